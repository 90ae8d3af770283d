"""Seeds are functions of numbers, the same everywhere, and unlike each other."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from torch_utils.rng import derive_seed, seed_all


def test_derive_seed_known_values_stay():
    """Another value would make runs that go on from a state differ from those that were never interrupted."""
    assert derive_seed(0, 1) == 4049638602957442601
    assert derive_seed(0) == int.from_bytes(hashlib.blake2b(b"0", digest_size=8).digest(), "little")
    assert derive_seed(-3, 2**70) < 2**64


def test_derive_seed_numpy_integers_and_bools_are_numbers():
    assert derive_seed(np.int64(7), np.uint8(2), True) == derive_seed(7, 2, 1)


def test_derive_seed_neighbours_orders_and_groupings_differ():
    parts = [(a, b) for a in range(60) for b in range(60)]
    parts += [(a,) for a in range(100)] + [(a, b, 0) for a in range(10) for b in range(10)] + [(1, 23), (12, 3), (123,)]
    distinct = set(parts)
    assert len({derive_seed(*one) for one in distinct}) == len(distinct)


def test_derive_seed_every_bit_is_set_half_of_the_time():
    seeds = [derive_seed(0, number) for number in range(4000)]
    shares = [sum(seed >> bit & 1 for seed in seeds) / len(seeds) for bit in range(64)]
    assert max(abs(share - 0.5) for share in shares) < 0.04  # five standard deviations of 0.5 / sqrt(4000)


@pytest.mark.parametrize("parts, expected", [((), "came none"), ((1, 2.0), "expected integers"), (("1",), "integers")])
def test_derive_seed_anything_else_raises(parts, expected):
    with pytest.raises(ValueError, match=f"seed: .*{expected}"):
        derive_seed(*parts)


def test_seed_all_same_parts_give_the_same_numbers():
    assert seed_all(5, 1000, 2, 0) == derive_seed(5, 1000, 2, 0)
    first = torch.randn(4)
    torch.randn(3)
    seed_all(5, 1000, 2, 0)
    assert torch.equal(torch.randn(4), first)
    seed_all(5, 1000, 2, 1)
    assert not torch.equal(torch.randn(4), first)


def test_seed_all_leaves_numpy_alone():
    np.random.seed(1)
    expected = np.random.rand()
    np.random.seed(1)
    seed_all(7)
    assert np.random.rand() == expected
