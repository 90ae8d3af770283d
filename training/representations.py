"""Plane representations of a radiance field: planes and points in, features out.

A representation turns the backbone's image into planes and looks points up in them. To add one, write a subclass of
`Representation` in any imported file and decorate it with `register_representation`: generator, renderer and decoder
need no change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from training.config import require
from training.layers import Conv2dLayer

PLANE_FEATURES = 32  # decoder and super-resolution of all published systems are built for 32 features

_REGISTRY: dict[str, type[Representation]] = {}
_FUSION_EPS = 1e-8


class Representation:
    """Planes and points to features.

    Attributes:
        backbone_channels: image channels that the backbone must emit.
        plane_channels: channels after `projections`, before `unpack`.
    """

    backbone_channels: int
    plane_channels: int

    def __init__(self, plane_depth: int) -> None:
        self.plane_depth = plane_depth

    def projections(self) -> dict[str, nn.Module]:
        """Build the bias-free 1 x 1 layers between backbone and planes, by name; their outputs are concatenated.

        The generator owns them, under these names. An empty dict feeds the backbone's image to `unpack`.
        """
        return {}

    def unpack(self, image: torch.Tensor) -> torch.Tensor:
        """View `[B, plane_channels, H, W]` as planes, batch first."""
        raise NotImplementedError

    def __call__(self, planes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Look up points.

        Args:
            planes: as `unpack` returned them, for B scenes.
            points: `[B, M, 3]`, in units of half the box: the cube is [-1, 1]^3.

        Returns:
            features `[B, M, PLANE_FEATURES]`.
        """
        raise NotImplementedError


def register_representation(name: str) -> Callable[[type[Representation]], type[Representation]]:
    """Make a `Representation` available as `GeneratorConfig.representation`."""

    def register(cls: type[Representation]) -> type[Representation]:
        require(name not in _REGISTRY, "register_representation", "a new name", name)
        _REGISTRY[name] = cls
        return cls

    return register


def make_representation(name: str, plane_depth: int) -> Representation:
    """Build a registered representation; `ValueError` for an unknown name."""
    require(name in _REGISTRY, "representation", f"one of {', '.join(sorted(_REGISTRY))}", name)
    return _REGISTRY[name](plane_depth)


def representation_name(representation: Representation) -> str | None:
    """Return the name that the class of a representation is registered under; None for one that is not."""
    return next((name for name, cls in _REGISTRY.items() if cls is type(representation)), None)


