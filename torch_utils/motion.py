"""Tell whether the main thread of this process gets on, and where it is."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from types import FrameType

import psutil
import torch
import torch.distributed as dist

_MOVING_SHARE = 0.02  # of one core; more is computing
_HERE = os.path.dirname(__file__)
_SUPERVISION = tuple(os.path.join(_HERE, f"{name}.py") for name in ("motion", "watchdog", "distributed", "gradients"))
_FOREIGN = (sysconfig.get_path("stdlib"), os.path.dirname(torch.__file__), "<frozen", *_SUPERVISION)
_COLLECTIVES = os.path.dirname(dist.__file__)


class Motion:
    """For how long the main thread has not moved; `sample` is to be called often, from another thread.

    A main thread moves if it is seen at different places, or if `progress` grows; if the process computes; if its child
    processes do; if it or one of them waits for a disk.

    Args:
        counts_cpu: whether computing is motion. Not where there is a GPU: a thread that waits for one spins.
        suspicious_s: child processes and disks are only looked at after this long without other motion.
    """

    _looking_s = 0.0  # computing time of this process that went into looking, which is no motion

    def __init__(self, counts_cpu: bool, suspicious_s: float) -> None:
        self.progress = 0
        self.is_exempt = False
        self.still_s = 0.0
        self._counts_cpu, self._suspicious_s = counts_cpu, suspicious_s
        self._place: tuple = ()
        self._sampled_at = time.monotonic()
        self._own = _Rate()
        self._children = _Rate()

    def sample(self, interval_s: float) -> None:
        """Look at the process.

        Args:
            interval_s: how often that happens; if this call comes later, the process itself was stopped meanwhile, and
                that time does not count as standing still.
        """
        now, place = time.monotonic(), (self.progress, *_places(_main_frame()))
        self.still_s += min(now - self._sampled_at, 2 * interval_s)
        self._sampled_at = now
        computes = self._own.is_moving(now, time.process_time() - Motion._looking_s) and self._counts_cpu
        if place != self._place or computes or self.is_exempt:
            self._place, self.still_s = place, 0.0

    def look_elsewhere(self) -> None:
        """Look at child processes and disks, if there is reason to."""
        if self.still_s <= self._suspicious_s:
            self._children = _Rate()
            return
        began_s = time.thread_time()
        if self._works_elsewhere():
            self.still_s = 0.0
        Motion._looking_s += time.thread_time() - began_s

    def where(self) -> tuple[str, bool]:
        """Return where the main thread is, such as `at train.py:12 (main)`, and whether it is in a collective."""
        frame = _main_frame()
        waits = any(place.f_code.co_filename.startswith(_COLLECTIVES) for place in _stack(frame))
        return ("waits at " if waits else "at ") + _own_place(frame), waits

    def _works_elsewhere(self) -> bool:
        try:
            process = psutil.Process()
            children = process.children(recursive=True)
            if any(one.status() == psutil.STATUS_DISK_SLEEP for one in (process, *children)):
                return True
            spent = [child.cpu_times() for child in children]
        except psutil.Error:  # one of them has just ended, which is motion
            return True
        return self._children.is_moving(time.monotonic(), sum(times.user + times.system for times in spent))


class _Rate:
    """Whether computing time grows."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None

    def is_moving(self, now: float, spent_s: float) -> bool:
        """Return whether it has grown by more than 2 % of a core since the last call at least half a second ago."""
        if self._last is None:
            self._last = (now, spent_s)
        then, before = self._last
        if now - then < 0.5:
            return False
        self._last = (now, spent_s)
        return abs(spent_s - before) > _MOVING_SHARE * (now - then)  # less: a child process has ended


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident)


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _places(frame: FrameType | None) -> tuple[tuple[int, int], ...]:
    return tuple((id(place.f_code), place.f_lasti) for place in _stack(frame))


def _own_place(frame: FrameType | None) -> str:
    """Return the innermost place that is neither in Python's library, nor in PyTorch, nor in what supervises."""
    places = list(_stack(frame))
    own = [place for place in places if not place.f_code.co_filename.startswith(_FOREIGN)]
    for place in own or places:
        return f"{os.path.basename(place.f_code.co_filename)}:{place.f_lineno} ({place.f_code.co_name})"
    return "an unknown place"
