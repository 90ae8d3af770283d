"""Time and memory of a training run, and the line that tells of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import psutil
import torch


class TickClock:
    """Measures ticks: time for a thousand images, time left, and memory.

    A tick is training up to `tick`, then maintenance (statistics, pictures, files) up to `end_maintenance`.
    """

    def __init__(
        self,
        cur_nimg: int,
        total_nimg: int,
        device: torch.device | str = "cpu",
        elapsed_s: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin a tick.

        Args:
            cur_nimg: images so far.
            total_nimg: images at the end of training.
            device: whose memory is measured, besides that of the process.
            elapsed_s: time spent by earlier parts of the run.
            now: the time in seconds.
        """
        self._total_nimg, self._device, self._now = total_nimg, torch.device(device), now
        self._begin_nimg = self._tick_nimg = cur_nimg
        self._begin_s = self._tick_s = now()
        self._elapsed_before_s, self._maintenance_s = elapsed_s, 0.0

    @property
    def elapsed_s(self) -> float:
        """Time spent in the run, earlier parts included."""
        return self._elapsed_before_s + self._now() - self._begin_s

    def tick(self, cur_nimg: int) -> dict[str, float]:
        """End the training part of a tick.

        Returns:
            scalars by name, for `RunLog.tick`. `Timing/eta_sec` takes what comes to cost as much as what this process
            has done since it began, maintenance included.
        """
        now = self._now()
        kimg = (cur_nimg - self._tick_nimg) / 1000
        rate = (now - self._begin_s) / max(cur_nimg - self._begin_nimg, 1)
        scalars = {
            "Timing/sec_per_tick": now - self._tick_s,
            "Timing/sec_per_kimg": (now - self._tick_s) / kimg if kimg > 0 else math.nan,
            "Timing/maintenance_sec": self._maintenance_s,
            "Timing/total_sec": self.elapsed_s,
            "Timing/eta_sec": rate * max(self._total_nimg - cur_nimg, 0),
            **self._memory_gb(),
        }
        self._tick_nimg, self._tick_s = cur_nimg, now
        return scalars

    def end_maintenance(self) -> None:
        """Begin the training part of the next tick."""
        self._maintenance_s = self._now() - self._tick_s
        self._tick_s = self._now()

    def _memory_gb(self) -> dict[str, float]:
        scalars = {"Resources/cpu_mem_gb": psutil.Process().memory_info().rss / 2**30}
        if self._device.type == "cuda":
            scalars["Resources/gpu_mem_gb"] = torch.cuda.memory_allocated(self._device) / 2**30
            scalars["Resources/peak_gpu_mem_gb"] = torch.cuda.max_memory_allocated(self._device) / 2**30
            scalars["Resources/peak_gpu_mem_reserved_gb"] = torch.cuda.max_memory_reserved(self._device) / 2**30
            torch.cuda.reset_peak_memory_stats(self._device)
        return scalars


def format_duration(seconds: float) -> str:
    """Return a time to read: '12s', '3m 05s', '2h 03m', '4d 05h'.

    >>> format_duration(185)
    '3m 05s'
    """
    if not math.isfinite(seconds):
        return "?"
    seconds = max(round(seconds), 0)
    minutes, hours = seconds // 60, seconds // 3600
    if minutes == 0:
        return f"{seconds}s"
    if hours == 0:
        return f"{minutes}m {seconds % 60:02d}s"
    return f"{hours}h {minutes % 60:02d}m" if hours < 24 else f"{hours // 24}d {hours % 24:02d}h"


_PROGRESS_LINE: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("Progress/tick", lambda x: f"tick {x:<5.0f}"),
    ("Progress/kimg", lambda x: f"kimg {x:<9.1f}"),
    ("Timing/total_sec", lambda x: f"time {format_duration(x):<8}"),
    ("Timing/eta_sec", lambda x: f"left {format_duration(x):<8}"),
    ("Timing/sec_per_tick", lambda x: f"s/tick {x:<7.1f}"),
    ("Timing/sec_per_kimg", lambda x: f"s/kimg {x:<8.2f}"),
    ("Timing/maintenance_sec", lambda x: f"maintenance {x:<6.1f}"),
    ("Resources/cpu_mem_gb", lambda x: f"cpu GB {x:<6.2f}"),
    ("Resources/gpu_mem_gb", lambda x: f"gpu GB {x:<6.2f}"),
    ("Resources/peak_gpu_mem_gb", lambda x: f"peak {x:<6.2f}"),
    ("Progress/augment", lambda x: f"augment {x:.3f}"),
)


def progress_line(scalars: Mapping[str, float]) -> str:
    """Return the line of a tick from those of its scalars that are there."""
    return "  ".join(show(scalars[name]) for name, show in _PROGRESS_LINE if name in scalars).rstrip()
