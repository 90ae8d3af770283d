"""Test cameras against published vectors, geometry that must hold, and broken labels."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import camera_utils
from camera_utils import (
    TRAINING_FOCAL,
    FOV_to_intrinsics,
    GaussianCameraPoseSampler,
    LookAtPoseSampler,
    UniformCameraPoseSampler,
    camera_label,
    check_label,
    create_cam2world_matrix,
    focal_from_fov,
    fov_from_focal,
    intrinsics_from_focal,
    look_at_pose,
    mirror_label,
    orbit_path,
    oscillating_path,
    pitch_from_vertical,
    split_label,
    vertical_from_pitch,
    yaw_pitch_roll_deg,
)

HALF_PI = math.pi / 2
VECTORS = json.loads((Path(__file__).parent / "data" / "cameras.json").read_text())
PUBLISHED = {"rtol": 0.0, "atol": 1e-6}  # float32 arithmetic of the same formula in a slightly different order


def label_at(yaw_rad=0.0, pitch_rad=0.0, **kwargs):
    """Return the label [V, 25] of training cameras at the given angles."""
    return camera_label(look_at_pose(yaw_rad, pitch_rad, **kwargs), intrinsics_from_focal(TRAINING_FOCAL))


def published_lookat(case):
    """Run LookAtPoseSampler on one of the published cases."""
    h, v = HALF_PI + case["h_minus_halfpi"], HALF_PI + case["v_minus_halfpi"]
    return LookAtPoseSampler.sample(h, v, torch.tensor(case["lookat"]).float(), radius=case["radius"])


# Published surface


@pytest.mark.parametrize("case", VECTORS["lookat"])
def test_lookat_sampler_published_case_equals_vector(case):
    expected = torch.tensor(case["cam2world"]).reshape(1, 4, 4)
    torch.testing.assert_close(published_lookat(case), expected, **PUBLISHED)


@pytest.mark.parametrize(
    "sampler, key",
    [
        (GaussianCameraPoseSampler, "gaussian_seed0_b2_std0.3_0.155"),
        (UniformCameraPoseSampler, "uniform_seed0_b2_0.3_0.155"),
    ],
)
def test_spread_sampler_seed0_equals_vector(sampler, key):
    torch.manual_seed(0)
    pose = sampler.sample(HALF_PI, HALF_PI, 0.3, 0.155, radius=2.7, batch_size=2)
    torch.testing.assert_close(pose, torch.tensor(VECTORS[key]).reshape(2, 4, 4), **PUBLISHED)


@pytest.mark.parametrize("sampler", [LookAtPoseSampler, GaussianCameraPoseSampler, UniformCameraPoseSampler])
def test_sampler_without_spread_still_draws_two_numbers_per_pose(sampler):
    draw = torch.rand if sampler is UniformCameraPoseSampler else torch.randn
    args = ((0, 0, 0),) if sampler is LookAtPoseSampler else ()
    torch.manual_seed(3)
    sampler.sample(HALF_PI, HALF_PI, *args, batch_size=5)
    after = torch.randn(4)
    torch.manual_seed(3)
    draw((5, 1)), draw((5, 1))
    assert torch.equal(after, torch.randn(4))


def test_lookat_sampler_batch_has_shape_dtype_and_list_target():
    pose = LookAtPoseSampler.sample(HALF_PI, HALF_PI, [0, 0, 0.2], 0.1, 0.1, radius=2.7, batch_size=3)
    assert pose.shape == (3, 4, 4) and pose.dtype == torch.float32


@pytest.mark.parametrize("fov_deg, focal", VECTORS["fov_to_focal"].items())
def test_fov_to_intrinsics_published_case_equals_vector(fov_deg, focal):
    intrinsics = FOV_to_intrinsics(float(fov_deg))
    expected = torch.tensor([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]])
    torch.testing.assert_close(intrinsics, expected, **PUBLISHED)


@pytest.mark.parametrize("vertical, forward", [("down", [0.0, -3.0, 0.0]), ("up", [0.0, 0.5, 0.0])])
def test_create_cam2world_vertical_view_is_limit_of_frontal_view(vertical, forward):
    pose = create_cam2world_matrix(torch.tensor([forward]), torch.zeros(1, 3))
    nearly = torch.tensor([[0.0, forward[1], -1e-4 * abs(forward[1])]])  # the camera comes from the front
    expected = create_cam2world_matrix(nearly, torch.zeros(1, 3))
    torch.testing.assert_close(pose, expected, rtol=0, atol=2e-4)  # 1e-4 rad away


def test_create_cam2world_no_direction_raises():
    with pytest.raises(ValueError, match="viewing direction"):
        create_cam2world_matrix(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), torch.zeros(2, 3))


# Intrinsics


def test_focal_from_fov_diagonal_spans_field_of_view():
    focal = focal_from_fov(40.0)
    corner = math.hypot(0.5, 0.5) / focal  # image corner at depth 1
    assert math.degrees(2 * math.atan(corner)) == pytest.approx(40.0, abs=1e-12)


@pytest.mark.parametrize("fov_deg", [0.1, 12.0, 18.837, 90.0, 179.0])
def test_fov_from_focal_inverts_focal_from_fov(fov_deg):
    assert fov_from_focal(focal_from_fov(fov_deg)) == pytest.approx(fov_deg, rel=1e-12)


def test_focal_from_fov_values_of_docstring_hold():
    assert focal_from_fov(18.837) == pytest.approx(4.26274, abs=5e-6)
    assert fov_from_focal(TRAINING_FOCAL) == pytest.approx(18.8285, abs=5e-5)
    for fov_deg, published in VECTORS["fov_to_focal"].items():
        assert published / focal_from_fov(float(fov_deg)) - 1 == pytest.approx(1.5e-4, abs=5e-6)


@pytest.mark.parametrize("fov_deg", [0.0, -5.0, 180.0, math.nan])
def test_focal_from_fov_outside_range_raises(fov_deg):
    with pytest.raises(ValueError, match="fov_deg"):
        focal_from_fov(fov_deg)


@pytest.mark.parametrize("focal", [0.0, -1.0, math.inf, math.nan])
def test_focal_invalid_raises(focal):
    for convert in (fov_from_focal, intrinsics_from_focal):
        with pytest.raises(ValueError, match="focal"):
            convert(focal)


# Poses


@pytest.mark.parametrize(
    "yaw_rad, pitch_rad, position",
    [(0, 0, (0, 0, 2)), (HALF_PI, 0, (2, 0, 0)), (math.pi, 0, (0, 0, -2)), (1.0, HALF_PI, (0, 2, 0))],
)
def test_look_at_pose_cardinal_angles_stand_where_documented(yaw_rad, pitch_rad, position):
    pose = look_at_pose(yaw_rad, pitch_rad, radius=2.0)
    torch.testing.assert_close(pose[0, :3, 3], torch.tensor(position).float(), rtol=0, atol=1e-6)


def test_look_at_pose_is_rigid_upright_and_aims_at_target():
    yaw, pitch = torch.linspace(-7, 7, 41), torch.linspace(-HALF_PI, HALF_PI, 41)  # both poles are among them
    target = torch.tensor([0.1, -0.2, 0.15])
    pose = look_at_pose(yaw, pitch, 2.7, target)
    rotation, position = pose[:, :3, :3], pose[:, :3, 3]
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(3).expand(41, 3, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(41), rtol=0, atol=1e-6)
    aim = torch.nn.functional.normalize(target - position, dim=-1)
    torch.testing.assert_close(rotation[:, :, 2], aim, rtol=0, atol=1e-6)
    assert (rotation[:, 1, 0].abs() < 1e-6).all()  # the image's horizontal is level
    assert (rotation[:, 1, 1] < 1e-6).all()  # +y of the image points down


@pytest.mark.parametrize("case", VECTORS["lookat"])
def test_look_at_pose_equals_published_sampler(case):
    pose = look_at_pose(
        case["h_minus_halfpi"],
        pitch_from_vertical(HALF_PI + case["v_minus_halfpi"]),
        case["radius"],
        case["lookat"],
    )
    torch.testing.assert_close(pose.flatten(), torch.tensor(case["cam2world"]), rtol=0, atol=1e-6)


def test_look_at_pose_vertical_view_is_limit_along_its_meridian():
    yaw = torch.linspace(-3, 3, 7)
    for sign in (-1, 1):
        limit = look_at_pose(yaw, sign * (HALF_PI - 1e-4))
        torch.testing.assert_close(look_at_pose(yaw, sign * HALF_PI), limit, rtol=0, atol=5e-4)  # 1e-4 rad of 2.7


def test_look_at_pose_draws_nothing():
    state = torch.get_rng_state()
    look_at_pose(torch.rand(3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())


def test_look_at_pose_gradient_is_finite_everywhere():
    yaw = torch.tensor([0.0, 1.0, math.pi], requires_grad=True)
    pitch = torch.tensor([0.3, -HALF_PI, HALF_PI], requires_grad=True)
    look_at_pose(yaw, pitch).square().cos().sum().backward()
    assert yaw.grad.isfinite().all() and pitch.grad.isfinite().all() and pitch.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "kwargs",
    [
        {"yaw_rad": torch.zeros(2), "pitch_rad": torch.zeros(3)},
        {"yaw_rad": torch.zeros(2, 2)},
        {"yaw_rad": 0.0, "target": (0.0, 0.0)},
        {"yaw_rad": torch.zeros(2), "target": torch.zeros(3, 3)},
    ],
)
def test_look_at_pose_wrong_shapes_raise(kwargs):
    with pytest.raises(ValueError, match="yaw_rad"):
        look_at_pose(**kwargs)


@pytest.mark.parametrize("kwargs", [{"radius": 0.0}, {"radius": 0.2, "target": (0, 0, 0.2)}, {"radius": math.nan}])
def test_look_at_pose_without_direction_raises(kwargs):
    with pytest.raises(ValueError, match="viewing direction"):
        look_at_pose(0.0, **kwargs)


def test_vertical_and_pitch_are_inverse_for_floats_and_tensors():
    vertical = torch.linspace(0, math.pi, 33, dtype=torch.float64)
    torch.testing.assert_close(vertical_from_pitch(pitch_from_vertical(vertical)), vertical, rtol=0, atol=1e-12)
    pitch = pitch_from_vertical(HALF_PI - 0.2)
    assert isinstance(pitch, float) and math.degrees(pitch) == pytest.approx(7.315, abs=1e-3)
    assert vertical_from_pitch(pitch) == pytest.approx(HALF_PI - 0.2, abs=1e-12)
    float32_pi = torch.tensor(math.pi)  # a little above pi
    torch.testing.assert_close(pitch_from_vertical(float32_pi), torch.tensor(-HALF_PI), rtol=0, atol=1e-6)


@pytest.mark.parametrize("vertical", [-0.1, 3.2, math.nan])
def test_pitch_from_vertical_outside_range_raises(vertical):
    with pytest.raises(ValueError, match="vertical"):
        pitch_from_vertical(torch.tensor([1.0, vertical]))


# Labels


def test_camera_label_round_trip_keeps_pose_and_intrinsics():
    pose = look_at_pose(torch.linspace(0, 3, 4))
    intrinsics = torch.stack([intrinsics_from_focal(f) for f in (1.0, 2.0, 3.0, 4.0)])
    label = camera_label(pose, intrinsics)
    assert label.shape == (4, 25) and torch.equal(label[:, 16], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(label[:, [3, 7, 11]], pose[:, :3, 3])
    got_pose, got_intrinsics = split_label(label)
    assert torch.equal(got_pose, pose) and torch.equal(got_intrinsics, intrinsics)


@pytest.mark.parametrize(
    "pose_shape, intrinsics_shape", [((4, 4), (3, 3)), ((2, 3, 4), (3, 3)), ((2, 4, 4), (3, 3, 3)), ((2, 4, 4), (9,))]
)
def test_camera_label_wrong_shape_raises(pose_shape, intrinsics_shape):
    with pytest.raises(ValueError, match="must be"):
        camera_label(torch.zeros(pose_shape), torch.zeros(intrinsics_shape))


@pytest.mark.parametrize("shape", [(25,), (2, 26), (1, 1, 25)])
def test_split_label_wrong_shape_raises(shape):
    with pytest.raises(ValueError, match=r"\[B, 25\]"):
        split_label(torch.zeros(shape))


def test_check_label_good_labels_pass():
    check_label(label_at(torch.linspace(-4, 4, 9), 0.3))
    check_label(torch.zeros(0, 25))


def test_check_label_published_sample_is_a_loose_rotation():
    label = torch.tensor([VECTORS["pose_angle_example"]["label"]])
    check_label(label)
    with pytest.raises(ValueError, match="0.0279"):
        check_label(label, rotation_tolerance=1e-3)


@pytest.mark.parametrize(
    "entries, value, message",
    [
        ([3], math.nan, r"entry 3 \(cam2world\[0, 3\]\) must be finite"),
        ([18], math.inf, r"entry 18 \(intrinsics\[0, 2\]\) must be finite"),
        ([13], 0.5, r"entry 13 \(cam2world\[3, 1\]\) must be 0"),
        ([15], 0.0, r"entry 15 \(cam2world\[3, 3\]\) must be 1"),
        ([20], -4.0, r"entry 20 \(intrinsics\[1, 1\]\) must be above 0"),
        ([0, 1, 2], 0.9, "must be a rotation: max"),
    ],
)
def test_check_label_bad_entry_is_named(entries, value, message):
    label = label_at(torch.zeros(3))
    label[1, entries] = value
    with pytest.raises(ValueError, match="label 1, .*" + message):
        check_label(label)


def test_check_label_wrong_axes_raise():
    mirrored = label_at()
    mirrored[:, [0, 4, 8]] *= -1
    with pytest.raises(ValueError, match="mirror image"):
        check_label(mirrored)
    column_major = label_at()
    column_major[:, :16] = column_major[:, :16].reshape(1, 4, 4).mT.reshape(1, 16)
    with pytest.raises(ValueError, match="last row"):
        check_label(column_major)


def test_mirror_label_is_camera_at_opposite_yaw():
    label = label_at(torch.tensor([0.4, -2.0]), torch.tensor([0.2, -0.3]), target=(0, 0, 0.2))
    expected = label_at(torch.tensor([-0.4, 2.0]), torch.tensor([0.2, -0.3]), target=(0, 0, 0.2))
    torch.testing.assert_close(mirror_label(label), expected, rtol=0, atol=1e-6)
    assert torch.equal(mirror_label(mirror_label(label)), label)
    with pytest.raises(ValueError, match="25"):
        mirror_label(torch.zeros(2, 16))


def test_mirror_label_projects_mirrored_point_to_mirrored_pixel():
    label, point = label_at(0.7, 0.2), torch.tensor([0.1, 0.05, 0.2])

    def project(label, point):
        pose, intrinsics = split_label(label)
        u, v, depth = intrinsics[0] @ (pose[0, :3, :3].mT @ (point - pose[0, :3, 3]))
        return u / depth, v / depth

    u, v = project(label, point)
    u_mirrored, v_mirrored = project(mirror_label(label), point * torch.tensor([-1.0, 1.0, 1.0]))
    torch.testing.assert_close(torch.stack([1 - u, v]), torch.stack([u_mirrored, v_mirrored]), rtol=0, atol=1e-6)


def test_yaw_pitch_roll_returns_angles_of_look_at_pose_in_all_views():
    yaw_deg, pitch_deg = torch.meshgrid(torch.arange(-175.0, 180.0, 5), torch.arange(-85.0, 86.0, 17), indexing="ij")
    yaw_deg, pitch_deg = yaw_deg.flatten(), pitch_deg.flatten()  # profile views are among them
    angles = yaw_pitch_roll_deg(label_at(yaw_deg.deg2rad(), pitch_deg.deg2rad()))
    expected = torch.stack([yaw_deg, pitch_deg, torch.zeros_like(yaw_deg)], dim=-1)
    torch.testing.assert_close(angles, expected, rtol=0, atol=2e-4)  # float32 pose, steep views magnify by 1/cos(85)


@pytest.mark.parametrize("pitch_rad", [-HALF_PI, HALF_PI])
def test_yaw_pitch_roll_vertical_view_puts_all_into_roll(pitch_rad):
    angles = yaw_pitch_roll_deg(label_at(0.0, pitch_rad))
    expected = torch.tensor([[0.0, math.degrees(pitch_rad), 0.0]])
    torch.testing.assert_close(angles, expected, rtol=0, atol=1e-4)  # float32 degrees


def test_yaw_pitch_roll_rolled_camera_agrees_with_published_sign():
    label = label_at()
    roll = torch.tensor(0.3)
    turn = torch.tensor([[roll.cos(), -roll.sin(), 0], [roll.sin(), roll.cos(), 0], [0, 0, 1.0]])
    label[:, :16].reshape(1, 4, 4)[:, :3, :3] @= turn
    torch.testing.assert_close(yaw_pitch_roll_deg(label)[0, 2].abs().deg2rad(), roll, rtol=0, atol=1e-6)
    torch.testing.assert_close(yaw_pitch_roll_deg(label), yaw_pitch_roll_deg(label, published=True), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", VECTORS["lookat"])
def test_published_angles_equal_vectors(case):
    label = camera_label(torch.tensor(case["cam2world"]).reshape(1, 4, 4), intrinsics_from_focal(1.0))
    angles, expected = yaw_pitch_roll_deg(label, published=True)[0], torch.tensor(case["yaw_pitch_roll_deg"])
    torch.testing.assert_close(angles[1:], expected[1:], rtol=0, atol=2e-5)  # published in float32: 1e-7 rad
    turn = (angles[0] - expected[0] + 180) % 360 - 180  # -180 and 180 are one yaw
    torch.testing.assert_close(turn, torch.tensor(0.0), rtol=0, atol=2e-5)


def test_published_angles_at_profile_jump_as_published():
    label = camera_label(look_at_pose(math.radians(90.5))[:1], intrinsics_from_focal(1.0))
    jump = yaw_pitch_roll_deg(label, published=True)[0, 1].abs()  # its sign is a matter of rounding
    assert jump == pytest.approx(180, abs=1e-2)
    torch.testing.assert_close(yaw_pitch_roll_deg(label), torch.tensor([[90.5, 0.0, 0.0]]), rtol=0, atol=1e-4)


def test_angles_of_published_sample_agree_in_both_forms():
    label = torch.tensor([VECTORS["pose_angle_example"]["label"]])
    expected = torch.tensor([VECTORS["pose_angle_example"]["yaw_pitch_roll_deg"]])
    torch.testing.assert_close(yaw_pitch_roll_deg(label, published=True), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(yaw_pitch_roll_deg(label)[:, 1], expected[:, 1], rtol=0, atol=0.05)  # skewed axes


# Paths


@pytest.mark.parametrize("path", [orbit_path, oscillating_path])
def test_path_steps_are_even_across_the_loop(path):
    poses = path(60)
    steps = (poses.roll(-1, dims=0) - poses)[:, :3, 3].norm(dim=-1)
    assert poses.shape == (60, 4, 4) and poses.dtype == torch.float32
    assert steps[-1] < 1.02 * torch.maximum(steps[0], steps[-2])  # neighbours in time: no jump where the loop closes


def test_orbit_path_follows_published_formula():
    poses = orbit_path(8, target=(0, 0, 0.2))
    for frame, pose in enumerate(poses):
        turn = 2 * math.pi * frame / 8
        args = (HALF_PI + turn, HALF_PI - 0.05 + 0.5 * math.sin(turn), torch.tensor([0, 0, 0.2]))
        torch.testing.assert_close(pose, LookAtPoseSampler.sample(*args, radius=2.7)[0], rtol=0, atol=2e-6)  # float32


@pytest.mark.parametrize("yaw_range_rad", [1.5, 0.35])
def test_oscillating_path_follows_published_formula(yaw_range_rad):
    poses = oscillating_path(8, yaw_range_rad=yaw_range_rad)
    for frame, pose in enumerate(poses):
        turn = 2 * math.pi * frame / 8
        h, v = HALF_PI + yaw_range_rad * math.sin(turn), HALF_PI - 0.05 + 0.25 * math.cos(turn)
        expected = LookAtPoseSampler.sample(h, v, torch.zeros(3), radius=2.7)[0]
        torch.testing.assert_close(pose, expected, rtol=0, atol=2e-6)  # float32


def test_orbit_path_level_circle_stays_level():
    poses = orbit_path(5, vertical_centre=HALF_PI, vertical_range=0.0, radius=1.0)
    torch.testing.assert_close(poses[:, 1, 3], torch.zeros(5), rtol=0, atol=1e-7)
    torch.testing.assert_close(poses[:, :3, 3].norm(dim=-1), torch.ones(5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", [orbit_path, oscillating_path])
@pytest.mark.parametrize(
    "kwargs, match", [({"num_frames": 0}, "num_frames"), ({"num_frames": 8, "vertical_range": 2}, "vertical")]
)
def test_path_invalid_arguments_raise(path, kwargs, match):
    with pytest.raises(ValueError, match=match):
        path(**kwargs)


def test_orbit_path_elevations_are_those_of_docstring():
    angles = yaw_pitch_roll_deg(camera_label(orbit_path(720), intrinsics_from_focal(1.0)))
    assert (angles[:, 1].min().item(), angles[:, 1].max().item()) == pytest.approx((-16.6, 20.5), abs=0.05)


def test_camera_utils_needs_only_torch():
    source = Path(camera_utils.__file__).read_text()
    imports = [line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert set(imports) <= {"__future__", "math", "collections.abc", "torch"}
