"""Pair views of the same identity."""

from __future__ import annotations

import numpy as np

from torch_utils.rng import derive_seed
from training.dataset import HeadDataset

_STREAM = 2  # of the seed; `training.training_loop` has 0 and 1


class ViewPairs:
    """Chooses, for items of a data set, others that show the same head in another image.

    What is chosen depends on the seed, on the position in the run and on the items alone.

    Args:
        dataset: of which items; without identities, every item is its own partner.
        share: probability of another image; an item without one is its own partner.
        seed: of the choice.
    """

    num_identities: int
    """Identities of which there are several images; 0 where every item is its own partner."""

    def __init__(self, dataset: HeadDataset, share: float, seed: int) -> None:
        self._share, self._seed = share, seed
        identities = dataset.identities
        images: dict[int, dict[tuple[int, bool], int]] = {}  # identity -> image -> first item that shows it
        self._places: list[tuple[list[int], int]] = []  # of each item: items of its identity, and which is its own
        for item, identity in enumerate([] if identities is None else identities.tolist()):
            images.setdefault(identity, {}).setdefault(dataset.locate(item), item)
        views = {identity: list(found.values()) for identity, found in images.items()}
        places = {found: place for items in images.values() for place, found in enumerate(items)}
        for item, identity in enumerate([] if identities is None else identities.tolist()):
            self._places.append((views[identity], places[dataset.locate(item)]))
        self.num_identities = sum(len(items) > 1 for items in views.values())

    def partners(self, nimg: int, indices: np.ndarray) -> np.ndarray:
        """Return the partners int64 [count] of the items at positions `nimg`, `nimg + 1`, ... of a run."""
        random = np.random.default_rng(derive_seed(self._seed, _STREAM, nimg))
        is_other = random.random(len(indices)) < self._share
        choices = random.random(len(indices))
        partners = indices.copy()
        if self.num_identities:
            for row in np.flatnonzero(is_other).tolist():
                views, place = self._places[indices[row]]
                if len(views) > 1:
                    choice = int(choices[row] * (len(views) - 1))
                    partners[row] = views[choice + (choice >= place)]
        return partners

    def describe(self) -> str:
        """Say in one line what the partners are."""
        if not self.num_identities:
            return "every view is reconstructed from itself: the data set names no identities of several views"
        return f"{self._share:.0%} of targets are another view, of {self.num_identities} identities"
