"""Configurations refuse what cannot work, name the field, and survive JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dnnlib import serialize
from tests.helpers.tiny import tiny_config
from training.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    MappingConfig,
    RenderingConfig,
    SuperresolutionConfig,
    SynthesisConfig,
    require,
)

SUPERRESOLUTION = SuperresolutionConfig(variant="SuperresolutionHybrid2X")


def generator(**fields: Any) -> GeneratorConfig:
    return GeneratorConfig(**{"img_resolution": 128, "superresolution": SUPERRESOLUTION, **fields})


def test_require_names_field_expectation_and_value():
    require(True, "field", "anything", None)
    with pytest.raises(ValueError, match=r"^field: expected a thing, got 'x'$"):
        require(False, "field", "a thing", "x")


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (MappingConfig, {"num_layers": 0}, r"mapping\.num_layers: .*, got 0"),
        (MappingConfig, {"num_layers": 10**9}, r"mapping\.num_layers: .*64, got 1000000000"),
        (SynthesisConfig, {"channel_base": 0}, r"synthesis\.channel_base: .*got 0"),
        (SynthesisConfig, {"channel_max": -1}, r"synthesis\.channel_max: .*got -1"),
        (RenderingConfig, {"depth_resolution": 1}, r"rendering\.depth_resolution: expected at least 2, got 1"),
        (RenderingConfig, {"depth_resolution": 3}, r"rendering\.depth_resolution: expected at least 4 with importance"),
        (RenderingConfig, {"depth_resolution_importance": -1}, r"rendering\.depth_resolution_importance: .*got -1"),
        (RenderingConfig, {"clamp_mode": "relu"}, r"rendering\.clamp_mode: expected 'softplus', got 'relu'"),
        (RenderingConfig, {"box_warp": 0.0}, r"rendering\.box_warp: .*got 0"),
        (RenderingConfig, {"density_noise": -0.1}, r"rendering\.density_noise: .*got -0\.1"),
        (RenderingConfig, {"box_warp": "large"}, r"rendering\.box_warp: .*got 'large'"),
        (RenderingConfig, {"depth_resolution": [48]}, r"rendering\.depth_resolution: .*got \[48\]"),
        (generator, {"img_resolution": 128.0}, r"img_resolution: .*got 128\.0"),
        (generator, {"z_dim": "64"}, r"z_dim: .*got '64'"),
        (generator, {"neural_rendering_resolution": None}, r"neural_rendering_resolution: .*got None"),
        (generator, {"img_resolution": 100}, r"img_resolution: expected a power of two.*got 100"),
        (generator, {"img_resolution": 0}, r"img_resolution: .*got 0"),
        (generator, {"plane_resolution": 48}, r"plane_resolution: expected a power of two.*got 48"),
        (generator, {"plane_resolution": 2}, r"plane_resolution: .*got 2"),
        (generator, {"w_dim": 256}, r"w_dim: expected 512.*got 256"),
        (generator, {"c_dim": 0}, r"c_dim: expected 25.*got 0"),
        (generator, {"z_dim": 0}, r"z_dim: .*got 0"),
        (generator, {"img_channels": 1}, r"img_channels: expected 3, got 1"),
        (generator, {"parsing_classes": -1}, r"parsing_classes: .*got -1"),
        (generator, {"neural_rendering_resolution": 0}, r"neural_rendering_resolution: .*got 0"),
    ],
)
def test_config_impossible_value_raises_value_error_that_names_the_field(build, fields, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        build(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"depth_resolution": 2, "depth_resolution_importance": 0},
        {"depth_resolution": 4, "depth_resolution_importance": 1},
        {"ray_start": "auto", "ray_end": "auto"},
        {"ray_start": 0.0},
    ],
)
def test_rendering_config_extremes_that_work_are_accepted(fields):
    config = RenderingConfig(**fields)
    config.require_range()
    assert config.auto_range == (config.ray_start == "auto")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ray_start": "auto"}, "both numbers or both 'auto'"),
        ({"ray_end": "auto"}, "both numbers or both 'auto'"),
        ({"ray_start": 3.3}, "start before end"),
        ({"ray_start": "near", "ray_end": "far"}, "both numbers or both 'auto'"),
    ],
)
def test_rendering_config_limits_that_do_not_belong_together_are_refused_on_use(fields, message):
    config = RenderingConfig(**fields)  # scripts assign one limit after the other
    with pytest.raises(ValueError, match=rf"^rendering\.ray_start, ray_end: expected {message}"):
        config.require_range()


@pytest.mark.parametrize("cls", [GeneratorConfig, DiscriminatorConfig, SuperresolutionConfig, RenderingConfig])
def test_config_is_frozen_and_takes_keywords_only(cls):
    config = tiny_config() if cls is GeneratorConfig else None
    if config is not None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.z_dim = 3
    with pytest.raises(TypeError):
        cls("something")


def test_synthesis_config_channels_are_halved_per_doubling_up_to_the_maximum():
    config = SynthesisConfig(channel_base=1024, channel_max=100)
    assert [config.channels(r) for r in (4, 8, 16, 32, 1024)] == [100, 100, 64, 32, 1]
    assert config.background() == SynthesisConfig(channel_base=512, channel_max=100)
    with pytest.raises(ValueError, match=r"synthesis\.channel_base: expected at least 2048, got 1024"):
        config.channels(2048)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config("tri_grid", extras={"note": [1, 2.5, None, {"a": True}]}),
        tiny_config("tri_plane", ray_start="auto", ray_end="auto", crop_margin=None),
        tiny_config(synthesis=SynthesisConfig(channel_base=256, conv_clamp=256, fused_modconv=False)),
        DiscriminatorConfig(img_resolution=64),
        DiscriminatorConfig(variant="MaskDualDiscriminator", img_resolution=64, seg_resolution=16, conv_clamp=None),
    ],
)
def test_config_json_round_trip_is_equal(config):
    assert serialize.loads(type(config), serialize.dumps(config)) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rendering", "depth_resolution"), 1, r"rendering\.depth_resolution"),
        (("rendering", "ray_start"), "automatic", r"config\.rendering\.ray_start"),
        (("rendering", "ray_start"), float("nan"), r"config\.rendering\.ray_start"),
        (("mapping", "num_layers"), True, r"config\.mapping\.num_layers"),
        (("mapping", "num_layers"), 2.5, r"config\.mapping\.num_layers"),
        (("z_dim",), "64", r"config\.z_dim"),
        (("z_dimension",), 64, r"config\.z_dimension"),
        (("superresolution",), None, r"config\.superresolution"),
    ],
)
def test_config_json_of_another_kind_raises_value_error_that_names_the_field(path, value, message):
    data = serialize.to_json(tiny_config())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        serialize.from_json(GeneratorConfig, data)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(GeneratorConfig)])
def test_config_json_without_a_field_raises_value_error_that_names_it(field):
    data = serialize.to_json(tiny_config())
    del data[field]
    with pytest.raises(ValueError, match=rf"config\.{field}: missing"):
        serialize.from_json(GeneratorConfig, data)


def test_config_json_of_an_old_file_means_what_it_was_trained_with():
    new = serialize.to_json(tiny_config())
    old = {**new, "rendering": {k: v for k, v in new["rendering"].items() if k != "importance_draws"}}
    assert serialize.from_json(GeneratorConfig, old).rendering.importance_draws == "random"
    assert serialize.to_json(serialize.from_json(GeneratorConfig, new)) == new
    for misfit in ([], {**old, "rendering": 1}):
        with pytest.raises(ValueError, match="config"):
            serialize.from_json(GeneratorConfig, misfit)
