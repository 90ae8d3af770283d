"""Videos of seeds and of saved latents: complete or absent, the same bytes for the same command."""

import json
import os
import signal
import time

import imageio
import numpy as np
import pytest
import trimesh

import inference.sampling
import inference.video_request
from inference.loading import load_generator
from inference.sampling import Truncation, seed_ws
from tests.cli.running import contents, fail, invoke, start, succeed

SCRIPT = "gen_videos.py"
FAST = ("--network", "init:debug", "--nrr", 8, "--image-mode", "image_raw", "--w-frames", 2)
NUM_FRAMES = 4


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """Return the folder with a turning video of two seeds."""
    outdir = tmp_path_factory.mktemp("baseline")
    succeed(SCRIPT, *FAST, "--seeds", "0-1", "--cfg", "Head", "--outdir", outdir)
    return outdir


@pytest.fixture
def no_rendering(monkeypatch):
    """Fail where a network is loaded."""
    monkeypatch.setattr(inference.video_request, "load_generator", lambda *_: pytest.fail("loaded a network"))


def read_frames(path) -> np.ndarray:
    """Return the frames `[F, H, W, 3]` of a video."""
    with imageio.get_reader(path, format="FFMPEG") as reader:
        return np.stack([np.asarray(frame) for frame in reader])


def test_video_has_the_published_name_rate_and_number_of_frames(baseline):
    assert list(contents(baseline)) == ["debug_90.mp4"]
    assert read_frames(baseline / "debug_90.mp4").shape == (NUM_FRAMES, 8, 8, 3)
    with imageio.get_reader(baseline / "debug_90.mp4", format="FFMPEG") as reader:
        assert reader.get_meta_data()["fps"] == 60


def test_same_command_gives_the_same_bytes_and_says_where(baseline, tmp_path):
    result = succeed(SCRIPT, *FAST, "--seeds", "0-1", "--cfg", "Head", "--outdir", tmp_path)
    assert result.stdout == f"wrote {tmp_path / 'debug_90.mp4'}\n"
    assert "untrained" in result.stderr
    assert contents(tmp_path) == contents(baseline)


@pytest.mark.parametrize(
    "changed",
    [
        ("--cfg", "FFHQ"),
        ("--seeds", "2-3"),
        ("--shuffle-seed", "0"),
        ("--num-keyframes", "3"),
        ("--trunc", "0.5"),
        ("--pose-cond", "0"),
        ("--fov-deg", "30"),
        ("--sample-mult", "2"),
        ("--image-mode", "image_depth"),
        ("--noise-seed", "1"),
        ("--fps", "24"),
    ],
    ids=lambda changed: changed[0],
)
def test_every_option_changes_the_video(baseline, tmp_path, changed):
    succeed(SCRIPT, *FAST, "--seeds", "0-1", "--cfg", "Head", "--outdir", tmp_path, *changed)
    (video,) = contents(tmp_path).values()
    assert video != contents(baseline)["debug_90.mp4"]


def test_grid_cells_are_videos_of_their_own(tmp_path):
    common = ("--network", "init:debug", "--nrr", 8, "--w-frames", 1)
    succeed(SCRIPT, *common, "--seeds", "5-6", "--grid", "2x1", "--output", tmp_path / "grid.mp4")
    succeed(SCRIPT, *common, "--seeds", "6", "--output", tmp_path / "cell.mp4")
    (grid,), (cell,) = read_frames(tmp_path / "grid.mp4"), read_frames(tmp_path / "cell.mp4")
    assert grid.shape == (128, 256, 3)
    # The same picture after lossy coding in two surroundings.
    assert np.abs(grid[:, 128:].astype(int) - cell).mean() < 4
    assert np.abs(grid[:, :128].astype(int) - cell).mean() > 8


