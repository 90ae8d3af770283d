"""Geometric transformation of images by band-limited resampling (Karras et al. 2020, ADA, appendix B).

An image is enlarged twice with the low-pass filter of a wavelet, sampled bilinearly where the transformation says, and
reduced twice with the same filter mirrored. The filters are orthonormal to their even shifts (sum_k h_k h_{k + 2 m} = 0
for m != 0), so enlarging and reducing alone give the image back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from torch_utils.ops.upfirdn2d import upfirdn2d

# Low-pass of the symlet with six vanishing moments: among the spectral factors of Daubechies' polynomial the one whose
# phase is nearest to linear (Daubechies, Ten Lectures on Wavelets, table 6.3). A test derives it anew.
SYM6_TAPS = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
HAAR_TAPS = (1.0, 1.0)
"""The one symmetric filter of that kind, and the one without negative taps."""

Margins = tuple[int, int, int, int]


class Resampler(NamedTuple):
    """A filter for enlarging and reducing twice."""

    fir: torch.Tensor
    """`[K]` or `[K, K]`, of sum 1, with K even."""
    centre: float
    """Where, in pixels of the enlarged image, the first pixel lies: 0.5 for a symmetric filter. Sym6 is not symmetric;
    its centre of mass is 0.4 before the middle, its peak 0.5. With the peak, flipped pixels meet pixels."""


SYM6_CENTRE, HAAR_CENTRE = 0.0, 0.5


class _GridSample(torch.autograd.Function):
    """`F.grid_sample` (bilinear, zeros outside, align_corners=False), for gradients of any order in the image alone.

    It is linear in the image, so that the derivative of the backward is the forward. Native double backward exists on
    some devices and releases of PyTorch only, and would compute the gradient of the grid, which is constant here.
    """

    @staticmethod
    def forward(ctx: Any, image: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = image.shape
        return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _GridSampleTransposed.apply(grad, grid, ctx.shape), None


class _GridSampleTransposed(torch.autograd.Function):
    """The transpose of `_GridSample`."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, grid: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.save_for_backward(grid)
        # Only the shape of the image matters, and its values for the gradient of the grid, which is not asked for.
        image = grad.new_empty(1).expand(shape)
        bilinear, zeros, align_corners = 0, 0, False
        return torch.ops.aten.grid_sampler_2d_backward(
            grad, image, grid, bilinear, zeros, align_corners, (True, False)
        )[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _GridSample.apply(grad, grid), None, None


def reflected(position: torch.Tensor, side: int, border: float) -> torch.Tensor:
    """Fold positions, in pixels, into [-0.5, side - 0.5] by reflection at the edges of the image.

    Positions up to `border` outside stay: there the enlarged image, which the filter makes a little different from its
    mirror image, is at hand. Without that an image would come back changed at its borders when nothing is done to it.
    """
    folded = side - ((position + 0.5).remainder(2 * side) - side).abs() - 0.5
    return torch.where((position < -border) | (position > side - 1 + border), folded, position)


def _pad_symmetric(x: torch.Tensor, width: int) -> torch.Tensor:
    """Enlarge images by `width` pixels on all sides, reflected at the edges (`F.pad` reflects at middles of pixels)."""
    for dim in (2, 3):
        side = x.shape[dim]
        x = torch.cat([x.narrow(dim, 0, width).flip(dim), x, x.narrow(dim, side - width, width).flip(dim)], dim)
    return x


def published_margins(inverse: torch.Tensor, size: tuple[int, int], taps: int) -> Margins:
    """Return by how many pixels (left, right, top, bottom) reflection has to enlarge images for what will be sampled.

    As far as the transformed corners of any image of the batch reach out, plus half of the filter's taps; at most
    the size minus 1, beyond which reflection of padding ends. Reads values, so it waits for the device.

    Args:
        inverse: `[B, 3, 3]`, see `resample`.
        size: (height, width).
        taps: taps of the filter.
    """
    half_y, half_x = ((side - 1) / 2 for side in size)
    reach_x = inverse[:, 0, 0].abs() * half_x + inverse[:, 0, 1].abs() * half_y
    reach_y = inverse[:, 1, 0].abs() * half_x + inverse[:, 1, 1].abs() * half_y
    x, y = inverse[:, 0, 2], inverse[:, 1, 2]
    reaches = ((reach_x - x, half_x), (reach_x + x, half_x), (reach_y - y, half_y), (reach_y + y, half_y))
    margins = [((reach.max() - half + taps // 2).ceil().clamp(0, 2 * half)) for reach, half in reaches]
    left, right, top, bottom = (int(margin) for margin in torch.stack(margins).tolist())
    return left, right, top, bottom


def resample(
    x: torch.Tensor, inverse: torch.Tensor, resampler: Resampler, margins: Margins | None = None
) -> torch.Tensor:
    """Transform the geometry of images.

    Differentiable in the images to any order, not in the transformation.

    Args:
        x: `[B, C, H, W]`.
        inverse: `[B, 3, 3]`, from places in the result to places in the image, both in pixels, x right and y down,
            with the middle of the image as origin.
        resampler: filter for enlarging and reducing.
        margins: None reflects the image at its edges for ever: positions outside are folded inside. Edges are at the
            same place for every size. Numbers of pixels (left, right, top, bottom) enlarge the image by reflection at
            the middles of its outermost pixels, with zeros beyond, as published; numbers that suffice depend on the
            transformation, so that a device has to be waited for.

    Returns:
        `[B, C, H, W]`.

    Raises:
        ValueError: for an image too small to be reflected.
    """
    taps = resampler.fir.shape[-1]
    # Reducing an image left in place reads the enlarged one up to `border` pixels outside (half a pixel for rounding),
    # and enlarging that much of it reads the image up to `support` pixels outside.
    border, support = taps // 4 + 0.5, taps // 2 + 1
    height, width = x.shape[-2:]
    if min(height, width) < support:
        raise ValueError(f"augmented image: expected sides of at least {support} pixels, got {(height, width)}")
    if margins is None:
        padded, left, top = _pad_symmetric(x, support), support, support
    else:
        padded = F.pad(F.pad(x, margins, mode="reflect"), (support,) * 4)
        left, top = margins[0] + support, margins[2] + support
    enlarged = upfirdn2d(padded, resampler.fir, up=2, gain=4)
    origin_x, origin_y = taps // 2 - 2 * left, taps // 2 - 2 * top  # of the pixels of `enlarged`
    place_x, place_y = _sampled_places(inverse.to(x.dtype), (height, width), taps, resampler.centre)  # [B, 2H+, 2W+]
    if margins is None:
        place_x, place_y = reflected(place_x, width, border), reflected(place_y, height, border)
    grid_x = _grid_coordinate(2 * place_x + resampler.centre - origin_x, enlarged.shape[3])
    grid_y = _grid_coordinate(2 * place_y + resampler.centre - origin_y, enlarged.shape[2])
    sampled = _GridSample.apply(enlarged, torch.stack([grid_x, grid_y], dim=-1))
    mirrored_fir = resampler.fir.flip(tuple(range(resampler.fir.ndim)))
    return upfirdn2d(sampled, mirrored_fir, down=2)


def _sampled_places(
    inverse: torch.Tensor, size: tuple[int, int], taps: int, centre: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and y, in pixels of the image, of all samples of the enlarged result and of the filter's support."""
    half_y, half_x = ((side - 1) / 2 for side in size)

    def axis(side: int) -> torch.Tensor:
        enlarged = torch.arange(1 - taps // 2, 2 * side - 1 + taps // 2, dtype=inverse.dtype, device=inverse.device)
        return (enlarged - centre) / 2 - (side - 1) / 2

    y, x = axis(size[0])[:, None], axis(size[1])[None, :]
    rows = inverse[:, :2, :, None, None]  # [B, 2, 3, 1, 1]
    placed = rows[:, :, 0] * x + rows[:, :, 1] * y + rows[:, :, 2]  # [B, 2, 2H - 2 + K, 2W - 2 + K]
    return placed[:, 0] + half_x, placed[:, 1] + half_y


def _grid_coordinate(index: torch.Tensor, size: int) -> torch.Tensor:
    """Turn pixel indices into coordinates of `F.grid_sample`."""
    return (2 * index + 1) / size - 1
