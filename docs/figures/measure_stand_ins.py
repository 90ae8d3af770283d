"""Print the table of docs/metrics.md that says what metrics find in generators whose properties are known.

PYTHONPATH=. python docs/figures/measure_stand_ins.py [--images 500]

The generators trace synthetic heads exactly, and the data are such heads, so that one of them makes just what is in the
data. The others each have one fault.
"""

from __future__ import annotations

from collections.abc import Callable

import click
import torch

from dataset_tools.synthetic_data import SyntheticData
from metrics.evaluation import Evaluation, EvaluationSettings
from metrics.metric_main import compute_metrics, parse_metrics
from metrics.stats_cache import default_cache_dir
from tests.helpers.stand_ins import Field, NoiseGenerator, RayTracedGenerator, TwoFacedGenerator
from training.dataset import HeadDataset

_MANY = 1 << 20  # heads, so that hardly one comes twice
_OTHER_SEED = 1000  # none of the heads in the data


class FlippedGenerator(RayTracedGenerator):
    """Pictures flipped left to right, under the cameras of those that are not."""

    def render(
        self, field: Field, c: torch.Tensor, neural_rendering_resolution: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Trace and flip."""
        return {name: x.flip(3) for name, x in super().render(field, c, neural_rendering_resolution).items()}


def _generator(cls: Callable[..., RayTracedGenerator], **options: float) -> Callable[[int], RayTracedGenerator]:
    return lambda resolution: cls(resolution, num_heads=_MANY, seed=_OTHER_SEED, **options)


ROWS = {
    "other heads from the same source": _generator(RayTracedGenerator),
    "four heads, again and again": lambda resolution: RayTracedGenerator(resolution, 4, _OTHER_SEED),
    "a face on both sides": _generator(TwoFacedGenerator),
    "left and right exchanged": _generator(FlippedGenerator),
    "depth off by 0.1": _generator(RayTracedGenerator, depth_error=0.1),
    "noise": _generator(NoiseGenerator),
}


@click.command()
@click.option("--images", default=500, show_default=True, help="Generated images of each metric.")
@click.option("--heads", default=50, show_default=True, help="Heads of mv_consistency.")
@click.option("--resolution", default=64, show_default=True, help="Side of the pictures.")
def main(images: int, heads: int, resolution: int) -> None:
    """Measure all generators, and print the rows of the table."""
    data = SyntheticData.parse(["synth:1500x4"], [], default_cache_dir(), resolution)
    data.make()
    dataset = HeadDataset(data.config)
    names = [f"fd{images}_full", f"view_accuracy{images}", f"back_face_rate{images}", f"mv_consistency{heads}"]
    settings = EvaluationSettings(cache_dir=default_cache_dir(), batch_size=8)
    click.echo(f"| generator | {' | '.join(f'`{name}`' for name in names)} |\n|---|{'---|' * len(names)}")
    for row, make in ROWS.items():
        evaluation = Evaluation(make(resolution), dataset, settings=settings)
        results = compute_metrics(parse_metrics(names), evaluation)
        cells = ["-" if r.values is None else f"{next(iter(r.values.values.values())):.3g}" for r in results]
        click.echo(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
