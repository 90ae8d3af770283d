"""The endless order of images."""

import json

import numpy as np
import pytest

from training.infinite_sampler import InfiniteSampler

# Of the published sampler, from the specification.
ONE_OF_ONE = [2, 8, 4, 9, 1, 6, 2, 3, 0, 9, 7, 8, 1, 5, 6, 4, 3, 8, 2, 1, 9, 6, 7, 5, 8, 4, 0, 9, 6, 7, 3, 1, 2, 8, 4]
ONE_OF_ONE += [7, 6, 3, 1, 8]
SECOND_OF_TWO = [4, 2, 6, 0, 2, 4, 6, 0, 2, 5, 6, 1, 8, 4, 7, 2, 4, 6, 1, 2]
FIRST_OF_FOUR = [6, 4, 3, 2, 0, 3, 2, 0, 4, 1, 1, 5]


@pytest.mark.parametrize(
    ("size", "seed", "rank", "ranks", "expected"),
    [(10, 0, 0, 1, ONE_OF_ONE), (10, 3, 1, 2, SECOND_OF_TWO), (7, 1, 0, 4, FIRST_OF_FOUR)],
)
def test_indices_equal_the_published_order(size, seed, rank, ranks, expected):
    stream = InfiniteSampler(size, seed).indices(0, len(expected) * ranks)
    assert stream[rank::ranks].tolist() == expected


def test_vectors_here_are_those_of_the_specification(shared_dir):
    vectors = json.loads((shared_dir / "spec/fixtures/misc.json").read_text())["infinite_sampler"]
    assert list(vectors.values()) == [ONE_OF_ONE, SECOND_OF_TWO, FIRST_OF_FOUR]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 1000])
def test_any_start_and_any_split_read_the_same_stream(size):
    whole = InfiniteSampler(size, seed=4).indices(0, 700)
    jumping = InfiniteSampler(size, seed=4)
    for start, count in [(0, 3), (3, 0), (3, 97), (650, 50), (10, 20), (0, 700), (699, 1)]:
        assert jumping.indices(start, count).tolist() == whole[start : start + count].tolist()


def test_far_start_equals_walking_there():
    walking = InfiniteSampler(50, seed=1)
    for start in range(0, 200_000, 1000):
        block = walking.indices(start, 1000)
    assert InfiniteSampler(50, seed=1).indices(199_000, 1000).tolist() == block.tolist()


def test_every_image_comes_about_as_often():
    counts = np.bincount(InfiniteSampler(20, seed=0).indices(0, 20_000))
    assert counts.min() > 800 and counts.max() < 1200


def test_window_of_nothing_repeats_one_order():
    first, second = InfiniteSampler(6, window_share=0).indices(0, 12).reshape(2, 6)
    assert first.tolist() == second.tolist()
    assert sorted(first) == list(range(6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "sampler size: .* got 0"), ((3, -1), "sampler seed"), ((3, 1 << 32), "sampler seed"), ((3, 0, 2), "share")],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        InfiniteSampler(*arguments)


def test_negative_start_is_refused():
    with pytest.raises(ValueError, match="sampler positions"):
        InfiniteSampler(3).indices(-1, 2)
