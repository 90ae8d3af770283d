"""Phases of one training iteration: which terms they compute, on what, and with which gradients.

Terms are in `training.loss` and `training.vico`, schedules in `training.schedules`. Random numbers come from the
default generators in the published order, so that a seed gives the published values.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from training import loss, vico
from training.config import require
from training.dual_discriminator import Discriminator, filtered_resizing
from training.networks_stylegan2 import SynthesisOptions
from training.schedules import ScheduleValues
from training.train_config import TrainConfig
from training.triplane import RadianceField, TriPlaneGenerator
from training.vico import MismatchedLabels, WeightedValues

Network = Literal["G", "D"]

_NUM_POINTS = 1000  # of the l1 and total-variation regularisers, per sample
_NUM_MONOTONIC_POINTS = 2000
_MONOTONIC_WEIGHT = 10.0
_MONOTONIC_STEPS = 256  # steps per side of the box
_OPTIONS = SynthesisOptions()  # fresh layer noise


@dataclass(frozen=True)
class Phase:
    """One optimiser step."""

    name: str
    """Gmain, Greg, Gboth, Dmain, Dreg or Dboth."""
    network: Network
    """The network that is trained."""
    interval: int = 1
    """The phase runs in every iteration that is a multiple of it, with gradients times it (lazy regularisation)."""


@dataclass
class Chunk:
    """What one pass works on: B samples in whole groups, laid out member by member (`training.batch_plan`)."""

    real: Mapping[str, torch.Tensor] | None
    """`image` `[B, 3, H, W]` in [-1, 1], and where the discriminator sees them `image_mask` `[B, 1, ., .]` and
    `image_parsing` `[B, classes, ., .]` in [0, 1]; None is allowed where no real image is needed (G phases)."""
    real_label: torch.Tensor | None
    """Their cameras `[B, 25]`."""
    z: torch.Tensor
    """Latents `[B, z_dim]`."""
    label: torch.Tensor
    """Cameras `[B, 25]` to generate from."""
    num_groups: int = 1
    """Groups in the chunk."""
    mismatched: MismatchedLabels | None = None
    """Cameras that do not belong to the real images; needed in main phases of D with view-image consistency."""
    mismatched_fake: MismatchedLabels | None = None
    """The same for `label`; needed where generated images take part in it."""


@dataclass
class PhaseResult:
    """What a pass leaves besides gradients; tensors stay on the device and carry no graph."""

    stats: dict[str, torch.Tensor] = field(default_factory=dict)
    """Statistics by published name, one value per sample or one for all."""
    weighted_stats: dict[str, WeightedValues] = field(default_factory=dict)
    """Statistics of which every value has a weight."""
    loss: torch.Tensor | None = None
    """Sum of what was differentiated, a scalar."""
    w_mean: torch.Tensor | None = None
    """Mean `[w_dim]` of the generated w; of main phases of D."""
    real_signs: torch.Tensor | None = None
    """Signs `[B, 1]` of the logits of real images; of phases of D."""


def has_reg_phase(config: TrainConfig, network: Network) -> bool:
    """Return whether the regulariser of a network has steps of its own."""
    if network == "G":
        return config.loss.density_reg > 0 and config.optimizer.generator_reg_interval > 1
    return config.loss.r1_gamma > 0 and config.optimizer.discriminator_reg_interval > 1


def make_phases(config: TrainConfig) -> tuple[Phase, ...]:
    """Return the phases of an iteration in order: those of G, then those of D.

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
    return tuple(phases)


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
        self, G: TriPlaneGenerator, D: Discriminator, config: TrainConfig, augment: nn.Module | None = None
    ) -> None:
        self.G, self.D, self.config, self.augment = G, D, config, augment
        self.inputs = (*D.variant.stacked, *(["image_mask"] if D.variant.mask_tower else []))
        if "image_parsing" in self.inputs:
            classes = (G.config.parsing_classes, D.config.parsing_channels)
            require(classes[0] == classes[1], "parsing classes of G and D", "the same number", classes)
        require(
            not config.vico.uses_head or D.view_head is not None,
            "discriminator.view_head_features",
            f"above 0 for vico.mode {config.vico.mode!r}",
            D.config.view_head_features,
        )

    def run(self, phase: Phase, chunk: Chunk, values: ScheduleValues, weight: float = 1.0) -> PhaseResult:
        """Compute the terms of a phase on a chunk and add their gradients, times interval and weight.

        Leaves `requires_grad` on in the network of the phase and off in the other.

        Args:
            phase: one of `make_phases`.
            chunk: samples.
            values: schedules of this iteration.
            weight: share of the chunk in the global batch.
        """
        self.G.requires_grad_(phase.network == "G")
        self.D.requires_grad_(phase.network == "D")
        is_main, is_reg = (phase.name[1:] in (kind, "both") for kind in ("main", "reg"))
        with _density_noise(self.G, values.density_noise):
            pass_ = _Pass(self, chunk, values, phase.interval * weight)
            if phase.network == "G":
                if is_main:
                    pass_.generator()
                if is_reg and self.config.loss.density_reg > 0:
                    pass_.density()
            else:
                if is_main:
                    pass_.fake_images()
                pass_.real_images(is_main, is_reg and self.config.loss.r1_gamma > 0)
        return pass_.result


