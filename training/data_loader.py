"""Bring the batches of a run to the device, in an order that only the seed and the position in the run determine."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from dnnlib.workers import WorkerDied, WorkerPool
from training.batch_plan import BatchPlan
from training.config import require
from training.dataset import HeadDataset
from training.image_sources import BadImage
from training.infinite_sampler import InfiniteSampler

Chunk = dict[str, torch.Tensor]
Partners = Callable[[int, np.ndarray], "np.ndarray | None"]
"""From the position of a global batch and its items int64 [N] to items that are read with them, or to None."""

_MIN_PREFETCH = 2  # iterations
_TASKS_PER_WORKER = 2  # queued or finished, so that no worker waits
_MAX_ROWS_PER_TASK = 8
_MAX_TRIES = 100  # images in a row that cannot be read, before storage as a whole is to blame


@dataclass
class _Pending:
    """A chunk that workers are filling."""

    indices: np.ndarray
    """int64 [rows]: items of the data set; changed where one is replaced."""
    layers: torch.Tensor
    """uint8 [rows, C, H, W]."""
    tasks: list[tuple[slice, Future]]
    """Rows, and what tells when they are there."""
    targets: np.ndarray | None
    """int64 [b]: row with the partner of each image of the batch, which are the first b rows; None without partners."""


class BatchLoader:
    """Iterate over the global batches of a run; of each, over the chunks of this process.

    Global batch t holds positions `start_nimg + t * batch_size`, ... of the stream of `InfiniteSampler`. The images of
    an iteration therefore depend on `seed`, `start_nimg` and t alone: not on the number of processes or workers, and
    not on whether the run was interrupted.

    With the data set's `skip_bad`, an image that cannot be read any more is replaced by the next item of the data set
    that can; `replaced` counts them. A worker that dies is replaced, and what it did is done again.

    Args:
        dataset: where items come from.
        plan: which of them this process reads, in which order.
        seed: of the order.
        start_nimg: images that the run has seen before.
        workers: processes that read; 0 reads in this one, when a batch is asked for.
        device: where the batches go, without waiting for it.
        partners: chooses items that are read with those of a batch, for example `ViewPairs.partners`; None reads none.

    Yields:
        Lists of one dict for each of `plan.chunks`, with tensors on the device (rows in the order of `plan.positions`):
        `image` float32 [b, 3, H, W] in [-1, 1]; `image_mask` float32 [b, 1, H, W] in [0, 1] and `image_parsing` float32
        [b, K, H, W], one-hot, if the data set has them; `label` float32 [b, 25]; and `index` int64 [b] on the CPU.
        With partners, there are `target_image` and so on of these too. Where an image or its partner was replaced, the
        image is its own partner.

    Raises:
        ValueError: while iterating, an image cannot be read and the data set does not skip, or 100 in a row.
    """

    def __init__(
        self,
        dataset: HeadDataset,
        plan: BatchPlan,
        seed: int = 0,
        start_nimg: int = 0,
        workers: int = 0,
        device: torch.device | str = "cpu",
        partners: Partners | None = None,
    ) -> None:
        require(start_nimg >= 0, "start_nimg", "0 or more", start_nimg)
        require(workers >= 0, "workers", "0 or more", workers)
        self._dataset = dataset
        self._plan = plan
        self._device = torch.device(device)
        self._partners = partners
        self._sampler = InfiniteSampler(len(dataset), seed)
        self._next_nimg = start_nimg
        self._pool = WorkerPool(dataset.reader, workers)
        self._labels = torch.from_numpy(dataset.labels)
        self._queue: collections.deque[list[_Pending]] = collections.deque()
        rows = len(plan.chunks) * plan.batch_gpu
        self._rows_per_task = min(math.ceil(rows / max(workers, 1)), _MAX_ROWS_PER_TASK)
        needed = workers * _TASKS_PER_WORKER * self._rows_per_task
        self._prefetch = max(_MIN_PREFETCH, math.ceil(needed / rows)) if workers else 1
        self.replaced: dict[str, str] = {}
        """Items that were replaced because they could not be read, by name, each with the reason."""
        self.num_replaced = 0
        """How often an item was replaced."""

    @property
    def num_worker_deaths(self) -> int:
        """Workers that ended unexpectedly, and were replaced."""
        return self._pool.num_deaths

    def __iter__(self) -> Iterator[list[Chunk]]:
        return self

    def __next__(self) -> list[Chunk]:
        while len(self._queue) < self._prefetch:
            self._queue.append(self._submit_batch())
        return [self._finish(pending) for pending in self._queue.popleft()]

    def _submit_batch(self) -> list[_Pending]:
        batch = self._sampler.indices(self._next_nimg, self._plan.batch_size)
        partners = None if self._partners is None else self._partners(self._next_nimg, batch)
        self._next_nimg += self._plan.batch_size
        rows = [self._plan.positions(chunk) for chunk in self._plan.chunks]
        return [self._submit_chunk(batch[part], None if partners is None else partners[part]) for part in rows]

    def _submit_chunk(self, indices: np.ndarray, partners: np.ndarray | None) -> _Pending:
        targets = None
        if partners is not None:  # an image that is its own partner is read once
            others = np.flatnonzero(partners != indices)
            targets = np.arange(len(indices))
            targets[others] = len(indices) + np.arange(len(others))
            indices = np.concatenate([indices, partners[others]])
        reader = self._dataset.reader
        shape = (len(indices), reader.num_channels, reader.resolution, reader.resolution)
        # Pinned memory comes from a cache, which hands it out again only when copies from it have ended.
        layers = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        starts = range(0, len(indices), self._rows_per_task)
        tasks = [slice(start, start + self._rows_per_task) for start in starts]
        started = [(rows, self._submit(indices[rows], layers[rows])) for rows in tasks]
        return _Pending(indices, layers, started, targets)

    def _submit(self, indices: np.ndarray, into: torch.Tensor) -> Future:
        """Start to read items [b] into uint8 [b, C, H, W]."""
        task = [self._dataset.locate(index) for index in indices.tolist()]
        return self._pool.submit(task, memoryview(into.numpy()).cast("B"))

    def _finish(self, pending: _Pending) -> Chunk:
        """Wait for a chunk, and bring it to the device."""
        asked = pending.indices.copy()
        for rows, future in pending.tasks:
            try:
                future.result()
            except (BadImage, WorkerDied):  # one by one, to know which it was
                for row in range(len(pending.indices))[rows]:
                    pending.indices[row] = self._read_or_replace(
                        int(pending.indices[row]), pending.layers[row : row + 1]
                    )
        indices = torch.from_numpy(pending.indices)
        labels = self._labels[indices]
        if self._device.type == "cuda":
            labels = labels.pin_memory()
        chunk = self._convert(pending.layers.to(self._device, non_blocking=True))
        chunk["label"] = labels.to(self._device, non_blocking=True)
        if pending.targets is None:
            return {**chunk, "index": indices}
        targets = _kept_targets(pending.targets, pending.indices != asked)
        rows = torch.from_numpy(targets).to(self._device, non_blocking=True)
        own = {name: values[: len(rows)] for name, values in chunk.items()}
        return {
            **own,
            **{f"target_{name}": values[rows] for name, values in chunk.items()},
            "index": indices[: len(rows)],
        }

    def _read_or_replace(self, index: int, into: torch.Tensor) -> int:
        """Read an item into uint8 [1, C, H, W]; return it, or the one that stands in for it."""
        for _ in range(_MAX_TRIES):
            try:
                self._submit(np.array([index]), into).result()
                return index
            except (BadImage, WorkerDied) as error:
                if not self._dataset.config.skip_bad:
                    raise ValueError(f"{error} (data.skip_bad would replace it)") from None
                self.num_replaced += 1
                self.replaced[self._dataset.name(index)] = reason = str(error)
            index = (index + 1) % len(self._dataset)
        raise ValueError(f"expected images that can be read, came none in {_MAX_TRIES} tries; the last: {reason}")

    def _convert(self, layers: torch.Tensor) -> Chunk:
        """Convert uint8 [b, C, H, W] to what networks take."""
        chunk = {"image": layers[:, :3].float() / 127.5 - 1}
        if self._dataset.has_masks:
            chunk["image_mask"] = layers[:, 3:4].float() / 255
        if self._dataset.has_parsing:
            indices = layers[:, -1:].long()  # below the number of classes, as the reader has checked
            shape = (len(layers), self._dataset.parsing_classes, *layers.shape[2:])
            zeros = torch.zeros(shape, device=layers.device)
            chunk["image_parsing"] = zeros.scatter_(1, indices, 1.0)  # [b, K, H, W]
        return chunk

    def close(self) -> None:
        """End the worker processes; the loader cannot be used any more."""
        self._queue.clear()
        self._pool.close()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _kept_targets(targets: np.ndarray, replaced: np.ndarray) -> np.ndarray:
    """Return rows of partners [b] where rows [rows] that were replaced are nobody's partner, and have none."""
    own = np.arange(len(targets))
    return np.where(replaced[own] | replaced[targets], own, targets)
