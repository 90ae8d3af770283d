"""Read the camera labels of a data set, check them, and choose images by the direction they were taken from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from camera_utils import LABEL_SIZE, check_label, yaw_pitch_roll_deg
from training.image_sources import without_extension

BACK_YAW_DEG = 90.0  # images with an absolute yaw of at least this show the back of the head
_CENTRE_TOLERANCE = 1e-3  # of a principal point, in image widths


def parse_labels(data: bytes, where: str) -> dict[str, Any] | None:
    """Read the text of `dataset.json`: an object whose entry `labels` is a list of [path, label], or null.

    Args:
        data: the text.
        where: what it is called in messages.

    Returns:
        Labels, as they stand there, by path with forward slashes; None where there are none. A path that has two
        different labels has the label None.

    Raises:
        ValueError: it is broken; the message says what was expected and what came.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON, came {str(error)[:200] or type(error).__name__}") from None
    if not isinstance(content, dict) or "labels" not in content:
        raise ValueError(f"{where}: expected an object with the key 'labels', came {_shape(content)}")
    entries = content["labels"]
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise ValueError(f"{where}: labels: expected a list of [path, label], came {_shape(entries)}")
    table: dict[str, Any] = {}
    for position, entry in enumerate(entries):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(f"{where}: labels[{position}]: expected [path, label], came {_shape(entry)}")
        name = entry[0].replace("\\", "/").removeprefix("./")
        table[name] = entry[1] if table.get(name, entry[1]) == entry[1] else None
    return table


def _shape(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {sorted(value)[:5]}"
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:80]


def label_by_name(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Index labels by path without extension, for images whose format changed after the labels were written.

    Paths that differ in the extension alone, and have different labels, are left out.
    """
    stems: dict[str, Any] = {}
    for name, label in table.items():
        stem = without_extension(name)
        stems[stem] = label if stems.get(stem, label) == label else None
    return stems


def collect_labels(names: Iterable[str], table: Mapping[str, Any]) -> tuple[np.ndarray, dict[int, str]]:
    """Look up the labels of images.

    An image whose own path has no label takes that of the same path with another extension: published cropping tools
    write .png into the labels of .jpg files. Numbers may be strings, as those tools write them.

    Args:
        names: paths of images.
        table: as `parse_labels` returns.

    Returns:
        Labels float64 [N, 25], and the defects by position; labels of images with a defect are 0.
    """
    stems = label_by_name(table)
    names = list(names)
    labels = np.zeros((len(names), LABEL_SIZE))
    defects: dict[int, str] = {}
    missing = object()
    for position, name in enumerate(names):
        label = table.get(name, missing)
        if label is missing:
            label = stems.get(without_extension(name), missing)
        if label is missing:
            defects[position] = "expected a label in dataset.json, came none"
            continue
        try:
            labels[position] = _numbers(label)
        except ValueError as error:
            defects[position] = str(error)
    defects.update(_camera_defects(labels, [i for i in range(len(names)) if i not in defects]))
    labels[list(defects)] = 0
    return labels, defects


def _numbers(label: Any) -> np.ndarray:
    if label is None:
        raise ValueError("expected one label in dataset.json, came null or several that differ")
    if not isinstance(label, list):
        raise ValueError(f"label: expected {LABEL_SIZE} numbers of a camera, came {repr(label)[:40]}")
    if len(label) != LABEL_SIZE:
        raise ValueError(f"label: expected {LABEL_SIZE} numbers of a camera, came {len(label)}")
    try:
        return np.array([float(number) for number in label])
    except (TypeError, ValueError, OverflowError):
        raise ValueError("label: expected numbers, or numbers as strings, came something else") from None


def _camera_defects(labels: np.ndarray, positions: list[int]) -> dict[int, str]:
    """Return what is wrong with those labels that describe no camera, by position."""
    try:
        check_label(torch.from_numpy(labels[positions]))
    except ValueError as error:
        if len(positions) == 1:
            return {positions[0]: str(error).replace("label 0", "label", 1)}
        half = len(positions) // 2  # the check stops at the first; halving finds the others
        return {**_camera_defects(labels, positions[:half]), **_camera_defects(labels, positions[half:])}
    return {}


def mirror_defects(labels: np.ndarray) -> dict[int, str]:
    """Return which labels [N, 25] cannot be mirrored, by position: the principal point must be in the middle."""
    off_centre = np.flatnonzero(np.abs(labels[:, 18] - 0.5) > _CENTRE_TOLERANCE)
    return {
        int(i): f"label: expected a principal point of 0.5 for mirroring, came {labels[i, 18]:g}" for i in off_centre
    }


def view_angles_deg(labels: np.ndarray, published: bool = False) -> np.ndarray:
    """Return yaw, pitch and roll [N, 3] of labels [N, 25] in degrees, see `camera_utils.yaw_pitch_roll_deg`."""
    return yaw_pitch_roll_deg(torch.from_numpy(np.asarray(labels, dtype=np.float64)), published=published).numpy()


def select_views(
    labels: np.ndarray,
    *,
    min_yaw_deg: float = 0.0,
    max_yaw_deg: float = 180.0,
    max_pitch_deg: float = 90.0,
    back_repeat: int = 1,
    published_angles: bool = False,
) -> np.ndarray:
    """Choose images by the direction they were taken from, and repeat those from behind.

    Chosen are those with `min_yaw <= |yaw| <= max_yaw` and `|pitch| <= max_pitch`; of them, those with
    `|yaw| >= max(90, min_yaw)` are from behind.

    Args:
        labels: [N, 25].
        min_yaw_deg, max_yaw_deg, max_pitch_deg: limits, which belong to what they limit.
        back_repeat: how many times an image from behind appears.
        published_angles: measure by the published formula, which drops level views just behind profile.

    Returns:
        int64 [M]: front images in ascending order, then `back_repeat` times the others in ascending order.

    Differs from the published code, where the front images come in the order of a Python set, and a choice without any
    front image cannot be used.
    """
    yaw, pitch, _ = np.abs(view_angles_deg(labels, published_angles)).T
    valid = (yaw >= min_yaw_deg) & (yaw <= max_yaw_deg) & (pitch <= max_pitch_deg)
    back = valid & (yaw >= max(BACK_YAW_DEG, min_yaw_deg))
    front_indices, back_indices = np.flatnonzero(valid & ~back), np.flatnonzero(back)
    return np.concatenate([front_indices, np.tile(back_indices, back_repeat)]).astype(np.int64)
