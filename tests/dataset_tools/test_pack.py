"""Packing: what is written, under which names, and that nothing is lost when it is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from dataset_tools.pack import PackRequest, pack
from tests.helpers.head_data import SIDE, HeadFiles, encoded, item_name, picture, write_files
from training.dataset import HeadDataset
from training.image_transforms import Transform
from training.train_config import DataConfig


@pytest.fixture
def files():
    return HeadFiles(12, [10.0 * i for i in range(12)])


def request(tmp_path, suffix=".zip", **options):
    """Return a request to pack what `HeadFiles.write` wrote to tmp_path/source."""
    kinds = {"": "images", "_masks": "masks", "_parsing": "parsing"}
    dests = {f"dest{key}": tmp_path / "packed" / f"{kind}{suffix}" for key, kind in kinds.items()}
    roots = {kind: tmp_path / "source" / kind for kind in ("masks", "parsing")}
    return PackRequest(**{"source": tmp_path / "source" / "images", **roots, **dests, **options})


def packed_config(tmp_path, suffix=".zip", **options):
    roots = {kind: (str(tmp_path / "packed" / f"{kind}{suffix}"),) for kind in ("images", "masks", "parsing")}
    return DataConfig(**{**roots, "resolution": SIDE, "parsing_classes": 19, **options})


def content(folder):
    """Return all files below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("suffix", [".zip", ""])
@pytest.mark.parametrize("workers", [0, 2])
def test_packed_data_set_equals_its_source(tmp_path, files, suffix, workers):
    source = HeadDataset(files.write(tmp_path / "source"))
    seen = []
    report = pack(request(tmp_path, suffix, workers=workers), lambda done, total: seen.append((done, total)))
    assert report == (12, 0, True, []) and seen == [(i, 12) for i in range(13)]
    packed = HeadDataset(packed_config(tmp_path, suffix))
    assert len(packed) == 12
    for index in range(12):
        for key, value in source[index].items():
            assert np.array_equal(packed[index][key], value), key
    assert sorted(os.listdir(tmp_path / "packed")) == sorted(f"{k}{suffix}" for k in ("images", "masks", "parsing"))


def test_zip_file_has_stored_members_of_published_names(tmp_path, files):
    files.write(tmp_path / "source")
    pack(request(tmp_path))
    with zipfile.ZipFile(tmp_path / "packed" / "images.zip") as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.namelist() == [f"00000/img{i:08d}.png" for i in range(12)] + ["dataset.json"]
        labels = json.loads(archive.read("dataset.json"))
    assert labels["labels"] == [[f"00000/img{i:08d}.png", files.labels[item_name(i)]] for i in range(12)]
    assert labels["fnames"] == [[f"00000/img{i:08d}.png", item_name(i)] for i in range(12)]


def test_images_are_cropped_resized_and_written_as_jpeg(tmp_path):
    files = HeadFiles(2, [0, 5])
    files.images = {name: encoded(picture(i, 40).crop((0, 0, 40, 24))) for i, name in enumerate(files.images)}
    files.masks = {name: encoded(Image.new("L", (80, 48), 255)) for name in files.images}
    files.write(tmp_path / "source")
    transform = Transform(crop="center-crop", resolution=(16, 16))
    options = {"parsing": None, "dest_parsing": None, "transform": transform, "extension": "jpg"}
    pack(request(tmp_path, **options))
    packed = HeadDataset(packed_config(tmp_path, resolution=16, parsing=(), parsing_classes=0))
    assert packed.name(0).endswith("img00000000.jpg") and packed[0]["mask"].shape == (1, 16, 16)
    focal = files.labels[item_name(0)][16]
    assert packed.labels[0][16] == pytest.approx(focal * 40 / 24) and packed.labels[0][20] == pytest.approx(focal)


def test_first_images_alone_are_packed(tmp_path, files):
    files.write(tmp_path / "source")
    assert pack(request(tmp_path, max_images=5)).num_images == 5


