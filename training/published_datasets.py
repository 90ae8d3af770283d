"""The data set classes that published training and metric code constructs, over `training.dataset.HeadDataset`.

They are importable from `training.dataset` under their published names, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from training.dataset import HeadDataset
from training.image_reading import open_image
from training.image_sources import open_source
from training.train_config import DataConfig


class CameraLabeledDataset(HeadDataset):
    """Images with camera labels; items are (image, label), or (image, mask, label).

    Args:
        path: folder or zip file of images.
        resolution: side of the images; None is that of the first.
        use_labels: whether there are labels; without, poses are not filtered.
        max_size: use a random subset of this size.
        xflip: add flipped copies.
        random_seed: of the subset.
        min_yaw, max_yaw, max_pitch: limits in degrees, by the published formula; only with labels.
        back_repeat: how many times an image from behind appears.
        mask_path: folder or zip file of masks.

    Differs from the published code: front images are in ascending order; `get_label` gives flipped items the label of
    the flipped camera, as item access does; images without labels can be used; labels have no dimension without
    `use_labels`, but those of items are 25 zeros.
    """

    def __init__(
        self,
        path: str,
        resolution: int | None = None,
        *,
        use_labels: bool = False,
        max_size: int | None = None,
        xflip: bool = False,
        random_seed: int = 0,
        min_yaw: float = 0,
        max_yaw: float = 180,
        max_pitch: float = 90,
        back_repeat: int = 1,
        mask_path: str | None = None,
    ) -> None:
        config = DataConfig(
            images=(path,),
            masks=() if mask_path is None else (mask_path,),
            resolution=_first_side(path) if resolution is None else resolution,
            conditional=use_labels,
            mirror=xflip,
            min_yaw_deg=min_yaw,
            max_yaw_deg=max_yaw,
            max_pitch_deg=max_pitch,
            back_repeat=back_repeat,
            published_angles=True,
            max_images=max_size,
        )
        super().__init__(config, random_seed)

    @property
    def image_shape(self) -> list[int]:
        """Channels, height, width."""
        return [3, self.resolution, self.resolution]

    @property
    def has_labels(self) -> bool:
        """Whether labels are used."""
        return self.config.conditional

    @property
    def label_dim(self) -> int:
        """Numbers in a label; 0 where labels are not used."""
        return self.labels.shape[1] if self.has_labels else 0

    def get_label(self, index: int) -> np.ndarray:
        """Return the label of an item."""
        return self.labels[index].copy()

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Return (image, label), or (image, mask, label)."""
        item = super().__getitem__(index)
        return tuple(item[key] for key in ("image", "mask", "label") if key in item)


class ImageFolderDataset(CameraLabeledDataset):
    """Images, with labels if asked for, of all poses. Arguments as for `CameraLabeledDataset` without limits."""

    def __init__(self, path: str, resolution: int | None = None, **options: Any) -> None:
        # The published pitch is anything near profile, up to 180 degrees.
        super().__init__(path, resolution, max_pitch=180, **options)


class MaskLabeledDataset(CameraLabeledDataset):
    """Images with masks; items are (image, mask, label). Other arguments as for `CameraLabeledDataset`.

    Args:
        img_path: folder or zip file of images.
        seg_path: folder or zip file of masks.
    """

    def __init__(self, img_path: str, seg_path: str, resolution: int | None = None, **options: Any) -> None:
        super().__init__(img_path, resolution, mask_path=seg_path, **options)


def _first_side(path: str) -> int:
    source = open_source(path, "path")
    if not source.names:
        raise ValueError(f"path: expected images in {path}, came none")
    with open_image(source.read(source.names[0])) as image:
        return image.width
