"""The split of a batch into chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.batch_plan import BatchPlan


def groups_seen(plan: BatchPlan) -> set[tuple[int, ...]]:
    """Return which positions a minibatch-std layer would put together, over the chunks of one process."""
    seen = set()
    for chunk in plan.chunks:
        strided = plan.positions(chunk).reshape(plan.group_size, plan.num_groups)  # the layer's reshape
        seen |= {tuple(strided[:, group]) for group in range(plan.num_groups)}
    return seen


@pytest.mark.parametrize(("batch_gpu", "world_size"), [(16, 1), (8, 1), (4, 1), (8, 2), (4, 2), (4, 4)])
def test_batch_plan_any_split_has_the_same_groups(batch_gpu, world_size):
    plans = [
        BatchPlan(batch_size=16, batch_gpu=batch_gpu, group_size=4, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    expected = {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)}
    assert set().union(*map(groups_seen, plans)) == expected
    positions = np.concatenate([plan.positions(chunk) for plan in plans for chunk in plan.chunks])
    assert sorted(positions) == list(range(16))


def test_batch_plan_roll_by_the_number_of_groups_stays_within_groups():
    plan = BatchPlan(batch_size=8, batch_gpu=8, group_size=4)
    positions = torch.from_numpy(plan.positions(0))
    rolled = positions.roll(plan.num_groups, 0)
    assert (rolled // 4).equal(positions // 4)
    assert ((positions - rolled) % 4).eq(1).all()


def test_batch_plan_chunks_go_round_the_processes():
    plans = [BatchPlan(batch_size=16, batch_gpu=4, group_size=4, rank=rank, world_size=2) for rank in range(2)]
    assert [plan.chunks for plan in plans] == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"batch_size": 12, "batch_gpu": 8},
            r"batch size: expected a multiple of processes x batch_gpu = 1 x 8, got 12",
        ),
        ({"batch_size": 8, "batch_gpu": 2}, r"batch_gpu: expected a multiple of the minibatch-std group size 4, got 2"),
        ({"batch_size": 8, "batch_gpu": 4, "world_size": 3}, r"3 x 4, got 8"),
        ({"batch_size": 8, "batch_gpu": 4, "rank": 2, "world_size": 2}, r"rank: expected below 2, got 2"),
    ],
)
def test_batch_plan_impossible_split_raises_value_error(fields, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan(**{"group_size": 4, **fields})
