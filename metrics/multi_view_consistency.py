"""Multi-view consistency: whether a head that is seen from a step aside is the same head.

Each head is rendered from pairs of neighbouring cameras. The pixels of one picture are moved to the other by the
rendered depth, and compared where both cameras see the same piece of surface. What only one of them sees does not
count; what the superresolution repaints with the camera, and texture that sticks to the screen, does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from camera_utils import split_label, yaw_pitch_roll_deg
from metrics.registry import Curve, MetricValues, NotApplicable, RendersOnItsOwn, register
from metrics.requests import StatsRequest, yaw_bins
from training.config import require
from training.image_metrics import K1, K2, WINDOW_SIZE, window_mean
from training.networks_stylegan2 import SynthesisOptions
from training.volumetric_rendering.ray_sampler import sample_rays

if TYPE_CHECKING:
    from metrics.evaluation import Evaluation
    from metrics.feature_stats import FeatureStats

STEP_DEG = 10.0
"""Angle between the cameras of a pair: surfaces move by some pixels, and little is hidden."""
PAIRS_PER_HEAD = 4
"""Pairs of cameras around each head, 90 degrees apart."""
OPAQUE = 0.9
"""Opacity from which on a pixel belongs to the head."""
STEEPEST_DEG = 65.0
"""Surfaces that are turned away from the camera by more are left out, and with them edges of depth: there, depth is a
mean of near and far, and a pixel is a long piece of surface."""
BEHIND = 0.03
"""A point is hidden in the other view if that view's surface is nearer by more, in sides of the box."""
MAX_PSNR_DB = 100.0

_PEAK = 2.0  # of values in [-1, 1]
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_C1, _C2 = (K1 * _PEAK) ** 2, (K2 * _PEAK) ** 2


class View(NamedTuple):
    """Pictures of B heads from B cameras."""

    labels: torch.Tensor
    """`[B, 25]`"""
    image: torch.Tensor
    """`[B, 3, H, W]`; values beyond [-1, 1] count as these."""
    depth: torch.Tensor
    """`[B, 1, R, R]`: distance along the rays in world units."""
    mask: torch.Tensor
    """`[B, 1, R, R]`: opacity in [0, 1]."""


class Overlap(NamedTuple):
    """What a view shows of another one, on the pixels of the other one."""

    image: torch.Tensor
    """`[B, 3, R, R]`"""
    seen: torch.Tensor
    """bool `[B, 1, R, R]`: which pixels can be compared."""
    surface: torch.Tensor
    """bool `[B, 1, R, R]`: which pixels show a surface that could be seen."""
    depth_difference: torch.Tensor
    """`[B, 1, R, R]`: depth in the view minus that of the moved point, in world units; positive where the view sees
    through the point."""


