"""Work shared between processes: those that torchrun starts, or `torch_utils.launch`.

A training process wraps its work in `session`. Then a rank that fails, dies or hangs ends all of them; see
`torch_utils.watchdog`.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from torch_utils.failures import PeerFailedError, give_way, is_clean_exit, is_lost_connection, report
from torch_utils.watchdog import Watchdog

T = TypeVar("T")

COLLECTIVE_TIMEOUT_S = 1800.0
PEER_TIMEOUT_S = 45.0
PEER_TIMEOUT_VARIABLE = "SPHEREHEAD_PEER_TIMEOUT"
_MAX_FLAT_BYTES = 2**28  # of parameters that travel together
_watchdog: Watchdog | None = None


# What the environment says --------------------------------------------------------------------------------------------


def _env_int(name: str, default: int | None, low: int, high: int, expected: str) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise ValueError(f"{name}: expected {expected}, came {text!r}")
    return int(text)


def world_size() -> int:
    """Return how many processes there are; 1 without torchrun.

    Raises:
        ValueError: the variable WORLD_SIZE is not a number above 0.
    """
    return _env_int("WORLD_SIZE", 1, 1, 10**6, "a number of processes, at least 1")


def rank() -> int:
    """Return the number of this process among all of them; 0 without torchrun.

    Raises:
        ValueError: the variable RANK is not a number below WORLD_SIZE.
    """
    ranks = world_size()
    return _env_int("RANK", 0, 0, ranks - 1, f"a number from 0 to WORLD_SIZE - 1 = {ranks - 1}")


def local_rank() -> int:
    """Return the number of this process among those on this machine; 0 without torchrun.

    Raises:
        ValueError: the variable LOCAL_RANK is not a number below WORLD_SIZE.
    """
    ranks = world_size()
    return _env_int("LOCAL_RANK", 0, 0, ranks - 1, f"a number from 0 to WORLD_SIZE - 1 = {ranks - 1}")


def is_main() -> bool:
    """Return whether this process has rank 0, which writes files and prints."""
    return rank() == 0


def is_worker() -> bool:
    """Return whether torchrun or `torch_utils.launch` started this process."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def shard(items: Sequence[T]) -> list[T]:
    """Return this process's share: every `world_size`-th item from the `rank`-th on."""
    return list(items[rank() :: world_size()])


