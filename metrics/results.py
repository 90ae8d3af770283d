"""What metrics found, for programs and for people: lines of JSON beside the network, and tables."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnnlib.sources import file_name, without_credentials
from metrics.network_data import run_folder
from training.tick_clock import format_duration

if TYPE_CHECKING:
    from metrics.evaluation import EvaluationSettings
    from metrics.metric_main import MetricResult
    from metrics.registry import Curve
    from training.train_config import DataConfig

_GAP = "  "
_NOTHING = "-"
_UNTOLD_SETTINGS = ("cache_dir", "progress", "workers", "render_ahead", "mode")  # no number depends on the first four


@dataclass(frozen=True, kw_only=True)
class ResultContext:
    """What a result depends on beside the metric."""

    network: str
    """Path, URL or name."""
    data: DataConfig
    settings: EvaluationSettings
    num_ranks: int = 1
    is_beside_network: bool = True
    """Whether lines go to the run folder of the network, if it lies in one; there, its name says which it is."""


# ---- lines ----


def result_record(result: MetricResult, context: ResultContext) -> dict[str, Any]:
    """Return a result as JSON data, with the published keys and ours.

    Published are `results`, `metric`, `total_time` (seconds), `total_time_str`, `num_gpus` (processes), `mode`,
    `snapshot_pkl` (name of the file in lines beside it, elsewhere the network as given) and `timestamp` (seconds since
    1970). Ours are `curve` and `details`, null and empty where a metric has none, `detectors`, `data`, `settings`, and
    `not_applicable`, the reason why there is no number, or null. Numbers that are not finite are null.
    """
    values = result.values
    is_near = context.is_beside_network and run_folder(context.network) is not None
    name = file_name(context.network) if is_near else without_credentials(context.network)
    settings = dataclasses.asdict(context.settings)
    record = {
        "results": {} if values is None else dict(values.values),
        "metric": result.metric,
        "total_time": result.seconds,
        "total_time_str": format_duration(result.seconds),
        "num_gpus": context.num_ranks,
        "mode": context.settings.mode,
        "snapshot_pkl": name,
        "timestamp": time.time(),
        "not_applicable": result.reason,
        "curve": None if values is None or values.curve is None else dataclasses.asdict(values.curve),
        "details": {} if values is None else dict(values.details),
        "detectors": list(result.detectors),
        "data": dataclasses.asdict(context.data),
        "settings": {key: value for key, value in settings.items() if key not in _UNTOLD_SETTINGS},
    }
    return _json(record)


def _json(value: Any) -> Any:
    """Return JSON data: null for numbers that are not finite, lists for sequences and arrays, text for the rest."""
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_json(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and PyTorch
        return _json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def prepare_folder(folder: Path) -> None:
    """Make the folder of lines, before anything is computed.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder}: expected a folder to write results to, but it is read-only; see --outdir")


def append_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Append a result to `metric-<name>.jsonl` in a folder; a line is there whole or not at all.

    Several processes may do so at once. Half a line that a crash left behind stays a line of its own.

    Returns:
        The file.

    Raises:
        OSError: the disk is full, or the file cannot be written to.
    """
    path = folder / f"metric-{record['metric']}.jsonl"
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    with open(path, "ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        written = file.write(line)  # one call, which a file opened for appending does not mix with those of others
        if written < len(line):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(file.fileno())
    return path


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the results in a file of lines, in order; what is no JSON object is left out."""
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


# ---- tables ----


def results_table(results: Sequence[MetricResult]) -> str:
    """Return results as text: numbers with their times, curves, and what the numbers depend on."""
    rows = [["metric", "value", "time"]]
    for result in results:
        time_shown = format_duration(result.seconds)
        if result.values is None:
            rows.append([result.metric, _NOTHING, time_shown])
            continue
        for position, (name, value) in enumerate(result.values.values.items()):
            shown = name if name.startswith(result.metric) else f"{_GAP}{name}"
            rows.append([shown, _number(value), time_shown if position == 0 else ""])
    curves = {result.metric: result.values.curve for result in results if _has_curve(result)}
    parts = [_aligned(rows), *_curve_tables(curves)]
    return "\n\n".join([*parts, *_notes(results)]) + "\n"


def comparison_table(columns: Mapping[str, Sequence[MetricResult]]) -> str:
    """Return the results of several networks as text: a row for each network, columns for the numbers of each metric.

    Args:
        columns: results by the name of the network; some networks may lack some.
    """
    found = {network: {result.metric: result for result in results} for network, results in columns.items()}
    metrics = list(dict.fromkeys(metric for results in found.values() for metric in results))
    numbers = {network: _numbers(results.values()) for network, results in found.items()}
    names = list(dict.fromkeys(name for values in numbers.values() for name in values))
    rows = [["network", *names]]
    rows += [[network, *(_number(values.get(name)) for name in names)] for network, values in numbers.items()]
    curves = {
        f"{metric}, {network}": results[metric].values.curve
        for metric in metrics
        for network, results in found.items()
        if metric in results and _has_curve(results[metric])
    }
    every = [result for results in columns.values() for result in results]
    return "\n\n".join([_aligned(rows), *_curve_tables(curves), *_notes(every)]) + "\n"


def _numbers(results: Iterable[MetricResult]) -> dict[str, float | None]:
    """Return the numbers that have the name of their metric, or begin with it; None where it is not applicable."""
    numbers: dict[str, float | None] = {}
    for result in results:
        values = {result.metric: None} if result.values is None else result.values.values
        numbers |= {name: value for name, value in values.items() if name.startswith(result.metric)}
    return numbers


def _has_curve(result: MetricResult) -> bool:
    return result.values is not None and result.values.curve is not None


def _curve_tables(curves: Mapping[str, Curve]) -> list[str]:
    """Return a table for each set of curves over the same places."""
    groups: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for name, curve in curves.items():
        groups.setdefault((curve.x_name, tuple(curve.x)), []).append(name)
    tables = []
    for (x_name, x), names in groups.items():
        rows = [[f"by {x_name}", *(f"{place:g}" for place in x)]]
        rows += [[name, *(_number(value) for value in curves[name].y)] for name in names]
        tables.append(_aligned(rows))
    return tables


def _notes(results: Sequence[MetricResult]) -> list[str]:
    """Return what is not in the numbers, as lines in one block; an empty list where there is nothing."""
    reasons = dict.fromkeys(
        f"{result.metric}: not applicable: {result.reason.removeprefix(f'{result.metric}: ')}"
        for result in results
        if result.reason
    )
    detectors = [detector for result in results for detector in result.detectors]
    named = dict.fromkeys(f"detector {detector['name']}; resize: {detector['resize']}" for detector in detectors)
    noted = dict.fromkeys(note for result in results if result.values is not None for note in result.values.notes)
    lines = [*reasons, *named, *noted]
    return ["\n".join(lines)] if lines else []


def _number(value: float | None) -> str:
    return _NOTHING if value is None or not math.isfinite(value) else f"{value:.5g}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as text in columns, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        _GAP.join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
