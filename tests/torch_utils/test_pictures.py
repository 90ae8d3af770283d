"""Bytes of pictures: ranges, colours, layout."""

import numpy as np
import pytest
import torch
from PIL import Image

from torch_utils.pictures import (
    PARSING_PALETTE,
    classes_to_uint8,
    colors_to_uint8,
    depth_to_uint8,
    mask_to_uint8,
    parsing_to_uint8,
    save_png,
    tile,
)


def row(*values):
    return torch.tensor(values).view(1, 1, 1, -1)


def test_colors_to_uint8_scales_clamps_and_truncates():
    image = row(-2.0, -1.0, -0.001, 0.0, 0.999, 1.0, 3.0).expand(1, 3, 1, 7)
    assert colors_to_uint8(image)[0, 0, :, 1].tolist() == [0, 0, 127, 128, 255, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_colors_to_uint8_grey_of_any_dtype_has_three_equal_channels(dtype):
    pixels = colors_to_uint8(row(-1.0, 0.5).to(dtype).requires_grad_())
    assert pixels.tolist() == [[[[0, 0, 0], [191, 191, 191]]]]


def test_mask_to_uint8_empty_is_black_and_full_is_white():
    assert mask_to_uint8(row(-0.001, 0.0, 0.5, 1.0, 1.001))[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_depth_to_uint8_with_limits_is_the_same_scale_for_every_image():
    depth = torch.tensor([[2.0, 2.5, 3.0], [2.5, 2.5, 2.75]]).view(2, 1, 1, 3)
    assert depth_to_uint8(depth, (2.0, 3.0))[..., 0].reshape(2, 3).tolist() == [[255, 128, 0], [128, 128, 64]]
    assert depth_to_uint8(depth)[..., 0].reshape(2, 3).tolist() == [[255, 128, 0], [255, 255, 0]]


def test_depth_to_uint8_beyond_the_limits_is_black_or_white():
    assert depth_to_uint8(row(1.0, 9.0), (2.0, 3.0))[0, 0, :, 0].tolist() == [255, 0]


def test_palette_has_twenty_different_colours_and_black_background():
    assert PARSING_PALETTE.shape == (20, 3) and len({tuple(color) for color in PARSING_PALETTE.tolist()}) == 20
    assert PARSING_PALETTE[0].tolist() == [0, 0, 0]


def test_parsing_to_uint8_is_the_colour_of_the_highest_class():
    scores = torch.eye(20).view(1, 20, 4, 5) * 0.1
    np.testing.assert_array_equal(parsing_to_uint8(scores).reshape(20, 3), PARSING_PALETTE)
    np.testing.assert_array_equal(classes_to_uint8(np.array([[1], [21]], np.uint8))[:, 0], PARSING_PALETTE[[1, 1]])


def test_tile_fills_rows_first_and_leaves_the_rest_black():
    images = [np.full((1, 2, 3), value, np.uint8) for value in (1, 2, 3)]
    assert tile(images, 2)[..., 0].tolist() == [[1, 1, 2, 2], [3, 3, 0, 0]]


@pytest.mark.parametrize(("sizes", "columns"), [((), 2), ((1, 2), 2), ((1, 1), 0)])
def test_tile_of_nothing_or_different_sizes_raises(sizes, columns):
    with pytest.raises(ValueError, match="grid: expected images of one size"):
        tile([np.zeros((size, 1, 3), np.uint8) for size in sizes], columns)


def test_save_png_is_lossless_and_makes_folders(tmp_path):
    image = np.random.RandomState(0).randint(0, 256, (4, 5, 3)).astype(np.uint8)
    save_png(tmp_path / "new" / "a.png", image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), image)
