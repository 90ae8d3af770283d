"""Published keyword arguments and `rendering_kwargs` mean what they mean in EG3D-family code."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tests.helpers.published import tiny_generator_kwargs
from tests.helpers.tiny import tiny_config
from training.config import RenderingConfig, SuperresolutionConfig
from training.presets import GENERATOR_PRESETS
from training.published_kwargs import (
    discriminator_config_from_kwargs,
    generator_config_from_kwargs,
    generator_kwargs,
)
from training.triplane import TriPlaneGenerator

MINIMAL = {"superresolution_module": "training.superresolution.SuperresolutionHybrid8XDC"}


def from_kwargs(rendering: dict | None = None, **kwargs):
    """Build a configuration from little more than the required published arguments."""
    return generator_config_from_kwargs(
        512, 25, 512, 512, 3, rendering_kwargs={**MINIMAL, **(rendering or {})}, **kwargs
    )


@pytest.fixture
def generator() -> TriPlaneGenerator:
    with torch.device("meta"):
        return TriPlaneGenerator.from_config(tiny_config())


# Constructor arguments.


@pytest.mark.parametrize("system", ["sphere", "pano", "eg3d"])
def test_generator_config_published_arguments_reach_their_fields(system):
    config = generator_config_from_kwargs(**tiny_generator_kwargs(system))
    assert (config.z_dim, config.img_resolution, config.mapping.num_layers) == (64, 128, 2)
    assert (config.synthesis.channel_base, config.synthesis.channel_max) == (1024, 32)
    assert config.superresolution == SuperresolutionConfig(
        variant="SuperresolutionHybrid2X", num_fp16_res=4, first_rgb_replaces_raw=True
    )
    assert config.parsing_classes == (20 if system == "sphere" else 0)
    assert config.decoder.activation == ("sigmoid" if system == "eg3d" else "none")
    assert config.plane_resolution == (256 if system == "eg3d" else 32)
    assert config.rendering.depth_resolution == 12 and config.rendering.depth_clamp == "batch"
    assert config.extras["avg_camera_radius"] == 2.7 and config.extras["trans_reg"] == 10
    assert "clamp_mode" not in config.extras


@pytest.mark.parametrize("name", GENERATOR_PRESETS)
def test_generator_kwargs_are_the_inverse_of_generator_config(name):
    config = GENERATOR_PRESETS[name]
    assert generator_config_from_kwargs(**generator_kwargs(config)) == config


def test_generator_config_without_c_scale_ignores_the_label_as_published():
    assert from_kwargs().conditioning.scale == 0
    assert from_kwargs({"c_scale": 1}).conditioning.scale == 1


@pytest.mark.parametrize(("value", "expected"), [(False, False), (True, True), (0, False), (1, True)])
def test_generator_config_published_flags_may_be_numbers(value, expected):
    config = from_kwargs({"white_back": value, "disparity_space_sampling": value})
    assert config.rendering.white_back is expected and config.rendering.disparity_space_sampling is expected


def test_generator_config_arguments_left_out_have_the_published_defaults():
    config = from_kwargs()
    assert config.mapping.num_layers == 8 and config.synthesis.conv_clamp == 256
    config = from_kwargs(mapping_kwargs={"num_layers": 2}, conv_clamp=None)
    assert config.mapping.num_layers == 2 and config.synthesis.conv_clamp is None


def test_generator_config_image_resolution_is_that_of_the_argument():
    assert from_kwargs({"image_resolution": 64}).img_resolution == 512


def test_generator_config_unused_widths_of_superresolution_are_ignored():
    sr_kwargs = {"channel_base": 1, "channel_max": 2, "fused_modconv_default": False}
    config = from_kwargs(sr_kwargs=sr_kwargs, sr_num_fp16_res=4)
    assert config.superresolution.fused_modconv is False and config.superresolution.num_fp16_res == 4


@pytest.mark.parametrize(
    ("rendering", "message"),
    [
        ({"clamp_mode": "relu"}, r"clamp_mode.*'softplus'.*'relu'"),
        ({"depth_resolution": 1}, r"rendering\.depth_resolution"),
        ({"box_warp": -1}, r"rendering\.box_warp"),
        ({"triplane_size": 100}, r"plane_resolution.*100"),
    ],
)
def test_generator_config_impossible_setting_raises_value_error_that_names_it(rendering, message):
    with pytest.raises(ValueError, match=message):
        from_kwargs(rendering)


def test_generator_config_without_superresolution_module_raises_value_error():
    with pytest.raises(ValueError, match="superresolution_module"):
        generator_config_from_kwargs(512, 25, 512, 512, 3, rendering_kwargs={})


def test_generator_config_superresolution_module_of_another_type_raises_value_error():
    with pytest.raises(ValueError, match="superresolution_module.*5"):
        from_kwargs({"superresolution_module": 5})


def test_generator_config_unknown_argument_raises_type_error_that_names_it():
    with pytest.raises(TypeError, match="channel_bass"):
        from_kwargs(channel_bass=1)


def test_discriminator_config_nested_arguments_reach_their_fields():
    config = discriminator_config_from_kwargs(
        "MaskDualDiscriminator",
        c_dim=25,
        img_resolution=64,
        img_channels=3,
        block_kwargs={"freeze_layers": 2},
        mapping_kwargs={"num_layers": 3, "lr_multiplier": 0.1},
        epilogue_kwargs={"mbstd_group_size": 8, "mbstd_num_channels": 2},
        seg_resolution=32,
        seg_channels=1,
        sr_upsample_factor=2,
        parsing_resolution=64,
        architecture="skip",
    )
    assert (config.freeze_layers, config.mbstd_group_size, config.mbstd_num_channels) == (2, 8, 2)
    assert (config.mapping_layers, config.mapping_lr_multiplier) == (3, 0.1)
    assert (config.seg_resolution, config.architecture, config.variant) == (32, "skip", "MaskDualDiscriminator")


def test_discriminator_config_unknown_argument_raises_type_error_that_names_it():
    with pytest.raises(TypeError, match="colour"):
        discriminator_config_from_kwargs("HoloDiscriminator", img_resolution=64, colour=1)


# The view `G.rendering_kwargs`.


def test_rendering_kwargs_reads_every_published_entry(generator):
    kwargs = generator.rendering_kwargs
    published = {
        "image_resolution": 128,
        "superresolution_module": "training.superresolution.SuperresolutionHybrid2X",
        "superresolution_noise_mode": "none",
        "sr_antialias": True,
        "disparity_space_sampling": False,
        "c_gen_conditioning_zero": False,
        "c_scale": 1.0,
        "decoder_lr_mul": 1.0,
        "decoder_activation": "none",
        "use_torgb_raw": True,
        "use_background": True,
        "triplane_size": 16,
        "triplane_depth": 3,
        "depth_resolution": 6,
        "depth_resolution_importance": 6,
        "ray_start": 2.25,
        "ray_end": 3.3,
        "box_warp": 1.0,
        "white_back": False,
        "density_noise": 0.0,
        "avg_camera_radius": 2.7,
        "avg_camera_pivot": [0, 0, 0.2],
    }
    assert {key: kwargs[key] for key in published} == published
    assert set(published) <= set(kwargs) and len(kwargs) == len(list(kwargs)) == len(dict(kwargs))
    assert kwargs.get("avg_camera_radius", 1) == 2.7 and kwargs.get("nothing", 1) == 1
    assert "ray_start" in kwargs and "nothing" not in kwargs
    assert "'ray_start': 2.25" in repr(kwargs)


def test_rendering_kwargs_unknown_entry_raises_key_error(generator):
    with pytest.raises(KeyError, match="nothing"):
        generator.rendering_kwargs["nothing"]


def test_rendering_kwargs_assignment_changes_the_configuration(generator):
    kwargs = generator.rendering_kwargs
    kwargs["depth_resolution"] = kwargs["depth_resolution"] * 2
    kwargs["ray_start"] = 2.35
    kwargs["c_scale"] = 0.5
    kwargs["superresolution_noise_mode"] = "random"
    kwargs["sr_antialias"] = True
    config = generator.config
    assert (config.rendering.depth_resolution, config.rendering.ray_start) == (12, 2.35)
    assert config.conditioning.scale == 0.5 and config.superresolution.noise_mode == "random"
    assert generator.rendering_kwargs["depth_resolution"] == 12


def test_rendering_kwargs_update_and_setdefault_work_as_for_a_dict(generator):
    generator.rendering_kwargs.update(depth_resolution=10, mine=3)
    assert generator.config.rendering.depth_resolution == 10 and generator.config.extras["mine"] == 3
    assert generator.rendering_kwargs.setdefault("mine", 4) == 3
    assert generator.rendering_kwargs.pop("mine") == 3 and "mine" not in generator.rendering_kwargs


def test_rendering_kwargs_unknown_entry_is_kept(generator):
    generator.rendering_kwargs["my_hint"] = {"a": 1}
    assert generator.rendering_kwargs["my_hint"] == {"a": 1} == generator.config.extras["my_hint"]
    del generator.rendering_kwargs["my_hint"]
    assert "my_hint" not in generator.config.extras


@pytest.mark.parametrize("key", ["ray_start", "missing"])
def test_rendering_kwargs_deleting_what_must_stay_or_is_absent_is_refused(generator, key):
    before = generator.config
    with pytest.raises((ValueError, KeyError), match=key):
        del generator.rendering_kwargs[key]
    assert generator.config == before


def test_rendering_kwargs_pop_of_an_absent_entry_gives_the_default(generator):
    assert generator.rendering_kwargs.pop("missing", 7) == 7


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("triplane_size", 32),
        ("triplane_depth", 1),
        ("image_resolution", 256),
        ("use_background", False),
        ("use_torgb_raw", False),
        ("decoder_activation", "sigmoid"),
        ("decoder_lr_mul", 2.0),
        ("superresolution_module", "training.superresolution.SuperresolutionHybrid4X"),
        ("sr_antialias", False),
    ],
)
def test_rendering_kwargs_what_is_built_in_cannot_change(generator, key, value):
    before = generator.config
    with pytest.raises(ValueError, match="once the generator is built"):
        generator.rendering_kwargs[key] = value
    generator.rendering_kwargs[key] = generator.rendering_kwargs[key]  # the same value is no change
    assert generator.config == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("depth_resolution", 0, "depth_resolution"),
        ("density_noise", -1.0, "density_noise"),
        ("box_warp", 0.0, "box_warp"),
        ("clamp_mode", "relu", "clamp_mode"),
    ],
)
def test_rendering_kwargs_impossible_value_raises_value_error_and_changes_nothing(generator, key, value, message):
    before = generator.config
    with pytest.raises(ValueError, match=message):
        generator.rendering_kwargs[key] = value
    assert generator.config == before


def test_rendering_kwargs_ray_limits_may_be_assigned_one_after_the_other(generator):
    generator.rendering_kwargs["ray_start"] = "auto"
    rays = torch.zeros(1, 1, 3), torch.ones(1, 1, 3)
    with pytest.raises(ValueError, match=r"ray_start, ray_end.*both 'auto'"):
        generator.renderer(torch.zeros(1), generator.decoder, *rays, generator.config.rendering)
    generator.rendering_kwargs["ray_end"] = "auto"
    assert generator.config.rendering.auto_range


def test_rendering_kwargs_whole_assignment_changes_several_entries(generator):
    generator.rendering_kwargs = {**generator.rendering_kwargs, "ray_start": "auto", "ray_end": "auto", "mine": 1}
    assert generator.config.rendering.auto_range and generator.config.extras["mine"] == 1
    assert generator.config.extras["avg_camera_radius"] == 2.7


def test_rendering_kwargs_whole_assignment_keeps_known_entries_that_it_lacks(generator):
    generator.rendering_kwargs = {"depth_resolution": 9}
    assert generator.config.rendering == RenderingConfig(depth_resolution=9, depth_resolution_importance=6)
    assert generator.config.extras == {}


def test_rendering_kwargs_whole_assignment_of_another_generators_is_equal(generator):
    with torch.device("meta"):
        other = TriPlaneGenerator.from_config(tiny_config(ray_start=2.0, extras={"mine": 1}))
    generator.rendering_kwargs = other.rendering_kwargs
    assert generator.config == other.config
    generator.rendering_kwargs = copy.deepcopy(other.rendering_kwargs)
    assert generator.config == other.config


def test_rendering_kwargs_whole_assignment_of_the_constructor_argument_changes_nothing(generator):
    before = generator.config
    generator.rendering_kwargs = generator.init_kwargs["rendering_kwargs"]
    assert generator.config == before
    generator.rendering_kwargs["clamp_mode"] = "softplus"
    assert generator.config == before


def test_rendering_kwargs_whole_assignment_with_a_built_in_change_changes_nothing(generator):
    before = generator.config
    with pytest.raises(ValueError, match="plane_resolution"):
        generator.rendering_kwargs = {**generator.rendering_kwargs, "ray_start": 2.0, "triplane_size": 32}
    assert generator.config == before


@pytest.mark.parametrize("copied", [dict, copy.copy, copy.deepcopy, lambda kwargs: kwargs.copy()])
def test_rendering_kwargs_copies_do_not_follow_the_generator(generator, copied):
    kept = copied(generator.rendering_kwargs)
    generator.rendering_kwargs["ray_start"] = 2.0
    assert kept["ray_start"] == 2.25 and isinstance(kept, dict)


def test_rendering_kwargs_changes_are_part_of_the_constructor_arguments(generator):
    generator.rendering_kwargs["ray_start"] = 2.0
    generator.neural_rendering_resolution = 9
    config = generator_config_from_kwargs(**generator.init_kwargs)
    assert config.rendering.ray_start == 2.0 and config.neural_rendering_resolution == 9
    assert config == dataclasses.replace(generator.config)
