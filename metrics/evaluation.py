"""What is evaluated, and how: the network, the data set, and random choices that nothing but the seed determines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from tqdm import tqdm

from camera_utils import TRAINING_FOCAL, TRAINING_RADIUS, LookAtPoseSampler, camera_label, intrinsics_from_focal
from metrics.detectors import Detector, DetectorContext, load_detector
from metrics.feature_stats import FeatureStats
from metrics.registry import NotApplicable
from metrics.requests import BACK, FRONT, Cameras, ImageSet, YawRange
from torch_utils import distributed
from torch_utils.rng import derive_seed
from training.config import require
from training.dataset import HeadDataset
from training.head_labels import view_angles_deg

if TYPE_CHECKING:
    from training.triplane import TriPlaneGenerator

Mode = Literal["all", "front", "back"]

# Streams of the seed: random choices that must not depend on each other.
_LATENTS, _CAMERAS, _CONDITIONS, _NOISE, _REAL_ORDER = range(5)
# Detectors that are trained on the data do not change with the seed: numbers of several seeds are to have one scale.
_DETECTOR_SEED = 0
_MODE_YAW: dict[Mode, YawRange | None] = {"all": None, "front": FRONT, "back": BACK}
_FRONTAL = 3.14 / 2  # the published scripts' pi


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How a generator is evaluated."""

    seed: int = 0
    """Of latents, cameras, noise and the order of real images; not of detectors that are trained."""
    batch_size: int = 4
    """Images that are rendered at a time. It is part of the result: noise and ray jitter are drawn for each batch."""
    truncation_psi: float = 1.0
    truncation_cutoff: int | None = None
    """How many w-layers are truncated; None is all of them."""
    mode: Mode = "all"
    """Views that metrics without a choice of their own compare (published): all, or those from front or back. `back`
    conditions on the frontal camera and leaves out the learned camera offset."""
    num_yaw_bins: int = 8
    """Into how many ranges metrics over the yaw divide it."""
    detector: str | None = None
    """Of the metrics fd, kd and pr instead of their default, see `metrics.detectors.load_detector`."""
    segmenter: str | None = None
    """Of metrics that need masks of images, see `metrics.segmenter.load_segmenter`; None trains one on the data."""
    vgg: str | None = None
    """TorchScript file of LPIPS, for path lengths; None is the distance that needs no file."""
    workers: int = 1
    """Processes that read real images; 0 reads in this one."""
    render_ahead: bool = False
    """Whether a thread renders the next images while features of the last ones are computed."""
    cache_dir: Path | None = None
    """Where statistics of real images and networks trained on them are kept; None keeps nothing."""
    progress: bool = True
    """Whether bars show how far it is."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", "0 or more", self.seed)
        require(self.batch_size >= 1, "batch", "at least 1", self.batch_size)
        require(math.isfinite(self.truncation_psi), "truncation", "a finite number", self.truncation_psi)
        require(self.mode in _MODE_YAW, "mode", "all, front or back", self.mode)
        require(self.num_yaw_bins >= 2, "yaw bins", "at least 2", self.num_yaw_bins)
        for name in ("detector", "segmenter", "vgg"):
            value = getattr(self, name)
            require(value is None or bool(value.strip()), name, "a name, a path or a URL", value)


class Evaluation:
    """A generator, real images, and everything that metrics share.

    All random choices are functions of the seed and of what they are for: latent i is the same in every metric, and
    nothing depends on the number of processes.

    Args:
        generator: in eval mode, on the device; None where no metric needs generated images.
        dataset: real images with cameras, of the generator's resolution.
        device: where images and features are computed.
        settings: how.

    Raises:
        ValueError: generator and data have different resolutions, or the data have no cameras.
    """

    def __init__(
        self,
        generator: TriPlaneGenerator | None,
        dataset: HeadDataset,
        device: torch.device | str = "cpu",
        settings: EvaluationSettings | None = None,
    ) -> None:
        self.generator, self.dataset, self.device = generator, dataset, torch.device(device)
        self.settings = settings or EvaluationSettings()
        require(dataset.config.conditional, "data", "cameras of the images", "none")
        if generator is not None:
            came = f"{dataset.resolution} px in {', '.join(dataset.config.images)}"
            same = dataset.resolution == generator.img_resolution
            require(same, "data", f"images of {generator.img_resolution} px, as the network makes", came)
        self._detectors: dict[str, Detector] = {}

    # ---- sets of images ----

    def real(self, num_images: int | None = None, yaw: YawRange | None = None) -> ImageSet:
        """Return a set of real images: a random part, or all; without `yaw`, the views of the mode."""
        return ImageSet(kind="real", num_images=num_images, yaw=yaw or _MODE_YAW[self.settings.mode])

    def generated(self, num_images: int, cameras: Cameras = "matched", yaw: YawRange | None = None) -> ImageSet:
        """Return a set of generated images; without `yaw`, with the cameras of the mode."""
        if yaw is None and cameras == "matched" and self.settings.mode == "back":
            cameras = "frontal"
        yaw = yaw or _MODE_YAW[self.settings.mode]
        return ImageSet(kind="generated", num_images=num_images, yaw=yaw, cameras=cameras)

    @cached_property
    def yaw_deg(self) -> np.ndarray:
        """The yaw of every item of the data set, float64 [len]."""
        return view_angles_deg(self.dataset.labels)[:, 0]

    def items(self, images: ImageSet) -> np.ndarray:
        """Return the items of the data set that a set of real images is, in random order: int64 [N]."""
        order = np.random.default_rng(derive_seed(self.settings.seed, _REAL_ORDER)).permutation(len(self.dataset))
        if images.yaw is not None:
            order = order[images.yaw.contains(self.yaw_deg[order])]
        return order[: images.num_images]

    def num_real(self, yaw: YawRange | None = None) -> int:
        """Return how many real images there are in a range; without `yaw`, in the views of the mode."""
        yaw = yaw or _MODE_YAW[self.settings.mode]
        return len(self.dataset) if yaw is None else int(yaw.contains(self.yaw_deg).sum())

    # ---- random choices ----

    def latents(self, indices: np.ndarray) -> torch.Tensor:
        """Return the latents of samples, `[B, z_dim]` on the device; each depends on the seed and its index alone."""
        size = self.generator.z_dim
        rows = [
            np.random.default_rng(derive_seed(self.settings.seed, _LATENTS, int(i))).standard_normal(size)
            for i in indices
        ]
        return torch.from_numpy(np.stack(rows)).to(self.device, torch.float32)

    def cameras(self, images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
        """Return the cameras of a set of generated images: labels to condition on, and to render, float32 [N, 25].

        They are those of real images, drawn with replacement from the set's range of yaws. A longer set of the same
        kind starts with the same cameras.

        Raises:
            NotApplicable: there is no real image in the range.
        """
        candidates = np.arange(len(self.dataset))
        if images.yaw is not None:
            candidates = candidates[images.yaw.contains(self.yaw_deg)]
        if len(candidates) == 0:
            raise NotApplicable(f"the data have no images with {images.yaw}")
        rendering = self.dataset.labels[candidates[self._draw(_CAMERAS, len(candidates), images)]]
        if images.cameras == "random":
            drawn = self._draw(_CONDITIONS, len(self.dataset), images)
            return self.dataset.labels[drawn], rendering
        if images.cameras == "frontal":
            return np.broadcast_to(frontal_label().numpy(), rendering.shape), rendering
        return rendering, rendering

    def _draw(self, stream: int, size: int, images: ImageSet) -> np.ndarray:
        """Return random numbers below `size`, int64 [N]; those of different ranges do not depend on each other."""
        bounds = (-181, 181) if images.yaw is None else (images.yaw.low_deg, images.yaw.high_deg)
        key = (round(bound * 1000) for bound in bounds)
        generator = np.random.default_rng(derive_seed(self.settings.seed, stream, *key))
        # One number at a time is a function of its position; one call for all of them need not be.
        return np.floor(generator.random(images.num_images) * size).astype(np.int64)

    def noise_generator(self, *parts: int) -> torch.Generator:
        """Return a generator of noise on the device, seeded by the seed and `parts`."""
        seed = derive_seed(self.settings.seed, _NOISE, *parts)
        return torch.Generator(self.device).manual_seed(seed % 2**63)

    # ---- work that ranks share ----

    def batches(self, num: int, description: str, size: int | None = None) -> Iterator[np.ndarray]:
        """Yield this rank's batches of 0 ... num - 1, int64 [B], under a progress bar.

        Batch k belongs to rank `k % world_size`: which indices are together does not depend on the number of ranks.
        Without `size`, batches are as large as the settings say.
        """
        size = size or self.settings.batch_size
        starts = range(0, num, size)[distributed.rank() :: distributed.world_size()]
        shown = self.settings.progress and distributed.is_main()
        with tqdm(total=num, desc=description, unit="img", disable=not shown, leave=False) as bar:
            for start in starts:
                yield np.arange(start, min(start + size, num))
                distributed.note_progress()
                bar.update(min(size * distributed.world_size(), num - bar.n))

    def gather(self, indices: np.ndarray, values: torch.Tensor | np.ndarray) -> np.ndarray:
        """Return the rows of all ranks in the order of their indices: float32 [N, K].

        Args:
            indices: int64 [n], of this rank's rows; none may occur twice.
            values: [n, K].
        """
        stats = FeatureStats(moments=False, capture=1 << 62)
        if len(indices):
            stats.add(torch.as_tensor(values), indices)
        stats.reduce()
        return stats.rows()

    def require_finite(self, pictures: torch.Tensor, indices: np.ndarray) -> None:
        """Raise ValueError unless pictures [B, C, H, W] of samples [B] are finite: NaN would look alike everywhere."""
        finite = pictures.isfinite().flatten(1).all(dim=1).cpu().numpy()
        if not finite.all():
            raise ValueError(
                f"network: expected finite pixel values, came NaN or infinity in sample {indices[~finite][0]} of seed "
                f"{self.settings.seed}"
            )

    def load_detector(self, name: str) -> Detector:
        """Return a detector, loaded or trained at the first call; collective."""
        if name not in self._detectors:
            self._detectors[name] = load_detector(name, self.detector_context)
        return self._detectors[name]

    def use_detectors(self, detectors: Mapping[str, Detector]) -> None:
        """Take detectors that are there already, by the names that metrics ask for."""
        self._detectors |= detectors

    @property
    def detector_context(self) -> DetectorContext:
        """What loading or training a detector needs."""
        settings = self.settings
        return DetectorContext(
            device=self.device,
            dataset=self.dataset,
            cache_dir=settings.cache_dir,
            seed=_DETECTOR_SEED,
            workers=settings.workers,
            progress=settings.progress,
        )


def frontal_label() -> torch.Tensor:
    """Return the label `[1, 25]` of the camera straight in front, as the published scripts write it."""
    pose = LookAtPoseSampler.sample(_FRONTAL, _FRONTAL, torch.zeros(3), radius=TRAINING_RADIUS)
    return camera_label(pose, intrinsics_from_focal(TRAINING_FOCAL))
