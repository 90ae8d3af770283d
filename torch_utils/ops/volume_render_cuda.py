"""Calls of the CUDA kernels of the volume renderer: tensors to C structures and back, like volume_render_native.py.

The functions return None where there is no kernel. Planes may be float32, float16 or bfloat16; everything else is
float32, also inside the kernels. Under `torch.use_deterministic_algorithms` gradients of planes are summed as 64-bit
integers, which takes a second backward pass and, for one scene at a time, twice the memory of float32 planes; all other
results are the same in every run anyway.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from torch_utils import native
from torch_utils.ops import volume_render_native as cpu
from torch_utils.ops.volume_render_native import FieldGradients, Options, RenderOutputs

_TEXEL_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ALIGNMENT = 16  # bytes that a thread reads at once
_MAX_WIDTH = 256  # of channels, hidden units and colour features

Tensors = Sequence[torch.Tensor]
OptionalTensors = Sequence[torch.Tensor | None]


class CudaOptions(cpu._Structure):
    """Where and how kernels run."""

    _fields_ = [
        *cpu._pointers("stream", "workspace"),
        *cpu._integers("workspace_bytes", "device", "texel_type", "deterministic"),
    ]


def is_available(dtype: torch.dtype) -> bool:
    """Whether there are kernels for planes of a dtype."""
    return dtype in _TEXEL_TYPES and _launcher("volume_render_cuda") is not None


def volume_render(*arguments: Any) -> tuple[torch.Tensor, ...] | None:
    """See `spherehead::volume_render`."""
    tensors, options = list(arguments[: cpu.NUM_RENDER_TENSORS]), Options(*arguments[cpu.NUM_RENDER_TENSORS :])
    if not _supported(tensors):
        return None
    tensors[0] = _aligned(tensors[0], options.representation)
    field, rays = cpu.render_structures(tensors, options)
    outputs = cpu.render_outputs(tensors)
    results = RenderOutputs.of(**outputs._asdict())
    _call("volume_render", tensors[0], (field, rays, results), (field, rays, None))
    return tuple(outputs)


def volume_render_backward(
    gradients: Tensors, arguments: OptionalTensors, needed: Sequence[bool], *options: Any
) -> list[torch.Tensor] | None:
    """See `spherehead::volume_render_backward`."""
    if not _supported(arguments):
        return None
    parsed = Options(*options)
    planes = _aligned(arguments[0], parsed.representation)
    arguments = [planes, *arguments[1:]]
    field, rays = cpu.render_structures(arguments, parsed)
    of_field, of_rays = _field_gradients(arguments, needed), cpu.ray_gradients(arguments, needed)
    wanted = cpu.render_gradients_structure(gradients, of_field, of_rays)
    _call("volume_render_backward", planes, (field, rays, wanted), (field, rays, wanted))
    return [of_field[0].to(planes.dtype), *of_field[1:], *of_rays]


def query_field(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """See `spherehead::query_field`."""
    *tensors, need_colors = arguments[: cpu.NUM_QUERY_TENSORS + 1]
    options = Options(*arguments[cpu.NUM_QUERY_TENSORS + 1 :])
    if not _supported(tensors):
        return None
    tensors[0] = _aligned(tensors[0], options.representation)
    field, points = cpu.query_structures(tensors, options)
    sigma, colors = cpu.query_outputs(tensors, need_colors)
    results = sigma, colors if need_colors else None
    _call("query_field", tensors[0], (field, points, *results), (field, points, None))
    return sigma, colors


def query_field_backward(
    gradients: OptionalTensors, arguments: Tensors, needed: Sequence[bool], *options: Any
) -> list[torch.Tensor] | None:
    """See `spherehead::query_field_backward`."""
    if not _supported(arguments):
        return None
    parsed = Options(*options)
    planes = _aligned(arguments[0], parsed.representation)
    arguments = [planes, *arguments[1:]]
    field, points = cpu.query_structures([*arguments, None], parsed)
    of_field = _field_gradients(arguments, needed)
    of_points = torch.empty_like(arguments[5]) if needed[2] else arguments[5].new_empty(0)
    wanted = FieldGradients.of_tensors(of_field)
    launched = field, points, *gradients, wanted, of_points if needed[2] else None
    _call("query_field_backward", planes, launched, (field, points, wanted))
    return [of_field[0].to(planes.dtype), *of_field[1:], of_points]


# ---- launching ----


def _launcher(name: str) -> Any | None:
    library = native.load()
    return None if library is None else library.cuda(name)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _call(name: str, planes: torch.Tensor, arguments: Sequence[Any], for_workspace: Sequence[Any]) -> None:
    """Launch a kernel on the current stream, with a workspace as large as it needs."""
    where = {
        "stream": _stream(planes.device),
        "device": planes.device.index or 0,
        "texel_type": _TEXEL_TYPES[planes.dtype],
        "deterministic": int(torch.are_deterministic_algorithms_enabled()),
    }
    num_bytes = _workspace_bytes(name, for_workspace, where)
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=planes.device)
    options = CudaOptions.of(workspace=workspace, workspace_bytes=num_bytes, **where)
    _check(name, _launcher(f"{name}_cuda")(*map(cpu.as_pointer, (*arguments, options))))


def _workspace_bytes(name: str, arguments: Sequence[Any], where: dict[str, int | None]) -> int:
    size = _launcher(f"{name.removesuffix('_backward')}_workspace_cuda")
    options, num_bytes = CudaOptions.of(workspace=None, workspace_bytes=0, **where), ctypes.c_int64()
    _check(name, size(*map(cpu.as_pointer, (*arguments, options)), ctypes.byref(num_bytes)))
    return num_bytes.value


def _check(name: str, status: int) -> None:
    if status != 0:
        raise RuntimeError(f"{name}: CUDA error {status} (cudaError_t)")


# ---- arguments ----


def _supported(tensors: OptionalTensors) -> bool:
    """Whether there is a kernel for the dtypes and widths of an op's arguments; the field's come first."""
    planes, hidden_weight, _, output_weight, *_ = tensors
    widths = (*hidden_weight.shape, output_weight.shape[0] - 1)
    rest_fits = all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors[1:])
    return rest_fits and 1 <= min(widths) and max(widths) <= _MAX_WIDTH and is_available(planes.dtype)


def _aligned(planes: torch.Tensor, representation: str) -> torch.Tensor:
    """Return planes every texel of which begins at a multiple of 16 bytes and has memory of its own."""
    channel_axis = cpu.LAYOUTS[representation].channel_axis
    steps = [planes.stride(i) for i, size in enumerate(planes.shape) if size > 1 and i != channel_axis]
    whole = all(step > 0 and step * planes.element_size() % _ALIGNMENT == 0 for step in steps)
    if whole and planes.data_ptr() % _ALIGNMENT == 0:
        return planes
    return planes.movedim(channel_axis, -1).clone(memory_format=torch.contiguous_format).movedim(-1, channel_axis)


def _field_gradients(tensors: OptionalTensors, needed: Sequence[bool]) -> list[torch.Tensor]:
    """Return zeros for the gradients of the field, those of planes in float32 and with the strides of the planes."""
    planes = tensors[0]
    of_planes = planes.new_empty(0, dtype=torch.float32)
    if needed[0]:
        of_planes = torch.empty_strided(
            planes.shape, planes.stride(), dtype=torch.float32, device=planes.device
        ).zero_()
    return [of_planes, *cpu.field_gradients(tensors, [False, needed[1]])[1:]]
