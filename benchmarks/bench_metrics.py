"""Time the parts of metrics: images a second and memory, rendering with and without features computed beside it.

    python benchmarks/bench_metrics.py --out metrics.json
    python benchmarks/bench_metrics.py --config debug --quick --images 64
    python benchmarks/bench_metrics.py --stages generated --batch 16 --device cuda

Method and meaning of the columns: benchmarks/README.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, too

from benchmarks.measure import Action, environment, markdown_table, measure, write_report
from benchmarks.train_setups import write_data
from dnnlib import cli
from inference.loading import load_generator
from metrics.evaluation import Evaluation, EvaluationSettings
from metrics.frechet_distance import frechet_distance
from metrics.image_streams import generated_images, real_images
from metrics.kernel_inception_distance import kernel_distances
from metrics.multi_view_consistency import PAIRS_PER_HEAD, compare_heads
from metrics.precision_recall import precision_recall
from metrics.requests import ImageSet, StatsRequest
from metrics.stats_pipeline import collect_stats
from torch_utils.distributed import resolve_device
from training.dataset import HeadDataset
from training.presets import GENERATOR_PRESETS

NUM_FEATURES = 2048
"""Of Inception."""
NUM_ROWS = 2500
"""Images whose features are compared one by one."""
NUM_SUBSETS = 10
"""Of the kernel distance, a tenth of those of the metric."""
LONG_S = 120.0
"""Stages with a run that takes longer are measured once."""
_UNTIMED_RUNS = 2  # of `measure`
_VIEWS_PER_PAIR = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of metrics, in one way or in several."""

    title: str
    num_images: int
    """Images, or rows of features, that one run of it takes."""
    actions: dict[str, Action]


