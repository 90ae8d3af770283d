"""View accuracy: whether a head is seen from where the camera stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from metrics.detectors import VIEW_NAME
from metrics.directions import angle_deg, view_directions, yaw_of
from metrics.registry import Curve, MetricValues, register
from metrics.requests import ImageSet, StatsRequest, yaw_bins

if TYPE_CHECKING:
    from metrics.evaluation import Evaluation
    from metrics.feature_stats import FeatureStats

FAR_OFF_DEG = 30.0
"""An error above this is a wrong view, not an imprecise one."""


@dataclass(frozen=True, kw_only=True)
class ViewAccuracy:
    """Angle between the camera and the view that a picture shows: `view_accuracyN` over N generated images.

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
        cameras = view_directions(labels)
        error_deg, yaw_deg = angle_deg(directions, cameras), yaw_of(cameras)
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
    "view_accuracyN",
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
