"""Moving average of a network's weights."""

from __future__ import annotations

import torch
from torch import nn


def ema_beta(batch_size: int, cur_nimg: int, ema_kimg: float, rampup: float | None = None) -> float:
    """Return how much of the average stays in one step.

    ``beta = 0.5^(batch_size / half_life)`` with the half-life ``1000 ema_kimg``, at most ``rampup * cur_nimg``
    (Karras et al. 2020, StyleGAN2-ADA).

    Args:
        batch_size: images of a step, over all processes.
        cur_nimg: images before the step.
        ema_kimg: half-life in thousand images; 0 makes the average equal to the weights.
        rampup: longest half-life as a share of the images so far; None does not limit it.

    Returns:
        a number from 0 (the average becomes the weights) to below 1.
    """
    half_life_nimg = ema_kimg * 1000
    if rampup is not None:
        half_life_nimg = min(half_life_nimg, cur_nimg * rampup)
    return 0.5 ** (batch_size / max(half_life_nimg, 1e-8))


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, beta: float) -> None:
    """Move an average towards a network: ``average = network + beta (average - network)``; buffers are copied.

    Args:
        average: the average (G_ema), in place.
        network: a module of the same structure (G).
        beta: see `ema_beta`.

    Raises:
        ValueError: the parameters or buffers have other names.

    Differs from the published code: tensors are matched by name instead of by position, and no settings are copied
    (neural rendering resolution, density noise); the training loop decides which of them belong in a snapshot.
    """
    parameters = _pairs(dict(average.named_parameters()), dict(network.named_parameters()))
    if beta > 0:
        torch._foreach_lerp_(*parameters, 1 - beta)
    else:  # also if there was something non-finite in the average
        torch._foreach_copy_(*parameters)
    buffers = _pairs(dict(average.named_buffers()), dict(network.named_buffers()))
    if buffers[0]:
        torch._foreach_copy_(*buffers)


def _pairs(
    average: dict[str, torch.Tensor], network: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the tensors of both in the same order."""
    strangers = sorted(average.keys() ^ network.keys())
    if strangers:
        raise ValueError(f"update_ema: expected networks with the same tensors, but only one has '{strangers[0]}'")
    return list(average.values()), [network[name] for name in average]
