"""Brute-force twins: the same formulas as loops over single numbers, in float64, for comparison."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

# ---- resampling ----


def upfirdn2d(
    image: np.ndarray, fir: np.ndarray, up: int, down: int, padding: Sequence[int], gain: float
) -> np.ndarray:
    """Zero-stuff, pad, convolve and decimate one channel `[H, W]`, one product at a time."""
    x0, x1, y0, y1 = padding
    height, width = image.shape[0] * up, image.shape[1] * up

    def stuffed(row: int, column: int) -> float:
        inside = 0 <= row < height and 0 <= column < width
        return image[row // up, column // up] if inside and row % up == 0 and column % up == 0 else 0.0

    taps_y, taps_x = fir.shape
    rows = range(0, height + y0 + y1 - taps_y + 1, down)
    columns = range(0, width + x0 + x1 - taps_x + 1, down)
    out = np.zeros((len(rows), len(columns)))
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        for a, b in itertools.product(range(taps_y), range(taps_x)):
            # True convolution: the filter runs backwards.
            out[i, j] += gain * fir[taps_y - 1 - a, taps_x - 1 - b] * stuffed(row + a - y0, column + b - x0)
    return out


# ---- plane look-ups ----


def texel_weights(coordinate: float, size: int) -> list[tuple[int, float]]:
    """Return texels and weights of linear interpolation at a coordinate in [-1, 1] whose ends are texel edges."""
    position = ((coordinate + 1) * size - 1) / 2
    first = math.floor(position)
    return [(first, first + 1 - position), (first + 1, position - first)]


def interpolate(grid: np.ndarray, coordinates: Sequence[float]) -> np.ndarray:
    """Look up `[C, *sizes]` at coordinates in the order of the sizes; outside is zero."""
    total = np.zeros(grid.shape[0])
    axes = [texel_weights(coordinate, size) for coordinate, size in zip(coordinates, grid.shape[1:], strict=True)]
    for corners in itertools.product(*axes):
        index = tuple(texel for texel, _ in corners)
        if all(0 <= texel < size for texel, size in zip(index, grid.shape[1:])):
            total += grid[(slice(None), *index)] * math.prod(weight for _, weight in corners)
    return total


def spherical_coordinates(x: float, y: float, z: float) -> tuple[float, float, float, float]:
    """Return theta, phi, radius and fusion weight; the weight as the product of cosines of the paper."""
    rho, norm = math.hypot(x, y), math.sqrt(x * x + y * y + z * z)
    theta = 2 * math.atan2(rho, z) / math.pi - 1
    phi = math.atan2(y, x) / math.pi
    weight = (1 + math.cos(math.pi * theta)) / 2 * (1 + math.cos(math.pi * phi)) / 2
    return theta, phi, 2 * norm / math.sqrt(3) - 1, weight


def look_up_dual_spherical(planes: np.ndarray, point: Sequence[float]) -> np.ndarray:
    """Look up one point in planes `[2, 3, C, H, W]`, fused plane by plane."""
    x, y, z = point
    fused = [0.0, 0.0, 0.0]
    total_weight = 0.0
    for sphere, axes in zip(planes, ((z, y, -x), (-z, -x, y)), strict=True):
        theta, phi, radius, weight = spherical_coordinates(*axes)
        for d, (width, height) in enumerate(((theta, phi), (theta, radius), (phi, radius))):
            fused[d] = fused[d] + weight * interpolate(sphere[d], (height, width))
        total_weight += weight
    return sum(fused) / 3 / (total_weight + 1e-8)


def look_up_tri_plane(planes: np.ndarray, point: Sequence[float]) -> np.ndarray:
    """Look up one point in planes `[3, C, H, W]`."""
    x, y, z = point
    pairs = ((x, y), (x, z), (z, x))
    return sum(interpolate(plane, (h, w)) for plane, (w, h) in zip(planes, pairs, strict=True)) / 3


def look_up_tri_grid(planes: np.ndarray, point: Sequence[float]) -> np.ndarray:
    """Look up one point in grids `[3, C, D, H, W]`."""
    x, y, z = point
    triples = ((x, y, z), (x, z, y), (y, z, x))
    return sum(interpolate(grid, (d, h, w)) for grid, (w, h, d) in zip(planes, triples, strict=True)) / 3


# ---- rendering of one ray ----

Field = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""Point `[3]` to raw density and colour features."""


