"""Shape synthetic heads: from parameters to primitives, and from primitives to signed distances of materials."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from training.synthetic_head_forms import FAR, FormBatch, Forms, rotation
from training.synthetic_head_parameters import HeadParameters

SKIN, HAIR, CLOTH, GLASSES, HAT, METAL = range(6)  # materials
BOX = ((-0.4, 0.4), (-0.5, 0.34), (-0.4, 0.4))  # nothing of any head lies outside
_CRANIUM_CENTER, _CRANIUM_RADII = np.array([0.0, 0.075, -0.025]), np.array([0.143, 0.15, 0.17])
_NAPE = (0.0, -0.085, -0.15)  # where the hairline of short cuts passes behind
Points = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Coordinates x, y, z of places, [B, M] each."""


def smooth_min(first: torch.Tensor, second: torch.Tensor, width: float) -> torch.Tensor:
    """Unite two signed distances, rounding the seam where they differ by less than `width`.

    ``min(a, b) - max(w - |a - b|, 0)^2 / (4 w)``, the quadratic polynomial of I. Quilez, as
    ``min(a, b - clamp(w + b - a, 0, 2 w)^2 / (4 w))``, which is the same in fewer passes over memory.
    """
    overlap = (second - first).clamp_(-width, width).add_(width)
    torch.addcmul(second, overlap, overlap, value=-0.25 / width, out=overlap)
    return torch.minimum(first, overlap, out=overlap)


def smooth_max(first: torch.Tensor, second: torch.Tensor, width: float) -> torch.Tensor:
    """Intersect two signed distances, rounding the edge; see :func:`smooth_min`."""
    overlap = (first - second).clamp_(-width, width).add_(width)
    torch.addcmul(second, overlap, overlap, value=0.25 / width, out=overlap)
    return torch.maximum(first, overlap, out=overlap)


def length(vectors: torch.Tensor) -> torch.Tensor:
    """Return the lengths [B, 1, N] of vectors [B, 3, N].

    The same bits as those of `torch.linalg.vector_norm`, which takes 30 times as long along this axis. The square root
    is taken in float64 because PyTorch's in float32 is wrong in the last bit now and then.
    """
    return (vectors * vectors).sum(dim=1, keepdim=True).double().sqrt_().float()


@functools.lru_cache(maxsize=64)  # views of an identity come one after the other
def head_forms(head: HeadParameters) -> Forms:
    """Build the primitives of a head."""
    face = head.face
    forms = Forms(scale=np.array([face.head_width, face.head_height, face.head_depth]))
    _add_skull(forms, head)
    _add_features(forms, head)
    _add_clothes(forms, head)
    _add_hair(forms, head)
    if head.wear.hat != "none":
        _add_hat(forms, head)
    if head.wear.glasses != "none":
        _add_glasses(forms, head)
    if head.wear.earrings:
        place = np.array([0.152, -0.066 * face.ear_size, -0.012]) * forms.scale
        forms.capsule("earring", place, place, (0.0115, 0.0115), mirrored=True)
    return forms


def _add_skull(forms: Forms, head: HeadParameters) -> None:
    face = head.face
    forms.ellipsoid("cranium", _CRANIUM_CENTER, _CRANIUM_RADII)
    forms.ellipsoid("face", (0.0, -0.045, 0.042), (0.112 * (0.5 + 0.5 * face.jaw_width), 0.135, 0.107))
    forms.ellipsoid("jaw", (0.0, -0.118, 0.055), (0.077 * face.jaw_width, 0.07, 0.078))
    turn = rotation(about_x_rad=-0.2, about_y_rad=-face.ear_out)
    size = face.ear_size
    forms.ellipsoid("ear", (0.148, 0.0, -0.022), (0.0135, 0.056 * size, 0.033 * size), turn, mirrored=True)
    neck = (forms.scale * (0.0, -0.08, -0.035), (0.0, -0.42, -0.06))
    forms.capsule("neck", *neck, (face.neck_radius, face.neck_radius * 1.08))


