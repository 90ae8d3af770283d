"""The scripts do their jobs on every published kind of snapshot."""

import functools
from pathlib import Path
from typing import Any

import imageio
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

import legacy
from tests.cli.running import contents, succeed
from training.snapshots import NETWORK_NAMES

pytestmark = pytest.mark.shared

SLOW = pytest.mark.slow
SNAPSHOTS = [
    "spherehead_128",
    "spherehead_parsing_256",
    "panohead_128",
    "eg3d_128",
    pytest.param("spherehead_512", marks=SLOW),  # five seconds per view on one core
]
OTHERS = ["spherehead_parsing_256", "panohead_128", "eg3d_128", "spherehead_512"]
FAST = ("--nrr", 16, "--seeds", 0)
SHAPES = ("--shapes", "true", "--shape-format", "glb", "--shape-res", 32)


@pytest.fixture(scope="module")
def snapshot(shared_dir):
    return lambda name: shared_dir / "golden" / f"{name}.pkl"


@pytest.fixture(scope="module")
def samples(snapshot, tmp_path_factory):
    """Return a function that gives the folder of a snapshot's samples, made once."""

    @functools.cache
    def make(name):
        outdir = tmp_path_factory.mktemp("samples")
        succeed("gen_samples.py", "--network", snapshot(name), *FAST, *SHAPES, "--outdir", outdir)
        return outdir

    return make


def read_networks(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return legacy.load_network_pkl(file)


def side_of(name: str) -> int:
    return int(name.rsplit("_", 1)[1])


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_gen_samples_makes_a_strip_and_a_closed_coloured_shape(samples, name):
    folder, side = samples(name) / f"{name}_90", side_of(name)
    pixels = np.asarray(Image.open(folder / "seed0000.png"))
    num_views = 3 if name.startswith("eg3d") else 5
    assert pixels.shape == (side, num_views * side, 3)
    assert pixels.std() > 5
    mesh = trimesh.load(folder / "seed0000.glb", force="mesh")
    assert mesh.is_watertight
    assert len(np.unique(mesh.visual.vertex_colors, axis=0)) > 10


@pytest.mark.parametrize("name", SNAPSHOTS)
@pytest.mark.parametrize("script", ["gen_videos.py", "gen_videos_interp.py"])
def test_video_scripts_make_their_videos(snapshot, tmp_path, script, name):
    arguments = ("--network", snapshot(name), *FAST, "--cfg", "Head", "--w-frames", 2, "--outdir", tmp_path)
    succeed(script, *arguments)
    with imageio.get_reader(tmp_path / f"{name}_90.mp4", format="FFMPEG") as reader:
        frames = np.stack([np.asarray(frame) for frame in reader])
    side = side_of(name)
    assert frames.shape == (2, side, side, 3)
    assert frames.std() > 5
    turned = np.abs(frames[1].astype(int) - frames[0]).mean()
    assert turned > 1 if script == "gen_videos.py" else turned < 1  # the other camera stands still


@pytest.mark.parametrize("name", ["spherehead_128", *(pytest.param(name, marks=SLOW) for name in OTHERS)])
def test_converted_snapshot_gives_the_same_bytes(snapshot, samples, tmp_path, name):
    converted = tmp_path / f"{name}.safetensors"
    succeed("convert_checkpoint.py", snapshot(name), converted, "--networks", "G_ema")
    succeed("gen_samples.py", "--network", converted, *FAST, *SHAPES, "--outdir", tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {f"{name}_90/seed0000.png", f"{name}_90/seed0000.glb"}
    assert contents(tmp_path / "out") == contents(samples(name))


@pytest.mark.parametrize("name", ["spherehead_128", *OTHERS])
def test_converted_snapshot_holds_the_same_networks(snapshot, tmp_path, name):
    succeed("convert_checkpoint.py", snapshot(name), tmp_path / "a.safetensors")
    pickled, converted = (read_networks(path) for path in (snapshot(name), tmp_path / "a.safetensors"))
    for key in NETWORK_NAMES:
        assert (pickled[key] is None) == (converted[key] is None)
        if pickled[key] is not None:
            assert converted[key].config == pickled[key].config
            ours, expected = converted[key].state_dict(), pickled[key].state_dict()
            assert ours.keys() == expected.keys()
            assert all(torch.equal(ours[tensor], expected[tensor]) for tensor in expected)
