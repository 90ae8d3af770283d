"""Small evaluations: a few images, a stand-in generator, and a detector that is a formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from metrics.detector_interface import DetectorInfo
from metrics.evaluation import Evaluation, EvaluationSettings
from tests.helpers.head_data import HeadFiles
from training.dataset import HeadDataset


class MeanColors:
    """A detector: means of the colours, and of the left and the right half, in [0, 255]."""

    outputs = frozenset({"features"})
    key = "c0105"
    info = DetectorInfo(name="colours", resize="none", sha256=None, source="tests")

    def __init__(self) -> None:
        self.num_images = 0
        """Images that it has seen."""

    def __call__(self, images: torch.Tensor, output: str) -> torch.Tensor:
        """Return `[B, 5]`."""
        assert images.dtype == torch.uint8 and output == "features"
        self.num_images += len(images)
        pixels = images.float()
        half = images.shape[3] // 2
        halves = [pixels[..., :half].mean(dim=(1, 2, 3)), pixels[..., half:].mean(dim=(1, 2, 3))]
        return torch.cat([pixels.mean(dim=(2, 3)), torch.stack(halves, dim=1)], dim=1)


def tiny_evaluation(
    folder: Path,
    generator: Any = None,
    count: int = 12,
    side: int = 8,
    *,
    yaw_deg: list[float] | None = None,
    detectors: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **settings: Any,
) -> Evaluation:
    """Return an evaluation on `count` flat images all around, whose red tells their number.

    Args:
        folder: for the files of the data set, made if absent.
        generator: None has no generated images.
        count: images.
        side: of the images, pixels.
        yaw_deg: of the cameras; None is all around.
        detectors: by name, in place of those that would be loaded.
        data: fields of the data configuration.
        **settings: fields of `EvaluationSettings`.
    """
    folder.mkdir(exist_ok=True)
    config = HeadFiles(count, yaw_deg, side).write(folder, zipped=True, **(data or {}))
    quiet = {"progress": False, "workers": 0, **settings}
    evaluation = Evaluation(generator, HeadDataset(config), "cpu", EvaluationSettings(**quiet))
    evaluation.use_detectors({"colours": MeanColors(), **(detectors or {})})
    return evaluation
