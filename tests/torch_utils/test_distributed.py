"""Processes share work without overlap and agree; devices that are not there and malformed variables are errors."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import Torchrun, wait_for
from tests.torch_utils.rank_scenarios import data, make_model, train
from torch_utils import distributed


@pytest.fixture
def ranks(monkeypatch):
    """Return a function that sets what torchrun tells a process."""

    def be(rank, world_size, local_rank=None):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("LOCAL_RANK", str(rank if local_rank is None else local_rank))

    return be


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_one_process_has_all():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.shard([3, 1, 2]) == [3, 1, 2]


@pytest.mark.parametrize("num_items", [0, 1, 5, 6])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shard_every_item_goes_to_one_process_evenly_and_in_order(ranks, num_items, world_size):
    shares = []
    for rank in range(world_size):
        ranks(rank, world_size)
        shares.append(distributed.shard(range(num_items)))
    assert sorted(item for share in shares for item in share) == list(range(num_items))
    assert all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_resolve_device_auto_is_the_cpu_without_a_gpu(no_gpu):
    assert distributed.resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_resolve_device_is_the_gpu_of_the_local_rank(two_gpus, ranks, name):
    assert distributed.resolve_device(name) == torch.device("cuda:0")
    ranks(5, 8, local_rank=1)
    assert distributed.resolve_device(name) == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["cpu", "cuda:0", "cuda:1"])
def test_resolve_device_named_one_is_taken_whatever_the_rank(two_gpus, ranks, name):
    ranks(1, 2)
    assert distributed.resolve_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_resolve_device_without_a_gpu_raises_and_names_it(no_gpu, name):
    with pytest.raises(ValueError, match="device: expected one of 0 CUDA devices, got 'cuda:"):
        distributed.resolve_device(name)


def test_resolve_device_beyond_the_last_gpu_raises(two_gpus, ranks):
    with pytest.raises(ValueError, match="device: expected one of 2 CUDA devices, got 'cuda:2'"):
        distributed.resolve_device("cuda:2")
    ranks(2, 3)
    with pytest.raises(ValueError, match="got 'cuda:2'"):
        distributed.resolve_device("auto")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_resolve_device_that_is_no_device_raises_and_lists_the_known(name):
    with pytest.raises(ValueError, match="device: expected auto, cpu, cuda or cuda:N, got"):
        distributed.resolve_device(name)


# What the environment says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, function, expected",
    [
        (
            "WORLD_SIZE",
            "two",
            distributed.world_size,
            "WORLD_SIZE: expected a number of processes, at least 1, came 'two'",
        ),
        ("WORLD_SIZE", "0", distributed.world_size, "at least 1, came '0'"),
        ("WORLD_SIZE", "", distributed.is_main, "WORLD_SIZE: .* came ''"),
        ("RANK", "2", distributed.rank, r"RANK: expected a number from 0 to WORLD_SIZE - 1 = 1, came '2'"),
        ("RANK", "-1", distributed.is_main, "RANK: .* came '-1'"),
        ("RANK", "1.0", distributed.rank, "RANK: .* came '1.0'"),
        ("RANK", "٣", distributed.rank, "RANK: .* came '٣'"),
        ("LOCAL_RANK", "x", distributed.local_rank, "LOCAL_RANK: .* came 'x'"),
        ("LOCAL_RANK", "9" * 5000, distributed.local_rank, "LOCAL_RANK: .* came '999"),
        (
            "MASTER_PORT",
            "http",
            lambda: distributed.init("cpu"),
            "MASTER_PORT: expected a port from 1 to 65535, came 'http'",
        ),
        ("MASTER_PORT", "70000", lambda: distributed.init("cpu"), "MASTER_PORT: .* came '70000'"),
        ("MASTER_ADDR", " ", lambda: distributed.init("cpu"), "MASTER_ADDR: expected the host of rank 0, came ' '"),
        ("SPHEREHEAD_PEER_TIMEOUT", "-1", lambda: distributed.init("cpu"), "SPHEREHEAD_PEER_TIMEOUT: .* came '-1'"),
        ("SPHEREHEAD_PEER_TIMEOUT", "nan", lambda: distributed.init("cpu"), "SPHEREHEAD_PEER_TIMEOUT: .* came 'nan'"),
    ],
)
def test_malformed_variable_raises_and_is_named(ranks, monkeypatch, name, value, function, expected):
    ranks(1, 2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=expected):
        function()


def test_init_without_a_port_raises_and_names_it(ranks, monkeypatch):
    ranks(0, 2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ValueError, match="MASTER_PORT: expected a port from 1 to 65535, came ''"):
        distributed.init("cpu")


def test_is_worker_is_whether_a_launcher_started_this_process(ranks):
    assert not distributed.is_worker()
    ranks(0, 2)
    assert distributed.is_worker()


# One process ----------------------------------------------------------------------------------------------------------


def test_session_of_one_process_needs_nothing():
    model, tensor = make_model(seed=0), torch.ones(2)
    with distributed.session("cpu"):
        assert not distributed.is_active()
        assert distributed.all_reduce_mean(tensor) is tensor
        assert distributed.broadcast_object("a") == "a"
        distributed.broadcast_module(model)
        distributed.check_same_across_ranks(model)
        distributed.barrier()
        with distributed.long_task("saving"):
            pass


@pytest.mark.parametrize("error", [ValueError("a"), SystemExit(0), SystemExit(3), KeyboardInterrupt()])
def test_session_of_one_process_passes_errors_on(error):
    with pytest.raises(type(error)) as raised, distributed.session("cpu"):
        raise error
    assert raised.value is error


def test_collective_before_init_raises(ranks):
    ranks(0, 2)
    with pytest.raises(RuntimeError, match="expected one of 2 ranks, came none; call init first"):
        distributed.barrier()


# Two processes under torchrun -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """Return what two ranks found that torchrun started, and that SIGUSR1 to one of them ended."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {"SPHEREHEAD_PEER_TIMEOUT": "2", "OMP_NUM_THREADS": "1"}
    one = Torchrun([str(Path(__file__).with_name("rank_scenarios.py")), "cooperate", str(folder)], environment)
    try:
        files = [folder / f"rank{rank}.json" for rank in (0, 1)]
        wait_for(lambda: all(file.exists() for file in files), one)
        os.kill(int((folder / "pid").read_text()), signal.SIGUSR1)
        outcome = one.finish()
    finally:
        one.kill()
    assert outcome.status == 0, outcome
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def alone() -> list[dict]:
    """Return what one process finds with the whole batch: after three steps, and after two more."""
    model = make_model(seed=1)
    return [train(model, data(), steps=steps) for steps in (3, 2)]


