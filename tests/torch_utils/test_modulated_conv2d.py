"""Every route through a synthesis layer and into the image stream gives the values of the plain one."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.threads import one_thread  # noqa: F401  small images
from torch_utils import native
from torch_utils.ops import conv2d_native
from torch_utils.ops import modulated_conv2d as module
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.modulated_conv2d import modulated_conv2d, modulated_layer, modulated_to_image
from torch_utils.ops.upfirdn2d import setup_filter, upsample2d

FIR = setup_filter((1, 3, 3, 1))
KERNEL = 1e-5  # relative to the largest value; measured 2e-6 to 6e-6
ROUNDING = 5e-6  # relative to the largest value: float32 sums of up to a thousand products in another order


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(ours: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def layer_arguments(batch: int, inputs: int, outputs: int, height: int, width: int, up: int, noise: str):
    shape = {"none": None, "shared": (up * height, up * width), "own": (batch, 1, up * height, up * width)}[noise]
    tensors = (
        random(batch, inputs, height, width),
        random(outputs, inputs, 3, 3, seed=1),
        random(batch, inputs, seed=2),
    )
    options = {"noise": None if shape is None else random(*shape, seed=3), "fir": FIR, "up": up}
    return tensors, options, {"bias": random(outputs, seed=4), "activation": "lrelu", "gain": 0.7, "clamp": 1.5}


@pytest.fixture
def kernel_calls(monkeypatch):
    """Count the layers that take the kernel, which here has few channels to pay for itself."""
    monkeypatch.setattr(conv2d_native, "_pays", lambda *_: True)
    calls, kernel = [], conv2d_native.modulated_conv3x3
    monkeypatch.setattr(conv2d_native, "modulated_conv3x3", lambda *args, **kw: calls.append(1) or kernel(*args, **kw))
    return calls


@pytest.mark.parametrize("noise", ["none", "shared", "own"])
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "height", "width", "is_large"),
    [(1, 16, 24, 32, 32, True), (2, 8, 8, 37, 33, True), (1, 5, 9, 40, 40, False), (1, 1, 1, 5, 3, False)]
    + [(2, 16, 8, 7, 9, False), (1, 512, 512, 4, 4, False)],
)
def test_modulated_layer_equals_plain_layer_in_float64(
    kernel_calls, batch, inputs, outputs, height, width, is_large, up, noise
):
    tensors, options, tail = layer_arguments(batch, inputs, outputs, height, width, up, noise)
    plain = modulated_conv2d(*map(double, tensors), **{name: double(value) for name, value in options.items()})
    expected = bias_act(plain, tail["bias"].double(), "lrelu", 0.7, 1.5)
    for fused in (True, False):
        with torch.no_grad():
            ours = modulated_layer(*tensors, **options, **tail, fused=fused)
        assert_near(ours, expected, KERNEL)
    assert len(kernel_calls) == (2 if is_large and native.load() is not None else 0)


@pytest.mark.parametrize("index", range(3))
def test_modulated_layer_any_gradient_takes_the_differentiable_route(kernel_calls, index):
    tensors, options, tail = layer_arguments(1, 8, 8, 32, 32, 1, "shared")
    tensors[index].requires_grad_()
    ours = torch.autograd.grad(modulated_layer(*tensors, **options, **tail).square().sum(), tensors[index])
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    plain = modulated_conv2d(*doubles, noise=options["noise"].double())
    loss = bias_act(plain, tail["bias"].double(), "lrelu", 0.7, 1.5).square().sum()
    assert_near(ours[0], torch.autograd.grad(loss, doubles)[index], 1e-5)  # sums of 1024 pixels
    assert not kernel_calls


def test_modulated_layer_other_types_and_switched_off_take_the_plain_route(kernel_calls):
    tensors, options, tail = layer_arguments(1, 8, 8, 32, 32, 1, "none")
    with torch.no_grad():
        assert modulated_layer(*map(double, tensors), **options, **tail).dtype == torch.float64
        with native.disabled():
            modulated_layer(*tensors, **options, **tail)
    assert not kernel_calls


@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("up", [None, 1, 2])
@pytest.mark.parametrize(("batch", "inputs", "outputs", "size"), [(1, 8, 3, 6), (2, 5, 1, 4), (1, 16, 192, 12)])
def test_modulated_to_image_without_gradients_equals_with(batch, inputs, outputs, size, up, clamp):
    x, weight, styles = random(batch, inputs, size, size), random(outputs, inputs, 1, 1, seed=1), random(batch, inputs)
    bias, stream = random(outputs, seed=2), {"clamp": clamp}
    if up is not None:
        stream |= {"image": random(batch, outputs, size // up, size // up, seed=3), "fir": FIR, "up": up}
    inputs_before = [tensor.clone() for tensor in (x, bias, stream.get("image", bias))]
    added = bias_act(
        modulated_conv2d(x.double(), weight.double(), styles.double(), demodulate=False), bias, clamp=clamp
    )
    if up is not None:
        added = added + (upsample2d(stream["image"].double(), FIR) if up == 2 else stream["image"])
    assert_near(modulated_to_image(x, weight, styles, bias, **stream), added, ROUNDING)
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            ours = modulated_to_image(x.contiguous(memory_format=memory_format), weight, styles, bias, **stream)
            assert_near(ours, added, ROUNDING)
    for before, after in zip(inputs_before, (x, bias, stream.get("image", bias)), strict=True):
        assert torch.equal(before, after)


def test_modulated_to_image_half_precision_features_give_an_image_of_the_parameters_type():
    x, weight, styles, bias = random(1, 8, 4, 4), random(3, 8, 1, 1, seed=1), random(1, 8), random(3, seed=2)
    image = random(1, 3, 4, 4, seed=3)
    with torch.no_grad():
        ours = modulated_to_image(x.half(), weight, styles, bias, image=image)
        expected = modulated_to_image(x.half().float(), weight, styles, bias, image=image)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=5e-3, atol=2e-2)  # half precision has 11 bits


def test_modulated_conv2d_small_images_scale_activations_with_the_same_result(monkeypatch):
    (x, weight, styles), options, _ = layer_arguments(1, 16, 16, 4, 4, 1, "none")
    results = []
    for small in (True, False):
        monkeypatch.setattr(module, "_is_small", lambda *_, small=small: small)
        results.append(modulated_conv2d(x, weight, styles, **options))
    assert not torch.equal(*results)  # rounding tells that both ways were taken
    assert_near(results[0], results[1].double(), ROUNDING)
