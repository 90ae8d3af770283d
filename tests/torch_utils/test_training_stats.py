"""Statistics are those of all values together, whatever batches and processes they came in."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from torch_utils.training_stats import Collector, Stat

TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
from torch_utils.training_stats import Collector

torch.set_num_threads(1)
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
collector = Collector()
assert collector.reduce() == {}
collector.add("both", torch.tensor([1.0, 2.0]) if rank == 0 else torch.tensor([6.0]))
collector.add("only one" if rank == 0 else "other", 4.0 + rank)
if rank == 1:
    collector.add("both", float("inf"))
    collector.add("b first on rank 1", 0.0)

state = collector.state_dict()
collector.gather_to_main()
assert (len(collector.state_dict()["names"]) == 0) == (rank == 1)
again = Collector()
again.load_state_dict(collector.state_dict() if rank == 0 else state)  # processes other than 0 begin empty
stats = again.reduce()
again.load_state_dict(state)
one = again.reduce()
collector.add("later", float(rank))
collector.reduce()
print({name: (s.num, s.mean, s.nonfinite) for name, s in stats.items()}, one["both"].num)
dist.destroy_process_group()  # or threads of the group may still run when Python ends, which aborts it
"""


def test_reduce_over_batches_is_the_mean_and_population_std_of_all_values():
    collector, values = Collector(), np.random.RandomState(0).randn(3, 4, 5)
    for batch in values:
        collector.add("a", torch.from_numpy(batch))
    stat = collector.reduce()["a"]
    assert (stat.num, stat.nonfinite) == (60, 0)
    assert stat.mean == pytest.approx(values.mean(), rel=1e-12)  # float64 sums in another order
    assert stat.std == pytest.approx(values.std(), rel=1e-12)


def test_reduce_of_float32_values_far_from_zero_keeps_the_deviation():
    collector = Collector()
    for _ in range(100):
        collector.add("a", torch.tensor([4000.0, 4000.5]))
    # The square of 4000 has 24 bits; sums in float32 would lose the deviation altogether.
    assert collector.reduce()["a"] == Stat(200, 4000.25, 0.25)


@pytest.mark.parametrize("values", [3, 2.5, torch.tensor(2.5), torch.tensor([True, False]), torch.arange(3)])
def test_add_takes_numbers_and_tensors_of_any_real_dtype(values):
    collector = Collector()
    collector.add("a", values)
    expected = torch.as_tensor(values).double()
    assert collector.reduce()["a"] == Stat(expected.numel(), float(expected.mean()), float(expected.std(correction=0)))


def test_add_tensor_that_requires_gradients_keeps_no_graph():
    collector, value = Collector(), torch.ones(2, requires_grad=True)
    collector.add("a", value * 2)
    assert not collector.state_dict()["moments"].requires_grad


def test_add_non_finite_values_are_counted_apart():
    collector = Collector()
    collector.add("some", torch.tensor([1.0, math.nan, 3.0, math.inf]))
    collector.add("none", -math.inf)
    stats = collector.reduce()
    assert stats["some"] == Stat(2, 2.0, 1.0, nonfinite=2)
    assert (stats["none"].num, stats["none"].nonfinite) == (0, 1) and math.isnan(stats["none"].mean)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_add_with_a_mask_counts_only_what_is_in_it(dtype):
    collector, values = Collector(), torch.tensor([[1.0, math.nan], [math.inf, 4.0], [7.0, 100.0]])
    collector.add("a", values, mask=torch.tensor([[1, 0], [1, 1], [1, 0]], dtype=dtype))
    assert collector.reduce()["a"] == Stat(3, 4.0, math.sqrt(6.0), nonfinite=1)


def test_reduce_begins_anew_and_drops_names_without_values():
    collector = Collector()
    collector.add("a", 1.0)
    collector.add("empty", torch.zeros(0))
    assert list(collector.reduce()) == ["a"]
    collector.add("b", 2.0)
    assert list(collector.reduce()) == ["b"]
    assert collector.reduce() == {}


def test_stat_of_a_number_is_what_a_collector_reduces_it_to():
    for value in (2.5, math.nan):
        collector = Collector()
        collector.add("a", value)
        assert str(collector.reduce()["a"]) == str(Stat.of(value))  # as text: NaN is not equal to itself


def test_state_dict_round_trip_goes_on_with_the_same_bits():
    values = torch.randn(6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    straight, first, second = Collector(), Collector(), Collector()
    for i, batch in enumerate(values):
        straight.add("a", batch)
        if i < 3:
            first.add("a", batch)
    state = first.state_dict()
    second.load_state_dict(state)
    first.add("a", 1e9)  # what was saved does not change any more
    for batch in values[3:]:
        second.add("a", batch)
    assert second.reduce() == straight.reduce()


def test_load_state_dict_of_another_shape_raises():
    with pytest.raises(ValueError, match=r"expected float64 \[2, 4\] for 2 names, got torch.float64 \[1, 4\]"):
        Collector().load_state_dict({"names": ["a", "b"], "moments": torch.zeros(1, 4, dtype=torch.float64)})


def test_two_processes_with_different_names_get_the_statistics_of_all_values(tmp_path, repo_root):
    command = [sys.executable, "-c", TWO_PROCESSES]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], cwd=repo_root, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    expected = {
        "b first on rank 1": (1, 0.0, 0),
        "both": (3, 3.0, 1),
        "only one": (1, 4.0, 0),
        "other": (1, 5.0, 0),
    }
    assert outputs == [f"{expected} 2\n"] * 2


@pytest.mark.gpu
def test_add_never_waits_for_the_gpu():
    collector, values = Collector("cuda"), torch.ones(4, device="cuda")
    collector.add("warm-up", values)
    torch.cuda.set_sync_debug_mode("error")
    try:
        collector.add("a", values * 2, mask=values)
        collector.add("a", 5.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert collector.reduce()["a"] == Stat(5, 2.6, pytest.approx(1.2))
