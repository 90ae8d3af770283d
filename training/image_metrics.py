"""Say how close a picture is to another one: L2, PSNR and SSIM of pictures as they are shown, for reports."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from torch_utils.pictures import colors_to_uint8
from training.config import require

_PEAK = 255.0
WINDOW_SIZE = 11
"""Of SSIM, in pixels."""
_WINDOW_SIGMA = 1.5
K1, K2 = 0.01, 0.03


def l2(image: torch.Tensor, target: torch.Tensor) -> float:
    """Return the mean squared difference of two pictures, in the units of [-1, 1].

    Args:
        image: `[1, 3, H, W]` in [-1, 1]; rounded to 8 bits, as a PNG has it.
        target: of the same shape.

    Returns:
        0 (equal) to 4 (black and white).

    Raises:
        ValueError: other shapes, or values that are not finite.
    """
    return _squared_difference(image, target).mean().item() * (2 / _PEAK) ** 2


def psnr(image: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Return the peak signal-to-noise ratio of two pictures in dB: `10 log10(255^2 / MSE)` of their 8-bit values.

    Args:
        image: `[1, 3, H, W]` in [-1, 1]; rounded to 8 bits, as a PNG has it.
        target: of the same shape.
        mask: `[1, 1, H, W]` in [0, 1], the weight of each pixel in the MSE; None counts all of them.

    Returns:
        dB; `math.inf` for equal pictures.

    Raises:
        ValueError: other shapes, values that are not finite, or a mask that is empty.
    """
    error = _squared_difference(image, target)
    if mask is not None:
        shape = (1, 1, *image.shape[2:])
        require(tuple(mask.shape) == shape, "mask", f"the shape {list(shape)}", list(mask.shape))
        weight = mask.detach().to("cpu", torch.float64)
        require(bool(((weight >= 0) & (weight <= 1)).all()), "mask", "values in [0, 1]", "others")
        require(weight.sum().item() > 0, "mask", "pixels that count", "none")
        error = error * weight / weight.mean()
    mean = error.mean().item()
    return 10 * math.log10(_PEAK**2 / mean) if mean > 0 else math.inf


def ssim(image: torch.Tensor, target: torch.Tensor) -> float:
    """Return the structural similarity of two pictures.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", eq. 13, with
    K1 = 0.01, K2 = 0.03 and their Gaussian window of 11 x 11 pixels (standard deviation 1.5), at the places where the
    whole window lies in the picture; the mean over the three colour channels, which the paper leaves open.

    Args:
        image: `[1, 3, H, W]` in [-1, 1], at least 11 pixels high and wide; rounded to 8 bits, as a PNG has it.
        target: of the same shape.

    Returns:
        -1 to 1 (equal).

    Raises:
        ValueError: other shapes, values that are not finite, or less than 11 pixels.
    """
    x, y = _as_shown(image, target)
    side = min(x.shape[2:])
    require(side >= WINDOW_SIZE, "image", f"at least {WINDOW_SIZE} pixels high and wide for SSIM", side)
    mean_x, mean_y = window_mean(x), window_mean(y)
    var_x = window_mean(x * x) - mean_x**2
    var_y = window_mean(y * y) - mean_y**2
    var_difference = window_mean((x - y) ** 2) - (mean_x - mean_y) ** 2
    c1, c2 = (K1 * _PEAK) ** 2, (K2 * _PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (1 - structure_error(var_x, var_y, var_difference, c2))).mean().item()


def structure_error(var_x: torch.Tensor, var_y: torch.Tensor, var_difference: torch.Tensor, c2: float) -> torch.Tensor:
    """Return 1 minus the contrast-structure term of SSIM: `var(x - y) / (var(x) + var(y) + c2)`.

    That is `1 - (2 cov(x, y) + c2) / (var(x) + var(y) + c2)` (Wang et al. 2004, the right factor of eq. 13), because
    `var(x - y) = var(x) + var(y) - 2 cov(x, y)`. In this form the error of nearly equal images is a small number from
    the start, and no difference of large ones.

    Args:
        var_x: local variance of one image, any shape.
        var_y: local variance of the other image.
        var_difference: local variance of their difference.
        c2: positive; in the units of the variances. Structure weaker than this counts less.

    Returns:
        0 (equal but for the mean) to 2 (inverted); 1 where nothing is common.
    """
    return var_difference / (var_x + var_y + c2)


def _as_shown(image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 8-bit values of two images as float64 `[1, 3, H, W]` on the CPU."""
    shown = []
    for name, picture in (("image", image), ("target", target)):
        require(picture.ndim == 4 and picture.shape[:2] == (1, 3), name, "[1, 3, H, W]", list(picture.shape))
        require(bool(torch.isfinite(picture).all()), name, "finite values", "NaN or infinity")
        shown.append(torch.from_numpy(colors_to_uint8(picture)).permute(0, 3, 1, 2).double())
    require(image.shape == target.shape, "image", f"the size {list(target.shape)} of the target", list(image.shape))
    return shown[0], shown[1]


def _squared_difference(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    x, y = _as_shown(image, target)
    return (x - y) ** 2


def window_mean(x: torch.Tensor) -> torch.Tensor:
    """Return means `[B, C, H - 10, W - 10]` of images `[B, C, H, W]` under the Gaussian window of SSIM."""
    offsets = torch.arange(WINDOW_SIZE, dtype=x.dtype, device=x.device) - WINDOW_SIZE // 2
    taps = torch.exp(-(offsets**2) / (2 * _WINDOW_SIGMA**2))
    taps = taps / taps.sum()
    planes = x.flatten(0, 1)[:, None]  # [B * C, 1, H, W]
    planes = functional.conv2d(functional.conv2d(planes, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
    return planes.unflatten(0, x.shape[:2])[:, :, 0]
