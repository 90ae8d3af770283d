"""Matrices of augmentations: of coordinates in a plane, and of colours.

Every entry of a matrix is a number or a tensor `[B]`. Angles are in radians. Nothing here copies from the host to a
device, so nothing waits for one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Entry = float | torch.Tensor


def matrix(rows: Sequence[Sequence[Entry]], like: torch.Tensor) -> torch.Tensor:
    """Stack rows of numbers and tensors `[B]` to matrices `[B, N, N]`, of the type and on the device of `like` [B]."""

    def column(entry: Entry) -> torch.Tensor:
        return entry if isinstance(entry, torch.Tensor) else torch.full_like(like, entry)

    return torch.stack([torch.stack([column(entry) for entry in row], dim=-1) for row in rows], dim=-2)


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Multiply matrices `[B, N, N]` in full precision.

    Without matrix multiplication, which may run in TF32: its 11 bits would move the pixels of a large image.
    """
    return (first.unsqueeze(-1) * second.unsqueeze(-3)).sum(dim=-2)


def translation_2d(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return `[B, 3, 3]` that moves points by (x, y), each [B]."""
    return matrix([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]], like=x)


def scaling_2d(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return `[B, 3, 3]` that multiplies coordinates by x and y, each [B]."""
    return matrix([[x, 0.0, 0.0], [0.0, y, 0.0], [0.0, 0.0, 1.0]], like=x)


def rotation_2d(angle_rad: torch.Tensor) -> torch.Tensor:
    """Return `[B, 3, 3]` that turns the x axis towards the y axis by `angle_rad` [B]; in images, y down, clockwise."""
    cos, sin = angle_rad.cos(), angle_rad.sin()
    return matrix([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], like=angle_rad)


def brightness(offset: torch.Tensor) -> torch.Tensor:
    """Return `[B, 4, 4]` that adds `offset` [B] to all three channels."""
    rows = [[1.0, 0.0, 0.0, offset], [0.0, 1.0, 0.0, offset], [0.0, 0.0, 1.0, offset], [0.0, 0.0, 0.0, 1.0]]
    return matrix(rows, like=offset)


def contrast(factor: torch.Tensor) -> torch.Tensor:
    """Return `[B, 4, 4]` that multiplies all three channels by `factor` [B]."""
    return _circulant(factor, torch.zeros_like(factor), torch.zeros_like(factor))


def luma_flip(flip: torch.Tensor) -> torch.Tensor:
    """Return `[B, 4, 4]`: I - 2 flip v v^T, with the luma axis v = (1, 1, 1) / sqrt(3).

    Args:
        flip: [B], 1 to turn light into dark with hue and saturation kept, 0 for the identity.
    """
    return _circulant(1 - 2 / 3 * flip, -2 / 3 * flip, -2 / 3 * flip)


def hue_rotation(angle_rad: torch.Tensor) -> torch.Tensor:
    """Return `[B, 4, 4]`: the rotation by `angle_rad` [B] about the luma axis (Rodrigues' formula)."""
    cos, sin = angle_rad.cos(), angle_rad.sin()
    shared, turn = (1 - cos) / 3, sin / math.sqrt(3)
    return _circulant(cos + shared, shared - turn, shared + turn)


def saturation(factor: torch.Tensor) -> torch.Tensor:
    """Return `[B, 4, 4]`: v v^T + factor (I - v v^T), which scales the distance from the luma axis by `factor` [B]."""
    off_diagonal = (1 - factor) / 3
    return _circulant(factor + off_diagonal, off_diagonal, off_diagonal)


def _circulant(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    # Linear maps that treat red, green and blue alike are circulant.
    return matrix([[a, b, c, 0.0], [c, a, b, 0.0], [b, c, a, 0.0], [0.0, 0.0, 0.0, 1.0]], like=a)


def transform_colour(x: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Apply colour matrices to every three channels.

    Args:
        x: images `[B, C, H, W]`, with C a multiple of 3.
        colour: `[B, 4, 4]`, acting on (red, green, blue, 1).

    Raises:
        ValueError: for another number of channels.
    """
    batch, channels, height, width = x.shape
    if channels % 3 != 0:
        raise ValueError(f"colour transform: expected a multiple of 3 channels, got images {list(x.shape)}")
    colour = colour.to(x.dtype)
    pixels = x.reshape(batch, channels // 3, 3, height * width)
    pixels = colour[:, None, :3, :3] @ pixels + colour[:, None, :3, 3:]
    return pixels.reshape(x.shape)