def test_interpolate_false_makes_a_video_for_each_seed_shared_between_processes(tmp_path, monkeypatch):
    arguments = (*FAST, "--seeds", "3-4", "--interpolate", "false", "--outdir")
    succeed(SCRIPT, *arguments, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        succeed(SCRIPT, *arguments, tmp_path / "two")
    files = contents(tmp_path / "one")
    assert set(files) == {"debug_90/seed0003.mp4", "debug_90/seed0004.mp4"}
    assert contents(tmp_path / "two") == files


def test_latent_gives_the_video_of_its_seeds(baseline, tmp_path):
    w = seed_ws(load_generator("init:debug"), [0, 1], Truncation(psi=1.0))
    np.savez(tmp_path / "face.npz", w=w.numpy())
    succeed(SCRIPT, *FAST, "--latent", tmp_path / "face.npz", "--cfg", "Head", "--outdir", tmp_path / "out")
    assert contents(tmp_path / "out") == {"face.mp4": contents(baseline)["debug_90.mp4"]}


def test_shapes_accompany_the_video(tmp_path):
    succeed(SCRIPT, *FAST, "--seeds", "0-1", "--shapes", "true", "--shape-res", 12, "--outdir", tmp_path)
    shapes = [f"debug_90_shapes/{number:04d}_shape.ply" for number in range(NUM_FRAMES)]
    assert set(contents(tmp_path)) == {"debug_90.mp4", *shapes, "debug_90_shapes/trajectory.npy"}
    assert np.load(tmp_path / "debug_90_shapes" / "trajectory.npy").shape == (NUM_FRAMES, 4, 4)
    assert all(trimesh.load(tmp_path / path).is_watertight for path in shapes)


def test_truncation_0_stands_still(tmp_path):
    common = ("--network", "init:debug", "--nrr", 8, "--image-mode", "image_raw", "--trunc", 0, "--w-frames", 1)
    for seeds in ("0", "5"):
        succeed(SCRIPT, *common, "--seeds", seeds, "--output", tmp_path / f"{seeds}.mp4")
    first, second = contents(tmp_path).values()
    assert first == second


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, no_rendering):
    arguments = (*FAST, "--seeds", "0-3", "--grid", "2x1", "--outdir", tmp_path / "out", "--dry-run")
    plan = json.loads(succeed(SCRIPT, *arguments).stdout)
    assert plan["videos"] == [{"file": str(tmp_path / "out" / "debug_90.mp4"), "seeds": [0, 1, 2, 3], "frames": 4}]
    assert plan["settings"]["grid"] == [2, 1]
    assert not list(tmp_path.iterdir())


def test_existing_video_is_refused_and_untouched_unless_overwriting(baseline, tmp_path, no_rendering, monkeypatch):
    (tmp_path / "debug_90.mp4").write_bytes(b"precious")
    arguments = (*FAST, "--seeds", "0-1", "--cfg", "Head", "--outdir", tmp_path)
    assert "debug_90.mp4 is there already; give --overwrite" in fail(SCRIPT, *arguments)
    assert contents(tmp_path) == {"debug_90.mp4": b"precious"}
    monkeypatch.undo()
    succeed(SCRIPT, *arguments, "--overwrite")
    assert contents(tmp_path) == contents(baseline)


def test_broken_off_video_leaves_nothing(tmp_path, monkeypatch):
    render, views = inference.sampling.Head.render, []

    def interrupted_render(*arguments):
        views.append(1)
        if len(views) == 3:
            raise KeyboardInterrupt
        return render(*arguments)

    monkeypatch.setattr(inference.sampling.Head, "render", interrupted_render)
    result = invoke(SCRIPT, *FAST, "--seeds", "0-1", "--outdir", tmp_path)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Error: interrupted"
    assert not contents(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="signals to process groups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_process_leaves_nothing_and_is_one_line(tmp_path, number):
    """As by Ctrl-C in a terminal, which stops the encoder too, or by torchrun, which stops the process alone."""
    process = start([SCRIPT, *FAST[:-2], "--w-frames", 100_000, "--seeds", "0", "--outdir", tmp_path])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".*.tmp.mp4")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob(".*.tmp.mp4")), "no video was begun"
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "Error: interrupted"
    assert "Traceback" not in stderr
    assert not contents(tmp_path)
