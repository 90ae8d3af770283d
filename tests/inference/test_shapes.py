"""Shapes: what the network says at voxel centres, and closed, upright, coloured surfaces of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh

from inference import make_head
from inference.shapes import (
    REMOVED_SIGMA,
    ShapeSettings,
    density_volume,
    save_shape,
    surface_level,
    vertex_colors,
)
from shape_utils import MESH_FORMATS

BOX_SIDE = 2.0
CONE = {"base_y": -0.5, "tip_y": 0.7, "radius": 0.4, "axis_x": 0.1}


def cone_density(points: torch.Tensor) -> torch.Tensor:
    """Density of a cone that stands beside the origin with its tip up; 10 on its surface."""
    x, y, z = points.unbind(-1)
    radius = CONE["radius"] * (CONE["tip_y"] - y) / (CONE["tip_y"] - CONE["base_y"])
    inside = torch.minimum(radius - torch.hypot(x - CONE["axis_x"], z), y - CONE["base_y"])
    return 10 + 100 * inside


class AnalyticGenerator:
    """Has the density of a cone and colours that follow the position."""

    config = SimpleNamespace(rendering=SimpleNamespace(box_warp=BOX_SIDE))

    def __init__(self, density=cone_density):
        self.density, self.largest_query = density, 0

    def query_density(self, field, points):
        self.largest_query = max(self.largest_query, points.shape[1])
        return self.density(points)

    def point_colors(self, field, points):
        return points


def analytic_head(density=cone_density):
    return SimpleNamespace(generator=AnalyticGenerator(density), field=None, ws=torch.zeros(1, 10, 512))


def read_mesh(path) -> trimesh.Trimesh:
    return trimesh.load(path, force="mesh", process=True)


# Volumes.


def test_density_volume_equals_direct_queries_at_voxel_centres(generator):
    head = make_head(generator, 0)
    n = 12
    volume = density_volume(head, ShapeSettings(resolution=n, border=0.0))
    index = np.random.RandomState(0).randint(0, n, (50, 3))
    box_side = generator.config.rendering.box_warp
    points = torch.from_numpy(index * (box_side / (n - 1)) - box_side / 2).float()[None]
    with torch.no_grad():
        expected = generator.query(head.field, points)[0][0].numpy()
    # Coordinates may differ by a rounding step, and so does what the planes say there.
    torch.testing.assert_close(volume[tuple(index.T)], expected, rtol=1e-4, atol=1e-4)


def test_density_volume_border_is_removed_and_changes_nothing_inside(generator):
    head = make_head(generator, 0)
    whole = density_volume(head, ShapeSettings(resolution=16, border=0.0))
    cleared = density_volume(head, ShapeSettings(resolution=16, border=3.9 / 16))
    inner = (slice(3, -3),) * 3
    # Coordinates may differ by a rounding step.
    torch.testing.assert_close(cleared[inner], whole[inner], rtol=1e-4, atol=1e-4)
    outside = np.ones_like(cleared, bool)
    outside[inner] = False
    assert (cleared[outside] == REMOVED_SIGMA).all()
    assert (whole > REMOVED_SIGMA).all()


def test_density_volume_published_border_is_30_of_256():
    volume = density_volume(analytic_head(lambda points: points[..., 0]), ShapeSettings(resolution=128))
    assert (volume > REMOVED_SIGMA).sum() == (128 - 2 * 15) ** 3


@pytest.mark.parametrize("chunk_points", [1, 100, 512, 513, 10**6])
def test_density_volume_chunk_size_has_no_effect_but_bounds_queries(chunk_points):
    head = analytic_head()
    whole = density_volume(head, ShapeSettings(resolution=8, border=0.0))
    chunked_head = analytic_head()
    chunked = density_volume(chunked_head, ShapeSettings(resolution=8, border=0.0, chunk_points=chunk_points))
    np.testing.assert_array_equal(chunked, whole)
    assert chunked_head.generator.largest_query == min(chunk_points, 512)


def test_density_volume_of_a_network_in_chunks_equals_the_whole(generator):
    head = make_head(generator, 0)
    whole = density_volume(head, ShapeSettings(resolution=12, border=0.0))
    chunked = density_volume(head, ShapeSettings(resolution=12, border=0.0, chunk_points=100))
    # A matrix product of another height may sum in another order.
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("resolution", 7, "shape resolution: expected at least 8, got 7"),
        ("border", 0.5, r"shape border: expected a share in \[0, 0.5\), got 0.5"),
        ("border", -0.1, "shape border"),
        ("chunk_points", 0, "shape chunk_points: expected at least 1, got 0"),
    ],
)
def test_shape_settings_out_of_range_raise_and_name_the_field(field, value, expected):
    with pytest.raises(ValueError, match=expected):
        ShapeSettings(**{field: value})


# Levels.


def test_surface_level_is_the_wanted_one_where_it_has_a_surface():
    volume = np.linspace(-5, 20, 64, dtype=np.float32).reshape(4, 4, 4)
    assert surface_level(volume, 10.0) == 10.0


@pytest.mark.parametrize("wanted", [30.0, -400.0])
def test_surface_level_falls_back_to_the_densest_tenth(wanted):
    volume = np.full((12, 12, 12), REMOVED_SIGMA, np.float32)
    volume[1:-1, 1:-1, 1:-1] = np.arange(1000).reshape(10, 10, 10) / 1000
    assert surface_level(volume, wanted) == pytest.approx(0.9, abs=0.002)


def test_save_shape_says_which_level_it_took(tmp_path, capsys):
    settings = ShapeSettings(resolution=16)
    assert save_shape(tmp_path / "a.ply", analytic_head(), settings) == 10.0
    assert capsys.readouterr().err == ""
    fog = analytic_head(lambda points: 0.1 * points[..., 1])
    level = save_shape(tmp_path / "b.ply", fog, settings)
    assert 0 < level < 0.1
    assert capsys.readouterr().err == f"b.ply: no surface at density 10; took {level:.4g}\n"
    assert save_shape(tmp_path / "c.mrc", fog, settings) is None


def test_save_shape_constant_density_has_no_surface_and_leaves_no_file(tmp_path):
    constant = analytic_head(lambda points: torch.zeros_like(points[..., 0]))
    with pytest.raises(ValueError, match="no surface"):
        save_shape(tmp_path / "a.ply", constant, ShapeSettings(resolution=8))
    assert not list(tmp_path.iterdir())


# Surfaces.


@pytest.mark.parametrize("suffix", MESH_FORMATS)
def test_save_shape_mesh_is_closed_upright_and_in_world_units(tmp_path, suffix):
    path = tmp_path / f"cone.{suffix}"
    save_shape(path, analytic_head(), ShapeSettings(resolution=64))
    mesh = read_mesh(path)
    assert mesh.is_watertight
    voxel = BOX_SIDE / 63
    low, high = mesh.bounds
    # Marching cubes rounds edges by less than a voxel, and the sharp tip by two.
    np.testing.assert_allclose(low, [CONE["axis_x"] - CONE["radius"], CONE["base_y"], -CONE["radius"]], atol=voxel)
    np.testing.assert_allclose(high[[0, 2]], [CONE["axis_x"] + CONE["radius"], CONE["radius"]], atol=voxel)
    assert CONE["tip_y"] - 2 * voxel <= high[1] <= CONE["tip_y"]
    height = CONE["tip_y"] - CONE["base_y"]
    assert mesh.volume == pytest.approx(np.pi * CONE["radius"] ** 2 * height / 3, rel=0.03)
    near_the_tip = mesh.vertices[mesh.vertices[:, 1] > 0.5]
    assert np.abs(near_the_tip[:, 0] - CONE["axis_x"]).max() < 0.15  # narrow above: +y is up


@pytest.mark.parametrize("suffix", MESH_FORMATS)
def test_save_shape_colours_are_those_of_the_vertices(tmp_path, suffix):
    path = tmp_path / f"cone.{suffix}"
    save_shape(path, analytic_head(), ShapeSettings(resolution=32, chunk_points=100))
    mesh = trimesh.load(path, force="mesh", process=False)
    expected = np.clip(np.asarray(mesh.vertices, np.float32) * 127.5 + 128, 0, 255)
    # Truncated to 8 bits, from vertices that the file may have rounded.
    np.testing.assert_allclose(np.asarray(mesh.visual.vertex_colors)[:, :3] + 0.5, expected, atol=0.51)


def test_save_shape_network_mesh_is_closed_and_has_its_colours(generator, tmp_path):
    head = make_head(generator, 0)
    save_shape(tmp_path / "head.ply", head, ShapeSettings(resolution=16))
    mesh = trimesh.load(tmp_path / "head.ply", process=False)
    assert mesh.is_watertight
    half = generator.config.rendering.box_warp / 2
    assert np.abs(mesh.bounds).max() < half
    with torch.no_grad():
        colors = generator.point_colors(head.field, torch.from_numpy(np.asarray(mesh.vertices)).float()[None])[0]
    expected = (colors * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy()
    np.testing.assert_array_equal(np.asarray(mesh.visual.vertex_colors)[:, :3], expected)
    assert len(np.unique(expected, axis=0)) > 10


def test_vertex_colors_of_a_network_in_chunks_equal_the_whole(generator):
    head = make_head(generator, 0)
    vertices = np.random.RandomState(0).uniform(-0.4, 0.4, (50, 3)).astype(np.float32)
    whole, chunked = vertex_colors(head, vertices), vertex_colors(head, vertices, chunk_points=7)
    assert whole.shape == (50, 3) and whole.dtype == np.uint8
    # A matrix product of another height may sum in another order, which truncation to 8 bits can make one step.
    np.testing.assert_allclose(chunked.astype(int), whole.astype(int), atol=1)


def test_save_shape_volume_has_the_world_s_axes_and_scale(tmp_path):
    import mrcfile

    save_shape(tmp_path / "a.mrc", analytic_head(), ShapeSettings(resolution=16))
    volume = density_volume(analytic_head(), ShapeSettings(resolution=16))
    with mrcfile.open(tmp_path / "a.mrc") as mrc:
        np.testing.assert_array_equal(mrc.data.T, volume)
        np.testing.assert_allclose(mrc.voxel_size.x, BOX_SIDE / 15, rtol=1e-6)
        np.testing.assert_allclose(mrc.header.origin.y, -BOX_SIDE / 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["a.stl", "a", "a.ply.gz"])
def test_save_shape_other_suffix_raises_before_any_work(tmp_path, name):
    with pytest.raises(ValueError, match="expected a suffix of mrc, ply, obj, glb"):
        save_shape(tmp_path / name, None, ShapeSettings())
