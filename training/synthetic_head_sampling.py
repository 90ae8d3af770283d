"""Draw synthetic identities and cameras: functions of (seed, index), in streams that never change."""

from __future__ import annotations

import colorsys
import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch

from camera_utils import TRAINING_FOCAL, TRAINING_RADIUS, camera_label, look_at_pose
from training.config import require
from training.synthetic_head_parameters import Colour, Colours, FaceShape, Hair, HeadParameters, Light, Wear

_IDENTITY_STREAM, _CAMERA_STREAM = 1, 2
_FRONT_SIGMA_DEG = 25.0  # spread of the near-frontal share of the cameras

# Light to dark; neighbours are mixed.
_SKIN_TONES: tuple[Colour, ...] = (
    (0.96, 0.80, 0.71),
    (0.91, 0.72, 0.60),
    (0.84, 0.63, 0.49),
    (0.74, 0.53, 0.38),
    (0.58, 0.39, 0.27),
    (0.43, 0.28, 0.19),
    (0.31, 0.20, 0.15),
)
_HAIR_TONES: tuple[Colour, ...] = (
    (0.05, 0.045, 0.05),
    (0.13, 0.09, 0.07),
    (0.24, 0.15, 0.09),
    (0.36, 0.22, 0.12),
    (0.52, 0.20, 0.09),
    (0.62, 0.44, 0.22),
    (0.80, 0.66, 0.40),
    (0.90, 0.84, 0.68),
    (0.55, 0.55, 0.56),
    (0.88, 0.88, 0.87),
)
_IRIS_TONES: tuple[Colour, ...] = (
    (0.25, 0.14, 0.07),
    (0.40, 0.25, 0.12),
    (0.42, 0.44, 0.22),
    (0.28, 0.48, 0.34),
    (0.30, 0.50, 0.70),
    (0.50, 0.58, 0.64),
)
_HAIR_WEIGHTS = {
    "bald": 5,
    "buzz": 6,
    "short": 14,
    "swept": 12,
    "horseshoe": 4,
    "bob": 12,
    "long": 14,
    "bun": 7,
    "ponytail": 8,
    "pigtails": 4,
    "curly": 8,
    "afro": 5,
    "mohawk": 4,
}
_UNDER_HATS = ("bald", "buzz", "short", "bob", "long", "ponytail", "pigtails")  # cuts that fit under a hat


