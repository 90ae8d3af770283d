"""Directions from which heads are seen: those of cameras, their yaw, and the angles between them."""

from __future__ import annotations

import numpy as np

from training.config import require


def view_directions(labels: np.ndarray) -> np.ndarray:
    """Return from where cameras look at the head: unit vectors float64 [N, 3] in world axes, +z in front of the face.

    It is minus the viewing direction of labels [N, 25], from which `camera_utils.yaw_pitch_roll_deg` takes its angles;
    for a camera that looks at the origin, it is the direction of its position.
    """
    back = -np.asarray(labels, np.float64)[:, [2, 6, 10]]
    return back / np.linalg.norm(back, axis=1, keepdims=True)


def yaw_of(directions: np.ndarray) -> np.ndarray:
    """Return the yaw of directions [N, 3] in degrees, -180 to 180: `atan2(x, z)`."""
    return np.rad2deg(np.arctan2(directions[:, 0], directions[:, 2]))


def angle_deg(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the angles between vectors [N, 3] of any length but 0, float64 [N] in degrees, 0 to 180.

    `2 atan2(|a - b|, |a + b|)` of the unit vectors, which is precise for small angles, where the arc cosine is not
    (Kahan, "How futile are mindless assessments of roundoff in floating-point computation?", section 12). One of the
    two may be a single vector [1, 3].

    Raises:
        ValueError: a vector has no direction.
    """
    units = []
    for vectors in (first, second):
        vectors = np.asarray(vectors, np.float64)
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        require(bool((length > 0).all()), "directions", "vectors of a length above 0", length.min(initial=1.0))
        units.append(vectors / length)
    a, b = units
    return np.rad2deg(2 * np.arctan2(np.linalg.norm(a - b, axis=1), np.linalg.norm(a + b, axis=1)))
