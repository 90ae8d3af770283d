"""Pictures of a training run: real images, and what the generator makes of fixed seeds from fixed views."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

import camera_utils
from torch_utils.pictures import (
    classes_to_uint8,
    colors_to_uint8,
    depth_to_uint8,
    mask_to_uint8,
    parsing_to_uint8,
    save_png,
    tile,
)
from training.config import NoiseMode, RenderingConfig, require
from training.networks_stylegan2 import SynthesisOptions
from training.triplane import TriPlaneGenerator

_MAX_HEIGHT_PX, _MAX_HEADS = {"cpu": 768, "cuda": 2048}, {"cpu": 4, "cuda": 8}
_OVERVIEW_ROWS, _OVERVIEW_SIDE = 2, 128
OVERVIEW = "overview"


@dataclass(frozen=True, kw_only=True)
class GridSpec:
    """Which heads are shown from where: a row for each seed, a column for each view.

    Everything random is fixed, so that pictures of different ticks differ by what was learned alone.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Of latents; the same heads as `gen_samples.py --seeds` makes."""
    yaws_deg: tuple[float, ...] = (0.0, 45.0, 90.0, 135.0, 180.0, -90.0)
    """0 is in front of the face, 180 behind."""
    pitch_deg: float = 0.0
    radius: float = camera_utils.TRAINING_RADIUS
    """Distance of the cameras, in world units."""
    focal: float = camera_utils.TRAINING_FOCAL
    """Focal length, in image widths."""
    noise_mode: NoiseMode = "const"
    noise_seed: int = 0
    """Of the jitter of samples along rays, the same in every view."""

    def __post_init__(self) -> None:
        for name in ("seeds", "yaws_deg"):
            require(len(getattr(self, name)) > 0, f"grid.{name}", "at least one", getattr(self, name))

    def labels(self) -> torch.Tensor:
        """Return the camera labels `[V, 25]` of the columns."""
        return self._labels(self.yaws_deg, self.pitch_deg)

    def conditioning_label(self) -> torch.Tensor:
        """Return the label `[1, 25]` that the mapping network is told in every view: a level, frontal camera."""
        return self._labels((0.0,), 0.0)

    def _labels(self, yaws_deg: Sequence[float], pitch_deg: float) -> torch.Tensor:
        yaw_rad = torch.tensor(yaws_deg).deg2rad()
        poses = camera_utils.look_at_pose(yaw_rad, math.radians(pitch_deg), self.radius)
        return camera_utils.camera_label(poses, camera_utils.intrinsics_from_focal(self.focal))


def make_grid(resolution: int, device: torch.device | str = "cpu", labels: np.ndarray | None = None) -> GridSpec:
    """Choose a grid for images of a size and a kind of cameras.

    Args:
        resolution: of the images, in pixels.
        device: that renders them; on a CPU grids are smaller.
        labels: `[N, 25]` of the data set, whose median distance and focal length are taken; None, or labels of zeros,
            take those of published models.
    """
    cameras = {}
    if labels is not None and len(labels) and np.any(labels):
        positions = labels[:, [3, 7, 11]].astype(np.float64)
        cameras = {
            "radius": float(np.median(np.linalg.norm(positions, axis=1))),
            "focal": float(np.median(labels[:, 16])),
        }
    kind = "cpu" if torch.device(device).type == "cpu" else "cuda"
    num_heads = min(max(_MAX_HEIGHT_PX[kind] // resolution, 2), _MAX_HEADS[kind])
    return GridSpec(seeds=tuple(range(num_heads)), **cameras)


# ---- what the generator makes ---------------------------------------------------------------------------------------


def save_fakes(run_dir: str | Path, generator: TriPlaneGenerator, cur_nimg: int, grid: GridSpec) -> dict[str, Path]:
    """Render a grid and write a PNG file for each kind of picture, and an overview of the first heads.

    Args:
        run_dir: folder of the run.
        generator: its moving average (G_ema).
        cur_nimg: images so far; thousands of them are part of the names.
        grid: what to render.

    Returns:
        files by kind: `image` is `fakes<kimg, six digits>.png`, and there are `raw`, `depth`, `mask`, `overview` and,
        with a semantic head, `parsing`, with that suffix.
    """
    cells = render_cells(generator, grid)
    pictures = {kind: tile(images, len(grid.yaws_deg)) for kind, images in cells.items()}
    pictures[OVERVIEW] = _overview(cells, len(grid.yaws_deg))
    paths = {}
    for kind, picture in pictures.items():
        suffix = "" if kind == "image" else f"_{kind}"
        paths[kind] = Path(run_dir) / f"fakes{cur_nimg // 1000:06d}{suffix}.png"
        save_png(paths[kind], picture)
    return paths


@torch.no_grad()
def render_cells(generator: TriPlaneGenerator, grid: GridSpec) -> dict[str, list[np.ndarray]]:
    """Render the cells of a grid, the views of the first head first.

    Cameras are those of the grid, without the learned offset. The global random numbers are neither used nor changed.
    Depths of all cells and ticks have the same scale: that of the distances within which the volume is sampled.

    Returns:
        images uint8 `[H, W, 3]` by kind: `image`, `raw`, `depth`, `mask` and, with a semantic head, `parsing`.
    """
    device = next(generator.parameters()).device
    converters = _converters(generator.config.rendering, grid.radius)
    # One head and one view at a time: the jitter of a cell then does not depend on how many there are.
    random = torch.Generator(device=device)
    options = SynthesisOptions(noise_mode=grid.noise_mode, generator=random)
    labels = grid.labels().to(device)
    cells: dict[str, list[np.ndarray]] = {}
    with _eval_mode(generator):
        for seed in grid.seeds:
            random.manual_seed(grid.noise_seed)
            field = generator.radiance_field(_seed_ws(generator, seed, grid), options=options)
            for label in labels:
                random.manual_seed(grid.noise_seed)
                output = generator.render(field, label.unsqueeze(0))
                for name in converters.keys() & output.keys():
                    cells.setdefault(name, []).append(converters[name](output[name])[0])
    return {name.removeprefix("image_"): cells[name] for name in converters if name in cells}


def _seed_ws(generator: TriPlaneGenerator, seed: int, grid: GridSpec) -> torch.Tensor:
    """Return the w-layers `[1, L, 512]` of a seed, without truncation."""
    parameter = next(generator.parameters())
    z = torch.from_numpy(np.random.RandomState(seed).randn(1, generator.z_dim)).to(parameter)
    return generator.mapping(z, grid.conditioning_label().to(parameter))


def _converters(config: RenderingConfig, radius: float) -> dict[str, Callable[[torch.Tensor], np.ndarray]]:
    """Return what turns each image of a rendering `[B, C, H, W]` into bytes `[B, H, W, 3]`."""
    limits = (config.ray_start, config.ray_end)
    if config.auto_range:  # the ball around the box
        half_diagonal = config.box_warp * math.sqrt(3) / 2
        limits = (max(radius - half_diagonal, 0.0), radius + half_diagonal)
    return {
        "image": colors_to_uint8,
        "image_raw": colors_to_uint8,
        "image_depth": lambda depth: depth_to_uint8(depth, limits),
        "image_mask": mask_to_uint8,
        "image_parsing": parsing_to_uint8,
    }


@contextmanager
def _eval_mode(network: torch.nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _overview(cells: dict[str, list[np.ndarray]], columns: int) -> np.ndarray:
    """Put all kinds of pictures of the first heads below each other."""
    num_heads = min(len(cells["image"]) // columns, _OVERVIEW_ROWS)
    rows = [images[head * columns : (head + 1) * columns] for head in range(num_heads) for images in cells.values()]
    return tile([_resize(image, _OVERVIEW_SIDE) for row in rows for image in row], columns)


def _resize(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an image: smaller ones by repeating pixels, larger ones by averaging."""
    how = Image.Resampling.BOX if image.shape[0] > side else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(image).resize((side, side), how))


