"""Photos of heads for inversion: find them with cameras and masks, and read them as a generator's pictures."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from camera_utils import TRAINING_RADIUS
from inference.photo_cameras import CameraOf, labels_of, read_camera, read_file, read_labels, shown, what_is
from inference.photo_cameras import parse_camera as parse_camera
from training.image_sources import LABELS_NAME, BadImage, FolderSource, is_image_name, printable, without_extension
from training.image_transforms import Geometry, Transform, load_upright, to_mask, to_rgb, transform_label

_MAX_NAME_BYTES = 120  # of a photo's name: file systems take 255, and scripts add to it
_UNSAFE = frozenset('/\\:*?"<>|%')  # in names of folders, on one system or another
_SQUARE_TOLERANCE = 0.01  # of the ratio of both focal lengths, above which a note says so
_MIN_BRIGHTEST = 128  # of a mask of 8 bits; one that stays below says 1 where it should say 255, or shows no head


@dataclass(frozen=True, kw_only=True, eq=False)
class PhotoFile:
    """A photo that was found, with its camera and its mask; its pixels are not read yet."""

    name: str
    """Its path from the target, without extension, made fit for the name of a folder; unique within a list."""
    image: Path
    label: torch.Tensor | None
    """float64 [25]: the camera; None only where there is a `defect`."""
    mask: Path | None = None
    camera_of: CameraOf = "stored image"
    """Whether the camera took the stored picture (upright, before the crop), or is that of the cropped square."""
    defect: str | None = None
    """Why it cannot be used, and its path; `read_photo` raises it. The others of a list can be used nevertheless."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Photo:
    """A photo as a generator would have made it."""

    name: str
    image: torch.Tensor
    """float32 [1, 3, R, R] in [-1, 1]."""
    label: torch.Tensor
    """float32 [1, 25]: camera of the square."""
    mask: torch.Tensor | None = None
    """float32 [1, 1, R, R] in [0, 1], 1 on the head; None where there is none."""
    note: str | None = None
    """A line on what the crop changed, and on enlarging; None if there is nothing to say."""


# Finding --------------------------------------------------------------------------------------------------------------


def list_photos(
    target: str | os.PathLike,
    camera: str | None = None,
    mask: str | os.PathLike | None = None,
    *,
    radius: float = TRAINING_RADIUS,
    results: str | os.PathLike | None = None,
) -> list[PhotoFile]:
    """Find photos with their cameras and masks.

    A folder has its cameras in `dataset.json`, the format of data sets; without one, the folders below that have one
    are read. Hidden files are passed over, and so are folders of masks and of results within the target. Photos come in
    the order of their paths. What is wrong with one photo of a folder is its `defect`; only what concerns all is an
    error.

    Args:
        target: such a folder, or one image.
        camera: of one image, see `parse_camera`; None takes it from `dataset.json` in the folder of the image.
        mask: an image if there is one photo, or a folder of images that are matched by path without extension.
        radius: distance of a camera that is given by angles.
        results: folder whose pictures are no photos, if it is within the target; it need not exist.

    Returns:
        At least one photo.

    Raises:
        ValueError: there is no photo; or a camera cannot be read; or two photos have the same `name`; or, of a single
            image, anything that would be its `defect`.
        OSError: a file cannot be read.

    Differs from the published code, where one image without a label stops all, and masks are not used.
    """
    target = Path(target)
    mask = None if mask is None else Path(mask)
    if target.is_dir():
        if camera is not None:
            raise ValueError(f"camera: expected one image as the target of one camera, came the folder {shown(target)}")
        return _in_folder(target, mask, None if results is None else Path(results))
    _require_image(target, "target", f"a folder with {LABELS_NAME}, or an image")
    photo = _single(target, camera, mask, radius)
    if photo.defect is not None:
        raise ValueError(photo.defect)
    return [photo]


def _require_image(path: Path, name: str, expected: str) -> None:
    if not path.is_file():
        raise ValueError(f"{name}: expected {expected}, came {shown(path)}, which is {what_is(path)}")
    if not is_image_name(path.name):
        raise ValueError(f"{name}: expected {expected}, came {shown(path)}, whose ending is that of neither")


def _single(image: Path, camera: str | None, mask: Path | None, radius: float) -> PhotoFile:
    camera_of: CameraOf = "stored image"
    if camera is not None:
        label, camera_of = read_camera(camera, radius, image.name)
        defect = None
    else:
        table = read_labels(image.parent)
        if table is None:
            raise ValueError(f"{shown(image)}: expected a camera, or labels in {LABELS_NAME} beside it, came neither")
        label, defect = labels_of([image.name], table)[0]
    entry = _Entry(image.name, label, defect)
    return replace(_photo(image.parent, entry, _Masks(mask, root="", single=True)), camera_of=camera_of)