def test_labels_can_be_matched_by_file_name_alone(tmp_path, files):
    files.masks = {f"other/{name.rsplit('/')[-1]}": data for name, data in files.masks.items()}
    files.labels = {f"x/{name.rsplit('/')[-1]}": label for name, label in files.labels.items()}
    files.write(tmp_path / "source")
    options = {"parsing": None, "dest_parsing": None}
    with pytest.raises(ValueError, match="expected a mask"):
        pack(request(tmp_path, **options))
    assert pack(request(tmp_path, use_basename=True, **options)).has_labels
    assert len(HeadDataset(packed_config(tmp_path, parsing=(), parsing_classes=0))) == 12


@pytest.mark.parametrize("use_basename", [False, True])
def test_identities_are_packed_under_the_new_names(tmp_path, files, use_basename):
    files.identities = {name: f"head {i // 4}" for i, name in enumerate(files.images) if i < 8}
    source = HeadDataset(files.write(tmp_path / "source"))
    assert pack(request(tmp_path, max_images=10, use_basename=use_basename)).num_images == 10
    packed = HeadDataset(packed_config(tmp_path))
    assert packed.identities.tolist() == source.identities[:10].tolist() == [0] * 4 + [1] * 4 + [2, 3]


def test_source_without_labels_is_packed_without(tmp_path, files):
    write_files(tmp_path / "source" / "images", files.images)
    none = dict.fromkeys(("masks", "dest_masks", "parsing", "dest_parsing"))
    assert not pack(request(tmp_path, **none)).has_labels
    with zipfile.ZipFile(tmp_path / "packed" / "images.zip") as archive:
        assert json.loads(archive.read("dataset.json"))["labels"] is None


@pytest.mark.parametrize("suffix", [".zip", ""])
def test_bad_images_are_errors_or_left_out_with_a_gap(tmp_path, files, suffix):
    files.images[item_name(3)] = files.images[item_name(3)][:-30]
    files.parsing[item_name(5)] = encoded(picture(5))
    files.labels.pop(item_name(7))
    files.write(tmp_path / "source")
    with pytest.raises(ValueError, match="img00000007.png: expected a label"):
        pack(request(tmp_path, suffix))
    report = pack(request(tmp_path, suffix, skip_bad=True))
    assert report.num_images == 9 and len(report.skipped) == 3
    assert "img00000003.png: cannot be decoded" in report.skipped[1]
    assert "img00000005.png: expected class indices" in report.skipped[2]
    packed = HeadDataset(packed_config(tmp_path, suffix))
    assert [int(packed[i]["image"][0, 0, 0]) for i in range(9)] == [0, 1, 2, 4, 6, 8, 9, 10, 11]


def test_error_on_the_way_can_be_skipped_without_starting_again(tmp_path, files):
    files.images[item_name(9)] = b"x"
    files.write(tmp_path / "source")
    with pytest.raises(ValueError, match=r"img00000009.png: not an image .*\(skipping would leave it out\)"):
        pack(request(tmp_path))
    assert not any(path.suffix == ".zip" for path in (tmp_path / "packed").iterdir())
    assert pack(request(tmp_path, skip_bad=True))[:2] == (11, 9)


def test_existing_destination_is_kept(tmp_path, files):
    files.write(tmp_path / "source")
    pack(request(tmp_path))
    before = content(tmp_path / "packed")
    with pytest.raises(ValueError, match="images.zip: exists already; expected a new name, or overwrite"):
        pack(request(tmp_path))
    assert content(tmp_path / "packed") == before
    pack(request(tmp_path, overwrite=True, max_images=3))
    assert len(HeadDataset(packed_config(tmp_path))) == 3
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="expected a new name or an empty folder, came a folder that is in use"):
        pack(request(tmp_path, dest=tmp_path / "folder", overwrite=True))


