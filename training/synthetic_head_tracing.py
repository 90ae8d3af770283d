"""Trace rays to the surfaces of synthetic heads: cones for blocks of pixels first, then cones of pixels, then rays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from camera_utils import split_label
from training.synthetic_head_geometry import BOX, HeadField, Points, length

BLOCKS = (8, 4)  # sides, in pixels, of the blocks that share a cone, one after the other
_RELAX = 0.9  # share of the estimated distance that is walked: unions and bumps are no exact distances
_STEPS_PER_ROUND = 2  # between two rounds, rays that have arrived are left out
_CONE_ROUNDS = 6
_RAY_ROUNDS = 16  # grazing rays need the most; what has not arrived then counts as a miss
_CONE_STOP = 1.5  # a cone stops where the surface is nearer than this many of its radii


@dataclass
class RayBatch:
    """Rays of a batch of images; a row is an image."""

    origin: torch.Tensor
    """[B, 3]"""
    direction: torch.Tensor
    """[B, 3, N], of length 1."""
    start: torch.Tensor
    """[B, N]: depth at which to begin."""
    end: torch.Tensor
    """[B, N]: depth of the way out of the box; below `start` where the ray is not to be traced."""

    def pick(self, index: torch.Tensor, valid: torch.Tensor) -> RayBatch:
        """Return the rays of the columns `index` [B, K]; those that are not `valid` [B, K] end before they start."""
        direction = self.direction.gather(2, index[:, None].expand(-1, 3, -1))
        end = torch.where(valid, self.end.gather(1, index), -1.0)
        return RayBatch(self.origin, direction, self.start.gather(1, index), end)

    def points(self, depth: torch.Tensor) -> Points:
        """Return the coordinates [B, N] at depths [B, N]."""
        return torch.addcmul(self.origin[:, :, None], self.direction, depth[:, None]).unbind(1)


def camera_rays(label: torch.Tensor, u: torch.Tensor, v: torch.Tensor, margin: torch.Tensor) -> RayBatch:
    """Make the rays through places of the image.

    Args:
        label: [B, 25].
        u, v: image coordinates in [0, 1] from left and from top, [N] or [B, N].
        margin: [B, 1] float64: by how much the box is made larger on every side, for rays that stand for cones.

    Returns:
        Rays that begin where they enter the box that holds all heads and end where they leave it.
    """
    cam2world, intrinsics = split_label(label)
    fx, skew, cx = (intrinsics[:, 0, i, None] for i in range(3))
    fy, cy = intrinsics[:, 1, 1, None], intrinsics[:, 1, 2, None]
    down = (v - cy) / fy
    right = (u - cx - skew * down) / fx
    camera = torch.stack([right, down, torch.ones_like(right)], dim=1)  # [B, 3, N]
    direction = torch.bmm(cam2world[:, :3, :3], camera)
    direction = direction / length(direction)
    origin = cam2world[:, :3, 3]
    start, end = torch.zeros_like(right), torch.full_like(right, 1e3)
    for axis, (low, high) in enumerate(BOX):
        slope = direction[:, axis]
        slope = torch.where(slope.abs() < 1e-9, 1e-9, slope)
        sides = ((low - margin).float(), (high + margin).float())  # [B, 1]
        near, far = ((side - origin[:, axis, None]) / slope for side in sides)
        start = torch.maximum(start, torch.minimum(near, far))
        end = torch.minimum(end, torch.maximum(near, far))
    return RayBatch(origin, direction, start, end)


def compact(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns where a mask [B, N] holds, row by row.

    Returns:
        Index [B, K], K the most that any row has, and which of it [B, K] is no filling. Filling points to a column
        where the mask does not hold.
    """
    if len(mask) == 1:
        index = mask[0].nonzero().T  # [1, K]
        return index, torch.ones_like(index, dtype=torch.bool)
    row, column = mask.nonzero().unbind(1)
    counts = mask.sum(dim=1)
    longest = int(counts.max())
    position = torch.arange(len(row), device=mask.device) - (counts.cumsum(0) - counts)[row]
    index = (~mask).int().argmax(dim=1, keepdim=True).repeat(1, longest)
    index[row, position] = column
    return index, torch.arange(longest, device=mask.device) < counts[:, None]


def put(target: torch.Tensor, index: torch.Tensor, valid: torch.Tensor, value: torch.Tensor) -> None:
    """Write values [B, K] or [B, C, K] to the columns `index` [B, K] of `target` [B, N] or [B, C, N], where `valid`.

    No column is both filling and not, see :func:`compact`; filling writes again what is there.
    """
    if target.ndim == 3:
        index, valid = (t[:, None].expand_as(value) for t in (index, valid))
    if len(target) > 1:
        value = torch.where(valid, value, target.gather(-1, index))
    target.scatter_(-1, index, value)


