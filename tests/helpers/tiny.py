"""Networks small enough to build and run in a fraction of a second."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from camera_utils import TRAINING_FOCAL, camera_label, intrinsics_from_focal, look_at_pose
from tests.helpers.published import fill_weights
from training.config import GeneratorConfig, RenderingConfig
from training.presets import generator_preset
from training.triplane import TriPlaneGenerator

SYSTEM_FIELDS: dict[str, dict[str, Any]] = {
    "dual_spherical": {},
    "tri_grid": {"representation": "tri_grid", "plane_depth": 2},
    "tri_plane": {
        "representation": "tri_plane",
        "plane_depth": 1,
        "pose_offset": False,
        "background": False,
        "raw_torgb": False,
    },
}


def tiny_config(representation: str = "dual_spherical", **fields: Any) -> GeneratorConfig:
    """Return a configuration like the preset 'debug', smaller still; fields of `rendering` may be among `fields`."""
    rendering_names = {field.name for field in dataclasses.fields(RenderingConfig)}
    rendering = {name: fields.pop(name) for name in list(fields) if name in rendering_names}
    debug = generator_preset("debug")
    return dataclasses.replace(
        debug,
        **{
            "plane_resolution": 16,
            "neural_rendering_resolution": 8,
            "rendering": dataclasses.replace(
                debug.rendering, **{"depth_resolution": 6, "depth_resolution_importance": 6, **rendering}
            ),
            **SYSTEM_FIELDS[representation],
            **fields,
        },
    )


def tiny_network(representation: str = "dual_spherical", **fields: Any) -> TriPlaneGenerator:
    """Return a generator in eval mode whose weights depend on their names alone, none of them zero."""
    with torch.random.fork_rng(devices=[]):
        generator = TriPlaneGenerator.from_config(tiny_config(representation, **fields)).eval()
    fill_weights(generator)
    return generator


def latents(batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Return z `[B, 64]`."""
    return torch.randn(batch, 64, generator=torch.Generator().manual_seed(seed))


def labels(batch: int = 2, yaw_rad: float = 0.2) -> torch.Tensor:
    """Return camera labels `[B, 25]`, each turned further than the one before."""
    poses = look_at_pose(yaw_rad + torch.arange(batch, dtype=torch.float32), 0.1)
    return camera_label(poses, intrinsics_from_focal(TRAINING_FOCAL))
