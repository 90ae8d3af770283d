"""Signals that ask a training run to stop: the schedulers' warnings before they take a machine away, and Ctrl-C."""

from __future__ import annotations

import datetime
import os
import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

# SIGTERM: kill, systemd, Kubernetes, torchrun. SIGUSR1: sbatch --signal=USR1@60. SIGINT: Ctrl-C.
_WATCHED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class SignalWatch:
    """Notes signals instead of dying from them, so that a run can save its state and end by itself.

    A second Ctrl-C interrupts at once. Other signals may come repeatedly, because schedulers send a warning first and
    SIGTERM later; what ends a run that does not stop is their SIGKILL.

        with SignalWatch() as watch:
            while not done:
                step()
                if watch.any_rank_requested():
                    save_and_leave()

    Agreement between processes costs one all-reduce of a byte among CPUs for every call, a fraction of a millisecond on
    one machine. It goes through gloo also where gradients go through NCCL, so that it never waits for a GPU.
    """

    def __init__(self, timeout: datetime.timedelta | None = None) -> None:
        """Begin without a signal.

        Args:
            timeout: after which `any_rank_requested` raises if another process does not call it; None is the default of
                torch.distributed. The longest pause of one process (snapshots, image grids) must fit.
        """
        self.timeout = timeout
        self.reason: str | None = None
        """Name of the first signal that came to this process, such as 'SIGTERM'."""
        self._group: dist.ProcessGroup | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.reason is not None

    def __enter__(self) -> SignalWatch:
        """Begin to watch. Under torch.distributed every process must do so.

        Raises:
            ValueError: this is not the main thread, which alone can watch signals.
        """
        self._pid = os.getpid()
        if _is_distributed():
            self._group = self._make_group()
        for number in _WATCHED:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the signals back to who had them."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        self._group = None

    def any_rank_requested(self) -> bool:
        """Whether any process was asked to stop; every process must call it equally often, and all get the same."""
        if self._group is None:
            return self.requested
        flag = torch.tensor([self.requested], dtype=torch.uint8)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        if bool(flag) and self.reason is None:
            self.reason = "a signal to another process"
        return bool(flag)

    def _make_group(self) -> dist.ProcessGroup:
        if dist.get_backend() == "gloo" and self.timeout is None:
            return dist.group.WORLD
        return dist.new_group(backend="gloo", timeout=self.timeout)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if os.getpid() != self._pid:  # a forked child inherited this handler, and is to die as usual
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and self.reason == "SIGINT":
            raise KeyboardInterrupt
        if self.reason is None or number == signal.SIGINT:
            self.reason = signal.Signals(number).name


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
