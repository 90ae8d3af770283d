"""Kernel distance between the features of generated and of real images: KID, and KD with other detectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from metrics.evaluation import Evaluation
from metrics.feature_stats import FeatureStats, sum_of_ranks
from metrics.frechet_distance import DEFAULT_DETECTOR, INCEPTION
from metrics.real_and_generated import Comparison, captured, chosen_detector, counts, fixed_detector
from metrics.registry import MetricValues, register
from metrics.requests import StatsRequest
from torch_utils import distributed
from torch_utils.rng import derive_seed
from training.config import require

NUM_SUBSETS = 100
MAX_SUBSET_SIZE = 1000
MAX_REAL = 1_000_000


def kernel_distances(
    real: np.ndarray,
    generated: np.ndarray,
    *,
    num_subsets: int = NUM_SUBSETS,
    max_subset_size: int = MAX_SUBSET_SIZE,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Return estimates of the squared maximum mean discrepancy of two distributions; their mean is KID.

    Binkowski et al. 2018: with the kernel `k(x, y) = (x y^T / F + 1)^3` and `m` images of either kind, drawn without
    replacement,

        1 / (m (m - 1)) sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) - 2 / m^2 sum_{i, j} k(x_i, y_j),

    which is unbiased, and therefore may be negative. Ranks share the subsets.

    Differs from the published code: subsets come from a seed instead of the state of NumPy's generator, products are
    float64, and where a subset is everything there is it is computed once.

    Args:
        real: `[N, F]`, the same on all ranks.
        generated: `[M, F]`, the same on all ranks.
        num_subsets: how many estimates.
        max_subset_size: images of either kind in a subset, unless there are fewer.
        seed: of the subsets.
        device: that computes.

    Returns:
        float64 `[num_subsets]`, or `[1]` where a subset is everything; the same on all ranks.

    Raises:
        ValueError: widths differ, or there are fewer than 2 images of a kind.
    """
    fits = real.ndim == generated.ndim == 2 and real.shape[1] == generated.shape[1] > 0
    require(fits, "features", "[N, F] and [M, F]", (real.shape, generated.shape))
    size = min(len(real), len(generated), max_subset_size)
    require(size >= 2, "kernel distance", "at least 2 images of either kind", size)
    num_different = 1 if len(real) == len(generated) == size else num_subsets
    estimates = torch.zeros(num_different, dtype=torch.float64, device=device)
    for subset in distributed.shard(range(num_different)):
        generator = np.random.default_rng(derive_seed(seed, subset))
        pair = [
            torch.from_numpy(rows[generator.choice(len(rows), size, replace=False)]).to(device, torch.float64)
            for rows in (real, generated)
        ]
        estimates[subset] = _squared_discrepancy(*pair)
        distributed.note_progress()
    return sum_of_ranks(estimates).cpu().numpy()  # each is 0 on all ranks but one


def _squared_discrepancy(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the unbiased estimate from `[m, F]` and `[m, F]`."""
    size = len(x)
    same = sum((kernel := _kernel(rows, rows)).sum() - kernel.trace() for rows in (x, y))
    return same / (size * (size - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


# Metric ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """Kernel distance between generated and real images."""

    name: str
    comparison: Comparison
    is_kid: bool
    """Whether it is KID, which is defined by its detector."""

    def requests(self, evaluation: Evaluation) -> Sequence[StatsRequest]:
        """Return which statistics it needs.

        Raises:
            NotApplicable: there are not two real images.
        """
        if self.is_kid:
            detector = fixed_detector(evaluation, self.name, INCEPTION, "kd")
        else:
            detector = chosen_detector(evaluation, DEFAULT_DETECTOR)
        return self.comparison.requests(evaluation, detector, capture=True)

    def compute(self, evaluation: Evaluation, stats: Mapping[StatsRequest, FeatureStats]) -> MetricValues:
        """Compute it."""
        requests = self.requests(evaluation)
        real, generated = (captured(stats[request], request) for request in requests)
        estimates = kernel_distances(real, generated, seed=evaluation.settings.seed, device=evaluation.device)
        details = {
            **counts(*(stats[request] for request in requests)),
            "subsets": len(estimates),
            "subset_size": min(len(real), len(generated), MAX_SUBSET_SIZE),
            "std_of_subsets": float(estimates.std()),
        }
        return MetricValues(values={self.name: float(estimates.mean())}, details=details)


@register(
    r"(?P<family>kid)(?P<num>\d+k?)(?P<full>_full)?", "kidN[_full]", "kernel distance of Inception features (KID)"
)
@register(r"(?P<family>kd)(?P<num>\d+k?)(?P<full>_full)?", "kdN[_full]", "kernel distance of any detector's features")
def _make(*, name: str, family: str, num_images: int, full: str | None) -> KernelDistance:
    comparison = Comparison(num_images=num_images, all_real=full is not None, max_real=MAX_REAL)
    return KernelDistance(name=name, comparison=comparison, is_kid=family == "kid")
