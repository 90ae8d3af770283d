"""Ray geometry."""

from __future__ import annotations

import torch


def intersect_box(
    ray_origins: torch.Tensor, ray_directions: torch.Tensor, box_side: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Intersect rays with the cube of side `box_side` around the origin (slab method).

    Args:
        ray_origins: `[B, R, 3]`.
        ray_directions: `[B, R, 3]`, unit length.
        box_side: in world units.

    Returns:
        near and far distances, each `[B, R, 1]`; (-1, -2) for rays that miss.
    """
    half = box_side / 2
    # A ray parallel to a slab is inside it all the way or not at all. Its limits do not come from 1 / 0, whose gradient
    # would be NaN.
    parallel, inside = ray_directions == 0, ray_origins.abs() <= half
    inverse = 1 / torch.where(parallel, 1, ray_directions)
    first, second = (-half - ray_origins) * inverse, (half - ray_origins) * inverse
    near, far = torch.minimum(first, second), torch.maximum(first, second)
    for mask, sign in ((parallel & inside, 1), (parallel & ~inside, -1)):
        near, far = near.masked_fill(mask, -sign * torch.inf), far.masked_fill(mask, sign * torch.inf)
    near, far = near.amax(dim=-1, keepdim=True), far.amin(dim=-1, keepdim=True)
    hit = near <= far
    return near.masked_fill(~hit, -1), far.masked_fill(~hit, -2)