class _Draw:
    """Random numbers of one item, from NumPy's frozen legacy generator."""

    def __init__(self, *key: int) -> None:
        self._random = np.random.RandomState([part & 0xFFFFFFFF for part in key] + [key[-1] >> 32, key[-2] >> 32])

    def uniform(self, low: float, high: float) -> float:
        return float(low + (high - low) * self._random.random_sample())

    def normal(self, mean: float, sigma: float) -> float:
        """Draw from a normal distribution cut at two sigma."""
        return float(mean + sigma * np.clip(self._random.standard_normal(), -2.0, 2.0))

    def chance(self, probability: float) -> bool:
        return bool(self._random.random_sample() < probability)

    def choice(self, weights: dict[str, float]) -> str:
        edges = np.cumsum(list(weights.values()))
        return list(weights)[int(np.searchsorted(edges, self._random.random_sample() * edges[-1], side="right"))]

    def tone(self, tones: tuple[Colour, ...]) -> Colour:
        """Mix two neighbours of a scale of colours."""
        position = self.uniform(0.0, len(tones) - 1.0)
        first = min(int(position), len(tones) - 2)
        share = position - first
        return _colour(*(a + share * (b - a) for a, b in zip(tones[first], tones[first + 1])))

    def colour(self, saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
        """Draw any hue."""
        return _colour(*colorsys.hsv_to_rgb(self.uniform(0, 1), self.uniform(*saturation), self.uniform(*value)))


def _colour(red: float, green: float, blue: float) -> Colour:
    return tuple(float(min(max(part, 0.0), 1.0)) for part in (red, green, blue))


def sample_identity(seed: int, index: int) -> HeadParameters:
    """Draw an identity.

    Args:
        seed: of the whole data set, at least 0.
        index: number of the identity, at least 0.

    Returns:
        The same head for the same (seed, index), whatever else is drawn, on every machine.

    Raises:
        ValueError: a number is negative.
    """
    _require_natural(seed=seed, index=index)
    draw = _Draw(_IDENTITY_STREAM, seed, index)
    masculine = draw.uniform(0.0, 1.0)
    hair = _sample_hair(draw, masculine)
    wear = _sample_wear(draw)
    if wear.hat != "none" and hair.style not in _UNDER_HATS:
        weights = {name: _HAIR_WEIGHTS[name] for name in _UNDER_HATS}
        hair = dataclasses.replace(hair, style=draw.choice(weights), curl=min(hair.curl, 0.003))
    return HeadParameters(
        face=_sample_face(draw, masculine),
        hair=hair,
        wear=wear,
        colours=_sample_colours(draw),
        light=_sample_light(draw),
        **_sample_background(draw),
    )


def _sample_face(draw: _Draw, masculine: float) -> FaceShape:
    opened = draw.chance(0.25)
    return FaceShape(
        head_width=draw.normal(1.0, 0.035),
        head_height=draw.normal(1.0, 0.025),
        head_depth=draw.normal(1.0, 0.03),
        jaw_width=draw.normal(0.94 + 0.1 * masculine, 0.05),
        chin=draw.normal(0.012 + 0.006 * masculine, 0.004),
        cheeks=draw.uniform(0.0, 0.012),
        brow_ridge=draw.uniform(0.0, 0.004) + 0.005 * masculine,
        eye_spacing=draw.normal(0.056, 0.0025),
        eye_y=draw.normal(0.014, 0.004),
        eye_half_width=draw.normal(0.031, 0.0022),
        eye_half_height=draw.normal(0.0155 - 0.002 * masculine, 0.002),
        eye_tilt=draw.normal(0.08, 0.07),
        gaze_x=draw.normal(0.0, 0.12),
        iris_radius=draw.normal(0.0138, 0.0008),
        brow_gap=draw.normal(0.035 - 0.004 * masculine, 0.0025),
        brow_half_height=draw.normal(0.0045 + 0.003 * masculine, 0.001),
        brow_arch=draw.uniform(0.0, 0.5),
        brow_tilt=draw.normal(0.0, 0.12),
        nose_length=draw.normal(0.085, 0.007),
        nose_depth=draw.normal(0.041, 0.006),
        nose_radius=draw.normal(0.0185, 0.002),
        nose_wings=draw.normal(0.0135 + 0.002 * masculine, 0.0018),
        mouth_y=draw.normal(-0.117, 0.004),
        mouth_half_width=draw.normal(0.043, 0.004),
        lip_upper=draw.normal(0.0115 - 0.002 * masculine, 0.002),
        lip_lower=draw.normal(0.0145 - 0.002 * masculine, 0.002),
        smile=draw.uniform(-0.004, 0.012),
        mouth_open=draw.uniform(0.004, 0.012) if opened else 0.0,
        ear_size=draw.normal(1.0, 0.08),
        ear_out=draw.uniform(0.15, 0.5),
        neck_radius=draw.normal(0.058 + 0.012 * masculine, 0.003),
    )


def _sample_hair(draw: _Draw, masculine: float) -> Hair:
    style = draw.choice(_HAIR_WEIGHTS)
    curly = style in ("curly", "afro") or (style in ("bob", "long", "short", "ponytail") and draw.chance(0.35))
    bearded = draw.chance(0.55 * masculine) and style not in ("bun", "ponytail", "pigtails")
    return Hair(
        style=style,
        thickness=draw.uniform(0.011, 0.02),
        hairline_y=draw.normal(0.118, 0.012),
        parting=draw.normal(0.0, 0.12),
        length=draw.uniform(0.0, 1.0),
        volume=draw.uniform(0.0, 1.0),
        curl=draw.uniform(0.003, 0.006) if curly else 0.0,
        curl_frequency=draw.uniform(50.0, 85.0),
        strands=draw.uniform(0.15, 0.5),
        phase=draw.uniform(0.0, 2.0 * math.pi),
        beard=_sample_beard(draw) if bearded else 0.0,
        beard_length=draw.uniform(0.0, 0.02) if bearded else 0.0,
        moustache=draw.uniform(0.3, 0.9) if draw.chance(0.3 * masculine) else 0.0,
    )


def _sample_beard(draw: _Draw) -> float:
    """Draw the opacity of a beard: stubble or more."""
    return 0.3 if draw.chance(0.25) else draw.uniform(0.6, 0.95)


def _sample_wear(draw: _Draw) -> Wear:
    return Wear(
        top=draw.choice({"crew": 3, "turtleneck": 2, "v_neck": 3, "hood": 2}),
        stripes=draw.uniform(0.4, 1.0) if draw.chance(0.25) else 0.0,
        hat=draw.choice({"none": 84, "beanie": 6, "cap": 6, "brim": 4}),
        glasses=draw.choice({"none": 76, "clear": 18, "dark": 6}),
        glasses_radius=draw.uniform(0.034, 0.041),
        glasses_aspect=draw.uniform(1.0, 1.3),
        earrings=draw.chance(0.15),
        necklace=draw.chance(0.12),
    )


def _sample_colours(draw: _Draw) -> Colours:
    skin = draw.tone(_SKIN_TONES)
    hair = draw.colour((0.55, 0.9), (0.5, 0.9)) if draw.chance(0.07) else draw.tone(_HAIR_TONES)
    redness = draw.uniform(0.15, 0.5)
    brightness = sum(skin) / 3.0
    lips = [s * (1.0 - redness) + c * redness * (0.35 + brightness) for s, c in zip(skin, (0.85, 0.22, 0.26))]
    brow_share = draw.uniform(0.4, 0.8)
    brows = [0.75 * (brow_share * min(h, 0.6) + (1.0 - brow_share) * 0.35 * s) for h, s in zip(hair, skin)]
    return Colours(
        skin=skin,
        lips=_colour(*lips),
        iris=draw.tone(_IRIS_TONES),
        hair=hair,
        brows=_colour(*brows),
        cloth=draw.colour((0.0, 0.8), (0.1, 0.9)),
        cloth_second=draw.colour((0.0, 0.6), (0.2, 0.95)),
        hat=draw.colour((0.1, 0.9), (0.12, 0.85)),
        glasses=draw.colour((0.0, 0.7), (0.04, 0.35)),
        metal=draw.tone(((0.9, 0.72, 0.3), (0.85, 0.85, 0.87))),
    )


def _sample_light(draw: _Draw) -> Light:
    azimuth, elevation = draw.uniform(-math.pi, math.pi), draw.uniform(0.3, 1.1)
    azimuth *= 0.6  # from the side of the face more often than from behind, as photographers do
    across = math.cos(elevation)
    return Light(
        direction=(across * math.sin(azimuth), math.sin(elevation), across * math.cos(azimuth)),
        strength=draw.uniform(0.45, 0.75),
        ambient=draw.uniform(0.45, 0.65),
        warmth=draw.uniform(-0.6, 0.8),
    )


def _sample_background(draw: _Draw) -> dict:
    first = draw.colour((0.0, 0.45), (0.15, 0.98))
    second = first if draw.chance(0.4) else draw.colour((0.0, 0.45), (0.15, 0.98))
    return {"background": (first, second), "background_angle": draw.uniform(0.0, 2.0 * math.pi)}


@dataclass(frozen=True, kw_only=True)
class CameraRange:
    """Where cameras of synthetic images stand; all look at the origin, upright."""

    yaw_deg: tuple[float, float] = (-180.0, 180.0)
    """Lowest and highest azimuth; drawn evenly between."""
    pitch_deg: tuple[float, float] = (-20.0, 40.0)
    """Lowest and highest elevation; drawn evenly between."""
    front_bias: float = 0.0
    """Share of the cameras whose azimuth is drawn about the front (normal, sigma 25 degrees), kept within `yaw_deg`."""
    radius: float = TRAINING_RADIUS
    focal: float = TRAINING_FOCAL
    focal_jitter: float = 0.0
    """Focal lengths are drawn evenly from `focal` times 1 - jitter to 1 + jitter."""

    def __post_init__(self) -> None:
        for name, limit in (("yaw_deg", 360.0), ("pitch_deg", 89.0)):
            low, high = getattr(self, name)
            require(-limit <= low <= high <= limit, name, f"two ascending numbers within +-{limit:g}", (low, high))
        require(0.0 <= self.front_bias <= 1.0, "front_bias", "0 to 1", self.front_bias)
        require(0.0 <= self.focal_jitter <= 0.5, "focal_jitter", "0 to 0.5", self.focal_jitter)
        require(1.0 <= self.radius <= 100.0, "radius", "1 to 100, outside the head", self.radius)
        require(0.1 <= self.focal <= 100.0, "focal", "0.1 to 100 image widths", self.focal)


def sample_cameras(seed: int, first: int, count: int, cameras: CameraRange | None = None) -> torch.Tensor:
    """Draw the cameras of images `first` ... `first + count - 1`.

    Args:
        seed: of the whole data set, at least 0.
        first: number of the first image, at least 0.
        count: how many, at least 1.
        cameras: where they stand; None is :class:`CameraRange` with its defaults.

    Returns:
        Labels [count, 25] float32 on the CPU. Each is a function of (seed, number of the image, `cameras`).

    Raises:
        ValueError: a number is negative, or there are none to draw.
    """
    _require_natural(seed=seed, first=first)
    require(count >= 1, "count", "at least 1", count)
    cameras = cameras or CameraRange()
    rows = [_sample_camera(_Draw(_CAMERA_STREAM, seed, first + i), cameras) for i in range(count)]
    yaw, pitch, focal = torch.tensor(rows, dtype=torch.float64).T  # [count] each
    intrinsics = torch.zeros(count, 3, 3)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal.float()
    intrinsics[:, :2, 2] = 0.5
    intrinsics[:, 2, 2] = 1.0
    return camera_label(look_at_pose(torch.deg2rad(yaw), torch.deg2rad(pitch), cameras.radius), intrinsics)


def _sample_camera(draw: _Draw, cameras: CameraRange) -> tuple[float, float, float]:
    """Return yaw and pitch in degrees, and the focal length."""
    low, high = cameras.yaw_deg
    yaw = draw.uniform(low, high)
    pitch = draw.uniform(*cameras.pitch_deg)
    focal = cameras.focal * (1.0 + cameras.focal_jitter * draw.uniform(-1.0, 1.0))
    if draw.chance(cameras.front_bias):
        yaw = min(max(draw.normal(0.0, _FRONT_SIGMA_DEG), low), high)
    return yaw, pitch, focal


def _require_natural(**numbers: int) -> None:
    for name, value in numbers.items():
        require(isinstance(value, int) and value >= 0, name, "a whole number of at least 0", value)
