"""Calls of the CPU kernels of the volume renderer: tensors to the C structures of csrc/volume_render.h and back.

The functions have the arguments of the ops registered in volume_render_ops.py; without a kernel they return None.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from torch_utils import native
from training.config import RenderingConfig
from training.volumetric_rendering.decoder import DecoderWeights
from training.volumetric_rendering.reference import MarchOutput

NUM_RENDER_TENSORS, NUM_QUERY_TENSORS = 13, 7  # before the options, among the arguments of the ops
_ACTIVATION_IDS = {"none": 0, "sigmoid": 1, "lrelu": 2}
_SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}


class Options(NamedTuple):
    """What an op is told besides tensors: how to evaluate the field, and what it needs of a `RenderingConfig`."""

    representation: str
    activation: str
    depth_resolution: int
    depth_resolution_importance: int
    box_warp: float
    crop_margin: float | None
    density_noise: float
    disparity_space_sampling: bool

    @classmethod
    def of(cls, representation: str, activation: str, config: RenderingConfig) -> Options:
        """Choose from a configuration."""
        disparity = config.disparity_space_sampling and not config.auto_range
        values = {name: getattr(config, name) for name in cls._fields[2:-1]}
        return cls(representation, activation, **values, disparity_space_sampling=disparity)

    def rendering(self) -> RenderingConfig:
        """Return a configuration with these values."""
        return RenderingConfig(**dict(zip(self._fields[2:], self[2:])))


OPTIONS_SCHEMA = (
    "str representation, str activation, int depth_resolution, int depth_resolution_importance, float box_warp, "
    "float? crop_margin, float density_noise, bool disparity_space_sampling"
)


class PlaneLayout(NamedTuple):
    """How a representation's planes are handed to kernels."""

    id: int
    """Of the representation in csrc/representations.h."""
    stack: Callable[[torch.Tensor], torch.Tensor]
    """Views what `Representation.unpack` returns as `[B, P, C, D, H, W]`, with D = 1 for planes."""
    channel_axis: int
    """Of what `Representation.unpack` returns."""
    plane_depth: Callable[[torch.Tensor], int]
    """Reads off it what the representation's constructor was told."""


LAYOUTS = {
    "dual_spherical": PlaneLayout(0, lambda planes: planes.flatten(1, 2).unsqueeze(3), 3, lambda planes: 3),
    "tri_plane": PlaneLayout(1, lambda planes: planes.unsqueeze(3), 2, lambda planes: 1),
    "tri_grid": PlaneLayout(2, lambda planes: planes, 2, lambda planes: planes.shape[3]),
}
"""By the name that representations are registered under; one row for each that has a kernel."""


class _Structure(ctypes.Structure):
    @classmethod
    def of(cls, **values: Any) -> _Structure:
        """Fill the structure; tensors become pointers, None a null pointer."""
        fields = {name for name, _ in cls._fields_}
        if fields != set(values):
            raise TypeError(f"{cls.__name__}: expected {sorted(fields)}, came {sorted(values)}")
        return cls(**{k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in values.items()})


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


def _integers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names]


def _numbers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_double) for name in names]


class Field(_Structure):
    """A radiance field: planes and decoder."""

    _fields_ = [
        *_pointers("planes", "hidden_weight", "hidden_bias", "output_weight", "output_bias"),
        *_integers("scenes", "channels", "depth", "height", "width"),
        *_integers("scene_stride", "plane_stride", "depth_stride", "row_stride", "column_stride"),
        *_integers("hidden", "outputs", "representation", "activation"),
        *_numbers("box_scale"),
    ]


class FieldGradients(_Structure):
    """Where gradients of a field go."""

    _fields_ = _pointers("planes", "hidden_weight", "hidden_bias", "output_weight", "output_bias")

    @classmethod
    def of_tensors(cls, tensors: Sequence[torch.Tensor]) -> FieldGradients:
        """Describe tensors, of which empty ones become null pointers."""
        return cls.of(**{name: _or_null(tensor) for (name, _), tensor in zip(cls._fields_, tensors, strict=True)})


class Rays(_Structure):
    """Rays, how they are sampled, and the random numbers."""

    _fields_ = [
        *_pointers("origins", "directions", "near_limits", "far_limits", "coarse_jitter", "importance"),
        *_pointers("coarse_noise", "fine_noise"),
        *_integers("rays", "coarse", "fine", "disparity"),
        *_numbers("crop_limit", "density_noise"),
    ]


