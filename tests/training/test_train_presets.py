"""Training presets, and settings laid over them."""

from __future__ import annotations

import pytest

from dnnlib import serialize
from training.train_config import DataConfig, TrainConfig
from training.train_presets import TRAIN_PRESETS, make_train_config, replace_fields


def data(resolution: int = 64, **fields) -> DataConfig:
    return DataConfig(images=("images.zip",), masks=("masks.zip",), resolution=resolution, **fields)


def make(preset: str = "demo", resolution: int = 64, processes: int = 1, **settings):
    paths = {name.replace("__", "."): value for name, value in settings.items()}
    return make_train_config(preset, data(resolution), paths, processes)


@pytest.mark.parametrize("preset", TRAIN_PRESETS)
def test_train_preset_survives_its_json(preset):
    config = make(preset, TRAIN_PRESETS[preset].resolution or 512)
    assert serialize.loads(TrainConfig, serialize.dumps(config)) == config


@pytest.mark.parametrize("resolution", [64, 128, 256, 512])
def test_make_train_config_sizes_follow_the_data(resolution):
    config = make("spherehead", resolution)
    assert config.generator.img_resolution == config.discriminator.img_resolution == resolution
    assert config.generator.neural_rendering_resolution == (32 if resolution == 64 else 64)


def test_make_train_config_panohead_has_the_published_recipe():
    config = make("panohead", 512)
    loss = config.loss
    assert (loss.r1_gamma, loss.r1_gamma_mask, loss.density_reg, loss.pose_offset_reg) == (1, 1, 0, 10)
    assert (loss.background_swap_prob, loss.conditioning_swap_prob, loss.density_noise_fade_kimg) == (0.2, 0.7, 200)
    assert config.data.mirror and config.data.back_repeat == 4
    assert config.discriminator.variant == "MaskDualDiscriminatorV2"
    assert config.vico.mode == "none" and config.discriminator.view_head_features == 0
    assert (config.loop.batch_size, config.loop.ema_kimg, loss.blur_fade_kimg) == (32, 10, 200)


def test_make_train_config_smaller_batch_shortens_average_and_blur():
    config = make("panohead", 512, loop__batch_size=8)
    assert (config.loop.ema_kimg, config.loss.blur_fade_kimg) == (2.5, 50)


def test_make_train_config_processes_share_the_batch():
    assert make("spherehead", 512, processes=8).loop.batch_gpu == 4
    assert make("spherehead", 512, processes=8, loop__batch_gpu=2).loop.batch_gpu == 2


def test_make_train_config_settings_win_over_the_preset():
    config = make(loss__r1_gamma=3.0, generator__synthesis__channel_base=2048, vico__mode="none")
    assert config.loss.r1_gamma == 3 and config.generator.synthesis.channel_base == 2048
    assert config.discriminator.view_head_features == 0


def test_make_train_config_parsing_maps_bring_their_head_and_discriminator():
    config = make_train_config("spherehead", data(512, parsing=("p.zip",), parsing_classes=20), {})
    assert config.generator.parsing_classes == config.discriminator.parsing_channels == 20
    assert config.discriminator.variant == "HoloDiscriminator"


def test_make_train_config_leaving_out_the_warm_up_of_a_preset_leaves_out_what_follows_it():
    assert make().warmup.kimg > 0 and make().warmup.after_interval is not None
    assert make(warmup__kimg=0).warmup.after_interval is None
    with pytest.raises(ValueError, match=r"warmup.kimg: expected above 0 with warmup.after_interval, got 0"):
        make(warmup__kimg=0, warmup__after_interval=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss.gamma": 1.0}, r"setting: expected a field of LossConfig, got 'gamma'"),
        ({"losses.r1_gamma": 1.0}, r"setting: expected one of the sections .*, got 'losses.r1_gamma'"),
        ({"loss.r1_gamma": -1.0}, r"loss.r1_gamma: expected 0 or more, got -1"),
        ({"discriminator.view_head_features": 0}, r"view_head_features: expected above 0 exactly where"),
        ({"discriminator.c_dim": 0}, r"vico.mode: expected 'none' if D is not told cameras"),
        ({"data.conditional": False}, r"data.conditional: expected true"),
        ({"discriminator.variant": "HoloDiscriminator"}, r"HoloDiscriminator.*parsing"),
    ],
)
def test_make_train_config_impossible_setting_raises_value_error(settings, message):
    with pytest.raises(ValueError, match=message):
        make_train_config("demo", data(), settings)


def test_make_train_config_odd_resolution_raises_value_error():
    with pytest.raises(ValueError, match=r"resolution: expected one of \[64, 128, 256, 512\], got 100"):
        make("demo", 100)


def test_make_train_config_masks_are_needed_where_the_discriminator_sees_them():
    with pytest.raises(ValueError, match=r"MaskDualDiscriminatorV2.*masks"):
        make_train_config("demo", DataConfig(images=("images.zip",), resolution=64), {})


def test_replace_fields_validates_once_for_fields_that_belong_together():
    config = make()
    changed = replace_fields(
        config, {"vico.mode": "none", "discriminator.view_head_features": 0, "generator.rendering.ray_start": "auto"}
    )
    assert changed.vico.mode == "none" and changed.generator.rendering.ray_start == "auto"
