"""Typed, frozen configuration of a training run.

`train.py` builds a `TrainConfig` from its options and writes it to `options.json`; training reads nothing else. Values
that change during a run are functions of these fields and of `cur_nimg`, see `training.schedules`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from training.config import DiscriminatorConfig, GeneratorConfig, require

DensityRegType = Literal["l1", "monotonic-detach", "monotonic-fixed", "total-variation"]
VicoMode = Literal["none", "label", "head", "both"]
VicoSource = Literal["real", "fake", "both"]
AugmentMode = Literal["noaug", "ada", "fixed"]


def _require_share(name: str, value: float) -> None:
    require(0 <= value <= 1, name, "a number from 0 to 1", value)


def _require_not_negative(owner: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(value >= 0, f"{prefix}.{name}", "0 or more", value)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images of heads with camera labels, and what belongs to them."""

    images: tuple[str, ...]
    """Folders or zip files with `dataset.json`; several are read as one data set, in this order."""
    masks: tuple[str, ...] = ()
    """Foreground masks, matched by path without extension: none, or one root for each of `images`."""
    parsing: tuple[str, ...] = ()
    """Maps of class indices, matched like masks: none, or one root for each of `images`."""
    resolution: int
    """Side of the images, in pixels; no image is resized."""
    parsing_classes: int = 0
    """Classes of the parsing maps; indices are below it. 0 where there are no maps."""
    conditional: bool = True
    """Whether camera labels are read; without them labels are zeros, and poses are not filtered. Training needs them,
    also where neither network is told them."""
    mirror: bool = False
    """Add the left-right flipped copy of every image, with the flipped camera."""
    min_yaw_deg: float = 0.0
    """Images with a smaller absolute yaw are left out."""
    max_yaw_deg: float = 180.0
    max_pitch_deg: float = 90.0
    """Images with a larger absolute pitch are left out."""
    back_repeat: int = 1
    """How many times an image with an absolute yaw of at least 90 degrees appears."""
    published_angles: bool = False
    """Measure yaw and pitch by the published formula, which drops views near profile; otherwise by true angles."""
    max_images: int | None = None
    """Use a random subset of this size; None is all."""
    skip_bad: bool = False
    """Leave out images that cannot be used, count and report them; otherwise the first one is an error."""

    def __post_init__(self) -> None:
        require(len(self.images) > 0, "data.images", "at least one folder or zip file", self.images)
        for name in ("masks", "parsing"):
            roots = getattr(self, name)
            require(
                len(roots) in (0, len(self.images)), f"data.{name}", f"none or {len(self.images)} roots", len(roots)
            )
        require((self.parsing_classes > 0) == (len(self.parsing) > 0), "data.parsing_classes", "set with parsing", self)
        require(self.back_repeat >= 1, "data.back_repeat", "at least 1", self.back_repeat)
        require(self.max_images is None or self.max_images >= 1, "data.max_images", "at least 1", self.max_images)
        _require_not_negative(self, "data", "min_yaw_deg", "max_yaw_deg", "max_pitch_deg")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Loss terms of generator and discriminator, and their schedules; a fade of 0 kimg is over at once."""

    r1_gamma: float
    """Weight of the R1 penalty on image and raw image; 0 leaves R1 out altogether."""
    r1_gamma_mask: float = 0.0
    """Weight of the R1 penalty on the mask."""
    r1_gamma_parsing: float = 0.0
    """Weight of the R1 penalty on the parsing map (ours)."""
    density_reg: float = 0.25
    """Weight of the density regulariser; 0 leaves it out."""
    density_reg_type: DensityRegType = "l1"
    density_reg_perturbation: float = 0.004
    """Standard deviation, in world units, of the distance between the points of a pair (l1)."""
    pose_offset_reg: float = 0.0
    """Weight of the penalty on the mean learned camera offset (published `trans_reg`)."""
    style_mixing_prob: float = 0.0
    conditioning_swap_prob: float | None = 0.5
    """Probability, after the fade, that a generator is conditioned on the camera of another sample (published
    `gpc_reg_prob`); before the fade it is 1. None conditions on a zero label."""
    conditioning_swap_fade_kimg: float = 1000.0
    background_swap_prob: float = 0.0
    """Probability that the background comes from another latent (published `bcg_reg_prob`)."""
    blur_init_sigma: float = 10.0
    """Standard deviation (base 2) of the blur of images at the start, in pixels."""
    blur_fade_kimg: float = 200.0
    """The blur falls to 0 within this many thousand images; 0 does not blur."""
    density_noise_fade_kimg: float = 0.0
    """Noise on the raw density falls from 1 to 0 within this many thousand images; 0 adds none."""
    neural_rendering_resolution_initial: int = 64
    neural_rendering_resolution_final: int | None = None
    """Side of the volume-rendered image after the fade; None keeps the initial one."""
    neural_rendering_resolution_fade_kimg: float = 1000.0
    resize_mode: Literal["antialiased", "none", "classic"] = "antialiased"
    """How real images are resized to the raw image, see `training.dual_discriminator.filtered_resizing`."""

    def __post_init__(self) -> None:
        _require_not_negative(
            *(self, "loss", "r1_gamma", "r1_gamma_mask", "r1_gamma_parsing", "density_reg"),
            *("density_reg_perturbation", "pose_offset_reg", "conditioning_swap_fade_kimg", "blur_init_sigma"),
            *("blur_fade_kimg", "density_noise_fade_kimg", "neural_rendering_resolution_fade_kimg"),
        )
        _require_share("loss.style_mixing_prob", self.style_mixing_prob)
        _require_share("loss.background_swap_prob", self.background_swap_prob)
        if self.conditioning_swap_prob is not None:
            _require_share("loss.conditioning_swap_prob", self.conditioning_swap_prob)
        for name in ("neural_rendering_resolution_initial", "neural_rendering_resolution_final"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"loss.{name}", "at least 1 pixel", value)


@dataclass(frozen=True, kw_only=True)
class VicoConfig:
    """View-image consistency (our design: the paper names the loss and does not define it)."""

    mode: VicoMode = "none"
    """`label`: the discriminator's own logit must reject images with the camera of another one. `head`: a separate
    head, which must be in the discriminator, learns whether image and camera belong together. `both`, or `none`."""
    weight: float = 1.0
    source: VicoSource = "real"
    """Which images are shown with mismatched cameras."""
    min_angle_deg: float = 45.0
    """Least angle between the view directions of an image and its mismatched camera."""
    hard_share: float = 0.5
    """Share of mismatched cameras that are taken opposite in yaw (a face as seen from behind)."""
    generator_weight: float = 1.0
    """Weight of the generator's consistency term, in the modes with a head."""

    def __post_init__(self) -> None:
        _require_not_negative(self, "vico", "weight", "generator_weight")
        require(0 < self.min_angle_deg < 180, "vico.min_angle_deg", "above 0 and below 180", self.min_angle_deg)
        _require_share("vico.hard_share", self.hard_share)

    @property
    def uses_labels(self) -> bool:
        """Whether the discriminator's own logit is shown mismatched cameras."""
        return self.mode in ("label", "both")

    @property
    def uses_head(self) -> bool:
        """Whether the discriminator has a consistency head."""
        return self.mode in ("head", "both")


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """Reconstruction before adversarial training (ours), see `training.reconstruction`."""

    kimg: float = 0.0
    """Thousand images of it, rounded up to whole batches; 0 leaves it out."""
    other_view_share: float = 0.5
    """Share of targets that are another view of the identity, where the data set names identities; the others are the
    view that was encoded."""
    raw_weight: float = 1.0
    """Weight of the squared error of the raw image; that of the image has the weight 1."""
    mask_weight: float = 1.0
    """Weight of the squared error of the mask, where the data set has masks."""
    parsing_weight: float = 1.0
    """Weight of the squared error of the parsing map, where there is one."""
    perceptual_weight: float = 1.0
    """Weight of the pyramid distance."""
    kl_weight: float = 2e-4
    """Weight of the divergence of the encoder's latents from normal ones, in nats of a whole latent."""
    generator_lr: float = 0.0025
    encoder_lr: float = 5e-4
    betas: tuple[float, float] = (0.5, 0.99)
    """Of Adam for both."""
    after_interval: int | None = None
    """After the warm-up, take a step of reconstruction in every iteration that is a multiple of it; None takes none."""

    def __post_init__(self) -> None:
        weights = ("raw_weight", "mask_weight", "parsing_weight", "perceptual_weight", "kl_weight")
        _require_not_negative(self, "warmup", "kimg", *weights)
        _require_share("warmup.other_view_share", self.other_view_share)
        for name in ("generator_lr", "encoder_lr"):
            require(getattr(self, name) > 0, f"warmup.{name}", "above 0", getattr(self, name))
        for beta in self.betas:
            require(0 <= beta < 1, "warmup.betas", "0 to below 1", beta)
        interval = self.after_interval
        require(interval is None or interval >= 1, "warmup.after_interval", "at least 1", interval)
        require(interval is None or self.kimg > 0, "warmup.kimg", "above 0 with warmup.after_interval", self.kimg)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of what the discriminator sees (Karras et al. 2020, ADA)."""

    mode: AugmentMode = "noaug"
    """`ada` adapts the strength, `fixed` keeps `p`."""
    p: float = 0.2
    """Strength of `fixed`."""
    target: float = 0.6
    """What `ada` holds the mean sign of real logits at."""
    ada_kimg: float = 500.0
    """Thousand images in which the strength of `ada` can go from 0 to 1."""

    def __post_init__(self) -> None:
        _require_share("augment.p", self.p)
        _require_share("augment.target", self.target)
        require(self.ada_kimg > 0, "augment.ada_kimg", "above 0", self.ada_kimg)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam for both networks, with lazy regularisation (Karras et al. 2020, appendix B)."""

    generator_lr: float = 0.0025
    discriminator_lr: float = 0.002
    betas: tuple[float, float] = (0.0, 0.99)
    eps: float = 1e-8
    generator_reg_interval: int = 4
    """Iterations between density regularisations; in force where there is one."""
    discriminator_reg_interval: int = 16
    """Iterations between R1 penalties."""

    def __post_init__(self) -> None:
        for name in ("generator_lr", "discriminator_lr", "eps"):
            require(getattr(self, name) > 0, f"optimizer.{name}", "above 0", getattr(self, name))
        for name in ("generator_reg_interval", "discriminator_reg_interval"):
            require(getattr(self, name) >= 1, f"optimizer.{name}", "at least 1", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Arithmetic and memory formats; half precision by blocks is part of the networks' own configuration."""

    tf32: bool = False
    """Let CUDA multiply float32 in TF32."""
    cudnn_benchmark: bool = True
    channels_last: bool = False
    """Keep images and convolution weights channels-last."""
    compile: bool = False
    """Compile the networks with torch.compile."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how much at a time, and what is kept."""

    batch_size: int
    """Images per optimiser step, over all processes."""
    batch_gpu: int
    """Images that one process computes at a time; gradients are accumulated over several such chunks."""
    total_kimg: float = 25000.0
    tick_kimg: float = 4.0
    """Thousand images between two lines of statistics."""
    snapshot_ticks: int | None = 50
    """Ticks between network snapshots; None only writes the last."""
    image_ticks: int | None = 50
    """Ticks between image grids; None writes none."""
    state_ticks: int | None = 10
    """Ticks between training states; None only writes the last, and on a signal."""
    keep_states: int = 2
    """How many training states are kept."""
    metrics: tuple[str, ...] = ()
    """Metrics of the moving average that are computed after every snapshot, see `metrics.metric_main`."""
    ema_kimg: float = 10.0
    """Half-life of the moving average of the generator's weights."""
    ema_rampup: float | None = 0.05
    """The half-life is at most this times the images seen so far; None does not limit it."""
    seed: int = 0
    workers: int = 3
    """Processes that read images, for each training process; 0 reads in the training process."""
    max_skipped_steps: int = 20
    """Optimiser steps in a row that may be skipped for non-finite gradients before training stops."""
    start_nimg: int = 0
    """Where `cur_nimg`, which drives all schedules, starts (published `--resume-kimg`)."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_gpu", "keep_states", "max_skipped_steps"):
            require(getattr(self, name) >= 1, f"loop.{name}", "at least 1", getattr(self, name))
        for name in ("snapshot_ticks", "image_ticks", "state_ticks"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"loop.{name}", "at least 1", value)
        _require_not_negative(self, "loop", "total_kimg", "ema_kimg", "seed", "workers", "start_nimg")
        require(self.tick_kimg > 0, "loop.tick_kimg", "above 0", self.tick_kimg)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines a training run, apart from the number of processes and the device."""

    preset: str
    """The preset it was made from; only a name."""
    data: DataConfig
    generator: GeneratorConfig
    discriminator: DiscriminatorConfig
    loss: LossConfig
    vico: VicoConfig = VicoConfig()
    warmup: WarmupConfig = WarmupConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    loop: LoopConfig
    resume_from: str | None = None
    """Published or own snapshot from which the networks start (fine-tuning)."""

    def __post_init__(self) -> None:
        side = self.generator.img_resolution
        for name, came in (("data", self.data), ("discriminator", self.discriminator)):
            resolution = came.resolution if name == "data" else came.img_resolution
            require(resolution == side, f"{name} resolution", f"the generator's {side}", resolution)
        require(
            self.vico.uses_head == (self.discriminator.view_head_features > 0),
            "discriminator.view_head_features",
            "above 0 exactly where vico.mode has a head",
            self.discriminator.view_head_features,
        )
        told = self.discriminator.c_dim > 0
        require(self.vico.mode == "none" or told, "vico.mode", "'none' if D is not told cameras", self.vico.mode)
        require(self.data.conditional, "data.conditional", "true: cameras are needed to render from", False)

    @property
    def warmup_end_nimg(self) -> int:
        """`cur_nimg` where adversarial training begins; where the run starts, if there is no warm-up."""
        batch_size = self.loop.batch_size
        return self.loop.start_nimg + math.ceil(self.warmup.kimg * 1000 / batch_size) * batch_size

    def schedule_nimg(self, cur_nimg: int) -> int:
        """Return the argument of schedules after `cur_nimg` images: they stand still during the warm-up."""
        return self.loop.start_nimg + max(cur_nimg - self.warmup_end_nimg, 0)

    def has_encoder(self, cur_nimg: int) -> bool:
        """Return whether the encoder of the warm-up is needed, or needed later, after `cur_nimg` images."""
        return cur_nimg < self.warmup_end_nimg or self.warmup.after_interval is not None
