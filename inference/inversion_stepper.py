"""What the two stages of an inversion have in common: a step, its checks, and a state to resume from."""

from __future__ import annotations

import dataclasses
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

import camera_utils
from inference.inversion_camera import CameraRefinement
from inference.inversion_generator import ViewRenderer
from inference.inversion_loss import ImageLoss
from inference.inversion_settings import InversionSettings
from torch_utils.rng import derive_seed
from training.config import require
from training.triplane import TriPlaneGenerator

if TYPE_CHECKING:
    from inference.photos import Photo
    from training.perceptual import PerceptualDistance

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of Adam
_RENDER = 1  # stream of random numbers, among those of the stages


class InversionDiverged(ValueError):
    """A loss or a gradient is not finite. The stepper is as it was after the last good step."""


class Stepper(ABC):
    """One stage: `step` until `finished`; `ws`, `label`, `generator` and `render` show where it stands."""

    stage: str
    """Name in messages."""
    _stage_seed: int

    def __init__(
        self,
        generator: TriPlaneGenerator,
        photo: Photo,
        distance: PerceptualDistance,
        settings: InversionSettings,
        label: torch.Tensor,
        num_steps: int,
    ) -> None:
        self.generator, self.settings, self.num_steps = generator, settings, num_steps
        self.step_index = 0
        """Steps done."""
        self._label = label
        self._photo_checksum = torch.tensor(zlib.crc32(photo.image.cpu().numpy().tobytes()))
        refines = settings.camera.refine and (self._stage_seed == 1 or settings.camera.in_tuning)
        self._camera = CameraRefinement(label, settings.camera) if refines else None
        self._image_loss = ImageLoss(photo, distance, settings.background_weight, settings.silhouette_weight)
        self._optimizer: torch.optim.Adam | None = None
        self._unknowns: dict[str, torch.Tensor] = {}

    # ---- for the caller ----

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step_index >= self.num_steps

    @property
    @abstractmethod
    def ws(self) -> torch.Tensor:
        """The latent `[1, L, 512]`, without noise and gradients."""

    @property
    def label(self) -> torch.Tensor:
        """The camera `[1, 25]`, refined or as given."""
        return self._label if self._camera is None else self._camera.label().detach()

    def step(self) -> dict[str, float]:
        """Do one step.

        Returns:
            `loss` and its terms, not weighted, as of before the change.

        Raises:
            ValueError: all steps are done.
            InversionDiverged: the loss or a gradient is not finite; nothing has changed.
        """
        require(not self.finished, f"{self.stage}, step", f"one of {self.num_steps}", self.step_index)
        self._optimizer.zero_grad(set_to_none=True)
        terms, weights = self._compute(), self._weights()
        loss = sum(weights[name] * term for name, term in terms.items())
        values = dict(zip(["loss", *terms], torch.stack([loss, *terms.values()]).tolist()))
        self._require_finite("loss", values, all(map(math.isfinite, values.values())))
        loss.backward()
        gradients = [value.grad for value in self._unknowns.values() if value.grad is not None]
        largest = torch.stack(torch._foreach_norm(gradients, math.inf)) if gradients else loss.detach()
        self._require_finite("gradient", values, bool(largest.isfinite().all()))
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate(group["name"])
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)  # until the next step, gradients are memory
        self._after_step()
        self.step_index += 1
        return values

    @torch.no_grad()
    def render(self) -> torch.Tensor:
        """Render the present state: `[1, 3, H, W]`, with the same jitter of ray samples every time."""
        seed = derive_seed(self.settings.seed, _RENDER)
        return self._renderer().render(self._render_ws(), self.label, seed)["image"]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all that a resume needs: the tensors themselves, not copies, which the next step changes."""
        state = {"step": torch.tensor(self.step_index)}
        for name, value in self._unknowns.items():
            state[name] = value.detach()
            moments = self._optimizer.state.get(value, {})
            state |= {f"adam.{name}.{kind}": moments[kind] for kind in _MOMENTS if kind in moments}
        return state | self._fixed_state()

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a state, whose tensors are copied.

        Raises:
            ValueError: an entry is missing, unknown or of another shape, or belongs to another photo; nothing has
                changed then.
        """
        self._check_state(state)
        for name, value in self._unknowns.items():
            value.copy_(state[name])
            self._optimizer.state.pop(value, None)
            if f"adam.{name}.step" in state:
                moments = {kind: state[f"adam.{name}.{kind}"] for kind in _MOMENTS}
                self._optimizer.state[value] = {
                    kind: moment.to(value.device, copy=True) for kind, moment in moments.items()
                }
        self.step_index = int(state["step"])

    # ---- for the stages ----

    @abstractmethod
    def _compute(self) -> dict[str, torch.Tensor]:
        """Render, and return the terms of the loss, not weighted."""

    @abstractmethod
    def _weights(self) -> dict[str, float]:
        """Return the weights of the terms of the loss."""

    @abstractmethod
    def _learning_rate(self, group: str) -> float:
        """Return the learning rate of this step, for the group 'main' or 'camera'."""

    @abstractmethod
    def _renderer(self) -> ViewRenderer: ...

    @abstractmethod
    def _render_ws(self) -> torch.Tensor: ...

    def _after_step(self) -> None:  # noqa: B027, a stage need not have any
        """Change what a step has made."""

    def _fixed_state(self) -> dict[str, torch.Tensor]:
        """Return what does not change, and must be the same when the state is loaded."""
        return {"base_label": self._label, "photo": self._photo_checksum}

    def _seed(self, stream: int) -> int:
        return derive_seed(self.settings.seed, self._stage_seed, self.step_index, stream)

    def _set_unknowns(self, unknowns: Mapping[str, torch.Tensor]) -> None:
        """Make the optimiser, of these and of the camera's."""
        groups = [{"params": list(unknowns.values()), "name": "main"}]
        self._unknowns = dict(unknowns)
        if self._camera is not None:
            groups.append({"params": [self._camera.unknowns], "name": "camera"})
            self._unknowns["camera"] = self._camera.unknowns
        self._optimizer = torch.optim.Adam(groups, fused=True)

    def _step_label(self, moving: bool = True) -> torch.Tensor:
        """Return the camera for a rendering, with gradients where it is refined and `moving`."""
        return self.label if self._camera is None or not moving else self._camera.label()

    def _camera_terms(self, moving: bool = True) -> dict[str, torch.Tensor]:
        return {"camera": self._camera.penalty()} if self._camera is not None and moving else {}

    def _require_finite(self, what: str, values: Mapping[str, float], finite: bool) -> None:
        if finite:
            return
        self._optimizer.zero_grad(set_to_none=True)
        terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise InversionDiverged(
            f"{self.stage}, step {self.step_index}: expected a finite {what}, got one that is not ({terms}); a lower "
            "learning rate may help"
        )

    def _check_state(self, state: Mapping[str, torch.Tensor]) -> None:
        fixed = self._fixed_state()
        expected = {name: value.shape for name, value in (self._unknowns | fixed).items()}
        for name, value in self._unknowns.items():
            if any(f"adam.{name}.{kind}" in state for kind in _MOMENTS):
                shapes = (value.shape, value.shape, torch.Size([]))
                expected |= {f"adam.{name}.{kind}": shape for kind, shape in zip(_MOMENTS, shapes)}
        expected["step"] = torch.Size([])
        where = f"state of the {self.stage}"
        _require_same_names(where, expected, state)
        for name, shape in expected.items():
            require(state[name].shape == shape, f"{where}, '{name}'", f"shape {tuple(shape)}", tuple(state[name].shape))
        for name, value in fixed.items():
            same = torch.equal(state[name].to(value.device), value)
            require(same, f"{where}, '{name}'", "that of this photo and these settings", "another one")
        step = int(state["step"])
        require(0 <= step <= self.num_steps, f"{where}, 'step'", f"0 to {self.num_steps}", step)


