"""Training configurations, networks and chunks small enough to run a phase in a fraction of a second."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

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


class SplitDraws:
    """Random numbers that belong to samples of the global batch, whatever the chunk they are computed in.

    Every call of torch.rand, randn or randint takes its numbers from a table for 8 samples (or 2 groups), in which it
    finds its rows: the n-th call of a chunk reads the n-th table.
    """

    def __init__(self, positions: np.ndarray, num_groups: int) -> None:
        self.positions, self.calls = torch.as_tensor(positions), 0
        self.groups = self.positions[:num_groups] // 4

    def table(self, shape: tuple[int, ...], draw: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.calls)
        self.calls += 1
        if len(shape) < 2:  # one number for each group
            return draw((2,), generator)[self.groups]
        repeats = shape[0] // len(self.positions)
        whole = draw((8, repeats, *shape[1:]), generator)
        return whole[self.positions].flatten(0, 1)

    @contextlib.contextmanager
    def patched(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        rand, randn, randint = torch.rand, torch.randn, torch.randint

        def size(args: tuple) -> tuple[int, ...]:
            return tuple(args[0]) if args and not isinstance(args[0], int) else tuple(args)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *s, **_: self.table(size(s), lambda n, g: rand(n, generator=g)))
            patch.setattr(torch, "randn", lambda *s, **_: self.table(size(s), lambda n, g: randn(n, generator=g)))
            patch.setattr(
                torch,
                "randn_like",
                lambda x: self.table(tuple(x.shape), lambda n, g: randn(n, generator=g)).to(x.dtype),
            )
            patch.setattr(
                torch,
                "randint",
                lambda low, high, n, **_: self.table(n, lambda n, g: randint(low, high, n, generator=g)),
            )
            yield


class NoHostReads(TorchDispatchMode):
    """Fails where a number of a tensor is read by the host, or a shape depends on one."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        boolean = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        assert not boolean, f"{name} with a mask waits for the device"
        return func(*args, **(kwargs or {}))
