"""The detector `view`, which needs no download: it learns from the real images how heads look from where."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional

from metrics.data_training import TrainedNetwork, TrainingPlan, apply_in_batches, conv_block, trained_network
from metrics.detector_interface import DetectorContext, DetectorInfo, check_request, detection
from metrics.directions import angle_deg, view_directions, yaw_of
from metrics.registry import NotApplicable
from metrics.requests import Output
from metrics.training_examples import Examples, resize_name, shrink, to_float
from training.config import require

_MIN_SPREAD_DEG = 5.0
_NUM_YAW_BINS = 24
_FAR_OFF_DEG = 30.0
_BEHIND_DEG, _FRONTAL_DEG = 120.0, 60.0
_TEXTURE_BLOCKS = 3  # of those with the most pixels; standard deviations are about texture
_FEATURE_EPS = 1e-8  # under the root of a variance


class ViewNetwork(torch.nn.Module):
    """A small convolutional network from images to viewing directions.

    Convolutions with stride 2 down to 4 x 4 pixels, two more in between, and one linear layer that sees where in the
    image everything is; 0.3 million parameters.

    Args:
        size: side of the images in pixels, 32 or 64.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        require(size in (32, 64), "view network, size", "32 or 64 pixels", size)
        blocks = [conv_block(3, 16, size // 32), conv_block(16, 32, 2), conv_block(32, 64, 2)]
        blocks += [conv_block(64, 64), conv_block(64, 128, 2), conv_block(128, 128)]
        self.blocks = torch.nn.ModuleList(blocks)
        self.direction = torch.nn.Linear(128 * 4 * 4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return directions `[B, 3]` of images `[B, 3, S, S]` in [-1, 1]; their length is up to 1 by certainty."""
        return self.direction(self.activations(images)[-1].flatten(1))

    def activations(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return what every block makes of images."""
        out = []
        for block in self.blocks:
            images = block(images)
            out.append(images)
        return out


class ViewTask:
    """Learn directions by their squared error: its best answer where two are possible is one of length below 1."""

    name = "view"
    needs_masks = False

    def __init__(self, plan: TrainingPlan | None = None) -> None:
        self.plan = plan or TrainingPlan()

    def build(self, size: int) -> ViewNetwork:
        """Return a network with random weights."""
        return ViewNetwork(size)

    def sampling_weights(self, examples: Examples) -> torch.Tensor:
        """Return weights by which yaws with few images come more often: one over the root of how many are alike.

        Most portraits are frontal, and metrics ask about the back as well.
        """
        yaw = torch.atan2(examples.directions[:, 0], examples.directions[:, 2]) / (2 * math.pi) + 0.5
        bins = (yaw * _NUM_YAW_BINS).long().clamp(max=_NUM_YAW_BINS - 1)
        return torch.bincount(bins, minlength=_NUM_YAW_BINS)[bins].double().rsqrt()

    def loss(self, network: torch.nn.Module, batch: Examples, images: torch.Tensor) -> torch.Tensor:
        """Return the mean squared distance of directions."""
        return (network(images) - batch.directions).square().sum(1).mean()

    def evaluate(self, network: torch.nn.Module, examples: Examples) -> dict[str, float]:
        """Return the angular errors, and how often a view from behind is taken for a frontal one.

        Returns:
            `median_deg`, `mean_deg`; `above_30_deg`, a share; and if there are views with an absolute yaw of at least
            120 degrees, `back_taken_for_front`: the share of them whose predicted one is below 60.
        """
        predicted = apply_in_batches(lambda images: predict_directions(network, images), examples.images).numpy()
        wanted = examples.directions.numpy()
        error_deg = angle_deg(predicted, wanted)
        report = {
            "median_deg": float(np.median(error_deg)),
            "mean_deg": float(error_deg.mean()),
            "above_30_deg": float((error_deg > _FAR_OFF_DEG).mean()),
        }
        behind = np.abs(yaw_of(wanted)) >= _BEHIND_DEG
        if behind.any():
            frontal = np.abs(yaw_of(predicted[behind])) < _FRONTAL_DEG
            report["back_taken_for_front"] = float(frontal.mean())
        return report


class ViewDetector:
    """Says from where a head is seen, and describes images by the layers that find it out.

    Outputs:
        `directions` `[B, 3]`: unit vectors in world axes, from the head to the camera, +z in front of the face; yaw is
        `atan2(x, z)`, pitch `atan2(y, hypot(x, z))`.

        `features` `[B, 352]`: mean and standard deviation over the pixels of each channel of the first three layers,
        and mean over the pixels of each channel of the last one. What these are good for is comparing networks on the
        same data: they see colours, edges, texture and the parts of a head that tell where its front is. What they are
        not: features of a large network that was trained on millions of pictures. A Frechet distance of them sees
        nothing below a sixty-fourth of the image, knows little about what makes a face look real, and has a scale of
        its own on every data set. It is no estimate of the published FID.
    """

    outputs: frozenset[Output] = frozenset({"directions", "features"})

    def __init__(self, trained: TrainedNetwork, source: str) -> None:
        self._network, self._size, self.key = trained.network, trained.size, trained.key
        self.info = DetectorInfo(
            name=f"view (trained on this data: {trained.num_images} images)",
            resize=resize_name(trained.size),
            sha256=None,
            source=source,
            held_out=trained.held_out,
        )

    def __call__(self, images: torch.Tensor, output: Output) -> torch.Tensor:
        """Return the output for each image, see the class and `metrics.detectors.Detector`."""
        check_request(self, images, output)
        with detection():
            images = to_float(shrink(images, self._size)).contiguous(memory_format=torch.channels_last)
            if output == "directions":
                return predict_directions(self._network, images)
            return _statistics(self._network.activations(images))


def predict_directions(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return unit vectors `[B, 3]` for images `[B, 3, S, S]` in [-1, 1]: by them and their mirror images.

    With the mean of both, left and right are alike, and errors smaller by a tenth.
    """
    mirrored = network(images.flip(3)) * images.new_tensor([-1.0, 1.0, 1.0])
    return functional.normalize(network(images) + mirrored, dim=1)


def load_view_detector(context: DetectorContext, plan: TrainingPlan | None = None) -> ViewDetector:
    """Return the detector for the data set of the context, trained now or taken from the cache; collective.

    Args:
        context: where, and on what.
        plan: how long to train; None is the usual one.

    Raises:
        NotApplicable: fewer than 64 images, or all cameras on the same side of the head.
        ValueError: no cameras.
    """
    dataset = context.dataset
    where = ", ".join(dataset.config.images)
    require(dataset.config.conditional, "detector view, data", "cameras of the images", "none")
    directions = view_directions(dataset.labels)
    middle = directions.mean(axis=0, keepdims=True)
    # Without a middle, cameras are all around.
    spread_deg = angle_deg(directions, middle).mean() if np.linalg.norm(middle) > 1e-9 else 90.0
    if spread_deg < _MIN_SPREAD_DEG:
        raise NotApplicable(
            f"detector view needs cameras all around, or at least {_MIN_SPREAD_DEG:g} degrees from their middle on "
            f"average, and those of the data are {spread_deg:.2f} degrees from it"
        )
    return ViewDetector(trained_network(ViewTask(plan), context), where)


def _statistics(activations: list[torch.Tensor]) -> torch.Tensor:
    """Return means and standard deviations of the first blocks, and means of the last: [B, F]."""
    parts = []
    for activation in activations[:_TEXTURE_BLOCKS]:
        variance, mean = torch.var_mean(activation, (2, 3), correction=0)
        parts += [mean, (variance + _FEATURE_EPS).sqrt()]
    return torch.cat([*parts, activations[-1].mean((2, 3))], 1)
