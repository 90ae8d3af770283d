"""The three generators give the published numbers: every key of every reference rendering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from tests.helpers.parity import assert_parity, strip_prefix
from tests.helpers.published import (
    FIXTURE_SEED,
    fixture_cameras,
    fixture_latents,
    fixture_points,
    tiny_generator,
)
from tests.helpers.vectors import SampledTensor, read_vectors, sampled_tensors
from training.triplane import TriPlaneGenerator

pytestmark = pytest.mark.usefixtures("kernels")

TRUNCATION = {"truncation_psi": 0.7, "truncation_cutoff": 5}
CAMERAS = fixture_cameras()  # made once, because making them draws from the generator that the cases seed


def synthesize(generator: TriPlaneGenerator, ws: torch.Tensor) -> dict[str, torch.Tensor]:
    """Render with fixed layer noise."""
    return generator.synthesis(ws, CAMERAS, noise_mode="const")


def render_latents(generator: TriPlaneGenerator, ws: torch.Tensor) -> dict[str, torch.Tensor]:
    """Render from the latents, with fresh layer noise."""
    return generator(fixture_latents(), CAMERAS, **TRUNCATION)


def query_points(generator: TriPlaneGenerator, ws: torch.Tensor) -> dict[str, torch.Tensor]:
    """Evaluate the field at points."""
    return generator.sample_mixed(fixture_points(), None, ws, noise_mode="const")


def synthesize_in_train_mode(generator: TriPlaneGenerator, ws: torch.Tensor) -> dict[str, torch.Tensor]:
    """Render with un-fused modulation."""
    return synthesize(generator.train(), ws)


class Case(NamedTuple):
    """One call of the reference values."""

    call: Callable[[TriPlaneGenerator, torch.Tensor], dict[str, torch.Tensor]] = synthesize
    rendering: dict[str, Any] = {}
    """Rendering settings other than those of the tiny generator."""


CASES = {
    "const": Case(),
    "rand": Case(render_latents),
    "sample": Case(query_points),
    "train": Case(synthesize_in_train_mode),
    "dnoise": Case(rendering={"density_noise": 0.5}),
    "auto": Case(rendering={"ray_start": "auto", "ray_end": "auto"}),
    "white": Case(rendering={"ray_start": 0.1, "ray_end": 2.6, "box_warp": 1.6, "white_back": True}),
    "disp": Case(rendering={"ray_start": 2.25, "ray_end": 3.3, "box_warp": 1, "disparity_space_sampling": True}),
}
LATENT_KEYS = {"ws", "delta_c"}
# Only SphereHead has plane projections that can be folded into the backbone.
NETWORKS = [("sphere", True), ("sphere", False), ("pano", True), ("eg3d", True)]


def reference_values(system: str) -> dict[str, SampledTensor]:
    return sampled_tensors(read_vectors(f"generator_{system}"))


@pytest.fixture(scope="module")
def ws_by_system() -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {
            system: tiny_generator(system).mapping(fixture_latents(), CAMERAS, **TRUNCATION)
            for system in ("sphere", "pano", "eg3d")
        }


@pytest.mark.parametrize("system", ["sphere", "pano", "eg3d"])
def test_reference_values_have_a_case_for_every_key(system):
    prefixes = {key.split(".")[0] for key in reference_values(system)}
    assert prefixes - LATENT_KEYS == set(CASES)


@torch.no_grad()
@pytest.mark.parametrize("system", ["sphere", "pano", "eg3d"])
def test_mapping_and_pose_offset_equal_published(system, ws_by_system):
    reference = reference_values(system)
    ours = {"ws": ws_by_system[system]}
    generator = tiny_generator(system)
    if generator.config.pose_offset:
        shifted, ours["delta_c"] = generator.apply_delta_c(fixture_latents(), CAMERAS, **TRUNCATION)
        moved = shifted - CAMERAS
        # The shift is added to numbers of order 1 in float32, so it comes back with their rounding.
        torch.testing.assert_close(moved[:, [3, 7, 11]], ours["delta_c"], rtol=0, atol=1e-6)
        assert moved.count_nonzero() == 6
    assert_parity(ours, reference, keys=[key for key in reference if key in LATENT_KEYS])


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("system", "fold"), NETWORKS, ids=[f"{system}-{'folded' if fold else 'unfolded'}" for system, fold in NETWORKS]
)
def test_rendering_equals_published(system, fold, case, ws_by_system):
    call, rendering = CASES[case]
    generator = tiny_generator(system, **rendering)
    generator.fold_projections = fold
    torch.manual_seed(FIXTURE_SEED)
    out = call(generator, ws_by_system[system])
    assert_parity(out, strip_prefix(f"{case}.", reference_values(system)))


@torch.no_grad()
def test_rendering_with_its_own_generator_equals_the_seeded_default_generator(ws_by_system):
    generator = tiny_generator("sphere")
    out = generator.synthesis(
        ws_by_system["sphere"],
        CAMERAS,
        noise_mode="const",
        generator=torch.Generator().manual_seed(FIXTURE_SEED),
    )
    assert_parity(out, strip_prefix("const.", reference_values("sphere")))
