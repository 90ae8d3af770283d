"""Style-modulated convolution (StyleGAN2, Karras et al. 2020), and the whole layer around it."""

from __future__ import annotations

import math

import torch

from torch_utils.ops import conv2d_native
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.conv3x3 import conv3x3
from torch_utils.ops.upsample_bias import upsample_bias

_NORM_EPS = 1e-8
_FEWEST_PIXELS = 32 * 32  # of images whose layers are worth transformed weights: memory, and time of the first call


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
    large = x.shape[2] * x.shape[3] >= _FEWEST_PIXELS
    if large and not _records_gradients(x, weight, styles, noise, bias) and conv2d_native.supported(x, weight, up):
        tail = {"bias": bias, "activation": activation, "gain": gain, "clamp": clamp}
        return conv2d_native.modulated_conv3x3(x, weight, styles, up=up, fir=fir, noise=noise, **tail)
    x = modulated_conv2d(x, weight, styles, noise=noise, fir=fir, up=up, fused=fused)
    return bias_act(x, bias, activation, gain=gain, clamp=clamp, inplace=True)


def modulated_to_image(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    bias: torch.Tensor,
    *,
    image: torch.Tensor | None = None,
    fir: torch.Tensor | None = None,
    up: int = 1,
    clamp: float | None = None,
    fused: bool = True,
) -> torch.Tensor:
    """Add `bias_act(modulated_conv2d(x, weight, styles, demodulate=False), bias)` to the image stream (ToRGB).

    In inference on a CPU this is a matrix product for every image, which accumulates onto the upsampled image.

    Args:
        x: features `[B, I, H, W]`.
        weight: `[O, I, 1, 1]`.
        styles: `[B, I]` in the dtype of the parameters.
        bias: `[O]`.
        image: `[B, O, H / up, W / up]`, to add to; None begins the stream.
        fir: resampling filter, where `up` is 2.
        up: 1 or 2.
        clamp: bound of the absolute value of what is added.
        fused: as of `modulated_conv2d`.

    Returns:
        `[B, O, H, W]` in the dtype of the parameters.
    """
    if x.device.type == "cpu" and x.dtype == weight.dtype and not torch.is_grad_enabled():
        return _accumulate_image(x, weight, styles, bias, image, fir, up, clamp)
    rgb = modulated_conv2d(x, weight, styles, demodulate=False, fused=fused)
    rgb = bias_act(rgb, bias, clamp=clamp, inplace=True).to(weight.dtype)
    if image is None:
        return rgb
    return add_owned(rgb, upsample_bias(image, fir) if up == 2 else image)


def _accumulate_image(x, weight, styles, bias, image, fir, up, clamp):
    """Compute `modulated_to_image` in memory of its own, channels last."""
    adds = image is not None and up == 2 and clamp is None  # otherwise the product comes first
    if adds:
        out = upsample_bias(image, fir, bias).contiguous(memory_format=torch.channels_last)
        pixels = _as_pixels(out)
    else:
        pixels = bias.expand(x.shape[0], x.shape[2] * x.shape[3], -1).clone()  # [B, H W, O]
    x = x.contiguous(memory_format=torch.channels_last)
    pixels.baddbmm_(_as_pixels(x), styles[:, :, None] * weight.flatten(1).T)  # [B, I, O]
    if adds:
        return out
    pixels = pixels if clamp is None else pixels.clamp_(-clamp, clamp)
    if image is not None:
        pixels.add_(_as_pixels(upsample_bias(image, fir) if up == 2 else image))
    return pixels.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def _as_pixels(x: torch.Tensor) -> torch.Tensor:
    """View `[B, C, H, W]`, channels last in memory, as `[B, H W, C]`."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


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
    if fused and (x.device.type != "cpu" or (batch == 1 and not _is_small(x, weight, up))):
        scales = styles[:, None] if scale is None else scale[:, :, None] * styles[:, None]  # [B, O or 1, I]
        weights = weight * scales[..., None, None]  # [B, O, I, k, k]
        if batch > 1:
            x = x.reshape(1, batch * in_channels, *x.shape[2:])
        x = conv2d_resample(x, weights.flatten(0, 1).to(x.dtype), fir, up=up, padding=padding, groups=batch)
        if batch > 1:
            x = x.reshape(batch, -1, *x.shape[2:])
    else:
        x = x * styles.to(x.dtype)[:, :, None, None]
        if up == 1 and kernel_size == 3:
            x = conv3x3(x, weight.to(x.dtype))
        else:
            x = conv2d_resample(x, weight.to(x.dtype), fir, up=up, padding=padding)
        if scale is not None:
            x = x * scale.to(x.dtype)[:, :, None, None]
    return x if noise is None else add_owned(x, noise.to(x.dtype))


def _is_small(x: torch.Tensor, weight: torch.Tensor, up: int) -> bool:
    """Whether it is cheaper to scale the activations than the weights; so it is, on a CPU, for groups of channels."""
    out_channels, in_channels, *_ = weight.shape
    return x.shape[2] * x.shape[3] * (in_channels + out_channels * up**2) < weight.numel()


def add_owned(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return `x + y`; overwrites `x`, which the caller must own, unless gradients are recorded."""
    return x + y if torch.is_grad_enabled() else x.add_(y)
