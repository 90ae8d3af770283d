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


def composite_depth(weights: torch.Tensor, depths: torch.Tensor, clamp: str) -> torch.Tensor:
    """Return the expected depth `[B, R]` of the intervals; a ray without weight gets the far end of its range.

    Args:
        weights: interval weights `[B, R, S - 1]`.
        depths: ascending `[B, R, S]`.
        clamp: 'ray' limits depths to the range of their own ray; 'batch' to that of all rays together, as published.
    """
    accumulation = weights.sum(dim=-1)
    hit = accumulation > 0
    expected = (weights * midpoints(depths)).sum(dim=-1) / torch.where(hit, accumulation, 1)
    near, far = depths[..., 0].detach(), depths[..., -1].detach()
    if clamp == "batch":
        near, far = near.min(), far.max()
    return torch.where(hit, expected, far).clamp(near, far)
