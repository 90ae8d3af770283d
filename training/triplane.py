"""The generator: latents and cameras in, images out. Composition only; the parts live in their own files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import camera_utils
from training.config import GeneratorConfig, require
from training.networks_stylegan2 import (
    Generator,
    MappingNetwork,
    SynthesisNetwork,
    SynthesisOptions,
    ToRGBLayer,
)
from training.published_kwargs import (
    RenderingKwargs,
    generator_config_from_kwargs,
    generator_kwargs,
    replace_rendering_kwargs,
)
from training.representations import PLANE_FEATURES, make_representation
from training.superresolution import Superresolution, resize_bilinear
from training.volumetric_rendering.decoder import OSGDecoder, widen_sigmoid_range
from training.volumetric_rendering.ray_sampler import RaySampler
from training.volumetric_rendering.renderer import ImportanceRenderer

_TRANSLATION_ENTRIES = slice(3, 12, 4)  # of the camera label


class RadianceField:
    """What latents determine before any camera is chosen: planes and, on first use, the background.

    Made by `TriPlaneGenerator.radiance_field`; rendering it from many cameras computes the networks behind it once.
    """

    def __init__(
        self,
        ws: torch.Tensor,
        planes: torch.Tensor,
        ws_background: torch.Tensor,
        background_network: SynthesisNetwork | None,
        options: SynthesisOptions,
    ) -> None:
        self.ws, self.planes, self.options = ws, planes, options
        self._ws_background, self._background_network = ws_background, background_network
        self._background: torch.Tensor | None = None

    @property
    def background(self) -> torch.Tensor | None:
        """Background features `[B, C, H, W]`; None for a generator without background network."""
        network = self._background_network
        if network is None:
            return None
        if self._background is None:
            # Computed late because the published code draws its random layer noise after that of the renderer.
            ws = self._ws_background[:, : network.num_ws]
            missing = network.num_ws - ws.shape[1]
            if missing > 0:
                ws = torch.cat([ws, ws[:, -1:].expand(-1, missing, -1)], dim=1)
            self._background = network(ws, self.options)
        return self._background


class TriPlaneGenerator(nn.Module):
    """3D-aware generator of SphereHead, PanoHead and EG3D, by configuration.

    The constructor takes the published arguments (see `generator_config_from_kwargs`); `from_config` takes the typed
    configuration. `config` is frozen but replaceable: `rendering_kwargs` is a view through which scripts of the EG3D
    family read and change it.

    Differs from the published code: see docs/differences.md.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = config = generator_config_from_kwargs(*args, **kwargs)
        self.z_dim, self.c_dim, self.w_dim = config.z_dim, config.c_dim, config.w_dim
        self.img_resolution, self.img_channels = config.img_resolution, config.img_channels
        self.fold_projections = True
        """Take the plane projections inside the backbone's ToRGB layers where that is exact; False takes them apart."""
        representation = make_representation(config.representation, config.plane_depth)

        # Sub-modules draw their initial weights in this (published) order.
        self.renderer = ImportanceRenderer(representation)
        self.ray_sampler = RaySampler()
        self.backbone = Generator(
            config.z_dim,
            config.c_dim,
            config.w_dim,
            config.plane_resolution,
            representation.backbone_channels,
            config.mapping,
            config.synthesis,
        )
        projections = representation.projections()
        self._projection_names = tuple(projections)
        for name, projection in projections.items():
            biases = [parameter for parameter, _ in projection.named_parameters() if parameter.endswith("bias")]
            require(not biases, f"projection '{name}'", "layers without bias", biases)
            self.add_module(name, projection)
        self.superresolution = Superresolution(config.img_resolution, config.superresolution)
        self.decoder = OSGDecoder(PLANE_FEATURES, PLANE_FEATURES, config.decoder)
        self.torgb = ToRGBLayer(PLANE_FEATURES, 3, config.w_dim) if config.raw_torgb else None
        self.bcg_synthesis = None
        if config.background:
            self.bcg_synthesis = SynthesisNetwork(
                config.w_dim,
                self.superresolution.input_resolution,
                PLANE_FEATURES,
                config.synthesis.background(),
            )
        if config.pose_offset:
            self.t_mapping = _pose_offset_network(config)
        self.toparsing = None
        if config.parsing_classes:
            self.toparsing = ToRGBLayer(PLANE_FEATURES, config.parsing_classes, config.w_dim)
        self._cached_field: RadianceField | None = None

    @classmethod
    def from_config(cls, config: GeneratorConfig) -> TriPlaneGenerator:
        """Build a generator with random weights."""
        return cls(**generator_kwargs(config))

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes over: all but the cache, which may hang on to a graph of gradients."""
        return {**self.__dict__, "_cached_field": None}

    # ---- what scripts of the EG3D family use besides the methods below ----

    @property
    def init_args(self) -> tuple:
        """Positional constructor arguments (none)."""
        return ()

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Keyword arguments that construct a generator like this one."""
        return generator_kwargs(self.config)

    @property
    def rendering_kwargs(self) -> RenderingKwargs:
        """The published dictionary, as a view of `config`."""
        return RenderingKwargs(self)

    @rendering_kwargs.setter
    def rendering_kwargs(self, values: Mapping[str, Any]) -> None:
        self.config = replace_rendering_kwargs(self.config, values)

    @property
    def neural_rendering_resolution(self) -> int:
        """Side of the volume-rendered image, in pixels; part of `config`."""
        return self.config.neural_rendering_resolution

    @neural_rendering_resolution.setter
    def neural_rendering_resolution(self, value: int) -> None:
        self.config = dataclasses.replace(self.config, neural_rendering_resolution=int(value))

    @property
    def projections(self) -> list[nn.Sequential]:
        """The bias-free layers between backbone and planes; empty for representations without."""
        return [getattr(self, name) for name in self._projection_names]

    @property
    def parsing_flag(self) -> bool:
        """Whether the generator has a semantic head."""
        return self.toparsing is not None

    # ---- latents ----

    def mapping(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> torch.Tensor:
        """Map latents `[B, z_dim]` and conditioning labels `[B, 25]` to w-layers `[B, L, 512]`.

        See `MappingNetwork.forward` for the other arguments.
        """
        return self.backbone.mapping(
            z, self._conditioning(c), truncation_psi, truncation_cutoff, update_emas=update_emas
        )

    def apply_delta_c(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift cameras by the learned offset of each latent (PanoHead, camera self-adaptation).

        Returns:
            the shifted labels `[B, 25]` and the offsets `[B, 3]`, in world units.

        Differs from the published code: with zero conditioning, only the network's input is zeroed, not the camera.
        """
        require(self.config.pose_offset, "apply_delta_c", "a generator with a pose offset", self.config.representation)
        offset = self.t_mapping(z, self._conditioning(c), truncation_psi, truncation_cutoff, update_emas).squeeze(1)
        shifted = c.to(offset.dtype).clone()
        shifted[:, _TRANSLATION_ENTRIES] += offset
        return shifted, offset

    def _conditioning(self, c: torch.Tensor) -> torch.Tensor:
        config = self.config.conditioning
        return torch.zeros_like(c) if config.zero else c * config.scale

    # ---- from w-layers to a radiance field, and from there to images ----

    def radiance_field(
        self, ws: torch.Tensor, ws_bcg: torch.Tensor | None = None, options: SynthesisOptions | None = None
    ) -> RadianceField:
        """Compute the planes of w-layers `[B, L, 512]`; `ws_bcg` gives the background other layers than its own."""
        options = options or SynthesisOptions()
        ws = ws.to(self.backbone.mapping.fc0.weight.dtype)
        ws_bcg = ws if ws_bcg is None else ws_bcg.to(ws.dtype)
        planes = self.renderer.prepare_planes(self.renderer.representation.unpack(self._plane_image(ws, options)))
        return RadianceField(ws, planes, ws_bcg, self.bcg_synthesis, options)

    def _plane_image(self, ws: torch.Tensor, options: SynthesisOptions) -> torch.Tensor:
        """Backbone and plane projections: `[B, plane_channels, H, W]`."""
        projections = self.projections
        if not projections:
            return self.backbone.synthesis(ws, options)
        if self.fold_projections and self.config.synthesis.conv_clamp is None:
            matrix = torch.cat(
                [_projection_matrix(projection, self.backbone.img_channels) for projection in projections]
            )
            return self.backbone.synthesis(ws, options, output_projection=matrix)
        image = self.backbone.synthesis(ws, options)
        return torch.cat([projection(image) for projection in projections], dim=1)

    def render(
        self, field: RadianceField, c: torch.Tensor, neural_rendering_resolution: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Render a radiance field from cameras.

        Args:
            field: of B latents.
            c: camera labels `[B, 25]`.
            neural_rendering_resolution: R, side of the volume-rendered image; None is the generator's own.

        Returns:
            `image` `[B, 3, H, W]`, nominally in [-1, 1]; `image_raw` `[B, 3, R, R]`; `image_depth` `[B, 1, R, R]`, the
            distance along the ray in world units; `image_mask` `[B, 1, R, R]`, the opacity of the volume in [-0.001,
            1.001]; with a semantic head `image_parsing` `[B, classes, R, R]`, probabilities.
        """
        resolution = neural_rendering_resolution
        if resolution is None:
            resolution = self.neural_rendering_resolution
        require(resolution >= 1, "neural_rendering_resolution", "at least 1", resolution)
        _require_batch("camera labels", c, field)
        cam2world, intrinsics = camera_utils.split_label(c.to(field.planes.dtype))
        rays = self.ray_sampler(cam2world, intrinsics, resolution)
        options = field.options
        rendered = self.renderer(field.planes, self.decoder, *rays, self.config.rendering, generator=options.generator)
        features, depth, accumulation = (
            x.transpose(1, 2).unflatten(2, (resolution, resolution)) for x in rendered
        )  # [B, C, R, R]
        features = self._to_signed(features)
        background = field.background
        if background is not None:
            background = resize_bilinear(background, resolution, self.config.superresolution.antialias)
            features = features + (1 - accumulation) * background

        raw = self._raw_image(features, field)
        sr_options = SynthesisOptions(
            noise_mode=self.config.superresolution.noise_mode,
            force_fp32=options.force_fp32,
            fused_modconv=options.fused_modconv,
            generator=options.generator,
        )
        image, first_rgb = self.superresolution(raw, features.contiguous(), field.ws, sr_options)
        if self.config.superresolution.first_rgb_replaces_raw and first_rgb is not None:
            raw = first_rgb
        out = {
            "image": image,
            "image_raw": raw,
            "image_depth": depth,
            "image_mask": widen_sigmoid_range(accumulation),
        }
        if self.toparsing is not None:
            out["image_parsing"] = F.softmax(self.toparsing(features, field.ws[:, -1], fused=False), dim=1)
        return out

    def query(self, field: RadianceField, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return raw density `[B, M]` and colour features `[B, M, 32]` at world coordinates `[B, M, 3]`."""
        return self._query(field, points)

    def query_density(self, field: RadianceField, points: torch.Tensor) -> torch.Tensor:
        """Return raw density `[B, M]` at world coordinates `[B, M, 3]`."""
        return self._query(field, points, need_colors=False)[0]

    def _query(
        self, field: RadianceField, points: torch.Tensor, need_colors: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        _require_batch("points", points, field)
        points, config = points.to(field.planes.dtype), self.config.rendering
        return self.renderer.query(field.planes, self.decoder, points, config, field.options.generator, need_colors)

    def point_colors(self, field: RadianceField, points: torch.Tensor) -> torch.Tensor:
        """Return colours `[B, M, 3]`, nominally in [-1, 1], of world coordinates `[B, M, 3]` (no super-resolution)."""
        _, features = self.query(field, points)
        features = self._to_signed(features).transpose(1, 2).unsqueeze(-1)  # [B, C, M, 1]
        return self._raw_image(features, field).squeeze(-1).transpose(1, 2)

    def _to_signed(self, features: torch.Tensor) -> torch.Tensor:
        """Map the features of a sigmoid decoder from [0, 1] to [-1, 1]."""
        return features * 2 - 1 if self.decoder.activation == "sigmoid" else features

    def _raw_image(self, features: torch.Tensor, field: RadianceField) -> torch.Tensor:
        """Colours `[B, 3, H, W]` of composited or point features `[B, C, H, W]`."""
        if self.torgb is None:
            return features[:, :3]
        return self.torgb(features, field.ws[:, -1], fused=False)

    # ---- the published calls ----

    def synthesis(
        self,
        ws: torch.Tensor,
        c: torch.Tensor,
        neural_rendering_resolution: int | None = None,
        update_emas: bool = False,
        ws_bcg: torch.Tensor | None = None,
        cache_backbone: bool = False,
        use_cached_backbone: bool = False,
        **option_kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Render w-layers `[B, L, 512]` from cameras `[B, 25]`; see `render` for the result.

        Args:
            ws: w-layers.
            c: camera labels.
            neural_rendering_resolution: for this call; None is the generator's own.
            update_emas: accepted for compatibility; nothing here keeps averages.
            ws_bcg: other w-layers for the background.
            cache_backbone: keep planes and background for later calls.
            use_cached_backbone: reuse what was kept, if it was made from the same `ws` and options.
            **option_kwargs: fields of `SynthesisOptions` (`noise_mode`, `force_fp32`, `fused_modconv`, `generator`).

        Differs from the published code: a resolution given here does not stay on the generator, and a cache made for
        other latents is not used.
        """
        del update_emas
        options = SynthesisOptions(**option_kwargs)
        field = self._cached_field if use_cached_backbone else None
        if ws_bcg is not None or not _is_reusable(field, ws, options):
            # What is kept has latents of its own, so that it is seen when the caller changes theirs in place.
            field = self.radiance_field(ws.clone() if cache_backbone else ws, ws_bcg, options)
        if cache_backbone and ws_bcg is None:
            self._cached_field = field
        return self.render(field, c, neural_rendering_resolution)

    def sample_mixed(
        self,
        coordinates: torch.Tensor,
        directions: torch.Tensor | None,
        ws: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
        **option_kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Query the field of w-layers at world coordinates `[B, M, 3]`.

        `directions`, `truncation_psi`, `truncation_cutoff` and `update_emas` are accepted and have no effect, as
        published.

        Returns:
            `rgb` `[B, M, 32]`, `sigma` `[B, M, 1]` (raw density) and `xyz`, the coordinates.
        """
        del directions, truncation_psi, truncation_cutoff, update_emas
        sigma, features = self.query(self.radiance_field(ws, options=SynthesisOptions(**option_kwargs)), coordinates)
        return {"rgb": features, "sigma": sigma.unsqueeze(-1), "xyz": coordinates}

    def sample(
        self,
        coordinates: torch.Tensor,
        directions: torch.Tensor | None,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
        **option_kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Query the field of latents `[B, z_dim]` under conditioning labels `[B, 25]`; see `sample_mixed`."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff, update_emas)
        return self.sample_mixed(coordinates, directions, ws, **option_kwargs)

    def forward(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        neural_rendering_resolution: int | None = None,
        update_emas: bool = False,
        cache_backbone: bool = False,
        use_cached_backbone: bool = False,
        **option_kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Render latents from the cameras they are conditioned on, shifted by the learned offset if there is one."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff, update_emas)
        if self.config.pose_offset:
            c, _ = self.apply_delta_c(z, c, truncation_psi, truncation_cutoff, update_emas)
        return self.synthesis(
            ws,
            c,
            neural_rendering_resolution,
            cache_backbone=cache_backbone,
            use_cached_backbone=use_cached_backbone,
            **option_kwargs,
        )


def _pose_offset_network(config: GeneratorConfig) -> MappingNetwork:
    mapping = dataclasses.replace(config.mapping, lr_multiplier=1.0)
    return MappingNetwork(config.z_dim, config.c_dim, 3, 1, mapping, last_activation="linear")


def _projection_matrix(projection: nn.Module, num_channels: int) -> torch.Tensor:
    """Return the matrix `[out, num_channels]` that a linear module of 1 x 1 layers applies to every pixel."""
    parameter = next(projection.parameters())
    identity = torch.eye(num_channels, dtype=parameter.dtype, device=parameter.device)
    return projection(identity[:, :, None, None])[:, :, 0, 0].T


def _require_batch(name: str, value: torch.Tensor, field: RadianceField) -> None:
    batch = field.planes.shape[0]
    require(value.shape[0] == batch >= 1, name, f"one for each of the {batch} latents", value.shape[0])


def _is_reusable(field: RadianceField | None, ws: torch.Tensor, options: SynthesisOptions) -> bool:
    """Whether a field was made from the same latents, on the same device, and carries gradients if they are wanted."""
    if field is None or field.options != options or field.ws.device != ws.device or field.ws.shape != ws.shape:
        return False
    if torch.is_grad_enabled() and not field.planes.requires_grad and ws.requires_grad:
        return False
    return torch.equal(field.ws, ws.to(field.ws.dtype))
