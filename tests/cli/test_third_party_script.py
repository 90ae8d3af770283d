"""A script written for EG3D-family code runs unchanged against this tree, and gets what it expects."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from legacy import load_network_pkl
from tests.cli.running import REPO_ROOT, contents, start

SCRIPT = Path(__file__).parent / "data" / "third_party_script.py"
SHAPE_RES = 16
SNAPSHOTS = [
    "spherehead_128",
    "panohead_128",
    "eg3d_128",
    pytest.param("spherehead_parsing_256", marks=pytest.mark.slow),
]


def run_here(network: Path, outdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script in this process."""
    arguments = [str(SCRIPT), "--network", str(network), "--outdir", str(outdir), "--nrr", "16"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.chdir(REPO_ROOT)
    runpy.run_path(str(SCRIPT), run_name="__main__")


def check_results(network: Path, outdir: Path) -> None:
    """Check the files of the script, as far as the published code determines them."""
    with open(network, "rb") as file:
        generator = load_network_pkl(file)["G_ema"]
    files = contents(outdir)
    assert set(files) == {"loaded.png", "rebuilt.png", "shape.ply", "numbers.npz"}
    assert files["loaded.png"] == files["rebuilt.png"]
    with np.load(outdir / "numbers.npz") as archive:
        check_numbers({name: archive[name] for name in archive.files}, generator)
    surface = trimesh.load(outdir / "shape.ply")
    assert len(surface.faces) > 10
    assert surface.bounds.min() >= 0
    assert surface.bounds.max() <= SHAPE_RES - 1


def check_numbers(numbers: dict[str, np.ndarray], generator: Any) -> None:
    fresh = numbers["fresh_image"]
    assert np.isfinite(fresh).all()
    for name in ("keeping", "kept"):
        np.testing.assert_array_equal(numbers[f"{name}_image"], fresh)
    for name in ("half_resolution", "called"):
        assert (numbers[f"{name}_image"] != fresh).any()
    assert (numbers["other_background_image"] != fresh).any() == (generator.bcg_synthesis is not None)

    np.testing.assert_array_equal(numbers["sigmas"], numbers["sigmas_of_ws"])
    assert numbers["sigmas"].shape == (1, SHAPE_RES**3, 1)
    assert numbers["depth_resolutions"].tolist() == [2 * generator.rendering_kwargs["depth_resolution"]] * 2

    front, by_hand = numbers["poses"][0], numbers["poses"][-1]
    np.testing.assert_allclose(front[:3, 3], [0, 0, 2.7], atol=1e-5)  # float32 angles
    np.testing.assert_allclose(by_hand, [[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 2.7], [0, 0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(numbers["poses"][:, :3, 3], axis=1), 2.7, rtol=1e-5)

    sizes = sorted(numbers["noise_shapes"].tolist())
    assert sizes[0] == 4 and sizes[-1] == generator.config.plane_resolution
    assert numbers["noise_gradients"].all()


def test_script_runs_by_itself_on_a_published_pickle(sphere_pickle, tmp_path):
    process = start([SCRIPT, "--network", sphere_pickle, "--outdir", tmp_path / "out"])
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    check_results(sphere_pickle, tmp_path / "out")


@pytest.mark.shared
@pytest.mark.parametrize("name", SNAPSHOTS)
def test_script_runs_on_golden_snapshots(shared_dir, tmp_path, monkeypatch, name):
    network = shared_dir / "golden" / f"{name}.pkl"
    run_here(network, tmp_path, monkeypatch)
    check_results(network, tmp_path)


def test_script_knows_nothing_of_this_project():
    """It uses published names alone, so that it stands for scripts that were never adapted."""
    text = SCRIPT.read_text()
    for ours in ("inference", "Head(", "from_config", "radiance_field", "GeneratorConfig", "look_at_pose"):
        assert ours not in text
