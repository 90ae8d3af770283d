"""Paint and light the surfaces of synthetic heads: all is a function of the place on the head, not of the camera."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from training.image_reading import PARSING_CLASSES
from training.synthetic_head_geometry import (
    CLOTH,
    GLASSES,
    HAIR,
    HAT,
    METAL,
    SKIN,
    HeadField,
    Points,
    length,
    nose_tip_y,
)
from training.synthetic_head_parameters import HeadParameters

_CLASS = {name: index for index, name in enumerate(PARSING_CLASSES)}
_MATERIAL_CLASS = {SKIN: "skin", HAIR: "hair", CLOTH: "cloth", GLASSES: "glasses", HAT: "hat", METAL: "earring"}
_GAMMA = 2.2
_AO_REACH, _SHADOW_REACH = 0.03, 0.07


def coverage(distance: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Return how much of a pixel of a width [B, 1] lies inside a signed distance: a ramp from 1 inside to 0 outside."""
    return (0.5 - distance / width.float()).clamp_(0.0, 1.0)


def image_by_image(
    function: Callable[..., torch.Tensor], counts: Sequence[int] | None, *inputs: torch.Tensor
) -> torch.Tensor:
    """Apply a function to images one after the other.

    In the last bit, PyTorch's powers and arctangents on a CPU depend on where in a tensor a number stands. What this
    returns does not depend on the other images of the batch.

    Args:
        function: of tensors like `inputs`.
        counts: how many columns of each image are no filling, B; None applies the function to all at once.
        inputs: [B, ..., N].

    Returns:
        [B, ..., N], shaped like the first input; 0 in filling.
    """
    if counts is None:
        return function(*inputs)
    out = torch.zeros_like(inputs[0])
    for i, count in enumerate(counts):
        part = (slice(i, i + 1), ..., slice(count))
        out[part] = function(*(tensor[part].contiguous() for tensor in inputs))
    return out


def _linear_colours(head: HeadParameters) -> torch.Tensor:
    """Return the colours of one head in linear light, [1, colours, 3]; see :func:`image_by_image`."""
    return torch.tensor([list(vars(head.colours).values())], dtype=torch.float32) ** _GAMMA


