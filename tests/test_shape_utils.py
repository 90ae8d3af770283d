"""Test voxel grids, surfaces and files on shapes whose size, place and orientation are known."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
import trimesh

import shape_utils
from shape_utils import (
    Mesh,
    convert_sdf_samples_to_ply,
    extract_mesh,
    voxel_grid_chunks,
    voxel_grid_points,
    write_mesh,
    write_volume_mrc,
)

VECTORS = json.loads((Path(__file__).parent / "data" / "cameras.json").read_text())
BOX = 1.4
LEVEL = 10.0


def grid(resolution, box_size=BOX):
    """Return the voxel positions [N, N, N, 3] float64."""
    return voxel_grid_points(resolution, box_size).double().numpy().reshape(*[resolution] * 3, 3)


def density(distance):
    """Turn a signed distance (negative inside) to a density that is LEVEL on the surface."""
    return (LEVEL - 100.0 * distance).astype(np.float32)


def ball(resolution, centre=(0.0, 0.0, 0.0), radius=0.4):
    """Return the density of a ball."""
    return density(np.linalg.norm(grid(resolution) - centre, axis=-1) - radius)


def as_trimesh(mesh):
    """Return the trimesh twin, nothing merged."""
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


@pytest.fixture
def coloured_ball():
    mesh = extract_mesh(ball(12), BOX, LEVEL)
    return mesh, np.random.RandomState(0).randint(0, 256, (len(mesh.vertices), 3)).astype(np.uint8)


# Grid


@pytest.mark.parametrize("resolution", [2, 3, 8, 9])
def test_voxel_grid_points_reshape_to_axes_in_order_and_touch_the_box(resolution):
    points = voxel_grid_points(resolution, BOX).reshape(resolution, resolution, resolution, 3)
    axis = torch.linspace(-BOX / 2, BOX / 2, resolution)
    expected = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    torch.testing.assert_close(points, expected, rtol=0, atol=1e-6)  # float32 of another formula
    assert torch.equal(points, -points.flip(0, 1, 2))  # exactly symmetric


def test_voxel_grid_points_differ_from_published_ones_only_by_their_fraction():
    published = torch.tensor(VECTORS["create_samples_N4_L1_first10"])
    published_index = (published + 0.5) * 3
    expected = (published_index + 1e-4).floor() / 3 - 0.5  # 1e-4: whole numbers came through float32
    expected[:, 1] = (published_index[:, 1] % 4 + 1e-4).floor() / 3 - 0.5
    torch.testing.assert_close(voxel_grid_points(4, 1.0, stop=10), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 7, 25, 125, 1000])
def test_voxel_grid_chunks_cover_the_whole_grid_once(chunk_size):
    whole, seen = voxel_grid_points(5, BOX), torch.full((125, 3), torch.nan)
    for where, points in voxel_grid_chunks(5, BOX, chunk_size):
        assert len(points) <= chunk_size and seen[where].isnan().all()
        seen[where] = points
    assert torch.equal(seen, whole)


@pytest.mark.parametrize(
    "args, match", [((1, BOX), "resolution"), ((8, 0.0), "box_size"), ((8, float("nan")), "box_size")]
)
def test_voxel_grid_invalid_size_raises_at_the_call(args, match):
    with pytest.raises(ValueError, match=match):
        voxel_grid_points(*args)
    with pytest.raises(ValueError, match=match):
        voxel_grid_chunks(*args, chunk_size=10)


@pytest.mark.parametrize("start, stop", [(-1, 3), (5, 4), (0, 28)])
def test_voxel_grid_points_invalid_run_raises(start, stop):
    with pytest.raises(ValueError, match="start, stop"):
        voxel_grid_points(3, 1.0, start, stop)


def test_voxel_grid_chunks_empty_chunk_raises():
    with pytest.raises(ValueError, match="chunk_size"):
        voxel_grid_chunks(3, 1.0, 0)


# Surface


@pytest.mark.parametrize("resolution", [24, 33])
@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor, lambda s: torch.as_tensor(s).double()])
def test_extract_mesh_ball_has_its_radius_volume_and_no_holes(resolution, convert):
    centre, radius = np.array([0.1, -0.05, 0.2]), 0.4
    mesh = extract_mesh(convert(ball(resolution, centre, radius)), BOX, LEVEL)
    voxel = BOX / (resolution - 1)
    distance = np.linalg.norm(mesh.vertices - centre, axis=1)
    assert np.abs(distance - radius).max() < 0.1 * voxel  # linear interpolation of a distance is better than a voxel
    assert mesh.vertices.dtype == np.float32 and mesh.faces.dtype == np.int32
    surface = as_trimesh(mesh)
    assert surface.is_watertight and surface.is_winding_consistent
    assert surface.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)  # positive: faces point outwards


def test_extract_mesh_ellipsoid_in_a_box_of_three_sides_keeps_scale_and_place():
    sides, shape = np.array([1.0, 2.0, 1.5]), (21, 32, 26)
    axes = [np.linspace(-s / 2, s / 2, n) for s, n in zip(sides, shape)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    centre, radii = np.array([-0.05, 0.3, 0.1]), np.array([0.3, 0.5, 0.4])
    sigma = density(np.linalg.norm((points - centre) / radii, axis=-1) - 1)
    surface = as_trimesh(extract_mesh(sigma, sides, LEVEL))
    np.testing.assert_allclose(surface.bounds, [centre - radii, centre + radii], atol=0.05)  # a voxel
    np.testing.assert_allclose(surface.center_mass, centre, atol=2e-3)
    assert surface.is_watertight and surface.volume == pytest.approx(4 / 3 * np.pi * radii.prod(), rel=0.02)


@pytest.mark.parametrize("axis, direction", [(0, -1), (1, 1), (2, 1)])
def test_extract_mesh_bump_lands_on_its_side(axis, direction):
    offset = np.eye(3)[axis] * direction * 0.4
    sigma = np.maximum(ball(29, radius=0.3), ball(29, offset, radius=0.15))
    vertices = extract_mesh(sigma, BOX, LEVEL).vertices
    far = vertices[np.abs(vertices).max(axis=1) > 0.4]
    assert len(far) > 10 and (far @ offset > 0).all()
    assert np.abs(vertices).max() == pytest.approx(0.55, abs=0.01)


@pytest.mark.parametrize("centre", [(0.5, 0.0, 0.0), (-0.6, 0.6, 0.6)])
def test_extract_mesh_surface_leaving_the_box_is_closed_at_its_faces(centre):
    sigma = ball(22, centre)
    surface = as_trimesh(extract_mesh(sigma, BOX, LEVEL))
    assert surface.is_watertight and surface.volume > 0
    assert np.abs(surface.vertices).max() <= (BOX / 2) + 0.5 * BOX / 21 + 1e-6  # half a voxel beyond at most
    assert not as_trimesh(extract_mesh(sigma, BOX, LEVEL, close_border=False)).is_watertight


def test_extract_mesh_noise_is_watertight():
    sigma = np.random.RandomState(0).randn(9, 12, 10)
    assert as_trimesh(extract_mesh(sigma, 1.0, 0.1)).is_watertight


def test_extract_mesh_leaves_its_input_alone():
    sigma = ball(10)
    before = sigma.copy()
    extract_mesh(sigma, BOX, LEVEL)
    assert np.array_equal(sigma, before)


@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_extract_mesh_level_not_crossed_raises_with_range(level):
    sigma = ball(10)
    with pytest.raises(ValueError, match=f"between {sigma.min():g} and {sigma.max():g}; choose a level"):
        extract_mesh(sigma, BOX, level)


def test_extract_mesh_constant_density_raises():
    with pytest.raises(ValueError, match="constant density"):
        extract_mesh(np.full((4, 4, 4), 3.0), BOX, 3.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_extract_mesh_not_finite_raises(value):
    sigma = ball(10)
    sigma[3, 4, 5] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        extract_mesh(sigma, BOX, LEVEL)


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (1, 4, 4, 4)])
def test_extract_mesh_wrong_shape_raises(shape):
    with pytest.raises(ValueError, match=r"\[X, Y, Z\]"):
        extract_mesh(np.zeros(shape), BOX, LEVEL)


@pytest.mark.parametrize("box_size", [0.0, (1.0, -1.0, 1.0), (1.0, 2.0), float("inf")])
def test_extract_mesh_wrong_box_raises(box_size):
    with pytest.raises(ValueError, match="box_size"):
        extract_mesh(ball(10), box_size, LEVEL)


# Files


@pytest.mark.parametrize("suffix", ["ply", "obj", "glb", "PLY"])
def test_write_mesh_reads_back_with_vertices_faces_and_colours(tmp_path, coloured_ball, suffix):
    mesh, colours = coloured_ball
    write_mesh(tmp_path / f"a.{suffix}", mesh, colours)
    read = trimesh.load(tmp_path / f"a.{suffix}", process=False, force="mesh")
    np.testing.assert_allclose(read.vertices, mesh.vertices, atol=1e-7)  # OBJ has 8 digits
    np.testing.assert_array_equal(read.faces, mesh.faces)
    np.testing.assert_array_equal(read.visual.vertex_colors[:, :3], colours)
    assert os.listdir(tmp_path) == [f"a.{suffix}"]


def test_write_mesh_formats_store_colours_where_documented(tmp_path, coloured_ball):
    mesh, colours = coloured_ball
    for suffix in ("ply", "obj", "glb"):
        write_mesh(tmp_path / f"a.{suffix}", mesh, colours)
    header = (tmp_path / "a.ply").read_bytes().split(b"end_header")[0]
    assert all(f"property uchar {c}\n".encode() in header for c in ("red", "green", "blue"))
    first = next(line for line in (tmp_path / "a.obj").read_text().splitlines() if line.startswith("v "))
    np.testing.assert_allclose([float(n) for n in first.split()[1:]], [*mesh.vertices[0], *colours[0] / 255], atol=1e-6)
    assert b'"COLOR_0"' in (tmp_path / "a.glb").read_bytes()


@pytest.mark.parametrize("suffix", ["ply", "obj", "glb"])
def test_write_mesh_without_colours_reads_back(tmp_path, coloured_ball, suffix):
    mesh, _ = coloured_ball
    write_mesh(tmp_path / f"a.{suffix}", mesh)
    read = trimesh.load(tmp_path / f"a.{suffix}", process=False, force="mesh")
    assert len(read.vertices) == len(mesh.vertices) and read.is_watertight
    assert b"COLOR_0" not in (tmp_path / f"a.{suffix}").read_bytes()


@pytest.mark.parametrize("name", ["a.stl", "a", "ply"])
def test_write_mesh_unknown_suffix_raises(tmp_path, coloured_ball, name):
    with pytest.raises(ValueError, match=r"\.ply, \.obj, \.glb"):
        write_mesh(tmp_path / name, coloured_ball[0])


@pytest.mark.parametrize("colours", [np.zeros((3, 3), np.uint8), np.zeros((1, 4), np.uint8), None])
def test_write_mesh_colours_that_do_not_fit_raise(tmp_path, coloured_ball, colours):
    mesh, good = coloured_ball
    with pytest.raises(ValueError, match="vertex_colors must be"):
        write_mesh(tmp_path / "a.ply", mesh, good / 255.0 if colours is None else colours)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("suffix", ["ply", "obj", "glb", "mrc"])
@pytest.mark.parametrize("older", [False, True])
def test_writers_full_disk_leave_nothing_half_written(tmp_path, coloured_ball, monkeypatch, suffix, older):
    path = tmp_path / f"a.{suffix}"
    if older:
        path.write_bytes(b"older")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        if suffix == "mrc":
            write_volume_mrc(path, ball(8), 0.1)
        else:
            write_mesh(path, *coloured_ball)
    assert os.listdir(tmp_path) == ([path.name] if older else [])
    assert not older or path.read_bytes() == b"older"


def test_write_volume_mrc_has_world_axes_scale_and_origin(tmp_path):
    sigma = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    write_volume_mrc(tmp_path / "a.mrc", sigma, 0.25)
    assert mrcfile.validate(tmp_path / "a.mrc")
    with mrcfile.open(tmp_path / "a.mrc") as mrc:
        np.testing.assert_array_equal(mrc.data, sigma.numpy().transpose(2, 1, 0))  # MRC: x is the fastest axis
        assert (mrc.header.nx, mrc.header.ny, mrc.header.nz) == (4, 5, 7)
        assert mrc.voxel_size.tolist() == pytest.approx((0.25, 0.25, 0.25))
        assert mrc.header.origin.tolist() == pytest.approx((-0.375, -0.5, -0.75))


def test_write_volume_mrc_invalid_arguments_raise(tmp_path):
    with pytest.raises(ValueError, match="voxel_size"):
        write_volume_mrc(tmp_path / "a.mrc", ball(4), 0.0)
    with pytest.raises(ValueError, match="NaN"):
        write_volume_mrc(tmp_path / "a.mrc", np.full((2, 2, 2), np.nan), 1.0)


@pytest.mark.parametrize("sign", [1, -1])  # a density, a signed distance
def test_convert_sdf_samples_to_ply_applies_origin_scale_and_offset(tmp_path, sign):
    resolution, origin, offset, scale = 20, np.array([1.0, -2.0, 0.5]), np.array([0.1, 0.2, -0.3]), 2.0
    voxel = BOX / (resolution - 1)
    path = tmp_path / "shape"  # the published function writes PLY under any name
    convert_sdf_samples_to_ply(sign * ball(resolution), origin, voxel, path, offset, scale, level=sign * LEVEL)
    surface = trimesh.load(path, file_type="ply", process=False)
    centre = (origin + BOX / 2) / scale - offset
    np.testing.assert_allclose(surface.center_mass, centre, atol=1e-3)
    distance = np.linalg.norm(surface.vertices - centre, axis=1)
    np.testing.assert_allclose(distance, 0.4 / scale, atol=0.1 * voxel)
    assert surface.is_watertight and surface.volume > 0


def test_convert_sdf_samples_to_ply_defaults_are_level_0_and_no_change(tmp_path):
    convert_sdf_samples_to_ply(ball(12) - LEVEL, [0, 0, 0], 1.0, str(tmp_path / "a.ply"))
    surface = trimesh.load(tmp_path / "a.ply", process=False)
    np.testing.assert_allclose(surface.bounds.mean(axis=0), [5.5] * 3, atol=1e-5)  # the middle voxel index


def test_convert_sdf_samples_to_ply_no_surface_raises_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="no surface at level 0"):
        convert_sdf_samples_to_ply(np.ones((4, 4, 4)), [0, 0, 0], 1.0, tmp_path / "a.ply")
    assert not os.listdir(tmp_path)


def test_shape_utils_import_needs_no_mesh_library():
    source = Path(shape_utils.__file__).read_text()
    imports = [line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not {"skimage", "trimesh", "mrcfile"} & {name.split(".")[0] for name in imports}


def test_mesh_is_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        Mesh(np.zeros((0, 3)), np.zeros((0, 3)))
