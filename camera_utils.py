"""Cameras: poses, intrinsics, the 25-number label, and paths of cameras for videos.

World: +y up, +z in front of the face, +x towards the head's left ear; the unit is that of ``box_warp``. Camera: the
OpenCV axes +x right, +y down, +z forward. A pose ``cam2world`` is [4, 4] with the columns right, down, forward,
position. Intrinsics are normalised by the image size. docs/conventions.md draws all of it.

Our own functions come first: deterministic, exact constants, true angles in radians. The published surface ends the
file (``create_cam2world_matrix`` ... ``LookAtPoseSampler``): names, signatures and numerics, odd constants included,
that scripts written for the EG3D family expect. Letters: B batch, V views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

Scalar = float | torch.Tensor  # a number or a tensor of them

LABEL_SIZE = 25  # 16 numbers of cam2world, 9 of the intrinsics, both row by row
TRAINING_FOCAL = 4.2647  # focal length, in image widths, in the labels that all published head models were trained on
TRAINING_RADIUS = 2.7  # distance of those cameras from the world origin

_NO_HEADING = 1e-6  # a horizontal part below this is rounding noise of a unit float32 vector: the view is vertical
_MIRRORED_ENTRIES = [1, 2, 3, 4, 8]  # R01, R02, tx, R10, R20: what diag(-1, 1, 1, 1) on both sides negates


def focal_from_fov(fov_deg: float) -> float:
    """Convert a field of view to the focal length of normalised intrinsics.

    ``focal = 1 / (sqrt(2) tan(fov / 2))``: ``fov_deg`` spans the image *diagonal*, as in the published ``--fov-deg``
    (whose 1.414 is this sqrt(2)). 18.837 gives 4.26274; that camera sees 13.38 degrees from left to right.

    Args:
        fov_deg: Diagonal field of view in degrees, in (0, 180).

    Returns:
        The focal length in image widths.

    Raises:
        ValueError: ``fov_deg`` is outside (0, 180).

    Differs from the published :func:`FOV_to_intrinsics`, whose 3.14159 and 1.414 give a focal length 1.5e-4 (relative)
    larger: 4.26339 at 18.837. Neither is the 4.2647 of the training labels (:data:`TRAINING_FOCAL`), which is 18.8285
    degrees. Between the three no pixel of a 512-pixel image moves by more than 0.12 pixels.
    """
    if not 0.0 < fov_deg < 180.0:
        raise ValueError(f"fov_deg must lie between 0 and 180 degrees, got {fov_deg}")
    return 1.0 / (math.sqrt(2.0) * math.tan(math.radians(fov_deg) / 2.0))


def fov_from_focal(focal: float) -> float:
    """Convert a focal length, above 0 image widths, to the diagonal field of view in degrees.

    ``fov = 2 atan(1 / (sqrt(2) focal))``, the inverse of :func:`focal_from_fov`. Raises ValueError for other values.
    """
    _check_focal(focal)
    return math.degrees(2.0 * math.atan(1.0 / (math.sqrt(2.0) * focal)))


def intrinsics_from_focal(focal: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Build normalised intrinsics [3, 3] float32, ``[[f, 0, .5], [0, f, .5], [0, 0, 1]]``, for a focal above 0."""
    _check_focal(focal)
    rows = [[focal, 0.0, 0.5], [0.0, focal, 0.5], [0.0, 0.0, 1.0]]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _check_focal(focal: float) -> None:
    if not 0.0 < focal < math.inf:
        raise ValueError(f"focal must be a finite number of image widths above 0, got {focal}")


