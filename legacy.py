"""Published EG3D, PanoHead and SphereHead snapshots -> live networks, executing nothing from the file.

Snapshots are pickles of classes that carry their own source text; the published loader runs it. Here the pickle is
read as data (`torch_utils.safe_pickle`), the networks are this project's own, and what the file says of them is their
constructor arguments, their rendering settings and their tensors.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from dnnlib import serialize
from dnnlib.extras import MissingExtraError
from dnnlib.sources import UNTRAINED_PREFIX, is_untrained, resolve_demo
from dnnlib.util import open_url
from torch_utils import checkpoint
from torch_utils.safe_pickle import PickledObject, named_tensors, read_pickle
from training.base_network import BasePlace, base_places, missing_base_message, source_identity
from training.dual_discriminator import Discriminator
from training.network_difference import NETWORK_NAME, is_difference, network_fingerprint, read_difference
from training.presets import untrained_generator
from training.published_kwargs import (
    EG3D_RENDERING,
    discriminator_config_from_kwargs,
    generator_config_from_kwargs,
)
from training.snapshots import NETWORK_NAMES, OPTIONAL_TENSORS, load_networks
from training.triplane import TriPlaneGenerator

_GENERATOR_CLASS = "TriPlaneGenerator"
_GENERATOR_ARGUMENTS = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")
_DISCRIMINATOR_ARGUMENTS = ("c_dim", "img_resolution", "img_channels")
# What the published code does that this project does otherwise by default; see docs/differences.md.
_PUBLISHED_RENDERING = {"depth_clamp": "batch", "auto_range_of_misses": "nearest", "importance_draws": "random"}
_MAX_ARGUMENT_VALUES = 10_000
_MAX_ARGUMENT_DEPTH = 20
_MAX_DIFFERENCES = 4  # on top of each other


def load_snapshot(source: str | os.PathLike, *, only: Collection[str] | None = None) -> dict[str, Any]:
    """Read a snapshot from wherever it is.

    Args:
        source: a path or URL (see `dnnlib.util.open_url`) of whatever `load_network_pkl` reads; `demo`, the bundled
            network; or `init:PRESET`, an untrained generator, which stands for `G_ema`.
        only: as for `load_network_pkl`.

    Returns, raises: as `load_network_pkl`; and OSError, the file cannot be read.
    """
    return _load_source(BasePlace(os.fspath(source)), only, ())


def load_network_pkl(
    f: BinaryIO, force_fp16: bool = False, *, only: Collection[str] | None = None, location: str | None = None
) -> dict[str, Any]:
    """Read a snapshot.

    Args:
        f: a file open for reading, of a published snapshot, of one that `convert_checkpoint.py` wrote, or of a
            difference from another network (`training.network_difference`), which is looked for.
        force_fp16: accepted for compatibility; True is an error.
        only: networks to build; None is all. The others are then None.
        location: path or URL of the file, for messages and to find the base of a difference; None is the name of the
            file object.

    Returns:
        dict with `G`, `D` and `G_ema`: live networks in eval mode on the CPU, not requiring gradients, None where the
        file has none; `training_set_kwargs` and `augment_pipe` as plain data.

    Raises:
        ValueError: the file is not a snapshot, holds a symbol outside the list of published snapshots (the message
            names it), is damaged, or its tensors do not fit the networks that it describes; or it is a difference, and
            its base is not found.

    Differs from the published code: nothing is executed; density noise that training left in the settings is removed;
    and the generator's settings say which published habits its weights need (`RenderingConfig.depth_clamp`, ...).
    """
    if force_fp16:
        raise ValueError("load_network_pkl: force_fp16: expected False; half precision is a field of the configuration")
    return _load_file(f, location or str(getattr(f, "name", "snapshot")), only, ())


def _load_source(place: BasePlace, only: Collection[str] | None, chain: tuple[str, ...]) -> dict[str, Any]:
    if is_untrained(place.source):
        name = place.source.removeprefix(UNTRAINED_PREFIX)
        build = only is None or NETWORK_NAME in only
        return {**_no_networks(), NETWORK_NAME: untrained_generator(name) if build else None}
    location = resolve_demo(place.source)
    with open_url(location, fetch=place.may_fetch) as file:
        return _load_file(file, location, only, chain)


def _no_networks() -> dict[str, Any]:
    return {"training_set_kwargs": None, "augment_pipe": None, **dict.fromkeys(NETWORK_NAMES)}


def _load_file(f: BinaryIO, source: str, only: Collection[str] | None, chain: tuple[str, ...]) -> dict[str, Any]:
    """Read a snapshot in whichever format; `chain` has the differences that led to it."""
    f, head = _peek(f)
    if checkpoint.is_checkpoint(head):
        if is_difference(f):
            wanted = only is None or NETWORK_NAME in only
            return {**_no_networks(), NETWORK_NAME: _load_difference(f, source, chain) if wanted else None}
        return _no_networks() | load_networks(f, source, only)
    result, data = _no_networks(), read_pickle(f, source=source)
    if not isinstance(data, dict) or not any(name in data for name in NETWORK_NAMES):
        kind = f"a dict with {', '.join(map(str, list(data)[:8]))}" if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{source}: expected a dict with {', '.join(NETWORK_NAMES)}, got {kind}")
    for name in NETWORK_NAMES:
        if data.get(name) is not None and (only is None or name in only):
            result[name] = _build_network(data[name], f"{source}: {name}")
    result["training_set_kwargs"] = data.get("training_set_kwargs")
    result["augment_pipe"] = data.get("augment_pipe")
    return result


def _load_difference(f: BinaryIO, source: str, chain: tuple[str, ...]) -> TriPlaneGenerator:
    """Read a difference, find its base, and build the tuned generator."""
    difference, chain = read_difference(f, source), (*chain, source_identity(source))
    if len(chain) > _MAX_DIFFERENCES:
        raise ValueError(f"{source}: expected at most {_MAX_DIFFERENCES} differences on top of each other, got more")
    reference, reasons = difference.header.base, []
    for place in base_places(reference, source):
        if place.identity in chain:
            reasons.append(f"{place.source} is this difference itself, or one that is built on it")
            continue
        try:
            base = _load_source(place, [NETWORK_NAME], chain)[NETWORK_NAME]
        except (ValueError, OSError, MissingExtraError) as error:
            reasons.append(str(error))
            continue
        came = None if base is None else network_fingerprint(base)
        if came == reference.fingerprint:
            return difference.apply(base)
        other = f"no {NETWORK_NAME}" if came is None else f"another network, with the fingerprint {came[:12]}"
        reasons.append(f"{place.source} has {other}")
    raise ValueError(missing_base_message(source, reference, reasons))


def _peek(f: BinaryIO) -> tuple[BinaryIO, bytes]:
    """Return a file at its old position and its first bytes."""
    position = f.tell()
    head = f.read(16)
    f.seek(position)
    return f, head


def _build_network(record: Any, where: str) -> nn.Module:
    """Make a live network of a persistent object."""
    if not isinstance(record, PickledObject):
        raise ValueError(f"{where}: expected a network, got {type(record).__name__}")
    tensors = named_tensors(record)
    try:
        if record.class_name == _GENERATOR_CLASS:
            config = generator_config_from_kwargs(**_generator_arguments(record.state, tensors))
            build = TriPlaneGenerator.from_config
        else:
            arguments = _constructor_arguments(record.state, _DISCRIMINATOR_ARGUMENTS)
            config = discriminator_config_from_kwargs(record.class_name, **arguments)
            build = Discriminator
        serialize.to_json(config)  # every value has the type that its field declares
        return checkpoint.build_filled(lambda: build(config), tensors, where, OPTIONAL_TENSORS)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where} ({record.class_name}): {text}") from error


def _generator_arguments(state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Constructor arguments of a pickled generator, with the settings that it held last."""
    arguments = _constructor_arguments(state, _GENERATOR_ARGUMENTS)
    rendering = dict(_plain(state.get("rendering_kwargs")) or arguments.get("rendering_kwargs") or {})
    rendering.pop("density_noise", None)  # a training schedule, copied into snapshots
    superresolution = dict(arguments.get("sr_kwargs") or {})
    representation = _representation(tensors)
    if representation == "tri_plane":
        rendering = {**rendering, **EG3D_RENDERING}
    return {
        **arguments,
        "rendering_kwargs": {**rendering, **_PUBLISHED_RENDERING},
        "sr_kwargs": {**superresolution, "first_rgb_replaces_raw": True},
        "representation": representation,
        "pose_offset": representation != "tri_plane",
        "neural_rendering_resolution": _plain(state.get("neural_rendering_resolution", 64)),
    }


