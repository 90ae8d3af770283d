"""Segmenters: networks that find the head in an image."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

from metrics.data_training import TrainedNetwork, TrainingPlan, apply_in_batches, conv_block, trained_network
from metrics.detector_interface import DetectorContext, DetectorInfo, detection
from metrics.torchscript_detectors import FileNetwork, parse_source
from metrics.training_examples import Examples, resize_name, shrink, to_float
from training.config import require

_PERSON = 15  # of the classes of PASCAL VOC, background being 0
_NUM_VOC_CLASSES = 21


class Segmenter(Protocol):
    """A network from images to masks."""

    info: DetectorInfo
    key: str
    """Hexadecimal; segmenters with the same key give the same masks, up to the rounding of devices."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 masks `[B, 1, H, W]` in [0, 1] of uint8 images `[B, 3, H, W]`; 1 is the head."""


def load_segmenter(spec: str | None, context: DetectorContext) -> Segmenter:
    """Load a segmenter, or train one on the masks of the data set; collective.

    Args:
        spec: path or URL of a TorchScript file, see `FileSegmenter`; None trains a network.
        context: where to put it, and what to train on.

    Raises:
        ValueError: the data set has no masks or fewer than 64 images, or the file is of another kind.
        OSError: the file cannot be had.
    """
    if spec is not None:
        return FileSegmenter(spec, context)
    return load_mask_segmenter(context)


def load_mask_segmenter(context: DetectorContext, plan: TrainingPlan | None = None) -> MaskSegmenter:
    """Return a segmenter trained on the masks of the data set, now or earlier; `plan` None is the usual one."""
    where = ", ".join(context.dataset.config.images)
    require(
        context.dataset.has_masks, f"segmenter, data {where}", "masks to learn from, or a segmentation network", "none"
    )
    return MaskSegmenter(trained_network(MaskTask(plan), context), where)


class MaskNetwork(torch.nn.Module):
    """A small U-Net (Ronneberger et al. 2015) from images to the logits of masks; `size` is a multiple of 16 pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        require(size % 16 == 0, "segmenter, size", "a multiple of 16", size)
        self.down = torch.nn.ModuleList([conv_block(3, 16, 2), conv_block(16, 32, 2), conv_block(32, 64, 2)])
        self.bottom = torch.nn.Sequential(conv_block(64, 64, 2), conv_block(64, 64))
        self.up = torch.nn.ModuleList([conv_block(64 + 64, 32), conv_block(32 + 32, 16), conv_block(16 + 16, 8)])
        self.out = torch.nn.Conv2d(8 + 3, 1, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits `[B, 1, S, S]` of images `[B, 3, S, S]` in [-1, 1]."""
        skips, x = [], images
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.bottom(x)
        for block, skip in zip(self.up, reversed(skips)):
            x = block(torch.cat([_twice(x), skip], 1))
        return self.out(torch.cat([_twice(x), images], 1))


class MaskTask:
    """Learn masks by cross-entropy."""

    name = "mask"
    needs_masks = True

    def __init__(self, plan: TrainingPlan | None = None) -> None:
        self.plan = plan or TrainingPlan(max_images=4096, min_seen=3_000, max_seen=8_000, batch_size=16)

    def build(self, size: int) -> MaskNetwork:
        """Return a network with random weights."""
        return MaskNetwork(size)

    def sampling_weights(self, examples: Examples) -> torch.Tensor:
        """Return equal weights."""
        return torch.ones(len(examples), dtype=torch.float64)

    def loss(self, network: torch.nn.Module, batch: Examples, images: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of pixels; masks may be soft."""
        return functional.binary_cross_entropy_with_logits(network(images), batch.masks.float() / 255)

    def evaluate(self, network: torch.nn.Module, examples: Examples) -> dict[str, float]:
        """Return `iou`: pixels in both masks over pixels in either, thresholds at a half, counted over all images."""
        predicted, masks = apply_in_batches(network, examples.images) > 0, examples.masks > 127
        either = (predicted | masks).sum().item()
        return {"iou": (predicted & masks).sum().item() / either if either else 1.0}


class MaskSegmenter:
    """A segmenter that was trained on the masks of the data set."""

    def __init__(self, trained: TrainedNetwork, source: str) -> None:
        self._network, self._size, self.key = trained.network, trained.size, trained.key
        self.info = DetectorInfo(
            name=f"masks (trained on this data: {trained.num_images} images)",
            resize=resize_name(trained.size),
            sha256=None,
            source=source,
            held_out=trained.held_out,
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return masks, see `Segmenter`; they are as fine as 64 pixels."""
        _check(images, self.info.name)
        with detection():
            small = to_float(shrink(images, self._size)).contiguous(memory_format=torch.channels_last)
            return _to_size(torch.sigmoid(self._network(small)), images)


class FileSegmenter:
    """A TorchScript segmentation network.

    It may return masks `[B, 1, h, w]` in [0, 1]; or logits `[B, 21, h, w]` of the classes of PASCAL VOC, as DeepLab
    does (Chen et al. 2017), of which those pixels count whose largest one is class 15, a person. They may be the entry
    `out` of a dict. Images are prepared as the suffix says, see `metrics.torchscript_detectors`; for DeepLab that is
    `deeplab.pt?input=imagenet`.

    Raises:
        ValueError, OSError: as `load_segmenter`.
    """

    def __init__(self, spec: str, context: DetectorContext) -> None:
        self._network = FileNetwork(parse_source(spec), context, "segmenter")
        self.key = self._network.key
        self.info = self._network.info()
        with detection():
            self(self._network.sample_images())

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return masks, see `Segmenter`."""
        _check(images, self.info.name)
        with detection():
            out = self._network(images)
            out = out.get("out") if isinstance(out, dict) else out
            fits = (
                isinstance(out, torch.Tensor)
                and out.ndim == 4
                and out.shape[:2]
                in {
                    (len(images), 1),
                    (len(images), _NUM_VOC_CLASSES),
                }
            )
            expected = f"masks [B, 1, H, W] or logits [B, {_NUM_VOC_CLASSES}, H, W]"
            came = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            require(fits, f"segmenter {self.info.source}, output", expected, came)
            if out.shape[1] == _NUM_VOC_CLASSES:
                out = (out.argmax(1, keepdim=True) == _PERSON).float()
            in_range = bool(((out >= 0) & (out <= 1)).all())  # also false for NaN
            require(in_range, f"segmenter {self.info.source}, masks", "numbers from 0 to 1", "others")
            return _to_size(out.float(), images)


def _twice(x: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(x, scale_factor=2, mode="nearest")


def _to_size(masks: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Bring masks to the size of images: bilinear where that is larger, else averaged."""
    size = tuple(images.shape[2:])
    if tuple(masks.shape[2:]) == size:
        return masks
    return functional.interpolate(masks, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


def _check(images: torch.Tensor, name: str) -> None:
    fits = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
    require(fits, f"segmenter {name}, images", "uint8 [B, 3, H, W]", f"{images.dtype} {list(images.shape)}")