def pitch_from_vertical(vertical: Scalar) -> Scalar:
    """Convert the published vertical parameter to the elevation of the camera.

    ``sin(pitch) = 1 - 2 vertical / pi``. Published samplers call ``vertical`` an angle, but it is pi/2 times
    (1 - height / radius): pi/2 - 0.2 is 0.1277 rad (7.3 degrees) above the horizon, not 0.2.

    Args:
        vertical: Published vertical parameter in [0, pi]: 0 straight above, pi/2 level, pi straight below.

    Returns:
        Elevation in radians in [-pi/2, pi/2], of the type and shape of ``vertical``.

    Raises:
        ValueError: A value is outside [0, pi].
    """
    values = torch.as_tensor(vertical, dtype=torch.float64)
    if not bool(((values >= 0.0) & (values <= math.pi + 1e-6)).all()):  # 1e-6: pi in float32 is above pi
        raise ValueError(f"vertical must lie in [0, pi], got {vertical}")
    pitch_rad = torch.asin((1.0 - 2.0 * values / math.pi).clamp(min=-1.0))
    return pitch_rad.to(vertical.dtype) if isinstance(vertical, torch.Tensor) else float(pitch_rad)


def vertical_from_pitch(pitch_rad: Scalar) -> Scalar:
    """Convert an elevation in [-pi/2, pi/2] (positive above) to the published vertical parameter in [0, pi].

    ``vertical = pi/2 (1 - sin(pitch))``, the inverse of :func:`pitch_from_vertical`; type and shape are kept.
    """
    sine = torch.sin(pitch_rad) if isinstance(pitch_rad, torch.Tensor) else math.sin(pitch_rad)
    return math.pi / 2.0 * (1.0 - sine)


def look_at_pose(
    yaw_rad: Scalar,
    pitch_rad: Scalar = 0.0,
    radius: Scalar = TRAINING_RADIUS,
    target: Sequence[float] | torch.Tensor = (0.0, 0.0, 0.0),
) -> torch.Tensor:
    """Place cameras on a sphere around the world origin, upright, each looking at a target.

    position = radius (cos pitch sin yaw, sin pitch, cos pitch cos yaw). Seen from straight above or below, where
    "upright" says nothing, the image is turned as it is just before the camera gets there along its meridian.

    Args:
        yaw_rad: Azimuth in radians, scalar or [V]: 0 in front of the face, pi/2 on the +x side, pi behind.
        pitch_rad: Elevation in radians, scalar or [V]: positive above. A true angle; see :func:`pitch_from_vertical`.
        radius: Distance from the world origin (not from the target), scalar or [V], above 0.
        target: Point to look at, [3] or [V, 3].

    Returns:
        cam2world [V, 4, 4] float32; V is 1 if all is scalar. Differentiable in all arguments.

    Raises:
        ValueError: The shapes do not broadcast to [V], or a camera stands on its target.
    """
    device = next((t.device for t in (yaw_rad, pitch_rad, radius, target) if isinstance(t, torch.Tensor)), None)
    numbers = [torch.as_tensor(t, dtype=torch.float64, device=device) for t in (yaw_rad, pitch_rad, radius)]
    target = torch.as_tensor(target, dtype=torch.float64, device=device)
    try:
        if max(t.ndim for t in numbers) > 1 or target.ndim not in (1, 2) or target.shape[-1] != 3:
            raise RuntimeError("too many axes, or a target that is not 3 long")
        yaw, pitch, distance, _ = torch.broadcast_tensors(*numbers, target.reshape(-1, 3)[:, 0])  # [V] each
    except RuntimeError as error:
        got = ", ".join(str(list(t.shape)) for t in (*numbers, target))
        raise ValueError(
            f"yaw_rad, pitch_rad, radius must be scalar or [V] and target [3] or [V, 3], got {got}: {error}"
        ) from None
    zero = torch.zeros_like(yaw)
    heading = torch.stack([yaw.sin(), zero, yaw.cos()], dim=-1)  # [V, 3] horizontal, outwards
    height = torch.stack([zero, pitch.sin(), zero], dim=-1)
    position = distance[:, None] * (pitch.cos()[:, None] * heading + height)
    return _cam2world(target - position, position, heading).float()


