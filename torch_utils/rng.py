"""Seeds of random numbers as functions of what they are for, so that no generator state has to be kept."""

from __future__ import annotations

import hashlib
import operator

import torch


def derive_seed(*parts: int) -> int:
    """Return a 64-bit seed that depends on all numbers and on their order.

    It is BLAKE2b with 8 bytes of digest over the decimal numbers joined by commas in ASCII, read as a little-endian
    unsigned number: the same on every platform and in every version. Close or equal parts give unrelated seeds.

    >>> derive_seed(0, 1)
    4049638602957442601

    Args:
        *parts: any integers, also negative ones and NumPy's, such as (seed, cur_nimg, phase, chunk); at least one.

    Returns:
        0 to 2**64 - 1; `torch.manual_seed` and `numpy.random.default_rng` take it.

    Raises:
        ValueError: no parts, or one that is no integer.
    """
    if not parts:
        raise ValueError("seed: expected at least one number, came none")
    try:
        text = ",".join(str(operator.index(part)) for part in parts)
    except TypeError:
        raise ValueError(f"seed: expected integers, came {parts!r}") from None
    return int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=8).digest(), "little")


def seed_all(*parts: int) -> int:
    """Seed PyTorch's default generators of the CPU and all GPUs with `derive_seed(*parts)`, and return that seed.

    Nothing waits for a GPU. Python's and NumPy's generators are left alone.
    """
    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    return seed
