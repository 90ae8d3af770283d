"""Names, shapes and kinds of the entries of the full-size networks are those of published checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.helpers.vectors import read_json_gz
from training.config import DiscriminatorConfig
from training.dual_discriminator import Discriminator
from training.presets import generator_preset
from training.triplane import TriPlaneGenerator

PUBLISHED = read_json_gz("state_dicts")
SPHEREHEAD_WITH_PARSING = dataclasses.replace(generator_preset("spherehead"), parsing_classes=20)
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "G_spherehead_512_parsing": lambda: TriPlaneGenerator.from_config(SPHEREHEAD_WITH_PARSING),
    "G_panohead_512": lambda: TriPlaneGenerator.from_config(generator_preset("panohead")),
    "G_eg3d_512": lambda: TriPlaneGenerator.from_config(generator_preset("eg3d")),
    "D_DualDiscriminator_512": lambda: discriminator("DualDiscriminator"),
    "D_MaskDualDiscriminator_512": lambda: discriminator("MaskDualDiscriminator", seg_resolution=128),
    "D_MaskDualDiscriminatorV2_512": lambda: discriminator("MaskDualDiscriminatorV2"),
    "D_HoloDiscriminator_512": lambda: discriminator("HoloDiscriminator"),
}
# Parameters of the published networks, by child where the specification has them.
PARAMETERS = {
    "G_spherehead_512_parsing": {
        "": 54_730_944,
        "backbone": 30_235_917,
        "ConvA": 155_648,
        "ConvB": 155_648,
        "superresolution": 1_649_578,
        "decoder": 4_257,
        "torgb": 16_515,
        "bcg_synthesis": 22_494_667,
        "t_mapping": 1_638,
        "toparsing": 17_076,
    },
    "G_panohead_512": {"": 53_741_548, "backbone": 29_574_893},
    "G_eg3d_512": {"": 30_662_136, "backbone": 29_008_301},
    "D_DualDiscriminator_512": {"": 31_359_744},
    "D_MaskDualDiscriminator_512": {"": 53_188_608},
    "D_MaskDualDiscriminatorV2_512": {"": 31_359_808},
    "D_HoloDiscriminator_512": {"": 31_361_088},
}


def discriminator(variant: str, **fields) -> Discriminator:
    return Discriminator(DiscriminatorConfig(variant=variant, img_resolution=512, **fields))


@pytest.fixture(scope="module", params=BUILDERS)
def network(request) -> tuple[str, nn.Module]:
    """Return a full-size network without memory for its weights, with its name."""
    with torch.device("meta"):
        return request.param, BUILDERS[request.param]()


def test_every_published_list_is_tested():
    assert set(BUILDERS) == set(PUBLISHED) == set(PARAMETERS)


def test_names_shapes_kinds_and_order_equal_published(network):
    name, module = network
    parameters = dict(module.named_parameters())
    ours = [[key, list(t.shape), "P" if key in parameters else "B"] for key, t in module.state_dict().items()]
    assert ours == PUBLISHED[name]


def test_parameter_counts_equal_published(network):
    name, module = network
    for child, expected in PARAMETERS[name].items():
        parameters = module.get_submodule(child).parameters()
        assert sum(parameter.numel() for parameter in parameters) == expected, child or "whole network"


def test_entries_are_float32(network):
    assert {tensor.dtype for tensor in network[1].state_dict().values()} == {torch.float32}