def _cam2world(forward: torch.Tensor, position: torch.Tensor, heading: torch.Tensor) -> torch.Tensor:
    """Assemble upright poses [B, 4, 4] from viewing directions and positions, both [B, 3].

    ``heading`` [B, 3] is the horizontal direction from which vertical views are taken to have come.
    """
    forward = _normalise(forward)
    vertical = torch.linalg.vector_norm(forward[:, ::2], dim=-1, keepdim=True) < _NO_HEADING  # [B, 1]
    world_up = torch.tensor([0.0, 1.0, 0.0], dtype=forward.dtype, device=forward.device)
    up = torch.where(vertical, heading * forward[:, 1:2], world_up)  # looking down, image-up points away from heading
    right = -_normalise(torch.linalg.cross(up, forward))
    down = _normalise(torch.linalg.cross(forward, right))
    columns = torch.stack([right, down, forward, position], dim=-1)  # [B, 3, 4]
    last_row = columns.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(columns), 1, 4)
    return torch.cat([columns, last_row], dim=1)  # [B, 4, 4]


def _normalise(vectors: torch.Tensor) -> torch.Tensor:
    """Scale vectors [B, 3] to length 1; one without direction is an error, not NaN."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    if not bool((length > 0.0).all()):
        raise ValueError(
            "a camera needs a viewing direction: the point it looks at must be finite and not its position"
        )
    return vectors / length


def camera_label(cam2world: torch.Tensor, intrinsics: torch.Tensor) -> torch.Tensor:
    """Join poses and intrinsics to the labels that generators take.

    Args:
        cam2world: [B, 4, 4].
        intrinsics: Normalised, [3, 3] for all or [B, 3, 3].

    Returns:
        [B, 25]: the 16 numbers of ``cam2world`` row by row, then the 9 of ``intrinsics``.

    Raises:
        ValueError: A shape is none of these.
    """
    if cam2world.ndim != 3 or cam2world.shape[1:] != (4, 4):
        raise ValueError(f"cam2world must be [B, 4, 4], got {list(cam2world.shape)}")
    num_labels = len(cam2world)
    if intrinsics.shape not in ((3, 3), (num_labels, 3, 3)):
        raise ValueError(f"intrinsics must be [3, 3] or [{num_labels}, 3, 3], got {list(intrinsics.shape)}")
    intrinsics = intrinsics.to(cam2world).expand(num_labels, 3, 3)
    return torch.cat([cam2world.reshape(num_labels, 16), intrinsics.reshape(num_labels, 9)], dim=1)


def split_label(label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take labels [B, 25] apart into cam2world [B, 4, 4] and intrinsics [B, 3, 3]; ValueError for another shape."""
    if label.ndim != 2 or label.shape[1] != LABEL_SIZE:
        raise ValueError(f"label must be [B, {LABEL_SIZE}], got {list(label.shape)}")
    return label[:, :16].reshape(-1, 4, 4), label[:, 16:].reshape(-1, 3, 3)


def check_label(label: torch.Tensor, rotation_tolerance: float = 0.05) -> None:
    """Check that labels [B, 25] describe cameras.

    Every entry is finite, the last row of the pose is 0 0 0 1, both focal lengths are above 0, and the rotation R is
    right-handed with ``max |R^T R - I| <= rotation_tolerance``. The default catches scaled and mirrored axes, but
    accepts what published cropping tools write: head poses fitted without orthogonality, up to 0.028 off in published
    samples.

    Raises:
        ValueError: Something is wrong; the message names the label (row) and the entry.
    """
    values = label.detach().double().cpu()
    cam2world, _ = split_label(values)
    _refuse(~values.isfinite(), values, range(LABEL_SIZE), "finite")
    for column in range(12, 16):
        expected = int(column == 15)
        _refuse((values[:, [column]] - expected).abs() > 1e-6, values, [column], f"{expected} (last row of a pose)")
    _refuse(values[:, [16, 20]] <= 0.0, values, [16, 20], "above 0 (a focal length)")
    rotation = cam2world[:, :3, :3]
    skew = (rotation.mT @ rotation - torch.eye(3, dtype=torch.float64)).abs().amax(dim=(1, 2))  # [B]
    for row in (skew > rotation_tolerance).nonzero().flatten().tolist():
        raise ValueError(
            f"label {row}, cam2world[:3, :3] must be a rotation: max |R^T R - I| is {float(skew[row]):.3g}, "
            f"allowed {rotation_tolerance:g}"
        )
    for row in (torch.linalg.det(rotation) < 0.0).nonzero().flatten().tolist():
        raise ValueError(f"label {row}, cam2world[:3, :3] must be a rotation, got a mirror image (determinant -1)")


