"""Pictures from which a small network learns directions and masks within seconds: a ball where the camera is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metrics.data_training import TrainingPlan
from metrics.detector_interface import DetectorContext
from tests.helpers.head_data import HeadFiles, encoded, head_labels, item_name, spread_yaw_deg
from training.dataset import HeadDataset

SIDE = 32
QUICK = TrainingPlan(min_seen=1, max_seen=1200, batch_size=16, learning_rate=1e-2)


def ball(yaw_deg: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture uint8 [32, 32, 3] and its mask uint8 [32, 32].

    The ball is on the side of the camera, red seen from the front and blue from behind.
    """
    x, z = np.sin(np.deg2rad(yaw_deg)), np.cos(np.deg2rad(yaw_deg))
    row, column = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    inside = (column - 9 * x) ** 2 + row**2 < 6**2
    pixels = np.full((SIDE, SIDE, 3), 100, np.uint8)
    pixels[inside] = (128 + 120 * z, 40, 128 - 120 * z)
    return pixels, np.where(inside, 255, 0).astype(np.uint8)


def toy_dataset(folder: Path, count: int = 96, yaw_deg: list[float] | None = None, **config: Any) -> HeadDataset:
    """Write balls seen from all around, or from `yaw_deg`, and open them."""
    yaw_deg = spread_yaw_deg(count) if yaw_deg is None else yaw_deg
    order = np.random.RandomState(0).permutation(len(yaw_deg))
    yaw_deg = [yaw_deg[i] for i in order]
    files = HeadFiles(0, side=SIDE)
    labels = head_labels(yaw_deg).tolist()
    for number, yaw in enumerate(yaw_deg):
        pixels, mask = ball(yaw)
        files.images[item_name(number)] = encoded(Image.fromarray(pixels))
        files.masks[item_name(number)] = encoded(Image.fromarray(mask))
        files.labels[item_name(number)] = labels[number]
    return HeadDataset(files.write(folder, zipped=True, **{"parsing": (), "parsing_classes": 0, **config}))


def toy_context(dataset: HeadDataset, cache_dir: Path | None = None, **fields: Any) -> DetectorContext:
    """Return a context on the CPU."""
    return DetectorContext(device="cpu", dataset=dataset, cache_dir=cache_dir, **fields)
