"""Which folder a training command works in, and what stands in its options.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dnnlib import serialize
from dnnlib.atomic import atomic_write
from training.config import require
from training.run_folder import find_run_dirs, make_run_dir
from training.train_config import TrainConfig
from training.train_presets import replace_fields
from training.training_state import list_states, newest_state, state_nimg

OPTIONS_NAME = "options.json"
# What may differ between two parts of one run: how long it is, what it writes, and how it is computed.
_FREE_FIELDS = (
    "loop.total_kimg",
    "loop.snapshot_ticks",
    "loop.image_ticks",
    "loop.state_ticks",
    "loop.keep_states",
    "loop.metrics",
    "loop.workers",
    "loop.batch_gpu",
    "loop.max_skipped_steps",
    "precision",
)
# What may besides be changed on the way, where the run is named.
_ADJUSTABLE_FIELDS = (
    "optimizer.generator_lr",
    "optimizer.discriminator_lr",
    "warmup.generator_lr",
    "warmup.encoder_lr",
    "loss.r1_gamma",
    "loss.r1_gamma_mask",
    "loss.r1_gamma_parsing",
)


class Run(NamedTuple):
    """Where a command trains."""

    run_dir: Path
    state: Path | None
    """Training state to go on from; None starts."""
    changes: tuple[str, ...] = ()
    """What goes on differently, in words."""

    def start_nimg(self, config: TrainConfig) -> int:
        """Return the images after which the run begins or goes on."""
        return config.loop.start_nimg if self.state is None else state_nimg(self.state)


def run_name(config: TrainConfig, processes: int, desc: str | None) -> str:
    """Return the published name of a run, without its number: preset, data set, processes, batch, gamma."""
    dataset = Path(config.data.images[0]).stem
    parts = (config.preset, dataset, f"gpus{processes}", f"batch{config.loop.batch_size}")
    return "-".join([*parts, f"gamma{config.loss.r1_gamma:g}", *([desc] if desc else [])])


def choose_run(outdir: Path, name: str, config: TrainConfig, resume: str, report: Callable[[str], Any] = print) -> Run:
    """Find the run to go on with, or make the folder of a new one.

    A run that is named may go on with other learning rates and weights of R1.

    Args:
        outdir: folder of runs.
        name: of the run, see `run_name`.
        config: of the run.
        resume: 'auto', the last run of this name and configuration if there is one; 'never'; or the path of a run's
            folder or of a training state.
        report: takes lines about damaged states.

    Raises:
        ValueError: the folder or state that `resume` names is absent, of another configuration, or damaged.
    """
    if resume == "never":
        return Run(make_run_dir(outdir, name), None)
    if resume == "auto":
        for run_dir in find_run_dirs(outdir, name):
            if difference(run_dir, config) is None:
                return Run(run_dir, newest_state(run_dir, report))
        return Run(make_run_dir(outdir, name), None)
    path = Path(resume)
    require(path.exists(), "resume", "auto, never, a run folder or a training state", resume)
    run_dir = path if path.is_dir() else path.parent
    why = difference(run_dir, config, _ADJUSTABLE_FIELDS)
    if why is not None:
        raise ValueError(f"resume: {run_dir}: {why}; a new run with --resume-from takes over the weights alone")
    before = _read_config(run_dir)
    values = ((name, _get(before, name), _get(config, name)) for name in _ADJUSTABLE_FIELDS)
    changes = tuple(f"{name}: {new:g} from here on, {old:g} before" for name, old, new in values if old != new)
    if path.is_file():
        return Run(run_dir, path, changes)
    state = newest_state(run_dir, report)
    require(state is not None, f"resume: {run_dir}", "a whole training state", [p.name for p in list_states(run_dir)])
    return Run(run_dir, state, changes)


def difference(run_dir: Path, config: TrainConfig, adjustable: Sequence[str] = ()) -> str | None:
    """Say why a run cannot go on with a configuration; None if it can.

    Args:
        run_dir: folder of the run.
        config: that it is to go on with.
        adjustable: fields that may differ, besides those that always may.
    """
    try:
        came = _read_config(run_dir)
    except FileNotFoundError:
        return f"expected {OPTIONS_NAME} in the folder of a run, came none"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{OPTIONS_NAME} cannot be read: {error}"
    free = {name: _get(config, name) for name in (*_FREE_FIELDS, *adjustable)}
    different = _first_difference(config, replace_fields(came, free))
    return None if different is None else "expected the configuration of this command, came another " + different


def _read_config(run_dir: Path) -> TrainConfig:
    path = run_dir / OPTIONS_NAME
    return serialize.from_json(TrainConfig, json.loads(path.read_bytes())["config"], str(path))


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _first_difference(expected: Any, came: Any, where: str = "") -> str | None:
    """Name the first field in which two configurations differ."""
    if not dataclasses.is_dataclass(expected):
        return None if expected == came else f"{where}: {came!r} instead of {expected!r}"
    for field in dataclasses.fields(expected):
        path = f"{where}.{field.name}" if where else field.name
        found = _first_difference(getattr(expected, field.name), getattr(came, field.name), path)
        if found is not None:
            return found
    return None


def write_options(run_dir: Path, config: TrainConfig, command: Sequence[str], versions: dict[str, str]) -> None:
    """Write options.json: the configuration, the command that made it, and versions of packages."""
    contents = {"command": list(command), "versions": versions, "config": serialize.to_json(config)}
    with atomic_write(run_dir / OPTIONS_NAME, "w", encoding="utf-8") as file:
        json.dump(contents, file, indent=2)
        file.write("\n")
