"""What an inversion leaves behind: pictures, video, latent, numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import camera_utils
from dnnlib.atomic import atomic_write
from inference.output import open_video
from inference.sampling import Head, Noise, camera_pivot, camera_radius, shows_all_sides, to_uint8
from training.image_metrics import l2, psnr, ssim
from training.perceptual import PerceptualDistance
from training.triplane import TriPlaneGenerator

TARGET, PROJECTED, TUNED_IMAGE, STRIP = "target.png", "proj_w.png", "proj.png", "strip.png"
VIDEO, LATENT, NETWORK, FULL_NETWORK = "proj.mp4", "latent.npz", "tuned.safetensors", "tuned_full.safetensors"
METRICS = "metrics.json"  # written last: where it is, the rest is too
RESULT_FILES = (TARGET, PROJECTED, TUNED_IMAGE, STRIP, VIDEO, LATENT, NETWORK, FULL_NETWORK, METRICS)
OTHER_VIEWS_DEG = (60.0, -60.0, 180.0)
_FRONTAL_VIEWS_DEG = (23.0, 0.0, -23.0)  # of a network that knows faces only


def load_png(path: Path) -> np.ndarray:
    """Read a picture uint8 `[H, W, 3]`."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def colors(image: torch.Tensor) -> np.ndarray:
    """Turn an image `[1, 3, H, W]` in [-1, 1] to uint8 `[H, W, 3]`."""
    return to_uint8({"image": image})[0]


def measure(
    image: torch.Tensor,
    target: torch.Tensor,
    distance: PerceptualDistance,
    features: tuple[torch.Tensor, ...],
    mask: torch.Tensor | None = None,
) -> dict[str, float]:
    """Compare an image with its target.

    Args:
        image: `[1, 3, H, W]` in [-1, 1].
        target: of the same shape.
        distance: for the perceptual one.
        features: of the target, from `distance`.
        mask: `[1, 1, H, W]` of the head; None measures no head of its own.

    Returns:
        'l2', 'perceptual', 'psnr_db' (None for equal images), 'ssim', and with a mask 'head_psnr_db'.
    """
    with torch.no_grad():
        perceptual = float(distance.distance(image, features).mean())
    values = {
        "l2": l2(image, target),
        "perceptual": perceptual,
        "psnr_db": psnr(image, target),
        "ssim": ssim(image, target),
    }
    if mask is not None:
        values["head_psnr_db"] = psnr(image, target, mask)
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def other_views(generator: TriPlaneGenerator, ws: torch.Tensor, label: torch.Tensor, seed: int) -> list[np.ndarray]:
    """Render a head from sides that its photo does not show, with the focal length of the photo.

    Args:
        generator: with which.
        ws: `[1, L, 512]`.
        label: `[1, 25]` of the photo's camera.
        seed: of ray jitter.

    Returns:
        three images uint8 `[H, W, 3]`: yaw +60, -60 and 180 degrees; for EG3D +23, 0 and -23.
    """
    yaw_deg = OTHER_VIEWS_DEG if shows_all_sides(generator) else _FRONTAL_VIEWS_DEG
    pivot = (0.0, 0.0, 0.0) if shows_all_sides(generator) else camera_pivot(generator)
    yaw_rad = torch.deg2rad(torch.tensor(yaw_deg))
    poses = camera_utils.look_at_pose(yaw_rad, radius=camera_radius(generator), target=pivot)
    _, intrinsics = camera_utils.split_label(label.detach().cpu())
    head = Head(generator, ws.detach(), Noise(seed=seed))
    return [to_uint8(head.render(view))[0] for view in camera_utils.camera_label(poses, intrinsics.expand(3, -1, -1))]


def save_latent(path: Path, ws: torch.Tensor, label: torch.Tensor, settings: str, seed: int, network: str) -> None:
    """Write `latent.npz`: `w` `[1, L, 512]` and `c` `[1, 25]`, both float32, `settings` (JSON), `seed`, `network`."""
    with atomic_write(path) as file:
        np.savez(
            file,
            w=ws.detach().float().cpu().numpy(),
            c=label.detach().float().cpu().numpy(),
            settings=np.array(settings),
            seed=np.array(seed),
            network=np.array(network),
        )


def save_progress_video(path: Path, target: np.ndarray, frames: Iterable[np.ndarray], fps: int) -> None:
    """Write a video with the target uint8 `[H, W, 3]` on the left and the frames on the right."""
    with open_video(path, fps) as video:
        for frame in frames:
            video.append_data(np.concatenate([target, frame], axis=1))


def save_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON, completely or not at all."""
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
