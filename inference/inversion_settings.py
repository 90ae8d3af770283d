"""Settings of an inversion: what can be chosen, with the published numbers as defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from training.config import require

LatentSpace = Literal["w+", "w"]
TunablePart = Literal["backbone", "decoder", "background", "superresolution"]
PoseOffset = Literal["none", "published"]
TUNABLE_PARTS: tuple[TunablePart, ...] = get_args(TunablePart)


def _require_at_least(name: str, value: float, minimum: float) -> None:
    require(value >= minimum, name, f"at least {minimum}", value)


def _require_positive(name: str, value: float) -> None:
    require(value > 0, name, "above 0", value)


@dataclass(frozen=True, kw_only=True)
class ProjectionSettings:
    """Stage 1, search of a latent (Karras et al. 2020, appendix D; the published projector)."""

    num_steps: int = 500
    space: LatentSpace = "w+"
    """'w+': one w for every layer; 'w': the same for all."""
    learning_rate: float = 0.1
    """Adam's, at the top of its ramps."""
    rampup: float = 0.05
    """Share of the steps over which the learning rate rises linearly from 0."""
    rampdown: float = 0.25
    """Share of the steps, at the end, over which it falls to 0 along a cosine."""
    w_noise: float = 0.05
    """Standard deviation of the noise on w at the start, in units of the spread of w."""
    w_noise_length: float = 0.75
    """Share of the steps over which that noise falls to 0, quadratically."""
    mse_weight: float = 0.1
    perceptual_weight: float = 1.0
    w_norm_weight: float = 1.0
    """On the mean squared distance of w from the mean w."""
    optimize_noise: bool = False
    """Search the fixed layer noise of the backbone too."""
    noise_weight: float = 1e5
    """On what keeps that noise uncorrelated."""
    num_w_samples: int = 10_000
    """Latents from which mean and spread of w are measured."""
    w_sample_seed: int = 123

    def __post_init__(self) -> None:
        for name in ("num_steps", "learning_rate", "rampdown", "rampup", "w_noise_length", "num_w_samples"):
            _require_positive(f"projection.{name}", getattr(self, name))
        for name in ("w_noise", "mse_weight", "perceptual_weight", "w_norm_weight", "noise_weight", "w_sample_seed"):
            _require_at_least(f"projection.{name}", getattr(self, name), 0)
        require(self.space in get_args(LatentSpace), "projection.space", "'w+' or 'w'", self.space)


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """Stage 2, pivotal tuning of the weights around the latent that was found (Roich et al. 2021)."""

    num_steps: int = 350
    learning_rate: float = 3e-4
    """Adam's, constant."""
    mse_weight: float = 0.1
    perceptual_weight: float = 1.0
    parts: tuple[TunablePart, ...] = TUNABLE_PARTS
    """What is tuned: 'backbone' (with the layers to the planes), 'decoder', 'background', 'superresolution' (with the
    ToRGB of the raw image). The rest is frozen, and computed once where it does not change."""
    locality_weight: float = 0.0
    """On the change of other heads (paper, equations 4 and 5), which costs two renderings more; published code: 0."""
    locality_alpha: float = 30.0
    """Distance of those heads from the pivot, in w."""
    locality_interval: int = 1
    """Steps from one of those heads to the next."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "learning_rate", "locality_alpha", "locality_interval"):
            _require_positive(f"tuning.{name}", getattr(self, name))
        for name in ("mse_weight", "perceptual_weight", "locality_weight"):
            _require_at_least(f"tuning.{name}", getattr(self, name), 0)
        valid = 0 < len(self.parts) == len(set(self.parts)) and set(self.parts) <= set(TUNABLE_PARTS)
        require(valid, "tuning.parts", f"some of {', '.join(TUNABLE_PARTS)}, each once", self.parts)


@dataclass(frozen=True, kw_only=True)
class CameraSettings:
    """Refinement of the camera: seven small unknowns, each in units of the error that is to be expected."""

    refine: bool = False
    in_tuning: bool = True
    """Go on with it in stage 2, where `refine` is set."""
    learning_rate: float = 0.05
    """Adam's in stage 1, in those units; it has the ramps of the latent's."""
    tuning_learning_rate: float = 0.01
    """The same in stage 2, constant."""
    rotation_deg: float = 3.0
    """Unit of the rotation around the centre of the head; 0 keeps it."""
    translation: float = 0.03
    """Unit of the shift along the axes of the camera, in world units; 0 keeps it."""
    log_focal: float = 0.03
    """Unit of the logarithm of the focal length's factor; 0 keeps it."""
    weight: float = 1e-3
    """On the sum of squared unknowns, which keeps what the photo does not tell (focal length against distance)."""
    start: float = 0.1
    """Share of the steps of stage 1 after which it begins, so that the latent is a head by then."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "tuning_learning_rate"):
            _require_positive(f"camera.{name}", getattr(self, name))
        for name in ("rotation_deg", "translation", "log_focal", "weight"):
            _require_at_least(f"camera.{name}", getattr(self, name), 0)
        require(0 <= self.start < 1, "camera.start", "0 to below 1", self.start)
        units = (self.rotation_deg, self.translation, self.log_focal)
        require(not self.refine or any(units), "camera", "a unit above 0 for something to refine", units)


@dataclass(frozen=True, kw_only=True)
class InversionSettings:
    """All settings of both stages; strict JSON by `dnnlib.serialize`."""

    projection: ProjectionSettings = ProjectionSettings()
    tuning: TuningSettings = TuningSettings()
    camera: CameraSettings = CameraSettings()
    seed: int = 303
    """Of all random numbers but those that measure w."""
    ray_start: float | None = None
    """Distance of the first sample from the camera, also in the tuned network. None: the published 2.35 where the
    network's own range is the published 2.25 to 3.3, else the network's own."""
    background_weight: float = 0.1
    """With a mask: weight of what is outside of the head, where 1 is the published loss; without a mask no effect."""
    silhouette_weight: float = 0.0
    """With a mask: weight of the mean squared difference between it and the opacity of the head."""
    pose_offset: PoseOffset = "none"
    """'published': shift the camera as `projector_withseg` does, by the learned offset of the mean latent."""

    def __post_init__(self) -> None:
        _require_at_least("seed", self.seed, 0)
        if self.ray_start is not None:
            _require_positive("ray_start", self.ray_start)
        require(0 <= self.background_weight <= 1, "background_weight", "0 to 1", self.background_weight)
        _require_at_least("silhouette_weight", self.silhouette_weight, 0)
        require(self.pose_offset in get_args(PoseOffset), "pose_offset", "'none' or 'published'", self.pose_offset)
