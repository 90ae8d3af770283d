"""Bias, activation, gain and clamp follow their definition, in place and out of place."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from torch_utils.ops.bias_act import ACTIVATIONS, bias_act

# Scalar definitions and default gains, as StyleGAN2 has them.
DEFINITIONS = {
    "linear": (lambda v: v, 1),
    "relu": (lambda v: max(v, 0), math.sqrt(2)),
    "lrelu": (lambda v: v if v >= 0 else 0.2 * v, math.sqrt(2)),
    "tanh": (math.tanh, 1),
    "sigmoid": (lambda v: 1 / (1 + math.exp(-v)), 1),
    "elu": (lambda v: v if v >= 0 else math.expm1(v), 1),
    "selu": (lambda v: 1.0507009873554805 * (v if v >= 0 else 1.6732632423543772 * math.expm1(v)), 1),
    "softplus": (lambda v: math.log1p(math.exp(v)), 1),
    "swish": (lambda v: v / (1 + math.exp(-v)), math.sqrt(2)),
}
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # float64, one formula


def features() -> torch.Tensor:
    return torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_definitions_cover_every_activation():
    assert set(DEFINITIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("clamp", [None, 0.6])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_act_every_activation_equals_its_definition(activation, clamp, inplace):
    function, default_gain = DEFINITIONS[activation]
    x, bias = features(), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    expected = np.vectorize(function)((x + bias[:, None, None]).numpy()) * default_gain * 0.7
    expected = torch.from_numpy(expected if clamp is None else expected.clip(-clamp, clamp))
    with torch.no_grad():
        ours = bias_act(x.clone(), bias, activation, gain=0.7, clamp=clamp, inplace=inplace)
    torch.testing.assert_close(ours, expected, **ROUNDING)


@pytest.mark.parametrize("inplace", [False, True])
def test_bias_act_recording_gradients_leaves_its_input_alone(inplace):
    x = features()
    before = x.clone()
    bias_act(x, torch.ones(3), "lrelu", clamp=0.1, inplace=inplace)
    torch.testing.assert_close(x, before, rtol=0, atol=0)  # untouched


def test_bias_act_without_gradients_and_not_in_place_leaves_its_input_alone():
    x = features()
    before = x.clone()
    with torch.no_grad():
        bias_act(x, torch.ones(3), "lrelu", clamp=0.1)
    torch.testing.assert_close(x, before, rtol=0, atol=0)  # untouched


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 6), (4, 3, 2, 2), (0, 3, 2, 2)])
def test_bias_act_any_rank_adds_the_bias_along_axis_one(shape):
    ours = bias_act(torch.zeros(shape), torch.tensor([1.0, 2.0, 3.0]))
    assert ours.shape == shape
    torch.testing.assert_close(
        ours.movedim(1, -1), torch.tensor([1.0, 2.0, 3.0]).expand(*shape[:1], *shape[2:], 3), rtol=0, atol=0
    )  # exact


def test_bias_act_half_input_keeps_its_dtype():
    assert bias_act(torch.ones(1, 2, dtype=torch.float16), torch.ones(2), "lrelu").dtype == torch.float16


def test_bias_act_nan_passes_through():
    assert bias_act(torch.tensor([[float("nan")]]), activation="lrelu", clamp=1.0).isnan().all()


@pytest.mark.parametrize("activation", ["lrelu", "linear"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_bias_act_gradients_equal_those_of_plain_operations(activation, with_bias, inplace):
    def gradients(function):
        x = features().requires_grad_()
        bias = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
        out = function(x * 1, bias if with_bias else None)  # not a leaf: may be overwritten
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        inputs = [x, bias] if with_bias else [x]
        return out, first, *torch.autograd.grad(first.pow(3).sum(), inputs)

    def plain(x, bias):
        x = x if bias is None else x + bias[:, None, None]
        return (ACTIVATIONS[activation].function(x) * ACTIVATIONS[activation].default_gain * 0.5).clamp(-0.6, 0.6)

    ours = gradients(lambda x, bias: bias_act(x, bias, activation, gain=0.5, clamp=0.6, inplace=inplace))
    torch.testing.assert_close(ours, gradients(plain), **ROUNDING)


def test_bias_act_in_place_overwrites_only_what_was_computed():
    leaf = features().requires_grad_()
    computed, whole = leaf * 1, leaf * 1
    part = whole[:, :2]
    assert bias_act(computed, None, "lrelu", inplace=True).data_ptr() == computed.data_ptr()
    for x in (leaf, part):
        assert bias_act(x, None, "lrelu", inplace=True).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("activation", ["lrelu", "swish", "sigmoid"])
def test_bias_act_gradients_of_both_orders_are_right(activation):
    x = features().requires_grad_()
    bias = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: bias_act(x, b, activation, gain=0.5, clamp=3.0), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, b: bias_act(x, b, activation, gain=0.5, clamp=3.0), (x, bias))


def test_bias_act_unknown_activation_raises_value_error_with_the_known_ones():
    with pytest.raises(ValueError, match=r"lrelu.*'gelu'"):
        bias_act(torch.zeros(1, 1), activation="gelu")
