"""Published snapshots are read exactly; hostile and damaged files give one clear error and run nothing."""

from __future__ import annotations

import io
import json
import pickle
import random
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.torch_utils import fake_snapshot as fake
from tests.torch_utils import hostile_pickles as hostile
from torch_utils.safe_pickle import (
    CorruptPickleError,
    PickledObject,
    PickleLimits,
    PickleReadError,
    UnsafePickleError,
    named_tensors,
    read_pickle,
)

HOSTILE = {
    f"{table.lower()}-{name}": case
    for table in ("SYMBOLS", "OPCODES", "TENSORS", "NUMPY", "BOMBS", "MALFORMED", "FILE_KINDS")
    for name, case in getattr(hostile, table).items()
}
GOLDEN_CASES = ("spherehead_128", "spherehead_parsing_256", "spherehead_512", "panohead_128", "eg3d_128")
MEBIBYTE = 1 << 20


def peak_resident_bytes() -> int:
    """Return the most memory that this process has had, or 0 where the system does not say it in known units."""
    if sys.platform != "linux":
        return 0
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_parts(*parts: bytes) -> object:
    return read_pickle(fake.whole(*parts))


# What is read.


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_read_pickle_fake_snapshot_equals_what_was_pickled(protocol):
    snapshot = fake.make_snapshot()
    loaded = read_pickle(fake.dump(snapshot, protocol))
    assert list(loaded) == ["training_set_kwargs", "G", "D", "G_ema", "augment_pipe"]
    options = loaded["training_set_kwargs"]
    weights = options.pop("weights")
    assert type(options) is dict and weights.dtype == np.float32
    np.testing.assert_array_equal(weights, np.arange(6).reshape(2, 3))
    weights += 1  # own memory, not a window on the file
    assert options == {
        "class_name": "training.dataset.MaskLabeledDataset",
        "resolution": 128,
        "max_size": None,
        "names": {"a", "b"},
        "image_shape": (3, 128, 128),
        "device": "cuda:1",
        "digest": b"\x00\xff\x80",
        "scale": -2.5,
        "offset": -70000,
        "large": 2**70,
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_named_tensors_fake_generator_equals_state_dict(protocol):
    generator = fake.make_snapshot()["G_ema"]
    tensors = named_tensors(read_pickle(fake.dump(generator, protocol)))
    expected = generator.state_dict()
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and not tensor.requires_grad
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=0, atol=0)  # bytes are copied, not computed


def test_read_pickle_records_hold_class_names_and_attributes():
    record = read_pickle(fake.dump(fake.make_snapshot()["G_ema"]))
    assert (record.module, record.class_name, record.persistent) == (
        "torch_utils.persistence",
        "TriPlaneGenerator",
        True,
    )
    assert record.state["rendering_kwargs"] == {"box_warp": 1.5, "avg_camera_pivot": [0, 0, 0.2], "ray_start": "auto"}
    assert record.state["_init_args"] == () and record.state["_init_kwargs"]["mapping_kwargs"] == {"num_layers": 2}
    torch.testing.assert_close(record.state["plane_axes"], torch.eye(3)[None], rtol=0, atol=0)  # exact numbers
    sampler = record.state["_modules"]["ray_sampler"]
    assert not sampler.persistent and sampler.state["ray_origins_h"] is None
    assert f"{sampler.module}.{sampler.class_name}" == "training.volumetric_rendering.ray_sampler.RaySampler"
    decoder = record.state["_modules"]["decoder"]
    assert (decoder.module, decoder.class_name) == ("torch.nn.modules.container", "Sequential")
    gain = record.state["_modules"]["mapping"].state["weight_gain"]
    assert type(gain) is np.float64 and gain == 0.5
    assert repr(decoder) == f"PickledObject(torch.nn.modules.container.Sequential, {len(decoder.state)} attributes)"


@pytest.mark.shared
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_named_tensors_golden_snapshot_equals_published_names_and_shapes(case, shared_dir):
    golden = shared_dir / "golden"
    with open(golden / f"{case}.pkl", "rb") as file:
        snapshot = read_pickle(file, source=file.name)
    expected = json.loads((golden / f"{case}.json").read_text())
    assert set(snapshot) == {"training_set_kwargs", "G", "D", "G_ema", "augment_pipe"}
    assert snapshot["G_ema"].class_name == "TriPlaneGenerator"
    for key, names in (("G", expected["G"]), ("G_ema", expected["G"]), ("D", expected["D"])):
        if snapshot[key] is None:
            assert key == "G" or names is None
            continue
        tensors = named_tensors(snapshot[key])
        assert {name: list(tensor.shape) for name, tensor in tensors.items()} == names
        assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, io.BytesIO])
def test_read_pickle_bytes_and_files_give_the_same(wrap):
    assert read_pickle(wrap(fake.whole(b"]K\x05a"))) == [5]


