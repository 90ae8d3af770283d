"""Fixed layer noise as an unknown of a projection (Karras et al. 2020, appendix D)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from torch_utils.rng import derive_seed
from training.triplane import TriPlaneGenerator

_COARSEST = 8  # pixels


def noise_names(generator: TriPlaneGenerator) -> list[str]:
    """Return the names of the noise buffers of the backbone, coarse to fine."""
    names = (name for name, _ in generator.named_buffers())
    return [name for name in names if name.startswith("backbone.synthesis.") and name.endswith(".noise_const")]


def initial_noise(generator: TriPlaneGenerator, *seed_parts: int) -> dict[str, torch.Tensor]:
    """Draw standard normal noise `[H, W]` for every buffer of the backbone."""
    buffers = dict(generator.named_buffers())
    result = {}
    for index, name in enumerate(noise_names(generator)):
        random = torch.Generator().manual_seed(derive_seed(*seed_parts, index))
        result[name] = torch.randn(buffers[name].shape, generator=random).to(buffers[name])
    return result


def noise_correlation(noise: torch.Tensor) -> torch.Tensor:
    """Measure how far noise `[H, W]` is from white, on all scales; a scalar.

    The sum over the levels of a pyramid (means of 2 x 2 pixels, down to 8 x 8) of the squared mean products of
    neighbours to the right and below, around the edges.
    """
    level, total = noise[None, None], noise.new_zeros(())
    while True:
        total = total + sum((level * level.roll(1, dims=axis)).mean().square() for axis in (2, 3))
        if level.shape[-1] <= _COARSEST:
            return total
        level = F.avg_pool2d(level, 2)


@torch.no_grad()
def normalize_noise_(noise: torch.Tensor) -> None:
    """Give noise `[H, W]` mean 0 and mean square 1, in place."""
    noise.sub_(noise.mean())
    noise.mul_(noise.square().mean().rsqrt())
