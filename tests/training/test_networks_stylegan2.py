"""StyleGAN2 blocks: modulation, layers, mapping and synthesis follow their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from torch_utils.ops.modulated_conv2d import modulated_conv2d
from training.config import MappingConfig, SynthesisConfig
from training.networks_stylegan2 import (
    Generator,
    MappingNetwork,
    SynthesisLayer,
    SynthesisNetwork,
    SynthesisOptions,
    ToRGBLayer,
)

W_DIM = 16
REORDERED = {"rtol": 1e-11, "atol": 1e-11}  # float64, the same products summed in another order
CONST = SynthesisOptions(noise_mode="const")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def network(resolution: int = 16, img_channels: int = 5, w_dim: int = W_DIM, **config) -> SynthesisNetwork:
    """Return a small network in float64 whose noise strengths and biases are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = SynthesisConfig(**{"channel_base": 64, "channel_max": 8, **config})
        synthesis = SynthesisNetwork(w_dim, resolution, img_channels, config)
        for name, parameter in synthesis.named_parameters():
            if name.endswith(("noise_strength", ".bias")):
                parameter.data += 0.3 * torch.randn_like(parameter)
    return synthesis.double().eval()


# Layers.


def test_synthesis_layer_gain_scales_result_and_clamp():
    layer = SynthesisLayer(3, 4, W_DIM, 8, conv_clamp=0.5).double()
    x, w = 10 * randn(2, 3, 8, 8), randn(2, W_DIM, seed=1)
    unclamped = SynthesisLayer(3, 4, W_DIM, 8).double()
    unclamped.load_state_dict(layer.state_dict())
    expected = (unclamped(x, w, CONST, fused=True) * 0.25).clamp(-0.125, 0.125)
    torch.testing.assert_close(layer(x, w, CONST, fused=True, gain=0.25), expected, **REORDERED)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 2, 8, 8), (1, 3, 8, 4)])
def test_synthesis_layer_other_input_shape_raises_value_error(shape):
    with pytest.raises(ValueError, match=r"synthesis layer input.*\[3, 8, 8\]"):
        SynthesisLayer(3, 4, W_DIM, 8)(torch.zeros(shape), torch.zeros(1, W_DIM), CONST, fused=True)


def test_to_rgb_layer_equals_its_formula():
    layer = ToRGBLayer(4, 3, W_DIM, conv_clamp=1.0).double()
    layer.bias.data = randn(3)
    x, w = randn(2, 4, 5, 5, seed=1), randn(2, W_DIM, seed=2)
    styles = layer.affine(w) / 2
    expected = torch.einsum("oi,bi,bihw->bohw", layer.weight[:, :, 0, 0], styles, x) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x, w, fused=True), expected.clamp(-1, 1), **REORDERED)


# Noise.


def test_noise_const_is_repeatable_and_in_proportion_to_its_strength():
    layer = SynthesisLayer(3, 4, W_DIM, 8, activation="linear").double()
    x, w = randn(1, 3, 8, 8), randn(1, W_DIM)
    silent = layer(x, w, SynthesisOptions(noise_mode="none"), fused=True)
    layer.noise_strength.data.fill_(0.5)
    first, second = (layer(x, w, CONST, fused=True) for _ in range(2))
    assert first.equal(second)
    torch.testing.assert_close(first - silent, (0.5 * layer.noise_const).expand(1, 4, 8, 8), **REORDERED)


