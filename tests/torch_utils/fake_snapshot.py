"""Make small pickles in the published snapshot format, with the standard pickler or opcode by opcode.

The classes here only have the names of published ones. While `dump_snapshot` pickles them they stand in ``sys.modules``
under the published module names, so that the bytes are what a published snapshot holds.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import sys
import types
from collections.abc import Iterator

import numpy as np
import torch

MODULE_SOURCE = "open({path!r}, 'w').close()"  # a loader that executes embedded sources leaves this file behind


def _reconstruct_persistent_obj(description: dict) -> object:
    raise NotImplementedError("only the name of this function is pickled")


class _Persistent(torch.nn.Module):
    """Pickle like the published persistent classes: one call on a dict with the source text and the state."""

    source = ""

    def __reduce__(self) -> tuple:
        description = {
            "type": "class",
            "version": 6,
            "module_src": _Persistent.source,
            "class_name": type(self).__name__,
            "state": self.__dict__,
        }
        return _reconstruct_persistent_obj, (description,)


class FullyConnectedLayer(_Persistent):
    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(out_features, in_features))
        self.bias = torch.nn.Parameter(torch.randn(out_features)) if bias else None
        self.weight_gain = 1 / np.sqrt(np.float64(in_features))
        self._init_args, self._init_kwargs = (in_features, out_features), {"bias": bias}


class RaySampler(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ray_origins_h = None


class EasyDict(dict):
    pass


class TriPlaneGenerator(_Persistent):
    """Hold every kind of value that real snapshots hold."""

    def __init__(self) -> None:
        super().__init__()
        self.ray_sampler = RaySampler()
        self.mapping = FullyConnectedLayer(4, 6, bias=False)
        self.decoder = torch.nn.Sequential(FullyConnectedLayer(6, 5), torch.nn.Softplus(), FullyConnectedLayer(5, 4))
        self.torgb = None
        self.const = torch.nn.Parameter(torch.randn(3, 2, 2))
        base = torch.randn(4, 6)
        self.register_buffer("transposed", base.t())
        self.register_buffer("window", base[1:3, 2:5])
        self.register_buffer("float16", torch.randn(3).half())
        self.register_buffer("counter", torch.tensor(7))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("bfloat16_pair", torch.randn(2).bfloat16())
        self.register_buffer("cached", torch.zeros(2), persistent=False)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("absent", None)
        self.plane_axes = torch.eye(3)[None]
        self.rendering_kwargs = EasyDict(box_warp=1.5, avg_camera_pivot=[0, 0, 0.2], ray_start="auto")
        self._init_args, self._init_kwargs = (), EasyDict(z_dim=4, mapping_kwargs=EasyDict(num_layers=2))


_PUBLISHED_NAMES = {
    "torch_utils.persistence": [_reconstruct_persistent_obj],
    "training.volumetric_rendering.ray_sampler": [RaySampler],
    "dnnlib.util": [EasyDict],
}
for _module, _members in _PUBLISHED_NAMES.items():
    for _member in _members:
        _member.__module__ = _module


@contextlib.contextmanager
def _published_modules() -> Iterator[None]:
    """Put modules with the published names in place, and the previous ones back afterwards."""
    before = {name: sys.modules.get(name) for name in _PUBLISHED_NAMES}
    try:
        for name, members in _PUBLISHED_NAMES.items():
            sys.modules[name] = types.ModuleType(name)
            for member in members:
                setattr(sys.modules[name], member.__name__, member)
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def make_snapshot(seed: int = 0) -> dict:
    """Return what a published training run pickles, in small."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = TriPlaneGenerator()
    data_set = EasyDict(
        class_name="training.dataset.MaskLabeledDataset",
        resolution=128,
        max_size=None,
        weights=np.arange(6, dtype=np.float32).reshape(2, 3),
        names={"a", "b"},
        image_shape=torch.Size([3, 128, 128]),
        device=torch.device("cuda", 1),
        digest=b"\x00\xff\x80",
        scale=-2.5,
        offset=-70000,
        large=2**70,
    )
    return {"training_set_kwargs": data_set, "G": None, "D": None, "G_ema": generator, "augment_pipe": None}


def dump(value: object, protocol: int = 4, module_source: str = "# left out\n") -> bytes:
    """Pickle ``value`` with the standard pickler, under the published names."""
    with _published_modules():
        _Persistent.source = module_source
        return pickle.dumps(value, protocol=protocol)


