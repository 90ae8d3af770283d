"""What `bench_train_step.py` trains: configurations, images that mean nothing, and ways of doing the same."""

from __future__ import annotations

import io
import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

import camera_utils
from training.config import require
from training.train_config import DataConfig, TrainConfig
from training.train_presets import make_train_config, train_preset

# The published recipe at 128 px, without terms of our own, so that times can be set beside those of published code.
_MEDIUM = {
    "vico.mode": "none",
    "generator.plane_resolution": 128,
    "generator.synthesis.channel_base": 8192,
    "generator.synthesis.channel_max": 256,
    "generator.rendering.depth_resolution": 48,
    "generator.rendering.depth_resolution_importance": 48,
    "discriminator.channel_base": 8192,
    "discriminator.channel_max": 256,
    "discriminator.variant": "MaskDualDiscriminatorV2",
    "loss.neural_rendering_resolution_initial": 64,
    "loop.batch_size": 4,
}
_CONFIGS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "demo": ("demo", 64, {}),
    "medium": ("spherehead", 128, _MEDIUM),
    "debug": ("debug", 64, {}),
}
CONFIG_NAMES = tuple(_CONFIGS)
START_KIMG = 10_000
"""Where schedules stand: at their ends, so that no step blurs or adds noise."""

NUM_IMAGES = 64
_COARSE_SIDE = 16  # images are smooth, as photographs are: noise takes longer to decode
_IMAGES, _MASKS = "images.zip", "masks.zip"

RENDERERS = ("fused", "reference", "plain")
_MODIFIERS = {"free": "memory", "glibc": "memory", "compile": "compile"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way of computing a training step."""

    renderer: Literal["fused", "reference", "plain"] = "fused"
    """Volume renderer; `plain` is the reference, and no native kernels elsewhere either."""
    compile: bool = False
    """`TrainConfig.precision.compile`."""
    memory: Literal["keep", "free", "glibc"] = "keep"
    """Memory of freed tensors on a CPU: `keep` for the next ones, `free` gives it back to the C library, and with
    `glibc` that keeps it, because its thresholds for large blocks are raised."""

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read `renderer[+compile][+free|+glibc]`, such as `fused+compile`.

        Raises:
            ValueError: something else.
        """
        renderer, *modifiers = text.split("+")
        require(renderer in RENDERERS, "variant", f"a renderer ({', '.join(RENDERERS)}) first", text)
        fields: dict[str, Any] = {}
        for modifier in modifiers:
            field = _MODIFIERS.get(modifier)
            require(field is not None and field not in fields, "variant", f"one of {', '.join(_MODIFIERS)}", text)
            fields[field] = True if field == "compile" else modifier
        if renderer == "plain":  # what keeps memory is native
            fields.setdefault("memory", "free")
        return cls(renderer=renderer, **fields)


def write_data(folder: Path, side: int, seed: int = 0, num_images: int = NUM_IMAGES) -> DataConfig:
    """Write zip files of random images and masks, with cameras all around; return the configuration of them."""
    random = np.random.RandomState(seed)
    names = [f"{number:05d}.png" for number in range(num_images)]
    for file, channels in ((_IMAGES, 3), (_MASKS, 1)):
        with zipfile.ZipFile(folder / file, "w") as archive:
            for name in names:
                coarse = random.randint(0, 256, (_COARSE_SIDE, _COARSE_SIDE, channels), dtype=np.uint8)
                archive.writestr(name, _png(coarse, side))
            if file == _IMAGES:
                table = _labels(random.uniform(-math.pi, math.pi, num_images)).tolist()
                archive.writestr("dataset.json", json.dumps({"labels": [list(row) for row in zip(names, table)]}))
    return DataConfig(images=(str(folder / _IMAGES),), masks=(str(folder / _MASKS),), resolution=side)


def _png(coarse: np.ndarray, side: int) -> bytes:
    image = Image.fromarray(coarse.squeeze()).resize((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _labels(yaw_rad: np.ndarray) -> torch.Tensor:
    poses = camera_utils.look_at_pose(torch.from_numpy(yaw_rad).float(), 0.0)
    intrinsics = camera_utils.intrinsics_from_focal(camera_utils.TRAINING_FOCAL)
    return camera_utils.camera_label(poses, intrinsics)


def make_config(name: str, folder: Path, variant: Variant) -> TrainConfig:
    """Return a configuration of `CONFIG_NAMES`, on data that it writes to a folder unless they are there."""
    preset, side, settings = _CONFIGS[name]
    if (folder / _IMAGES).exists():
        data = DataConfig(images=(str(folder / _IMAGES),), masks=(str(folder / _MASKS),), resolution=side)
    else:
        data = write_data(folder, side)
    loop = {"loop.workers": 0, "loop.image_ticks": None}  # all of the work in one process, where it can be timed
    fields = {**settings, **loop, "precision.compile": variant.compile}
    return make_train_config(preset, data, fields)


def images_per_step(name: str) -> int:
    """Return the batch size of a configuration."""
    preset, _, settings = _CONFIGS[name]
    return {**train_preset(preset).fields, **settings}["loop.batch_size"]
