"""Volume renderer: two-pass ray marching of a plane representation (plain PyTorch reference)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from training.config import RenderingConfig, require
from training.representations import Representation
from training.volumetric_rendering.decoder import OSGDecoder
from training.volumetric_rendering.depth_sampling import importance_depths, stratified_depths
from training.volumetric_rendering.ray_marcher import (
    composite_depth,
    render_weight_from_density,
    sample_weights_from_intervals,
)

_REMOVED_SIGMA = -1000.0


class RenderOutput(NamedTuple):
    """What a ray sees."""

    features: torch.Tensor
    """Composited colour features `[B, R, C]`."""
    depth: torch.Tensor
    """Expected distance along the ray `[B, R, 1]`, in world units."""
    accumulation: torch.Tensor
    """Opacity `[B, R, 1]` in [0, 1]."""


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

        Numbers are drawn in float32 and converted, so that a seed means the same in every precision.
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
        return cls(coarse_jitter=jitter, importance=importance, coarse_noise=coarse_noise, fine_noise=randn(fine))


def query_field_ref(
    representation: Representation,
    planes: torch.Tensor,
    decoder: OSGDecoder,
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


def render_rays_ref(
    representation: Representation,
    planes: torch.Tensor,
    decoder: OSGDecoder,
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

    def evaluate(depths: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        points = ray_origins.unsqueeze(2) + depths.unsqueeze(3) * ray_directions.unsqueeze(2)  # [B, R, S, 3]
        flat_noise = None if noise is None else noise.flatten(1, 2)
        sigma, colors = query_field_ref(representation, planes, decoder, points.flatten(1, 2), config, flat_noise)
        sigma, colors = sigma.unflatten(1, depths.shape[1:]), colors.unflatten(1, depths.shape[1:])
        if config.crop_margin is not None:
            sigma = sigma.masked_fill(~inside_crop(points, config), _REMOVED_SIGMA)
        return sigma, colors

    depths = stratified_depths(ray_origins, ray_directions, draws.coarse_jitter, config)
    sigma, colors = evaluate(depths, draws.coarse_noise)
    weights = render_weight_from_density(sigma, depths)  # [B, R, S - 1]
    if config.depth_resolution_importance == 0:
        sample_weights = sample_weights_from_intervals(weights)
        features = torch.einsum("brs,brsc->brc", sample_weights, colors)
    else:
        coarse_colors, num_coarse = colors, depths.shape[-1]
        fine_depths = importance_depths(depths, weights, draws.importance)
        fine_sigma, fine_colors = evaluate(fine_depths, draws.fine_noise)
        # Only the scalars are sorted; the weights go back to the unsorted samples, so that features stay where they
        # are.
        depths, order = torch.cat([depths, fine_depths], dim=-1).sort(dim=-1)
        sigma = torch.cat([sigma, fine_sigma], dim=-1).gather(-1, order)
        weights = render_weight_from_density(sigma, depths)  # [B, R, S + F - 1]
        sample_weights = sample_weights_from_intervals(weights)
        sample_weights = torch.zeros_like(sample_weights).scatter(-1, order, sample_weights)
        features = torch.einsum("brs,brsc->brc", sample_weights[..., :num_coarse], coarse_colors)
        features = features + torch.einsum("brs,brsc->brc", sample_weights[..., num_coarse:], fine_colors)

    accumulation = weights.sum(dim=-1, keepdim=True)
    if config.white_back:
        features = features + 1 - accumulation
    depth = composite_depth(weights, depths, config.depth_clamp).unsqueeze(-1)
    return RenderOutput(features, depth, accumulation)


class ImportanceRenderer(nn.Module):
    """The renderer of one representation, as the generator holds it; it has no parameters."""

    def __init__(self, representation: Representation) -> None:
        super().__init__()
        self.representation = representation

    def forward(
        self,
        planes: torch.Tensor,
        decoder: OSGDecoder,
        ray_origins: torch.Tensor,
        ray_directions: torch.Tensor,
        config: RenderingConfig,
        draws: RenderDraws | None = None,
        generator: torch.Generator | None = None,
    ) -> RenderOutput:
        """Render rays `[B, R, 3]`; see `render_rays_ref`. Random numbers come from `draws`, else from `generator`."""
        require(
            ray_origins.ndim == 3 and ray_origins.shape == ray_directions.shape and ray_origins.shape[-1] == 3,
            "ray_origins, ray_directions",
            "two tensors of shape [B, R, 3]",
            (tuple(ray_origins.shape), tuple(ray_directions.shape)),
        )
        config.require_range()
        if draws is None:
            draws = RenderDraws.draw(ray_origins, config, generator)
        return render_rays_ref(self.representation, planes, decoder, ray_origins, ray_directions, config, draws)

    def query(
        self,
        planes: torch.Tensor,
        decoder: OSGDecoder,
        points: torch.Tensor,
        config: RenderingConfig,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return raw density `[B, M]` and colour features `[B, M, C]` at world coordinates `[B, M, 3]`."""
        noise = None
        if config.density_noise > 0:
            noise = torch.randn(*points.shape[:2], 1, device=points.device, generator=generator).squeeze(-1)
            noise = noise.to(points.dtype)
        return query_field_ref(self.representation, planes, decoder, points, config, noise)
