"""Evaluations and statistics for tests of metrics: data of which there is nothing but cameras, features by hand."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from metrics.evaluation import Evaluation, EvaluationSettings
from metrics.feature_stats import FeatureStats
from metrics.requests import StatsRequest
from tests.helpers.head_data import head_labels


class Views:
    """A data set of cameras at azimuths, without images."""

    config = SimpleNamespace(conditional=True)

    def __init__(self, yaw_deg: Sequence[float]) -> None:
        self.labels = head_labels(list(yaw_deg))

    def __len__(self) -> int:
        return len(self.labels)


def evaluation_of(yaw_deg: Sequence[float], **settings: Any) -> Evaluation:
    """Return an evaluation with a data set of views, without a generator."""
    return Evaluation(None, Views(yaw_deg), settings=EvaluationSettings(**settings))


def stats_of(features: np.ndarray | torch.Tensor, request: StatsRequest) -> FeatureStats:
    """Return the statistics that a request asks for, of features of the images 0, 1, ..."""
    stats = FeatureStats(moments=request.moments, capture=request.capture)
    stats.add(torch.as_tensor(features), np.arange(len(features)))
    stats.reduce()
    return stats
