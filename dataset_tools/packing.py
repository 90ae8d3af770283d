"""Convert one image with what belongs to it; runs in worker processes, and imports little."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from training.image_reading import ItemNames, Roots
from training.image_sources import BadImage, printable
from training.image_transforms import Extension, Transform, encode, load_upright, to_mask, to_parsing, to_rgb


class PackedItem(NamedTuple):
    """What was made of an image."""

    files: dict[str, bytes]
    """Encoded image, and mask and parsing map where there are, by kind of root."""
    size: tuple[int, int]
    """Width and height of the source."""


class PackItem:
    """Convert images: called with the names of their files; returns a PackedItem, or what is wrong as a message.

    Args:
        roots: where the files are.
        transform: crop and size.
        extension: format of the image; the others are PNG.
        png_compression: 0, without, to 9.
    """

    def __init__(self, roots: Roots, transform: Transform, extension: Extension, png_compression: int) -> None:
        self._roots = roots
        self._transform = transform
        self._extension = extension
        self._png_compression = png_compression

    def __call__(self, names: ItemNames) -> PackedItem | str:
        """Convert an image, see the class."""
        files: dict[str, bytes] = {}
        size: tuple[int, int] | None = None
        for kind, name in (("images", names.image), ("masks", names.mask), ("parsing", names.parsing)):
            source = getattr(self._roots, kind)
            if source is None:
                continue
            try:
                image = load_upright(source.read(name))
                size = size or image.size
                files[kind] = self._convert(kind, image, size)
            except (BadImage, OSError) as error:
                return f"{printable(source.path)}/{printable(name)}: {error}"
            except KeyError:
                return f"{printable(source.path)}/{printable(name)}: the file is gone"
        return PackedItem(files, size)

    def _convert(self, kind: str, image: Image.Image, size: tuple[int, int]) -> bytes:
        geometry = self._transform.geometry(image.size)
        if image.width * size[1] != image.height * size[0]:
            raise BadImage(
                f"expected the shape of the image, {size[0]} x {size[1]}, came {image.width} x {image.height}"
            )
        convert = {"images": to_rgb, "masks": to_mask, "parsing": to_parsing}[kind]
        image = self._transform.apply(convert(image), geometry, exact=kind == "parsing")
        return encode(image, self._extension if kind == "images" else "png", self._png_compression)
