"""Depths along rays equal loops over single rays, stay in range and handle rays that miss everything."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import twins
from training.config import RenderingConfig
from training.volumetric_rendering.depth_sampling import (
    importance_depths,
    ray_limits,
    sample_pdf,
    stratified_depths,
)

ROUNDING = {"rtol": 1e-11, "atol": 1e-11}  # float64, one formula in another order
AUTO = {"ray_start": "auto", "ray_end": "auto"}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def config(num_coarse: int = 6, num_fine: int = 0, **fields) -> RenderingConfig:
    return RenderingConfig(depth_resolution=num_coarse, depth_resolution_importance=num_fine, **fields)


def coarse_depths(origins, directions, jitter: torch.Tensor, settings: RenderingConfig) -> torch.Tensor:
    return stratified_depths(*ray_limits(origins, directions, settings), jitter, settings)


def axis_rays(offsets: list[float], distance: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rays `[1, R, 3]` along -z at these x; the box reaches to x = 0.5."""
    origins = torch.tensor([[[x, 0.1, distance] for x in offsets]], dtype=torch.float64)
    return origins, torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64).expand_as(origins)


# Coarse depths.


@pytest.mark.parametrize("num_samples", [2, 3, 6])
@pytest.mark.parametrize("disparity", [False, True])
def test_stratified_depths_equal_loops(num_samples, disparity):
    jitter = rand(2, 3, num_samples)
    rays = torch.zeros(2, 3, 3, dtype=torch.float64)
    ours = coarse_depths(rays, rays, jitter, config(num_samples, disparity_space_sampling=disparity))
    expected = [[twins.coarse_depths(2.25, 3.3, ray, disparity) for ray in scene] for scene in jitter.tolist()]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), **ROUNDING)
    assert (ours.diff(dim=-1) > 0).all()


def test_stratified_depths_jitter_goes_from_the_sample_to_the_next_one():
    rays = torch.zeros(1, 1, 3, dtype=torch.float64)
    lowest = coarse_depths(rays, rays, torch.zeros(1, 1, 5).double(), config(5, ray_start=1.0, ray_end=3.0))
    highest = coarse_depths(rays, rays, torch.ones(1, 1, 5).double(), config(5, ray_start=1.0, ray_end=3.0))
    assert lowest[0, 0].tolist() == [1, 1.5, 2, 2.5, 3]
    assert highest[0, 0].tolist() == [1.5, 2, 2.5, 3, 3.5]  # one-sided: the last may lie behind the end


def test_stratified_depths_disparity_over_a_wide_range_stays_in_front_of_the_camera():
    wide = config(5, ray_start=0.1, ray_end=2.5, disparity_space_sampling=True)
    rays, jitter = torch.zeros(1, 2, 3).double(), torch.stack([torch.zeros(5), torch.full((5,), 0.999)])[None].double()
    ours = coarse_depths(rays, rays, jitter, wide)
    assert (ours.diff(dim=-1) > 0).all() and ours.min() > 0
    assert ours[0, 1, -1].item() == pytest.approx(25)  # at most ten times the end


def test_stratified_depths_auto_limits_equal_loops():
    origins = torch.tensor([[[0.3, 0.2, 2.0], [0.0, -0.1, -3.0], [1.5, 1.5, 1.6]]], dtype=torch.float64)
    directions = torch.nn.functional.normalize(torch.tensor([0.1, 0.05, 0.0]).double() - origins, dim=-1)
    jitter = rand(1, 3, 6)
    ours = coarse_depths(origins, directions, jitter, config(**AUTO))
    for r in range(3):
        limits = twins.box_limits(origins[0, r].tolist(), directions[0, r].tolist(), 1.0)
        expected = torch.tensor(twins.coarse_depths(*limits, jitter[0, r].tolist()), dtype=torch.float64)
        torch.testing.assert_close(ours[0, r], expected, **ROUNDING)


