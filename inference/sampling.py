"""Heads from latents, and views of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import camera_utils
from torch_utils.pictures import colors_to_uint8, depth_to_uint8, mask_to_uint8, parsing_to_uint8
from training.config import NoiseMode, require
from training.networks_stylegan2 import SynthesisOptions
from training.triplane import RadianceField, TriPlaneGenerator

ImageMode = Literal["image", "image_raw", "image_depth", "image_mask", "image_parsing"]
IMAGE_MODES: tuple[ImageMode, ...] = ("image", "image_raw", "image_depth", "image_mask", "image_parsing")

DEFAULT_FOV_DEG = 18.837
FRONT_DEG = 90.0  # of the published pose_cond, whose angles start at the +x side
STRIP_VERTICAL = math.pi / 2 - 0.2
FULL_STRIP_YAW_RAD = tuple(-k * math.pi / 4 for k in range(5))  # front to back
FRONTAL_STRIP_YAW_RAD = (0.4, 0.0, -0.4)  # EG3D, which knows faces only


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """How far latents may lie from the mean."""

    psi: float = 0.7
    """Share of the distance kept; 1 keeps all."""
    cutoff: int | None = 14
    """Layers that are truncated; None is all."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Randomness of a rendering: layer noise and the jitter of samples along rays."""

    mode: NoiseMode = "const"
    """Layer noise. With 'random', which is new for every view, planes cannot be reused from view to view."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.seed >= 0, "noise seed", "at least 0", self.seed)

    def stream_seed(self, stream: int) -> int:
        """Return the seed of a stream of random numbers; mixed, because PyTorch's on the CPU uses the low 32 bits."""
        return int(np.random.SeedSequence((self.seed, stream)).generate_state(1, np.uint64)[0])


