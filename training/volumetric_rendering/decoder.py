"""Decoder from plane features to raw density and colour features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from torch_utils.ops.bias_act import LRELU_SLOPE
from training.config import DecoderConfig
from training.layers import FullyConnectedLayer

_HIDDEN_FEATURES = 64
_SIGMOID_MARGIN = 0.001  # mip-NeRF: lets the sigmoid reach 0 and 1


def widen_sigmoid_range(x: torch.Tensor) -> torch.Tensor:
    """Map [0, 1] to [-0.001, 1.001] (mip-NeRF)."""
    return x * (1 + 2 * _SIGMOID_MARGIN) - _SIGMOID_MARGIN


class OSGDecoder(nn.Module):
    """Two-layer decoder (EG3D)."""

    def __init__(self, in_features: int, out_features: int, config: DecoderConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.net = nn.Sequential(
            FullyConnectedLayer(in_features, _HIDDEN_FEATURES, lr_multiplier=config.lr_multiplier),
            nn.Softplus(),
            FullyConnectedLayer(_HIDDEN_FEATURES, 1 + out_features, lr_multiplier=config.lr_multiplier),
        )

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map `[..., in]` to raw density `[...]` and colour features `[..., out]`."""
        sigma, colors = self.net(features).split([1, self.net[2].weight.shape[0] - 1], dim=-1)
        if self.activation == "sigmoid":
            colors = widen_sigmoid_range(colors.sigmoid())
        elif self.activation == "lrelu":
            colors = F.leaky_relu(colors, LRELU_SLOPE) * math.sqrt(2)
        return sigma.squeeze(-1), colors