def _add_features(forms: Forms, head: HeadParameters) -> None:
    face, scale = head.face, forms.scale
    eye = (face.eye_spacing, face.eye_y, 0.094)
    forms.capsule("eye", eye * scale, eye * scale, (0.0315, 0.0315), mirrored=True)
    tip_y = nose_tip_y(head)
    bridge, tip = (0.0, face.eye_y + 0.018, 0.132), (0.0, tip_y, 0.148 + face.nose_depth - face.nose_radius)
    forms.capsule("nose", bridge * scale, tip * scale, (0.011, face.nose_radius))
    wing = np.array([0.6 * face.nose_radius + 0.008, tip_y - 0.006, 0.146]) * scale
    forms.capsule("nose wing", wing, wing, (face.nose_wings, face.nose_wings), mirrored=True)
    forms.bump("chin", (0.0, -0.172, 0.125), (0.035, 0.026, 0.04), face.chin)
    forms.bump("cheek", (0.068, -0.035, 0.11), (0.035, 0.035, 0.05), face.cheeks, mirrored=True)
    forms.bump("socket", (face.eye_spacing, face.eye_y + 0.004, 0.14), (0.036, 0.02, 0.04), -0.017, mirrored=True)
    forms.bump("brow", (0.045, face.eye_y + 0.042, 0.14), (0.05, 0.016, 0.05), face.brow_ridge, mirrored=True)
    y, half = face.mouth_y, face.mouth_half_width
    gap = face.mouth_open
    forms.bump("upper lip", (0.0, y + gap + 0.5 * face.lip_upper, 0.15), (0.75 * half, 0.008, 0.03), 0.006)
    forms.bump("lower lip", (0.0, y - gap - 0.6 * face.lip_lower, 0.15), (0.65 * half, 0.0085, 0.03), 0.0075)
    forms.bump("below lip", (0.0, y - gap - face.lip_lower - 0.014, 0.15), (0.03, 0.01, 0.03), -0.005)
    forms.bump("ear hollow", (0.162, 0.006, -0.014), (0.018, 0.026 * face.ear_size, 0.014), -0.008, mirrored=True)
    if head.hair.beard_length > 0.0:
        forms.bump("beard", (0.0, -0.165, 0.1), (0.07, 0.045, 0.07), head.hair.beard_length)


def nose_tip_y(head: HeadParameters) -> float:
    """Return the height of the centre of the nose's tip, in the frame of the average head."""
    return head.face.eye_y + 0.018 - head.face.nose_length


def _add_clothes(forms: Forms, head: HeadParameters) -> None:
    body = Forms()  # not scaled with the head
    body.ellipsoid("chest", (0.0, -0.52, -0.045), (0.30, 0.2, 0.135))
    body.ellipsoid("trapezius", (0.0, -0.36, -0.065), (0.17, 0.085, 0.075))
    if head.wear.top == "hood":
        body.ellipsoid("hood", (0.0, -0.285, -0.115), (0.125, 0.05, 0.075), rotation(about_x_rad=0.5))
    body.plane("hem", (0.0, -1.0, 0.0), (0.0, -0.495, 0.0))
    forms.ellipsoids.update(body.ellipsoids)
    forms.planes.update(body.planes)
    forms.capsule("shoulder", (0.06, -0.375, -0.055), (0.25, -0.425, -0.05), (0.07, 0.085), mirrored=True)
    radius = head.face.neck_radius + (0.013 if head.wear.top == "turtleneck" else 0.011)
    top = -0.235 if head.wear.top == "turtleneck" else -0.295
    forms.capsule("collar", (0.0, top - radius, -0.051), (0.0, -0.42, -0.058), (radius, radius + 0.02))


