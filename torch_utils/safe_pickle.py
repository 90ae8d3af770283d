"""Read published network snapshots, which are pickles, without running anything from them.

Threat model: the file is untrusted. A pickle normally may call any function of any module, and the published snapshots
moreover carry the source text of their classes, which the published loader executes. Here a file is data:

* No code from the file runs, no name from it is imported or looked up, and no attribute of anything is set. The
  machine of `torch_utils.pickle_machine` knows only the names listed in this module, each with a function of this
  project behind it. A name outside the list is an `UnsafePickleError` that spells it out, as is an opcode that
  snapshots do not use. Embedded sources are skipped unread.
* Modules of the file become `PickledObject` records. Making live modules of them is the caller's business.
* Memory and time stay within `PickleLimits` and a small multiple of the size of the file: nothing is allocated because
  of a number in the file before the bytes that it promises were found.
* Every malformed file is one `CorruptPickleError`.

Out of scope: whether the weights are any good, and which keys and shapes the caller expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch

from torch_utils.legacy_storage import Storage, parse_storage, rebuild_tensor
from torch_utils.pickle_limits import (
    Budget,
    CorruptPickleError,
    PickleLimits,
    PickleReadError,
    UnsafePickleError,
    show,
)
from torch_utils.pickle_machine import ByteView, Dialect, PickleMachine, Symbol, is_key
from torch_utils.pickle_numpy import NumpyType, apply_array_state, build_array, build_scalar, build_type

__all__ = [
    "CorruptPickleError",
    "PickleLimits",
    "PickleReadError",
    "PickledObject",
    "UnsafePickleError",
    "named_tensors",
    "read_pickle",
]

DEFAULT_LIMITS = PickleLimits()
PERSISTENT_VERSION = 6  # of the records that all published snapshots hold
MAX_NAME_LENGTH = 256  # of a class, module or tensor, in characters
MAX_PATH_LENGTH = 1024  # of a dotted name, in characters

_PERSISTENT_MODULE = "torch_utils.persistence"
_PLAIN_MODULES = (  # created without __init__, then given a state
    ("torch.nn.modules.container", "Sequential"),
    ("torch.nn.modules.activation", "Softplus"),
    ("training.triplane", "OSGDecoder"),
    ("training.volumetric_rendering.ray_marcher", "MipRayMarcher2"),
    ("training.volumetric_rendering.ray_sampler", "RaySampler"),
    ("training.volumetric_rendering.renderer", "ImportanceRenderer"),
)
_MODULE_DICTS = ("_parameters", "_buffers", "_modules")
_SIGNATURES = (  # (offset, bytes there, what such a file is)
    (0, b"PK\x03\x04", "a zip archive (as torch.save and NumPy write them), not a published snapshot pickle"),
    (0, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a file of torch.save, not a published snapshot pickle"),
    (8, b'{"', "a safetensors file"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"version https://git-lfs", "a git-lfs pointer; fetch the file itself with `git lfs pull`"),
    (0, b"<", "an HTML or XML page, perhaps an error message of the download server"),
    (0, b"{", "a JSON text"),
)
_LEAVES = (str, bytes, int, float, type(None), torch.Tensor, np.generic, np.ndarray)
_READ_CHUNK_BYTES = 16 << 20


@dataclass(eq=False, repr=False)
class PickledObject:
    """Hold an object of a snapshot as data: its class by name, and its attributes.

    Args:
        module: module of the class; ``torch_utils.persistence`` for persistent objects, which do not name theirs.
        class_name: name of the class.
        state: attributes; those of a network module include ``_parameters``, ``_buffers`` and ``_modules``.
        persistent: True if the file held a persistent object, with its source text; False for a plain module.
    """

    module: str
    class_name: str
    state: dict
    persistent: bool

    def __repr__(self) -> str:
        return f"PickledObject({self.module}.{self.class_name}, {len(self.state)} attributes)"


def read_pickle(
    data: bytes | bytearray | memoryview | BinaryIO, *, source: str = "<pickle>", limits: PickleLimits = DEFAULT_LIMITS
) -> object:
    """Read the one pickle that ``data`` consists of.

    Differs from ``pickle.load``: nothing is called or imported, names are restricted to those of published snapshots,
    and bytes after the end of the pickle are an error, since they mean that the file is not what it seems.

    Args:
        data: the bytes, or a binary file, which is read from where it stands to its end. Protocols 2 to 4 (and files
            marked 5 that use nothing new). Bytes and tensors are in memory together: twice the size of the file.
        source: how messages call the data, usually the path.
        limits: bounds on the cost.

    Returns:
        dicts (also for ordered dicts and the like), lists, tuples, sets, numbers, text, bytes, None, torch tensors on
        the CPU (shared storages stay shared), NumPy scalars and arrays of numbers, and `PickledObject` records.
        A ``torch.Size`` becomes a tuple, a ``torch.device`` a text such as ``cuda:0``. Values may refer to each other
        in cycles.

    Raises:
        UnsafePickleError: a symbol or opcode that is not allowed; the message names it.
        CorruptPickleError: the data are empty, truncated, malformed, too large or something other than a pickle.
        ValueError: ``data`` is neither bytes nor a binary file.
    """
    view = _view_bytes(data, source, limits)
    _check_kind(view, source)
    budget = Budget(limits, len(view))
    dialect = _SnapshotDialect(source, budget).dialect()
    machine = PickleMachine(view, dialect, budget, source)
    result = machine.run()
    if machine.position != len(view):
        left = len(view) - machine.position
        raise CorruptPickleError(f"{source}: {left} bytes follow the end of the pickle at byte {machine.position}")
    _check_result(result, limits, source)
    return result


def _view_bytes(data: object, source: str, limits: PickleLimits) -> memoryview:
    """Return the bytes of ``data``, reading a file completely, once."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        data = _read_file(data, source, limits)
    view = memoryview(data)
    if not view.c_contiguous:
        raise ValueError(f"{source}: the memoryview is not contiguous")
    if view.nbytes > limits.max_bytes:
        raise CorruptPickleError(f"{source}: too large: {view.nbytes} bytes, at most {limits.max_bytes} are read")
    return view.cast("B").toreadonly() if view.nbytes else memoryview(b"")


