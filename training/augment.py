"""Augmentation of what the discriminator sees, with adaptive strength (Karras et al. 2020, ADA).

Real and generated images are augmented alike. The generator then still learns images that are not augmented, as long as
their distribution can be told from that of augmented ones, which holds up to a strength p of about 0.8 (section 2.2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import nn

from torch_utils.ops.upfirdn2d import setup_filter
from training import augment_transforms as transforms
from training.augment_resampling import (
    HAAR_CENTRE,
    HAAR_TAPS,
    SYM6_CENTRE,
    SYM6_TAPS,
    Margins,
    Resampler,
    published_margins,
    resample,
)
from training.config import require
from training.train_config import AugmentConfig

_IMAGES = ("image", "image_raw")
_MAPS = ("image_mask", "image_parsing")


@dataclass(frozen=True, kw_only=True)
class AugmentOptions:
    """Which augmentations there are, and how strong. Names and numbers are the published ones.

    Each of the first twelve is multiplied by the strength `p` of the pipe and is the probability of that augmentation;
    0 leaves it out.
    """

    xflip: float = 1.0
    """Left and right exchanged, in half of the cases. The camera label stays, see `AugmentPipe`."""
    rotate90: float = 1.0
    """Rotation by 0, 90, 180 or 270 degrees."""
    xint: float = 1.0
    """Translation by whole pixels."""
    scale: float = 1.0
    rotate: float = 1.0
    """Rotation by any angle, before or after the anisotropic scaling, or both."""
    aniso: float = 1.0
    """Scaling of x by a factor and of y by its inverse."""
    xfrac: float = 1.0
    """Translation by fractions of pixels."""
    brightness: float = 1.0
    contrast: float = 1.0
    lumaflip: float = 1.0
    """Light and dark exchanged with hue and saturation kept, in half of the cases."""
    hue: float = 1.0
    saturation: float = 1.0
    xint_max: float = 0.125
    """Largest translation by whole pixels, as a share of the image's side."""
    scale_std: float = 0.2
    """Standard deviation of log2 of the scale."""
    rotate_max: float = 1.0
    """Largest rotation, in units of 180 degrees."""
    aniso_std: float = 0.2
    """Standard deviation of log2 of the anisotropic scale."""
    xfrac_std: float = 0.125
    """Standard deviation of the translation, as a share of the image's side."""
    brightness_std: float = 0.2
    contrast_std: float = 0.5
    """Standard deviation of log2 of the contrast."""
    hue_max: float = 1.0
    """Largest rotation of the hue, in units of 180 degrees."""
    saturation_std: float = 1.0
    """Standard deviation of log2 of the saturation."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            require(0 <= value < math.inf, f"augmentation {field.name}", "a finite number, 0 or more", value)


class Transforms(NamedTuple):
    """What happens to each image of a batch."""

    inverse: torch.Tensor | None
    """`[B, 3, 3]`, from the augmented to the given image, in pixels of an image of `size`, x right and y down, with the
    middle as origin. None leaves places alone."""
    colour: torch.Tensor | None
    """`[B, 4, 4]` on (red, green, blue, 1). None leaves colours alone."""
    flipped: torch.Tensor
    """bool `[B]`: whether left and right are exchanged."""
    size: tuple[int, int]
    """(height, width)."""


class AugmentPipe(nn.Module):
    """Augment batches of images together with their raw images, masks and parsing maps.

    All entries go through the same geometric transformation, each at its own size; `image` and `image_raw` also through
    the same colour transformation. Images are resampled with the sym6 filter as published. Masks and parsing maps are
    resampled with box filters, whose taps are not negative and add up to 1: values stay in [0, 1] without clamping
    (which would stop gradients) and soft one-hot maps keep adding up to 1. Outside the borders everything is reflected,
    maps too, so that a reflected piece of a head is marked as head. At p = 0 images come back as they are, to rounding.

    The buffer `p` is the strength; it is a tensor that the host never reads. Random numbers come from the default
    generator of its device, for each augmentation in the order of `AugmentOptions`: first the parameter, then
    U[0, 1) < strength * p, each per sample.

    Camera labels stay, as published: of a flipped left profile the label says right, in up to half of the cases. A
    generator learns the right side all the same while p < 1, but a discriminator that judges views is taught wrong
    ones. `draw` says what is flipped: `where(flipped[:, None], mirror_label(c), c)` is right, with `apply_transforms`.
    Or leave flips out (`xflip=0`). Rotations stand for cameras that are rolled, which labels do not say either.

    Differs from the published code:
        * It took one tensor (image and resized raw image, six channels) and resampled the raw image at full size, which
          blurs it, also at p = 0. Here raw images keep their pixels. `published_resampling` does as published.
        * It padded images by as much as the batch needs, for which it waits for the device, reflected at the middles of
          the outermost pixels, with zeros beyond one reflection. Here sampling positions are reflected, for ever, at
          the edges, which lie at the same place for every size. Where a place is inside the image nothing differs.
          `published_resampling` pads.
        * Image-space filters, noise and cutout, which were switched off, are left out, and with them `Hz_fbank`.
        * Augmentations that are not named are on with strength 1, as in the published training command; they were off.

    Args:
        published_resampling: resample as published; waits for the device at every call.
        **options: fields of `AugmentOptions`.

    Raises:
        TypeError: for an unknown option.
        ValueError: for a negative one.
    """

    p: torch.Tensor
    Hz_geom: torch.Tensor
    map_filter: torch.Tensor

    def __init__(self, published_resampling: bool = False, **options: float) -> None:
        super().__init__()
        self.options = AugmentOptions(**options)
        self.published_resampling = published_resampling
        self.register_buffer("p", torch.ones([]))
        self.register_buffer("Hz_geom", setup_filter(SYM6_TAPS))
        self.register_buffer("map_filter", setup_filter(HAAR_TAPS), persistent=False)

    @overload
    def forward(self, images: torch.Tensor) -> torch.Tensor: ...

    @overload
    def forward(self, images: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...

    def forward(self, images: torch.Tensor | Mapping[str, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor]:
        """Draw transformations and apply them.

        Args:
            images: `image` `[B, 3, H, W]`, and any of `image_raw` `[B, 3, ., .]`, `image_mask` `[B, 1, ., .]` and
                `image_parsing` `[B, classes, ., .]`, of any size in the same proportion. A tensor `[B, C, H, W]`, with
                C a multiple of 3, is taken as images stacked along the channels.

        Returns:
            The same, augmented. Colours may leave [-1, 1]; masks and maps stay in [0, 1].

        Raises:
            ValueError: for a missing or unknown entry, or one of another proportion or batch.
        """
        if isinstance(images, torch.Tensor):
            return self.forward({"image": images})["image"]
        require("image" in images, "augmented images", "an entry 'image'", sorted(images))
        batch, _, height, width = images["image"].shape
        return self.apply_transforms(images, self.draw(batch, (height, width)))

    def draw(self, batch: int, size: tuple[int, int]) -> Transforms:
        """Draw the transformations of `batch` images whose `image` has `size` (height, width)."""
        inverse, flipped = self._draw_geometry(batch, size)
        colour = self._draw_colour(batch)
        return Transforms(inverse, colour, flipped, size)

    def apply_transforms(self, images: Mapping[str, torch.Tensor], drawn: Transforms) -> dict[str, torch.Tensor]:
        """Transform images, see `forward`."""
        for name, image in images.items():
            _check_entry(name, image, images["image"])
        if self.published_resampling and "image_raw" in images:
            return self._apply_stacked(images, drawn)
        augmented = dict(images)
        if drawn.inverse is not None:
            augmented = {name: self._resampled(name, image, drawn) for name, image in augmented.items()}
        if drawn.colour is not None:
            for name in _IMAGES:
                if name in augmented:
                    augmented[name] = transforms.transform_colour(augmented[name], drawn.colour)
        return augmented

    def _apply_stacked(self, images: Mapping[str, torch.Tensor], drawn: Transforms) -> dict[str, torch.Tensor]:
        """Transform the raw image as further channels of `image`."""
        image, raw = images["image"], images["image_raw"]

        def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False, antialias=True)

        others = {name: entry for name, entry in images.items() if name != "image_raw"}
        stacked = {**others, "image": torch.cat([image, resized(raw, image)], dim=1)}
        augmented = self.apply_transforms(stacked, drawn)
        augmented["image"], raw_enlarged = augmented["image"].split([image.shape[1], raw.shape[1]], dim=1)
        augmented["image_raw"] = resized(raw_enlarged, raw)
        return {name: augmented[name] for name in images}

    def _resampled(self, name: str, image: torch.Tensor, drawn: Transforms) -> torch.Tensor:
        is_map = name in _MAPS
        resampler = Resampler(self.map_filter, HAAR_CENTRE) if is_map else Resampler(self.Hz_geom, SYM6_CENTRE)
        size = (image.shape[2], image.shape[3])
        # The linear part is free of units; translations are in pixels of an image of the size drawn for.
        inverse = drawn.inverse
        if size != drawn.size:
            ratio = size[1] / drawn.size[1]
            inverse = torch.cat([inverse[:, :, :2], inverse[:, :, 2:] * ratio], dim=2)
        margins: Margins | None = None
        if self.published_resampling:
            margins = published_margins(inverse, size, self.Hz_geom.shape[0])
        precise = image if image.dtype in (torch.float32, torch.float64) else image.float()  # places need the bits
        return resample(precise, inverse, resampler, margins).to(image.dtype)

    def _gated(self, probability: torch.Tensor | float, value: torch.Tensor, identity: float) -> torch.Tensor:
        """Keep the rows of `value` [B, ...] with the given probability, and make the others the identity."""
        shape = [value.shape[0]] + [1] * (value.ndim - 1)
        return torch.where(torch.rand(shape, device=value.device) < probability, value, identity)

    def _draw_geometry(self, batch: int, size: tuple[int, int]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Draw `Transforms.inverse` and `Transforms.flipped`."""
        exact, flipped = self._draw_moves_to_pixels(batch, size)
        factors = exact + self._draw_moves_between_pixels(batch, size)
        if not factors:
            return None, flipped
        # Factors of the inverse stand from left to right: the first augmentation is undone last.
        return functools.reduce(transforms.compose, factors), flipped

    def _draw_moves_to_pixels(self, batch: int, size: tuple[int, int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Draw the inverses of augmentations that exchange pixels of `image`, and which images are flipped."""
        o, device = self.options, self.p.device
        flipped = torch.zeros(batch, dtype=torch.bool, device=device)
        factors = []
        if o.xflip > 0:
            flip = self._gated(o.xflip * self.p, (torch.rand(batch, device=device) * 2).floor(), 0.0)
            flipped = flip > 0
            factors.append(transforms.scaling_2d(1 - 2 * flip, torch.ones_like(flip)))
        if o.rotate90 > 0:
            quarters = self._gated(o.rotate90 * self.p, (torch.rand(batch, device=device) * 4).floor(), 0.0)
            factors.append(transforms.rotation_2d(quarters * (math.pi / 2)))
        if o.xint > 0:
            shares = (torch.rand(batch, 2, device=device) * 2 - 1) * o.xint_max
            x, y = self._gated(o.xint * self.p, shares, 0.0).unbind(1)
            factors.append(transforms.translation_2d(-(x * size[1]).round(), -(y * size[0]).round()))
        return factors, flipped

    def _draw_moves_between_pixels(self, batch: int, size: tuple[int, int]) -> list[torch.Tensor]:
        """Draw the inverses of augmentations that interpolate."""
        o, device = self.options, self.p.device
        factors = []
        if o.scale > 0:
            scale = self._gated(o.scale * self.p, self._log_normal(batch, o.scale_std), 1.0)
            factors.append(transforms.scaling_2d(1 / scale, 1 / scale))
        if o.rotate > 0:
            factors.append(self._draw_rotation(batch))
        if o.aniso > 0:
            scale = self._gated(o.aniso * self.p, self._log_normal(batch, o.aniso_std), 1.0)
            factors.append(transforms.scaling_2d(1 / scale, scale))
        if o.rotate > 0:
            factors.append(self._draw_rotation(batch))
        if o.xfrac > 0:
            shares = torch.randn(batch, 2, device=device) * o.xfrac_std
            x, y = self._gated(o.xfrac * self.p, shares, 0.0).unbind(1)
            factors.append(transforms.translation_2d(-x * size[1], -y * size[0]))
        return factors

    def _log_normal(self, batch: int, std: float) -> torch.Tensor:
        return torch.exp2(torch.randn(batch, device=self.p.device) * std)

    def _draw_rotation(self, batch: int) -> torch.Tensor:
        """Draw one of two rotations; the probability that there is any is rotate * p."""
        probability = 1 - (1 - self.options.rotate * self.p).clamp(0, 1).sqrt()
        angle_rad = (torch.rand(batch, device=self.p.device) * 2 - 1) * (math.pi * self.options.rotate_max)
        return transforms.rotation_2d(self._gated(probability, angle_rad, 0.0))

    def _draw_colour(self, batch: int) -> torch.Tensor | None:
        """Draw `Transforms.colour`."""
        o, device = self.options, self.p.device
        factors = []
        if o.brightness > 0:
            offset = torch.randn(batch, device=device) * o.brightness_std
            factors.append(transforms.brightness(self._gated(o.brightness * self.p, offset, 0.0)))
        if o.contrast > 0:
            factor = self._log_normal(batch, o.contrast_std)
            factors.append(transforms.contrast(self._gated(o.contrast * self.p, factor, 1.0)))
        if o.lumaflip > 0:
            flip = (torch.rand(batch, device=device) * 2).floor()
            factors.append(transforms.luma_flip(self._gated(o.lumaflip * self.p, flip, 0.0)))
        if o.hue > 0:
            angle_rad = (torch.rand(batch, device=device) * 2 - 1) * (math.pi * o.hue_max)
            factors.append(transforms.hue_rotation(self._gated(o.hue * self.p, angle_rad, 0.0)))
        if o.saturation > 0:
            factor = self._log_normal(batch, o.saturation_std)
            factors.append(transforms.saturation(self._gated(o.saturation * self.p, factor, 1.0)))
        if not factors:
            return None
        return functools.reduce(lambda colour, factor: transforms.compose(factor, colour), factors)


def _check_entry(name: str, entry: torch.Tensor, image: torch.Tensor) -> None:
    require(name in _IMAGES + _MAPS, "augmented images", f"entries {', '.join(_IMAGES + _MAPS)}", name)
    require(entry.ndim == 4 and len(entry) == len(image), f"augmented '{name}'", f"{len(image)} images", entry.shape)
    proportional = entry.shape[2] * image.shape[3] == entry.shape[3] * image.shape[2]
    require(proportional, f"augmented '{name}'", f"the proportion of {tuple(image.shape)}", tuple(entry.shape))


def make_augment_pipe(config: AugmentConfig, **options: float) -> AugmentPipe | None:
    """Make the pipe of a training run, with p at its start: 0 for `ada`, `config.p` for `fixed`; None for `noaug`."""
    if config.mode == "noaug":
        return None
    pipe = AugmentPipe(**options)
    pipe.p.fill_(config.p if config.mode == "fixed" else 0.0)
    return pipe


def adjust_p(p: torch.Tensor, mean_sign: torch.Tensor, target: float, num_images: int, ada_kimg: float) -> torch.Tensor:
    """Move the strength of the augmentation towards where the discriminator overfits as much as is wanted.

    p <- max(p + sign(mean_sign - target) num_images / (1000 ada_kimg), 0), on the device (Karras et al. 2020, equation
    1: r_t). There is no upper limit, as published: above 1 all augmentations happen always.

    Args:
        p: strength, a scalar tensor.
        mean_sign: mean of sign(D(real)) since the last adjustment, over all processes. Not a number, as the mean of
            nothing is, leaves p.
        target: what `mean_sign` is held at.
        num_images: images since the last adjustment.
        ada_kimg: thousand images in which p can go from 0 to 1.

    Returns:
        The new p, without a wait for the device: `pipe.p.copy_(adjust_p(pipe.p, ...))`.
    """
    direction = (mean_sign - target).sign().to(p)  # 0 where it is not a number
    return (p + direction * (num_images / (1000 * ada_kimg))).clamp(min=0)
