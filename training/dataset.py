"""Data sets of heads: images with camera labels, masks and parsing maps, from folders or zip files.

What is checked when a data set is opened, in parallel where it is large: names, labels, whether masks and parsing maps
are there, and of every file the header (type, size) and the end (truncation shows there). Files that look unusual, and
256 spread over the set, are decoded in full. All of 100,000 images would take minutes; `dataset_tool.py check` does it.
What only shows on decoding (damaged pixels, class indices) is an error when the image is read.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from camera_utils import LABEL_SIZE, mirror_label
from dnnlib.workers import map_ordered
from training.config import require
from training.head_identities import number_identities
from training.head_labels import collect_labels, mirror_defects, parse_labels, select_views
from training.image_reading import HeadReader, ItemNames, Probe, Roots, open_image
from training.image_sources import (
    LABELS_NAME,
    BadImage,
    FolderSource,
    ZipSource,
    open_source,
    printable,
    read_labels_file,
    without_extension,
)
from training.train_config import DataConfig

_DECODED_AT_START = 256  # images
_PROBES_PER_TASK = 500
_MAX_PROBE_WORKERS = 8
_MAX_SKIPPED_SHOWN = 20  # lines about images that were left out


class HeadDataset(torch.utils.data.Dataset):
    """Images of heads and what belongs to them.

    The items are the images that `config` chooses, front views in ascending order of their path, then views from behind
    as often as asked for; then, with `config.mirror`, all of them flipped.

    Args:
        config: where the files are and which of them to use.
        seed: of the random choice where `config.max_images` is below the number of images.

    Raises:
        ValueError: without `config.skip_bad`, something cannot be used: the message names root and file, what was
            expected and what came. With it, there is nothing that can be used, or a root is no data set at all.

    Differs from the published code: labels of flipped items are mirrored wherever they are read, and classes of parsing
    maps too; several roots are read as one; defects are found at the start.
    """

    labels: np.ndarray
    """float32 [len, 25]: label of every item, mirrored where the item is; zeros if the data set is not conditional."""
    label_std: np.ndarray
    """float32 [25]: population standard deviation over the labels of all images that can be used."""
    skipped: list[str]
    """One line for each image that `skip_bad` left out."""
    reader: HeadReader
    """Reads images; can be sent to other processes."""

    def __init__(self, config: DataConfig, seed: int = 0) -> None:
        self.config = config
        roots, items, self.skipped = _list_items(config)
        self.reader = HeadReader(roots, items, config.resolution, config.parsing_classes)
        labels, usable = self._check_items()
        self._chosen = self._choose(labels, usable, seed)
        self.label_std = labels[usable].std(axis=0).astype(np.float32)
        chosen_labels = labels[self._chosen].astype(np.float32)
        if config.mirror:
            flipped = mirror_label(torch.from_numpy(chosen_labels)).numpy()
            chosen_labels = np.concatenate([chosen_labels, flipped])
        self.labels = chosen_labels

    def _check_items(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the labels float64 [N, 25] of the reader's images, and which [M] of these can be used."""
        labels, defects = _read_labels(self.reader, self.config)
        for item, text in _probe(self.reader, [i for i in range(len(self.reader.items)) if i not in defects]):
            defects.setdefault(item, text)
        found = [defects[item] for item in sorted(defects)]
        _refuse_unless_skipped(found, self.config.skip_bad)
        self.skipped += found
        usable = np.setdiff1d(np.arange(len(labels)), list(defects))
        if len(usable) == 0:
            first = f"; the first of {len(self.skipped)} left out: {self.skipped[0]}" if self.skipped else ""
            raise ValueError(f"data.images: expected images in {', '.join(self.config.images)}, came none{first}")
        return labels, usable

    def _choose(self, labels: np.ndarray, usable: np.ndarray, seed: int) -> np.ndarray:
        """Return the images [M] that `config` chooses of the usable ones, in order."""
        config = self.config
        chosen = usable
        if config.conditional:
            views = select_views(
                labels[usable],
                min_yaw_deg=config.min_yaw_deg,
                max_yaw_deg=config.max_yaw_deg,
                max_pitch_deg=config.max_pitch_deg,
                back_repeat=config.back_repeat,
                published_angles=config.published_angles,
            )
            chosen = usable[views]
        limits = f"yaw {config.min_yaw_deg:g} to {config.max_yaw_deg:g}, pitch up to {config.max_pitch_deg:g} degrees"
        require(len(chosen) > 0, "data", f"at least one of {len(usable)} images within {limits}", 0)
        if config.max_images is not None and config.max_images < len(chosen):
            order = np.arange(len(chosen))
            np.random.RandomState(seed % (1 << 32)).shuffle(order)
            chosen = chosen[np.sort(order[: config.max_images])]
        return chosen

    def __len__(self) -> int:
        return len(self._chosen) * (2 if self.config.mirror else 1)

    @property
    def resolution(self) -> int:
        """Side of the images, in pixels."""
        return self.config.resolution

    @property
    def has_masks(self) -> bool:
        """Whether items have a mask."""
        return self.reader.has_masks

    @property
    def has_parsing(self) -> bool:
        """Whether items have a parsing map."""
        return self.reader.has_parsing

    @property
    def parsing_classes(self) -> int:
        """Class indices of parsing maps are below it; 0 where there are none."""
        return self.config.parsing_classes

    @functools.cached_property
    def identities(self) -> np.ndarray | None:
        """int64 [len]: equal where items show the same head; None where the data set does not say.

        A flipped head is another one. Images without an identity are alone in theirs.

        Raises:
            ValueError: what `dataset.json` says cannot be used.
        """
        numbers = number_identities(self.reader)
        if numbers is None:
            return None
        chosen = numbers[self._chosen]
        return np.concatenate([chosen, chosen + len(numbers)]) if self.config.mirror else chosen

    @property
    def fingerprint(self) -> str:
        """A hash of the names, the order and the labels of all items: equal where runs see the same data set."""
        digest = hashlib.sha256(self.labels.tobytes())
        for item in self._chosen:
            digest.update("\0".join(map(str, self.reader.items[item])).encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()

    def describe(self) -> list[str]:
        """Return lines for people: what there is, and some of what was left out."""
        maps = [name for name, there in (("masks", self.has_masks), ("parsing maps", self.has_parsing)) if there]
        with_maps = f" with {' and '.join(maps)}" if maps else ""
        lines = [f"data: {len(self)} images of {self.resolution} px{with_maps}"]
        if self.skipped:
            lines.append(f"data: {len(self.skipped)} left out, such as:")
            lines += [f"  {line}" for line in self.skipped[:_MAX_SKIPPED_SHOWN]]
        return lines

    def locate(self, index: int) -> tuple[int, bool]:
        """Return which of `reader`'s images an item is, and whether it is flipped."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, came {index}")
        return int(self._chosen[index % len(self._chosen)]), index >= len(self._chosen)

    def name(self, index: int) -> str:
        """Return what an item is called in messages: root, path, and whether it is flipped."""
        item, mirrored = self.locate(index)
        return self.reader.describe(item) + (" (mirrored)" if mirrored else "")

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read an item.

        Returns:
            `image` uint8 [3, H, W], `label` float32 [25], `index` int, and where the data set has them `mask` uint8
            [1, H, W] (255 in the foreground) and `parsing` uint8 [1, H, W] (class indices).

        Raises:
            IndexError: there is no such item.
            training.image_sources.BadImage: a ValueError; a file cannot be used.
        """
        layers = self.reader.read(*self.locate(index))
        item = {"image": layers[:3], "label": self.labels[index].copy(), "index": index}
        if self.has_masks:
            item["mask"] = layers[3:4]
        if self.has_parsing:
            item["parsing"] = layers[-1:]
        return item


def _refuse_unless_skipped(defects: list[str], skip_bad: bool) -> None:
    if defects and not skip_bad:
        others = f" (and {len(defects) - 1} more; dataset_tool.py check lists them)" if len(defects) > 1 else ""
        raise ValueError(defects[0] + others)


def _list_items(config: DataConfig) -> tuple[list[Roots], list[ItemNames], list[str]]:
    """Open all roots; return them, the files of each image, and the defects of what was left out."""
    roots, items, skipped = [], [], []
    for number, path in enumerate(config.images):
        images = open_source(path, "data.images")
        masks = open_source(config.masks[number], "data.masks") if config.masks else None
        parsing = open_source(config.parsing[number], "data.parsing") if config.parsing else None
        roots.append(Roots(images, masks, parsing))
        found, defects = match_files(number, roots[-1])
        items += found
        skipped += defects
    _refuse_unless_skipped(skipped, config.skip_bad)
    return roots, items, skipped


def match_files(
    number: int, roots: Roots, key: Callable[[str], str] = without_extension
) -> tuple[list[ItemNames], list[str]]:
    """Find mask and parsing map of every image of a root.

    Args:
        number: of the root.
        roots: its sources.
        key: what files that belong together have in common; by default, the path without extension.

    Returns:
        The files of each image, and the defects of images that were left out: names that are unsafe or ambiguous, and
        masks or parsing maps that are missing.
    """
    defects = [f"{_where(roots.images, name)}: {reason}" for name, reason in roots.images.refused]
    others = {
        kind: _by_key(getattr(roots, kind), key) for kind in ("masks", "parsing") if getattr(roots, kind) is not None
    }
    items, seen = [], {}
    for name in roots.images.names:
        stem = key(name)
        reason = None
        if stem in seen:
            reason = f"expected one image of this name without extension, came {printable(seen[stem])} too"
        seen.setdefault(stem, name)
        partners: dict[str, str | None] = {}
        for kind, table in others.items():
            candidates = table.get(stem, [])
            if len(candidates) != 1 and reason is None:
                word = "mask" if kind == "masks" else "parsing map"
                came = f"came {len(candidates)}: {candidates}" if candidates else "came none"
                reason = f"expected a {word} {printable(stem)}.* in {getattr(roots, kind).path}, {came}"
            partners[kind] = candidates[0] if candidates else None
        if reason is None:
            items.append(ItemNames(number, name, partners.get("masks"), partners.get("parsing")))
        else:
            defects.append(f"{_where(roots.images, name)}: {reason}")
    return items, defects


def _by_key(source: FolderSource | ZipSource, key: Callable[[str], str]) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for name in source.names:
        table.setdefault(key(name), []).append(name)
    return table


def _where(source: FolderSource | ZipSource, name: str) -> str:
    return printable(f"{source.path}/{name}")


def _read_labels(reader: HeadReader, config: DataConfig) -> tuple[np.ndarray, dict[int, str]]:
    """Return the labels float64 [N, 25] of all images, and the defects by image."""
    labels = np.zeros((len(reader.items), LABEL_SIZE))
    defects: dict[int, str] = {}
    if not config.conditional:
        return labels, defects
    counts = Counter(names.root for names in reader.items)
    first = 0
    for number, roots in enumerate(reader.roots):
        where = f"{printable(roots.images.path)}/{LABELS_NAME}"
        text = read_labels_file(roots.images)
        table = None if text is None else parse_labels(text, where)
        require(table is not None, where, "labels of cameras, which a conditional run needs", "none")
        part = slice(first, first + counts[number])
        labels[part], found = collect_labels((names.image for names in reader.items[part]), table)
        if config.mirror:
            found = {**mirror_defects(np.where(labels[part, 18:19] == 0, 0.5, labels[part])), **found}
        defects.update({first + i: f"{reader.describe(first + i)}: {text}" for i, text in found.items()})
        first = part.stop
    return labels, defects


def _probe(reader: HeadReader, items: list[int]) -> list[tuple[int, str]]:
    """Return the defects of images that show without decoding all of them, as (image, defect)."""
    spread = set(np.linspace(0, len(items) - 1, min(len(items), _DECODED_AT_START)).astype(int).tolist())
    tasks = [(items[i], items[i] + 1, True) for i in sorted(spread)]
    rest = [item for i, item in enumerate(items) if i not in spread]
    tasks += [(start, stop, False) for start, stop in _ranges(rest)]
    workers = min(_MAX_PROBE_WORKERS, os.cpu_count() or 1) if len(rest) > 2 * _PROBES_PER_TASK else 0
    return [defect for found in map_ordered(Probe(reader), tasks, workers) for defect in found]


def _ranges(items: list[int]) -> list[tuple[int, int]]:
    """Join ascending numbers to ranges (start, stop) of at most `_PROBES_PER_TASK`."""
    ranges: list[tuple[int, int]] = []
    for item in items:
        if ranges and ranges[-1][1] == item and item - ranges[-1][0] < _PROBES_PER_TASK:
            ranges[-1] = (ranges[-1][0], item + 1)
        else:
            ranges.append((item, item + 1))
    return ranges


def image_side(root: str) -> int:
    """Return the side of the first image of a data set, in pixels.

    Raises:
        ValueError: there is no image, it cannot be read, or it is not square.
    """
    source = open_source(root, "data.images")
    require(len(source.names) > 0, printable(source.path), "at least one image", "none")
    where = _where(source, source.names[0])
    try:
        width, height = open_image(source.read(source.names[0])).size
    except BadImage as error:
        raise ValueError(f"{where}: {error}") from None
    require(width == height, where, "a square image", f"{width} x {height} pixels")
    return width


def __getattr__(name: str) -> Any:
    """Find the published classes, which build on this module."""
    if name in ("ImageFolderDataset", "CameraLabeledDataset", "MaskLabeledDataset"):
        from training import published_datasets

        return getattr(published_datasets, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