def _add_hair(forms: Forms, head: HeadParameters) -> None:
    hair = head.hair
    if hair.style == "bald":
        return
    nape_y = _NAPE[1] - (0.02 if hair.style in ("bob", "long", "curly", "afro") else 0.0)
    rise = hair.hairline_y - nape_y
    forms.plane("hairline", (hair.parting * 0.3, -0.29, rise), (0.0, hair.hairline_y, 0.14))
    length, volume = hair.length, hair.volume
    full = _CRANIUM_RADII + hair.thickness
    if hair.style == "swept":
        forms.ellipsoid("dome", (0.1 * hair.parting, 0.135, 0.035), (0.125, 0.075 + 0.04 * volume, 0.125))
    elif hair.style == "horseshoe":
        forms.plane("bald top", (0.0, 1.0, 0.25), (0.0, 0.085 + 0.04 * volume, 0.0))
    elif hair.style in ("curly", "afro"):
        extra = 0.02 + 0.02 * volume if hair.style == "curly" else 0.045 + 0.03 * volume
        forms.ellipsoid("dome", _CRANIUM_CENTER + (0.0, 0.3 * extra - 0.01, -0.02), _CRANIUM_RADII + extra)
    elif hair.style == "mohawk":
        forms.ellipsoid("dome", (0.0, 0.12, -0.03), (0.022, 0.14 + 0.05 * volume, 0.17 + 0.03 * volume))
    elif hair.style in ("bob", "long"):
        _add_curtain(forms, head, full)
    elif hair.style == "bun":
        place = np.array([0.0, 0.06 + 0.19 * length, -0.225 + 0.16 * length * length]) * forms.scale
        forms.capsule("tail", place, place, (0.05 + 0.015 * volume,) * 2)
    elif hair.style == "ponytail":
        start = np.array([0.0, 0.14, -0.19]) * forms.scale
        end = np.array([0.0, -0.08 - 0.2 * length, -0.26]) * forms.scale
        forms.capsule("tail", start, end, (0.03 + 0.015 * volume, 0.03))
    elif hair.style == "pigtails":
        start, end = np.array([0.158, 0.085, -0.06]) * forms.scale, np.array([0.2, -0.1 - 0.15 * length, -0.05])
        forms.capsule("pigtail", start, end, (0.035 + 0.015 * volume, 0.026), mirrored=True)


def _add_curtain(forms: Forms, head: HeadParameters, full: np.ndarray) -> None:
    """Add hair that hangs around the head and is open at the face."""
    hair = head.hair
    wide, deep = full[0] + 0.012 + 0.02 * hair.volume, full[2] + 0.004 + 0.012 * hair.volume
    if hair.style == "bob":
        forms.ellipsoid("curtain", (0.0, 0.0, -0.03), (wide, 0.245, deep))
        bottom = -0.1 - 0.1 * hair.length
    else:
        forms.ellipsoid("curtain", (0.0, -0.07, -0.035), (wide, 0.325, deep))
        bottom = -0.25 - 0.12 * hair.length
    forms.plane("curtain front", (0.0, 0.12, 1.0), (0.0, 0.0, 0.035 + 0.03 * hair.volume))
    forms.plane("curtain bottom", (0.0, -1.0, 0.0), (0.0, bottom, 0.0))


def _add_hat(forms: Forms, head: HeadParameters) -> None:
    room = 0.014 if head.hair.style in ("bald", "buzz") else head.hair.thickness + 0.014
    room += 0.014 if head.hair.style in ("bob", "long") else 0.0
    tall = 0.03 if head.wear.hat == "brim" else 0.012
    forms.ellipsoid("hat", _CRANIUM_CENTER + (0.0, 0.008, 0.0), _CRANIUM_RADII + (room, room + tall, room))
    forms.plane("hat line", (0.0, -1.0, 0.32), (0.0, 0.094, 0.12))
    if head.wear.hat == "cap":
        turn = rotation(about_x_rad=0.12)
        forms.ellipsoid("hat brim", (0.0, 0.098, 0.19), (0.105, 0.012, 0.12), turn)
    elif head.wear.hat == "brim":
        turn = rotation(about_x_rad=0.2)
        forms.ellipsoid("hat brim", (0.0, 0.078, -0.015), (0.275, 0.014, 0.29), turn)


def _add_glasses(forms: Forms, head: HeadParameters) -> None:
    face, wear, scale = head.face, head.wear, forms.scale
    center = np.array([face.eye_spacing + 0.003, face.eye_y - 0.004, 0.156]) * scale
    forms.ring("rim", center, wear.glasses_radius, wear.glasses_aspect)
    outer = center[0] + wear.glasses_radius * wear.glasses_aspect
    inner = center[0] - wear.glasses_radius * wear.glasses_aspect
    y, z = center[1] + 0.01, center[2]
    forms.capsule("temple", (outer, y, z), (max(0.153 * scale[0], outer), y, -0.02), (0.005, 0.005), mirrored=True)
    forms.capsule("bridge", (0.0, y, z + 0.004), (max(inner, 0.001), y, z), (0.0045, 0.0045), mirrored=True)


