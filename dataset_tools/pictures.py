"""Draw the poses of a data set, and sheets of its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from torch_utils.pictures import classes_to_uint8

_BIN_DEG = 5
_CELL = 10  # pixels of a bin
_LEFT, _TOP, _RIGHT, _BOTTOM = 60, 150, 150, 50  # margins of the histogram; bars at the top and the right
_BAR = 90
_INK, _GRID, _PAPER = (40, 40, 40), (225, 225, 225), (255, 255, 255)
_RAMP = np.array([(237, 244, 252), (158, 202, 225), (66, 146, 198), (8, 81, 156), (8, 29, 88)], dtype=float)


def _font(size: int) -> ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # before Pillow 10.1, in one size
        return ImageFont.load_default()


def pose_histogram(yaw_deg: np.ndarray, pitch_deg: np.ndarray) -> Image.Image:
    """Draw how many images were taken from where.

    A cell of 5 x 5 degrees is the darker, on a logarithmic scale, the more images it has. Bars show the sums over pitch
    at the top, and over yaw at the right.

    Args:
        yaw_deg: [N] in [-180, 180].
        pitch_deg: [N] in [-90, 90].
    """
    edges = [np.arange(-limit, limit + 1, _BIN_DEG) for limit in (180, 90)]
    counts, _, _ = np.histogram2d(yaw_deg, pitch_deg, bins=edges)
    columns, rows = counts.shape
    width, height = columns * _CELL, rows * _CELL
    sheet = Image.new("RGB", (_LEFT + width + _RIGHT, _TOP + height + _BOTTOM), _PAPER)
    sheet.paste(_heat_map(counts), (_LEFT, _TOP))
    draw = ImageDraw.Draw(sheet)
    _axes(draw, width, height)
    _bars(draw, counts.sum(axis=1), (_LEFT, _TOP - 8), upwards=True)
    _bars(draw, counts.sum(axis=0)[::-1], (_LEFT + width + 8, _TOP), upwards=False)
    title = f"{len(yaw_deg)} images, at most {int(counts.max(initial=0))} in a cell of {_BIN_DEG} x {_BIN_DEG} degrees"
    draw.text((_LEFT, 12), title, _INK, _font(16))
    return sheet


def _heat_map(counts: np.ndarray) -> Image.Image:
    """Return counts [columns, rows], the first row at the bottom, as a picture."""
    levels = np.log1p(counts) / max(np.log1p(counts.max(initial=0)), 1e-9) * (len(_RAMP) - 1)
    colours = np.stack([np.interp(levels, np.arange(len(_RAMP)), _RAMP[:, i]) for i in range(3)], axis=-1)
    colours[counts == 0] = _PAPER
    pixels = colours.transpose(1, 0, 2)[::-1].astype(np.uint8)  # [rows, columns, 3]
    return Image.fromarray(pixels.repeat(_CELL, axis=0).repeat(_CELL, axis=1))


def _axes(draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    for yaw in range(-180, 181, 45):
        x = _LEFT + (yaw + 180) * _CELL // _BIN_DEG
        draw.line([(x, _TOP), (x, _TOP + height)], _GRID)
        draw.text((x, _TOP + height + 8), f"{yaw}", _INK, _font(14), anchor="ma")
    for pitch in range(-90, 91, 30):
        y = _TOP + (90 - pitch) * _CELL // _BIN_DEG
        draw.line([(_LEFT, y), (_LEFT + width, y)], _GRID)
        draw.text((_LEFT - 8, y), f"{pitch}", _INK, _font(14), anchor="rm")
    draw.rectangle([_LEFT, _TOP, _LEFT + width, _TOP + height], outline=_INK)
    text = "yaw, degrees (0 in front of the face, 180 behind the head)"
    draw.text((_LEFT + width // 2, _TOP + height + 28), text, _INK, _font(14), anchor="ma")
    draw.text((4, _TOP - 24), "pitch", _INK, _font(14))


def _bars(draw: ImageDraw.ImageDraw, sums: np.ndarray, origin: tuple[int, int], upwards: bool) -> None:
    x, y = origin
    for position, share in enumerate(sums / max(sums.max(initial=0), 1)):
        low, high = position * _CELL + 1, (position + 1) * _CELL - 2
        length = round(share * _BAR)
        box = [x + low, y - length, x + high, y] if upwards else [x, y + low, x + length, y + high]
        if length:
            draw.rectangle(box, fill=tuple(int(value) for value in _RAMP[2]))


class Tile(NamedTuple):
    """An image of a sheet, with what is shown below it."""

    layers: np.ndarray
    """uint8 [C, H, W] as `training.image_reading.HeadReader.read` returns."""
    caption: str


def contact_sheet(tiles: Sequence[Tile], has_mask: bool, has_parsing: bool, side: int = 128) -> Image.Image:
    """Lay out images in rows of eight, each with its caption, its mask and its parsing map in colours below.

    Args:
        tiles: at least one.
        has_mask: whether channel 3 of the layers is a mask.
        has_parsing: whether their last channel holds class indices.
        side: of a picture on the sheet, in pixels.
    """
    columns = min(8, len(tiles))
    pictures = 1 + has_mask + has_parsing
    block = pictures * side + 24
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (side + 4) + 4, rows * block), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for position, tile in enumerate(tiles):
        x, y = 4 + position % columns * (side + 4), position // columns * block
        draw.text((x + side // 2, y + 4), tile.caption, _INK, _font(13), anchor="ma")
        for row, picture in enumerate(_pictures(tile.layers, has_mask, has_parsing)):
            exact = has_parsing and row == pictures - 1
            sampling = Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS
            sheet.paste(Image.fromarray(picture).resize((side, side), sampling), (x, y + 20 + row * side))
    return sheet


def _pictures(layers: np.ndarray, has_mask: bool, has_parsing: bool) -> list[np.ndarray]:
    """Return pictures [H, W, 3]: image, mask, parsing map."""
    pictures = [layers[:3].transpose(1, 2, 0)]
    if has_mask:
        pictures.append(layers[3][..., None].repeat(3, axis=-1))
    if has_parsing:
        pictures.append(classes_to_uint8(layers[-1]))
    return [np.ascontiguousarray(picture) for picture in pictures]
