"""3x3 convolution for training on a CPU: Winograd's method forward, and for the gradients of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from torch_utils.ops import conv2d_native

# Least B * H * W. Weights change with every step, and are transformed on every call, which takes as long as 1000 pixels
# save. Processor time of PyTorch's convolution over ours, with that and with converting the order of channels, one
# thread of a Zen 3 core (AVX2), batch 4:
#     channels                   64->64 at 128x128    128->128 at 64x64    256->256 at 32x32    256->256 at 16x16
#     with both gradients              1.2                  1.4                  1.3                  1.0
#     with that of the image           1.5                  2.0                  1.6                  1.0
_FEWEST_PIXELS = 2048


def conv3x3(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Convolve with zeros around the image, stride 1; differentiable any number of times.

    Float32 images on a CPU that record gradients are convolved by Winograd's method F(4x4, 3x3), and so are the
    gradients with respect to `x` (see `conv2d_native.modulated_conv3x3`); differences are below 1e-5 of the largest
    result. All else, and gradients of weights, are PyTorch's.

    Args:
        x: features `[B, I, H, W]`.
        weight: `[O, I, 3, 3]`.

    Returns:
        `[B, O, H, W]`, with the order in memory of PyTorch's convolution.
    """
    records = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not records or torch.compiler.is_compiling():
        return F.conv2d(x, weight, padding=1)
    return _convolve(x, weight)


def _convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if pixels < _FEWEST_PIXELS or not conv2d_native.supported(x.detach(), weight.detach()):
        return F.conv2d(x, weight, padding=1)
    return _Conv3x3.apply(x, weight)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        learns = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if learns else None, weight)
        # Of weights that change, a new tensor, so that nothing is kept for a next call.
        out = conv2d_native.modulated_conv3x3(_to_channels_last(x), weight.detach() if learns else weight, None)
        return out if x.is_contiguous(memory_format=torch.channels_last) else _to_channels_first(out)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _convolve(gradient, weight.transpose(0, 1).flip((2, 3)))
        if ctx.needs_input_grad[1]:
            geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, not transposed, groups
            backward = torch.ops.aten.convolution_backward
            of_weight = backward(gradient, x, weight, None, *geometry, [False, True, False])[1]
        return of_x, of_weight


def _to_channels_last(x: torch.Tensor) -> torch.Tensor:
    """Return `[B, C, H, W]` with its channels last in memory."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    batch, channels, height, width = x.shape
    pixels = _transpose_each(x.flatten(2))
    return pixels.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _to_channels_first(x: torch.Tensor) -> torch.Tensor:
    """Return `[B, C, H, W]`, channels last in memory, in the usual order."""
    return _transpose_each(x.permute(0, 2, 3, 1).flatten(1, 2)).view(x.shape)


def _transpose_each(matrices: torch.Tensor) -> torch.Tensor:
    """Transpose matrices `[B, M, N]` in memory; PyTorch is more than twice as fast one by one as all at once."""
    out = matrices.new_empty(matrices.shape[0], matrices.shape[2], matrices.shape[1])
    for target, matrix in zip(out, matrices):
        target.copy_(matrix.T)
    return out
