"""Presets build what they are named after, and survive JSON."""

from __future__ import annotations

import pytest
import torch

from dnnlib import serialize
from training.config import GeneratorConfig
from training.presets import GENERATOR_PRESETS, generator_preset
from training.triplane import TriPlaneGenerator

# Preset -> output size, plane resolution, representation, whether it has pose offset and background.
EXPECTED = {
    "spherehead": (512, 256, "dual_spherical", True),
    "panohead": (512, 256, "tri_grid", True),
    "eg3d": (512, 256, "tri_plane", False),
    "debug": (128, 64, "dual_spherical", True),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_generator_preset_is_what_its_name_says(name):
    config = generator_preset(name)
    size, planes, representation, has_both = EXPECTED[name]
    assert (config.img_resolution, config.plane_resolution, config.representation) == (size, planes, representation)
    assert config.pose_offset == config.background == has_both
    assert config.conditioning.scale == 1 and not config.conditioning.zero
    assert config.rendering.depth_clamp == "ray" and config.rendering.auto_range_of_misses == "longest"
    assert not config.superresolution.first_rgb_replaces_raw


@pytest.mark.parametrize("name", GENERATOR_PRESETS)
def test_generator_preset_builds(name):
    with torch.device("meta"):
        generator = TriPlaneGenerator.from_config(generator_preset(name))
    assert generator.config == generator_preset(name)


@pytest.mark.parametrize("name", GENERATOR_PRESETS)
def test_generator_preset_json_round_trip_is_equal(name):
    config = generator_preset(name)
    assert serialize.loads(GeneratorConfig, serialize.dumps(config)) == config


def test_generator_preset_unknown_name_raises_value_error_with_the_known_ones():
    with pytest.raises(ValueError, match=r"preset.*spherehead.*'stylegan3'"):
        generator_preset("stylegan3")


def test_debug_preset_is_small():
    with torch.device("meta"):
        generator = TriPlaneGenerator.from_config(generator_preset("debug"))
    assert sum(parameter.numel() for parameter in generator.parameters()) < 3_000_000