@dataclass(frozen=True, kw_only=True)
class MultiViewConsistency(RendersOnItsOwn):
    """PSNR of neighbouring views where they show the same: `mv_consistencyN` for N heads.

    For head i, the camera of sample i is turned about the vertical axis to four places 90 degrees apart, which wander
    from head to head, and there by 5 degrees to either side. Both views come from one radiance field with constant
    layer noise and equal ray jitter. A learned camera offset is left out. Each is moved to the other (`warp`), and over
    the pixels that can be compared

        MSE = mean |A - warp(B)|^2 over colours in [-1, 1],  PSNR = 10 log10(4 / mean MSE),  at most 100 dB

    with the mean of MSE over all pairs in both directions. Pictures are compared at the resolution R of the volume
    rendering, to which `image` is averaged down: depth is known there, and to a small part of a pixel.

    The filter of the resampling sets a limit, most of all where R is the resolution itself: exactly traced synthetic
    heads get 36 dB at 64 pixels. Only networks of equal R and equal resolution can be compared with each other. And
    blurred pictures are easy to keep consistent, so read this beside a Frechet distance.

    Values: the PSNR in dB; `ssim`, over windows weighted by the pixels that count; `overlap`, the share of surface that
    could be compared, which is low where the depths of two views contradict each other; `depth_difference`, the mean
    absolute difference of their depths there, in sides of the box.
    """

    name: str
    num_images: int

    def compute(self, evaluation: Evaluation, stats: Mapping[StatsRequest, FeatureStats]) -> MetricValues:
        """Render the pairs and compare them; collective.

        Raises:
            NotApplicable: no pair shows a surface that could be compared, or depth has less than 11 pixels a side.
        """
        side = evaluation.generator.neural_rendering_resolution
        if side < WINDOW_SIZE:
            raise NotApplicable(f"{self.name}: the volume is rendered with {side} pixels, too few for SSIM")
        indices, rows = [], []
        cameras = evaluation.cameras(evaluation.generated(self.num_images))
        for heads in evaluation.batches(self.num_images, "pairs of views"):
            rows.append(compare_heads(evaluation, heads, cameras))  # [B, pairs * 5]
            indices.append(heads)
        columns = PAIRS_PER_HEAD * len(_ROW)
        rows = np.concatenate(rows) if rows else np.empty((0, columns), np.float32)
        indices = np.concatenate(indices) if indices else np.empty(0, np.int64)
        return self.summarise(evaluation.gather(indices, rows), evaluation)

    def summarise(self, rows: np.ndarray, evaluation: Evaluation) -> MetricValues:
        """Turn the numbers of heads, `[N, pairs * 5]` as `compare_heads` gives them, to values and a curve over yaw."""
        pairs = rows.astype(np.float64).reshape(-1, len(_ROW))  # [N * pairs, 5]
        yaw_deg, overlap = pairs[:, 0], pairs[:, 1]
        shown = overlap > 0
        if not shown.any():
            raise NotApplicable(f"{self.name}: no view shows a surface that its neighbour shows too")
        mean = pairs[shown].mean(axis=0)
        bins = yaw_bins(evaluation.settings.num_yaw_bins)
        curve = []
        for yaw_range in bins:
            mse = pairs[shown & yaw_range.contains(yaw_deg), 2]
            curve.append(psnr_db(mse.mean()) if len(mse) else None)
        return MetricValues(
            values={
                self.name: psnr_db(mean[2]),
                "ssim": float(mean[3]),
                "overlap": float(overlap.mean()),
                "depth_difference": float(mean[4]),
            },
            curve=Curve(
                x_name="yaw_deg", x=tuple(b.middle_deg for b in bins), y_name="PSNR of neighbours in dB", y=tuple(curve)
            ),
            details={
                "num_pairs": len(pairs),
                "num_pairs_without_overlap": int((~shown).sum()),
                "step_deg": STEP_DEG,
                "resolution": evaluation.generator.neural_rendering_resolution,
                "opaque": OPAQUE,
                "steepest_deg": STEEPEST_DEG,
                "behind": BEHIND,
            },
        )


_ROW = ("yaw_deg", "overlap", "mse", "ssim", "depth_difference")


@register(
    r"mv_consistency(?P<num>\d+k?)", "mv_consistencyN", "PSNR of neighbouring views of N heads, warped by their depth"
)
def make_multi_view_consistency(name: str, num_images: int) -> MultiViewConsistency:
    """Make the metric of a name."""
    return MultiViewConsistency(name=name, num_images=num_images)


def psnr_db(mse: float) -> float:
    """Return `10 log10(4 / mse)`, the PSNR of values in [-1, 1] in dB, at most 100."""
    return min(10 * math.log10(_PEAK**2 / mse), MAX_PSNR_DB) if mse > 0 else MAX_PSNR_DB


