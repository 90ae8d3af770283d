"""Difference files: what tuning changed in a generator, against a base network that they name but do not contain.

One file of the safetensors format (`torch_utils.tensor_file`) holds the tensors that changed, all settings of the tuned
generator, and where the base was. The base is recognised by the fingerprint of its weights, wherever it is now.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dnnlib import serialize
from dnnlib.sources import local_path, without_credentials
from torch_utils import checkpoint
from torch_utils.tensor_file import read_tensor_file, tensor_file_kind, write_tensor_file
from training.config import GeneratorConfig, require
from training.triplane import TriPlaneGenerator

KIND = "spherehead-difference"
NETWORK_NAME = "G_ema"
"""The network of a snapshot that a difference is one of."""
_HALF_EXPONENT = 15  # float16 goes to 65504; scaled differences stay below 2^15
_MIN_EXPONENT = -1000  # of a scale, so that it is no denormal number


@dataclass(frozen=True, kw_only=True)
class BaseReference:
    """Which network a difference belongs to, and where it was when the difference was written."""

    source: str
    """As it was given: a path, a URL (without user name and password), `demo`, or `init:PRESET`."""
    path: str | None
    """Absolute path, where the base was a local file."""
    relative_path: str | None
    """Path from the folder of the difference, with forward slashes, where the base was a local file."""
    fingerprint: str
    """See `network_fingerprint`."""


@dataclass(frozen=True, kw_only=True)
class DifferenceHeader:
    """What a difference file says besides its tensors."""

    base: BaseReference
    config: GeneratorConfig
    """All settings of the tuned generator, those that did not change too."""
    scales: dict[str, float]
    """Name -> s of tensors that are stored as float16 d, for base + s * d; the others are stored as they are."""
    provenance: dict[str, serialize.JSON]
    """Where the weights come from."""


def network_fingerprint(generator: TriPlaneGenerator) -> str:
    """Return what identifies a generator's weights: a SHA-256 over names, dtypes, shapes and bytes of its state dict.

    It is the same for a published pickle and for the file converted from it, on every device, and another one as soon
    as a single bit of a tensor differs. Settings do not count: scripts change them at run time, and a difference
    brings all of its own.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(generator.state_dict().items()):
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, kind, list(tensor.shape)]).encode() + b"\n")
        digest.update(_bits(tensor).cpu().numpy())
    return digest.hexdigest()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor in logical order, uint8 `[N]`; for a contiguous one without a copy."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def write_difference(
    path: str | Path,
    base: TriPlaneGenerator,
    tuned: TriPlaneGenerator,
    base_source: str | os.PathLike,
    *,
    half: bool = False,
    provenance: Mapping[str, Any],
) -> None:
    """Write what differs between a generator and the one that it was tuned from.

    Tensors are compared bit by bit; those that are equal are not stored. One tensor at a time is copied in memory
    (with `half`, all differences, at two bytes a number).

    Args:
        path: of the file, which appears complete or not at all.
        base: as it was loaded, with unchanged weights.
        tuned: with the same tensors by name, shape and dtype; it may share those that did not change with the base.
        base_source: where the base was loaded from, as given to `--network`.
        half: store differences as float16, scaled by a power of two for each tensor, instead of the new values:
            half as large, and off by up to 2^-11 of the change of each weight, or 2^-39 of the largest in its tensor.
            Otherwise the tuned weights come back bit for bit.
        provenance: JSON data that says where the weights come from.

    Raises:
        ValueError: the networks do not have the same tensors, a change is not finite (only with `half`), or provenance
            or settings are no JSON.
        OSError: as `dnnlib.atomic.atomic_write`.
    """
    tensors, scales = {}, {}
    for name, old, new in _changed(base.state_dict(), tuned.state_dict()):
        if not half or not new.is_floating_point():
            tensors[name] = new
            continue
        change, scale = _scaled_half(name, old, new)
        if scale > 0:  # else only signs of zeros differ
            tensors[name], scales[name] = change, scale
    header = DifferenceHeader(
        base=base_reference(base_source, path, network_fingerprint(base)),
        config=tuned.config,
        scales=scales,
        provenance=dict(provenance),
    )
    write_tensor_file(path, KIND, tensors, serialize.to_json(header, "difference"))


