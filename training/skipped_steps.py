"""Optimiser steps that were skipped for non-finite gradients: counted, named, and ended when there are too many."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

_MAX_NAMES_SHOWN = 5
_LAG_ON_CUDA = 16  # phases; so long after it was queued, the value of a flag is there without waiting


class TrainingDivergedError(ValueError):
    """Gradients stayed non-finite; the message holds the diagnosis."""


class PhaseRecord(NamedTuple):
    """What a phase worked on, for a message about it."""

    phase: str
    network: str
    """'G' or 'D', whose optimiser step it was."""
    cur_nimg: int
    indices: tuple[int, ...]
    """Images of the data set in this process's share of the batch."""


class SkippedSteps:
    """Watch the flags of optimiser steps without stopping the device for them.

    On CUDA a flag is copied to the host beside the computation and looked at `_LAG_ON_CUDA` phases later, always the
    same number, so that all processes, whose flags agree, act at the same step. On a CPU it is looked at once.

    Args:
        device: of the flags.
        limit: steps of one network in a row that may be skipped.
        total: how many were skipped before (of an earlier part of the run).
    """

    def __init__(self, device: torch.device, limit: int, total: int = 0) -> None:
        self.limit, self.total = limit, total
        self.in_a_row = {"G": 0, "D": 0}
        self._lag = _LAG_ON_CUDA if device.type == "cuda" else 0
        self._pending: deque[tuple[PhaseRecord, torch.Tensor]] = deque()

    def add(self, record: PhaseRecord, finite: torch.Tensor) -> list[PhaseRecord]:
        """Note the flag (1 applied, 0 skipped) of a step; return the records of steps now known to be skipped."""
        if self._lag:
            host = torch.empty((), dtype=finite.dtype, pin_memory=True)
            finite = host.copy_(finite, non_blocking=True)
        self._pending.append((record, finite))
        return self._look(self._lag)

    def flush(self) -> list[PhaseRecord]:
        """Look at all flags that are left, for which the device must have finished; return as `add`."""
        if self._lag:
            torch.cuda.synchronize()
        return self._look(0)

    def _look(self, leave: int) -> list[PhaseRecord]:
        skipped = []
        while len(self._pending) > leave:
            record, finite = self._pending.popleft()
            if float(finite) == 1:
                self.in_a_row[record.network] = 0
            else:
                self.in_a_row[record.network] += 1
                self.total += 1
                skipped.append(record)
        return skipped

    def require_progress(self, diagnose: Callable[[], str]) -> None:
        """Raise `TrainingDivergedError` if more steps in a row were skipped than is allowed."""
        for network, count in self.in_a_row.items():
            if count >= self.limit:
                raise TrainingDivergedError(
                    f"training stopped: the gradients of {network} were not finite in {count} steps in a row. "
                    + diagnose()
                )


def describe_skip(record: PhaseRecord, name: Callable[[int], str]) -> str:
    """Say in one line which step was skipped and on which images."""
    names = [name(index) for index in record.indices[:_MAX_NAMES_SHOWN]]
    more = len(record.indices) - len(names)
    images = ", ".join(names) + (f" and {more} more" if more > 0 else "")
    return (
        f"{record.phase}: step skipped at {record.cur_nimg / 1000:g} kimg, gradients were not finite; images: {images}"
    )


def diagnose(networks: dict[str, nn.Module]) -> str:
    """Say which parameters and gradients are not finite, and how large the parameters have become."""
    parts = []
    for name, network in networks.items():
        parameters = [(key, p.detach()) for key, p in network.named_parameters()]
        gradients = [(key, p.grad) for key, p in network.named_parameters() if p.grad is not None]
        largest, value = max(((key, float(p.abs().max())) for key, p in parameters), key=lambda pair: pair[1])
        parts.append(f"{name}: largest parameter {largest} at {value:.3g}")
        for what, tensors in (("parameters", parameters), ("gradients", gradients)):
            bad = [key for key, tensor in tensors if not bool(tensor.isfinite().all())]
            if bad:
                more = f" and {len(bad) - _MAX_NAMES_SHOWN} more" if len(bad) > _MAX_NAMES_SHOWN else ""
                parts.append(f"{name}: {what} not finite in {', '.join(bad[:_MAX_NAMES_SHOWN])}{more}")
    advice = "Lower the learning rates or raise gamma, and resume from an earlier state; try without half precision."
    return "; ".join(parts) + ". " + advice
