"""What inference on a CPU does differently for speed changes no values: memory order, and sums in place."""

from __future__ import annotations

import pytest
import torch

from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.modulated_conv2d import modulated_conv2d
from torch_utils.ops.upfirdn2d import setup_filter
from training.config import SynthesisConfig
from training.networks_stylegan2 import SynthesisBlock, SynthesisOptions

ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of a few hundred products of unit size, in another order


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kernel_size", "up", "down"), [(3, 1, 1), (3, 2, 1), (3, 1, 2), (1, 1, 1), (1, 2, 1), (1, 1, 2)]
)
def test_conv2d_resample_without_gradients_equals_with(kernel_size, up, down, groups):
    x, weight = randn(2, 8, 12, 12), randn(6, 8 // groups, kernel_size, kernel_size, seed=1)
    arguments = (x, weight, setup_filter((1, 3, 3, 1)), up, down, kernel_size // 2, groups)
    recorded = conv2d_resample(*arguments)
    with torch.no_grad():
        torch.testing.assert_close(conv2d_resample(*arguments), recorded, **ROUNDING)


def test_conv2d_resample_without_gradients_keeps_channels_last():
    x, weight, fir = randn(1, 8, 12, 12), randn(6, 8, 3, 3, seed=1), setup_filter((1, 3, 3, 1))
    with torch.no_grad():
        results = [conv2d_resample(x, weight, fir, up=up, padding=1) for up in (1, 2)]
    assert all(result.is_contiguous(memory_format=torch.channels_last) for result in results)
    assert conv2d_resample(x, weight, fir, up=2, padding=1).is_contiguous()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_conv2d_fused_equals_formula(batch, demodulate):
    x, weight, styles = randn(batch, 8, 6, 6), randn(5, 8, 3, 3, seed=1), randn(batch, 8, seed=2)
    weights = weight * styles[:, None, :, None, None]
    if demodulate:
        weights = weights / (weights.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).sqrt()
    expected = torch.cat([torch.nn.functional.conv2d(x[i : i + 1], weights[i], padding=1) for i in range(batch)])
    for fused in (True, False):
        ours = modulated_conv2d(x, weight, styles, demodulate=demodulate, fused=fused)
        torch.testing.assert_close(ours, expected, **ROUNDING)


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_synthesis_block_without_gradients_equals_with_and_keeps_its_inputs(architecture, up):
    config = SynthesisConfig(architecture=architecture)
    block = SynthesisBlock(4, 6, 512, 8 * up, 3, is_last=True, config=config, up=up).eval()
    x, image, ws = randn(2, 4, 8, 8), randn(2, 3, 8, 8, seed=1), randn(2, 3, 512, seed=2)
    copies, options = (x.clone(), image.clone()), SynthesisOptions(noise_mode="const")
    block.conv1.noise_strength.data.fill_(0.5)
    recorded = block(x, image, ws, options)
    with torch.no_grad():
        for ours, expected in zip(block(x, image, ws, options), recorded, strict=True):
            torch.testing.assert_close(ours, expected, **ROUNDING)
    assert torch.equal(x, copies[0]) and torch.equal(image, copies[1])
