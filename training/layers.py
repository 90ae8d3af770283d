"""Layers that generator and discriminator share (Karras et al. 2020), with equalised learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.conv3x3 import conv3x3
from torch_utils.ops.upfirdn2d import setup_filter

RESAMPLE_TAPS = (1, 3, 3, 1)
_NORM_EPS = 1e-8


def normalize_2nd_moment(x: torch.Tensor) -> torch.Tensor:
    """Scale the rows of `[B, F]` to unit mean square."""
    return x * (x.square().mean(dim=1, keepdim=True) + _NORM_EPS).rsqrt()


class FullyConnectedLayer(nn.Module):
    """Equalised-learning-rate linear layer with activation."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], float(bias_init))) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, in]` to `[B, out]`."""
        weight = self.weight.to(x.dtype) * self.weight_gain
        bias = None
        if self.bias is not None:
            bias = self.bias.to(x.dtype) * self.bias_gain
        if self.activation == "linear":
            return torch.nn.functional.linear(x, weight, bias)
        return bias_act(x @ weight.T, bias, self.activation, inplace=True)


class Conv2dLayer(nn.Module):
    """Equalised-learning-rate convolution with resampling and activation.

    With `trainable` off (Freeze-D) weight and bias are buffers of the same names.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: str = "linear",
        up: int = 1,
        down: int = 1,
        resample_taps: Sequence[float] = RESAMPLE_TAPS,
        conv_clamp: float | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        self.activation, self.up, self.down, self.conv_clamp = activation, up, down, conv_clamp
        self.register_buffer("resample_filter", setup_filter(resample_taps))
        self.padding = kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        weight = torch.randn(out_channels, in_channels, kernel_size, kernel_size)
        bias_value = torch.zeros(out_channels) if bias else None
        if trainable:
            self.weight = nn.Parameter(weight)
            self.bias = None if bias_value is None else nn.Parameter(bias_value)
        else:
            self.register_buffer("weight", weight)
            self.register_buffer("bias", bias_value)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        """Map `[B, in, H, W]` to `[B, out, H * up / down, W * up / down]`; `gain` scales result and clamp."""
        weight = (self.weight * self.weight_gain).to(x.dtype)
        if self.up == self.down == self.padding == 1:
            x = conv3x3(x, weight)
        else:
            x = conv2d_resample(x, weight, self.resample_filter, up=self.up, down=self.down, padding=self.padding)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(x, self.bias, self.activation, gain=gain, clamp=clamp, inplace=True)
