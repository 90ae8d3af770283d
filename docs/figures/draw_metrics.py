"""Draw docs/figures/metrics_of_runs.png, a picture of docs/metrics.md: metrics of the snapshots of runs over time.

pip install matplotlib        # or the extra `docs`
for snapshot in runs/*/network-snapshot-*.safetensors; do python calc_metrics.py --network $snapshot --data ...; done
PYTHONPATH=. python docs/figures/draw_metrics.py NAME=RUN_FOLDER ...
"""

from __future__ import annotations

import re
from pathlib import Path

import click
import matplotlib

from metrics.results import read_records

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATH = Path(__file__).parent / "metrics_of_runs.png"
# Metric, title, whether its axis is logarithmic.
PANELS = (
    ("fd500_full", "Frechet distance, view features", True),
    ("fd_random500_full", "the same, random conditioning", True),
    ("view_accuracy500", "angle between camera and what is seen, degrees", False),
    ("mv_consistency50", "multi-view PSNR, dB", False),
)


def series(folder: Path, metric: str) -> tuple[list[int], list[float]]:
    """Return thousands of images and the last number of a metric for each snapshot in a run folder."""
    path = folder / f"metric-{metric}.jsonl"
    found: dict[int, float] = {}
    for record in read_records(path) if path.is_file() else []:
        match = re.search(r"network-snapshot-(\d+)", record["snapshot_pkl"])
        value = next(iter(record["results"].values()), None)
        if match and value is not None:
            found[int(match[1])] = value
    return sorted(found), [found[kimg] for kimg in sorted(found)]


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="NAME=RUN_FOLDER...")
def main(runs: tuple[str, ...]) -> None:
    """Draw a panel for each metric, a line for each run."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(3.6 * len(PANELS), 3.2), constrained_layout=True)
    for axis, (metric, title, is_logarithmic) in zip(axes, PANELS):
        for run in runs:
            name, _, folder = run.partition("=")
            axis.plot(*series(Path(folder), metric), "o-", label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("thousand images")
        axis.set_yscale("log" if is_logarithmic else "linear")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(PATH, dpi=90)


if __name__ == "__main__":
    main()
