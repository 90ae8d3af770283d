"""FIR resampling equals loops over single products, keeps sizes, and has the right derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import twins
from torch_utils.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

TAPS = (1, 3, 3, 1)
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # float64 sums of a few dozen products
ASYMMETRIC = torch.tensor([[0.5, -1.0, 2.0], [0.25, 3.0, -0.75], [1.5, 0.0, -2.5], [0.125, 1.0, 0.5]]).double()


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("up", "down", "padding"),
    [
        (1, 1, (0, 0, 0, 0)),
        (1, 1, (2, 2, 1, 1)),
        (1, 1, (1, 2, 3, 0)),
        (2, 1, (2, 1, 2, 1)),
        (1, 2, (1, 1, 1, 1)),
        (3, 2, (2, 3, 1, 0)),
        (2, 3, (-1, 2, 0, -1)),
        (1, 2, (-1, -1, -1, -1)),
    ],
)
def test_upfirdn2d_asymmetric_filter_equals_loops(up, down, padding):
    x = image(2, 3, 6, 5)
    ours = upfirdn2d(x, ASYMMETRIC, up=up, down=down, padding=padding, gain=1.7)
    for sample, expected in zip(ours.flatten(0, 1), x.flatten(0, 1), strict=True):
        twin = twins.upfirdn2d(expected.numpy(), ASYMMETRIC.numpy(), up, down, padding, 1.7)
        torch.testing.assert_close(sample, torch.from_numpy(twin), **ROUNDING)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_upfirdn2d_separable_filter_equals_outer_product(up, down):
    x, taps = image(1, 2, 9, 8), torch.tensor([0.1, 0.4, -0.2, 0.3, 0.5], dtype=torch.float64)
    options = {"up": up, "down": down, "padding": (2, 3, 1, 2), "gain": 2.5}
    torch.testing.assert_close(
        upfirdn2d(x, taps, **options), upfirdn2d(x, taps.outer(taps), **options), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("padding", [0, (1, 2, 0, 1), (-1, 1, 1, -1), 2])
def test_upfirdn2d_without_filter_equals_one_tap(padding):
    x, one = image(1, 2, 4, 5), torch.ones(1, 1, dtype=torch.float64)
    options = {"up": 2, "down": 3, "padding": padding, "gain": 0.5}
    torch.testing.assert_close(upfirdn2d(x, None, **options), upfirdn2d(x, one, **options), rtol=0, atol=0)  # copies


@pytest.mark.parametrize("options", [{}, {"up": 2, "padding": (2, 1, 2, 1)}, {"down": 2, "padding": 1}])
def test_upfirdn2d_gradients_of_both_orders_are_right(options):
    fir = setup_filter(TAPS).double()
    x = image(1, 1, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: upfirdn2d(x, fir, **options), x)
    assert torch.autograd.gradgradcheck(lambda x: upfirdn2d(x, fir, **options), x)


def test_setup_filter_short_taps_become_a_normalised_outer_product():
    fir = setup_filter((1, 2), gain=3.0)
    torch.testing.assert_close(fir, torch.tensor([[1.0, 2], [2, 4]]) / 9 * 3, rtol=1e-7, atol=0)  # one rounding
    assert fir.dtype == torch.float32


def test_setup_filter_long_taps_stay_separable_with_the_total_gain():
    taps = torch.arange(1.0, 9.0)
    fir = setup_filter(taps, gain=4.0)
    torch.testing.assert_close(fir, taps / 36 * 2, rtol=1e-6, atol=0)  # sqrt(gain) per axis
    torch.testing.assert_close(setup_filter(taps, normalize=False), taps, rtol=0, atol=0)  # untouched


@pytest.mark.parametrize("taps", [[], [[[1.0]]], 3.0])
def test_setup_filter_unusable_taps_raise_value_error(taps):
    with pytest.raises(ValueError, match="filter taps"):
        setup_filter(taps)


def test_upsample2d_constant_keeps_its_value_inside_and_fades_at_the_border():
    out = upsample2d(torch.ones(1, 1, 4, 4), setup_filter(TAPS))
    assert out.shape == (1, 1, 8, 8)
    torch.testing.assert_close(out[0, 0, 1:-1, 1:-1], torch.ones(6, 6), rtol=1e-6, atol=0)  # float32
    torch.testing.assert_close(out[0, 0, 0, 1:-1], torch.full((6,), 0.75), rtol=1e-6, atol=0)  # zeros outside


def test_downsample2d_constant_keeps_its_value_inside():
    out = downsample2d(torch.ones(1, 1, 8, 6), setup_filter(TAPS))
    assert out.shape == (1, 1, 4, 3)
    torch.testing.assert_close(out[0, 0, 1:-1, 1:-1], torch.ones(2, 1), rtol=1e-6, atol=0)  # float32


@pytest.mark.parametrize("num_taps", [3, 4, 5])
@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
def test_filter2d_any_filter_keeps_the_size(num_taps, size):
    fir = setup_filter(np.ones(num_taps))
    assert filter2d(torch.ones(2, 1, *size), fir).shape == (2, 1, *size)
    assert filter2d(torch.ones(2, 1, *size), fir, padding=1).shape == (2, 1, size[0] + 2, size[1] + 2)


def test_upfirdn2d_float16_keeps_the_dtype():
    assert upsample2d(torch.ones(1, 1, 2, 2, dtype=torch.float16), setup_filter(TAPS)).dtype == torch.float16


def test_upfirdn2d_nan_stays_where_the_filter_reaches():
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = float("nan")
    out = filter2d(x, setup_filter((1, 1, 1)))[0, 0].isnan()
    assert out[3:6, 3:6].all() and out.sum() == 9