def _read_file(file: object, source: str, limits: PickleLimits) -> bytearray:
    """Read a file in chunks, since a size asked for at once would be allocated at once."""
    if not hasattr(file, "read"):
        raise ValueError(f"{source}: expected bytes or a binary file, got {type(file).__name__}")
    content = bytearray()
    while len(content) <= limits.max_bytes:
        chunk = file.read(_READ_CHUNK_BYTES)
        if not isinstance(chunk, bytes):
            raise ValueError(f"{source}: expected a file opened in binary mode, its read() gave {type(chunk).__name__}")
        if not chunk:
            break
        content += chunk
    return content


def _check_kind(view: memoryview, source: str) -> None:
    """Refuse what does not begin like a pickle, and say what it seems to be."""
    if not len(view):
        raise CorruptPickleError(f"{source} is empty (0 bytes)")
    for offset, signature, kind in _SIGNATURES:
        if view[offset : offset + len(signature)] == signature:
            raise CorruptPickleError(f"{source}: this is {kind}")
    if view[0] != 0x80:
        head = show(bytes(view[:16]))
        raise CorruptPickleError(f"{source}: this is not a pickle of protocol 2 or later; it begins with {head}")


class _SnapshotDialect:
    """Say what the names in a snapshot mean; each method stands in for one name or a few."""

    def __init__(self, source: str, budget: Budget) -> None:
        self._source = source
        self._budget = budget

    def dialect(self) -> Dialect:
        """Return the table of allowed names, with the functions that stand in for them."""
        symbols = [
            Symbol(_PERSISTENT_MODULE, "_reconstruct_persistent_obj", reduce=self._persistent_object),
            Symbol("torch._utils", "_rebuild_tensor_v2", reduce=lambda args: rebuild_tensor(args, self._source)),
            Symbol("torch._utils", "_rebuild_parameter", reduce=self._parameter),
            Symbol("torch.storage", "_load_from_bytes", reduce=self._storage, takes_view=True),
            Symbol("torch", "Size", reduce=self._size),
            Symbol("torch", "device", reduce=self._device),
            Symbol("collections", "OrderedDict", reduce=self._empty_dict),
            Symbol("dnnlib.util", "EasyDict", create=dict),
            Symbol("numpy", "dtype", reduce=lambda args: build_type(args, self._source)),
            Symbol("numpy", "ndarray"),
            Symbol("_codecs", "encode", reduce=self._encode),
        ]
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            symbols.append(Symbol(module, "scalar", reduce=lambda args: build_scalar(args, self._source)))
            symbols.append(Symbol(module, "_reconstruct", reduce=lambda args: build_array(args, self._source)))
        symbols += [Symbol(module, "set", reduce=self._set) for module in ("builtins", "__builtin__")]
        symbols += [self._plain_module(*name) for name in _PLAIN_MODULES]
        return Dialect({(symbol.module, symbol.name): symbol for symbol in symbols}, apply_state=self._apply_state)

    def _corrupt(self, message: str) -> CorruptPickleError:
        return CorruptPickleError(f"{self._source}: {message}")

    def _persistent_object(self, arguments: tuple) -> PickledObject:
        if len(arguments) != 1 or type(arguments[0]) is not dict:
            raise self._corrupt("a persistent object is not described by one dict")
        description = arguments[0]
        kind, version, name, state = (description.get(key) for key in ("type", "version", "class_name", "state"))
        if type(kind) is not str or kind != "class" or type(version) is not int or version != PERSISTENT_VERSION:
            raise self._corrupt(
                f"a persistent object is of type {show(kind)}, version {show(version)}, "
                f"expected 'class', {PERSISTENT_VERSION}"
            )
        if type(name) is not str or len(name) > MAX_NAME_LENGTH or not name.isidentifier():
            raise self._corrupt(f"a persistent object has the class name {show(name)}")
        if type(state) is not dict:
            raise self._corrupt(f"the state of persistent object {name} is not a dict but {show(state)}")
        return PickledObject(_PERSISTENT_MODULE, name, state, persistent=True)

    def _plain_module(self, module: str, name: str) -> Symbol:
        return Symbol(module, name, create=lambda: PickledObject(module, name, {}, persistent=False))

    def _apply_state(self, target: object, state: object) -> None:
        if type(target) is NumpyType:
            target.apply_state(state, self._source)
        elif type(target) is np.ndarray:
            apply_array_state(target, state, self._budget, self._source)
        elif type(target) is not PickledObject or target.persistent or target.state:
            raise self._corrupt(f"{show(target)} cannot be given a state")
        elif type(state) is not dict:
            raise self._corrupt(f"the state of a {target.class_name} is not a dict but {show(state)}")
        else:
            target.state = state

    def _storage(self, arguments: tuple) -> Storage:
        blob = arguments[0] if len(arguments) == 1 else None
        blob = blob.view if type(blob) is ByteView else blob
        if not isinstance(blob, (bytes, memoryview)):
            raise self._corrupt("a tensor storage is not made of one byte string")
        return parse_storage(memoryview(blob), self._budget, self._source)

    def _parameter(self, arguments: tuple) -> torch.Tensor:
        if len(arguments) != 3 or not isinstance(arguments[0], torch.Tensor):
            raise self._corrupt("a parameter is not made of a tensor, a flag and hooks")
        return arguments[0]

    def _size(self, arguments: tuple) -> tuple:
        size = arguments[0] if len(arguments) == 1 else None
        if type(size) is not tuple or len(size) > 16 or any(type(length) is not int for length in size):
            raise self._corrupt("a torch.Size is not made of one tuple of integers")
        return size

    def _device(self, arguments: tuple) -> str:
        kind, index = arguments if len(arguments) == 2 else (arguments[0] if len(arguments) == 1 else None, 0)
        if type(kind) is not str or not 0 < len(kind) < 16 or not kind.isidentifier() or type(index) is not int:
            raise self._corrupt("a torch.device is not made of a name and a number")
        return kind if len(arguments) == 1 else f"{kind}:{index}"

    def _empty_dict(self, arguments: tuple) -> dict:
        if arguments:
            raise self._corrupt("an ordered dict is made with arguments, expected none")
        return {}

    def _set(self, arguments: tuple) -> set:
        items = arguments[0] if len(arguments) == 1 else None
        if type(items) is not list:
            raise self._corrupt("a set is not made of one list")
        self._budget.spend_opcodes(len(items), self._source)  # the same list may be used again and again
        if not all(map(is_key, items)):
            raise self._corrupt("a set holds something other than text, bytes and 64-bit integers")
        return set(items)

    def _encode(self, arguments: tuple) -> bytes:
        text, encoding = arguments if len(arguments) == 2 else (None, None)
        if type(text) is not str or type(encoding) is not str or encoding not in ("latin1", "latin-1"):
            raise self._corrupt("_codecs.encode is used for something other than bytes written as latin1 text")
        self._budget.spend_bytes(len(text), self._source)
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError:
            raise self._corrupt("bytes written as latin1 text hold other characters") from None


