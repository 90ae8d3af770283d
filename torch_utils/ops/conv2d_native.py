"""3x3 convolution of large images on a CPU, in one pass with modulation, upsampling, noise, bias and activation."""

from __future__ import annotations

import ctypes
import math
import weakref
from dataclasses import dataclass

import torch

from torch_utils import native
from torch_utils.ops.bias_act import ACTIVATIONS, LRELU_SLOPE, bias_act
from torch_utils.ops.conv2d_resample import conv2d_resample

_EPS = 1e-8  # of demodulation, as in the published layers
_SLOPES = {"linear": 1.0, "lrelu": LRELU_SLOPE}  # activations that the kernel has
_GROUP = 8  # channels that the kernel takes at a time
_SAMPLES = 4096  # weights compared on every call
# Least in_channels * out_channels * H * W. Time of PyTorch's layer (modulation, convolution, noise, bias, activation)
# over ours, one thread of a Zen 3 core (AVX2), weights not in the caches, batch 1:
#     channels    512->512  512->256  256->256  128->128  64->64  32->32      up: 512->512  256->256  128->128  64->64
#     at 4x4        2.4       2.2       1.6       1.3      0.9     0.9               2.1       1.8       1.3     1.3
#     at 8x8        4.0       2.8       1.9       1.5      1.0     0.9               3.5       1.5       1.4     1.7
#     at 16x16      3.3       3.0       2.4       1.8      1.3     1.0               1.7       2.1       2.6     1.3
#     at 64x64      3.2       2.6       2.6       2.2      1.6     1.2                -        1.2       1.1     1.5
_MIN_WORK = 2**18  # 128 channels at 4x4, 64 at 8x8, 32 at 16x16
_CACHE_LIMIT_BYTES = 512 * 2**20


def modulated_conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor | None,
    *,
    demodulate: bool = True,
    up: int = 1,
    fir: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "linear",
    gain: float = 1.0,
    clamp: float | None = None,
) -> torch.Tensor:
    """Compute a layer `bias_act(scale * conv(x * styles, weight) + noise, bias)`, with zeros around the image.

    `scale` is `(sum over i, k, l of (weight * styles)^2 + 1e-8)^-1/2` (StyleGAN2, Karras et al. 2020, eq. 3). On a CPU,
    float32 images without gradients are convolved by Winograd's method F(4x4, 3x3) (Lavin and Gray 2016), where
    `supported` says that a kernel is there and pays; all else is computed by `modulated_conv3x3_ref`. Errors of the
    kernel are below 1e-5 of the largest result.

    The kernel needs transformed weights, 4 times as large as the weights. They are kept per weight tensor, up to 512
    MiB in all, until that tensor dies or changes; `cached_bytes` says how much that is. Pass the parameter itself: a
    product of it would be transformed again on every call.

    Args:
        x: features `[B, I, H, W]`, any order in memory; channels last is not copied.
        weight: `[O, I, 3, 3]`.
        styles: factors of the input channels, `[B, I]`; None is a plain convolution without `scale`.
        demodulate: multiply by `scale`.
        up: 1, or 2 to double the size through `fir`, as `conv2d_resample` does.
        fir: `[4, 4]` filter, where `up` is 2.
        noise: `[up * H, up * W]` or `[B or 1, 1, up * H, up * W]`, added before the bias; None adds nothing.
        bias: `[O]`; None adds nothing.
        activation: a name of `torch_utils.ops.bias_act.ACTIVATIONS`.
        gain: factor on top of the activation's own default gain.
        clamp: bound of the result's absolute value, in the scale of the result; None does not clamp.

    Returns:
        `[B, O, up * H, up * W]`, channels last in memory.

    Raises:
        ValueError: for a wrong shape, an unknown activation, or another `up` than 1 and 2.
    """
    _check(x, weight, styles, up, fir, noise, bias, activation, clamp)
    tensors = [x, weight, styles, fir, noise, bias]
    options = (demodulate, up, activation, gain, clamp)
    if not _is_suited(tensors, up, activation) or not supported(x, weight, up):
        return modulated_conv3x3_ref(*tensors, *options)
    return _modulated_conv3x3(*tensors, *options)


