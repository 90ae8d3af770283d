"""FIR resampling of images: zero-stuff, pad, filter, decimate (StyleGAN2, Karras et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

_SEPARABLE_MIN_TAPS = 8  # shorter prepared filters are stored as their 2-D outer product


def setup_filter(taps: Sequence[float] | torch.Tensor, gain: float = 1.0, normalize: bool = True) -> torch.Tensor:
    """Prepare filter taps for the functions of this module.

    Args:
        taps: 1-D or 2-D taps. Fewer than 8 one-dimensional taps become their outer product.
        gain: total gain of the two-dimensional filter.
        normalize: divide by the sum of the taps.

    Returns:
        float32 filter, `[K, K]`, or `[K]` for a separable filter of 8 or more taps.
    """
    fir = torch.as_tensor(taps, dtype=torch.float32)
    if fir.ndim not in (1, 2) or fir.numel() == 0:
        raise ValueError(f"filter taps: expected a non-empty 1-D or 2-D array, got shape {tuple(fir.shape)}")
    if fir.ndim == 1 and fir.numel() < _SEPARABLE_MIN_TAPS:
        fir = fir.outer(fir)
    if normalize:
        fir = fir / fir.sum()
    return fir * gain ** (fir.ndim / 2)


def upfirdn2d(
    x: torch.Tensor,
    fir: torch.Tensor | None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = 1.0,
) -> torch.Tensor:
    """Upsample by zero-stuffing, pad, convolve with `fir` on every channel, keep every `down`-th sample.

    Args:
        x: images `[B, C, H, W]`.
        fir: `[K, K]`, or `[K]` to filter both axes one after the other; None is the identity.
        up: integer factor of zero-stuffing; zeros follow every sample, the last one too.
        down: integer decimation, starting at index 0.
        padding: zeros `(x0, x1, y0, y1)`, or one number for all sides; negative numbers crop.
        gain: factor of the result.

    Returns:
        `[B, C, H', W']` with `H' = (H * up + y0 + y1 - K) // down + 1`.
    """
    x0, x1, y0, y1 = (padding,) * 4 if isinstance(padding, int) else padding
    batch, channels, height, width = x.shape
    if up > 1 and fir is not None and fir.ndim == 2 and x.device.type == "cpu":
        crop = (fir.shape[1] - 1 - x0, fir.shape[1] - up - x1, fir.shape[0] - 1 - y0, fir.shape[0] - up - y1)
        if min(crop) >= 0:
            return _convolve_upsampled(x, fir * gain, up, crop)[:, :, ::down, ::down]
    if up > 1:
        x = x.reshape(batch, channels, height, 1, width, 1)
        x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1))
        x = x.reshape(batch, channels, height * up, width * up)
    if min(x0, x1, y0, y1) < 0:  # the convolution can pad, but not crop
        x = F.pad(x, (x0, x1, y0, y1))
        x0 = x1 = y0 = y1 = 0
    elif x0 != x1 or y0 != y1:
        x = F.pad(x, (x0, x1, y0, y1))
        x0 = y0 = 0
    if fir is None:
        x = F.pad(x, (x0, x0, y0, y0))
        return x[:, :, ::down, ::down] * gain
    # Correlation with the flipped filter is a true convolution.
    if fir.ndim == 2:
        weight = (fir * gain).flip((0, 1)).to(x.dtype)[None, None].expand(channels, 1, -1, -1)
        return F.conv2d(x, weight, stride=down, padding=(y0, x0), groups=channels)
    weight = (fir * gain**0.5).flip(0).to(x.dtype)[None, None].expand(channels, 1, -1)
    x = F.conv2d(x, weight.unsqueeze(2), stride=(1, down), padding=(0, x0), groups=channels)
    return F.conv2d(x, weight.unsqueeze(3), stride=(down, 1), padding=(y0, 0), groups=channels)


def _convolve_upsampled(x: torch.Tensor, fir: torch.Tensor, up: int, crop: tuple[int, int, int, int]) -> torch.Tensor:
    """Convolve the zero-stuffed image with `fir` and crop `(left, right, top, bottom)`, several times faster on a CPU.

    A transposed convolution does not multiply by the zeros.
    """
    left, right, top, bottom = crop
    weight = fir.to(x.dtype)[None, None].expand(x.shape[1], 1, -1, -1)
    x = F.conv_transpose2d(x, weight, stride=up, groups=x.shape[1])
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]


def filter2d(x: torch.Tensor, fir: torch.Tensor, padding: int = 0, gain: float = 1.0) -> torch.Tensor:
    """Filter images `[B, C, H, W]`, keeping their size when `padding` is 0 (zeros outside)."""
    taps = fir.shape[-1]
    before, after = padding + taps // 2, padding + (taps - 1) // 2
    return upfirdn2d(x, fir, padding=(before, after, before, after), gain=gain)


def upsample2d(x: torch.Tensor, fir: torch.Tensor, up: int = 2, padding: int = 0, gain: float = 1.0) -> torch.Tensor:
    """Upsample images `[B, C, H, W]` by `up`; constant regions keep their value, borders fade towards zero."""
    taps = fir.shape[-1]
    before, after = padding + (taps + up - 1) // 2, padding + (taps - up) // 2
    return upfirdn2d(x, fir, up=up, padding=(before, after, before, after), gain=gain * up**2)


def downsample2d(
    x: torch.Tensor, fir: torch.Tensor, down: int = 2, padding: int = 0, gain: float = 1.0
) -> torch.Tensor:
    """Downsample images `[B, C, H, W]` by `down`."""
    taps = fir.shape[-1]
    before, after = padding + (taps - down + 1) // 2, padding + (taps - down) // 2
    return upfirdn2d(x, fir, down=down, padding=(before, after, before, after), gain=gain)
