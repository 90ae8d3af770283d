"""Files of tensors are in the safetensors format, whole, and read one tensor at a time."""

import io
import json
import struct
import tracemalloc

import pytest
import safetensors.torch
import torch

from torch_utils import tensor_file
from torch_utils.tensor_file import (
    check_tensor_file,
    open_tensor_file,
    read_tensor_file,
    tensor_file_kind,
    write_tensor_file,
)

KIND = "test"
DTYPES = [*tensor_file._DTYPES]


def some_tensors():
    torch.manual_seed(0)
    tensors = {f"t{i}": (torch.randn(3, i) * 100).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors["scalar"] = torch.tensor(2.5)
    tensors["view"] = torch.randn(4, 6)[::2, 1::2].T
    tensors["channels last"] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors["shared"] = tensors["view"]
    tensors['ünï/\'"crc32":"########"'] = torch.zeros(1)
    return tensors


def test_round_trip_keeps_names_shapes_dtypes_and_values(tmp_path):
    tensors = some_tensors()
    header = {"a": [1, None, "########"]}
    write_tensor_file(tmp_path / "a", KIND, tensors, header)
    with open_tensor_file(tmp_path / "a", KIND) as file:
        assert file.header == header
        assert file.specs == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name), tensor) and file.read(name).dtype == tensor.dtype


def test_file_is_one_of_the_safetensors_library(tmp_path):
    tensors = some_tensors()
    write_tensor_file(tmp_path / "a", KIND, tensors, None)
    for name, tensor in safetensors.torch.load_file(tmp_path / "a").items():
        assert torch.equal(tensor, tensors[name])


def test_every_tensor_is_aligned_to_its_own_size(tmp_path):
    write_tensor_file(tmp_path / "a", KIND, some_tensors(), None)
    data = (tmp_path / "a").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            size = torch.empty(0, dtype={v: k for k, v in tensor_file._DTYPES.items()}[entry["dtype"]]).element_size()
            assert (8 + length + entry["data_offsets"][0]) % size == 0


def test_writing_takes_little_memory_besides_the_tensors(tmp_path):
    tensors = {f"t{i}": torch.ones(1_000_000) for i in range(8)}
    tracemalloc.start()
    try:
        write_tensor_file(tmp_path / "a", KIND, tensors, None)
        assert tracemalloc.get_traced_memory()[1] < 1e6  # the file is 32 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("header", [{"a": float("nan")}, {"a": torch.zeros(1)}])
def test_header_that_is_no_json_raises_and_writes_nothing(tmp_path, header):
    with pytest.raises((ValueError, TypeError)):
        write_tensor_file(tmp_path / "a", KIND, {}, header)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "expected [0-9,]+ bytes, got [0-9,]+; it was cut off or added to"),
        (lambda data: data[:-1] + b"x", "its checksum does not match"),
        (lambda data: b"", "its header is cut off"),
        (lambda data: struct.pack("<Q", 2**63) + data[8:], "its header is cut off"),
        (lambda data: data[:8] + b"[" + data[9:], "its header is damaged"),
        (lambda data: data.replace(b'"test"', b'"best"'), "expected contents of kind 'test', got 'best'"),
        (lambda data: data.replace(b'"version":"1"', b'"version":"2"'), "expected format version 1, got '2'"),
        (lambda data: data.replace(b'"crc32"', b'"crc33"'), "its checksum does not match"),
        (lambda data: data.replace(b'"data_offsets"', b'"date_offsets"'), "its header is damaged"),
    ],
)
def test_damaged_file_raises_and_says_how(tmp_path, change, message):
    write_tensor_file(tmp_path / "a", KIND, {"t": torch.ones(3)}, {})
    (tmp_path / "a").write_bytes(change((tmp_path / "a").read_bytes()))
    with pytest.raises(ValueError, match=message):
        check_tensor_file(tmp_path / "a", KIND)
    with pytest.raises(ValueError, match=message), open_tensor_file(tmp_path / "a", KIND):
        pass


def test_check_without_checksum_reads_header_and_length_alone(tmp_path):
    write_tensor_file(tmp_path / "a", KIND, {"t": torch.ones(3)}, {})
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[:-1] + b"x")
    check_tensor_file(tmp_path / "a", KIND, checksum=False)
    (tmp_path / "a").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="cut off"):
        check_tensor_file(tmp_path / "a", KIND, checksum=False)


# Open files, which need not have a path.


def test_read_tensor_file_gives_all_tensors_and_the_header(tmp_path):
    tensors = some_tensors()
    write_tensor_file(tmp_path / "a", KIND, tensors, [1])
    file = io.BytesIO(b"before" + (tmp_path / "a").read_bytes())
    file.seek(6)
    assert tensor_file_kind(file) == KIND and file.tell() == 6
    loaded, header = read_tensor_file(file, KIND)
    assert header == [1] and loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04pickle", b"\xff" * 16, b"\x02" + bytes(7) + b"{}", b"\x02" + bytes(7) + b"[]"]
)
def test_tensor_file_kind_of_other_files_is_none(data):
    assert tensor_file_kind(io.BytesIO(data)) is None
    with pytest.raises(ValueError, match="its header is"):
        read_tensor_file(io.BytesIO(data), KIND)


@pytest.mark.parametrize(
    "entry", [{"data_offsets": [0, "8"]}, {"data_offsets": [0, 1.5]}, {"data_offsets": 5}, {}, [], None, "x"]
)
def test_read_tensor_file_with_nonsense_for_offsets_raises_value_error(entry):
    metadata = {"format": KIND, "version": "1", "crc32": 5, "header": "null"}
    text = json.dumps({"__metadata__": metadata, "a": entry}).encode()
    with pytest.raises(ValueError, match="its header is damaged"):
        read_tensor_file(io.BytesIO(struct.pack("<Q", len(text)) + text), KIND)


def test_read_tensor_file_cut_off_or_damaged_raises_value_error(tmp_path):
    write_tensor_file(tmp_path / "a", KIND, some_tensors(), None)
    data = (tmp_path / "a").read_bytes()
    with pytest.raises(ValueError, match="cut off or added to"):
        read_tensor_file(io.BytesIO(data[:-1]), KIND)
    with pytest.raises(ValueError, match="checksum"):
        read_tensor_file(io.BytesIO(data[:-1] + bytes([data[-1] ^ 1])), KIND)
    with pytest.raises(ValueError, match="expected contents of kind 'other'"):
        read_tensor_file(io.BytesIO(data), "other")
