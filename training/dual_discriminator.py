"""Camera-conditioned residual discriminators over stacked inputs: one network, a table of published variants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from torch_utils.ops.upfirdn2d import downsample2d, setup_filter, upsample2d
from training.config import Architecture, DiscriminatorConfig, MappingConfig, require
from training.layers import RESAMPLE_TAPS, Conv2dLayer, FullyConnectedLayer
from training.networks_stylegan2 import SQRT_HALF, MappingNetwork
from training.view_head import ViewHead

_LOWEST_BLOCK = 8
_RAW_FADE_STEP = 32 / 500_000  # DummyDual: the raw image is faded out over 500k images in batches of 32


class DiscriminatorVariant(NamedTuple):
    """How one published discriminator assembles its input."""

    stacked: tuple[str, ...]
    """Images that are resized to the input resolution and stacked, in this order."""
    mask_tower: bool = False
    """A second tower of blocks sees the mask; both meet at 4 x 4."""
    fades_raw: bool = False
    """The raw image is faded out as training goes on."""
    has_filter_buffer: bool = True
    """Whether checkpoints hold a `resample_filter` at the top of the module."""


VARIANTS = {
    "SingleDiscriminator": DiscriminatorVariant(("image",), has_filter_buffer=False),
    "DualDiscriminator": DiscriminatorVariant(("image", "image_raw")),
    "DummyDualDiscriminator": DiscriminatorVariant(("image", "image_raw"), fades_raw=True),
    "MaskDualDiscriminator": DiscriminatorVariant(("image", "image_raw"), mask_tower=True),
    "MaskDualDiscriminatorV2": DiscriminatorVariant(("image", "image_raw", "image_mask")),
    "HoloDiscriminator": DiscriminatorVariant(("image", "image_raw", "image_mask", "image_parsing")),
}


def filtered_resizing(x: torch.Tensor, size: int, fir: torch.Tensor, mode: str | float = "antialiased") -> torch.Tensor:
    """Resize images `[B, C, H, W]` to `size` x `size`.

    Args:
        x: images.
        size: side of the result, in pixels.
        fir: `[4, 4]` filter of the mode 'classic'.
        mode: 'antialiased' (bilinear with antialiasing); 'none' (bilinear without); 'classic' (FIR upsampling,
            bilinear to a little over twice the size, FIR downsampling); or a number in (0, 1), the share of
            'antialiased' in a blend with 'none'.
    """

    def bilinear(image: torch.Tensor, side: int, antialias: bool) -> torch.Tensor:
        return F.interpolate(image, size=(side, side), mode="bilinear", align_corners=False, antialias=antialias)

    if mode == "antialiased" or mode == "none":
        return bilinear(x, size, antialias=mode == "antialiased")
    if mode == "classic":
        enlarged = bilinear(upsample2d(x, fir), 2 * size + 2, antialias=False)
        return downsample2d(enlarged, fir, padding=-1)
    require(isinstance(mode, float) and 0 < mode < 1, "mode", "'antialiased', 'classic', 'none' or in (0, 1)", mode)
    return torch.lerp(bilinear(x, size, antialias=False), bilinear(x, size, antialias=True), mode)


class DiscriminatorBlock(nn.Module):
    """One resolution of a discriminator; halves it.

    Args:
        in_channels: 0 for the first block, which reads the image.
        tmp_channels: features at this resolution.
        out_channels: features at half of it.
        resolution: side of the input.
        img_channels: channels of the input image.
        first_layer_idx: layers before this block, for Freeze-D.
        config: architecture, clamp, frozen layers.
        use_fp16: half precision on CUDA.
    """

    def __init__(
        self,
        in_channels: int,
        tmp_channels: int,
        out_channels: int,
        resolution: int,
        img_channels: int,
        first_layer_idx: int,
        config: DiscriminatorConfig,
        use_fp16: bool,
    ) -> None:
        super().__init__()
        self.in_channels, self.resolution, self.img_channels = in_channels, resolution, img_channels
        self.architecture: Architecture = config.architecture
        self.use_fp16, self.half_dtype = use_fp16, getattr(torch, config.half_precision)
        self.register_buffer("resample_filter", setup_filter(RESAMPLE_TAPS))
        self.num_layers = 0
        clamp = config.conv_clamp

        def trainable() -> bool:
            self.num_layers += 1
            return first_layer_idx + self.num_layers > config.freeze_layers

        if in_channels == 0 or self.architecture == "skip":
            self.fromrgb = Conv2dLayer(
                img_channels, tmp_channels, 1, activation="lrelu", conv_clamp=clamp, trainable=trainable()
            )
        self.conv0 = Conv2dLayer(
            tmp_channels, tmp_channels, 3, activation="lrelu", conv_clamp=clamp, trainable=trainable()
        )
        self.conv1 = Conv2dLayer(
            tmp_channels, out_channels, 3, activation="lrelu", down=2, conv_clamp=clamp, trainable=trainable()
        )
        if self.architecture == "resnet":
            self.skip = Conv2dLayer(tmp_channels, out_channels, 1, bias=False, down=2, trainable=trainable())

    def forward(
        self, x: torch.Tensor | None, img: torch.Tensor | None, force_fp32: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return features `[B, out, R / 2, R / 2]` and, in the skip architecture, the image at half size."""
        source = img if x is None else x
        half = self.use_fp16 and not force_fp32 and source.device.type == "cuda"
        dtype = self.half_dtype if half else self.conv0.weight.dtype
        x = None if x is None else x.to(dtype)
        if self.in_channels == 0 or self.architecture == "skip":
            img = img.to(dtype)
            rgb = self.fromrgb(img)
            x = rgb if x is None else x + rgb
            img = downsample2d(img, self.resample_filter) if self.architecture == "skip" else None
        if self.architecture == "resnet":
            shortcut = self.skip(x, gain=SQRT_HALF)
            return shortcut + self.conv1(self.conv0(x), gain=SQRT_HALF), img
        return self.conv1(self.conv0(x)), img


