"""Where along the rays the field is evaluated: stratified depths, then importance sampling (NeRF, section 5.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from training.config import RenderingConfig
from training.volumetric_rendering.math_utils import intersect_box

_WEIGHT_FLOOR = 0.01  # keeps some samples in regions that the coarse pass saw as empty
_PDF_EPS = 1e-5
_MIN_RELATIVE_DISPARITY = 0.1  # few samples over a wide range: jitter would carry the last one through infinity


def ray_limits(
    ray_origins: torch.Tensor, ray_directions: torch.Tensor, config: RenderingConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distances `[B, R]` between which each ray is sampled.

    With 'auto' limits they come from the box, and rays that miss it take those of the whole batch.

    Differs from the published code, unless `auto_range_of_misses` says so: where all rays miss, they have no length
    (instead of running backwards).

    Args:
        ray_origins: `[B, R, 3]`.
        ray_directions: `[B, R, 3]`, unit length.
        config: limits.
    """
    if not config.auto_range:
        shape = ray_origins.shape[:-1]
        return ray_origins.new_full(shape, config.ray_start), ray_origins.new_full(shape, config.ray_end)
    near, far = (x.squeeze(-1) for x in intersect_box(ray_origins, ray_directions, config.box_warp))
    hit = far > near
    as_published = config.auto_range_of_misses == "nearest"
    # Without looking at the values, for which a GPU would have to be waited for.
    nearest = near.masked_fill(~hit, torch.inf).amin()
    farthest = (near if as_published else far).masked_fill(~hit, -torch.inf).amax()
    none_hit = ~hit.any()
    near_of_misses = torch.where(none_hit, near if as_published else 0, nearest)
    far_of_misses = torch.where(none_hit, far if as_published else 0, farthest)
    return torch.where(hit, near, near_of_misses), torch.where(hit, far, far_of_misses)


def stratified_depths(
    near: torch.Tensor, far: torch.Tensor, jitter: torch.Tensor, config: RenderingConfig
) -> torch.Tensor:
    """Return coarse depths `[B, R, S]`, ascending.

    The jitter only moves samples away from the camera, by up to one interval; the last one may lie behind `far`.

    Args:
        near: `[B, R]`, from `ray_limits`.
        far: `[B, R]`.
        jitter: uniform numbers `[B, R, S]` in [0, 1).
        config: spacing.
    """
    num_samples = config.depth_resolution
    steps = torch.linspace(0, 1, num_samples, dtype=jitter.dtype, device=jitter.device)
    fractions = steps + jitter / (num_samples - 1)  # [B, R, S]
    near, far = near.unsqueeze(-1), far.unsqueeze(-1)
    if config.disparity_space_sampling and not config.auto_range:
        disparity = (1 - fractions) / near + fractions / far
        return 1 / torch.maximum(disparity, _MIN_RELATIVE_DISPARITY / far)
    return near + (far - near) * fractions


def importance_depths(depths: torch.Tensor, weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw depths `[B, R, F]` from the smoothed weights of a coarse pass; no gradient flows through them.

    Weights are max-filtered and averaged over neighbours (mip-NeRF, section 3.4), floored, and inverted as a
    histogram over the midpoints between coarse depths. As published, the histogram has one bin less than there are
    midpoints, so nothing is drawn from the last one.

    Args:
        depths: coarse depths `[B, R, S]`, S >= 4.
        weights: coarse weights `[B, R, S - 1]`.
        uniforms: numbers `[B, R, F]` in [0, 1).
    """
    with torch.no_grad():
        left, right = F.pad(weights, (1, 0), value=-torch.inf), F.pad(weights, (0, 1), value=-torch.inf)
        blurred = torch.maximum(left, right)  # [B, R, S]
        smoothed = (blurred[..., :-1] + blurred[..., 1:]) / 2 + _WEIGHT_FLOOR
        bins = (depths[..., :-1] + depths[..., 1:]) / 2  # [B, R, S - 1]
        return sample_pdf(bins, smoothed[..., 1:-1], uniforms)


def sample_pdf(bins: torch.Tensor, weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Invert the piecewise linear cdf of a histogram.

    Args:
        bins: bin edges `[..., K + 2]`; the last is not used.
        weights: non-negative `[..., K]`; weight k belongs to the bin from edge k to edge k + 1.
        uniforms: `[..., F]` in [0, 1).

    Returns:
        samples `[..., F]`.
    """
    pdf = weights + _PDF_EPS
    pdf = pdf / pdf.sum(dim=-1, keepdim=True)
    cdf = F.pad(pdf.cumsum(dim=-1), (1, 0))  # [..., K + 1]
    above = torch.searchsorted(cdf, uniforms.contiguous(), right=True)
    lower, upper = (above - 1).clamp(min=0), above.clamp(max=weights.shape[-1])
    cdf_lower, cdf_upper = cdf.gather(-1, lower), cdf.gather(-1, upper)
    bin_lower, bin_upper = bins.gather(-1, lower), bins.gather(-1, upper)
    span = cdf_upper - cdf_lower
    span = torch.where(span < _PDF_EPS, 1, span)
    return bin_lower + (uniforms - cdf_lower) / span * (bin_upper - bin_lower)
