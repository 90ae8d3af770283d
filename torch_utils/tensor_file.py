"""Large safetensors files, written and read tensor by tensor, with a checksum.

For training states and differences of networks: `torch_utils.checkpoint` has the whole file in memory, which networks
are small enough for.
"""

from __future__ import annotations

import io
import json
import operator
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import safetensors
import safetensors.torch
import torch

from dnnlib.atomic import atomic_write

FORMAT_VERSION = 1
_ALIGNMENT = 8
_LENGTH_BYTES = 8  # of the number in front of the header
_MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors format
_CHUNK_BYTES = 1 << 24
_NO_CHECKSUM = "#" * 8  # what the header has instead of the checksum, while that is computed
# In the order of the file: the widest first, so that every tensor is aligned.
_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


def write_tensor_file(path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], header: Any) -> None:
    """Write tensors of any device and a JSON header; nothing appears under `path` unless all was written.

    Besides the tensors themselves, one of them at a time is held in memory.

    Args:
        path: of the file.
        kind: of the contents; `open_tensor_file` asks for it.
        tensors: by name. Memory layouts are not kept; a tensor of channels-last memory is written in logical order.
        header: JSON data.

    Raises:
        ValueError: a dtype is not among those of the format, or the header is no JSON data.
        OSError: as `dnnlib.atomic.atomic_write`.
    """
    order = list(_DTYPES)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"tensor '{name}': expected one of {', '.join(map(str, order))}, got {tensor.dtype}")
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    metadata = {
        "format": kind,
        "version": str(FORMAT_VERSION),
        "crc32": _NO_CHECKSUM,
        "header": json.dumps(header, allow_nan=False),
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        entries[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        checksum = zlib.crc32(text)
        for name in names:
            for chunk in _chunks(tensors[name]):
                checksum = zlib.crc32(chunk, checksum)
                file.write(chunk)
        file.seek(_LENGTH_BYTES + text.index(_NO_CHECKSUM.encode()))  # before the caller's header
        file.write(b"%08x" % checksum)


def _chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in logical order."""
    data = tensor.detach().cpu().contiguous().reshape(-1)
    if data.numel():
        view = memoryview(data.view(torch.uint8).numpy())
        for start in range(0, len(view), _CHUNK_BYTES):
            yield view[start : start + _CHUNK_BYTES]


@dataclass(frozen=True)
class TensorFile:
    """An open file of tensors."""

    header: Any
    """The JSON data that were written."""
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    """Name -> dtype and shape."""
    _file: Any

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor of `specs` to the CPU."""
        return self._file.get_tensor(name)


def check_tensor_file(path: str | Path, kind: str, checksum: bool = True) -> None:
    """Check that a file is whole.

    Args:
        path: of the file.
        kind: that it must have.
        checksum: whether to read all data and compare their checksum; otherwise only header and length are checked.

    Raises:
        ValueError: it is not; the message says what is wrong, without the path.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        _check(file, kind, checksum)


def _check(file: IO[bytes], kind: str, checksum: bool) -> None:
    start, text = _read_header(file, kind)
    size = file.seek(0, 2)
    expected = start + _data_bytes(text)
    if size != expected:
        raise ValueError(f"expected {expected:,} bytes, got {size:,}; it was cut off or added to")
    if checksum:
        file.seek(start)
        expected = str(json.loads(text)["__metadata__"].get("crc32", "missing")).encode()
        came = zlib.crc32(text.replace(expected, _NO_CHECKSUM.encode(), 1))
        while chunk := file.read(_CHUNK_BYTES):
            came = zlib.crc32(chunk, came)
        if b"%08x" % came != expected:
            raise ValueError("its checksum does not match; the contents are damaged")


def tensor_file_kind(file: BinaryIO) -> str | None:
    """Return the kind that a file says it is of, or None where it says nothing; the file stays where it stands."""
    position = file.tell()
    try:
        kind = json.loads(_read_text(file))["__metadata__"]["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    finally:
        file.seek(position)
    return kind if isinstance(kind, str) else None


def read_tensor_file(file: BinaryIO, kind: str) -> tuple[dict[str, torch.Tensor], Any]:
    """Read the rest of an open file: all tensors, on the CPU, and the header.

    The file is in memory twice meanwhile; `open_tensor_file` reads tensor by tensor.

    Raises:
        ValueError: it is not whole, or of another kind; the message says what is wrong, without the name.
    """
    data = file.read()
    _check(io.BytesIO(data), kind, checksum=True)
    _, text = _read_header(io.BytesIO(data), kind)
    try:
        return safetensors.torch.load(data), json.loads(json.loads(text)["__metadata__"]["header"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"its contents are damaged: {error}") from error


@contextmanager
def open_tensor_file(path: str | Path, kind: str) -> Iterator[TensorFile]:
    """Open a file that passes `check_tensor_file`, and raises like it; tensors are read one by one."""
    check_tensor_file(path, kind)
    with open(path, "rb") as file:
        _, text = _read_header(file, kind)
    dtype_of = {name: dtype for dtype, name in _DTYPES.items()}
    try:
        entries = json.loads(text)
        header = json.loads(entries.pop("__metadata__")["header"])
        specs = {name: (dtype_of[entry["dtype"]], tuple(entry["shape"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError):
        raise ValueError("its header is damaged") from None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield TensorFile(header, specs, file)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error


def _read_header(file: IO[bytes], kind: str) -> tuple[int, bytes]:
    """Return where the data begin, and the text of the header; ValueError if it is not of this kind."""
    text = _read_text(file)
    try:
        metadata = json.loads(text)["__metadata__"]
        came, version = metadata["format"], metadata["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("its header is damaged") from None
    if came != kind:
        raise ValueError(f"expected contents of kind {kind!r}, got {came!r}")
    if version != str(FORMAT_VERSION):
        raise ValueError(f"expected format version {FORMAT_VERSION}, got {version!r}")
    return _LENGTH_BYTES + len(text), text


def _read_text(file: IO[bytes]) -> bytes:
    """Read the JSON text at the start of a file; ValueError if it ends before."""
    prefix = file.read(_LENGTH_BYTES)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == _LENGTH_BYTES else 0
    text = file.read(length) if 0 < length <= _MAX_HEADER_BYTES else b""
    if not text or len(text) != length:
        raise ValueError("its header is cut off")
    return text


def _data_bytes(text: bytes) -> int:
    """Return the length of the data by the header."""
    entries = json.loads(text)
    try:
        ends = (entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        return max(map(operator.index, ends), default=0)
    except (KeyError, TypeError, IndexError):
        raise ValueError("its header is damaged") from None
