"""Turn what networks make into pictures: conversion to bytes, colours of parsing classes, grids, PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dnnlib.atomic import atomic_write

# Twenty colours that tell classes apart, the first (background) black.
_PARSING_COLORS = (
    "000000 d9a066 8f563b 663931 5b6ee1 306082 63c7b2 e0705c b5493a ffd700 f4b183 c0392b ff7f9f d95763 c2a27c 8a6f4e"
    " 3f7f4f 4b2e1e 9b59b6 bdc3c7"
)
PARSING_PALETTE = np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in _PARSING_COLORS.split()], np.uint8)


def colors_to_uint8(image: torch.Tensor) -> np.ndarray:
    """Turn colours `[B, C, H, W]` in [-1, 1], C 3 or 1 (grey), to uint8 `[B, H, W, 3]`; truncated as published."""
    pixels = (image.detach().float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def mask_to_uint8(mask: torch.Tensor) -> np.ndarray:
    """Turn opacities `[B, 1, H, W]` in [0, 1] to uint8 `[B, H, W, 3]`: opaque is white."""
    return colors_to_uint8(mask.detach().float() * 2 - 1)


def depth_to_uint8(depth: torch.Tensor, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Turn depths `[B, 1, H, W]` to uint8 `[B, H, W, 3]`: near is bright.

    Args:
        depth: distances.
        limits: nearest and farthest distance, white and black; None takes those of each image.
    """
    nearness = -depth.detach().float()
    if limits is None:
        low, high = nearness.amin(dim=(1, 2, 3), keepdim=True), nearness.amax(dim=(1, 2, 3), keepdim=True)
    else:
        high, low = (nearness.new_tensor(-limit) for limit in limits)
    return colors_to_uint8((nearness - low) / (high - low).clamp(min=1e-8) * 2 - 1)


def classes_to_uint8(classes: np.ndarray) -> np.ndarray:
    """Turn class indices, integers of any shape `[...]`, to colours uint8 `[..., 3]`; after 20 classes they repeat."""
    return PARSING_PALETTE[classes % len(PARSING_PALETTE)]


def parsing_to_uint8(scores: torch.Tensor) -> np.ndarray:
    """Turn scores `[B, classes, H, W]` to uint8 `[B, H, W, 3]`: the colour of the class with the highest."""
    return classes_to_uint8(scores.detach().argmax(dim=1).cpu().numpy())


def tile(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Put images uint8 `[H, W, 3]` of one size into a grid, row by row; empty places are black.

    Returns:
        uint8 `[rows * H, columns * W, 3]`.

    Raises:
        ValueError: there are no images, or they differ in size.
    """
    shapes = {image.shape for image in images}
    if len(shapes) != 1 or columns < 1:
        raise ValueError(f"grid: expected images of one size and at least 1 column, got {shapes} and {columns}")
    (shape,) = shapes
    rows = -(-len(images) // columns)
    missing = [np.zeros(shape, np.uint8)] * (rows * columns - len(images))
    cells = np.stack([*images, *missing]).reshape(rows, columns, *shape)  # [rows, columns, H, W, 3]
    return cells.swapaxes(1, 2).reshape(rows * shape[0], columns * shape[1], 3)


def save_png(path: Path, image: np.ndarray) -> None:
    """Write an image uint8 `[H, W, 3]`, completely or not at all."""
    with atomic_write(path) as file:
        Image.fromarray(image).save(file, format="png")
