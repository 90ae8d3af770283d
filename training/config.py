"""Typed, frozen configuration of the networks.

Every field has a default only where the published systems agree on one. `dnnlib.serialize` turns a configuration into
strict JSON and back; `training.published_kwargs` translates the keyword arguments of EG3D-family code.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from dnnlib.serialize import ABSENT

NoiseMode = Literal["random", "const", "none"]
Architecture = Literal["orig", "skip", "resnet"]
FusedModconv = Literal["inference_only"] | bool
DecoderActivation = Literal["sigmoid", "lrelu", "none"]
HalfPrecision = Literal["float16", "bfloat16"]

W_DIM = 512  # the super-resolution modules of all published systems hard-code it
LABEL_DIM = 25
_MAX_MAPPING_LAYERS = 64  # a damaged file may ask for any number; building them takes time, unlike wide ones


def require(condition: bool, name: str, expected: str, came: object) -> None:
    """Raise a `ValueError` that names the field, what was expected and what came, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {came!r}")


def _require_at_least(name: str, value: float, minimum: float) -> None:
    require(isinstance(value, Real) and value >= minimum, name, f"at least {minimum}", value)


def _require_power_of_two(name: str, value: int, minimum: int) -> None:
    valid = isinstance(value, Integral) and value >= minimum and value & (value - 1) == 0
    require(valid, name, f"a power of two of at least {minimum}", value)


