"""Train a generator of heads and its discriminator."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from dataset_tools.synthetic_data import SyntheticData, names_synthetic_data
from dnnlib import cli, serialize
from dnnlib.extras import has_extra
from legacy import load_snapshot
from metrics.metric_main import parse_metrics
from metrics.snapshot_metrics import SnapshotMetrics
from torch_utils import distributed
from torch_utils.launch import launch
from training.config import require
from training.dataset import HeadDataset, image_side
from training.network_setup import keep_habits
from training.run_log import RunLog
from training.run_options import Run, choose_run, run_name, write_options
from training.snapshots import NETWORK_NAMES
from training.train_config import DataConfig, LossConfig, TrainConfig
from training.train_options import NOT_NEGATIVE, given_settings, setting_options
from training.train_presets import TRAIN_PRESETS, make_train_config, train_preset
from training.training_loop import TrainRequest, train
from training.training_state import is_state

_SYNTHETIC_RESOLUTION = 128


@click.command()
@cli.option("--outdir", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where run folders are.")
@cli.option("--cfg", type=click.Choice(list(TRAIN_PRESETS)), required=True, help="Preset.")
@cli.option(
    *("--img-data", "--data", "image_roots"),
    multiple=True,
    required=True,
    help="Folder or zip with images and dataset.json; may be given several times. synth[:IDENTITIESxVIEWS] makes "
    "and keeps a set of synthetic heads.",
)
@cli.option(*("--seg-data", "mask_roots"), multiple=True, help="Masks; one root for each of --img-data.")
@cli.option(*("--parsing-data", "parsing_roots"), multiple=True, help="Parsing maps; one root for each of --img-data.")
@cli.option("--parsing-classes", type=cli.POSITIVE_INT, default=20, help="Classes of the parsing maps.")
@cli.option("--resolution", type=cli.POSITIVE_INT, help="Side of synthetic images; others say theirs.")
@cli.option("--gpus", type=cli.POSITIVE_INT, help="Training processes on this machine (also without GPUs).")
@cli.option(
    "--resume",
    metavar="auto|never|FOLDER|FILE",
    default="never",
    help="auto goes on with the newest run of the same name and configuration in OUTDIR, if there is one; a run folder "
    "or a training state goes on there. A network file starts a new run from its weights, as --resume-from does.",
)
@cli.option("--resume-from", metavar="NETWORK", help="Snapshot (published or own) from whose weights to start.")
@cli.option("--resume-kimg", type=NOT_NEGATIVE, default=0, help="Where schedules start, with --resume-from.")
@cli.bool_option("--resume-blur", default=False, help="Blur and swap from the start again, with --resume-from.")
@cli.bool_option("--cond", default=True, help="Tell the networks cameras; data sets need labels in any case.")
@cli.option("--desc", help="Added to the name of the run folder.")
@setting_options
@cli.renderer_option()
@cli.device_option()
@cli.bool_option(
    "--tensorboard", default=None, show_default=False, help="Write TensorBoard events; default: if it is installed."
)
@cli.option("--wandb", "wandb_project", metavar="PROJECT", help="Also log to this project of Weights & Biases.")
@cli.option("-n", "--dry-run", is_flag=True, help="Print the configuration as JSON, and stop.")
@cli.cli_errors()
def train_command(**options: Any) -> None:
    """Train on a data set. Settings that are not given come from the preset; --dry-run prints them all.

    Stopped by SIGTERM, SIGUSR1 or Ctrl-C, it saves its state within a step and ends with code 0; the same command with
    --resume auto goes on where it stopped.

    \b
    Examples:
        python train.py --outdir runs --cfg demo --data synth --kimg 200 --resume auto
        python train.py --outdir runs --cfg spherehead --img-data imgs.zip --seg-data masks.zip --gpus 8 --batch 32
        torchrun --nnodes 2 --nproc-per-node 8 train.py --outdir runs --cfg eg3d --img-data imgs.zip --batch 32
    """
    started, processes = distributed.world_size(), options["gpus"] or distributed.world_size()
    if distributed.is_worker():
        require(processes == started, "--gpus", f"{started}, the processes that were started", processes)
    config = make_train_config(options["cfg"], _data_config(options), _settings(options), processes)
    name = run_name(config, processes, options["desc"])
    if options["dry_run"]:
        cli.print_dry_run({"outdir": options["outdir"], "run": name, "config": serialize.to_json(config)})
    elif processes > 1 and not distributed.is_worker():
        launch(processes)
    else:
        _train(config, name, options)


# ---- from options to a configuration ----


def _data_config(options: Mapping[str, Any]) -> DataConfig:
    """Return where the data are; synthetic ones need not be there yet."""
    images, masks, parsing = (options[name] for name in ("image_roots", "mask_roots", "parsing_roots"))
    synthetic = _synthetic_data(options)
    if synthetic is not None:
        return synthetic.config
    require(options["resolution"] is None, "--resolution", "none without --data synth", options["resolution"])
    return DataConfig(
        images=images,
        masks=masks,
        parsing=parsing,
        resolution=image_side(images[0]),
        parsing_classes=options["parsing_classes"] if parsing else 0,
    )


def _synthetic_data(options: Mapping[str, Any]) -> SyntheticData | None:
    """Return the synthetic data set, if the command asks for one."""
    if not names_synthetic_data(options["image_roots"]):
        return None
    resolution = options["resolution"] or train_preset(options["cfg"]).resolution or _SYNTHETIC_RESOLUTION
    others = [*options["mask_roots"], *options["parsing_roots"]]
    return SyntheticData.parse(options["image_roots"], others, options["outdir"], resolution)


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that options set, and those that follow from starting with trained networks."""
    fields = given_settings(options)
    if "loop.metrics" in fields:
        fields["loop.metrics"] = tuple(metric.name for metric in parse_metrics(fields["loop.metrics"]))
    if options["gen_pose_cond"] is not None and options["gpc_reg_prob"] is None:
        default = LossConfig.conditioning_swap_prob
        preset = train_preset(options["cfg"]).fields.get("loss.conditioning_swap_prob", default)
        fields["loss.conditioning_swap_prob"] = (preset or default) if options["gen_pose_cond"] else None
    if not options["cond"]:
        untold = {"generator.conditioning.zero": True, "discriminator.c_dim": 0, "loss.conditioning_swap_prob": None}
        fields |= {**untold, "vico.mode": options["vico"] or "none"}
    start = _start_network(options)
    require(start is not None or not options["resume_blur"], "--resume-blur", "a network to start from", None)
    fields |= {"resume_from": start, "loop.start_nimg": int(options["resume_kimg"] * 1000)}
    if start is not None:
        defaults = {"augment.ada_kimg": 100.0, "loop.ema_rampup": None}
        if not options["resume_blur"]:
            defaults |= {"loss.blur_init_sigma": 0.0, "loss.conditioning_swap_fade_kimg": 0.0}
        fields = {**defaults, **fields}
    return fields


