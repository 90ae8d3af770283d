"""Cameras of photos, from numbers, files and angles, and what is no camera."""

import json
import math

import pytest
import torch

from camera_utils import focal_from_fov, split_label, yaw_pitch_roll_deg
from inference.photo_cameras import parse_camera
from tests.helpers.head_data import head_labels

LABEL = head_labels([30.0], 10.0)[0].astype(float).tolist()
ENTRY = ["00000/img00000000.png", LABEL]
EXACT = {"rtol": 0, "atol": 0}  # numbers are read, not computed


def changed(entries):
    return [entries.get(i, number) for i, number in enumerate(LABEL)]


def text_of(label):
    return ",".join(map(str, label))


# What is accepted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [text_of(LABEL), " ".join(map(str, LABEL)), f" {LABEL} \n", text_of(LABEL) + ","])
def test_numbers_between_commas_or_blanks_are_read_in_double_precision(text):
    torch.testing.assert_close(parse_camera(text), torch.tensor(LABEL, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize(
    "content", [LABEL, [str(number) for number in LABEL], ENTRY, {"labels": [ENTRY]}, {"labels": [ENTRY, ENTRY]}]
)
def test_file_with_one_camera_is_read(content, tmp_path):
    path = tmp_path / "my camera, turned=30.json"
    path.write_text(json.dumps(content), encoding="utf-8-sig")  # with the mark that some editors put in front
    torch.testing.assert_close(parse_camera(str(path)), torch.tensor(LABEL, dtype=torch.float64), **EXACT)


def test_file_with_several_cameras_gives_that_of_the_image(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": [["a.png", head_labels([0.0])[0].tolist()], ["b.png", LABEL]]}))
    camera = parse_camera(str(path), image_name="b.jpg")
    torch.testing.assert_close(camera, torch.tensor(LABEL, dtype=torch.float64), **EXACT)
    with pytest.raises(ValueError, match="expected one label, came 2"):
        parse_camera(str(path))
    with pytest.raises(ValueError, match=r"c\.png: expected a label in dataset\.json, came none"):
        parse_camera(str(path), image_name="c.png")


@pytest.mark.parametrize(
    ("text", "yaw", "pitch", "focal"),
    [
        ("yaw=20,pitch=5,fov=18.837", 20.0, 5.0, focal_from_fov(18.837)),
        (" pitch = -30 ", 0.0, -30.0, 4.2647),
        ("yaw=180 fov=40,", 180.0, 0.0, focal_from_fov(40.0)),
        ("yaw=-100;pitch=90", None, 90.0, 4.2647),
    ],
)
def test_angles_place_a_camera_that_looks_at_the_head(text, yaw, pitch, focal):
    camera = parse_camera(text, radius=3.0)
    assert camera.shape == (25,) and camera.dtype == torch.float64
    angles = yaw_pitch_roll_deg(camera[None])[0]
    tolerance = {"rtol": 0, "atol": 2e-3}  # degrees; asin and atan2 of float32 numbers near 1 and 0
    if yaw is not None:
        assert math.isclose(math.cos(math.radians(float(angles[0]) - yaw)), 1.0, abs_tol=1e-6)  # 180 is -180
    torch.testing.assert_close(angles[1], torch.tensor(pitch, dtype=torch.float64), **tolerance)
    cam2world, intrinsics = split_label(camera[None])
    rounding = {"rtol": 1e-6, "atol": 1e-6}  # of float32
    torch.testing.assert_close(cam2world[0, :3, 3] + 3.0 * cam2world[0, :3, 2], torch.zeros(3).double(), **rounding)
    expected = torch.tensor([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(intrinsics[0], expected, **rounding)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected 25 numbers, a JSON file, or angles .* came ''"),
        ("frontal", r"came 'frontal'"),
        ("/", "came '/'"),
        (",", "came ','"),
        ("yaw", "came 'yaw'"),
        (text_of(LABEL[:24]), "expected 25 numbers of a camera, came 24"),
        (text_of([*LABEL, 1]), "expected 25 numbers of a camera, came 26"),
        (text_of(changed({0: math.nan})), r"entry 0 \(cam2world\[0, 0\]\) must be finite, got nan"),
        (text_of(changed({0: 2.0})), r"cam2world\[:3, :3\] must be a rotation"),
        (text_of(changed({14: 1.0})), "last row of a pose"),
        (text_of(changed({16: 0.0})), r"must be above 0 \(a focal length\)"),
        (
            text_of(changed({16: 2183.0, 18: 256.0, 20: 2183.0, 21: 256.0})),
            r"shares of the image, .* point of 256, 256",
        ),
        (text_of(changed({i: -LABEL[i] for i in (3, 7, 11)})), "camera that looks at the head .* looks away"),
        ("yaw=", "yaw: expected degrees, came ''"),
        ("yaw=left", "yaw: expected degrees, came 'left'"),
        ("yaw=nan", "yaw: expected degrees between -360 and 360, came nan"),
        ("pitch=91", "pitch: expected degrees between -90 and 90, came 91"),
        ("fov=0", "fov: expected degrees between 0 and 180, came 0"),
        ("fov=180", "fov: expected degrees between 0 and 180, came 180"),
        ("yaw=1,yaw=2", "at most once, came 'yaw' twice"),
        ("yaw=1,roll=3", "expected each of yaw, pitch, fov at most once, came 'roll=3'"),
        ("no such.json", r"expected a file, came no such\.json, which is absent"),
    ],
)
def test_what_is_no_camera_is_named(text, message):
    with pytest.raises(ValueError, match=f"^camera: .*{message}"):
        parse_camera(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected JSON, came Expecting value"),
        ("[" * 100_000, "expected JSON, came maximum recursion"),
        ("\udcff", "expected JSON, came 'utf-8' codec"),
        ("null", "expected an object with the key 'labels', came None"),
        ("{}", "expected an object with the key 'labels'"),
        ('{"labels": null}', "expected a label, came none"),
        ('{"labels": []}', "expected a label, came none"),
        ('{"labels": {"a.png": []}}', "expected a list of .path, label., came an object"),
        ("[]", "expected 25 numbers of a camera, came 0"),
        (json.dumps(["x"] * 25), "expected numbers, or numbers as strings"),
        (json.dumps(["a.png", LABEL[:3]]), "expected 25 numbers of a camera, came 3"),
        (json.dumps(["a.png", None]), "came null"),
        (json.dumps(changed({5: math.inf})), "must be finite, got inf"),
    ],
)
def test_file_without_a_camera_is_named(content, message, tmp_path):
    path = tmp_path / "camera.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"^camera: .*camera\.json: .*{message}"):
        parse_camera(str(path))


def test_folder_called_json_is_named(tmp_path):
    (tmp_path / "camera.json").mkdir()
    with pytest.raises(ValueError, match="expected a file, .* which is not a regular file"):
        parse_camera(str(tmp_path / "camera.json"))