class MinibatchStdLayer(nn.Module):
    """Append the standard deviation over groups of the batch as channels (Karras et al. 2018).

    Members of a group are strided: with `n = B / group_size` groups, samples j, n + j, 2 n + j, ... share a statistic.
    """

    def __init__(self, group_size: int | None, num_channels: int = 1) -> None:
        super().__init__()
        self.group_size, self.num_channels = group_size, num_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, C, H, W]` to `[B, C + num_channels, H, W]`; B must be a multiple of the group size (or smaller)."""
        batch, _, height, width = x.shape
        require(batch >= 1, "batch size", "at least 1", batch)
        size = batch if self.group_size is None else min(self.group_size, batch)
        require(batch % size == 0, "batch size", f"a multiple of the minibatch-std group size {size}", batch)
        groups = x.reshape(size, -1, self.num_channels, x.shape[1] // self.num_channels, height, width)
        variance = groups.var(dim=0, correction=0)
        deviation = (variance + 1e-8).sqrt().mean(dim=(2, 3, 4))  # [n, F]
        statistic = deviation.repeat(size, 1)[:, :, None, None].expand(-1, -1, height, width)
        return torch.cat([x, statistic], dim=1)


class DiscriminatorEpilogue(nn.Module):
    """The last block, at 4 x 4: features to a logit, projected on the label embedding if there is one."""

    def __init__(self, in_channels: int, cmap_dim: int, img_channels: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.cmap_dim, self.architecture = cmap_dim, config.architecture
        if self.architecture == "skip":
            self.fromrgb = Conv2dLayer(img_channels, in_channels, 1, activation="lrelu")
        self.mbstd = MinibatchStdLayer(config.mbstd_group_size, config.mbstd_num_channels)
        self.conv = Conv2dLayer(
            in_channels + config.mbstd_num_channels, in_channels, 3, activation="lrelu", conv_clamp=config.conv_clamp
        )
        self.fc = FullyConnectedLayer(in_channels * 16, in_channels, activation="lrelu")
        self.out = FullyConnectedLayer(in_channels, cmap_dim or 1)

    def forward(self, x: torch.Tensor, img: torch.Tensor | None, cmap: torch.Tensor | None) -> torch.Tensor:
        """Return logits `[B, 1]` of features `[B, C, 4, 4]` and label embeddings `[B, cmap_dim]`."""
        return self.project(self.embed(x, img), cmap)

    def embed(self, x: torch.Tensor, img: torch.Tensor | None) -> torch.Tensor:
        """Return image embeddings `[B, cmap_dim]` (`[B, 1]`, the logits, without labels) of features `[B, C, 4, 4]`."""
        dtype = self.fc.weight.dtype
        x = x.to(dtype)
        if self.architecture == "skip":
            x = x + self.fromrgb(img.to(dtype))
        return self.out(self.fc(self.conv(self.mbstd(x)).flatten(1)))

    def project(self, embedding: torch.Tensor, cmap: torch.Tensor | None) -> torch.Tensor:
        """Return logits `[B, 1]` of image embeddings and label embeddings `[B, cmap_dim]`."""
        if self.cmap_dim == 0:
            return embedding
        return (embedding * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)


class DiscriminatorFeatures(NamedTuple):
    """What the discriminator knows of images before it is told their cameras."""

    trunk: torch.Tensor
    """Features `[B, C, 4, 4]` after the last block."""
    embedding: torch.Tensor
    """Image embeddings `[B, cmap_dim]`, `[B, 1]` without labels; they hold minibatch statistics."""


class Discriminator(nn.Module):
    """Discriminator of any variant, with a view-image consistency head if `view_head_features` is above 0.

    `forward` is `logits(features(img), c)`; with the parts, one pass over images serves several labels.

    Results do not depend on how a global batch is split, as long as every part holds whole minibatch-std groups
    (`training.batch_plan`): label noise is measured in deviations within them.

    Differs from the published code: label noise works on a copy of the labels, takes its deviations over groups and
    not over the whole batch, and is left out for a single sample; the raw image of DummyDual fades in training mode
    only.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        require(config.variant in VARIANTS, "discriminator.variant", f"one of {', '.join(VARIANTS)}", config.variant)
        measurable = config.disc_c_noise == 0 or config.mbstd_group_size != 1
        require(
            measurable, "discriminator.disc_c_noise", "0 for groups of 1, which have no deviation", config.disc_c_noise
        )
        self.config, self.variant = config, VARIANTS[config.variant]
        self.c_dim, self.img_resolution = config.c_dim, config.img_resolution
        if self.variant.has_filter_buffer:
            self.register_buffer("resample_filter", setup_filter(RESAMPLE_TAPS))
        self.raw_fade = 1.0
        channels = {"image_mask": config.seg_channels, "image_parsing": config.parsing_channels}
        self.img_channels = sum(channels.get(name, config.img_channels) for name in self.variant.stacked)
        self._build_towers()
        cmap_dim = 0 if config.c_dim == 0 else config.cmap_dim or config.channels(4)
        if config.c_dim > 0:
            mapping = MappingConfig(
                num_layers=config.mapping_layers, lr_multiplier=config.mapping_lr_multiplier, w_avg_beta=None
            )
            self.mapping = MappingNetwork(0, config.c_dim, cmap_dim, None, mapping)
        self.b4 = DiscriminatorEpilogue(config.channels(4), cmap_dim, self.img_channels, config)
        self.view_head = None
        if config.view_head_features > 0:
            # Made last, so that all other layers start from the weights that they have without it.
            require(config.c_dim > 0, "discriminator.view_head_features", "0 without labels", config.view_head_features)
            self.view_head = ViewHead(config.channels(4), config.view_head_features)

    def _build_towers(self) -> None:
        config = self.config
        log2 = int(math.log2(config.img_resolution))
        fp16_resolution = max(2 ** (log2 + 1 - config.num_fp16_res), _LOWEST_BLOCK)
        self.block_resolutions = [2**i for i in range(log2, 2, -1)]
        self.seg_block_resolutions: list[int] = []
        if self.variant.mask_tower:
            top = config.seg_resolution
            require(top is not None, "discriminator.seg_resolution", f"a size for {config.variant}", top)
            require(top <= config.img_resolution, "discriminator.seg_resolution", "at most img_resolution", top)
            self.seg_block_resolutions = [r for r in self.block_resolutions if r <= top]

        def add_block(name: str, resolution: int, first: bool, img_channels: int, first_layer_idx: int) -> int:
            block = DiscriminatorBlock(
                0 if first else config.channels(resolution),
                config.channels(resolution),
                config.channels(resolution // 2),
                resolution,
                img_channels,
                first_layer_idx,
                config,
                use_fp16=resolution >= fp16_resolution,
            )
            self.add_module(name, block)
            return first_layer_idx + block.num_layers

        layers = 0
        for resolution in self.block_resolutions:
            first = resolution == config.img_resolution
            after = add_block(f"b{resolution}", resolution, first, self.img_channels, layers)
            if resolution in self.seg_block_resolutions:
                # Both towers freeze by one count, advanced by the mask tower where there is one, as published.
                first = resolution == config.seg_resolution
                after = add_block(f"sb{resolution}", resolution, first, config.seg_channels, layers)
            layers = after

    def forward(
        self,
        img: dict[str, torch.Tensor],
        c: torch.Tensor,
        update_emas: bool = False,
        force_fp32: bool = False,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Return logits `[B, 1]`.

        Args:
            img: the images that the variant stacks: `image` and `image_raw` `[B, 3, ., .]` in [-1, 1], `image_mask`
                `[B, 1, ., .]` and `image_parsing` `[B, classes, ., .]` in [0, 1]; all but `image` of any size.
            c: camera labels `[B, c_dim]`.
            update_emas: accepted for compatibility; nothing here keeps averages.
            force_fp32: no half precision.
            generator: source of label noise.

        Raises:
            ValueError: for a missing image or an `image` of another resolution.
        """
        del update_emas
        return self.logits(self.features(img, force_fp32), c, generator)

    def features(self, img: dict[str, torch.Tensor], force_fp32: bool = False) -> DiscriminatorFeatures:
        """Run all layers that do not depend on the camera; see `forward` for the arguments."""
        trunk, image = self._run_tower("b", self.block_resolutions, self.assemble(img), force_fp32)
        if self.variant.mask_tower:
            mask = self._resized(img, "image_mask", self.config.seg_resolution)
            mask_features, _ = self._run_tower("sb", self.seg_block_resolutions, mask, force_fp32)
            trunk = trunk + mask_features
        return DiscriminatorFeatures(trunk, self.b4.embed(trunk, image))

    def logits(
        self, features: DiscriminatorFeatures, c: torch.Tensor | None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Return logits `[B, 1]` of images with camera labels `[B, c_dim]`."""
        cmap = None
        if self.c_dim > 0:
            cmap = self.mapping(None, self._noisy_labels(c, generator))
        return self.b4.project(features.embedding, cmap)

    def consistency(self, features: DiscriminatorFeatures, c: torch.Tensor) -> torch.Tensor:
        """Return logits `[B, 1]` that images were seen by the cameras of labels `[B, 25]`; needs the head."""
        require(self.view_head is not None, "consistency", "a discriminator with view_head_features above 0", 0)
        return self.view_head(features.trunk, c)

    def assemble(self, img: dict[str, torch.Tensor]) -> torch.Tensor:
        """Resize and stack the input images: `[B, img_channels, H, W]`."""
        require("image" in img, "discriminator input", "an entry 'image'", sorted(img))
        side, size = self.img_resolution, tuple(img["image"].shape[-2:])
        require(size == (side, side), "discriminator input 'image'", f"size {(side, side)}", size)
        stacked = [self._resized(img, name, side) for name in self.variant.stacked]
        if self.variant.fades_raw:
            if self.training:
                self.raw_fade = max(self.raw_fade - _RAW_FADE_STEP, 0.0)
            stacked[1] = stacked[1] * self.raw_fade
        return torch.cat(stacked, dim=1)

    def _resized(self, img: dict[str, torch.Tensor], name: str, size: int) -> torch.Tensor:
        require(name in img, f"input of {self.config.variant}", f"an entry '{name}'", sorted(img))
        image = img[name]
        if name == "image":
            return image
        if image.shape[-2:] != (size, size):
            image = filtered_resizing(image, size, fir=None)
        return image if name == "image_raw" else image * 2 - 1

    def _run_tower(
        self, prefix: str, resolutions: Sequence[int], image: torch.Tensor, force_fp32: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = None
        for resolution in resolutions:
            features, image = getattr(self, f"{prefix}{resolution}")(features, image, force_fp32)
        return features, image

    def _noisy_labels(self, c: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        strength = self.config.disc_c_noise
        if strength == 0 or c.shape[0] < 2:
            return c
        noise = torch.randn(c.shape, device=c.device, generator=generator).to(c.dtype)
        size = min(self.config.mbstd_group_size or c.shape[0], c.shape[0])
        groups = c.unflatten(0, (size, -1))  # strided members, as in the minibatch-std layer
        return c + noise * (groups.std(dim=0) * strength).repeat(size, 1)
