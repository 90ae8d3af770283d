"""Partners show the same head in another image, and depend on seed and position alone."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.head_data import HeadFiles, item_name
from training.dataset import HeadDataset
from training.view_pairs import ViewPairs


@pytest.fixture
def dataset(tmp_path):
    """Heads with 4, 4 and 1 images, some from behind and repeated, all of them flipped too."""
    files = HeadFiles(9, [0.0, 180.0, 90.5, -20.0, 0.0, 10.0, 20.0, 170.0, 0.0])
    files.identities = {item_name(i): i // 4 for i in range(9)}
    return HeadDataset(files.write(tmp_path, mirror=True, back_repeat=3))


def test_partners_show_the_same_head_in_another_image(dataset):
    pairs = ViewPairs(dataset, 1.0, seed=0)
    assert pairs.num_identities == 4  # two, and the same flipped
    items = np.repeat(np.arange(len(dataset)), 40)
    partners = pairs.partners(0, items)
    assert (dataset.identities[items] == dataset.identities[partners]).all()
    same = [dataset.locate(int(a)) == dataset.locate(int(b)) for a, b in zip(items, partners)]
    alone = [int((dataset.identities == identity).sum()) == 1 for identity in dataset.identities[items]]
    assert same == alone  # the head with one image is its own partner
    for item in np.flatnonzero(dataset.identities == dataset.identities[0]):
        seen = {dataset.locate(int(partner)) for partner in partners[items == item]}
        assert len(seen) == 3  # every other image of the head


def test_partners_have_the_share_that_was_asked_for(dataset):
    items = np.zeros(4000, np.int64)
    share = (ViewPairs(dataset, 0.3, seed=0).partners(0, items) != items).mean()
    assert abs(share - 0.3) < 0.03  # four standard deviations
    assert (ViewPairs(dataset, 0.0, seed=0).partners(0, items) == items).all()


def test_partners_depend_on_seed_and_position_alone(dataset):
    items = np.arange(len(dataset))
    first, again = ViewPairs(dataset, 0.5, seed=1), ViewPairs(dataset, 0.5, seed=1)
    first.partners(8, items)
    assert (first.partners(16, items) == again.partners(16, items)).all()
    assert (first.partners(16, items) != first.partners(24, items)).any()
    assert (first.partners(16, items) != ViewPairs(dataset, 0.5, seed=2).partners(16, items)).any()


def test_partners_without_identities_are_the_items_themselves(tmp_path):
    dataset = HeadDataset(HeadFiles(4).write(tmp_path))
    pairs = ViewPairs(dataset, 1.0, seed=0)
    assert pairs.partners(0, np.arange(4)).tolist() == [0, 1, 2, 3]
    assert "names no identities" in pairs.describe()
