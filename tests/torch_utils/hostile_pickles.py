"""Hostile and malformed pickles, as a table: name -> how to make it, which error it must give and what that names."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.torch_utils import fake_snapshot as fake
from tests.torch_utils.fake_snapshot import call, integer, stack_symbol, symbol, text, whole
from torch_utils.safe_pickle import CorruptPickleError, PickleReadError, UnsafePickleError


class Hostile(NamedTuple):
    """Describe a hostile pickle.

    Args:
        make: from the path of a file that running the pickle would create, the bytes.
        error: class of the error.
        culprit: pattern that the message must match.
        runs: True if the standard unpickler would create the file.
    """

    make: Callable[[Path], bytes]
    error: type[PickleReadError]
    culprit: str
    runs: bool = False


def _unsafe(make: Callable[[Path], bytes], culprit: str, runs: bool = False) -> Hostile:
    return Hostile(make, UnsafePickleError, culprit, runs)


def _corrupt(make: Callable[[Path], bytes], culprit: str) -> Hostile:
    return Hostile(make, CorruptPickleError, culprit)


def _touch(path: Path) -> bytes:
    return text(f"touch '{path}'")


def _write(path: Path) -> bytes:
    return text(f"open({str(path)!r}, 'w').close()")


def _nested_in_storage(path: Path) -> bytes:
    inner = whole(call(symbol("os", "system"), _touch(path)), protocol=2)
    return whole(call(symbol("torch.storage", "_load_from_bytes"), fake.blob(inner)))


def _setstate_on_symbol(path: Path) -> bytes:
    return whole(symbol("collections", "OrderedDict"), b"}", text("__setstate__"), _write(path), b"sb")


def _get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def _put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def _chain_with_shortcuts(length: int) -> bytes:
    """Return a chain of lists, each within the next, with every one of them also directly in the root list."""
    links = b"".join(b"]" + _get(index - 1) + b"a" + _put(index) for index in range(1, length))
    return b"](]" + _put(0) + links + b"e"


def laughing_modules(num_levels: int = 40) -> bytes:
    """Return modules each of which holds the next one twice: 2^40 paths in a few kB."""
    module = fake.persistent(fake.module_dict())
    for level in range(num_levels):
        children = b"}" + text("a") + module + _put(level) + b"s" + text("b") + _get(level) + b"s"
        module = fake.persistent(fake.module_dict(modules=children))
    return whole(module)


SYMBOLS = {
    "os_system": _unsafe(lambda p: whole(call(symbol("os", "system"), _touch(p))), r"'os\.system'", True),
    "posix_system": _unsafe(
        lambda p: whole(call(stack_symbol("posix", "system"), _touch(p))), r"'posix\.system'", True
    ),
    "eval": _unsafe(lambda p: whole(call(stack_symbol("builtins", "eval"), _write(p))), r"'builtins\.eval'", True),
    "exec": _unsafe(lambda p: whole(call(stack_symbol("builtins", "exec"), _write(p))), r"'builtins\.exec'", True),
    "exec_python2_name": _unsafe(
        lambda p: whole(call(symbol("__builtin__", "eval"), _write(p)), protocol=2), r"'__builtin__\.eval'", True
    ),
    "popen": _unsafe(
        lambda p: whole(call(stack_symbol("subprocess", "Popen"), b"](" + text("touch") + text(str(p)) + b"e")),
        r"'subprocess\.Popen'",
        True,
    ),
    "getattr": _unsafe(
        lambda p: whole(call(symbol("builtins", "getattr"), symbol("torch.storage", "io"), text("open"))),
        r"'builtins\.getattr'",
    ),
    "dotted_attribute": _unsafe(lambda p: whole(stack_symbol("os", "path.join")), r"'os\.path\.join'"),
    "attribute_of_allowed": _unsafe(
        lambda p: whole(call(stack_symbol("torch.storage", "_load_from_bytes.__globals__"), text("x"))),
        r"_load_from_bytes\.__globals__'",
    ),
    "module_of_allowed": _unsafe(
        lambda p: whole(stack_symbol("torch.storage", "torch.hub.load")), r"torch\.hub\.load'"
    ),
    "torch_load": _unsafe(lambda p: whole(call(symbol("torch", "load"), text(str(p)))), r"'torch\.load'"),
    "numpy_load": _unsafe(lambda p: whole(call(symbol("numpy", "load"), text(str(p)))), r"'numpy\.load'"),
    "numpy_runstring": _unsafe(
        lambda p: whole(call(symbol("numpy.testing._private.utils", "runstring"), _write(p), b"}")),
        r"'numpy\.testing\._private\.utils\.runstring'",
        True,
    ),
    "other_module_class": _unsafe(lambda p: whole(symbol("torch.nn.modules.module", "Module")), r"Module'"),
    "case_differs": _unsafe(lambda p: whole(symbol("Torch._utils", "_rebuild_parameter")), r"'Torch\._utils"),
    "pushed_only": _unsafe(lambda p: whole(b"}", text("x"), symbol("os", "system"), b"s"), r"'os\.system'"),
    "odd_characters": _unsafe(lambda p: whole(stack_symbol("os\n\x1b[31m", "system")), r"'os\\n\\x1b\[31m\.system'"),
    "allowed_as_data": _corrupt(
        lambda p: whole(b"}", text("x"), symbol("collections", "OrderedDict"), b"s"), r"'collections\.OrderedDict'"
    ),
    "not_callable": _unsafe(lambda p: whole(call(symbol("numpy", "ndarray"), b"N")), r"'numpy\.ndarray'"),
    "not_a_class": _unsafe(lambda p: whole(symbol("torch.storage", "_load_from_bytes"), b")\x81"), r"_load_from_bytes"),
    "state_of_symbol": _unsafe(_setstate_on_symbol, r"'collections\.OrderedDict' may not be given a state"),
    "state_of_persistent": _corrupt(lambda p: whole(fake.persistent(b"}"), b"}b"), r"PickledObject cannot be given"),
    "nested_in_storage": _unsafe(_nested_in_storage, r"storage: symbol 'os\.system'"),
    "snapshot_symbol_in_storage": _unsafe(
        lambda p: whole(fake.storage(kind=symbol("collections", "OrderedDict"))), r"'collections\.OrderedDict'"
    ),
}

OPCODES = {
    "PERSID": _unsafe(lambda p: whole(b"Pid\n"), "opcode PERSID"),
    "BINPERSID": _unsafe(lambda p: whole(text("id"), b"Q"), "opcode BINPERSID"),
    "EXT1": _unsafe(lambda p: whole(b"\x82\x01"), "opcode EXT1"),
    "EXT2": _unsafe(lambda p: whole(b"\x83\x01\x00"), "opcode EXT2"),
    "EXT4": _unsafe(lambda p: whole(b"\x84\x01\x00\x00\x00"), "opcode EXT4"),
    "INST": _unsafe(lambda p: whole(b"(", _touch(p), b"ios\nsystem\n"), "opcode INST", True),
    "OBJ": _unsafe(lambda p: whole(b"(", symbol("collections", "OrderedDict"), b"o"), "opcode OBJ"),
    "NEWOBJ_EX": _unsafe(lambda p: whole(symbol("dnnlib.util", "EasyDict"), b")}\x92"), "opcode NEWOBJ_EX"),
    "NEXT_BUFFER": _unsafe(lambda p: whole(b"\x97"), "opcode NEXT_BUFFER"),
    "BYTEARRAY8": _unsafe(lambda p: whole(b"\x96" + struct.pack("<Q", 1 << 40)), "opcode BYTEARRAY8"),
    "DUP": _unsafe(lambda p: whole(b"N2"), "opcode DUP"),
    "INT": _unsafe(lambda p: whole(b"I" + b"9" * 500_000 + b"\n"), "opcode INT"),
    "LONG": _unsafe(lambda p: whole(b"L" + b"9" * 500_000 + b"L\n"), "opcode LONG"),
    "LONG4": _unsafe(lambda p: whole(b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20)), "opcode LONG4"),
    "LONG4_negative": _unsafe(lambda p: whole(b"\x8b" + struct.pack("<i", -5)), "opcode LONG4"),
    "FLOAT": _unsafe(lambda p: whole(b"F1e999999\n"), "opcode FLOAT"),
    "unknown": _corrupt(lambda p: whole(b"\xff"), "0xff is not a pickle opcode"),
}

TENSORS = {
    "stride_zero": _corrupt(lambda p: whole(fake.tensor((1 << 30, 1 << 30), (0, 0))), "does not fit its storage of 4"),
    "offset_beyond": _corrupt(lambda p: whole(fake.tensor((2,), (1,), 3)), "does not fit"),
    "stride_beyond": _corrupt(lambda p: whole(fake.tensor((2,), (4,))), "does not fit"),
    "negative_size": _corrupt(lambda p: whole(fake.tensor((-1,))), r"size of a tensor holds -1"),
    "negative_stride": _corrupt(lambda p: whole(fake.tensor((2,), (-1,), 3)), r"stride of a tensor holds -1"),
    "negative_offset": _corrupt(lambda p: whole(fake.tensor((2,), (1,), -1)), r"offset of a tensor holds -1"),
    "huge_size": _corrupt(lambda p: whole(fake.tensor((2**70,))), r"size of a tensor holds 1180591620717411303424"),
    "empty_and_huge": _corrupt(lambda p: whole(fake.tensor((0,) + (2**30,) * 5, (1,) * 6)), "does not fit"),
    "more_strides": _corrupt(lambda p: whole(fake.tensor((2,), (1, 1))), "1 sizes but 2 strides"),
    "many_dimensions": _corrupt(lambda p: whole(fake.tensor((1,) * 40, (1,) * 40)), "at most 16"),
    "no_storage": _corrupt(lambda p: whole(fake.tensor(content=text("x"))), "not made of a storage"),
    "tensor_as_storage": _corrupt(lambda p: whole(fake.tensor(content=fake.tensor())), "not made of a storage"),
    "hooks": _corrupt(lambda p: whole(fake.tensor(hooks=b"}" + text("a") + b"Ns")), "hooks"),
    "bare_storage": _corrupt(lambda p: whole(fake.storage()), "bare Storage is stored"),
    "storage_claims_2_40": _corrupt(lambda p: whole(fake.storage(numel=1 << 40)), "1099511627776 elements need"),
    "storage_negative": _corrupt(lambda p: whole(fake.storage(numel=-1)), "-1 elements follow"),
    "storage_count_differs": _corrupt(lambda p: whole(fake.storage(count=3)), "3 elements follow.* has 4"),
    "storage_trailing": _corrupt(lambda p: whole(fake.storage(payload=bytes(20))), "need 16 bytes, but 20"),
    "storage_truncated": _corrupt(lambda p: whole(fake.storage(payload=bytes(15))), "need 16 bytes, but 15"),
    "storage_magic": _corrupt(lambda p: whole(fake.storage(magic=7)), "wrong magic number 7"),
    "storage_version": _corrupt(lambda p: whole(fake.storage(version=1002)), "version 1002"),
    "storage_big_endian": _corrupt(lambda p: whole(fake.storage(little_endian=b"\x89")), "little_endian is not true"),
    "storage_other_key": _corrupt(lambda p: whole(fake.storage(key="1")), "list of keys"),
    "storage_of_zip": _corrupt(
        lambda p: whole(call(symbol("torch.storage", "_load_from_bytes"), fake.blob(b"PK\x03\x04" + bytes(40)))),
        r"storage: does not begin with a pickle of protocol 2 but with b'PK",
    ),
    "storage_empty": _corrupt(
        lambda p: whole(call(symbol("torch.storage", "_load_from_bytes"), fake.blob(b""))),
        "storage: does not begin",
    ),
    "storage_of_text": _corrupt(
        lambda p: whole(call(symbol("torch.storage", "_load_from_bytes"), text("x"))), "not made of one byte string"
    ),
    "storage_bytes_as_data": _corrupt(
        lambda p: whole(symbol("torch.storage", "_load_from_bytes"), fake.blob(b"x"), b"\x86"), "stored as if"
    ),
}

NUMPY = {
    "object_dtype": _unsafe(lambda p: whole(fake.numpy_dtype("O8")), r"numpy dtype 'O8'"),
    "object_scalar": _unsafe(
        lambda p: whole(call(symbol("numpy.core.multiarray", "scalar"), fake.numpy_dtype("O8"), _write(p))),
        r"numpy dtype 'O8'",
    ),
    "structured_dtype": _unsafe(lambda p: whole(fake.numpy_dtype("f8,O")), r"numpy dtype 'f8,O'"),
    "scalar_length": _corrupt(
        lambda p: whole(call(symbol("numpy.core.multiarray", "scalar"), fake.numpy_dtype("f8"), fake.blob(b"1234"))),
        "float64 has 4 bytes",
    ),
    "array_length": _corrupt(lambda p: whole(fake.numpy_array((1 << 20,), bytes(4))), r"\(1048576,\).* has 4 bytes"),
    "array_empty_and_huge": _corrupt(lambda p: whole(fake.numpy_array((0,) + (2**30,) * 5, b"")), "has 0 bytes"),
    "array_negative": _corrupt(lambda p: whole(fake.numpy_array((-1,), bytes(4))), "shape of a numpy array"),
    "array_class": _corrupt(
        lambda p: whole(
            call(symbol("numpy.core.multiarray", "_reconstruct"), symbol("collections", "OrderedDict"), b"NN")
        ),
        "class other than numpy.ndarray",
    ),
    "encode_other": _corrupt(lambda p: whole(call(symbol("_codecs", "encode"), text("x"), text("rot13"))), "_codecs"),
}

BOMBS = {
    "memo_index": _corrupt(lambda p: whole(b"Nr\xff\xff\xff\xff", b"j\xfe\xff\xff\xff"), "memo entry 4294967294"),
    "frame": _corrupt(lambda p: whole(b"\x95" + struct.pack("<Q", 1 << 60), b"N"), "frame of 1152921504606846976"),
    "bytes8": _corrupt(lambda p: whole(b"\x8e" + struct.pack("<Q", 1 << 50)), "1125899906842624 bytes expected"),
    "bytes4": _corrupt(lambda p: whole(b"B\xff\xff\xff\xff"), "4294967295 bytes expected"),
    "text8": _corrupt(lambda p: whole(b"\x8d" + struct.pack("<Q", 1 << 50)), "a text of 1125899906842624 bytes"),
    "deep_lists": _corrupt(lambda p: whole(b"]" * 200_000, b"a" * 199_999), "nested more than 200 levels"),
    "deep_tuples": _corrupt(lambda p: whole(b")", b"\x85" * 200_000), "nested more than 200 levels"),
    "deep_marks": _corrupt(lambda p: whole(b"(" * 200_000, b"t" * 200_000), "nested more than 200 levels"),
    "deep_key": _corrupt(lambda p: whole(b"})", b"\x85" * 200_000, b"Ns"), "a tuple cannot be a dict key"),
    "deep_behind_shortcuts": _corrupt(
        lambda p: whole(_chain_with_shortcuts(300)),
        "nested more than 200 levels",
    ),
    "same_storage_again": _corrupt(
        lambda p: whole(
            symbol("torch.storage", "_load_from_bytes"),
            fake.blob(fake.storage_blob(numel=1 << 18, payload=bytes(1 << 20))),
            b"\x85q\x00R",
            (symbol("torch.storage", "_load_from_bytes") + b"h\x00R") * 50,
            b"t",
        ),
        "claim more bytes than the file holds",
    ),
    "same_set_again": _corrupt(
        lambda p: whole(b"](", b"K\x01" * 50_000, b"e\x85q\x00", (symbol("builtins", "set") + b"h\x00R") * 50),
        "more than 1000000 opcodes",
    ),
    "long_line": _corrupt(lambda p: whole(b"c" + b"x" * 1_000_000 + b"\n"), "no end of line within 256 bytes"),
}

MALFORMED = {
    "stack_empty": _corrupt(lambda p: whole(b"a"), "stack is empty"),
    "stop_without_value": _corrupt(lambda p: whole(), "unfinished values"),
    "stop_with_two": _corrupt(lambda p: whole(b"NN"), "unfinished values"),
    "stop_in_mark": _corrupt(lambda p: whole(b"(N"), "unfinished values"),
    "pop_through_mark": _corrupt(lambda p: whole(b"N(\x85"), "stack is empty"),
    "mark_missing": _corrupt(lambda p: whole(b"]e"), "MARK is missing"),
    "memo_put_nothing": _corrupt(lambda p: whole(b"\x94"), "stack is empty where a value is to be remembered"),
    "memo_get_absent": _corrupt(lambda p: whole(b"h\x05"), "memo entry 5"),
    "append_to_text": _corrupt(lambda p: whole(text("x"), b"Na"), "no list"),
    "items_of_list": _corrupt(lambda p: whole(b"](NNu"), "no dict"),
    "odd_items": _corrupt(lambda p: whole(b"}(Nu"), "no value"),
    "unhashable_key": _corrupt(lambda p: whole(b"}]Ns"), "a list cannot be a dict key"),
    "huge_key": _corrupt(lambda p: whole(b"}", integer(2**61 - 1 << 200), b"Ns"), "cannot be a dict key"),
    "set_of_lists": _corrupt(lambda p: whole(b"\x8f(]\x90"), "a list cannot be"),
    "set_called_on_lists": _corrupt(lambda p: whole(call(symbol("builtins", "set"), b"]]a")), "a set holds"),
    "utf8": _corrupt(lambda p: whole(b"\x8c\x02\xff\xfe"), "not valid UTF-8"),
    "symbol_of_numbers": _corrupt(lambda p: whole(b"NN\x93"), "needs two texts"),
    "call_of_text": _corrupt(lambda p: whole(text("os.system"), b")R"), "a call needs a symbol"),
    "protocol_9": _corrupt(lambda p: whole(b"N", protocol=9), "protocol 9"),
    "trailing_bytes": _corrupt(lambda p: whole(b"N") + b"more", "4 bytes follow"),
    "persistent_version": _corrupt(lambda p: whole(fake.persistent(b"}", version=7)), "version 7"),
    "persistent_class": _corrupt(lambda p: whole(fake.persistent(b"}", class_name="a b")), "class name 'a b'"),
    "persistent_state": _corrupt(lambda p: whole(fake.persistent(b"N")), "state of persistent object SynthesisLayer"),
    "plain_state": _corrupt(
        lambda p: whole(symbol("torch.nn.modules.container", "Sequential"), b")\x81Nb"), "state of a Sequential"
    ),
    "plain_arguments": _corrupt(
        lambda p: whole(symbol("torch.nn.modules.container", "Sequential"), b"N\x85\x81"), "takes no arguments"
    ),
}

FILE_KINDS = {
    "nothing": _corrupt(lambda p: b"", r"is empty \(0 bytes\)"),
    "zip": _corrupt(lambda p: b"PK\x03\x04" + bytes(30), "zip archive"),
    "old_torch_save": _corrupt(lambda p: fake.legacy_torch_save({}), "file of torch.save"),
    "safetensors": _corrupt(lambda p: struct.pack("<Q", 40) + b'{"w":{}}', "safetensors"),
    "png": _corrupt(lambda p: b"\x89PNG\r\n\x1a\n" + bytes(30), "PNG"),
    "jpeg": _corrupt(lambda p: b"\xff\xd8\xff\xe0" + bytes(30), "JPEG"),
    "gzip": _corrupt(lambda p: b"\x1f\x8b\x08" + bytes(30), "gzip"),
    "tar": _corrupt(lambda p: b"name" + bytes(253) + b"ustar" + bytes(250), "tar archive"),
    "html": _corrupt(lambda p: b"<!DOCTYPE html><html>", "HTML"),
    "git_lfs": _corrupt(lambda p: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    "json": _corrupt(lambda p: b'{"error": 1}', "JSON"),
    "text": _corrupt(lambda p: b"hello, world", "not a pickle of protocol 2 or later; it begins with b'hello"),
    "protocol_0": _corrupt(lambda p: b"cos\nsystem\n(S'true'\ntR.", "not a pickle of protocol 2"),
}
