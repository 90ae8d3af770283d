"""StyleGAN2 generator blocks (Karras et al. 2020), with the parameter names of the published EG3D-family checkpoints.

Tensors are NCHW. Half precision is used on CUDA only; parameters may be float32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from torch_utils.ops.modulated_conv2d import modulated_layer, modulated_to_image
from torch_utils.ops.upfirdn2d import setup_filter, upsample2d
from training.config import Architecture, FusedModconv, MappingConfig, NoiseMode, SynthesisConfig, require
from training.layers import (
    RESAMPLE_TAPS,
    Conv2dLayer,
    FullyConnectedLayer,
    normalize_2nd_moment,
)

SQRT_HALF = math.sqrt(0.5)


@dataclass(frozen=True, kw_only=True)
class SynthesisOptions:
    """Choices of one synthesis call, handed down to every layer.

    `noise_mode` defaults to fresh noise, as in the published code. `fused_modconv` None keeps each block's own default.
    `generator` is the source of random noise; None is the default generator of the device.
    """

    noise_mode: NoiseMode = "random"
    force_fp32: bool = False
    fused_modconv: bool | None = None
    generator: torch.Generator | None = None


DEFAULT_OPTIONS = SynthesisOptions()


class MappingNetwork(nn.Module):
    """Map latents z and labels c to w, with a running mean of w for truncation.

    Args:
        z_dim: width of z; 0 uses the label alone.
        c_dim: width of the label; 0 uses z alone.
        w_dim: width of w.
        num_ws: copies of w in the result; None returns `[B, w_dim]` and keeps no mean.
        config: layers and learning rate.
        last_activation: activation of the last layer; None is that of the others.
    """

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        config: MappingConfig,
        last_activation: str | None = None,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, c_dim, w_dim, num_ws
        self.num_layers, self.w_avg_beta = config.num_layers, config.w_avg_beta
        embed_features = 0 if c_dim == 0 else config.embed_features or w_dim
        hidden = [config.layer_features or w_dim] * (config.num_layers - 1)
        widths = [z_dim + embed_features, *hidden, w_dim]
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embed_features)
        for i in range(config.num_layers):
            last = i == config.num_layers - 1
            activation = last_activation if last and last_activation else config.activation
            layer = FullyConnectedLayer(
                widths[i], widths[i + 1], activation=activation, lr_multiplier=config.lr_multiplier
            )
            self.add_module(f"fc{i}", layer)
        if num_ws is not None and self.w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self,
        z: torch.Tensor | None,
        c: torch.Tensor | None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> torch.Tensor:
        """Return w, `[B, num_ws, w_dim]`, or `[B, w_dim]` where `num_ws` is None.

        Args:
            z: `[B, z_dim]`, any float type.
            c: `[B, c_dim]`.
            truncation_psi: distance from the mean w kept: 1 all, 0 none.
            truncation_cutoff: layers that are truncated; None is all.
            update_emas: let this batch move the running mean.
        """
        x = torch.cat([normalize_2nd_moment(part) for part in self._inputs(z, c)], dim=1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        if update_emas and self.w_avg_beta is not None and self.num_ws is not None:
            self.w_avg.copy_(x.detach().mean(dim=0).lerp(self.w_avg, self.w_avg_beta))
        if self.num_ws is None:
            return x
        x = x.unsqueeze(1).repeat(1, self.num_ws, 1)  # [B, L, w_dim]
        if truncation_psi == 1:
            return x
        require(self.w_avg_beta is not None, "truncation_psi", "1 for a network without w_avg", truncation_psi)
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        truncated = self.w_avg.lerp(x[:, :cutoff], truncation_psi)
        return torch.cat([truncated, x[:, cutoff:]], dim=1)

    def _inputs(self, z: torch.Tensor | None, c: torch.Tensor | None) -> list[torch.Tensor]:
        parts = []
        dtype = self.fc0.weight.dtype
        if self.z_dim > 0:
            parts.append(_checked("z", z, self.z_dim).to(dtype))
        if self.c_dim > 0:
            parts.append(self.embed(_checked("c", c, self.c_dim).to(dtype)))
        sizes = {len(part) for part in parts}
        require(len(sizes) == 1 and 0 not in sizes, "z, c", "the same number of both, at least one", sorted(sizes))
        return parts


def _checked(name: str, value: torch.Tensor | None, width: int) -> torch.Tensor:
    shape = None if value is None else tuple(value.shape)
    require(shape is not None and len(shape) == 2 and shape[1] == width, name, f"shape [B, {width}]", shape)
    return value


class SynthesisLayer(nn.Module):
    """Style-modulated convolution with noise, bias and activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        up: int = 1,
        conv_clamp: float | None = None,
        activation: str = "lrelu",
        kernel_size: int = 3,
        resample_taps: Sequence[float] = RESAMPLE_TAPS,
    ) -> None:
        super().__init__()
        self.resolution, self.up, self.activation, self.conv_clamp = resolution, up, activation, conv_clamp
        # Random numbers are drawn in the published order, so that a seed gives the published initial weights.
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.register_buffer("resample_filter", setup_filter(resample_taps))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(
        self, x: torch.Tensor, w: torch.Tensor, options: SynthesisOptions, fused: bool, gain: float = 1.0
    ) -> torch.Tensor:
        """Map `[B, in, H, W]` and w `[B, w_dim]` to `[B, out, resolution, resolution]`."""
        expected = [self.affine.weight.shape[0], self.resolution // self.up, self.resolution // self.up]
        require(list(x.shape[1:]) == expected, "synthesis layer input", f"[B, *{expected}]", list(x.shape))
        return modulated_layer(
            x,
            self.weight,
            self.affine(w),
            noise=self._noise(x.shape[0], x.device, options),
            fir=self.resample_filter,
            up=self.up,
            fused=fused,
            bias=self.bias,
            activation=self.activation,
            gain=gain,
            clamp=None if self.conv_clamp is None else self.conv_clamp * gain,
        )

    def _noise(self, batch: int, device: torch.device, options: SynthesisOptions) -> torch.Tensor | None:
        if options.noise_mode == "none":
            return None
        if options.noise_mode == "const":
            return self.noise_const * self.noise_strength
        require(options.noise_mode == "random", "noise_mode", "'random', 'const' or 'none'", options.noise_mode)
        shape = (batch, 1, self.resolution, self.resolution)
        noise = torch.randn(shape, device=device, generator=options.generator)
        return noise.to(self.weight.dtype) * self.noise_strength


class ToRGBLayer(nn.Module):
    """Style-modulated 1 x 1 convolution without demodulation: features to image channels."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, conv_clamp: float | None = None) -> None:
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        fused: bool,
        output_projection: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        fir: torch.Tensor | None = None,
        up: int = 1,
    ) -> torch.Tensor:
        """Map `[B, in, H, W]` to `[B, out, H, W]`, or to `[B, out', H, W]` through a matrix `[out', out]`.

        It is added to `image`, if there is one, enlarged by `up` through `fir`; see `modulated_to_image`.
        """
        weight, bias = self.weight, self.bias
        if output_projection is not None:
            require(self.conv_clamp is None, "output_projection", "a layer without conv_clamp", self.conv_clamp)
            weight = torch.einsum("po,oikl->pikl", output_projection, weight)
            bias = output_projection @ bias
        styles = self.affine(w) * self.weight_gain
        stream = {"image": image, "fir": fir, "up": up}
        return modulated_to_image(x, weight, styles, bias, clamp=self.conv_clamp, fused=fused, **stream)


class SynthesisBlock(nn.Module):
    """One resolution of the synthesis network.

    Args:
        in_channels: 0 for the first block, which starts from a learned constant.
        out_channels: feature channels.
        w_dim: width of w.
        resolution: side of the output.
        img_channels: channels of the image stream.
        is_last: the block that must emit an image in every architecture.
        config: clamp, architecture, fusing.
        use_fp16: half precision on CUDA.
        up: 2, or 1 for the super-resolution blocks that keep the resolution of features and image.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        img_channels: int,
        is_last: bool,
        config: SynthesisConfig,
        use_fp16: bool = False,
        up: int = 2,
    ) -> None:
        super().__init__()
        self.in_channels, self.w_dim, self.resolution, self.up = in_channels, w_dim, resolution, up
        self.img_channels, self.use_fp16 = img_channels, use_fp16
        self.half_dtype = getattr(torch, config.half_precision)
        self.architecture: Architecture = config.architecture
        self.fused_modconv: FusedModconv = config.fused_modconv
        self.register_buffer("resample_filter", setup_filter(RESAMPLE_TAPS))
        clamp = config.conv_clamp
        if in_channels == 0:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim, resolution, up=up, conv_clamp=clamp)
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, conv_clamp=clamp)
        self.torgb = None
        if is_last or self.architecture == "skip":
            self.torgb = ToRGBLayer(out_channels, img_channels, w_dim, conv_clamp=clamp)
        if in_channels != 0 and self.architecture == "resnet":
            self.skip = Conv2dLayer(in_channels, out_channels, 1, bias=False, up=up)

    def forward(
        self,
        x: torch.Tensor | None,
        img: torch.Tensor | None,
        ws: torch.Tensor,
        options: SynthesisOptions = DEFAULT_OPTIONS,
        output_projection: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return features `[B, out, R, R]` and the image stream `[B, img_channels, R, R]` (None if not begun).

        `ws` is `[B, 3, w_dim]`, for conv0, conv1 and torgb (`[B, 2, w_dim]` for the first block, which has no conv0);
        `output_projection` `[img_channels', img_channels]` is applied to what this block adds to the image.
        """
        parameter_dtype = self.conv1.weight.dtype
        half = self.use_fp16 and not options.force_fp32 and ws.device.type == "cuda"
        dtype = self.half_dtype if half else parameter_dtype
        fused = self._is_fused(options)
        *w_convs, w_torgb = ws.to(parameter_dtype).unbind(dim=1)

        if self.in_channels == 0:
            x = self.const.to(dtype).unsqueeze(0).repeat(ws.shape[0], 1, 1, 1)
            x = self.conv1(x, w_convs[0], options, fused)
        elif self.architecture == "resnet":
            x = x.to(dtype)
            shortcut = self.skip(x, gain=SQRT_HALF)
            x = self.conv0(x, w_convs[0], options, fused)
            x = shortcut + self.conv1(x, w_convs[1], options, fused, gain=SQRT_HALF)
        else:
            x = self.conv0(x.to(dtype), w_convs[0], options, fused)
            x = self.conv1(x, w_convs[1], options, fused)

        if self.torgb is not None:
            img = self.torgb(x, w_torgb, fused, output_projection, image=img, fir=self.resample_filter, up=self.up)
        elif img is not None and self.up == 2:
            img = upsample2d(img, self.resample_filter)
        return x, img

    def _is_fused(self, options: SynthesisOptions) -> bool:
        fused = self.fused_modconv if options.fused_modconv is None else options.fused_modconv
        return not self.training if fused == "inference_only" else bool(fused)


class SynthesisNetwork(nn.Module):
    """Map w-layers `[B, num_ws, w_dim]` to an image of `img_channels` at `img_resolution`."""

    def __init__(self, w_dim: int, img_resolution: int, img_channels: int, config: SynthesisConfig) -> None:
        super().__init__()
        self.w_dim, self.img_resolution, self.img_channels, self.config = w_dim, img_resolution, img_channels, config
        log2 = int(math.log2(img_resolution))
        self.num_ws = 2 * log2 - 2
        fp16_resolution = max(2 ** (log2 + 1 - config.num_fp16_res), 8)
        in_channels = 0
        for resolution in self._resolutions():
            channels, use_fp16 = config.channels(resolution), resolution >= fp16_resolution
            is_last = resolution == img_resolution
            block = SynthesisBlock(in_channels, channels, w_dim, resolution, img_channels, is_last, config, use_fp16)
            self.add_module(f"b{resolution}", block)
            in_channels = channels

    def _resolutions(self) -> list[int]:
        return [2**k for k in range(2, int(math.log2(self.img_resolution)) + 1)]

    def forward(
        self,
        ws: torch.Tensor,
        options: SynthesisOptions | None = None,
        *,
        output_projection: torch.Tensor | None = None,
        update_emas: bool = False,
        **option_kwargs,
    ) -> torch.Tensor:
        """Return the image `[B, img_channels, img_resolution, img_resolution]`.

        Args:
            ws: `[B, num_ws, w_dim]`.
            options: choices of the call; instead of it, its fields may be given as keywords (`noise_mode='const'`).
            output_projection: matrix `[P, img_channels]`; the result is then `[B, P, ...]`, as if every pixel had been
                multiplied by it, but the product is taken inside the ToRGB layers, where it is cheaper. Upsampling and
                summation are linear, so this is exact; it needs layers without clamp.
            update_emas: accepted for compatibility; this network keeps no averages.
        """
        del update_emas
        options = options or SynthesisOptions(**option_kwargs)
        shape = tuple(ws.shape)
        require(shape[1:] == (self.num_ws, self.w_dim), "ws", f"shape [B, {self.num_ws}, {self.w_dim}]", shape)
        x = img = None
        for resolution in self._resolutions():
            # Block 2^k takes w_{2k-5} to w_{2k-3}: its torgb shares a w with the next block's conv0.
            k = int(math.log2(resolution))
            block_ws = ws[:, max(2 * k - 5, 0) : 2 * k - 2]
            x, img = getattr(self, f"b{resolution}")(x, img, block_ws, options, output_projection)
        return img


class Generator(nn.Module):
    """StyleGAN2 generator: mapping and synthesis."""

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        mapping: MappingConfig,
        synthesis: SynthesisConfig,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.synthesis = SynthesisNetwork(w_dim, img_resolution, img_channels, synthesis)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, mapping)

    def forward(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
        **option_kwargs,
    ) -> torch.Tensor:
        """Return the image of latents `[B, z_dim]` and labels `[B, c_dim]`."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff, update_emas)
        return self.synthesis(ws, **option_kwargs)