def test_read_pickle_file_reads_from_its_position():
    file = io.BytesIO(b"header" + fake.whole(b"N"))
    file.seek(6)
    assert read_pickle(file) is None


@pytest.mark.parametrize("data", ["path.pkl", 5, None, Path("path.pkl"), io.StringIO("text")])
def test_read_pickle_neither_bytes_nor_binary_file_raises(data):
    with pytest.raises(ValueError, match="expected .*binary"):
        read_pickle(data)


def test_read_pickle_strided_view_picks_the_elements():
    assert read_parts(fake.tensor((2, 2), (1, 2))).tolist() == [[1, 3], [2, 4]]
    assert read_parts(fake.tensor((2,), (2,), 1)).tolist() == [2, 4]
    assert read_parts(fake.tensor((), (), 3)).item() == 4


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8],
)
def test_read_pickle_storage_types_equal_torch(dtype):
    expected = torch.tensor([1, 0, 100], dtype=dtype)
    loaded = read_pickle(fake.dump([expected]))[0]
    assert loaded.dtype == expected.dtype
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)  # bytes are copied, not computed


def test_read_pickle_shared_storage_stays_shared():
    again = b"h\x00"  # the storage, remembered as memo entry 0
    first = fake.tensor((4,), (1,), content=fake.storage() + b"q\x00")
    second = fake.tensor((2,), (1,), 1, content=again)
    first, second = read_parts(first, second, b"\x86")
    first[1] = 9
    assert second.tolist() == [9, 3]


def test_read_pickle_embedded_source_is_not_run(tmp_path):
    sentinel = tmp_path / "sentinel"
    data = fake.dump(fake.make_snapshot(), module_source=fake.MODULE_SOURCE.format(path=str(sentinel)))
    assert str(sentinel).encode() in data
    read_pickle(data)
    assert not sentinel.exists()


def test_read_pickle_list_that_contains_itself_is_read():
    value = read_parts(b"]q\x00h\x00a")
    assert value[0] is value


# What is refused.


@pytest.mark.parametrize("name", HOSTILE)
def test_read_pickle_hostile_names_the_culprit_and_runs_nothing(name, tmp_path):
    case = HOSTILE[name]
    sentinel = tmp_path / "sentinel"
    data = case.make(sentinel)
    resident_before = peak_resident_bytes()
    if "deep" not in name:  # tracing 200 thousand allocations takes seconds; their memory shows below
        tracemalloc.start()
    try:
        with pytest.raises(case.error, match=case.culprit) as caught:
            read_pickle(data, source="hostile.pkl")
        peak = tracemalloc.get_traced_memory()[1]  # 0 where nothing was traced
    finally:
        tracemalloc.stop()
    assert type(caught.value) is case.error and str(caught.value).startswith("hostile.pkl")
    assert len(str(caught.value)) < 600
    assert not sentinel.exists()
    assert peak < 64 * MEBIBYTE
    # Tensors are not traced. 200 thousand lists and the tracing itself take some.
    assert peak_resident_bytes() - resident_before < 200 * MEBIBYTE


@pytest.mark.parametrize("name", [name for name, case in HOSTILE.items() if case.runs])
def test_standard_unpickler_hostile_runs(name, tmp_path):
    """Show that the sentinel of the test above would be there if the pickle had run."""
    sentinel = tmp_path / "sentinel"
    result = pickle.loads(HOSTILE[name].make(sentinel))
    if hasattr(result, "wait"):
        result.wait()
    assert sentinel.exists()


def test_read_pickle_small_limits_refuse_each():
    data = fake.dump(fake.make_snapshot())
    for limit, value in (("max_bytes", 100), ("max_opcodes", 100), ("max_depth", 3), ("max_text_bytes", 5)):
        with pytest.raises(CorruptPickleError, match=f"{value}"):
            read_pickle(data, limits=PickleLimits(**{limit: value}))
    with pytest.raises(CorruptPickleError, match="at most 100"):
        read_pickle(io.BytesIO(data), limits=PickleLimits(max_bytes=100))


def test_read_pickle_many_small_objects_stop_at_the_limit_of_opcodes():
    with pytest.raises(CorruptPickleError, match="more than 1000 opcodes"):
        read_pickle(fake.whole(b"\x8f" * 100_000), limits=PickleLimits(max_opcodes=1000))


def test_pickle_limits_not_positive_raises():
    with pytest.raises(ValueError, match="max_depth must be a positive integer, got 0"):
        PickleLimits(max_depth=0)


def test_read_pickle_truncated_anywhere_raises():
    data = fake.dump(fake.make_snapshot())
    for offset in random.Random(0).sample(range(len(data)), 50):
        with pytest.raises(CorruptPickleError):
            read_pickle(data[:offset])


