"""Stand-ins for generators with properties that are known: exact geometry, faces on both sides, or nothing but noise.

They have the part of the interface of `TriPlaneGenerator` that metrics use. Latents choose one of a few heads.
"""

from __future__ import annotations

import dataclasses
import zlib
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from camera_utils import yaw_pitch_roll_deg
from metrics.detector_interface import DetectorInfo
from training.config import RenderingConfig
from training.networks_stylegan2 import SynthesisOptions
from training.synthetic_head_geometry import HeadField
from training.synthetic_head_parameters import HeadParameters
from training.synthetic_head_tracing import march, pixel_cones
from training.synthetic_heads import render_heads, sample_identity

FAR = 3.3  # depth of rays that meet nothing
_TOLERANCE = 0.08  # pixels: how near to a surface a ray must come, as in the pictures


class Field(NamedTuple):
    """What stand-ins render."""

    ws: torch.Tensor
    """`[B, 2, 4]`"""
    heads: list[HeadParameters]
    options: SynthesisOptions


class RayTracedGenerator(nn.Module):
    """Synthetic heads with exact views, masks and depths.

    Args:
        resolution: side of the pictures and of depth and mask, a multiple of 8.
        num_heads: how many different heads there are.
        seed: of the heads.
        depth_error: is added to the depth, in world units.
    """

    def __init__(self, resolution: int = 32, num_heads: int = 4, seed: int = 0, depth_error: float = 0.0) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = 8, 25, 4
        self.img_resolution, self.img_channels = resolution, 3
        self.neural_rendering_resolution = resolution
        self.config = SimpleNamespace(pose_offset=False, background=True, rendering=RenderingConfig())
        self.num_heads, self.seed, self.depth_error = num_heads, seed, depth_error
        self.register_buffer("anchor", torch.zeros(1))  # so that `.to(device)` and checks of devices find something
        self.eval()

    def mapping(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> torch.Tensor:
        """Return w-layers `[B, 2, 4]` that hold the number of a head, which z alone chooses."""
        assert z.shape == (len(c), self.z_dim) and c.shape[1] == self.c_dim
        numbers = [zlib.crc32(row.float().cpu().numpy().tobytes()) % self.num_heads for row in z]
        return torch.tensor(numbers, dtype=torch.float32, device=z.device)[:, None, None].expand(-1, 2, self.w_dim)

    def radiance_field(
        self, ws: torch.Tensor, ws_bcg: torch.Tensor | None = None, options: SynthesisOptions | None = None
    ) -> Field:
        """Return the heads of w-layers, before the backgrounds of others."""
        heads, others = ([self._head(row) for row in layers] for layers in (ws, ws if ws_bcg is None else ws_bcg))
        behind = [{"background": h.background, "background_angle": h.background_angle} for h in others]
        heads = [dataclasses.replace(head, **background) for head, background in zip(heads, behind)]
        return Field(ws, heads, options or SynthesisOptions())

    def _head(self, layers: torch.Tensor) -> HeadParameters:
        return sample_identity(self.seed, int(layers[0, 0].round()))

    def render(
        self, field: Field, c: torch.Tensor, neural_rendering_resolution: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Trace the heads from cameras `[B, 25]`; see `TriPlaneGenerator.render`."""
        size = neural_rendering_resolution or self.neural_rendering_resolution
        raw = render_heads(field.heads, c, size)
        full = raw if size == self.img_resolution else render_heads(field.heads, c, self.img_resolution)
        return {
            "image": full.rgb / 127.5 - 1,
            "image_raw": raw.rgb / 127.5 - 1,
            "image_depth": trace_depth(field.heads, c, size) + self.depth_error,
            "image_mask": raw.mask[:, None] / 255.0,
        }

    def synthesis(
        self,
        ws: torch.Tensor,
        c: torch.Tensor,
        neural_rendering_resolution: int | None = None,
        ws_bcg: torch.Tensor | None = None,
        **option_kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Render w-layers `[B, 2, 4]` from cameras."""
        options = SynthesisOptions(**option_kwargs)
        return self.render(self.radiance_field(ws, ws_bcg, options), c, neural_rendering_resolution)

    def forward(self, z: torch.Tensor, c: torch.Tensor, **option_kwargs: Any) -> dict[str, torch.Tensor]:
        """Render latents from cameras."""
        return self.synthesis(self.mapping(z, c), c, **option_kwargs)


class TwoFacedGenerator(RayTracedGenerator):
    """Heads with a face on both sides: a camera behind the head sees its front half mirrored to the back.

    The scene is reflected by z -> -z. An image of it from a pose C is the image of the head from diag(1, 1, -1) C
    diag(-1, 1, 1), flipped left to right.
    """

    def render(
        self, field: Field, c: torch.Tensor, neural_rendering_resolution: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Trace the heads from the front: from cameras behind them, what a mirror there shows."""
        behind = yaw_pitch_roll_deg(c)[:, 0].abs() > 90  # [B]
        mirrored = reflect_depth(c)
        out = super().render(field, torch.where(behind[:, None], mirrored, c), neural_rendering_resolution)
        return {name: torch.where(behind[:, None, None, None], x.flip(3), x) for name, x in out.items()}


class NoiseGenerator(RayTracedGenerator):
    """Noise instead of pictures; opaque everywhere, at the depth of the origin."""

    def render(
        self, field: Field, c: torch.Tensor, neural_rendering_resolution: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Draw noise, of the options' generator."""
        raw = neural_rendering_resolution or self.neural_rendering_resolution

        def draw(size: int) -> torch.Tensor:
            return torch.rand(len(c), 3, size, size, generator=field.options.generator, device=c.device) * 2 - 1

        flat = torch.ones(len(c), 1, raw, raw, device=c.device)
        return {
            "image": draw(self.img_resolution),
            "image_raw": draw(raw),
            "image_depth": flat * 2.7,
            "image_mask": flat,
        }


class Compass(RayTracedGenerator):
    """Pictures whose colour is the direction in which the camera stands.

    Args:
        resolution: side of the pictures.
        error_deg: by how much directions are turned about the vertical axis.
    """

    def __init__(self, resolution: int = 8, error_deg: float = 0.0) -> None:
        super().__init__(resolution)
        self.error_deg = error_deg

    def render(
        self, field: Field, c: torch.Tensor, neural_rendering_resolution: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Write the directions."""
        yaw, pitch, _ = torch.deg2rad(yaw_pitch_roll_deg(c) + torch.tensor([self.error_deg, 0, 0])).T
        direction = torch.stack([pitch.cos() * yaw.sin(), pitch.sin(), pitch.cos() * yaw.cos()], dim=1)
        return {"image": direction[:, :, None, None].expand(-1, -1, self.img_resolution, self.img_resolution)}


class ReadCompass:
    """The detector that reads the colours of `Compass`."""

    outputs = frozenset({"directions"})
    key = "c033"
    info = DetectorInfo(name="compass", resize="none", sha256=None, source="tests", held_out={"median_deg": 0.5})

    def __call__(self, images: torch.Tensor, output: str) -> torch.Tensor:
        """Return unit vectors `[B, 3]`."""
        assert images.dtype == torch.uint8 and output == "directions"
        return functional.normalize((images.float().mean(dim=(2, 3)) - 127.5) / 127.5)


@torch.no_grad()
def trace_depth(heads: list[HeadParameters], labels: torch.Tensor, resolution: int) -> torch.Tensor:
    """Return the distance along the rays of pixel centres to heads, `[B, 1, H, W]`; `FAR` where there is nothing."""
    field = HeadField(heads, labels.device)
    pixel = 1 / (resolution * labels[:, [16]].double())  # width of a pixel at depth 1
    rays = pixel_cones(field, labels, resolution, pixel)
    depth, met, _ = march(field, rays, None, _TOLERANCE * pixel)
    return torch.where(met, depth, FAR).reshape(-1, 1, resolution, resolution)


def reflect_depth(labels: torch.Tensor) -> torch.Tensor:
    """Return labels `[B, 25]` of the poses diag(1, 1, -1) C diag(-1, 1, 1), which move the back to the front."""
    reflected = labels.clone()
    reflected[:, 8:12] *= -1  # the world's z
    reflected[:, [0, 4, 8]] *= -1  # the camera's x
    return reflected
