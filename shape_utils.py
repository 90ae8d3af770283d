"""Shapes: voxel grids to sample a density on, the surface inside one, and files of meshes and volumes.

A volume ``sigma`` is [X, Y, Z]: sigma[i, j, k] is the density at world position (x_i, y_j, z_k). The outermost voxels
lie *on* the faces of the box, which is centred on the world origin, so that N voxels span N - 1 steps. World: +y up, +z
in front of the face (docs/conventions.md); PLY, OBJ and GLB files keep these axes and the world's unit.

Letters: M points; X, Y, Z voxels along the world axes. scikit-image, trimesh and mrcfile, the
extra `meshes`, are imported where they are used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dnnlib.atomic import atomic_path, atomic_write
from dnnlib.extras import import_extra

MESH_FORMATS = ("ply", "obj", "glb")


@dataclass(frozen=True, kw_only=True, eq=False)
class Mesh:
    """A triangle mesh."""

    vertices: np.ndarray  # [num_vertices, 3] float32, world units, +y up
    faces: np.ndarray  # [num_faces, 3] int32, counter-clockwise seen from outside


def voxel_grid_points(
    resolution: int,
    box_size: float,
    start: int = 0,
    stop: int | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Compute the positions of a run of voxels of a cubic grid around the world origin.

    Voxel m has the indices x = m // N^2, y = m // N mod N, z = m mod N (z fastest, so that densities of all points
    reshape to sigma [N, N, N]) and the coordinates index box_size / (N - 1) - box_size / 2.

    Args:
        resolution: N, voxels along each side, at least 2.
        box_size: Side of the box in world units, above 0 (``box_warp`` for the whole field).
        start: First voxel.
        stop: The voxel after the last; None for all N^3.
        device: Where the result lies.

    Returns:
        [M, 3] float32 with M = stop - start.

    Raises:
        ValueError: ``resolution``, ``box_size`` or the run is out of range.

    Differs from the published code, which divides without flooring: its x and y are fractional, a sheared grid.
    """
    _check_grid(resolution, box_size)
    stop = resolution**3 if stop is None else stop
    if not 0 <= start <= stop <= resolution**3:
        raise ValueError(f"start, stop must satisfy 0 <= start <= stop <= {resolution**3}, got {start}, {stop}")
    voxel = torch.arange(start, stop, device=device)
    index = torch.stack(
        [voxel // resolution**2, voxel // resolution % resolution, voxel % resolution], dim=-1
    )  # [M, 3]
    centred = 2 * index - (resolution - 1)  # whole numbers: mirror voxels get exactly mirrored coordinates
    return centred.float() * (box_size / (2 * (resolution - 1)))


def voxel_grid_chunks(
    resolution: int, box_size: float, chunk_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Walk through the grid of :func:`voxel_grid_points` without ever holding all of its coordinates.

    Args:
        resolution: N, voxels along each side, at least 2.
        box_size: Side of the box in world units, above 0.
        chunk_size: Largest number of points at once, at least 1.
        device: Where the points lie.

    Yields:
        (where, points): the slice of the flat [N^3] volume, and its points [M, 3] float32. Chunks are in order and
        cover every voxel once.

    Raises:
        ValueError: An argument is out of range; raised at the call, not at the first chunk.
    """
    _check_grid(resolution, box_size)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 point, got {chunk_size}")
    starts = range(0, resolution**3, chunk_size)
    runs = (slice(start, min(start + chunk_size, resolution**3)) for start in starts)
    return ((run, voxel_grid_points(resolution, box_size, run.start, run.stop, device)) for run in runs)


def _check_grid(resolution: int, box_size: float) -> None:
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2 voxels, got {resolution}")
    if not 0.0 < box_size < float("inf"):
        raise ValueError(f"box_size must be a finite length above 0, got {box_size}")


def extract_mesh(
    sigma: np.ndarray | torch.Tensor,
    box_size: float | Sequence[float],
    level: float,
    close_border: bool = True,
) -> Mesh:
    """Extract the surface where a density crosses a level, by marching cubes (Lewiner et al. 2003).

    Args:
        sigma: [X, Y, Z], denser inside; at least 2 voxels along each axis. float32 is not copied but once for padding.
        box_size: Side of the box in world units, above 0; three numbers for a box that is not a cube.
        level: The density on the surface (published scripts use 10).
        close_border: Close surfaces that leave the box by caps at most half a voxel outside it. The mesh is then
            watertight. False leaves them open.

    Returns:
        The mesh, its faces turned outwards, so that a closed mesh has a positive volume.

    Raises:
        ValueError: ``sigma`` is not a finite volume, or nothing in it crosses the level; the message gives its range.
    """
    volume = _as_volume(sigma)
    sides = np.asarray(box_size, dtype=np.float32)
    if sides.shape not in ((), (3,)) or not (np.isfinite(sides).all() and (sides > 0.0).all()):
        raise ValueError(f"box_size must be a finite length above 0, or three, got {box_size}")
    lowest, highest = _density_range(volume)
    if not lowest < level < highest:
        raise ValueError(
            f"no surface at level {level:g}: the densities lie between {lowest:g} and {highest:g}; "
            + ("choose a level between them" if lowest < highest else "a constant density has no surface at any level")
        )
    num_padded = 0
    if close_border:
        # As far below the level as the peak is above it: a cap lies at most half a voxel outside the border voxels.
        padded = np.full([n + 2 for n in volume.shape], 2.0 * level - highest, dtype=np.float32)
        padded[1:-1, 1:-1, 1:-1] = volume
        volume, num_padded = padded, 1
    voxel_sides = sides / np.subtract(volume.shape, 1 + 2 * num_padded).astype(np.float32)  # [3]
    vertices, faces = _marching_cubes(volume, level, outside_is_lower=True)
    vertices = (vertices - np.float32(num_padded)) * voxel_sides - sides / 2
    return Mesh(vertices=vertices, faces=faces)


def _as_volume(sigma: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return sigma as float32 [X, Y, Z] on the CPU, without a copy where it is that already."""
    volume = sigma.detach().float().cpu().numpy() if isinstance(sigma, torch.Tensor) else np.asarray(sigma)
    if volume.ndim != 3 or min(volume.shape) < 2:
        raise ValueError(f"sigma must be [X, Y, Z] with at least 2 voxels along each axis, got {list(volume.shape)}")
    return volume.astype(np.float32, copy=False)


def _density_range(volume: np.ndarray) -> tuple[float, float]:
    """Return (lowest, highest); neither allocates a mask, and NaN and infinity show in them."""
    lowest, highest = float(volume.min()), float(volume.max())
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise ValueError(f"sigma must be finite, but it holds NaN or infinity (its range is [{lowest:g}, {highest:g}])")
    return lowest, highest


def _marching_cubes(volume: np.ndarray, level: float, outside_is_lower: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices [num_vertices, 3] float32 in voxel indices, and outward faces [num_faces, 3] int32."""
    measure = import_extra("skimage.measure", "meshes")
    # scikit-image names the direction for left-handed axes; ours are right-handed, so that its names change places.
    direction = "ascent" if outside_is_lower else "descent"
    vertices, faces, _, _ = measure.marching_cubes(volume, level, gradient_direction=direction)
    return np.ascontiguousarray(vertices, dtype=np.float32), np.ascontiguousarray(faces, dtype=np.int32)


def write_mesh(path: str | os.PathLike, mesh: Mesh, vertex_colors: np.ndarray | None = None) -> None:
    """Write a mesh as PLY (binary), OBJ or GLB, chosen by the suffix.

    Colours become uchar red, green, blue in PLY, ``v x y z r g b`` in OBJ and COLOR_0 in GLB. Their bytes are stored as
    they are: viewers that follow the letter of glTF, where COLOR_0 is linear light, show them a little lighter.

    Args:
        path: Where to, ending in .ply, .obj or .glb. A write that fails leaves nothing, or the older file, there.
        mesh: What to write.
        vertex_colors: sRGB, [num_vertices, 3] uint8; None for none.

    Raises:
        ValueError: The suffix is another, or the colours do not fit the vertices.
        OSError: The file cannot be written.
    """
    suffix = Path(path).suffix[1:].lower()
    if suffix not in MESH_FORMATS:
        raise ValueError(f"{path}: a mesh file must end in one of .{', .'.join(MESH_FORMATS)}")
    if vertex_colors is not None:
        vertex_colors = np.asarray(vertex_colors)
        if vertex_colors.shape != (len(mesh.vertices), 3) or vertex_colors.dtype != np.uint8:
            expected = f"[{len(mesh.vertices)}, 3] uint8"
            raise ValueError(f"vertex_colors must be {expected}, got {list(vertex_colors.shape)} {vertex_colors.dtype}")
    _export(path, suffix, mesh, vertex_colors)


def _export(path: str | os.PathLike, file_type: str, mesh: Mesh, vertex_colors: np.ndarray | None = None) -> None:
    """Write checked arguments as ``file_type``."""
    trimesh = import_extra("trimesh", "meshes")
    # process=False: keep every vertex in its place, where trimesh would merge and reorder them
    surface = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=vertex_colors, process=False)
    content = surface.export(file_type=file_type)
    with atomic_write(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_volume_mrc(path: str | os.PathLike, sigma: np.ndarray | torch.Tensor, voxel_size: float) -> None:
    """Write a density as an MRC volume, for ChimeraX and other volume viewers.

    The file's x, y, z axes are the world's, and its origin is set so that the middle of the volume is the world origin.

    Args:
        path: Where to. A write that fails leaves nothing, or the older file, there.
        sigma: [X, Y, Z], finite.
        voxel_size: Distance of neighbouring voxels in world units, above 0: box_size / (N - 1).

    Raises:
        ValueError: ``sigma`` is not a finite volume, or ``voxel_size`` is not above 0.
        OSError: The file cannot be written.

    Differs from the published code, which stores the array as it is: x and z change places in viewers, and neither the
    scale nor the position is set.
    """
    mrcfile = import_extra("mrcfile", "meshes")
    if not 0.0 < voxel_size < float("inf"):
        raise ValueError(f"voxel_size must be a finite length above 0, got {voxel_size}")
    volume = _as_volume(sigma)
    _density_range(volume)
    with atomic_path(path) as temp, mrcfile.new(temp, np.ascontiguousarray(volume.T)) as mrc:  # slowest axis first: z
        mrc.voxel_size = voxel_size
        for axis, size in zip("xyz", volume.shape):
            mrc.header.origin[axis] = -voxel_size * (size - 1) / 2
        mrc.header.nlabl, mrc.header.label[0] = 1, "raw density"  # mrcfile's own label holds the time


def convert_sdf_samples_to_ply(
    numpy_3d_sdf_tensor: np.ndarray,
    voxel_grid_origin: Sequence[float],
    voxel_size: float,
    ply_filename_out: str | os.PathLike,
    offset: float | Sequence[float] | None = None,
    scale: float | None = None,
    level: float = 0.0,
) -> None:
    """Write the surface of a volume to a PLY file: the published interface, for scripts that call it.

    vertex = (origin + index * voxel_size) / scale - offset. New code calls :func:`extract_mesh` and :func:`write_mesh`.

    Args:
        numpy_3d_sdf_tensor: [X, Y, Z], signed distances (negative inside) or densities (higher inside).
        voxel_grid_origin: Position of voxel (0, 0, 0), [3].
        voxel_size: Distance of neighbouring voxels.
        ply_filename_out: Where to; always PLY, whatever the suffix.
        offset: Subtracted from the vertices, a number or [3]; None for 0.
        scale: The vertices are divided by this first; None for 1.
        level: The value on the surface.

    Raises:
        ValueError: The volume is not finite, or does not cross the level.

    Differs from the published code: faces are turned outwards whichever side is higher, an empty result is an error,
    and the file appears only when it is complete.
    """
    volume = _as_volume(numpy_3d_sdf_tensor)
    lowest, highest = _density_range(volume)
    if not lowest < level < highest:
        raise ValueError(f"no surface at level {level:g}: the values lie between {lowest:g} and {highest:g}")
    vertices, faces = _marching_cubes(volume, level, outside_is_lower=True)
    vertices = np.asarray(voxel_grid_origin, dtype=np.float32) + vertices * np.float32(voxel_size)
    vertices = vertices / np.float32(1.0 if scale is None else scale)
    vertices = vertices - np.asarray(0.0 if offset is None else offset, dtype=np.float32)
    corners = (vertices - vertices.mean(axis=0))[faces]  # [num_faces, 3 corners, 3]; centred: it may be open
    if np.einsum("ij,ij->", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])) < 0.0:  # six times the volume
        faces = faces[:, ::-1]
    _export(ply_filename_out, "ply", Mesh(vertices=vertices, faces=faces))