def _require_same_names(where: str, expected: Iterable[str], came: Iterable[str]) -> None:
    missing, unknown = sorted(set(expected) - set(came)), sorted(set(came) - set(expected))
    require(not missing, where, f"an entry '{missing[0] if missing else ''}'", "none")
    require(not unknown, where, "no other entries than its own", ", ".join(unknown[:3]))


def check_photo(photo: Photo, generator: TriPlaneGenerator) -> None:
    """Check that a photo fits a network.

    Raises:
        ValueError: a shape, or a value that is not finite, or a label that is not that of a camera.
    """
    size = generator.img_resolution
    shapes = {"image": (1, 3, size, size), "label": (1, camera_utils.LABEL_SIZE), "mask": (1, 1, size, size)}
    for name, expected in shapes.items():
        value = getattr(photo, name)
        if name == "mask" and value is None:
            continue
        where = f"photo '{photo.name}', {name}"
        require(tuple(value.shape) == expected, where, f"shape {expected}", tuple(value.shape))
        require(bool(value.isfinite().all()), where, "finite numbers", "some that are not")
    camera_utils.check_label(photo.label)


def place_photo(photo: Photo, generator: TriPlaneGenerator) -> Photo:
    """Return a photo on the device of a generator, in the type of its weights."""
    weight = generator.backbone.mapping.fc0.weight
    tensors = {name: getattr(photo, name) for name in ("image", "label", "mask")}
    placed = {name: None if value is None else value.to(weight) for name, value in tensors.items()}
    return dataclasses.replace(photo, **placed)
