"""Measure actions against each other: time, memory, floating-point operations and memory traffic."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dnnlib.atomic import atomic_write
from torch_utils import native
from torch_utils.memory import keep_freed_memory, release_kept_memory, stop_keeping_memory

Action = Callable[[], torch.Tensor]
GLIBC_TUNABLES = (
    "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296:glibc.malloc.top_pad=268435456"
)
_MIB = 2**20
_HIGH_WATER_MARK = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER_MARK = "5"  # proc(5): sets VmHWM to the present resident size


@dataclasses.dataclass(kw_only=True)
class Measurement:
    """What was seen of one action."""

    seconds: list[float]
    """Wall-clock time of each repetition."""
    cpu_seconds: list[float]
    """Processor time of each repetition, summed over threads."""
    gflop: float
    """Multiplications and additions in convolutions and matrix products, in 1e9."""
    gbyte: float
    """Bytes that the operations would move if each read its operands and wrote its result once, in 1e9."""
    peak_mib: float | None
    """Highest memory while it ran: resident on a CPU, allocated on a GPU. None where the system does not tell."""
    extra_mib: float | None
    """The part of it that was not in use before."""

    def to_json(self) -> dict[str, Any]:
        """Return all numbers, with median, min and max of the repetitions."""
        median_s = statistics.median(self.seconds)
        return {
            "median_s": median_s,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "median_cpu_s": statistics.median(self.cpu_seconds),
            "gflop_per_s": self.gflop / median_s,
            "gbyte_per_s": self.gbyte / median_s,
            **vars(self),
        }


def measure(
    actions: Mapping[str, Action], repeats: int, device: torch.device, long_s: float, report: Callable[[], None]
) -> tuple[dict[str, Measurement], float]:
    """Measure actions that do the same in different ways, in turns (A, B, A, B, ...).

    Each action runs once to count its operations, once to watch its memory, and then `repeats` times for its time. If
    one of them takes more than `long_s` seconds, there is only one run of each for everything. Counting costs some 20
    us per operation.

    Args:
        actions: by name.
        repeats: timed runs of each.
        device: that they compute on.
        long_s: see above.
        report: called after every run.

    Returns:
        The measurements by name, and the largest difference between the results of the actions, relative to the
        largest value, or absolute where that is below 1.
    """
    measurements, results = {}, []
    for name, action in actions.items():
        with peak_memory(device) as memory, _TrafficCounter() as traffic, FlopCounterMode(display=False) as flops:
            result, wall_s, cpu_s = _timed(action, device)
        measurements[name] = Measurement(
            seconds=[wall_s],
            cpu_seconds=[cpu_s],
            gflop=flops.get_total_flops() / 1e9,
            gbyte=traffic.num_bytes / 1e9,
            **memory,
        )
        results.append(result.double().cpu())
        report()
    difference = max(_difference(result, results[-1]) for result in results)
    if max(measurement.seconds[0] for measurement in measurements.values()) > long_s:
        return measurements, difference
    for name, action in actions.items():
        with peak_memory(device) as memory:  # counting keeps some tensors alive longer
            action()
        measurements[name] = dataclasses.replace(measurements[name], seconds=[], cpu_seconds=[], **memory)
        report()
    for _ in range(repeats):
        for name, action in actions.items():
            _, wall_s, cpu_s = _timed(action, device)
            measurements[name].seconds.append(wall_s)
            measurements[name].cpu_seconds.append(cpu_s)
            report()
    return measurements, difference


def _timed(action: Action, device: torch.device) -> tuple[torch.Tensor, float, float]:
    """Return the result of an action, and its wall-clock and processor time in seconds."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    result = action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start_s, time.process_time() - start_cpu_s


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


class _TrafficCounter(TorchDispatchMode):
    """Adds up the bytes of operands and results; views and empty memory move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if not is_view and "empty" not in func.__name__:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            # Expanded tensors are larger than their memory.
            self.num_bytes += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        return result


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float | None]]:
    """Yield a dict that has `peak_mib` and `extra_mib` of `Measurement` when the block has ended.

    On Linux the kernel keeps the highest resident size of a process exactly, and lets it be reset. Memory that this
    project and the C library keep for reuse is given back first; otherwise what ran before would count.
    """
    memory: dict[str, float | None] = {"peak_mib": None, "extra_mib": None}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield memory
        peak = torch.cuda.max_memory_allocated(device)
    else:
        _give_memory_back()
        before = psutil.Process().memory_info().rss
        can_reset = _reset_high_water_mark()
        yield memory
        peak = _high_water_mark() if can_reset else None
    if peak is not None:
        memory |= {"peak_mib": peak / _MIB, "extra_mib": max(0, peak - before) / _MIB}


def _give_memory_back() -> None:
    release_kept_memory()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        _HIGH_WATER_MARK.write_text(_RESET_HIGH_WATER_MARK)
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    """Return the highest resident size since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) * 1024


def environment(device: torch.device) -> dict[str, Any]:
    """Say what the numbers are measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@contextlib.contextmanager
def memory_and_kernels(ours: bool) -> Iterator[None]:
    """Keep freed memory and use native kernels while the body runs, or do neither."""
    if ours:
        keep_freed_memory()
    else:
        stop_keeping_memory()
    with contextlib.nullcontext() if ours else native.disabled():
        yield


def restart_with_glibc_tunables() -> None:
    """Start this program anew with `GLIBC_TUNABLES`, which glibc reads when a process starts, unless it has them."""
    if os.environ.get("GLIBC_TUNABLES") != GLIBC_TUNABLES:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GLIBC_TUNABLES": GLIBC_TUNABLES})


def write_report(path: Path, settings: dict[str, Any], machine: dict[str, Any], results: dict[str, Any]) -> None:
    """Write what a benchmark found to a JSON file."""
    with atomic_write(path, "w") as file:
        json.dump({"settings": settings, "environment": machine, "results": results}, file, indent=2, allow_nan=False)


def markdown_table(rows: list[list[str]]) -> str:
    """Return rows of cells, the first of them the heads, as a Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
