"""Adaptive strength of augmentation (ADA, Karras et al. 2020)."""

from __future__ import annotations

import torch
from torch import nn

from torch_utils import distributed
from training.augment import AugmentPipe, adjust_p
from training.train_config import AugmentConfig

ADA_INTERVAL = 4
"""Iterations between two adjustments."""


class AdaptiveStrength(nn.Module):
    """Watches the signs of real logits, and adjusts the strength of a pipe; its buffer is part of a training state.

    Args:
        config: target and speed.
        batch_size: images per iteration, over all processes.
    """

    def __init__(self, config: AugmentConfig, batch_size: int) -> None:
        super().__init__()
        self.config, self.batch_size = config, batch_size
        self.register_buffer("signs", torch.zeros(2, dtype=torch.float64))  # sum and count of this process

    def add(self, real_signs: torch.Tensor) -> None:
        """Note the signs `[B, 1]` of logits of real images."""
        count = self.signs.new_full((), real_signs.numel())
        self.signs += torch.stack([real_signs.sum(dtype=torch.float64), count])

    def gather_to_main(self) -> None:
        """Move what all processes noted to process 0, for a training state; every process must call it."""
        total = distributed.all_reduce_mean(self.signs) * distributed.world_size()
        self.signs.copy_(total if distributed.is_main() else torch.zeros_like(total))

    def after_iteration(self, iteration: int, pipe: AugmentPipe) -> None:
        """Adjust the strength of a pipe after every fourth iteration, without waiting for the device."""
        if (iteration + 1) % ADA_INTERVAL:
            return
        total, count = distributed.all_reduce_mean(self.signs).clone()
        self.signs.zero_()
        num_images = self.batch_size * ADA_INTERVAL
        pipe.p.copy_(adjust_p(pipe.p, total / count, self.config.target, num_images, self.config.ada_kimg))
