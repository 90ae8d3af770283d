"""Inversion of a photo: a latent that looks like it, then weights that reproduce it (pivotal tuning).

>>> projection = Projection(G, photo, distance, settings)   # doctest: +SKIP
>>> while not projection.finished:                          # doctest: +SKIP
...     losses = projection.step()
>>> tuning = PivotalTuning(G, photo, distance, settings, projection.ws, projection.label)  # doctest: +SKIP

Both stages can be interrupted: `state_dict` and `load_state_dict` continue bit for bit on a CPU, because the random
numbers of a step are a function of the seed and the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

import camera_utils
from inference.inversion_generator import ViewRenderer, share_generator, trainable
from inference.inversion_noise import initial_noise, noise_correlation, noise_names, normalize_noise_
from inference.inversion_settings import (
    CameraSettings,
    InversionSettings,
    ProjectionSettings,
    TuningSettings,
)
from inference.inversion_statistics import measure_w, shift_as_published
from inference.inversion_stepper import InversionDiverged, Stepper, check_photo, place_photo
from inference.sampling import camera_radius, conditioning_label, shows_all_sides
from torch_utils.rng import derive_seed
from training.config import require
from training.triplane import TriPlaneGenerator

if TYPE_CHECKING:
    from inference.photos import Photo
    from training.perceptual import PerceptualDistance

__all__ = [
    "CameraSettings",
    "InversionDiverged",
    "InversionSettings",
    "PivotalTuning",
    "Projection",
    "ProjectionSettings",
    "TuningSettings",
]

_JITTER, _W_NOISE, _LAYER_NOISE, _LOCALITY = 0, 2, 3, 4  # streams of random numbers
_FRONTAL_YAW_RAD = 0.4  # of other heads, for networks that know faces only


class Projection(Stepper):
    """Stage 1: search the latent of a photo, with frozen weights."""

    stage = "projection"
    _stage_seed = 1

    def __init__(
        self,
        generator: TriPlaneGenerator,
        photo: Photo,
        distance: PerceptualDistance,
        settings: InversionSettings,
        initial_ws: torch.Tensor | None = None,
    ) -> None:
        """Prepare the search.

        Args:
            generator: any; it is not changed.
            photo: of the generator's resolution.
            distance: perceptual distance, on the generator's device.
            settings: of both stages.
            initial_ws: `[1, L, 512]` or `[1, 1, 512]`, where the search starts; None is the mean w.

        Raises:
            ValueError: photo, latent or settings do not fit the network.
        """
        check_photo(photo, generator)
        photo = place_photo(photo, generator)
        chosen = settings.projection
        label = photo.label
        if settings.pose_offset == "published":
            label = shift_as_published(generator, label, chosen.num_w_samples, chosen.w_sample_seed)
        noise = {}
        if chosen.optimize_noise:
            noise = initial_noise(generator, settings.seed, self._stage_seed, 0, _LAYER_NOISE)
        shared = share_generator(generator, ray_start=settings.ray_start, noise_buffers=noise)
        super().__init__(shared, photo, distance, settings, label, chosen.num_steps)
        self._statistics = measure_w(generator, chosen.num_w_samples, chosen.w_sample_seed)
        self._w = self._initial_w(initial_ws).requires_grad_(True)
        buffers = dict(shared.named_buffers())
        self._noise = {name: buffers[name].requires_grad_(True) for name in noise}
        self._set_unknowns({"w": self._w, **{f"noise.{name}": value for name, value in self._noise.items()}})
        self._views = ViewRenderer(shared)

    def _initial_w(self, initial_ws: torch.Tensor | None) -> torch.Tensor:
        """Return a new `[1, L, 512]`, or `[1, 1, 512]` in W."""
        num_ws = self.generator.backbone.num_ws
        layers = 1 if self.settings.projection.space == "w" else num_ws
        if initial_ws is None:
            return self._statistics.mean.repeat(1, layers, 1)
        shapes = [(1, num_ws, self.generator.w_dim), (1, 1, self.generator.w_dim)]
        shape = tuple(initial_ws.shape)
        require(shape in shapes, "latent to start from", f"shape {shapes[0]}", shape)
        require(bool(initial_ws.isfinite().all()), "latent to start from", "finite numbers", "some that are not")
        initial_ws = initial_ws.detach().to(self._statistics.mean)
        if layers == 1:
            same = bool((initial_ws == initial_ws[:, :1]).all())
            require(same, "latent to start from", "the same w in all layers, in space 'w'", "different ones")
            return initial_ws[:, :1].clone()
        return initial_ws.repeat(1, num_ws // initial_ws.shape[1], 1)

    @property
    def ws(self) -> torch.Tensor:
        """The latent `[1, L, 512]`, without noise and gradients."""
        return self._all_layers(self._w.detach())

    @property
    def noise_buffers(self) -> dict[str, torch.Tensor]:
        """Layer noise that was searched, `[H, W]` by name of the buffer; empty where it was not."""
        return {name: value.detach() for name, value in self._noise.items()}

    def _all_layers(self, w: torch.Tensor) -> torch.Tensor:
        return w.expand(1, self.generator.backbone.num_ws, -1)

    def _camera_moves(self) -> bool:
        return self._camera is not None and self.step_index >= self.settings.camera.start * self.num_steps

    def _compute(self) -> dict[str, torch.Tensor]:
        scale = w_noise_scale(self.settings.projection, self.step_index) * self._statistics.std
        random = torch.Generator().manual_seed(self._seed(_W_NOISE))
        noise = torch.randn(self._w.shape, generator=random).to(self._w)
        moves = self._camera_moves()
        rendered = self._views.render(
            self._all_layers(self._w + noise * scale), self._step_label(moves), self._seed(_JITTER)
        )
        terms = self._image_loss(rendered) | self._camera_terms(moves)
        terms["w_norm"] = (self._w - self._statistics.mean).square().mean()
        if self._noise:
            terms["noise"] = sum(noise_correlation(value) for value in self._noise.values())
        return terms

    def _weights(self) -> dict[str, float]:
        chosen = self.settings.projection
        return {
            "mse": chosen.mse_weight,
            "perceptual": chosen.perceptual_weight,
            "silhouette": self.settings.silhouette_weight,
            "w_norm": chosen.w_norm_weight,
            "noise": chosen.noise_weight,
            "camera": self.settings.camera.weight,
        }

    def _learning_rate(self, group: str) -> float:
        chosen = self.settings.projection
        top = chosen.learning_rate if group == "main" else self.settings.camera.learning_rate
        return top * learning_rate_ramp(chosen, self.step_index)

    def _after_step(self) -> None:
        for value in self._noise.values():
            normalize_noise_(value)

    def _renderer(self) -> ViewRenderer:
        return self._views

    def _render_ws(self) -> torch.Tensor:
        return self.ws


def learning_rate_ramp(settings: ProjectionSettings, step: int) -> float:
    """Return the factor on the learning rate: up linearly, at the end down along a cosine (published; 0 at step 0)."""
    progress = step / settings.num_steps
    down = min(1.0, (1.0 - progress) / settings.rampdown)
    return (0.5 - 0.5 * math.cos(math.pi * down)) * min(1.0, progress / settings.rampup)


def w_noise_scale(settings: ProjectionSettings, step: int) -> float:
    """Return the noise on w, in units of its spread: w_noise * max(0, 1 - t / length)^2 at progress t (published)."""
    progress = step / settings.num_steps
    return settings.w_noise * max(0.0, 1.0 - progress / settings.w_noise_length) ** 2


class PivotalTuning(Stepper):
    """Stage 2: tune the weights around a fixed latent (Roich et al. 2021)."""

    stage = "tuning"
    _stage_seed = 2

    def __init__(
        self,
        generator: TriPlaneGenerator,
        photo: Photo,
        distance: PerceptualDistance,
        settings: InversionSettings,
        ws: torch.Tensor,
        label: torch.Tensor,
        noise_buffers: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Prepare the tuning.

        Args:
            generator: the base; it is not changed, and shares with `self.generator` all that is not tuned.
            photo: of the generator's resolution; its label is not used.
            distance: perceptual distance, on the generator's device.
            settings: of both stages.
            ws: the pivot, `[1, L, 512]`.
            label: camera `[1, 25]`.
            noise_buffers: layer noise of stage 1, which becomes part of the tuned network; None keeps the network's.

        Raises:
            ValueError: photo, latent, camera or settings do not fit the network.
        """
        check_photo(photo, generator)
        photo = place_photo(photo, generator)
        camera_utils.check_label(label)
        expected = (1, generator.backbone.num_ws, generator.w_dim)
        require(tuple(ws.shape) == expected, "latent to tune around", f"shape {expected}", tuple(ws.shape))
        chosen = settings.tuning
        shared = share_generator(
            generator, tuned=chosen.parts, ray_start=settings.ray_start, noise_buffers=noise_buffers
        )
        unknowns = trainable(shared)
        require(bool(unknowns), "tuning.parts", "a part that the network has", ", ".join(chosen.parts))
        super().__init__(shared, photo, distance, settings, label.detach().to(photo.label), chosen.num_steps)
        self._ws = ws.detach().to(photo.image).clone()
        self._views = ViewRenderer(shared, self._ws)
        self._distance = distance
        self._base: ViewRenderer | None = None
        if chosen.locality_weight > 0:
            base = share_generator(generator, ray_start=settings.ray_start, noise_buffers=noise_buffers)
            self._base, self._others = ViewRenderer(base), ViewRenderer(shared)
        names = noise_names(shared) if noise_buffers else []
        buffers = dict(shared.named_buffers())
        self._noise = {name: buffers[name] for name in names}
        self._set_unknowns(unknowns)

    @property
    def ws(self) -> torch.Tensor:
        """The pivot `[1, L, 512]`."""
        return self._ws

    @property
    def noise_buffers(self) -> dict[str, torch.Tensor]:
        """Layer noise of stage 1, `[H, W]` by name of the buffer; empty where there was none."""
        return dict(self._noise)

    def _compute(self) -> dict[str, torch.Tensor]:
        rendered = self._views.render(self._ws, self._step_label(), self._seed(_JITTER))
        terms = self._image_loss(rendered) | self._camera_terms()
        if self._base is not None and self.step_index % self.settings.tuning.locality_interval == 0:
            terms["locality"] = self._locality()
        return terms

    def _locality(self) -> torch.Tensor:
        """Return how far another head near the pivot has moved from what the base makes of it (paper, equation 4)."""
        chosen, random = self.settings.tuning, torch.Generator().manual_seed(self._seed(_LOCALITY))
        z = torch.randn(1, self.generator.z_dim, generator=random).to(self._ws)
        turn = float(torch.rand((), generator=random) * 2 - 1)
        label = conditioning_label(self.generator).to(self._ws)
        with torch.no_grad():
            direction = self.generator.mapping(z, label) - self._ws
            length = direction.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(direction.dtype).tiny)
            ws = self._ws + chosen.locality_alpha * direction / length
        yaw_rad = turn * (math.pi if shows_all_sides(self.generator) else _FRONTAL_YAW_RAD)
        pose = camera_utils.look_at_pose(yaw_rad, radius=camera_radius(self.generator)).to(ws)
        _, intrinsics = camera_utils.split_label(self.label)
        label, seed = camera_utils.camera_label(pose, intrinsics), derive_seed(self._seed(_LOCALITY), 1)
        with torch.no_grad():
            target = self._base.render(ws, label, seed)["image"]
            features = self._distance.features(target)
        image = self._others.render(ws, label, seed)["image"]
        mse = (image - target).square().mean()
        return chosen.mse_weight * mse + chosen.perceptual_weight * self._distance.distance(image, features).mean()

    def _weights(self) -> dict[str, float]:
        chosen = self.settings.tuning
        return {
            "mse": chosen.mse_weight,
            "perceptual": chosen.perceptual_weight,
            "silhouette": self.settings.silhouette_weight,
            "locality": chosen.locality_weight,
            "camera": self.settings.camera.weight,
        }

    def _learning_rate(self, group: str) -> float:
        return self.settings.tuning.learning_rate if group == "main" else self.settings.camera.tuning_learning_rate

    def _renderer(self) -> ViewRenderer:
        return self._views

    def _render_ws(self) -> torch.Tensor:
        return self._ws

    def _fixed_state(self) -> dict[str, torch.Tensor]:
        return (
            super()._fixed_state() | {"ws": self._ws} | {f"noise.{name}": value for name, value in self._noise.items()}
        )
