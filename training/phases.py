"""Phases of one training iteration: which there are, when they run, with which optimiser, and how to run one.

What a phase computes is in `training.phase_pass`, schedules in `training.schedules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

import camera_utils
from training.augment import AugmentPipe
from training.config import require
from training.dual_discriminator import Discriminator
from training.phase_pass import Chunk, Pass, PassSetup, PhaseResult, density_noise
from training.schedules import ScheduleValues
from training.train_config import TrainConfig
from training.triplane import TriPlaneGenerator

__all__ = [
    *("Chunk", "Phase", "PhaseResult", "PhaseRunner", "due_phases", "make_phases", "optimizer_settings"),
    *("update_w_avg", "WARMUP"),
]

Network = Literal["G", "D"]
WARMUP = "Gwarmup"
"""Name of the phase of `training.reconstruction`."""


@dataclass(frozen=True)
class Phase:
    """One optimiser step."""

    name: str
    """Gmain, Greg, Gboth, Dmain, Dreg, Dboth or Gwarmup."""
    network: Network
    """The network that is trained."""
    interval: int | None = 1
    """The phase runs in every iteration that is a multiple of it, with gradients times it (lazy regularisation).
    Gwarmup, with an optimiser of its own, runs in all of the warm-up, and its gradients stay; None: only there."""


def has_reg_phase(config: TrainConfig, network: Network) -> bool:
    """Return whether the regulariser of a network has steps of its own."""
    if network == "G":
        return config.loss.density_reg > 0 and config.optimizer.generator_reg_interval > 1
    return config.loss.r1_gamma > 0 and config.optimizer.discriminator_reg_interval > 1


def make_phases(config: TrainConfig) -> tuple[Phase, ...]:
    """Return the phases of an iteration in order: those of G, those of D, and the one of the warm-up if there is one.

    A network whose regulariser is off, or due in every iteration, has a single phase `both`.

    Differs from the published code, which has a phase without terms for a penalty that is off, and takes two steps for
    an interval of 1.
    """
    intervals = {
        "G": config.optimizer.generator_reg_interval,
        "D": config.optimizer.discriminator_reg_interval,
    }
    phases: list[Phase] = []
    for network, interval in intervals.items():
        if has_reg_phase(config, network):
            phases += [Phase(f"{network}main", network), Phase(f"{network}reg", network, interval)]
        else:
            phases.append(Phase(f"{network}both", network))
    if config.warmup.kimg > 0:  # last, so that a phase has the same number, and draws the same, without it
        phases.append(Phase(WARMUP, "G", config.warmup.after_interval))
    return tuple(phases)


def due_phases(phases: Sequence[Phase], config: TrainConfig, cur_nimg: int) -> list[tuple[int, Phase]]:
    """Return the phases of the iteration that begins after `cur_nimg` images, with their numbers in `phases`.

    The warm-up has one; lazy regularisation counts iterations from its end.
    """
    nimg = cur_nimg - config.warmup_end_nimg
    if nimg < 0:
        return [(number, phase) for number, phase in enumerate(phases) if phase.name == WARMUP]
    iteration = nimg // config.loop.batch_size
    return [(number, p) for number, p in enumerate(phases) if p.interval is not None and iteration % p.interval == 0]


def optimizer_settings(config: TrainConfig, network: Network) -> dict[str, Any]:
    """Return `lr`, `betas` and `eps` of Adam for a network.

    With a separate step of the regulariser every I iterations, `c = I / (I + 1)`: lr becomes c lr, and each beta
    beta^c, so that the additional steps change neither speed nor memory (Karras et al. 2020, appendix B).
    """
    optimizer = config.optimizer
    lr, interval = {
        "G": (optimizer.generator_lr, optimizer.generator_reg_interval),
        "D": (optimizer.discriminator_lr, optimizer.discriminator_reg_interval),
    }[network]
    ratio = interval / (interval + 1) if has_reg_phase(config, network) else 1.0
    return {"lr": lr * ratio, "betas": tuple(beta**ratio for beta in optimizer.betas), "eps": optimizer.eps}


@torch.no_grad()
def update_w_avg(G: TriPlaneGenerator, w_mean: torch.Tensor) -> None:
    """Move the running mean of w towards the mean `[w_dim]` of the global batch: `w_avg <- lerp(w_mean, w_avg, beta)`.

    Differs from the published code, where every process follows its own samples.
    """
    mapping = G.backbone.mapping
    if mapping.w_avg_beta is not None:
        mapping.w_avg.copy_(w_mean.lerp(mapping.w_avg, mapping.w_avg_beta))


class PhaseRunner:
    """Runs phases on chunks; gradients add up in the parameters.

    Args:
        G: generator, in training mode.
        D: discriminator, in training mode.
        config: loss terms, consistency, regulariser intervals.
        augment: pipe that maps a dict of images to one, applied to all that D sees; None augments nothing.

    Raises:
        ValueError: the discriminator needs an image that the generator does not make, or a head that it lacks.

    Differs from the published code: gradients are means over the global batch, not sums over chunks; generated images
    of D phases build no graph, and real ones are prepared where they are used.
    """

    def __init__(
        self, G: TriPlaneGenerator, D: Discriminator, config: TrainConfig, augment: AugmentPipe | None = None
    ) -> None:
        inputs = (*D.variant.stacked, *(["image_mask"] if D.variant.mask_tower else []))
        if "image_parsing" in inputs:
            classes = (G.config.parsing_classes, D.config.parsing_channels)
            require(classes[0] == classes[1], "parsing classes of G and D", "the same number", classes)
        require(
            not config.vico.uses_head or D.view_head is not None,
            "discriminator.view_head_features",
            f"above 0 for vico.mode {config.vico.mode!r}",
            D.config.view_head_features,
        )
        signs = camera_utils.mirror_label(torch.ones(camera_utils.LABEL_SIZE))
        signs = signs.to(next(D.parameters()).device)
        self._setup = PassSetup(G, D, config, augment, inputs, signs)

    def run(self, phase: Phase, chunk: Chunk, values: ScheduleValues, weight: float = 1.0) -> PhaseResult:
        """Compute the terms of a phase on a chunk and add their gradients, times interval and weight.

        Leaves `requires_grad` on in the network of the phase and off in the other.

        Args:
            phase: one of `make_phases`.
            chunk: samples.
            values: schedules of this iteration.
            weight: share of the chunk in the global batch.
        """
        setup, terms = self._setup, self._setup.config.loss
        setup.G.requires_grad_(phase.network == "G")
        setup.D.requires_grad_(phase.network == "D")
        is_main, is_reg = (phase.name[1:] in (kind, "both") for kind in ("main", "reg"))
        with density_noise(setup.G, values.density_noise):
            one = Pass(setup, chunk, values, phase.interval * weight)
            if phase.network == "G":
                if is_main:
                    one.generator()
                if is_reg and terms.density_reg > 0:
                    one.density()
            else:
                if is_main:
                    one.fake_images()
                if is_main or terms.r1_gamma > 0:
                    one.real_images(is_main, is_reg and terms.r1_gamma > 0)
        return one.result