def _refuse(bad: torch.Tensor, values: torch.Tensor, columns: Sequence[int], expected: str) -> None:
    """Raise ValueError for the first true element of ``bad`` [B, len(columns)]; ``values`` [B, 25] are all entries."""
    for row, position in bad.nonzero()[:1].tolist():
        i = columns[position]
        name = f"cam2world[{i // 4}, {i % 4}]" if i < 16 else f"intrinsics[{(i - 16) // 3}, {(i - 16) % 3}]"
        raise ValueError(f"label {row}, entry {i} ({name}) must be {expected}, got {float(values[row, i]):g}")


def mirror_label(label: torch.Tensor) -> torch.Tensor:
    """Turn labels [..., 25] into those of the left-right flipped images, in a new tensor.

    The pose C becomes M C M with M = diag(-1, 1, 1, 1): entries 1, 2, 3, 4, 8 change their sign. The intrinsics stay,
    which is right for a principal point in the middle. Twice is nothing. Raises ValueError for another shape.
    """
    if label.shape[-1:] != (LABEL_SIZE,):
        raise ValueError(f"label must be [..., {LABEL_SIZE}], got {list(label.shape)}")
    signs = label.new_ones(LABEL_SIZE)
    signs[_MIRRORED_ENTRIES] = -1.0
    return label * signs


def yaw_pitch_roll_deg(label: torch.Tensor, published: bool = False) -> torch.Tensor:
    """Measure from where the cameras of labels look at the head.

    With b the direction back to the camera (minus the forward column), r and u the right and up columns:
    yaw = atan2(b_x, b_z), pitch = atan2(b_y, sqrt(b_x^2 + b_z^2)), roll = atan2(u . h, r . h) with the horizon
    h = (cos yaw, 0, -sin yaw). These are azimuth, elevation and the turn of the image, stable in every view but the two
    vertical ones, where yaw is set to 0 and roll takes its part.

    Args:
        label: [B, 25].
        published: Return the published angles instead, for thresholds that were tuned on them.

    Returns:
        [B, 3] in degrees: yaw in [-180, 180] (0 frontal, positive towards +x), pitch in [-90, 90] (positive above),
        roll in [-180, 180].

    Raises:
        ValueError: ``label`` is not [B, 25].

    Differs from the published code, which takes yaw = asin(b_x) and pitch = atan2(b_y, b_z). They agree near the front.
    At azimuth 45, elevation 7.3 the published angles are 44.5, 10.3; near profile the published pitch is anything (-180
    for a level camera at 90.5); behind the head it has the opposite sign.
    """
    cam2world, _ = split_label(label)
    if published:
        return _published_angles_deg(cam2world)
    right, up, back = cam2world[:, :3, 0], -cam2world[:, :3, 1], -cam2world[:, :3, 2]  # [B, 3]
    across = torch.hypot(back[:, 0], back[:, 2])
    yaw = torch.where(across < _NO_HEADING, 0.0, torch.atan2(back[:, 0], back[:, 2]))
    horizon = torch.stack([yaw.cos(), torch.zeros_like(yaw), -yaw.sin()], dim=-1)
    roll = torch.atan2((up * horizon).sum(-1), (right * horizon).sum(-1))
    return torch.rad2deg(torch.stack([yaw, torch.atan2(back[:, 1], across), roll], dim=-1))  # [B, 3]


