"""Lay out the primitives of a synthetic head as polynomials of position, so that one matrix product evaluates them all.

An ellipsoid, a capsule, a bump, a plane and a ring need the squared length of a scaled vector or its component
along an axis: polynomials of degree two in (x, |x|, y, z). Each is a row of coefficients over the features

    1, x, |x|, y, z, x^2, y^2, z^2, |x| y, |x| z, y z, x y, x z

A primitive in |x| stands on both sides of the head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional

NUM_FEATURES = 13
_ONE, _X, _AX, _Y, _Z, _XX, _YY, _ZZ, _AXY, _AXZ, _YZ, _XY, _XZ = range(NUM_FEATURES)
_FEWEST_POINTS = 16  # below 12, products of matrices on a CPU round in another way
FAR = 1e4  # a distance beyond everything: the constant of the rows of a primitive that a head does not have
Vector = Sequence[float]


def position_features(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return the features [B, 13, M] of positions whose coordinates are [B, M] each."""
    base = torch.stack([torch.ones_like(x), x, x.abs(), y, z], dim=1)  # [B, 5, M]
    first, second = _factors(x.device)
    return base.index_select(1, first).mul_(base.index_select(1, second))


@functools.cache
def _factors(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which two of 1, x, |x|, y, z each feature is the product of."""
    pairs = [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (3, 3), (4, 4), (2, 3), (2, 4), (3, 4), (1, 3), (1, 4)]
    return tuple(torch.tensor(column, device=device) for column in zip(*pairs))


def rotation(about_x_rad: float = 0.0, about_y_rad: float = 0.0) -> np.ndarray:
    """Return the matrix [3, 3] that turns a primitive about x, then y."""
    (cx, sx), (cy, sy) = ((math.cos(a), math.sin(a)) for a in (about_x_rad, about_y_rad))
    around_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    around_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return around_y @ around_x


def _squared_length(matrix: np.ndarray, center: np.ndarray, mirrored: bool) -> np.ndarray:
    """Return the row [13] of ``|matrix (p - center)|^2``."""
    m = matrix.T @ matrix
    row = np.zeros(NUM_FEATURES)
    row[[_XX, _YY, _ZZ]] = m[0, 0], m[1, 1], m[2, 2]
    row[[_AXY, _AXZ] if mirrored else [_XY, _XZ]] = 2.0 * m[0, 1], 2.0 * m[0, 2]
    row[_YZ] = 2.0 * m[1, 2]
    row[[_AX if mirrored else _X, _Y, _Z]] = -2.0 * (m @ center)
    row[_ONE] = center @ m @ center
    return row


def _component(axis: np.ndarray, center: np.ndarray, mirrored: bool) -> np.ndarray:
    """Return the row [13] of ``axis . (p - center)``."""
    row = np.zeros(NUM_FEATURES)
    row[[_AX if mirrored else _X, _Y, _Z]] = axis
    row[_ONE] = -(axis @ center)
    return row


@dataclass
class Forms:
    """Primitives of one head, by name; centres and sizes are multiplied by `scale` along x, y, z where said."""

    scale: np.ndarray = field(default_factory=lambda: np.ones(3))
    ellipsoids: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    capsules: dict[str, tuple[np.ndarray, np.ndarray, float, float, float]] = field(default_factory=dict)
    bumps: dict[str, tuple[np.ndarray, float]] = field(default_factory=dict)
    planes: dict[str, np.ndarray] = field(default_factory=dict)
    rings: dict[str, tuple[np.ndarray, np.ndarray, float]] = field(default_factory=dict)

    def ellipsoid(
        self, name: str, center: Vector, radii: Vector, turn: np.ndarray | None = None, mirrored: bool = False
    ) -> None:
        """Add an ellipsoid in the frame of the average head; `turn` [3, 3] rotates it about its centre."""
        inverse = np.diag(1.0 / (np.asarray(radii) * self.scale)) @ (np.eye(3) if turn is None else turn.T)
        stretched = np.diag(1.0 / (np.asarray(radii) * self.scale)) @ inverse
        place = np.asarray(center) * self.scale
        rows = (_squared_length(inverse, place, mirrored), _squared_length(stretched, place, mirrored))
        self.ellipsoids[name] = rows

    def capsule(
        self, name: str, start: Vector, end: Vector, radii: tuple[float, float], mirrored: bool = False
    ) -> None:
        """Add a tapered capsule in world coordinates; start == end is a ball."""
        start, end = np.asarray(start, dtype=float), np.asarray(end, dtype=float)
        length = float(np.linalg.norm(end - start))
        axis = (end - start) / length if length > 0.0 else np.zeros(3)
        slope = (radii[1] - radii[0]) / length if length > 0.0 else 0.0
        rows = (_squared_length(np.eye(3), start, mirrored), _component(axis, start, mirrored))
        self.capsules[name] = (*rows, length, radii[0], slope)

    def bump(self, name: str, center: Vector, sigmas: Vector, height: float, mirrored: bool = False) -> None:
        """Raise the skin by ``height max(1 - q / 4, 0)^4``, q = |(p - center) / sigmas|^2, in the average head's frame.

        Nearly ``height exp(-q)``, but cheap, and nothing at all beyond two sigmas.
        """
        inverse = np.diag(1.0 / (np.asarray(sigmas) * self.scale))
        self.bumps[name] = (_squared_length(inverse, np.asarray(center) * self.scale, mirrored), height)

    def plane(self, name: str, normal: Vector, point: Vector) -> None:
        """Add a half space: negative behind the plane through `point` (average head), whose normal points outwards."""
        axis = np.asarray(normal) / self.scale
        axis = axis / np.linalg.norm(axis)
        self.planes[name] = _component(axis, np.asarray(point) * self.scale, mirrored=False)

    def ring(self, name: str, center: Vector, radius: float, aspect: float) -> None:
        """Add a pair of rims that face +z, in world coordinates: `radius` high, `aspect` times as wide."""
        around = _squared_length(np.diag([1.0 / aspect, 1.0, 0.0]), np.asarray(center), mirrored=True)
        along = _component(np.array([0.0, 0.0, 1.0]), np.asarray(center), mirrored=True)
        self.rings[name] = (around, along, radius)


class FormBatch:
    """Primitives of a batch of heads; what any of them has is evaluated for all of them.

    Args:
        heads: one entry per head.
        device: where positions will be.
    """

    def __init__(self, heads: Sequence[Forms], device: torch.device | str) -> None:
        self._ellipsoids = _names(head.ellipsoids for head in heads)
        self._capsules = _names(head.capsules for head in heads)
        self._bumps = _names(head.bumps for head in heads)
        self._planes = _names(head.planes for head in heads)
        self._rings = _names(head.rings for head in heads)
        rows = np.stack([self._rows(head) for head in heads])  # [B, rows, 13]
        self._table = torch.tensor(rows, dtype=torch.float32, device=device)
        lengths, radii, slopes = (
            [[head.capsules[n][column] if n in head.capsules else 0.0 for n in self._capsules] for head in heads]
            for column in (2, 3, 4)
        )
        self._lengths, self._radii, self._slopes = (
            torch.tensor(v, dtype=torch.float32, device=device)[:, :, None] for v in (lengths, radii, slopes)
        )  # [B, capsules, 1]
        heights = [[head.bumps[n][1] if n in head.bumps else 0.0 for n in self._bumps] for head in heads]
        self._heights = torch.tensor(heights, dtype=torch.float32, device=device)[:, None]  # [B, 1, bumps]
        ring_radii = [[head.rings[n][2] if n in head.rings else 0.0 for n in self._rings] for head in heads]
        self._ring_radii = torch.tensor(ring_radii, dtype=torch.float32, device=device)[:, :, None]

    def _rows(self, head: Forms) -> np.ndarray:
        """Return the coefficients [rows, 13], in the order in which `distances` takes them apart."""
        far = np.zeros(NUM_FEATURES)
        far[_ONE] = FAR
        one = np.zeros(NUM_FEATURES)
        one[_ONE] = 1.0
        rows = [head.ellipsoids.get(n, (far, one))[0] for n in self._ellipsoids]
        rows += [head.ellipsoids.get(n, (far, one))[1] for n in self._ellipsoids]
        rows += [head.capsules[n][0] if n in head.capsules else far for n in self._capsules]
        rows += [head.capsules[n][1] if n in head.capsules else 0.0 * far for n in self._capsules]
        rows += [head.bumps[n][0] if n in head.bumps else far for n in self._bumps]
        rows += [head.rings[n][0] if n in head.rings else far for n in self._rings]
        rows += [head.rings[n][1] if n in head.rings else far for n in self._rings]
        rows += [head.planes.get(n, -far) for n in self._planes]  # a plane that is not there cuts nothing off
        return np.stack(rows)

    def distances(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> dict[str, torch.Tensor]:
        """Evaluate all primitives.

        Args:
            x, y, z: coordinates [B, M].

        Returns:
            Signed distance [B, M] of every primitive by name, negative inside: exact for balls and planes, along the
            axes of an ellipsoid, and nearly so elsewhere. Rings have two entries: "<name> around", the distance from
            the circle within its plane, and "<name> along", the signed distance from the plane. "bumps" is the sum of
            the heights of all bumps.
        """
        num_points = x.shape[1]
        if num_points < _FEWEST_POINTS:
            padded = (functional.pad(axis, (0, _FEWEST_POINTS - num_points)) for axis in (x, y, z))
            return {name: distance[:, :num_points] for name, distance in self.distances(*padded).items()}
        forms = torch.bmm(self._table, position_features(x, y, z))  # [B, rows, M]
        e, c, b, r = len(self._ellipsoids), len(self._capsules), len(self._bumps), len(self._rings)
        lengths = forms[:, : 2 * e].clamp_min_(1e-9).sqrt_()  # rounding may go below 0 in the centre
        k0, k1 = lengths[:, :e], lengths[:, e:]
        ellipsoids = (k0 - 1.0).mul_(k0).div_(k1)  # |p/r| (|p/r| - 1) / |p/r^2|, first order in the distance
        squares, alongs = forms[:, 2 * e : 2 * e + c], forms[:, 2 * e + c : 2 * e + 2 * c]
        foot = torch.minimum(alongs.clamp_min(0.0), self._lengths)
        reach = squares.add_(foot * (foot - 2.0 * alongs)).clamp_min_(1e-12).sqrt_()
        capsules = reach.sub_(self._radii).sub_(foot.mul_(self._slopes))
        start = 2 * e + 2 * c
        bell = forms[:, start : start + b].mul_(-0.25).add_(1.0).clamp_min_(0.0).square_().square_()
        bumps = torch.bmm(self._heights, bell)[:, 0]  # [B, M]
        rims = forms[:, start + b : start + b + r].clamp_min_(0.0).sqrt_().sub_(self._ring_radii)
        start += b + r
        out = {"bumps": bumps}
        for names, values in ((self._ellipsoids, ellipsoids), (self._capsules, capsules)):
            out.update(zip(names, values.unbind(1)))
        out.update({f"{name} around": rims[:, i] for i, name in enumerate(self._rings)})
        out.update({f"{name} along": forms[:, start + i] for i, name in enumerate(self._rings)})
        out.update(zip(self._planes, forms[:, start + r :].unbind(1)))
        return out


def _names(parts: object) -> list[str]:
    """Return all keys of some dicts, each once, in a fixed order."""
    return sorted({name for part in parts for name in part})
