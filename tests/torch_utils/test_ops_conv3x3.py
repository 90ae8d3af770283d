"""The 3x3 convolution for training equals PyTorch's, with gradients of both orders, also by Winograd's method."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.threads import one_thread  # noqa: F401 (a fixture for every test)
from torch_utils import native
from torch_utils.ops import conv3x3 as module
from torch_utils.ops.conv3x3 import conv3x3

needs_kernel = pytest.mark.skipif(native.load() is None, reason=f"no native kernels: {native.reason()}")
WINOGRAD = {"rtol": 1e-4, "atol": 1e-4}  # float32, errors below 1e-5 of the largest value, which is below 10


def tensors(batch: int = 3, inputs: int = 32, outputs: int = 64, size: tuple[int, int] = (32, 30), dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, inputs, *size, generator=random, dtype=dtype)
    weight = torch.randn(outputs, inputs, 3, 3, generator=random, dtype=dtype) / (9 * inputs) ** 0.5
    return x.requires_grad_(), weight.requires_grad_()


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, weight, padding=1)


def all_gradients(function, x, weight):
    """Return the result, its gradients, and those of a penalty on the gradient of x, as R1 takes them."""
    out = function(x, weight)
    first = torch.autograd.grad(out.sin().sum(), [x, weight], create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), [x, weight])
    return [out, *first, *second]


def is_winograd(out: torch.Tensor) -> bool:
    return "Conv3x3" in out.grad_fn.name()


@needs_kernel
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_conv3x3_large_image_equals_pytorch_with_gradients_of_both_orders(order):
    x, weight = tensors()
    x = x.detach().to(memory_format=order).requires_grad_()
    ours, theirs = all_gradients(conv3x3, x, weight), all_gradients(plain, x, weight)
    assert is_winograd(ours[0]) and ours[0].is_contiguous(memory_format=order)
    for found, expected in zip(ours, theirs):
        scale = expected.abs().max()
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-5)  # twice Winograd's error


@needs_kernel
def test_conv3x3_frozen_weight_or_image_gets_no_gradient():
    x, weight = tensors()
    (of_x,) = torch.autograd.grad(conv3x3(x, weight.detach()).square().sum(), x)
    (of_weight,) = torch.autograd.grad(conv3x3(x.detach(), weight).square().sum(), weight)
    expected = torch.autograd.grad(plain(x, weight).square().sum(), [x, weight])
    torch.testing.assert_close([of_x / 10, of_weight / 100], [expected[0] / 10, expected[1] / 100], **WINOGRAD)


@needs_kernel
def test_conv3x3_frozen_weight_needs_no_image_afterwards():
    x, weight = tensors()
    frozen = conv3x3(x, weight.detach())
    assert frozen.grad_fn.saved_tensors[0] is None
    assert conv3x3(x, weight).grad_fn.saved_tensors[0] is not None
    expected = torch.autograd.grad(plain(x, weight.detach()).square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(frozen.square().sum(), x)[0], expected, rtol=1e-3, atol=1e-3)


@needs_kernel
def test_conv3x3_expanded_gradient_is_taken():
    x, weight = tensors()
    (ours,) = torch.autograd.grad(conv3x3(x, weight).sum(), x)  # its gradient has strides of 0
    torch.testing.assert_close(ours, torch.autograd.grad(plain(x, weight).sum(), x)[0], **WINOGRAD)


@needs_kernel
def test_conv3x3_leaves_no_transformed_weights():
    x, weight = tensors()
    module.conv2d_native.clear_cache()
    conv3x3(x, weight).sum().backward()
    assert module.conv2d_native.cached_bytes() == 0


@pytest.mark.parametrize(
    "changes", [{"dtype": torch.float64}, {"inputs": 7}, {"size": (4, 4)}], ids=["float64", "channels", "small"]
)
def test_conv3x3_without_a_kernel_is_exactly_pytorch(changes):
    x, weight = tensors(**changes)
    ours = conv3x3(x, weight)
    assert not is_winograd(ours)
    torch.testing.assert_close(ours, plain(x, weight), rtol=0, atol=0)  # the same operation


def test_conv3x3_without_gradients_is_exactly_pytorch():
    x, weight = tensors()
    with torch.no_grad():
        torch.testing.assert_close(conv3x3(x, weight), plain(x, weight), rtol=0, atol=0)  # the same operation
    assert conv3x3(x.detach(), weight.detach()).grad_fn is None
