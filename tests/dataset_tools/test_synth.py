"""Synthetic data sets: the same bytes, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset_tools.synth import DESCRIPTION, IMAGES, MASKS, PARSING, SynthRequest, synthesise
from training.dataset import HeadDataset
from training.synthetic_heads import PARSING_CLASSES, CameraRange, sample_cameras
from training.train_config import DataConfig

REQUEST = SynthRequest(num_identities=5, views_per_identity=2, resolution=16, with_parsing=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "set"
    assert synthesise(folder, REQUEST)
    return folder


def data_of(folder: Path) -> HeadDataset:
    roots = {kind: (str(folder / name),) for kind, name in (("images", IMAGES), ("masks", MASKS), ("parsing", PARSING))}
    return HeadDataset(DataConfig(**roots, resolution=16, parsing_classes=len(PARSING_CLASSES)))


def file_order(data: HeadDataset) -> list[int]:
    """Return the items as they are in the file; the data set has views from behind last."""
    return sorted(range(len(data)), key=data.name)


def test_synthesise_writes_what_training_reads(made):
    data = data_of(made)
    assert len(data) == 10 and data.has_masks and data.has_parsing
    labels = torch.from_numpy(data.labels[file_order(data)])
    torch.testing.assert_close(labels, sample_cameras(0, 0, 10), rtol=0, atol=0)
    for i in range(10):
        item = data[i]
        assert ((item["mask"] >= 128) == (item["parsing"] > 0)).all()
        assert 0.1 < (item["mask"] >= 128).mean() < 0.9


def test_synthesise_names_identities_whose_views_follow_each_other(made):
    data = data_of(made)
    assert data.identities[file_order(data)].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_synthetic_set_from_before_identities_is_known_by_its_note(made, tmp_path):
    for name in (MASKS, PARSING, DESCRIPTION):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    with zipfile.ZipFile(made / IMAGES) as new, zipfile.ZipFile(tmp_path / IMAGES, "w") as old:
        for name in new.namelist():
            content = new.read(name)
            if name == "dataset.json":
                content = json.dumps({"labels": json.loads(content)["labels"]})
            old.writestr(name, content)
    data = data_of(tmp_path)
    assert data.identities[file_order(data)].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    (tmp_path / DESCRIPTION).unlink()
    assert data_of(tmp_path).identities is None


def test_synthesise_views_of_an_identity_share_its_background(made):
    data = data_of(made)
    items = [data[i] for i in file_order(data)]

    def same_background(first: dict, second: dict) -> bool:
        outside = (first["mask"] == 0) & (second["mask"] == 0)
        return np.array_equal(first["image"][:, outside[0]], second["image"][:, outside[0]])

    assert all(same_background(items[i], items[i + 1]) for i in range(0, 10, 2))
    assert not same_background(items[0], items[2])


def test_synthesise_again_makes_nothing(made):
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    assert not synthesise(made, REQUEST)
    assert before == {path.name: path.stat().st_mtime_ns for path in made.iterdir()}


@pytest.mark.parametrize("workers", [0, 2])
def test_synthesise_same_request_makes_the_same_bytes(made, tmp_path, workers):
    synthesise(tmp_path, REQUEST, workers=workers)
    for path in made.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_synthesise_interrupted_goes_on_to_the_same_bytes(made, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        if done >= 8:
            raise Interrupted

    with pytest.raises(Interrupted):
        synthesise(tmp_path, REQUEST, interrupt)
    assert not (tmp_path / IMAGES).exists()
    seen = []
    assert synthesise(tmp_path, REQUEST, lambda done, total: seen.append((done, total)))
    assert seen[0] == (8, 10) and seen[-1] == (10, 10)
    for path in made.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_synthesise_into_another_set_raises_value_error_that_names_the_difference(made):
    other = dataclasses.replace(REQUEST, seed=3)
    with pytest.raises(ValueError, match=r"holds another set \(seed 0 instead of 3\)"):
        synthesise(made, other)


def test_synthesise_over_foreign_files_raises_value_error(tmp_path):
    (tmp_path / IMAGES).write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"expected a folder without images.zip"):
        synthesise(tmp_path, REQUEST)
    assert (tmp_path / IMAGES).read_bytes() == b"mine"


def test_synthesise_without_parsing_writes_no_maps(tmp_path):
    synthesise(tmp_path, dataclasses.replace(REQUEST, with_parsing=False, num_identities=1))
    assert {path.name for path in tmp_path.iterdir()} == {IMAGES, MASKS, DESCRIPTION}


def test_synthesise_cameras_follow_their_range(tmp_path):
    request = dataclasses.replace(REQUEST, num_identities=1, cameras=CameraRange(yaw_deg=(10, 20), pitch_deg=(0, 5)))
    synthesise(tmp_path, request)
    with zipfile.ZipFile(tmp_path / IMAGES) as archive:
        labels = json.loads(archive.read("dataset.json"))["labels"]
    positions = np.array([[label[3], label[7], label[11]] for _, label in labels])
    yaw_deg = np.degrees(np.arctan2(positions[:, 0], positions[:, 2]))
    assert ((yaw_deg > 10) & (yaw_deg < 20)).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_identities", 0), ("views_per_identity", 0), ("resolution", 20), ("seed", -1), ("extension", "gif")],
)
def test_synth_request_impossible_value_raises_value_error(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(REQUEST, **{field: value})
