"""Examples to train small networks on: the real images of a data set, with cameras and masks, made small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from dnnlib.workers import map_ordered
from metrics.detector_interface import DetectorContext
from metrics.directions import view_directions
from torch_utils import distributed
from training.dataset import HeadDataset
from training.image_reading import HeadReader

_MAX_STRETCHES, _MIN_STRETCH = 64, 8  # their number, and images in one
_HELD_OUT = 8  # one in so many
_READ_TOGETHER = 16  # images


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Images and what is to be learnt from them."""

    images: torch.Tensor
    """uint8 [N, 3, S, S]."""
    directions: torch.Tensor
    """float32 [N, 3]: from where the camera looks, see `metrics.directions.view_directions`."""
    masks: torch.Tensor | None = None
    """uint8 [N, 1, S, S], where the data set has masks."""

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, rows: torch.Tensor | slice) -> Examples:
        """Return some of them."""
        masks = None if self.masks is None else self.masks[rows]
        return Examples(images=self.images[rows], directions=self.directions[rows], masks=masks)


def shrink(images: torch.Tensor, size: int) -> torch.Tensor:
    """Average images down to a size, or enlarge them bilinearly; rounded to whole numbers, as the training sees them.

    Args:
        images: uint8 [B, C, H, W].
        size: side in pixels.

    Returns:
        uint8 [B, C, size, size].
    """
    if images.shape[2:] == (size, size):
        return images
    if min(images.shape[2:]) >= size:
        resized = functional.adaptive_avg_pool2d(images.float(), size)
    else:
        resized = functional.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False)
    return resized.round().to(torch.uint8)


def resize_name(size: int) -> str:
    """Return what `shrink` is called in results."""
    return f"area average, to {size}"


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Return bytes as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def unique_items(dataset: HeadDataset) -> list[int]:
    """Return one index of the data set for every image that is in it, in the order of the files."""
    first: dict[int, int] = {}
    for index in range(len(dataset)):
        item, mirrored = dataset.locate(index)
        if not mirrored:
            first.setdefault(item, index)
    return [first[item] for item in sorted(first)]


def split(dataset: HeadDataset, items: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Split items of a data set into those to train on and those that are held out, one in eight.

    By identity, if the data set names identities; otherwise in stretches of files in their order, since neighbours are
    often pictures of the same person; by image, if there are fewer than eight identities or stretches.
    """
    identities = dataset.identities
    if identities is None:
        stretches = min(_MAX_STRETCHES, len(items) // _MIN_STRETCH // _HELD_OUT * _HELD_OUT)
        groups = np.arange(len(items)) * stretches // len(items)
    else:
        groups = np.unique(np.asarray(identities)[list(items)], return_inverse=True)[1].reshape(-1)
    if groups.max() < _HELD_OUT - 1:  # a few identities: then each has some images in both parts
        groups = np.arange(len(items))
    held_out = groups % _HELD_OUT == _HELD_OUT // 2
    items = np.asarray(items)
    return items[~held_out], items[held_out]


def limit(parts: tuple[np.ndarray, np.ndarray], most: int) -> list[np.ndarray]:
    """Return both parts of a split, or of each an equal share that is spread evenly over the files: `most` in all."""
    total = sum(map(len, parts))
    if total <= most:
        return list(parts)
    counts = [max(1, len(part) * most // total) for part in parts]
    return [part[np.linspace(0, len(part) - 1, count).astype(int)] for part, count in zip(parts, counts)]


def read_examples(context: DetectorContext, indices: np.ndarray, size: int, with_masks: bool) -> Examples:
    """Read items of the data set of a context, and shrink them to `size` pixels.

    Raises:
        ValueError: an image cannot be read.
    """
    dataset, reader = context.dataset, _reader(context.dataset, with_masks)
    groups = [indices[start : start + _READ_TOGETHER] for start in range(0, len(indices), _READ_TOGETHER)]
    tasks = ([dataset.locate(int(index)) for index in group] for group in groups)
    layers = []
    with tqdm(total=len(indices), desc="reading images", unit="img", disable=not context.progress, leave=False) as bar:
        for pixels in map_ordered(reader, tasks, context.workers):
            layers.append(shrink(torch.from_numpy(pixels), size))
            bar.update(len(pixels))
            distributed.note_progress()
    pixels = torch.cat(layers)
    masks = pixels[:, 3:4].clone() if reader.has_masks else None
    directions = torch.from_numpy(view_directions(dataset.labels[indices])).float()
    return Examples(images=pixels[:, :3].clone(), directions=directions, masks=masks)


def _reader(dataset: HeadDataset, with_masks: bool) -> HeadReader:
    """Return a reader of images, and of masks if they are wanted: decoding is most of the work."""
    reader = dataset.reader
    unwanted = {"parsing": None} if with_masks else {"parsing": None, "masks": None}
    return HeadReader([root._replace(**unwanted) for root in reader.roots], reader.items, reader.resolution)
