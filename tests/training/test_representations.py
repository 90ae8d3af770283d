"""Plane representations equal loops over single points, and have finite, right gradients everywhere."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from tests.helpers import twins
from tests.helpers.published import fixture_cameras
from training import representations
from training.presets import generator_preset
from training.representations import (
    PLANE_FEATURES,
    Representation,
    TriGrid,
    make_representation,
    register_representation,
    sample_planes,
    spherical_coordinates,
)
from training.triplane import TriPlaneGenerator

DTYPES = [torch.float32, torch.float64]
REORDERED = {"rtol": 1e-10, "atol": 1e-10}  # float64, the same products summed in another order
SPHERE_AXES = {"A": lambda x, y, z: (z, y, -x), "B": lambda x, y, z: (-z, -x, y)}
TWINS = {
    "dual_spherical": twins.look_up_dual_spherical,
    "tri_plane": twins.look_up_tri_plane,
    "tri_grid": twins.look_up_tri_grid,
}
DEPTHS = {"dual_spherical": 3, "tri_plane": 1, "tri_grid": 3}
PLANE_SHAPES = {
    "dual_spherical": (2, 3, PLANE_FEATURES, 6, 6),
    "tri_plane": (3, PLANE_FEATURES, 6, 6),
    "tri_grid": (3, PLANE_FEATURES, 3, 6, 6),
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * scale


def random_planes(name: str, batch: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return randn(batch, *PLANE_SHAPES[name], dtype=dtype)


def difficult_points(dtype: torch.dtype) -> torch.Tensor:
    """Return points `[M, 3]` on and around the origin, both polar axes, both seams and all coordinate planes."""
    tiny = torch.finfo(dtype).tiny
    # Zeros of both signs, the smallest denormal, underflow of squares, and ordinary sizes.
    sizes = [0.0, tiny * torch.finfo(dtype).eps, tiny, tiny**0.75, tiny**0.5, tiny**0.25, 1e-12, 1e-6, 1e-3, 0.5, 1.0]
    values = [-0.0, *sizes, *(-size for size in sizes)]
    return torch.tensor(list(itertools.product(values, repeat=3)), dtype=dtype)


# Spherical coordinates.


def test_spherical_weight_closed_form_equals_the_cosines_of_the_paper():
    points = uniform(4000, 3)
    theta, phi, _, weight = spherical_coordinates(points)
    cosines = (1 + (math.pi * theta).cos()) / 2 * (1 + (math.pi * phi).cos()) / 2
    torch.testing.assert_close(weight, cosines, rtol=0, atol=1e-12)  # float64, away from the singularities


def test_spherical_coordinates_equal_loops():
    points = uniform(100, 3)
    ours = torch.stack(spherical_coordinates(points), dim=1)
    expected = torch.tensor([twins.spherical_coordinates(*point) for point in points.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)  # float64, one formula each


def test_spherical_weight_near_the_seam_keeps_its_relative_accuracy():
    y = torch.tensor([1e-3, 1e-6, 1e-9], dtype=torch.float32)
    points = torch.stack([torch.full_like(y, -1), y, torch.zeros_like(y)], dim=-1)
    weight = spherical_coordinates(points).weight
    torch.testing.assert_close(weight, y.double().square().float() / 4, rtol=1e-5, atol=0)  # y^2 / 4 to order y^4


@pytest.mark.parametrize(
    ("point", "theta", "phi", "weight"),
    [
        pytest.param((1, 0, 0), 0, 0, 1, id="front"),
        pytest.param((0, 0, 1), -1, 0, 0, id="pole"),
        pytest.param((0, 0, -1), 1, 0, 0, id="other pole"),
        pytest.param((-1, 0, 0), 0, 1, 0, id="seam"),
        pytest.param((0, 1, 0), 0, 0.5, 0.5, id="side"),
        pytest.param((0, -1, 0), 0, -0.5, 0.5, id="other side"),
    ],
)
def test_spherical_coordinates_of_unit_vectors_are_the_landmarks(point, theta, phi, weight):
    ours = spherical_coordinates(torch.tensor([point], dtype=torch.float64))
    expected = torch.tensor([[theta], [phi], [2 / math.sqrt(3) - 1], [weight]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(ours), expected, rtol=0, atol=1e-12)  # float64


def test_spherical_radius_is_minus_one_at_the_origin_and_one_at_the_corners():
    points = torch.tensor([[0.0, 0, 0], [1, -1, 1], [-1, -1, -1]], dtype=torch.float64)
    radius = torch.tensor([-1.0, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(spherical_coordinates(points).radius, radius, rtol=0, atol=1e-12)  # float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sphere", SPHERE_AXES)
def test_spherical_coordinates_difficult_points_have_finite_values_and_gradients(sphere, dtype):
    points = difficult_points(dtype).requires_grad_()
    out = spherical_coordinates(torch.stack(SPHERE_AXES[sphere](*points.unbind(dim=-1)), dim=-1))
    for name, limits in {"theta": (-1, 1), "phi": (-1, 1), "radius": (-1, 1), "weight": (0, 1)}.items():
        value = getattr(out, name)
        assert value.isfinite().all(), name
        assert value.min() >= limits[0] - 1e-6 and value.max() <= limits[1] + 1e-6, name
        (gradient,) = torch.autograd.grad(value.sum(), points, retain_graph=True)
        assert gradient.isfinite().all(), (name, points[~gradient.isfinite().all(dim=1)][:5])


@pytest.mark.parametrize("sphere", SPHERE_AXES)
@pytest.mark.parametrize("kind", ["generic", "seam", "pole"])
def test_spherical_coordinates_gradients_are_right(sphere, kind):
    points = uniform(12, 3, scale=0.9)
    # Along the sphere's own axes: next to the seam x < 0, |y| small; next to the pole x and y small.
    if kind == "seam":
        points = torch.stack([-points[:, 0].abs() - 0.1, points[:, 1] * 1e-3, points[:, 2]], dim=-1)
    if kind == "pole":
        points = torch.stack([points[:, 0] * 1e-2, points[:, 1] * 1e-2, points[:, 2] + points[:, 2].sign()], dim=-1)
    x, y, z = points.unbind(dim=-1)
    world = {"A": (-z, y, x), "B": (-y, z, -x)}[sphere]
    torch.testing.assert_close(torch.stack(SPHERE_AXES[sphere](*world), dim=-1), points, rtol=0, atol=0)  # permuted

    def coordinates(world):
        return tuple(spherical_coordinates(torch.stack(SPHERE_AXES[sphere](*world.unbind(dim=-1)), dim=-1)))

    assert torch.autograd.gradcheck(coordinates, torch.stack(world, dim=-1).requires_grad_(), eps=1e-7)


# Look-ups.


@pytest.mark.parametrize("name", TWINS)
def test_representation_equals_loops_over_points(name):
    planes = random_planes(name)
    # Inside, on the half-texel border, and outside the box.
    points = torch.cat([uniform(2, 12, 3), uniform(2, 6, 3, seed=1, scale=1.6)], dim=1)
    ours = make_representation(name, DEPTHS[name])(planes, points)
    expected = [
        [torch.from_numpy(TWINS[name](scene.numpy(), point)) for point in scene_points.tolist()]
        for scene, scene_points in zip(planes, points, strict=True)
    ]
    torch.testing.assert_close(ours, torch.stack([torch.stack(rows) for rows in expected]), **REORDERED)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("num_points", [0, 1, 7])
def test_representation_any_number_of_points(name, num_points):
    planes = random_planes(name, batch=1)
    assert make_representation(name, DEPTHS[name])(planes, uniform(1, num_points, 3)).shape == (1, num_points, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TWINS)
def test_representation_difficult_points_have_finite_values_and_gradients(name, dtype):
    points = difficult_points(dtype)[None].requires_grad_()
    planes = random_planes(name, batch=1, dtype=dtype).requires_grad_()
    out = make_representation(name, DEPTHS[name])(planes, points)
    assert out.isfinite().all()
    # Different weights per channel, so that nothing cancels by symmetry.
    (out * torch.arange(1, 33)).sum().backward()
    assert planes.grad.isfinite().all()
    bad = ~points.grad.isfinite().all(dim=-1)
    assert not bad.any(), points[bad][:5]


@pytest.mark.parametrize("name", TWINS)
def test_representation_gradients_are_right(name):
    planes = random_planes(name, batch=1).requires_grad_()
    representation = make_representation(name, DEPTHS[name])
    # Linear interpolation has kinks between texels; within the step of 1e-7 around these points there are none.
    points = uniform(1, 4, 3, scale=0.95, seed=3).requires_grad_()
    weights = randn(1, 4, 32, seed=5)
    assert torch.autograd.gradcheck(
        lambda p, x: (representation(p, x) * weights).sum(dim=-1), (planes, points), eps=1e-7, atol=1e-5, fast_mode=True
    )


def test_dual_spherical_gradients_next_to_seams_and_poles_are_right():
    planes = random_planes("dual_spherical", batch=1)
    representation = make_representation("dual_spherical", 3)
    near = 1e-3
    points = torch.tensor(
        [
            [near, 0.31, -0.5],  # seam of sphere A: x = 0, z < 0
            [-near, -0.27, -0.6],
            [0.23, near, 0.43],  # its equator
            [near, 0.33, 0.57],  # seam of sphere B
            [0.61, near, 2 * near],  # pole of A
            [near, 0.47, -near],  # pole of B
            [3 * near, 2 * near, -near],  # the origin
        ],
        dtype=torch.float64,
    )[None].requires_grad_()
    weights = randn(1, points.shape[1], 32, seed=5)
    assert torch.autograd.gradcheck(
        lambda x: (representation(planes, x) * weights).sum(dim=-1), points, eps=1e-8, atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["tri_plane", "tri_grid"])
def test_representation_outside_the_box_is_zero(name):
    points = uniform(1, 50, 3)
    points = points + 1.25 * points.sign()  # a texel of six reaches a sixth beyond the box
    assert (make_representation(name, DEPTHS[name])(random_planes(name, batch=1), points) == 0).all()


def test_dual_spherical_outside_the_box_keeps_only_the_plane_over_the_angles():
    planes = random_planes("dual_spherical", batch=1)
    points = 2.2 * torch.nn.functional.normalize(randn(1, 50, 3), dim=-1)  # the corners are at a distance of 1.7
    representation = make_representation("dual_spherical", 3)
    angles_only = planes.clone()
    angles_only[:, :, 1:] = 0
    assert (representation(planes - angles_only, points) == 0).all()
    torch.testing.assert_close(representation(planes, points), representation(angles_only, points), rtol=0, atol=0)


def test_tri_grid_constant_grid_is_one_inside():
    planes = torch.ones(1, 3, 32, 4, 8, 8, dtype=torch.float64)
    inside = uniform(1, 20, 3, scale=0.7)
    ours = TriGrid(4)(planes, inside)
    torch.testing.assert_close(ours, torch.ones_like(ours), **REORDERED)


def test_tri_grid_depth_one_fades_along_its_depth_axis():
    planes = torch.ones(1, 3, 32, 1, 8, 8, dtype=torch.float64)
    points = uniform(1, 20, 3, scale=0.8)
    expected = (1 - points.abs() / 2).mean(dim=-1, keepdim=True).expand(-1, -1, 32)  # the depths are z, y and x
    torch.testing.assert_close(make_representation("tri_grid", 1)(planes, points), expected, **REORDERED)


def test_tri_plane_third_plane_is_z_x_as_published():
    planes = torch.zeros(1, 3, 32, 8, 8, dtype=torch.float64)
    planes[:, 2] = randn(32, 8, 8)
    points = uniform(1, 10, 3)
    ours = make_representation("tri_plane", 1)(planes, points)
    moved = points + torch.tensor([0, 0.1, 0]).double()
    torch.testing.assert_close(make_representation("tri_plane", 1)(planes, moved), ours, rtol=0, atol=0)  # blind to y


def test_sample_planes_outer_edges_are_half_and_beyond_is_zero():
    planes = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    coordinates = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, -1.0], [1.5, 0.0], [9.0, 0.0]]], dtype=torch.float64)
    expected = torch.tensor([1, 0.5, 0.25, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(sample_planes(planes, coordinates)[0, 0], expected, rtol=0, atol=1e-12)  # float64


@pytest.mark.parametrize("name", TWINS)
def test_unpack_follows_the_published_channel_order(name):
    representation = make_representation(name, DEPTHS[name])
    channels = torch.arange(representation.plane_channels, dtype=torch.float32)
    planes = representation.unpack(channels[None, :, None, None])
    if name == "dual_spherical":  # sphere, plane, feature
        assert planes[0, 1, 2, 5, 0, 0] == 1 * 96 + 2 * 32 + 5
    elif name == "tri_plane":  # plane, feature
        assert planes[0, 2, 5, 0, 0] == 2 * 32 + 5
    else:  # plane, feature, depth
        assert planes[0, 2, 5, 1, 0, 0] == 2 * 32 * 3 + 5 * 3 + 1


# The registry.


def test_make_representation_unknown_name_raises_value_error_with_the_known_ones():
    with pytest.raises(ValueError, match=r"dual_spherical, tri_grid, tri_plane.*'hash_grid'"):
        make_representation("hash_grid", 1)


@pytest.mark.parametrize(
    ("name", "depth"), [("dual_spherical", 1), ("dual_spherical", 4), ("tri_plane", 3), ("tri_grid", 0)]
)
def test_make_representation_impossible_depth_raises_value_error(name, depth):
    with pytest.raises(ValueError, match=f"plane_depth.*{depth}"):
        make_representation(name, depth)


@pytest.fixture
def single_plane():
    """Register a fourth representation for one test: a single plane over x and z."""

    @register_representation("single_plane")
    class SinglePlane(Representation):
        backbone_channels = plane_channels = PLANE_FEATURES

        def unpack(self, image: torch.Tensor) -> torch.Tensor:
            return image

        def __call__(self, planes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
            return sample_planes(planes, points[..., [0, 2]]).transpose(1, 2)

    yield SinglePlane
    del representations._REGISTRY["single_plane"]


def test_register_representation_a_fourth_one_builds_a_generator_and_renders(single_plane):
    config = dataclasses.replace(
        generator_preset("debug"), representation="single_plane", plane_depth=1, neural_rendering_resolution=8
    )
    generator = TriPlaneGenerator.from_config(config).eval()
    assert isinstance(generator.renderer.representation, single_plane)
    with torch.no_grad():
        out = generator(torch.zeros(2, 64), fixture_cameras(), noise_mode="const")
    assert out["image"].shape == (2, 3, 128, 128) and out["image"].isfinite().all()
    assert generator.config == config


def test_register_representation_taken_name_raises_value_error(single_plane):
    with pytest.raises(ValueError, match="'single_plane'"):
        register_representation("single_plane")(single_plane)
    assert representations._REGISTRY["single_plane"] is single_plane