def march(
    field: HeadField, rays: RayBatch, cone_radius: torch.Tensor | None, tolerance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Walk along rays until something is near.

    A cone advances by ``(d - r t) / (1 + r)``, d the distance of the nearest surface, r t the cone's radius at depth t:
    no ray inside the cone can meet a surface before that. It stops where d < 1.5 r t, or early: that is safe too.

    Args:
        field: the heads.
        rays: [B, N].
        cone_radius: r, radius of a cone at depth 1, [B, 1] float64; None for rays.
        tolerance: for rays, the distance per depth at which a surface counts as met, [B, 1] float64; None for cones.

    Returns:
        Depth [B, N] where the walk stopped; whether it met something [B, N]; for rays, the least distance per depth
        on the way [B, N], infinite where a ray was not walked.
    """
    depth_out = rays.start.clone()
    met_out = torch.zeros_like(depth_out, dtype=torch.bool)
    least_out = torch.full_like(depth_out, math.inf)
    index, valid = compact(rays.start < rays.end)
    for _ in range(_RAY_ROUNDS if cone_radius is None else _CONE_ROUNDS):
        if index.shape[1] == 0:
            break
        active, depth, least = rays.pick(index, valid), depth_out.gather(1, index), least_out.gather(1, index)
        if cone_radius is None:
            depth, met, least = _walk_rays(field, active, depth, least, tolerance.float())
            put(least_out, index, valid, least)
        else:
            depth, met = _walk_cones(field, active, depth, cone_radius)
        inside = depth < active.end
        put(depth_out, index, valid, depth)
        put(met_out, index, valid, met & inside)
        kept, kept_valid = compact(inside & ~met & valid)
        index, valid = index.gather(1, kept), kept_valid
    if cone_radius is not None and index.shape[1]:
        put(met_out, index, valid, torch.ones_like(valid))
    return depth_out, met_out, least_out


def _walk_rays(
    field: HeadField, rays: RayBatch, depth: torch.Tensor, least: torch.Tensor, tolerance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return depth, whether a surface was met, and the least distance per depth after some steps, [B, N] each."""
    for _ in range(_STEPS_PER_ROUND):
        distance = field.distance(*rays.points(depth))
        met = distance < tolerance * depth
        least = torch.minimum(least, distance / depth)
        depth = torch.where(met, depth, depth + distance * _RELAX)
    return torch.where(met, depth + distance, depth), met, least  # the last bit of the way


def _walk_cones(
    field: HeadField, rays: RayBatch, depth: torch.Tensor, radius: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return depth and whether a surface was met after some steps, [B, N] each."""
    stop, share, radius = (_CONE_STOP * radius).float(), (_RELAX / (1.0 + radius)).float(), radius.float()
    for _ in range(_STEPS_PER_ROUND):
        distance = field.distance(*rays.points(depth))
        met = distance < stop * depth
        depth = torch.where(met, depth, depth + (distance - radius * depth).mul_(share))
    return depth, met


def pixel_cones(field: HeadField, label: torch.Tensor, resolution: int, pixel: torch.Tensor) -> RayBatch:
    """Trace the cones of blocks, of smaller blocks, and of pixels.

    Args:
        field: the heads.
        label: cameras [B, 25].
        resolution: side of the pictures, a multiple of the largest block.
        pixel: width of a pixel at depth 1, [B, 1] float64.

    Returns:
        The rays of the pixels' centres [B, H W]. They start where nothing within the pixel can have been met before,
        and end before they start where the whole pixel misses.
    """
    half_diagonal = math.sqrt(0.5) * pixel
    starts = None
    for block in (*BLOCKS, 1):
        size = resolution // block
        radius = block * half_diagonal
        margin = 2.0 * radius * camera_distance(label)
        rays = camera_rays(label, *grid(size, label.device), margin=margin)
        if starts is not None:
            coarse = math.isqrt(starts.shape[1])
            starts = functional.interpolate(starts.reshape(-1, 1, coarse, coarse), size=(size, size), mode="nearest")
            rays.start = starts.flatten(1)
        depth, met, _ = march(field, rays, radius)
        starts = torch.where(met, depth, 1e3)  # beyond everything
    rays.start = starts
    return rays


def camera_distance(label: torch.Tensor) -> torch.Tensor:
    """Return how far from the origin the cameras of labels [B, 25] stand, [B, 1] float64."""
    return torch.linalg.vector_norm(label[:, [3, 7, 11]], dim=1, keepdim=True).double()


def grid(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return u and v [size^2] of the centres of a square grid's cells, row by row."""
    centres = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
    return centres.repeat(size), centres.repeat_interleave(size)
