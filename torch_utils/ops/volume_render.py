"""Fused volume rendering: rays through planes and decoder to composited features, forward and backward in one op each.

`volume_render` and `query_field` compute what `render_rays_ref` and `query_field_ref` do, without storing anything of
the size samples x channels, also not for the backward pass, which traces the rays again. Memory beyond arguments,
results and gradients is a few MiB. The registered ops are in volume_render_ops.py, the kernels in csrc/.

Native kernels read planes **channels last**: `[B, P, H, W, C]` in memory, seen as `[B, P, C, H, W]`. Others are copied;
`prepare_planes` does so once for many calls.

There are kernels for the CPU in float32 and float64, and for CUDA in float32; half-precision planes are read as float32
on the CPU. `unsupported` tells whether a call has one. Without, the registered ops run the reference.

Differs from the published renderer: samples outside the crop region are not evaluated, a decoder without activation
composites its hidden units and applies its last layer once per ray, and nothing is sorted but scalars.
"""

from __future__ import annotations

import torch

from torch_utils import native
from torch_utils.ops import volume_render_ops as ops
from torch_utils.ops.volume_render_native import LAYOUTS, Options, channels_last
from training.config import RenderingConfig, require
from training.representations import Representation, representation_name
from training.volumetric_rendering.decoder import OSGDecoder
from training.volumetric_rendering.depth_sampling import ray_limits
from training.volumetric_rendering.reference import MarchOutput, RenderDraws, RenderOutput, finish

_MAX_SCENE_ELEMENTS = 2**31  # kernels count them in 32 bits
_MAX_SAMPLES = 2**15
_CHANNEL_MULTIPLE = 8
_DRAW_SAMPLES = {
    "coarse_jitter": "depth_resolution",
    "importance": "depth_resolution_importance",
    "coarse_noise": "depth_resolution",
    "fine_noise": "depth_resolution_importance",
}
"""Fields of RenderDraws in the order of the op's arguments, and what their last axis counts."""


def volume_render(
    representation: Representation,
    planes: torch.Tensor,
    decoder: OSGDecoder,
    ray_origins: torch.Tensor,
    ray_directions: torch.Tensor,
    config: RenderingConfig,
    draws: RenderDraws,
) -> RenderOutput:
    """Render rays with the fused op; arguments, result and gradients are those of `render_rays_ref`.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the op does not support them (see `unsupported`).
    """
    reason = unsupported(representation, planes, decoder, config)
    require(reason is None, "volume_render", "a supported call", reason)
    batch, rays = _check_rays(planes, ray_origins, ray_directions)
    tensors = [_checked_draw(name, draws, (batch, rays), config, planes) for name in _DRAW_SAMPLES]
    name, planes = _as_kernel_planes(representation, planes)
    march = torch.ops.spherehead.volume_render(
        planes,
        *(weight.to(_compute_dtype(planes)) for weight in decoder.weights()),
        ray_origins.contiguous(),
        ray_directions.contiguous(),
        *(limit.contiguous() for limit in ray_limits(ray_origins, ray_directions, config)),
        *tensors,
        *Options.of(name, decoder.activation, config),
    )
    return finish(MarchOutput(*march), config)


