"""Back-face rate: how often a face looks back where the back of a head should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from metrics.directions import view_directions, yaw_of
from metrics.registry import Curve, MetricValues, NotApplicable, register
from metrics.requests import ImageSet, StatsRequest, YawRange
from metrics.view_accuracy import directions_and_labels, directions_request

if TYPE_CHECKING:
    from metrics.evaluation import Evaluation
    from metrics.feature_stats import FeatureStats

BEHIND = YawRange(low_deg=120, high_deg=180, absolute=True)
"""Cameras that do not see the face of a head; from 90 to 120 degrees they may."""
FRONTAL_YAW_DEG = 60.0
"""A picture is seen as frontal if its absolute yaw is below this, which is 60 degrees away from every such camera: more
than the errors of the view detector."""
_NUM_BINS = 4


@dataclass(frozen=True, kw_only=True)
class BackFaceRate:
    """Share of pictures from behind that show a face: `back_face_rateN` over N generated images.

    The cameras are those of real images with an absolute yaw of 120 to 180 degrees. A picture counts if the detector
    `view`, a network trained on the real images of the data set, sees it from within 60 degrees of the front. This is
    the mirroring artefact that SphereHead exists to remove: a generator that is asked for the back and shows the front.
    Pictures that are no heads at all are seen from anywhere; view accuracy tells those from heads that are mirrored.

    Values: the share with matched cameras, 0 to 1; `random`, that of heads conditioned on an independent camera, where
    a generator cannot know that it will be looked at from behind; `real`, the detector's own mistakes on as many real
    images from there. The detector was trained on most of those, so that `real` is a lower limit.
    """

    name: str
    num_images: int

    def requests(self, evaluation: Evaluation) -> Sequence[StatsRequest]:
        """Return those for the directions of generated and of real images from behind.

        Raises:
            NotApplicable: the data have no images from behind.
        """
        return [directions_request(images) for images in self._sets(evaluation).values()]

    def _sets(self, evaluation: Evaluation) -> dict[str, ImageSet]:
        """Return the sets by the name of their value."""
        if evaluation.num_real(BEHIND) == 0:
            raise NotApplicable(f"{self.name}: the data have no images with {BEHIND}")
        return {
            self.name: evaluation.generated(self.num_images, cameras="matched", yaw=BEHIND),
            "random": evaluation.generated(self.num_images, cameras="random", yaw=BEHIND),
            "real": evaluation.real(self.num_images, yaw=BEHIND),
        }

    def compute(self, evaluation: Evaluation, stats: Mapping[StatsRequest, FeatureStats]) -> MetricValues:
        """Count what is seen as frontal."""
        values, counts, curve = {}, {}, None
        for name, images in self._sets(evaluation).items():
            labels, directions = directions_and_labels(evaluation, images, stats[directions_request(images)])
            frontal = is_frontal(directions)
            values[name], counts[name] = float(frontal.mean()), len(frontal)
            curve = curve or _curve(labels, frontal)
        return MetricValues(
            values=values,
            curve=curve,
            details={
                "num_images": counts[self.name],
                "num_real": counts["real"],
                "cameras_yaw_deg": [BEHIND.low_deg, BEHIND.high_deg],
                "frontal_below_yaw_deg": FRONTAL_YAW_DEG,
            },
        )


@register(
    r"back_face_rate(?P<num>\d+k?)", "back_face_rateN", "share of pictures from behind that are seen from the front"
)
def make_back_face_rate(name: str, num_images: int) -> BackFaceRate:
    """Make the metric of a name."""
    return BackFaceRate(name=name, num_images=num_images)


def is_frontal(directions: np.ndarray) -> np.ndarray:
    """Return which directions [N, 3] have an absolute yaw below 60 degrees: bool [N]."""
    return np.abs(yaw_of(directions)) < FRONTAL_YAW_DEG


def _curve(labels: np.ndarray, frontal: np.ndarray) -> Curve:
    """Return the share of frontal pictures by the absolute yaw of the camera."""
    yaw_deg = np.abs(yaw_of(view_directions(labels)))
    edges = np.linspace(BEHIND.low_deg, BEHIND.high_deg, _NUM_BINS + 1).tolist()
    bins = [YawRange(low_deg=low, high_deg=high, absolute=True) for low, high in zip(edges, edges[1:])]
    shares = [frontal[yaw_range.contains(yaw_deg)] for yaw_range in bins]
    return Curve(
        x_name="absolute yaw, degrees",
        x=tuple(yaw_range.middle_deg for yaw_range in bins),
        y_name="share seen from the front",
        y=tuple(float(share.mean()) if len(share) else None for share in shares),
    )
