"""Pinhole rays from camera poses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def sample_rays(
    cam2world: torch.Tensor, intrinsics: torch.Tensor, resolution: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rays through the pixel centres of a square image.

    Args:
        cam2world: `[B, 4, 4]`, camera axes x right, y down, z forward.
        intrinsics: `[B, 3, 3]`, normalised by the image size; skew is honoured.
        resolution: pixels per side.

    Returns:
        origins and unit directions in world space, each `[B, resolution^2, 3]`, pixels row by row.
    """
    fx, skew, cx = intrinsics[:, 0, 0, None], intrinsics[:, 0, 1, None], intrinsics[:, 0, 2, None]
    fy, cy = intrinsics[:, 1, 1, None], intrinsics[:, 1, 2, None]
    centers = (torch.arange(resolution, dtype=cam2world.dtype, device=cam2world.device) + 0.5) / resolution
    v, u = (grid.reshape(1, -1) for grid in torch.meshgrid(centers, centers, indexing="ij"))  # [1, R]
    y = (v - cy) / fy
    x = (u - cx - skew * y) / fx
    camera_directions = torch.stack([x, y, torch.ones_like(x)], dim=-1)  # [B, R, 3]
    directions = F.normalize(camera_directions @ cam2world[:, :3, :3].transpose(1, 2), dim=-1)
    return cam2world[:, None, :3, 3].expand_as(directions), directions


class RaySampler(nn.Module):
    """Module form of `sample_rays`, under the published name."""

    def forward(
        self, cam2world_matrix: torch.Tensor, intrinsics: torch.Tensor, resolution: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `sample_rays`."""
        return sample_rays(cam2world_matrix, intrinsics, resolution)
