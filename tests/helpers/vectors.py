"""Reference values on disk: named float arrays and JSON beside them, in one compressed file, without pickle."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

DATA_DIR = Path(__file__).resolve().parents[1] / "data"
_META = "meta"


class Vectors(NamedTuple):
    """Contents of one file."""

    arrays: dict[str, np.ndarray]
    """Float32 arrays by name."""
    meta: Any
    """JSON data that says what they are."""


def write_vectors(path: Path, vectors: Vectors) -> None:
    """Write reference values to an .npz file; the same values give the same bytes."""
    arrays = {name: np.asarray(array, dtype=np.float32) for name, array in vectors.arrays.items()}
    np.savez_compressed(path, **arrays, **{_META: np.array(json.dumps(vectors.meta))})


def read_vectors(name: str) -> Vectors:
    """Read `tests/data/<name>.npz`."""
    with np.load(DATA_DIR / f"{name}.npz", allow_pickle=False) as file:
        return Vectors({key: file[key] for key in file.files if key != _META}, json.loads(str(file[_META])))


def write_json_gz(path: Path, data: Any) -> None:
    """Write JSON data to a gzip file; the same data give the same bytes."""
    path.write_bytes(gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0))


def read_json_gz(name: str) -> Any:
    """Read `tests/data/<name>.json.gz`."""
    return json.loads(gzip.decompress((DATA_DIR / f"{name}.json.gz").read_bytes()))


class SampledTensor(NamedTuple):
    """A tensor of which every `stride`-th element is known, and statistics of all of them."""

    values: torch.Tensor
    """Elements of the flattened tensor, from the first."""
    stride: int
    shape: tuple[int, ...]
    statistics: tuple[float, float, float, float]
    """Mean, population standard deviation, minimum and maximum."""


def sampled_tensors(vectors: Vectors) -> dict[str, SampledTensor]:
    """Return the tensors of a file that `make_vectors.py` wrote for a generator."""
    return {
        name: SampledTensor(
            torch.from_numpy(vectors.arrays[name]), entry["stride"], tuple(entry["shape"]), tuple(entry["statistics"])
        )
        for name, entry in vectors.meta["tensors"].items()
    }


def flat(values: Mapping[str, Any], key: str, *shape: int) -> torch.Tensor:
    """Return a list of numbers as a float32 tensor of a shape."""
    return torch.tensor(values[key], dtype=torch.float32).reshape(shape)