def softplus(x: float) -> float:
    """Return log(1 + e^x) without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def coarse_depths(near: float, far: float, jitter: Sequence[float], disparity: bool = False) -> list[float]:
    """Return stratified depths of one ray."""
    fractions = [(k + u) / (len(jitter) - 1) for k, u in enumerate(jitter)]
    if disparity:
        return [1 / ((1 - q) / near + q / far) for q in fractions]
    return [near + (far - near) * q for q in fractions]


def box_limits(origin: Sequence[float], direction: Sequence[float], side: float) -> tuple[float, float]:
    """Return where a ray enters and leaves a cube; (-1, -2) for a miss."""
    near, far = -math.inf, math.inf
    for o, d in zip(origin, direction, strict=True):
        if d == 0:
            if abs(o) > side / 2:
                return -1.0, -2.0
            continue
        limits = sorted([(-side / 2 - o) / d, (side / 2 - o) / d])
        near, far = max(near, limits[0]), min(far, limits[1])
    return (near, far) if near <= far else (-1.0, -2.0)


def interval_weights(sigma: Sequence[float], depths: Sequence[float]) -> list[float]:
    """Return the weights of the intervals between samples."""
    weights, transmittance = [], 1.0
    for i in range(len(depths) - 1):
        density = softplus((sigma[i] + sigma[i + 1]) / 2 - 1)
        alpha = 1 - math.exp(-density * (depths[i + 1] - depths[i]))
        weights.append(alpha * transmittance)
        transmittance *= 1 - alpha + 1e-10
    return weights


def sample_pdf(bins: Sequence[float], weights: Sequence[float], uniforms: Sequence[float]) -> list[float]:
    """Invert the cdf of a histogram; the last of the `len(weights) + 2` bin edges is never reached."""
    total = sum(w + 1e-5 for w in weights)
    cdf = [0.0]
    for w in weights:
        cdf.append(cdf[-1] + (w + 1e-5) / total)
    samples = []
    for u in uniforms:
        above = next((k for k, value in enumerate(cdf) if value > u), len(cdf))
        low, high = max(above - 1, 0), min(above, len(weights))
        span = cdf[high] - cdf[low]
        span = 1.0 if span < 1e-5 else span
        samples.append(bins[low] + (u - cdf[low]) / span * (bins[high] - bins[low]))
    return samples


def fine_depths(depths: Sequence[float], weights: Sequence[float], uniforms: Sequence[float]) -> list[float]:
    """Return importance depths of one ray."""
    num = len(depths)
    highest = [max(weights[max(i - 1, 0) : i + 1]) for i in range(num)]
    smoothed = [(highest[i] + highest[i + 1]) / 2 + 0.01 for i in range(num - 1)]
    bins = [(depths[i] + depths[i + 1]) / 2 for i in range(num - 1)]
    return sample_pdf(bins, smoothed[1:-1], uniforms)


def render_ray(
    field: Field,
    origin: np.ndarray,
    direction: np.ndarray,
    limits: tuple[float, float],
    jitter: Sequence[float],
    uniforms: Sequence[float] = (),
    *,
    box: float = 1.0,
    crop_margin: float | None = None,
    white_back: bool = False,
    disparity: bool = False,
) -> tuple[np.ndarray, float, float]:
    """Return features, depth (not clamped; NaN without weight) and opacity of one ray."""

    def evaluate(depth: float) -> tuple[float, float, np.ndarray]:
        point = origin + depth * direction
        sigma, color = field(point)
        if crop_margin is not None and max(abs(point[0]), abs(point[2])) > box / 2 - crop_margin:
            sigma = -1000.0
        return depth, sigma, color

    samples = [evaluate(t) for t in coarse_depths(*limits, jitter, disparity)]
    if len(uniforms):
        depths, sigmas, _ = zip(*samples)
        samples += [evaluate(t) for t in fine_depths(depths, interval_weights(sigmas, depths), uniforms)]
        samples.sort(key=lambda sample: sample[0])
    depths, sigmas, colors = zip(*samples)
    features, depth, opacity = np.zeros_like(colors[0]), 0.0, 0.0
    for i, weight in enumerate(interval_weights(sigmas, depths)):
        features = features + weight * (colors[i] + colors[i + 1]) / 2
        depth += weight * (depths[i] + depths[i + 1]) / 2
        opacity += weight
    if white_back:
        features = features + 1 - opacity
    return features, depth / opacity if opacity > 0 else math.nan, opacity
