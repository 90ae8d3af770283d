"""Work shared between the processes that torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def rank() -> int:
    """Return the number of this process among all that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return how many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def shard(items: Sequence[T]) -> list[T]:
    """Return this process's share: every `world_size`-th item from the `rank`-th on."""
    return list(items[rank() :: world_size()])


def resolve_device(name: str) -> torch.device:
    """Return the device of a `--device` option.

    Args:
        name: 'auto' (a GPU if there is one, else the CPU), 'cpu', 'cuda' or 'cuda:N'. Under torchrun 'auto' and 'cuda'
            are the GPU of the local rank.

    Raises:
        ValueError: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {name!r}")
    return device
