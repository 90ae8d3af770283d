"""Decoder from plane features to raw density and colour features."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from torch_utils.ops.bias_act import LRELU_SLOPE
from training.config import DecoderActivation, DecoderConfig
from training.layers import FullyConnectedLayer

_HIDDEN_FEATURES = 64
_SIGMOID_MARGIN = 0.001  # mip-NeRF: lets the sigmoid reach 0 and 1


def widen_sigmoid_range(x: torch.Tensor) -> torch.Tensor:
    """Map [0, 1] to [-0.001, 1.001] (mip-NeRF)."""
    return x * (1 + 2 * _SIGMOID_MARGIN) - _SIGMOID_MARGIN


class DecoderWeights(NamedTuple):
    """What a decoder computes with: parameters times their learning-rate gains. U hidden units, O colour features."""

    hidden_weight: torch.Tensor
    """`[U, C]`."""
    hidden_bias: torch.Tensor
    """`[U]`."""
    output_weight: torch.Tensor
    """`[1 + O, U]`, density first."""
    output_bias: torch.Tensor
    """`[1 + O]`."""


def decode(
    features: torch.Tensor, weights: DecoderWeights, activation: DecoderActivation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map plane features `[..., C]` to raw density `[...]` and colour features `[..., O]`."""
    hidden = F.softplus(F.linear(features, weights.hidden_weight, weights.hidden_bias))
    out = F.linear(hidden, weights.output_weight, weights.output_bias)
    sigma, colors = out.split([1, out.shape[-1] - 1], dim=-1)
    if activation == "sigmoid":
        colors = widen_sigmoid_range(colors.sigmoid())
    elif activation == "lrelu":
        colors = F.leaky_relu(colors, LRELU_SLOPE) * math.sqrt(2)
    return sigma.squeeze(-1), colors


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

    def weights(self) -> DecoderWeights:
        """Return what the decoder computes with."""
        first, last = self.net[0], self.net[2]
        return DecoderWeights(
            first.weight * first.weight_gain,
            first.bias * first.bias_gain,
            last.weight * last.weight_gain,
            last.bias * last.bias_gain,
        )

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map `[..., in]` to raw density `[...]` and colour features `[..., out]`."""
        return decode(features, self.weights(), self.activation)
