"""Generate videos of seeds, or of a saved latent, along a camera path."""

from __future__ import annotations

from typing import Any

import click

from dnnlib import cli, cli_video
from inference.output import VIDEO_FPS
from inference.sampling import IMAGE_MODES
from inference.shapes import VIDEO_SHAPE_FORMATS, ShapeSettings
from inference.video import CAMERA_PATHS
from inference.video_request import VideoRequest, make_videos


@click.command()
@cli_video.video_options(CAMERA_PATHS, IMAGE_MODES, VIDEO_SHAPE_FORMATS, ShapeSettings.level, VIDEO_FPS)
@cli.cli_errors()
def generate_videos(dry_run: bool, **options: Any) -> None:
    """Generate a video in which the camera moves and, with several keyframes, one head turns into the next.

    The same command writes the same bytes. A saved latent is an .npz with an array 'w', as the projector writes it.

    \b
    Examples:
        python gen_videos.py --network spherehead.pkl --seeds 0-3 --cfg Head --outdir out
        python gen_videos.py --network spherehead.pkl --seeds 0-7 --grid 2x2 --cfg Head --outdir out
        python gen_videos.py --network init:debug --seeds 0 --w-frames 24 --interpolate false --outdir out
        python gen_videos.py --network spherehead.pkl --latent projected_w.npz --cfg Head --output out/turn.mp4
    """
    request = VideoRequest.from_options(**options)
    if dry_run:
        cli.print_dry_run(request.plan())
        return
    for path in make_videos(request):
        click.echo(f"wrote {path}")
    cli.warn_if_untrained(request.network)


if __name__ == "__main__":
    generate_videos()