def resolve_device(name: str) -> torch.device:
    """Return the device of a `--device` option.

    Args:
        name: 'auto' (a GPU if there is one, else the CPU), 'cpu', 'cuda' or 'cuda:N'. Under torchrun 'auto' and 'cuda'
            are the GPU of the local rank.

    Raises:
        ValueError: the device is not there, or the variable LOCAL_RANK is malformed.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {name!r}")
    return device


def _rendezvous_address() -> tuple[str, int]:
    host = os.environ.get("MASTER_ADDR", "").strip()
    if not host:
        raise ValueError(f"MASTER_ADDR: expected the host of rank 0, came {os.environ.get('MASTER_ADDR')!r}")
    return host, _env_int("MASTER_PORT", None, 1, 65535, "a port from 1 to 65535")


def _peer_timeout_s(default: float) -> float:
    text = os.environ.get(PEER_TIMEOUT_VARIABLE) or str(default)
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1e6:
            return float(text)
    raise ValueError(f"{PEER_TIMEOUT_VARIABLE}: expected seconds, or 0 for no supervision; came {text!r}")


# The process group ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def session(
    device: torch.device | str, *, timeout_s: float = COLLECTIVE_TIMEOUT_S, peer_timeout_s: float = PEER_TIMEOUT_S
) -> Iterator[None]:
    """Join the other ranks for the time of a `with` block; arguments and errors as for `init`.

    Where the body raises, the other ranks are told, and end with this rank's error. Where it raises because another
    rank has failed, that rank's error takes the place of the broken connection.

    Raises:
        PeerFailedError: another rank failed.
    """
    try:
        init(device, timeout_s=timeout_s, peer_timeout_s=peer_timeout_s)
        ending = None
        try:
            yield
        except BaseException as error:
            if not is_clean_exit(error):
                raise
            ending = error
        shutdown()
    except BaseException as error:
        cause = _leave_after(error)
        if cause is not None:
            raise cause from error
        raise
    if ending is not None:
        raise ending


def init(
    device: torch.device | str, *, timeout_s: float = COLLECTIVE_TIMEOUT_S, peer_timeout_s: float = PEER_TIMEOUT_S
) -> None:
    """Join the other ranks, with NCCL on CUDA and Gloo on the CPU; one process alone needs nothing.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them. `shutdown` is the end of it;
    `session` does both. A process that ends without `shutdown` counts as failed.

    Args:
        device: that of this rank; as from `resolve_device`.
        timeout_s: for how long a rank waits in a collective for others that work, such as rank 0 while it draws images.
        peer_timeout_s: for how long a rank may give no sign of life, or hang, before all end; 0 is for ever. The
            variable SPHEREHEAD_PEER_TIMEOUT takes precedence.

    Raises:
        ValueError: a variable is malformed; the message names it.
        RuntimeError: called twice.
        torch.distributed.DistError: the other ranks were not there in time.
    """
    global _watchdog
    peer_timeout_s, ranks, device = _peer_timeout_s(peer_timeout_s), world_size(), torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks == 1:
        return
    if dist.is_initialized():
        raise RuntimeError("process group: expected none yet, came a second call of init")
    timeout = datetime.timedelta(seconds=timeout_s)
    host, port = _rendezvous_address()
    store = _connect(host, port, timeout)
    if peer_timeout_s > 0:
        _watchdog = Watchdog(host, port, rank(), ranks, device.type, peer_timeout_s)
        _watchdog.start()
    atexit.register(_at_exit)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank(),
        world_size=ranks,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    if _watchdog is not None:
        _watchdog.note_joined()


def _connect(host: str, port: int, timeout: datetime.timedelta) -> dist.Store:
    """Return the store through which ranks find each other; rank 0 hosts it unless a launcher does."""
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listening = os.environ.get("SPHEREHEAD_STORE_FD") if rank() == 0 else None  # a socket of torch_utils.launch
    store = dist.TCPStore(
        host,
        port,
        None if hosted else world_size(),
        rank() == 0 and not hosted,
        timeout=timeout,
        wait_for_workers=False,
        **({"master_listen_fd": int(listening)} if listening else {}),
    )
    return dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def shutdown() -> None:
    """Wait until all ranks have come here, and leave the process group; nothing without one."""
    global _watchdog
    if dist.is_initialized():
        barrier()
        if _watchdog is not None:
            _watchdog.halt()
        barrier()  # rank 0 may host what the watchdogs of others still read
        _watchdog = None
        dist.destroy_process_group()
    atexit.unregister(_at_exit)


def _leave_after(error: BaseException) -> BaseException | None:
    """Tell the other ranks about an error; return the one of another rank if that is the cause."""
    global _watchdog
    watchdog, _watchdog = _watchdog, None
    atexit.unregister(_at_exit)
    cause = None
    if is_lost_connection(error) and watchdog is not None:
        verdict = watchdog.wait_for_verdict()
        cause = PeerFailedError(verdict) if verdict else None
    if world_size() > 1:
        report(cause or error, rank(), is_secondary=cause is not None or is_lost_connection(error))
    if watchdog is not None:
        watchdog.fail(error)
    if cause is not None:
        give_way()
    return cause


def _at_exit() -> None:
    if _watchdog is not None:
        _watchdog.fail(None)


@contextlib.contextmanager
def long_task(name: str) -> Iterator[None]:
    """Tell the other ranks that this one will be busy, and perhaps silent, with something that is not a fault.

    For work of one rank while others wait, such as writing to slow storage; it may take as long as a collective. Work
    that computes needs no such notice.
    """
    if _watchdog is None:
        yield
        return
    with _watchdog.long_task(name):
        yield


# Collectives ----------------------------------------------------------------------------------------------------------


def is_active() -> bool:
    """Return whether there is a process group of several ranks.

    Raises:
        RuntimeError: there are several processes, but none has called `init`.
    """
    if dist.is_available() and dist.is_initialized():
        return True
    if world_size() > 1:
        raise RuntimeError(f"process group: expected one of {world_size()} ranks, came none; call init first")
    return False


def note_progress() -> None:
    """Say that this rank gets on; needed only in loops that always spend nearly all of their time at one place."""
    if _watchdog is not None:
        _watchdog.note_progress()


def barrier() -> None:
    """Wait for all ranks."""
    if is_active():
        dist.barrier()


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean of a floating-point tensor over all ranks, which is the same on all of them."""
    if not is_active():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def broadcast_object(value: T, src: int = 0) -> T:
    """Return the object that rank `src` has; it is pickled on the way, so ranks must trust each other."""
    if not is_active():
        return value
    values = [value]
    dist.broadcast_object_list(values, src)
    return values[0]


