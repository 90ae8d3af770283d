"""Layers that generator and discriminator share (Karras et al. 2020), with equalised learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.upfirdn2d import setup_filter

RESAMPLE_TAPS = (1, 3, 3, 1)
_NORM_EPS = 1e-8


def normalize_2nd_moment(x: torch.Tensor) -> torch.Tensor:
    """Scale the rows of `[B, F]` to unit mean square."""
    return x * (x.square().mean(dim=1, keepdim=True) + _NORM_EPS).rsqrt()


def modulated_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    fir: torch.Tensor | None = None,
    up: int = 1,
    demodulate: bool = True,
    fused: bool = True,
) -> torch.Tensor:
    """Convolve each sample with weights scaled by its styles (StyleGAN2, eq. 1 and 3).

    Args:
        x: features `[B, I, H, W]`.
        weight: `[O, I, k, k]`.
        styles: `[B, I]` in the dtype of the parameters.
        noise: `[B, 1, H', W']` or `[H', W']`, added to the result.
        fir: resampling filter, where `up` is 2.
        up: 1 or 2.
        demodulate: scale each output channel's weights to unit norm.
        fused: one grouped convolution with per-sample weights instead of scaling activations; same result.

    Returns:
        `[B, O, H * up, W * up]` in the dtype of `x`.
    """
    batch, in_channels, kernel_size = x.shape[0], weight.shape[1], weight.shape[-1]
    if demodulate and x.dtype == torch.float16:
        # Demodulation cancels both scales; they keep half precision from overflowing.
        weight = weight * (1 / math.sqrt(in_channels * kernel_size**2) / weight.abs().amax(dim=(1, 2, 3), keepdim=True))
        styles = styles / styles.abs().amax(dim=1, keepdim=True)

    scale = None
    if demodulate:
        # A matrix product, because sums over the few elements of each kernel are slow.
        energy = styles.square().repeat_interleave(kernel_size**2, dim=1) @ weight.square().flatten(1).T  # [B, O]
        scale = (energy + _NORM_EPS).rsqrt()

    padding = kernel_size // 2
    if fused and (batch == 1 or x.device.type != "cpu"):  # on a CPU, grouped convolutions are slower than scaling
        scales = styles[:, None] if scale is None else scale[:, :, None] * styles[:, None]  # [B, O or 1, I]
        weights = weight * scales[..., None, None]  # [B, O, I, k, k]
        if batch > 1:
            x = x.reshape(1, batch * in_channels, *x.shape[2:])
        x = conv2d_resample(x, weights.flatten(0, 1).to(x.dtype), fir, up=up, padding=padding, groups=batch)
        if batch > 1:
            x = x.reshape(batch, -1, *x.shape[2:])
    else:
        x = x * styles.to(x.dtype)[:, :, None, None]
        x = conv2d_resample(x, weight.to(x.dtype), fir, up=up, padding=padding)
        if scale is not None:
            x = x * scale.to(x.dtype)[:, :, None, None]
    return x if noise is None else add_owned(x, noise.to(x.dtype))


def add_owned(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return `x + y`; overwrites `x`, which the caller must own, unless gradients are recorded."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


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
        x = conv2d_resample(x, weight, self.resample_filter, up=self.up, down=self.down, padding=self.padding)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(x, self.bias, self.activation, gain=gain, clamp=clamp, inplace=True)
