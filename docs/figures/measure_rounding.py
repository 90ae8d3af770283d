"""Print how much the pictures of two networks differ, such as those of a network and of its rounded copy.

PYTHONPATH=. python docs/figures/measure_rounding.py EXACT ROUNDED [--seeds 0-15] [--views 8]
"""

from __future__ import annotations

import math

import click
import numpy as np

from dnnlib import cli
from inference.loading import load_generator
from inference.sampling import Truncation, make_head, orbit_labels

_RANGE = 2.0  # of images in [-1, 1]


@click.command()
@click.argument("exact")
@click.argument("rounded")
@click.option("--seeds", type=cli.SeedList(), default="0-15", show_default=True)
@click.option("--views", default=8, show_default=True, help="Views of each head, once around.")
def main(exact: str, rounded: str, seeds: list[int], views: int) -> None:
    """Render the same heads with both, without truncation, and compare."""
    generators = [load_generator(source) for source in (exact, rounded)]
    labels, squared, largest = orbit_labels(views), [], 0.0
    for seed in seeds:
        heads = [make_head(generator, seed, Truncation(psi=1.0)) for generator in generators]
        for label in labels:
            first, second = (head.render(label)["image"].clamp(-1, 1) for head in heads)
            squared.append(float((first - second).square().mean()))
            largest = max(largest, float((first - second).abs().max()))
    mean_db, worst_db = (10 * math.log10(_RANGE**2 / max(value, 1e-20)) for value in (np.mean(squared), max(squared)))
    click.echo(f"{len(squared)} pictures: PSNR {mean_db:.1f} dB, {worst_db:.1f} dB in the worst")
    click.echo(f"largest difference: {largest * 127.5:.2f} of 255")


if __name__ == "__main__":
    main()
