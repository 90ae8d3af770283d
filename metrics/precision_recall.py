"""Precision and recall: how many generated images look real, and how much of what is real is generated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from metrics.evaluation import Evaluation
from metrics.feature_stats import FeatureStats, sum_of_ranks
from metrics.real_and_generated import Comparison, captured, chosen_detector, counts
from metrics.registry import MetricValues, register
from metrics.requests import StatsRequest
from torch_utils import distributed
from training.config import require

DEFAULT_DETECTOR = "vgg16"
DEFAULT_NEIGHBORS = 3
MAX_REAL = 200_000
BLOCK_SIZE = 2048
# Of squared distances to squared norms: features are float32, so what differs by less is the same.
_ZERO = 1e-12


class PrecisionRecall(NamedTuple):
    """Shares, 0 to 1."""

    precision: float
    recall: float


def precision_recall(
    real: np.ndarray,
    generated: np.ndarray,
    *,
    num_neighbors: int = DEFAULT_NEIGHBORS,
    device: torch.device | str = "cpu",
    block_size: int = BLOCK_SIZE,
) -> PrecisionRecall:
    """Return precision and recall of generated features.

    Kynkaanniemi et al. 2019, equations 1 and 2: every point of a set is the centre of a ball that reaches to its
    `num_neighbors`-th nearest neighbour in that set. Precision is the share of generated points in any ball of a real
    one, recall the share of real points in any ball of a generated one; borders belong to the balls.

    Distances are computed block by block, `[block_size, block_size]`, and ranks share the rows of blocks.

    Differs from the published code: distances are float64 instead of float16, which has 3 digits and turns features
    above 65504 into infinity; and points that are equal have distance 0, whatever their norms are rounded to.

    Args:
        real: `[N, F]`, the same on all ranks.
        generated: `[M, F]`, the same on all ranks.
        num_neighbors: k; the point itself is not among its neighbours.
        device: that computes.
        block_size: points of a block. Besides the features, memory for 4 blocks of distances and 2 of points is needed.

    Returns:
        Both shares, the same on all ranks.

    Raises:
        ValueError: widths differ, or a set has no more than `num_neighbors` points.
    """
    fits = real.ndim == generated.ndim == 2 and real.shape[1] == generated.shape[1] > 0
    require(fits, "features", "[N, F] and [M, F]", (real.shape, generated.shape))
    require(num_neighbors >= 1, "neighbours", "at least 1", num_neighbors)
    fewest = min(len(real), len(generated))
    require(fewest > num_neighbors, "precision and recall", f"more than {num_neighbors} images of either kind", fewest)
    real_set, generated_set = (_Points(torch.from_numpy(rows), device, block_size) for rows in (real, generated))
    return PrecisionRecall(
        precision=_share_inside(generated_set, real_set, _squared_radii(real_set, num_neighbors)),
        recall=_share_inside(real_set, generated_set, _squared_radii(generated_set, num_neighbors)),
    )


@dataclass(frozen=True)
class _Points:
    """Points `[N, F]`, read in blocks."""

    rows: torch.Tensor
    device: torch.device | str
    block_size: int

    def blocks(self, of_this_rank: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the place of a block and its points in float64."""
        starts = range(0, len(self.rows), self.block_size)
        for start in distributed.shard(starts) if of_this_rank else starts:
            place = slice(start, min(start + self.block_size, len(self.rows)))
            yield place, self.rows[place].to(self.device, torch.float64)
            distributed.note_progress()


def _squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return `[N, M]`."""
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    distances = torch.addmm(norms, x, y.T, alpha=-2)
    return distances.masked_fill_(distances <= norms.mul_(_ZERO), 0.0)


def _squared_radii(points: _Points, num_neighbors: int) -> torch.Tensor:
    """Return the squared distance of each point to its k-th nearest neighbour, float64 `[N]`, the same on all ranks."""
    radii = torch.zeros(len(points.rows), dtype=torch.float64, device=points.device)
    for place, centers in points.blocks(of_this_rank=True):
        nearest = centers.new_empty(len(centers), 0)
        for other_place, others in points.blocks():
            distances = _squared_distances(centers, others)
            if place == other_place:
                distances.fill_diagonal_(torch.inf)  # not a neighbour of itself
            few = distances.topk(min(num_neighbors, distances.shape[1]), dim=1, largest=False, sorted=False).values
            nearest = torch.cat([nearest, few], dim=1)  # [block, up to 2 k]
            nearest = nearest.topk(min(num_neighbors, nearest.shape[1]), dim=1, largest=False, sorted=False).values
        radii[place] = nearest.amax(dim=1)
    return sum_of_ranks(radii)  # 0 on all ranks but one


def _share_inside(points: _Points, centers: _Points, squared_radii: torch.Tensor) -> float:
    """Return the share of points that lie in any of the balls, the same on all ranks."""
    inside = torch.zeros((), dtype=torch.float64, device=points.device)
    for _, some in points.blocks(of_this_rank=True):
        is_inside = torch.zeros(len(some), dtype=torch.bool, device=points.device)
        for place, balls in centers.blocks():
            is_inside |= (_squared_distances(some, balls) <= squared_radii[place]).any(dim=1)
        inside += is_inside.sum()
    return float(sum_of_ranks(inside)) / len(points.rows)


# Metric ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PrecisionRecallMetric:
    """Precision and recall of generated images."""

    name: str
    comparison: Comparison
    num_neighbors: int

    def requests(self, evaluation: Evaluation) -> Sequence[StatsRequest]:
        """Return which statistics it needs.

        Raises:
            NotApplicable: there are too few real images for so many neighbours.
        """
        return self.comparison.requests(evaluation, chosen_detector(evaluation, DEFAULT_DETECTOR), capture=True)

    def compute(self, evaluation: Evaluation, stats: Mapping[StatsRequest, FeatureStats]) -> MetricValues:
        """Compute it."""
        requests = self.requests(evaluation)
        real, generated = (captured(stats[request], request) for request in requests)
        result = precision_recall(real, generated, num_neighbors=self.num_neighbors, device=evaluation.device)
        values = {f"{self.name}_{share}": value for share, value in result._asdict().items()}
        details = {**counts(*(stats[request] for request in requests)), "neighbors": self.num_neighbors}
        return MetricValues(values=values, details=details)


# The published pr50k3 is 50k images and 3 neighbours; after a number without k, an underscore parts the two.
@register(
    r"pr(?P<num>\d+k?)(?:_?(?<=[k_])(?P<neighbors>\d{1,7}))?(?P<full>_full)?",
    "prN[_K][_full]",
    "precision and recall by balls to the K-th of nearest neighbours, else 3; pr50k3 as published",
)
def _make(*, name: str, num_images: int, neighbors: str | None, full: str | None) -> PrecisionRecallMetric:
    num_neighbors = DEFAULT_NEIGHBORS if neighbors is None else int(neighbors)
    expected = f"from 1 neighbour to {num_images - 1} of as many images"
    require(1 <= num_neighbors < num_images, f"metric {name}", expected, num_neighbors)
    comparison = Comparison(
        num_images=num_images, all_real=full is not None, max_real=MAX_REAL, least_real=num_neighbors + 1
    )
    return PrecisionRecallMetric(name=name, comparison=comparison, num_neighbors=num_neighbors)
