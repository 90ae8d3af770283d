"""Generate image strips and shapes of seeds from a pretrained network."""

from __future__ import annotations

from pathlib import Path

import click
from tqdm import tqdm

from dnnlib import cli
from inference.loading import load_generator
from inference.output import output_folder, prepare_outputs, save_png
from inference.sampling import (
    DEFAULT_FOV_DEG,
    FRONT_DEG,
    IMAGE_MODES,
    Noise,
    Truncation,
    make_head,
    render_strip,
    strip_labels,
)
from inference.shapes import SHAPE_FORMATS, ShapeSettings, save_shape
from torch_utils import distributed


def _say_without_effect(ctx: click.Context, param: click.Parameter, value: int | None) -> None:
    if value is not None:
        click.echo("--class has no effect, as in the published script: the networks know no classes.", err=True)


@click.command()
@cli.network_option()
@cli.seeds_option()
@cli.truncation_options(psi=0.7)
@cli.option(
    "--pose-cond", type=cli.FiniteFloat(), default=FRONT_DEG, help="Azimuth told to the mapping network, degrees."
)
@cli.option("--fov-deg", type=cli.POSITIVE_FLOAT, default=DEFAULT_FOV_DEG, help="Diagonal field of view, degrees.")
@cli.option("--image-mode", type=click.Choice(IMAGE_MODES), default="image", help="What to show.")
@cli.option("--nrr", type=cli.POSITIVE_INT, help="Neural rendering resolution; the network's own if not given.")
@cli.bool_option("--shapes", default=False, help="Also write the shape of each seed.")
@cli.option("--shape-res", type=click.IntRange(min=8), default=512, help="Voxels per side.")
@cli.option("--shape-format", type=cli.Suffix(SHAPE_FORMATS), default="mrc", help="ply, obj and glb carry colours.")
@cli.option("--shape-level", type=cli.FiniteFloat(), default=ShapeSettings.level, help="Raw density of the surface.")
@cli.noise_options()
@cli.option("--class", "class_index", type=int, hidden=True, expose_value=False, callback=_say_without_effect)
@cli.reload_modules_option()
@cli.renderer_option()
@cli.device_option()
@cli.output_options(outdir_help="Strips go to OUTDIR/<network>_<pose-cond>; without it to samples_<network> beside it.")
@cli.cli_errors()
def generate_samples(
    network: str,
    seeds: list[int],
    truncation_psi: float,
    truncation_cutoff: int,
    pose_cond: float,
    fov_deg: float,
    image_mode: str,
    nrr: int | None,
    shapes: bool,
    shape_res: int,
    shape_format: str,
    shape_level: float,
    noise_mode: str,
    noise_seed: int,
    renderer: str,
    device: str,
    outdir: Path | None,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Generate a strip of views for each seed, from the front round to the back, and its shape if asked for.

    The same command writes the same bytes. Under torchrun the seeds are shared between the processes.

    \b
    Examples:
        python gen_samples.py --network spherehead.pkl --seeds 0-3,7 --outdir out
        python gen_samples.py --network init:debug --seeds 0 --outdir out --shapes --shape-format glb --shape-res 64
        torchrun --nproc-per-node 8 gen_samples.py --network spherehead.pkl --seeds 0-999 --outdir out
    """
    folder = output_folder(network, outdir, pose_cond)
    strips = {seed: folder / f"seed{seed:04d}.png" for seed in seeds}
    shape_files = {seed: folder / f"seed{seed:04d}.{shape_format}" for seed in seeds} if shapes else {}
    truncation = Truncation(psi=truncation_psi, cutoff=truncation_cutoff)
    noise = Noise(mode=noise_mode, seed=noise_seed)
    shape_settings = ShapeSettings(resolution=shape_res, level=shape_level)
    if dry_run:
        files = [*strips.values(), *shape_files.values()]
        plan = {"network": network, "files": files, "image_mode": image_mode, "truncation": truncation}
        cli.print_dry_run({**plan, "noise": noise, "fov_deg": fov_deg, "renderer": renderer, "device": device})
        return
    own_seeds = distributed.shard(list(strips))
    prepare_outputs([files[seed] for files in (strips, shape_files) if files for seed in own_seeds], overwrite)

    generator = load_generator(network, distributed.resolve_device(device), renderer)
    cli.warn_if_untrained(network)
    labels = strip_labels(generator, fov_deg)
    for seed in tqdm(own_seeds, desc="seeds", unit="seed"):
        head = make_head(generator, seed, truncation, noise, pose_cond)
        save_png(strips[seed], render_strip(head, labels, image_mode, nrr))
        if shapes:
            save_shape(shape_files[seed], head, shape_settings, progress=True)
    click.echo(f"wrote {len(own_seeds)} strips to {folder}")


if __name__ == "__main__":
    generate_samples()
