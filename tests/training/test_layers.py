"""Shared layers: modulation, equalised learning rates and normalisation follow their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from torch_utils.ops.modulated_conv2d import modulated_conv2d
from torch_utils.ops.upfirdn2d import setup_filter
from training.layers import (
    RESAMPLE_TAPS,
    Conv2dLayer,
    FullyConnectedLayer,
    normalize_2nd_moment,
)

REORDERED = {"rtol": 1e-11, "atol": 1e-11}  # float64, the same products summed in another order


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Modulated convolution.


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_modulated_conv2d_fused_equals_unfused(batch, up, demodulate, kernel_size):
    x, weight = randn(batch, 4, 6, 5), randn(3, 4, kernel_size, kernel_size, seed=1)
    styles, noise = randn(batch, 4, seed=2), randn(batch, 1, 6 * up, 5 * up, seed=3)
    options = {"noise": noise, "fir": setup_filter(RESAMPLE_TAPS).double(), "up": up, "demodulate": demodulate}
    fused = modulated_conv2d(x, weight, styles, fused=True, **options)
    unfused = modulated_conv2d(x, weight, styles, fused=False, **options)
    assert fused.shape == (batch, 3, 6 * up, 5 * up)
    torch.testing.assert_close(fused, unfused, **REORDERED)


@pytest.mark.parametrize("fused", [True, False])
def test_modulated_conv2d_equals_one_convolution_per_sample(fused):
    x, weight, styles = randn(3, 4, 6, 5), randn(2, 4, 3, 3, seed=1), randn(3, 4, seed=2)
    expected = []
    for sample, style in zip(x, styles, strict=True):
        modulated = weight * style[None, :, None, None]
        modulated = modulated / (modulated.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected.append(F.conv2d(sample[None], modulated, padding=1))
    torch.testing.assert_close(modulated_conv2d(x, weight, styles, fused=fused), torch.cat(expected), **REORDERED)


@pytest.mark.parametrize("fused", [True, False])
def test_modulated_conv2d_demodulation_gives_kernels_of_unit_norm(fused):
    weight, styles = 50 * randn(6, 4, 3, 3), 0.1 * randn(1, 4, seed=1)
    # Impulses, one channel at a time, show the effective kernels.
    impulses = torch.zeros(4, 4, 5, 5, dtype=torch.float64)
    impulses[torch.arange(4), torch.arange(4), 2, 2] = 1
    kernels = modulated_conv2d(impulses, weight, styles.expand(4, -1), fused=fused)
    norms = kernels.square().sum(dim=(0, 2, 3)).sqrt()
    torch.testing.assert_close(norms, torch.ones(6, dtype=torch.float64), rtol=1e-8, atol=0)  # 1e-8 in the root


def test_modulated_conv2d_demodulation_cancels_the_scale_of_the_styles():
    x, weight, styles = randn(2, 4, 5, 5), randn(3, 4, 3, 3, seed=1), randn(2, 4, seed=2)
    scaled = modulated_conv2d(x, weight, styles * 100)
    torch.testing.assert_close(modulated_conv2d(x, weight, styles), scaled, rtol=1e-6, atol=1e-6)  # 1e-8 in the root


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_modulated_conv2d_half_precision_with_large_weights_and_styles_does_not_overflow(fused, batch):
    x, weight, styles = randn(batch, 4, 6, 6), 1e3 * randn(3, 4, 3, 3, seed=1), 1e4 * randn(batch, 4, seed=2)
    ours = modulated_conv2d(x.half(), weight.float(), styles.float(), fused=fused)
    assert ours.dtype == torch.float16 and ours.isfinite().all()
    expected = modulated_conv2d(x.half().double(), weight, styles)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-2, atol=2e-2)  # float16 sums of 36 products


# Layers.


def test_normalize_2nd_moment_rows_have_unit_mean_square():
    rows = normalize_2nd_moment(randn(5, 7) * torch.tensor([1e-2, 1, 10, 100, 1e4]).double()[:, None])
    torch.testing.assert_close(rows.square().mean(dim=1), torch.ones(5).double(), rtol=1e-3, atol=0)  # 1e-8 / 1e-4
    assert normalize_2nd_moment(torch.zeros(1, 3)).equal(torch.zeros(1, 3))


@pytest.mark.parametrize(("activation", "slope", "gain"), [("linear", 1.0, 1.0), ("lrelu", 0.2, math.sqrt(2))])
def test_fully_connected_layer_equals_its_formula(activation, slope, gain):
    layer = FullyConnectedLayer(6, 4, activation=activation, lr_multiplier=0.01, bias_init=3).double()
    assert (layer.bias == 3).all()
    layer.bias.data = randn(4)
    x = randn(5, 6, seed=1)
    y = x @ (layer.weight * 0.01 / math.sqrt(6)).T + layer.bias * 0.01
    torch.testing.assert_close(layer(x), torch.where(y >= 0, y, slope * y) * gain, **REORDERED)


def test_fully_connected_layer_initial_weights_have_the_inverse_learning_rate_scale():
    torch.manual_seed(0)
    deviation = FullyConnectedLayer(200, 200, lr_multiplier=0.01).weight.std()
    torch.testing.assert_close(deviation, torch.tensor(100.0), rtol=0.02, atol=0)  # 40000 samples


def test_fully_connected_layer_float64_input_is_processed_in_float64():
    assert FullyConnectedLayer(3, 2)(randn(1, 3)).dtype == torch.float64


def test_conv2d_layer_gain_scales_result_and_clamp():
    layer = Conv2dLayer(3, 4, 3, activation="lrelu", conv_clamp=0.5).double()
    x = 10 * randn(2, 3, 4, 4)
    ours = layer(x, gain=0.25)
    expected = F.leaky_relu(F.conv2d(x, layer.weight / math.sqrt(27), padding=1), 0.2) * math.sqrt(2) * 0.25
    torch.testing.assert_close(ours, expected.clamp(-0.125, 0.125), **REORDERED)


def test_conv2d_layer_not_trainable_has_buffers_of_the_same_names():
    trainable, frozen = Conv2dLayer(3, 4, 1), Conv2dLayer(3, 4, 1, trainable=False)
    assert set(trainable.state_dict()) == set(frozen.state_dict()) == {"weight", "bias", "resample_filter"}
    assert {name for name, _ in trainable.named_parameters()} == {"weight", "bias"}
    assert not list(frozen.parameters())
    assert set(Conv2dLayer(3, 4, 1, bias=False, trainable=False).state_dict()) == {"weight", "resample_filter"}