@torch.no_grad()
def broadcast_module(module: torch.nn.Module, src: int = 0) -> None:
    """Give all parameters and buffers of a module the values that they have on rank `src`.

    They travel flattened, one tensor for each dtype and 256 MiB. Modules must be alike in names, shapes and dtypes.
    """
    if not is_active():
        return
    for _, tensors in _buckets(_tensors_of(module)):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        dist.broadcast(flat, src)
        for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(values.view_as(tensor))


@torch.no_grad()
def check_same_across_ranks(module: torch.nn.Module, names: Sequence[str] | None = None) -> None:
    """Compare parameters and buffers with those of rank 0, bit by bit.

    Args:
        module: the same on all ranks.
        names: which of its parameters and buffers; None is all.

    Raises:
        ValueError: a name that the module does not have.
        RuntimeError: on all ranks, if a tensor differs on any of them; the message names the first such tensors.
    """
    tensors = _tensors_of(module)
    unknown = [name for name in names or () if name not in tensors]
    if unknown:
        raise ValueError(f"names: expected parameters or buffers, came {unknown[0]!r}")
    if names is not None:
        tensors = {name: tensors[name] for name in names}
    if not is_active() or not tensors:
        return
    largest = {}
    for bucket, members in _buckets(tensors):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in members])
        first = flat.clone()
        dist.broadcast(first, 0)
        sizes = [tensor.numel() for tensor in members]
        pairs = zip(bucket, flat.split(sizes), first.split(sizes))
        largest |= {name: _difference(mine, theirs) for name, mine, theirs in pairs}
    differences = torch.stack(list(largest.values()))
    dist.all_reduce(differences, dist.ReduceOp.MAX)
    wrong = [f"{name} by {value:.3g}" for name, value in zip(largest, differences.tolist()) if value > 0]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RuntimeError(
            f"ranks: expected the same values everywhere, but rank 0 differs in {', '.join(wrong[:3])}{more}"
        )


def _tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in named.items() if tensor.numel() > 0}


def _buckets(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
    """Yield names and tensors of one dtype and device that fit into one flat tensor."""
    groups: dict[tuple, list[list[str]]] = {}
    used: dict[tuple, int] = {}
    for name, tensor in tensors.items():
        key, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        if key not in groups or used[key] + size > _MAX_FLAT_BYTES:
            groups.setdefault(key, []).append([])
            used[key] = 0
        groups[key][-1].append(name)
        used[key] += size
    for names in (names for buckets in groups.values() for names in buckets):
        yield names, [tensors[name] for name in names]


def _difference(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return the largest difference as float64 scalar: 0 only where all bits are the same, infinity at a NaN."""
    same_bits = torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    if same_bits:
        return mine.new_zeros((), dtype=torch.float64)
    gap = (mine.double() - theirs.double()).abs().max()
    tiny = torch.finfo(torch.float64).tiny  # such as between 0 and -0
    return torch.nan_to_num(gap, nan=float("inf"), posinf=float("inf")).clamp(min=tiny)
