"""Pack images of heads, masks and parsing maps into the format that training reads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset_tools.packing import PackedItem, PackItem
from dataset_tools.writers import Journal, Writer, journal_path, open_writer, publish
from dnnlib.workers import WorkerDied, map_ordered
from training.dataset import match_files
from training.head_identities import IDENTITIES_KEY, Identity, read_identities
from training.head_labels import collect_labels, parse_labels
from training.image_reading import ItemNames, Roots
from training.image_sources import LABELS_NAME, open_source, printable, read_labels_file, without_extension
from training.image_transforms import Extension, Transform, transform_label

Progress = Callable[[int, int], None]
"""Called with how many images are done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class PackRequest:
    """What to pack, how, and where to."""

    source: Path
    """Folder or zip file of images, with `dataset.json` if there are labels."""
    dest: Path
    """Zip file, if it ends in .zip, or folder; there must be none yet."""
    masks: Path | None = None
    """Folder or zip file of masks, matched by path without extension."""
    dest_masks: Path | None = None
    parsing: Path | None = None
    """Folder or zip file of class indices, matched like masks."""
    dest_parsing: Path | None = None
    transform: Transform = field(default_factory=Transform)
    max_images: int | None = None
    """Take the first ones only."""
    use_basename: bool = False
    """Match labels, masks and parsing maps by file name alone, without folders."""
    extension: Extension = "png"
    """Format of the images; masks and parsing maps are always PNG."""
    png_compression: int = 0
    skip_bad: bool = False
    """Leave out images that cannot be used, and report them; otherwise the first one is an error."""
    overwrite: bool = False
    """Replace zip files that are there already."""
    workers: int = 0
    """Processes that convert; 0 is this one."""

    def __post_init__(self) -> None:
        for name in ("masks", "parsing"):
            if (getattr(self, name) is None) != (getattr(self, f"dest_{name}") is None):
                raise ValueError(f"{name}, dest_{name}: expected both or neither, came one")
        paths = [os.path.realpath(path) for path in (*self.sources.values(), *self.dests.values())]
        if len(set(paths)) < len(paths):
            raise ValueError(f"source, dest: expected different folders and files, came {', '.join(paths)}")

    @property
    def sources(self) -> dict[str, Path]:
        """The roots that are read, by kind."""
        roots = {"images": self.source, "masks": self.masks, "parsing": self.parsing}
        return {kind: path for kind, path in roots.items() if path is not None}

    @property
    def dests(self) -> dict[str, Path]:
        """The roots that are written, by kind."""
        roots = {"images": self.dest, "masks": self.dest_masks, "parsing": self.dest_parsing}
        return {kind: path for kind, path in roots.items() if path is not None}


class PackReport(NamedTuple):
    """What was packed."""

    num_images: int
    num_resumed: int
    """Images, among them, that an earlier run had packed."""
    has_labels: bool
    skipped: list[str]
    """One line for each image that was left out."""


class _Plan(NamedTuple):
    roots: Roots
    items: list[ItemNames]
    labels: np.ndarray | None
    """float64 [N, 25]."""
    identities: list[Identity | None] | None
    """Of every item, None for those without one; None where the source names none."""
    skipped: list[str]


def archive_name(number: int, extension: str) -> str:
    """Return the published name of an image: eight digits, in folders by the first five."""
    digits = f"{number:08d}"
    return f"{digits[:5]}/img{digits}.{extension}"


def pack(request: PackRequest, progress: Progress = lambda done, total: None) -> PackReport:
    """Pack a data set.

    Images are converted in the order of their paths and get numbers in this order; one that is left out leaves a gap.
    `dataset.json` holds labels, whose intrinsics follow the crop, under `fnames` the original paths, and `identities`
    if the source has some.

    After an interruption, also by SIGKILL, the same call goes on: what is written lies beside the destination, under
    `.NAME.partial`, with notes in `.NAME.journal`. What was cut off in the middle is written again. The names appear
    when all is done.

    Args:
        request: what to do.
        progress: called after each image.

    Raises:
        ValueError: a root is none, a destination exists, or, without `request.skip_bad`, an image cannot be used.
        OSError: the disk is full, or the like; the same call goes on later.
    """
    if not journal_path(request.dest).exists():
        _require_free(request)
    plan = _plan(request)
    with contextlib.closing(Journal(request.dest, _description(request, plan))) as journal:
        resumed = len(plan.items)
        if not journal.sealed:
            _require_free(request)
            resumed = _write(request, plan, journal, progress)
        for path in request.dests.values():
            publish(path)
        journal.finish()
    skipped = plan.skipped + [f"{text}" for _, text in sorted(journal.skipped.items())]
    num_resumed = sum(number < resumed for number in _packed(plan, journal))
    return PackReport(len(_packed(plan, journal)), num_resumed, plan.labels is not None, skipped)


def _write(request: PackRequest, plan: _Plan, journal: Journal, progress: Progress) -> int:
    """Write what is not there yet; return the number of the first image that was not."""
    if journal.skipped and not request.skip_bad:
        raise ValueError(f"{next(iter(journal.skipped.values()))} (an earlier run has left it out)")
    with contextlib.ExitStack() as stack:
        writers: dict[str, Writer] = {}
        for kind, path in request.dests.items():
            writers[kind] = stack.enter_context(contextlib.closing(open_writer(path, journal.resumes)))
        resumed = _resume(request, plan, journal, writers)
        _convert(request, plan, journal, writers, resumed, progress)
        if not _packed(plan, journal):
            raise ValueError(f"source: expected images that can be used in {request.source}, came none")
        writers["images"].add(LABELS_NAME, _labels_file(request, plan, journal))
        for writer in writers.values():
            writer.seal()
        journal.seal()
    return resumed


