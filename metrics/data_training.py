"""Train small networks on the real images of a data set: once, in about a minute of one core, and keep them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch.nn import functional
from tqdm import tqdm

from metrics.detector_interface import DetectorContext
from metrics.registry import NotApplicable
from metrics.stats_cache import data_key, keep
from metrics.training_examples import Examples, limit, read_examples, split, to_float, unique_items
from torch_utils import distributed
from torch_utils.rng import derive_seed
from torch_utils.tensor_file import read_tensor_file, write_tensor_file
from training.config import require

MIN_IMAGES = 64
MAX_SIZE, MIN_SIZE = 64, 32
_VERSION = 2  # goes up when the same data would give other networks
_KIND = "spherehead-trained-detector"
_EVALUATED_TOGETHER = 128  # images
_WARM_UP = 0.1  # share of the steps


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How long and how fast a network is trained."""

    max_images: int = 8192
    """At most so many images are read,"""
    max_pixels: int = 1 << 30
    """with so many pixels altogether: decoding large ones would take longer than the training."""
    epochs: float = 25
    min_seen: int = 5_000
    """Images that training sees at least, counted as often as it sees them,"""
    max_seen: int = 42_000
    """and at most. It is what bounds the time."""
    batch_size: int = 32
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2

    def most_images(self, resolution: int) -> int:
        """Return how many images of a size in pixels may be read."""
        return max(MIN_IMAGES, min(self.max_images, self.max_pixels // resolution**2))

    def num_steps(self, num_images: int) -> int:
        """Return the number of batches for a number of images."""
        seen = min(max(self.epochs * num_images, self.min_seen), self.max_seen)
        return max(1, round(seen / self.batch_size))


class Task(Protocol):
    """What a network is to learn."""

    name: str
    """Of files and progress bars."""
    needs_masks: bool
    """Whether masks are read."""
    plan: TrainingPlan

    def build(self, size: int) -> torch.nn.Module:
        """Return a network for images of `size` pixels, with random weights."""

    def sampling_weights(self, examples: Examples) -> torch.Tensor:
        """Return how often each example is wanted, relative to the others: float64 [N]."""

    def loss(self, network: torch.nn.Module, batch: Examples, images: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch; `images` are its images as float32 in [-1, 1], disturbed."""

    def evaluate(self, network: torch.nn.Module, examples: Examples) -> dict[str, float]:
        """Return how good a network is on examples that it has not seen."""


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """A network that was trained on a data set, on the device of the context and in evaluation mode."""

    network: torch.nn.Module
    size: int
    """Of the images that it takes, in pixels."""
    num_images: int
    """That it was trained on, those that were held out not counted."""
    held_out: dict[str, float] = field(default_factory=dict)
    """What `Task.evaluate` returned, and `num_images`."""
    key: str
    """SHA-256 of the weights."""


def trained_network(task: Task, context: DetectorContext) -> TrainedNetwork:
    """Return a network trained on the data set of the context; collective.

    Rank 0 trains it, on its CPU so that machines with and without a GPU get the same network up to rounding, or takes
    it from the cache, where it is kept under a hash of data, task, plan and seed.

    One image in eight is held out, see `metrics.training_examples.split`. Flipped and repeated items count once; flips
    are an augmentation here.

    Raises:
        NotApplicable: fewer than 64 images.
        ValueError: one that cannot be read.
    """
    items = unique_items(context.dataset)
    name = f"detector {task.name}"
    if len(items) < MIN_IMAGES:
        raise NotApplicable(f"{name} needs at least {MIN_IMAGES} images to train on, and the data have {len(items)}")
    size = MAX_SIZE if context.dataset.resolution >= MAX_SIZE else MIN_SIZE
    state = None
    if distributed.is_main():
        with distributed.long_task(f"training {name}"):
            state = _load_or_train(task, context, items, size)
    weights, header = distributed.broadcast_object(state)
    with torch.random.fork_rng(devices=[]):  # initial weights draw from it, only to be replaced
        network = task.build(size)
    network.load_state_dict(weights)
    network.to(context.device).eval().requires_grad_(False)
    digest = hashlib.sha256(f"{task.name} {_VERSION} {size}".encode())
    for _, tensor in sorted(weights.items()):
        digest.update(tensor.numpy().tobytes())
    return TrainedNetwork(
        network=network, size=size, num_images=header["num_images"], held_out=header["held_out"], key=digest.hexdigest()
    )


def _load_or_train(
    task: Task, context: DetectorContext, items: list[int], size: int
) -> tuple[dict[str, torch.Tensor], dict]:
    """Return weights and a header, from the cache if they are there."""
    path = _cache_path(task, context, size)
    if path is not None and path.is_file():
        try:
            with open(path, "rb") as file:
                return read_tensor_file(file, _KIND)
        except (ValueError, OSError):
            pass  # damaged: trained again, and written over
    parts = limit(split(context.dataset, items), task.plan.most_images(context.dataset.resolution))
    training, held_out = (read_examples(context, part, size, task.needs_masks) for part in parts)
    network = train(task, training, size, context)
    held = {"num_images": float(len(held_out)), **task.evaluate(network.eval(), held_out)}
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    header = {"task": task.name, "num_images": len(training), "held_out": held}
    if path is not None:
        keep(path, lambda: write_tensor_file(path, _KIND, weights, header))
    return weights, header


def _cache_path(task: Task, context: DetectorContext, size: int) -> Path | None:
    if context.cache_dir is None:
        return None
    who = context.dataset.identities  # which images are held out depends on it
    identities = None if who is None else hashlib.sha256(who.tobytes()).hexdigest()
    parts = [_VERSION, task.name, asdict(task.plan), context.seed, size, data_key(context.dataset), identities]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return Path(context.cache_dir) / "detectors" / f"{task.name}-{key[:32]}.safetensors"


def train(task: Task, examples: Examples, size: int, context: DetectorContext) -> torch.nn.Module:
    """Train a network on the CPU: AdamW, the learning rate warmed up and then lowered along half a cosine.

    Examples, initial weights, seed and plan determine it, up to rounding.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: the loss is not finite.
    """
    plan, steps = task.plan, task.plan.num_steps(len(examples))
    generator = torch.Generator().manual_seed(derive_seed(context.seed, _VERSION))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(derive_seed(context.seed, _VERSION, 1))  # of the initial weights
        network = task.build(size).to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.AdamW(network.parameters(), plan.learning_rate, weight_decay=plan.weight_decay)
        weights, pending = task.sampling_weights(examples), torch.empty(0, dtype=torch.int64)
        with tqdm(total=steps, desc=f"training {task.name}", disable=not context.progress, leave=False) as bar:
            for step in range(steps):
                if len(pending) < plan.batch_size:
                    pending = torch.cat([pending, balanced_order(weights, generator)])
                rows, pending = pending.split([plan.batch_size, len(pending) - plan.batch_size])
                for group in optimizer.param_groups:
                    group["lr"] = plan.learning_rate * _rate(step / steps)
                batch, images = disturb(examples.rows(rows), generator)
                loss = task.loss(network, batch, images.contiguous(memory_format=torch.channels_last))
                require(math.isfinite(loss.item()), f"detector {task.name}", "a finite loss", loss.item())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                bar.update()
                distributed.note_progress()
    return network


def _rate(progress: float) -> float:
    return min(1.0, progress / _WARM_UP + 0.01) * (0.5 + 0.5 * math.cos(math.pi * progress))


def balanced_order(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw as many examples as there are, in random order, each in proportion to its weight.

    By systematic resampling, so that an example with k times the mean weight comes floor(k) or ceil(k) times: exactly
    once, if all weights are equal.

    Args:
        weights: float64 [N], above 0.
        generator: on the CPU.

    Returns:
        int64 [N].
    """
    count = len(weights)
    shuffled = torch.randperm(count, generator=generator)
    ends = (weights[shuffled] / weights.sum() * count).cumsum(0)
    places = torch.arange(count, dtype=torch.float64) + 0.5
    drawn = shuffled[torch.searchsorted(ends, places, right=True).clamp(max=count - 1)]
    return drawn[torch.randperm(count, generator=generator)]


def disturb(batch: Examples, generator: torch.Generator) -> tuple[Examples, torch.Tensor]:
    """Flip half of a batch, with everything that belongs to the images, and disturb the images a little.

    Brightness and contrast of each colour change by a tenth of the range or so, images move by up to one pixel, a
    quarter of them is blurred and another quarter noisy: generated images are not as clean as real ones, and metrics
    shall see other faults than that.

    Returns:
        The batch, with images and masks flipped and moved, and its images as float32 in [-1, 1], disturbed.
    """
    count = len(batch)
    flipped = torch.rand(count, generator=generator) < 0.5
    signs = torch.where(flipped[:, None], torch.tensor([-1.0, 1.0, 1.0]), torch.ones(3))
    shifts = tuple(torch.randint(-1, 2, (2,), generator=generator).tolist())
    layers = [batch.images] if batch.masks is None else [batch.images, batch.masks]
    pixels = torch.cat(layers, 1)
    pixels = torch.where(flipped[:, None, None, None], pixels.flip(3), pixels).roll(shifts, (2, 3))
    moved = Examples(
        images=pixels[:, :3],
        directions=batch.directions * signs,
        masks=None if batch.masks is None else pixels[:, 3:],
    )
    gain, offset = 0.1 * torch.randn(2, count, 3, 1, 1, generator=generator)
    images = to_float(moved.images) * (1 + gain) + offset
    quarter = count // 4
    blurred = functional.avg_pool2d(functional.pad(images[:quarter], (1, 1, 1, 1), mode="replicate"), 3, 1)
    noisy = images[quarter : 2 * quarter]
    noisy = noisy + 0.05 * torch.randn(noisy.shape, generator=generator)
    return moved, torch.cat([blurred, noisy, images[2 * quarter :]])


def conv_block(in_channels: int, out_channels: int, stride: int = 1) -> torch.nn.Sequential:
    """Return a 3 x 3 convolution with batch normalisation and ReLU."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
        torch.nn.BatchNorm2d(out_channels),
        torch.nn.ReLU(),
    )


@torch.no_grad()
def apply_in_batches(network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Apply a network to bytes [N, 3, S, S], as float32 in [-1, 1] and in batches, and return all outputs."""
    return torch.cat([network(to_float(part)) for part in images.split(_EVALUATED_TOGETHER)])
