"""Compute metrics of generators."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from dataset_tools.synthetic_data import SYNTHETIC_NAME, SyntheticData, names_synthetic_data
from dnnlib import cli
from dnnlib.sources import is_demo, without_credentials
from dnnlib.util import source_name
from inference.loading import load_generator
from metrics.evaluation import Evaluation, EvaluationSettings
from metrics.metric_main import PRESETS, MetricResult, compute_metrics, metric_list, parse_metrics
from metrics.network_data import data_of_network, run_folder
from metrics.picture import check_picture, curves_by_metric, draw_curves
from metrics.results import (
    ResultContext,
    append_record,
    comparison_table,
    prepare_folder,
    result_record,
    results_table,
)
from metrics.stats_cache import default_cache_dir
from torch_utils import distributed
from torch_utils.launch import launch
from training.config import require
from training.dataset import HeadDataset, image_side
from training.train_config import DataConfig
from training.volumetric_rendering.renderer import RendererChoice

_SYNTHETIC_SIZE = 500, 4  # identities, views of each
_LABEL = re.compile(r"([^=/\\:?#]+)=(.+)", re.DOTALL)  # nothing that a URL has before its first equals sign
_METRICS_HELP = f"Names joined by commas, or {', '.join(name for name in PRESETS if PRESETS[name])}; --list shows them."
_OUTDIR_HELP = "Where metric-<name>.jsonl go.  [default: the run folder in which the network lies, else none]"

_evaluation_options = cli.group(
    cli.option("--metrics", metavar="NAME,...", default="quick", help=_METRICS_HELP),
    cli.option(
        *("--img-data", "--data", "image_roots"),
        multiple=True,
        help="Folder or zip with images and dataset.json; may be given several times. synth[:IDENTITIESxVIEWS] makes "
        "and keeps a set of synthetic heads.  [default: what the network was trained on; synth for demo]",
    ),
    cli.option(*("--seg-data", "mask_roots"), multiple=True, help="Masks; one root for each of --img-data."),
    cli.bool_option("--mirror", default=False, help="Add left-right flipped images, with the cameras flipped too."),
    cli.option("--mode", type=click.Choice(["all", "front", "back"]), default="all", help="Views that are compared."),
    cli.truncation_options(psi=1.0),
    cli.option("--seed", type=click.IntRange(0, cli.MAX_SEED), default=0, help="Of all random choices."),
    cli.option("--batch", "batch_size", type=cli.POSITIVE_INT, default=4, help="Images rendered at a time."),
    cli.option(
        "--detector",
        help="Of fd, kd and pr: view, inception, vgg16, dinov2, or a TorchScript file or URL. FID, KID, IS and lists "
        "with them, such as full, take inception alone.",
    ),
    cli.option("--segmenter", help="TorchScript file or URL that makes masks; default: trained on those of the data."),
    cli.option("--vgg", metavar="FILE", help="TorchScript file or URL of LPIPS, for path lengths."),
    cli.option("--yaw-bins", "num_yaw_bins", type=click.IntRange(min=2), default=8, help="Ranges of metrics by yaw."),
    cli.option("--workers", type=click.IntRange(min=0), default=1, help="Processes that read images; 0 uses this one."),
    cli.bool_option(
        "--render-ahead",
        default=None,
        show_default=False,
        help="Render the next images while features of the last are computed.  [default: on GPUs]",
    ),
    cli.option(
        "--cache-dir",
        type=click.Path(file_okay=False, path_type=Path),
        help="Where statistics of real images, and networks trained on them, are kept.  "
        "[default: metrics/ in $SPHEREHEAD_CACHE_DIR, or in ~/.cache/spherehead]",
    ),
    cli.option("--no-cache", is_flag=True, help="Keep nothing, and use nothing that was kept."),
    cli.option("--outdir", type=click.Path(file_okay=False, path_type=Path), help=_OUTDIR_HELP),
    cli.option("--gpus", type=cli.POSITIVE_INT, help="Processes on this machine (also without GPUs)."),
    cli.renderer_option(),
    cli.device_option(),
    cli.option(
        "--format", "output_format", type=click.Choice(["table", "json"]), default="table", help="Of the output."
    ),
    cli.bool_option("--verbose", default=True, help="Show progress."),
    cli.option("-n", "--dry-run", is_flag=True, help="Print as JSON what would be done, and stop."),
)


@click.group(invoke_without_command=True)
@cli.network_option()
@_evaluation_options
@cli.option("--list", "lists_metrics", is_flag=True, help="List all metrics, and stop.")
@click.pass_context
@cli.cli_errors()
def calc_metrics(ctx: click.Context, network: str, lists_metrics: bool, **options: Any) -> None:
    """Compute metrics of a generator: a table, and a line in metric-<name>.jsonl beside a network of a run.

    Numbers are repeatable, and do not depend on the number of processes.

    \b
    Examples:
        python calc_metrics.py --network spherehead.pkl --data imgs.zip --seg-data masks.zip
        python calc_metrics.py --network spherehead.pkl --data imgs.zip --metrics fid50k_full,kid50k_full --gpus 8
        python calc_metrics.py --network init:debug --data synth:100x4 --metrics fd500_full,view_accuracy500
        torchrun --nproc-per-node 8 calc_metrics.py --network spherehead.pkl --data imgs.zip --metrics full
        python calc_metrics.py compare spherehead.pkl ours=init:debug --data imgs.zip --out compare.png
    """
    if ctx.invoked_subcommand is not None:
        _refuse_options_before(ctx)
    elif lists_metrics:
        click.echo(_listing())
    else:
        _run({source_name(network): network}, options, _show_results)


@calc_metrics.command()
@click.argument("networks", nargs=-1, required=True, metavar="[NAME=]NETWORK...")
@_evaluation_options
@cli.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Picture of the metrics that have a curve, a line for each network: .png, .svg or .pdf.",
)
@cli.cli_errors()
def compare(networks: tuple[str, ...], out: Path | None, **options: Any) -> None:
    """Compute metrics of several generators on the same data: one table, and one picture of their curves.

    \b
    Examples:
        python calc_metrics.py compare a.pkl b.pkl --data imgs.zip --out compare.png
        python calc_metrics.py compare before=a.pkl after=b.pkl --metrics fd_yaw500_full --out compare.svg
    """
    if out is not None and not options["dry_run"]:
        check_picture(out)
    _run(_labelled(networks), options, functools.partial(_show_comparison, out))


def _show_results(columns: Mapping[str, Sequence[MetricResult]]) -> None:
    for results in columns.values():
        click.echo(results_table(results), nl=False)


def _show_comparison(picture: Path | None, columns: Mapping[str, Sequence[MetricResult]]) -> None:
    click.echo(comparison_table(columns), nl=False)
    if picture is None:
        return
    panels = curves_by_metric(columns)
    if panels:
        draw_curves(picture, panels)
        click.echo(f"wrote {picture}")
    else:
        click.echo(f"{picture}: nothing to draw, because none of these metrics has a curve", err=True)


# ---- from options to requests ----


def _refuse_options_before(ctx: click.Context) -> None:
    given = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if ctx.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"{given[0]}: expected behind {ctx.invoked_subcommand}, came before it", ctx)


def _listing() -> str:
    rows = [*metric_list(), *((name, ", ".join(PRESETS[name])) for name in PRESETS if PRESETS[name])]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows)


def _labelled(networks: tuple[str, ...]) -> dict[str, str]:
    """Return sources by the names under which they are shown: those given, else that of the file, else all of it."""
    matches = [None if Path(text).exists() else _LABEL.fullmatch(text) for text in networks]
    pairs = [(None, text) if match is None else match.groups() for match, text in zip(matches, networks)]
    stems = [source_name(source) for label, source in pairs if label is None]
    labels: dict[str, str] = {}
    for given, source in pairs:
        stem = source_name(source)
        label = given or (stem if stems.count(stem) == 1 else without_credentials(source))
        require(label not in labels, "networks", "a name of its own for each, such as before=a.pkl after=b.pkl", label)
        labels[label] = source
    return labels


class _Request(NamedTuple):
    """What a command line asks for, checked as far as that needs no network."""

    networks: Mapping[str, str]
    """Sources by the names under which they are shown."""
    metrics: tuple[str, ...]
    """Canonical names."""
    data: DataConfig | None
    """None is synthetic heads, or what each network was trained on."""
    synthetic: tuple[str, ...]
    """The name of synthetic heads; empty where they are not asked for."""
    mirror: bool
    settings: EvaluationSettings
    outdir: Path | None
    folders: Mapping[str, Path | None]
    """Where lines of each network go."""
    device: str
    renderer: RendererChoice
    prints_json: bool

    @property
    def plan(self) -> dict[str, Any]:
        """What would be done, for a dry run."""
        data = self.data or self.synthetic or "what the network was trained on"
        plan = {"network": next(iter(self.networks.values())), "networks": self.networks, "metrics": self.metrics}
        plan |= {"data": data, "mirror": self.mirror, "folders": self.folders, "settings": self.settings}
        return plan | {"device": self.device, "renderer": self.renderer}


def _request(networks: Mapping[str, str], options: Mapping[str, Any]) -> _Request:
    images, masks = options["image_roots"], options["mask_roots"]
    require(bool(images) or not masks, "--seg-data", "--img-data with it", masks)
    if not images and all(is_demo(network) for network in networks.values()):
        images = (SYNTHETIC_NAME,)  # what it was trained on, which everyone can make
    is_synthetic = names_synthetic_data(images)
    if is_synthetic:  # a malformed name is an error now
        SyntheticData.parse(images, masks, Path(), 8)
    has_files = images and not is_synthetic
    metrics = parse_metrics(options["metrics"].split(","))
    require(len(metrics) > 0, "--metrics", "at least one metric", options["metrics"])
    return _Request(
        networks=networks,
        metrics=tuple(metric.name for metric in metrics),
        data=DataConfig(images=images, masks=masks, resolution=image_side(images[0])) if has_files else None,
        synthetic=images if is_synthetic else (),
        mirror=options["mirror"],
        settings=_settings(options),
        outdir=options["outdir"],
        folders={label: options["outdir"] or run_folder(network) for label, network in networks.items()},
        device=options["device"],
        renderer=options["renderer"],
        prints_json=options["output_format"] == "json",
    )


def _settings(options: Mapping[str, Any]) -> EvaluationSettings:
    both = options["no_cache"] and options["cache_dir"] is not None
    require(not both, "--cache-dir", "none together with --no-cache", options["cache_dir"])
    on_gpu = options["device"] != "cpu" and torch.cuda.is_available()
    same_names = ("seed", "batch_size", "truncation_psi", "truncation_cutoff", "mode", "num_yaw_bins", "detector")
    return EvaluationSettings(
        **{name: options[name] for name in (*same_names, "segmenter", "vgg", "workers")},
        render_ahead=on_gpu if options["render_ahead"] is None else options["render_ahead"],
        cache_dir=None if options["no_cache"] else options["cache_dir"] or default_cache_dir(),
        progress=options["verbose"],
    )


# ---- evaluation ----


def _run(
    networks: Mapping[str, str],
    options: Mapping[str, Any],
    show: Callable[[Mapping[str, Sequence[MetricResult]]], None],
) -> None:
    """Do what a command line asks for, in as many processes.

    Args:
        networks: sources by name.
        options: values by parameter.
        show: called on rank 0 with the results by network, also with some of them when the rest failed.
    """
    started = distributed.world_size()
    processes = options["gpus"] or started
    if distributed.is_worker():
        require(processes == started, "--gpus", f"{started}, the processes that were started", processes)
    request = _request(networks, options)
    if options["dry_run"]:
        cli.print_dry_run({**request.plan, "processes": processes})
        return
    for folder in filter(None, request.folders.values()):
        prepare_folder(folder)
    if processes > 1 and not distributed.is_worker():
        launch(processes)
        return
    columns: dict[str, list[MetricResult]] = {}
    try:
        _evaluate(request, columns)
    finally:
        if distributed.is_main() and columns and not request.prints_json:
            show(columns)


def _evaluate(request: _Request, columns: dict[str, list[MetricResult]]) -> None:
    """Compute all metrics of all networks as one of the processes, and put them into `columns`."""
    device = distributed.resolve_device(request.device)
    with distributed.session(device), _cache(request.settings) as settings:
        data = _known_data(request)
        for label, network in request.networks.items():
            generator = load_generator(network, device, request.renderer)
            if distributed.is_main():
                cli.warn_if_untrained(network)
            if data is None:
                data = _make_synthetic_data(request, settings, generator.img_resolution)
            dataset = HeadDataset(dataclasses.replace(data, mirror=request.mirror), settings.seed)
            evaluation = Evaluation(generator, dataset, device, settings)
            for result in compute_metrics(parse_metrics(request.metrics), evaluation):
                columns.setdefault(label, []).append(result)
                if distributed.is_main():
                    _keep(result, evaluation, request, label)


@contextlib.contextmanager
def _cache(settings: EvaluationSettings) -> Iterator[EvaluationSettings]:
    """Yield settings with a cache: without one, a folder that lasts as long as the body, for what networks share."""
    if settings.cache_dir is not None:
        yield settings
        return
    with contextlib.ExitStack() as stack:
        folder = None
        if distributed.is_main():
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="spherehead-metrics-"))
        yield dataclasses.replace(settings, cache_dir=Path(distributed.broadcast_object(folder)))
        distributed.barrier()  # others may still read


def _known_data(request: _Request) -> DataConfig | None:
    """Return the data that were given, or those that all networks were trained on; None for synthetic heads."""
    if request.data is not None or request.synthetic:
        return request.data
    (first, data), *others = ((label, data_of_network(network)) for label, network in request.networks.items())
    for label, other in others:
        expected = f"data that are the same for all, or --data; {first} has {', '.join(data.images)}"
        require(other == data, f"data of {label}", expected, ", ".join(other.images))
    return data


def _make_synthetic_data(request: _Request, settings: EvaluationSettings, resolution: int) -> DataConfig:
    """Make synthetic heads in OUTDIR or else in the cache, unless they are there."""
    parent = request.outdir or settings.cache_dir
    data = SyntheticData.parse(request.synthetic, (), parent, resolution, _SYNTHETIC_SIZE)
    data.make(settings.progress)
    return data.config


def _keep(result: MetricResult, evaluation: Evaluation, request: _Request, label: str) -> None:
    """Append a result to its file, and print it where JSON is asked for."""
    context = ResultContext(
        network=request.networks[label],
        data=evaluation.dataset.config,
        settings=evaluation.settings,
        num_ranks=distributed.world_size(),
        is_beside_network=request.outdir is None,
    )
    record = result_record(result, context)
    if request.folders[label] is not None:
        append_record(request.folders[label], record)
    if request.prints_json:
        click.echo(json.dumps(record))


if __name__ == "__main__":
    calc_metrics()