def test_impossible_requests_are_refused(tmp_path, files):
    files.write(tmp_path / "source")
    with pytest.raises(ValueError, match="masks, dest_masks: expected both or neither"):
        request(tmp_path, dest_masks=None)
    with pytest.raises(ValueError, match="expected different folders"):
        request(tmp_path, dest=tmp_path / "source" / "images")
    with pytest.raises(ValueError, match="images: expected a folder or a zip file, came .*nowhere"):
        pack(request(tmp_path, source=tmp_path / "nowhere"))


# Interruptions --------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Stands for a kill."""


def stop_after(count):
    def progress(done, total):
        if done >= count:
            raise Stop

    return progress


@pytest.mark.parametrize("suffix", [".zip", ""])
@pytest.mark.parametrize("count", [0, 1, 7, 12])
def test_interrupted_run_goes_on_and_ends_with_the_same_files(tmp_path, files, suffix, count):
    files.images[item_name(2)] = b"x"
    files.write(tmp_path / "source")
    with pytest.raises(Stop):
        pack(request(tmp_path, suffix, skip_bad=True), stop_after(count))
    report = pack(request(tmp_path, suffix, skip_bad=True))
    assert (report.num_images, len(report.skipped)) == (11, 1)
    assert report.num_resumed == count - (count > 2)
    resumed = content(tmp_path / "packed")
    for path in (tmp_path / "packed").iterdir():
        path.rename(tmp_path / f"old-{path.name}")
    pack(request(tmp_path, suffix, skip_bad=True))
    assert content(tmp_path / "packed") == resumed


@pytest.mark.parametrize("cut", [1, 100, 1000])
def test_member_that_was_cut_off_is_written_again(tmp_path, files, cut):
    files.write(tmp_path / "source")
    with pytest.raises(Stop):
        pack(request(tmp_path), stop_after(9))
    partial = tmp_path / "packed" / ".masks.zip.partial"
    os.truncate(partial, partial.stat().st_size - cut)
    report = pack(request(tmp_path))
    assert 0 < report.num_resumed < 9
    assert len(HeadDataset(packed_config(tmp_path))) == 12


def test_other_settings_start_again(tmp_path, files):
    files.write(tmp_path / "source")
    with pytest.raises(Stop):
        pack(request(tmp_path), stop_after(9))
    assert pack(request(tmp_path, transform=Transform(resolution=(16, 16)))).num_resumed == 0
    assert len(HeadDataset(packed_config(tmp_path, resolution=16))) == 12


def test_kill_between_two_renames_is_made_good(tmp_path, files, monkeypatch):
    files.write(tmp_path / "source")
    calls = []

    def publish(path):
        calls.append(path)
        if len(calls) == 2:
            raise Stop
        os.replace(path.with_name(f".{path.name}.partial"), path)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr("dataset_tools.pack.publish", publish)
        pack(request(tmp_path))
    assert pack(request(tmp_path))[:2] == (12, 12)
    assert len(HeadDataset(packed_config(tmp_path))) == 12
    assert sorted(os.listdir(tmp_path / "packed")) == ["images.zip", "masks.zip", "parsing.zip"]


def test_two_runs_at_once_are_refused(tmp_path, files):
    files.write(tmp_path / "source")
    errors = []

    def progress(done, total):
        if done == 3:
            with pytest.raises(ValueError, match="another process is writing it") as error:
                pack(request(tmp_path))
            errors.append(error)

    pack(request(tmp_path), progress)
    assert len(errors) == 1


def test_killed_process_leaves_what_the_next_one_needs(tmp_path):
    files = HeadFiles(200, [0.0] * 200)
    files.write(tmp_path / "source")
    code = f"""
import sys
from pathlib import Path
from tests.dataset_tools.test_pack import request
from dataset_tools.pack import pack
pack(request(Path({str(tmp_path)!r}), workers=1), lambda done, total: print(done, flush=True))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    for line in process.stdout:
        if int(line) >= 40:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    time.sleep(0.05)
    report = pack(request(tmp_path))
    assert report.num_images == 200 and report.num_resumed >= 39
    assert len(HeadDataset(packed_config(tmp_path))) == 200