@pytest.mark.parametrize(("rule", "end"), [("longest", 4.5), ("nearest", 3.5)])
def test_stratified_depths_auto_rays_that_miss_take_the_limits_of_the_others(rule, end):
    near, near_directions = axis_rays([0.0, 0.7], distance=2.0)
    far, _ = axis_rays([0.2, 0.9], distance=4.0)
    origins, directions = torch.cat([near, far]), torch.cat([near_directions] * 2)
    ours = coarse_depths(origins, directions, torch.zeros(2, 2, 6).double(), config(auto_range_of_misses=rule, **AUTO))
    limits = ours[:, :, [0, -1]]
    assert limits[0, 0].tolist() == [1.5, 2.5] and limits[1, 0].tolist() == [3.5, 4.5]
    assert limits[0, 1].tolist() == limits[1, 1].tolist() == [1.5, end]


def test_stratified_depths_auto_rays_that_all_miss_have_no_length():
    rays = axis_rays([0.7, 0.9])
    assert (coarse_depths(*rays, rand(1, 2, 6), config(**AUTO)) == 0).all()


def test_stratified_depths_auto_rays_that_all_miss_run_backwards_where_published():
    rays = axis_rays([0.7, 0.9])
    ours = coarse_depths(*rays, torch.zeros(1, 2, 6).double(), config(auto_range_of_misses="nearest", **AUTO))
    assert ours[0, 0, [0, -1]].tolist() == [-1, -2]


# Importance depths.


@pytest.mark.parametrize("num_coarse", [4, 5, 9])
@pytest.mark.parametrize("num_fine", [1, 7])
def test_importance_depths_equal_loops(num_coarse, num_fine):
    depths, weights = rand(2, 3, num_coarse).sort(dim=-1).values, rand(2, 3, num_coarse - 1, seed=1).pow(4)
    uniforms = rand(2, 3, num_fine, seed=2)
    ours = importance_depths(depths, weights, uniforms)
    expected = [
        [twins.fine_depths(*(x[b, r].tolist() for x in (depths, weights, uniforms))) for r in range(3)]
        for b in range(2)
    ]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), **ROUNDING)


def test_importance_depths_never_reach_the_last_midpoint():
    depths = torch.arange(8.0).double().expand(1, 1, -1)
    uniforms = torch.linspace(0, 1 - 1e-9, 1001, dtype=torch.float64).expand(1, 1, -1)
    ours = importance_depths(depths, rand(1, 1, 7), uniforms)
    torch.testing.assert_close(ours[0, 0, [0, -1]], torch.tensor([0.5, 5.5]).double(), rtol=0, atol=1e-6)  # 1 - 1e-9
    assert (ours.diff(dim=-1) >= 0).all()


def test_importance_depths_without_weights_are_spread_evenly():
    depths = torch.arange(6.0).double().expand(1, 1, -1)
    uniforms = torch.linspace(0, 0.9, 10, dtype=torch.float64).expand(1, 1, -1)
    ours = importance_depths(depths, torch.zeros(1, 1, 5).double(), uniforms)
    torch.testing.assert_close(ours, 0.5 + 3 * uniforms, **ROUNDING)


def test_importance_depths_follow_the_weights():
    depths = torch.linspace(0, 1, 48, dtype=torch.float64).expand(1, 1, -1)
    weights = torch.zeros(1, 1, 47, dtype=torch.float64)
    weights[..., 30] = 1
    ours = importance_depths(depths, weights, rand(1, 1, 1000))
    around = (ours - depths[..., 30]).abs() < 0.06  # the interval, and the neighbours that the filter spreads it to
    assert around.double().mean() > 0.8


def test_importance_depths_carry_no_gradient():
    depths, weights = rand(1, 1, 6).sort(dim=-1).values.requires_grad_(), rand(1, 1, 5).requires_grad_()
    assert not importance_depths(depths, weights, rand(1, 1, 3)).requires_grad


@pytest.mark.parametrize(
    "weights",
    [[0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 5.0, 0.0], [1e-12, 1e12, 1e-12]],
    ids=["zero", "gap", "one", "big"],
)
def test_sample_pdf_equals_loops(weights):
    bins, uniforms = [0.0, 1.0, 3.0, 4.0, 9.0], [0.0, 1e-7, 0.25, 0.5, 0.500001, 0.75, 1 - 1e-7]
    ours = sample_pdf(*(torch.tensor(x, dtype=torch.float64) for x in (bins, weights, uniforms)))
    expected = torch.tensor(twins.sample_pdf(bins, weights, uniforms), dtype=torch.float64)
    torch.testing.assert_close(ours, expected, **ROUNDING)
    assert ((ours >= 0) & (ours <= 4)).all()
