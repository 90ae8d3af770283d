"""Checkpoint files come back bit by bit; damaged, foreign and hostile ones give one ValueError that names them."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from torch_utils.checkpoint import FORMAT, build_filled, is_checkpoint, read_checkpoint, write_checkpoint

HEADER = {"networks": {}, "note": "Zürich", "numbers": [1, 2.5, None, True]}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    return {
        "float": base,
        "transposed": base.t(),
        "window": base[1:3, 2:5],
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3, generator=generator).half(),
        "bfloat": torch.randn(3, generator=generator).bfloat16(),
        "double": torch.randn(2, dtype=torch.float64, generator=generator),
        "integer": torch.tensor([-7, 2**40]),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "parameter": nn.Parameter(torch.ones(2)),
    }


@pytest.fixture
def content(tmp_path) -> bytes:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, tensors(), HEADER)
    return path.read_bytes()


def read(data: bytes) -> tuple[dict[str, torch.Tensor], dict]:
    return read_checkpoint(io.BytesIO(data), "some.file")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


# Writing and reading.


def test_checkpoint_round_trip_is_bit_exact(content):
    loaded, header = read(content)
    assert header == HEADER
    expected = tensors()
    assert set(loaded) == set(expected)
    for name, tensor in loaded.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert bits(tensor) == bits(expected[name]), name
        assert not tensor.requires_grad


def test_checkpoint_is_a_plain_safetensors_file(content):
    assert is_checkpoint(content[:16])
    assert set(safetensors.torch.load(content)) == set(tensors())
    (length,) = struct.unpack("<Q", content[:8])
    assert json.loads(content[8 : 8 + length])["__metadata__"]["format"] == FORMAT


@pytest.mark.parametrize("head", [b"", b"\x80\x04\x95", b"PK\x03\x04aaaaaaaa", b"\x80\x02}q\x00(X\x04\x00\x00\x00"])
def test_is_checkpoint_other_files_are_none(head):
    assert not is_checkpoint(head)


def test_write_checkpoint_tensors_that_share_memory_come_back_complete(tmp_path):
    shared = torch.arange(6.0)
    write_checkpoint(tmp_path / "a", {"a": shared, "b": shared, "c": shared[2:]}, {})
    loaded, _ = read((tmp_path / "a").read_bytes())
    assert loaded["a"].equal(shared) and loaded["b"].equal(shared) and loaded["c"].equal(shared[2:])


@pytest.mark.parametrize("header", [{"x": float("nan")}, {"x": {1, 2}}])
def test_write_checkpoint_header_that_is_no_json_leaves_no_file(tmp_path, header):
    with pytest.raises((ValueError, TypeError)):
        write_checkpoint(tmp_path / "a.safetensors", {}, header)
    assert not list(tmp_path.iterdir())


def test_write_checkpoint_over_a_file_replaces_it(tmp_path):
    path = tmp_path / "a.safetensors"
    for value in (1.0, 2.0):
        write_checkpoint(path, {"x": torch.tensor(value)}, {"value": value})
    loaded, header = read(path.read_bytes())
    assert loaded["x"] == 2 and header == {"value": 2.0}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


# Damaged and foreign files.


def with_metadata(changes: dict[str, object]) -> Callable[[bytes], bytes]:
    """Return a function that changes the metadata of a file; None removes an entry."""

    def change(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header["__metadata__"] = {k: v for k, v in (header["__metadata__"] | changes).items() if v is not None}
        return with_header(json.dumps(header).encode(), content[8 + length :])

    return change


def with_header(header: bytes, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + rest


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "seven_bytes": lambda content: content[:7],
    "length_only": lambda content: content[:8],
    "header_longer_than_file": lambda content: struct.pack("<Q", len(content)) + content[8:],
    "header_of_exabytes": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "header_not_json": lambda _: with_header(b"{not json"),
    "header_not_utf8": lambda _: with_header(b'{"\xff\xfe": 1}'),
    "header_a_list": lambda _: with_header(b"[]"),
    "header_a_number": lambda _: with_header(b"1"),
    "header_nested_deep": lambda _: with_header(nested(100_000)),
    "metadata_a_list": lambda _: with_header(b'{"__metadata__": []}'),
    "not_our_format": with_metadata({"format": "pt"}),
    "no_format": with_metadata({"format": None}),
    "newer_version": with_metadata({"version": "2"}),
    "no_version": with_metadata({"version": None}),
    "version_a_number": with_metadata({"version": 1}),
    "no_inner_header": with_metadata({"header": None}),
    "inner_header_not_json": with_metadata({"header": "{"}),
    "inner_header_nested_deep": with_metadata({"header": nested(100_000).decode()}),
    "inner_header_not_text": with_metadata({"header": {"networks": {}}}),
    "tensor_beyond_the_end": lambda content: content[:-4],
    "bytes_after_the_end": lambda content: content + b"xxxx",
    "tensors_overlap": lambda _: with_header(
        json.dumps(
            {
                "__metadata__": {"format": FORMAT, "version": "1", "header": "{}"},
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            }
        ).encode(),
        b"\0" * 4,
    ),
    "shape_larger_than_data": lambda _: with_header(
        json.dumps(
            {
                "__metadata__": {"format": FORMAT, "version": "1", "header": "{}"},
                "a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
            }
        ).encode(),
        b"\0" * 4,
    ),
    "unknown_dtype": lambda _: with_header(
        json.dumps(
            {
                "__metadata__": {"format": FORMAT, "version": "1", "header": "{}"},
                "a": {"dtype": "Q99", "shape": [1], "data_offsets": [0, 4]},
            }
        ).encode(),
        b"\0" * 4,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_read_checkpoint_hostile_file_raises_value_error_that_names_it(content, name):
    with pytest.raises(ValueError, match=r"^some\.file: "):
        read(HOSTILE[name](content))


def test_read_checkpoint_truncated_anywhere_raises_value_error(content):
    offsets = [0, 1, 7, 8, 9, len(content) - 1, *random.Random(0).sample(range(len(content)), 50)]
    for offset in offsets:
        with pytest.raises(ValueError, match=r"^some\.file: "):
            read(content[:offset])


def test_read_checkpoint_flipped_header_bytes_raise_value_error_or_read(content):
    (length,) = struct.unpack("<Q", content[:8])
    for offset in random.Random(1).sample(range(8 + length), 200):
        damaged = bytearray(content)
        damaged[offset] ^= 0xFF
        with pytest.raises(ValueError, match=r"^some\.file: "):
            read(bytes(damaged))


# Building modules.


class Pair(nn.Module):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("cached", torch.zeros(1), persistent=False)


def pair_tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = {"linear.weight": torch.ones(3, 2), "linear.bias": torch.arange(3.0), "mean": torch.full([2], 7.0)}
    return {name: tensor for name, tensor in (state | changes).items() if tensor is not None}


def test_build_filled_gives_the_tensors_to_a_frozen_module_in_eval_mode():
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

    values = torch.tensor([1.0, 2.0])
    module = build_filled(Stored, {"weight": values}, "file")
    assert not module.training and isinstance(module.weight, nn.Parameter) and not module.weight.requires_grad
    assert module.weight.equal(values) and module.weight.data_ptr() != values.data_ptr()


def test_build_filled_converts_to_the_dtypes_of_the_module():
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 3))

    transposed = torch.ones(3, 2, dtype=torch.float16).t()
    module = build_filled(Stored, {"weight": transposed}, "file")
    assert module.weight.dtype == torch.float32 and module.weight.is_contiguous()


def test_build_filled_optional_tensor_is_left_out():
    tensors = {"weight": torch.ones(3, 2), "bias": torch.ones(3), "statistic": torch.ones(9)}
    module = build_filled(lambda: nn.Linear(2, 3), tensors, "file", frozenset({"statistic"}))
    assert set(module.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear.weight": None}, r"^file: missing tensors: linear\.weight$"),
        ({"extra": torch.ones(1)}, r"^file: unknown tensors: extra$"),
        ({"mean": None, "extra": torch.ones(1)}, r"^file: missing tensors: mean; unknown tensors: extra$"),
        ({"linear.weight": torch.ones(2, 3)}, r"^file: 'linear\.weight': expected shape \(3, 2\), got \(2, 3\)$"),
        ({f"extra{i}": torch.ones(1) for i in range(9)}, r"extra4 and 4 more$"),
    ],
)
def test_build_filled_tensors_that_do_not_fit_raise_value_error_that_names_them(changes, message):
    with pytest.raises(ValueError, match=message):
        build_filled(Pair, pair_tensors(**changes), "file")


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(10**30, 3),
        lambda: nn.Linear(-5, 3),
        lambda: nn.Linear("2", 3),
        lambda: nn.Linear(1 // 0, 3),
    ],
)
def test_build_filled_module_that_cannot_be_built_raises_value_error(build):
    with pytest.raises(ValueError, match=r"^file: "):
        build_filled(build, {}, "file")


def test_build_filled_huge_module_costs_no_memory():
    tensors = {"weight": torch.ones(1), "bias": torch.ones(1)}
    with pytest.raises(ValueError, match="'weight': expected shape"):  # 4 exabytes, were they allocated
        build_filled(lambda: nn.Linear(10**9, 10**9), tensors, "file")


def test_write_checkpoint_path_may_be_text(tmp_path: Path):
    write_checkpoint(str(tmp_path / "a"), {"x": torch.ones(1)}, {})
    assert read((tmp_path / "a").read_bytes())[0]["x"] == 1
