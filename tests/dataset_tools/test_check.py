"""The list of defects, and the pictures."""

import numpy as np
import pytest

from dataset_tools.check import check
from dataset_tools.pictures import pose_histogram
from tests.helpers.head_data import SIDE, HeadFiles, encoded, item_name, picture
from torch_utils.pictures import PARSING_PALETTE


def run(config, **options):
    return check(config.images, config.masks, config.parsing, **{"parsing_classes": 19, **options})


@pytest.mark.parametrize("workers", [0, 2])
def test_whole_data_set_has_no_defects(tmp_path, workers):
    seen = []
    config = HeadFiles(36).write(tmp_path)
    report = run(config, workers=workers, progress=lambda done, total: seen.append((done, total)))
    assert report.defects == [] and report.remarks == [] and len(report.usable) == 36
    assert seen == [(32, 36), (36, 36)]
    summary = report.summary()
    assert (summary["resolution"], summary["num_usable"], summary["num_defects"]) == (SIDE, 36, 0)
    assert summary["share"] == {"front": 0.25, "side": 0.25, "back": 0.5}
    assert summary["yaw_deg"]["min"] == pytest.approx(-171, abs=1e-3)


def test_every_defect_is_listed(tmp_path):
    files = HeadFiles(40)
    files.images[item_name(1)] = b"x"
    files.images[item_name(20)] = files.images[item_name(20)][:-30]
    files.masks[item_name(20)] = encoded(picture(0, 16))
    files.masks.pop(item_name(3))
    files.labels.pop(item_name(4))
    files.labels[item_name(5)][3] = float("nan")
    files.images["../evil.png"] = b"x"
    files.images[item_name(6).replace("png", "jpg")] = b"x"
    files.masks["99999/nobody.png"] = b"x"
    files.labels["99999/nobody.png"] = None
    report = run(files.write(tmp_path, zipped=True))
    expected = ["evil.png", "img00000003", "img00000006.png: expected one image", "img00000001", "img00000004"]
    expected += [
        "img00000006.jpg: not an image",
        "img00000005",
        "images.zip/00005/img00000020.png: cannot be decoded",
        "masks.zip/00005",
    ]
    for part in expected:
        assert sum(part in line for line in report.defects) == 1, (part, report.defects)
    assert len(report.defects) == 9
    assert len(report.usable) == 40 - 6
    assert sum("nobody" in line for line in report.remarks) == 2
    assert report.summary()["num_defects"] == 9


def test_size_is_that_of_the_first_image_or_given(tmp_path):
    files = HeadFiles(3)
    files.images[item_name(2)] = encoded(picture(2, 16))
    config = files.write(tmp_path)
    assert len(run(config).defects) == 1
    assert len(run(config, resolution=16).defects) == 8  # all files but the third image


def test_data_set_without_labels_is_remarked_upon(tmp_path):
    config = HeadFiles(3).write(tmp_path)
    (tmp_path / "images" / "dataset.json").unlink()
    report = run(config)
    assert report.defects == [] and not report.has_labels
    assert "no labels" in report.remarks[0]
    report.contact_sheet()


def test_data_set_without_images_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="images: expected at least one that can be opened"):
        check([str(tmp_path / "images")])


def test_contact_sheet_shows_images_over_masks_over_classes_by_yaw(tmp_path):
    report = run(HeadFiles(12).write(tmp_path))
    sheet = np.asarray(report.contact_sheet(count=3))
    assert sheet.shape == (3 * 128 + 24, 3 * 132 + 4, 3)
    for column, number in enumerate((0, 6, 11)):  # the least, the middle and the largest yaw
        x = 4 + column * 132
        assert sheet[20 + 64, x + 10, 0] == number
        assert sheet[20 + 128 + 64, x + 10].tolist() == [255 - number] * 3
        assert sheet[20 + 256 + 64, x + 10].tolist() == PARSING_PALETTE[2].tolist()
        assert sheet[20 + 256 + 64, x + 120].tolist() == PARSING_PALETTE[17].tolist()


def test_contact_sheet_shows_rare_views_from_behind(tmp_path):
    yaw = [*np.linspace(-20, 20, 20), 178.0]
    report = run(HeadFiles(21, yaw).write(tmp_path))
    sheet = np.asarray(report.contact_sheet(count=4))
    assert 20 in sheet[20 + 64, 14::132, 0]


def test_histogram_is_dark_where_images_are():
    picture = np.asarray(pose_histogram(np.array([42.0] * 5 + [-178.0]), np.array([12.0] * 5 + [-88.0])))
    darkness = 255 - picture[:, :, 0].astype(int)

    def cell(yaw, pitch):
        return darkness[150 + (90 - pitch) * 2, 60 + (yaw + 180) * 2]

    assert cell(42, 12) > cell(-178, -88) > 0 == cell(2, 2)


def test_histogram_takes_the_edges_of_all_ranges():
    pose_histogram(np.array([-180.0, 180.0]), np.array([-90.0, 90.0]))
    pose_histogram(np.zeros(0), np.zeros(0))
