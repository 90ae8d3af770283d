"""Upsampling of the image stream by two, with the bias of what is added to it."""

from __future__ import annotations

import ctypes

import torch

from torch_utils import native
from torch_utils.ops.upfirdn2d import upsample2d

_TAPS = 4
_NO_MEMORY, _NOT_SEPARABLE = 1, 2


def upsample_bias(x: torch.Tensor, fir: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `upsample2d(x, fir) + bias`.

    The kernel, for float32 on a CPU without gradients, writes the image once; it wants filters that are outer products.
    All else is computed by `upsample_bias_ref`.

    Args:
        x: images `[B, C, H, W]`, any order in memory; channels last is not copied.
        fir: `[4, 4]` filter.
        bias: `[C]`; None adds nothing.

    Returns:
        `[B, C, 2 H, 2 W]`, memory of its own; channels last from the kernel.

    Raises:
        ValueError: for a wrong shape.
    """
    _check_shape("x", x, x.ndim == 4, "[B, C, H, W]")
    _check_shape("fir", fir, list(fir.shape) == [_TAPS, _TAPS], f"[{_TAPS}, {_TAPS}]")
    if bias is not None:
        _check_shape("bias", bias, list(bias.shape) == [x.shape[1]], f"[{x.shape[1]}]")
    if not _is_suited(x, fir, bias) or native.load() is None:
        return upsample_bias_ref(x, fir, bias)
    return _upsample_bias(x, fir, bias)


def upsample_bias_ref(x: torch.Tensor, fir: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute `upsample_bias` by PyTorch's operations; any device, dtype and gradients."""
    x = upsample2d(x, fir)
    return x if bias is None else x + bias.to(x.dtype)[:, None, None]


def _check_shape(name: str, value: torch.Tensor, matches: bool, expected: str) -> None:
    if not matches:
        raise ValueError(f"{name}: expected shape {expected}, got {list(value.shape)}")


def _is_suited(*tensors: torch.Tensor | None) -> bool:
    """Say whether the kernel can compute this at all: no gradients, everything float32 on the CPU."""
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in given)


_upsample_bias = torch.library.custom_op(
    "spherehead::upsample_bias",
    lambda x, fir, bias: _channels_last(upsample_bias_ref(x, fir, bias)),
    mutates_args=(),
    schema="(Tensor x, Tensor fir, Tensor? bias) -> Tensor",
)


@_upsample_bias.register_fake
def _upsample_bias_fake(x, fir, bias):
    batch, channels, height, width = x.shape
    return _channels_last(x.new_empty(batch, channels, 2 * height, 2 * width))


class _Upsample(ctypes.Structure):
    """The struct of the same name in upsample.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "fir", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels")),
    )


@_upsample_bias.register_kernel("cpu")
def _upsample_bias_cpu(x, fir, bias):
    library = native.load()
    if library is None or not _is_suited(x, fir, bias):
        return _channels_last(upsample_bias_ref(x, fir, bias))
    x, fir, bias = _channels_last(x), fir.contiguous(), None if bias is None else bias.contiguous()
    batch, channels, height, width = x.shape
    out = torch.empty((batch, channels, 2 * height, 2 * width), memory_format=torch.channels_last)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (x, fir, bias, out)]
    status = library.cpu("upsample")(ctypes.byref(_Upsample(*pointers, batch, height, width, channels)))
    if status == _NOT_SEPARABLE:
        return _channels_last(upsample_bias_ref(x, fir, bias))
    if status == _NO_MEMORY:
        raise MemoryError(f"upsample_bias: no memory for a strip of {channels} channels")
    return out


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)
