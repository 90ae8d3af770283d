"""The loop through latents is the published spline."""

import numpy as np
import pytest
import torch
from scipy.interpolate import interp1d

from inference.interpolation import LatentLoop

TURNS = np.linspace(0.0, 1.0, 41)


def random_keyframes(num_keys: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(num_keys).randn(num_keys, 3, 4).astype(np.float32))


@pytest.mark.parametrize("num_keys", [2, 3, 5])
def test_latent_loop_equals_the_published_cubic_interpolation(num_keys):
    keyframes = random_keyframes(num_keys)
    positions = np.arange(-2 * num_keys, 3 * num_keys)
    published = interp1d(positions, np.tile(keyframes.double().numpy(), (5, 1, 1)), kind="cubic", axis=0)
    loop = LatentLoop(keyframes)
    ours = torch.stack([loop(turn) for turn in TURNS])
    # Both are float64 splines of the same numbers; ours is rounded to float32 at the end.
    torch.testing.assert_close(ours.double().numpy(), published(TURNS * num_keys), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_keys", [1, 2, 3, 5])
def test_latent_loop_visits_every_keyframe_and_closes(num_keys):
    keyframes = random_keyframes(num_keys)
    loop = LatentLoop(keyframes)
    for key in range(num_keys):
        torch.testing.assert_close(loop(key / num_keys), keyframes[key], rtol=0, atol=1e-6)  # float32 rounding
    torch.testing.assert_close(loop(1.0), loop(0.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_keys", [3, 5])
def test_latent_loop_closes_smoothly(num_keys):
    loop, step = LatentLoop(random_keyframes(num_keys).double()), 1e-5
    before, after = (loop(1.0) - loop(1.0 - step)) / step, (loop(step) - loop(0.0)) / step
    # What the far ends of the five repetitions do decays by 0.27 per keyframe on its way to the middle one.
    torch.testing.assert_close(before, after, rtol=0, atol=30 * 0.27 ** (2 * num_keys) + 1e-2)


def test_latent_loop_one_keyframe_stands_still():
    keyframes = random_keyframes(1)
    loop = LatentLoop(keyframes)
    assert all(torch.equal(loop(turn), keyframes[0]) for turn in (0.0, 0.3, 1.0))


def test_latent_loop_moves_between_keyframes_in_the_type_of_the_keyframes():
    keyframes = random_keyframes(2)
    halfway = LatentLoop(keyframes)(0.25)
    assert halfway.dtype == torch.float32 and halfway.shape == (3, 4)
    assert not torch.equal(halfway, keyframes[0])
    assert not torch.equal(halfway, keyframes[1])
