"""Schedules start, fade and end where they should."""

from __future__ import annotations

import pytest

from training import schedules
from training.schedules import fade, schedule_values
from training.train_config import LossConfig


def config(**fields) -> LossConfig:
    return LossConfig(r1_gamma=1, **fields)


@pytest.mark.parametrize(
    ("cur_nimg", "fade_kimg", "share"),
    [(0, 2, 0.0), (500, 2, 0.25), (2000, 2, 1.0), (9000, 2, 1.0), (0, 0, 1.0), (5, 0, 1.0)],
)
def test_fade_grows_to_one_and_is_over_at_once_for_zero_kimg(cur_nimg, fade_kimg, share):
    assert fade(cur_nimg, fade_kimg) == share


def test_blur_falls_linearly_to_zero_and_is_off_without_fade():
    sigmas = [
        schedules.blur_sigma(config(blur_init_sigma=10, blur_fade_kimg=200), n) for n in (0, 50_000, 200_000, 10**7)
    ]
    assert sigmas == [10, 7.5, 0, 0]
    assert schedules.blur_sigma(config(blur_fade_kimg=0), 0) == 0


def test_swap_prob_goes_from_one_to_its_value():
    swap = config(conditioning_swap_prob=0.5, conditioning_swap_fade_kimg=1000)
    assert [schedules.swap_prob(swap, n) for n in (0, 500_000, 1_000_000, 2_000_000)] == [1, 0.75, 0.5, 0.5]
    assert schedules.swap_prob(config(conditioning_swap_prob=0.5, conditioning_swap_fade_kimg=0), 0) == 0.5
    assert schedules.swap_prob(config(conditioning_swap_prob=None), 0) is None


def test_resolution_without_final_one_stays():
    assert {schedules.neural_rendering_resolution(config(), n) for n in (0, 10**6)} == {64}


@pytest.mark.parametrize(("cur_nimg", "side"), [(0, 64), (250_000, 80), (1_000_000, 128), (3_000_000, 128)])
def test_resolution_fades_to_the_final_one(cur_nimg, side):
    fading = config(neural_rendering_resolution_final=128, neural_rendering_resolution_fade_kimg=1000)
    assert schedules.neural_rendering_resolution(fading, cur_nimg) == side


def test_resolution_halves_are_rounded_to_even():
    fading = config(
        neural_rendering_resolution_initial=64,
        neural_rendering_resolution_final=66,
        neural_rendering_resolution_fade_kimg=4,
    )
    sides = [schedules.neural_rendering_resolution(fading, n) for n in (0, 1000, 2000, 3000, 4000)]
    assert sides == [64, 64, 65, 66, 66]  # 64.5 and 65.5 in between


def test_resolution_with_a_fade_of_zero_is_the_final_one_at_once():
    fading = config(neural_rendering_resolution_final=128, neural_rendering_resolution_fade_kimg=0)
    assert schedules.neural_rendering_resolution(fading, 0) == 128


def test_density_noise_falls_from_one_to_zero_and_is_off_without_fade():
    noisy = config(density_noise_fade_kimg=200)
    assert [schedules.density_noise(noisy, n) for n in (0, 100_000, 200_000, 300_000)] == [1, 0.5, 0, 0]
    assert schedules.density_noise(config(), 0) == 0


def test_schedule_values_are_numbers_of_the_host():
    values = schedule_values(config(), 1234)
    assert isinstance(values.neural_rendering_resolution, int)
    assert all(isinstance(x, float) for x in (values.blur_sigma, values.swap_prob, values.density_noise))