def supported(x: torch.Tensor, weight: torch.Tensor, up: int = 1) -> bool:
    """Say whether `modulated_conv3x3` has a kernel for these tensors, and is expected to be faster with it.

    Args:
        x: features `[B, I, H, W]`.
        weight: `[O, I, k, k]`.
        up: 1 or 2.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32 or x.numel() == 0:
        return False
    out_channels, in_channels, *kernel = weight.shape
    if list(kernel) != [3, 3] or in_channels % _GROUP or out_channels % _GROUP:
        return False
    return _is_built() and _pays(x.shape, out_channels)


def modulated_conv3x3_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor | None,
    fir: torch.Tensor | None,
    noise: torch.Tensor | None,
    bias: torch.Tensor | None,
    demodulate: bool,
    up: int,
    activation: str,
    gain: float,
    clamp: float | None,
) -> torch.Tensor:
    """Compute `modulated_conv3x3` by PyTorch's operations; any device, dtype and gradients."""
    if styles is not None:
        x = x * styles[:, :, None, None]
    x = conv2d_resample(x, weight, fir, up=up, padding=1)
    if styles is not None and demodulate:
        x = x * _scales(styles, weight.square().sum(dim=(2, 3)))[:, :, None, None]
    x = x if noise is None else x + noise
    return bias_act(x, bias, activation, gain, clamp).contiguous(memory_format=torch.channels_last)


