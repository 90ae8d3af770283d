"""Options that the video scripts share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from dnnlib import cli

_FILE = click.Path(dir_okay=False, path_type=Path)


def video_options(
    camera_paths: Sequence[str], image_modes: Sequence[str], shape_formats: Sequence[str], shape_level: float, fps: int
) -> cli.Decorator:
    """Add the options of `inference.video_request.VideoRequest.from_options`, and ``--dry-run``.

    Args:
        camera_paths: choices of ``--cfg``; the first is the default.
        image_modes: choices of ``--image-mode``; the first is the default.
        shape_formats: choices of ``--shape-format``; the first is the default.
        shape_level: default of ``--shape-level``.
        fps: default of ``--fps``.
    """
    return cli.group(
        cli.network_option(),
        cli.seeds_option(required=False),
        cli.option("--latent", type=_FILE, help="npz with w-layers 'w' to show instead of seeds."),
        cli.option("--cfg", type=click.Choice(camera_paths), default=camera_paths[0], help="Camera path; Head turns."),
        cli.option("--w-frames", type=cli.POSITIVE_INT, default=240, help="Frames per keyframe."),
        cli.option(
            "--num-keyframes", type=cli.POSITIVE_INT, help="Keyframes per cell; all that the seeds give if not set."
        ),
        cli.option(
            "--shuffle-seed", type=click.IntRange(0, cli.MAX_SEED), help="Shuffle the keyframes with this seed."
        ),
        cli.option("--grid", type=cli.Grid(), default="1x1", help="Cells of the video."),
        cli.bool_option("--interpolate", default=True, help="One video through all seeds; false: one for each."),
        cli.truncation_options(psi=1.0),
        cli.option(
            "--pose-cond", type=cli.FiniteFloat(), default=90, help="Azimuth told to the mapping network, degrees."
        ),
        cli.option("--image-mode", type=click.Choice(image_modes), default=image_modes[0], help="What to show."),
        cli.option("--fov-deg", type=cli.POSITIVE_FLOAT, help="Diagonal field of view, degrees.  [default: by --cfg]"),
        cli.option("--nrr", type=cli.POSITIVE_INT, help="Neural rendering resolution; the network's own if not given."),
        cli.option("--sample-mult", type=cli.POSITIVE_FLOAT, default=1.0, help="Factor on the samples per ray."),
        cli.bool_option(
            "--shapes",
            default=False,
            help="Also write shapes of the first cell, as it changes.",
        ),
        cli.option("--shape-res", type=click.IntRange(min=8), default=512, help="Voxels per side."),
        cli.option(
            "--shape-format", type=cli.Suffix(shape_formats), default=shape_formats[0], help="Kind of shape file."
        ),
        cli.option("--shape-level", type=cli.FiniteFloat(), default=shape_level, help="Raw density of the surface."),
        cli.option("--fps", type=cli.POSITIVE_INT, default=fps, help="Frames per second."),
        cli.noise_options(),
        cli.reload_modules_option(),
        cli.renderer_option(),
        cli.device_option(),
        cli.option(
            "--output", type=_FILE, help="Name of the video, ending in .mp4, instead of a name from the network."
        ),
        cli.output_options(
            outdir_help="Folder of <network>_<pose-cond>.mp4; samples_<network> beside it if not given."
        ),
    )
