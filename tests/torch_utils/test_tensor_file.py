"""Files of tensors are in the safetensors format, whole, and read one tensor at a time."""

import json
import struct
import tracemalloc

import pytest
import safetensors.torch
import torch

from torch_utils import tensor_file
from torch_utils.tensor_file import check_tensor_file, open_tensor_file, write_tensor_file

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
