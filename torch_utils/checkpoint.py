"""Checkpoint files: tensors and a JSON header in the safetensors format, and modules filled from named tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import nn

from dnnlib.atomic import atomic_write

FORMAT = "spherehead-checkpoint"
FORMAT_VERSION = 1
_HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors format
_MAX_NAMES_SHOWN = 5


def write_checkpoint(path: str | Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header to a safetensors file; nothing appears under `path` unless all was written."""
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "header": json.dumps(header, allow_nan=False)}
    data = safetensors.torch.save(_separate(tensors), metadata)
    (length,) = struct.unpack_from("<Q", data)
    start = _HEADER_LENGTH_BYTES + length
    # The library shuffles the metadata; sorted, the same contents make the same bytes.
    entries = json.loads(data[_HEADER_LENGTH_BYTES:start])
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_LENGTH_BYTES)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(memoryview(data)[start:])


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous tensors on the CPU, copied where two share memory, which the format cannot express."""
    separate, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return separate


def is_checkpoint(head: bytes) -> bool:
    """Whether a file that starts with these (at least 9) bytes is in the safetensors format."""
    return head[_HEADER_LENGTH_BYTES : _HEADER_LENGTH_BYTES + 1] == b"{"


def read_checkpoint(file: BinaryIO, source: str = "checkpoint") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_checkpoint` wrote: tensors by name, and the header.

    Raises:
        ValueError: the file is damaged, of another kind or of a newer version; the message names `source`.
    """
    data = file.read()
    metadata = _read_metadata(data, source)
    came = metadata.get("format")
    if came != FORMAT:
        raise ValueError(f"{source}: expected a safetensors file of format {FORMAT!r}, got format {came!r}")
    if metadata.get("version") != str(FORMAT_VERSION):
        raise ValueError(f"{source}: expected format version {FORMAT_VERSION}, got {metadata.get('version')!r}")
    try:
        return safetensors.torch.load(data), json.loads(metadata["header"])
    except (safetensors.SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{source}: damaged checkpoint: {error}") from error


def _read_metadata(data: bytes, source: str) -> dict[str, str]:
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > min(len(data) - _HEADER_LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise ValueError(f"its header of {length} bytes is longer than the file")
        header = json.loads(data[_HEADER_LENGTH_BYTES : _HEADER_LENGTH_BYTES + length])
        metadata = header.get("__metadata__", {})
    except (struct.error, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{source}: damaged safetensors file: {error}") from error
    return metadata if isinstance(metadata, dict) else {}


def build_filled(
    build: Callable[[], nn.Module],
    tensors: Mapping[str, torch.Tensor],
    source: str,
    optional: frozenset[str] = frozenset(),
) -> nn.Module:
    """Build a module and give it the tensors, strictly by name and shape.

    The module is first built without memory for its weights, so that a configuration that does not belong to the
    tensors costs nothing.

    Args:
        build: constructs the module.
        tensors: everything in its state dict; converted to the dtypes of the module.
        source: how messages call the network.
        optional: names in `tensors` that the module may lack.

    Returns:
        The module, in eval mode, not requiring gradients.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape, which the message names; or the module cannot be
            built.
    """
    try:
        with torch.device("meta"):
            module = build()
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:  # say, of sizes that make no sense
        raise ValueError(f"{source}: {str(error).partition(chr(10))[0]}") from error
    expected = module.state_dict()
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected and name not in optional]
    if missing or unknown:
        parts = [("missing", missing), ("unknown", unknown)]
        raise ValueError(f"{source}: " + "; ".join(f"{what} tensors: {_shorten(n)}" for what, n in parts if n))
    state = {}
    for name, target in expected.items():
        tensor = tensors[name]
        if tensor.shape != target.shape:
            raise ValueError(f"{source}: '{name}': expected shape {tuple(target.shape)}, got {tuple(tensor.shape)}")
        state[name] = tensor.to(target.dtype).clone(memory_format=torch.contiguous_format)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def _shorten(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES_SHOWN])
    more = len(names) - _MAX_NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
