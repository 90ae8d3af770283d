"""Density volumes and coloured meshes of heads."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import shape_utils
from inference.sampling import Head
from training.config import require

MRC_FORMAT = "mrc"
SHAPE_FORMATS = (MRC_FORMAT, *shape_utils.MESH_FORMATS)
VIDEO_SHAPE_FORMATS = (*shape_utils.MESH_FORMATS, MRC_FORMAT)
REMOVED_SIGMA = -1000.0
_AUTO_LEVEL_SHARE = 0.1  # of the inner voxels are taken to be inside, where the published level gives no surface


@dataclass(frozen=True, kw_only=True)
class ShapeSettings:
    """How a shape is sampled."""

    resolution: int = 512
    """Voxels per side of the box."""
    level: float = 10.0
    """Raw density of the surface."""
    border: float = 30 / 256
    """Share of the voxels along each side of the box that is removed (the network has artefacts there)."""
    chunk_points: int = 2**18
    """Points evaluated at a time, which bounds memory."""

    def __post_init__(self) -> None:
        require(self.resolution >= 8, "shape resolution", "at least 8", self.resolution)
        require(0 <= self.border < 0.5, "shape border", "a share in [0, 0.5)", self.border)
        require(self.chunk_points >= 1, "shape chunk_points", "at least 1", self.chunk_points)


@torch.no_grad()
def density_volume(head: Head, settings: ShapeSettings, progress: bool = False) -> np.ndarray:
    """Sample the raw density on a grid over the box: float32 `[X, Y, Z]`, world axes, the border removed."""
    generator, field = head.generator, head.field
    n, border = settings.resolution, int(settings.border * settings.resolution)
    # The border is not evaluated at all: what is left is a smaller grid around the same centre.
    inner = n - 2 * border
    inner_side = generator.config.rendering.box_warp * (inner - 1) / (n - 1)
    sigma = np.empty(inner**3, np.float32)
    chunks = shape_utils.voxel_grid_chunks(inner, inner_side, settings.chunk_points, head.ws.device)
    with tqdm(total=inner**3, desc="density", unit="voxel", unit_scale=True, disable=not progress, leave=False) as bar:
        for run, points in chunks:
            sigma[run] = generator.query_density(field, points.unsqueeze(0))[0].float().cpu().numpy()
            bar.update(len(points))
    volume = np.full((n, n, n), REMOVED_SIGMA, np.float32)
    kept = slice(border, n - border)
    volume[kept, kept, kept] = sigma.reshape(inner, inner, inner)
    return volume


@torch.no_grad()
def vertex_colors(head: Head, vertices: np.ndarray, chunk_points: int = 2**18) -> np.ndarray:
    """Return the colours uint8 `[M, 3]` that the network gives to points `[M, 3]`, before super-resolution."""
    colors = []
    for points in torch.from_numpy(vertices).split(chunk_points):
        rgb = head.generator.point_colors(head.field, points.unsqueeze(0).to(head.ws.device))[0]
        colors.append((rgb * 127.5 + 128).clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(colors).numpy()


def surface_level(volume: np.ndarray, level: float) -> float:
    """Return the level, or one that has a surface where this one has none (as with untrained networks)."""
    inner = volume[volume > REMOVED_SIGMA]
    if inner.size == 0 or inner.min() < level < inner.max():
        return level
    return float(np.quantile(inner, 1 - _AUTO_LEVEL_SHARE))


def save_shape(path: Path, head: Head, settings: ShapeSettings, progress: bool = False) -> float | None:
    """Write the shape of a head: a volume for `.mrc`, a coloured mesh for `.ply`, `.obj` and `.glb`.

    Returns:
        The level of the surface; None for a volume. It differs from `settings.level` where that one gives no surface,
        which a line on stderr then says.

    Raises:
        ValueError: the suffix is another, or the density has no surface at any level.
    """
    kind = path.suffix.removeprefix(".").lower()
    require(kind in SHAPE_FORMATS, str(path), f"a suffix of {', '.join(SHAPE_FORMATS)}", path.suffix)
    box_side = head.generator.config.rendering.box_warp
    volume = density_volume(head, settings, progress)
    if kind == MRC_FORMAT:
        shape_utils.write_volume_mrc(path, volume, box_side / (settings.resolution - 1))
        return None
    level = surface_level(volume, settings.level)
    if level != settings.level:
        tqdm.write(f"{path.name}: no surface at density {settings.level:g}; took {level:.4g}", file=sys.stderr)
    mesh = shape_utils.extract_mesh(volume, box_side, level)
    shape_utils.write_mesh(path, mesh, vertex_colors(head, mesh.vertices, settings.chunk_points))
    return level