@dataclass(frozen=True, kw_only=True)
class MappingConfig:
    """Mapping network z, c -> w."""

    num_layers: int = 2
    """Fully connected layers after the label embedding."""
    embed_features: int | None = None
    """Width of the label embedding; None is the output width."""
    layer_features: int | None = None
    """Width of the hidden layers; None is the output width."""
    activation: str = "lrelu"
    lr_multiplier: float = 0.01
    """Learning-rate multiplier of the layers (the embedding has 1)."""
    w_avg_beta: float | None = 0.998
    """Decay of the running mean of w, for truncation; None keeps no mean."""

    def __post_init__(self) -> None:
        valid = isinstance(self.num_layers, Integral) and 1 <= self.num_layers <= _MAX_MAPPING_LAYERS
        require(valid, "mapping.num_layers", f"1 to {_MAX_MAPPING_LAYERS}", self.num_layers)


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """StyleGAN2 synthesis network."""

    channel_base: int = 32768
    """Channels at resolution r are `min(channel_base // r, channel_max)`."""
    channel_max: int = 512
    num_fp16_res: int = 0
    """The highest resolutions that run in half precision on CUDA."""
    half_precision: HalfPrecision = "float16"
    """Which half precision that is (ours; published networks have float16)."""
    conv_clamp: float | None = None
    """Bound of layer outputs, against overflow in half precision; None does not clamp."""
    architecture: Architecture = "skip"
    fused_modconv: FusedModconv = "inference_only"
    """Whether styles are multiplied into per-sample weights rather than into activations."""

    def __post_init__(self) -> None:
        _require_at_least("synthesis.channel_base", self.channel_base, 1)
        _require_at_least("synthesis.channel_max", self.channel_max, 1)

    def channels(self, resolution: int) -> int:
        """Return the number of feature channels at a resolution; `ValueError` if there are none."""
        require(self.channel_base >= resolution, "synthesis.channel_base", f"at least {resolution}", self.channel_base)
        return min(self.channel_base // resolution, self.channel_max)

    def background(self) -> SynthesisConfig:
        """Return the configuration of the background network: half as wide."""
        return dataclasses.replace(self, channel_base=self.channel_base // 2)


@dataclass(frozen=True, kw_only=True)
class SuperresolutionConfig:
    """Super-resolution module."""

    variant: str
    """A row of `training.superresolution.VARIANTS`."""
    num_fp16_res: int = 4
    """Above 0, both blocks run in half precision on CUDA and clamp at 256 everywhere."""
    half_precision: HalfPrecision = "float16"
    antialias: bool = True
    """Antialias when the input must be resized."""
    noise_mode: Literal["none", "random"] = "none"
    fused_modconv: FusedModconv = "inference_only"
    first_rgb_replaces_raw: bool = False
    """Return as raw image the image after the first block, where that block does not upsample and no resize happened.
    The published code did so by accident (an in-place addition); its discriminators were trained on such images."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Decoder from plane features to density and colour features."""

    activation: DecoderActivation = "none"
    """Activation of the colour features."""
    lr_multiplier: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """What the mapping networks see of the conditioning label."""

    zero: bool = False
    """Replace the label by zeros."""
    scale: float = 1.0
    """Factor on the label."""


@dataclass(frozen=True, kw_only=True)
class RenderingConfig:
    """Volume rendering: how rays are sampled and composited."""

    depth_resolution: int = 48
    """Stratified samples per ray."""
    depth_resolution_importance: int = 48
    """Samples per ray drawn from the weights of the first pass; 0 leaves the second pass out."""
    ray_start: float | Literal["auto"] = 2.25
    """Distance of the first sample from the camera; 'auto' intersects each ray with the box."""
    ray_end: float | Literal["auto"] = 3.3
    box_warp: float = 1.0
    """Side of the axis-aligned cube around the origin that the planes cover, in world units."""
    crop_margin: float | None = 0.1
    """Density is removed nearer than this to the x and z faces of the cube, in world units; None removes nothing."""
    white_back: bool = False
    """Composite over white."""
    disparity_space_sampling: bool = False
    """Space the coarse samples evenly in 1 / depth."""
    clamp_mode: Literal["softplus"] = "softplus"
    """Activation of the raw density; published settings name it, and there is no other."""
    density_noise: float = 0.0
    """Standard deviation of Gaussian noise on the raw density (a training schedule)."""
    depth_clamp: Literal["ray", "batch"] = "ray"
    """Depths are limited to the sampled range of their own ray, or (as published) of the whole batch: rays that hit
    nothing then take their depth from other images of the batch."""
    auto_range_of_misses: Literal["longest", "nearest"] = "longest"
    """With 'auto' limits, rays that miss the box end at the largest far limit of the others, or (as published) at the
    largest near limit."""
    importance_draws: Literal["stratified", "random"] = field(default="stratified", metadata={ABSENT: "random"})
    """Samples of the second pass are spread evenly over the distribution function, or (as published) drawn
    independently of each other: rays with few samples then miss the surface here and there, which shows as specks."""

    def __post_init__(self) -> None:
        _require_at_least("rendering.depth_resolution", self.depth_resolution, 2)
        _require_at_least("rendering.depth_resolution_importance", self.depth_resolution_importance, 0)
        require(
            self.depth_resolution_importance == 0 or self.depth_resolution >= 4,
            "rendering.depth_resolution",
            "at least 4 with importance sampling",
            self.depth_resolution,
        )
        require(self.clamp_mode == "softplus", "rendering.clamp_mode", "'softplus'", self.clamp_mode)
        positive = isinstance(self.box_warp, Real) and self.box_warp > 0
        require(positive, "rendering.box_warp", "a positive side", self.box_warp)
        _require_at_least("rendering.density_noise", self.density_noise, 0)

    def require_range(self) -> None:
        """Raise a `ValueError` unless `ray_start` and `ray_end` belong together.

        Checked when rays are rendered, not at construction: scripts assign one after the other.
        """
        limits = (self.ray_start, self.ray_end)
        numbers = all(isinstance(limit, Real) for limit in limits)
        valid = numbers or limits == ("auto", "auto")
        require(valid, "rendering.ray_start, ray_end", "both numbers or both 'auto'", limits)
        require(not numbers or limits[0] < limits[1], "rendering.ray_start, ray_end", "start before end", limits)

    @property
    def auto_range(self) -> bool:
        """Whether each ray's limits come from the box."""
        return self.ray_start == "auto"


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """3D-aware generator: StyleGAN2 backbone -> planes -> volume rendering -> super-resolution."""

    z_dim: int = 512
    c_dim: int = LABEL_DIM
    w_dim: int = W_DIM
    img_resolution: int
    img_channels: int = 3
    representation: str = "dual_spherical"
    """A name registered in `training.representations`."""
    plane_resolution: int = 256
    plane_depth: int = 3
    """Depth of the tri-grid. Otherwise fixed: 3 (planes per sphere) for dual spherical, 1 for the tri-plane."""
    pose_offset: bool = True
    """Learn a camera translation per latent (PanoHead, 'camera self-adaptation')."""
    background: bool = True
    """Synthesise a background image behind the volume."""
    raw_torgb: bool = True
    """Make the raw image by a style-modulated layer; otherwise it is the first three feature channels."""
    parsing_classes: int = 0
    """Classes of the semantic head; 0 leaves it out."""
    mapping: MappingConfig = MappingConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    decoder: DecoderConfig = DecoderConfig()
    superresolution: SuperresolutionConfig
    conditioning: ConditioningConfig = ConditioningConfig()
    rendering: RenderingConfig = RenderingConfig()
    neural_rendering_resolution: int = 64
    """Side of the volume-rendered image before super-resolution, in pixels."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Entries of a published `rendering_kwargs` that the generator itself does not use: hints for scripts
    (`avg_camera_radius`, `avg_camera_pivot`) and training settings."""

    def __post_init__(self) -> None:
        _require_power_of_two("img_resolution", self.img_resolution, 64)
        _require_power_of_two("plane_resolution", self.plane_resolution, 4)
        require(self.w_dim == W_DIM, "w_dim", f"{W_DIM} (super-resolution needs it)", self.w_dim)
        require(self.c_dim == LABEL_DIM, "c_dim", f"{LABEL_DIM} (pose and intrinsics)", self.c_dim)
        _require_at_least("z_dim", self.z_dim, 1)
        require(self.img_channels == 3, "img_channels", "3", self.img_channels)
        _require_at_least("parsing_classes", self.parsing_classes, 0)
        _require_at_least("neural_rendering_resolution", self.neural_rendering_resolution, 1)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Camera-conditioned residual discriminator over stacked input images."""

    variant: str = "HoloDiscriminator"
    """A row of `training.dual_discriminator.VARIANTS`."""
    c_dim: int = LABEL_DIM
    img_resolution: int
    img_channels: int = 3
    seg_resolution: int | None = None
    """Input size of the separate mask tower, where the variant has one."""
    seg_channels: int = 1
    parsing_channels: int = 20
    architecture: Architecture = "resnet"
    channel_base: int = 32768
    channel_max: int = 512
    num_fp16_res: int = 4
    half_precision: HalfPrecision = "float16"
    conv_clamp: float | None = 256
    cmap_dim: int | None = None
    """Width of the label projection; None is the width at 4 x 4."""
    disc_c_noise: float = 0.0
    """Label noise, in batch standard deviations per dimension."""
    mapping_layers: int = 8
    mapping_lr_multiplier: float = 0.01
    freeze_layers: int = 0
    """Freeze-D: layers, counted from the highest resolution, that do not train."""
    mbstd_group_size: int | None = 4
    """Samples per minibatch-standard-deviation group; None is the whole batch."""
    mbstd_num_channels: int = 1
    view_head_features: int = 0
    """Width of the embeddings of the view-image consistency head (ours); 0 leaves the head out."""

    def __post_init__(self) -> None:
        _require_at_least("discriminator.view_head_features", self.view_head_features, 0)
        _require_power_of_two("discriminator.img_resolution", self.img_resolution, 8)
        if self.seg_resolution is not None:
            _require_power_of_two("discriminator.seg_resolution", self.seg_resolution, 8)
        _require_at_least("discriminator.disc_c_noise", self.disc_c_noise, 0)
        if self.mbstd_group_size is not None:
            _require_at_least("discriminator.mbstd_group_size", self.mbstd_group_size, 1)

    def channels(self, resolution: int) -> int:
        """Return the number of feature channels at a resolution; `ValueError` if there are none."""
        base = self.channel_base
        require(base >= resolution, "discriminator.channel_base", f"at least {resolution}", base)
        return min(base // resolution, self.channel_max)
