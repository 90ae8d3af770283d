"""Pack, check and synthesise data sets of images of heads with camera labels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import click
from tqdm import tqdm

from dataset_tools.check import check as check_data_set
from dataset_tools.pack import PackRequest
from dataset_tools.pack import pack as pack_data_set
from dataset_tools.synth import SynthRequest, synthesise
from dnnlib import cli
from dnnlib.atomic import atomic_path, atomic_write
from torch_utils import distributed
from training.image_transforms import CROPS, EXTENSIONS, FILTERS, Transform
from training.synthetic_heads import CameraRange

_ROOT = click.Path(path_type=Path)
_workers_option = cli.option(
    "--workers", type=click.IntRange(min=0), default=min(8, os.cpu_count() or 1), help="Processes; 0 uses this one."
)


def _progress_bar(bar: tqdm) -> Callable[[int, int], None]:
    """Return a function that shows how much is done, with the time that is left."""

    def show(done: int, total: int) -> None:
        if bar.total is None:
            bar.reset(total)
            bar.initial = done  # so that the time left does not count what an earlier run has done
        bar.update(done - bar.n)

    return show


@click.command()
@cli.option("--source", "--img-source", "source", type=_ROOT, required=True, help="Folder or zip file of images.")
@cli.option("--dest", "--img-dest", "dest", type=_ROOT, required=True, help="Zip file (*.zip) or folder to write.")
@cli.option("--masks", "--seg-source", "masks", type=_ROOT, help="Folder or zip file of masks.")
@cli.option("--dest-masks", "--seg-dest", "dest_masks", type=_ROOT, help="Where masks go.")
@cli.option("--parsing", type=_ROOT, help="Folder or zip file of parsing maps: class indices.")
@cli.option("--dest-parsing", type=_ROOT, help="Where parsing maps go.")
@cli.option("--max-images", type=cli.POSITIVE_INT, help="Take the first ones only.")
@cli.option("--transform", type=click.Choice(CROPS), help="How to crop; nothing is cropped if not given.")
@cli.option("--resolution", type=cli.Grid(), metavar="WxH", help="Size to write; that of the images if not given.")
@cli.option("--filter", "filter_name", type=click.Choice(FILTERS), default="lanczos", help="For images and masks.")
@cli.option("--ext", "extension", type=cli.Suffix(EXTENSIONS), default="png", help="Format of the images.")
@cli.option("--png-compression", type=click.IntRange(0, 9), default=0, help="0 is the quickest to read.")
@cli.bool_option("--use-basename", default=False, help="Match by file name alone, without folders.")
@cli.option("--skip-bad", is_flag=True, help="Leave out images that cannot be used, and list them.")
@cli.option("--overwrite", is_flag=True, help="Replace zip files that are there already.")
@_workers_option
@cli.cli_errors()
def pack(
    source: Path,
    dest: Path,
    masks: Path | None,
    dest_masks: Path | None,
    parsing: Path | None,
    dest_parsing: Path | None,
    max_images: int | None,
    transform: str | None,
    resolution: tuple[int, int] | None,
    filter_name: str,
    extension: str,
    png_compression: int,
    use_basename: bool,
    skip_bad: bool,
    overwrite: bool,
    workers: int,
) -> None:
    """Pack images, masks and parsing maps into the format that training reads.

    Masks and parsing maps are matched by path without extension. Labels come from dataset.json in the source. After an
    interruption, the same command goes on where it was.

    \b
    Examples:
        python dataset_tool.py pack --source photos --dest heads.zip --transform center-crop --resolution 512x512
        python dataset_tool.py pack --source img --masks seg --dest img.zip --dest-masks seg.zip --resolution 128x128
    """
    request = PackRequest(
        source=source,
        dest=dest,
        masks=masks,
        dest_masks=dest_masks,
        parsing=parsing,
        dest_parsing=dest_parsing,
        transform=Transform(crop=transform, resolution=resolution, filter=filter_name),
        max_images=max_images,
        use_basename=use_basename,
        extension=extension,
        png_compression=png_compression,
        skip_bad=skip_bad,
        overwrite=overwrite,
        workers=workers,
    )
    with tqdm(desc="images", unit="img") as bar:
        report = pack_data_set(request, _progress_bar(bar))
    for line in report.skipped:
        click.echo(f"left out: {line}", err=True)
    resumed = f" ({report.num_resumed} of them by an earlier run)" if report.num_resumed else ""
    without = "" if report.has_labels else ", without labels"
    click.echo(f"packed {report.num_images} images{resumed}{without}, left out {len(report.skipped)}: {dest}")


@click.command()
@cli.option("--source", "--img-source", "source", multiple=True, required=True, help="Images; repeat to join several.")
@cli.option("--masks", "--seg-source", "masks", multiple=True, help="Masks, as often as --source.")
@cli.option("--parsing", multiple=True, help="Parsing maps, as often as --source.")
@cli.option("--resolution", type=cli.POSITIVE_INT, help="Side in pixels; that of the first image if not given.")
@cli.option("--parsing-classes", type=click.IntRange(1, 256), default=20, help="Class indices are below it.")
@cli.option(
    "--outdir", type=click.Path(file_okay=False, path_type=Path), help="For poses.png, sheet.png, summary.json."
)
@_workers_option
@cli.cli_errors()
def check(
    source: tuple[str, ...],
    masks: tuple[str, ...],
    parsing: tuple[str, ...],
    resolution: int | None,
    parsing_classes: int,
    outdir: Path | None,
    workers: int,
) -> None:
    """List every defect of a data set, and draw its poses and a sheet of its images.

    Every file is decoded. The exit code is 1 if there is a defect.

    \b
    Examples:
        python dataset_tool.py check --source heads.zip --outdir report
        python dataset_tool.py check --source img --masks seg --parsing parsing --resolution 512
    """
    for name, roots in (("--masks", masks), ("--parsing", parsing)):
        if len(roots) not in (0, len(source)):
            raise click.BadParameter(f"{name}: expected none or one for each --source, came {len(roots)}")
    with tqdm(desc="images", unit="img") as bar:
        report = check_data_set(
            *(source, masks, parsing),
            resolution=resolution,
            parsing_classes=parsing_classes,
            workers=workers,
            progress=_progress_bar(bar),
        )
    for line in report.defects:
        click.echo(f"defect: {line}")
    for line in report.remarks:
        click.echo(f"remark: {line}")
    if outdir is not None:
        pictures = {"sheet.png": report.contact_sheet} if len(report.usable) else {}
        if report.has_labels and len(report.usable):
            pictures["poses.png"] = report.pose_picture
        for name, draw in pictures.items():
            with atomic_path(outdir / name) as path:
                draw().save(path)
        with atomic_write(outdir / "summary.json", "w", encoding="utf-8") as file:
            json.dump(report.summary(), file, indent=2)
    click.echo(f"{len(report.usable)} images can be used, {len(report.defects)} defects")
    if report.defects:
        raise click.exceptions.Exit(1)


@click.command()
@cli.option("--dest", type=_ROOT, required=True, help="Folder for images.zip, masks.zip and parsing.zip.")
@cli.option("--identities", type=cli.POSITIVE_INT, default=2000, help="Different heads.")
@cli.option("--views", type=cli.POSITIVE_INT, default=4, help="Images of each.")
@cli.option("--resolution", type=cli.POSITIVE_INT, default=128, help="Side of the images, pixels; a multiple of 8.")
@cli.option("--seed", type=click.IntRange(min=0), default=0, help="Of heads and cameras.")
@cli.option("--yaw-range", type=cli.FloatVector(2), default=(-180.0, 180.0), help="Azimuths, degrees.")
@cli.option("--pitch-range", type=cli.FloatVector(2), default=(-20.0, 40.0), help="Elevations, degrees.")
@cli.option("--front-bias", type=cli.FiniteFloat(0, 1), default=0.0, help="Share of cameras near the front.")
@cli.option("--focal-jitter", type=cli.FiniteFloat(0, 0.5), default=0.0, help="Relative spread of focal lengths.")
@cli.option("--supersample", type=click.IntRange(1, 8), default=2, help="Rays along a side of pixels at edges.")
@cli.bool_option("--parsing", default=True, help="Write parsing maps too.")
@cli.option("--ext", "extension", type=cli.Suffix(EXTENSIONS), default="png", help="Format of the images.")
@cli.device_option()
@_workers_option
@cli.cli_errors()
def synth(
    dest: Path,
    identities: int,
    views: int,
    resolution: int,
    seed: int,
    yaw_range: tuple[float, float],
    pitch_range: tuple[float, float],
    front_bias: float,
    focal_jitter: float,
    supersample: int,
    parsing: bool,
    extension: str,
    device: str,
    workers: int,
) -> None:
    """Make a data set of synthetic heads, with masks, parsing maps and exact cameras all around.

    The same command makes the same files. After an interruption, it goes on where it was.

    \b
    Examples:
        python dataset_tool.py synth --dest heads --identities 2000 --views 4 --resolution 128
        python dataset_tool.py synth --dest faces --identities 500 --yaw-range=-90,90 --front-bias 0.5
    """
    request = SynthRequest(
        num_identities=identities,
        views_per_identity=views,
        resolution=resolution,
        seed=seed,
        cameras=CameraRange(yaw_deg=yaw_range, pitch_deg=pitch_range, front_bias=front_bias, focal_jitter=focal_jitter),
        supersample=supersample,
        with_parsing=parsing,
        extension=extension,
    )
    with tqdm(desc="images", unit="img") as bar:
        made = synthesise(dest, request, _progress_bar(bar), workers, distributed.resolve_device(device))
    click.echo(f"{'made' if made else 'found'} {request.num_images} images of {identities} heads: {dest}")


# One command for each function above; click names them after it.
dataset_tool = click.Group(name="dataset_tool", help=__doc__, commands=[pack, check, synth])


if __name__ == "__main__":
    dataset_tool()
