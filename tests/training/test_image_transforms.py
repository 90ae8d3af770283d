"""Crops, sizes, types of images, and what becomes of the camera."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.head_data import encoded, head_labels
from training.image_sources import BadImage
from training.image_transforms import Transform, encode, load_upright, to_mask, to_parsing, to_rgb, transform_label


def gradient(width, height):
    """Return an image whose red grows to the right, and whose green grows downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def run(image, exact=False, **options):
    transform = Transform(**options)
    return transform.apply(image, transform.geometry(image.size), exact)


@pytest.mark.parametrize(("width", "height", "box"), [(24, 16, (4, 0, 20, 16)), (16, 25, (0, 4, 16, 20))])
def test_center_crop_takes_the_square_in_the_middle(width, height, box):
    image = gradient(width, height)
    assert (np.asarray(run(image, crop="center-crop")) == np.asarray(image.crop(box))).all()


@pytest.mark.parametrize("filter_name", ["lanczos", "box", "bilinear", "bicubic"])
def test_resizing_uses_the_named_filter(filter_name):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8))
    expected = image.resize((8, 8), Image.Resampling[filter_name.upper()])
    assert (np.asarray(run(image, resolution=(8, 8), filter=filter_name)) == np.asarray(expected)).all()


def test_exact_resizing_invents_no_values():
    classes = Image.fromarray(np.random.RandomState(0).choice([2, 17], (33, 33)).astype(np.uint8))
    assert set(np.unique(run(classes, exact=True, resolution=(8, 8)))) == {2, 17}


def test_wide_crop_is_a_square_with_black_above_and_below():
    image = run(Image.new("RGB", (40, 40), (9, 9, 9)), crop="center-crop-wide", resolution=(16, 8))
    pixels = np.asarray(image)
    assert pixels.shape == (16, 16, 3)
    assert (pixels[:4] == 0).all() and (pixels[12:] == 0).all() and (pixels[4:12] == 9).all()


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({}, (24, 16), "expected a square image, came 24 x 16"),
        ({}, (24, 24), "power of two, at least 4, came 24"),
        ({"resolution": (16, 16)}, (24, 16), "expected the shape of 16 x 16, came 24 x 16; a crop changes it"),
        ({"crop": "center-crop"}, (30, 24), "power of two, at least 4, came 24"),
    ],
)
def test_result_that_networks_cannot_take_is_refused(options, size, message):
    with pytest.raises(ValueError, match=message):
        Transform(**options).geometry(size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": (16, 8)}, "resolution: expected a square, came 16x8"),
        ({"resolution": (24, 24)}, "resolution: expected a side that is a power of two"),
        ({"crop": "center-crop-wide"}, "resolution: expected a width and a height for center-crop-wide, came none"),
        ({"crop": "center-crop-wide", "resolution": (8, 16)}, "wider than high"),
    ],
)
def test_impossible_transforms_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Transform(**options)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((48, 32), {"crop": "center-crop", "resolution": (64, 64)}),
        ((32, 48), {"crop": "center-crop", "resolution": (16, 16)}),
        ((48, 48), {"crop": "center-crop-wide", "resolution": (64, 32)}),
        ((100, 40), {"crop": "center-crop-wide", "resolution": (64, 32)}),
    ],
)
def test_label_of_a_crop_projects_points_to_where_their_pixels_went(size, options):
    label = head_labels([30.0])[0].astype(float).tolist()
    label[17], label[18], label[21] = 0.1, 0.47, 0.55  # skew, and a principal point that is not in the middle
    transform = Transform(**options)
    geometry = transform.geometry(size)
    before, after = (np.array(entries[16:]).reshape(3, 3) for entries in (label, transform_label(label, geometry)))
    ray = np.array([0.01, -0.02, 1.0])
    pixel = (before @ ray)[:2] * size
    part = np.array(geometry.box[2:]) - geometry.box[:2]
    margin = (np.array(geometry.canvas) - geometry.size) / 2
    moved = (pixel - geometry.box[:2]) * geometry.size / part + margin
    np.testing.assert_allclose((after @ ray)[:2] * geometry.canvas, moved, rtol=1e-12)  # float64 rounding
    assert transform_label(label, geometry)[:16] == label[:16]


def test_label_of_a_square_image_stays():
    label = head_labels([30.0])[0].tolist()
    assert transform_label(label, Transform(resolution=(8, 8)).geometry((563, 563))) == label


def test_exif_orientation_is_followed():
    image = gradient(16, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to be seen upright
    upright = load_upright(encoded(image, "PNG", exif=exif))
    assert upright.size == (8, 16)
    assert (np.asarray(upright) == np.asarray(image.transpose(Image.Transpose.ROTATE_270))).all()


def test_exif_data_that_are_damaged_are_named():
    exif = Image.Exif()
    exif[0x0112] = 6
    damaged = exif.tobytes().replace(b"II*\0", b"IX*\0").replace(b"MM\0*", b"MX\0*")
    assert damaged != exif.tobytes()
    with pytest.raises(BadImage, match="upright by its EXIF data: not a TIFF file"):
        load_upright(encoded(gradient(16, 8), "PNG", exif=damaged))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("LA", (4, 4), (10, 0)), (255, 255, 255)),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)), (100, 100, 100)),
        (Image.new("RGB", (4, 4), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE), (1, 2, 3)),
    ],
)
def test_images_of_all_types_become_rgb(image, expected):
    converted = to_rgb(image)
    assert converted.mode == "RGB" and converted.getpixel((1, 1)) == expected


def test_masks_become_grey_and_classes_keep_their_index():
    assert to_mask(Image.new("RGBA", (4, 4), (255, 255, 255, 0))).getpixel((0, 0)) == 255
    palette = Image.new("P", (4, 4), 17)
    palette.putpalette([0, 0, 0] * 256)
    assert to_parsing(palette).mode == "L" and to_parsing(palette).getpixel((0, 0)) == 17


@pytest.mark.parametrize(
    ("convert", "image", "message"),
    [
        (to_parsing, Image.new("RGB", (4, 4)), "class indices of 8 bits, came mode RGB"),
        (to_rgb, Image.new("F", (4, 4)), "floating-point"),
        (to_rgb, Image.new("I", (4, 4), 70000), "values up to 70000"),
    ],
)
def test_images_that_cannot_be_converted_are_named(convert, image, message):
    with pytest.raises(ValueError, match=message):
        convert(image)


def test_png_is_lossless_and_jpeg_nearly():
    image = gradient(16, 16)
    for options, tolerance in (({"extension": "png", "png_compression": 6}, 0), ({"extension": "jpg"}, 3)):
        again = np.asarray(load_upright(encode(image, **options)), dtype=float)
        limits = {"rtol": 0, "atol": tolerance}  # quality 100 rounds coefficients and colours
        torch.testing.assert_close(torch.tensor(again), torch.tensor(np.asarray(image, dtype=float)), **limits)
