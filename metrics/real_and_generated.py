"""What metrics share that compare the distribution of features of generated images with that of real ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from metrics.evaluation import Evaluation
from metrics.feature_stats import FeatureStats
from metrics.registry import NotApplicable
from metrics.requests import Cameras, ImageSet, StatsRequest, YawRange
from training.config import require


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Sets of real and generated images that are compared."""

    num_images: int
    """How many generated ones."""
    all_real: bool
    """All real images, as the published metrics with `_full` in their names; otherwise as many as generated ones."""
    max_real: int | None = None
    """How many real images at most; None is any number."""
    least_real: int = 2
    """Real images below which there is no distribution to speak of."""
    cameras: Cameras = "matched"
    """Of generated images."""
    yaw: YawRange | None = None
    """From where the images of both sets are seen; None is what the settings say."""

    def is_possible(self, evaluation: Evaluation) -> bool:
        """Return whether there are enough real images."""
        return evaluation.num_real(self.yaw) >= self.least_real

    def requests(
        self, evaluation: Evaluation, detector: str, *, moments: bool = False, capture: bool = False
    ) -> tuple[StatsRequest, StatsRequest]:
        """Return requests for features of the real and of the generated images; `capture` is of all of them.

        Raises:
            NotApplicable: there are too few real images.
        """
        if not self.is_possible(evaluation):
            there = evaluation.real(yaw=self.yaw).yaw
            where = "" if there is None else f" with {there}"
            came = evaluation.num_real(self.yaw)
            raise NotApplicable(f"the data have {came} images{where}, of which it needs {self.least_real}")
        real, generated = self._image_sets(evaluation)
        most_real = evaluation.num_real(self.yaw) if real.num_images is None else real.num_images
        return (
            StatsRequest(images=real, detector=detector, moments=moments, capture=most_real if capture else None),
            StatsRequest(
                images=generated, detector=detector, moments=moments, capture=self.num_images if capture else None
            ),
        )

    def _image_sets(self, evaluation: Evaluation) -> tuple[ImageSet, ImageSet]:
        limits = [self.max_real] if self.all_real else [self.max_real, self.num_images]
        most = min((limit for limit in limits if limit is not None), default=None)
        # All of them have one name, so that metrics share their statistics.
        if most is not None and most >= evaluation.num_real(self.yaw):
            most = None
        return evaluation.real(most, self.yaw), evaluation.generated(self.num_images, self.cameras, self.yaw)


def captured(stats: FeatureStats, request: StatsRequest) -> np.ndarray:
    """Return the features that a request asked for, float32 `[N, F]`; the statistics may hold those of more images."""
    return stats.rows()[: np.searchsorted(stats.row_indices(), request.capture)]


def counts(real: FeatureStats, generated: FeatureStats) -> Mapping[str, Any]:
    """Return what a reader of a distance must know: how many images, and how many features each."""
    return {
        "real_images": real.num_items,
        "generated_images": generated.num_items,
        "features": real.num_features,
    }


def chosen_detector(evaluation: Evaluation, default: str) -> str:
    """Return the detector of a metric that leaves the choice."""
    chosen = evaluation.settings.detector
    return default if chosen is None else chosen


def fixed_detector(evaluation: Evaluation, name: str, detector: str, instead: str | None) -> str:
    """Return the detector that is part of a metric's definition.

    Args:
        evaluation: what is evaluated.
        name: of the metric.
        detector: the only one that gives this metric.
        instead: the metric that takes any detector, as a prefix of names such as 'fd'; None if there is none.

    Raises:
        ValueError: the settings name another detector.
    """
    came = evaluation.settings.detector
    other = f"; with another one that metric is called {instead}" if instead else ""
    require(came in (None, detector), f"detector of {name}", f"{detector}, which defines it{other}", came)
    return detector
