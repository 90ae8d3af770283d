"""The average of weights follows the formula of the specification."""

import copy

import pytest
import torch
from torch import nn

from torch_utils.ema import ema_beta, update_ema


@pytest.mark.parametrize(
    ("arguments", "beta"),
    [
        ((32, 10**6, 10.0, None), 0.5 ** (32 / 10_000)),
        ((32, 10**6, 10.0, 0.05), 0.5 ** (32 / 10_000)),  # the ramp ended at 200 kimg
        ((32, 100_000, 10.0, 0.05), 0.5 ** (32 / 5_000)),
        ((10_000, 0, 10.0, None), 0.5),
        ((4, 0, 10.0, 0.05), 0.0),
        ((4, 100, 0.0, None), 0.0),
    ],
)
def test_ema_beta_is_the_formula(arguments, beta):
    assert ema_beta(*arguments) == beta


def make_network(seed):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    network[1].running_mean.normal_()
    network[1].num_batches_tracked += seed
    return network


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 0.999])
def test_update_ema_moves_parameters_and_copies_buffers(beta):
    network, average = make_network(1), make_network(2)
    before = copy.deepcopy(average)
    update_ema(average, network, beta)
    old, new = dict(before.named_parameters()), dict(network.named_parameters())
    for name, parameter in average.named_parameters():
        expected = new[name].double() + beta * (old[name].double() - new[name].double())
        torch.testing.assert_close(parameter, expected.float(), rtol=1e-6, atol=1e-7)  # one rounding step of float32
        assert parameter.requires_grad
    for name, buffer in average.named_buffers():
        assert torch.equal(buffer, dict(network.named_buffers())[name])


def test_update_ema_with_beta_zero_is_an_exact_copy_of_anything():
    network, average = make_network(1), make_network(2)
    average[0].weight.data[0, 0] = float("nan")
    update_ema(average, network, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(average.state_dict().values(), network.state_dict().values()))


def test_update_ema_leaves_the_network_alone():
    network, average = make_network(1), make_network(2)
    before = copy.deepcopy(network.state_dict())
    update_ema(average, network, 0.9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_update_ema_channels_last_average_of_a_contiguous_network():
    network = nn.Conv2d(3, 4, 3)
    average = copy.deepcopy(network).to(memory_format=torch.channels_last)
    network.weight.data += 1
    expected = network.weight + 0.75 * (average.weight - network.weight)
    update_ema(average, network, 0.75)
    torch.testing.assert_close(average.weight, expected, rtol=1e-6, atol=1e-7)  # one rounding step of float32


def test_update_ema_of_another_structure_raises_and_names_the_tensor():
    with pytest.raises(ValueError, match="only one has '3.bias'"):
        update_ema(nn.Sequential(*make_network(1), nn.Linear(2, 2)), make_network(1), 0.5)
