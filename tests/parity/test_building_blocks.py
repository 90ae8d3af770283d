"""Formulas of resampling, rays, spherical coordinates, depth sampling and marching give the published numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.parity import relative_error
from tests.helpers.vectors import flat, read_json_gz
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upsample2d
from training.layers import RESAMPLE_TAPS
from training.representations import make_representation, spherical_coordinates
from training.volumetric_rendering.depth_sampling import importance_depths
from training.volumetric_rendering.math_utils import intersect_box
from training.volumetric_rendering.ray_marcher import (
    expected_depth,
    limit_depth,
    render_weight_from_density,
    sample_weights_from_intervals,
)
from training.volumetric_rendering.ray_sampler import sample_rays

VECTORS = read_json_gz("building_blocks")
FIR = setup_filter(RESAMPLE_TAPS)
ROUNDING = 1e-6  # one formula in float32; the reference values have 8 digits


def composite_depth(weights: torch.Tensor, depths: torch.Tensor, clamp: str) -> torch.Tensor:
    depth_range = torch.stack([depths[..., 0], depths[..., -1]], dim=-1)
    return limit_depth(expected_depth(weights, depths), weights.sum(dim=-1), depth_range, clamp)


def normals(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape).astype(np.float32))


def check(ours: torch.Tensor, values: dict, key: str, tolerance: float = ROUNDING) -> None:
    assert relative_error(ours.flatten(), flat(values, key, -1)) <= tolerance, key


def test_setup_filter_default_taps_equal_published_entries():
    rows = torch.tensor([[1.0, 3, 3, 1], [3, 9, 9, 3], [3, 9, 9, 3], [1, 3, 3, 1]])
    torch.testing.assert_close(FIR, rows / 64, rtol=0, atol=0)  # exact: powers of two


def test_resampling_equals_published():
    x, values = normals(7, 1, 1, 5, 6), VECTORS["resample"]
    check(upsample2d(x, FIR), values, "upsample2d")
    check(downsample2d(x[:, :, :4], FIR), values, "downsample2d_of_4x6")
    # A Gaussian of sigma 1 out to 3 sigma, as the blur of the published discriminator phases prepares it.
    taps = torch.arange(-3, 4, dtype=torch.float32).square().neg().exp2()
    check(filter2d(x, taps / taps.sum()), values, "filter2d_blur_sigma1")


@pytest.mark.parametrize(("name", "options"), {"up2": {"up": 2}, "down2": {"down": 2}, "same": {}}.items())
def test_convolution_with_resampling_equals_published(name, options):
    x, weight = normals(9, 1, 1, 4, 4), normals(8, 2, 1, 3, 3)
    check(conv2d_resample(x, weight, FIR, padding=1, **options), VECTORS["conv_resample"], name, 2e-6)


def test_rays_equal_published():
    values = VECTORS["rays_R4"]
    origins, directions = sample_rays(flat(values, "cam2world", 1, 4, 4), flat(values, "K", 1, 3, 3), 4)
    assert origins.shape == directions.shape == (1, 16, 3)
    check(origins[0, 0], values, "origins_first")
    torch.testing.assert_close(origins, origins[:, :1].expand_as(origins), rtol=0, atol=0)  # copies of one number
    check(directions, values, "dirs")


@pytest.mark.parametrize("sphere", ["A", "B"])
def test_spherical_coordinates_equal_published(sphere):
    points = torch.from_numpy(np.random.RandomState(0).uniform(-0.5, 0.5, (12, 3)).astype(np.float32)) * 2
    x, y, z = points.unbind(dim=-1)
    axes = {"A": (z, y, -x), "B": (-z, -x, y)}[sphere]
    coordinates = spherical_coordinates(torch.stack(axes, dim=-1))
    for name in ("theta", "phi", "radius", "weight"):
        check(getattr(coordinates, name), VECTORS["spherical_box1"][sphere], name, 2e-6)


def test_dual_spherical_look_up_equals_published():
    values = VECTORS["sphere_sample_planes_RandomState1_1x2x3x32x8x8"]
    planes = normals(1, 1, 2, 3, 32, 8, 8)
    points = torch.from_numpy(np.random.RandomState(0).uniform(-0.5, 0.5, (1, 12, 3)).astype(np.float32)) * 2
    representation = make_representation("dual_spherical", 3)
    # The reference is given per plane; the representation returns the mean of the three.
    alone = [planes * (torch.arange(3) == d)[:, None, None, None] for d in range(3)]
    fused = torch.stack([3 * representation(one, points) for one in alone], dim=1)
    assert list(fused.shape) == values["shape"]
    check(fused[..., 0], values, "first_channel", 1e-5)
    assert relative_error(fused.mean(), torch.tensor(values["mean"])) <= 1e-6
    assert relative_error(fused.std(correction=0), torch.tensor(values["std"])) <= 1e-6
    torch.testing.assert_close(representation(planes, points), fused.mean(dim=1), rtol=0, atol=1e-6)  # reordered sum


def depths_and_weights() -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.RandomState(4)
    depths = np.sort(random.uniform(2.25, 3.3, (1, 3, 8, 1)), axis=2)[..., 0].astype(np.float32)
    weights = random.uniform(0, 1, (1, 3, 7, 1))[..., 0].astype(np.float32)
    return torch.from_numpy(depths), torch.from_numpy(weights)


def test_importance_depths_equal_published():
    values = VECTORS["importance"]
    torch.manual_seed(values["seed"])
    uniforms = torch.rand(3, values["n"])[None]
    check(importance_depths(*depths_and_weights(), uniforms), values, "out")


def test_marching_equals_published():
    random = np.random.RandomState(6)
    colors = torch.from_numpy(random.randn(1, 3, 8, 2).astype(np.float32))
    sigma = torch.from_numpy((3 * random.randn(1, 3, 8, 1))[..., 0].astype(np.float32))
    depths, _ = depths_and_weights()
    weights = render_weight_from_density(sigma, depths)
    values = VECTORS["marcher"]
    check(weights, values, "weights")
    check(torch.einsum("brs,brsc->brc", sample_weights_from_intervals(weights), colors), values, "rgb")
    check(composite_depth(weights, depths, "batch"), values, "depth")
    check(composite_depth(weights, depths, "ray"), values, "depth")  # every ray has weight, so the clamp is idle


def test_box_limits_equal_published():
    values = VECTORS["box_limits"]
    near, far = intersect_box(flat(values, "o", 1, -1, 3), flat(values, "d", 1, -1, 3), 1.0)
    check(near, values, "near", 2e-6)
    check(far, values, "far", 2e-6)
