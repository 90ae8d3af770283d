"""Which images of a global batch a process computes, and in which order: the same for any number of processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.config import require


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Split of the global batch into chunks that are computed one after the other, or by several processes.

    Some terms mix samples: minibatch standard deviation, label and background rolls, batch means. They work within
    *groups* of `group_size` consecutive positions of the global batch, and a chunk holds whole groups, so that the
    result does not depend on how many processes share the batch.

    The minibatch-standard-deviation layer groups strided members of its input (j, n + j, 2 n + j, ... for n groups).
    A chunk is therefore laid out member by member: row `i * num_groups + j` is member i of its group j. A roll by one
    within the groups is then `torch.roll(x, num_groups, 0)`.

    Chunk q goes to process q modulo `world_size`.

    Differs from the published code, where rolls, means and minibatch-std groups follow from the number of GPUs.
    """

    batch_size: int
    """Images per optimiser step, over all processes."""
    batch_gpu: int
    """Images per chunk."""
    group_size: int
    """Images per group."""
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        share = self.world_size * self.batch_gpu
        expected = f"a multiple of processes x batch_gpu = {self.world_size} x {self.batch_gpu}"
        require(self.batch_size % share == 0 and self.batch_size > 0, "batch size", expected, self.batch_size)
        expected = f"a multiple of the minibatch-std group size {self.group_size}"
        require(self.batch_gpu % self.group_size == 0, "batch_gpu", expected, self.batch_gpu)
        require(0 <= self.rank < self.world_size, "rank", f"below {self.world_size}", self.rank)

    @property
    def num_groups(self) -> int:
        """Groups in a chunk."""
        return self.batch_gpu // self.group_size

    @property
    def chunks(self) -> list[int]:
        """Numbers of this process's chunks, counted over the global batch."""
        return list(range(self.rank, self.batch_size // self.batch_gpu, self.world_size))

    def positions(self, chunk: int) -> np.ndarray:
        """Return the positions `[batch_gpu]` in the global batch of the rows of a chunk."""
        first = chunk * self.batch_gpu
        return first + np.arange(self.batch_gpu).reshape(self.num_groups, self.group_size).T.reshape(-1)
