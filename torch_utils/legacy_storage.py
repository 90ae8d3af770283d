"""Read tensors of published snapshots: storages as older ``torch.save`` wrote them, and strided views on them.

Layout of a storage: five pickles of protocol 2 in a row - a magic integer,
the version 1001, a dict about the writing system, the persistent id ``('storage', type, key, location, numel, None)``
and the list ``[key]`` - followed by the number of elements as a little-endian int64 and the raw elements.

All lengths are compared with the bytes at hand before memory is allocated, and a view must lie within its storage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from torch_utils.pickle_limits import Budget, CorruptPickleError, show
from torch_utils.pickle_machine import Dialect, PickleMachine, Symbol

STORAGE_MAGIC = 0x1950A86A20F9469CFC6C
STORAGE_VERSION = 1001
MAX_DIMENSIONS = 16  # far above the four or five of convolution weights

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_SYMBOLS = {("torch", name): Symbol("torch", name) for name in _DTYPES}
_HEADER = b"\x80\x02"
_COUNT_BYTES = 8


@dataclass(frozen=True)
class Storage:
    """Hold the elements of a storage.

    Args:
        elements: tensor [numel], contiguous, which owns its memory.
    """

    elements: torch.Tensor


@dataclass(frozen=True)
class _StorageId:
    dtype: torch.dtype
    key: str
    numel: int


def parse_storage(blob: memoryview, budget: Budget, source: str) -> Storage:
    """Parse the bytes of one storage.

    Args:
        blob: bytes as ``torch.storage._load_from_bytes`` takes them.
        budget: limits; the opcodes and bytes of the storage are taken from it.
        source: how messages call the data.

    Returns:
        The storage, with its elements copied once.

    Raises:
        UnsafePickleError: a symbol or opcode that storages do not use.
        CorruptPickleError: anything but one complete little-endian storage.
    """
    source = f"{source}, tensor storage"
    if blob[: len(_HEADER)] != _HEADER:
        raise CorruptPickleError(
            f"{source}: does not begin with a pickle of protocol 2 but with {show(bytes(blob[:8]))}"
        )
    budget.spend_bytes(len(blob), source)
    dialect = Dialect(_SYMBOLS, load_persistent=partial(_read_id, source=source))
    values, position = [], 0
    for _ in range(5):
        machine = PickleMachine(blob, dialect, budget, source, start=position)
        values.append(machine.run())
        position = machine.position
    storage_id = _check_preamble(values, source)
    return Storage(_copy_elements(blob[position:], storage_id, source))


def _read_id(value: object, source: str) -> _StorageId:
    """Check the persistent id of a storage."""
    if type(value) is not tuple or len(value) != 6 or type(value[0]) is not str or value[0] != "storage":
        raise CorruptPickleError(f"{source}: the persistent id is not that of a storage")
    _, symbol, key, _, numel, view = value
    if type(symbol) is not Symbol or type(key) is not str or type(numel) is not int or view is not None:
        raise CorruptPickleError(f"{source}: the persistent id of the storage is malformed")
    return _StorageId(_DTYPES[symbol.name], key, numel)


def _check_preamble(values: list, source: str) -> _StorageId:
    """Check the five pickles in front of the elements; return the id of the storage."""
    magic, version, system, storage_id, keys = values
    if type(magic) is not int or magic != STORAGE_MAGIC:
        raise CorruptPickleError(f"{source}: wrong magic number {show(magic)}, expected {STORAGE_MAGIC}")
    if type(version) is not int or version != STORAGE_VERSION:
        raise CorruptPickleError(f"{source}: version {show(version)}, expected {STORAGE_VERSION}")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise CorruptPickleError(f"{source}: little_endian is not true; only little-endian data can be read")
    if type(storage_id) is not _StorageId:
        raise CorruptPickleError(f"{source}: the fourth pickle holds no storage")
    if type(keys) is not list or len(keys) != 1 or type(keys[0]) is not str or keys[0] != storage_id.key:
        raise CorruptPickleError(f"{source}: the list of keys does not hold the one key of the storage")
    return storage_id


def _copy_elements(payload: memoryview, storage_id: _StorageId, source: str) -> torch.Tensor:
    """Copy the elements behind the count out of ``payload``, after checking that exactly those are there."""
    if len(payload) < _COUNT_BYTES:
        raise CorruptPickleError(f"{source}: the data end before the number of elements")
    count = int.from_bytes(payload[:_COUNT_BYTES], "little", signed=True)
    if count != storage_id.numel or count < 0:
        raise CorruptPickleError(f"{source}: {count} elements follow, but the storage has {show(storage_id.numel)}")
    num_bytes = count * storage_id.dtype.itemsize
    if num_bytes != len(payload) - _COUNT_BYTES:
        left = len(payload) - _COUNT_BYTES
        raise CorruptPickleError(f"{source}: {count} elements need {num_bytes} bytes, but {left} are there")
    raw = torch.empty(num_bytes, dtype=torch.uint8)
    if count:  # numpy makes no array of an empty buffer
        raw.numpy()[:] = np.frombuffer(payload, np.uint8, offset=_COUNT_BYTES)
    # Any byte but 0 and 1 is no valid bool, so the comparison makes new ones.
    return raw != 0 if storage_id.dtype == torch.bool else raw.view(storage_id.dtype)


def rebuild_tensor(arguments: tuple, source: str) -> torch.Tensor:
    """Make the tensor that ``torch._utils._rebuild_tensor_v2`` makes of its arguments.

    Element ``(i, j, ...)`` of the tensor is element ``offset + i * stride[0] + j * stride[1] + ...`` of the storage.

    Args:
        arguments: (storage, offset, size, stride, requires_grad, hooks[, metadata]), offset and stride in elements.
            ``requires_grad`` is ignored; hooks and metadata must be empty.
        source: how messages call the data.

    Returns:
        A view on the storage, shared with other tensors of the same storage, without gradient.

    Raises:
        CorruptPickleError: malformed arguments, a view that reaches beyond its storage, or one with more elements
            than the storage (stride 0 would make a few bytes look like terabytes).
    """
    if len(arguments) not in (6, 7) or type(arguments[0]) is not Storage:
        raise CorruptPickleError(f"{source}: a tensor is not made of a storage, offset, size, stride, flag and hooks")
    storage, offset, size, stride, _, hooks = arguments[:6]
    metadata = arguments[6] if len(arguments) == 7 else None
    if type(hooks) is not dict or hooks or not (metadata is None or (type(metadata) is dict and not metadata)):
        raise CorruptPickleError(f"{source}: a tensor has hooks or metadata, which published snapshots do not have")
    _check_sizes("size", size, source)
    _check_sizes("stride", stride, source)
    _check_sizes("offset", (offset,), source)
    if len(size) != len(stride):
        raise CorruptPickleError(f"{source}: a tensor has {len(size)} sizes but {len(stride)} strides")
    numel = storage.elements.numel()
    if 0 in size and math.prod(length or 1 for length in size) < 2**31:
        return storage.elements.new_empty(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if 0 in size or last >= numel or math.prod(size) > numel:
        raise CorruptPickleError(
            f"{source}: a tensor of size {size}, stride {stride}, offset {offset} "
            f"does not fit its storage of {numel} elements"
        )
    return storage.elements.as_strided(size, stride, offset)


def _check_sizes(what: str, values: object, source: str) -> None:
    """Refuse anything but a short tuple of non-negative integers, so small that products of them stay exact."""
    if type(values) is not tuple or len(values) > MAX_DIMENSIONS:
        raise CorruptPickleError(
            f"{source}: the {what} of a tensor is not a tuple of at most {MAX_DIMENSIONS} integers"
        )
    for value in values:
        if type(value) is not int or not 0 <= value < 2**31:
            raise CorruptPickleError(f"{source}: the {what} of a tensor holds {show(value)}, expected 0 to 2^31 - 1")
