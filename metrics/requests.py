"""What metrics ask for: statistics of the output of a detector over a set of images.

Metrics name what they need; `metrics.stats_pipeline` computes it, every image and every feature once, however many
metrics share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from training.config import require

Cameras = Literal["matched", "random", "frontal"]
Output = Literal["features", "probabilities", "directions"]


@dataclass(frozen=True, kw_only=True)
class YawRange:
    """Views whose yaw lies in `low_deg <= yaw < high_deg`; a bound of 180 belongs to it."""

    low_deg: float
    high_deg: float
    absolute: bool = False
    """Whether the absolute yaw is meant."""

    def __post_init__(self) -> None:
        least = 0 if self.absolute else -180
        require(least <= self.low_deg < self.high_deg <= 180, "yaw range", f"{least} <= low < high <= 180", self)

    def contains(self, yaw_deg: np.ndarray) -> np.ndarray:
        """Return which yaws lie in the range: bool, of the same shape."""
        yaw_deg = np.abs(yaw_deg) if self.absolute else yaw_deg
        return (yaw_deg >= self.low_deg) & (yaw_deg < (np.inf if self.high_deg == 180 else self.high_deg))

    def __str__(self) -> str:
        """Say it in words, such as `an absolute yaw of 90 to 180 degrees`."""
        return f"{'an absolute' if self.absolute else 'a'} yaw of {self.low_deg:g} to {self.high_deg:g} degrees"

    @property
    def middle_deg(self) -> float:
        """The middle of the range."""
        return (self.low_deg + self.high_deg) / 2


FRONT = YawRange(low_deg=0, high_deg=90, absolute=True)
BACK = YawRange(low_deg=90, high_deg=180, absolute=True)


def yaw_bins(num_bins: int) -> tuple[YawRange, ...]:
    """Return equal ranges that cover all yaws, the front in the middle of one of them if their number is odd."""
    require(num_bins >= 1, "yaw bins", "at least 1", num_bins)
    edges = np.linspace(-180, 180, num_bins + 1).tolist()
    return tuple(YawRange(low_deg=low, high_deg=high) for low, high in zip(edges, edges[1:]))


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images that statistics are computed of."""

    kind: Literal["real", "generated"]
    num_images: int | None = None
    """How many; of real ones a random part of that size, None for all of them."""
    yaw: YawRange | None = None
    """The views in it: of real images those that were taken from there, of generated ones those with cameras of such
    real images. None is all."""
    cameras: Cameras = "matched"
    """Of generated images. `matched`: the network is conditioned on the camera that renders. `random`: on another one,
    drawn independently. `frontal`: on the frontal camera, and no learned camera offset (published mode `back`)."""

    def __post_init__(self) -> None:
        real = self.kind == "real"
        require(not real or self.cameras == "matched", "image set", "no choice of cameras for real images", self)
        require(real or self.num_images is not None, "image set", "a number of generated images", self)
        require(self.num_images is None or self.num_images >= 1, "image set", "at least 1 image", self)


@dataclass(frozen=True, kw_only=True)
class StatsRequest:
    """Statistics of a detector's output over a set of images."""

    images: ImageSet
    detector: str
    """As `metrics.detectors.load_detector` takes it."""
    output: Output = "features"
    moments: bool = False
    """Whether mean and covariance are needed."""
    capture: int | None = None
    """How many rows are needed themselves, at most: those of the first images of the set; None is none."""