class Subject:
    """A generator, real images and a detector.

    Args:
        config: preset of the generator, which is untrained.
        folder: where real images are written.
        num_images: real ones, and generated ones.
        batch_size: images that are rendered at a time.
        detector: see `metrics.detectors.load_detector`; loaded or trained here, outside of what is timed.
        device: where to compute.
    """

    def __init__(
        self, config: str, folder: Path, num_images: int, batch_size: int, detector: str, device: torch.device
    ) -> None:
        self.generator = load_generator(f"init:{config}", device)
        self.num_images, self.detector, self.device = num_images, detector, device
        data = write_data(folder, self.generator.img_resolution, num_images=num_images)
        self._dataset = HeadDataset(data)
        self._settings = EvaluationSettings(batch_size=batch_size, cache_dir=None, progress=False, workers=0)
        self.evaluation = self._evaluation()
        self._loaded = self.evaluation.load_detector(detector)

    def _evaluation(self, **settings: Any) -> Evaluation:
        evaluation = Evaluation(
            self.generator, self._dataset, self.device, dataclasses.replace(self._settings, **settings)
        )
        if hasattr(self, "_loaded"):
            evaluation.load_detector = lambda name: self._loaded  # as it is, also with other settings
        return evaluation

    def statistics(self, images: ImageSet, **settings: Any) -> torch.Tensor:
        """Return the mean of features over a set of images, which are made or read."""
        request = StatsRequest(images=images, detector=self.detector, moments=True)
        stats = collect_stats(self._evaluation(**settings), [request])[request]
        return torch.from_numpy(stats.mean_cov()[0])

    def read(self, workers: int) -> torch.Tensor:
        """Read real images; return their mean."""
        batches = real_images(self._evaluation(workers=workers), np.arange(self.num_images))
        return torch.stack([batch.images.double().mean() for batch in batches]).mean()

    def render(self) -> torch.Tensor:
        """Render images; return their mean."""
        batches = generated_images(self.evaluation, self.evaluation.generated(self.num_images))
        return torch.stack([batch.images.double().mean() for batch in batches]).mean()

    def detect(self) -> torch.Tensor:
        """Compute features of images that are there already; return their mean."""
        side, size = self.generator.img_resolution, self._settings.batch_size
        images = torch.full((size, 3, side, side), 99, dtype=torch.uint8, device=self.device)
        features = [self._loaded(images, "features") for _ in range(self.num_images // size)]
        return torch.cat(features).double().mean(dim=0)

    def compare_views(self, num_heads: int) -> torch.Tensor:
        """Render heads for multi-view consistency, and compare their views."""
        batches = self.evaluation.batches(num_heads, "")
        cameras = self.evaluation.cameras(self.evaluation.generated(num_heads))
        rows = [torch.from_numpy(compare_heads(self.evaluation, heads, cameras)) for heads in batches]
        return torch.nan_to_num(torch.cat(rows))


def make_stages(subject: Subject) -> dict[str, Stage]:
    """Return the stages by the names that `--stages` takes."""
    number, evaluation = subject.num_images, subject.evaluation
    real, generated = evaluation.real(), evaluation.generated(number)
    num_heads = max(1, number // (PAIRS_PER_HEAD * _VIEWS_PER_PAIR))
    rows = np.random.RandomState(0).standard_normal((2, NUM_ROWS, NUM_FEATURES)).astype(np.float32)
    moments = [value for part in rows for value in (part.mean(axis=0), np.cov(part, rowvar=False))]
    one = {
        "read": (
            "reading real images",
            number,
            {"here": partial(subject.read, 0), "one worker": partial(subject.read, 1)},
        ),
        "real": (
            "real images to statistics",
            number,
            {
                "here": partial(subject.statistics, real, workers=0),
                "one worker": partial(subject.statistics, real, workers=1),
            },
        ),
        "detector": ("features of images", number, {"alone": subject.detect}),
        "render": ("rendering", number, {"alone": subject.render}),
        "generated": (
            "generated images to statistics",
            number,
            {
                "ahead": partial(subject.statistics, generated, render_ahead=True),
                "in turns": partial(subject.statistics, generated, render_ahead=False),
            },
        ),
        "consistency": (
            "views to multi-view consistency",
            num_heads * PAIRS_PER_HEAD * _VIEWS_PER_PAIR,
            {"alone": partial(subject.compare_views, num_heads)},
        ),
        "frechet": (
            f"Frechet distance, {NUM_FEATURES} features",
            2 * NUM_ROWS,
            {"alone": lambda: torch.tensor(frechet_distance(*moments))},
        ),
        "kernel": (
            f"kernel distance, {NUM_FEATURES} features, {NUM_SUBSETS} subsets",
            2 * NUM_ROWS,
            {
                "alone": lambda: torch.from_numpy(
                    kernel_distances(*rows, num_subsets=NUM_SUBSETS, device=subject.device)
                )
            },
        ),
        "precision": (
            f"precision and recall, {NUM_FEATURES} features",
            2 * NUM_ROWS,
            {"alone": lambda: torch.tensor(precision_recall(*rows, num_neighbors=3, device=subject.device))},
        ),
    }
    return {
        name: Stage(title=title, num_images=images, actions=actions) for name, (title, images, actions) in one.items()
    }


STAGES = ("read", "real", "detector", "render", "generated", "consistency", "frechet", "kernel", "precision")


def run_stage(stage: Stage, repeats: int, device: torch.device, report: Callable[[], Any]) -> dict[str, Any]:
    """Measure one stage; returns an entry of the `results` of the JSON file."""
    measurements, difference = measure(stage.actions, repeats, device, LONG_S, report)
    variants = {}
    for name, measurement in measurements.items():
        numbers = measurement.to_json()
        for key in ("gflop", "gflop_per_s", "gbyte", "gbyte_per_s"):  # threads of their own are not counted
            del numbers[key]
        variants[name] = {**numbers, "images_per_s": stage.num_images / numbers["median_s"]}
    return {"title": stage.title, "images": stage.num_images, "variants": variants, "difference": difference}


def results_table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    rows = ["stage, variant, runs, images, images/s, s, min ... max, CPU s, peak MiB, extra MiB".split(", ")]
    for result in results.values():
        for number, (name, m) in enumerate(result["variants"].items()):
            first = [result["title"] if number == 0 else "", name, str(len(m["seconds"])), str(result["images"])]
            times = [f"{m['images_per_s']:.1f}", f"{m['median_s']:.3f}", f"{m['min_s']:.3f} ... {m['max_s']:.3f}"]
            memory = ["-" if m[key] is None else f"{m[key]:.0f}" for key in ("peak_mib", "extra_mib")]
            rows.append([*first, *times, f"{m['median_cpu_s']:.3f}", *memory])
    return markdown_table(rows)


@click.command()
@cli.option("--config", type=click.Choice(list(GENERATOR_PRESETS)), default="debug", help="Preset to build, untrained.")
@cli.option("--images", "num_images", type=click.IntRange(min=64), default=128, help="Real and generated ones.")
@cli.option("--batch", "batch_size", type=cli.POSITIVE_INT, default=4, help="Images at a time.")
@cli.option("--detector", default="view", help="Whose features are computed; view is trained first.")
@cli.option("--stages", type=click.Choice(STAGES), multiple=True, default=STAGES, help="What to time.")
@cli.option("--repeats", type=cli.POSITIVE_INT, default=3, help="Timed runs of each.")
@cli.option("--quick", is_flag=True, help="One timed run each.")
@cli.option("--threads", type=cli.POSITIVE_INT, help="CPU threads; PyTorch's choice if not given.")
@cli.option("--json", "--out", "out", type=click.Path(dir_okay=False, path_type=Path), help="Also write this file.")
@cli.device_option()
@cli.cli_errors()
@torch.no_grad()
def benchmark(
    config: str,
    num_images: int,
    batch_size: int,
    detector: str,
    stages: tuple[str, ...],
    repeats: int,
    quick: bool,
    threads: int | None,
    out: Path | None,
    device: str,
) -> None:
    """Time the parts of metrics, and print a table."""
    if threads is not None:
        torch.set_num_threads(threads)
    resolved, repeats = resolve_device(device), 1 if quick else repeats
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(config, Path(folder), num_images, batch_size, detector, resolved)
        chosen = {name: stage for name, stage in make_stages(subject).items() if name in stages}
        settings = {"config": config, "images": num_images, "batch": batch_size, "detector": detector}
        settings |= {"repeats": repeats, "side": subject.generator.img_resolution}
        machine = environment(resolved) | {"load_before": os.getloadavg()[0]}
        results = {}
        total = sum(len(stage.actions) for stage in chosen.values()) * (_UNTIMED_RUNS + repeats)
        with tqdm(total=total, desc=config, unit="run") as bar:
            for name, stage in chosen.items():
                bar.set_postfix_str(name)
                results[name] = run_stage(stage, repeats, resolved, partial(bar.update, 1))
    machine["load_after"] = os.getloadavg()[0]
    click.echo(f"{json.dumps(settings | machine)}\n\n{results_table(results)}\n")
    worst = max(result["difference"] for result in results.values())
    click.echo(f"The variants of a stage differ by at most {worst:.1e}.")
    if out is not None:
        write_report(out, settings, machine, results)


if __name__ == "__main__":
    benchmark()
