"""Draw docs/figures/inversion_known.png: what projector.py makes of heads that are known from other sides.

python dataset_tool.py synth --dest known --identities 4 --views 5 --resolution 64 --seed 7 --parsing false
python -m zipfile -e known/images.zip known/photos
python projector.py --target known/photos --idx 2,8,10,18 --outdir out
PYTHONPATH=. python docs/figures/draw_known_heads.py known/photos out/demo/*/
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch
from draw_inversion import captioned

from inference.inversion_results import LATENT, METRICS, NETWORK
from inference.loading import load_generator
from inference.sampling import Head, to_uint8
from inference.video_request import load_latent
from torch_utils.pictures import save_png, tile
from training.dataset import HeadDataset, image_side
from training.image_metrics import psnr
from training.train_config import DataConfig

PATH = Path(__file__).parent / "inversion_known.png"


def views_of(dataset: HeadDataset, photo: str) -> list[int]:
    """Return the items that show the head of a photo, which is the first."""
    names = [Path(dataset.name(index)).with_suffix("").parts for index in range(len(dataset))]
    found = next(index for index, parts in enumerate(names) if "_".join(parts).endswith(photo))
    same = np.flatnonzero(dataset.identities == dataset.identities[found])
    return [found, *(int(index) for index in same if index != found)]


def render_views(network: str | Path, folder: Path, labels: list[np.ndarray]) -> list[dict[str, torch.Tensor]]:
    """Render what was found for a photo with some network, from cameras `[25]`."""
    generator = load_generator(network)
    head = Head(generator, load_latent(folder / LATENT, generator))
    return [head.render(torch.from_numpy(label)) for label in labels]


def rows(dataset: HeadDataset, folder: Path) -> tuple[list[np.ndarray], str]:
    """Return views of a head, then what was made of it from the same cameras, uint8 `[H, W, 3]`, and PSNRs in words."""
    metrics = json.loads((folder / METRICS).read_text())
    items = [dataset[index] for index in views_of(dataset, metrics["photo"])]
    targets = [torch.from_numpy(item["image"]).float()[None] / 127.5 - 1 for item in items]
    labels = [item["label"] for item in items]
    found, tuned = (render_views(network, folder, labels) for network in (metrics["network"], folder / NETWORK))
    before, after = (
        [psnr(output["image"], target) for output, target in zip(outputs, targets)] for outputs in (found, tuned)
    )
    true = [item["image"].transpose(1, 2, 0) for item in items]
    cells = [captioned(picture, "known" if view else "the photo") for view, picture in enumerate(true)]
    cells += [captioned(to_uint8(output)[0], f"{db:.1f} dB") for output, db in zip(tuned, after)]
    others = [f"{np.mean(values[1:]):.1f}" for values in (before, after)]
    return cells, f"{folder.name}: photo {before[0]:.1f} dB, tuned {after[0]:.1f}; other views {', '.join(others)}"


@click.command()
@click.argument("data", type=click.Path(exists=True))
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
def draw(data: str, folders: tuple[Path, ...]) -> None:
    """Put heads below each other, the known views above what was made of them."""
    dataset = HeadDataset(DataConfig(images=(data,), resolution=image_side(data)))
    pictures: list[np.ndarray] = []
    for folder in folders:
        cells, line = rows(dataset, folder)
        pictures += cells
        click.echo(line)
    save_png(PATH, tile(pictures, len(pictures) // (2 * len(folders))))


if __name__ == "__main__":
    draw()
