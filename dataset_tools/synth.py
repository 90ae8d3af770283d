"""Make data sets of synthetic heads in the format that training reads, reproducible from one command."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from dataset_tools.pack import archive_name
from dataset_tools.writers import Journal, Writer, journal_path, open_writer, publish
from dnnlib.atomic import atomic_write
from dnnlib.workers import map_ordered
from training.config import require
from training.head_identities import IDENTITIES_KEY, SYNTHETIC_NOTE
from training.image_sources import LABELS_NAME
from training.image_transforms import EXTENSIONS, Extension, encode
from training.synthetic_heads import RENDERER_VERSION, CameraRange, render_heads, sample_cameras, sample_identity

IMAGES, MASKS, PARSING = "images.zip", "masks.zip", "parsing.zip"
DESCRIPTION = SYNTHETIC_NOTE
_IMAGES_PER_TASK = 8
_PNG_COMPRESSION = 1  # half the size of none, and nearly as quick to read

Progress = Callable[[int, int], None]
"""Called with how many images are done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class SynthRequest:
    """What a synthetic data set holds; the same request makes the same bytes on the same machine."""

    num_identities: int
    views_per_identity: int = 4
    """Images of each identity; they follow each other."""
    resolution: int = 128
    """Side of the images, in pixels, a multiple of 8."""
    seed: int = 0
    cameras: CameraRange = dataclasses.field(default_factory=CameraRange)
    supersample: int = 2
    """Rays along a side of a pixel at an edge."""
    with_parsing: bool = False
    """Also write parsing maps."""
    extension: Extension = "png"
    """Format of the images; masks and parsing maps are always PNG."""

    def __post_init__(self) -> None:
        for name in ("num_identities", "views_per_identity"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.resolution >= 8 and self.resolution % 8 == 0, "resolution", "a multiple of 8", self.resolution)
        require(self.seed >= 0, "seed", "0 or more", self.seed)
        require(self.extension in EXTENSIONS, "extension", f"one of {', '.join(EXTENSIONS)}", self.extension)

    @property
    def num_images(self) -> int:
        """Images of the set."""
        return self.num_identities * self.views_per_identity

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the zip files."""
        return (IMAGES, MASKS, PARSING) if self.with_parsing else (IMAGES, MASKS)

    def labels(self, first: int, count: int) -> torch.Tensor:
        """Return the camera labels `[count, 25]` of images from `first` on."""
        return sample_cameras(self.seed, first, count, self.cameras)


class RenderImages:
    """Render images of a set; runs in worker processes.

    Called with the numbers of images, a range; returns for each the encoded files, in the order of `request.files`.
    """

    def __init__(self, request: SynthRequest, device: str, threads: int | None) -> None:
        self._request, self._device, self._threads = request, device, threads

    def __call__(self, numbers: range) -> list[tuple[bytes, ...]]:
        """Render images, see the class."""
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        request = self._request
        identities = [sample_identity(request.seed, number // request.views_per_identity) for number in numbers]
        labels = request.labels(numbers[0], len(numbers)).to(self._device)
        images = render_heads(identities, labels, request.resolution, request.supersample)
        layers = [images.rgb.permute(0, 2, 3, 1), images.mask, images.parsing][: len(request.files)]
        formats = [request.extension, "png", "png"]
        return [
            tuple(
                encode(Image.fromarray(layer[i].cpu().numpy()), fmt, _PNG_COMPRESSION)
                for layer, fmt in zip(layers, formats)
            )
            for i in range(len(numbers))
        ]


def synthesise(
    dest_dir: Path,
    request: SynthRequest,
    progress: Progress = lambda done, total: None,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> bool:
    """Make `images.zip`, `masks.zip` and, if asked for, `parsing.zip` in a folder.

    After an interruption, also by SIGKILL, the same call goes on: what is written lies beside the files, with notes.
    Nothing is done where a whole set of the same request is there.

    Args:
        dest_dir: folder, made if absent.
        request: contents.
        progress: called after every few images.
        workers: processes that render on the CPU, each with one thread; 0 renders in this one.
        device: where to render; with a GPU there are no workers.

    Returns:
        Whether anything was made.

    Raises:
        ValueError: the folder holds another data set, or one without a description.
        OSError: the disk is full, or the like; the same call goes on later.
    """
    paths = {name: dest_dir / name for name in request.files}
    description = _description(request)
    if _is_there(dest_dir, paths, description):
        return False
    if torch.device(device).type != "cpu":
        workers = 0
    render = RenderImages(request, str(device), 1 if workers else None)
    with contextlib.closing(Journal(paths[IMAGES], description)) as journal:
        if not journal.sealed:
            _write(paths, request, journal, render, workers, progress)
        for path in paths.values():
            publish(path)
        with atomic_write(dest_dir / DESCRIPTION, "w", encoding="utf-8") as file:
            file.write(description + "\n")
        journal.finish()
    return True


def _description(request: SynthRequest) -> str:
    """Return what determines the bytes of a set, as JSON."""
    return json.dumps({**dataclasses.asdict(request), "renderer": RENDERER_VERSION}, sort_keys=True)


def _is_there(dest_dir: Path, paths: dict[str, Path], description: str) -> bool:
    """Return whether a whole set of this description is there; raise where it would overwrite another one."""
    note = dest_dir / DESCRIPTION
    came = note.read_text(encoding="utf-8").strip() if note.is_file() else None
    there = [name for name, path in paths.items() if path.exists()]
    if came == description and len(there) == len(paths):
        return True
    if came is not None and came != description:
        raise ValueError(f"{dest_dir}: holds another set ({_difference(description, came)}); expected a new folder")
    if there and not journal_path(paths[IMAGES]).exists():
        raise ValueError(f"{dest_dir}: expected a folder without {there[0]}, came one that is in use")
    return False


def _difference(expected: str, came: str) -> str:
    """Name the settings in which two descriptions differ."""
    try:
        ours, theirs = json.loads(expected), dict(json.loads(came))
    except (ValueError, TypeError):
        return f"{DESCRIPTION} cannot be read"
    return ", ".join(f"{key} {theirs.get(key)} instead of {ours[key]}" for key in ours if ours[key] != theirs.get(key))


def _write(
    paths: dict[str, Path],
    request: SynthRequest,
    journal: Journal,
    render: RenderImages,
    workers: int,
    progress: Progress,
) -> None:
    """Render and write what is not there yet."""
    total = request.num_images
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(contextlib.closing(open_writer(path, journal.resumes))) for path in paths.values()
        ]
        first = _resume(request, writers)
        progress(first, total)
        tasks = [range(i, min(i + _IMAGES_PER_TASK, total)) for i in range(first, total, _IMAGES_PER_TASK)]
        done = first
        with contextlib.closing(map_ordered(render, tasks, workers)) as results:
            for images in results:
                for files in images:
                    for writer, name, data in zip(writers, _names(request, done), files):
                        writer.add(name, data)
                    done += 1
                progress(done, total)
        labels = request.labels(0, total).tolist()
        names = [archive_name(number, request.extension) for number in range(total)]
        identities = [[name, number // request.views_per_identity] for number, name in enumerate(names)]
        table = {"labels": list(zip(names, labels)), IDENTITIES_KEY: identities}
        writers[0].add(LABELS_NAME, json.dumps(table).encode())
        for writer in writers:
            writer.seal()
        journal.seal()


def _names(request: SynthRequest, number: int) -> list[str]:
    """Return the names of an image's files."""
    return [archive_name(number, request.extension), *[archive_name(number, "png")] * (len(request.files) - 1)]


def _resume(request: SynthRequest, writers: list[Writer]) -> int:
    """Make all writers go on at the first image that one of them lacks; return its number."""
    first = min(len(writer.recovered()) for writer in writers)
    first = min(first, request.num_images) // _IMAGES_PER_TASK * _IMAGES_PER_TASK
    for column, writer in enumerate(writers):
        writer.keep([_names(request, number)[column] for number in range(first)])
    return first