def test_noise_random_differs_between_calls_and_samples_and_follows_its_generator():
    synthesis, ws = network(), randn(1, 6, W_DIM).expand(2, -1, -1)
    first, second = synthesis(ws), synthesis(ws)
    assert not torch.allclose(first, second) and not torch.allclose(first[0], first[1])
    seeded = [synthesis(ws, noise_mode="random", generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert seeded[0].equal(seeded[1])
    other = synthesis(ws, noise_mode="random", generator=torch.Generator().manual_seed(6))
    assert not torch.allclose(seeded[0], other)


def test_noise_random_with_a_generator_leaves_the_default_generator_alone():
    synthesis, ws = network(), randn(1, 6, W_DIM)
    state = torch.get_rng_state()
    synthesis(ws, noise_mode="random", generator=torch.Generator().manual_seed(5))
    assert torch.get_rng_state().equal(state)


def test_noise_none_equals_no_strength():
    synthesis, ws = network(), randn(1, 6, W_DIM)
    expected = synthesis(ws, noise_mode="none")
    for name, parameter in synthesis.named_parameters():
        if name.endswith("noise_strength"):
            parameter.data.zero_()
    assert synthesis(ws, noise_mode="const").equal(expected)


def test_noise_mode_unknown_raises_value_error_that_names_it():
    with pytest.raises(ValueError, match=r"noise_mode.*'fixed'"):
        network()(randn(1, 6, W_DIM), noise_mode="fixed")


# Mapping.


def mapping_network(num_ws: int | None = 4, **kwargs) -> MappingNetwork:
    torch.manual_seed(0)
    config = kwargs.pop("config", MappingConfig(num_layers=3))
    return MappingNetwork(kwargs.pop("z_dim", 6), kwargs.pop("c_dim", 5), 8, num_ws, config, **kwargs).double()


def test_mapping_equals_its_formula():
    mapping = mapping_network(last_activation="linear")
    z, c = randn(3, 6), randn(3, 5, seed=1)
    normalize = lambda v: v / (v.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()  # noqa: E731
    embedded = c @ mapping.embed.weight.T / math.sqrt(5) + mapping.embed.bias
    x = torch.cat([normalize(z), normalize(embedded)], dim=1)
    for i in range(3):
        layer = getattr(mapping, f"fc{i}")
        x = x @ layer.weight.T * 0.01 / math.sqrt(x.shape[1]) + layer.bias * 0.01
        x = x if i == 2 else F.leaky_relu(x, 0.2) * math.sqrt(2)
    torch.testing.assert_close(mapping(z, c), x[:, None].expand(-1, 4, -1), **REORDERED)


def test_mapping_update_emas_moves_the_mean_as_in_the_formula():
    mapping = mapping_network()
    mapping.w_avg.copy_(randn(8, seed=2))
    before, z, c = mapping.w_avg.clone(), randn(3, 6), randn(3, 5, seed=1)
    w = mapping(z, c, update_emas=True)[:, 0]
    assert w.requires_grad and not mapping.w_avg.requires_grad
    torch.testing.assert_close(mapping.w_avg, w.detach().mean(dim=0) * 0.002 + before * 0.998, **REORDERED)
    moved = mapping.w_avg.clone()
    mapping(z, c)
    assert mapping.w_avg.equal(moved)


@pytest.mark.parametrize("cutoff", [None, 0, 2, 4, 99])
def test_mapping_truncation_moves_the_first_layers_towards_the_mean(cutoff):
    mapping = mapping_network()
    mapping.w_avg.copy_(randn(8, seed=2))
    z, c = randn(3, 6), randn(3, 5, seed=1)
    full, truncated = mapping(z, c), mapping(z, c, truncation_psi=0.3, truncation_cutoff=cutoff)
    expected = full.clone()
    expected[:, :cutoff] = mapping.w_avg + 0.3 * (full[:, :cutoff] - mapping.w_avg)
    torch.testing.assert_close(truncated, expected, **REORDERED)


def test_mapping_without_num_ws_returns_one_w_and_keeps_no_mean():
    mapping = mapping_network(num_ws=None, z_dim=0)
    assert mapping(None, randn(3, 5)).shape == (3, 8)
    assert "w_avg" not in mapping.state_dict()


def test_mapping_without_labels_ignores_them():
    mapping = mapping_network(c_dim=0)
    assert mapping(randn(2, 6), None).shape == (2, 4, 8)
    assert not any(name.startswith("embed") for name in mapping.state_dict())


def test_mapping_truncation_without_a_mean_raises_value_error():
    mapping = mapping_network(config=MappingConfig(w_avg_beta=None))
    with pytest.raises(ValueError, match="truncation_psi"):
        mapping(randn(2, 6), randn(2, 5), truncation_psi=0.5)


@pytest.mark.parametrize(
    ("z", "c", "name"),
    [((2, 7), (2, 5), "z"), ((2, 6), (2, 4), "c"), ((6,), (2, 5), "z"), ((2, 6), None, "c")],
)
def test_mapping_other_shapes_raise_value_error_that_names_the_input(z, c, name):
    with pytest.raises(ValueError, match=f"^{name}: expected shape"):
        mapping_network()(torch.zeros(z), None if c is None else torch.zeros(c))


# Synthesis.


@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
@pytest.mark.parametrize(("resolution", "num_ws"), [(4, 2), (8, 4), (16, 6), (32, 8)])
def test_synthesis_every_architecture_runs_with_the_published_number_of_ws(architecture, resolution, num_ws):
    synthesis = network(resolution, architecture=architecture)
    assert synthesis.num_ws == num_ws == 2 * int(math.log2(resolution)) - 2
    image = synthesis(randn(2, num_ws, W_DIM), CONST)
    assert image.shape == (2, 5, resolution, resolution) and image.isfinite().all()


@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
def test_synthesis_every_w_layer_matters(architecture):
    synthesis = network(16, architecture=architecture)
    ws = randn(1, 6, W_DIM).requires_grad_()
    synthesis(ws, CONST).square().sum().backward()
    assert (ws.grad.abs().amax(dim=2) > 0).all()


@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
def test_synthesis_output_projection_equals_projecting_afterwards(architecture):
    synthesis, ws, matrix = network(16, architecture=architecture), randn(2, 6, W_DIM), randn(3, 5, seed=1)
    ours = synthesis(ws, CONST, output_projection=matrix)
    expected = torch.einsum("po,bohw->bphw", matrix, synthesis(ws, CONST))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)  # float64, another order of the sums


def test_synthesis_output_projection_with_a_clamp_raises_value_error():
    with pytest.raises(ValueError, match=r"output_projection.*256"):
        network(conv_clamp=256)(randn(1, 6, W_DIM), CONST, output_projection=randn(3, 5))


@pytest.mark.parametrize("shape", [(1, 5, W_DIM), (1, 7, W_DIM), (1, 6, W_DIM + 1), (6, W_DIM), (1, 1, 6, W_DIM)])
def test_synthesis_ws_of_another_shape_raise_value_error_that_names_it(shape):
    with pytest.raises(ValueError, match=rf"^ws: expected shape \[B, 6, {W_DIM}\].*{shape[-1]}"):
        network()(torch.zeros(shape))


def test_synthesis_clamp_bounds_the_activations():
    synthesis, bounds = network(16, conv_clamp=0.1), []
    for module in synthesis.modules():
        if isinstance(module, SynthesisLayer):
            module.register_forward_hook(lambda _m, _i, out: bounds.append(out.abs().max().item()))
    synthesis(randn(1, 6, W_DIM), CONST)
    assert len(bounds) == 5 and max(bounds) <= 0.1


def test_synthesis_fused_follows_the_mode_unless_told(monkeypatch):
    synthesis, seen = network(), []

    def spy(*args, fused, **kwargs):
        seen.append(fused)
        return modulated_conv2d(*args, fused=fused, **kwargs)

    monkeypatch.setattr("torch_utils.ops.modulated_conv2d.modulated_conv2d", spy)
    for train, option, expected in (
        (False, None, True),
        (True, None, False),
        (True, True, True),
        (False, False, False),
    ):
        seen.clear()
        synthesis.train(train)(randn(1, 6, W_DIM), noise_mode="const", fused_modconv=option)
        assert set(seen) == {expected}


def test_synthesis_train_and_eval_mode_agree():
    synthesis, ws = network(), randn(2, 6, W_DIM)
    torch.testing.assert_close(synthesis.train()(ws, CONST), synthesis.eval()(ws, CONST), **REORDERED)


def test_synthesis_samples_do_not_depend_on_each_other():
    synthesis, ws = network(), randn(3, 6, W_DIM)
    together = synthesis(ws, CONST)
    for i in range(3):
        torch.testing.assert_close(synthesis(ws[i : i + 1], CONST), together[i : i + 1], **REORDERED)


def test_synthesis_too_few_channels_raises_value_error_that_names_the_field():
    with pytest.raises(ValueError, match=r"synthesis\.channel_base.*16.*8"):
        network(16, channel_base=8)


def test_generator_forward_equals_mapping_then_synthesis():
    torch.manual_seed(0)
    config = SynthesisConfig(channel_base=64, channel_max=8)
    generator = Generator(6, 5, W_DIM, 8, 3, MappingConfig(), config).double()
    z, c = randn(2, 6), randn(2, 5)
    assert generator.num_ws == generator.mapping.num_ws == 4
    expected = generator.synthesis(generator.mapping(z, c, 0.5, 2), noise_mode="none")
    torch.testing.assert_close(generator(z, c, 0.5, 2, noise_mode="none"), expected, rtol=0, atol=0)  # the same calls
