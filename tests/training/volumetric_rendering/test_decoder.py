"""The decoder follows its formula for every activation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from training.config import DecoderConfig
from training.volumetric_rendering.decoder import OSGDecoder, widen_sigmoid_range

ACTIVATIONS = {
    "none": lambda x: x,
    "sigmoid": lambda x: x.sigmoid() * 1.002 - 0.001,
    "lrelu": lambda x: torch.where(x >= 0, x, 0.2 * x) * math.sqrt(2),
}


@pytest.mark.parametrize("lr_multiplier", [1.0, 0.5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_decoder_equals_its_formula(activation, lr_multiplier):
    torch.manual_seed(0)
    decoder = OSGDecoder(5, 4, DecoderConfig(activation=activation, lr_multiplier=lr_multiplier)).double()
    for layer in (decoder.net[0], decoder.net[2]):
        layer.bias.data = torch.randn_like(layer.bias)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    hidden = x @ decoder.net[0].weight.T * lr_multiplier / math.sqrt(5) + decoder.net[0].bias * lr_multiplier
    out = F.softplus(hidden) @ decoder.net[2].weight.T * lr_multiplier / 8 + decoder.net[2].bias * lr_multiplier
    sigma, colors = decoder(x)
    assert sigma.shape == (2, 3) and colors.shape == (2, 3, 4)
    torch.testing.assert_close(sigma, out[..., 0], rtol=1e-12, atol=1e-12)  # float64, one formula
    torch.testing.assert_close(colors, ACTIVATIONS[activation](out[..., 1:]), rtol=1e-12, atol=1e-12)


def test_decoder_names_are_those_of_published_checkpoints():
    names = set(OSGDecoder(32, 32, DecoderConfig()).state_dict())
    assert names == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}


def test_widen_sigmoid_range_reaches_a_little_beyond_zero_and_one():
    ends = widen_sigmoid_range(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([-0.001, 0.5, 1.001]), rtol=0, atol=2e-7)  # float32