@contextlib.contextmanager
def _density_noise(G: TriPlaneGenerator, strength: float) -> Iterator[None]:
    """Set the density noise of a generator for the moment, so that it gets into no snapshot."""
    before = G.config
    G.config = dataclasses.replace(before, rendering=dataclasses.replace(before.rendering, density_noise=strength))
    try:
        yield
    finally:
        G.config = before


class _Pass:
    """One phase on one chunk."""

    def __init__(self, runner: PhaseRunner, chunk: Chunk, values: ScheduleValues, gain: float) -> None:
        self.runner, self.chunk, self.values, self.gain = runner, chunk, values, gain
        self.G, self.D, self.config = runner.G, runner.D, runner.config
        self.result = PhaseResult()

    # ---- steps of the phases ----

    def generator(self) -> None:
        """Adversarial loss of G, its pose offsets and consistency."""
        images, offsets, _ = self.generate()
        features = self.D.features(self.augmented(self.fake_inputs(images)))
        logits = self.D.logits(features, self.seen(self.chunk.label))
        self.report_logits("fake", logits)
        total = term = loss.generator_loss(logits)
        self.report("Loss/G/loss", term)
        vico_config = self.config.vico
        if vico_config.uses_head and vico_config.generator_weight > 0:
            term = vico.generator_term(self.D.consistency(features, self.chunk.label), vico_config)
            self.report("Loss/vico/generator", term)
            total = total + term
        total = total.mean()
        if offsets is not None and self.config.loss.pose_offset_reg > 0:
            penalty = self.config.loss.pose_offset_reg * loss.pose_offset_penalty(offsets, self.chunk.num_groups)
            self.report("Loss/G/trans_reg_loss", penalty)
            total = total + penalty
        self.backward(total)

    def density(self) -> None:
        """Regularise the density field."""
        kind = self.config.loss.density_reg_type
        weight, perturbation = self.config.loss.density_reg, self.config.loss.density_reg_perturbation
        box_warp = self.G.config.rendering.box_warp
        batch, device = len(self.chunk.z), self.chunk.z.device
        if kind == "total-variation":
            ws = self.regulariser_latents()
            step = box_warp / self.G.config.plane_resolution
            sigma = self.query(ws, loss.stencil_points(batch, _NUM_POINTS, box_warp, step, device), draws_views=False)
            self.add_density_term("TVloss", weight * loss.density_total_variation(sigma.unflatten(1, (-1, 4))))
            return
        if kind != "l1":
            ws, step = self.regulariser_latents(), box_warp / _MONOTONIC_STEPS
            sigma = self.query(ws, loss.behind_pairs(batch, _NUM_MONOTONIC_POINTS, step, device))
            term = loss.density_monotonic(*sigma.chunk(2, dim=1), detach=kind == "monotonic-detach")
            self.add_density_term("monotonic_loss", _MONOTONIC_WEIGHT * term)
            perturbation = step
        ws = self.regulariser_latents()
        sigma = self.query(ws, loss.near_pairs(batch, _NUM_POINTS, perturbation, device))
        self.add_density_term("TVloss", weight * loss.density_l1(*sigma.chunk(2, dim=1)))

    def fake_images(self) -> None:
        """Adversarial loss of D on generated images."""
        with torch.no_grad():
            images, _, self.result.w_mean = self.generate()
        label = self.seen(self.chunk.label)
        features = self.D.features(self.augmented(self.fake_inputs(images)))
        logits = self.D.logits(features, label)
        self.report_logits("fake", logits)
        term = loss.discriminator_fake_loss(logits)
        self.report("Loss/D/loss", term)
        if self.config.vico.mode != "none" and self.config.vico.source in ("fake", "both"):
            term = term + self.vico("fake", features, logits, label, self.chunk.mismatched_fake)
        self.backward(term.mean())

    def real_images(self, is_main: bool, is_reg: bool) -> None:
        """Adversarial loss of D on real images, and R1."""
        images = self.real_inputs()
        penalised = {}
        if is_reg:
            penalised = {name: images[name].requires_grad_() for name in images if self.r1_gamma(name) > 0}
        label = self.seen(self.chunk.real_label)
        features = self.D.features(self.augmented(images))
        logits = self.D.logits(features, label)
        self.report_logits("real", logits)
        self.result.real_signs = logits.detach().sign()
        total = torch.zeros_like(logits)
        if is_main:
            term = loss.discriminator_real_loss(logits)
            self.report("Loss/D/loss", term + self.result.stats["Loss/D/loss"])
            total = total + term
            if self.config.vico.mode != "none" and self.config.vico.source in ("real", "both"):
                total = total + self.vico("real", features, logits, label, self.chunk.mismatched)
        if is_reg:
            total = total + self.r1(logits, penalised)[:, None]
        self.backward(total.mean())

    # ---- parts ----

    def generate(self) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor]:
        """Return images, camera offsets `[B, 3]` if there are any, and the mean `[w_dim]` of w."""
        G, chunk, config = self.G, self.chunk, self.config.loss
        conditioning = loss.swap_conditioning(self.seen(chunk.label), self.values.swap_prob, chunk.num_groups)
        ws = G.mapping(chunk.z, conditioning)
        w_mean = ws.detach()[:, 0].mean(dim=0)
        ws = self.mix_styles(ws)
        background = None
        if G.config.background:
            background = loss.swap_backgrounds(ws, config.background_swap_prob, chunk.num_groups)
        camera, offsets = chunk.label, None
        if G.config.pose_offset:
            camera, offsets = G.apply_delta_c(chunk.z, chunk.label)
        images = G.synthesis(ws, camera, self.values.neural_rendering_resolution, ws_bcg=background)
        return images, offsets, w_mean

    def mix_styles(self, ws: torch.Tensor) -> torch.Tensor:
        """Style mixing, where it is on."""
        if self.config.loss.style_mixing_prob == 0:
            return ws
        cutoffs = loss.draw_mixing_cutoffs(
            ws.shape[1], self.config.loss.style_mixing_prob, self.chunk.num_groups, ws.device
        )
        other = self.G.mapping(torch.randn_like(self.chunk.z), self.seen(self.chunk.label))
        return loss.mix_styles(ws, other, cutoffs)

    def regulariser_latents(self) -> torch.Tensor:
        """Return the w-layers whose density is regularised; whole groups swap their conditioning."""
        label, groups = self.seen(self.chunk.label), self.chunk.num_groups
        conditioning = loss.swap_conditioning_of_groups(label, self.values.swap_prob, groups)
        return self.mix_styles(self.G.mapping(self.chunk.z, conditioning))

    def query(self, ws: torch.Tensor, points: torch.Tensor, draws_views: bool = True) -> torch.Tensor:
        """Return the raw density `[B, M]` of w-layers at points `[B, M, 3]`."""
        if draws_views:
            torch.randn_like(points)  # the published code draws view directions here, which nothing reads
        field: RadianceField = self.G.radiance_field(ws, options=_OPTIONS)
        return self.G.query_density(field, points)

    def add_density_term(self, name: str, term: torch.Tensor) -> None:
        """Report and differentiate one term of the density regulariser."""
        self.report(f"Loss/G/{name}", term)
        self.backward(term)

    def real_inputs(self) -> dict[str, torch.Tensor]:
        """Return what D sees of real images before augmentation: R1 is measured on these, as published.

        Raw image, mask and parsing map have the resolution of generated ones. Image and raw image are blurred alike.
        """
        real, side = self.chunk.real, self.values.neural_rendering_resolution
        require(real is not None and self.chunk.real_label is not None, "chunk.real", "images in phases of D", real)
        fir = getattr(self.D, "resample_filter", None)
        images = {}
        for name in self.runner.inputs:
            source = "image" if name == "image_raw" else name
            require(source in real, "chunk.real", f"an entry '{source}'", sorted(real))
            image = real[source].detach()
            if name != "image":
                image = filtered_resizing(image, side, fir, self.config.loss.resize_mode)
            images[name] = loss.blur(image, self.values.blur_sigma) if source == "image" else image
        return images

    def fake_inputs(self, images: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what D sees of generated images before augmentation; the raw image is not blurred, as published."""
        images = {name: images[name] for name in self.runner.inputs}
        images["image"] = loss.blur(images["image"], self.values.blur_sigma)
        return images

    def augmented(self, images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Augment what D sees, if there is a pipe."""
        return images if self.runner.augment is None else self.runner.augment(images)

    def seen(self, label: torch.Tensor) -> torch.Tensor:
        """Return a label as the networks are conditioned on it: zeros in unconditional training."""
        return label if self.config.data.conditional else torch.zeros_like(label)

    def r1_gamma(self, name: str) -> float:
        """Return the weight of the R1 penalty on one of D's inputs."""
        config = self.config.loss
        return {"image_mask": config.r1_gamma_mask, "image_parsing": config.r1_gamma_parsing}.get(name, config.r1_gamma)

    def r1(self, logits: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted R1 penalty `[B]`; those of image and raw image are reported as one."""
        penalties = loss.r1_penalties(logits, inputs)
        reported: dict[str, torch.Tensor] = {}
        for name, penalty in penalties.items():
            suffix = {"image_mask": "_seg", "image_parsing": "_parsing"}.get(name, "")
            reported[suffix] = reported.get(suffix, 0) + penalty
        for suffix, penalty in reported.items():
            self.report(f"Loss/r1_penalty{suffix}", penalty)
        total = sum(self.r1_gamma(name) / 2 * penalty for name, penalty in penalties.items())
        self.report("Loss/D/reg", total)
        return total

    def vico(
        self,
        source: str,
        features: Any,
        logits: torch.Tensor,
        label: torch.Tensor,
        mismatched: MismatchedLabels | None,
    ) -> torch.Tensor:
        """Return the consistency term `[B, 1]` of D on real or generated images."""
        require(mismatched is not None, "chunk", f"mismatched labels for {source} images", None)
        term = vico.discriminator_term(self.D, features, logits, label, mismatched, self.config.vico)
        prefix = "Loss/vico/" if source == "real" else "Loss/vico_fake/"
        for name, value in term.stats.items():
            self.report(prefix + name, value)
        self.result.weighted_stats |= {prefix + name: value for name, value in term.weighted_stats.items()}
        return term.loss

    def report_logits(self, kind: str, logits: torch.Tensor) -> None:
        """Report logits of real or fake images and their signs."""
        self.report(f"Loss/scores/{kind}", logits)
        self.report(f"Loss/signs/{kind}", logits.sign())

    def report(self, name: str, value: torch.Tensor) -> None:
        """Keep a statistic."""
        self.result.stats[name] = value.detach()

    def backward(self, total: torch.Tensor) -> None:
        """Add the gradients of a scalar, times interval and weight."""
        total = total * self.gain
        total.backward()
        before = self.result.loss
        self.result.loss = total.detach() if before is None else before + total.detach()
