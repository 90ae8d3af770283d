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
        inplace: overwrite `x`, for callers that own it, and for whom its gradient needs only what it was computed
            from (a convolution, a sum). While gradients are recorded, activations other than linear and lrelu ignore
            it.

    Raises:
        ValueError: for an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    function, default_gain = ACTIVATIONS[activation]
    gain = gain * default_gain
    if bias is not None:
        bias = bias.to(x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))
    if torch.is_grad_enabled():
        saves_memory = activation == "lrelu" or (activation == "linear" and clamp is not None)
        if saves_memory and not torch.compiler.is_compiling():
            slope = LRELU_SLOPE if activation == "lrelu" else 1.0
            owned = inplace and x.requires_grad and not x.is_leaf and x._base is None
            return _PiecewiseLinear.apply(x, bias, slope, gain, clamp, owned)
        inplace = False
    if not inplace:
        x = x if bias is None else x + bias
        x = function(x)
        x = x * gain if gain != 1 else x
        return x.clamp(-clamp, clamp) if clamp is not None else x
    # Memory-bound at image sizes: in place saves a third of the traffic.
    x = x if bias is None else x.add_(bias)
    x = F.leaky_relu_(x, LRELU_SLOPE) if activation == "lrelu" else function(x)
    return _scale_and_clamp_(x, gain, clamp)


def _scale_and_clamp_(x: torch.Tensor, gain: float, clamp: float | None) -> torch.Tensor:
    x = x.mul_(gain) if gain != 1 else x
    return x.clamp_(-clamp, clamp) if clamp is not None else x


class _PiecewiseLinear(torch.autograd.Function):
    """`clamp(gain * lrelu(x + bias))`; remembers its result alone, whose signs and bounds tell the gradients."""

    @staticmethod
    def forward(ctx, x, bias, slope, gain, clamp, owned):
        ctx.options = slope, gain, clamp
        if owned:
            ctx.mark_dirty(x)
        if bias is None:
            out = x if owned else x.clone()
        else:
            out = x.add_(bias) if owned else x + bias
            ctx.bias_shape = bias.shape
        if slope != 1:
            out = F.leaky_relu_(out, slope)
        out = _scale_and_clamp_(out, gain, clamp)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        slope, gain, clamp = ctx.options
        out = ctx.saved_tensors[0].detach()  # almost everywhere, second derivatives are zero
        if clamp is not None:
            gradient = torch.ops.aten.hardtanh_backward(gradient, out, -clamp, clamp)
        if slope != 1:
            gradient = torch.ops.aten.leaky_relu_backward(
                gradient, out, slope, False
            )  # signs of input and result agree
        if gain != 1:
            gradient = gradient * gain
        of_bias = gradient.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[1] else None
        return gradient, of_bias, None, None, None, None