class HeadPainter:
    """Colours and parsing classes of a batch of heads.

    Args:
        heads: one for each entry of the batch.
        field: their geometry.
        width: width in world units over which painted edges are softened: that of a pixel, [B, 1] float64.
        device: where positions will be.
    """

    def __init__(
        self, heads: Sequence[HeadParameters], field: HeadField, width: torch.Tensor, device: torch.device | str
    ) -> None:
        self._field, self._width = field, width

        def column(read: Callable[[HeadParameters], float]) -> torch.Tensor:
            return torch.tensor([[float(read(head))] for head in heads], dtype=torch.float32, device=device)  # [B, 1]

        groups = ("face", "hair", "wear", "colours", "light")
        numbers: dict[str, torch.Tensor] = {}
        for group in groups:
            for name, value in vars(getattr(heads[0], group)).items():
                if isinstance(value, bool | int | float):
                    numbers[name] = column(lambda head, g=group, n=name: getattr(getattr(head, g), n))
        self._numbers = numbers
        self._nose_y = column(nose_tip_y)
        self._v_neck = column(lambda head: head.wear.top == "v_neck")
        self._band = column(lambda head: {"beanie": 0.034, "brim": 0.026}.get(head.wear.hat, 0.0))
        self._cap_hair = column(lambda head: head.hair.style in ("buzz", "mohawk"))
        self._has = {
            "beard": any(head.hair.beard > 0.0 for head in heads),
            "moustache": any(head.hair.moustache > 0.0 for head in heads),
            "necklace": any(head.wear.necklace for head in heads),
        }
        table = torch.cat([_linear_colours(head) for head in heads]).to(device)  # [B, colours, 3]
        self._colours = dict(zip(vars(heads[0].colours), table[:, :, :, None].unbind(1)))  # [B, 3, 1] each
        lamp = torch.tensor([head.light.direction for head in heads], dtype=torch.float32, device=device)
        self._lamp = lamp / torch.linalg.vector_norm(lamp, dim=1, keepdim=True)  # [B, 3]

    def paint(
        self, points: Points, counts: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Colour places on surfaces.

        Args:
            points: x, y, z [B, N].
            counts: see :func:`image_by_image`.

        Returns:
            Albedo [B, 3, N] in linear light, parsing class and material [B, N] int64, and gloss [B, N].
        """
        x, y, z = points
        materials, parts = self._field.materials(*points)
        names = list(materials)
        nearest = torch.stack([materials[name] for name in names]).argmin(dim=0)  # [B, N]
        lookup = torch.tensor([_CLASS[_MATERIAL_CLASS[name]] for name in names], device=x.device)
        classes = lookup[nearest]
        albedo, skin_classes = self._paint_skin(x, y, z, parts)
        is_skin = nearest == names.index(SKIN)
        classes = torch.where(is_skin, skin_classes, classes)
        gloss = torch.where(is_skin, 0.05, 0.0)
        painters = {
            HAIR: lambda: self._paint_hair(x, y, z, counts),
            CLOTH: lambda: self._paint_cloth(x, y, z),
            GLASSES: lambda: self._colours["glasses"],
            HAT: lambda: self._paint_hat(x, z, parts, counts),
            METAL: lambda: self._colours["metal"],
        }
        for position, name in enumerate(names):
            if name in painters:
                albedo = torch.where((nearest == position)[:, None], painters[name](), albedo)
        if HAIR in materials:
            gloss = torch.where(nearest == names.index(HAIR), 0.10, gloss)
        bare = self._v_neck.bool() & (1.5 * x.abs() - y < 0.375) & (z > 0.0) & (classes == _CLASS["cloth"])
        albedo = torch.where(bare[:, None], self._colours["skin"], albedo)
        classes = torch.where(bare, _CLASS["neck"], classes)
        return albedo, classes, nearest, gloss

    def _over(self, albedo: torch.Tensor, paint: torch.Tensor, opacity: torch.Tensor) -> torch.Tensor:
        """Lay a colour [B, 3, 1 or N] over another with an opacity [B, N]."""
        return torch.lerp(albedo, paint.expand_as(albedo), opacity[:, None])

    def _paint_skin(
        self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, parts: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        p = self._numbers
        u, v, w = x / p["head_width"], y / p["head_height"], z / p["head_depth"]
        across = u.abs()
        left = u > 0.0
        classes = torch.full_like(u, _CLASS["skin"], dtype=torch.int64)

        def mark(where: torch.Tensor, name: str, other: str | None = None) -> None:
            classes.masked_fill_(where, _CLASS[name])
            if other is not None:
                classes.masked_fill_(where & ~left, _CLASS[other])

        head = torch.minimum(torch.minimum(parts["face"], parts["jaw"]), parts["cranium"])
        mark(parts["neck"] < head, "neck")
        mark((parts["ear"] < 0.004) & (across > 0.13), "left ear", "right ear")
        front = w > 0.07
        mark((torch.minimum(parts["nose"], parts["nose wing"]) < 0.005) & front, "nose")
        albedo = self._colours["skin"].expand(-1, -1, u.shape[1])
        albedo = self._paint_complexion(albedo, across, v, w)
        albedo = self._paint_beard(albedo, across, v, w, front)
        albedo = self._paint_mouth(albedo, u, v, front, mark)
        albedo = self._paint_eyes(albedo, u, v, front, mark)
        if self._has["necklace"]:
            chain = (y + 0.257 + 0.35 * z).abs() - 0.006
            chain = torch.where((p["necklace"] > 0.0) & (parts["neck"] < head), chain, 1.0)
            albedo = self._over(albedo, self._colours["metal"], coverage(chain, self._width))
            mark(chain < 0.0, "necklace")
        return albedo, classes

    def _paint_complexion(
        self, albedo: torch.Tensor, across: torch.Tensor, v: torch.Tensor, w: torch.Tensor
    ) -> torch.Tensor:
        """Redden cheeks, nose and ears a little, and open the nostrils."""
        blush = torch.exp(-(((across - 0.065) / 0.03) ** 2 + ((v + 0.045) / 0.03) ** 2)).mul_(0.25)
        blush = torch.where(w > 0.03, blush, torch.where(across > 0.145, 0.2, 0.0))
        albedo = self._over(albedo, self._colours["lips"], blush)
        nostril = torch.hypot((across - 0.0105) / 0.0065, (v - self._nose_y + 0.0175) / 0.0045) - 1.0
        nostril = torch.where(w > 0.14, 0.005 * nostril, 1.0)
        return self._over(albedo, 0.15 * self._colours["skin"], 0.8 * coverage(nostril, self._width))

    def _paint_beard(
        self, albedo: torch.Tensor, across: torch.Tensor, v: torch.Tensor, w: torch.Tensor, front: torch.Tensor
    ) -> torch.Tensor:
        p = self._numbers
        if self._has["beard"]:
            cheek_line = v + 0.025 + 0.5 * w.clamp_min(0.0)
            edge = torch.maximum(torch.maximum(cheek_line, -0.225 - v), 0.002 - w)
            albedo = self._over(albedo, self._colours["brows"], p["beard"] * coverage(edge, 0.012 + self._width))
        if self._has["moustache"]:
            middle = 0.5 * (p["mouth_y"] + p["mouth_open"] + p["lip_upper"] + self._nose_y - 0.02)
            edge = torch.maximum(across - p["mouth_half_width"], (v - middle + 0.25 * across).abs() - 0.009)
            edge = torch.where(front, edge, 1.0)
            albedo = self._over(albedo, self._colours["brows"], p["moustache"] * coverage(edge, 0.005 + self._width))
        return albedo

    def _paint_mouth(
        self, albedo: torch.Tensor, u: torch.Tensor, v: torch.Tensor, front: torch.Tensor, mark: Callable
    ) -> torch.Tensor:
        p, width = self._numbers, self._width
        place = u / p["mouth_half_width"]
        bow = torch.where(front, 1.0 - place * place, -1.0)  # 1 in the middle, 0 in the corners
        height = v - p["mouth_y"] - p["smile"] * place * place
        gap = p["mouth_open"] * bow
        dip = 1.0 - 0.3 * (1.0 - (place / 0.3) ** 2).clamp_min_(0.0)
        above = torch.maximum(height - gap - p["lip_upper"] * bow * dip * 1.15, -height)
        below = torch.maximum(-height - gap - p["lip_lower"] * bow, height)
        albedo = self._over(albedo, 0.85 * self._colours["lips"], coverage(above, width))
        albedo = self._over(albedo, self._colours["lips"], coverage(below, width))
        mark(above < 0.0, "upper lip")
        mark(below < 0.0, "lower lip")
        inside = torch.where(p["mouth_open"] > 0.0, height.abs() - gap, 1.0)
        inside = torch.where(bow > 0.0, inside, 1.0)
        teeth = torch.where((height > -0.15 * gap)[:, None], 0.7, 0.3 * self._colours["lips"])
        albedo = self._over(albedo, teeth, coverage(inside, width))
        mark(inside < 0.0, "mouth")
        line = torch.where((p["mouth_open"] > 0.0) | (bow < 0.0), 1.0, height.abs() - 0.0016)
        return self._over(albedo, 0.2 * self._colours["lips"], 0.9 * coverage(line, width))

    def _paint_eyes(
        self, albedo: torch.Tensor, u: torch.Tensor, v: torch.Tensor, front: torch.Tensor, mark: Callable
    ) -> torch.Tensor:
        p, width = self._numbers, self._width
        side = u.sign()
        local = u.abs() - p["eye_spacing"]  # outwards
        place = local / p["eye_half_width"]
        bow = torch.where(front, 1.0 - place * place, -1.0)
        height = v - p["eye_y"] - p["eye_tilt"] * local
        upper = p["eye_half_height"] * bow
        opening = torch.maximum(height - upper, -0.8 * upper - height)
        white = albedo.new_tensor([0.82, 0.80, 0.78])[:, None]
        dark = 0.08 * self._colours["skin"]
        radius = torch.hypot(local - side * p["gaze_x"] * p["eye_half_width"], height - 0.0015)
        shade = 0.55 + 0.45 * ((upper - height) / 0.012).clamp(0.0, 1.0)  # of the lid on the eye
        ball = self._over(
            white.expand_as(albedo), 0.35 * self._colours["iris"], coverage(radius - p["iris_radius"], width)
        )
        ball = self._over(ball, self._colours["iris"], coverage(radius - 0.8 * p["iris_radius"], width))
        ball = self._over(ball, torch.zeros_like(dark), coverage(radius - 0.42 * p["iris_radius"], width))
        glint = torch.hypot(local - side * (p["gaze_x"] * p["eye_half_width"] + 0.004), height - 0.006) - 0.0028
        ball = self._over(ball * shade[:, None], torch.ones_like(dark), 0.9 * coverage(glint, width))
        albedo = self._over(albedo, ball, coverage(opening, width))
        mark(opening < 0.0, "left eye", "right eye")
        inside = torch.where(bow > -0.12, 0.0, 1.0)  # lines end a little outside the corners
        lash = (height - upper).abs() - 0.0028 + inside
        crease = (height - upper - 0.0085).abs() - 0.0012 + inside
        albedo = self._over(albedo, dark, 0.9 * coverage(lash, width))
        albedo = self._over(albedo, 0.35 * self._colours["skin"], 0.5 * coverage(crease, width))
        place = (local - 0.002) / (1.3 * p["eye_half_width"])
        bow = torch.where(front, 1.1 - place * place, -1.0)
        rise = p["brow_gap"] + p["brow_tilt"] * local - p["brow_arch"] * p["eye_half_width"] * (place - 0.2) ** 2
        brow = (v - p["eye_y"] - rise).abs() - p["brow_half_height"] * bow
        mark(brow < 0.0, "left brow", "right brow")
        return self._over(albedo, self._colours["brows"], 0.9 * coverage(brow, width + 0.002))

    def _paint_hair(
        self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, counts: Sequence[int] | None
    ) -> torch.Tensor:
        """Paint strands that run down from the crown."""
        p = self._numbers
        around = image_by_image(torch.atan2, counts, x, z + 0.06)
        bend = p["phase"] + 1.5 * torch.sin(24.0 * y + p["phase"])
        strands = torch.sin(19.0 * around + bend).add_(torch.sin(43.0 * around - 1.7 * bend)).mul_(0.5)
        strands = 1.0 + p["strands"] * torch.where(self._cap_hair.bool(), 0.2 * strands, strands)
        return self._colours["hair"] * strands[:, None]

    def _paint_cloth(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        stripes = self._numbers["stripes"] * coverage(torch.sin(y * (2.0 * math.pi / 0.034)) * 0.0054, self._width)
        cloth = self._colours["cloth"].expand(-1, -1, x.shape[1])
        return self._over(cloth, self._colours["cloth_second"], stripes)

    def _paint_hat(
        self, x: torch.Tensor, z: torch.Tensor, parts: dict[str, torch.Tensor], counts: Sequence[int] | None
    ) -> torch.Tensor:
        ribs = torch.sin(26.0 * image_by_image(torch.atan2, counts, x, z + 0.02)) * (self._band > 0.03) * 0.12
        hat = self._colours["hat"] * (1.0 + ribs)[:, None]
        band = torch.where(self._band > 0.0, -parts["hat line"] - self._band, 1.0)
        return self._over(hat, self._colours["cloth_second"], 0.8 * coverage(band, self._width))

    def light(
        self, points: Points, albedo: torch.Tensor, gloss: torch.Tensor, counts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Light places on surfaces.

        Lambert with a softened terminator, one step of occlusion along the normal and one of shadow towards the lamp.
        The highlight depends on the normal and the lamp alone, so that all cameras see the same radiance.

        Args:
            points: x, y, z [B, N].
            albedo: [B, 3, N].
            gloss: strength of the highlight [B, N].
            counts: see :func:`image_by_image`.

        Returns:
            Display colours [B, 3, N] in [0, 1].
        """
        p = self._numbers
        normal = self._normals(points)
        facing = torch.einsum("bc,bcn->bn", self._lamp, normal)
        open_sky = self._free(points, normal, _AO_REACH)
        lit = self._free(points, 0.7 * self._lamp[:, :, None] + 0.3 * normal, _SHADOW_REACH)
        diffuse = ((facing + 0.3) / 1.3).clamp(min=0.0) * (0.35 + 0.65 * lit)
        highlight = gloss * image_by_image(lambda t: t**12, counts, facing.clamp(min=0.0))
        warmth = p["warmth"]
        lamp = torch.stack([1.0 + 0.08 * warmth, torch.ones_like(warmth), 1.0 - 0.14 * warmth], dim=1)  # [B, 3, 1]
        sky = p["ambient"] * (0.8 + 0.2 * normal[:, 1]) * (0.45 + 0.55 * open_sky)
        strength = 1.2 * p["strength"]
        lamp_light = lamp * (strength * diffuse)[:, None]
        radiance = (albedo * (sky[:, None] + lamp_light) + lamp * highlight[:, None]).clamp_(1e-6, 1.0)
        return image_by_image(lambda t: t ** (1.0 / _GAMMA), counts, radiance)

    def _free(self, points: Points, direction: torch.Tensor, reach: float) -> torch.Tensor:
        """Return how far [B, N] the space is free in a direction [B, 3, N], as a share of a reach."""
        moved = (axis + reach * direction[:, i] for i, axis in enumerate(points))
        return (self._field.distance(*moved) / reach).clamp_(0.0, 1.0)

    def _normals(self, points: Points) -> torch.Tensor:
        """Return outward unit normals [B, 3, N] by differences over the corners of a tetrahedron of half a pixel."""
        x, y, z = points
        step = (0.5 * self._width).float()
        total: list[torch.Tensor | float] = [0.0, 0.0, 0.0]
        for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
            distance = self._field.distance(x + step * corner[0], y + step * corner[1], z + step * corner[2])
            total = [t + sign * distance for t, sign in zip(total, corner)]
        normal = torch.stack(total, dim=1)
        return normal / length(normal).clamp_min(1e-12)
