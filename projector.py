"""Invert photos: find the latent of a head, then tune the network around it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from dnnlib import cli
from inference.inversion_request import InversionRequest, ResultSettings
from inference.inversion_run import InversionStopped, PhotoOutcome, invert_photos
from inference.inversion_settings import (
    TUNABLE_PARTS,
    CameraSettings,
    InversionSettings,
    ProjectionSettings,
    TuningSettings,
)
from torch_utils import distributed
from torch_utils.preemption import SignalWatch

_WAIT_FOR_OTHERS_S = 30 * 86400.0  # ranks have different numbers of photos, and each photo takes minutes to hours
_FILE = click.Path(dir_okay=False, path_type=Path)
_NOT_NEGATIVE = cli.FiniteFloat(min=0)


class PhotosFailed(click.ClickException):
    """Photos could not be inverted; what concerns all of them ends with other codes."""

    exit_code = 3


class _Indices(cli.SeedList):
    """Indices such as ``0,2-5`` as a tuple, or ``all`` as an empty one."""

    name = "indices"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, str) and value.strip().lower() == "all":
            return ()
        return tuple(dict.fromkeys(super().convert(value, param, ctx)))


class _Parts(click.ParamType):
    """Parts of a network such as ``backbone,decoder`` as a tuple."""

    name = "parts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if not isinstance(value, str):
            return tuple(value)
        parts = tuple(part.strip() for part in value.split(","))
        if not set(parts) <= set(TUNABLE_PARTS) or len(set(parts)) < len(parts):
            self.fail(f"expected some of {','.join(TUNABLE_PARTS)}, each once; came {value!r}", param, ctx)
        return parts


@click.command()
@cli.network_option()
@cli.option(
    *("--target", "--target-img"),
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of photos with dataset.json (also in folders below), or one photo.",
)
@cli.option("--filename", default="", help="Folder or photo below --target; a folder of this name is made in OUTDIR.")
@cli.option("--idx", type=_Indices(), default="0", help="Which photos: numbers and ranges such as 0,2-5, or all.")
@cli.option("--camera", help="Of one photo: 25 numbers, a JSON file, or such as yaw=20,pitch=5,fov=18.837 (degrees).")
@cli.option(
    *("--mask", "--target-seg"),
    type=click.Path(path_type=Path),
    help="Mask of the head: a picture for one photo, or a folder of pictures with the names of the photos.",
)
@cli.option("--latent", type=_FILE, help="npz with w-layers 'w' to start from.  [default: the mean]")
@cli.option("--vgg", metavar="FILE", help="Published perceptual distance: a TorchScript file or URL.")
@cli.option("--num-steps", type=cli.POSITIVE_INT, default=500, help="Steps that search the latent.")
@cli.option("--num-steps-pti", type=cli.POSITIVE_INT, default=350, help="Steps that tune the network.")
@cli.option(
    "--space", type=click.Choice(["w+", "w"], case_sensitive=False), default="w+", help="One w per layer, or one."
)
@cli.option("--lr", type=cli.POSITIVE_FLOAT, default=ProjectionSettings.learning_rate, help="Learning rate of latents.")
@cli.option("--lr-pti", type=cli.POSITIVE_FLOAT, default=TuningSettings.learning_rate, help="The same in tuning.")
@cli.bool_option("--optimize-noise", default=False, help="Search the layer noise too.")
@cli.bool_option("--refine-camera", default=False, help="Correct the camera while searching.")
@cli.option(
    "--background-weight",
    type=cli.FiniteFloat(min=0, max=1),
    default=InversionSettings.background_weight,
    help="With --mask: weight of what is not the head; 1 is the published loss.",
)
@cli.option(
    "--silhouette-weight",
    type=_NOT_NEGATIVE,
    default=InversionSettings.silhouette_weight,
    help="With --mask: weight of the head's outline.",
)
@cli.option(
    "--locality",
    type=_NOT_NEGATIVE,
    default=TuningSettings.locality_weight,
    help="Weight of leaving other heads alone.",
)
@cli.option(
    "--tune-parts",
    type=_Parts(),
    default=",".join(TUNABLE_PARTS),
    metavar="PARTS",
    help=f"What is tuned: some of {','.join(TUNABLE_PARTS)}.",
)
@cli.option(
    "--ray-start", type=cli.POSITIVE_FLOAT, help="Nearest depth.  [default: 2.35 if the network has 2.25 to 3.3]"
)
@cli.option(
    "--pose-offset", type=click.Choice(["none", "published"]), default="none", help="Move the camera as 'withseg' does."
)
@cli.option("--seed", type=click.IntRange(0, cli.MAX_SEED), default=303, help="Of all random numbers.")
@cli.bool_option("--save-video", default=True, help="Make a video of the progress.")
@cli.option("--fps", type=cli.POSITIVE_INT, default=30, help="Its frames per second.")
@cli.option("--video-interval", type=cli.POSITIVE_INT, default=2, help="Steps from frame to frame.")
@cli.option("--video-interval-pti", type=cli.POSITIVE_INT, default=10, help="The same in tuning.")
@cli.bool_option("--half", default=False, help="Keep the tuned network in half precision.")
@cli.bool_option("--export-full", default=False, help="Also write the tuned network whole.")
@cli.bool_option("--resume", default=True, help="Go on where the same command stopped; false: start anew.")
@cli.option("--state-interval", "state_interval_s", type=_NOT_NEGATIVE, default=30, help="Seconds from state to state.")
@cli.renderer_option()
@cli.device_option()
@cli.output_options(required=True, outdir_help="Results go to OUTDIR/<network>/<photo>.")
@cli.cli_errors()
def project(dry_run: bool, **options: Any) -> None:
    """Invert photos: latent and tuned network of the head that each shows, with pictures, a video and numbers.

    Stopped by Ctrl-C or SIGTERM (or killed), it goes on where it was when the same command is given again, and makes
    the same files. Under torchrun the photos are shared between the processes.

    \b
    Examples:
        python projector.py --network spherehead.pkl --target photos --idx all --outdir out
        python projector.py --network spherehead.pkl --target face.jpg --camera yaw=20,pitch=5 --outdir out
        python projector.py --network spherehead.pkl --target photos --mask masks --idx 0,2-3 --outdir out
        python projector.py --network init:debug --target photos --num-steps 20 --num-steps-pti 10 --outdir out
        torchrun --nproc-per-node 8 projector.py --network spherehead.pkl --target photos --idx all --outdir out
    """
    request = _request(**options)
    if dry_run:
        cli.print_dry_run(request.plan())
        return
    device = distributed.resolve_device(request.device)
    stopped, outcomes = None, []
    # All ranks wait for each other at the end: one that ended with an error would make torchrun stop the rest.
    with distributed.session(device, timeout_s=_WAIT_FOR_OTHERS_S):
        try:
            for outcome in _run(request):
                outcomes.append(outcome)
        except InversionStopped as error:
            stopped = error
    if stopped is not None:
        raise cli.Interrupted(str(stopped))
    _raise_failures(outcomes)
    cli.warn_if_untrained(request.network)


def _request(
    *,
    filename: str,
    idx: tuple[int, ...],
    num_steps: int,
    num_steps_pti: int,
    space: str,
    lr: float,
    lr_pti: float,
    optimize_noise: bool,
    refine_camera: bool,
    background_weight: float,
    silhouette_weight: float,
    locality: float,
    tune_parts: tuple[str, ...],
    ray_start: float | None,
    pose_offset: str,
    seed: int,
    save_video: bool,
    fps: int,
    video_interval: int,
    video_interval_pti: int,
    half: bool,
    export_full: bool,
    **same_name: Any,
) -> InversionRequest:
    """Build a request from the values of the options."""
    settings = InversionSettings(
        projection=ProjectionSettings(
            num_steps=num_steps, space=space, learning_rate=lr, optimize_noise=optimize_noise
        ),
        tuning=TuningSettings(
            num_steps=num_steps_pti, learning_rate=lr_pti, parts=tune_parts, locality_weight=locality
        ),
        camera=CameraSettings(refine=refine_camera),
        seed=seed,
        ray_start=ray_start,
        background_weight=background_weight,
        silhouette_weight=silhouette_weight,
        pose_offset=pose_offset,
    )
    kept = ResultSettings(
        save_video=save_video,
        fps=fps,
        video_interval=video_interval,
        video_interval_pti=video_interval_pti,
        half=half,
        export_full=export_full,
    )
    return InversionRequest(subfolder=filename, indices=idx or None, settings=settings, kept=kept, **same_name)


def _run(request: InversionRequest) -> Iterator[PhotoOutcome]:
    """Invert photos, and say after each how it went."""
    with SignalWatch() as watch:
        for outcome in invert_photos(request, _say, lambda: watch.requested):
            if outcome.status != "failed":
                click.echo(outcome.message)
            elif request.indices is None or len(request.indices) > 1:
                _say(outcome.message)
            yield outcome


def _say(line: str) -> None:
    """Print a line above the progress bars."""
    tqdm.write(line, file=sys.stderr)


def _raise_failures(outcomes: list[PhotoOutcome]) -> None:
    failures = [outcome for outcome in outcomes if outcome.status == "failed"]
    if len(outcomes) == 1 and failures:
        raise PhotosFailed(failures[0].message)
    if failures:
        names = ", ".join(outcome.job.file.name for outcome in failures)
        raise PhotosFailed(f"{len(failures)} of {len(outcomes)} photos failed (see above): {names}")


if __name__ == "__main__":
    project()
