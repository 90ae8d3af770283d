"""A seed gives the published initial weights: same names, same order, same random draws."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.published import tiny_generator_kwargs
from tests.helpers.vectors import read_vectors
from training.config import DiscriminatorConfig
from training.dual_discriminator import Discriminator
from training.triplane import TriPlaneGenerator

VECTORS = read_vectors("initial_weights")
# Values were rounded to 7 digits, and sums of squares accumulated in float32.
ROUNDED = {"rtol": 1e-6, "atol": 1e-6}
SUMMED = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module", params=["sphere", "pano", "eg3d"])
def system(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def state(system) -> dict[str, torch.Tensor]:
    """Return the entries of a generator and a discriminator built one after the other after seed 0."""
    config = DiscriminatorConfig(variant="DualDiscriminator", img_resolution=64, channel_base=1024, channel_max=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks: dict[str, nn.Module] = {"G": TriPlaneGenerator(**tiny_generator_kwargs(system))}
        networks["D"] = Discriminator(config)
    return {f"{name}.{key}": t for name, network in networks.items() for key, t in network.state_dict().items()}


def test_names_shapes_and_order_equal_published(system, state):
    assert [[name, list(tensor.shape)] for name, tensor in state.items()] == VECTORS.meta["shapes"][system]


def test_first_values_equal_published(system, state):
    expected = torch.from_numpy(VECTORS.arrays[f"{system}.first"])
    for (name, tensor), row in zip(state.items(), expected, strict=True):
        first = tensor.flatten()[:3]
        torch.testing.assert_close(first, row[: len(first)], **ROUNDED, msg=lambda text, name=name: f"{name}: {text}")
        assert row[len(first) :].isnan().all(), name


def test_sums_of_squares_equal_published(system, state):
    ours = torch.stack([tensor.double().square().sum() for tensor in state.values()])
    expected = torch.from_numpy(VECTORS.arrays[f"{system}.sumsq"]).double()
    torch.testing.assert_close(ours, expected, **SUMMED)