def _published_angles_deg(cam2world: torch.Tensor) -> torch.Tensor:
    """Compute the published yaw, pitch, roll [B, 3] in float64, with their jumps near profile."""
    opengl = cam2world.double() * cam2world.new_tensor([1.0, -1.0, -1.0, 1.0])  # columns right, up, back
    w = torch.linalg.inv(opengl)[:, :3, :3]  # rows right, up, back
    side = w[:, 2, 0].sign()
    profile = w[:, 2, 0].abs() > 0.998  # within 3.6 degrees
    yaw = torch.where(profile, side * math.pi / 2.0, torch.asin(w[:, 2, 0].clamp(-1.0, 1.0)))
    pitch_profile = torch.atan2(-side * w[:, 0, 1], -side * w[:, 0, 2])
    pitch = torch.where(profile, pitch_profile, torch.atan2(w[:, 2, 1] / yaw.cos(), w[:, 2, 2] / yaw.cos()))
    behind = pitch.abs() > math.pi / 2.0
    yaw = torch.where(behind, torch.where(yaw > 0.0, math.pi - yaw, -math.pi - yaw), yaw)
    pitch = torch.atan2(w[:, 2, 1] / yaw.cos(), w[:, 2, 2] / yaw.cos())
    roll = torch.atan2(w[:, 1, 0] / yaw.cos(), w[:, 0, 0] / yaw.cos())
    return torch.rad2deg(torch.stack([yaw, pitch, roll], dim=-1)).to(cam2world.dtype)


def orbit_path(
    num_frames: int,
    *,
    radius: float = TRAINING_RADIUS,
    target: Sequence[float] = (0.0, 0.0, 0.0),
    vertical_centre: float = math.pi / 2.0 - 0.05,
    vertical_range: float = 0.5,
) -> torch.Tensor:
    """Walk once around the head while rising and sinking once: the published ``Head`` path.

    With phase = 2 pi f / num_frames of frame f: yaw = phase, vertical = centre + range sin(phase). A centre of pi/2
    with a range of 0 is the level circle.

    Args:
        num_frames: V, at least 1. The frame after the last would be the first again.
        radius: Distance from the world origin.
        target: Point to look at, [3].
        vertical_centre: Published vertical parameter (:func:`pitch_from_vertical`) in the middle of the swing.
        vertical_range: Its swing to either side. The defaults give elevations from -16.6 to 20.5 degrees.

    Returns:
        cam2world [V, 4, 4] float32 on the CPU.

    Raises:
        ValueError: ``num_frames`` is below 1, or the swing leaves [0, pi].

    Differs from the published code, whose 3.14 for pi leaves a jump of 0.18 degrees where the loop closes.
    """
    phase = _phase(num_frames)
    return look_at_pose(phase, pitch_from_vertical(vertical_centre + vertical_range * phase.sin()), radius, target)


def oscillating_path(
    num_frames: int,
    *,
    radius: float = TRAINING_RADIUS,
    target: Sequence[float] = (0.0, 0.0, 0.0),
    yaw_range_rad: float = 1.5,
    vertical_centre: float = math.pi / 2.0 - 0.05,
    vertical_range: float = 0.25,
) -> torch.Tensor:
    """Swing along an ellipse in front of the face: the published path of everything but ``Head``.

    With phase = 2 pi f / num_frames of frame f: yaw = yaw_range sin(phase), vertical = centre + range cos(phase).
    Published: yaw range 1.5 (0.35 in EG3D) and, for FFHQ, the target (0, 0, 0.2). The other arguments, the result, the
    errors and the difference from the published code are those of :func:`orbit_path`.
    """
    phase = _phase(num_frames)
    pitch_rad = pitch_from_vertical(vertical_centre + vertical_range * phase.cos())
    return look_at_pose(yaw_range_rad * phase.sin(), pitch_rad, radius, target)


def _phase(num_frames: int) -> torch.Tensor:
    """Return 2 pi f / num_frames for every frame f, [V] float64."""
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    return 2.0 * math.pi * torch.arange(num_frames, dtype=torch.float64) / num_frames


# The published surface ------------------------------------------------------------------------------------------------