@torch.no_grad()
def compare_heads(evaluation: Evaluation, heads: np.ndarray, cameras: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Render pairs of views of heads and compare them.

    Args:
        evaluation: with a generator.
        heads: numbers of the samples, int64 [B].
        cameras: labels of all samples, to condition on and to render from, as `Evaluation.cameras` returns them.

    Returns:
        float32 [B, pairs * 5]; of each pair its yaw in degrees, overlap, MSE, SSIM and difference of depth.

    Raises:
        ValueError: the network makes values that are not finite.
    """
    conditions, labels = (torch.from_numpy(rows[heads].copy()).to(evaluation.device) for rows in cameras)
    G, settings = evaluation.generator, evaluation.settings
    ws = G.mapping(
        evaluation.latents(heads),
        conditions,
        truncation_psi=settings.truncation_psi,
        truncation_cutoff=settings.truncation_cutoff,
    )
    noise = evaluation.noise_generator(int(heads[0]))
    field = G.radiance_field(ws, options=SynthesisOptions(noise_mode="const", generator=noise))
    state = noise.get_state()
    box = _box_side(G)
    rows = []
    for middle in pair_cameras(labels, heads):
        sides = []
        for angle_deg in (-STEP_DEG / 2, STEP_DEG / 2):
            noise.set_state(state)  # the same ray jitter in all views
            sides.append(_view(G, field, turn(middle, angle_deg)))
            evaluation.require_finite(sides[-1].image, heads)
        yaw_deg = yaw_pitch_roll_deg(middle)[:, :1]  # [B, 1]
        there, back = compare(*sides, box), compare(*reversed(sides), box)  # [B, 4]
        rows.append(torch.cat([yaw_deg, _mean_of_shown(there, back)], dim=1))
    return torch.cat(rows, dim=1).float().cpu().numpy()


def _box_side(generator: torch.nn.Module) -> float:
    return float(generator.config.rendering.box_warp)


def _view(G: torch.nn.Module, field: object, labels: torch.Tensor) -> View:
    out = G.render(field, labels)
    return View(labels, out["image"].float(), out["image_depth"].float(), out["image_mask"].float())


def pair_cameras(labels: torch.Tensor, heads: np.ndarray) -> list[torch.Tensor]:
    """Return the cameras in the middle of each pair, `[B, 25]` per pair.

    Args:
        labels: of the samples, `[B, 25]`. Their elevation, distance and intrinsics are kept.
        heads: numbers of the samples [B]; pair k of head i stands at the yaw `(k + frac(i g)) 90 - 180` degrees, with
            g the golden section, so that few heads already fill all yaws evenly.
    """
    yaw_deg = yaw_pitch_roll_deg(labels.double())[:, 0]
    phase = torch.from_numpy(np.asarray(heads) * _GOLDEN_RATIO % 1).to(labels.device)
    wanted = [(k + phase) * (360 / PAIRS_PER_HEAD) - 180 for k in range(PAIRS_PER_HEAD)]
    return [turn(labels, yaw - yaw_deg) for yaw in wanted]


def turn(labels: torch.Tensor, yaw_deg: torch.Tensor | float) -> torch.Tensor:
    """Turn cameras `[B, 25]` about the vertical axis of the world by angles in degrees: a number, or `[B]`."""
    cam2world, intrinsics = split_label(labels.double())
    angle = torch.deg2rad(torch.as_tensor(yaw_deg, dtype=torch.float64, device=labels.device)).expand(len(labels))
    rotation = torch.eye(4, dtype=torch.float64, device=labels.device).repeat(len(labels), 1, 1)
    rotation[:, 0, 0] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 0, 2], rotation[:, 2, 0] = angle.sin(), -angle.sin()
    return torch.cat([(rotation @ cam2world).flatten(1), intrinsics.flatten(1)], dim=1).to(labels.dtype)


def compare(view: View, other: View, box: float = 1.0) -> torch.Tensor:
    """Compare a view with what another one shows of it.

    Args:
        view, other: of the same heads.
        box: side of the box in world units.

    Returns:
        `[B, 4]`: share of surface that can be compared, and over it mean squared difference of colours, SSIM and mean
        absolute difference of depths in sides of the box; these are 0 where nothing can be compared.
    """
    overlap = warp(view, other, box)
    image = _average_down(view.image.clamp(-1, 1), view.depth.shape[-1])
    weight = overlap.seen.to(image.dtype)
    count = weight.sum((1, 2, 3))  # [B]
    share = count / overlap.surface.sum((1, 2, 3)).clamp(min=1)
    mse = ((image - overlap.image).square() * weight).mean(1).sum((1, 2)) / count.clamp(min=1)
    depth = (overlap.depth_difference.abs() * weight).sum((1, 2, 3)) / count.clamp(min=1) / box
    return torch.stack([share, mse, masked_ssim(image, overlap.image, weight), depth], dim=1)


def _mean_of_shown(there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """Average the numbers of both directions `[B, 4]`; a direction without overlap counts for its overlap alone."""
    shown = torch.stack([there[:, 0] > 0, back[:, 0] > 0]).double()[..., None]  # [2, B, 1]
    both = torch.stack([there, back]).double()
    mean = (both * shown).sum(0) / shown.sum(0).clamp(min=1)
    return torch.cat([both[..., :1].mean(0), mean[:, 1:]], dim=1)


def warp(view: View, other: View, box: float = 1.0) -> Overlap:
    """Find the pixels of a view in another one.

    A pixel's point `origin + depth direction` is projected to the other camera, whose picture is sampled there
    bilinearly. A pixel counts if both views show surface (`surface_of`) there and the other's surface does not hide it.
    A surface of the other view that lies *behind* the point does not: that view should see the point, and what it shows
    instead is a contradiction, not an occlusion.

    Args:
        view, other: of the same heads.
        box: side of the box in world units.
    """
    size = view.depth.shape[-1]
    # In float64: with TF32, which GPUs may be allowed to use, products of matrices would be pixels off.
    cam2world, intrinsics = split_label(view.labels.double())
    origins, directions = sample_rays(cam2world, intrinsics, size)  # [B, R^2, 3]
    points = origins + directions * view.depth.double().flatten(2).transpose(1, 2)
    place, distance, in_front = project(points, other.labels.double())  # [B, R^2, 2], [B, R^2] twice
    grid = (place * 2 - 1).unflatten(1, (size, size))  # [B, R, R, 2]; borders of the picture at -1 and 1
    inside = ((grid.abs() < 1).all(-1) & in_front.unflatten(1, (size, size)))[:, None]  # [B, 1, R, R]
    surface, other_surface = surface_of(view), surface_of(other)
    found = _sample(torch.cat([other.depth, other_surface.to(other.depth.dtype)], dim=1), grid)
    difference = found[:, :1] - distance.reshape(-1, 1, size, size).to(found.dtype)
    seen = surface & inside & (found[:, 1:] > 1 - 1e-3) & (difference > -BEHIND * box)
    # The picture may have more pixels than the depth: it is sampled at its own resolution and then averaged, so that
    # it loses as little as the other one.
    full = other.image.shape[-1]
    fine = functional.interpolate(grid.permute(0, 3, 1, 2), size=(full, full), mode="bilinear").permute(0, 2, 3, 1)
    return Overlap(_average_down(_sample(other.image.clamp(-1, 1), fine), size), seen, surface, difference)


def surface_of(view: View) -> torch.Tensor:
    """Return which pixels show a surface that can be followed: bool `[B, 1, R, R]`.

    The pixel and its eight neighbours are opaque, and their depths differ by no more than on a plane that is turned
    away by 65 degrees: `max - min <= 2 sqrt(2) tan(65 degrees) pixel`, with the width of a pixel at that depth.
    """
    size = view.depth.shape[-1]
    depth = functional.pad(view.depth, (1, 1, 1, 1), mode="replicate")
    nearest, farthest = -functional.max_pool2d(-depth, 3, 1), functional.max_pool2d(depth, 3, 1)
    thinnest = -functional.max_pool2d(functional.pad(-view.mask, (1, 1, 1, 1), mode="replicate"), 3, 1)
    focal = view.labels[:, [16, 20]].amin(dim=1)[:, None, None, None]
    pixel = view.depth / (size * focal)
    steepest = 2 * math.sqrt(2) * math.tan(math.radians(STEEPEST_DEG)) * pixel
    return (thinnest >= OPAQUE) & (farthest - nearest <= steepest)


def project(points: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project world points to pictures.

    Args:
        points: `[B, M, 3]`.
        labels: of the cameras, `[B, 25]`.

    Returns:
        (u, v) `[B, M, 2]`, 0 to 1 from left to right and from top to bottom; the distance from the camera `[B, M]`; and
        whether the point lies before the camera, bool `[B, M]`.
    """
    cam2world, intrinsics = split_label(labels)
    camera = (points - cam2world[:, None, :3, 3]) @ cam2world[:, :3, :3]  # [B, M, 3]: rotation transposed from the left
    z = camera[..., 2:]
    pixels = camera / torch.where(z > 0, z, 1) @ intrinsics.transpose(1, 2)  # [B, M, 3], the last of them 1
    return pixels[..., :2], torch.linalg.vector_norm(camera, dim=-1), z.squeeze(-1) > 0


def _sample(image: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Sample `[B, C, H, W]` bilinearly at `[B, R, R, 2]`, coordinates -1 to 1 from border to border."""
    return functional.grid_sample(image, grid.to(image.dtype), padding_mode="border", align_corners=False)


def _average_down(image: torch.Tensor, size: int) -> torch.Tensor:
    """Average a picture `[B, C, H, W]` down to `size` pixels a side."""
    return image if image.shape[-1] == size else functional.interpolate(image, size=(size, size), mode="area")


def masked_ssim(image: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity of parts of pictures.

    Wang et al. 2004, eq. 13, with the constants of `training.image_metrics.ssim`. Means and variances are those of the
    pixels that count: with the Gaussian window W and weights m, `mean_x = W(m x) / W(m)`, and so on. The result is the
    mean over the colours and over the pixels that count and whose window lies in the picture. Where all pixels count,
    it is `training.image_metrics.ssim`.

    Args:
        image, target: `[B, 3, H, W]` in [-1, 1].
        weight: `[B, 1, H, W]`, 0 or 1.

    Returns:
        `[B]`, -1 to 1; 0 where nothing counts.

    Raises:
        ValueError: the pictures have less than 11 pixels a side.
    """
    side = min(image.shape[2:])
    require(side >= WINDOW_SIZE, "image", f"at least {WINDOW_SIZE} pixels high and wide for SSIM", side)
    x, y, m = (t.double() for t in (image, target, weight))
    total = window_mean(m)
    safe = torch.where(total > 0, total, 1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return window_mean(values * m) / safe

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    cov = mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    similarity = (luminance * (2 * cov + _C2) / (var_x + var_y + _C2)).mean(1, keepdim=True)
    border = WINDOW_SIZE // 2
    inner = m[..., border:-border, border:-border]
    count = inner.sum((1, 2, 3))
    return ((similarity * inner).sum((1, 2, 3)) / torch.where(count > 0, count, 1)).to(image.dtype)
