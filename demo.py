"""Show heads from all sides: a picture, a video and a coloured mesh of a few seeds, in one command."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dnnlib import cli
from inference.loading import load_generator
from inference.output import open_video, prepare_outputs, save_png
from inference.sampling import Head, Truncation, make_head, orbit_labels, to_uint8
from inference.shapes import ShapeSettings, save_shape
from torch_utils import distributed
from torch_utils.pictures import tile

_MIN_SIDE = 128  # pixels; smaller views are enlarged by a whole factor
_VIDEO_COLUMNS = 3
_FPS = 24


@click.command()
@cli.network_option()
@cli.option("--seeds", type=cli.SeedList(), default="0-5", help="Random seeds, such as 0-3,7.")
@cli.truncation_options(psi=1.0)
@cli.option("--views", type=click.IntRange(min=2), default=8, help="Views of each head in the picture.")
@cli.option("--frames", type=click.IntRange(min=2), default=72, help=f"Of the video, {_FPS} in a second.")
@cli.option("--shape-res", type=click.IntRange(min=8), default=128, help="Voxels per side of the mesh.")
@cli.option("--shape-level", type=cli.FiniteFloat(), default=ShapeSettings.level, help="Raw density of its surface.")
@cli.renderer_option()
@cli.device_option()
@cli.output_options(outdir_help="Folder to write to, made if absent.  [default: out/demo]")
@cli.cli_errors()
def demo(
    network: str,
    seeds: list[int],
    truncation_psi: float,
    truncation_cutoff: int,
    views: int,
    frames: int,
    shape_res: int,
    shape_level: float,
    renderer: str,
    device: str,
    outdir: Path | None,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Show heads from all sides: OUTDIR/heads.png, orbit.mp4, and head.glb of the first seed.

    \b
    Examples:
        python demo.py
        python demo.py --network spherehead.pkl --seeds 0-2 --frames 24 --outdir out/spherehead
    """
    outdir = outdir or Path("out/demo")
    picture, video, mesh = files = [outdir / name for name in ("heads.png", "orbit.mp4", "head.glb")]
    truncation = Truncation(psi=truncation_psi, cutoff=truncation_cutoff)
    if dry_run:
        cli.print_dry_run({"network": network, "files": files, "truncation": truncation, "device": device})
        return
    prepare_outputs(files, overwrite)
    generator = load_generator(network, distributed.resolve_device(device), renderer)
    cli.warn_if_untrained(network)
    heads = [make_head(generator, seed, truncation) for seed in seeds]

    labels = orbit_labels(views)
    rows = [view for head in tqdm(heads, desc=picture.name, unit="head") for view in render_views(head, labels)]
    save_png(picture, tile(rows, views))
    with open_video(video, _FPS) as writer:
        for label in tqdm(orbit_labels(frames), desc=video.name, unit="frame"):
            cells = [view for head in heads for view in render_views(head, label[None])]
            writer.append_data(tile(cells, min(len(cells), _VIDEO_COLUMNS)))
    save_shape(mesh, heads[0], ShapeSettings(resolution=shape_res, level=shape_level), progress=True)
    click.echo(f"wrote {picture}, {video} and {mesh}")


def render_views(head: Head, labels: torch.Tensor) -> list[np.ndarray]:
    """Return views uint8 `[H, W, 3]` of a head from cameras `[V, 25]`, enlarged to at least 128 pixels."""
    return [enlarge(to_uint8(head.render(label, view))[0]) for view, label in enumerate(labels)]


def enlarge(image: np.ndarray) -> np.ndarray:
    """Return an image uint8 `[H, W, 3]`, by the smallest whole factor with which its width is at least 128 pixels."""
    height, width = image.shape[:2]
    factor = -(-_MIN_SIDE // width)
    if factor == 1:
        return image
    return np.asarray(Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.BICUBIC))


if __name__ == "__main__":
    demo()
