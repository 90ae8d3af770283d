"""What a training run tells: lines, statistics and pictures, to files, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from dnnlib.atomic import atomic_write
from dnnlib.extras import import_extra
from torch_utils.training_stats import Stat
from training.run_folder import RunLock
from training.tick_clock import progress_line

LOG_NAME = "log.txt"
STATS_NAME = "stats.jsonl"


class RunLog:
    """Lines, statistics and pictures of a run. Only the main process of a run logs; in others all methods do nothing.

    What cannot be written any more, because a disk is full or a service is away, is dropped with a warning: a log is
    not worth a run.
    """

    def __init__(
        self,
        run_dir: str | Path,
        is_main: bool = True,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        start_nimg: int = 0,
    ) -> None:
        """Open the log of a new run, or of one that goes on.

        Args:
            run_dir: folder of the run.
            is_main: whether this process logs.
            tensorboard: whether to write curves for TensorBoard as well (extra `tracking`).
            wandb_project: project of Weights & Biases to send curves to (extra `wandb`); None does not.
            start_nimg: images after which the run begins or goes on. Statistics from beyond, of a part of the run that
                is done again, are removed.

        Raises:
            MissingExtraError: a package is not installed.
            OSError: the folder cannot be written to, or another process trains in it.
        """
        self.run_dir, self.is_main = Path(run_dir), is_main
        self._silent: set[str] = set()  # what has failed and was reported
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._lock: RunLock | None = None
        if not is_main:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(self.run_dir)
        cut_stats(self.run_dir / STATS_NAME, start_nimg)
        with open(self.run_dir / LOG_NAME, "a", encoding="utf-8"):
            pass  # an unwritable folder is an error now, later a warning
        if tensorboard:
            import_extra("tensorboard", "tracking")
            writer = import_extra("torch.utils.tensorboard", "tracking").SummaryWriter
            self._tensorboard = writer(str(self.run_dir), purge_step=start_nimg + 1)
        if wandb_project is not None:
            self._wandb = self._begin_wandb(import_extra("wandb", "wandb"), wandb_project)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the log. An exception is written to log.txt, and raised further."""
        if error is not None and self.is_main:
            self._append(LOG_NAME, "".join(traceback.format_exception(kind, error, trace)))
        self.close()

    def close(self) -> None:
        """End TensorBoard and Weights & Biases, and leave the folder to others."""
        with self._dropping("TensorBoard"):
            if self._tensorboard is not None:
                self._tensorboard.close()
        with self._dropping("Weights & Biases"):
            if self._wandb is not None:
                self._wandb.finish()
        self._tensorboard = self._wandb = None
        if self._lock is not None:
            self._lock.release()

    def line(self, text: str) -> None:
        """Write a line to standard output and log.txt."""
        if not self.is_main:
            return
        with self._dropping("standard output"):  # closed where the terminal is gone
            print(text, flush=True)
        self._append(LOG_NAME, text + "\n")

    def tick(self, stats: Mapping[str, Stat], scalars: Mapping[str, float], cur_nimg: int) -> None:
        """Write the statistics of a tick, and its progress line.

        A row of stats.jsonl is an object: `cur_nimg`, `timestamp` (seconds since 1970), and for each name `num`,
        `mean`, `std`, null where there is no number, and `nonfinite` where there were such values.

        Args:
            stats: what `Collector.reduce` returned.
            scalars: numbers of this tick, by name; those of `TickClock.tick` and Progress/... make the line.
            cur_nimg: images so far.
        """
        if not self.is_main:
            return
        self.line(progress_line(scalars))
        self._row({**stats, **{name: Stat.of(value) for name, value in scalars.items()}}, cur_nimg)

    def metrics(self, values: Mapping[str, float], cur_nimg: int) -> None:
        """Write metrics of a snapshot: a line, and a row of stats.jsonl in which their names begin with Metrics/."""
        if not self.is_main or not values:
            return
        self.line("metrics: " + "    ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self._row({f"Metrics/{name}": Stat.of(value) for name, value in values.items()}, cur_nimg)

    def _row(self, stats: Mapping[str, Stat], cur_nimg: int) -> None:
        """Write statistics to stats.jsonl and to the services."""
        row = {name: _stat_json(stat) for name, stat in sorted(stats.items())}
        timestamp = time.time()
        text = json.dumps({"cur_nimg": int(cur_nimg), "timestamp": timestamp, **row}, allow_nan=False)
        self._append(STATS_NAME, text + "\n")
        means = {name: stat.mean for name, stat in stats.items() if stat.num}
        with self._dropping("TensorBoard"):
            if self._tensorboard is not None:
                for name, mean in means.items():
                    self._tensorboard.add_scalar(name, mean, cur_nimg, walltime=timestamp)
                self._tensorboard.flush()
        with self._dropping("Weights & Biases"):
            if self._wandb is not None:
                self._wandb.log({**means, "cur_nimg": cur_nimg})

    def images(self, name: str, path: str | Path, cur_nimg: int) -> None:
        """Show a picture file in TensorBoard and Weights & Biases."""
        if not self.is_main:
            return
        with self._dropping("TensorBoard"):
            if self._tensorboard is not None:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                self._tensorboard.add_image(name, pixels, cur_nimg, dataformats="HWC")
        with self._dropping("Weights & Biases"):
            if self._wandb is not None:
                self._wandb.log({name: import_extra("wandb", "wandb").Image(str(path)), "cur_nimg": cur_nimg})

    def _append(self, name: str, text: str) -> None:
        """Add whole lines to a file of the run."""
        with self._dropping(name), open(self.run_dir / name, "ab") as file:
            # A line that was cut off by a kill or a full disk stays alone on its line.
            ending = b"\n" if file.tell() and not _ends_with_newline(self.run_dir / name) else b""
            file.write(ending + text.encode())

    def _begin_wandb(self, wandb: Any, project: str) -> Any:
        """Begin or go on with a run of Weights & Biases; None where that fails."""
        run_id = hashlib.sha256(os.fsencode(self.run_dir.resolve())).hexdigest()[:16]  # the same when the run goes on
        with self._dropping("Weights & Biases"):
            return wandb.init(project=project, name=self.run_dir.name, id=run_id, resume="allow", dir=str(self.run_dir))
        return None

    @contextlib.contextmanager
    def _dropping(self, what: str) -> Iterator[None]:
        """Drop what fails, and say so once."""
        try:
            yield
        except Exception as error:  # services fail in their own ways
            if what not in self._silent:
                self._silent.add(what)
                with contextlib.suppress(OSError, ValueError):
                    print(f"warning: {what}: {error}; what cannot be written is dropped", file=sys.stderr, flush=True)


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _stat_json(stat: Stat) -> dict[str, float | int | None]:
    mean, std = (value if math.isfinite(value) else None for value in (stat.mean, stat.std))
    row = {"num": stat.num, "mean": mean, "std": std}
    return {**row, "nonfinite": stat.nonfinite} if stat.nonfinite else row


# ---- stats.jsonl ----------------------------------------------------------------------------------------------------


def read_stats(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a stats.jsonl in order, without damaged ones."""
    with open(path, "rb") as file:
        return [row for row in map(_parse_row, file) if row is not None]


def cut_stats(path: str | Path, cur_nimg: int) -> int:
    """Remove the rows of a stats.jsonl beyond `cur_nimg` images, and damaged ones; returns how many were removed.

    The file is replaced as a whole, or not at all where nothing is removed.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    rows = ((line, _parse_row(line)) for line in lines)
    kept = [line for line, row in rows if row is not None and row["cur_nimg"] <= cur_nimg]
    if len(kept) < len(lines):
        with atomic_write(path) as file:
            file.writelines(kept)
    return len(lines) - len(kept)


def _parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("cur_nimg"), int) else None
