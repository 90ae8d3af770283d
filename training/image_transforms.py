"""Crop and resize images of heads, masks and parsing maps, and let the cameras of their labels follow."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageOps

from training.image_reading import open_image, pixels
from training.image_sources import BadImage

Crop = Literal["center-crop", "center-crop-wide"]
Filter = Literal["lanczos", "box", "bilinear", "bicubic"]
Extension = Literal["png", "jpg"]
CROPS: tuple[str, ...] = get_args(Crop)
FILTERS: tuple[str, ...] = get_args(Filter)
EXTENSIONS: tuple[str, ...] = get_args(Extension)

_WHITE = (255, 255, 255, 255)
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")


class Geometry(NamedTuple):
    """Where pixels go: a box of the source is resized and put in the middle of a black canvas, whose side is even."""

    source: tuple[int, int]
    """Width and height, as everywhere here."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in the source."""
    size: tuple[int, int]
    """Of the box after resizing."""
    canvas: tuple[int, int]

    @property
    def moves_rays(self) -> bool:
        """Whether a pixel at the same share of the image shows another ray of the camera."""
        return self.box != (0, 0, *self.source) or self.canvas != self.size


@dataclass(frozen=True, kw_only=True)
class Transform:
    """How images are cropped and resized.

    `center-crop` takes the largest square in the middle. `center-crop-wide` takes the largest part in the middle that
    has the shape of `resolution`, which is wider than high, and adds black above and below to make it square. Without
    a crop, the image has to have the shape of `resolution`.

    Differs from the published code, which distorts an image of another shape where there is no crop, leaves out small
    images for `center-crop-wide`, and keeps the intrinsics in all cases.
    """

    crop: Crop | None = None
    resolution: tuple[int, int] | None = None
    """Width and height; None keeps the size."""
    filter: Filter = "lanczos"

    def __post_init__(self) -> None:
        if self.crop == "center-crop-wide" and self.resolution is None:
            raise ValueError("resolution: expected a width and a height for center-crop-wide, came none")
        if self.resolution is None:
            return
        width, height = self.resolution
        if self.crop == "center-crop-wide":
            if not (height <= width and (width - height) % 2 == 0):
                raise ValueError(f"resolution: expected 2N wider than high for center-crop-wide, came {width}x{height}")
        elif width != height:
            raise ValueError(f"resolution: expected a square, came {width}x{height}; center-crop-wide takes others")
        _require_side(width, "resolution")

    def geometry(self, source: tuple[int, int]) -> Geometry:
        """Return where the pixels of an image of a size (width, height) go.

        Raises:
            BadImage: the result would not be a square with a power of two as its side, which networks need.
        """
        width, height = source
        target = self.resolution
        if self.crop is None:
            size = target or source
            if width * size[1] != height * size[0]:
                raise BadImage(
                    f"expected the shape of {size[0]} x {size[1]}, came {width} x {height}; a crop changes it"
                )
            return self._checked(Geometry(source, (0, 0, width, height), size, size))
        size = target if target is not None else (min(source), min(source))
        part_width = min(width, int(np.rint(height * size[0] / size[1])))
        part_height = min(height, int(np.rint(width * size[1] / size[0])))
        left, top = (width - part_width) // 2, (height - part_height) // 2
        box = (left, top, left + part_width, top + part_height)
        return self._checked(Geometry(source, box, size, (size[0], size[0])))

    @staticmethod
    def _checked(geometry: Geometry) -> Geometry:
        width, height = geometry.canvas
        if width != height:
            raise BadImage(f"expected a square image, came {width} x {height}; a crop makes one")
        _require_side(width, "image")
        return geometry

    def apply(self, image: Image.Image, geometry: Geometry, exact: bool = False) -> Image.Image:
        """Crop and resize an image; `exact` takes the nearest pixel instead of mixing, for class indices."""
        sampling = Image.Resampling.NEAREST if exact else Image.Resampling[self.filter.upper()]
        left, top, right, bottom = geometry.box
        if geometry.size != (right - left, bottom - top):
            image = image.resize(geometry.size, sampling, box=geometry.box)
        elif geometry.box != (0, 0, *image.size):
            image = image.crop(geometry.box)
        if geometry.canvas == geometry.size:
            return image
        canvas = Image.new(image.mode, geometry.canvas)
        canvas.paste(image, ((geometry.canvas[0] - image.width) // 2, (geometry.canvas[1] - image.height) // 2))
        return canvas


def _require_side(side: int, name: str) -> None:
    if side < 4 or side & (side - 1):
        raise BadImage(
            f"{name}: expected a side that is a power of two, at least 4, came {side}; a resolution gives one"
        )


def transform_label(label: list[float], geometry: Geometry) -> list[float]:
    """Return the label [25] of a cropped image: intrinsics are in shares of the image, which is another one now.

    A pixel at share x of the source is at `(x W - left) size / part + margin` in the canvas, and so is the principal
    point; focal length and skew are scaled only. Square images that are not cropped keep their label.
    """
    moved = list(label)
    for axis, (scaled, centre) in enumerate((((16, 17), 18), ((20,), 21))):
        low, high = geometry.box[axis], geometry.box[axis + 2]
        size, canvas = geometry.size[axis], geometry.canvas[axis]
        if (high - low, size) == (geometry.source[axis], canvas):
            continue
        scale = size / (high - low)  # pixels of the canvas per pixel of the source
        for entry in scaled:
            moved[entry] = label[entry] * geometry.source[axis] * scale / canvas
        margin = (canvas - size) // 2
        moved[centre] = ((label[centre] * geometry.source[axis] - low) * scale + margin) / canvas
    return moved


def load_upright(data: bytes) -> Image.Image:
    """Open an encoded image and turn it as its EXIF orientation says; BadImage where it is damaged."""
    image = open_image(data)
    if max(image.size) > 1 << 15:
        raise BadImage(f"expected at most 32768 pixels a side, came {image.width} x {image.height}")
    pixels(image)  # decodes, with errors that are named
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # of many types, for what may be in damaged EXIF data
        raise BadImage(f"cannot be turned upright by its EXIF data: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8 bits of RGB: grey is repeated, 16 bits are scaled, what is transparent becomes white.

    Differs from the published code, which drops transparency and shows what is hidden below.
    """
    image = _to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def to_mask(image: Image.Image) -> Image.Image:
    """Convert a mask to 8 bits of grey; colours become their luma, and transparency is dropped."""
    return _to_8_bits(image).convert("RGB").convert("L")


def to_parsing(image: Image.Image) -> Image.Image:
    """Return class indices as an image of 8 bits; of a picture with a palette, the indices count."""
    if image.mode not in ("L", "P"):
        raise BadImage(f"expected class indices of 8 bits, came mode {image.mode}")
    return Image.fromarray(pixels(image))


def _to_8_bits(image: Image.Image) -> Image.Image:
    if image.mode in _GREY_16 or image.mode == "I":
        values = pixels(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise BadImage(f"expected grey of 8 or 16 bits, came values up to {values.max()}")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("expected integers, came an image of floating-point numbers")
    return image


def encode(image: Image.Image, extension: Extension = "png", png_compression: int = 0) -> bytes:
    """Return an image as a PNG (without compression unless asked for: quick to read) or as a JPEG of quality 100."""
    file = io.BytesIO()
    if extension == "png":
        image.save(file, "PNG", compress_level=png_compression)
    else:
        image.save(file, "JPEG", quality=100, subsampling=0)
    return file.getvalue()