def _hair_thickness(head: HeadParameters) -> float:
    """Return the thickness of the layer that follows the skull, such that a bald head has no hair beside hairy ones."""
    if head.hair.style == "bald":
        return -FAR
    return 0.004 if head.hair.style in ("buzz", "mohawk") else head.hair.thickness


class HeadField:
    """Signed distances of a batch of heads.

    Args:
        heads: one for each entry of the batch.
        device: where positions will be.
    """

    def __init__(self, heads: Sequence[HeadParameters], device: torch.device | str) -> None:
        self.forms = FormBatch([head_forms(head) for head in heads], device)
        self._any_curls = any(head.hair.curl > 0.0 and head.hair.style != "bald" for head in heads)
        self._any_dark = any(head.wear.glasses == "dark" for head in heads)

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]  # [B, 1]

        self._thickness = column([_hair_thickness(head) for head in heads])
        self._curl = column([head.hair.curl for head in heads])
        self._frequency = column([head.hair.curl_frequency for head in heads])
        self._phase = column([head.hair.phase for head in heads])
        self._dark = column([head.wear.glasses == "dark" for head in heads]).bool()

    def distance(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Return the signed distance [B, M] of positions [B, M] from the nearest surface."""
        materials = self.materials(x, y, z)[0]
        return functools.reduce(torch.minimum, materials.values())

    def materials(
        self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor
    ) -> tuple[dict[int, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the signed distances [B, M] by material (those that any head has), and of all primitives."""
        parts = self.forms.distances(x, y, z)
        out = {SKIN: self._skin(parts), CLOTH: self._cloth(parts)}
        if "hairline" in parts:
            out[HAIR] = self._hair(parts, x, y, z)
        if "hat" in parts:
            hat = smooth_max(parts["hat"], parts["hat line"], 0.008)
            out[HAT] = smooth_min(hat, parts["hat brim"], 0.012) if "hat brim" in parts else hat
        if "temple" in parts:
            out[GLASSES] = self._glasses(parts)
        if "earring" in parts:
            out[METAL] = parts["earring"]
        return out, parts

    def _skin(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        skin = smooth_min(parts["cranium"], parts["face"], 0.05)
        skin = smooth_min(skin, parts["jaw"], 0.03)
        skin = smooth_min(skin, parts["nose"], 0.025)
        skin = smooth_min(skin, parts["nose wing"], 0.012)
        skin = smooth_min(skin, parts["ear"], 0.012)
        skin = skin - parts["bumps"]
        skin = smooth_min(skin, parts["eye"], 0.004)
        return smooth_min(skin, parts["neck"], 0.03)

    def _hair(self, parts: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        hair = parts["cranium"] - self._thickness
        if "bald top" in parts:
            hair = smooth_max(hair, parts["bald top"], 0.01)
        if "dome" in parts:
            hair = smooth_min(hair, parts["dome"], 0.02)
        hair = smooth_max(hair, parts["hairline"], 0.012)
        if "curtain" in parts:
            curtain = smooth_max(parts["curtain"], parts["curtain front"], 0.03)
            hair = smooth_min(hair, smooth_max(curtain, parts["curtain bottom"], 0.04), 0.02)
        for name in ("tail", "pigtail"):
            if name in parts:
                hair = smooth_min(hair, parts[name], 0.015)
        if self._any_curls:
            f = self._frequency
            waves = torch.stack([x * f + self._phase, y * f, z * f + self._phase], dim=1).sin_()  # [B, 3, M]
            hair = hair + self._curl * waves.prod(dim=1)
        return hair

    def _cloth(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        cloth = smooth_min(parts["chest"], parts["shoulder"], 0.06)
        cloth = smooth_min(cloth, parts["trapezius"], 0.05)
        if "hood" in parts:
            cloth = smooth_min(cloth, parts["hood"], 0.02)
        cloth = smooth_min(cloth, parts["collar"], 0.015)
        return torch.maximum(cloth, parts["hem"])

    def _glasses(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        around, along = parts["rim around"], parts["rim along"]
        glasses = (around * around).addcmul_(along, along).sqrt_().sub_(0.0055)
        if self._any_dark:
            lens = torch.maximum(around, along.abs() - 0.002)
            glasses = torch.minimum(glasses, torch.where(self._dark, lens, FAR))
        return torch.minimum(glasses, torch.minimum(parts["temple"], parts["bridge"]))
