"""Look at every file of a data set, and sum up what is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dataset_tools.pictures import Tile, contact_sheet, pose_histogram
from dnnlib.workers import WorkerDied, map_ordered
from training.dataset import match_files
from training.head_identities import read_identities
from training.head_labels import BACK_YAW_DEG, collect_labels, parse_labels, view_angles_deg
from training.image_reading import HeadReader, ItemNames, Probe, Roots, open_image
from training.image_sources import (
    LABELS_NAME,
    BadImage,
    open_source,
    printable,
    read_labels_file,
    without_extension,
)

Progress = Callable[[int, int], None]
"""Called with how many images are done, and how many there are."""

_IMAGES_PER_TASK = 32
_MAX_ORPHANS = 20  # named one by one


@dataclass(frozen=True)
class CheckReport:
    """What a data set holds, and what is wrong with it."""

    reader: HeadReader
    """Of the images that have all that belongs to them."""
    defects: list[str]
    """One line for each; images that have one are not used in training."""
    remarks: list[str]
    """What is unusual, but does no harm."""
    has_labels: bool
    labels: np.ndarray
    """float64 [N, 25] of the reader's images."""
    usable: np.ndarray
    """int64 [M]: those of the reader's images that have no defect."""

    @property
    def angles_deg(self) -> np.ndarray:
        """Yaw, pitch, roll [M, 3] of the usable images."""
        return view_angles_deg(self.labels[self.usable])

    def summary(self) -> dict[str, Any]:
        """Return numbers of all kinds, as plain JSON data."""
        result: dict[str, Any] = {
            "roots": [root.images.path for root in self.reader.roots],
            "resolution": self.reader.resolution,
            "num_usable": len(self.usable),
            "num_defects": len(self.defects),
            "has_labels": self.has_labels,
            "has_masks": self.reader.has_masks,
            "has_parsing": self.reader.has_parsing,
        }
        if self.has_labels and len(self.usable):
            result |= _pose_summary(self.labels[self.usable], self.angles_deg)
        return {**result, "defects": self.defects, "remarks": self.remarks}

    def pose_picture(self) -> Image.Image:
        """Draw how many images were taken from where."""
        yaw, pitch, _ = self.angles_deg.T
        return pose_histogram(yaw, pitch)

    def contact_sheet(self, count: int = 32) -> Image.Image:
        """Lay out usable images: with labels, as evenly spread over yaw as they are there; otherwise over the paths."""
        tiles = []
        for position in _spread(self.angles_deg[:, 0] if self.has_labels else np.arange(len(self.usable)), count):
            yaw, pitch, _ = self.angles_deg[position]
            caption = f"yaw {yaw:.0f} pitch {pitch:.0f}" if self.has_labels else ""
            tiles.append(Tile(self.reader.read(int(self.usable[position])), caption))
        return contact_sheet(tiles, self.reader.has_masks, self.reader.has_parsing)


def _spread(values: np.ndarray, count: int) -> list[int]:
    """Return positions in `values` [N] that are as evenly spread over their range as possible, by ascending value."""
    order = np.argsort(values, kind="stable")
    if len(order) <= count:
        return order.tolist()
    left = order.tolist()
    chosen = []
    for wanted in np.linspace(values[order[0]], values[order[-1]], count):
        nearest = int(np.abs(values[left] - wanted).argmin())
        chosen.append(left.pop(nearest))
    return sorted(chosen, key=lambda position: values[position])


def _pose_summary(labels: np.ndarray, angles_deg: np.ndarray) -> dict[str, Any]:
    yaw, pitch, roll = angles_deg.T
    radius = np.linalg.norm(labels[:, [3, 7, 11]], axis=1)
    ranges = {"yaw_deg": yaw, "pitch_deg": pitch, "roll_deg": roll, "radius": radius, "focal": labels[:, 16]}
    quantiles = {
        name: dict(zip(("min", "median", "max"), np.quantile(values, [0, 0.5, 1]).round(4).tolist()))
        for name, values in ranges.items()
    }
    shares = {"front": np.abs(yaw) < 45, "side": (np.abs(yaw) >= 45) & (np.abs(yaw) < BACK_YAW_DEG)}
    shares["back"] = np.abs(yaw) >= BACK_YAW_DEG
    return {**quantiles, "share": {name: round(float(part.mean()), 4) for name, part in shares.items()}}


