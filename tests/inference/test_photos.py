"""Photos for inversion: what is found, what their pixels and cameras become, and what is refused."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from camera_utils import mirror_label
from dataset_tools.pack import PackRequest, pack
from inference.photos import list_photos, parse_camera, read_photo
from tests.helpers.head_data import encoded, head_labels, write_files
from training.image_transforms import Transform

LABELS = head_labels([-40.0, 0.0, 40.0, 170.0]).astype(float).tolist()
FRONT = "yaw=0"
EXACT = {"rtol": 0, "atol": 0}


def noise(width=16, height=16, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def data_set(folder, names, labels=None, **more):
    """Write photos with labels; `labels` None takes one after the other of LABELS."""
    table = dict(zip(names, LABELS)) if labels is None else labels
    files = {name: encoded(noise(seed=i)) for i, name in enumerate(names)}
    files["dataset.json"] = json.dumps({"labels": [list(entry) for entry in table.items()]}).encode()
    write_files(folder, {**files, **more})
    return folder


def names_of(photos):
    return [photo.name for photo in photos]


def read_one(folder, data, resolution=16, name="photo.png", **options):
    """Write and read a photo, whose camera is in front unless options say otherwise."""
    write_files(folder, {name: data})
    options.setdefault("camera", FRONT)
    (file,) = list_photos(folder / name, **options)
    return read_photo(file, resolution)


def double(label):
    return torch.tensor(label, dtype=torch.float64)


# Finding --------------------------------------------------------------------------------------------------------------


def test_folder_is_listed_in_the_order_of_paths_with_its_cameras(tmp_path):
    folder = data_set(tmp_path / "a set", ["b.png", "10.png", "2/x.png", ".hidden.png"])
    photos = list_photos(folder)
    assert names_of(photos) == ["10", "2_x", "b"]
    assert [photo.image for photo in photos] == [folder / "10.png", folder / "2/x.png", folder / "b.png"]
    for photo, label in zip(photos, (LABELS[1], LABELS[2], LABELS[0])):
        torch.testing.assert_close(photo.label, double(label), **EXACT)
        assert photo.camera_of == "stored image" and photo.defect is None and photo.mask is None


def test_folder_of_data_sets_is_all_their_photos(tmp_path):
    data_set(tmp_path / "0", ["0.png"])
    data_set(tmp_path / "more" / "img", ["0.png", "1.png"])
    write_files(tmp_path / "more" / "seg", {"0.png": encoded(noise())})  # no labels: not a photo
    photos = list_photos(tmp_path)
    assert names_of(photos) == ["0_0", "more_img_0", "more_img_1"]
    torch.testing.assert_close(photos[2].label, double(LABELS[1]), **EXACT)


def test_labels_in_a_folder_count_for_all_below(tmp_path):
    folder = data_set(tmp_path, ["00000/a.png"])
    data_set(folder / "00000", [], labels={"a.png": LABELS[3]})
    torch.testing.assert_close(list_photos(folder)[0].label, double(LABELS[0]), **EXACT)


def test_single_photo_takes_the_label_beside_it_or_the_camera_given(tmp_path):
    folder = data_set(tmp_path, ["a.png", "b.png"])
    (photo,) = list_photos(folder / "b.png")
    torch.testing.assert_close(photo.label, double(LABELS[1]), **EXACT)
    assert photo.camera_of == "stored image"
    (photo,) = list_photos(folder / "b.png", camera="yaw=20", radius=3.0)
    torch.testing.assert_close(photo.label, parse_camera("yaw=20", radius=3.0), **EXACT)
    assert photo.camera_of == "crop"
    (photo,) = list_photos(folder / "b.png", camera=",".join(map(str, LABELS[2])))
    assert photo.camera_of == "stored image"
    (photo,) = list_photos(folder / "b.png", camera=str(folder / "dataset.json"))
    torch.testing.assert_close(photo.label, double(LABELS[1]), **EXACT)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my photo (1).png", "my photo (1)"),
        ("Zoë.png", "Zoë"),
        ("Zoe\u0308.png", "Zoë"),  # decomposed, as some systems store it
        ("हिन्दी 😀.png", "हिन्दी 😀"),
        ("a:b*c%d\\e.png", "a_b_c_d_e"),
        ("line\nbreak\u2028\u202e.png", "line_break__"),
        (b"latin-\xe9.png".decode("utf-8", "surrogateescape"), "latin-_"),
        ("-rf.png", "_rf"),
        ("  .png", "_"),
        ("a.b..png", "a.b_"),
    ],
)
def test_names_become_fit_for_folders(name, expected, tmp_path):
    write_files(tmp_path, {name: encoded(noise())})
    (photo,) = list_photos(tmp_path / name, camera=FRONT)
    assert photo.name == expected
    (tmp_path / "results" / photo.name).mkdir(parents=True)
    assert read_photo(photo, 16).name == expected


def test_long_names_are_cut_and_stay_different(tmp_path):
    stem = "ü" * 100
    folder = data_set(tmp_path, [f"{stem}/{stem}a.png", f"{stem}/{stem}b.png"])
    names = names_of(list_photos(folder))
    assert len(set(names)) == 2 and all(len(name.encode()) <= 120 for name in names)


# Masks ----------------------------------------------------------------------------------------------------------------


def test_masks_are_matched_by_path_without_extension(tmp_path):
    folder = data_set(tmp_path / "img", ["a.png", "sub/b.png"])
    mask = encoded(Image.new("L", (16, 16), 255))
    write_files(tmp_path / "seg", {"a.png": mask, "sub/b.jpg": mask, "other.png": mask})
    for target in (folder, tmp_path):
        masks = [photo.mask for photo in list_photos(target, mask=tmp_path / "seg")]
        assert masks == [tmp_path / "seg/a.png", tmp_path / "seg/sub/b.jpg"]
    (photo,) = list_photos(folder / "a.png", mask=tmp_path / "seg")
    assert photo.mask == tmp_path / "seg/a.png"
    (photo,) = list_photos(folder / "a.png", mask=tmp_path / "seg/other.png")
    assert photo.mask == tmp_path / "seg/other.png"


def test_masks_within_the_target_are_no_photos(tmp_path):
    folder = data_set(tmp_path, ["a.png"], **{"seg/a.png": encoded(Image.new("L", (16, 16), 255))})
    (photo,) = list_photos(folder, mask=folder / "seg")
    assert photo.defect is None and photo.mask == folder / "seg/a.png"


@pytest.mark.parametrize("folder", ["", "sub"])
def test_results_within_the_target_are_no_photos(folder, tmp_path):
    photos = data_set(tmp_path / folder, ["a.png"])
    results = data_set(photos / "out", ["target.png"])
    assert len(list_photos(tmp_path)) == len(list_photos(tmp_path, results=photos / "ou")) == 2
    assert [photo.image.name for photo in list_photos(tmp_path, results=results)] == ["a.png"]


def test_mask_is_cropped_with_its_photo(tmp_path):
    array = np.zeros((16, 24), np.uint8)
    array[:, 4:12] = 255  # the left half of the square in the middle
    write_files(tmp_path, {"mask.png": encoded(Image.fromarray(array))})
    photo = read_one(tmp_path, encoded(noise(24, 16)), mask=tmp_path / "mask.png")
    expected = torch.zeros(1, 1, 16, 16)
    expected[..., :8] = 1
    torch.testing.assert_close(photo.mask, expected, **EXACT)


@pytest.mark.parametrize(
    "mask",
    [
        Image.new("1", (16, 16), 1),
        Image.fromarray(np.full((16, 16), 0xFFFF, np.uint16)),
        Image.new("RGB", (16, 16), (255,) * 3),
    ],
)
def test_masks_of_other_types_are_read(mask, tmp_path):
    write_files(tmp_path, {"mask.png": encoded(mask)})
    photo = read_one(tmp_path, encoded(noise()), mask=tmp_path / "mask.png")
    torch.testing.assert_close(photo.mask, torch.ones(1, 1, 16, 16), **EXACT)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (encoded(Image.new("L", (8, 8), 255)), "expected a mask of the size of the photo, 16 x 16, came 8 x 8"),
        (encoded(Image.new("L", (16, 16), 1)), "expected a mask that is 255 on the head, came values up to 1"),
        (encoded(Image.new("L", (16, 16), 0)), "came values up to 0"),
        (encoded(Image.new("RGBA", (16, 16), (255, 255, 255, 0))), "came one with transparency"),
        (encoded(noise())[:300], "cannot be decoded"),
        (b"", "not an image that can be read"),
    ],
)
def test_masks_that_cannot_be_used_are_named(mask, message, tmp_path):
    write_files(tmp_path, {"m.png": mask})
    with pytest.raises(ValueError, match=rf"m\.png: .*{message}"):
        read_one(tmp_path, encoded(noise()), mask=tmp_path / "m.png")


# Pixels and cameras ---------------------------------------------------------------------------------------------------


def test_square_photo_of_the_right_size_keeps_pixels_and_camera(tmp_path):
    image = noise()
    folder = data_set(tmp_path, ["a.png"], **{"a.png": encoded(image)})
    photo = read_photo(list_photos(folder)[0], 16)
    assert photo.image.dtype == photo.label.dtype == torch.float32
    shown = ((photo.image[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    assert (shown == np.asarray(image)).all()
    assert photo.image.min() >= -1 and photo.image.max() <= 1
    torch.testing.assert_close(photo.label, torch.tensor([LABELS[0]]), **EXACT)
    assert photo.mask is None and photo.note is None


def test_crop_is_that_of_packed_data_sets(tmp_path):
    """Pixels and intrinsics of a photo that is not square are those that `dataset_tool.py pack` gives."""
    table = {"a.png": LABELS[0], "b.png": LABELS[2]}
    images = {"a.png": encoded(noise(40, 24)), "b.png": encoded(noise(24, 47))}
    folder = data_set(tmp_path / "photos", [], labels=table, **images)
    pack(PackRequest(source=folder, dest=tmp_path / "p", transform=Transform(crop="center-crop", resolution=(16, 16))))
    for stored, packed in zip(list_photos(folder), list_photos(tmp_path / "p"), strict=True):
        ours, theirs = read_photo(stored, 16), read_photo(packed, 16)
        torch.testing.assert_close(ours.image, theirs.image, **EXACT)
        torch.testing.assert_close(ours.label, theirs.label, **EXACT)
        assert "cropped" in ours.note and theirs.note is None


def test_crop_scales_the_focal_length_that_the_label_gives(tmp_path):
    label = list(LABELS[0])
    label[16], label[20] = 2.0, 3.0  # of 24 x 16 pixels, which are square: 48 pixels either way
    folder = data_set(tmp_path, [], labels={"a.png": label}, **{"a.png": encoded(noise(24, 16))})
    photo = read_photo(list_photos(folder)[0], 16)
    torch.testing.assert_close(photo.label[0, [16, 20]], torch.tensor([3.0, 3.0]), **EXACT)
    assert (
        photo.note == "cropped 24 x 16 to the 16 x 16 in the middle, where the focal lengths are 3 and 3 image widths"
    )


def test_label_of_a_square_on_a_photo_that_is_none_is_pointed_out(tmp_path):
    folder = data_set(tmp_path, [], labels={"a.png": LABELS[0]}, **{"a.png": encoded(noise(24, 16))})
    assert "does the label describe a square already?" in read_photo(list_photos(folder)[0], 16).note


def test_camera_of_angles_describes_the_crop(tmp_path):
    photo = read_one(tmp_path, encoded(noise(24, 16)), camera="yaw=20,fov=30")
    torch.testing.assert_close(photo.label[0], parse_camera("yaw=20,fov=30").float(), **EXACT)
    assert photo.note.endswith("in the middle")


def test_small_photo_is_enlarged_and_says_so(tmp_path):
    photo = read_one(tmp_path, encoded(noise(8, 8)), resolution=32)
    assert photo.image.shape == (1, 3, 32, 32) and photo.note == "enlarged from 8 x 8 to 32 x 32"


def test_exif_rotated_photo_is_turned_upright_before_its_crop(tmp_path):
    upright = noise(16, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    write_files(tmp_path, {"mask.png": encoded(Image.new("L", (16, 24), 255))})  # drawn on what viewers show
    turned = read_one(tmp_path, stored, mask=tmp_path / "mask.png")
    torch.testing.assert_close(turned.image, read_one(tmp_path, encoded(upright)).image, **EXACT)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (16, 16), 51), -0.6),
        (Image.fromarray(np.full((16, 16), 257 * 51, np.uint16)), -0.6),
        (Image.new("RGBA", (16, 16), (51, 51, 51, 255)), -0.6),
        (Image.new("RGBA", (16, 16), (51, 51, 51, 0)), 1.0),
        (Image.new("LA", (16, 16), (51, 255)), -0.6),
        (Image.new("RGB", (16, 16), (51,) * 3).convert("P", palette=Image.Palette.ADAPTIVE), -0.6),
    ],
    ids=["grey", "16 bits", "RGBA", "transparent", "grey with alpha", "palette"],
)
def test_photos_of_all_types_become_rgb(image, expected, tmp_path):
    photo = read_one(tmp_path, encoded(image))
    rounding = {"rtol": 0, "atol": 1e-6}  # of 51 / 127.5 - 1 in float32
    torch.testing.assert_close(photo.image, torch.full((1, 3, 16, 16), expected), **rounding)


def test_mirrored_photo_with_mirrored_label_is_the_mirrored_crop(tmp_path):
    folder = data_set(tmp_path, [], labels={"a.png": LABELS[0]}, **{"a.png": encoded(noise(23, 16))})
    photo = read_photo(list_photos(folder)[0], 16)
    flipped = mirror_label(double(LABELS[0])).tolist()
    image = noise(23, 16).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored = data_set(tmp_path / "m", [], labels={"a.png": flipped}, **{"a.png": encoded(image)})
    other = read_photo(list_photos(mirrored)[0], 16)
    # An odd margin cannot be halved: in both, the crop is half a pixel to the left of the middle.
    torch.testing.assert_close(other.label[:, 18] - 0.5, photo.label[:, 18] - 0.5, **EXACT)
    torch.testing.assert_close(other.image.flip(-1)[..., :-1], photo.image[..., 1:], **EXACT)


# What is wrong with one photo -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("none", r"expected a label in dataset\.json, came none"),
        (None, "came null"),
        (LABELS[1][:16], "expected 25 numbers of a camera, came 16"),
        ([float("nan")] * 25, "must be finite, got nan"),
        ([2 * number for number in LABELS[1]], "must be 1|must be a rotation"),
    ],
)
def test_photo_without_a_camera_does_not_stop_the_others(label, message, tmp_path):
    table = {"a.png": LABELS[0], "b.png": label, "c.png": LABELS[2]}
    if label == "none":
        del table["b.png"]
    folder = data_set(tmp_path, ["a.png", "b.png", "c.png"], labels=table)
    photos = list_photos(folder)
    assert [photo.defect is None for photo in photos] == [True, False, True]
    assert photos[1].label is None and names_of(photos) == ["a", "b", "c"]
    read_photo(photos[2], 16)
    with pytest.raises(ValueError, match=rf"b\.png: .*({message})"):
        read_photo(photos[1], 16)
    with pytest.raises(ValueError, match=rf"b\.png: .*({message})"):
        list_photos(folder / "b.png")


@pytest.mark.parametrize(("masks", "message"), [(["a.png"], "came none"), (["a.png", "b.png", "b.jpg"], "came 2")])
def test_photo_without_its_mask_does_not_stop_the_others(masks, message, tmp_path):
    folder = data_set(tmp_path / "img", ["a.png", "b.png"])
    write_files(tmp_path / "seg", {name: encoded(Image.new("L", (16, 16), 255)) for name in masks})
    good, bad = list_photos(folder, mask=tmp_path / "seg")
    read_photo(good, 16)
    with pytest.raises(ValueError, match=rf"b\.png: expected a mask b\.\* in .*seg, {message}"):
        read_photo(bad, 16)


def test_broken_link_and_pipe_do_not_stop_the_others(tmp_path):
    folder = data_set(tmp_path, ["a.png"])
    (folder / "link.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    photos = list_photos(folder)
    assert [photo.defect is None for photo in photos] == [True, False, False]
    for photo in photos[1:]:
        with pytest.raises(ValueError, match=r"expected a regular file"):
            read_photo(photo, 16)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image that can be read"),
        (b"<html>not found</html>", "not an image that can be read"),
        (encoded(noise(64, 64))[:5000], "cannot be decoded"),
        (encoded(noise(64, 64), "JPEG")[:1500], "cannot be decoded"),
        (encoded(Image.new("F", (16, 16)), "TIFF"), "expected integers, came an image of floating-point numbers"),
        (encoded(Image.new("1", (40000, 4))), "expected at most 32768 pixels a side"),
        (encoded(Image.new("1", (20000, 20000))), "exceeds limit"),
    ],
    ids=["empty", "web page", "PNG cut off", "JPEG cut off", "floating point", "too wide", "too large"],
)
def test_photos_that_cannot_be_read_are_named(data, message, tmp_path):
    with pytest.raises(ValueError, match=rf"my photo\.png: .*{message}"):
        read_one(tmp_path, data, name="my photo.png")


def test_photo_that_is_gone_is_named(tmp_path):
    (photo,) = list_photos(data_set(tmp_path, ["a.png"]))
    photo.image.unlink()
    with pytest.raises(ValueError, match=r"a\.png: expected a file, came absent"):
        read_photo(photo, 16)


def test_file_that_no_photo_needs_is_not_read(tmp_path):
    (photo,) = list_photos(data_set(tmp_path, ["a.png"]))
    os.truncate(photo.image, 1 << 30)  # takes no space on disk
    with pytest.raises(ValueError, match=r"a\.png: expected at most 268435456 bytes, came a file of 1073741824"):
        read_photo(photo, 16)


def test_resolution_that_no_network_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match="resolution: expected a side that is a power of two"):
        read_one(tmp_path, encoded(noise()), resolution=48)


# What concerns all ----------------------------------------------------------------------------------------------------


def test_photos_whose_names_collide_are_refused(tmp_path):
    for number, pair in enumerate((["a.png", "a.jpg"], ["x/a.png", "x_a.png"], ["Zoë.png", "Zoe\u0308.png"])):
        folder = data_set(tmp_path / str(number), pair)
        with pytest.raises(ValueError, match="target: expected photos with results in different folders, came"):
            list_photos(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"expected dataset\.json in .* or in folders below it, came none"),
        ({"a.png": encoded(noise())}, r"expected dataset\.json in"),
        ({"dataset.json": b'{"labels": []}'}, "expected images in .*, came none"),
        (
            {"dataset.json": b'{"labels": null}', "a.png": encoded(noise())},
            r"dataset\.json: expected labels, came none",
        ),
        ({"dataset.json": b"{", "a.png": encoded(noise())}, r"dataset\.json: expected JSON"),
    ],
)
def test_folder_without_labels_or_photos_is_refused(files, message, tmp_path):
    (tmp_path / "set").mkdir()
    write_files(tmp_path / "set", files)
    with pytest.raises(ValueError, match=message):
        list_photos(tmp_path / "set")


def test_target_that_is_no_photo_is_refused(tmp_path):
    write_files(tmp_path, {"photos.zip.txt": b"", "a.png": encoded(noise())})
    os.mkfifo(tmp_path / "pipe.png")
    expected = {
        "no.png": "which is absent",
        "photos.zip.txt": "whose ending is that of neither",
        "pipe.png": "which is not a regular file",
    }
    for name, message in expected.items():
        with pytest.raises(ValueError, match=rf"target: expected a folder with dataset\.json, or an image.*{message}"):
            list_photos(tmp_path / name, camera=FRONT)
    with pytest.raises(
        ValueError, match=r"a\.png: expected a camera, or labels in dataset\.json beside it, came neither"
    ):
        list_photos(tmp_path / "a.png")
    with pytest.raises(ValueError, match="camera: expected one image as the target of one camera, came the folder"):
        list_photos(tmp_path, camera=FRONT)


def test_masks_that_concern_no_photo_are_refused(tmp_path):
    folder = data_set(tmp_path / "img", ["a.png", "b.png"])
    (tmp_path / "empty").mkdir()
    write_files(tmp_path, {"mask.png": encoded(Image.new("L", (16, 16), 255)), "mask.txt": b""})
    expected = {
        "none": "mask: expected an image or a folder of images, .* which is absent",
        "mask.txt": "mask: expected an image or a folder of images, .* ending",
        "mask.png": "mask: expected a folder, for there are several photos",
        "empty": "mask: expected images in .*empty, came none",
        "img": "mask: expected another folder than that of the photos",
    }
    for name, message in expected.items():
        with pytest.raises(ValueError, match=message):
            list_photos(folder, mask=tmp_path / name)


# Real photos ----------------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_real_photos_are_read_with_their_masks(shared_dir):
    photos = shared_dir / "photos"
    assert names_of(list_photos(photos)) == ["0_0", "1_1", "panohead_img_000134", "panohead_img_000157"]
    assert names_of(list_photos(photos / "0")) == ["0"]
    for file in list_photos(photos / "panohead" / "img", mask=photos / "panohead" / "seg"):
        photo = read_photo(file, 64)
        square = Image.open(file.image).resize((64, 64), Image.Resampling.LANCZOS)  # as published
        shown = ((photo.image[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
        assert (shown == np.asarray(square)).all()
        torch.testing.assert_close(photo.label[0], file.label.float(), **EXACT)
        corner, middle = photo.mask[0, 0, 0, 0], photo.mask[0, 0, 32, 32]
        assert corner == 0 and middle > 0.99  # 254 of 255
