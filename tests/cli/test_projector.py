"""The projector's command line: what it writes and says, and what it refuses in one line."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest
from PIL import Image

import inference.inversion_run
from inference.inversion_results import RESULT_FILES
from tests.cli.running import contents, fail, invoke, start, succeed
from tests.helpers.head_data import head_labels
from tests.helpers.photos import SIDE, write_network, write_photos
from tests.helpers.ranks import Torchrun

SCRIPT = "projector.py"
FEW_STEPS = ("--num-steps", 2, "--num-steps-pti", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a small network, photos of which the second is bad, and the results of the first."""
    folder = tmp_path_factory.mktemp("projector")
    write_network(folder / "small.safetensors")
    photos = write_photos(folder / "photos", ["a.png", "b ü.png", "c.png"])
    (photos / "b ü.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def result(folder):
    """Return what the script said when it inverted the first photo."""
    return succeed(SCRIPT, *given(folder), *FEW_STEPS, "--half")


def given(folder, outdir="out"):
    """Return the options without which nothing goes."""
    return "--network", folder / "small.safetensors", "--target", folder / "photos", "--outdir", folder / outdir


def made(folder, outdir="out", photo="a"):
    """Return the folder of a photo's results."""
    return folder / outdir / "small" / photo


# What it does ---------------------------------------------------------------------------------------------------------


def test_results_are_written_and_named(folder, result):
    assert result.stdout == f"wrote {made(folder)}\n"
    assert set(contents(made(folder))) == {*RESULT_FILES} - {"tuned_full.safetensors"}
    lines = result.stderr.replace("\r", "\n").splitlines()
    assert any(line.startswith("perceptual distance: pyramid") and "--vgg" in line for line in lines)
    bars = [line for line in lines if line.startswith("a: ")]
    assert any("latent: 100%" in bar and "2/2" in bar and "perceptual=" in bar for bar in bars)
    assert any("tuning: 100%" in bar and "2/2" in bar and "mse=" in bar for bar in bars)


def test_same_command_again_says_that_it_is_done(folder, result):
    before = contents(folder)
    again = succeed(SCRIPT, *given(folder), *FEW_STEPS, "--half")
    assert (again.stdout, again.stderr) == (f"{made(folder)}: done already\n", "")
    assert contents(folder) == before


def test_other_scripts_take_the_tuned_network_and_the_latent(folder, result, tmp_path):
    network = made(folder) / "tuned.safetensors"
    options = ("--latent", made(folder) / "latent.npz", "--w-frames", 1, "--image-mode", "image_raw")
    for name, source in (("pre", folder / "small.safetensors"), ("post", network)):
        succeed("gen_videos.py", "--network", source, *options, "--output", tmp_path / f"{name}.mp4")
    videos = contents(tmp_path)
    assert videos["pre.mp4"] != videos["post.mp4"]
    succeed("gen_samples.py", "--network", network, "--seeds", 0, "--outdir", tmp_path / "samples")
    assert list(contents(tmp_path / "samples"))


def test_bad_photo_among_others_is_told_and_makes_the_end_a_failure(folder, result):
    ended = invoke(SCRIPT, *given(folder), *FEW_STEPS, "--half", "--idx", "all")
    assert ended.exit_code == 3
    assert ended.stdout == f"{made(folder)}: done already\nwrote {made(folder, photo='c')}\n"
    lines = ended.stderr.replace("\r", "\n").splitlines()
    assert any(line.startswith(f"{folder / 'photos' / 'b ü.png'}: ") for line in lines)
    assert lines[-1] == "Error: 1 of 3 photos failed (see above): b ü"
    assert "Traceback" not in ended.stderr


def test_one_photo_with_a_camera_and_a_mask(folder, tmp_path):
    Image.open(folder / "photos" / "a.png").convert("RGBA").save(tmp_path / "me.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[16:48, 16:48] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = (
        "--network",
        folder / "small.safetensors",
        "--target",
        tmp_path / "me.png",
        "--camera",
        "yaw=20,fov=20",
    )
    succeed(SCRIPT, *arguments, "--mask", tmp_path / "mask.png", *FEW_STEPS, "--save-video=false", "--outdir", tmp_path)
    metrics = json.loads((tmp_path / "small" / "me" / "metrics.json").read_text())
    assert metrics["stages"]["pti"]["head_psnr_db"] > 0
    np.testing.assert_allclose(metrics["camera"][:16], head_labels([20.0])[0, :16], atol=1e-6)  # float32


def test_stop_by_a_signal_is_said_in_one_line_with_its_place(folder, tmp_path, monkeypatch):
    step, steps = inference.inversion_run.Projection.step, []

    def step_and_signal(self):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(inference.inversion_run.Projection, "step", step_and_signal)
    ended = invoke(SCRIPT, *given(folder)[:4], "--outdir", tmp_path, "--num-steps", 9)
    assert ended.exit_code == 130
    expected = "Error: a: stopped after latent step 2 of 9; the same command goes on from there"
    assert ended.stderr.splitlines()[-1] == expected
    assert (tmp_path / "small" / "a" / ".work" / "state.safetensors").exists()


def test_dry_run_prints_the_plan_and_neither_loads_nor_writes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(inference.inversion_run, "load_generator", lambda *_: pytest.fail("loaded a network"))
    plan = json.loads(
        succeed(SCRIPT, *given(folder)[:4], "--outdir", tmp_path / "out", "--idx", "all", "--dry-run").stdout
    )
    assert plan["network"] == str(folder / "small.safetensors")
    assert [photo["name"] for photo in plan["photos"]] == ["a", "b ü", "c"]
    assert plan["photos"][1]["folder"] == str(tmp_path / "out" / "small" / "b ü")
    assert plan["settings"]["projection"]["num_steps"] == 500
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given_option", "where", "value"),
    [
        (("--num-steps", "7"), ("settings", "projection", "num_steps"), 7),
        (("--num-steps-pti", "7"), ("settings", "tuning", "num_steps"), 7),
        (("--space", "W"), ("settings", "projection", "space"), "w"),
        (("--lr", "0.5"), ("settings", "projection", "learning_rate"), 0.5),
        (("--lr-pti", "0.5"), ("settings", "tuning", "learning_rate"), 0.5),
        (("--optimize-noise",), ("settings", "projection", "optimize_noise"), True),
        (("--refine-camera",), ("settings", "camera", "refine"), True),
        (("--background-weight", "1"), ("settings", "background_weight"), 1),
        (("--silhouette-weight", "0.5"), ("settings", "silhouette_weight"), 0.5),
        (("--locality", "0.1"), ("settings", "tuning", "locality_weight"), 0.1),
        (("--tune-parts", "decoder, superresolution"), ("settings", "tuning", "parts"), ["decoder", "superresolution"]),
        (("--ray-start", "2"), ("settings", "ray_start"), 2),
        (("--pose-offset", "published"), ("settings", "pose_offset"), "published"),
        (("--seed", "1"), ("settings", "seed"), 1),
        (("--save-video", "false"), ("results", "save_video"), False),
        (("--fps", "25"), ("results", "fps"), 25),
        (("--video-interval", "5"), ("results", "video_interval"), 5),
        (("--video-interval-pti", "5"), ("results", "video_interval_pti"), 5),
        (("--half",), ("results", "half"), True),
        (("--export-full",), ("results", "export_full"), True),
        (("--vgg", "vgg.pt"), ("vgg",), "vgg.pt"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and value[0].startswith("--") else "",
)
def test_option_reaches_its_setting(folder, tmp_path, given_option, where, value):
    plans = [
        json.loads(succeed(SCRIPT, *given(folder)[:4], "--outdir", tmp_path, *more, "--dry-run").stdout)
        for more in ((), given_option)
    ]
    for key in where:
        plans = [plan[key] for plan in plans]
    assert plans[1] == value != plans[0]


# What it refuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "culprit"),
    [
        (("--target", "absent"), "absent"),
        (("--idx", "9"), "--idx: expected 0 to 2, 3 photos"),
        (("--idx", "a"), "'a'"),
        (("--idx", "2-1"), "'2-1'"),
        (("--filename", "../photos"), "--filename"),
        (("--num-steps", "0"), "--num-steps"),
        (("--num-steps-pti", "-1"), "--num-steps-pti"),
        (("--space", "z"), "--space"),
        (("--lr", "nan"), "--lr"),
        (("--tune-parts", "decoder,eyes"), "'decoder,eyes'"),
        (("--tune-parts", "decoder,decoder"), "each once"),
        (("--background-weight", "2"), "--background-weight"),
        (("--camera", "yaw=20"), "camera"),
        (("--mask", "absent"), "absent"),
        (("--seed", "-1"), "--seed"),
        (("--fps", "0"), "--fps"),
        (("--device", "gpu"), "'gpu'"),
        (("--device", "cuda:98"), "cuda:98"),
        (("--network", "absent.pkl"), "absent.pkl"),
        (("--network", "init:nope"), "'nope'"),
        (("--latent", "absent.npz"), "absent.npz"),
        (("--silhouette-weight", "1"), "silhouette_weight: expected 0 for a photo without mask"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_option_is_one_line_that_names_it(folder, tmp_path, monkeypatch, changed, culprit):
    monkeypatch.chdir(tmp_path)
    ended = invoke(SCRIPT, *given(folder)[:4], "--outdir", tmp_path / "out", *FEW_STEPS, *changed)
    assert ended.exit_code != 0
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert culprit in last
    assert "Traceback" not in ended.stderr
    assert not [
        name for name in contents(tmp_path) if not name.endswith((".work/lock", ".work/run.json", "target.png"))
    ]


PHOTOS = {
    "no picture": lambda path: path.write_bytes(b"no picture"),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("kind", PHOTOS)
def test_bad_photo_is_one_line_that_names_it(folder, tmp_path, kind):
    photos = write_photos(tmp_path / "photos", ["a.png"])
    PHOTOS[kind](photos / "a.png")
    ended = invoke(SCRIPT, *given(folder)[:2], "--target", photos, "--outdir", tmp_path / "out", *FEW_STEPS)
    assert ended.exit_code == 3
    assert ended.stderr.splitlines()[-1].startswith(f"Error: {photos / 'a.png'}: ")
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize("camera", ["scaled", "nan", "missing"])
def test_photo_without_a_camera_is_one_line_that_names_it(folder, tmp_path, camera):
    photos = write_photos(tmp_path / "photos", ["a.png"])
    label = head_labels([0.0])[0].tolist()
    label[0] = {"scaled": 3.0, "nan": "NaN", "missing": label[0]}[camera]
    entries = [] if camera == "missing" else [["a.png", label]]
    (photos / "dataset.json").write_text(json.dumps({"labels": entries}))
    line = fail(SCRIPT, *given(folder)[:2], "--target", photos, "--outdir", tmp_path / "out", *FEW_STEPS)
    assert "a.png" in line
    assert not contents(tmp_path / "out")


def test_results_of_other_settings_are_refused_with_the_difference(folder, result):
    before = contents(made(folder))
    line = fail(SCRIPT, *given(folder), *FEW_STEPS, "--half", "--num-steps-pti", 3)
    assert "settings.tuning.num_steps was 2, and is 3 now; give --overwrite to replace it" in line
    assert contents(made(folder)) == before


def test_output_that_is_a_file_is_one_line_that_names_it(folder, tmp_path):
    (tmp_path / "out").write_bytes(b"precious")
    ended = invoke(SCRIPT, *given(folder)[:4], "--outdir", tmp_path / "out" / "here", *FEW_STEPS)
    assert ended.exit_code != 0
    assert str(tmp_path / "out") in ended.stderr.splitlines()[-1]
    assert contents(tmp_path) == {"out": b"precious"}


# Processes that are killed, and several of them -----------------------------------------------------------------------


def start_and_stop(command, folder, frame, number):
    """Start the script, and send it a signal when a frame is there."""
    process = start([SCRIPT, *command])
    deadline = time.monotonic() + 300
    while not list(folder.rglob(f"frames/{frame}")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_processes_go_on_to_the_same_bits(folder, tmp_path):
    steps = ("--num-steps", 24, "--num-steps-pti", 12, "--video-interval", 4, "--video-interval-pti", 4)
    common = (*given(folder)[:4], *steps, "--state-interval", 0)
    succeed(SCRIPT, *common, "--outdir", tmp_path / "whole")
    command = (*common, "--outdir", tmp_path / "killed")
    stops = (("w-000004.jpg", signal.SIGKILL), ("w-000012.jpg", signal.SIGINT), ("pti-000004.jpg", signal.SIGKILL))
    for frame, number in (*stops, ("pti-000008.jpg", signal.SIGTERM)):
        status, errors = start_and_stop(command, tmp_path / "killed", frame, number)
        assert status == (-signal.SIGKILL if number == signal.SIGKILL else 130), errors
        assert "Traceback" not in errors
    process = start([SCRIPT, *command])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "goes on where it stopped" in errors
    killed, whole = (contents(tmp_path / outdir) for outdir in ("killed", "whole"))
    assert killed.keys() == whole.keys()
    assert [name for name in whole if killed[name] != whole[name]] == ["small/a/metrics.json"]  # seconds
    stages = [json.loads(files["small/a/metrics.json"])["stages"] for files in (killed, whole)]
    for values in (stage for run in stages for stage in run.values()):
        del values["seconds"]
    assert stages[0] == stages[1]


@pytest.mark.slow
def test_ranks_share_the_photos_and_wait_for_each_other_though_one_failed(folder, tmp_path):
    command = ["projector.py", *map(str, given(folder)[:4]), "--outdir", str(tmp_path), "--save-video", "false"]
    # Rank 0 has the bad photo alone, and is ready first; torchrun would stop rank 1 if it ended then.
    command += ["--idx", "1,0", "--num-steps", "60", "--num-steps-pti", "2", "--device", "cpu"]
    outcome = Torchrun(command, {"OMP_NUM_THREADS": "1"}).finish(timeout_s=300)
    assert outcome.status != 0
    assert (tmp_path / "small" / "a" / "metrics.json").exists(), outcome.err
    assert f"Error: {folder / 'photos' / 'b ü.png'}" in outcome.err
