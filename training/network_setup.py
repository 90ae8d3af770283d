"""The networks of a training run: built, started from a snapshot, and prepared for the device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from torch_utils.misc import copy_params_and_buffers
from training.dual_discriminator import Discriminator
from training.train_config import PrecisionConfig, TrainConfig
from training.train_presets import replace_fields
from training.triplane import TriPlaneGenerator
from training.volumetric_rendering.renderer import RendererChoice


class TrainingNetworks(NamedTuple):
    """Generator, discriminator, and the moving average of the generator."""

    G: TriPlaneGenerator
    D: Discriminator
    G_ema: TriPlaneGenerator


# Settings that published weights were trained with; see docs/differences.md, "Quirks kept".
_HABITS = (
    "rendering.depth_clamp",
    "rendering.auto_range_of_misses",
    "rendering.importance_draws",
    "superresolution.first_rgb_replaces_raw",
)


def keep_habits(config: TrainConfig, start: Mapping[str, nn.Module | None]) -> TrainConfig:
    """Return a configuration whose generator has the published quirks of the network that a run starts from."""
    source = start.get("G_ema") or start.get("G")
    if source is None:
        return config
    habits = {}
    for path in _HABITS:
        section, name = path.split(".")
        habits[f"generator.{path}"] = getattr(getattr(source.config, section), name)
    return replace_fields(config, habits)


def build_networks(
    config: TrainConfig, device: torch.device, renderer: RendererChoice, start: Mapping[str, nn.Module | None]
) -> tuple[TrainingNetworks, list[str]]:
    """Build the networks of a run, with weights from PyTorch's global generator or from a snapshot.

    Args:
        config: of the run.
        device: where they go.
        renderer: what renders the volume; see `ImportanceRenderer`.
        start: networks to start from, by name (`G`, `D`, `G_ema`), empty for random weights. Tensors are taken by name;
            those that the snapshot lacks stay random, as published.

    Returns:
        the networks, G and D in training mode and all without gradients; and one line for each network that says what
        was taken from `start`.

    Raises:
        ValueError: a tensor of the snapshot has another shape.
    """
    G = TriPlaneGenerator.from_config(config.generator)
    D = Discriminator(config.discriminator)
    networks = TrainingNetworks(G.train(), D.train(), copy.deepcopy(G).eval())
    lines = []
    if start:
        for name, network in networks._asdict().items():
            source = start.get(name)
            if name == "G" and source is None:
                source = start.get("G_ema")
            lines.append(f"{name}: {_copy_matching(source, network)}")
    for network in networks:
        network.requires_grad_(False).to(device)
    for network in (G, networks.G_ema):
        network.renderer.choose(renderer, device)
    _prepare(networks, config.precision)
    return networks, lines


def _copy_matching(source: nn.Module | None, target: nn.Module) -> str:
    """Copy the tensors that both have; say how many."""
    if source is None:
        return "not in the snapshot, starts from random weights"
    copy_params_and_buffers(source, target)
    own, theirs = target.state_dict().keys(), source.state_dict().keys()
    unused = f", {len(theirs - own)} others not used" if theirs - own else ""
    return f"{len(own & theirs)} of {len(own)} tensors taken from the snapshot{unused}"


def _prepare(networks: TrainingNetworks, precision: PrecisionConfig) -> None:
    """Choose memory format and compilation."""
    if precision.channels_last:
        for network in networks:
            network.to(memory_format=torch.channels_last)
    if precision.compile:
        # Not the discriminator: R1 needs second derivatives, which torch.compile does not support.
        G = networks.G
        for module in (G.backbone.synthesis, G.superresolution, G.bcg_synthesis):
            if module is not None:
                module.compile()


def set_backends(precision: PrecisionConfig) -> None:
    """Set PyTorch's global switches for CUDA arithmetic."""
    torch.backends.cuda.matmul.allow_tf32 = precision.tf32
    torch.backends.cudnn.allow_tf32 = precision.tf32
    torch.backends.cudnn.benchmark = precision.cudnn_benchmark
    # Sums in float16 lose digits.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
