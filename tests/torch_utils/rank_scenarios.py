"""What a rank does in the tests of processes that work together; run as a script with the name of a scenario."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from torch_utils import distributed, gradients
from torch_utils.preemption import SignalWatch


def make_model(seed: int) -> torch.nn.Module:
    """Return a model with a channels-last convolution, a linear layer, a buffer, and a parameter that nothing uses."""
    torch.manual_seed(seed)
    conv = torch.nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)
    model = torch.nn.Sequential(conv, torch.nn.Flatten(), torch.nn.Linear(4 * 16, 1))
    model.register_buffer("count", torch.full((2,), seed))
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    return model


def data() -> torch.Tensor:
    """Return the global batch `[4, 2, 4, 4]`."""
    return torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(7))


def train(model: torch.nn.Module, batch: torch.Tensor, steps: int = 3, poisoned: int | None = None) -> dict:
    """Train on this rank's share of the batch; return what is to be compared.

    Args:
        poisoned: step in which rank 1 has a gradient that is not finite.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.0, 0.99), fused=True)
    flags = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        model(batch).square().mean().backward()
        if step == poisoned and distributed.rank() == 1:
            model[0].weight.grad[0, 0, 0, 0] = float("nan")
        finite = gradients.average_gradients(dict(model.named_parameters()))
        gradients.step_if_finite(optimizer, finite)
        flags.append(finite.item())
    values = {name: value.tolist() for name, value in model.state_dict().items()}
    strides = all(param.grad is None or param.grad.stride() == param.stride() for param in model.parameters())
    return {
        **{"values": values, "flags": flags, "unused": model.unused.grad, "strides": strides},
        "steps": optimizer.state[model[0].weight]["step"].item(),
    }


def cooperate(out: Path) -> None:
    """Use every collective, and write what came of it; in between be slow and silent, which must do no harm.

    At last wait until one of them is asked to stop by a signal.
    """
    rank, result = distributed.rank(), {}
    result["mean"] = distributed.all_reduce_mean(torch.tensor([1.0, rank])).tolist()
    result["object"] = distributed.broadcast_object({"run": Path("runs/00001")} if rank == 0 else None)["run"].name
    model = make_model(seed=rank)
    with_error(result, "differ", lambda: distributed.check_same_across_ranks(model))
    with_error(result, "same part", lambda: distributed.check_same_across_ranks(model, ["unused"]))
    distributed.broadcast_module(model, src=1)
    with_error(result, "same", lambda: distributed.check_same_across_ranks(model))
    result |= train(model, data()[rank::2], poisoned=None)
    result["poisoned"] = train(model, data()[rank::2], poisoned=1)
    if rank == 1:
        busy_until = time.monotonic() + 3
        while time.monotonic() < busy_until:
            data().sum()
        with distributed.long_task("a write that holds the interpreter's lock"):
            ctypes.PyDLL(None).sleep(3)
    distributed.barrier()
    model.unused.grad = torch.ones(3) if rank == 1 else None
    with_error(result, "one-sided", lambda: gradients.average_gradients(dict(model.named_parameters())))
    with SignalWatch() as watch:
        if rank == 1:
            (out / "pid").write_text(str(os.getpid()))
        (out / f"rank{rank}.json").write_text(json.dumps(result))
        while not watch.any_rank_requested():
            time.sleep(0.05)


def with_error(result: dict, key: str, action) -> None:
    """Note the error that an action raises, or None."""
    try:
        action()
        result[key] = None
    except (RuntimeError, ValueError) as error:
        result[key] = f"{type(error).__name__}: {error}"


def fail(out: Path) -> None:
    """Rank 1 raises while rank 0 waits for it."""
    if distributed.rank() == 1:
        time.sleep(0.5)
        raise ValueError("the image a.png is broken")
    distributed.barrier()


def hang(out: Path) -> None:
    """Rank 1 sleeps while rank 0 waits for it."""
    if distributed.rank() == 1:
        time.sleep(1000)
    distributed.barrier()


def vanish(out: Path) -> None:
    """Rank 1 is killed while rank 0 waits for it."""
    if distributed.rank() == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def freeze(out: Path) -> None:
    """Rank 1 is stopped, so that its connections stay open, while rank 0 waits for it."""
    if distributed.rank() == 1:
        (out / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    distributed.barrier()


def leave_early(out: Path) -> None:
    """Rank 1 ends with status 0 although rank 0 goes on; without `session`, which would wait."""
    if distributed.rank() == 1:
        sys.exit(0)
    distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenario = globals()[sys.argv[1]]
    if scenario is leave_early:
        distributed.init("cpu")
        scenario(Path(sys.argv[2]))
    else:
        with distributed.session("cpu"):
            scenario(Path(sys.argv[2]))