def check(
    images: Sequence[str],
    masks: Sequence[str] = (),
    parsing: Sequence[str] = (),
    *,
    resolution: int | None = None,
    parsing_classes: int = 20,
    workers: int = 0,
    progress: Progress = lambda done, total: None,
) -> CheckReport:
    """Check a data set; every file is decoded in full.

    Args:
        images, masks, parsing: roots, as in `training.train_config.DataConfig`.
        resolution: side that all images must have; None is that of the first one.
        parsing_classes: class indices are below it.
        workers: processes that decode; 0 is this one.
        progress: called from time to time.

    Raises:
        ValueError: a root is no folder or zip file, or `dataset.json` cannot be read at all.
    """
    roots, items, defects = [], [], []
    for number, path in enumerate(images):
        partners = {kind: open_source(paths[number], kind) for kind, paths in _given(masks=masks, parsing=parsing)}
        roots.append(Roots(open_source(path, "images"), **partners))
        found, missing = match_files(number, roots[-1])
        items += found
        defects += missing
    if resolution is None:
        resolution = _first_side(roots, items)
    reader = HeadReader(roots, items, resolution, parsing_classes)
    labels, bad, remarks, has_labels = _check_labels(reader)
    remarks += [remark for root in roots for remark in _orphans(root)]
    for item, text in _decode_all(reader, workers, progress):
        bad.setdefault(item, []).append(text)
    defects += [text for item in sorted(bad) for text in bad[item]]
    usable = np.array([item for item in range(len(items)) if item not in bad], dtype=np.int64)
    return CheckReport(reader, defects, remarks, has_labels, labels, usable)


def _given(**roots: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    return [(kind, paths) for kind, paths in roots.items() if paths]


def _first_side(roots: list[Roots], items: list[ItemNames]) -> int:
    """Return the width of the first image that can be opened."""
    for names in items:
        try:
            with open_image(roots[names.root].images.read(names.image)) as image:
                return image.width
        except (BadImage, OSError, KeyError):
            continue
    paths = ", ".join(root.images.path for root in roots)
    raise ValueError(f"images: expected at least one that can be opened, with all that belongs to it, in {paths}")


def _check_labels(reader: HeadReader) -> tuple[np.ndarray, dict[int, list[str]], list[str], bool]:
    """Return labels [N, 25], defects by image, remarks, and whether all roots have labels."""
    labels = np.zeros((len(reader.items), 25))
    bad: dict[int, list[str]] = {}
    remarks: list[str] = []
    has_labels = True
    for number, root in enumerate(reader.roots):
        part = [i for i, names in enumerate(reader.items) if names.root == number]
        where = f"{printable(root.images.path)}/{LABELS_NAME}"
        text = read_labels_file(root.images)
        table = None if text is None else parse_labels(text, where)
        if table is None:
            has_labels = False
            remarks.append(f"{where}: no labels, which only runs without cameras can do without")
            continue
        labels[part], defects = collect_labels([reader.items[i].image for i in part], table)
        bad |= {part[i]: [f"{reader.describe(part[i])}: {text}"] for i, text in defects.items()}
        names = [reader.items[i].image for i in part]
        alone = [name for name, one in zip(names, read_identities(root.images, names) or names) if one is None]
        remarks += _named(where, "images without an identity", alone)
        there = {without_extension(name) for name in root.images.names}
        remarks += _named(
            where, "labels of images that are not there", [n for n in table if without_extension(n) not in there]
        )
    return labels, bad, remarks, has_labels


def _orphans(root: Roots) -> list[str]:
    """Return remarks on masks and parsing maps without an image."""
    there = {without_extension(name) for name in root.images.names}
    remarks = []
    for source in (root.masks, root.parsing):
        if source is not None:
            alone = [name for name in source.names if without_extension(name) not in there]
            remarks += _named(printable(source.path), "files without an image", alone)
    return remarks


def _named(where: str, what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    others = ", ..." if len(names) > _MAX_ORPHANS else ""
    return [f"{where}: {len(names)} {what}: {', '.join(map(printable, names[:_MAX_ORPHANS]))}{others}"]


def _decode_all(reader: HeadReader, workers: int, progress: Progress) -> list[tuple[int, str]]:
    total = len(reader.items)
    starts = range(0, total, _IMAGES_PER_TASK)
    tasks = [(start, min(start + _IMAGES_PER_TASK, total), True) for start in starts]
    found: list[tuple[int, str]] = []
    try:
        for (_, stop, _), defects in zip(tasks, map_ordered(Probe(reader), tasks, workers)):
            found += defects
            progress(stop, total)
    except WorkerDied as error:
        raise ValueError(f"{error}; expected enough memory for the images, or fewer workers") from None
    return found
