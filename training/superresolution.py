"""Super-resolution from the volume-rendered image to the final one: two StyleGAN2 blocks driven by the last w."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from torch_utils.ops.upfirdn2d import setup_filter
from training.config import W_DIM, SuperresolutionConfig, SynthesisConfig, require
from training.layers import RESAMPLE_TAPS
from training.networks_stylegan2 import DEFAULT_OPTIONS, SynthesisBlock, SynthesisOptions
from training.representations import PLANE_FEATURES

_FP16_CLAMP = 256


class SuperresolutionVariant(NamedTuple):
    """One published super-resolution module."""

    input_resolution: int
    """Images and features of another size are resized to it."""
    output_resolution: int
    channels: tuple[int, int]
    """Feature channels of the two blocks."""
    has_filter_buffer: bool = True
    """Whether checkpoints hold a (never used) `resample_filter` at the top of the module."""

    @property
    def first_block_up(self) -> int:
        """Upsampling of the first block; the second always doubles."""
        return self.output_resolution // (2 * self.input_resolution)


VARIANTS = {
    "SuperresolutionHybrid8XDC": SuperresolutionVariant(128, 512, (256, 128), has_filter_buffer=False),
    "SuperresolutionHybrid8X": SuperresolutionVariant(128, 512, (128, 64)),
    "SuperresolutionHybrid4X": SuperresolutionVariant(128, 256, (128, 64)),
    "SuperresolutionHybrid2X": SuperresolutionVariant(64, 128, (128, 64)),
    "SuperresolutionHybridDeepfp32": SuperresolutionVariant(128, 256, (128, 64)),
    # Ours, for small machines.
    "Superresolution2XSmall": SuperresolutionVariant(32, 64, (64, 32), has_filter_buffer=False),
}


def resize_bilinear(x: torch.Tensor, size: int, antialias: bool = True) -> torch.Tensor:
    """Resize images `[B, C, H, W]` to `size` x `size`, unless they have that size."""
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False, antialias=antialias)


class SuperresolutionOutput(NamedTuple):
    """Result of super-resolution."""

    image: torch.Tensor
    """`[B, 3, H, W]` at the output resolution."""
    first_rgb: torch.Tensor | None
    """The raw image plus what the first block adds to it, where block and image have the same size."""


class Superresolution(nn.Module):
    """Super-resolution module of any variant.

    Differs from the published code: the 4X module also resizes inputs larger than 128, for which the published one
    failed.
    """

    def __init__(self, img_resolution: int, config: SuperresolutionConfig) -> None:
        super().__init__()
        require(config.variant in VARIANTS, "superresolution.variant", f"one of {', '.join(VARIANTS)}", config.variant)
        variant = VARIANTS[config.variant]
        require(
            variant.output_resolution == img_resolution,
            "superresolution.variant",
            f"a module with output resolution {img_resolution}",
            f"{config.variant}, which makes {variant.output_resolution}",
        )
        self.config, self.variant = config, variant
        self.input_resolution = variant.input_resolution
        use_fp16 = config.num_fp16_res > 0
        clamp = _FP16_CLAMP if use_fp16 else None
        blocks = SynthesisConfig(
            conv_clamp=clamp, fused_modconv=config.fused_modconv, half_precision=config.half_precision
        )
        if variant.has_filter_buffer:
            self.register_buffer("resample_filter", setup_filter(RESAMPLE_TAPS))
        wide, narrow = variant.channels
        self.block0 = SynthesisBlock(
            PLANE_FEATURES,
            wide,
            W_DIM,
            img_resolution // 2,
            3,
            is_last=False,
            config=blocks,
            use_fp16=use_fp16,
            up=variant.first_block_up,
        )
        self.block1 = SynthesisBlock(
            wide, narrow, W_DIM, img_resolution, 3, is_last=True, config=blocks, use_fp16=use_fp16
        )

    def forward(
        self, rgb: torch.Tensor, features: torch.Tensor, ws: torch.Tensor, options: SynthesisOptions = DEFAULT_OPTIONS
    ) -> SuperresolutionOutput:
        """Enlarge the raw image `[B, 3, r, r]` with the help of its features `[B, 32, r, r]`.

        `ws` is `[B, L, 512]`, of which only the last layer is used.
        """
        ws = ws[:, -1:].expand(-1, 3, -1)
        same_size = rgb.shape[-1] == self.input_resolution
        rgb, features = (resize_bilinear(x, self.input_resolution, self.config.antialias) for x in (rgb, features))
        features, rgb = self.block0(features, rgb, ws, options)
        first_rgb = rgb if same_size and self.variant.first_block_up == 1 else None
        _, image = self.block1(features, rgb, ws, options)
        return SuperresolutionOutput(image, first_rgb)
