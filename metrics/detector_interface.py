"""What a detector is: a network that turns images into the numbers that metrics compare."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from metrics.requests import Output
from training.config import require
from training.dataset import HeadDataset


@dataclass(frozen=True, kw_only=True)
class DetectorInfo:
    """What results say about a detector, so that numbers are compared only where they may be."""

    name: str
    """Such as `inception`, or `view (trained on this data: 6000 images)`."""
    resize: str
    """The filter by which images get to the size of the network: `in the network`, `none`, or the filter with the size,
    such as `bicubic, antialiased, to 224`. Frechet distances depend on it (Parmar et al. 2022)."""
    sha256: str | None
    """Of the file that was loaded; None where there is no file."""
    source: str
    """Path or URL of the file, or what the network was trained on."""
    held_out: dict[str, float] | None = None
    """How good a network that was trained on the data set at hand is on the part of it that it was not trained on."""

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON data."""
        return asdict(self)


class Detector(Protocol):
    """A network from images to rows of numbers; it depends on nothing but its images."""

    info: DetectorInfo
    outputs: frozenset[Output]
    """What it can be asked for."""
    key: str
    """Hexadecimal; detectors with the same key give the same numbers, up to the rounding of devices."""

    def __call__(self, images: torch.Tensor, output: Output) -> torch.Tensor:
        """Return the output for each image.

        Args:
            images: uint8 `[B, 3, H, W]`, on the device of the detector.
            output: one of `outputs`.

        Returns:
            float32 `[B, F]`.

        Raises:
            ValueError: other images, or an output that it does not have.
        """


@dataclass(frozen=True, kw_only=True)
class DetectorContext:
    """Where detectors are loaded, and the data set that some are trained on."""

    device: torch.device | str
    dataset: HeadDataset
    """Real images, with labels of their cameras."""
    cache_dir: Path | None
    """Where networks that were trained are kept, in `detectors/`; None keeps none."""
    seed: int = 0
    """Of training: initial weights, order, augmentation."""
    workers: int = 0
    """Processes that read images; 0 reads in this one."""
    progress: bool = False
    """Whether training and downloads show on stderr."""


def check_request(detector: Detector, images: torch.Tensor, output: Output) -> None:
    """Raise ValueError unless images are uint8 `[B, 3, H, W]` and the detector has the output."""
    name = f"detector {detector.info.name}"
    require(output in detector.outputs, name, f"one of the outputs {', '.join(sorted(detector.outputs))}", output)
    fits = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
    require(fits, f"{name}, images", "uint8 [B, 3, H, W]", f"{images.dtype} {list(images.shape)}")


@contextlib.contextmanager
def detection() -> Iterator[None]:
    """Compute in float32 as it stands, without gradients: TF32 would change the third digit of features on GPUs."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        yield