# Opcode by opcode.


def text(value: str) -> bytes:
    """Return the opcode that pushes a text."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def blob(raw: bytes) -> bytes:
    """Return the opcode that pushes a byte string."""
    return b"B" + struct.pack("<I", len(raw)) + raw


def symbol(module: str, name: str) -> bytes:
    """Return the opcode of older protocols that pushes a name."""
    return f"c{module}\n{name}\n".encode()


def stack_symbol(module: str, name: str) -> bytes:
    """Return the opcodes of protocol 4 that push a name."""
    return text(module) + text(name) + b"\x93"


def integer(value: int) -> bytes:
    """Return the opcode that pushes an integer of up to 255 bytes."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def integers(*values: int) -> bytes:
    """Return the opcodes that push a tuple of integers."""
    return b"(" + b"".join(map(integer, values)) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    """Return the opcodes that call a name on arguments."""
    return function + b"(" + b"".join(arguments) + b"tR"


def whole(*parts: bytes, protocol: int = 4) -> bytes:
    """Return a complete pickle."""
    return bytes([0x80, protocol]) + b"".join(parts) + b"."


def storage_blob(
    *,
    magic: int = 0x1950A86A20F9469CFC6C,
    version: int = 1001,
    little_endian: bytes = b"\x88",
    kind: bytes = symbol("torch", "FloatStorage"),
    numel: int = 4,
    count: int | None = None,
    key: str = "0",
    payload: bytes = struct.pack("<4f", 1, 2, 3, 4),
) -> bytes:
    """Return the bytes of a storage, by default [1, 2, 3, 4], with anything in it replaced on request."""
    pickles = [
        whole(integer(magic), protocol=2),
        whole(integer(version), protocol=2),
        whole(b"}", text("little_endian"), little_endian, b"s", protocol=2),
        whole(b"(", text("storage"), kind, text("0"), text("cpu"), integer(numel), b"NtQ", protocol=2),
        whole(b"]", text(key), b"a", protocol=2),
    ]
    return b"".join(pickles) + struct.pack("<q", numel if count is None else count) + payload


def storage(**changes: object) -> bytes:
    """Return the opcodes that push a storage."""
    return call(symbol("torch.storage", "_load_from_bytes"), blob(storage_blob(**changes)))


def tensor(
    size: tuple = (4,), stride: tuple = (1,), offset: int = 0, content: bytes | None = None, hooks: bytes = b"}"
) -> bytes:
    """Return the opcodes that push a tensor."""
    content = storage() if content is None else content
    rebuild = symbol("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, content, integer(offset), integers(*size), integers(*stride), b"\x89", hooks)


def numpy_dtype(code: str) -> bytes:
    """Return the opcodes that push a little-endian NumPy type."""
    state = b"(" + integer(3) + text("<") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"t"
    return call(symbol("numpy", "dtype"), text(code), b"\x89", b"\x88") + state + b"b"


def numpy_array(shape: tuple, raw: bytes, code: str = "f4") -> bytes:
    """Return the opcodes that push a NumPy array."""
    rebuild = symbol("numpy.core.multiarray", "_reconstruct")
    empty = call(rebuild, symbol("numpy", "ndarray"), integers(0), blob(b"b"))
    return empty + b"(" + integer(1) + integers(*shape) + numpy_dtype(code) + b"\x89" + blob(raw) + b"tb"


def module_dict(parameters: bytes = b"}", buffers: bytes = b"}", modules: bytes = b"}") -> bytes:
    """Return the opcodes that push the state of a network module."""
    return b"}(" + text("_parameters") + parameters + text("_buffers") + buffers + text("_modules") + modules + b"u"


def persistent(state: bytes, class_name: str = "SynthesisLayer", version: int = 6) -> bytes:
    """Return the opcodes that push a persistent object."""
    description = b"}(" + text("type") + text("class") + text("version") + integer(version)
    description += text("module_src") + text("import os") + text("class_name") + text(class_name)
    description += text("state") + state + b"u"
    return call(symbol("torch_utils.persistence", "_reconstruct_persistent_obj"), description)


def legacy_torch_save(value: object) -> bytes:
    """Return what ``torch.save`` wrote before its zip format."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()
