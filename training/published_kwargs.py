"""Translation between the keyword arguments of EG3D-family code and the typed configuration."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np

from dnnlib import serialize
from dnnlib.util import EasyDict
from training.config import (
    ConditioningConfig,
    DecoderConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    MappingConfig,
    RenderingConfig,
    SuperresolutionConfig,
    SynthesisConfig,
    require,
)

# rendering_kwargs key -> (section of GeneratorConfig or "" for its top level, field).
_RENDERING_KEYS: dict[str, tuple[str, str]] = {
    **{field.name: ("rendering", field.name) for field in dataclasses.fields(RenderingConfig)},
    "superresolution_module": ("superresolution", "variant"),
    "superresolution_noise_mode": ("superresolution", "noise_mode"),
    "sr_antialias": ("superresolution", "antialias"),
    "c_gen_conditioning_zero": ("conditioning", "zero"),
    "c_scale": ("conditioning", "scale"),
    "decoder_activation": ("decoder", "activation"),
    "decoder_lr_mul": ("decoder", "lr_multiplier"),
    "use_torgb_raw": ("", "raw_torgb"),
    "use_background": ("", "background"),
    "triplane_size": ("", "plane_resolution"),
    "triplane_depth": ("", "plane_depth"),
    "image_resolution": ("", "img_resolution"),
}
# What EG3D's code does where its dictionary says nothing (or is ignored).
EG3D_RENDERING = {
    "decoder_activation": "sigmoid",
    "use_torgb_raw": False,
    "use_background": False,
    "triplane_size": 256,
    "triplane_depth": 1,
    "crop_margin": None,
}
PUBLISHED_PARSING_CLASSES = 20
# What published constructors take where an argument is left out; training commands always name these.
_MAPPING_DEFAULTS = {"num_layers": 8}
_SYNTHESIS_DEFAULTS = {"conv_clamp": 256}
_LIVE_SECTIONS = {"rendering", "conditioning"}  # what a built generator can still change
_SUPERRESOLUTION_PREFIX = "training.superresolution."


def generator_config_from_kwargs(
    z_dim: int,
    c_dim: int,
    w_dim: int,
    img_resolution: int,
    img_channels: int,
    *,
    sr_num_fp16_res: int = 0,
    mapping_kwargs: Mapping[str, Any] | None = None,
    rendering_kwargs: Mapping[str, Any] | None = None,
    sr_kwargs: Mapping[str, Any] | None = None,
    parsing_flag: bool = False,
    representation: str = "dual_spherical",
    pose_offset: bool = True,
    neural_rendering_resolution: int = 64,
    parsing_classes: int = PUBLISHED_PARSING_CLASSES,
    **synthesis_kwargs: Any,
) -> GeneratorConfig:
    """Build the configuration of a generator from the published constructor arguments.

    Args:
        z_dim: width of z; the next four as published.
        c_dim: 25.
        w_dim: 512.
        img_resolution: side of the final image, in pixels.
        img_channels: 3.
        sr_num_fp16_res: above 0, super-resolution runs in half precision on CUDA.
        mapping_kwargs: fields of `MappingConfig`.
        rendering_kwargs: the published dictionary; fields of `RenderingConfig` under their own names are accepted too.
        sr_kwargs: `channel_base` and `channel_max` are ignored, as published.
        parsing_flag: add the semantic head.
        representation: ours: a registered representation.
        pose_offset: ours: whether the generator learns a camera offset (not in EG3D).
        neural_rendering_resolution: ours, to begin with; published code sets the attribute of the generator.
        parsing_classes: ours: classes of the semantic head, if it is there.
        **synthesis_kwargs: `channel_base`, `channel_max`, `num_fp16_res`, `conv_clamp`, `architecture`,
            `fused_modconv_default`.

    Raises:
        ValueError: for a value outside its range. Unknown keywords raise a TypeError that names them.
    """
    # Published: the label counts for nothing unless c_scale is there.
    rendering_kwargs = {"c_scale": 0, **(rendering_kwargs or {}), "image_resolution": img_resolution}
    sections, extras = _split_rendering_kwargs(rendering_kwargs)
    superresolution = sections.pop("superresolution", {})
    require("variant" in superresolution, "rendering_kwargs", "an entry 'superresolution_module'", sorted(sections))
    sr_kwargs = {k: v for k, v in (sr_kwargs or {}).items() if k not in ("channel_base", "channel_max")}
    return GeneratorConfig(
        z_dim=z_dim,
        c_dim=c_dim,
        w_dim=w_dim,
        img_channels=img_channels,
        representation=representation,
        pose_offset=pose_offset,
        neural_rendering_resolution=neural_rendering_resolution,
        parsing_classes=parsing_classes if parsing_flag else 0,
        mapping=MappingConfig(**{**_MAPPING_DEFAULTS, **(mapping_kwargs or {})}),
        synthesis=SynthesisConfig(**{**_SYNTHESIS_DEFAULTS, **_rename_fused(synthesis_kwargs)}),
        superresolution=SuperresolutionConfig(
            num_fp16_res=sr_num_fp16_res, **superresolution, **_rename_fused(sr_kwargs)
        ),
        decoder=DecoderConfig(**sections.pop("decoder", {})),
        conditioning=ConditioningConfig(**sections.pop("conditioning", {})),
        rendering=RenderingConfig(**sections.pop("rendering", {})),
        extras=extras,
        **sections.pop("", {}),
    )


def generator_kwargs(config: GeneratorConfig) -> dict[str, Any]:
    """Return the constructor arguments of a configuration; inverse of `generator_config_from_kwargs`."""
    rendering = {key: _read(config, key) for key in _RENDERING_KEYS}
    synthesis = dataclasses.asdict(config.synthesis)
    superresolution = config.superresolution
    return EasyDict(
        {
            "z_dim": config.z_dim,
            "c_dim": config.c_dim,
            "w_dim": config.w_dim,
            "img_resolution": config.img_resolution,
            "img_channels": config.img_channels,
            "sr_num_fp16_res": superresolution.num_fp16_res,
            "mapping_kwargs": dataclasses.asdict(config.mapping),
            "rendering_kwargs": {**rendering, **copy.deepcopy(config.extras)},
            "sr_kwargs": {
                "fused_modconv_default": superresolution.fused_modconv,
                "first_rgb_replaces_raw": superresolution.first_rgb_replaces_raw,
                "half_precision": superresolution.half_precision,
            },
            "parsing_flag": config.parsing_classes > 0,
            "parsing_classes": config.parsing_classes or PUBLISHED_PARSING_CLASSES,
            "representation": config.representation,
            "pose_offset": config.pose_offset,
            "neural_rendering_resolution": config.neural_rendering_resolution,
            "fused_modconv_default": synthesis.pop("fused_modconv"),
            **synthesis,
        }
    )


def discriminator_config_from_kwargs(class_name: str, **kwargs: Any) -> DiscriminatorConfig:
    """Build the configuration of a discriminator from its published class name and constructor arguments."""
    nested = {**_pop_dict(kwargs, "block_kwargs"), **_pop_dict(kwargs, "epilogue_kwargs")}
    mapping = {
        f"mapping_{key.removeprefix('num_')}": value for key, value in _pop_dict(kwargs, "mapping_kwargs").items()
    }
    for ignored in ("parsing_resolution", "sr_upsample_factor"):  # the published classes only store them
        kwargs.pop(ignored, None)
    return DiscriminatorConfig(variant=class_name, **kwargs, **nested, **mapping)


def _pop_dict(kwargs: dict[str, Any], key: str) -> dict[str, Any]:
    return dict(kwargs.pop(key, None) or {})


class RenderingKwargs(MutableMapping):
    """The published `G.rendering_kwargs` as a view of a generator's configuration.

    Reading and writing go to the configuration, where values are validated; entries that the generator does not know
    are kept for the scripts that put them there. What is fixed once a generator is built cannot be assigned another
    value.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __getitem__(self, key: str) -> Any:
        config = self._owner.config
        return _read(config, key) if key in _RENDERING_KEYS else config.extras[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._owner.config = _write(self._owner.config, key, value)

    def __delitem__(self, key: str) -> None:
        config = self._owner.config
        require(key not in _RENDERING_KEYS, "rendering_kwargs", "an entry that can be deleted", key)
        extras = {k: v for k, v in config.extras.items() if k != key}
        require(len(extras) < len(config.extras), "rendering_kwargs", "an existing entry", key)
        self._owner.config = dataclasses.replace(config, extras=extras)

    def __iter__(self) -> Iterator[str]:
        return iter([*_RENDERING_KEYS, *self._owner.config.extras])

    def __len__(self) -> int:
        return len(_RENDERING_KEYS) + len(self._owner.config.extras)

    def copy(self) -> dict[str, Any]:
        """Return a plain dict, as the method of a dict would."""
        return dict(self)

    __copy__ = copy

    def __or__(self, other: Mapping) -> dict[str, Any]:
        return {**self, **other}

    def __ror__(self, other: Mapping) -> dict[str, Any]:
        return {**other, **self}

    def __deepcopy__(self, memo: dict) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)

    def __repr__(self) -> str:
        return f"RenderingKwargs({dict(self)})"