class Head:
    """One generated head: latents and, computed once, what does not depend on the camera."""

    def __init__(self, generator: TriPlaneGenerator, ws: torch.Tensor, noise: Noise | None = None) -> None:
        """Wrap w-layers.

        Args:
            generator: that the layers belong to.
            ws: `[1, L, 512]`, or `[L, 512]`.
            noise: None is fixed layer noise and seed 0.
        """
        device = next(generator.parameters()).device
        ws = (ws.unsqueeze(0) if ws.ndim == 2 else ws).to(device)
        expected = (1, generator.backbone.num_ws, generator.w_dim)
        require(tuple(ws.shape) == expected, "ws", f"shape {expected}", tuple(ws.shape))
        self.generator, self.ws, self.noise = generator, ws, noise or Noise()
        self._random = torch.Generator(device=device)
        self._options = SynthesisOptions(noise_mode=self.noise.mode, generator=self._random)
        self._field: RadianceField | None = None

    @property
    def field(self) -> RadianceField:
        """The radiance field, computed at first use; with random layer noise, that of view 0."""
        if self._field is None:
            self._seed(view=0)
            self._field = self._new_field()
        return self._field

    def _seed(self, view: int) -> None:
        """Start the random numbers of a view, which are those of view 0 unless layer noise is random."""
        self._random.manual_seed(self.noise.stream_seed(view if self.noise.mode == "random" else 0))

    @torch.no_grad()
    def _new_field(self) -> RadianceField:
        return self.generator.radiance_field(self.ws, options=self._options)

    @torch.no_grad()
    def render(
        self, label: torch.Tensor, view: int = 0, neural_rendering_resolution: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Render from a camera.

        Args:
            label: `[25]` or `[1, 25]`.
            view: number of the view, which chooses the noise where it is random. Ray jitter is otherwise the same in
                every view, so that it does not flicker.
            neural_rendering_resolution: None is the generator's own.

        Returns:
            images `[1, C, H, W]` by name; see `TriPlaneGenerator.render`.

        Raises:
            ValueError: the label is not that of a camera; see `camera_utils.check_label`.
        """
        label = label.reshape(1, -1)
        camera_utils.check_label(label)
        reused = None if self.noise.mode == "random" else self.field
        self._seed(view)
        return self.generator.render(reused or self._new_field(), label.to(self.ws.device), neural_rendering_resolution)


def make_head(
    generator: TriPlaneGenerator,
    seed: int,
    truncation: Truncation | None = None,
    noise: Noise | None = None,
    pose_cond_deg: float = FRONT_DEG,
) -> Head:
    """Make the head of a seed.

    Args:
        generator: from `load_generator`.
        seed: of the latent.
        truncation: None is the default of `Truncation`.
        noise: None is fixed layer noise and seed 0.
        pose_cond_deg: azimuth of the camera that the mapping network is told, 90 in front of the face.
    """
    return Head(generator, seed_ws(generator, [seed], truncation or Truncation(), pose_cond_deg), noise)


@torch.no_grad()
def seed_ws(
    generator: TriPlaneGenerator, seeds: Sequence[int], truncation: Truncation, pose_cond_deg: float = FRONT_DEG
) -> torch.Tensor:
    """Return the w-layers `[len(seeds), L, 512]` of seeds; arguments as for `make_head`."""
    device = next(generator.parameters()).device
    z = np.stack([np.random.RandomState(seed).randn(generator.z_dim) for seed in seeds])
    label = conditioning_label(generator, pose_cond_deg).to(device).expand(len(seeds), -1)
    return generator.mapping(torch.from_numpy(z).to(device), label, truncation.psi, truncation.cutoff)


def conditioning_label(generator: TriPlaneGenerator, pose_cond_deg: float = FRONT_DEG) -> torch.Tensor:
    """Return the label `[1, 25]` for the mapping network: a level camera with the focal length of the training data."""
    yaw_rad = math.radians(pose_cond_deg - FRONT_DEG)
    pose = camera_utils.look_at_pose(yaw_rad, radius=camera_radius(generator), target=_frontal_target(generator))
    return camera_utils.camera_label(pose, camera_utils.intrinsics_from_focal(camera_utils.TRAINING_FOCAL))


def camera_radius(generator: TriPlaneGenerator) -> float:
    """Return the distance of cameras that the generator was trained with, in world units."""
    return generator.rendering_kwargs.get("avg_camera_radius", camera_utils.TRAINING_RADIUS)


def camera_pivot(generator: TriPlaneGenerator) -> tuple[float, ...]:
    """Return the point that frontal cameras look at."""
    return tuple(generator.rendering_kwargs.get("avg_camera_pivot", (0.0, 0.0, 0.0)))


def shows_all_sides(generator: TriPlaneGenerator) -> bool:
    """Whether the generator is made for views from behind; the tri-plane of EG3D is not."""
    return generator.config.representation != "tri_plane"


def _frontal_target(generator: TriPlaneGenerator) -> tuple[float, ...]:
    return (0.0, 0.0, 0.0) if shows_all_sides(generator) else camera_pivot(generator)


def labels_from_poses(poses: torch.Tensor, fov_deg: float = DEFAULT_FOV_DEG) -> torch.Tensor:
    """Return the labels `[V, 25]` of poses `[V, 4, 4]` at a (diagonal) field of view."""
    return camera_utils.camera_label(poses, camera_utils.intrinsics_from_focal(camera_utils.focal_from_fov(fov_deg)))


def orbit_labels(num_views: int, fov_deg: float = DEFAULT_FOV_DEG) -> torch.Tensor:
    """Return the labels `[num_views, 25]` of cameras once around the head."""
    return labels_from_poses(camera_utils.orbit_path(num_views), fov_deg)


def strip_labels(generator: TriPlaneGenerator, fov_deg: float = DEFAULT_FOV_DEG) -> torch.Tensor:
    """Return the labels `[V, 25]` of an image strip: front to back, or the front alone for EG3D."""
    yaw_rad = FULL_STRIP_YAW_RAD if shows_all_sides(generator) else FRONTAL_STRIP_YAW_RAD
    poses = camera_utils.look_at_pose(
        torch.tensor(yaw_rad),
        camera_utils.pitch_from_vertical(STRIP_VERTICAL),
        camera_radius(generator),
        _frontal_target(generator),
    )
    return labels_from_poses(poses, fov_deg)


def render_strip(
    head: Head, labels: Iterable[torch.Tensor], mode: ImageMode = "image", resolution: int | None = None
) -> np.ndarray:
    """Render views side by side: uint8 `[H, W * V, 3]`."""
    views = (head.render(label, view, resolution) for view, label in enumerate(labels))
    return np.concatenate([to_uint8(output, mode)[0] for output in views], axis=1)


def to_uint8(output: dict[str, torch.Tensor], mode: ImageMode = "image") -> np.ndarray:
    """Turn one image of a rendering into something to look at.

    Args:
        output: from `Head.render` or `TriPlaneGenerator.synthesis`.
        mode: 'image' and 'image_raw': colours, [-1, 1] to 0...255, truncated as published. 'image_depth': near is
            bright, scaled to the range of each image. 'image_mask': opaque is white. 'image_parsing': a colour per
            class.

    Returns:
        uint8 `[B, H, W, 3]`.

    Raises:
        ValueError: the generator makes no such image.
    """
    require(mode in output, "image mode", f"one of {', '.join(output)} for this network", mode)
    convert = {"image_depth": depth_to_uint8, "image_mask": mask_to_uint8, "image_parsing": parsing_to_uint8}
    return convert.get(mode, colors_to_uint8)(output[mode])