def _packed(plan: _Plan, journal: Journal) -> list[int]:
    return [number for number in range(len(plan.items)) if number not in journal.skipped]


def _require_free(request: PackRequest) -> None:
    for path in request.dests.values():
        if path.is_dir() and (path.suffix.lower() == ".zip" or any(path.iterdir())):
            raise ValueError(f"{path}: expected a new name or an empty folder, came a folder that is in use")
        if path.is_file() and not (request.overwrite and path.suffix.lower() == ".zip"):
            raise ValueError(f"{path}: exists already; expected a new name, or overwrite for a zip file")


def _basename(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _plan(request: PackRequest) -> _Plan:
    """Find what belongs together, and leave out what lacks something."""
    roots = Roots(**{kind: open_source(path, kind) for kind, path in request.sources.items()})
    key = (lambda name: without_extension(_basename(name))) if request.use_basename else without_extension
    items, skipped = match_files(0, roots, key)
    labels = None
    text = read_labels_file(roots.images)
    table = None if text is None else parse_labels(text, f"{printable(roots.images.path)}/{LABELS_NAME}")
    if table is not None:
        names = [names.image for names in items]
        if request.use_basename:
            table, names = {_basename(name): label for name, label in table.items()}, [*map(_basename, names)]
        labels, defects = collect_labels(names, table)
        usable = [i for i in range(len(items)) if i not in defects]
        skipped += [f"{printable(roots.images.path)}/{items[i].image}: {defects[i]}" for i in sorted(defects)]
        items, labels = [items[i] for i in usable], labels[usable]
    if skipped and not request.skip_bad:
        others = f" (and {len(skipped) - 1} more; skipping leaves them out)" if len(skipped) > 1 else ""
        raise ValueError(skipped[0] + others)
    if not items:
        raise ValueError(f"source: expected images in {request.source}, came none" + "".join(skipped[:1]))
    items = items[: request.max_images]
    identities = read_identities(roots.images, [names.image for names in items], request.use_basename)
    return _Plan(roots, items, labels, identities, skipped)


def _description(request: PackRequest, plan: _Plan) -> str:
    """Return a hash of all that determines what is written."""
    parts: list[Any] = [request.transform, request.extension, request.png_compression, request.dests]
    parts += [root.path for root in plan.roots if root is not None]
    digest = hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape"))
    digest.update(repr(plan.items).encode("utf-8", "surrogateescape"))
    if plan.identities is not None:
        digest.update(repr(plan.identities).encode("utf-8", "surrogateescape"))
    digest.update(b"" if plan.labels is None else plan.labels[: len(plan.items)].tobytes())
    return digest.hexdigest()


def _archive_name(request: PackRequest, kind: str, number: int) -> str:
    return archive_name(number, request.extension if kind == "images" else "png")


def _resume(request: PackRequest, plan: _Plan, journal: Journal, writers: dict[str, Writer]) -> int:
    """Make all writers go on at the first image that one of them lacks; return its number."""
    first = len(plan.items)
    for kind, writer in writers.items():
        there = set(writer.recovered())
        missing = (
            number
            for number in range(first)
            if number not in journal.skipped and _archive_name(request, kind, number) not in there
        )
        first = next(missing, first)
    for kind, writer in writers.items():
        kept = [number for number in range(first) if number not in journal.skipped]
        writer.keep([_archive_name(request, kind, number) for number in kept])
    return first


def _convert(
    request: PackRequest, plan: _Plan, journal: Journal, writers: dict[str, Writer], start: int, progress: Progress
) -> None:
    """Convert and write the images from number `start` on."""
    total = len(plan.items)
    progress(start, total)
    handler = PackItem(plan.roots, request.transform, request.extension, request.png_compression)
    for number, result in enumerate(_results(handler, plan.items[start:], request.workers), start):
        if isinstance(result, str):
            if not request.skip_bad:
                raise ValueError(f"{result} (skipping would leave it out)")
            journal.skip(number, result)
        else:
            if request.transform.geometry(result.size).moves_rays:
                journal.note_size(number, result.size)
            for kind, data in result.files.items():
                writers[kind].add(_archive_name(request, kind, number), data)
        progress(number + 1, total)


def _results(handler: PackItem, items: list[ItemNames], workers: int) -> Iterator[PackedItem | str]:
    try:
        with contextlib.closing(map_ordered(handler, items, workers)) as results:
            yield from results
    except WorkerDied as error:
        raise ValueError(f"{error}; expected enough memory for the images, or fewer workers") from None


def _labels_file(request: PackRequest, plan: _Plan, journal: Journal) -> bytes:
    """Return the contents of `dataset.json`."""
    packed = _packed(plan, journal)
    names = {number: archive_name(number, request.extension) for number in packed}
    labels = None
    if plan.labels is not None:
        labels = [[names[number], _label(request, plan, journal, number)] for number in packed]
    fnames = [[names[number], printable(plan.items[number].image)] for number in packed]
    content: dict[str, Any] = {"labels": labels, "fnames": fnames}
    if plan.identities is not None:
        known = [number for number in packed if plan.identities[number] is not None]
        content[IDENTITIES_KEY] = [[names[number], plan.identities[number]] for number in known]
    return json.dumps(content).encode()


def _label(request: PackRequest, plan: _Plan, journal: Journal, number: int) -> list[float]:
    label = plan.labels[number].tolist()
    size = journal.sizes.get(number)  # only noted where the label changes
    return label if size is None else transform_label(label, request.transform.geometry(size))
