"""Small made-up data sets of heads: flat colours that tell the number of the image, with cameras all around."""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from camera_utils import camera_label, intrinsics_from_focal, look_at_pose
from training.train_config import DataConfig

SIDE = 8


def head_labels(yaw_deg: list[float], pitch_deg: float = 0.0) -> np.ndarray:
    """Return labels float32 [N, 25] of cameras at azimuths."""
    pose = look_at_pose(torch.tensor(yaw_deg) * math.pi / 180, math.radians(pitch_deg))
    return camera_label(pose, intrinsics_from_focal(4.2647)).numpy()


def spread_yaw_deg(count: int) -> list[float]:
    """Return azimuths all around, none of them where thresholds are."""
    return [-171.0 + 360.0 * i / count for i in range(count)]


def picture(number: int, side: int = SIDE) -> Image.Image:
    """Return an image whose red tells its number, and whose green is bright in the left half."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[..., 0] = number
    pixels[:, : side // 2, 1] = 200
    return Image.fromarray(pixels)


def mask_picture(number: int, side: int = SIDE) -> Image.Image:
    """Return a mask whose left half is 255 - number."""
    pixels = np.zeros((side, side), np.uint8)
    pixels[:, : side // 2] = 255 - number
    return Image.fromarray(pixels)


def parsing_picture(number: int, side: int = SIDE) -> Image.Image:
    """Return a map of classes: left brow (2) in the left half, hair (17) in the right."""
    pixels = np.full((side, side), 17, np.uint8)
    pixels[:, : side // 2] = 2
    return Image.fromarray(pixels)


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """Return an image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def item_name(number: int) -> str:
    """Return the path of an image in its root."""
    return f"{number // 4:05d}/img{number:08d}.png"


class HeadFiles:
    """Files of a data set, to be spoilt before they are written.

    Args:
        count: images.
        yaw_deg: azimuths of the cameras.
    """

    def __init__(self, count: int = 12, yaw_deg: list[float] | None = None, side: int = SIDE) -> None:
        numbers = range(count)
        self.images = {item_name(i): encoded(picture(i, side)) for i in numbers}
        self.masks = {item_name(i): encoded(mask_picture(i, side)) for i in numbers}
        self.parsing = {item_name(i): encoded(parsing_picture(i, side)) for i in numbers}
        table = head_labels(spread_yaw_deg(count) if yaw_deg is None else yaw_deg).tolist()
        self.labels: dict[str, Any] = dict(zip(self.images, table))
        self.identities: dict[str, Any] | None = None
        self.side = side

    def write(self, folder: Path, zipped: bool = False, method: int = zipfile.ZIP_STORED, **config: Any) -> DataConfig:
        """Write all roots below a folder; return the configuration of them."""
        content = {"labels": list(self.labels.items())}
        if self.identities is not None:
            content["identities"] = list(self.identities.items())
        labels = json.dumps(content).encode()
        roots = {"images": {**self.images, "dataset.json": labels}, "masks": self.masks, "parsing": self.parsing}
        paths = {kind: str(folder / (f"{kind}.zip" if zipped else kind)) for kind in roots}
        for kind, files in roots.items():
            write_files(Path(paths[kind]), files, method)
        defaults = {"masks": (paths["masks"],), "parsing": (paths["parsing"],), "parsing_classes": 19}
        fields = {"images": (paths["images"],), "resolution": self.side, **defaults, **config}
        return DataConfig(**fields)


def write_files(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Write files to a folder, or to a zip file if the path ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
