"""Draw docs/figures/inversion.png, the picture of docs/inversion.md, from folders that projector.py wrote.

PYTHONPATH=. python docs/figures/draw_inversion.py out/pti/demo/*/
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw

from inference.inversion_results import METRICS, OTHER_VIEWS_DEG, STRIP, load_png
from torch_utils.pictures import save_png

PATH = Path(__file__).parent / "inversion.png"
_CAPTION = 16  # pixels
_SIDE = 144  # of a picture


def captions(metrics: dict) -> list[str]:
    """Return what stands above the pictures of a strip."""
    stages = metrics["stages"]
    found = [f"{name}: {stages[stage]['psnr_db']:.1f} dB" for name, stage in (("latent", "w"), ("tuned", "pti"))]
    return [metrics["photo"][-22:], *found, *(f"{angle:+.0f} degrees" for angle in OTHER_VIEWS_DEG)]


def row(folder: Path) -> np.ndarray:
    """Return the strip of a photo with captions, uint8 `[H, W, 3]`."""
    metrics = json.loads((folder / METRICS).read_text())
    strip = load_png(folder / STRIP)
    pictures = np.split(strip, strip.shape[1] // strip.shape[0], axis=1)
    return np.concatenate([captioned(*cell) for cell in zip(pictures, captions(metrics), strict=True)], axis=1)


def captioned(picture: np.ndarray, text: str) -> np.ndarray:
    """Return a square picture uint8 `[H, W, 3]` in the size of a page's pictures, below some text."""
    how = Image.Resampling.BOX if len(picture) > _SIDE else Image.Resampling.NEAREST
    page = Image.new("RGB", (_SIDE, _SIDE + _CAPTION), "white")
    page.paste(Image.fromarray(picture).resize((_SIDE, _SIDE), how), (0, _CAPTION))
    ImageDraw.Draw(page).text((3, 2), text, fill="black")
    return np.asarray(page)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
def draw(folders: tuple[Path, ...]) -> None:
    """Put the strips of photos below each other."""
    save_png(PATH, np.concatenate([row(folder) for folder in folders]))


if __name__ == "__main__":
    draw()
