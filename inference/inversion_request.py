"""What the projector asks for: photos, settings, and where results go."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dnnlib import serialize
from dnnlib.sources import local_path, resolve_demo
from dnnlib.util import file_sha256, source_name
from inference.inversion_results import METRICS, RESULT_FILES
from inference.inversion_settings import InversionSettings
from inference.inversion_work import Work, first_difference, read_json
from inference.photos import PhotoFile, list_photos
from training.config import require
from training.volumetric_rendering.renderer import RendererChoice

Status = Literal["new", "unfinished", "done", "in the way", "defective"]


@dataclass(frozen=True, kw_only=True)
class ResultSettings:
    """What is kept of an inversion besides pictures, latent and numbers."""

    save_video: bool = True
    """Make a video of the progress: target and synthesis side by side."""
    fps: int = 30
    video_interval: int = 2
    """Steps of the first stage from one frame to the next."""
    video_interval_pti: int = 10
    """The same in the second stage."""
    half: bool = False
    """Keep the tuned network as differences in float16."""
    export_full: bool = False
    """Also write the tuned network whole."""

    def __post_init__(self) -> None:
        for name in ("fps", "video_interval", "video_interval_pti"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class PhotoJob:
    """A photo, and where its results go."""

    index: int
    """In the list of photos of the target."""
    file: PhotoFile
    folder: Path


@dataclass(frozen=True, kw_only=True)
class InversionRequest:
    """Inversions of photos, and where their results go."""

    network: str
    target: Path
    """Folder with dataset.json, or one image."""
    outdir: Path
    subfolder: str = ""
    """Folder or photo of the target; a folder of this name is made in the output."""
    indices: tuple[int, ...] | None = (0,)
    """Which photos, in the order of the list; None is all."""
    camera: str | None = None
    mask: Path | None = None
    latent: Path | None = None
    """`.npz` with w-layers `w` `[1, L, 512]` to start from; None is the mean."""
    vgg: str | None = None
    """TorchScript file of the published perceptual distance; None is one that needs no file."""
    settings: InversionSettings = InversionSettings()
    kept: ResultSettings = ResultSettings()
    renderer: RendererChoice = "auto"
    device: str = "auto"
    resume: bool = True
    """Go on where a run with the same settings has stopped; False starts anew."""
    overwrite: bool = False
    """Replace results of other settings."""
    state_interval_s: float = 30.0
    """Shortest time between two states of a run; 0 saves one after every step."""

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.subfolder).parts
        require(
            not PurePosixPath(self.subfolder).is_absolute() and ".." not in parts,
            "--filename",
            "a name below --target",
            self.subfolder,
        )
        require(self.indices is None or self.indices, "--idx", "at least one photo", self.indices)

    def jobs(self) -> list[PhotoJob]:
        """List the chosen photos.

        Raises:
            ValueError: the target is no folder of photos with cameras and no photo with one, or has no such index.
            OSError: a file cannot be read.
        """
        target, results = self.target / self.subfolder, self.outdir / source_name(self.network)
        if self.outdir.resolve() != target.resolve():  # else only what this network has made is told from photos
            results = self.outdir
        files = list_photos(target, camera=self.camera, mask=self.mask, results=results)
        indices = range(len(files)) if self.indices is None else self.indices
        for index in indices:
            expected = f"0 to {len(files) - 1}, {len(files)} photos in {target}"
            require(index < len(files), "--idx", expected, index)
        subfolder = Path(self.subfolder) if target.is_dir() else Path(self.subfolder).parent
        folder = self.outdir / source_name(self.network) / subfolder
        return [PhotoJob(index=index, file=files[index], folder=folder / files[index].name) for index in indices]

    def identity(self, job: PhotoJob) -> dict[str, Any]:
        """Return all that decides about the results of a photo, as JSON data."""
        return {
            "settings": serialize.to_json(self.settings),
            "results": serialize.to_json(self.kept),
            "network": _source_identity(self.network),
            "photo": _file_identity(job.file.image),
            "camera": [float(value) for value in job.file.label],
            "camera_of": job.file.camera_of,
            "mask": _file_identity(job.file.mask) if job.file.mask else None,
            "latent": _file_identity(self.latent) if self.latent else None,
            "vgg": _source_identity(self.vgg) if self.vgg else None,
        }

    def status(self, job: PhotoJob) -> tuple[Status, str]:
        """Say what is there of a photo's results.

        Returns:
            the status, and a reason where it is 'in the way' (results of other settings, or files of others) or
            'defective' (the photo cannot be used).
        """
        if job.file.defect is not None:
            return "defective", job.file.defect
        folder = job.folder
        try:
            finished, begun = read_json(folder / METRICS), Work(folder, 0).plan()
        except ValueError as error:
            return "in the way", str(error)
        if finished is None and begun is None:
            there = [name for name in RESULT_FILES if (folder / name).exists()]
            return ("in the way", f"{folder / there[0]} is there already") if there else ("new", "")
        before = finished.get("made_from", {}) if finished is not None else begun
        difference = first_difference(before, self.identity(job))
        if difference is not None and finished is None and not Work(folder, 0).has_state():
            return "new", ""  # such as after an option that was refused
        if difference is not None:
            kind = "result" if finished is not None else "unfinished run"
            return "in the way", f"{folder} holds the {kind} of another command: {difference}"
        return ("unfinished" if finished is None else "done"), ""

    def plan(self) -> dict[str, Any]:
        """Return what would be done, as JSON data."""
        photos = []
        for job in self.jobs():
            status, reason = self.status(job)
            entry = {"index": job.index, "name": job.file.name, "image": job.file.image, "mask": job.file.mask}
            photos.append({**entry, "folder": job.folder, "status": status, "reason": reason or None})
        settings = serialize.to_json(self.settings)
        return {"network": self.network, "photos": photos, "settings": settings, "results": self.kept, "vgg": self.vgg}


def _source_identity(source: str) -> str:
    """Tell apart what a path, a URL or a preset stands for: by the contents of a local file, else by the name.

    Raises:
        OSError: there is no such file.
    """
    path = local_path(resolve_demo(source))
    return source if path is None else _file_identity(path)


def _file_identity(path: Path) -> str:
    stat = path.stat()
    return _file_identity_of(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _file_identity_of(path: str, size: int, mtime_ns: int) -> str:
    return f"sha256:{file_sha256(Path(path))}"
