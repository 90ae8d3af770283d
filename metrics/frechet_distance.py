"""Frechet distance between the features of generated and of real images: FID, and FD with other detectors.

`fid` takes the published Inception network, `fd` any detector. Of a head that is seen from all sides one number says
little, so both come in variants: `_random` conditions the network on another camera than the one that renders, `_front`
and `_back` compare views from there, and `_yaw` compares views of each range of yaws among themselves.

The distance of finite sets is biased upwards, the more the fewer images there are: compare numbers of equal counts
only, and those of ranges of yaws not with those of all views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from metrics.evaluation import Evaluation
from metrics.feature_stats import FeatureStats
from metrics.real_and_generated import Comparison, chosen_detector, counts, fixed_detector
from metrics.registry import Curve, MetricValues, NotApplicable, register
from metrics.requests import BACK, FRONT, StatsRequest, YawRange, yaw_bins
from torch_utils import distributed
from training.config import require

INCEPTION = "inception"
DEFAULT_DETECTOR = "view"
_YAW_OF_VARIANT = {"front": FRONT, "back": BACK}


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Return the squared Frechet distance of two normal distributions.

    `|m1 - m2|^2 + Tr(C1) + Tr(C2) - 2 Tr((C1 C2)^(1/2))` (Dowson and Landau 1982; Heusel et al. 2017). With factors
    `C1 = A1 A1^T` and `C2 = A2 A2^T` from eigendecompositions the last trace is the sum of the singular values of
    `A1^T A2`.

    Differs from the published code, which takes the real part of SciPy's square root of `C1 C2`: that matrix is not
    symmetric, and where there are fewer images than features it is singular, so that rounding of 1e-16 becomes errors
    of 1e-8 in each of thousands of eigenvalues, or the square root fails. Here nothing is squared before a root is
    taken, and directions without variance beyond rounding are left out; singular covariances are as exact as others.

    Args:
        mean1, mean2: `[F]`.
        cov1, cov2: `[F, F]`, symmetric and positive semidefinite up to rounding in float64.

    Returns:
        The distance; a negative one, which can only be rounding, is 0.

    Raises:
        ValueError: shapes do not fit, a value is not finite, or a covariance is none.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(array, np.float64) for array in (mean1, cov1, mean2, cov2))
    require(mean1.ndim == 1 and mean1.shape == mean2.shape, "means", "[F] both", (mean1.shape, mean2.shape))
    require(np.isfinite(mean1).all() and np.isfinite(mean2).all(), "means", "finite numbers", "NaN or infinity")
    factors = [_factor(cov, len(mean1)) for cov in (cov1, cov2)]
    root_trace = scipy.linalg.svdvals(factors[0].T @ factors[1], check_finite=False).sum() if mean1.size else 0.0
    difference = mean1 - mean2
    distance = difference @ difference + np.trace(cov1) + np.trace(cov2) - 2 * root_trace
    return max(float(distance), 0.0)


def _factor(cov: np.ndarray, size: int) -> np.ndarray:
    """Return A `[F, rank]` with `A A^T = cov`."""
    require(cov.shape == (size, size), "covariance", f"[{size}, {size}] as the mean has it", cov.shape)
    require(bool(np.isfinite(cov).all()), "covariance", "finite numbers", "NaN or infinity")
    scale = np.abs(cov).max(initial=0.0)
    require(bool(np.abs(cov - cov.T).max(initial=0.0) <= 1e-8 * scale), "covariance", "a symmetric matrix", "another")
    values, vectors = scipy.linalg.eigh(cov, check_finite=False)
    most = values.max(initial=0.0)
    rounding = size * np.finfo(np.float64).eps * most  # how exact the solver is
    # Tolerates sums that were made in float32.
    require(bool((values >= -1e-5 * most).all()), "covariance", "no negative eigenvalue", values.min(initial=0.0))
    kept = values > rounding
    return vectors[:, kept] * np.sqrt(values[kept])


def distance_of_stats(real: FeatureStats, generated: FeatureStats) -> float:
    """Return the Frechet distance of two sets of images, the same on all ranks."""
    distance = frechet_distance(*real.mean_cov(), *generated.mean_cov())
    return distributed.broadcast_object(distance)  # libraries of other machines may round otherwise


# Metrics --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FrechetDistance:
    """Frechet distance between generated and real images."""

    name: str
    comparison: Comparison
    is_fid: bool
    """Whether it is FID, which is defined by its detector."""

    def requests(self, evaluation: Evaluation) -> Sequence[StatsRequest]:
        """Return which statistics it needs.

        Raises:
            NotApplicable: there are no real images from that side.
        """
        detector = _detector(evaluation, self.name, self.is_fid)
        return self.comparison.requests(evaluation, detector, moments=True)

    def compute(self, evaluation: Evaluation, stats: Mapping[StatsRequest, FeatureStats]) -> MetricValues:
        """Compute it."""
        real, generated = (stats[request] for request in self.requests(evaluation))
        return MetricValues(values={self.name: distance_of_stats(real, generated)}, details=counts(real, generated))


@dataclass(frozen=True, kw_only=True)
class FrechetDistanceOverYaw:
    """Frechet distance between generated and real views of each range of yaws; their mean is the metric.

    The generated images are split evenly over the ranges, those without two real images included, so that numbers do
    not depend on which these are; the first ones get what remains.
    """

    name: str
    num_images: int
    all_real: bool
    is_fid: bool

    def requests(self, evaluation: Evaluation) -> Sequence[StatsRequest]:
        """Return which statistics it needs.

        Raises:
            ValueError: fewer than 2 images for each range of yaws.
            NotApplicable: no range of yaws has two real images.
        """
        detector = _detector(evaluation, self.name, self.is_fid)
        needed = [
            comparison.requests(evaluation, detector, moments=True)
            for comparison in self._comparisons(evaluation)
            if comparison.is_possible(evaluation)
        ]
        if not needed:
            raise NotApplicable("no range of yaws has two real images")
        return [request for pair in needed for request in pair]

    def _comparisons(self, evaluation: Evaluation) -> list[Comparison]:
        ranges = yaw_bins(evaluation.settings.num_yaw_bins)
        expected = f"{2 * len(ranges)} images or more in {len(ranges)} yaw bins"
        require(self.num_images >= 2 * len(ranges), f"metric {self.name}", expected, self.num_images)
        each, more = divmod(self.num_images, len(ranges))
        return [
            Comparison(num_images=each + (number < more), all_real=self.all_real, yaw=yaw)
            for number, yaw in enumerate(ranges)
        ]

    def compute(self, evaluation: Evaluation, stats: Mapping[StatsRequest, FeatureStats]) -> MetricValues:
        """Compute it."""
        detector = _detector(evaluation, self.name, self.is_fid)
        ranges: list[YawRange] = []
        distances: list[float | None] = []
        details = []
        for comparison in self._comparisons(evaluation):
            ranges.append(comparison.yaw)
            if not comparison.is_possible(evaluation):
                distances.append(None)
                details.append({"real_images": evaluation.num_real(comparison.yaw), "generated_images": 0})
                continue
            real, generated = (stats[r] for r in comparison.requests(evaluation, detector, moments=True))
            distances.append(distance_of_stats(real, generated))
            details.append(counts(real, generated))
        known = [distance for distance in distances if distance is not None]
        curve = Curve(
            x_name="yaw_deg",
            x=tuple(yaw.middle_deg for yaw in ranges),
            y_name="Frechet distance",
            y=tuple(distances),
        )
        return MetricValues(values={self.name: float(np.mean(known))}, curve=curve, details={"ranges": details})


def _detector(evaluation: Evaluation, name: str, is_fid: bool) -> str:
    if is_fid:
        return fixed_detector(evaluation, name, INCEPTION, "fd")
    return chosen_detector(evaluation, DEFAULT_DETECTOR)


_SUFFIX = r"(?:_(?P<variant>random|front|back|yaw))?(?P<num>\d+k?)(?P<full>_full)?"
_SHOWN = "[_random|_front|_back|_yaw]N[_full]"


@register(rf"(?P<family>fid){_SUFFIX}", f"fid{_SHOWN}", "Frechet distance of Inception features (FID)")
@register(rf"(?P<family>fd){_SUFFIX}", f"fd{_SHOWN}", "Frechet distance of any detector's features")
def _make(
    *, name: str, family: str, variant: str | None, num_images: int, full: str | None
) -> FrechetDistance | FrechetDistanceOverYaw:
    is_fid, all_real = family == "fid", full is not None
    if variant == "yaw":
        return FrechetDistanceOverYaw(name=name, num_images=num_images, all_real=all_real, is_fid=is_fid)
    comparison = Comparison(
        num_images=num_images,
        all_real=all_real,
        cameras="random" if variant == "random" else "matched",
        yaw=_YAW_OF_VARIANT.get(variant),
    )
    return FrechetDistance(name=name, comparison=comparison, is_fid=is_fid)
