"""The registered ops behind volume_render.py: reference, shapes, gradients and kernels, for PyTorch's dispatcher.

Arguments are checked in volume_render.py. The ops take the decoder as four tensors (`DecoderWeights`) and end with the
fields of `Options`, because an op's schema has no dataclasses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from typing import Any

import torch

from torch_utils.ops import volume_render_cuda, volume_render_native
from torch_utils.ops.volume_render_native import (
    LAYOUTS,
    NUM_QUERY_TENSORS,
    NUM_RENDER_TENSORS,
    OPTIONS_SCHEMA,
    Options,
)
from training.representations import make_representation
from training.volumetric_rendering.decoder import DecoderWeights, decode
from training.volumetric_rendering.reference import RenderDraws, march_rays_ref, query_field_ref

_Tensors = Sequence[torch.Tensor]
_OptionalTensors = Sequence[torch.Tensor | None]
_KERNELS = {"cpu": volume_render_native, "cuda": volume_render_cuda}
_RENDER_GROUPS, _QUERY_GROUPS = (1, 4, 4), (1, 4, 1)  # planes, decoder, rays with their limits or points


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are native kernels for planes of a dtype on a device."""
    return device.type in _KERNELS and _KERNELS[device.type].is_available(dtype)


def _field_of_reference(options: Options, planes: torch.Tensor, weights: DecoderWeights):
    """Return representation, planes in the precision of the decoder, and decoder."""
    depth = LAYOUTS[options.representation].plane_depth(planes)
    decoder = functools.partial(decode, weights=weights, activation=options.activation)
    return make_representation(options.representation, depth), planes.to(weights.hidden_weight.dtype), decoder


# ---- references: the default bodies ----


def _march(
    planes: torch.Tensor,
    hidden_weight: torch.Tensor,
    hidden_bias: torch.Tensor,
    output_weight: torch.Tensor,
    output_bias: torch.Tensor,
    ray_origins: torch.Tensor,
    ray_directions: torch.Tensor,
    near: torch.Tensor,
    far: torch.Tensor,
    coarse_jitter: torch.Tensor,
    importance: torch.Tensor | None,
    coarse_noise: torch.Tensor | None,
    fine_noise: torch.Tensor | None,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    parsed = Options(*options)
    weights = DecoderWeights(hidden_weight, hidden_bias, output_weight, output_bias)
    field = _field_of_reference(parsed, planes, weights)
    draws = RenderDraws(
        coarse_jitter=coarse_jitter, importance=importance, coarse_noise=coarse_noise, fine_noise=fine_noise
    )
    rays = ray_origins, ray_directions, (near, far)
    return tuple(march_rays_ref(*field, *rays, parsed.rendering(), draws))


def _march_backward(
    gradients: _Tensors, arguments: _OptionalTensors, needed: Sequence[bool], *options: Any
) -> list[torch.Tensor]:
    def forward(*leaves: torch.Tensor) -> _Tensors:
        return _march(*leaves, *arguments[len(leaves) :], *options)[: len(gradients)]

    return _differentiate(forward, arguments[: sum(_RENDER_GROUPS)], _spread(needed, _RENDER_GROUPS), gradients)


def _query(
    planes: torch.Tensor,
    hidden_weight: torch.Tensor,
    hidden_bias: torch.Tensor,
    output_weight: torch.Tensor,
    output_bias: torch.Tensor,
    points: torch.Tensor,
    noise: torch.Tensor | None,
    need_colors: bool,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    parsed = Options(*options)
    weights = DecoderWeights(hidden_weight, hidden_bias, output_weight, output_bias)
    field = _field_of_reference(parsed, planes, weights)
    sigma, colors = query_field_ref(*field, points, parsed.rendering(), noise)
    return sigma.clone(), colors.clone() if need_colors else colors.new_empty(0)


def _query_backward(
    gradients: _OptionalTensors, arguments: _Tensors, needed: Sequence[bool], *options: Any
) -> list[torch.Tensor]:
    given = [g for g in gradients if g is not None]

    def forward(*leaves: torch.Tensor) -> _Tensors:
        return _query(*leaves, None, len(given) == 2, *options)[: len(given)]

    return _differentiate(forward, arguments, _spread(needed, _QUERY_GROUPS), given)


def _spread(needed: Sequence[bool], groups: Sequence[int]) -> list[bool]:
    """Repeat each flag for the members of its group."""
    return list(chain.from_iterable(repeat(flag, count) for flag, count in zip(needed, groups)))


def _differentiate(
    function: Callable[..., _Tensors], arguments: _Tensors, needed: Sequence[bool], gradients: _Tensors
) -> list[torch.Tensor]:
    """Return the vector-Jacobian product for each argument, empty tensors for those that are not needed."""

    def run() -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_(flag) for x, flag in zip(arguments, needed)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.enable_grad():
            outputs = function(*leaves)
            found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True, materialize_grads=True))
        return [next(found).clone() if leaf.requires_grad else leaf.new_empty(0) for leaf in leaves]

    # Inside an op nothing is recorded for differentiation; in a thread of its own it is.
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(run).result()


