"""Render synthetic heads: seeded, procedural, seen from all around, with masks, parsing maps and exact cameras.

An open stand-in for photographs of heads. A head is a union of analytic signed distances, traced on the CPU or a GPU:

    heads = [sample_identity(seed=0, index=i) for i in range(4)]
    images = render_heads(heads, sample_cameras(seed=0, first=0, count=4), resolution=128)

Geometry, paint and light are fixed to the head; the background is fixed to the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from camera_utils import LABEL_SIZE, check_label
from training.config import require
from training.image_reading import PARSING_CLASSES
from training.synthetic_head_geometry import HeadField
from training.synthetic_head_parameters import HeadParameters
from training.synthetic_head_sampling import CameraRange, sample_cameras, sample_identity
from training.synthetic_head_shading import HeadPainter
from training.synthetic_head_tracing import (
    BLOCKS,
    RayBatch,
    camera_distance,
    camera_rays,
    compact,
    grid,
    march,
    pixel_cones,
    put,
)

__all__ = [
    "PARSING_CLASSES",
    "CameraRange",
    "HeadImages",
    "HeadParameters",
    "render_heads",
    "sample_cameras",
    "sample_identity",
]
RENDERER_VERSION = 1  # goes up whenever the same parameters give other pictures
_TOLERANCE = 0.08  # pixels: how near to a surface a ray must come
_NEAR = 0.75  # pixels: a ray that misses by less may have a surface in its pixel
_DEPTH_EDGE = 4.0  # pixels of depth between neighbours that count as an edge
_PIXELS_TOGETHER = 8 * 128**2  # in images that a CPU renders at a time: enough to hide the cost of starting operations


@dataclass(frozen=True)
class HeadImages:
    """Pictures of heads, all [B, ..., H, W] uint8."""

    rgb: torch.Tensor
    """[B, 3, H, W]"""
    mask: torch.Tensor
    """[B, H, W]: share of the pixel that shows the head, 255 for all of it."""
    parsing: torch.Tensor
    """[B, H, W]: index into `PARSING_CLASSES`; 0 exactly where `mask` is below 128."""


@torch.no_grad()
def render_heads(
    identities: Sequence[HeadParameters], labels: torch.Tensor, resolution: int, supersample: int = 2
) -> HeadImages:
    """Render one picture of each head.

    One ray per pixel, and `supersample`^2 rays in pixels that hold an edge between materials or before the background;
    painted edges are softened by formula.

    Args:
        identities: B heads.
        labels: cameras [B, 25]; the pictures are made on their device.
        resolution: side of the pictures in pixels, a multiple of 8.
        supersample: rays along a side of an edge pixel, at least 1.

    Returns:
        The pictures. On a CPU they do not depend, not in a bit, on what else is in the batch.

    Raises:
        ValueError: numbers of heads and labels differ, a label is no camera, or a size is impossible.
    """
    require(labels.ndim == 2 and labels.shape[1] == LABEL_SIZE, "labels", "shape [B, 25]", list(labels.shape))
    require(len(identities) == len(labels) > 0, "identities", f"one per label, {len(labels)}", len(identities))
    whole = isinstance(resolution, int) and resolution >= BLOCKS[0] and resolution % BLOCKS[0] == 0
    require(whole, "resolution", f"a multiple of {BLOCKS[0]}", resolution)
    require(isinstance(supersample, int) and 1 <= supersample <= 8, "supersample", "1 to 8", supersample)
    check_label(labels)
    together = max(1, _PIXELS_TOGETHER // resolution**2) if labels.device.type == "cpu" else len(labels)
    parts = [
        _Rendering(identities[i : i + together], labels[i : i + together].float(), resolution, supersample).images()
        for i in range(0, len(labels), together)
    ]
    rgb, mask, parsing = (torch.cat(tensors) for tensors in zip(*parts))
    return HeadImages(rgb, mask, parsing)


class _Rendering:
    """One batch on its way to pictures."""

    def __init__(
        self, identities: Sequence[HeadParameters], labels: torch.Tensor, resolution: int, supersample: int
    ) -> None:
        self.identities, self.labels = identities, labels
        self.resolution, self.supersample = resolution, supersample
        self.device = labels.device
        focal = labels[:, [16, 20]].amin(dim=1, keepdim=True).double()
        self.pixel = 1.0 / (resolution * focal)  # width of a pixel at depth 1, [B, 1]
        self.width = self.pixel * camera_distance(labels)  # and at the head
        self.field = HeadField(identities, self.device)
        self.painter = HeadPainter(identities, self.field, self.width, self.device)

    def images(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rgb [B, 3, H, W], mask and parsing [B, H, W], uint8."""
        B, size = len(self.identities), self.resolution
        rays = pixel_cones(self.field, self.labels, size, self.pixel)
        depth, met, least = march(self.field, rays, None, _TOLERANCE * self.pixel)
        colour, class_map, material_map = self._shade(rays, depth, met)
        alpha = met.float()
        if self.supersample > 1:
            self._refine(self._edges(least, met, depth, material_map), rays.start, colour, alpha, class_map)
        rgb = colour + (1.0 - alpha)[:, None] * self._background()
        grey = (alpha * 255.0 + 0.5).to(torch.uint8)
        rgb = (rgb.clamp(0.0, 1.0) * 255.0 + 0.5).to(torch.uint8)
        parsing = class_map.to(torch.uint8)
        return rgb.reshape(B, 3, size, size), grey.reshape(B, size, size), parsing.reshape(B, size, size)

    def _shade(
        self, rays: RayBatch, depth: torch.Tensor, met: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return colour [B, 3, N], class and material [B, N] of rays; 0, 0 and -1 where they met nothing."""
        colour = torch.zeros_like(rays.direction)
        class_map = torch.zeros_like(depth, dtype=torch.int64)
        material_map = torch.full_like(class_map, -1)
        index, valid = compact(met)
        if index.shape[1]:
            alone = len(met) == 1 or self.device.type != "cpu"
            counts = None if alone else valid.sum(dim=1).tolist()
            points = rays.pick(index, valid).points(depth.gather(1, index))
            albedo, classes, materials, gloss = self.painter.paint(points, counts)
            put(colour, index, valid, self.painter.light(points, albedo, gloss, counts))
            put(class_map, index, valid, classes)
            put(material_map, index, valid, materials)
        return colour, class_map, material_map

    def _edges(
        self, least: torch.Tensor, met: torch.Tensor, depth: torch.Tensor, materials: torch.Tensor
    ) -> torch.Tensor:
        """Find pixels [B, H W] that hold more than one thing: neighbours differ, or a surface is missed by little."""
        size = self.resolution
        depth = torch.where(met, depth, 0.0).reshape(-1, size, size)
        materials = materials.reshape(-1, size, size)
        edges = torch.zeros_like(materials, dtype=torch.bool)
        for axis in (1, 2):
            first, second = (slice(None, -1), slice(1, None))
            pick = (slice(None), slice(None)) if axis == 2 else (slice(None),)
            before, after = (*pick, first), (*pick, second)
            step = materials[before] != materials[after]
            step |= (depth[before] - depth[after]).abs() > (_DEPTH_EDGE * self.width).float()[:, :, None]
            edges[before] |= step
            edges[after] |= step
        return (edges.flatten(1) & met) | ((least < (_NEAR * self.pixel).float()) & ~met)

    def _refine(
        self,
        edges: torch.Tensor,
        start: torch.Tensor,
        colour: torch.Tensor,
        alpha: torch.Tensor,
        class_map: torch.Tensor,
    ) -> None:
        """Replace colour [B, 3, H W], alpha and class [B, H W] of edge pixels by what several rays see."""
        size, count = self.resolution, self.supersample**2
        index, valid = compact(edges)  # [B, K]
        if index.shape[1] == 0:
            return
        B, K = index.shape
        offset_v, offset_u = (
            (offset - 0.5) / size for offset in reversed(grid(self.supersample, self.device))
        )  # [count]
        u = ((index % size + 0.5) / size)[:, :, None] + offset_u  # [B, K, count]
        v = ((index // size + 0.5) / size)[:, :, None] + offset_v
        rays = camera_rays(self.labels, u.flatten(1), v.flatten(1), margin=2.0 * self.width)
        begin = torch.where(valid, start.gather(1, index), 1e3)
        rays.start = begin[:, :, None].expand(-1, -1, count).reshape(B, -1)
        depth, met, _ = march(self.field, rays, None, _TOLERANCE * self.pixel)
        seen, classes, _ = self._shade(rays, depth, met)
        share = met.reshape(B, K, count).float().mean(2)
        most = _most_frequent(classes.reshape(B, K, count))
        put(colour, index, valid, seen.reshape(B, 3, K, count).mean(3))
        put(alpha, index, valid, share)
        put(class_map, index, valid, torch.where(share >= 0.5, most, 0))

    def _background(self) -> torch.Tensor:
        """Return display colours [B, 3, H W]."""
        u, v = grid(self.resolution, self.device)
        angles = torch.tensor([[head.background_angle] for head in self.identities], device=self.device)
        along = (u - 0.5) * torch.cos(angles) + (v - 0.5) * torch.sin(angles)  # [B, H W], within +-sqrt(0.5)
        share = (0.5 + along / math.sqrt(2.0))[:, None]
        ends = torch.tensor([head.background for head in self.identities], device=self.device)  # [B, 2, 3]
        return torch.lerp(ends[:, 0, :, None], ends[:, 1, :, None], share)


def _most_frequent(classes: torch.Tensor) -> torch.Tensor:
    """Return the most frequent class but 0 of [B, K, n] along n, the first to come among equals; 0 if all are 0."""
    votes = (classes[..., :, None] == classes[..., None, :]).sum(-1)  # [B, K, n]
    votes = torch.where(classes > 0, votes, -1)
    return classes.gather(-1, votes.argmax(-1, keepdim=True)).squeeze(-1)
