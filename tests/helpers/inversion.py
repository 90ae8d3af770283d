"""A small head to invert, and a distance that needs no network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from camera_utils import TRAINING_FOCAL, camera_label, intrinsics_from_focal, look_at_pose
from inference.photos import Photo
from inference.sampling import Head
from tests.helpers.tiny import latents, tiny_network
from training.config import SuperresolutionConfig
from training.triplane import TriPlaneGenerator


class AreaDistance:
    """Mean absolute difference of images averaged over 2, 4 and 8 pixels."""

    name = "area"

    def __init__(self) -> None:
        self.num_features = 0

    def features(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Average `[B, 3, H, W]`."""
        self.num_features += 1
        return self._levels(image)

    def distance(self, image: torch.Tensor, target: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return `[B]`."""
        return sum((a - b).abs().mean(dim=(1, 2, 3)) for a, b in zip(self._levels(image), target))

    def _levels(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(F.avg_pool2d(image, size) for size in (2, 4, 8))


def head_network(representation: str = "dual_spherical", **fields) -> TriPlaneGenerator:
    """Return a network of 64 pixels whose heads are opaque, so that they look different from every side."""
    small = {
        "img_resolution": 64,
        "superresolution": SuperresolutionConfig(variant="Superresolution2XSmall"),
        "neural_rendering_resolution": 16,
        "depth_resolution": 12,
        "depth_resolution_importance": 12,
        "background": False,
    }
    generator = tiny_network(representation, **small | fields).requires_grad_(False)
    output = generator.decoder.net[2].weight
    output[0] *= 30  # density
    output[1:] *= 3
    return generator


def view_label(yaw_deg: float, pitch_deg: float = 0.0) -> torch.Tensor:
    """Return the label `[1, 25]` of a camera around the head."""
    pose = look_at_pose(math.radians(yaw_deg), math.radians(pitch_deg))
    return camera_label(pose, intrinsics_from_focal(TRAINING_FOCAL))


def known_ws(generator: TriPlaneGenerator, seed: int = 5) -> torch.Tensor:
    """Return the w-layers `[1, L, 512]` of a random latent."""
    return generator.mapping(latents(1, seed), view_label(0)).detach()


def photo_of(
    generator: TriPlaneGenerator,
    ws: torch.Tensor,
    label: torch.Tensor,
    claimed_label: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Photo:
    """Photograph a known latent; `claimed_label` says that it was from another camera."""
    image = Head(generator, ws).render(label)["image"]
    return Photo(name="known", image=image, label=label if claimed_label is None else claimed_label, mask=mask)


def view_psnrs(generator: TriPlaneGenerator, ws: torch.Tensor, targets: dict[float, torch.Tensor]) -> list[float]:
    """Compare views of a latent with images `[1, 3, H, W]` by yaw in degrees: PSNR in dB."""
    head = Head(generator, ws)
    return [psnr(head.render(view_label(yaw_deg))["image"], target) for yaw_deg, target in targets.items()]


def psnr(image: torch.Tensor, target: torch.Tensor) -> float:
    """Return the PSNR in dB of images in [-1, 1]."""
    image, target = (x.clamp(-1, 1) for x in (image, target))
    return 10 * math.log10(4 / max(float((image - target).square().mean()), 1e-12))