def query_field(
    representation: Representation,
    planes: torch.Tensor,
    decoder: OSGDecoder,
    points: torch.Tensor,
    config: RenderingConfig,
    noise: torch.Tensor | None = None,
    need_colors: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Evaluate the field with the fused op; arguments, result and gradients are those of `query_field_ref`.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the op does not support them (see `unsupported`).
    """
    reason = unsupported(representation, planes, decoder, config)
    require(reason is None, "query_field", "a supported call", reason)
    expected = (planes.shape[0], "M", 3)
    fits = points.ndim == 3 and points.shape[0] == planes.shape[0] and points.shape[2] == 3
    require(fits, "points", f"shape {expected}", tuple(points.shape))
    if noise is not None:
        require(noise.shape == points.shape[:2], "noise", f"shape {tuple(points.shape[:2])}", tuple(noise.shape))
        noise = noise.to(_compute_dtype(planes)).contiguous()
    name, planes = _as_kernel_planes(representation, planes)
    sigma, colors = torch.ops.spherehead.query_field(
        planes,
        *(weight.to(_compute_dtype(planes)) for weight in decoder.weights()),
        points.to(_compute_dtype(planes)).contiguous(),
        noise,
        need_colors,
        *Options.of(name, decoder.activation, config),
    )
    return sigma, colors if need_colors else None


def unsupported(
    representation: Representation, planes: torch.Tensor, decoder: OSGDecoder, config: RenderingConfig
) -> str | None:
    """Return why the fused ops cannot do this call, or None if they can."""
    reason = no_kernel(representation, planes.device, _compute_dtype(planes))
    if reason is not None:
        return reason
    if type(decoder) is not OSGDecoder:
        return f"there is no kernel for the decoder {type(decoder).__name__}"
    if planes.numel() == 0:
        return f"planes are empty: {tuple(planes.shape)}"
    channels = planes.shape[LAYOUTS[representation_name(representation)].channel_axis]
    if channels % _CHANNEL_MULTIPLE != 0:
        return f"planes have {channels} channels, not a multiple of {_CHANNEL_MULTIPLE}"
    if planes[0].numel() >= _MAX_SCENE_ELEMENTS:
        return f"planes of one scene have {planes[0].numel()} elements, not less than {_MAX_SCENE_ELEMENTS}"
    if config.depth_resolution + config.depth_resolution_importance > _MAX_SAMPLES:
        return f"more than {_MAX_SAMPLES} samples per ray"
    return None


def no_kernel(representation: Representation, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why there are no kernels for a representation on a device, or None if there are."""
    if representation_name(representation) not in LAYOUTS:
        return f"there is no kernel for the representation {type(representation).__name__}"
    if not ops.has_kernel(device, dtype):
        return native.reason() or f"there is no kernel for {dtype} on {device.type}"
    return None


def prepare_planes(representation: Representation, planes: torch.Tensor) -> torch.Tensor:
    """Return planes as kernels read them, channels last; unchanged where there is no kernel for the representation."""
    name = representation_name(representation)
    return channels_last(name, planes) if name in LAYOUTS else planes


def _compute_dtype(planes: torch.Tensor) -> torch.dtype:
    return torch.float32 if planes.dtype in (torch.float16, torch.bfloat16) else planes.dtype


def _as_kernel_planes(representation: Representation, planes: torch.Tensor) -> tuple[str, torch.Tensor]:
    name = representation_name(representation)
    readable = ops.has_kernel(planes.device, planes.dtype)
    return name, channels_last(name, planes if readable else planes.to(_compute_dtype(planes)))


def _check_rays(planes: torch.Tensor, origins: torch.Tensor, directions: torch.Tensor) -> tuple[int, int]:
    shapes = tuple(origins.shape), tuple(directions.shape)
    fit = origins.ndim == 3 and shapes[0] == shapes[1] and shapes[0][::2] == (planes.shape[0], 3)
    require(fit, "ray_origins, ray_directions", f"two tensors of shape ({planes.shape[0]}, R, 3)", shapes)
    expected = _compute_dtype(planes), planes.device
    for tensor in (origins, directions):
        require((tensor.dtype, tensor.device) == expected, "rays", expected, (tensor.dtype, tensor.device))
    return origins.shape[:2]


def _checked_draw(
    name: str, draws: RenderDraws, shape: tuple[int, int], config: RenderingConfig, planes: torch.Tensor
) -> torch.Tensor | None:
    draw: torch.Tensor | None = getattr(draws, name)
    samples = getattr(config, _DRAW_SAMPLES[name])
    if samples == 0 or (name.endswith("noise") and config.density_noise == 0):
        return None
    expected = (*shape, samples)
    came = None if draw is None else tuple(draw.shape)
    require(came == expected, name, f"shape {expected}", came)
    return draw.to(_compute_dtype(planes)).contiguous()
