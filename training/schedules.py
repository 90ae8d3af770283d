"""Quantities that change during training, as pure functions of the configuration and of the images seen so far."""

from __future__ import annotations

from dataclasses import dataclass

from training.train_config import LossConfig


@dataclass(frozen=True, kw_only=True)
class ScheduleValues:
    """What holds during one iteration; all are numbers of the host, so that no device has to be asked."""

    blur_sigma: float
    """Standard deviation (base 2) of the blur of images, in pixels; 0 does not blur."""
    swap_prob: float | None
    """Probability that a generator is conditioned on the camera of another sample; None conditions on zeros."""
    neural_rendering_resolution: int
    """Side of the volume-rendered image, in pixels."""
    density_noise: float
    """Standard deviation of the noise on the raw density."""


def schedule_values(config: LossConfig, cur_nimg: int) -> ScheduleValues:
    """Return the values of all schedules after `cur_nimg` images."""
    return ScheduleValues(
        blur_sigma=blur_sigma(config, cur_nimg),
        swap_prob=swap_prob(config, cur_nimg),
        neural_rendering_resolution=neural_rendering_resolution(config, cur_nimg),
        density_noise=density_noise(config, cur_nimg),
    )


def fade(cur_nimg: int, fade_kimg: float) -> float:
    """Return how far a fade of `fade_kimg` thousand images has come, 0 to 1; a fade of 0 kimg is over at once."""
    return min(cur_nimg / (1000 * fade_kimg), 1.0) if fade_kimg > 0 else 1.0


def blur_sigma(config: LossConfig, cur_nimg: int) -> float:
    """Return `sigma_0 max(1 - n / (1000 fade), 0)`, in pixels."""
    return (1 - fade(cur_nimg, config.blur_fade_kimg)) * config.blur_init_sigma


def swap_prob(config: LossConfig, cur_nimg: int) -> float | None:
    """Return the probability of swapped conditioning: from 1 to `conditioning_swap_prob`; None without conditioning."""
    if config.conditioning_swap_prob is None:
        return None
    alpha = fade(cur_nimg, config.conditioning_swap_fade_kimg)
    return (1 - alpha) + alpha * config.conditioning_swap_prob


def neural_rendering_resolution(config: LossConfig, cur_nimg: int) -> int:
    """Return the side of the volume-rendered image, in pixels; halves are rounded to even, as published.

    Differs from the published code, which divides by zero for a fade of 0 kimg.
    """
    initial, final = config.neural_rendering_resolution_initial, config.neural_rendering_resolution_final
    if final is None:
        return initial
    alpha = fade(cur_nimg, config.neural_rendering_resolution_fade_kimg)
    return round(initial * (1 - alpha) + final * alpha)


def density_noise(config: LossConfig, cur_nimg: int) -> float:
    """Return the standard deviation of the noise on the raw density: from 1 to 0."""
    return 1 - fade(cur_nimg, config.density_noise_fade_kimg)
