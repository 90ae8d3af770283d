"""Generate videos in which one head turns into the next."""

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
def generate_interpolations(dry_run: bool, **options: Any) -> None:
    """Generate a video that moves through the keyframes at half the speed of gen_videos.py.

    With --cfg Head the camera stays in front; otherwise it moves as in gen_videos.py.

    \b
    Examples:
        python gen_videos_interp.py --network spherehead.pkl --seeds 0-3 --cfg Head --outdir out
        python gen_videos_interp.py --network init:debug --seeds 0-1 --w-frames 12 --outdir out
    """
    request = VideoRequest.from_options(turns=0.5, fixed_camera=True, **options)
    if dry_run:
        cli.print_dry_run(request.plan())
        return
    for path in make_videos(request):
        click.echo(f"wrote {path}")
    cli.warn_if_untrained(request.network)


if __name__ == "__main__":
    generate_interpolations()