def _changed(
    base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield name, old and new tensor of those that are not equal bit by bit."""
    require(base.keys() == tuned.keys(), "tuned network", "tensors of the base", sorted(base.keys() ^ tuned.keys())[:5])
    for name, old in base.items():
        new = tuned[name]
        kinds = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (old, new)]
        require(kinds[0] == kinds[1], f"tuned network: '{name}'", kinds[0], kinds[1])
        if not _is_shared(old, new) and not torch.equal(_bits(old), _bits(new).to(old.device)):
            yield name, old, new


def _is_shared(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.device == b.device and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _scaled_half(name: str, old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the change of a tensor as float16 on the CPU, and the power of two to multiply it by; 0 if there is none.

    The largest value is in [2^14, 2^15], so that the small ones stay far from the end of float16.
    """
    change = new.detach().cpu().double() - old.detach().cpu().double()
    largest = change.abs().max().item()
    require(math.isfinite(largest), f"tuned network: '{name}'", "finite changes of the weights", largest)
    if largest == 0:
        return change, 0.0
    scale = 2.0 ** max(math.frexp(largest)[1] - _HALF_EXPONENT, _MIN_EXPONENT)
    return (change / scale).half(), scale


def base_reference(source: str | os.PathLike, difference: str | Path, fingerprint: str) -> BaseReference:
    """Describe a base network for a difference that is written to a path."""
    shown, path, relative = without_credentials(os.fspath(source)), None, None
    local = local_path(source)
    if local is not None:
        # Links in folders are followed, because `..` behind a link leads elsewhere; a link to the file has the name.
        path = os.path.join(os.path.realpath(local.parent), local.name)
        try:
            relative = os.path.relpath(path, os.path.dirname(os.path.realpath(difference))).replace(os.sep, "/")
        except ValueError:  # another drive
            relative = None
    return BaseReference(source=shown, path=path, relative_path=relative, fingerprint=fingerprint)


# ---- reading --------------------------------------------------------------------------------------------------------


def is_difference(file: BinaryIO) -> bool:
    """Whether an open file says that it is a difference; the file stays where it stands."""
    return tensor_file_kind(file) == KIND


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference file that was read."""

    header: DifferenceHeader
    tensors: dict[str, torch.Tensor]
    source: str
    """How messages call it."""

    def apply(self, base: TriPlaneGenerator) -> TriPlaneGenerator:
        """Build the tuned generator.

        Args:
            base: the network that the header names, on the CPU; it stays as it is.

        Returns:
            A generator in eval mode, on the CPU, not requiring gradients, which shares no memory with the base.

        Raises:
            ValueError: tensors, scales, settings and base do not belong together.
        """
        state = base.state_dict()
        for name, tensor in self.tensors.items():
            where = f"{self.source}: '{name}'"
            require(name in state, where, "the name of a tensor of the base network", name)
            scale = self.header.scales.get(name)
            old, stored_dtype = state[name], torch.float16 if scale is not None else state[name].dtype
            kinds = f"{tuple(old.shape)} {stored_dtype}", f"{tuple(tensor.shape)} {tensor.dtype}"
            if kinds[0] != kinds[1]:
                raise ValueError(f"{where}: expected shape and type {kinds[0]}, got {kinds[1]}")
            state[name] = tensor if scale is None else _add_scaled(where, old, tensor, scale)
        return checkpoint.build_filled(
            lambda: TriPlaneGenerator.from_config(self.header.config), state, f"{self.source}: {NETWORK_NAME}"
        )


def _add_scaled(where: str, old: torch.Tensor, change: torch.Tensor, scale: float) -> torch.Tensor:
    require(old.is_floating_point(), where, "no scale for whole numbers", str(old.dtype))
    new = (old.double() + change.double() * scale).to(old.dtype)
    if old.isfinite().all() and not new.isfinite().all():
        raise ValueError(f"{where}: expected finite changes, got some that are not, with scale {scale}")
    return new


def read_difference(file: BinaryIO, source: str = "difference") -> Difference:
    """Read a difference file; the base network is not looked for.

    Args:
        file: open for reading.
        source: how messages call it.

    Raises:
        ValueError: the file is damaged, or says something that it cannot mean.
    """
    try:
        tensors, data = read_tensor_file(file, KIND)
    except ValueError as error:
        raise ValueError(f"{source}: damaged difference file: {error}") from error
    header = serialize.from_json(DifferenceHeader, data, f"{source}: difference")
    for name, scale in header.scales.items():
        require(name in tensors, f"{source}: scales", "names of tensors in the file", name)
        require(scale > 0, f"{source}: scales: '{name}'", "a positive number", scale)
    return Difference(header=header, tensors=tensors, source=source)
