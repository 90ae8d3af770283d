"""Inception score: how sure the published Inception network is of its classes, and how many of them there are.

The classes are those of ImageNet, which has none for heads: the published metric is here to be complete, and says
little of heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special

from metrics.evaluation import Evaluation
from metrics.feature_stats import FeatureStats
from metrics.frechet_distance import INCEPTION
from metrics.real_and_generated import captured, fixed_detector
from metrics.registry import MetricValues, register
from metrics.requests import StatsRequest
from training.config import require

NUM_SPLITS = 10


def inception_scores(probabilities: np.ndarray, num_splits: int = NUM_SPLITS) -> np.ndarray:
    """Return the inception score of each part of the images.

    `exp(mean_i sum_c p_ic log(p_ic / p_c))` with the mean `p_c` over the part (Salimans et al. 2016), in float64; a
    probability of 0 adds 0. It is 1 where all images have the same probabilities, and at most the number of classes.

    Args:
        probabilities: `[N, C]`, of classes; rows sum to 1.
        num_splits: how many parts of equal size, up to 1; they follow each other.

    Returns:
        float64 `[num_splits]`.

    Raises:
        ValueError: fewer images than parts, a value that is no probability, or rows that do not sum to 1.
    """
    require(probabilities.ndim == 2, "probabilities", "[N, C]", probabilities.shape)
    enough = len(probabilities) >= num_splits >= 1
    require(enough, "inception score", f"at least as many images as the {num_splits} parts", len(probabilities))
    probabilities = probabilities.astype(np.float64)
    sums = probabilities.sum(axis=1)
    # Sums of a thousand classes in float32 or, on a GPU, less.
    valid = (probabilities >= 0).all() and np.allclose(sums, 1, rtol=0, atol=1e-2)
    require(bool(valid), "probabilities", "at least 0, with a sum of 1", (probabilities.min(), sums.min(), sums.max()))
    edges = [len(probabilities) * part // num_splits for part in range(num_splits + 1)]
    return np.array([_score(probabilities[low:high]) for low, high in zip(edges, edges[1:])])


def _score(probabilities: np.ndarray) -> float:
    """Return the score of `[N, C]`."""
    divergences = scipy.special.rel_entr(probabilities, probabilities.mean(axis=0)).sum(axis=1)  # [N]
    return float(np.exp(divergences.mean()))


# Metric ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InceptionScore:
    """Inception score of generated images: mean and population standard deviation over 10 parts."""

    name: str
    num_images: int

    def requests(self, evaluation: Evaluation) -> Sequence[StatsRequest]:
        """Return which statistics it needs."""
        detector = fixed_detector(evaluation, self.name, INCEPTION, None)
        images = evaluation.generated(self.num_images)
        return (StatsRequest(images=images, detector=detector, output="probabilities", capture=self.num_images),)

    def compute(self, evaluation: Evaluation, stats: Mapping[StatsRequest, FeatureStats]) -> MetricValues:
        """Compute it."""
        (request,) = self.requests(evaluation)
        scores = inception_scores(captured(stats[request], request))
        values = {f"{self.name}_mean": float(scores.mean()), f"{self.name}_std": float(scores.std())}
        details = {"generated_images": stats[request].num_items, "splits": NUM_SPLITS}
        return MetricValues(values=values, details=details)


@register(r"is(?P<num>\d+k?)", "isN", "Inception score of ImageNet's classes; says little of heads")
def _make(*, name: str, num_images: int) -> InceptionScore:
    require(num_images >= NUM_SPLITS, f"metric {name}", f"at least {NUM_SPLITS} images", num_images)
    return InceptionScore(name=name, num_images=num_images)