def _representation(tensors: dict[str, torch.Tensor]) -> str:
    """Tell the three published systems, whose generators share one class name, apart by their parts."""
    if "ConvA.0.weight" in tensors:
        return "dual_spherical"
    return "tri_grid" if any(name.startswith("t_mapping.") for name in tensors) else "tri_plane"


def _constructor_arguments(state: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Join positional and keyword arguments of a persistent object."""
    positional, keywords = _plain(state.get("_init_args", ())), _plain(state.get("_init_kwargs", {}))
    if not isinstance(positional, list) or not isinstance(keywords, dict) or len(positional) > len(names):
        raise ValueError(f"expected at most {len(names)} positional and some keyword constructor arguments")
    return {**dict(zip(names, positional)), **keywords}


def _plain(value: Any) -> Any:
    """Turn the containers and NumPy scalars of a pickle into JSON data; anything else is an error.

    The number of values is bounded, because containers of a pickle may contain each other, or one another many times.
    """
    values_left = _MAX_ARGUMENT_VALUES

    def convert(value: Any, depth: int) -> Any:
        nonlocal values_left
        values_left -= 1
        if values_left < 0 or depth > _MAX_ARGUMENT_DEPTH:
            raise ValueError("constructor arguments are too many or nested too deep")
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, dict):
            return {str(key): convert(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(item, depth + 1) for item in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ValueError(f"constructor arguments: expected plain data, got {type(value).__name__}")

    return convert(value, 0)