# ---- real images ----------------------------------------------------------------------------------------------------


class Images(Protocol):
    """What is needed of `training.dataset.HeadDataset`."""

    labels: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


def save_reals(run_dir: str | Path, dataset: Images, grid: GridSpec) -> dict[str, Path]:
    """Write grids of real images, as many as the grid has cells, evenly over the data set in order of their yaw.

    Returns:
        files by kind: `image` is `reals.png`; where the data set has them `mask` and `parsing`, with that suffix.

    Raises:
        ValueError: no image can be read.
    """
    columns = len(grid.yaws_deg)
    cells: dict[str, list[np.ndarray]] = {}
    for item in _spread_items(dataset, columns * len(grid.seeds)):
        cells.setdefault("image", []).append(item["image"])
        if "mask" in item:
            cells.setdefault("mask", []).append(np.repeat(item["mask"], 3, axis=0))
        if "parsing" in item:
            cells.setdefault("parsing", []).append(np.moveaxis(classes_to_uint8(item["parsing"][0]), -1, 0))
    require(bool(cells), "images for a grid", "at least one that can be read", 0)
    paths = {}
    for kind, images in cells.items():
        paths[kind] = Path(run_dir) / ("reals.png" if kind == "image" else f"reals_{kind}.png")
        save_png(paths[kind], tile([image.transpose(1, 2, 0) for image in images], columns))  # [H, W, 3] each
    return paths


def _spread_items(dataset: Images, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield items in order of yaw, from the left (-180) over the front to the right; unreadable ones are left out."""
    yaw_deg = camera_utils.yaw_pitch_roll_deg(torch.from_numpy(np.asarray(dataset.labels, np.float32)))[:, 0].numpy()
    order = np.argsort(yaw_deg, kind="stable")
    positions = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    for index in order[positions].tolist():
        try:
            yield {name: np.asarray(value) for name, value in dataset[index].items()}
        except (ValueError, OSError):
            continue  # the loader reports it
