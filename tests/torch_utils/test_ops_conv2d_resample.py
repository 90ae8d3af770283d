"""Convolution with resampling equals its steps written out with loops and explicit zero-stuffing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import twins
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.upfirdn2d import setup_filter

FIR = setup_filter((1, 3, 3, 1)).double()
ROUNDING = {"rtol": 1e-11, "atol": 1e-12}  # float64 sums of a few hundred products


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filtered(x: torch.Tensor, up: int, padding: int | tuple, gain: float = 1.0) -> torch.Tensor:
    """Filter `[B, C, H, W]` by the loop twin."""
    padding = (padding,) * 4 if isinstance(padding, int) else padding
    maps = [torch.from_numpy(twins.upfirdn2d(m.numpy(), FIR.numpy(), up, 1, padding, gain)) for m in x.flatten(0, 1)]
    return torch.stack(maps).unflatten(0, x.shape[:2])


def expected_result(x: torch.Tensor, weight: torch.Tensor, up: int, down: int) -> torch.Tensor:
    """Follow the published sequence of steps for one group."""
    if weight.shape[-1] == 1:
        if down == 2:
            return F.conv2d(filtered(x, 1, 1)[:, :, ::2, ::2], weight)
        return filtered(F.conv2d(x, weight), 2, (2, 1, 2, 1), gain=4) if up == 2 else F.conv2d(x, weight)
    if down == 2:
        return F.conv2d(filtered(x, 1, 2), weight)[:, :, ::2, ::2]
    if up == 2:
        # The transposed convolution is a true convolution of the zero-stuffed image: correlate with the flipped kernel.
        stuffed = x.new_zeros(*x.shape[:2], 2 * x.shape[2] - 1, 2 * x.shape[3] - 1)
        stuffed[:, :, ::2, ::2] = x
        return filtered(F.conv2d(stuffed, weight.flip(2, 3), padding=2), 1, 1, gain=4)
    return F.conv2d(x, weight, padding=1)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("size", [(4, 6), (3, 5)])
def test_conv2d_resample_equals_the_published_steps(kernel_size, up, down, size):
    x, weight = random(2, 3, *size), random(4, 3, kernel_size, kernel_size, seed=1)
    ours = conv2d_resample(x, weight, FIR, up=up, down=down, padding=kernel_size // 2)
    torch.testing.assert_close(ours, expected_result(x, weight, up, down), **ROUNDING)
    if size == (4, 6):
        assert ours.shape == (2, 4, size[0] * up // down, size[1] * up // down)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_conv2d_resample_groups_equal_separate_calls(kernel_size, up, down):
    x, weight = random(2, 6, 4, 4), random(9, 2, kernel_size, kernel_size, seed=1)
    options = {"up": up, "down": down, "padding": kernel_size // 2}
    separate = [conv2d_resample(x[:, 2 * g : 2 * g + 2], weight[3 * g : 3 * g + 3], FIR, **options) for g in range(3)]
    torch.testing.assert_close(
        conv2d_resample(x, weight, FIR, groups=3, **options), torch.cat(separate, dim=1), **ROUNDING
    )


@pytest.mark.parametrize(("up", "down"), [(2, 1), (1, 2)])
def test_conv2d_resample_gradients_are_right(up, down):
    x, weight = random(1, 2, 2, 4).requires_grad_(), random(1, 2, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: conv2d_resample(x, w, FIR, up=up, down=down, padding=1), (x, weight))


@pytest.mark.parametrize(("up", "down"), [(2, 2), (3, 1), (1, 4), (0, 1)])
def test_conv2d_resample_other_factors_raise_value_error(up, down):
    with pytest.raises(ValueError, match=f"up={up}, down={down}"):
        conv2d_resample(random(1, 1, 4, 4), random(1, 1, 3, 3), FIR, up=up, down=down)


def test_conv2d_resample_resampling_without_filter_raises_value_error():
    with pytest.raises(ValueError, match="filter"):
        conv2d_resample(random(1, 1, 4, 4), random(1, 1, 3, 3), up=2)
