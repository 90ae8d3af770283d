"""Processes share work without overlap, and devices that are not there are errors."""

import pytest
import torch

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
