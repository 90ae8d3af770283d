"""The order in which training sees the images of a data set: random, endless, and known at every position."""

from __future__ import annotations

import numpy as np

from training.config import require

_REPLAY_BLOCK = 1 << 16  # positions replayed at a time


class InfiniteSampler:
    """Walk through a data set for ever, shuffling it a little at every step.

    An order of 0 ... n - 1, shuffled at the start, is read round and round. After position t has been read at place
    i = t mod n, that place is swapped with one of the `round(n window_share)` places before it, chosen at random.
    Everything is drawn from `RandomState(seed)`, so that the stream is that of the published sampler; processes take
    their share of one stream (Karras et al. 2020, training code; see `training.batch_plan`).

    Args:
        size: n, at least 1.
        seed: of the stream, from 0 to 2^32 - 1.
        window_share: size of the window in shares of n, from 0 to 1; a window below 2 places does not shuffle further.
    """

    def __init__(self, size: int, seed: int = 0, window_share: float = 0.5) -> None:
        require(size >= 1, "sampler size", "at least 1", size)
        require(0 <= seed < 1 << 32, "sampler seed", "0 to 2^32 - 1", seed)
        require(0 <= window_share <= 1, "sampler window_share", "0 to 1", window_share)
        self.size = size
        self.seed = seed
        self._window = int(np.rint(size * window_share))
        self._rewind()

    def _rewind(self) -> None:
        self._random = np.random.RandomState(self.seed)
        order = np.arange(self.size)
        self._random.shuffle(order)
        self._order: list[int] = order.tolist()
        self._position = 0

    def indices(self, start: int, count: int) -> np.ndarray:
        """Return the indices [count] int64 at positions `start`, `start + 1`, ... of the stream.

        Cheap where `start` follows the last call; otherwise the stream is replayed, a few million positions a second.

        Raises:
            ValueError: `start` or `count` is negative.
        """
        require(start >= 0 and count >= 0, "sampler positions", "0 or more", (start, count))
        if start < self._position:
            self._rewind()
        while self._position < start:
            self._advance(min(start - self._position, _REPLAY_BLOCK))
        return np.array(self._advance(count), dtype=np.int64)

    def _advance(self, count: int) -> list[int]:
        """Read `count` indices at the current position."""
        order = self._order
        places = np.arange(self._position, self._position + count) % self.size
        self._position += count
        if self._window < 2:
            return [order[i] for i in places.tolist()]
        partners = (places - self._random.randint(self._window, size=count)) % self.size
        read = []
        for i, j in zip(places.tolist(), partners.tolist()):
            read.append(order[i])
            order[i], order[j] = order[j], order[i]
        return read
