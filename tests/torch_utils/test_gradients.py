"""Gradients say whether they are finite, and steps left out change nothing; several ranks: see test_distributed."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.torch_utils.rank_scenarios import data, make_model
from torch_utils.gradients import average_gradients, step_if_finite


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model() -> torch.nn.Module:
    """Return a model with gradients."""
    model = make_model(seed=0)
    model(data()).square().mean().backward()
    return model


def adam(model: torch.nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.5, 0.99), **{"fused": True, **options})


def bits(*objects) -> dict[str, torch.Tensor]:
    """Return everything that modules and optimisers hold, as bytes."""
    values = {}
    for number, one in enumerate(objects):
        state = one.state_dict()
        tensors = state if isinstance(one, torch.nn.Module) else _flat(state["state"])
        values |= {f"{number}.{name}": tensor.clone().reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}
    return values


def _flat(state: dict[int, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{index}.{name}": tensor for index, entry in state.items() for name, tensor in entry.items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_average_gradients_one_process_leaves_them_alone(model):
    before = {name: param.grad for name, param in model.named_parameters()}
    finite = average_gradients(dict(model.named_parameters()))
    assert (finite.shape, finite.dtype, finite.item()) == ((), torch.float32, 1)
    assert all(param.grad is before[name] for name, param in model.named_parameters())
    assert model.unused.grad is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_average_gradients_one_value_that_is_not_finite_gives_0(model, value):
    model[2].bias.grad[0] = value
    assert average_gradients(model.parameters()).item() == 0


def test_average_gradients_largest_finite_values_give_1(model):
    model[2].weight.grad.fill_(torch.finfo(torch.float32).max)
    assert average_gradients(model.parameters()).item() == 1


def test_average_gradients_without_any_gradient_gives_1():
    assert average_gradients(make_model(seed=0).parameters()).item() == 1


@pytest.mark.parametrize(
    "parameters, expected",
    [
        ([], "came none"),
        ([torch.zeros(1), torch.zeros(1, dtype=torch.float16)], "came torch.float16 on cpu, torch.float32 on cpu"),
        ([torch.zeros(1), torch.zeros(1, device="meta")], "came torch.float32 on cpu, torch.float32 on meta"),
    ],
)
def test_average_gradients_parameters_unlike_each_other_raise(parameters, expected):
    with pytest.raises(ValueError, match=f"parameters: expected some of one dtype and on one device, {expected}"):
        average_gradients(parameters)


def test_average_gradients_unknown_reduction_raises(model):
    with pytest.raises(ValueError, match="reduction: expected mean or sum, came 'max'"):
        average_gradients(model.parameters(), reduction="max")


def test_step_if_finite_takes_the_same_step_as_the_optimizer(model):
    twin = copy.deepcopy(model)
    for param, other in zip(model.parameters(), twin.parameters()):
        other.grad = None if param.grad is None else param.grad.clone()
    mine, its = adam(model), adam(twin)
    step_if_finite(mine, torch.ones(()))
    its.step()
    assert_same_bits(bits(model, mine), bits(twin, its))


def test_step_if_finite_left_out_changes_no_bit_of_parameters_moments_and_counters(model):
    optimizer = adam(model)
    for _ in range(2):
        step_if_finite(optimizer, torch.ones(()))
    before = bits(model, optimizer)
    model[0].weight.grad[0, 0, 0, 0] = float("nan")
    step_if_finite(optimizer, average_gradients(model.parameters()))
    assert_same_bits(bits(model, optimizer), before)
    assert optimizer.state[model[0].weight]["step"].item() == 2
    model[0].weight.grad[0, 0, 0, 0] = 0
    step_if_finite(optimizer, average_gradients(model.parameters()))
    assert optimizer.state[model[0].weight]["step"].item() == 3


def test_step_if_finite_first_step_left_out_leaves_zeros(model):
    optimizer, before = adam(model), bits(model)
    model[0].weight.grad.fill_(float("nan"))
    step_if_finite(optimizer, average_gradients(model.parameters()))
    assert_same_bits(bits(model), before)
    assert all(not tensor.any() for tensor in _flat(optimizer.state_dict()["state"]).values())


def test_step_if_finite_leaves_an_optimizer_without_traces(model):
    optimizer = adam(model)
    step_if_finite(optimizer, torch.zeros(()))
    before = bits(model)
    optimizer.step()
    assert any(not torch.equal(after, before[name]) for name, after in bits(model).items())
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")


def test_step_if_finite_optimizer_that_cannot_leave_a_step_out_raises(model):
    with pytest.raises(ValueError, match="optimizer: expected one with fused=True, came Adam without"):
        step_if_finite(adam(model, fused=False), torch.ones(()))
