"""A generator as an inversion uses it: what is not tuned shared with the original, and what does not change kept."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from inference.inversion_settings import TunablePart
from training.config import GeneratorConfig, require
from training.networks_stylegan2 import SynthesisOptions
from training.triplane import RadianceField, TriPlaneGenerator

_PUBLISHED_RANGE = (2.25, 3.3)
_PUBLISHED_RAY_START = 2.35  # in front of most faces there is nothing before it
_MODULES: dict[TunablePart, tuple[str, ...]] = {
    "backbone": ("backbone.synthesis.", "ConvA.", "ConvB."),
    "decoder": ("decoder.",),
    "background": ("bcg_synthesis.",),
    "superresolution": ("superresolution.", "torgb."),
}


@dataclass(frozen=True)
class ComputedField:
    """What `TriPlaneGenerator.render` reads of a radiance field, with a background that was computed before."""

    ws: torch.Tensor
    planes: torch.Tensor
    background: torch.Tensor
    options: SynthesisOptions


def share_generator(
    generator: TriPlaneGenerator,
    *,
    tuned: Collection[TunablePart] = (),
    ray_start: float | None = None,
    noise_buffers: Mapping[str, torch.Tensor] | None = None,
) -> TriPlaneGenerator:
    """Make a generator that has its own copy of the tuned parameters, and shares all other tensors with the original.

    The original stays as it is, whatever happens to the new one: modules and configuration are its own.

    Args:
        generator: the original.
        tuned: parts that get parameters of their own, which require gradients; no other does.
        ray_start: see `InversionSettings.ray_start`.
        noise_buffers: fixed layer noise `[H, W]` in place of the buffers of these names; copied.

    Returns:
        A generator in eval mode.

    Raises:
        ValueError: the network has no such part or buffer, or `ray_start` does not fit it.
    """
    prefixes = tuple(prefix for part in tuned for prefix in _MODULES[part])
    shared = _share(generator, prefixes, "").eval()
    shared.config = with_ray_start(generator.config, ray_start)
    buffers = dict(shared.named_buffers())
    for name, noise in (noise_buffers or {}).items():
        expected = tuple(buffers[name].shape) if name in buffers else None
        require(tuple(noise.shape) == expected, f"layer noise '{name}'", f"shape {expected}", tuple(noise.shape))
        owner, _, leaf = name.rpartition(".")
        shared.get_submodule(owner)._buffers[leaf] = noise.detach().to(buffers[name], copy=True)
    return shared


def _share(module: nn.Module, owned_prefixes: tuple[str, ...], name: str) -> nn.Module:
    """Copy a tree of modules, but only those tensors whose names begin with one of `owned_prefixes`."""
    result = copy.copy(module)
    result._parameters, result._buffers = {}, dict(module._buffers)
    for leaf, parameter in module._parameters.items():
        owned = f"{name}{leaf}".startswith(owned_prefixes) if owned_prefixes else False
        value = None
        if parameter is not None:
            value = parameter.detach().clone() if owned else parameter.detach()
            value = nn.Parameter(value, requires_grad=owned)
        result._parameters[leaf] = value
    result._modules = {
        child: None if part is None else _share(part, owned_prefixes, f"{name}{child}.")
        for child, part in module._modules.items()
    }
    return result


def with_ray_start(config: GeneratorConfig, ray_start: float | None) -> GeneratorConfig:
    """Return a configuration with another start of rays; see `InversionSettings.ray_start` for None."""
    rendering = config.rendering
    if ray_start is None:
        if (rendering.ray_start, rendering.ray_end) != _PUBLISHED_RANGE:
            return config
        ray_start = _PUBLISHED_RAY_START
    require(not rendering.auto_range, "ray_start", "none for a network whose rays are limited by its box", ray_start)
    rendering = dataclasses.replace(rendering, ray_start=ray_start)
    rendering.require_range()
    return dataclasses.replace(config, rendering=rendering)


def trainable(generator: TriPlaneGenerator) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {name: parameter for name, parameter in generator.named_parameters() if parameter.requires_grad}


class ViewRenderer:
    """Renders latents for an inversion; planes and background that cannot change are computed once.

    Layer noise is fixed, the jitter of ray samples comes from a seed, and everything is computed in float32. Styles are
    multiplied into activations: with frozen weights no gradient of a weight is then computed.
    """

    def __init__(self, generator: TriPlaneGenerator, fixed_ws: torch.Tensor | None = None) -> None:
        """Wrap a generator from `share_generator`.

        Args:
            generator: what renders; what requires gradients may change between calls.
            fixed_ws: `[1, L, 512]`, the only latent there will be; None for changing ones.
        """
        # The semantic head is not needed, and would be computed at every step.
        self._generator = _without_parsing(generator)
        self._random = torch.Generator(device=next(generator.parameters()).device)
        self._options = SynthesisOptions(
            noise_mode="const", force_fp32=True, fused_modconv=False, generator=self._random
        )
        self._fixed_ws = fixed_ws
        self._planes = self._background = None
        if fixed_ws is not None:
            self._keep_what_is_frozen(fixed_ws)

    @torch.no_grad()
    def _keep_what_is_frozen(self, ws: torch.Tensor) -> None:
        names = trainable(self._generator)
        if not any(name.startswith(_MODULES["backbone"]) for name in names):
            self._planes = self._generator.radiance_field(ws, options=self._options).planes
        if not any(name.startswith(_MODULES["background"]) for name in names):
            empty = ws.new_empty(0)  # the background does not depend on planes
            network = self._generator.bcg_synthesis
            self._background = RadianceField(ws, empty, ws, network, self._options).background

    def render(self, ws: torch.Tensor, label: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
        """Render w-layers `[1, L, 512]` from a camera `[1, 25]`; see `TriPlaneGenerator.render` for the result."""
        generator, options = self._generator, self._options
        self._random.manual_seed(seed)
        if ws is not self._fixed_ws:
            return generator.render(generator.radiance_field(ws, options=options), label)
        planes = self._planes
        if planes is None:
            planes = generator.radiance_field(ws, options=options).planes
        if self._background is None:
            return generator.render(RadianceField(ws, planes, ws, generator.bcg_synthesis, options), label)
        return generator.render(ComputedField(ws, planes, self._background, options), label)


def _without_parsing(generator: TriPlaneGenerator) -> TriPlaneGenerator:
    """Return the same generator, tensors and all, without its semantic head."""
    result = copy.copy(generator)
    result._modules = {name: None if name == "toparsing" else part for name, part in generator._modules.items()}
    return result
