"""Upsampling with a bias in one pass equals its steps."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.threads import one_thread  # noqa: F401  small images
from torch_utils import native
from torch_utils.ops.upfirdn2d import setup_filter, upsample2d
from torch_utils.ops.upsample_bias import upsample_bias, upsample_bias_ref

FIR = setup_filter((1, 3, 3, 1))
LOPSIDED = torch.tensor([1.0, 2.0, -4.0, 0.5]).outer(torch.tensor([0.25, 3.0, 1.0, -1.0]))  # tells the taps apart
ROUNDING = {"rtol": 1e-6, "atol": 2e-6}  # sums of four float32 products of unit size, in another order


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def kernel():
    """Skip the test where there is no kernel."""
    if native.load() is None:
        pytest.skip(f"native kernels are not available: {native.reason()}")


@pytest.mark.parametrize("fir", [FIR, LOPSIDED, LOPSIDED.T, torch.zeros(4, 4)])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (1, 3, 7, 5), (2, 8, 4, 9), (1, 13, 1, 30), (3, 192, 6, 40), (1, 5000, 3, 6), (1, 3, 90, 1500)],
)
def test_upsample_bias_equals_reference_in_float64(kernel, shape, fir):
    x, bias = random(*shape), random(shape[1], seed=1)
    expected = upsample_bias_ref(x.double(), fir.double(), bias.double()).float()
    torch.testing.assert_close(upsample_bias(x, fir, bias), expected, rtol=1e-6, atol=3e-5 if fir is not FIR else 2e-6)
    torch.testing.assert_close(upsample_bias(x, FIR), upsample2d(x, FIR), **ROUNDING)


def test_upsample_bias_result_is_channels_last(kernel):
    assert upsample_bias(random(1, 3, 4, 4), FIR).is_contiguous(memory_format=torch.channels_last)


def test_upsample_bias_order_in_memory_does_not_matter(kernel):
    x, bias = random(2, 6, 8, 5), random(12, seed=1)[::2]
    expected = upsample_bias(x, FIR, bias.clone())
    for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(upsample_bias(other, FIR.T.contiguous().T, bias), expected)
    assert torch.equal(
        upsample_bias(random(2, 6, 9, 5)[:, :, 1:], FIR), upsample_bias(random(2, 6, 9, 5)[:, :, 1:].clone(), FIR)
    )


def test_upsample_bias_threads_do_not_matter(kernel):
    x, bias = random(1, 32, 60, 60), random(32, seed=1)
    expected = upsample_bias(x, FIR, bias)
    torch.set_num_threads(2)
    try:
        assert torch.equal(upsample_bias(x, FIR, bias), expected)
    finally:
        torch.set_num_threads(1)


def test_upsample_bias_filter_that_is_no_outer_product_takes_the_reference(kernel):
    fir = FIR + 0.1 * torch.eye(4)
    x = random(1, 3, 5, 6)
    torch.testing.assert_close(upsample_bias(x, fir), upsample2d(x, fir), **ROUNDING)


def test_upsample_bias_nan_reaches_only_its_neighbours(kernel):
    x = torch.zeros(1, 2, 6, 6)
    x[0, 1, 0, 3] = torch.nan
    nans = upsample_bias(x, FIR).isnan().nonzero()
    assert torch.equal(nans, upsample2d(x, FIR).isnan().nonzero()) and len(nans) == 3 * 4


def test_upsample_bias_gradients_are_those_of_the_reference():
    x, bias = random(1, 3, 4, 5).requires_grad_(), random(3, seed=1).requires_grad_()
    out = upsample_bias(x, FIR, bias)
    ours = torch.autograd.grad(out.square().sum(), (x, bias))
    expected = torch.autograd.grad((upsample2d(x, FIR) + bias[:, None, None]).square().sum(), (x, bias))
    torch.testing.assert_close(ours, expected, **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_upsample_bias_other_types_take_the_reference(dtype):
    x, bias = random(1, 3, 4, 5).to(dtype), random(3, seed=1)
    assert torch.equal(upsample_bias(x, FIR, bias), upsample_bias_ref(x, FIR, bias))


def test_upsample_bias_empty_images_stay_empty(kernel):
    assert upsample_bias(torch.zeros(0, 3, 4, 4), FIR).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("x", "fir", "bias", "name"),
    [
        (random(3, 4, 4), FIR, None, "x"),
        (random(1, 3, 4, 4), FIR[:3], None, "fir"),
        (random(1, 3, 4, 4), FIR, random(4), "bias"),
    ],
)
def test_upsample_bias_wrong_shape_raises_value_error_that_names_it(x, fir, bias, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected shape .*, got"):
        upsample_bias(x, fir, bias)


def test_upsample_bias_registration_is_sound(kernel):
    arguments = (random(1, 3, 4, 5), FIR, random(3, seed=1))
    torch.library.opcheck(
        torch.ops.spherehead.upsample_bias.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
