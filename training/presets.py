"""Named generator configurations."""

from __future__ import annotations

import torch

from training.config import GeneratorConfig, RenderingConfig, SuperresolutionConfig, SynthesisConfig, require
from training.triplane import TriPlaneGenerator

_UNTRAINED_SEED = 0
_CAMERA_HINTS = {"avg_camera_radius": 2.7, "avg_camera_pivot": [0, 0, 0.2]}

GENERATOR_PRESETS = {
    "spherehead": GeneratorConfig(
        img_resolution=512,
        superresolution=SuperresolutionConfig(variant="SuperresolutionHybrid8XDC"),
        extras=_CAMERA_HINTS,
    ),
    "panohead": GeneratorConfig(
        img_resolution=512,
        representation="tri_grid",
        superresolution=SuperresolutionConfig(variant="SuperresolutionHybrid8XDC"),
        extras=_CAMERA_HINTS,
    ),
    "eg3d": GeneratorConfig(
        img_resolution=512,
        representation="tri_plane",
        plane_depth=1,
        pose_offset=False,
        background=False,
        raw_torgb=False,
        superresolution=SuperresolutionConfig(variant="SuperresolutionHybrid8XDC"),
        rendering=RenderingConfig(crop_margin=None),
        extras=_CAMERA_HINTS,
    ),
    # Small enough for tests and for a first look on any machine.
    "debug": GeneratorConfig(
        z_dim=64,
        img_resolution=128,
        plane_resolution=64,
        neural_rendering_resolution=32,
        synthesis=SynthesisConfig(channel_base=1024, channel_max=32),
        superresolution=SuperresolutionConfig(variant="SuperresolutionHybrid2X"),
        rendering=RenderingConfig(depth_resolution=16, depth_resolution_importance=16),
        extras=_CAMERA_HINTS,
    ),
}


def generator_preset(name: str) -> GeneratorConfig:
    """Return the configuration of a preset; `ValueError` for an unknown name."""
    require(name in GENERATOR_PRESETS, "preset", f"one of {', '.join(GENERATOR_PRESETS)}", name)
    return GENERATOR_PRESETS[name]


def untrained_generator(name: str) -> TriPlaneGenerator:
    """Build the generator of a preset with random weights, always the same, in eval mode and without gradients.

    Raises:
        ValueError: for an unknown name.
    """
    config = generator_preset(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_UNTRAINED_SEED)
        return TriPlaneGenerator.from_config(config).eval().requires_grad_(False)