class RenderOutputs(_Structure):
    """Where results of marching go."""

    _fields_ = _pointers("features", "depth", "accumulation", "depth_range")


class RenderGradients(_Structure):
    """Gradients of the results, and where those of the arguments go."""

    _fields_ = [
        *_pointers("features", "depth", "accumulation"),
        ("field", FieldGradients),
        *_pointers("origins", "directions", "near_limits", "far_limits"),
    ]


class Points(_Structure):
    """Points and density noise."""

    _fields_ = [*_pointers("points", "noise"), *_integers("count"), *_numbers("density_noise")]


def is_available(dtype: torch.dtype) -> bool:
    """Whether there are kernels for planes of a dtype."""
    return _kernel("volume_render", dtype) is not None


def _kernel(name: str, dtype: torch.dtype) -> Any | None:
    library = native.load()
    suffix = _SUFFIXES.get(dtype)
    return None if library is None or suffix is None else library.cpu(f"{name}_{suffix}")


def call(kernel: Any, *arguments: Any) -> None:
    """Call a kernel with structures, tensors and None; raise if it fails."""
    status = kernel(*map(as_pointer, arguments))
    if status == 1:
        raise MemoryError("volume renderer: not enough memory for its working space")
    if status != 0:
        raise RuntimeError(f"volume renderer: the kernel failed with status {status}")


def as_pointer(argument: ctypes.Structure | torch.Tensor | None) -> Any:
    """Return what a kernel is called with."""
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def channels_last(representation: str, planes: torch.Tensor) -> torch.Tensor:
    """Return planes of which each has its channels last in memory; the same if they are so already.

    Kernels could read an image `[B, H, W, P C]` in place, but texels are then far apart: 1.5 times as slow on a CPU.
    """
    axis = LAYOUTS[representation].channel_axis
    last = planes.movedim(axis, -1)
    return planes if last.is_contiguous() else last.contiguous().movedim(-1, axis)


# ---- the ops ----


def volume_render(*arguments: Any) -> tuple[torch.Tensor, ...] | None:
    """See `spherehead::volume_render`."""
    tensors, options = arguments[:NUM_RENDER_TENSORS], Options(*arguments[NUM_RENDER_TENSORS:])
    kernel = _kernel("volume_render", tensors[0].dtype)
    if kernel is None:
        return None
    field, rays = render_structures(tensors, options)
    outputs = render_outputs(tensors)
    call(kernel, field, rays, RenderOutputs.of(**outputs._asdict()))
    return tuple(outputs)


def volume_render_backward(
    gradients: Sequence[torch.Tensor], arguments: Sequence[torch.Tensor | None], needed: Sequence[bool], *options: Any
) -> list[torch.Tensor] | None:
    """See `spherehead::volume_render_backward`."""
    kernel = _kernel("volume_render_backward", arguments[0].dtype)
    if kernel is None:
        return None
    field, rays = render_structures(arguments, Options(*options))
    of_field, of_rays = field_gradients(arguments, needed), ray_gradients(arguments, needed)
    call(kernel, field, rays, render_gradients_structure(gradients, of_field, of_rays))
    return [*of_field, *of_rays]


