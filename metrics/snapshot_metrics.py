"""Metrics of the snapshots of a run, computed while it trains."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from metrics.evaluation import Evaluation, EvaluationSettings
from metrics.metric_main import compute_metrics, parse_metrics
from metrics.network_data import all_real_images
from metrics.results import ResultContext, append_record, result_record
from metrics.stats_cache import default_cache_dir
from torch_utils import distributed
from training.dataset import HeadDataset
from training.train_config import DataConfig
from training.triplane import TriPlaneGenerator


class SnapshotMetrics:
    """Computes metrics of a generator that is in training, and appends them to `metric-<name>.jsonl` of the run.

    They are those that `calc_metrics.py` computes of the snapshot with its defaults: real images are all of the run's
    data, none of them flipped or repeated.

    Args:
        names: of metrics, or of lists of them; see `metrics.metric_main.parse_metrics`.
        data: of the run.
        device: of the generator.
        workers: processes that read images.

    Raises:
        ValueError: there is no metric of a name.
    """

    def __init__(self, names: Sequence[str], data: DataConfig, device: torch.device, workers: int) -> None:
        self._metrics = parse_metrics(names)
        self._data = all_real_images(data)
        self._device = device
        self._settings = EvaluationSettings(
            workers=workers,
            render_ahead=device.type == "cuda",
            cache_dir=default_cache_dir(),
            progress=sys.stderr.isatty(),
        )
        self._evaluation: Evaluation | None = None

    def __call__(self, generator: TriPlaneGenerator, snapshot: Path) -> dict[str, float]:
        """Compute the metrics; on all ranks together.

        Args:
            generator: moving average, in eval mode; the same on all ranks.
            snapshot: the file that it was written to.

        Returns:
            The number of each metric that is applicable, by its name.
        """
        if self._evaluation is None:  # kept, with its detectors
            dataset = HeadDataset(self._data)
            self._evaluation = Evaluation(generator, dataset, self._device, self._settings)
        self._evaluation.generator = generator
        context = ResultContext(
            network=str(snapshot), data=self._data, settings=self._settings, num_ranks=distributed.world_size()
        )
        found = {}
        for result in compute_metrics(self._metrics, self._evaluation):
            if distributed.is_main():
                append_record(snapshot.parent, result_record(result, context))
            if result.values is not None:
                found[result.metric] = next(iter(result.values.values.values()))
        return found
