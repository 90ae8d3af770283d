"""Volume rendering in plain PyTorch: two-pass ray marching of a plane representation. What the fused op must equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from training.config import RenderingConfig
from training.representations import Representation
from training.volumetric_rendering.depth_sampling import importance_depths, ray_limits, stratified_depths
from training.volumetric_rendering.ray_marcher import (
    expected_depth,
    limit_depth,
    render_weight_from_density,
    sample_weights_from_intervals,
)

Decoder = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Maps features `[..., C]` to raw density `[...]` and colour features `[..., O]`."""
_REMOVED_SIGMA = -1000.0


class RenderOutput(NamedTuple):
    """What a ray sees."""

    features: torch.Tensor
    """Composited colour features `[B, R, C]`."""
    depth: torch.Tensor
    """Expected distance along the ray `[B, R, 1]`, in world units."""
    accumulation: torch.Tensor
    """Opacity `[B, R, 1]` in [0, 1]."""


class MarchOutput(NamedTuple):
    """What marching leaves for `finish`."""

    features: torch.Tensor
    """Composited colour features `[B, R, C]`, over black."""
    depth: torch.Tensor
    """Expected depth `[B, R]`, 0 where nothing was hit."""
    accumulation: torch.Tensor
    """Opacity `[B, R]`."""
    depth_range: torch.Tensor
    """First and last sample `[B, R, 2]`; carries no gradient."""


@dataclass(frozen=True, kw_only=True)
class RenderDraws:
    """The random numbers of one rendering."""

    coarse_jitter: torch.Tensor
    """Uniform `[B, R, S]`."""
    importance: torch.Tensor | None = None
    """Uniform `[B, R, F]`; None without importance samples."""
    coarse_noise: torch.Tensor | None = None
    """Normal `[B, R, S]`; None without density noise."""
    fine_noise: torch.Tensor | None = None
    """Normal `[B, R, F]`."""

    @classmethod
    def draw(cls, rays: torch.Tensor, config: RenderingConfig, generator: torch.Generator | None = None) -> RenderDraws:
        """Draw for rays `[B, R, 3]`, in the order and shapes of the published code.

        Numbers are drawn in float32 and converted, so that a seed means the same in every precision. With stratified
        `importance_draws`, number i of F becomes (i + u_i) / F.
        """
        batch, num_rays, _ = rays.shape
        coarse, fine = config.depth_resolution, config.depth_resolution_importance

        def rand(*shape: int) -> torch.Tensor:
            return torch.rand(shape, device=rays.device, generator=generator).to(rays.dtype)

        def randn(samples: int) -> torch.Tensor | None:
            if config.density_noise == 0 or samples == 0:
                return None
            noise = torch.randn(batch, num_rays * samples, 1, device=rays.device, generator=generator)
            return noise.to(rays.dtype).reshape(batch, num_rays, samples)

        if config.auto_range:
            jitter = rand(coarse, batch, num_rays, 1).permute(1, 2, 0, 3).squeeze(-1)
        else:
            jitter = rand(batch, num_rays, coarse, 1).squeeze(-1)
        coarse_noise = randn(coarse)
        importance = rand(batch * num_rays, fine).reshape(batch, num_rays, fine) if fine else None
        if fine and config.importance_draws == "stratified":
            importance = (importance + torch.arange(fine, dtype=rays.dtype, device=rays.device)) / fine
            importance = importance.clamp(max=1 - torch.finfo(torch.float32).eps / 2)  # the sum may round up
        return cls(coarse_jitter=jitter, importance=importance, coarse_noise=coarse_noise, fine_noise=randn(fine))


