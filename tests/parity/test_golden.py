"""Published snapshots, loaded as data, give the published results at their full size."""

from __future__ import annotations

import gzip
import json
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import camera_utils
import legacy
from tests.data import make_vectors
from tests.helpers.parity import assert_parity, strip_prefix
from tests.helpers.vectors import DATA_DIR
from training.dual_discriminator import Discriminator
from training.triplane import TriPlaneGenerator

pytestmark = pytest.mark.shared

TRUNCATION = {"truncation_psi": 0.7, "truncation_cutoff": 6}
BACKBONE_STEPS = {"spherehead_128": (4, 2, 2)}
"""Steps over channels, rows and columns at which the backbone's output was kept."""
DEFAULT_STEPS = (8, 4, 4)
RAYS_PER_SIDE = 16


class Rendering(NamedTuple):
    """One reference rendering."""

    num_items: int | None = None
    """Leading items of the batch; None is all."""
    neural_rendering_resolution: int | None = None


RENDERINGS = {"main": Rendering(), "nrr32": Rendering(neural_rendering_resolution=32), "single": Rendering(1)}
CASES = ["spherehead_128", "spherehead_parsing_256", "spherehead_512", "panohead_128", "eg3d_128"]


class Golden(NamedTuple):
    """One snapshot and what the published code computes from it."""

    name: str
    networks: dict[str, Any]
    meta: dict[str, Any]
    reference: dict[str, torch.Tensor]
    rendered: dict[tuple, dict[str, torch.Tensor]]
    """Results of `render`, for the snapshot whose batch of one makes two of the renderings the same."""

    @property
    def generator(self) -> TriPlaneGenerator:
        return self.networks["G_ema"]

    @property
    def discriminator(self) -> Discriminator | None:
        return self.networks["D"]

    def render(self, num_items: int | None, resolution: int | None) -> dict[str, torch.Tensor]:
        ws, c = self.reference["ws_trunc"][:num_items], self.reference["c"][:num_items]
        key = (len(ws), resolution)
        if key not in self.rendered:
            torch.manual_seed(self.meta["seed"])
            self.rendered[key] = self.generator.synthesis(ws, c, resolution, noise_mode="const")
        return self.rendered[key]


@pytest.fixture(scope="module", params=CASES)
def golden(request, shared_dir, kernels) -> Golden:
    folder = shared_dir / "golden"
    with open(folder / f"{request.param}.pkl", "rb") as file:
        networks = legacy.load_network_pkl(file)
    with np.load(folder / f"{request.param}.npz", allow_pickle=False) as file:
        reference = {key: torch.from_numpy(file[key]) for key in file.files}
    meta = json.loads((folder / f"{request.param}.json").read_text())
    return Golden(request.param, networks, meta, reference, {})


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in module.state_dict().items()}


def test_every_key_of_the_reference_is_tested(golden):
    inputs = {"z", "c_cond", "c", "coords"}
    computed = {"ws", "ws_trunc", "delta_c", "c_shifted", "backbone", "sample_rgb", "sample_sigma"}
    computed |= {"ray_origins", "ray_dirs", "D_logits"}
    prefixes = {*RENDERINGS, "D_in"}
    assert {key for key in golden.reference if "/" not in key} <= inputs | computed
    assert {key.split("/")[0] for key in golden.reference if "/" in key} <= prefixes


def test_generator_names_and_shapes_equal_published(golden):
    assert shapes(golden.generator) == golden.meta["G"]
    assert not golden.generator.training
    assert not any(tensor.requires_grad for tensor in golden.generator.parameters())


def test_discriminator_names_and_shapes_equal_published(golden):
    discriminator = golden.discriminator
    assert (None if discriminator is None else shapes(discriminator)) == golden.meta["D"]


def test_mapping_equals_published(golden):
    reference = golden.reference
    ours = {
        "ws": golden.generator.mapping(reference["z"], reference["c_cond"]),
        "ws_trunc": golden.generator.mapping(reference["z"], reference["c_cond"], **TRUNCATION),
    }
    assert_parity(ours, reference, keys=ours)


def test_pose_offset_equals_published(golden):
    reference = golden.reference
    if "delta_c" not in reference:
        with pytest.raises(ValueError, match="apply_delta_c"):
            golden.generator.apply_delta_c(reference["z"], reference["c"])
        return
    shifted, offset = golden.generator.apply_delta_c(reference["z"], reference["c"])
    ours = {"c_shifted": shifted, "delta_c": offset}
    assert_parity(ours, reference, keys=ours)


def test_backbone_equals_published(golden):
    planes = golden.generator.backbone.synthesis(golden.reference["ws_trunc"], noise_mode="const")
    channels, rows, columns = BACKBONE_STEPS.get(golden.name, DEFAULT_STEPS)
    ours = {"backbone": planes[:, ::channels, ::rows, ::columns]}
    assert_parity(ours, golden.reference, keys=ours)


def test_point_samples_equal_published(golden):
    reference = golden.reference
    out = golden.generator.sample_mixed(reference["coords"], None, reference["ws_trunc"], noise_mode="const")
    assert_parity(
        {"sample_rgb": out["rgb"], "sample_sigma": out["sigma"]}, reference, keys=["sample_rgb", "sample_sigma"]
    )


def test_rays_equal_published(golden):
    cameras = camera_utils.split_label(golden.reference["c"])
    origins, directions = golden.generator.ray_sampler(*cameras, RAYS_PER_SIDE)
    ours = {"ray_origins": origins, "ray_dirs": directions}
    assert_parity(ours, golden.reference, keys=ours)


@pytest.mark.parametrize("name", RENDERINGS)
def test_synthesis_equals_published(golden, name):
    assert_parity(golden.render(*RENDERINGS[name]), strip_prefix(f"{name}/", golden.reference))


def test_discriminator_logits_equal_published(golden):
    discriminator = golden.discriminator
    if discriminator is None:
        assert "D_logits" not in golden.reference
        return
    inputs = strip_prefix("D_in/", golden.reference)
    logits = discriminator(inputs, inputs["c"])
    assert_parity({"D_logits": logits}, golden.reference, keys=["D_logits"])


def test_copied_vectors_equal_the_specification(shared_dir, tmp_path):
    make_vectors.make_all(shared_dir / "spec", tmp_path)
    made = {path.name: path for path in tmp_path.iterdir()}
    assert set(made) == {path.name for path in DATA_DIR.iterdir() if path.suffix in (".npz", ".gz")}
    for name, path in made.items():
        if path.suffix == ".npz":  # compressed bytes may differ between zlib versions
            with np.load(path, allow_pickle=False) as ours, np.load(DATA_DIR / name, allow_pickle=False) as stored:
                assert ours.files == stored.files
                for key in ours.files:
                    np.testing.assert_array_equal(ours[key], stored[key])
        else:
            assert gzip.decompress(path.read_bytes()) == gzip.decompress((DATA_DIR / name).read_bytes()), name
