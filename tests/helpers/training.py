"""Tiny training runs: the `debug` preset on a made-up data set."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib import serialize
from tests.helpers.head_data import HeadFiles
from torch_utils import distributed
from torch_utils.tensor_file import open_tensor_file
from training.dataset import HeadDataset
from training.run_log import RunLog
from training.train_config import DataConfig, TrainConfig
from training.train_presets import make_train_config
from training.training_loop import TrainRequest, train
from training.training_state import KIND, newest_state

SIDE = 64


def debug_data(folder: Path, count: int = 12) -> DataConfig:
    """Write a data set with masks; return the configuration of it."""
    return HeadFiles(count, side=SIDE).write(folder, zipped=True, parsing=(), parsing_classes=0)


def debug_config(data: DataConfig, **settings: Any) -> TrainConfig:
    """Return a configuration without pictures; keyword arguments are dotted fields with __ for the dot."""
    paths = {name.replace("__", "."): value for name, value in settings.items()}
    return make_train_config("debug", data, {"loop.image_ticks": None, "loop.snapshot_ticks": None, **paths})


def request(config: TrainConfig, run_dir: Path, **fields: Any) -> TrainRequest:
    """Return what trains on a CPU, going on from the newest state of a folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    dataset = HeadDataset(config.data, seed=config.loop.seed)
    device, state = torch.device("cpu"), newest_state(run_dir)
    return TrainRequest(config=config, dataset=dataset, run_dir=run_dir, device=device, state=state, **fields)


def run(config: TrainConfig, run_dir: Path, kimg: float, **fields: Any) -> bool:
    """Train up to some images, going on where the folder's newest state is."""
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, total_kimg=kimg))
    with RunLog(run_dir, distributed.is_main()) as log:
        return train(request(config, run_dir, **fields), log)


def state_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a training state."""
    with open_tensor_file(path, KIND) as file:
        return {name: file.read(name).clone() for name in file.specs}


def assert_networks_equal_up_to_order(
    one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor], prefixes: Sequence[str]
) -> None:
    """Check that the weights of two states, by the prefixes of networks, differ as sums in another order do."""
    for network in prefixes:
        pairs = [(one[name], two[name]) for name in one if name.startswith(network)]
        distance = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
        size = math.sqrt(sum(float(a.square().sum()) for a, _ in pairs))
        # Sums in another order; Adam divides small gradients by themselves, so single biases may differ by 1e-3.
        assert distance < 1e-5 * size, network


def main() -> None:
    """Train as one of several processes: arguments are a file with the configuration, a run folder, and kimg."""
    config_path, run_dir, kimg = sys.argv[1:]
    torch.set_num_threads(1)
    config = serialize.loads(TrainConfig, Path(config_path).read_text())
    with distributed.session("cpu"):
        run(config, Path(run_dir), float(kimg))


if __name__ == "__main__":
    main()
