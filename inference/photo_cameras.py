"""Cameras of photos: from labels of data sets, from numbers, from files, from angles."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from camera_utils import (
    LABEL_SIZE,
    TRAINING_FOCAL,
    TRAINING_RADIUS,
    camera_label,
    focal_from_fov,
    intrinsics_from_focal,
    look_at_pose,
)
from training.head_labels import collect_labels, parse_labels
from training.image_sources import LABELS_NAME, MAX_LABELS_BYTES, MAX_MEMBER_BYTES, BadImage, printable

CameraOf = Literal["stored image", "crop"]
"""Whether a camera took the stored picture (upright, before any crop), or its picture is the cropped square."""

_CAMERA_FORMS = f"{LABEL_SIZE} numbers, a JSON file, or angles such as yaw=20,pitch=5,fov=18.837"
_ANGLES = {"yaw": (-360.0, 360.0), "pitch": (-90.0, 90.0), "fov": (0.0, 180.0)}  # degrees
_MAX_OFF_CENTRE = 4.0  # of a principal point, in image widths; in pixels it would be dozens


def parse_camera(text: str, radius: float = TRAINING_RADIUS, image_name: str | None = None) -> torch.Tensor:
    """Read a camera that was given on a command line.

    Args:
        text: one of

            - 25 numbers (pose, then normalised intrinsics, row by row) between commas or blanks: the camera that took
              the stored picture;
            - the path of a JSON file with these numbers, or with an entry `[name, [25 numbers]]` of `dataset.json`, or
              of a whole `dataset.json`: the same;
            - `yaw=20,pitch=5,fov=18.837`, in degrees, any of them: a camera that looks at the head's centre, as
              `camera_utils.look_at_pose` places it, and whose picture is the cropped square. Those left out are 0, 0
              and the field of view of the training cameras.
        radius: distance of a camera that is given by angles.
        image_name: which entry to take of a `dataset.json` with several.

    Returns:
        float64 [25].

    Raises:
        ValueError: it is none of these; or no camera, or not one that sees the head.
        OSError: the file cannot be read.
    """
    return read_camera(text, radius, image_name)[0]


def read_camera(text: str, radius: float, image_name: str | None) -> tuple[torch.Tensor, CameraOf]:
    """Read a camera as `parse_camera` does; return also which picture it describes."""
    is_file = os.path.isfile(text)
    if is_file or text.strip().lower().endswith(".json"):
        return _camera_of_file(Path(text if is_file else text.strip()), image_name), "stored image"
    if "=" in text:
        return _camera_of_angles(text, radius), "crop"
    tokens = re.split(r"[\s,;]+", text.strip(" \t\r\n,;[]"))
    try:
        numbers = [float(token) for token in tokens]
    except ValueError:
        raise ValueError(f"camera: expected {_CAMERA_FORMS}; came {text[:80]!r}") from None
    return _checked_camera(numbers, "camera"), "stored image"


def _camera_of_angles(text: str, radius: float) -> torch.Tensor:
    values: dict[str, float] = {}
    for token in re.split(r"[\s,;]+", re.sub(r"\s*=\s*", "=", text.strip(" \t\r\n,;"))):
        name, _, number = token.partition("=")
        if name not in _ANGLES or name in values:
            came = f"{name!r} twice" if name in values else repr(token[:40])
            raise ValueError(f"camera: expected each of {', '.join(_ANGLES)} at most once, came {came}")
        try:
            values[name] = float(number)
        except ValueError:
            raise ValueError(f"camera: {name}: expected degrees, came {number[:40]!r}") from None
        low, high = _ANGLES[name]
        if not (low <= values[name] <= high) or (name == "fov" and values[name] in (low, high)):
            raise ValueError(f"camera: {name}: expected degrees between {low:g} and {high:g}, came {number[:40]}")
    pose = look_at_pose(math.radians(values.get("yaw", 0.0)), math.radians(values.get("pitch", 0.0)), radius)
    focal = focal_from_fov(values["fov"]) if "fov" in values else TRAINING_FOCAL
    return camera_label(pose, intrinsics_from_focal(focal))[0].double()


def _camera_of_file(path: Path, image_name: str | None) -> torch.Tensor:
    where = f"camera: {shown(path)}"
    if not path.is_file():
        raise ValueError(f"camera: expected a file, came {shown(path)}, which is {what_is(path)}")
    data = read_file(path, MAX_LABELS_BYTES)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON, came {str(error)[:200] or type(error).__name__}") from None
    if isinstance(content, list):
        is_entry = len(content) == 2 and isinstance(content[0], str)
        return _checked_camera(content[1] if is_entry else content, where)
    table = parse_labels(data, where)
    if not table:
        raise ValueError(f"{where}: expected a label, came none")
    if len(table) == 1:
        return _checked_camera(next(iter(table.values())), where)
    if image_name is None:
        raise ValueError(f"{where}: expected one label, came {len(table)}")
    label, defect = labels_of([image_name], table)[0]
    if label is None:
        raise ValueError(f"{where}: {printable(image_name)}: {defect}")
    return label


def _checked_camera(numbers: Any, where: str) -> torch.Tensor:
    label, defect = labels_of(["camera"], {"camera": numbers})[0]
    if label is None:
        raise ValueError(f"{where}: {defect}")
    return label


def labels_of(names: Sequence[str], table: dict[str, Any]) -> list[tuple[torch.Tensor | None, str | None]]:
    """Return the label float64 [25] of each image, or None and what is wrong with it."""
    labels, defects = collect_labels(names, table)
    found = []
    for position, label in enumerate(labels):
        defect = defects.get(position) or _view_defect(label)
        found.append((torch.from_numpy(label.copy()) if defect is None else None, defect))
    return found


def _view_defect(label: np.ndarray) -> str | None:
    """Return why a camera shows no head, if it does not: its intrinsics count pixels, or it looks away."""
    x, y = label[[18, 21]]
    if max(abs(x - 0.5), abs(y - 0.5)) > _MAX_OFF_CENTRE:
        return f"label: expected intrinsics in shares of the image, came a principal point of {x:g}, {y:g}"
    forward, position = label[[2, 6, 10]], label[[3, 7, 11]]
    if forward @ position > 0:
        return "label: expected a camera that looks at the head (x right, y down, z forward), came one that looks away"
    return None


def read_labels(folder: Path) -> dict[str, Any] | None:
    """Return the labels of a folder by path; None where there are none."""
    path = folder / LABELS_NAME
    return parse_labels(read_file(path, MAX_LABELS_BYTES), shown(path)) if path.is_file() else None


def shown(path: str | os.PathLike) -> str:
    """Return a path as messages show it."""
    return printable(os.fspath(path))


def what_is(path: Path) -> str:
    """Say what a path is that is no regular file."""
    return "not a regular file" if path.exists() else "absent"


def read_file(path: Path, limit: int = MAX_MEMBER_BYTES) -> bytes:
    """Return the contents of a regular file; BadImage where it is none, or too large."""
    if not path.is_file():
        raise BadImage(f"expected a file, came {what_is(path)}")
    size = path.stat().st_size
    if size > limit:
        raise BadImage(f"expected at most {limit} bytes, came a file of {size}")
    return path.read_bytes()