def _children(node: object) -> Iterator:
    """Iterate over what a container or record refers to; keys are always plain."""
    if type(node) is PickledObject:
        return iter((node.state,))
    return iter(node.values() if type(node) is dict else node)


def _check_result(root: object, limits: PickleLimits, source: str) -> None:
    """Refuse nesting that would exhaust the stack of later code, and internal values that ended up as data.

    Depth-first without recursion. The height of a container is that of its highest child plus one; a child that is
    still open closes a cycle and counts nothing.
    """
    heights: dict[int, int] = {}
    open_nodes = [[None, iter((root,)), 0]]  # node, children not yet visited, greatest height among those visited
    while True:
        node, pending, _ = open_nodes[-1]
        for child in pending:
            if type(child) in (dict, list, tuple, set, PickledObject):
                if id(child) not in heights:
                    heights[id(child)] = 0
                    open_nodes.append([child, _children(child), 0])
                    break
                open_nodes[-1][2] = max(open_nodes[-1][2], heights[id(child)])
            elif not isinstance(child, _LEAVES):
                raise CorruptPickleError(f"{source}: {_describe_token(child)} is stored as if it were data")
        else:
            height = open_nodes.pop()[2]
            if height > limits.max_depth:
                raise CorruptPickleError(f"{source}: nested more than {limits.max_depth} levels deep")
            if not open_nodes:
                return
            heights[id(node)] = height + 1
            open_nodes[-1][2] = max(open_nodes[-1][2], height + 1)


