"""Rays go through the pixel centres of the camera, row by row."""

from __future__ import annotations

import math

import pytest
import torch

from camera_utils import camera_label, intrinsics_from_focal, look_at_pose, split_label
from training.volumetric_rendering.ray_sampler import RaySampler, sample_rays

ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # float64, one formula


def cameras() -> tuple[torch.Tensor, torch.Tensor]:
    """Return two different poses and intrinsics with skew and off-centre principal points, in float64."""
    poses = look_at_pose(torch.tensor([0.3, 2.0]), torch.tensor([0.1, -0.4])).double()
    intrinsics = torch.tensor(
        [[[4.0, 0.1, 0.45], [0, 4.2, 0.52], [0, 0, 1]], [[3.0, -0.2, 0.5], [0, 3.5, 0.4], [0, 0, 1]]]
    ).double()
    return poses, intrinsics


@pytest.mark.parametrize("resolution", [1, 2, 5])
def test_sample_rays_equal_loops_over_pixels(resolution):
    poses, intrinsics = cameras()
    origins, directions = sample_rays(poses, intrinsics, resolution)
    assert origins.shape == directions.shape == (2, resolution**2, 3)
    for b in range(2):
        (fx, skew, cx), (_, fy, cy), _ = intrinsics[b].tolist()
        for pixel in range(resolution**2):
            u, v = (pixel % resolution + 0.5) / resolution, (pixel // resolution + 0.5) / resolution
            y = (v - cy) / fy
            x = (u - cx + cy * skew / fy - skew * v / fy) / fx
            point = poses[b] @ torch.tensor([x, y, 1, 1], dtype=torch.float64)
            offset = point[:3] - poses[b, :3, 3]
            torch.testing.assert_close(directions[b, pixel], offset / offset.norm(), **ROUNDING)
            torch.testing.assert_close(origins[b, pixel], poses[b, :3, 3], rtol=0, atol=0)  # a copy


def test_sample_rays_of_an_upright_camera_go_right_down_and_forward():
    label = camera_label(look_at_pose(0.0, 0.0), intrinsics_from_focal(4.26))
    _, directions = sample_rays(*split_label(label), 3)
    rows = directions.reshape(3, 3, 3)
    torch.testing.assert_close(rows[1, 1], torch.tensor([0.0, 0.0, -1.0]), rtol=0, atol=1e-6)  # float32 angles
    assert (rows[:, 2] - rows[:, 0])[:, 0].min() > 0  # a frontal camera looks along -z, with +x to its right
    assert (rows[0] - rows[2])[:, 1].min() > 0  # the first row is at the top


def test_sample_rays_corners_span_the_field_of_view():
    label = camera_label(look_at_pose(0.0, 0.0), intrinsics_from_focal(4.26))
    _, directions = sample_rays(*split_label(label), 256)
    left, right = directions.reshape(256, 256, 3)[128, [0, -1]].double()
    angle = math.degrees(torch.acos(left @ right))
    assert angle == pytest.approx(math.degrees(2 * math.atan(255 / 256 / 2 / 4.26)), abs=1e-3)


def test_sample_rays_gradients_reach_pose_and_intrinsics():
    poses, intrinsics = (x.requires_grad_() for x in cameras())
    assert torch.autograd.gradcheck(lambda p, k: sample_rays(p, k, 2), (poses, intrinsics))


def test_ray_sampler_module_equals_function():
    poses, intrinsics = cameras()
    for ours, expected in zip(RaySampler()(poses, intrinsics, 3), sample_rays(poses, intrinsics, 3), strict=True):
        assert ours.equal(expected)