def _start_network(options: Mapping[str, Any]) -> str | None:
    """Return the snapshot that a new run starts from; `--resume` with a network file means the same."""
    if options["resume_from"] is not None:
        return options["resume_from"]
    return options["resume"] if _names_network(options["resume"]) else None


def _names_network(resume: str) -> bool:
    return resume not in ("auto", "never") and not Path(resume).is_dir() and not is_state(resume)


# ---- training ----


def _train(config: TrainConfig, name: str, options: Mapping[str, Any]) -> None:
    """Train as one of the processes of a run."""
    device = distributed.resolve_device(options["device"])
    tensorboard = options["tensorboard"]
    with distributed.session(device):
        start = _load_start(config)
        config = keep_habits(config, start)
        synthetic = _synthetic_data(options)
        if synthetic is not None:
            synthetic.make()
        dataset = HeadDataset(config.data, seed=config.loop.seed)
        loop = config.loop
        evaluate = SnapshotMetrics(loop.metrics, config.data, device, loop.workers) if loop.metrics else None
        run = distributed.broadcast_object(_choose_run(config, name, options) if distributed.is_main() else None)
        with RunLog(
            run.run_dir,
            distributed.is_main(),
            tensorboard=has_extra("tensorboard") if tensorboard is None else tensorboard,
            wandb_project=options["wandb_project"],
            start_nimg=run.start_nimg(config),
        ) as log:
            if distributed.is_main():
                versions = {"python": platform.python_version(), "torch": torch.__version__}
                write_options(run.run_dir, config, sys.argv, versions)
            log.line(f"run folder: {run.run_dir}")
            for change in run.changes:
                log.line(change)
            request = TrainRequest(
                config=config,
                dataset=dataset,
                run_dir=run.run_dir,
                device=device,
                renderer=options["renderer"],
                state=run.state,
                start=start,
                evaluate=evaluate,
            )
            train(request, log)


def _load_start(config: TrainConfig) -> dict[str, torch.nn.Module]:
    """Load the networks that a run starts from; none without `--resume-from`."""
    if config.resume_from is None:
        return {}
    networks = load_snapshot(config.resume_from)
    return {name: networks[name] for name in NETWORK_NAMES if networks[name] is not None}


def _choose_run(config: TrainConfig, name: str, options: Mapping[str, Any]) -> Run:
    resume = "never" if _names_network(options["resume"]) else options["resume"]
    return choose_run(options["outdir"], name, config, resume, click.echo)


if __name__ == "__main__":
    train_command()
