"""Training configurations, networks and chunks small enough to run a phase in a fraction of a second."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from camera_utils import TRAINING_FOCAL, camera_label, intrinsics_from_focal, look_at_pose
from tests.helpers.published import fill_weights
from tests.helpers.tiny import tiny_config
from training.config import DiscriminatorConfig, SuperresolutionConfig
from training.dual_discriminator import Discriminator
from training.phases import Chunk
from training.train_config import DataConfig, LoopConfig, LossConfig, OptimizerConfig, TrainConfig, VicoConfig
from training.triplane import TriPlaneGenerator

SIDE = 64
_CLASSES = 3
_filled: dict[str, tuple[TriPlaneGenerator, Discriminator]] = {}  # filling takes longer than copying


def train_config(
    variant: str = "DualDiscriminator",
    representation: str = "dual_spherical",
    batch: int = 4,
    vico: VicoConfig = VicoConfig(),  # noqa: B008 (frozen)
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
    discriminator: dict[str, Any] | None = None,
    **loss: Any,
) -> TrainConfig:
    """Return a configuration at 64 pixels; keywords are fields of `LossConfig`."""
    generator = tiny_config(
        representation,
        img_resolution=SIDE,
        superresolution=SuperresolutionConfig(variant="Superresolution2XSmall"),
        parsing_classes=_CLASSES if variant == "HoloDiscriminator" else 0,
    )
    fields = {
        "variant": variant,
        "img_resolution": SIDE,
        "channel_base": 512,
        "channel_max": 8,
        "parsing_channels": _CLASSES,
        "seg_resolution": 16,
        "mapping_layers": 2,
        "mbstd_group_size": 4,
        "view_head_features": 8 if vico.uses_head else 0,
        **(discriminator or {}),
    }
    terms = {"r1_gamma": 1.0, "neural_rendering_resolution_initial": 8, **loss}
    return TrainConfig(
        preset="test",
        data=DataConfig(images=("unused",), resolution=SIDE),
        generator=generator,
        discriminator=DiscriminatorConfig(**fields),
        loss=LossConfig(**terms),
        vico=vico,
        optimizer=optimizer,
        loop=LoopConfig(batch_size=batch, batch_gpu=batch),
    )


def networks(
    config: TrainConfig, dtype: torch.dtype = torch.float32, superresolution: bool = False
) -> tuple[TriPlaneGenerator, Discriminator]:
    """Return both networks in training mode, with weights that depend on names alone.

    Super-resolution, which mixes no samples and draws nothing, takes most of the time; without it the raw image is
    enlarged.
    """
    configs = (config.generator, config.discriminator)
    key = repr(configs)
    if key not in _filled:
        with torch.random.fork_rng(devices=[]):
            _filled[key] = TriPlaneGenerator.from_config(configs[0]), Discriminator(configs[1])
        for network in _filled[key]:
            fill_weights(network)
    G, D = (copy.deepcopy(network).to(dtype).train() for network in _filled[key])
    if not superresolution:
        G.superresolution.forward = lambda raw, *_: (F.interpolate(raw, (SIDE, SIDE), mode="bilinear"), None)
    return G, D


def camera_labels(yaw_deg: list[float] | np.ndarray, pitch_deg: float = 5.0) -> torch.Tensor:
    """Return labels `[B, 25]` of cameras around the head."""
    yaw_rad = torch.deg2rad(torch.as_tensor(yaw_deg, dtype=torch.float32))
    return camera_label(look_at_pose(yaw_rad, np.deg2rad(pitch_deg)), intrinsics_from_focal(TRAINING_FOCAL))


def batch(size: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> Chunk:
    """Return a chunk of one group, the same for every call."""
    random = np.random.RandomState(seed)
    tensor = lambda array: torch.from_numpy(array).to(dtype)  # noqa: E731
    parsing = np.eye(_CLASSES)[random.randint(_CLASSES, size=(size, SIDE, SIDE))].transpose(0, 3, 1, 2)
    real = {
        "image": tensor(random.uniform(-1, 1, (size, 3, SIDE, SIDE))),
        "image_mask": tensor(random.uniform(size=(size, 1, SIDE, SIDE))),
        "image_parsing": tensor(parsing.copy()),
    }
    labels = camera_labels(random.uniform(-180, 180, 2 * size)).to(dtype)
    z = tensor(random.randn(size, 64))
    return Chunk(real=real, real_label=labels[:size], z=z, label=labels[size:])


def rows(chunk: Chunk, positions: np.ndarray, num_groups: int) -> Chunk:
    """Return some samples of a chunk as another one."""
    index = torch.as_tensor(positions)

    def of(mismatched: Any) -> Any:
        return None if mismatched is None else type(mismatched)(*(t[index] for t in mismatched))

    return dataclasses.replace(
        chunk,
        real={name: image[index] for name, image in chunk.real.items()},
        real_label=chunk.real_label[index],
        z=chunk.z[index],
        label=chunk.label[index],
        num_groups=num_groups,
        mismatched=of(chunk.mismatched),
        mismatched_fake=of(chunk.mismatched_fake),
    )


def gradients(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients that a network has, by name."""
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
