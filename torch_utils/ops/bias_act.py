"""Bias, activation, gain and clamp: the tail of every StyleGAN2 layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

LRELU_SLOPE = 0.2


class Activation(NamedTuple):
    """An activation function and the gain that keeps its output at unit variance for normal input."""

    function: Callable[[torch.Tensor], torch.Tensor]
    default_gain: float


ACTIVATIONS: dict[str, Activation] = {
    "linear": Activation(lambda x: x, 1.0),
    "relu": Activation(F.relu, math.sqrt(2)),
    "lrelu": Activation(lambda x: F.leaky_relu(x, LRELU_SLOPE), math.sqrt(2)),
    "tanh": Activation(torch.tanh, 1.0),
    "sigmoid": Activation(torch.sigmoid, 1.0),
    "elu": Activation(F.elu, 1.0),
    "selu": Activation(F.selu, 1.0),
    "softplus": Activation(F.softplus, 1.0),
    "swish": Activation(F.silu, math.sqrt(2)),
}


def bias_act(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "linear",
    gain: float = 1.0,
    clamp: float | None = None,
    inplace: bool = False,
) -> torch.Tensor:
    """Compute `clamp(gain * default_gain * act(x + bias), -clamp, +clamp)`.

    Args:
        x: features `[B, C, ...]`.
        bias: `[C]`, added along axis 1; None adds nothing.
        activation: a name of `ACTIVATIONS`.
        gain: factor on top of the activation's own default gain.
        clamp: bound of the result's absolute value, in the scale of the result; None does not clamp.
        inplace: overwrite `x`, for callers that own it; ignored while gradients are recorded.

    Raises:
        ValueError: for an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    function, default_gain = ACTIVATIONS[activation]
    gain = gain * default_gain
    if bias is not None:
        bias = bias.to(x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))
    if not inplace or torch.is_grad_enabled():
        x = x if bias is None else x + bias
        x = function(x)
        x = x * gain if gain != 1 else x
        return x.clamp(-clamp, clamp) if clamp is not None else x
    # Memory-bound at image sizes: in place saves a third of the traffic.
    x = x if bias is None else x.add_(bias)
    x = F.leaky_relu_(x, LRELU_SLOPE) if activation == "lrelu" else function(x)
    x = x.mul_(gain) if gain != 1 else x
    return x.clamp_(-clamp, clamp) if clamp is not None else x