def query_field(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """See `spherehead::query_field`."""
    (*tensors, need_colors), options = arguments[: NUM_QUERY_TENSORS + 1], Options(*arguments[NUM_QUERY_TENSORS + 1 :])
    kernel = _kernel("query_field", tensors[0].dtype)
    if kernel is None:
        return None
    field, points = query_structures(tensors, options)
    sigma, colors = query_outputs(tensors, need_colors)
    call(kernel, field, points, sigma, colors if need_colors else None)
    return sigma, colors


def query_field_backward(
    gradients: Sequence[torch.Tensor | None], arguments: Sequence[torch.Tensor], needed: Sequence[bool], *options: Any
) -> list[torch.Tensor] | None:
    """See `spherehead::query_field_backward`."""
    kernel = _kernel("query_field_backward", arguments[0].dtype)
    if kernel is None:
        return None
    field, points = query_structures([*arguments, None], Options(*options))
    of_field = field_gradients(arguments, needed)
    of_points = torch.empty_like(arguments[5]) if needed[2] else arguments[5].new_empty(0)
    call(kernel, field, points, *gradients, FieldGradients.of_tensors(of_field), of_points if needed[2] else None)
    return [*of_field, of_points]


# ---- what CPU and CUDA share ----


def render_structures(tensors: Sequence[torch.Tensor | None], options: Options) -> tuple[Field, Rays]:
    """Describe the arguments of `spherehead::volume_render`."""
    return _field(tensors, options), _rays(tensors, options)


def query_structures(tensors: Sequence[torch.Tensor | None], options: Options) -> tuple[Field, Points]:
    """Describe the arguments of `spherehead::query_field`, whose last tensor is the noise."""
    points, noise = tensors[5:7]
    of_points = Points.of(points=points, noise=noise, count=points.shape[1], density_noise=options.density_noise)
    return _field(tensors, options), of_points


def render_outputs(tensors: Sequence[torch.Tensor | None]) -> MarchOutput:
    """Make room for the results of `spherehead::volume_render`."""
    origins, num_outputs = tensors[5], tensors[4].shape[0]
    return MarchOutput(*(origins.new_empty(*origins.shape[:2], *w) for w in ((num_outputs - 1,), (), (), (2,))))


def query_outputs(tensors: Sequence[torch.Tensor | None], need_colors: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Make room for the results of `spherehead::query_field`."""
    points, num_outputs = tensors[5], tensors[4].shape[0]
    colors = points.new_empty((*points.shape[:2], num_outputs - 1) if need_colors else (0,))
    return points.new_empty(points.shape[:2]), colors


def field_gradients(tensors: Sequence[torch.Tensor | None], needed: Sequence[bool]) -> list[torch.Tensor]:
    """Return zeros for the gradients of planes and decoder, which kernels add to; empty where they are not needed."""
    flags = [needed[0], *[needed[1]] * 4]
    return [torch.zeros_like(x) if flag else x.new_empty(0) for x, flag in zip(tensors, flags)]


def ray_gradients(tensors: Sequence[torch.Tensor | None], needed: Sequence[bool]) -> list[torch.Tensor]:
    """Make room for the gradients of origins, directions and limits; empty where they are not needed."""
    return [torch.empty_like(x) if needed[2] else x.new_empty(0) for x in tensors[5:9]]


def render_gradients_structure(
    gradients: Sequence[torch.Tensor], of_field: Sequence[torch.Tensor], of_rays: Sequence[torch.Tensor]
) -> RenderGradients:
    """Describe given gradients and where those of the arguments go."""
    features, depth, accumulation = gradients
    origins, directions, near, far = map(_or_null, of_rays)
    return RenderGradients.of(
        features=features,
        depth=depth,
        accumulation=accumulation,
        field=FieldGradients.of_tensors(of_field),
        origins=origins,
        directions=directions,
        near_limits=near,
        far_limits=far,
    )


def _or_null(tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor if tensor.numel() else None


def _field(tensors: Sequence[torch.Tensor | None], options: Options) -> Field:
    planes, *weights = tensors[:5]
    layout = LAYOUTS[options.representation]
    stacked = layout.stack(planes)
    scenes, _, channels, depth, height, width = stacked.shape
    scene_stride, plane_stride, channel_stride, depth_stride, row_stride, column_stride = stacked.stride()
    if channel_stride != 1 and channels > 1:
        raise ValueError(f"planes: expected channels adjacent in memory, came stride {channel_stride}")
    return Field.of(
        planes=stacked,
        **DecoderWeights(*weights)._asdict(),
        scenes=scenes,
        channels=channels,
        depth=depth,
        height=height,
        width=width,
        scene_stride=scene_stride,
        plane_stride=plane_stride,
        depth_stride=depth_stride,
        row_stride=row_stride,
        column_stride=column_stride,
        hidden=weights[0].shape[0],
        outputs=weights[2].shape[0] - 1,
        representation=layout.id,
        activation=_ACTIVATION_IDS[options.activation],
        box_scale=2 / options.box_warp,
    )


def _rays(tensors: Sequence[torch.Tensor | None], options: Options) -> Rays:
    origins, directions, near, far, coarse_jitter, importance, coarse_noise, fine_noise = tensors[5:]
    margin = options.crop_margin
    return Rays.of(
        origins=origins,
        directions=directions,
        near_limits=near,
        far_limits=far,
        coarse_jitter=coarse_jitter,
        importance=importance,
        coarse_noise=coarse_noise,
        fine_noise=fine_noise,
        rays=origins.shape[1],
        coarse=options.depth_resolution,
        fine=options.depth_resolution_importance,
        disparity=int(options.disparity_space_sampling),
        crop_limit=float("inf") if margin is None else options.box_warp / 2 - margin,
        density_noise=options.density_noise,
    )
