"""2-D convolution joined with FIR resampling by two (StyleGAN2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from torch_utils.ops.upfirdn2d import downsample2d, upfirdn2d, upsample2d


def conv2d_resample(
    x: torch.Tensor,
    weight: torch.Tensor,
    fir: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> torch.Tensor:
    """Convolve, with upsampling or downsampling by two through the filter `fir`.

    Args:
        x: features `[B, I, H, W]`.
        weight: `[O, I / groups, k, k]`, `k` 1 or 3.
        fir: `[4, 4]` filter; needed where `up` or `down` is 2.
        up: 1 or 2. At 2 and k = 3 the kernel acts as a true convolution on the zero-stuffed image, that is, flipped
            with respect to the other cases; published weights were trained so.
        down: 1 or 2.
        padding: zeros around the image, `k // 2` for the same size.
        groups: as in `torch.nn.functional.conv2d`.

    Returns:
        `[B, O, H * up / down, W * up / down]` for `padding = k // 2`.
    """
    if up not in (1, 2) or down not in (1, 2) or up * down == 4:
        raise ValueError(f"conv2d_resample: expected up and down of 1 or 2, not both 2; got up={up}, down={down}")
    large = x.shape[2] * x.shape[3] > weight[:, 0].numel()  # else converting the weights takes longer than it saves
    if large:
        x = _order_for_speed(x)
    if up == down == 1:
        return F.conv2d(x, weight, padding=padding, groups=groups)
    if fir is None:
        raise ValueError("conv2d_resample: resampling needs a filter, got None")
    if weight.shape[-1] == 1:
        if down == 2:
            return F.conv2d(downsample2d(x, fir), weight, groups=groups)
        return upsample2d(F.conv2d(x, weight, groups=groups), fir)
    if down == 2:
        pad = padding + (fir.shape[-1] - 1) // 2
        return F.conv2d(upfirdn2d(x, fir, padding=pad), weight, stride=2, groups=groups)
    weight = _swap_in_out(weight, groups)
    if large:
        weight = _order_for_speed(weight)
    x = F.conv_transpose2d(x, weight, stride=2, groups=groups)
    pad = padding + (fir.shape[-1] - 4) // 2
    return upfirdn2d(x, fir, padding=pad, gain=4.0)


def _order_for_speed(x: torch.Tensor) -> torch.Tensor:
    """Put the channels of `[B, C, H, W]` last in memory for inference on a CPU; elsewhere return `x` as it is.

    There it halves the time of transposed convolutions and of filters at image sizes. Convolutions keep the order that
    they find, so a network converts once. Their gradients are slower in this order, therefore not in training.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _swap_in_out(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Turn `[O, I / groups, k, k]` into the `[I, O / groups, k, k]` that transposed convolution wants."""
    if groups == 1:
        return weight.transpose(0, 1)
    outputs, inputs, *kernel = weight.shape
    weight = weight.reshape(groups, outputs // groups, inputs, *kernel).transpose(1, 2)
    return weight.reshape(groups * inputs, outputs // groups, *kernel)
