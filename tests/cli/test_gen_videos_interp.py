"""Interpolation videos go half the way of gen_videos.py, before a camera that with Head stays in front."""

import json

import numpy as np
import pytest

import inference.video
from inference.sampling import Head
from tests.cli.running import contents, succeed

SCRIPT = "gen_videos_interp.py"
FAST = ("--network", "init:debug", "--nrr", 8, "--image-mode", "image_raw")


@pytest.fixture
def views(monkeypatch):
    """Record latents and cameras of all views."""
    calls, render = [], Head.render

    def recording_render(self, label, *arguments):
        calls.append((self.ws[0].numpy(), label.numpy()))
        return render(self, label, *arguments)

    monkeypatch.setattr(inference.video.Head, "render", recording_render)
    return calls


def record(views, tmp_path, script, *arguments):
    """Return the latents `[F, L, 512]` and labels `[F, 25]` of a video."""
    views.clear()
    succeed(script, *FAST, "--seeds", "0-1", "--outdir", tmp_path, "--overwrite", *arguments)
    return np.stack([ws for ws, _ in views]), np.stack([label for _, label in views])


def test_latents_go_half_the_way_in_the_same_time(views, tmp_path):
    interpolated, _ = record(views, tmp_path, SCRIPT, "--w-frames", 4)
    whole, _ = record(views, tmp_path, "gen_videos.py", "--w-frames", 2)
    assert (len(interpolated), len(whole)) == (8, 4)
    np.testing.assert_array_equal(interpolated[::4], whole[:2])  # half-way through its time it is at a quarter
    assert np.abs(interpolated[-1] - interpolated[0]).max() > 0.1


def test_head_camera_stays_in_front(views, tmp_path):
    _, labels = record(views, tmp_path, SCRIPT, "--w-frames", 2, "--cfg", "Head")
    assert (labels == labels[0]).all()
    _, turning = record(views, tmp_path, "gen_videos.py", "--w-frames", 2, "--cfg", "Head")
    assert not (turning == turning[0]).all()


def test_other_cameras_move_as_in_gen_videos(views, tmp_path):
    _, labels = record(views, tmp_path, SCRIPT, "--w-frames", 2, "--cfg", "Cats")
    _, expected = record(views, tmp_path, "gen_videos.py", "--w-frames", 2, "--cfg", "Cats")
    np.testing.assert_array_equal(labels, expected)


def test_same_command_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        succeed(SCRIPT, *FAST, "--w-frames", 1, "--seeds", "0-1", "--cfg", "Head", "--outdir", tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    plan = json.loads(succeed(SCRIPT, *FAST, "--seeds", "0-1", "--outdir", tmp_path / "out", "--dry-run").stdout)
    assert plan["settings"]["turns"] == 0.5
    assert plan["videos"][0]["frames"] == 480
    assert not list(tmp_path.iterdir())
