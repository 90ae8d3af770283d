"""Compute metrics by name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

# Imported for the metrics that they register, in the order in which people see them.
from metrics import frechet_distance as _frechet_distance  # noqa: F401
from metrics import kernel_inception_distance as _kernel_inception_distance  # noqa: F401
from metrics import precision_recall as _precision_recall  # noqa: F401
from metrics import inception_score as _inception_score  # noqa: F401, I001
from metrics import perceptual_path_length as _perceptual_path_length  # noqa: F401
from metrics import view_accuracy as _view_accuracy  # noqa: F401
from metrics import back_face_rate as _back_face_rate  # noqa: F401
from metrics import multi_view_consistency as _multi_view_consistency  # noqa: F401
from metrics import background_swap as _background_swap  # noqa: F401
from metrics.evaluation import Evaluation
from metrics.registry import Metric, MetricValues, NotApplicable, metric_list, parse_metric
from metrics.stats_pipeline import collect_stats

__all__ = ["MetricResult", "compute_metrics", "metric_list", "parse_metric"]


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
    needed = {metric.name: tuple(metric.requests(evaluation)) for metric in metrics}
    stats = collect_stats(evaluation, (request for requests in needed.values() for request in requests))
    for metric in metrics:
        requests = needed[metric.name]
        names = dict.fromkeys(request.detector for request in requests)
        detectors = tuple(evaluation.load_detector(name).info.to_json() for name in names)
        values, reason = None, None
        try:
            values = metric.compute(evaluation, {request: stats[request] for request in requests})
        except NotApplicable as error:
            reason = str(error)
        now = time.monotonic()
        yield MetricResult(metric=metric.name, values=values, reason=reason, detectors=detectors, seconds=now - started)
        started = time.monotonic()
