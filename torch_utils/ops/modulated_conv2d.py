"""Style-modulated convolution (StyleGAN2, Karras et al. 2020), and the whole layer around it."""

from __future__ import annotations

import math

import torch

from torch_utils.ops import conv2d_native
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.conv2d_resample import conv2d_resample

_NORM_EPS = 1e-8


def modulated_layer(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    fir: torch.Tensor | None = None,
    up: int = 1,
    fused: bool = True,
    bias: torch.Tensor | None = None,
    activation: str = "linear",
    gain: float = 1.0,
    clamp: float | None = None,
) -> torch.Tensor:
    """Compute `bias_act(modulated_conv2d(x, weight, styles, ...), bias, ...)`, a layer of the synthesis network.

    Where a native kernel is faster, it does all of that (see `conv2d_native.modulated_conv3x3`): in inference on a CPU,
    in float32. Its results differ by less than 1e-5 of the largest one.

    Args: as of `modulated_conv2d` and `bias_act`. `weight` should be the parameter itself: what the kernel makes of it
    is kept for the next call.
    """
    if not _records_gradients(x, weight, styles, noise, bias) and conv2d_native.supported(x, weight, up):
        tail = {"bias": bias, "activation": activation, "gain": gain, "clamp": clamp}
        return conv2d_native.modulated_conv3x3(x, weight, styles, up=up, fir=fir, noise=noise, **tail)
    x = modulated_conv2d(x, weight, styles, noise=noise, fir=fir, up=up, fused=fused)
    return bias_act(x, bias, activation, gain=gain, clamp=clamp, inplace=True)


def _records_gradients(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


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
