"""The scratch folder of an inversion: what a killed run needs to go on, until it is done."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dnnlib.atomic import atomic_write
from torch_utils.tensor_file import open_tensor_file, write_tensor_file

try:
    import fcntl
except ImportError:  # Windows: two processes that invert the same photo then only waste work
    fcntl = None

WORK_FOLDER = ".work"
_FRAMES = "frames"
STATE_KIND = "spherehead-inversion-state"
_SAVING_SHARE = 0.05  # of the time at most
_JPEG_QUALITY = 95  # better than what the video keeps


@dataclass
class Progress:
    """How far an inversion has come."""

    stage: str = "w"
    """'w', 'pti'."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time spent so far, by stage."""
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    """Measurements of finished stages."""
    stepper: dict[str, torch.Tensor] | None = None
    """State of the stage's stepper; None is its beginning."""
    pivot: dict[str, torch.Tensor] = field(default_factory=dict)
    """What the first stage hands to the second."""


class Work:
    """The folder `.work` in the folder of a photo.

    `run.json` says what the run is to make, `state.safetensors` how far it has come, and `frames/` holds one small
    file for every frame of the video. A state is written at most so often that saving takes a twentieth of the time.

    Args:
        folder: of the photo.
        interval_s: shortest time between two states; 0 is after every step.
    """

    def __init__(self, folder: Path, interval_s: float) -> None:
        self.path = folder / WORK_FOLDER
        self._state, self._plan = self.path / "state.safetensors", self.path / "run.json"
        self._interval_s, self._pause_s, self._saved_at = interval_s, interval_s, time.monotonic()

    # ---- the folder ----

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out for the time of a `with` block; a killed process lets them in.

        Raises:
            ValueError: another process is at work here.
            OSError: the folder cannot be made.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        with open(self.path / "lock", "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.path.parent}: expected no other process at work here, came one") from None
            except OSError:  # a file system without locks
                pass
            yield

    def plan(self) -> dict[str, Any] | None:
        """Return what `begin` was given; None where nothing has begun.

        Raises:
            ValueError: the file is damaged.
        """
        return read_json(self._plan)

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Note what the run is to make; only then other files are written."""
        with atomic_write(self._plan, "w", encoding="utf-8") as file:
            json.dump(plan, file, indent=1, allow_nan=False)

    def clear(self) -> None:
        """Forget a run; `run.json` goes first, so that what is half removed counts as none."""
        self._plan.unlink(missing_ok=True)
        self._state.unlink(missing_ok=True)
        shutil.rmtree(self.path / _FRAMES, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder."""
        self.clear()
        shutil.rmtree(self.path, ignore_errors=True)

    def remove_stale_temps(self, names: Collection[str]) -> None:
        """Remove what killed runs left of files that they were writing: here, and of these names in the folder above.

        Only the holder of the lock may call it.
        """
        for folder, stems in ((self.path, ("state", "run")), (self.path.parent, {Path(name).stem for name in names})):
            for stem in stems:
                for path in folder.glob(f".{stem}.*.tmp.*"):
                    path.unlink(missing_ok=True)

    # ---- the state ----

    def is_save_due(self) -> bool:
        """Whether enough time has passed since the last state."""
        return time.monotonic() - self._saved_at >= self._pause_s

    def has_state(self) -> bool:
        """Whether there is a state, whole or damaged."""
        return self._state.exists()

    def save(self, progress: Progress) -> None:
        """Write a state, which replaces the one before when it is complete."""
        started = time.monotonic()
        tensors = {f"pivot/{name}": tensor for name, tensor in progress.pivot.items()}
        tensors |= {f"stepper/{name}": tensor for name, tensor in (progress.stepper or {}).items()}
        header = {
            "stage": progress.stage,
            "begun": progress.stepper is not None,
            "seconds": progress.seconds,
            "results": progress.results,
        }
        write_tensor_file(self._state, STATE_KIND, tensors, header)
        self._saved_at = time.monotonic()
        took_s = self._saved_at - started
        self._pause_s = max(self._interval_s, took_s / _SAVING_SHARE) if self._interval_s else 0.0

    def load(self) -> Progress:
        """Read the state; the beginning where there is none.

        Raises:
            ValueError: the file is damaged.
        """
        if not self.has_state():
            return Progress()
        try:
            with open_tensor_file(self._state, STATE_KIND) as file:
                tensors, header = {name: file.read(name) for name in file.specs}, file.header
            pivot, stepper = _strip(tensors, "pivot/"), _strip(tensors, "stepper/")
            return Progress(
                stage=header["stage"],
                seconds=header["seconds"],
                results=header["results"],
                stepper=stepper if header["begun"] else None,
                pivot=pivot,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._state}: {error}; give --resume false to start anew") from error

    # ---- frames ----

    def frame_path(self, stage: str, step: int) -> Path:
        """Return the file of the frame after a number of steps of a stage."""
        return self.path / _FRAMES / f"{stage}-{step:06d}.jpg"

    def save_frame(self, stage: str, step: int, image: np.ndarray) -> None:
        """Keep a frame uint8 `[H, W, 3]`."""
        with atomic_write(self.frame_path(stage, step)) as file:
            Image.fromarray(image).save(file, format="jpeg", quality=_JPEG_QUALITY, subsampling=0)

    def frames(self, stages: tuple[str, ...]) -> Iterator[np.ndarray]:
        """Yield the frames uint8 `[H, W, 3]` of stages, in order."""
        for stage in stages:
            for path in sorted((self.path / _FRAMES).glob(f"{stage}-*.jpg")):
                with Image.open(path) as image:
                    yield np.asarray(image.convert("RGB"))


def _strip(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object of a file; None where there is no file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, came {type(data).__name__}")
    return data


def first_difference(came: Any, expected: Any, where: str = "") -> str | None:
    """Describe the first place in which two JSON values differ, by its dotted name; None where they are equal."""
    if isinstance(came, dict) and isinstance(expected, dict):
        for key in [*expected, *(key for key in came if key not in expected)]:
            told = first_difference(came.get(key), expected.get(key), f"{where}.{key}" if where else key)
            if told is not None:
                return told
        return None
    if came == expected:
        return None
    return f"{where} was {_short(came)}, and is {_short(expected)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
