"""Matrices of augmentations: directions, angles, and what each leaves alone."""

from __future__ import annotations

import math

import pytest
import torch

from training import augment_transforms as transforms

ROUNDING = {"rtol": 0, "atol": 1e-12}  # float64, entries near 1
IDENTITY = torch.eye(4, dtype=torch.float64)[None]


def scalar(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def coloured(matrix: torch.Tensor, rgb: tuple[float, float, float]) -> torch.Tensor:
    return (matrix[0] @ torch.tensor([*rgb, 1.0], dtype=torch.float64))[:3]


def expect(came: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(came, torch.tensor(expected, dtype=torch.float64), **ROUNDING)


def test_rotation_2d_turns_x_towards_y() -> None:
    expect(transforms.rotation_2d(scalar(math.pi / 2))[0] @ torch.tensor([1.0, 0.0, 1.0]).double(), 0.0, 1.0, 1.0)


def test_translation_and_scaling_2d_act_on_their_axes() -> None:
    point = torch.tensor([2.0, 3.0, 1.0]).double()
    expect(transforms.translation_2d(scalar(5.0), scalar(-1.0))[0] @ point, 7.0, 2.0, 1.0)
    expect(transforms.scaling_2d(scalar(-1.0), scalar(0.5))[0] @ point, -2.0, 1.5, 1.0)


def test_compose_multiplies_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 3, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(transforms.compose(first, second), first @ second, **ROUNDING)


def test_brightness_and_contrast_shift_and_scale_all_channels() -> None:
    expect(coloured(transforms.brightness(scalar(0.2)), (0.1, -0.3, 0.5)), 0.3, -0.1, 0.7)
    expect(coloured(transforms.contrast(scalar(2.0)), (0.1, -0.3, 0.5)), 0.2, -0.6, 1.0)


def test_luma_flip_negates_grey_keeps_hue_and_undoes_itself() -> None:
    flip = transforms.luma_flip(scalar(1.0))
    expect(coloured(flip, (0.4, 0.4, 0.4)), -0.4, -0.4, -0.4)
    expect(coloured(flip, (0.5, -0.5, 0.0)), 0.5, -0.5, 0.0)  # no luma, only hue
    torch.testing.assert_close(flip @ flip, IDENTITY, **ROUNDING)
    torch.testing.assert_close(transforms.luma_flip(scalar(0.0)), IDENTITY, **ROUNDING)


def test_hue_rotation_takes_red_to_green_in_a_third_of_a_turn() -> None:
    expect(coloured(transforms.hue_rotation(scalar(2 * math.pi / 3)), (1.0, 0.0, 0.0)), 0.0, 1.0, 0.0)
    expect(coloured(transforms.hue_rotation(scalar(1.1)), (0.3, 0.3, 0.3)), 0.3, 0.3, 0.3)
    torch.testing.assert_close(transforms.hue_rotation(scalar(2 * math.pi)), IDENTITY, **ROUNDING)
    turn = transforms.hue_rotation(scalar(0.7))
    torch.testing.assert_close(turn @ turn.transpose(1, 2), IDENTITY, **ROUNDING)
    assert turn[0].det().item() == pytest.approx(1.0)


def test_saturation_keeps_grey_and_scales_the_distance_from_it() -> None:
    expect(coloured(transforms.saturation(scalar(3.0)), (0.3, 0.3, 0.3)), 0.3, 0.3, 0.3)
    expect(coloured(transforms.saturation(scalar(3.0)), (0.2, -0.2, 0.0)), 0.6, -0.6, 0.0)
    expect(coloured(transforms.saturation(scalar(0.0)), (0.6, 0.0, 0.0)), 0.2, 0.2, 0.2)


def test_transform_colour_of_stacked_images_treats_every_three_channels_alike() -> None:
    x = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    colour = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    out = transforms.transform_colour(x, colour)
    expected = colour[1, :3, :3] @ x[1, 3:, 2, 1] + colour[1, :3, 3]
    torch.testing.assert_close(out[1, 3:, 2, 1], expected)
    torch.testing.assert_close(out[:, :3], transforms.transform_colour(x[:, :3], colour))


def test_transform_colour_of_four_channels_raises() -> None:
    with pytest.raises(ValueError, match=r"multiple of 3 channels, got images \[1, 4, 2, 2\]"):
        transforms.transform_colour(torch.zeros(1, 4, 2, 2), torch.eye(4)[None])
