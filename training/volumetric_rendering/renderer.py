"""The renderer as the generator holds it: checks its arguments and chooses between the fused op and the reference."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from torch_utils.ops import volume_render as fused
from training.config import RenderingConfig, require
from training.representations import Representation
from training.volumetric_rendering.decoder import OSGDecoder
from training.volumetric_rendering.reference import RenderDraws, RenderOutput, query_field_ref, render_rays_ref

RendererChoice = Literal["auto", "fused", "reference"]


class ImportanceRenderer(nn.Module):
    """The renderer of one representation; it has no parameters."""

    def __init__(self, representation: Representation) -> None:
        super().__init__()
        self.representation = representation
        self.choice: RendererChoice = "auto"

    def choose(self, choice: RendererChoice, device: torch.device | str = "cpu") -> None:
        """Choose what renders from now on.

        Args:
            choice: 'auto' takes the fused op where there is one for the call; 'fused' raises where there is none;
                'reference' takes plain PyTorch.
            device: where it is going to render.

        Raises:
            ValueError: 'fused', and there is no kernel for the representation on the device; or another choice.
        """
        require(choice in get_args(RendererChoice), "renderer", " or ".join(get_args(RendererChoice)), choice)
        if choice == "fused":
            reason = fused.no_kernel(self.representation, torch.device(device), torch.float32)
            require(reason is None, "renderer", "'auto' or 'reference', since 'fused' cannot run here", reason)
        self.choice = choice

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
        render = fused.volume_render if self._is_fused(planes, decoder, config) else render_rays_ref
        return render(self.representation, planes, decoder, ray_origins, ray_directions, config, draws)

    def query(
        self,
        planes: torch.Tensor,
        decoder: OSGDecoder,
        points: torch.Tensor,
        config: RenderingConfig,
        generator: torch.Generator | None = None,
        need_colors: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return raw density `[B, M]` and colour features `[B, M, C]` at world coordinates `[B, M, 3]`.

        Without `need_colors` the second may be None, and costs nothing.
        """
        noise = None
        if config.density_noise > 0:
            noise = torch.randn(*points.shape[:2], 1, device=points.device, generator=generator).squeeze(-1)
            noise = noise.to(points.dtype)
        if self._is_fused(planes, decoder, config):
            return fused.query_field(self.representation, planes, decoder, points, config, noise, need_colors)
        return query_field_ref(self.representation, planes, decoder, points, config, noise)

    def prepare_planes(self, planes: torch.Tensor) -> torch.Tensor:
        """Return planes in the memory order that this renderer reads, which pays when they are rendered repeatedly."""
        return planes if self.choice == "reference" else fused.prepare_planes(self.representation, planes)

    def _is_fused(self, planes: torch.Tensor, decoder: OSGDecoder, config: RenderingConfig) -> bool:
        if self.choice == "reference":
            return False
        reason = fused.unsupported(self.representation, planes, decoder, config)
        require(reason is None or self.choice == "auto", "renderer", "'auto', since 'fused' cannot run here", reason)
        return reason is None
