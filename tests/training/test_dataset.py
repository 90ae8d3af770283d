"""Data sets: what is read, in which order, and what is wrong with those that cannot be used."""

import json
import os
import re
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from camera_utils import mirror_label
from tests.helpers.head_data import (
    SIDE,
    HeadFiles,
    encoded,
    head_labels,
    item_name,
    mask_picture,
    picture,
    write_files,
)
from training.dataset import HeadDataset
from training.head_labels import select_views, view_angles_deg


def numbers(dataset):
    """Return which picture each item shows."""
    return [int(dataset[i]["image"][0, 0, 0]) for i in range(len(dataset))]


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_items_are_images_masks_parsing_and_labels_in_order_of_paths(tmp_path, zipped, method):
    files = HeadFiles()
    dataset = HeadDataset(files.write(tmp_path, zipped, method))
    assert (len(dataset), dataset.resolution, dataset.has_masks, dataset.has_parsing) == (12, SIDE, True, True)
    assert numbers(dataset) == [3, 4, 5, 6, 7, 8, 0, 1, 2, 9, 10, 11]  # in front from -81 to 69 degrees, then behind
    for index in range(len(dataset)):
        item = dataset[index]
        number = int(item["image"][0, 0, 0])
        assert {key: (value.dtype.name, value.shape) for key, value in item.items() if key != "index"} == {
            "image": ("uint8", (3, SIDE, SIDE)),
            "mask": ("uint8", (1, SIDE, SIDE)),
            "parsing": ("uint8", (1, SIDE, SIDE)),
            "label": ("float32", (25,)),
        }
        assert item["index"] == index
        assert item["mask"].max() == 255 - number and item["mask"][0, 0, -1] == 0
        assert set(item["parsing"].ravel()) == {2, 17}
        assert item["label"].tolist() == files.labels[item_name(number)]
        assert dataset.name(index).endswith(item_name(number))