def sample_planes(planes: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """Look up coordinates bilinearly; outside is zero, and values fade to zero over the last half texel.

    Args:
        planes: `[N, C, H, W]`.
        coordinates: `[N, M, 2]` (along W, along H) in [-1, 1], where the ends are the outer edges of the border texels.

    Returns:
        `[N, C, M]`.
    """
    samples = F.grid_sample(planes, coordinates.unsqueeze(1), padding_mode="zeros", align_corners=False)  # [N, C, 1, M]
    return samples.squeeze(2)


class SphericalCoordinates(NamedTuple):
    """Coordinates on one sphere of the dual spherical tri-plane, each `[...]`."""

    theta: torch.Tensor
    """Angle from the polar axis, [-1, 1] for 0...pi."""
    phi: torch.Tensor
    """Angle around the polar axis, (-1, 1] for -pi...pi."""
    radius: torch.Tensor
    """-1 at the origin, +1 at the corners of the cube [-1, 1]^3."""
    weight: torch.Tensor
    """Confidence in this sphere, [0, 1]: 1 on the equator at phi = 0, 0 at poles, seam and origin."""


def spherical_coordinates(points: torch.Tensor) -> SphericalCoordinates:
    """Convert points `[..., 3]` with polar axis z to normalised spherical coordinates and the fusion weight.

    The weight `(1 + cos pi theta) / 2 * (1 + cos pi phi) / 2` (SphereHead, dual-sphere fusion) is evaluated in closed
    form as `rho (rho + x) / (2 |p|^2)` with `rho^2 = x^2 + y^2`.

    Differs from the published code: gradients at the poles and at the origin, where the angles are not
    differentiable, are zero instead of NaN.
    """
    x, y, z = points.unbind(dim=-1)
    rho_sq = x * x + y * y
    norm_sq = rho_sq + z * z
    # Nearer than this (6e-15 in float32) counts as zero, because the gradients, in 1 / distance^2, would overflow.
    negligible = torch.finfo(x.dtype).tiny ** 0.75
    on_axis, at_origin = rho_sq < negligible, norm_sq < negligible
    # Every value is replaced before the singular function sees it: a mask afterwards would turn 0 * inf into NaN.
    one = torch.ones_like(x)
    rho = torch.where(on_axis, one, rho_sq).sqrt().masked_fill(on_axis, 0)
    norm = torch.where(at_origin, one, norm_sq).sqrt().masked_fill(at_origin, 0)

    theta = 2 / math.pi * torch.atan2(rho, torch.where(at_origin, one, z)) - 1
    phi = torch.atan2(torch.where(on_axis, 0, y), torch.where(on_axis, one, x)) / math.pi
    radius = 2 / math.sqrt(3) * norm - 1

    # rho + x cancels near the seam (x < 0); there it equals y^2 / (rho - x).
    behind = (x < 0) & ~on_axis
    rho_minus_x = torch.where(behind, rho - x, one)
    rho_plus_x = torch.where(behind, y * y / rho_minus_x, rho + x)
    weight = rho * rho_plus_x / (2 * torch.where(at_origin, one, norm_sq))
    return SphericalCoordinates(theta, phi, radius, weight)


@register_representation("dual_spherical")
class DualSphericalTriPlane(Representation):
    """Dual spherical tri-plane (SphereHead, section 3): two spheres with crossed polar axes, fused by confidence.

    Planes are `[B, 2, 3, C, H, W]`: spheres A and B, each with planes (theta, phi), (theta, r) and (phi, r), the first
    coordinate along the width.

    Sphere A has its polar axis from ear to ear (-x), phi = 0 at the face (+z) and the seam behind; sphere B has its
    polar axis up (+y), phi = 0 behind (-z) and the seam in front. Each sphere's weight is zero at its own poles and
    seam, where the other sphere's is not.
    """

    backbone_channels = 512
    plane_channels = 2 * 3 * PLANE_FEATURES
    _hidden_channels = 256

    def __init__(self, plane_depth: int) -> None:
        super().__init__(plane_depth)
        require(plane_depth == 3, "plane_depth", "3, the planes of one sphere", plane_depth)

    def projections(self) -> dict[str, nn.Module]:
        """Build one pair of 1 x 1 layers per sphere."""
        return {name: self._projection() for name in ("ConvA", "ConvB")}

    def _projection(self) -> nn.Sequential:
        return nn.Sequential(
            Conv2dLayer(self.backbone_channels, self._hidden_channels, 1, bias=False),
            Conv2dLayer(self._hidden_channels, self.plane_channels // 2, 1, bias=False),
        )

    def unpack(self, image: torch.Tensor) -> torch.Tensor:
        """View `[B, 192, H, W]` as `[B, 2, 3, 32, H, W]`."""
        return image.unflatten(1, (2, 3, PLANE_FEATURES))

    def __call__(self, planes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Average the three planes of each sphere, then the spheres by weight. See `Representation.__call__`."""
        x, y, z = points.unbind(dim=-1)
        weighted = total_weight = 0
        for sphere, axes in enumerate(((z, y, -x), (-z, -x, y))):
            theta, phi, radius, weight = spherical_coordinates(torch.stack(axes, dim=-1))
            coordinates = _stack_coordinates((theta, phi), (theta, radius), (phi, radius))  # [B, P, M, 2]
            features = _mean_over_planes(planes[:, sphere], coordinates)  # [B, C, M]
            weighted = weighted + features * weight.unsqueeze(1)
            total_weight = total_weight + weight
        return (weighted / (total_weight.unsqueeze(1) + _FUSION_EPS)).transpose(1, 2)


@register_representation("tri_plane")
class TriPlane(Representation):
    """Tri-plane of EG3D: planes `[B, 3, C, H, W]` over (x, y), (x, z) and (z, x).

    The third plane is (z, x) in the published code and checkpoints, although the paper means (y, z).
    """

    backbone_channels = plane_channels = 3 * PLANE_FEATURES

    def __init__(self, plane_depth: int) -> None:
        super().__init__(plane_depth)
        require(plane_depth == 1, "plane_depth", "1 for the tri-plane", plane_depth)

    def unpack(self, image: torch.Tensor) -> torch.Tensor:
        """View `[B, 96, H, W]` as `[B, 3, 32, H, W]`."""
        return image.unflatten(1, (3, PLANE_FEATURES))

    def __call__(self, planes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Average the three planes. See `Representation.__call__`."""
        x, y, z = points.unbind(dim=-1)
        return _mean_over_planes(planes, _stack_coordinates((x, y), (x, z), (z, x))).transpose(1, 2)


@register_representation("tri_grid")
class TriGrid(Representation):
    """Tri-grid of PanoHead: three stacks of `plane_depth` planes, `[B, 3, C, D, H, W]`, looked up trilinearly.

    Grid axes (width, height, depth) are (x, y, z), (x, z, y) and (y, z, x). With a depth of 1 this is not a
    tri-plane: the half-texel fade acts along the depth axis too.
    """

    def __init__(self, plane_depth: int) -> None:
        super().__init__(plane_depth)
        require(plane_depth >= 1, "plane_depth", "at least 1", plane_depth)
        self.backbone_channels = self.plane_channels = 3 * PLANE_FEATURES * plane_depth

    def unpack(self, image: torch.Tensor) -> torch.Tensor:
        """View `[B, 96 D, H, W]` as `[B, 3, 32, D, H, W]`."""
        return image.unflatten(1, (3, PLANE_FEATURES, self.plane_depth))

    def __call__(self, planes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Average the three grids. See `Representation.__call__`."""
        x, y, z = points.unbind(dim=-1)
        coordinates = _stack_coordinates((x, y, z), (x, z, y), (y, z, x))  # [B, P, M, 3]
        grid = coordinates.flatten(0, 1)[:, None, None]  # [B P, 1, 1, M, 3]
        samples = F.grid_sample(planes.flatten(0, 1), grid, padding_mode="zeros", align_corners=False)
        samples = samples[:, :, 0, 0].unflatten(0, planes.shape[:2])  # [B, P, C, M]
        return samples.mean(dim=1).transpose(1, 2)


def _stack_coordinates(*planes: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Stack coordinates `[B, M]` per plane into `[B, P, M, 2 or 3]`."""
    return torch.stack([torch.stack(axes, dim=-1) for axes in planes], dim=1)


def _mean_over_planes(planes: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """Look up `[B, P, C, H, W]` at `[B, P, M, 2]` and average over the planes: `[B, C, M]`."""
    samples = sample_planes(planes.flatten(0, 1), coordinates.flatten(0, 1))
    return samples.unflatten(0, planes.shape[:2]).mean(dim=1)
