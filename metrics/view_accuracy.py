"""View accuracy: whether a head is seen from where the camera stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from metrics.detectors import VIEW_NAME
from metrics.registry import Curve, MetricValues, register
from metrics.requests import ImageSet, StatsRequest, yaw_bins
from training.config import require

if TYPE_CHECKING:
    from metrics.evaluation import Evaluation
    from metrics.feature_stats import FeatureStats

FAR_OFF_DEG = 30.0
"""An error above this is a wrong view, not an imprecise one."""


@dataclass(frozen=True, kw_only=True)
class ViewAccuracy:
    """Angle between the camera and the view that a picture shows: `view_accuracy<N>` over N generated images.

    A network trained on the real images of the data set (detector `view`) says from which direction a picture was
    taken; the error is the angle between that direction and the one of the camera that rendered. Its own error is part
    of the number: that on real images it was not trained on is in the details as `held_out`, to be compared with.

    Values: the mean error in degrees, `median`, and `above_30_deg`, the share of images with an error above 30 degrees.
    A guess without looking has a mean of 90.
    """

    name: str
    num_images: int

    def requests(self, evaluation: Evaluation) -> Sequence[StatsRequest]:
        """Return the one for the directions of generated images."""
        return [directions_request(evaluation.generated(self.num_images))]

    def compute(self, evaluation: Evaluation, stats: Mapping[StatsRequest, FeatureStats]) -> MetricValues:
        """Compare the directions with those of the cameras."""
        (request,) = self.requests(evaluation)
        labels, directions = directions_and_labels(evaluation, request.images, stats[request])
        error_deg = angle_deg(directions, camera_directions(labels))
        yaw_deg = np.rad2deg(np.arctan2(*camera_directions(labels)[:, [0, 2]].T))
        bins = yaw_bins(evaluation.settings.num_yaw_bins)
        per_bin = [error_deg[yaw_range.contains(yaw_deg)] for yaw_range in bins]
        return MetricValues(
            values={
                self.name: float(error_deg.mean()),
                "median": float(np.median(error_deg)),
                "above_30_deg": float((error_deg > FAR_OFF_DEG).mean()),
            },
            curve=Curve(
                x_name="yaw_deg",
                x=tuple(yaw_range.middle_deg for yaw_range in bins),
                y_name="mean angular error in degrees",
                y=tuple(float(errors.mean()) if len(errors) else None for errors in per_bin),
            ),
            details={
                "num_images": len(error_deg),
                "num_images_per_bin": [len(errors) for errors in per_bin],
                "held_out": evaluation.load_detector(VIEW_NAME).info.held_out,
            },
        )


@register(
    r"view_accuracy(?P<num>\d+k?)",
    "view_accuracy<N>",
    "angle between camera and the view that is seen, mean in degrees",
)
def make_view_accuracy(name: str, num_images: int) -> ViewAccuracy:
    """Make the metric of a name."""
    return ViewAccuracy(name=name, num_images=num_images)


def directions_request(images: ImageSet) -> StatsRequest:
    """Ask for the direction that each image of a set shows the head from, unit vectors [N, 3] in world axes."""
    return StatsRequest(images=images, detector=VIEW_NAME, output="directions", capture=images.num_images)


def directions_and_labels(
    evaluation: Evaluation, images: ImageSet, stats: FeatureStats
) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels [N, 25] of the cameras of a set, and the directions [N, 3] that were seen."""
    if images.kind == "real":
        labels = evaluation.dataset.labels[evaluation.items(images)]
    else:
        labels = evaluation.cameras(images)[1]
    return labels[stats.row_indices()], stats.rows()


def camera_directions(labels: np.ndarray) -> np.ndarray:
    """Return from which direction cameras look at the head: unit vectors float64 [N, 3] in world axes, +z in front.

    It is minus the forward axis of labels [N, 25], as in `camera_utils.yaw_pitch_roll_deg`.
    """
    back = -np.asarray(labels, np.float64)[:, [2, 6, 10]]
    return back / np.linalg.norm(back, axis=1, keepdims=True)


def angle_deg(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the angles between vectors [N, 3] of any length but 0, float64 [N] in degrees, 0 to 180.

    `2 atan2(|a - b|, |a + b|)` of the unit vectors, which is precise for small angles, where the arc cosine is not
    (Kahan, "How futile are mindless assessments of roundoff in floating-point computation?", section 12).

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
