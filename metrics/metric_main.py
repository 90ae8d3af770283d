"""Compute metrics by name."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

# Imported for the metrics that they register.
from metrics import (  # noqa: F401
    back_face_rate,
    background_swap,
    frechet_distance,
    inception_score,
    kernel_inception_distance,
    multi_view_consistency,
    perceptual_path_length,
    precision_recall,
    view_accuracy,
)
from metrics.evaluation import Evaluation
from metrics.registry import Metric, MetricValues, NotApplicable, metric_list, parse_metric
from metrics.requests import StatsRequest
from metrics.stats_pipeline import collect_stats

__all__ = ["PRESETS", "MetricResult", "compute_metrics", "metric_list", "parse_metric", "parse_metrics"]


PRESETS = {
    "none": (),
    # Minutes on a CPU, and nothing to download.
    "quick": (
        "fd500_full",
        "fd_random500_full",
        "fd_yaw500_full",
        "view_accuracy500",
        "back_face_rate500",
        "mv_consistency50",
    ),
    "full": (
        "fid50k_full",
        "kid50k_full",
        "pr50k3_full",
        "fid_random50k_full",
        "fid_yaw50k_full",
        "view_accuracy10k",
        "back_face_rate10k",
        "mv_consistency1k",
    ),
}
"""Lists of metrics that have a name of their own."""


def parse_metrics(names: Iterable[str]) -> tuple[Metric, ...]:
    """Return the metrics of a list of names and names of `PRESETS`, each once.

    Raises:
        ValueError: there is none of a name.
    """
    expanded = itertools.chain.from_iterable(PRESETS.get(name.strip().lower(), (name,)) for name in names)
    return tuple({metric.name: metric for metric in map(parse_metric, expanded)}.values())


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """What computing a metric gave."""

    metric: str
    """Canonical name."""
    values: MetricValues | None
    """None where it is not applicable."""
    reason: str | None = None
    """Why it is not applicable."""
    detectors: tuple[dict[str, Any], ...] = field(default=())
    """What is known of the detectors that it used: name, resize filter, checksum."""
    seconds: float = 0.0
    """Time it took; rendering for several metrics counts for the first of them."""


def compute_metrics(metrics: Sequence[Metric], evaluation: Evaluation) -> Iterator[MetricResult]:
    """Compute metrics, on all ranks together; yields each when it is there.

    Raises:
        ValueError, OSError: data, network or a detector cannot be used.
    """
    started = time.monotonic()
    needed: dict[str, tuple[StatsRequest, ...]] = {}
    reasons: dict[str, str] = {}
    for metric in metrics:
        try:
            needed[metric.name] = _requests(metric, evaluation)
        except NotApplicable as error:
            needed[metric.name], reasons[metric.name] = (), str(error)
    stats = collect_stats(evaluation, (request for requests in needed.values() for request in requests))
    for metric in metrics:
        requests = needed[metric.name]
        names = dict.fromkeys(request.detector for request in requests)
        detectors = tuple(evaluation.load_detector(name).info.to_json() for name in names)
        values, reason = None, reasons.get(metric.name)
        if reason is None:
            try:
                values = metric.compute(evaluation, {request: stats[request] for request in requests})
            except NotApplicable as error:
                reason = str(error)
        now = time.monotonic()
        yield MetricResult(metric=metric.name, values=values, reason=reason, detectors=detectors, seconds=now - started)
        started = time.monotonic()


def _requests(metric: Metric, evaluation: Evaluation) -> tuple[StatsRequest, ...]:
    """Return what a metric needs, after a look that it can be had.

    Raises:
        NotApplicable: it cannot: a detector cannot learn from these data, or they lack the views.
    """
    requests = tuple(metric.requests(evaluation))
    for request in requests:
        if evaluation.num_real(request.images.yaw) == 0:
            raise NotApplicable(f"the data have no images with {request.images.yaw}")
        evaluation.load_detector(request.detector)
    return requests
