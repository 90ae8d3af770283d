"""Which data set a network was trained on: from its run folder, ours or a published one, and from a snapshot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dnnlib import serialize
from metrics.network_data import data_of_network, run_folder
from tests.helpers.head_data import HeadFiles
from tests.inference.published_pickle import write_snapshot
from training.train_config import DataConfig


@pytest.fixture
def data(tmp_path) -> DataConfig:
    return HeadFiles(4).write(tmp_path / "data", zipped=True)


def write_options(folder: Path, data: DataConfig) -> str:
    """Write the file that a run has; return the path of a network beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "options.json").write_text(json.dumps({"config": {"data": serialize.to_json(data)}}))
    return str(folder / "net.safetensors")


def published_kwargs(data: DataConfig, **changes) -> dict:
    kwargs = {"class_name": "training.dataset.MaskLabeledDataset", "img_path": data.images[0], "use_labels": True}
    return {**kwargs, "seg_path": data.masks[0], "resolution": 8, "max_size": 2, "xflip": True, **changes}


def test_run_folder_is_where_options_lie_beside_the_network(tmp_path):
    assert run_folder(str(tmp_path / "net.pkl")) is None
    (tmp_path / "training_options.json").touch()
    assert run_folder(str(tmp_path / "net.pkl")) == tmp_path
    assert run_folder("init:debug") is run_folder("https://example.org/net.pkl") is run_folder("demo") is None


def test_data_of_a_run_are_all_of_its_images_once_and_unflipped(tmp_path, data):
    limited = dataclasses.replace(data, mirror=True, max_images=2, max_yaw_deg=90.0, back_repeat=2)
    found = data_of_network(write_options(tmp_path / "run", limited))
    expected = dataclasses.replace(limited, mirror=False, back_repeat=1, max_images=None, parsing=(), parsing_classes=0)
    assert found == expected


def test_data_of_a_published_run_and_of_its_snapshot_are_the_same(tmp_path, data):
    kwargs = published_kwargs(data, max_yaw=90, back_repeat=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training_options.json").write_text(json.dumps({"training_set_kwargs": kwargs}))
    write_snapshot(tmp_path / "net.pkl", training_set_kwargs=kwargs)
    found = data_of_network(str(tmp_path / "net.pkl"))
    assert found == data_of_network(str(tmp_path / "run" / "net.pkl"))
    assert (found.images, found.masks, found.resolution) == (data.images, data.masks, 8)
    assert (found.max_yaw_deg, found.back_repeat, found.published_angles) == (90.0, 1, True)
    assert not found.mirror and found.max_images is None


def test_data_of_a_snapshot_without_resolution_have_that_of_the_first_image(tmp_path, data):
    kwargs = {"path": data.images[0]}
    write_snapshot(tmp_path / "net.pkl", training_set_kwargs=kwargs)
    assert data_of_network(str(tmp_path / "net.pkl")) == DataConfig(
        images=data.images, resolution=8, published_angles=True
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (None, "expected to learn what it was trained on, came nothing"),
        ({"class_name": "some"}, "expected 'path', came none"),
        ({"path": "absent.zip"}, "absent.zip"),
        ({"path": ["a", "b"]}, "a folder or a zip file"),
    ],
)
def test_data_that_a_snapshot_does_not_tell_are_asked_for(tmp_path, kwargs, message):
    network = tmp_path / "net.pkl"
    write_snapshot(network, training_set_kwargs=kwargs)
    with pytest.raises(ValueError, match=rf"net\.pkl: .*{message}.*; give the images with --data"):
        data_of_network(str(network))


def test_data_of_a_run_that_have_moved_are_named_with_the_file_that_tells(tmp_path, data):
    network = write_options(tmp_path / "run", data)
    Path(data.images[0]).rename(tmp_path / "elsewhere.zip")
    with pytest.raises(ValueError, match=r"options\.json: .*images\.zip, which is absent.*--data"):
        data_of_network(network)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"config": {"data": {"images": 3}}}'])
def test_data_of_a_run_with_damaged_options_are_asked_for(tmp_path, text):
    (tmp_path / "options.json").write_text(text)
    with pytest.raises(ValueError, match=r"options\.json: .*--data"):
        data_of_network(str(tmp_path / "net.pkl"))


def test_data_of_an_untrained_network_are_asked_for():
    with pytest.raises(ValueError, match="init:debug: .*--data"):
        data_of_network("init:debug")