def create_cam2world_matrix(forward_vector: torch.Tensor, origin: torch.Tensor) -> torch.Tensor:
    """Assemble upright poses [B, 4, 4] from viewing directions [B, 3] (any length but 0) and positions [B, 3].

    right = -normalise((0, 1, 0) x forward), down = normalise(forward x right); columns right, down, forward, origin.
    Raises ValueError for a direction of length 0.

    Differs from the published code where that returns NaN: straight up and down (within 1e-6 rad) the image is turned
    as if the camera had come from the front.
    """
    return _cam2world(forward_vector, origin, forward_vector.new_tensor([[0.0, 0.0, 1.0]]))


def FOV_to_intrinsics(fov_degrees: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Build normalised intrinsics [3, 3] float32 from a diagonal field of view with the published constants.

    ``focal = 1 / (tan(fov * 3.14159 / 360) * 1.414)``; :func:`focal_from_fov` is exact and says how they differ.
    """
    return intrinsics_from_focal(1.0 / (math.tan(fov_degrees * 3.14159 / 360.0) * 1.414), device)


def _draw_poses(
    draw: Callable[[], torch.Tensor],
    means: tuple[Scalar, Scalar],
    spreads: tuple[Scalar, Scalar],
    lookat_position: torch.Tensor | Sequence[float],
    radius: Scalar,
) -> torch.Tensor:
    """Draw poses [B, 4, 4] with offsets [B, 1] from ``draw``, the horizontal before the vertical."""
    horizontal = draw() * spreads[0] + means[0]
    vertical = (draw() * spreads[1] + means[1]).clamp(1e-5, math.pi - 1e-5)  # published distance from straight up, down
    polar = torch.arccos(1.0 - 2.0 * (vertical / math.pi))
    x, z = torch.cos(math.pi - horizontal), torch.sin(math.pi - horizontal)
    positions = radius * torch.cat([polar.sin() * x, polar.cos(), polar.sin() * z], dim=1)  # [B, 3]
    lookat = torch.as_tensor(lookat_position, dtype=positions.dtype, device=positions.device)
    return create_cam2world_matrix(lookat - positions, positions)


class LookAtPoseSampler:
    """Draw cameras around the world origin with normally distributed angles, looking at a given point."""

    @staticmethod
    def sample(
        horizontal_mean: Scalar,
        vertical_mean: Scalar,
        lookat_position: torch.Tensor | Sequence[float],
        horizontal_stddev: Scalar = 0,
        vertical_stddev: Scalar = 0,
        radius: Scalar = 1,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Draw cam2world [batch_size, 4, 4] float32.

        The horizontal angle is azimuth + pi/2: pi/2 in front, pi on the +x side. The vertical parameter in [0, pi] is
        that of :func:`pitch_from_vertical`. ``lookat_position`` is [3] or [batch_size, 3]. As published, two tensors
        [batch_size, 1] are drawn from the default generator even with zero spread: :func:`look_at_pose` draws nothing.
        """
        means, spreads = (horizontal_mean, vertical_mean), (horizontal_stddev, vertical_stddev)
        return _draw_poses(lambda: torch.randn((batch_size, 1), device=device), means, spreads, lookat_position, radius)


class GaussianCameraPoseSampler:
    """Draw cameras around the world origin with normally distributed angles, looking at the origin."""

    _draw = staticmethod(torch.randn)

    @classmethod
    def sample(
        cls,
        horizontal_mean: Scalar,
        vertical_mean: Scalar,
        horizontal_stddev: Scalar = 0,
        vertical_stddev: Scalar = 0,
        radius: Scalar = 1,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Draw cam2world [batch_size, 4, 4] float32; the arguments are those of :class:`LookAtPoseSampler`."""
        means, spreads = (horizontal_mean, vertical_mean), (horizontal_stddev, vertical_stddev)
        return _draw_poses(lambda: cls._draw((batch_size, 1), device=device), means, spreads, (0.0, 0.0, 0.0), radius)


class UniformCameraPoseSampler(GaussianCameraPoseSampler):
    """Draw cameras as :class:`GaussianCameraPoseSampler`, uniformly within mean +- "stddev" (half the width here)."""

    @staticmethod
    def _draw(size: tuple[int, int], device: torch.device | str) -> torch.Tensor:
        return torch.rand(size, device=device) * 2 - 1
