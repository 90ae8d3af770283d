"""Weights, compositing and depths of rays equal loops over single intervals."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers import twins
from training.volumetric_rendering.ray_marcher import (
    expected_depth,
    limit_depth,
    midpoints,
    render_weight_from_density,
    sample_weights_from_intervals,
)

ROUNDING = {"rtol": 1e-11, "atol": 1e-11}  # float64, one formula in another order
REMOVED = -1000.0


def composite_depth(weights: torch.Tensor, depths: torch.Tensor, clamp: str) -> torch.Tensor:
    depth_range = torch.stack([depths[..., 0], depths[..., -1]], dim=-1)
    return limit_depth(expected_depth(weights, depths), weights.sum(dim=-1), depth_range, clamp)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sorted_depths(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 + torch.rand(*shape, dtype=torch.float64, generator=generator)).sort(dim=-1).values


@pytest.mark.parametrize("num_samples", [2, 3, 9])
def test_render_weight_from_density_equals_loops(num_samples):
    sigma, depths = 20 * randn(2, 3, num_samples), sorted_depths(2, 3, num_samples)
    expected = [
        [twins.interval_weights(sigma[b, r].tolist(), depths[b, r].tolist()) for r in range(3)] for b in range(2)
    ]
    ours = render_weight_from_density(sigma, depths)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), **ROUNDING)
    assert (ours >= 0).all() and (ours.sum(dim=-1) <= 1 + 1e-9).all()


def test_render_weight_from_density_constant_density_follows_beer_and_lambert():
    depths = torch.linspace(0, 2, 50, dtype=torch.float64).expand(1, 1, -1)
    weights = render_weight_from_density(torch.full_like(depths, 1.5), depths)
    expected = 1 - math.exp(-2 * twins.softplus(0.5))
    assert weights.sum().item() == pytest.approx(expected, abs=1e-8)  # 1e-10 per interval


def test_render_weight_from_density_removed_samples_have_none():
    sigma = torch.full((1, 1, 6), 30.0)
    sigma[..., 2] = REMOVED
    weights = render_weight_from_density(sigma, torch.linspace(2, 3, 6).expand(1, 1, -1))
    assert (weights[0, 0, 1:3] == 0).all() and (weights[0, 0, [0, 3]] > 0).all()


def test_render_weight_from_density_coinciding_depths_have_none():
    depths = torch.tensor([[[2.0, 2.0, 2.5, 2.5, 3.0]]])
    weights = render_weight_from_density(torch.full_like(depths, 5.0), depths)
    assert (weights[0, 0, [0, 2]] == 0).all() and (weights[0, 0, [1, 3]] > 0).all()


def test_render_weight_from_density_opaque_front_hides_what_is_behind():
    sigma = torch.tensor([[[1e4, 1e4, 5.0, 5.0]]])
    weights = render_weight_from_density(sigma, torch.tensor([[[2.0, 2.5, 3.0, 3.5]]]))
    torch.testing.assert_close(weights, torch.tensor([[[1.0, 0.0, 0.0]]]), rtol=0, atol=1e-9)  # 1e-10 per interval


def test_render_weight_from_density_gradients_are_right():
    sigma, depths = randn(1, 2, 5).requires_grad_(), sorted_depths(1, 2, 5).requires_grad_()
    assert torch.autograd.gradcheck(render_weight_from_density, (sigma, depths))


def test_sample_weights_from_intervals_composites_the_same_as_midpoints():
    weights, colors = randn(2, 3, 6).abs(), randn(2, 3, 7, 4)
    expected = torch.einsum("brs,brsc->brc", weights, midpoints(colors.movedim(-1, 0)).movedim(0, -1))
    ours = torch.einsum("brs,brsc->brc", sample_weights_from_intervals(weights), colors)
    torch.testing.assert_close(ours, expected, **ROUNDING)


# Depth.


def test_composite_depth_equals_the_mean_over_the_weights():
    weights, depths = randn(2, 3, 4).abs(), sorted_depths(2, 3, 5)
    expected = (weights * (depths[..., 1:] + depths[..., :-1]) / 2).sum(dim=-1) / weights.sum(dim=-1)
    for clamp in ("ray", "batch"):
        torch.testing.assert_close(composite_depth(weights, depths, clamp), expected, **ROUNDING)


def test_composite_depth_of_an_empty_ray_is_the_end_of_its_own_range_or_of_the_batch():
    weights, depths = torch.tensor([[[0.0, 0.0], [0.5, 0.2]]]), torch.tensor([[[1.0, 2.0, 3.0], [2.0, 5.0, 7.0]]])
    assert composite_depth(weights, depths, "ray")[0, 0] == 3
    assert composite_depth(weights, depths, "batch")[0, 0] == 7
    assert composite_depth(weights, depths, "ray")[0, 1] == composite_depth(weights, depths, "batch")[0, 1]


def test_composite_depth_of_an_empty_ray_has_finite_gradients():
    weights = torch.zeros(1, 2, 4, dtype=torch.float64)
    weights[0, 1] = 0.1
    weights, depths = weights.requires_grad_(), sorted_depths(1, 2, 5).requires_grad_()
    composite_depth(weights, depths, "ray").sum().backward()
    assert weights.grad.isfinite().all() and depths.grad.isfinite().all()
    assert (weights.grad[0, 1] != 0).any()


def test_composite_depth_gradients_are_right():
    weights, depths = randn(1, 2, 4).abs().requires_grad_(), sorted_depths(1, 2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, t: composite_depth(w, t, "ray"), (weights, depths))
