"""Draw docs/figures/training_curves.png and training_grids.png, the pictures of docs/training.md.

pip install matplotlib        # or the extra `docs`
PYTHONPATH=. python docs/figures/draw_training.py NAME=RUN_FOLDER ... --kimg 0,5,10
"""

from __future__ import annotations

from pathlib import Path

import click
import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from training.image_grids import GridSpec
from training.run_log import read_stats
from training.vico import YAW_BINS_DEG

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
_CAPTION = 16  # pixels
_VIEWS = len(GridSpec.yaws_deg)


def series(rows: list[dict], name: str) -> tuple[list[float], list[float]]:
    """Return thousands of images and means of a statistic, where it has values."""
    points = [(row["cur_nimg"] / 1000, row[name]["mean"]) for row in rows if row.get(name, {}).get("num")]
    return [kimg for kimg, _ in points], [mean for _, mean in points]


def draw_curves(runs: dict[str, list[dict]], path: Path) -> None:
    """Draw losses, scores, and the margins of the consistency head by yaw gap."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    for color, (name, rows) in zip(("tab:blue", "tab:orange", "tab:green"), runs.items()):
        for axis, kinds in (
            (axes[0], ("Loss/G/loss", "Loss/D/loss")),
            (axes[1], ("Loss/scores/real", "Loss/scores/fake")),
        ):
            for style, kind in zip(("-", "--"), kinds):
                axis.plot(*series(rows, kind), style, color=color, label=f"{name}: {kind.removeprefix('Loss/')}")
        for step, (low, high) in enumerate(zip(YAW_BINS_DEG, YAW_BINS_DEG[1:])):
            kimg, margin = series(rows, f"Loss/vico/margin_head/yaw{low:03d}-{high:03d}")
            if kimg:
                shade = plt.cm.viridis(step / (len(YAW_BINS_DEG) - 2))
                axes[2].plot(kimg, margin, color=shade, label=f"{name}: yaw gap {low} to {high} degrees")
    titles = ("losses", "scores of real and generated images", "margin of the consistency head")
    for axis, title in zip(axes, titles):
        axis.set_title(title)
        axis.set_xlabel("thousand images")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def draw_pictures(runs: dict[str, Path], kimgs: list[int], heads: int, path: Path) -> None:
    """Put the first heads of the grids at some ticks below each other, a column for each run."""
    columns = []
    for name, folder in runs.items():
        cells = []
        for kimg in kimgs:
            grid = Image.open(folder / f"fakes{kimg:06d}.png").convert("RGB")
            grid = grid.crop((0, 0, grid.width, grid.width // _VIEWS * heads))
            cell = Image.new("RGB", (grid.width, grid.height + _CAPTION), "white")
            cell.paste(grid, (0, _CAPTION))
            ImageDraw.Draw(cell).text((2, 2), f"{name}, {kimg} kimg", fill="black")
            cells.append(np.asarray(cell))
        columns.append(np.concatenate(cells))
    gap = np.full((columns[0].shape[0], 12, 3), 255, np.uint8)
    joined = [part for column in columns for part in (column, gap)][:-1]
    Image.fromarray(np.concatenate(joined, axis=1)).save(path, optimize=True)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="NAME=RUN_FOLDER...")
@click.option("--kimg", default="0", help="Ticks whose grids are shown, thousands of images.")
@click.option("--heads", default=2, help="Rows of each grid.")
def main(runs: tuple[str, ...], kimg: str, heads: int) -> None:
    """Draw training_curves.png and training_grids.png beside this file."""
    folders = {name: Path(folder) for name, _, folder in (run.partition("=") for run in runs)}
    draw_curves(
        {name: read_stats(folder / "stats.jsonl") for name, folder in folders.items()}, FOLDER / "training_curves.png"
    )
    draw_pictures(folders, [int(text) for text in kimg.split(",")], heads, FOLDER / "training_grids.png")


if __name__ == "__main__":
    main()
