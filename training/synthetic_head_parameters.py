"""Describe synthetic heads: every number that a procedural head is made of, with the values of a plain one as defaults.

Lengths are in world units (the box of the radiance field has side 1; a head is about 0.42 high) and, unless said
otherwise, in the frame of a head of average size, in which the chin is at y = -0.19, the top of the skull at y = 0.225
and the tip of the nose at z = 0.19. Colours are sRGB in [0, 1]. "Left" is the head's own left, +x.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Literal

from training.config import require

Colour = tuple[float, float, float]
HairStyle = Literal[
    "bald",
    "buzz",
    "short",
    "swept",
    "horseshoe",
    "bob",
    "long",
    "bun",
    "ponytail",
    "pigtails",
    "curly",
    "afro",
    "mohawk",
]
HatStyle = Literal["none", "beanie", "cap", "brim"]
GlassesStyle = Literal["none", "clear", "dark"]
TopStyle = Literal["crew", "turtleneck", "v_neck", "hood"]
HAIR_STYLES: tuple[str, ...] = typing.get_args(HairStyle)
HAT_STYLES: tuple[str, ...] = typing.get_args(HatStyle)
GLASSES_STYLES: tuple[str, ...] = typing.get_args(GlassesStyle)
TOP_STYLES: tuple[str, ...] = typing.get_args(TopStyle)


def _require_style(name: str, value: str, styles: tuple[str, ...]) -> None:
    require(value in styles, name, "one of " + ", ".join(styles), value)


@dataclass(frozen=True, kw_only=True)
class FaceShape:
    """Shape of skull, face, ears and neck."""

    head_width: float = 1.0
    """Scale of the whole head along x."""
    head_height: float = 1.0
    head_depth: float = 1.0
    jaw_width: float = 1.0
    """Scale of the lower face along x."""
    chin: float = 0.014
    """How far the chin stands out."""
    cheeks: float = 0.006
    brow_ridge: float = 0.004
    eye_spacing: float = 0.056
    """Distance of the eyes' centres from the middle plane."""
    eye_y: float = 0.014
    eye_half_width: float = 0.031
    eye_half_height: float = 0.0145
    eye_tilt: float = 0.1
    """Rise of the outer corners, as a slope."""
    gaze_x: float = 0.0
    """Shift of both irises towards the head's left, in units of half an eye's width."""
    iris_radius: float = 0.0135
    brow_gap: float = 0.032
    """Height of the brows above the eyes' centres."""
    brow_half_height: float = 0.0065
    brow_arch: float = 0.3
    """Rise of the brows towards their middle, in 1 / unit: y = gap - arch (x - spacing)^2 / half width."""
    brow_tilt: float = 0.0
    nose_length: float = 0.085
    nose_depth: float = 0.042
    """How far the tip stands out."""
    nose_radius: float = 0.019
    nose_wings: float = 0.014
    mouth_y: float = -0.115
    mouth_half_width: float = 0.043
    lip_upper: float = 0.011
    """Height of the upper lip in its middle."""
    lip_lower: float = 0.013
    smile: float = 0.0
    """Rise of the corners of the mouth."""
    mouth_open: float = 0.0
    """Half height of the opening between the lips in its middle; teeth show in it."""
    ear_size: float = 1.0
    ear_out: float = 0.3
    """Angle by which the ears stand out, in radians."""
    neck_radius: float = 0.064


@dataclass(frozen=True, kw_only=True)
class Hair:
    """Hair of the head, and the beard."""

    style: HairStyle = "short"
    thickness: float = 0.014
    """Of the layer that follows the skull."""
    hairline_y: float = 0.115
    """Height of the hairline at the forehead."""
    parting: float = 0.0
    """Rise of the hairline towards one side, as a slope: positive is higher on the head's left."""
    length: float = 0.5
    """From 0, the shortest of the style, to 1."""
    volume: float = 0.5
    """From 0, flat, to 1."""
    curl: float = 0.0
    """Height of the waves of the surface."""
    curl_frequency: float = 70.0
    """Of these waves, in radians per unit."""
    strands: float = 0.3
    """Contrast of the painted strands, 0 to 1."""
    phase: float = 0.0
    """Of waves and strands, in radians."""
    beard: float = 0.0
    """Opacity of the beard: 0 none, 0.3 stubble, 1 full."""
    beard_length: float = 0.0
    """How far a beard stands out."""
    moustache: float = 0.0
    """Opacity."""

    def __post_init__(self) -> None:
        _require_style("hair.style", self.style, HAIR_STYLES)


@dataclass(frozen=True, kw_only=True)
class Wear:
    """Clothes and accessories."""

    top: TopStyle = "crew"
    stripes: float = 0.0
    """Opacity of stripes in the second colour."""
    hat: HatStyle = "none"
    glasses: GlassesStyle = "none"
    glasses_radius: float = 0.04
    glasses_aspect: float = 1.15
    """Width of a lens over its height."""
    earrings: bool = False
    necklace: bool = False

    def __post_init__(self) -> None:
        _require_style("wear.top", self.top, TOP_STYLES)
        _require_style("wear.hat", self.hat, HAT_STYLES)
        _require_style("wear.glasses", self.glasses, GLASSES_STYLES)


@dataclass(frozen=True, kw_only=True)
class Colours:
    """Colours of the materials, without light."""

    skin: Colour = (0.85, 0.65, 0.53)
    lips: Colour = (0.72, 0.38, 0.36)
    iris: Colour = (0.3, 0.45, 0.6)
    hair: Colour = (0.25, 0.15, 0.09)
    brows: Colour = (0.22, 0.14, 0.09)
    cloth: Colour = (0.2, 0.3, 0.55)
    cloth_second: Colour = (0.85, 0.85, 0.85)
    hat: Colour = (0.6, 0.15, 0.15)
    glasses: Colour = (0.08, 0.08, 0.09)
    metal: Colour = (0.85, 0.7, 0.35)


@dataclass(frozen=True, kw_only=True)
class Light:
    """A lamp far away and light from the sky, both fixed relative to the head: they do not move with the camera."""

    direction: Colour = (0.35, 0.6, 0.72)
    """Towards the lamp; of any length above 0."""
    strength: float = 0.6
    ambient: float = 0.5
    warmth: float = 0.0
    """Of the lamp, -1 bluish to 1 yellowish."""


@dataclass(frozen=True, kw_only=True)
class HeadParameters:
    """One synthetic identity: shape, hair, clothes, colours, light and the picture's background."""

    face: FaceShape = field(default_factory=FaceShape)
    hair: Hair = field(default_factory=Hair)
    wear: Wear = field(default_factory=Wear)
    colours: Colours = field(default_factory=Colours)
    light: Light = field(default_factory=Light)
    background: tuple[Colour, Colour] = ((0.8, 0.8, 0.8), (0.8, 0.8, 0.8))
    """Colours at the two ends of a linear gradient across the picture."""
    background_angle: float = 0.0
    """Direction of the gradient in radians: 0 from left to right, pi / 2 from top to bottom."""
