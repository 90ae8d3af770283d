"""Adaptive strength of augmentation."""

from __future__ import annotations

import pytest
import torch

from training.ada import ADA_INTERVAL, AdaptiveStrength
from training.augment import AugmentPipe
from training.train_config import AugmentConfig


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 0.132), (-1.0, 0.068), (0.0, 0.068)])
def test_adaptive_strength_follows_the_mean_sign_after_four_iterations(sign, expected):
    pipe = AugmentPipe()
    pipe.p.fill_(0.1)
    control = AdaptiveStrength(AugmentConfig(mode="ada", ada_kimg=1.0), batch_size=8)
    for iteration in range(ADA_INTERVAL):
        assert float(pipe.p) == pytest.approx(0.1)
        control.add(torch.full((8, 1), sign))
        control.after_iteration(iteration, pipe)
    # 32 images of 1000: a step of 0.032 (float32).
    assert float(pipe.p) == pytest.approx(expected, rel=1e-6)
    assert control.signs.eq(0).all()


def test_adaptive_strength_state_goes_on_between_adjustments():
    config = AugmentConfig(mode="ada", ada_kimg=1.0)
    first, second, pipe = AdaptiveStrength(config, 8), AdaptiveStrength(config, 8), AugmentPipe()
    pipe.p.zero_()
    first.add(torch.ones(8, 1))
    first.gather_to_main()
    second.load_state_dict(first.state_dict())
    second.after_iteration(3, pipe)
    assert float(pipe.p) == pytest.approx(0.032, rel=1e-6)