@pytest.mark.parametrize("protocol", [3, 4])
def test_read_pickle_mutated_bytes_raise_nothing_else(protocol):
    data = fake.dump(fake.make_snapshot(), protocol)
    rng = random.Random(protocol)
    num_refused = 0
    for _ in range(300):
        mutated = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            mutated[rng.randrange(len(data))] = rng.randrange(256)
        try:
            named_tensors(read_pickle(mutated)["G_ema"])
        except PickleReadError:
            num_refused += 1
        except (KeyError, ValueError) as error:
            # A changed key or constant can leave a readable file in which G_ema is missing or no longer a module.
            assert "G_ema" in str(error) or "PickledObject" in str(error)
    assert 30 < num_refused < 300  # both outcomes occur: most bytes are weights, the others matter


def test_read_pickle_random_opcodes_raise_nothing_else():
    words = [bytes([code]) for code in b".(0N}])\x88\x89\x8f\x85\x86\x87taesubR\x81\x90\x93\x94Q"]
    words += [
        b"h\x00",
        b"h\x01",
        b"K\x01",
        b"q\x00",
        fake.text("storage"),
        fake.text("a"),
        fake.blob(b"b"),
        b"]a",
        b")R",
    ]
    words += [fake.storage(), fake.tensor(), fake.numpy_dtype("f8"), fake.numpy_array((1,), bytes(4)), fake.integers(0)]
    words += [fake.persistent(fake.module_dict()), fake.symbol("builtins", "set"), fake.symbol("torch", "device")]
    words += [
        fake.symbol("torch._utils", "_rebuild_tensor_v2"),
        fake.symbol("torch.nn.modules.container", "Sequential"),
    ]
    words += [fake.symbol("numpy", "ndarray"), fake.symbol("numpy.core.multiarray", "_reconstruct")]
    rng = random.Random(1)
    num_read = 0
    for _ in range(3000):
        parts = rng.choices(words, k=rng.randrange(1, 12))
        try:
            read_parts(*parts)
            num_read += 1
        except PickleReadError:
            pass
    assert num_read > 10


# Names of tensors.


def module(**entries: dict) -> PickledObject:
    state = {"_parameters": {}, "_buffers": {}, "_modules": {}} | {f"_{key}": value for key, value in entries.items()}
    return PickledObject("torch_utils.persistence", "Layer", state, persistent=True)


def test_named_tensors_order_is_parameters_buffers_children():
    tensor = torch.zeros(1)
    child = module(parameters={"weight": tensor}, buffers={"noise": tensor, "none": None})
    root = module(modules={"b1": child, "b0": child, "gone": None}, buffers={"w_avg": tensor}, parameters={"c": tensor})
    assert list(named_tensors(root)) == ["c", "w_avg", "b1.weight", "b1.noise", "b0.weight", "b0.noise"]


def test_named_tensors_module_that_contains_itself_raises():
    root = module()
    root.state["_modules"]["child"] = module(modules={"root": root})
    with pytest.raises(CorruptPickleError, match="Layer at 'child.root': the module contains itself"):
        named_tensors(root)


def test_named_tensors_exponential_sharing_raises():
    data = hostile.laughing_modules()
    assert len(data) < 20_000
    with pytest.raises(CorruptPickleError, match="more than 100000 modules and tensors"):
        named_tensors(read_pickle(data))


def test_named_tensors_long_path_raises():
    root = module()
    for _ in range(100):
        root = module(modules={"x" * 200: root})
    with pytest.raises(CorruptPickleError, match="nested too deep"):
        named_tensors(root)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"parameters": {"weight": 1.0}}, "_parameters holds 1.0 under 'weight', expected a Tensor"),
        ({"buffers": {"w": np.zeros(1)}}, "_buffers holds a ndarray under 'w', expected a Tensor"),
        ({"modules": {"b4": torch.zeros(1)}}, "_modules holds a Tensor under 'b4', expected a PickledObject"),
        ({"parameters": {4: torch.zeros(1)}}, "4 in _parameters is no name"),
        ({"parameters": {"a.b": torch.zeros(1)}}, "'a.b' in _parameters is no name"),
        ({"parameters": {"": torch.zeros(1)}}, "'' in _parameters is no name"),
        ({"parameters": None}, "no network module, _parameters is None instead of a dict"),
        ({"parameters": {"a": torch.zeros(1)}, "buffers": {"a": torch.zeros(1)}}, "'a' is both a parameter and"),
        ({"non_persistent_buffers_set": ["a"]}, "_non_persistent_buffers_set is not a set"),
    ],
)
def test_named_tensors_malformed_module_names_the_entry(entries, message):
    with pytest.raises(CorruptPickleError, match=f"Layer at 'child': {message}"):
        named_tensors(module(modules={"child": module(**entries)}))


def test_named_tensors_no_record_raises():
    with pytest.raises(ValueError, match="expects a PickledObject, got dict"):
        named_tensors({})


def test_errors_share_one_base_that_is_a_value_error():
    assert issubclass(UnsafePickleError, PickleReadError) and issubclass(CorruptPickleError, PickleReadError)
    assert issubclass(PickleReadError, ValueError)