def test_mirrored_copies_follow_with_flipped_label_mask_and_classes(tmp_path):
    dataset = HeadDataset(HeadFiles().write(tmp_path, mirror=True))
    assert len(dataset) == 24
    for index in (0, 5):
        item, flipped = dataset[index], dataset[index + 12]
        assert (flipped["image"] == item["image"][:, :, ::-1]).all()
        assert (flipped["mask"] == item["mask"][:, :, ::-1]).all()
        assert (flipped["parsing"][0, :, SIDE // 2 :] == 3).all(), "the left brow is the right one of the mirror image"
        assert flipped["label"].tolist() == mirror_label(torch.from_numpy(item["label"])).tolist()
        assert (flipped["label"] == dataset.labels[index + 12]).all()
        assert dataset.name(index + 12) == dataset.name(index) + " (mirrored)"
        assert view_angles_deg(flipped["label"][None])[0, 0] == pytest.approx(
            -view_angles_deg(item["label"][None])[0, 0], abs=1e-4
        )


def test_label_std_is_that_of_all_labels_without_mirroring(tmp_path):
    files = HeadFiles()
    dataset = HeadDataset(files.write(tmp_path, mirror=True, max_yaw_deg=60))
    expected = np.array(list(files.labels.values())).std(axis=0)
    torch.testing.assert_close(dataset.label_std, expected.astype(np.float32), rtol=1e-6, atol=1e-7)  # float32 rounding


def test_several_roots_are_one_data_set(tmp_path):
    first, second = HeadFiles(4, [0, 10, 20, 30]), HeadFiles(4, [1, 11, 21, 31])
    second.images = {name: encoded(picture(100 + i)) for i, name in enumerate(second.images)}
    configs = [first.write(tmp_path / "a"), second.write(tmp_path / "b", zipped=True)]
    joined = {kind: getattr(configs[0], kind) + getattr(configs[1], kind) for kind in ("images", "masks", "parsing")}
    dataset = HeadDataset(first.write(tmp_path / "a", **joined))
    assert numbers(dataset) == [0, 1, 2, 3, 100, 101, 102, 103]
    np.testing.assert_allclose(view_angles_deg(dataset.labels)[:, 0], [0, 10, 20, 30, 1, 11, 21, 31], atol=1e-4)


def test_unconditional_data_set_needs_no_labels(tmp_path):
    files = HeadFiles(3)
    files.labels = {}
    dataset = HeadDataset(files.write(tmp_path, conditional=False, mirror=True))
    assert dataset.labels.tolist() == np.zeros((6, 25)).tolist()
    assert numbers(dataset)[:3] == [0, 1, 2]


def test_labels_may_be_strings_and_those_of_another_extension(tmp_path):
    files = HeadFiles(2, [5, 50])
    files.images = {name.replace(".png", ".jpg"): encoded(picture(40), "JPEG") for name in files.images}
    files.labels = {name: [f"{number:.6f}" for number in label] for name, label in files.labels.items()}
    dataset = HeadDataset(files.write(tmp_path))
    np.testing.assert_allclose(view_angles_deg(dataset.labels)[:, 0], [5, 50], atol=1e-3)  # six digits


def test_grey_and_palette_images_become_three_channels(tmp_path):
    files = HeadFiles(3, [0, 1, 2])
    files.images[item_name(0)] = encoded(Image.new("L", (SIDE, SIDE), 77))
    files.images[item_name(1)] = encoded(picture(9).convert("P"))
    dataset = HeadDataset(files.write(tmp_path))
    assert dataset[0]["image"].shape == (3, SIDE, SIDE) and (dataset[0]["image"] == 77).all()
    assert dataset[1]["image"].shape == (3, SIDE, SIDE)


def test_published_sample_is_read(shared_dir):
    from training.train_config import DataConfig

    folder = shared_dir / "photos" / "panohead"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    config = DataConfig(images=(str(folder / "img"),), masks=(str(folder / "seg"),), resolution=563)
    dataset = HeadDataset(config)
    assert len(dataset) == 2 and dataset[0]["mask"].max() == 255


# Choice of views ------------------------------------------------------------------------------------------------------


def test_views_are_filtered_and_those_from_behind_repeated():
    yaw = [0, 95, -30, 179, 30.5, -120, 90]
    labels = head_labels(yaw)
    labels[0] = head_labels([0], pitch_deg=50)
    assert select_views(labels).tolist() == [0, 2, 4, 1, 3, 5, 6]
    assert select_views(labels, back_repeat=2).tolist() == [0, 2, 4, 1, 3, 5, 6, 1, 3, 5, 6]
    assert select_views(labels, max_pitch_deg=49.9).tolist() == [2, 4, 1, 3, 5, 6]
    assert select_views(labels, min_yaw_deg=29, max_yaw_deg=121).tolist() == [2, 4, 1, 5, 6]
    back = select_views(labels, min_yaw_deg=90, back_repeat=2)
    assert back.tolist() == [1, 3, 5, 6, 1, 3, 5, 6] and back.dtype == np.int64  # published: cannot be used


def test_published_angles_drop_level_views_behind_profile():
    labels = head_labels([0, 90.5, 120])
    assert select_views(labels).tolist() == [0, 1, 2]
    assert select_views(labels, published_angles=True).tolist() == [0, 2]


def test_subset_is_random_and_sorted(tmp_path):
    config = HeadFiles().write(tmp_path, max_images=5)
    order = np.arange(12)
    np.random.RandomState(3).shuffle(order)
    everything = numbers(HeadDataset(HeadFiles().write(tmp_path)))
    assert numbers(HeadDataset(config, seed=3)) == [everything[i] for i in sorted(order[:5])]


def test_no_image_within_the_limits_is_an_error(tmp_path):
    config = HeadFiles().write(tmp_path, min_yaw_deg=10.0, max_yaw_deg=5.0)
    with pytest.raises(ValueError, match=r"expected at least one of 12 images within yaw 10 to 5, pitch up to 90"):
        HeadDataset(config)


def test_fingerprint_tells_data_sets_apart(tmp_path):
    prints = {
        HeadDataset(HeadFiles(count).write(tmp_path / str(count), **options)).fingerprint
        for count, options in [(6, {}), (7, {}), (6, {"mirror": True}), (6, {"max_images": 5})]
    }
    assert len(prints) == 4
    assert HeadDataset(HeadFiles(6).write(tmp_path / "again", zipped=True)).fingerprint in prints


# Defects --------------------------------------------------------------------------------------------------------------

VICTIM = item_name(4)
TRUNCATED = encoded(picture(4))[:-30]


def set_entry(position, value):
    def spoil(files):
        files.labels[VICTIM][position] = value

    return spoil


def replace(kind, data):
    return lambda files: getattr(files, kind).update({VICTIM: data})


def bomb(width, height):
    """Return a PNG that announces a huge picture and holds nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


DEFECTS = {
    "truncated image": (replace("images", TRUNCATED), "image file is truncated|cannot be decoded"),
    "empty image": (replace("images", b""), "not an image that can be read"),
    "text for an image": (replace("images", b"<html>404</html>"), "not an image that can be read"),
    "wrong size": (replace("images", encoded(picture(4, 16))), "expected 8 x 8 pixels, came 16 x 16"),
    "huge size": (replace("images", bomb(9000, 9000)), "expected 8 x 8 pixels, came 9000 x 9000"),
    "decompression bomb": (replace("images", bomb(60000, 60000)), "decompression bomb"),
    "transparency": (replace("images", encoded(picture(4).convert("RGBA"))), "8 bits of RGB or grey .*came mode RGBA"),
    "16 bits": (replace("images", encoded(Image.new("I;16", (SIDE, SIDE)))), "8 bits of RGB or grey .*came mode I;16"),
    "program for an image": (replace("images", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"), "not an image"),
    "missing label": (lambda files: files.labels.pop(VICTIM), "expected a label in dataset.json, came none"),
    "label of 26": (lambda files: files.labels[VICTIM].append(1.0), "expected 25 numbers of a camera, came 26"),
    "class for a label": (lambda files: files.labels.update({VICTIM: 3}), "expected 25 numbers of a camera, came 3"),
    "NaN in a label": (set_entry(7, float("nan")), r"label, entry 7 \(cam2world\[1, 3\]\) must be finite, got nan"),
    "text in a label": (set_entry(7, "x"), "expected numbers, or numbers as strings"),
    "scaled rotation": (set_entry(5, -1.5), "must be a rotation"),
    "focal length of 0": (set_entry(16, 0.0), "must be above 0"),
    "missing mask": (lambda files: files.masks.pop(VICTIM), r"expected a mask 00001/img00000004\.\* in .*, came none"),
    "two masks": (
        lambda files: files.masks.update({VICTIM.replace("png", "jpg"): b""}),
        r"expected a mask 00001/img00000004\.\* in .*, came 2",
    ),
    "mask of another size": (replace("masks", encoded(mask_picture(4, 16))), "masks.*expected 8 x 8.*came 16 x 16"),
    "damaged mask": (replace("masks", TRUNCATED), "masks.*cannot be decoded"),
    "missing parsing map": (lambda files: files.parsing.pop(VICTIM), "expected a parsing map .* came none"),
    "parsing map of colours": (replace("parsing", encoded(picture(4))), "expected class indices of 8 bits, came mode"),
    "class index too high": (
        replace("parsing", encoded(Image.new("L", (SIDE, SIDE), 19))),
        "parsing.*expected class indices below 19, came 19",
    ),
    "two images of a name": (
        lambda files: files.images.update({VICTIM.replace("png", "webp"): b""}),
        r"img00000004.webp: expected one image of this name .*img00000004.png too",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("zipped", [False, True])
def test_defect_is_an_error_that_names_the_file_or_is_skipped(tmp_path, defect, zipped):
    spoil, message = DEFECTS[defect]
    files = HeadFiles()
    spoil(files)
    with pytest.raises(ValueError, match=message) as error:
        HeadDataset(files.write(tmp_path, zipped))
    assert VICTIM.removesuffix(".png") in str(error.value) and str(tmp_path) in str(error.value)
    dataset = HeadDataset(files.write(tmp_path, zipped, skip_bad=True))
    assert len(dataset.skipped) == 1 and re.search(message, dataset.skipped[0])
    assert dataset.describe()[1:] == ["data: 1 left out, such as:", f"  {dataset.skipped[0]}"]
    kept = 12 if defect == "two images of a name" else 11
    assert len(dataset) == kept and (4 in numbers(dataset)) == (kept == 12)


def test_several_defects_are_counted(tmp_path):
    files = HeadFiles()
    for number in (1, 4, 7):
        files.images[item_name(number)] = b"x"
    files.labels.pop(item_name(2))
    with pytest.raises(ValueError, match=r"img00000001.png: .*\(and 3 more; dataset_tool.py check lists them\)"):
        HeadDataset(files.write(tmp_path))
    assert len(HeadDataset(files.write(tmp_path, skip_bad=True)).skipped) == 4


def test_mirroring_needs_the_principal_point_in_the_middle(tmp_path):
    files = HeadFiles()
    files.labels[VICTIM][18] = 0.52
    HeadDataset(files.write(tmp_path))
    with pytest.raises(ValueError, match=r"img00000004.png: .*principal point of 0.5 for mirroring, came 0.52"):
        HeadDataset(files.write(tmp_path, mirror=True))


def test_data_set_of_defects_alone_is_an_error_also_when_skipping(tmp_path):
    files = HeadFiles(3)
    files.images = dict.fromkeys(files.images, b"x")
    with pytest.raises(ValueError, match="expected images in .*, came none; the first of 3 left out: .*img00000000"):
        HeadDataset(files.write(tmp_path, skip_bad=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON, came"),
        ("[" * 100_000, "expected JSON, came"),
        ("[]", "expected an object with the key 'labels', came a list of 0"),
        ('{"labels": null}', "expected labels of cameras, which a conditional run needs"),
        ('{"labels": {}}', "labels: expected a list"),
        ('{"labels": [["a"]]}', r"labels\[0\]: expected \[path, label\], came a list of 1"),
        (None, "expected labels of cameras, which a conditional run needs"),
    ],
)
def test_broken_dataset_json_is_named(tmp_path, text, message):
    config = HeadFiles().write(tmp_path, skip_bad=True)
    path = tmp_path / "images" / "dataset.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        HeadDataset(config)


@pytest.mark.parametrize("kind", ["images", "masks", "parsing"])
def test_absent_root_is_named(tmp_path, kind):
    config = HeadFiles().write(tmp_path, **{kind: (str(tmp_path / "nowhere"),)})
    with pytest.raises(ValueError, match=rf"data.{kind}: expected a folder or a zip file, came .*nowhere"):
        HeadDataset(config)


# Hostile zip files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png", "C:/x.png", "a\\..\\x.png", "a\0b.png"])
def test_unsafe_member_name_is_refused(tmp_path, name):
    files = HeadFiles(3)
    config = files.write(tmp_path, zipped=True)
    with zipfile.ZipFile(config.images[0], "a") as archive:
        info = zipfile.ZipInfo("x" * len(name))
        archive.writestr(info, files.images[item_name(0)])
    data = (tmp_path / "images.zip").read_bytes().replace(b"x" * len(name), name.encode())
    (tmp_path / "images.zip").write_bytes(data)
    with pytest.raises(ValueError, match="expected a relative path with forward slashes and without '..'"):
        HeadDataset(config)


def test_member_that_inflates_beyond_what_it_announces_is_refused(tmp_path):
    files = HeadFiles(3)
    big = encoded(picture(0)) + bytes(10_000_000)
    files.images[item_name(0)] = big
    config = files.write(tmp_path, zipped=True, method=zipfile.ZIP_DEFLATED)
    path = tmp_path / "images.zip"
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", len(big)), struct.pack("<I", 100)))
    with pytest.raises(ValueError, match="img00000000.png: damaged: size or checksum differ"):
        HeadDataset(config)


def test_member_that_announces_gigabytes_is_refused_unread(tmp_path):
    files = HeadFiles(3)
    config = files.write(tmp_path, zipped=True)
    path = tmp_path / "images.zip"
    size = len(files.images[item_name(0)])
    entry = path.read_bytes().rindex(item_name(0).encode()) - 46  # of the table of contents
    data = bytearray(path.read_bytes())
    assert data[entry + 24 : entry + 28] == struct.pack("<I", size)
    data[entry + 24 : entry + 28] = struct.pack("<I", 0xFFFF0000)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="img00000000.png: expected at most 268435456 bytes, came a member of"):
        HeadDataset(config)


def test_flipped_bit_in_a_zip_file_is_found_when_the_image_is_read(tmp_path):
    config = HeadFiles(3, [0, 1, 2]).write(tmp_path, zipped=True)
    dataset = HeadDataset(config)
    data = bytearray((tmp_path / "images.zip").read_bytes())
    data[data.index(b"IDAT") + 8] ^= 1  # in place, so that the open file changes
    with open(tmp_path / "images.zip", "r+b") as file:
        file.write(data)
    with pytest.raises(ValueError, match="img00000000.png: damaged: size or checksum"):
        dataset[0]


@pytest.mark.parametrize("cut", [100, 500])
def test_truncated_zip_file_is_named(tmp_path, cut):
    config = HeadFiles(3).write(tmp_path, zipped=True)
    path = tmp_path / "images.zip"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match="data.images: expected a folder or a zip file, came .*images.zip"):
        HeadDataset(config)


def test_randomly_damaged_zip_files_give_named_errors(tmp_path):
    config = HeadFiles(4).write(tmp_path, zipped=True, method=zipfile.ZIP_DEFLATED, skip_bad=True)
    path = tmp_path / "images.zip"
    whole = path.read_bytes()
    random = np.random.RandomState(0)
    outcomes = set()
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(3):  # most of them in the table of contents
            data[-1 - random.randint(random.choice([400, len(data)]))] = random.randint(256)
        path.write_bytes(data)
        try:
            dataset = HeadDataset(config)
            outcomes.add("whole" if len(dataset) == 4 else "parts")
        except ValueError as error:
            assert str(tmp_path) in str(error)
            outcomes.add("refused")
    assert outcomes == {"whole", "parts", "refused"}


def test_duplicate_member_is_refused(tmp_path):
    config = HeadFiles(3).write(tmp_path, zipped=True)
    with zipfile.ZipFile(config.images[0], "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(item_name(1), b"other")
    with pytest.raises(ValueError, match="img00000001.png: expected one member of this name, came several"):
        HeadDataset(config)


def test_hidden_files_and_those_of_packers_are_passed_over(tmp_path):
    files = HeadFiles(3, [0, 1, 2])
    junk = {"__MACOSX/00000/._img00000000.png": b"x", ".hidden/a.png": b"x", "00000/.b.png": b"x", "notes.txt": b"x"}
    for zipped in (False, True):
        config = files.write(tmp_path, zipped)
        write_files(tmp_path / "junk.zip", {**files.images, **junk, "dataset.json": b"{}"})
        if zipped:
            labels = zipfile.ZipFile(config.images[0]).read("dataset.json")
            write_files(tmp_path / "images.zip", {**files.images, **junk, "dataset.json": labels})
        else:
            write_files(tmp_path / "images", junk)
        assert len(HeadDataset(config)) == 3


def test_pipe_among_the_images_is_refused_and_not_waited_for(tmp_path):
    config = HeadFiles(3).write(tmp_path)
    os.mkfifo(tmp_path / "images" / "pipe.png")
    with pytest.raises(ValueError, match="pipe.png: expected a regular file"):
        HeadDataset(config)


def test_labels_of_the_data_set_are_written_as_published(tmp_path):
    config = HeadFiles(2).write(tmp_path)
    content = json.loads((tmp_path / "images" / "dataset.json").read_text())
    assert [name for name, _ in content["labels"]] == [item_name(0), item_name(1)] and config.resolution == SIDE


def test_many_images_are_checked_by_several_processes(tmp_path):
    files = HeadFiles(0, [])
    one = encoded(picture(1))
    files.images = {f"{i:05d}.png": one for i in range(1500)}
    files.images["01234.png"] = one[:-30]
    files.labels = dict.fromkeys(files.images, head_labels([0.0])[0].tolist())
    with pytest.raises(ValueError, match="01234.png: cannot be decoded"):
        HeadDataset(files.write(tmp_path, zipped=True, masks=(), parsing=(), parsing_classes=0))


def test_describe_says_what_there_is(tmp_path):
    assert HeadDataset(HeadFiles(3).write(tmp_path, mirror=True)).describe() == [
        "data: 6 images of 8 px with masks and parsing maps"
    ]
