"""Examples from a data set: what is held out, what is read, and how it is made small."""

from pathlib import Path

import numpy as np
import pytest
import torch

from metrics.training_examples import limit, read_examples, shrink, split, unique_items
from tests.helpers.toy_views import toy_context, toy_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("data"))


def test_shrink_averages_and_enlarges():
    images = torch.arange(2 * 3 * 64 * 64, dtype=torch.int64).remainder(251).to(torch.uint8).view(2, 3, 64, 64)
    expected = images.double().view(2, 3, 32, 2, 32, 2).mean((3, 5)).round()
    assert (shrink(images, 32).double() - expected).abs().max() <= 1  # halves are rounded either way
    assert shrink(images, 64) is images
    assert shrink(images[..., :20, :20], 32).shape == (2, 3, 32, 32)
    assert shrink(torch.full((1, 3, 20, 20), 7, dtype=torch.uint8), 32).unique().tolist() == [7]


def test_split_without_identities_holds_out_stretches_of_files(dataset):
    items = list(range(len(dataset)))
    training, held_out = split(dataset, items)
    assert sorted([*training, *held_out]) == items
    assert len(items) / 10 < len(held_out) < len(items) / 6

    class Many:
        identities = None

    _, held_out = split(Many(), list(range(6400)))
    assert (np.diff(held_out) == 1).sum() == len(held_out) - 8  # eight stretches
    assert len(held_out) == 800


def test_split_never_parts_an_identity():
    class Known:
        identities = np.arange(600) % 200  # the images of one are far from each other

    training, held_out = split(Known(), list(range(600)))
    assert not set(training % 200) & set(held_out % 200)
    assert len(held_out) == 600 / 8


def test_split_of_very_few_identities_holds_images_out():
    class Twins:
        identities = np.arange(80) % 2

    assert len(split(Twins(), list(range(80)))[1]) == 10


def test_flipped_and_repeated_items_count_once(tmp_path, dataset):
    larger = toy_dataset(tmp_path, mirror=True, back_repeat=3)
    assert len(larger) > 2 * len(dataset)
    items = unique_items(larger)
    located = [larger.locate(i) for i in items]
    assert located == [(i, False) for i in range(len(dataset))]


def test_large_data_sets_are_read_in_part(dataset):
    parts = split(dataset, range(len(dataset)))
    few = limit(parts, 72)
    assert [len(part) for part in few] == [72 * 84 // 96, 72 * 12 // 96]
    assert all(set(part) <= set(whole) and len(set(part)) == len(part) for part, whole in zip(few, parts))
    assert list(map(len, limit(parts, 96))) == [84, 12]


def test_workers_read_the_same(dataset):
    indices = np.arange(20)
    examples = [read_examples(toy_context(dataset, workers=w), indices, 32, with_masks=True) for w in (0, 1)]
    assert (examples[0].images == examples[1].images).all() and (examples[0].masks == examples[1].masks).all()
    assert (examples[0].images[19] == torch.from_numpy(dataset[19]["image"])).all()
    assert (examples[0].masks[19] == torch.from_numpy(dataset[19]["mask"])).all()


def test_files_that_nobody_needs_are_not_read(tmp_path):
    dataset = toy_dataset(tmp_path)
    Path(dataset.config.masks[0]).unlink()
    examples = read_examples(toy_context(dataset), np.arange(20), 32, with_masks=False)
    assert examples.masks is None and examples.images.shape == (20, 3, 32, 32)
