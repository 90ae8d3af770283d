"""Rays meet the box where loops over single slabs say, and nowhere divide by zero."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import twins
from training.volumetric_rendering.math_utils import intersect_box

SIDE = 1.0
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # float64, one formula
AXES = torch.eye(3, dtype=torch.float64)


def random_rays(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rays around the box, about half of which hit it."""
    generator = torch.Generator().manual_seed(0)
    origins = torch.randn(1, num, 3, dtype=torch.float64, generator=generator)
    targets = 0.9 * torch.rand(1, num, 3, dtype=torch.float64, generator=generator) - 0.2
    return origins, F.normalize(targets - origins, dim=-1)


def test_intersect_box_random_rays_equal_loops():
    origins, directions = random_rays(300)
    near, far = intersect_box(origins, directions, SIDE)
    expected = [twins.box_limits(o, d, SIDE) for o, d in zip(origins[0].tolist(), directions[0].tolist(), strict=True)]
    torch.testing.assert_close(
        torch.cat([near, far], dim=-1)[0], torch.tensor(expected, dtype=torch.float64), **ROUNDING
    )
    num_hit = int((far > near).sum())
    assert 50 < num_hit < 290  # both kinds are there


def test_intersect_box_limits_lie_on_the_surface():
    origins, directions = random_rays(300)
    near, far = intersect_box(origins, directions, SIDE)
    for limit in (near, far):
        surface = (origins + limit * directions).abs().amax(dim=-1)[(far > near)[..., 0]]
        torch.testing.assert_close(surface, torch.full_like(surface, SIDE / 2), **ROUNDING)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("axis", range(3))
def test_intersect_box_parallel_rays_hit_inside_the_slabs_and_on_their_faces_only(axis, sign):
    side = AXES[(axis + 1) % 3]
    origins = torch.stack([-sign * 2 * AXES[axis] + offset * side for offset in (0.0, 0.3, 0.5, -0.5, 0.51)])[None]
    near, far = intersect_box(origins, (sign * AXES[axis]).expand_as(origins), SIDE)
    expected = torch.tensor([[1.5, 2.5]] * 4 + [[-1.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(torch.cat([near, far], dim=-1)[0], expected, **ROUNDING)


def test_intersect_box_from_inside_starts_behind_the_origin():
    near, far = intersect_box(torch.zeros(1, 1, 3), torch.tensor([[[0.0, 0.0, 1.0]]]), SIDE)
    assert (near.item(), far.item()) == (-0.5, 0.5)


@pytest.mark.parametrize("axis", range(3))
def test_intersect_box_parallel_rays_have_finite_gradients(axis):
    origins = torch.stack([-2 * AXES[axis] + offset * AXES[(axis + 1) % 3] for offset in (0.0, 0.5, 0.7)])[None]
    origins, directions = origins.requires_grad_(), AXES[axis].repeat(1, 3, 1).requires_grad_()
    near, far = intersect_box(origins, directions, SIDE)
    (near + 2 * far).sum().backward()
    assert origins.grad.isfinite().all() and directions.grad.isfinite().all()


def test_intersect_box_gradients_are_right():
    origins, directions = random_rays(20)
    near, far = intersect_box(origins, directions, SIDE)
    hit = (far > near)[..., 0]
    origins, directions = (x[hit][None].requires_grad_() for x in (origins, directions))
    assert torch.autograd.gradcheck(lambda o, d: intersect_box(o, d, SIDE), (origins, directions))
