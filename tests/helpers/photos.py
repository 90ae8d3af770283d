"""Photos and a network with which an inversion takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.head_data import head_labels
from tests.helpers.tiny import tiny_network
from training.config import SuperresolutionConfig
from training.snapshots import save_networks
from training.triplane import TriPlaneGenerator

SIDE = 64


def small_generator() -> TriPlaneGenerator:
    """Return a generator of 64 px."""
    superresolution = SuperresolutionConfig(variant="Superresolution2XSmall")
    return tiny_network(img_resolution=SIDE, superresolution=superresolution)


def write_network(path: Path) -> Path:
    """Write that generator to a file."""
    save_networks(path, {"G_ema": small_generator()}, {})
    return path


def write_photos(folder: Path, names: list[str], unlabelled: tuple[str, ...] = ()) -> Path:
    """Write photos, discs of different colours, with cameras in front of them.

    Args:
        folder: where to.
        names: of the files.
        unlabelled: those of them that get no camera.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:SIDE, :SIDE] - SIDE / 2 + 0.5
    for number, name in enumerate(names):
        pixels = np.full((SIDE, SIDE, 3), 40, np.uint8)
        pixels[rows**2 + columns**2 < (SIDE / 3) ** 2] = (230, 60 + 50 * number % 190, 90)
        Image.fromarray(pixels).save(folder / name)
    labels = zip(names, head_labels([10.0 * number for number in range(len(names))]).tolist())
    entries = [[name, label] for name, label in labels if name not in unlabelled]
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}), encoding="utf-8")
    return folder
