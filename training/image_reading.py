"""Decode images, masks and parsing maps, and check that they are what a data set needs."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from training.image_sources import BadImage, FolderSource, ZipSource, printable

# Pixels alone: EPS, WMF and the like are programs, and Pillow starts other programs for some of them.
Image.init()  # loads the readers of all formats
IMAGE_FORMATS = tuple(
    name
    for name in "PNG JPEG MPO WEBP BMP DIB TIFF GIF PPM TGA JPEG2000 AVIF".split()
    if name in Image.OPEN  # what this Pillow was built with
)
_KNOWN_FORMATS = ", ".join(IMAGE_FORMATS)
PARSING_CLASSES = (
    *("background", "skin", "left brow", "right brow", "left eye", "right eye", "glasses", "left ear", "right ear"),
    *("earring", "nose", "mouth", "upper lip", "lower lip", "neck", "necklace", "cloth", "hair", "hat"),
)
"""What the class indices of parsing maps mean."""
_MIRRORED_CLASSES = ((2, 3), (4, 5), (7, 8))  # left and right brow, eye, ear

_HEADER_BYTES = 4096  # enough for size and mode, if no colour profile or thumbnail comes first
_ENDINGS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
_RETRY_SECONDS = (0.1, 1.0)  # after errors of the file system, which may be passing ones


class ItemNames(NamedTuple):
    """The files of one image, each relative to its root."""

    root: int
    """Number of the root."""
    image: str
    mask: str | None = None
    parsing: str | None = None


class Roots(NamedTuple):
    """Where the files of one root of a data set lie."""

    images: FolderSource | ZipSource
    masks: FolderSource | ZipSource | None = None
    parsing: FolderSource | ZipSource | None = None


def open_image(data: bytes) -> Image.Image:
    """Open an encoded image of a format of `IMAGE_FORMATS` without decoding it; BadImage where it is none."""
    try:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not an image that can be read: expected {_KNOWN_FORMATS}; came something else") from None
    except Exception as error:  # of many types, for what may be in a damaged file
        raise BadImage(f"not an image that can be read: {_reason(error)}") from None


def pixels(image: Image.Image, mode: str | None = None) -> np.ndarray:
    """Decode an image to an array [H, W] or [H, W, C]; BadImage where it is damaged.

    `mode` is Pillow's name of the type to convert to; None keeps the type.
    """
    try:
        return np.asarray(image if mode in (None, image.mode) else image.convert(mode))
    except MemoryError:
        raise
    except Exception as error:
        raise BadImage(f"cannot be decoded: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return f"{error}" if isinstance(error, OSError | SyntaxError) else f"{type(error).__name__}: {error}"


def _check(image: Image.Image, resolution: int, modes: tuple[str, ...], hint: str) -> None:
    """Raise BadImage unless an image that was opened, but not decoded, has the size and one of the modes."""
    if image.size != (resolution, resolution):
        width, height = image.size
        raise BadImage(f"expected {resolution} x {resolution} pixels, came {width} x {height}")
    if image.mode not in modes or (image.mode == "P" and "transparency" in image.info and modes == _IMAGE_MODES):
        raise BadImage(f"expected {hint}, came mode {image.mode}")


_IMAGE_MODES = ("RGB", "L", "P", "1")
_MASK_MODES = ("L", "RGB", "P", "1")
_PARSING_MODES = ("L", "P")


def _check_image(image: Image.Image, resolution: int) -> None:
    _check(image, resolution, _IMAGE_MODES, "8 bits of RGB or grey without transparency")


def _check_mask(image: Image.Image, resolution: int) -> None:
    _check(image, resolution, _MASK_MODES, "a mask of 8 bits without transparency")


def _check_parsing(image: Image.Image, resolution: int) -> None:
    _check(image, resolution, _PARSING_MODES, "class indices of 8 bits")


def decode_image(data: bytes, resolution: int) -> np.ndarray:
    """Decode a picture to uint8 [3, H, W]; grey becomes three equal channels.

    Raises:
        BadImage: it is damaged, of another size, or of a type whose conversion is a matter of choice (transparency,
            16 bits, CMYK).

    Differs from the published code, where a data set is grey or coloured as its first image is.
    """
    with open_image(data) as image:
        _check_image(image, resolution)
        array = pixels(image, None if image.mode == "L" else "RGB")
    array = array[..., None] if array.ndim == 2 else array
    return np.broadcast_to(array.transpose(2, 0, 1), (3, resolution, resolution))


def decode_mask(data: bytes, resolution: int) -> np.ndarray:
    """Decode a mask to uint8 [1, H, W], 255 in the foreground; colours become their luma. Raises as `decode_image`."""
    with open_image(data) as image:
        _check_mask(image, resolution)
        return pixels(image, "L")[None]


def decode_parsing(data: bytes, resolution: int, num_classes: int) -> np.ndarray:
    """Decode class indices to uint8 [1, H, W]; of a picture with a palette, the indices count.

    Raises:
        BadImage: it is damaged, of another size, has colours, or an index that is not below `num_classes`.
    """
    with open_image(data) as image:
        _check_parsing(image, resolution)
        indices = pixels(image)
    if indices.max() >= num_classes:
        raise BadImage(f"expected class indices below {num_classes}, came {indices.max()}")
    return indices[None]


def mirrored_classes(num_classes: int) -> np.ndarray:
    """Return which class each class becomes in a mirror, uint8 [256]: left brow, eye and ear change with the right."""
    table = np.arange(256, dtype=np.uint8)
    for left, right in _MIRRORED_CLASSES:
        if right < num_classes:
            table[[left, right]] = right, left
    return table


class HeadReader:
    """Read the images of a data set, with masks and parsing maps if it has them; can be sent to other processes.

    Args:
        roots: where the files are.
        items: the files of each image; whether there are masks and parsing maps is the same for all.
        resolution: side of the images, in pixels.
        parsing_classes: class indices are below it.
    """

    def __init__(self, roots: list[Roots], items: list[ItemNames], resolution: int, parsing_classes: int = 0) -> None:
        self.roots = roots
        self.items = items
        self.resolution = resolution
        self.parsing_classes = parsing_classes
        self.has_masks = any(root.masks is not None for root in roots)
        self.has_parsing = any(root.parsing is not None for root in roots)
        self._mirrored_classes = mirrored_classes(parsing_classes)

    @property
    def num_channels(self) -> int:
        """Channels of what `read` returns."""
        return 3 + self.has_masks + self.has_parsing

    def describe(self, item: int, kind: str = "image") -> str:
        """Return root and name of a file, for messages; `kind` is "image", "mask" or "parsing"."""
        source, name = self._file(item, kind)
        return printable(f"{source.path}/{name}")

    def _file(self, item: int, kind: str) -> tuple[FolderSource | ZipSource, str]:
        names = self.items[item]
        roots = self.roots[names.root]
        return {
            "image": (roots.images, names.image),
            "mask": (roots.masks, names.mask),
            "parsing": (roots.parsing, names.parsing),
        }[kind]

    def read(self, item: int, mirror: bool = False) -> np.ndarray:
        """Read everything of an image.

        Args:
            item: which of `items`.
            mirror: flip left and right; classes of the left side of the body become those of the right side too.

        Returns:
            uint8 [C, H, W]: red, green, blue, then mask and class index where there are.

        Raises:
            BadImage: something cannot be used; the message names the file, what was expected and what came.
        """
        out = np.empty((self.num_channels, self.resolution, self.resolution), np.uint8)
        for kind, channels in self._channels().items():
            out[channels] = self._decoded(item, kind)
        if mirror and self.has_parsing:
            out[-1] = self._mirrored_classes[out[-1]]
        return np.ascontiguousarray(out[:, :, ::-1]) if mirror else out

    def _channels(self) -> dict[str, slice]:
        """Return which channels hold what, by kind of file."""
        channels = {"image": slice(0, 3)}
        if self.has_masks:
            channels["mask"] = slice(3, 4)
        if self.has_parsing:
            channels["parsing"] = slice(self.num_channels - 1, self.num_channels)
        return channels

    def __call__(self, task: list[tuple[int, bool]]) -> np.ndarray:
        """Read several images, `task` being arguments of `read`; returns uint8 [b, C, H, W]."""
        return np.stack([self.read(item, mirror) for item, mirror in task])

    def _decoded(self, item: int, kind: str) -> np.ndarray:
        source, name = self._file(item, kind)
        try:
            data = _patiently(source.read, name)
            if kind == "parsing":
                return decode_parsing(data, self.resolution, self.parsing_classes)
            return (decode_image if kind == "image" else decode_mask)(data, self.resolution)
        except BadImage as error:
            raise BadImage(f"{self.describe(item, kind)}: {error}") from None

    def defects(self, item: int) -> list[str]:
        """Return all defects of an image and of what belongs to it, as messages; everything is decoded."""
        found = []
        for kind in self._channels():
            try:
                self._decoded(item, kind)
            except BadImage as error:
                found.append(str(error))
        return found

    def probe(self, item: int) -> list[str]:
        """Return the defects of an image that show without decoding it: type, size, and whether the end is there.

        A file that looks unusual is decoded.
        """
        checks = {"image": _check_image, "mask": _check_mask, "parsing": _check_parsing}
        found = []
        for kind in self._channels():
            try:
                if not self._looks_whole(*self._file(item, kind), checks[kind]):
                    self._decoded(item, kind)
            except BadImage as error:
                where = self.describe(item, kind)
                found.append(str(error) if str(error).startswith(where) else f"{where}: {error}")
        return found

    def _looks_whole(
        self, source: FolderSource | ZipSource, name: str, check: Callable[[Image.Image, int], None]
    ) -> bool:
        """Check the header; return whether header and end look as usual, so that decoding can wait."""
        first, last = _patiently(source.head, name, _HEADER_BYTES)
        try:
            with open_image(first) as image:
                file_format = image.format
                check(image, self.resolution)
        except BadImage:
            with open_image(_patiently(source.read, name)) as image:  # perhaps its header is only longer
                file_format = image.format
                check(image, self.resolution)
        ending = _ENDINGS.get(file_format)
        return ending is not None and last.endswith(ending)


def _patiently(read: Callable[..., bytes | tuple[bytes, bytes]], name: str, *arguments: int) -> bytes:
    """Read from storage that may fail for a moment.

    Raises:
        BadImage: the file is gone, or storage keeps failing.
    """
    for pause in (*_RETRY_SECONDS, None):
        try:
            return read(name, *arguments)
        except KeyError:
            raise BadImage("the file is gone") from None
        except OSError as error:
            if pause is None:
                raise BadImage(f"cannot be read: {error.strerror or error}") from None
            time.sleep(pause)
    raise AssertionError("unreachable")


class Probe:
    """Check ranges of images in another process: called with (start, stop, whether to decode).

    Returns a list of (item, defect).
    """

    def __init__(self, reader: HeadReader) -> None:
        self._reader = reader

    def __call__(self, task: tuple[int, int, bool]) -> list[tuple[int, str]]:
        """Return the defects in a range, see the class."""
        start, stop, decode = task
        look = self._reader.defects if decode else self._reader.probe
        return [(item, text) for item in range(start, stop) for text in look(item)]