def query_field_ref(
    representation: Representation,
    planes: torch.Tensor,
    decoder: Decoder,
    points: torch.Tensor,
    config: RenderingConfig,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluate the radiance field.

    Args:
        representation: how points are looked up in planes.
        planes: of B scenes, as the representation unpacks them.
        decoder: features to density and colours.
        points: world coordinates `[B, M, 3]`.
        config: box and density noise. The crop region applies to rendering only, as published.
        noise: standard normal numbers `[B, M]` for `config.density_noise`; None adds none.

    Returns:
        raw density `[B, M]` and colour features `[B, M, C]`.
    """
    sigma, colors = decoder(representation(planes, points * (2 / config.box_warp)))
    if noise is not None:
        sigma = sigma + noise * config.density_noise
    return sigma, colors


def inside_crop(points: torch.Tensor, config: RenderingConfig) -> torch.Tensor:
    """Return whether points `[..., 3]` keep their density: away from the x and z faces of the box (y is free)."""
    limit = config.box_warp / 2 - config.crop_margin
    return (points[..., 0].abs() <= limit) & (points[..., 2].abs() <= limit)


def march_rays_ref(
    representation: Representation,
    planes: torch.Tensor,
    decoder: Decoder,
    ray_origins: torch.Tensor,
    ray_directions: torch.Tensor,
    limits: tuple[torch.Tensor, torch.Tensor],
    config: RenderingConfig,
    draws: RenderDraws,
) -> MarchOutput:
    """March rays between near and far limits `[B, R]`; see `render_rays_ref` for the other arguments."""

    def evaluate(depths: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        points = ray_origins.unsqueeze(2) + depths.unsqueeze(3) * ray_directions.unsqueeze(2)  # [B, R, S, 3]
        flat_noise = None if noise is None else noise.flatten(1, 2)
        sigma, colors = query_field_ref(representation, planes, decoder, points.flatten(1, 2), config, flat_noise)
        sigma, colors = sigma.unflatten(1, depths.shape[1:]), colors.unflatten(1, depths.shape[1:])
        if config.crop_margin is not None:
            sigma = sigma.masked_fill(~inside_crop(points, config), _REMOVED_SIGMA)
        return sigma, colors

    depths = stratified_depths(*limits, draws.coarse_jitter, config)
    sigma, colors = evaluate(depths, draws.coarse_noise)
    if config.depth_resolution_importance == 0:
        weights = render_weight_from_density(sigma, depths)  # [B, R, S - 1]
        features = torch.einsum("brs,brsc->brc", sample_weights_from_intervals(weights), colors)
    else:
        coarse_colors, num_coarse = colors, depths.shape[-1]
        fine_depths = importance_depths(depths, render_weight_from_density(sigma, depths), draws.importance)
        fine_sigma, fine_colors = evaluate(fine_depths, draws.fine_noise)
        # Only the scalars are sorted; the weights go back to the unsorted samples, so that features stay where they
        # are.
        depths, order = torch.cat([depths, fine_depths], dim=-1).sort(dim=-1, stable=True)
        sigma = torch.cat([sigma, fine_sigma], dim=-1).gather(-1, order)
        weights = render_weight_from_density(sigma, depths)  # [B, R, S + F - 1]
        sample_weights = sample_weights_from_intervals(weights)
        sample_weights = torch.zeros_like(sample_weights).scatter(-1, order, sample_weights)
        features = torch.einsum("brs,brsc->brc", sample_weights[..., :num_coarse], coarse_colors)
        features = features + torch.einsum("brs,brsc->brc", sample_weights[..., num_coarse:], fine_colors)
    depth_range = torch.stack([depths[..., 0], depths[..., -1]], dim=-1).detach()
    return MarchOutput(features, expected_depth(weights, depths), weights.sum(dim=-1), depth_range)


def finish(march: MarchOutput, config: RenderingConfig) -> RenderOutput:
    """Put what was marched over its background, and limit its depth."""
    accumulation = march.accumulation.unsqueeze(-1)
    features = march.features + 1 - accumulation if config.white_back else march.features
    depth = limit_depth(march.depth, march.accumulation, march.depth_range, config.depth_clamp)
    return RenderOutput(features, depth.unsqueeze(-1), accumulation)


def render_rays_ref(
    representation: Representation,
    planes: torch.Tensor,
    decoder: Decoder,
    ray_origins: torch.Tensor,
    ray_directions: torch.Tensor,
    config: RenderingConfig,
    draws: RenderDraws,
) -> RenderOutput:
    """Render rays in two passes: stratified samples, then samples where the first pass found density.

    Gradients flow to planes, decoder and, through the sample positions, to origins and directions; the depths of the
    second pass are constants, as published.

    Args:
        representation: how points are looked up in planes.
        planes: of B scenes, as the representation unpacks them.
        decoder: features to density and colours.
        ray_origins: `[B, R, 3]`, world units.
        ray_directions: `[B, R, 3]`, unit length.
        config: sampling and compositing.
        draws: the random numbers.
    """
    limits = ray_limits(ray_origins, ray_directions, config)
    march = march_rays_ref(representation, planes, decoder, ray_origins, ray_directions, limits, config, draws)
    return finish(march, config)
