"""Training states come back bit for bit, appear whole or not at all, and damaged ones are passed over."""

import builtins
import errno
import json
import os
import random
import signal
import time

import pytest
import torch
from torch import nn

from torch_utils.tensor_file import check_tensor_file
from torch_utils.training_stats import Collector
from training.training_state import (
    KIND,
    list_states,
    load_state,
    newest_state,
    prune_states,
    remove_stale_temps,
    save_state,
    state_path,
)

DEAD_PID = 2**22 + 1  # above the largest that Linux gives


class Net(nn.Module):
    """A convolution, which may be channels-last, a shared and a frozen weight, and buffers of several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.tied = self.conv.bias
        self.register_buffer("small", torch.randn(3).half())
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("p", torch.tensor(0.1))
        self.register_buffer("empty", torch.zeros(0, 2, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.conv(x) * self.scale).square().mean()


def make_objects(seed=0, channels_last=False, device="cpu", **adam):
    torch.manual_seed(seed)
    net = Net().to(device)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, **{"lr": 0.01, "betas": (0.5, 0.99), **adam})
    return {"G": net, "opt": optimizer, "stats": Collector(device), "counters": {"ticks": 0}}


def train(objects, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        objects["opt"].zero_grad(set_to_none=True)
        loss = objects["G"](torch.randn(2, 3, 8, 8).to(objects["G"].scale.device))
        loss.backward()
        objects["opt"].step()
        objects["stats"].add("loss", loss)
        objects["G"].p += 0.01
        objects["counters"]["ticks"] += 1


def contents(objects):
    """Return everything that makes up a state, for an exact comparison."""
    state = {f"G.{name}": tensor for name, tensor in objects["G"].state_dict().items()}
    for index, entries in objects["opt"].state_dict()["state"].items():
        state.update({f"opt.{index}.{name}": value for name, value in entries.items()})
    state["stats"] = objects["stats"].state_dict()["moments"]
    return state, objects["counters"]


def assert_same(objects, expected):
    (ours, our_counters), (theirs, their_counters) = contents(objects), contents(expected)
    assert ours.keys() == theirs.keys() and our_counters == their_counters
    for name, tensor in theirs.items():
        assert (
            ours[name].device == tensor.device
            and ours[name].dtype == tensor.dtype
            and ours[name].stride() == tensor.stride()
        ), name
        assert torch.equal(ours[name], tensor), name


def write_states(run_dir, *cur_nimg):
    for nimg in cur_nimg:
        save_state(run_dir, nimg, {"counters": {"nimg": nimg}, "G": nn.Linear(2, 2)})


# Round trips.


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("adam", [{"betas": (0.0, 0.99)}, {"betas": (0.0, 0.99), "fused": True}])
def test_first_moments_that_every_step_overwrites_are_left_out(tmp_path, adam, channels_last):
    straight, first, second = (make_objects(channels_last=channels_last, **adam) for _ in range(3))
    train(straight, 6)
    train(first, 3)
    path = save_state(tmp_path, 96, first)
    assert b"exp_avg_sq" in path.read_bytes() and b'exp_avg"' not in path.read_bytes()
    load_state(path, second)
    train(second, 3, first=3)
    assert_same(second, straight)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("adam", [{}, {"fused": True}, {"capturable": False, "amsgrad": True}])
def test_training_that_is_interrupted_ends_with_the_same_bits(tmp_path, adam, channels_last):
    straight = make_objects(channels_last=channels_last, **adam)
    train(straight, 6)
    first = make_objects(channels_last=channels_last, **adam)
    train(first, 3)
    path = save_state(tmp_path, 96, first, {"config": {"lr": 0.01}})
    second = make_objects(seed=1, channels_last=channels_last, **adam)
    train(second, 1)  # what was there before does not matter
    assert load_state(path, second) == {"config": {"lr": 0.01}, "cur_nimg": 96}
    assert_same(second, first)
    train(second, 3, first=3)
    assert_same(second, straight)


@pytest.mark.gpu
@pytest.mark.parametrize("adam", [{"fused": True}, {"capturable": True}, {"foreach": True}])
def test_state_goes_from_gpu_to_gpu_and_to_cpu_with_the_same_bits(tmp_path, adam):
    first, second, on_cpu = (make_objects(device=device, **adam) for device in ("cuda", "cuda", "cpu"))
    train(first, 3)
    path = save_state(tmp_path, 96, first)
    load_state(path, second)
    load_state(path, on_cpu)
    assert_same(second, first)
    entries = on_cpu["opt"].state_dict()["state"]
    for index, expected in first["opt"].state_dict()["state"].items():
        assert all(torch.equal(entries[index][name], value.cpu()) for name, value in expected.items())
    for objects in (first, second):
        train(objects, 3, first=3)
    assert_same(second, first)


def test_load_state_of_an_optimizer_that_made_no_step_makes_it_new_again(tmp_path):
    untouched, trained = make_objects(), make_objects()
    path = save_state(tmp_path, 0, untouched)
    train(trained, 2)
    load_state(path, trained)
    assert_same(trained, untouched)


def test_special_values_and_tiny_numbers_keep_their_bits(tmp_path):
    values = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 0x7FA00001], dtype=torch.float32)
    values[4] = values.view(torch.int32)[4].fill_(0x7FA00001).view(torch.float32)  # a NaN with a payload
    net = nn.Module()
    net.register_buffer("values", values)
    path = save_state(tmp_path, 0, {"G": net})
    other = nn.Module()
    other.register_buffer("values", torch.zeros(5))
    load_state(path, {"G": other})
    assert torch.equal(other.values.view(torch.int32), values.view(torch.int32))


def test_save_state_same_objects_write_the_same_bytes(tmp_path):
    objects = make_objects()
    train(objects, 1)
    assert save_state(tmp_path / "a", 5, objects).read_bytes() == save_state(tmp_path / "b", 5, objects).read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["state-000000005.safetensors"]


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    objects, other = make_objects(), make_objects(seed=1)
    train(objects, 1)
    path = save_state(tmp_path, 5, objects)
    load_state(path, other)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(other, objects)


# What does not fit.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.pop("stats"), r"objects: 'stats': expected nothing, got stateful"),
        (lambda o: o.update(more={}), r"objects: 'more': expected json, got nothing"),
        (lambda o: setattr(o["G"], "small", torch.zeros(3)), r"G: 'small': expected \(torch.float32, .*torch.float16"),
        (lambda o: setattr(o["G"], "p", torch.zeros(2)), r"G: 'p': expected \(torch.float32, \(2,\)\), got"),
        (lambda o: o["G"].register_buffer("new", torch.zeros(1)), r"G: 'new': expected .*, got nothing"),
        (lambda o: delattr(o["G"], "flag"), r"G: 'flag': expected nothing, got"),
        (lambda o: o["opt"].add_param_group({"params": [o["G"].frozen]}), r"opt: 'G.frozen': .*, got nothing"),
    ],
)
def test_load_state_into_other_objects_raises_and_changes_nothing(tmp_path, change, message):
    objects, other, same = make_objects(), make_objects(seed=1), make_objects(seed=1)
    train(objects, 2)
    path = save_state(tmp_path, 1, objects)
    change(other), change(same)
    with pytest.raises(ValueError, match=f"state-000000001.safetensors: {message}"):
        load_state(path, other)
    for ours, theirs in zip(other["G"].state_dict().values(), same["G"].state_dict().values()):
        assert torch.equal(ours, theirs)
    assert not other["opt"].state


def test_save_state_of_an_optimizer_of_an_absent_module_raises(tmp_path):
    objects = make_objects()
    del objects["G"]
    with pytest.raises(ValueError, match="optimiser 'opt': expected parameters of the modules that are saved with it"):
        save_state(tmp_path, 0, objects)


@pytest.mark.parametrize("data", [{"a": float("nan")}, {"a": (1, 2)}, {1: 2}, {"a": torch.zeros(1)}])
def test_save_state_of_what_json_cannot_hold_raises(tmp_path, data):
    with pytest.raises(ValueError, match="'counters': expected finite JSON data"):
        save_state(tmp_path, 0, {"counters": data})


def test_save_state_of_an_unusual_dtype_raises_and_names_it(tmp_path):
    net = nn.Module()
    net.register_buffer("wave", torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(ValueError, match="tensor 'G/wave': expected one of .*, got torch.complex64"):
        save_state(tmp_path, 0, {"G": net})


# Damaged files.


def damage(path, how):
    data = path.read_bytes()
    changed = {
        "empty": b"",
        "half": data[: len(data) // 2],
        "one byte short": data[:-1],
        "one byte more": data + b"\0",
        "header cut": data[:20],
        "one bit of the data": data[:-3] + bytes([data[-3] ^ 4]) + data[-2:],
        "one digit of the header": data.replace(b'cur_nimg\\": 9', b'cur_nimg\\": 8', 1),
        "zeros": bytes(len(data)),
        "another file": b"PK\3\4" + bytes(100),
        "another kind": data.replace(KIND.encode(), b"spherehead-treining-state", 1),
    }[how]
    assert changed != data
    path.write_bytes(changed)


DAMAGES = [
    *("empty", "half", "one byte short", "one byte more", "header cut", "one bit of the data"),
    *("one digit of the header", "zeros", "another file", "another kind"),
]


@pytest.mark.parametrize("how", DAMAGES)
def test_newest_state_passes_over_a_damaged_file_and_says_so(tmp_path, how):
    write_states(tmp_path, 5, 9)
    damage(state_path(tmp_path, 9), how)
    lines = []
    assert newest_state(tmp_path, lines.append) == state_path(tmp_path, 5)
    assert len(lines) == 1 and lines[0].startswith(f"{state_path(tmp_path, 9)}: not used: ")
    with pytest.raises(ValueError, match="state-000000009.safetensors: "):
        load_state(state_path(tmp_path, 9), {"counters": {}, "G": nn.Linear(2, 2)})


def test_newest_state_cut_at_every_length_is_passed_over(tmp_path):
    write_states(tmp_path, 9)
    data = state_path(tmp_path, 9).read_bytes()
    for length in range(len(data)):
        state_path(tmp_path, 9).write_bytes(data[:length])
        assert newest_state(tmp_path, lambda line: None) is None, length


def test_newest_state_goes_by_the_number_of_images(tmp_path):
    write_states(tmp_path, 1_000_000_000, 999, 5000)  # ten digits are more than nine
    (tmp_path / "state-7.safetensors").write_bytes(b"not one of ours")
    assert newest_state(tmp_path) == state_path(tmp_path, 1_000_000_000)
    assert [path.name[6:-12] for path in list_states(tmp_path)] == ["1000000000", "000005000", "000000999"]


def test_newest_state_without_a_folder_or_states_is_none(tmp_path):
    assert newest_state(tmp_path / "absent") is None
    assert newest_state(tmp_path) is None


# Keeping the last.


def test_prune_states_keeps_those_written_last(tmp_path):
    write_states(tmp_path, 1, 2, 3)
    for nimg, written in ((3, 10), (1, 20), (2, 30)):  # the run went on from 1 although there was 3
        os.utime(state_path(tmp_path, nimg), (written, written))
    assert prune_states(tmp_path, 2) == [state_path(tmp_path, 3)]
    assert prune_states(tmp_path, 2) == []
    assert len(list_states(tmp_path)) == 2


def test_prune_states_damaged_file_takes_no_place(tmp_path):
    write_states(tmp_path, 1, 2, 3)
    damage(state_path(tmp_path, 3), "half")
    assert prune_states(tmp_path, 2) == []
    assert newest_state(tmp_path, lambda line: None) == state_path(tmp_path, 2)


def test_prune_states_that_would_keep_none_raises(tmp_path):
    with pytest.raises(ValueError, match="states to keep: expected at least 1, got 0"):
        prune_states(tmp_path, 0)


# Saves that fail.


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_save_state_on_a_full_disk_keeps_the_last_one_and_says_why(tmp_path, monkeypatch):
    write_states(tmp_path, 5)
    real_open = builtins.open

    def open_full(file, mode="r", *args, **kwargs):
        opened = real_open(file, mode, *args, **kwargs)
        if "w" in mode:
            written = []
            real_write = opened.write

            class Full:
                def __getattr__(self, name):
                    return getattr(opened, name)

                def __enter__(self):
                    return self

                def __exit__(self, *error):
                    opened.close()

                def write(self, data):
                    written.append(len(data))
                    if len(written) > 1:
                        raise OSError(errno.ENOSPC, "No space left on device")
                    return real_write(data)

            return Full()
        return opened

    monkeypatch.setattr(builtins, "open", open_full)
    with pytest.raises(OSError, match="state-000000009.safetensors: .* of 0 MB could not be written .No space left"):
        write_states(tmp_path, 9)
    monkeypatch.undo()
    assert names(tmp_path) == ["state-000000005.safetensors"]
    assert newest_state(tmp_path) == state_path(tmp_path, 5)


def test_save_state_above_a_real_limit_keeps_the_last_one(tmp_path):
    resource = pytest.importorskip("resource")
    write_states(tmp_path, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="of 4 MB could not be written .File too large; free space: .* MB.; older"):
            save_state(tmp_path, 9, {"G": nn.Linear(1000, 1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["state-000000005.safetensors"]
    load_state(newest_state(tmp_path), {"counters": {}, "G": nn.Linear(2, 2)})


def test_remove_stale_temps_leaves_those_of_living_processes_and_other_files(tmp_path):
    kept = [
        f".state-000000001.{os.getppid()}-0123abcd.tmp.safetensors",  # a process that lives
        f".network-snapshot-000001.{DEAD_PID}-0123abcd.tmp.safetensors",
        f"state-000000001.{DEAD_PID}-0123abcd.tmp.safetensors",
    ]
    stale = [f".state-000000001.{pid}-0123abcd.tmp.safetensors" for pid in (DEAD_PID, os.getpid())]
    for name in kept + stale:
        (tmp_path / name).write_bytes(b"x")
    assert sorted(path.name for path in remove_stale_temps(tmp_path)) == sorted(stale)
    assert names(tmp_path) == sorted(kept)


def _save_for_ever(run_dir):
    """Write states until the process is killed; the tensors of a state all have its number."""
    net = nn.Module()
    for index in range(8):
        net.register_buffer(f"b{index}", torch.zeros(250_000))  # 8 MB together
    nimg = int(list_states(run_dir)[0].name[6:15]) if list_states(run_dir) else 0
    while True:
        nimg += 1
        for buffer in net.buffers():
            buffer.fill_(nimg)
        save_state(run_dir, nimg, {"G": net, "counters": {"nimg": nimg}})
        prune_states(run_dir, 2)


def _kill_while_saving(run_dir, seconds):
    pid = os.fork()
    if pid == 0:
        try:
            _save_for_ever(run_dir)
        finally:
            os._exit(1)  # never reached by a killed process
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system lacks")
@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_at_any_moment_leaves_a_whole_newest_state(tmp_path, kills):
    moments = random.Random(0)
    last, interrupted_saves = 0, 0
    for _ in range(kills):
        _kill_while_saving(tmp_path, moments.uniform(0.05, 0.3))
        interrupted_saves += any(name.startswith(".state-") for name in names(tmp_path))
        for path in list_states(tmp_path):
            check_tensor_file(path, KIND)  # a state of this name is whole, always
        path = newest_state(tmp_path)
        assert names(tmp_path) == sorted(path.name for path in list_states(tmp_path))  # temporary files are gone
        if path is None:
            continue
        net, counters = nn.Module(), {}
        for index in range(8):
            net.register_buffer(f"b{index}", torch.zeros(250_000))
        header = load_state(path, {"G": net, "counters": counters})
        assert all(bool((buffer == counters["nimg"]).all()) for buffer in net.buffers())
        assert header["cur_nimg"] == counters["nimg"] >= last
        last = counters["nimg"]
    assert interrupted_saves >= kills // 5 and last > kills  # the kills did hit saves, and saves did end


def test_state_file_is_read_by_the_safetensors_library(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    net = Net()
    path = save_state(tmp_path, 3, {"G": net}, {"a": 1})
    with safetensors.safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["header"])["header"] == {"a": 1}
        assert torch.equal(file.get_tensor("G/conv.weight"), net.conv.weight)
