"""Strips and shapes of seeds: whole files under published names, the same bytes for the same command."""

import errno
import json
import os

import numpy as np
import pytest
import trimesh
from PIL import Image

import inference.sampling
from tests.cli.running import contents, fail, invoke, start, succeed
from torch_utils import native

SCRIPT = "gen_samples.py"
FAST = ("--network", "init:debug", "--nrr", 8)  # 0.15 s per view
SHAPES = ("--shapes", "true", "--shape-format", "glb", "--shape-res", 12)
NUM_SEEDS = 3


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """Return the folder that one process writes for three seeds with their shapes."""
    outdir = tmp_path_factory.mktemp("baseline")
    succeed(SCRIPT, *FAST, *SHAPES, "--seeds", f"0-{NUM_SEEDS - 1}", "--outdir", outdir)
    return outdir


@pytest.fixture
def no_rendering(monkeypatch):
    """Fail where a network is loaded."""
    monkeypatch.setattr("gen_samples.load_generator", lambda *_: pytest.fail("loaded a network"))


def strip(outdir, *arguments, seed=0) -> np.ndarray:
    """Return the strip that the script writes for a seed."""
    succeed(SCRIPT, "--seeds", seed, "--outdir", outdir, *arguments)
    (path,) = outdir.rglob("*.png")
    return np.asarray(Image.open(path))


# What is written.


def test_files_are_named_and_sized_as_published(baseline):
    names = {f"debug_90/seed{seed:04d}.{suffix}" for seed in range(NUM_SEEDS) for suffix in ("png", "glb")}
    assert set(contents(baseline)) == names
    with Image.open(baseline / "debug_90" / "seed0001.png") as image:
        assert (image.size, image.mode) == ((5 * 128, 128), "RGB")
    mesh = trimesh.load(baseline / "debug_90" / "seed0001.glb", force="mesh")
    assert mesh.is_watertight


