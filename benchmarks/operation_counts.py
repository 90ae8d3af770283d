"""Multiplications and additions of the project's own ops, for PyTorch's `FlopCounterMode`, which does not know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from torch_utils.ops.volume_render_native import NUM_RENDER_TENSORS, Options
from training.volumetric_rendering.reference import inside_crop

RENDERER_OPS = ("spherehead.volume_render", "spherehead.volume_render_backward")
_TEXELS = {"dual_spherical": 24, "tri_plane": 12, "tri_grid": 24}  # that a point reads


def flop_counter() -> FlopCounterMode:
    """Return a counter of convolutions, matrix products and native ops; `counted` reads it."""
    ops = torch.ops.spherehead
    formulas = {
        ops.volume_render: _raw(_render_flop),
        ops.volume_render_backward: _raw(_render_backward_flop),
        ops.modulated_conv3x3: _raw(_modulated_conv_flop),
        torch.ops.aten.baddbmm_: _raw(_accumulating_product_flop),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def counted(counter: FlopCounterMode) -> dict[str, float]:
    """Return what was counted so far, in 1e9, of the volume renderer and of everything else."""
    found = {str(op): flop for op, flop in counter.get_flop_counts().get("Global", {}).items()}
    renderer = sum(found.get(name, 0) for name in RENDERER_OPS)
    return {"networks": (sum(found.values()) - renderer) / 1e9, "renderer": renderer / 1e9}


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    formula._get_raw = True  # tells the counter to hand over tensors instead of their shapes
    return formula


def point_flop(representation: str, channels: int, hidden: int) -> dict[str, int]:
    """Return the operations of one point: of its texels, of the decoder's hidden layer, and of what follows.

    Elementwise functions do not count. A decoder without activation applies its last layer once per ray, which is
    nothing; only density is computed for each point, and hidden units are composited.
    """
    return {"texels": 2 * _TEXELS[representation] * channels, "hidden": 2 * channels * hidden, "rest": 4 * hidden}


def num_points(tensors: tuple[torch.Tensor | None, ...], options: Options) -> float:
    """Return how many samples of a call of the renderer are not cropped, estimated from evenly spaced ones."""
    origins, directions, near, far = tensors[5:9]
    count = origins[..., 0].numel() * (options.depth_resolution + options.depth_resolution_importance)
    if options.crop_margin is None:
        return count
    near, far = (limit.reshape(*limit.shape[:2], 1) if limit.ndim > 1 else limit for limit in (near, far))
    fractions = torch.linspace(0, 1, options.depth_resolution, device=origins.device, dtype=origins.dtype)
    depths = near + (far - near) * fractions
    points = origins.unsqueeze(2) + depths.unsqueeze(-1) * directions.unsqueeze(2)
    return count * inside_crop(points, options.rendering()).float().mean().item()


def _per_point(tensors: tuple[torch.Tensor | None, ...], options: Options) -> dict[str, int]:
    hidden, channels = tensors[1].shape
    return point_flop(options.representation, channels, hidden)


def _render_flop(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    tensors, options = arguments[:NUM_RENDER_TENSORS], Options(*arguments[NUM_RENDER_TENSORS:])
    return int(num_points(tensors, options) * sum(_per_point(tensors, options).values()))


def _render_backward_flop(gradients: Any, tensors: Any, needed: Any, *options: Any, out_val: Any = None) -> int:
    parsed = Options(*options)
    work = _per_point(tensors, parsed)
    # Everything again; then texels and both products of the hidden layer for their gradients.
    return int(num_points(tensors, parsed) * (3 * work["texels"] + 3 * work["hidden"] + 2.5 * work["rest"]))


def _modulated_conv_flop(x: torch.Tensor, weight: torch.Tensor, *rest: Any, out_val: Any = None, **_: Any) -> int:
    batch, inputs, height, width = x.shape
    flop = 2 * batch * height * width * inputs * weight.shape[0] * 9
    if out_val.shape[2] > height:
        flop += 2 * out_val.numel() * 16  # the resampling filter
    return flop


def _accumulating_product_flop(
    x: Any, a: torch.Tensor, b: torch.Tensor, *_: Any, out_val: Any = None, **__: Any
) -> int:
    return 2 * a.numel() * b.shape[-1]
