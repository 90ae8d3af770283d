"""Inversions of photos from the first step to the files, in runs that can be killed at any moment and go on."""

from __future__ import annotations

import dataclasses
import errno
import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tqdm import tqdm

from dnnlib import serialize
from inference import inversion_results as results
from inference.inversion import PivotalTuning, Projection
from inference.inversion_request import InversionRequest, PhotoJob
from inference.inversion_stepper import place_photo
from inference.inversion_work import Work
from inference.loading import load_generator
from inference.photos import read_photo
from inference.video_request import load_latent
from torch_utils import distributed
from torch_utils.pictures import save_png, tile
from training.config import require
from training.network_difference import write_difference
from training.perceptual import PerceptualDistance, load_perceptual_distance
from training.snapshots import save_networks
from training.triplane import TriPlaneGenerator

STAGES = ("w", "pti")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no room, or not writable: of no photo in particular
_BAR_INTERVAL_S, _LOG_INTERVAL_S = 0.1, 10.0  # between two states of a bar, on a terminal and in a file
_STAGE_NAMES = {"w": "latent", "pti": "tuning"}


@dataclass(frozen=True, kw_only=True)
class PhotoOutcome:
    """How the inversion of a photo ended."""

    job: PhotoJob
    status: Literal["made", "done before", "failed"]
    message: str
    """One line."""


class InversionStopped(KeyboardInterrupt):
    """The run was asked to stop, and has saved its state; the message says where it stands."""


def invert_photos(
    request: InversionRequest,
    report: Callable[[str], Any] = print,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[PhotoOutcome]:
    """Invert the photos of a request, this process's share under torchrun.

    A photo that cannot be inverted does not keep the others from it.

    Args:
        request: what to do.
        report: takes one line at a time.
        should_stop: asked after every step; True ends the run with its state saved.

    Yields:
        how it went, after each photo.

    Raises:
        InversionStopped: `should_stop` said so.
        ValueError, OSError: what all photos need is not there: the target, the network, the distance, room on a disk
            that can be written.
    """
    tools: _Tools | None = None
    for job in distributed.shard(request.jobs()):
        try:
            if _is_done(request, job):
                yield PhotoOutcome(job=job, status="done before", message=f"{job.folder}: done already")
                continue
        except (ValueError, OSError) as error:
            yield PhotoOutcome(job=job, status="failed", message=one_line(error))
            continue
        if tools is None:
            tools = _Tools.load(request)
            report(_describe_distance(tools.distance, request.vgg))
        try:
            _PhotoRun(request, job, tools, report, should_stop).run()
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) in _DISK_ERRORS:
                raise
            yield PhotoOutcome(job=job, status="failed", message=one_line(error))
        else:
            yield PhotoOutcome(job=job, status="made", message=f"wrote {job.folder}")


def _is_done(request: InversionRequest, job: PhotoJob) -> bool:
    """Whether there is nothing to do for a photo.

    Raises:
        ValueError: the photo cannot be used.
        FileExistsError: something would be replaced without permission.
    """
    status, reason = request.status(job)
    if status == "defective":
        raise ValueError(reason)
    if status == "done" and request.resume:
        return True
    if status == "in the way" and not request.overwrite:
        raise FileExistsError(f"{reason}; give --overwrite to replace it")
    if status == "done" and not request.overwrite:
        raise FileExistsError(f"{job.folder} is done already; give --overwrite to make it anew")
    return False


@dataclass(frozen=True)
class _Tools:
    """What the inversions of all photos share."""

    generator: TriPlaneGenerator
    distance: PerceptualDistance
    device: torch.device
    initial_ws: torch.Tensor | None

    @classmethod
    def load(cls, request: InversionRequest) -> _Tools:
        device = distributed.resolve_device(request.device)
        generator = load_generator(request.network, device, request.renderer)
        distance = load_perceptual_distance(request.vgg, device)
        initial_ws = None if request.latent is None else load_latent(request.latent, generator)
        if initial_ws is not None:
            require(len(initial_ws) == 1, f"{request.latent}: w", "one latent", len(initial_ws))
        return cls(generator, distance, device, initial_ws)


