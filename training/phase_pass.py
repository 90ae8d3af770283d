"""One pass of a training phase: the terms of a loss on a chunk of samples, and their gradients.

Terms are in `training.loss` and `training.vico`. Random numbers come from the default generators in the published
order, so that a seed gives the published values.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from training import loss, vico
from training.augment import AugmentPipe
from training.config import require
from training.dual_discriminator import Discriminator, DiscriminatorFeatures, filtered_resizing
from training.schedules import ScheduleValues
from training.train_config import TrainConfig
from training.triplane import TriPlaneGenerator
from training.vico import MismatchedLabels, WeightedValues

_NUM_POINTS = 1000  # of the l1 and total-variation regularisers, per sample
_NUM_MONOTONIC_POINTS = 2000
_MONOTONIC_WEIGHT = 10.0
_MONOTONIC_STEPS = 256  # steps per side of the box


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


@dataclass(frozen=True)
class PassSetup:
    """What all passes of a run share."""

    G: TriPlaneGenerator
    D: Discriminator
    config: TrainConfig
    augment: AugmentPipe | None
    """None augments nothing."""
    inputs: tuple[str, ...]
    """Images that D sees."""
    mirror_signs: torch.Tensor
    """`[25]`: a label times these is that of the flipped image (`camera_utils.mirror_label`, which takes its list of
    entries to the device at every call, and waits)."""


@contextlib.contextmanager
def density_noise(G: TriPlaneGenerator, strength: float) -> Iterator[None]:
    """Set the density noise of a generator for the moment, so that it gets into no snapshot."""
    before = G.config
    G.config = dataclasses.replace(before, rendering=dataclasses.replace(before.rendering, density_noise=strength))
    try:
        yield
    finally:
        G.config = before


class Pass:
    """The terms of both networks on one chunk; each method adds its gradients and reports.

    Args:
        setup: networks and configuration.
        chunk: samples.
        values: schedules of this iteration.
        gain: factor of all gradients.
    """

    def __init__(self, setup: PassSetup, chunk: Chunk, values: ScheduleValues, gain: float) -> None:
        self.setup, self.chunk, self.values, self.gain = setup, chunk, values, gain
        self.G, self.D, self.config = setup.G, setup.D, setup.config
        self.result = PhaseResult()

    # ---- steps of the phases ----

    def generator(self) -> None:
        """Adversarial loss of G, its pose offsets and consistency."""
        images, offsets, _ = self.generate()
        inputs, label, _ = self.augmented(self.fake_inputs(images), self.chunk.label)
        features = self.D.features(inputs)
        logits = self.D.logits(features, label)
        self.report_logits("fake", logits)
        total = term = loss.generator_loss(logits)
        self.report("Loss/G/loss", term)
        vico_config = self.config.vico
        if vico_config.uses_head and vico_config.generator_weight > 0:
            term = vico.generator_term(self.D.consistency(features, label), vico_config)
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
            with density_noise(self.G, 0.0):  # differences of noise would hide those of the field
                sigma = self.query(ws, loss.stencil_points(batch, _NUM_POINTS, box_warp, step, device))
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
        views = self.chunk.label, self.chunk.mismatched_fake
        inputs, label, mismatched = self.augmented(self.fake_inputs(images), *views)
        features = self.D.features(inputs)
        logits = self.D.logits(features, label)
        self.report_logits("fake", logits)
        term = loss.discriminator_fake_loss(logits)
        self.report("Loss/D/loss", term)
        if self.config.vico.mode != "none" and self.config.vico.source in ("fake", "both"):
            term = term + self.vico("fake", features, logits, label, mismatched)
        self.backward(term.mean())

    def real_images(self, is_main: bool, is_reg: bool) -> None:
        """Adversarial loss of D on real images, and R1."""
        images = self.real_inputs()
        penalised = {}
        if is_reg:
            penalised = {name: images[name].requires_grad_() for name in images if self.r1_gamma(name) > 0}
        views = self.chunk.real_label, self.chunk.mismatched
        inputs, label, mismatched = self.augmented(images, *views)
        features = self.D.features(inputs)
        logits = self.D.logits(features, label)
        self.report_logits("real", logits)
        self.result.real_signs = logits.detach().sign()
        total = torch.zeros_like(logits)
        if is_main:
            term = loss.discriminator_real_loss(logits)
            self.report("Loss/D/loss", term + self.result.stats["Loss/D/loss"])
            total = total + term
            if self.config.vico.mode != "none" and self.config.vico.source in ("real", "both"):
                total = total + self.vico("real", features, logits, label, mismatched)
        if is_reg:
            total = total + self.r1(logits, penalised)[:, None]
        self.backward(total.mean())

    # ---- parts ----

    def generate(self) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor]:
        """Return images, camera offsets `[B, 3]` if there are any, and the mean `[w_dim]` of w."""
        G, chunk, config = self.G, self.chunk, self.config.loss
        conditioning = loss.swap_conditioning(chunk.label, self.values.swap_prob, chunk.num_groups)
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
        other = self.G.mapping(torch.randn_like(self.chunk.z), self.chunk.label)
        return loss.mix_styles(ws, other, cutoffs)

    def regulariser_latents(self) -> torch.Tensor:
        """Return the w-layers whose density is regularised; whole groups swap their conditioning."""
        label, groups = self.chunk.label, self.chunk.num_groups
        conditioning = loss.swap_conditioning_of_groups(label, self.values.swap_prob, groups)
        return self.mix_styles(self.G.mapping(self.chunk.z, conditioning))

    def query(self, ws: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Return the raw density `[B, M]` of w-layers at points `[B, M, 3]`."""
        torch.randn_like(points)  # the published code draws view directions here, which nothing reads
        return self.G.query_density(self.G.radiance_field(ws), points)

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
        for name in self.setup.inputs:
            source = "image" if name == "image_raw" else name
            require(source in real, "chunk.real", f"an entry '{source}'", sorted(real))
            image = real[source].detach()
            if name != "image":
                image = filtered_resizing(image, side, fir, self.config.loss.resize_mode)
            images[name] = loss.blur(image, self.values.blur_sigma) if source == "image" else image
        return images

    def fake_inputs(self, images: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what D sees of generated images before augmentation; the raw image is not blurred, as published."""
        images = {name: images[name] for name in self.setup.inputs}
        images["image"] = loss.blur(images["image"], self.values.blur_sigma)
        return images

    def augmented(
        self, images: dict[str, torch.Tensor], label: torch.Tensor, mismatched: MismatchedLabels | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, MismatchedLabels | None]:
        """Augment what D sees, if there is a pipe.

        Labels stay, as published, unless view-image consistency is on: then those of flipped images are mirrored.
        """
        pipe = self.setup.augment
        if pipe is None:
            return images, label, mismatched
        if self.config.vico.mode == "none":
            return pipe(images), label, mismatched
        drawn = pipe.draw(len(label), tuple(images["image"].shape[-2:]))
        signs = torch.where(drawn.flipped[:, None], self.setup.mirror_signs, 1.0)
        if mismatched is not None:
            mismatched = mismatched._replace(labels=mismatched.labels * signs)
        return pipe.apply_transforms(images, drawn), label * signs, mismatched

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
        features: DiscriminatorFeatures,
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