# ---- registration ----


def _register(name: str, reference: Callable, schema: str) -> torch.library.CustomOpDef:
    """Register an op whose body is the reference, except where a device has a native kernel."""
    op = torch.library.custom_op(f"spherehead::{name}", reference, mutates_args=(), schema=schema)
    for device, module in _KERNELS.items():
        op.register_kernel(device, functools.partial(_run, getattr(module, name), reference))
    return op


def _run(kernel: Callable, reference: Callable, *arguments):
    result = kernel(*arguments)
    return reference(*arguments) if result is None else result


_FIELD_SCHEMA = "Tensor planes, Tensor hidden_weight, Tensor hidden_bias, Tensor output_weight, Tensor output_bias"
_march_op = _register(
    "volume_render",
    _march,
    f"({_FIELD_SCHEMA}, Tensor ray_origins, Tensor ray_directions, Tensor near, Tensor far, Tensor coarse_jitter, "
    f"Tensor? importance, Tensor? coarse_noise, Tensor? fine_noise, {OPTIONS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
_march_backward_op = _register(
    "volume_render_backward",
    _march_backward,
    f"(Tensor[] gradients, Tensor?[] arguments, bool[] needed, {OPTIONS_SCHEMA}) -> Tensor[]",
)
_query_op = _register(
    "query_field",
    _query,
    f"({_FIELD_SCHEMA}, Tensor points, Tensor? noise, bool need_colors, {OPTIONS_SCHEMA}) -> (Tensor, Tensor)",
)
_query_backward_op = _register(
    "query_field_backward",
    _query_backward,
    f"(Tensor?[] gradients, Tensor[] arguments, bool[] needed, {OPTIONS_SCHEMA}) -> Tensor[]",
)


# ---- shapes, for torch.compile ----


@_march_op.register_fake
def _(planes, hidden_weight, hidden_bias, output_weight, output_bias, ray_origins, *rest):
    shape = ray_origins.shape[:2]
    return tuple(ray_origins.new_empty(*shape, *width) for width in ((output_bias.shape[0] - 1,), (), (), (2,)))


@_march_backward_op.register_fake
def _(gradients, arguments, needed, *options):
    return _fake_gradients(arguments, _spread(needed, _RENDER_GROUPS))


@_query_op.register_fake
def _(planes, hidden_weight, hidden_bias, output_weight, output_bias, points, noise, need_colors, *options):
    shape = points.shape[:2]
    return points.new_empty(shape), points.new_empty((*shape, output_bias.shape[0] - 1) if need_colors else (0,))


@_query_backward_op.register_fake
def _(gradients, arguments, needed, *options):
    return _fake_gradients(arguments, _spread(needed, _QUERY_GROUPS))


def _fake_gradients(arguments: _Tensors, needed: Sequence[bool]) -> list[torch.Tensor]:
    return [torch.empty_like(x) if flag else x.new_empty(0) for x, flag in zip(arguments, needed)]


# ---- gradients ----


def _keep_march(ctx, inputs, output) -> None:
    tensors, ctx.options = inputs[:NUM_RENDER_TENSORS], inputs[NUM_RENDER_TENSORS:]
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[3])


def _backward_of_march(ctx, *gradients):
    needs = ctx.needs_input_grad
    needed = [needs[0], any(needs[1:5]), any(needs[5:9])]
    given = [gradient.contiguous() for gradient in gradients[:3]]
    found = torch.ops.spherehead.volume_render_backward(given, list(ctx.saved_tensors), needed, *ctx.options)
    return (*_of_needed(found, needed, _RENDER_GROUPS), *[None] * (len(needs) - sum(_RENDER_GROUPS)))


def _keep_query(ctx, inputs, output) -> None:
    *tensors, _, ctx.need_colors = inputs[: NUM_QUERY_TENSORS + 1]
    ctx.options = inputs[NUM_QUERY_TENSORS + 1 :]
    ctx.save_for_backward(*tensors)


def _backward_of_query(ctx, g_sigma, g_colors):
    needs = ctx.needs_input_grad
    needed = [needs[0], any(needs[1:5]), needs[5]]
    given = [g_sigma.contiguous(), g_colors.contiguous() if ctx.need_colors else None]
    found = torch.ops.spherehead.query_field_backward(given, list(ctx.saved_tensors), needed, *ctx.options)
    return (*_of_needed(found, needed, _QUERY_GROUPS), *[None] * (len(needs) - sum(_QUERY_GROUPS)))


def _of_needed(found: _Tensors, needed: Sequence[bool], groups: Sequence[int]) -> list[torch.Tensor | None]:
    return [gradient if flag else None for gradient, flag in zip(found, _spread(needed, groups))]


_march_op.register_autograd(_backward_of_march, setup_context=_keep_march)
_query_op.register_autograd(_backward_of_query, setup_context=_keep_query)