@pytest.mark.skipif(native.load() is None, reason=f"no native kernels: {native.reason()}")
def test_renderers_make_the_same_picture_up_to_rounding(tmp_path):
    pictures = [strip(tmp_path / name, *FAST, "--renderer", name).astype(int) for name in ("fused", "reference")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert pictures[0].std() > 1


def test_seeds_give_different_heads(baseline):
    files = contents(baseline)
    assert len(set(files.values())) == len(files)


def test_without_outdir_files_go_beside_the_network(sphere_pickle, networks):
    succeed(SCRIPT, "--network", sphere_pickle, "--nrr", 8, "--seeds", "4")
    assert list(contents(networks / "samples_sphere")) == ["seed0004.png"]


def test_pose_cond_names_the_folder_and_changes_the_head(baseline, tmp_path):
    succeed(SCRIPT, *FAST, "--seeds", 0, "--outdir", tmp_path, "--pose_cond", "-30")
    files = contents(tmp_path)
    assert list(files) == ["debug_-30/seed0000.png"]
    assert files["debug_-30/seed0000.png"] != contents(baseline)["debug_90/seed0000.png"]


def test_output_says_that_a_preset_is_untrained(tmp_path, sphere_pickle):
    assert "untrained" in succeed(SCRIPT, *FAST, "--seeds", 0, "--outdir", tmp_path / "a").stderr
    trained = ("--network", sphere_pickle, "--nrr", 8)
    assert "untrained" not in succeed(SCRIPT, *trained, "--seeds", 0, "--outdir", tmp_path / "b").stderr


def test_class_is_accepted_and_said_to_have_no_effect(baseline, tmp_path):
    result = succeed(SCRIPT, *FAST, "--seeds", 0, "--outdir", tmp_path, "--class", 3)
    assert "--class has no effect" in result.stderr
    assert contents(tmp_path)["debug_90/seed0000.png"] == contents(baseline)["debug_90/seed0000.png"]


# The same bytes.


def test_two_processes_write_what_one_writes(baseline, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, seeds in ((0, (0, 2)), (1, (1,))):
        monkeypatch.setenv("RANK", str(rank))
        before = set(contents(tmp_path))
        succeed(SCRIPT, *FAST, *SHAPES, "--seeds", f"0-{NUM_SEEDS - 1}", "--outdir", tmp_path)
        new = set(contents(tmp_path)) - before
        assert new == {f"debug_90/seed{seed:04d}.{suffix}" for seed in seeds for suffix in ("png", "glb")}
    assert contents(tmp_path) == contents(baseline)


def test_repeated_seeds_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        said.append(succeed(SCRIPT, *FAST, "--seeds", "4,4,4", "--outdir", tmp_path).stdout)
    assert [text.split(" to ")[0] for text in said] == ["wrote 1 strips", "wrote 0 strips"]
    assert list(contents(tmp_path)) == ["debug_90/seed0004.png"]


def test_a_process_of_its_own_writes_the_same_bytes(baseline, tmp_path):
    arguments = [SCRIPT, *FAST, *SHAPES, "--seeds", "0", "--outdir", tmp_path]
    process = start(arguments)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout.endswith(f"wrote 1 strips to {tmp_path / 'debug_90'}\n")
    expected = contents(baseline)
    assert contents(tmp_path) == {name: expected[name] for name in ("debug_90/seed0000.png", "debug_90/seed0000.glb")}


@pytest.mark.parametrize("suffix", ["ply", "obj", "mrc"])
def test_same_command_gives_the_same_shape(tmp_path, suffix):
    for name in ("a", "b"):
        succeed(SCRIPT, *FAST, *SHAPES, "--shape-format", suffix, "--seeds", 0, "--outdir", tmp_path / name)
    assert f"debug_90/seed0000.{suffix}" in contents(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_default_shape_is_an_mrc_volume(tmp_path):
    import mrcfile

    succeed(SCRIPT, *FAST, "--shapes", "--shape-res", 16, "--seeds", 0, "--outdir", tmp_path)
    with mrcfile.open(tmp_path / "debug_90" / "seed0000.mrc") as mrc:
        assert mrc.data.shape == (16, 16, 16)
        assert mrc.data.dtype == np.float32
        assert mrc.data[0, 0, 0] == -1000
        assert mrc.data[8, 8, 8] > -1000


def test_random_noise_is_repeatable_and_follows_its_seed(sphere_pickle, tmp_path):
    common = ("--network", sphere_pickle, "--nrr", 8)
    strips = {
        (mode, seed, run): strip(tmp_path / f"{mode}{seed}{run}", *common, "--noise-mode", mode, "--noise-seed", seed)
        for mode, seed, run in [("random", 0, 0), ("random", 0, 1), ("random", 1, 0), ("const", 0, 0), ("none", 0, 0)]
    }
    first = strips.pop(("random", 0, 0))
    np.testing.assert_array_equal(strips.pop(("random", 0, 1)), first)
    for other in strips.values():
        assert np.abs(other.astype(int) - first).mean() > 1


def test_noise_seed_moves_the_ray_jitter_of_fixed_layer_noise(baseline, tmp_path):
    moved = strip(tmp_path, *FAST, "--noise-seed", 1)
    assert (moved != np.asarray(Image.open(baseline / "debug_90" / "seed0000.png"))).any()


# What options do.


def test_truncation_0_gives_the_mean_head_for_every_seed(tmp_path):
    succeed(SCRIPT, *FAST, "--seeds", "1-2", "--trunc", 0, "--outdir", tmp_path)
    first, second = contents(tmp_path).values()
    assert first == second


def test_trunc_cutoff_limits_the_truncated_layers(baseline, tmp_path):
    none_truncated = strip(tmp_path / "a", *FAST, "--trunc", 0.3, "--trunc-cutoff", 0)
    np.testing.assert_array_equal(strip(tmp_path / "b", *FAST, "--trunc", 1), none_truncated)
    assert (np.asarray(Image.open(baseline / "debug_90" / "seed0000.png")) != none_truncated).any()


def test_fov_deg_zooms(solid_network, tmp_path):
    """A box full of matter fills the picture of a long lens, and shrinks as the field of view grows."""
    covered = []
    for fov_deg in (15.5, 40, 80):
        arguments = ("--network", solid_network, "--nrr", 16, "--image-mode", "image_mask", "--fov-deg", fov_deg)
        covered.append((strip(tmp_path / str(fov_deg), *arguments) > 127).mean())
    assert covered[0] > 0.99
    assert covered[1] < 0.8
    assert covered[2] < 0.6 * covered[1]


@pytest.mark.parametrize("mode", inference.sampling.IMAGE_MODES)
def test_image_mode_gives_a_strip_of_its_resolution(sphere_pickle, tmp_path, mode):
    pixels = strip(tmp_path, "--network", sphere_pickle, "--nrr", 8, "--image-mode", mode)
    side = 128 if mode == "image" else 8
    assert pixels.shape == (side, 5 * side, 3)
    assert len(np.unique(pixels)) > 1


# Files that are there, and runs that break off.


def test_existing_files_are_refused_and_untouched_unless_overwriting(baseline, tmp_path, no_rendering, monkeypatch):
    folder = tmp_path / "debug_90"
    folder.mkdir()
    (folder / "seed0001.png").write_bytes(b"precious")
    message = fail(SCRIPT, *FAST, "--seeds", "0-1", "--outdir", tmp_path)
    assert "seed0001.png is there already; give --overwrite" in message
    assert contents(folder) == {"seed0001.png": b"precious"}
    monkeypatch.undo()
    succeed(SCRIPT, *FAST, "--seeds", "1", "--outdir", tmp_path, "--overwrite")
    assert contents(folder)["seed0001.png"] == contents(baseline)["debug_90/seed0001.png"]


def test_existing_shapes_are_refused_too(tmp_path, no_rendering):
    (tmp_path / "debug_90").mkdir()
    (tmp_path / "debug_90" / "seed0000.glb").touch()
    assert "seed0000.glb is there already" in fail(SCRIPT, *FAST, *SHAPES, "--seeds", "0", "--outdir", tmp_path)


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, no_rendering):
    arguments = (*FAST, *SHAPES, "--seeds", "0,7", "--outdir", tmp_path / "out", "--trunc", 0.5, "--device", "cuda:99")
    plan = json.loads(succeed(SCRIPT, *arguments, "--dry-run").stdout)
    folder = tmp_path / "out" / "debug_90"
    expected = [folder / f"seed{seed:04d}.{suffix}" for suffix in ("png", "glb") for seed in (0, 7)]
    assert plan["files"] == [str(path) for path in expected]
    assert plan["truncation"] == {"psi": 0.5, "cutoff": 14}
    assert plan["network"] == "init:debug"
    assert not list(tmp_path.iterdir())


def test_interrupted_run_leaves_whole_files_alone(baseline, tmp_path, monkeypatch):
    render, views = inference.sampling.Head.render, []

    def interrupted_render(*arguments):
        views.append(1)
        if len(views) == 8:  # the third view of the second seed
            raise KeyboardInterrupt
        return render(*arguments)

    monkeypatch.setattr(inference.sampling.Head, "render", interrupted_render)
    result = invoke(SCRIPT, *FAST, "--seeds", "0-2", "--outdir", tmp_path)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Error: interrupted"
    assert contents(tmp_path) == {"debug_90/seed0000.png": contents(baseline)["debug_90/seed0000.png"]}


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.replace", no_space)
    result = invoke(SCRIPT, *FAST, "--seeds", "0", "--outdir", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: no space left on the disk")
    assert "Traceback" not in result.stderr
    assert not contents(tmp_path)