def replace_rendering_kwargs(config: GeneratorConfig, values: Mapping[str, Any]) -> GeneratorConfig:
    """Return the configuration after assigning a whole `rendering_kwargs`; entries it lacks keep their values."""
    extras = {key: value for key, value in values.items() if key not in _RENDERING_KEYS}
    config = dataclasses.replace(config, extras=extras)
    sections, _ = _split_rendering_kwargs({key: values[key] for key in values if key in _RENDERING_KEYS})
    for section, fields in sections.items():
        config = _replace_section(config, section, fields)
    return config


def _split_rendering_kwargs(kwargs: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Sort a published dictionary into configuration sections, and the rest."""
    sections: dict[str, dict[str, Any]] = {}
    extras = {}
    for key, value in kwargs.items():
        if key in _RENDERING_KEYS:
            section, name = _RENDERING_KEYS[key]
            sections.setdefault(section, {})[name] = _plain(key, value)
        else:
            extras[key] = value
    return sections, extras


def _plain(key: str, value: Any) -> Any:
    """Undo what published dictionaries add to a value."""
    if key == "superresolution_module":
        require(isinstance(value, str), f"rendering_kwargs['{key}']", "the name of a class", value)
        return value.removeprefix(_SUPERRESOLUTION_PREFIX)
    if isinstance(value, np.generic):
        value = value.item()
    if key in ("white_back", "disparity_space_sampling", "sr_antialias") and value in (0, 1):
        return bool(value)
    return value


def _read(config: GeneratorConfig, key: str) -> Any:
    section, name = _RENDERING_KEYS[key]
    value = getattr(getattr(config, section) if section else config, name)
    return _SUPERRESOLUTION_PREFIX + value if key == "superresolution_module" else value


def _write(config: GeneratorConfig, key: str, value: Any) -> GeneratorConfig:
    if key not in _RENDERING_KEYS:
        return dataclasses.replace(config, extras={**config.extras, key: value})
    section, name = _RENDERING_KEYS[key]
    return _replace_section(config, section, {name: _plain(key, value)})


def _replace_section(config: GeneratorConfig, section: str, fields: Mapping[str, Any]) -> GeneratorConfig:
    old = getattr(config, section) if section else config
    changed = {name: value for name, value in fields.items() if getattr(old, name) != value}
    live = section in _LIVE_SECTIONS or (section, set(changed)) == ("superresolution", {"noise_mode"})
    if not changed:
        return config
    require(live, f"rendering_kwargs {sorted(changed)}", "no change once the generator is built", changed)
    new = dataclasses.replace(old, **changed)
    serialize.to_json(new, "rendering_kwargs")  # every value has the type that its field declares
    return dataclasses.replace(config, **{section: new})


def _rename_fused(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {("fused_modconv" if key == "fused_modconv_default" else key): value for key, value in kwargs.items()}
