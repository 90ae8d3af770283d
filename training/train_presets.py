"""Named training configurations, and how the settings of a command are laid over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from training.config import DiscriminatorConfig, require
from training.dual_discriminator import VARIANTS
from training.presets import generator_preset
from training.train_config import (
    AugmentConfig,
    DataConfig,
    LoopConfig,
    LossConfig,
    OptimizerConfig,
    PrecisionConfig,
    TrainConfig,
    VicoConfig,
    WarmupConfig,
)

_PUBLISHED_BATCH = 32  # schedules in kimg are given for this batch size, and shrink with a smaller one
_MIN_PUBLISHED_RESOLUTION = 128
_SUPERRESOLUTION = {
    64: "Superresolution2XSmall",
    128: "SuperresolutionHybrid2X",
    256: "SuperresolutionHybrid4X",
    512: "SuperresolutionHybrid8XDC",
}
_VIEW_HEAD_FEATURES = 256


class TrainPreset(NamedTuple):
    """One row: a generator, and fields (section.field) that differ from the defaults of `TrainConfig`."""

    generator: str
    """A row of `training.presets`."""
    resolution: int | None
    """Of images; None is that of the data set."""
    fields: dict[str, Any]


# PanoHead's published recipe. SphereHead published none; its generator differs from PanoHead's in the planes alone.
_HEADS = {
    "data.mirror": True,
    "data.back_repeat": 4,
    "discriminator.variant": "MaskDualDiscriminatorV2",
    "loss.r1_gamma": 1.0,
    "loss.r1_gamma_mask": 1.0,
    "loss.density_reg": 0.0,
    "loss.density_noise_fade_kimg": 200.0,
    "loss.background_swap_prob": 0.2,
    "loss.conditioning_swap_prob": 0.7,
    "loss.pose_offset_reg": 10.0,
}
# For exact cameras that know nothing of the identity, as `dataset_tool.py synth` makes them: no camera offset, no
# conditioning, and R1 after the rule 0.0002 resolution^2 / batch (StyleGAN2-ADA).
_SYNTHETIC = {
    "generator.pose_offset": False,
    "generator.conditioning.zero": True,
    "discriminator.variant": "MaskDualDiscriminatorV2",
    "loss.conditioning_swap_prob": None,
    "loss.density_reg": 0.0,
    "loss.blur_init_sigma": 1.5,
    "vico.mode": "head",
}

TRAIN_PRESETS = {
    "spherehead": TrainPreset("spherehead", None, {**_HEADS, "vico.mode": "label"}),
    "panohead": TrainPreset("panohead", None, _HEADS),
    "eg3d": TrainPreset(
        "eg3d",
        None,
        {
            "generator.decoder.activation": "sigmoid",
            "discriminator.variant": "DualDiscriminator",
            "loss.r1_gamma": 1.0,
        },
    ),
    # For small machines, and what the bundled network was trained with: 64 px unless the data say otherwise.
    "demo": TrainPreset(
        "spherehead",
        64,
        {
            **_SYNTHETIC,
            "generator.z_dim": 128,
            "generator.plane_resolution": 64,
            "generator.synthesis.channel_base": 2048,
            "generator.synthesis.channel_max": 96,
            "generator.rendering.depth_resolution": 16,
            "generator.rendering.depth_resolution_importance": 16,
            "discriminator.channel_base": 2048,
            "discriminator.channel_max": 96,
            "warmup.kimg": 40.0,
            "warmup.after_interval": 2,
            "loss.r1_gamma": 0.1,
            "loss.r1_gamma_mask": 0.1,
            "loss.blur_init_sigma": 0.0,
            "optimizer.generator_lr": 1e-3,
            "optimizer.discriminator_lr": 2e-3,
            "loop.batch_size": 8,
            "loop.tick_kimg": 0.5,
            "loop.image_ticks": 5,
            "loop.snapshot_ticks": 20,
            "loop.state_ticks": 2,
            "loop.workers": 1,
        },
    ),
    # Everything in seconds, for tests.
    "debug": TrainPreset(
        "debug",
        64,
        {
            **_SYNTHETIC,
            "generator.plane_resolution": 16,
            "generator.synthesis.channel_base": 256,
            "generator.synthesis.channel_max": 16,
            "generator.rendering.depth_resolution": 6,
            "generator.rendering.depth_resolution_importance": 6,
            "discriminator.channel_base": 512,
            "discriminator.channel_max": 16,
            "loss.r1_gamma": 0.2,
            "loss.r1_gamma_mask": 0.2,
            "loss.neural_rendering_resolution_initial": 16,
            "loop.batch_size": 4,
            "loop.tick_kimg": 0.016,
            "loop.image_ticks": 2,
            "loop.snapshot_ticks": 2,
            "loop.state_ticks": 1,
            "loop.workers": 0,
        },
    ),
}


def train_preset(name: str) -> TrainPreset:
    """Return a row of the presets; `ValueError` for an unknown name."""
    require(name in TRAIN_PRESETS, "preset", f"one of {', '.join(TRAIN_PRESETS)}", name)
    return TRAIN_PRESETS[name]


def make_train_config(preset: str, data: DataConfig, settings: Mapping[str, Any], processes: int = 1) -> TrainConfig:
    """Lay settings over a preset.

    What follows from other settings is filled in where nobody sets it: sizes from the data set, the super-resolution
    module from the size, the part of the batch per process, the half-life of the moving average (batch / 32 of 10
    kimg), the width of the consistency head, and the parsing head where there are parsing maps. `loss.blur_fade_kimg`
    is scaled by batch / 32, as published.

    Args:
        preset: a row of `TRAIN_PRESETS`.
        data: the data set; its `mirror` and `back_repeat` come from the preset where `settings` have none.
        settings: values by dotted field, such as `{"loss.r1_gamma": 1.0}`.
        processes: training processes, which share the batch.

    Raises:
        ValueError: an unknown preset or field, or values that do not go together.
    """
    row = train_preset(preset)
    if settings.get("warmup.kimg") == 0:
        settings = {"warmup.after_interval": None, **settings}  # that of a preset goes with its warm-up
    merged = {**row.fields, **settings}
    batch_size = merged.get("loop.batch_size", _PUBLISHED_BATCH)
    filled = {**row.fields, **_derived(data, merged, batch_size, processes), **settings}
    filled["loss.blur_fade_kimg"] = filled.get("loss.blur_fade_kimg", LossConfig.blur_fade_kimg) * (
        batch_size / _PUBLISHED_BATCH
    )

    sections = {
        "data": data,
        "generator": generator_preset(row.generator),
        "discriminator": DiscriminatorConfig(img_resolution=data.resolution),
        "loss": LossConfig(r1_gamma=filled.pop("loss.r1_gamma")),
        "vico": VicoConfig(),
        "warmup": WarmupConfig(),
        "augment": AugmentConfig(),
        "optimizer": OptimizerConfig(),
        "precision": PrecisionConfig(),
        "loop": LoopConfig(batch_size=batch_size, batch_gpu=filled["loop.batch_gpu"]),
    }
    top = {name: filled.pop(name) for name in list(filled) if "." not in name}
    for path in filled:
        require(path.split(".")[0] in sections, "setting", f"one of the sections {', '.join(sections)}", path)
    for name, section in sections.items():
        own = {path.partition(".")[2]: value for path, value in filled.items() if path.startswith(name + ".")}
        sections[name] = replace_fields(section, own)
    config = TrainConfig(preset=preset, **sections, **top)
    _require_inputs(config)
    return config


def _require_inputs(config: TrainConfig) -> None:
    """Raise a `ValueError` if the discriminator needs maps that the data set does not have."""
    name = config.discriminator.variant
    require(name in VARIANTS, "discriminator.variant", f"one of {', '.join(VARIANTS)}", name)
    row, there = VARIANTS[name], {"masks": config.data.masks, "parsing": config.data.parsing}
    needs_masks = row.mask_tower or "image_mask" in row.stacked
    for what, needed in (("masks", needs_masks), ("parsing", "image_parsing" in row.stacked)):
        require(there[what] or not needed, f"discriminator {name}", f"data.{what}, which it sees", there[what])


def _derived(data: DataConfig, settings: Mapping[str, Any], batch_size: int, processes: int) -> dict[str, Any]:
    """Return the settings that follow from others."""
    resolution = data.resolution
    require(resolution in _SUPERRESOLUTION, "resolution", f"one of {sorted(_SUPERRESOLUTION)}", resolution)
    small = resolution < _MIN_PUBLISHED_RESOLUTION
    nrr = settings.get("loss.neural_rendering_resolution_initial", resolution // 2 if small else 64)
    classes = data.parsing_classes
    has_head = settings.get("vico.mode", "none") in ("head", "both")
    derived = {
        "generator.img_resolution": resolution,
        "generator.superresolution.variant": _SUPERRESOLUTION[resolution],
        "generator.neural_rendering_resolution": nrr,
        "generator.parsing_classes": classes,
        "discriminator.view_head_features": _VIEW_HEAD_FEATURES if has_head else 0,
        "loss.neural_rendering_resolution_initial": nrr,
        "loop.batch_gpu": max(batch_size // processes, 1),
        "loop.ema_kimg": batch_size * 10 / _PUBLISHED_BATCH,
    }
    if classes:
        derived |= {"discriminator.variant": "HoloDiscriminator", "discriminator.parsing_channels": classes}
    return derived


def replace_fields(config: Any, fields: Mapping[str, Any]) -> Any:
    """Return a dataclass with values by dotted path replaced, nested ones too; every dataclass is validated once.

    Raises:
        ValueError: a path names no field.
    """
    known = {field.name for field in dataclasses.fields(config)}
    changes: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in fields.items():
        name, _, rest = path.partition(".")
        require(name in known, "setting", f"a field of {type(config).__name__}", path)
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            changes[name] = value
    changes |= {name: replace_fields(getattr(config, name), own) for name, own in nested.items()}
    return dataclasses.replace(config, **changes)
