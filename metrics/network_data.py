"""The data set that a network was trained on, as its run folder or its snapshot tells."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dnnlib import serialize
from dnnlib.sources import local_path, without_credentials
from legacy import load_snapshot
from training.dataset import image_side
from training.run_options import OPTIONS_NAME
from training.train_config import DataConfig

PUBLISHED_OPTIONS_NAME = "training_options.json"


def run_folder(network: str) -> Path | None:
    """Return the run folder in which a network file lies; None for what lies elsewhere, a URL or a preset."""
    path = local_path(network)
    if path is None:
        return None
    names = (OPTIONS_NAME, PUBLISHED_OPTIONS_NAME)
    return path.parent if any((path.parent / name).is_file() for name in names) else None


def data_of_network(network: str) -> DataConfig:
    """Return the data set that a network was trained on: all of it, no image flipped or repeated.

    It stands in options.json or training_options.json beside the network, else in a published snapshot.

    Args:
        network: as for `legacy.load_snapshot`.

    Raises:
        ValueError: nothing tells, or the data are not there; the message says what to do.
        OSError: a file cannot be read.
    """
    folder = run_folder(network)
    if folder is not None:
        ours = (folder / OPTIONS_NAME).is_file()
        where = folder / (OPTIONS_NAME if ours else PUBLISHED_OPTIONS_NAME)
        text = where.read_bytes()
        with _told_by(str(where)):
            options = json.loads(text)
            config = _own(options["config"]["data"]) if ours else _published(options["training_set_kwargs"])
            image_side(config.images[0])  # they may have moved
        return config
    kwargs = load_snapshot(network, only=())["training_set_kwargs"]
    with _told_by(without_credentials(network)):
        if kwargs is None:
            raise ValueError("expected to learn what it was trained on, came nothing in the file or beside it")
        config = _published(kwargs)
        image_side(config.images[0])
    return config


@contextlib.contextmanager
def _told_by(where: str) -> Iterator[None]:
    """Turn errors in what a file says into ones that name it, and what to do."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        text = f"expected {error}, came none" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where}: {text}; give the images with --data") from error


def _own(data: Any) -> DataConfig:
    config = serialize.from_json(DataConfig, data, "config.data")
    return all_real_images(config)


def all_real_images(config: DataConfig) -> DataConfig:
    """Return the data of a training as metrics compare with them: all, none flipped or repeated; no parsing maps."""
    return dataclasses.replace(config, mirror=False, back_repeat=1, max_images=None, parsing=(), parsing_classes=0)


def _published(kwargs: Mapping[str, Any]) -> DataConfig:
    """Return the configuration of published `training_set_kwargs`."""
    images = kwargs["img_path"] if "img_path" in kwargs else kwargs["path"]
    masks = kwargs.get("seg_path", kwargs.get("mask_path"))
    resolution = kwargs.get("resolution")
    return DataConfig(
        images=(str(images),),
        masks=() if masks is None else (str(masks),),
        resolution=image_side(str(images)) if resolution is None else int(resolution),
        min_yaw_deg=float(kwargs.get("min_yaw", 0)),
        max_yaw_deg=float(kwargs.get("max_yaw", 180)),
        max_pitch_deg=float(kwargs.get("max_pitch", 90)),
        published_angles=True,
    )
