"""Quadrature of the volume rendering integral over the midpoints of samples (mip-NeRF style)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_DENSITY_SHIFT = -1.0  # softplus(sigma - 1): an untrained network then starts nearly transparent
_TRANSMITTANCE_EPS = 1e-10


def midpoints(x: torch.Tensor) -> torch.Tensor:
    """Average neighbours along the last axis: `[..., S]` to `[..., S - 1]`."""
    return (x[..., :-1] + x[..., 1:]) / 2


def render_weight_from_density(sigma: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    """Return the weight of each interval between samples.

    With `d_i = t_{i+1} - t_i` and `s_i` the mean raw density of the interval's ends:
    `alpha_i = 1 - exp(-softplus(s_i - 1) d_i)` and `w_i = alpha_i prod_{j<i} (1 - alpha_j + 1e-10)`.

    Args:
        sigma: raw densities `[B, R, S]`, in the order of `depths`.
        depths: ascending `[B, R, S]`.

    Returns:
        `[B, R, S - 1]`, non-negative, summing to at most 1.
    """
    deltas = depths[..., 1:] - depths[..., :-1]
    alpha = 1 - torch.exp(-F.softplus(midpoints(sigma) + _DENSITY_SHIFT) * deltas)
    survival = F.pad(1 - alpha[..., :-1] + _TRANSMITTANCE_EPS, (1, 0), value=1.0)
    return alpha * survival.cumprod(dim=-1)


def sample_weights_from_intervals(weights: torch.Tensor) -> torch.Tensor:
    """Distribute interval weights `[..., S - 1]` to the samples `[..., S]` at their ends.

    Compositing midpoint features with `weights` is compositing sample features with the result.
    """
    return midpoints(F.pad(weights, (1, 1)))


def expected_depth(weights: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    """Return the mean depth `[B, R]` of interval weights `[B, R, S - 1]` at depths `[B, R, S]`; 0 without weight."""
    accumulation = weights.sum(dim=-1)
    return (weights * midpoints(depths)).sum(dim=-1) / torch.where(accumulation > 0, accumulation, 1)


def limit_depth(
    expected: torch.Tensor, accumulation: torch.Tensor, depth_range: torch.Tensor, clamp: str
) -> torch.Tensor:
    """Limit depths `[B, R]` to a sampled range; a ray without weight gets the far end.

    Args:
        expected: from `expected_depth`.
        accumulation: sum of weights `[B, R]`.
        depth_range: first and last sample of each ray `[B, R, 2]`; no gradient flows to it.
        clamp: 'ray' limits depths to the range of their own ray; 'batch' to that of all rays together, as published.
    """
    near, far = depth_range.detach().unbind(dim=-1)
    if clamp == "batch":
        near, far = near.amin(), far.amax()
    return torch.where(accumulation > 0, expected, far).clamp(near, far)