class _FeaturesOnce:
    """A distance that computes the features of one image, the target, once."""

    def __init__(self, distance: PerceptualDistance, target: torch.Tensor) -> None:
        self._distance, self._target, self.name = distance, target, distance.name

    @functools.cached_property
    def target_features(self) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return self._distance.features(self._target)

    def features(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.target_features if image is self._target else self._distance.features(image)

    def distance(self, image: torch.Tensor, target: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self._distance.distance(image, target)


class _PhotoRun:
    """The inversion of one photo."""

    def __init__(
        self,
        request: InversionRequest,
        job: PhotoJob,
        tools: _Tools,
        report: Callable[[str], Any],
        should_stop: Callable[[], bool],
    ) -> None:
        self.request, self.job, self.tools = request, job, tools
        self.report, self.should_stop = report, should_stop
        self.folder, self.settings = job.folder, request.settings
        self.work = Work(job.folder, request.state_interval_s)

    def run(self) -> None:
        """Go from wherever the run stands to the end."""
        photo = read_photo(self.job.file, self.tools.generator.img_resolution)
        if photo.note:
            self.report(f"{photo.name}: {photo.note}")
        self.photo = place_photo(photo, self.tools.generator)
        self.distance = _FeaturesOnce(self.tools.distance, self.photo.image)
        with self.work.locked():
            if _is_done(self.request, self.job):  # by another process, since the list was made
                self.work.remove()
                return
            self.work.remove_stale_temps(results.RESULT_FILES)
            self._clear_way()
            self.progress = self.work.load()
            if self.progress.seconds:
                spent_s = sum(self.progress.seconds.values())
                self.report(f"{self.folder}: goes on where it stopped, after {spent_s:.0f} s of work")
            save_png(self.folder / results.TARGET, results.colors(self.photo.image))
            if self.progress.stage == "w":
                self._project()
            self._tune()
            self.work.remove()

    def _clear_way(self) -> None:
        """Remove what may be replaced, and note what is being made."""
        status, _ = self.request.status(self.job)
        if status == "unfinished" and self.request.resume:
            return
        (self.folder / results.METRICS).unlink(missing_ok=True)  # first: without it, nothing counts as done
        self.work.clear()
        for name in results.RESULT_FILES:
            (self.folder / name).unlink(missing_ok=True)
        self.work.begin(self.request.identity(self.job))

    # ---- stages ----

    def _project(self) -> None:
        stepper = Projection(self.tools.generator, self.photo, self.distance, self.settings, self.tools.initial_ws)
        image = self._advance(stepper, self.request.kept.video_interval)
        save_png(self.folder / results.PROJECTED, results.colors(image))
        pivot = {"ws": stepper.ws, "label": stepper.label}
        pivot |= {f"noise/{name}": buffer for name, buffer in stepper.noise_buffers.items()}
        self._measure(image)
        self.progress = dataclasses.replace(
            self.progress,
            stage="pti",
            stepper=None,
            pivot={name: tensor.detach().cpu().clone() for name, tensor in pivot.items()},
        )
        self.work.save(self.progress)

    def _tune(self) -> None:
        pivot = {name: tensor.to(self.tools.device) for name, tensor in self.progress.pivot.items()}
        noise = {name.removeprefix("noise/"): value for name, value in pivot.items() if name.startswith("noise/")}
        stepper = PivotalTuning(
            *(self.tools.generator, self.photo, self.distance, self.settings, pivot["ws"], pivot["label"]),
            noise or None,
        )
        image = self._advance(stepper, self.request.kept.video_interval_pti)
        self._measure(image)
        for write in (self._write_pictures, self._write_video, self._write_latent_and_network):
            write(stepper, image)
            self._stop_if_asked(stepper)
        self._write_metrics(stepper)

    def _advance(self, stepper: Projection | PivotalTuning, frame_interval: int) -> torch.Tensor:
        """Take the steps of a stage that are left, and return its last image `[1, 3, H, W]`."""
        stage = self.progress.stage
        if self.progress.stepper is not None:
            stepper.load_state_dict(self.progress.stepper)
            self.progress.stepper = None  # the stepper has its own copy
        spent_s, started = self.progress.seconds.get(stage, 0.0), time.monotonic()
        with tqdm(
            total=stepper.num_steps,
            initial=stepper.step_index,
            desc=f"{self.job.file.name}: {_STAGE_NAMES[stage]}",
            unit="step",
            position=distributed.local_rank(),
            mininterval=_BAR_INTERVAL_S if sys.stderr.isatty() else _LOG_INTERVAL_S,
        ) as bar:
            while not stepper.finished:
                if stepper.step_index % frame_interval == 0 and not (stage == "pti" and stepper.step_index == 0):
                    self._save_frame(stepper)
                bar.set_postfix({name: f"{value:.4g}" for name, value in stepper.step().items()}, refresh=False)
                bar.update()
                self.progress.seconds[stage] = spent_s + time.monotonic() - started
                self._stop_if_asked(stepper)
                if self.work.is_save_due():
                    self._save(stepper)
        image = stepper.render()
        self._save_frame(stepper, image)
        return image

    def _save_frame(self, stepper: Projection | PivotalTuning, image: torch.Tensor | None = None) -> None:
        """Keep a frame for the video; a run that goes on does not render again what it finds."""
        if not self.request.kept.save_video:
            return
        stage, step = self.progress.stage, stepper.step_index
        if not self.work.frame_path(stage, step).exists():
            self.work.save_frame(stage, step, results.colors(stepper.render() if image is None else image))

    def _save(self, stepper: Projection | PivotalTuning) -> None:
        self.work.save(dataclasses.replace(self.progress, stepper=dict(stepper.state_dict())))

    def _stop_if_asked(self, stepper: Projection | PivotalTuning) -> None:
        if self.should_stop():
            self._save(stepper)
            where = f"{_STAGE_NAMES[self.progress.stage]} step {stepper.step_index} of {stepper.num_steps}"
            raise InversionStopped(f"{self.job.file.name}: stopped after {where}; the same command goes on from there")

    # ---- results ----

    def _measure(self, image: torch.Tensor) -> None:
        values = results.measure(image, self.photo.image, self.distance, self.distance.target_features, self.photo.mask)
        self.progress.results[self.progress.stage] = values

    def _write_pictures(self, stepper: PivotalTuning, image: torch.Tensor) -> None:
        tuned = results.colors(image)
        save_png(self.folder / results.TUNED_IMAGE, tuned)
        views = results.other_views(stepper.generator, stepper.ws, stepper.label, self.settings.seed)
        first = [results.load_png(self.folder / name) for name in (results.TARGET, results.PROJECTED)]
        save_png(self.folder / results.STRIP, tile([*first, tuned, *views], columns=6))

    def _write_video(self, stepper: PivotalTuning, image: torch.Tensor) -> None:
        if self.request.kept.save_video:
            target = results.colors(self.photo.image)
            frames = self.work.frames(STAGES)
            results.save_progress_video(self.folder / results.VIDEO, target, frames, self.request.kept.fps)

    def _write_latent_and_network(self, stepper: PivotalTuning, image: torch.Tensor) -> None:
        request, settings = self.request, serialize.dumps(self.settings)
        results.save_latent(
            *(self.folder / results.LATENT, stepper.ws, stepper.label, settings, self.settings.seed, request.network)
        )
        provenance = {"tool": "projector.py", "photo": self.job.file.name, "settings": serialize.to_json(self.settings)}
        write_difference(
            *(self.folder / results.NETWORK, self.tools.generator, stepper.generator, request.network),
            half=request.kept.half,
            provenance=provenance,
        )
        if request.kept.export_full:
            provenance = {**provenance, "base": request.network}
            save_networks(self.folder / results.FULL_NETWORK, {"G_ema": stepper.generator}, provenance)

    def _write_metrics(self, stepper: PivotalTuning) -> None:
        steps = {"w": self.settings.projection.num_steps, "pti": self.settings.tuning.num_steps}
        stages = {
            stage: {"steps": steps[stage], **self.progress.results[stage], "seconds": self.progress.seconds[stage]}
            for stage in STAGES
        }
        metrics = {
            "photo": self.job.file.name,
            "image": str(self.job.file.image),
            "network": self.request.network,
            "distance": self.distance.name,
            "device": str(self.tools.device),
            "stages": stages,
            "camera": [float(value) for value in stepper.label.flatten()],
            "made_from": self.request.identity(self.job),
        }
        results.save_json(self.folder / results.METRICS, metrics)


def _describe_distance(distance: PerceptualDistance, vgg: str | None) -> str:
    hint = "" if vgg else "; --vgg FILE takes the published one"
    return f"perceptual distance: {distance.name}{hint}"


def one_line(error: BaseException) -> str:
    """Return an error as one line, with the file that it is about."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
