"""Who is in the images: what dataset.json may say, and what is an error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.helpers.head_data import HeadFiles, item_name
from training.dataset import HeadDataset
from training.head_identities import parse_identities
from training.train_config import DataConfig


def write(folder: Path, identities: object, count: int = 6, **config) -> DataConfig:
    """Write a data set whose images are seen from the front, with identities."""
    files = HeadFiles(count, [0.0] * count)
    files.identities = identities
    return files.write(folder, **config)


def numbers(config: DataConfig) -> list[int] | None:
    identities = HeadDataset(config).identities
    return None if identities is None else identities.tolist()


def test_identities_are_numbered_in_order_and_strangers_are_alone(tmp_path):
    table = {item_name(0): "anna", item_name(1): 7, item_name(2): "anna", item_name(4): "7"}
    assert numbers(write(tmp_path, table)) == [0, 1, 0, 2, 3, 4]


def test_identities_follow_images_of_another_extension(tmp_path):
    table = {"./" + item_name(i).replace(".png", ".jpg"): i // 3 for i in range(6)}
    assert numbers(write(tmp_path, table)) == [0, 0, 0, 1, 1, 1]


def test_identities_absent_give_none(tmp_path):
    assert numbers(write(tmp_path, None)) is None


def test_identities_of_flipped_heads_are_others(tmp_path):
    table = {item_name(i): i // 2 for i in range(4)}
    found = numbers(write(tmp_path, table, count=4, mirror=True))
    assert found[:4] == [0, 0, 1, 1] and found[4] == found[5] and found[6] == found[7]
    assert len(set(found)) == 4


def test_identities_of_two_roots_are_different_people(tmp_path):
    first = write(tmp_path / "first", {item_name(i): 0 for i in range(2)}, count=2)
    second = write(tmp_path / "second", {item_name(i): 0 for i in range(2)}, count=2)
    third = write(tmp_path / "third", None, count=2)
    roots = {kind: sum((getattr(one, kind) for one in (first, second, third)), ()) for kind in ("images", "masks")}
    config = dataclasses.replace(first, **roots, parsing=(), parsing_classes=0)
    assert numbers(config) == [0, 0, 1, 1, 2, 3]


def test_identities_are_those_of_the_chosen_items(tmp_path):
    files = HeadFiles(4, [180.0, 0.0, 180.0, 0.0])
    files.identities = {item_name(i): i // 2 for i in range(4)}
    config = files.write(tmp_path, back_repeat=2)  # items: images 1, 3, 0, 2, 0, 2
    assert numbers(config) == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("identities", "message"),
    [
        ({"a.png": 1}, r"identities: expected a list of \[path, identity\], came \{'a.png': 1\}"),
        ([["a.png", 1, 2]], r"identities\[0\]: expected \[path, whole number or string\], came \['a.png', 1, 2\]"),
        ([["a.png", 1], ["b.png", 1.5]], r"identities\[1\]: expected \[path, whole number or string\]"),
        ([["a.png", True]], r"identities\[0\]: expected"),
        ([["a.png", None]], r"identities\[0\]: expected"),
        ([["a.png", 1], ["./a.png", 2]], r"identities: expected one for a.png, came several that differ"),
    ],
)
def test_identities_broken_raise_value_error(identities, message):
    with pytest.raises(ValueError, match="somewhere: " + message):
        parse_identities(json.dumps({"labels": [], "identities": identities}).encode(), "somewhere")


def test_identities_null_or_same_twice_are_fine():
    assert parse_identities(b'{"identities": null}', "somewhere") is None
    assert parse_identities(b'{"identities": [["a.png", 1], ["a.png", 1]]}', "somewhere") == {"a.png": 1}
    assert parse_identities(b'{"labels": null}', "somewhere") is None