def _scales(styles: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """Return the demodulation factors `[B, O]` for the energy `[O, I]` of the kernels."""
    return (styles.square() @ energy.T + _EPS).rsqrt()


def _check(x, weight, styles, up, fir, noise, bias, activation, clamp) -> None:
    if up not in (1, 2):
        raise ValueError(f"up: expected 1 or 2, got {up}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"clamp: expected a number of at least 0 or None, got {clamp}")
    _check_shape("x", x, x.ndim == 4, "[B, I, H, W]")
    batch, channels, height, width = x.shape
    outputs = weight.shape[0] if weight.ndim else 0
    _check_shape("weight", weight, list(weight.shape[1:]) == [channels, 3, 3], f"[O, {channels}, 3, 3]")
    if styles is not None:
        _check_shape("styles", styles, list(styles.shape) == [batch, channels], f"[{batch}, {channels}]")
    if up == 2:
        if fir is None:
            raise ValueError("fir: expected a [4, 4] filter where up is 2, got None")
        _check_shape("fir", fir, list(fir.shape) == [4, 4], "[4, 4]")
    if noise is not None:
        size = [up * height, up * width]
        matches = list(noise.shape) in (size, [1, 1, *size], [batch, 1, *size])
        _check_shape("noise", noise, matches, f"{size} or [{batch} or 1, 1, {size[0]}, {size[1]}]")
    if bias is not None:
        _check_shape("bias", bias, list(bias.shape) == [outputs], f"[{outputs}]")


def _check_shape(name: str, value: torch.Tensor, matches: bool, expected: str) -> None:
    if not matches:
        raise ValueError(f"{name}: expected shape {expected}, got {list(value.shape)}")


def _is_suited(tensors: list[torch.Tensor | None], up: int, activation: str) -> bool:
    """Say whether the kernel can compute this at all: no gradients, everything float32 on the CPU."""
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    return activation in _SLOPES and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in given)


def _pays(shape: torch.Size, out_channels: int) -> bool:
    return shape[1] * out_channels * shape[2] * shape[3] >= _MIN_WORK


@torch.compiler.assume_constant_result
def _is_built() -> bool:
    return native.load() is not None


_modulated_conv3x3 = torch.library.custom_op(
    "spherehead::modulated_conv3x3",
    modulated_conv3x3_ref,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? styles, Tensor? fir, Tensor? noise, Tensor? bias, bool demodulate,"
    " int up, str activation, float gain, float? clamp) -> Tensor",
)


@_modulated_conv3x3.register_fake
def _modulated_conv3x3_fake(x, weight, styles, fir, noise, bias, demodulate, up, activation, gain, clamp):
    size = (x.shape[0], weight.shape[0], up * x.shape[2], up * x.shape[3])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


class _WinogradConv(ctypes.Structure):
    """The struct of the same name in winograd.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "packed", "styles", "scales", "fir", "noise", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "in_channels", "out_channels")),
        *((name, ctypes.c_int64) for name in ("noise_stride", "threads")),
        *((name, ctypes.c_float) for name in ("slope", "gain", "clamp")),
    )


@_modulated_conv3x3.register_kernel("cpu")
def _modulated_conv3x3_cpu(x, weight, styles, fir, noise, bias, demodulate, up, activation, gain, clamp):
    tensors = [x, weight, styles, fir, noise, bias]
    library = native.load()
    if library is None or not _is_suited(tensors, up, activation) or weight.shape[0] % _GROUP or x.shape[1] % _GROUP:
        return modulated_conv3x3_ref(*tensors, demodulate, up, activation, gain, clamp)
    packed = _packed_weight(library, weight, up)
    scales = _scales(styles, packed.energy) if styles is not None and demodulate else None
    x = x.contiguous(memory_format=torch.channels_last)
    batch, in_channels, height, width = x.shape
    size = (batch, weight.shape[0], up * height, up * width)
    out = torch.empty(size, memory_format=torch.channels_last)
    fir = 4.0 * fir if up == 2 else None  # a quarter of the zero-stuffed pixels are not zero
    small = [None if tensor is None else tensor.contiguous() for tensor in (styles, scales, fir, noise, bias)]
    arguments = _WinogradConv(
        *(None if tensor is None else tensor.data_ptr() for tensor in (x, packed.data, *small, out)),
        *(batch, height, width, in_channels, weight.shape[0]),
        noise_stride=size[2] * size[3] if noise is not None and noise.ndim == 4 and noise.shape[0] > 1 else 0,
        threads=torch.get_num_threads(),
        slope=_SLOPES[activation],
        gain=gain * ACTIVATIONS[activation].default_gain,
        clamp=math.inf if clamp is None else clamp,
    )
    if library.cpu("winograd_conv" if up == 1 else "winograd_up_conv")(ctypes.byref(arguments)):
        raise MemoryError(f"modulated_conv3x3: no memory for the work space of {in_channels} and {size[1]} channels")
    return out


@dataclass(frozen=True)
class _PackedWeight:
    """Transformed weights, and what they were made of."""

    weight: weakref.ref
    fingerprint: tuple[int, int] | None
    sample: torch.Tensor
    """Some of the weights: changes through `.data` leave no other trace."""
    data: torch.Tensor
    energy: torch.Tensor
    """`[O, I]`, sums of squares of the kernels."""


_cache: dict[tuple[int, int], _PackedWeight] = {}  # by identity of the weight and `up`; the least recently used first


def cached_bytes() -> int:
    """Return the memory of the transformed weights kept for the next call."""
    return sum(entry.data.nbytes for entry in list(_cache.values()))


def clear_cache() -> None:
    """Forget the transformed weights."""
    _cache.clear()


def _packed_weight(library, weight: torch.Tensor, up: int) -> _PackedWeight:
    """Return the transformed weights, made now or by an earlier call with the same unchanged tensor."""
    if weight.is_inference():  # such tensors do not say whether they have changed
        return _pack(library, weight, up, None)
    key, fingerprint = (id(weight), up), (weight._version, weight.data_ptr())
    entry = _cache.pop(key, None)
    if entry is None or not _is_current(entry, weight, fingerprint):
        entry = _pack(library, weight, up, fingerprint)
    free_bytes = _CACHE_LIMIT_BYTES - entry.data.nbytes
    for old in list(_cache):
        if cached_bytes() <= free_bytes:
            break
        _cache.pop(old, None)
    if free_bytes >= 0:
        _cache[key] = entry
    return entry


def _is_current(entry: _PackedWeight, weight: torch.Tensor, fingerprint: tuple[int, int]) -> bool:
    same = entry.weight() is weight and entry.fingerprint == fingerprint
    return same and torch.equal(entry.sample, _sample(weight))


def _sample(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLES) | 1]  # an odd step meets weights of every kind


def _pack(library, weight: torch.Tensor, up: int, fingerprint: tuple[int, int] | None) -> _PackedWeight:
    key = (id(weight), up)

    def forget(_) -> None:
        _cache.pop(key, None)

    kernels = weight.detach().contiguous()
    sizes = [ctypes.c_int64(size) for size in (kernels.shape[1], kernels.shape[0])]
    data = torch.empty(library.cpu("winograd_packed_size")(*sizes))
    pack = library.cpu("winograd_pack" if up == 1 else "winograd_up_pack")
    pack(ctypes.c_void_p(kernels.data_ptr()), *sizes, ctypes.c_void_p(data.data_ptr()))
    return _PackedWeight(
        weight=weakref.ref(weight, forget),
        fingerprint=fingerprint,
        sample=_sample(weight).clone(),
        data=data,
        energy=kernels.square().sum(dim=(2, 3)),
    )
