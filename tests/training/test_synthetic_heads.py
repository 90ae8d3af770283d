"""Synthetic heads: the same for the same seed, true to their cameras, and different in front and behind."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from camera_utils import camera_label, intrinsics_from_focal, look_at_pose, split_label
from training.synthetic_heads import PARSING_CLASSES, CameraRange, render_heads, sample_cameras, sample_identity

SIDE = 48
FACE = [PARSING_CLASSES.index(name) for name in ("left eye", "right eye", "nose", "upper lip", "lower lip")]
NOSE = PARSING_CLASSES.index("nose")


def labels(*yaw_deg: float, pitch_deg: float = 0.0, focal: float = 4.2647) -> torch.Tensor:
    pose = look_at_pose(torch.tensor(yaw_deg).deg2rad(), math.radians(pitch_deg))
    return camera_label(pose, intrinsics_from_focal(focal))


def render(first: int, count: int, *yaw_deg: float, side: int = SIDE, **camera):
    """Render heads from the same views, one head after the other."""
    views = labels(*yaw_deg, **camera)
    heads = [sample_identity(0, first + i) for i in range(count) for _ in yaw_deg]
    return render_heads(heads, views.repeat(count, 1), side)


@pytest.fixture(scope="module")
def around():
    """Eight heads from the front, both sides and behind."""
    return render(0, 8, 0.0, 90.0, 180.0, -90.0)


def test_render_heads_are_the_same_in_any_company_on_a_cpu():
    together = render(3, 3, 20.0)
    for i in range(3):
        alone = render(3 + i, 1, 20.0)
        assert alone.rgb[0].equal(together.rgb[i]) and alone.parsing[0].equal(together.parsing[i])
    assert not together.rgb[0].equal(together.rgb[1])


def test_render_heads_mask_and_parsing_agree(around):
    assert (around.mask >= 128).equal(around.parsing > 0)
    assert around.parsing.max() < len(PARSING_CLASSES)
    share = (around.mask >= 128).float().mean(dim=(1, 2))
    assert (share > 0.2).all() and (share < 0.8).all()


def test_render_heads_show_a_face_in_front_and_none_behind(around):
    shown = torch.isin(around.parsing, torch.tensor(FACE)).flatten(1).sum(dim=1).unflatten(0, (8, 4))
    assert (shown[:, 0] > 20).all()
    assert (shown[:, 2] == 0).all()
    hidden_by_glasses_or_hair = (shown[:, [1, 3]] < shown[:, :1]).all()
    assert hidden_by_glasses_or_hair


def test_render_heads_nose_is_one_point_in_space_for_all_cameras():
    yaws = (-35.0, -15.0, 0.0, 20.0, 40.0)
    for number in range(3):
        images = render(number, 1, *yaws, side=96)
        cam2world, intrinsics = split_label(labels(*yaws))
        # Every view gives a ray through the middle of its nose; the point nearest to all rays.
        matrix, vector, rays = np.zeros((3, 3)), np.zeros(3), []
        for parsing, pose in zip(images.parsing.numpy(), cam2world.double().numpy()):
            v, u = (np.mean(axis) + 0.5 for axis in np.nonzero(parsing == NOSE))
            focal = float(intrinsics[0, 0, 0])
            direction = pose[:3, :3] @ [(u / 96 - 0.5) / focal, (v / 96 - 0.5) / focal, 1.0]
            direction /= np.linalg.norm(direction)
            across = np.eye(3) - np.outer(direction, direction)
            matrix, vector = matrix + across, vector + across @ pose[:3, 3]
            rays.append((across, pose[:3, 3]))
        point = np.linalg.solve(matrix, vector)
        distances = [np.linalg.norm(across @ (point - origin)) for across, origin in rays]
        assert abs(point[0]) < 0.03 and point[2] > 0.1  # in the middle, in front
        assert max(distances) < 0.03  # the visible side of the nose moves by as much


def test_render_heads_stay_within_the_cropped_box():
    # A wide camera: 0.4 of the box, drawn nearer to the camera by as much, is the widest that may be seen.
    images = render(0, 6, 0.0, 90.0, focal=1.5)
    position = ((torch.arange(SIDE) + 0.5) / SIDE - 0.5) / 1.5 * 2.7
    widest = 0.4 * 2.7 / (2.7 - 0.4) + 2.7 / 1.5 / SIDE
    assert (images.mask[:, :, position.abs() > widest] == 0).all()


def test_render_heads_flipped_camera_shows_the_other_side_of_the_silhouette():
    head = sample_identity(0, 1)
    bald = dataclasses.replace(head, hair=dataclasses.replace(head.hair, style="bald"))
    left, right = (render_heads([bald], labels(yaw), SIDE).mask[0].float() for yaw in (60.0, -60.0))
    assert (left - right.flip(-1)).abs().mean() < 0.1 * left.mean()  # heads are nearly symmetric


def test_sample_identity_and_cameras_are_functions_of_their_numbers():
    assert sample_identity(5, 7) == sample_identity(5, 7) != sample_identity(5, 8)
    whole = sample_cameras(2, 0, 6)
    assert whole[4:].equal(sample_cameras(2, 4, 2)) and not whole.equal(sample_cameras(3, 0, 6))


def test_sample_identity_has_every_cut_and_wear_among_many():
    heads = [sample_identity(0, i) for i in range(400)]
    assert len({head.hair.style for head in heads}) == 13
    assert {head.wear.top for head in heads} == {"crew", "turtleneck", "v_neck", "hood"}


def test_sample_cameras_follow_their_range_and_bias():
    range_ = CameraRange(yaw_deg=(-30.0, 60.0), pitch_deg=(5.0, 10.0), front_bias=0.5)
    position = sample_cameras(0, 0, 200, range_)[:, [3, 7, 11]]
    yaw = torch.rad2deg(torch.atan2(position[:, 0], position[:, 2]))
    pitch = torch.rad2deg(torch.asin(position[:, 1] / 2.7))
    assert yaw.min() >= -30.01 and yaw.max() <= 60.01 and pitch.min() >= 4.99 and pitch.max() <= 10.01
    assert (yaw.abs() < 25).float().mean() > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], labels(0.0), 48), r"identities: expected one per label, 1, got 0"),
        (([sample_identity(0, 0)], labels(0.0), 50), r"resolution: expected a multiple of 8, got 50"),
        (([sample_identity(0, 0)], torch.zeros(1, 25), 48), r"label 0"),
        (([sample_identity(0, 0)], torch.zeros(1, 16), 48), r"labels: expected shape \[B, 25\]"),
    ],
)
def test_render_heads_impossible_arguments_raise_value_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        render_heads(*arguments)


@pytest.mark.parametrize(
    "fields", [{"yaw_deg": (10.0, -10.0)}, {"pitch_deg": (0.0, 90.0)}, {"front_bias": 2.0}, {"radius": 0.1}]
)
def test_camera_range_impossible_value_raises_value_error(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        CameraRange(**fields)
