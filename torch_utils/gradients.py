"""Average gradients over processes, and leave out steps whose gradients are not finite, without waiting for a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.distributed as dist

from torch_utils import distributed

_ALIGNMENT = 32  # elements; kernels read vectors of up to 16 bytes, and 128 bytes make one memory transaction
_agreed: set[tuple[int, tuple[bool, ...]]] = set()  # who has gradients, where all ranks were seen to agree


def average_gradients(
    parameters: Iterable[torch.Tensor] | Mapping[str, torch.Tensor],
    *,
    reduction: Literal["mean", "sum"] = "mean",
) -> torch.Tensor:
    """Reduce gradients over all ranks with a single all-reduce, and tell whether all of them are finite.

    Gradients are copied into one flat tensor and reduced; `grad` of every parameter becomes a view of it, with the
    strides of the parameter. A parameter without a gradient on any rank keeps None. One process copies nothing.

    All ranks must have gradients for the same parameters; how many ranks have each travels in the same flat tensor.
    With gradients for another set of parameters than ever before, a rank looks at those numbers and raises where they
    differ. Later, on a GPU, a difference makes the result 0 instead: looking would wait for the GPU.

    Args:
        parameters: the same on all ranks, in the same order, of one dtype and on one device; with names, errors tell
            them.
        reduction: `mean` divides the sum over ranks by their number. `sum` does not: for losses that each rank has
            weighted by its share of the global batch already.

    Returns:
        Float32 scalar on the device of the parameters, the same on all ranks: 1 where all gradients are finite, else
        0. See `step_if_finite`.

    Raises:
        ValueError: no parameters, several dtypes or devices, or a gradient that only some ranks have.

    Differs from the published code, which replaces NaN by 0 and infinities by 1e5 or -1e5, and takes the step.
    """
    named = dict(parameters if isinstance(parameters, Mapping) else enumerate(parameters))
    params = list(named.values())
    _check_alike(params)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected mean or sum, came {reduction!r}")
    if not distributed.is_active():
        return _all_finite([param.grad for param in params if param.grad is not None], params[0].device)
    distributed.note_progress()
    present = tuple(param.grad is not None for param in params)
    flat, views, counts = _flatten(params)
    dist.all_reduce(flat)
    ranks = distributed.world_size()
    same = ((counts == 0) | (counts == ranks)).all()
    _require_agreement(named, present, counts, same)
    if reduction == "mean":
        flat.mul_(1 / ranks)
    for param, view in zip(params, views):
        if param.grad is not None:
            param.grad = view
    return _all_finite([flat], flat.device) * same


def step_if_finite(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
    """Take an optimiser step, or none where `finite` is 0, without the host knowing which.

    A step that is not taken leaves parameters, moments and step counters as they are, bit for bit. Moments that do not
    exist yet are made, as zeros.

    Args:
        optimizer: `torch.optim.Adam` or `AdamW` with `fused=True`.
        finite: scalar as from `average_gradients`.

    Raises:
        ValueError: an optimiser that cannot leave a step out.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise ValueError(f"optimizer: expected one with fused=True, came {type(optimizer).__name__} without")
    # Through these attributes torch.amp.GradScaler tells fused optimisers what it found.
    optimizer.grad_scale, optimizer.found_inf = None, (1 - finite).float().reshape(())
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def _check_alike(params: list[torch.Tensor]) -> None:
    kinds = {(param.dtype, param.device) for param in params}
    if len(kinds) != 1:
        came = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none"
        raise ValueError(f"parameters: expected some of one dtype and on one device, came {came}")


def _flatten(params: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Return a flat copy of all gradients (0 where there is none) and of whether there is one; and views of it.

    Returns:
        flat: 1-D.
        views: of `flat`, one like each parameter.
        counts: view of `flat`, one number for each parameter: 1 if it has a gradient, else 0.
    """
    sizes = (-(-param.numel() // _ALIGNMENT) * _ALIGNMENT for param in params)
    *starts, total = itertools.accumulate(sizes, initial=0)
    flat = torch.zeros(total + len(params), dtype=params[0].dtype, device=params[0].device)
    views = [_view_like(flat, start, param) for start, param in zip(starts, params)]
    filled = [(view, param.grad) for view, param in zip(views, params) if param.grad is not None]
    if filled:
        torch._foreach_copy_([view for view, _ in filled], [grad for _, grad in filled])
    counts = flat[total:]
    present = torch.tensor([param.grad is not None for param in params], dtype=flat.dtype)
    counts.copy_(present.pin_memory() if flat.is_cuda else present, non_blocking=True)
    return flat, views, counts


def _view_like(flat: torch.Tensor, start: int, param: torch.Tensor) -> torch.Tensor:
    """Return a view of `flat` from `start` on, with the shape of a parameter, and its strides if it is dense."""
    is_dense = param.is_contiguous() or (param.ndim == 4 and param.is_contiguous(memory_format=torch.channels_last))
    if is_dense:  # fused optimisers require the same strides
        return flat.as_strided(param.shape, param.stride(), start)
    return flat[start : start + param.numel()].view(param.shape)


def _require_agreement(
    named: Mapping[str | int, torch.Tensor], present: tuple[bool, ...], counts: torch.Tensor, same: torch.Tensor
) -> None:
    """Raise where some ranks lack a gradient, if it can be known without waiting or has not been looked at before."""
    key = (id(next(iter(named.values()))), present)
    if key in _agreed and counts.is_cuda:
        return
    if not bool(same):
        ranks = distributed.world_size()
        partly = [f"{name} on {count:.0f}" for name, count in zip(named, counts.tolist()) if count not in (0, ranks)]
        more = f" and {len(partly) - 3} more" if len(partly) > 3 else ""
        raise ValueError(f"gradients: expected on all or none of {ranks} ranks, came {', '.join(partly[:3])}{more}")
    _agreed.add(key)


def _all_finite(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return 1.0 or 0.0 as a scalar: whether all elements are finite."""
    if not tensors:
        return torch.ones((), device=device)
    largest = torch._foreach_norm(tensors, float("inf"))  # passes NaN on, and cannot overflow as a sum could
    return torch.stack(largest).isfinite().all().float()