def _describe_token(token: object) -> str:
    return f"symbol '{token}'" if type(token) is Symbol else f"a bare {type(token).__name__}"


def named_tensors(obj: PickledObject, *, limits: PickleLimits = DEFAULT_LIMITS) -> dict[str, torch.Tensor]:
    """Collect the parameters and buffers of a module and its submodules, as ``nn.Module.state_dict`` lists them.

    Args:
        obj: record of a network module.
        limits: `max_names` bounds modules plus tensors, `max_depth` the levels of modules.

    Returns:
        Tensors by dotted name, in the order parameters, buffers, children, for each module. Entries that are None are
        left out, as are the buffers that the module declared non-persistent.

    Raises:
        ValueError: ``obj`` is no `PickledObject`.
        CorruptPickleError: a module contains itself, an entry is no tensor or module, a name is no text or is used
            twice, or there is more than the limits allow.
    """
    if not isinstance(obj, PickledObject):
        raise ValueError(f"named_tensors expects a PickledObject, got {type(obj).__name__}")
    tensors: dict[str, torch.Tensor] = {}
    names_left = limits.max_names
    pending: list[tuple[str, PickledObject, tuple[int, ...]]] = [("", obj, ())]
    while pending:
        prefix, module, ancestors = pending.pop()
        where = f"{module.class_name} at '{prefix[:-1]}'" if prefix else module.class_name
        if id(module.state) in ancestors:
            raise CorruptPickleError(f"{where}: the module contains itself")
        if len(ancestors) >= limits.max_depth or len(prefix) > MAX_PATH_LENGTH:
            raise CorruptPickleError(f"{where[:MAX_NAME_LENGTH]}: modules nested too deep")
        names_left -= 1 + sum(len(_dict_of(module, key, where)) for key in _MODULE_DICTS)
        if names_left < 0:
            raise CorruptPickleError(f"{where}: more than {limits.max_names} modules and tensors")
        tensors.update((prefix + name, tensor) for name, tensor in _own_tensors(module, where).items())
        lineage = (*ancestors, id(module.state))
        children = _entries(module, "_modules", PickledObject, where)
        pending += [(f"{prefix}{name}.", child, lineage) for name, child in reversed(children.items())]
    return tensors


def _own_tensors(module: PickledObject, where: str) -> dict[str, torch.Tensor]:
    """Return the parameters and saved buffers of one module, by name."""
    parameters, buffers = (_entries(module, key, torch.Tensor, where) for key in ("_parameters", "_buffers"))
    skipped = module.state.get("_non_persistent_buffers_set", set())
    if type(skipped) is not set:
        raise CorruptPickleError(f"{where}: _non_persistent_buffers_set is not a set")
    buffers = {name: buffer for name, buffer in buffers.items() if name not in skipped}
    twice = parameters.keys() & buffers.keys()
    if twice:
        raise CorruptPickleError(f"{where}: {show(min(twice))} is both a parameter and a buffer")
    return parameters | buffers


def _dict_of(module: PickledObject, key: str, where: str) -> dict:
    """Return ``state[key]``, which must be a dict."""
    entries = module.state.get(key)
    if type(entries) is not dict:
        raise CorruptPickleError(f"{where}: no network module, {key} is {show(entries)} instead of a dict")
    return entries


def _entries(module: PickledObject, key: str, kind: type, where: str) -> dict:
    """Return ``state[key]`` without its None entries, after checking names and values."""
    entries = _dict_of(module, key, where)
    for name, value in entries.items():
        if type(name) is not str or not 0 < len(name) <= MAX_NAME_LENGTH or "." in name:
            raise CorruptPickleError(f"{where}: {show(name)} in {key} is no name of a tensor or module")
        if value is not None and not isinstance(value, kind):
            raise CorruptPickleError(f"{where}: {key} holds {show(value)} under {name!r}, expected a {kind.__name__}")
    return {name: value for name, value in entries.items() if value is not None}
