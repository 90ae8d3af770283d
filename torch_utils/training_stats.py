"""Statistics of a training run: mean and standard deviation of values that come in batches, over all processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_COUNT, _SUM, _SQUARES, _NONFINITE = range(4)
_NUM_MOMENTS = 4


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation of the values of one name."""

    num: int
    """Finite values."""
    mean: float
    """NaN where there was no finite value."""
    std: float
    """Population standard deviation; NaN where there was no finite value."""
    nonfinite: int = 0
    """Values that were NaN or infinite; they are in none of the others."""

    @classmethod
    def of(cls, value: float) -> Stat:
        """Return the statistic of a single number."""
        return cls(1, float(value), 0.0) if math.isfinite(value) else cls(0, math.nan, math.nan, 1)


class Collector:
    """Collects values by name until they are reduced to statistics.

    For each name it holds, in float64 on the device, the number of finite values, their sum, the sum of their squares,
    and the number of values that are not finite. Adding makes no host sync: the device is waited for in `reduce` alone.

    Differs from the published code: NaN and infinity are counted apart, where they used to turn the mean of a whole
    tick to NaN; there is no global registry; and a name without values since the last `reduce` is not reported.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Begin empty; `device` is where values come from."""
        self.device = torch.device(device)
        self._moments: dict[str, torch.Tensor] = {}  # name -> [4] float64

    @torch.no_grad()
    def add(self, name: str, values: torch.Tensor | float, mask: torch.Tensor | None = None) -> None:
        """Add values under a name.

        Args:
            name: such as 'Loss/G/loss'.
            values: a tensor of any shape and real dtype, or a number.
            mask: of the same shape, 1 (or true) where a value counts and 0 elsewhere; None counts all.
        """
        if not isinstance(values, torch.Tensor):
            values = torch.full((), float(values), dtype=torch.float64, device=self.device)  # no copy from the host
        values = values.to(device=self.device, dtype=torch.float64, non_blocking=True).flatten()
        counted = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.flatten().bool()
        finite = values.isfinite() & counted
        kept = torch.where(finite, values, 0.0)
        count = finite.sum(dtype=torch.float64)
        moments = torch.stack([count, kept.sum(), kept.square().sum(), counted.sum() - count])
        if name in self._moments:
            self._moments[name] += moments
        else:
            self._moments[name] = moments

    def reduce(self) -> dict[str, Stat]:
        """Return the statistics since the last call, over all processes, and begin anew.

        Under torch.distributed every process must call it, and all get the same; each may have other names.

        Returns:
            statistics by name, sorted.
        """
        names, moments = self._over_processes()
        self._moments = {}
        rows = moments.tolist()  # waits for the device
        return {name: _stat(row) for name, row in zip(names, rows) if row[_COUNT] or row[_NONFINITE]}

    def gather_to_main(self) -> None:
        """Move what all processes collected to process 0, whose `state_dict` is then complete.

        Under torch.distributed every process must call it; otherwise nothing happens. What is reported later does not
        change, up to the order in which float64 numbers are summed.
        """
        if not _is_distributed():
            return
        names, moments = self._over_processes()
        self._moments = dict(zip(names, moments.unbind())) if dist.get_rank() == 0 else {}

    def state_dict(self) -> dict[str, Any]:
        """Return what this process collected; see `gather_to_main` for the others."""
        names, moments = self._stacked(sorted(self._moments))
        return {"names": names, "moments": moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was collected, exactly.

        Processes other than process 0 begin empty, so that values are not counted once for each.

        Raises:
            ValueError: this is not what `state_dict` returned.
        """
        names, moments = state["names"], state["moments"]
        if moments.shape != (len(names), _NUM_MOMENTS) or moments.dtype != torch.float64:
            raise ValueError(
                f"collected statistics: expected float64 [{len(names)}, {_NUM_MOMENTS}] for {len(names)} names, "
                f"got {moments.dtype} {list(moments.shape)}"
            )
        if _is_distributed() and dist.get_rank() > 0:
            names = []
        self._moments = {name: row.to(self.device, copy=True) for name, row in zip(names, moments)}

    def _stacked(self, names: list[str]) -> tuple[list[str], torch.Tensor]:
        """Return names and their moments `[len(names), 4]`, zeros where a name has none."""
        zeros = torch.zeros(_NUM_MOMENTS, dtype=torch.float64, device=self.device)
        rows = [self._moments.get(name, zeros) for name in names]
        return names, torch.stack(rows) if rows else zeros.new_zeros(0, _NUM_MOMENTS)

    def _over_processes(self) -> tuple[list[str], torch.Tensor]:
        """Return the names of all processes and the sums of their moments `[N, 4]`."""
        if not _is_distributed():
            return self._stacked(sorted(self._moments))
        of_rank: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_rank, list(self._moments))
        names, moments = self._stacked(sorted(set().union(*of_rank)))
        if names:
            dist.all_reduce(moments)
        return names, moments


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _stat(moments: list[float]) -> Stat:
    count, nonfinite = int(moments[_COUNT]), int(moments[_NONFINITE])
    if count == 0:
        return Stat(0, math.nan, math.nan, nonfinite)
    mean = moments[_SUM] / count
    variance = moments[_SQUARES] / count - mean * mean
    return Stat(count, mean, math.sqrt(max(variance, 0.0)), nonfinite)