class _Entry(NamedTuple):
    """An image of a folder."""

    name: str
    """Relative to the target."""
    label: torch.Tensor | None
    defect: str | None


def _in_folder(target: Path, mask: Path | None, results: Path | None) -> list[PhotoFile]:
    if mask is not None and mask.resolve() == target.resolve():
        raise ValueError(f"mask: expected another folder than that of the photos, came {shown(mask)}")
    no_photos = tuple(_relative_folder(folder, target) for folder in (mask, results) if folder is not None)
    folders = [folder for folder in _labelled_folders(target) if not folder.startswith(no_photos)]
    if not folders:
        raise ValueError(f"target: expected {LABELS_NAME} in {shown(target)} or in folders below it, came none")
    entries = [
        entry
        for folder in folders
        for entry in _labelled_images(target, folder)
        if not entry.name.startswith(no_photos)
    ]
    if not entries:
        raise ValueError(f"target: expected images in {shown(target)}, came none")
    masks = _Masks(mask, root=folders[0] if len(folders) == 1 else "", single=len(entries) == 1)
    photos: dict[str, PhotoFile] = {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        photo = _photo(target, entry, masks)
        if photo.name in photos:
            came = f"{shown(photos[photo.name].image)} and {shown(photo.image)}"
            raise ValueError(f"target: expected photos with results in different folders, came {came}: {photo.name}")
        photos[photo.name] = photo
    return list(photos.values())


def _relative_folder(folder: Path, target: Path) -> str:
    """Return how the paths of what is in a folder start, relative to the target."""
    return os.path.relpath(folder.resolve(), target.resolve()).replace(os.sep, "/") + "/"


def _photo(target: Path, entry: _Entry, masks: _Masks) -> PhotoFile:
    mask, mask_defect = masks.find(entry.name)
    defect = entry.defect or mask_defect
    return PhotoFile(
        name=_safe_name(entry.name),
        image=target / entry.name,
        label=entry.label,
        mask=mask,
        defect=None if defect is None else f"{shown(target / entry.name)}: {defect}",
    )


def _labelled_folders(target: Path) -> list[str]:
    """Return the folders with labels, relative to the target with "/" at the end: itself (""), or topmost ones."""
    found = []
    for folder, below, files in os.walk(target, onerror=_raise):
        if LABELS_NAME in files:
            relative = os.path.relpath(folder, target)
            found.append("" if relative == "." else relative.replace(os.sep, "/") + "/")
            below.clear()
        below[:] = [name for name in below if not name.startswith(".") and name != "__MACOSX"]
    return found


def _raise(error: OSError) -> None:
    raise error


def _labelled_images(target: Path, folder: str) -> Iterator[_Entry]:
    """Yield the images of a folder that has labels."""
    source = FolderSource(os.path.abspath(target / folder))
    table = read_labels(target / folder)
    if table is None:
        raise ValueError(f"{shown(target / folder / LABELS_NAME)}: expected labels, came none")
    for name, (label, defect) in zip(source.names, labels_of(source.names, table)):
        yield _Entry(folder + name, label, defect)
    for name, reason in source.refused:
        yield _Entry(folder + name, None, reason)


class _Masks:
    """The masks of photos: one file for one photo, or a folder.

    Args:
        path: of the file or the folder; None: there are none.
        root: which start of photos' names is left out of those of masks.
        single: whether there is one photo.
    """

    def __init__(self, path: Path | None, root: str, single: bool) -> None:
        self._path, self._root = path, root
        self._files: dict[str, list[str]] | None = None
        if path is None:
            return
        if not path.is_dir():
            _require_image(path, "mask", "an image or a folder of images")
            if not single:
                raise ValueError(f"mask: expected a folder, for there are several photos, came the file {shown(path)}")
            return
        self._files = {}
        for name in FolderSource(os.path.abspath(path)).names:
            self._files.setdefault(without_extension(name), []).append(name)
        if not self._files:
            raise ValueError(f"mask: expected images in {shown(path)}, came none")

    def find(self, name: str) -> tuple[Path | None, str | None]:
        """Return the mask of a photo, and a defect where there is not exactly one."""
        if self._path is None or self._files is None:
            return self._path, None
        stem = without_extension(name.removeprefix(self._root))
        found = self._files.get(stem, [])
        if len(found) == 1:
            return self._path / found[0], None
        came = f"{len(found)}: {', '.join(map(printable, found))}" if found else "none"
        return None, f"expected a mask {printable(stem)}.* in {shown(self._path)}, came {came}"


def _safe_name(name: str) -> str:
    """Return a path without extension as the name of a folder: what systems refuse, and what is not seen, becomes _."""
    text = unicodedata.normalize("NFC", without_extension(name))
    safe = "".join(letter if _is_safe(letter) else "_" for letter in text).strip(" ")
    safe = re.sub(r"^[.-]|\.$", "_", safe) or "_"
    if len(safe.encode()) <= _MAX_NAME_BYTES:
        return safe
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return safe.encode()[: _MAX_NAME_BYTES - 9].decode(errors="ignore") + "-" + digest


def _is_safe(letter: str) -> bool:
    """Whether a letter is fit for the name of a folder; of blanks, only the plain one is."""
    return letter == " " or not (letter in _UNSAFE or unicodedata.category(letter)[0] in "CZ")


# Reading --------------------------------------------------------------------------------------------------------------


def read_photo(file: PhotoFile, resolution: int) -> Photo:
    """Read a photo as a generator of a resolution would have made it.

    The picture is turned upright by its EXIF orientation and becomes 8 bits of RGB (see `image_transforms.to_rgb`); the
    largest square in its middle is resized with a Lanczos filter, its mask with it. A camera of the stored picture is
    changed accordingly (see `image_transforms.transform_label`), as `dataset_tool.py pack` does.

    Args:
        file: as `list_photos` returns it.
        resolution: side of the result in pixels, a power of two.

    Raises:
        ValueError: something is wrong with the photo; the message names the file, what was expected and what came.
        OSError: a file cannot be read.

    Differs from the published code, which keeps the intrinsics whatever is cropped.
    """
    transform = Transform(crop="center-crop", resolution=(resolution, resolution))
    if file.defect is not None or file.label is None:
        raise BadImage(file.defect or f"{shown(file.image)}: expected a camera, came none")
    with _naming(file.image):
        upright = load_upright(read_file(file.image))
        geometry = transform.geometry(upright.size)
        picture = transform.apply(to_rgb(upright), geometry)
    mask = None
    if file.mask is not None:
        with _naming(file.mask):
            mask = _read_mask(file.mask, transform, geometry)
    label = file.label.tolist()
    if file.camera_of == "stored image":
        label = transform_label(label, geometry)
    return Photo(
        name=file.name,
        image=_planes(picture) / 127.5 - 1,
        label=torch.tensor([label], dtype=torch.float32),
        mask=mask,
        note=_note(geometry, label, file.camera_of),
    )


def _read_mask(path: Path, transform: Transform, geometry: Geometry) -> torch.Tensor:
    """Return a mask [1, 1, R, R] in [0, 1]."""
    image = load_upright(read_file(path))
    if image.size != geometry.source:
        width, height = geometry.source
        raise BadImage(f"expected a mask of the size of the photo, {width} x {height}, came {_size(image)}")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        if image.convert("RGBA").getextrema()[3][0] < 255:
            raise BadImage("expected a mask that is bright on the head, came one with transparency")
    mask = _planes(transform.apply(to_mask(image), geometry))
    if mask.max() < _MIN_BRIGHTEST:
        raise BadImage(f"expected a mask that is 255 on the head, came values up to {int(mask.max())} within the crop")
    return mask / 255


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"


def _planes(image: Image.Image) -> torch.Tensor:
    """Return an image as float32 [1, C, H, W] in [0, 255]."""
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array.transpose(2, 0, 1).astype(np.float32))[None]


def _note(geometry: Geometry, label: list[float], camera_of: CameraOf) -> str | None:
    """Return what cropping and enlarging did to a photo and its camera."""
    left, top, right, bottom = geometry.box
    side, resolution = right - left, geometry.canvas[0]
    texts = [f"enlarged from {side} x {side} to {resolution} x {resolution}"] if side < resolution else []
    if geometry.moves_rays:
        width, height = geometry.source
        text = f"cropped {width} x {height} to the {side} x {bottom - top} in the middle"
        if camera_of == "stored image":
            text += f", where the focal lengths are {label[16]:g} and {label[20]:g} image widths"
            if abs(label[16] / label[20] - 1) > _SQUARE_TOLERANCE:
                text += " (as if pixels were not square: does the label describe a square already?)"
        texts.insert(0, text)
    return "; ".join(texts) or None


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the name of a file into errors about its content."""
    try:
        yield
    except ValueError as error:
        raise BadImage(f"{shown(path)}: {error}") from None
