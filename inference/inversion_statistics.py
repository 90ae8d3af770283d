"""Mean and spread of w, from which a projection starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

import camera_utils
from training.config import require
from training.triplane import TriPlaneGenerator

_CHUNK = 500  # latents at a time: w-layers of 500 are 14 MB
_PUBLISHED_PI = 3.14


class WStatistics(NamedTuple):
    """Where latents of a frontal camera lie in W."""

    mean: torch.Tensor
    """`[1, 1, 512]`."""
    std: float
    """Root of the mean squared distance from the mean: sqrt(E |w - mean|^2), over all 512 dimensions together."""


@torch.no_grad()
def measure_w(generator: TriPlaneGenerator, num_samples: int, seed: int) -> WStatistics:
    """Measure w of random latents under the published frontal camera, without truncation.

    Args:
        generator: of which only the mapping network runs.
        num_samples: 10000 in the published projector.
        seed: of NumPy's generator; 123 there.
    """
    parameter = generator.backbone.mapping.fc0.weight
    label = _frontal_label().to(parameter.device)
    total = torch.zeros(generator.w_dim, dtype=torch.float64, device=parameter.device)
    total_square = torch.zeros((), dtype=torch.float64, device=parameter.device)
    for z in _latent_chunks(generator.z_dim, num_samples, seed):
        z = torch.from_numpy(z).to(parameter.device, parameter.dtype)
        w = generator.mapping(z, label.expand(len(z), -1))[:, 0].double()  # [B, 512]
        total += w.sum(dim=0)
        total_square += w.square().sum()
    mean = total / num_samples
    variance = total_square / num_samples - mean.square().sum()
    return WStatistics(mean.to(parameter.dtype)[None, None], math.sqrt(max(float(variance), 0.0)))


@torch.no_grad()
def shift_as_published(generator: TriPlaneGenerator, label: torch.Tensor, num_samples: int, seed: int) -> torch.Tensor:
    """Shift a camera `[1, 25]` by the learned offset of the mean of random latents, as `projector_withseg` does.

    Latents are scaled to unit length before they are mapped, so this mean, which is almost zero, stands for one
    arbitrary direction.

    Raises:
        ValueError: the network has no learned offset.
    """
    require(generator.config.pose_offset, "pose_offset", "'none' for a network without learned offset", "published")
    total = sum(z.sum(axis=0) for z in _latent_chunks(generator.z_dim, num_samples, seed))
    parameter = generator.backbone.mapping.fc0.weight
    z = torch.from_numpy(total / num_samples).to(parameter.device, parameter.dtype)[None]
    return generator.apply_delta_c(z, label)[0]


def _latent_chunks(z_dim: int, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the rows of `RandomState(seed).randn(num_samples, z_dim)`, some at a time."""
    random = np.random.RandomState(seed)
    for start in range(0, num_samples, _CHUNK):
        yield random.randn(min(_CHUNK, num_samples - start), z_dim)


def _frontal_label() -> torch.Tensor:
    """Return the label `[1, 25]` of the published frontal camera, whose pi is 3.14."""
    pitch_rad = camera_utils.pitch_from_vertical(_PUBLISHED_PI / 2)
    pose = camera_utils.look_at_pose(_PUBLISHED_PI / 2 - math.pi / 2, pitch_rad, camera_utils.TRAINING_RADIUS)
    return camera_utils.camera_label(pose, camera_utils.intrinsics_from_focal(camera_utils.TRAINING_FOCAL))
