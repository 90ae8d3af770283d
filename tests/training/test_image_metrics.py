"""L2, PSNR and SSIM agree with their definitions, and with scikit-image."""

import math

import numpy as np
import pytest
import torch

from training.image_metrics import l2, psnr, ssim, structure_error


def picture(seed: int, size: tuple[int, int] = (40, 52)) -> torch.Tensor:
    """Return a smooth random picture `[1, 3, H, W]` in [-1, 1] with 8-bit values."""
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 7, 1, 3)
    return ((smooth * 2).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


def bytes_of(image: torch.Tensor) -> np.ndarray:
    """Return `[H, W, 3]`, 0...255, of a picture with 8-bit values."""
    return ((image[0].double() + 1) * 127.5).round().permute(1, 2, 0).numpy()


def test_l2_known_difference_is_its_square():
    image = torch.zeros(1, 3, 4, 4)
    other = image + 51 / 127.5  # 51 grey levels
    assert l2(other, image) == pytest.approx(0.16, abs=1e-12)
    assert l2(image - 2, image + 2) == pytest.approx(4.0, abs=1e-12)  # clipped to black and white


def test_metrics_equal_pictures_are_perfect():
    image = picture(0)
    assert l2(image, image) == 0
    assert psnr(image, image) == math.inf
    assert ssim(image, image) == 1


def test_metrics_see_pictures_as_shown():
    """A difference that no byte shows is none."""
    image = picture(0) * 0.9
    shown = torch.from_numpy(np.floor(image.numpy() * 127.5 + 128)).float() / 127.5 - 1
    assert l2(image, shown) == 0 and psnr(image, shown) == math.inf and ssim(image, shown) == 1


def test_psnr_known_error_is_the_definition():
    image, target = picture(0), picture(1)
    error = np.mean((bytes_of(image) - bytes_of(target)) ** 2)
    assert psnr(image, target) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-9)
    # The same pictures in both units: MSE of [-1, 1] and of 0...255.
    assert l2(image, target) == pytest.approx(error * (2 / 255) ** 2, rel=1e-9)


def test_psnr_mask_counts_only_its_pixels():
    image, target = picture(0), picture(1)
    mask = torch.zeros(1, 1, *image.shape[2:])
    mask[..., :20, :] = 1
    assert psnr(image, target, mask) == pytest.approx(psnr(image[..., :20, :], target[..., :20, :]), abs=1e-9)
    assert psnr(image, target, torch.full_like(mask, 0.5)) == pytest.approx(psnr(image, target), abs=1e-9)


def test_ssim_at_one_window_is_the_formula_of_the_paper():
    """11 x 11 pixels hold one window: means, variances and covariance written out."""
    image, target = picture(2, (11, 11)), picture(3, (11, 11))
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights = (weights / weights.sum())[..., None]
    x, y = bytes_of(image), bytes_of(target)
    mean_x, mean_y = (weights * x).sum((0, 1)), (weights * y).sum((0, 1))
    var_x, var_y = (weights * (x - mean_x) ** 2).sum((0, 1)), (weights * (y - mean_y) ** 2).sum((0, 1))
    covariance = (weights * (x - mean_x) * (y - mean_y)).sum((0, 1))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    expected /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    assert ssim(image, target) == pytest.approx(expected.mean(), abs=1e-10)


@pytest.mark.parametrize("size", [(64, 64), (31, 50)])
def test_metrics_agree_with_scikit_image(size):
    metrics = pytest.importorskip("skimage.metrics")
    target = picture(4, size)
    image = (target + 0.8 * picture(5, size)).clamp(-1, 1)
    image = ((image + 1) * 127.5).round() / 127.5 - 1
    settings = {"channel_axis": 2, "data_range": 255, "gaussian_weights": True, "sigma": 1.5}
    expected = metrics.structural_similarity(bytes_of(target), bytes_of(image), use_sample_covariance=False, **settings)
    assert 0.1 < expected < 0.95
    assert ssim(image, target) == pytest.approx(expected, abs=1e-9)  # both in float64
    expected = metrics.peak_signal_noise_ratio(bytes_of(target), bytes_of(image), data_range=255)
    assert psnr(image, target) == pytest.approx(expected, abs=1e-9)


def test_ssim_inverted_picture_is_negative():
    noise = torch.where(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5, 0.5, -0.5)
    assert ssim(noise, -noise) < -0.5


def test_structure_error_is_one_minus_the_contrast_structure_term():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    c2 = 0.3
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    var_x, var_y, var_difference = (values.var(correction=0) for values in (x, y, x - y))
    expected = 1 - (2 * covariance + c2) / (var_x + var_y + c2)
    torch.testing.assert_close(structure_error(var_x, var_y, var_difference, c2), expected)  # float64: its default


@pytest.mark.parametrize("metric", [l2, psnr, ssim])
def test_metrics_bad_input_raises_and_names_it(metric):
    image = picture(0)
    with pytest.raises(ValueError, match=r"image: expected the size .* of the target"):
        metric(image[..., :-1], image)
    with pytest.raises(ValueError, match=r"target: expected \[1, 3, H, W\]"):
        metric(image, image[:, :1])
    with pytest.raises(ValueError, match="image: expected finite values"):
        metric(image * torch.nan, image)


def test_ssim_small_picture_raises():
    with pytest.raises(ValueError, match="image: expected at least 11 pixels high and wide for SSIM, got 10"):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 1, 8, 8), "mask: expected the shape"),
        (torch.zeros(1, 1, 40, 52), "mask: expected pixels that count"),
        (torch.full((1, 1, 40, 52), 2.0), r"mask: expected values in \[0, 1\]"),
        (torch.full((1, 1, 40, 52), torch.nan), r"mask: expected values in \[0, 1\]"),
    ],
)
def test_psnr_bad_mask_raises(mask, message):
    with pytest.raises(ValueError, match=message):
        psnr(picture(0), picture(1), mask)
