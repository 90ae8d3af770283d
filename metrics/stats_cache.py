"""Statistics of real images, kept between runs under a name that the data and the detector determine."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from metrics.feature_stats import FeatureStats
from training.dataset import HeadDataset

_VERSION = 1  # goes up when the same data would give other statistics
_FOLDER = "statistics"


def default_cache_dir() -> Path:
    """Return where metrics keep what they can use again: a folder in the one where `dnnlib.util.open_url` does."""
    return Path(os.environ.get("SPHEREHEAD_CACHE_DIR") or "~/.cache/spherehead").expanduser() / "metrics"


def data_key(dataset: HeadDataset) -> str:
    """Return a hash of a data set's contents: which images, in which order, flipped or not, with which cameras.

    Contents are told by the checksums that a zip file holds, and by size and time of the last change of files in a
    folder: a changed image gives another key, without all of them being read.
    """
    digest = hashlib.sha256(f"{_VERSION} {dataset.fingerprint} {dataset.config.mirror}".encode())
    reader = dataset.reader
    items = sorted({dataset.locate(index)[0] for index in range(len(dataset))})
    for item in items:
        names = reader.items[item]
        roots = reader.roots[names.root]
        for source, name in ((roots.images, names.image), (roots.masks, names.mask), (roots.parsing, names.parsing)):
            if source is not None and name is not None:
                digest.update(f"{source.stamp(name)}\n".encode())
    return digest.hexdigest()


def keep(path: Path, write: Callable[[], None]) -> None:
    """Write a file of a cache in a folder that is made if absent; what cannot be kept is no reason to lose it.

    Args:
        path: of the file.
        write: writes it, whole or not at all.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        text = f"warning: {path}: cannot be kept for the next time ({error.strerror or error}); see --cache-dir"
        print(text, file=sys.stderr, flush=True)


class StatsCache:
    """A folder of statistics.

    Args:
        folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / _FOLDER

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def load(self, key: str) -> FeatureStats | None:
        """Return what is kept under a key; None where there is nothing, or a damaged file."""
        if self._folder is None or not self._path(key).is_file():
            return None
        try:
            return FeatureStats.load(self._path(key))
        except (ValueError, OSError):  # computed again, and written over
            return None

    def save(self, key: str, stats: FeatureStats) -> None:
        """Keep statistics; the file appears whole or not at all."""
        if self._folder is not None:
            keep(self._path(key), lambda: stats.save(self._path(key)))
