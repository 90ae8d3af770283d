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
    inverse = 1 / ray_directions  # infinite for a ray parallel to a slab: its limits are then infinite too
    first, second = (-half - ray_origins) * inverse, (half - ray_origins) * inverse
    near = torch.minimum(first, second).amax(dim=-1, keepdim=True)
    far = torch.maximum(first, second).amin(dim=-1, keepdim=True)
    hit = near <= far
    return near.masked_fill(~hit, -1), far.masked_fill(~hit, -2)
