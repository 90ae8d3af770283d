"""Band-limited resampling: filters, geometry against brute force, borders, derivatives."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch_utils.ops.upfirdn2d import setup_filter
from training import augment_resampling as resampling
from training import augment_transforms as transforms
from training.augment_resampling import HAAR_CENTRE, HAAR_TAPS, SYM6_CENTRE, SYM6_TAPS, Resampler, resample

# The filters in double precision, for which float32 taps of `setup_filter` are too coarse.
SYM6 = Resampler(torch.tensor(SYM6_TAPS, dtype=torch.float64) / sum(SYM6_TAPS), SYM6_CENTRE)
HAAR = Resampler(setup_filter(HAAR_TAPS).double(), HAAR_CENTRE)
RESAMPLERS = pytest.mark.parametrize("resampler", [SYM6, HAAR], ids=["sym6", "haar"])
ROUNDING = {"rtol": 0, "atol": 1e-10}  # float64, values near 1, a few hundred operations; taps have 16 digits


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blob(x: float, y: float, size: int, radius: float = 3.0) -> torch.Tensor:
    """Draw a Gaussian spot at (x, y) pixels from the middle, [1, 1, size, size]."""
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    squared = (axis[None, :] - x) ** 2 + (axis[:, None] - y) ** 2
    return torch.exp(-squared / (2 * radius**2))[None, None]


def centroid(image: torch.Tensor) -> tuple[float, float]:
    axis = torch.arange(image.shape[-1], dtype=torch.float64) - (image.shape[-1] - 1) / 2
    total = image.sum()
    return float((image[0, 0].sum(0) * axis).sum() / total), float((image[0, 0].sum(1) * axis).sum() / total)


def scalars(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def inverse_of(angle_rad: float = 0.0, scale: tuple[float, float] = (1.0, 1.0), move: tuple[float, float] = (0.0, 0.0)):
    """Return the inverse [1, 3, 3] of: scale, then rotate, then move."""
    forward = transforms.compose(transforms.rotation_2d(*scalars(angle_rad)), transforms.scaling_2d(*scalars(*scale)))
    return torch.linalg.inv(transforms.compose(transforms.translation_2d(*scalars(*move)), forward))


def symlet_by_factorisation() -> list[np.ndarray]:
    """Derive all real orthonormal filters of 12 taps with six vanishing moments, nearest to linear phase first.

    |H(w)|^2 = 2 cos^12(w / 2) P(sin^2(w / 2)) with P(y) = sum_k C(5 + k, k) y^k; of every pair of roots z, 1 / z of
    P((2 - z - 1 / z) / 4) a factor takes one.
    """
    roots = np.roots([math.comb(5 + k, k) for k in range(6)][::-1])
    pairs = [np.roots([1, -(2 - 4 * y), 1]) for y in roots]
    frequency = np.linspace(0.01, 0.9 * np.pi, 200)
    found = []
    for choice in itertools.product((0, 1), repeat=5):
        taps = np.poly([pair[i] for pair, i in zip(pairs, choice)])
        if np.abs(taps.imag).max() > 1e-8:
            continue
        taps = taps.real
        for _ in range(6):
            taps = np.convolve(taps, [1, 1])
        taps *= math.sqrt(2) / taps.sum()
        phase = np.unwrap(np.angle([np.sum(taps * np.exp(-1j * w * np.arange(12))) for w in frequency]))
        slope = phase @ frequency / (frequency @ frequency)
        found.append((np.abs(phase - slope * frequency).max(), taps))
    return [taps for _, taps in sorted(found, key=lambda entry: entry[0])]


def test_sym6_taps_match_the_spectral_factor_nearest_to_linear_phase() -> None:
    nearest, mirrored = symlet_by_factorisation()[:2]
    taps = nearest if nearest[5] > nearest[6] else mirrored
    np.testing.assert_allclose(taps, SYM6_TAPS, atol=1e-9)  # roots of a polynomial of degree 10 lose some digits


@pytest.mark.parametrize(("taps", "moments"), [(SYM6_TAPS, 6), (HAAR_TAPS, 1)])
def test_taps_are_orthonormal_with_vanishing_moments(taps: tuple[float, ...], moments: int) -> None:
    low = np.array(taps) * math.sqrt(2) / sum(taps)
    for shift in range(0, len(low), 2):
        assert np.dot(low[shift:], low[: len(low) - shift]) == pytest.approx(1.0 if shift == 0 else 0.0, abs=1e-12)
    places = np.arange(len(low)) - (len(low) - 1) / 2
    high = low * (-1.0) ** np.arange(len(low))
    for power in range(moments):
        assert np.sum(places**power * high) == pytest.approx(0.0, abs=1e-9 * 6.0**power)
    assert abs(np.sum(places**moments * high)) > 1e-3  # and no more of them


@RESAMPLERS
@pytest.mark.parametrize("margins", [None, (3, 5, 0, 8)])
def test_resample_with_identity_returns_the_image(resampler: Resampler, margins: resampling.Margins | None) -> None:
    x = noise(2, 3, 11, 14)
    torch.testing.assert_close(resample(x, inverse_of().repeat(2, 1, 1), resampler, margins), x, **ROUNDING)


@RESAMPLERS
def test_resample_moved_by_whole_pixels_is_exact(resampler: Resampler) -> None:
    x = noise(1, 2, 20, 24)
    moved = resample(x, inverse_of(move=(3.0, -2.0)), resampler)  # right and up
    torch.testing.assert_close(moved[:, :, 3:-5, 6:-3], x[:, :, 5:-3, 3:-6], **ROUNDING)  # away from the borders
    if resampler is HAAR:
        reflected = torch.from_numpy(np.pad(x[0, 0], ((0, 2), (3, 0)), mode="symmetric"))[2:, :-3]
        torch.testing.assert_close(moved[0, 0], reflected, **ROUNDING)
    published = resample(x, inverse_of(move=(3.0, -2.0)), resampler, margins=(9, 9, 9, 9))
    reflected = F.pad(x, (3, 0, 0, 2), mode="reflect")[:, :, 2:, :-3]
    torch.testing.assert_close(published, reflected, **ROUNDING)


@RESAMPLERS
@pytest.mark.parametrize("operation", ["xflip", "quarter"])
def test_resample_flipped_or_turned_by_a_quarter_matches_exchanged_pixels(resampler: Resampler, operation: str) -> None:
    if operation == "xflip":
        inverse, exchange = inverse_of(scale=(-1.0, 1.0)), lambda x: x.flip(3)
    else:  # x towards y is clockwise on the screen
        inverse, exchange = inverse_of(angle_rad=math.pi / 2), lambda x: x.rot90(-1, (2, 3))
    x = blob(5.0, -3.0, 40) + 0.5 * blob(-9.0, 6.0, 40)
    # Sym6 mirrored is not sym6: pixels are 0.1 pixels off, which is 0.02 of the height of such a spot at most.
    atol = 0.03 if resampler is SYM6 else 1e-10
    torch.testing.assert_close(resample(x, inverse, resampler), exchange(x), rtol=0, atol=atol)
    assert (exchange(x) - x).abs().max() > 0.5
    if resampler is HAAR:
        x = noise(1, 1, 13, 13)
        torch.testing.assert_close(resample(x, inverse, resampler), exchange(x), **ROUNDING)


@RESAMPLERS
def test_resample_moves_a_spot_where_the_matrix_moves_its_middle(resampler: Resampler) -> None:
    generator = np.random.default_rng(0)
    for _ in range(8):
        inverse = inverse_of(
            generator.uniform(-np.pi, np.pi),
            tuple(2 ** generator.normal(0, 0.2, 2)),
            tuple(generator.uniform(-4, 4, 2)),
        )
        x, y = generator.uniform(-5, 5, 2)
        expected = np.linalg.inv(inverse[0].numpy()) @ [x, y, 1.0]
        moved = centroid(resample(blob(x, y, 48, radius=2.5), inverse, resampler))
        # Sym6: 0.05 pixels before and 0.05 after, see above. Tails of spots reach the border a little.
        np.testing.assert_allclose(moved, expected[:2], atol=0.15 if resampler is SYM6 else 0.02)


def folded(i: float, side: int) -> float:
    i = (i + 0.5) % (2 * side)
    return min(i, 2 * side - i) - 0.5


class ResampleTwin:
    """Resample one channel [H, W] sample by sample from the formulas."""

    def __init__(self, x: np.ndarray, inverse: np.ndarray, fir: np.ndarray, centre: float, folds: bool) -> None:
        self.x, self.inverse, self.fir, self.centre, self.folds = x, inverse, fir, centre, folds
        self.half_taps = len(fir) // 2
        self.known: dict[tuple[int, int], float] = {}

    def phase(self, j: int, side: int) -> tuple[list[int], list[float]]:
        """Return the pixels that make up enlarged pixel j on an axis, and their weights."""
        pairs = [(i, j + self.half_taps - 1 - 2 * i) for i in range(j // 2 - 6, j // 2 + 8)]
        pairs = [(i, tap) for i, tap in pairs if 0 <= tap < len(self.fir)]
        inside = [int(folded(i, side)) if self.folds else side - 1 - abs(side - 1 - abs(i)) for i, _ in pairs]
        return inside, [2 * self.fir[tap] for _, tap in pairs]

    def enlarged(self, jy: int, jx: int) -> float:
        if (jy, jx) not in self.known:
            (iy, wy), (ix, wx) = self.phase(jy, self.x.shape[0]), self.phase(jx, self.x.shape[1])
            self.known[jy, jx] = wy @ self.x[np.ix_(iy, ix)] @ wx
        return self.known[jy, jx]

    def sampled(self, vy: int, vx: int) -> float:
        sides = self.x.shape[::-1]
        out = [(v - self.centre) / 2 - (side - 1) / 2 for v, side in zip((vx, vy), sides)]
        places = (self.inverse @ [*out, 1.0])[:2] + [(side - 1) / 2 for side in sides]
        border = len(self.fir) // 4 + 0.5
        if self.folds:
            places = [
                place if -border <= place <= side - 1 + border else folded(place, side)
                for place, side in zip(places, sides)
            ]
        ux, uy = (2 * place + self.centre for place in places)
        jx, jy = math.floor(ux), math.floor(uy)
        corners = [(jy + b, jx + a) for a in (0, 1) for b in (0, 1)]
        return sum((1 - abs(uy - y)) * (1 - abs(ux - x)) * self.enlarged(y, x) for y, x in corners)

    def __call__(self) -> np.ndarray:
        (height, width), taps, first = self.x.shape, len(self.fir), 1 - self.half_taps
        rows, columns = (range(first, first + 2 * side - 2 + taps) for side in (height, width))
        samples = np.array([[self.sampled(vy, vx) for vx in columns] for vy in rows])
        out = np.zeros_like(self.x)
        for row, column in itertools.product(range(height), range(width)):
            out[row, column] = self.fir @ samples[2 * row :, 2 * column :][:taps, :taps] @ self.fir
        return out


@pytest.mark.parametrize("margins", [None, (8, 8, 9, 9)], ids=["folded", "padded"])
@RESAMPLERS
def test_resample_matches_brute_force(resampler: Resampler, margins: resampling.Margins | None) -> None:
    x = noise(1, 1, 10, 9)
    # Padding by reflection has an end, so a transformation that stays before it; folding has none.
    inverse = inverse_of(0.4, (0.7, 0.85), (2.7, -4.3)) if margins is None else inverse_of(0.3, (1.2, 1.0), (0.7, -1.3))
    fir = resampler.fir if resampler.fir.ndim == 1 else resampler.fir.sum(0)
    expected = ResampleTwin(x[0, 0].numpy(), inverse[0].numpy(), fir.numpy(), resampler.centre, margins is None)()
    torch.testing.assert_close(resample(x, inverse, resampler, margins)[0, 0], torch.from_numpy(expected), **ROUNDING)


def test_resample_folded_matches_padded_inside_and_nearly_outside() -> None:
    x = blob(2.0, -4.0, 32) + blob(-9.0, 9.0, 32) + blob(14.0, 3.0, 32)
    inverse = inverse_of(0.5, (0.8, 0.9), (3.0, 2.0))
    padded = resample(x, inverse, SYM6, margins=resampling.published_margins(inverse, (32, 32), 12))
    error = (resample(x, inverse, SYM6) - padded).abs()
    assert error[:, :, 14:20, 14:20].max() < 1e-12
    assert 1e-3 < error.max() < 0.25  # a spot of radius 3 moved by the pixel that is reflected as well


def test_published_margins_reach_the_transformed_corners() -> None:
    inverse = torch.cat([inverse_of(0.3, (0.9, 1.0), (4.0, -1.0)), inverse_of(0.0, (1.2, 1.2), (0.0, 2.0))])
    height, width = 20, 30
    corners = np.array([[sx * 14.5, sy * 9.5, 1.0] for sx in (-1, 1) for sy in (-1, 1)]).T
    x, y = (inverse.numpy() @ corners)[:, :2].transpose(1, 0, 2)
    reaches = (-x.min() - 14.5, x.max() - 14.5, -y.min() - 9.5, y.max() - 9.5)
    expected = tuple(int(np.clip(math.ceil(reach + 6), 0, 29 if i < 2 else 19)) for i, reach in enumerate(reaches))
    assert resampling.published_margins(inverse, (height, width), taps=12) == expected
    far = inverse_of(move=(500.0, 0.0))
    assert resampling.published_margins(far, (height, width), taps=12) == (29, 0, 6, 6)


def test_reflected_positions_walk_back_and_forth() -> None:
    position = torch.arange(-9.0, 12.0)
    expected = torch.tensor([0.0, 0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3])
    torch.testing.assert_close(resampling.reflected(position, side=4, border=0.5), expected)
    kept = resampling.reflected(position, side=4, border=2.0)
    torch.testing.assert_close(kept[7:15], position[7:15])
    torch.testing.assert_close(kept[:7], expected[:7])


@RESAMPLERS
def test_resample_keeps_a_constant_image(resampler: Resampler) -> None:
    inverse = inverse_of(1.0, (0.3, 0.5), (5.0, -40.0))
    out = resample(torch.full((1, 1, 12, 12), 0.7, dtype=torch.float64), inverse, resampler)
    torch.testing.assert_close(out, torch.full_like(out, 0.7), **ROUNDING)


def test_resample_with_box_filter_keeps_the_range_of_masks() -> None:
    mask = (noise(1, 1, 24, 24) > 0).double()
    out = resample(mask, inverse_of(0.7, (1.3, 0.8), (2.2, 5.1)), HAAR)
    assert -1e-12 <= out.min() and out.max() <= 1 + 1e-12
    sharp = resample(mask, inverse_of(0.7, (1.3, 0.8), (2.2, 5.1)), SYM6)
    assert sharp.max() > 1.05  # which is why masks are not resampled with sym6


@RESAMPLERS
@pytest.mark.parametrize("margins", [None, (2, 3, 4, 0)])
def test_resample_has_right_first_and_second_derivatives(
    resampler: Resampler, margins: resampling.Margins | None
) -> None:
    inverse = inverse_of(0.4, (1.1, 0.9), (0.7, -1.3))
    x = noise(1, 1, 8, 9).requires_grad_()
    torch.autograd.gradcheck(lambda x: resample(x, inverse, resampler, margins), x)
    # Linear, so that a second derivative exists only behind something curved.
    torch.autograd.gradgradcheck(lambda x: resample(x, inverse, resampler, margins).sin().sum(), x, fast_mode=True)


def test_grid_sample_derivatives_match_native_ones() -> None:
    x, grid = noise(2, 3, 7, 6).requires_grad_(), noise(2, 5, 4, 2, seed=1) * 0.8
    results = []
    for sample in (resampling._GridSample.apply, lambda x, grid: F.grid_sample(x, grid, align_corners=False)):
        out = sample(x, grid)
        (gradient,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.square().sum(), x)
        results.append((out, gradient, second, third))
    for ours, native in zip(*results):
        torch.testing.assert_close(ours, native, rtol=1e-10, atol=1e-10)  # float64; third derivatives reach 1e5


def test_resample_of_an_image_too_small_to_reflect_raises() -> None:
    with pytest.raises(ValueError, match=r"at least 7 pixels, got \(6, 9\)"):
        resample(noise(1, 1, 6, 9), inverse_of(), SYM6)