def assert_close_to(result: dict, expected: dict) -> None:
    for name, value in expected["values"].items():
        # Sums over the batch in another order; Adam divides by the gradients' size, which amplifies small ones.
        torch.testing.assert_close(torch.tensor(result["values"][name]), torch.tensor(value), rtol=1e-4, atol=1e-5)


def test_collectives_agree(results):
    assert [result["mean"] for result in results] == [[1.0, 0.5]] * 2
    assert [result["object"] for result in results] == ["00001"] * 2


def test_two_ranks_end_with_the_same_bits(results):
    assert results[0] == results[1]


def test_check_same_across_ranks_tells_names_until_broadcast(results):
    assert results[0]["differ"].startswith(
        "RuntimeError: ranks: expected the same values everywhere, but rank 0 differs"
    )
    assert "0.weight by " in results[0]["differ"] and "and 2 more" in results[0]["differ"]
    assert results[0]["same part"] is None
    assert results[0]["same"] is None


def test_broadcast_module_and_average_gradients_equal_one_process(results, alone):
    assert_close_to(results[0], alone[0])
    assert results[0]["flags"] == alone[0]["flags"] == [1, 1, 1]
    assert results[0]["steps"] == alone[0]["steps"] == 3


def test_average_gradients_keeps_none_and_strides(results):
    assert results[0]["unused"] is None
    assert results[0]["strides"]


def test_gradient_that_is_not_finite_on_one_rank_leaves_the_step_out_on_all(results, alone):
    poisoned = results[0]["poisoned"]
    assert (poisoned["flags"], poisoned["steps"]) == ([1, 0, 1], 2)
    assert_close_to(poisoned, alone[1])


def test_average_gradients_that_only_one_rank_has_raises_on_all(results):
    expected = "ValueError: gradients: expected on all or none of 2 ranks, came unused on 1"
    assert [result["one-sided"] for result in results] == [expected] * 2
