"""train.py: options, run folders, resuming after every kind of end."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from inference.loading import load_generator
from tests.cli.running import fail, start, succeed
from tests.helpers.head_data import HeadFiles
from tests.helpers.training import SIDE, state_tensors
from training.run_log import read_stats
from training.train_presets import TRAIN_PRESETS
from training.training_state import list_states


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Return a folder with images.zip and masks.zip."""
    folder = tmp_path_factory.mktemp("train-data")
    HeadFiles(12, side=SIDE).write(folder, zipped=True)
    return folder


def command(data: Path, outdir: Path, *more) -> list:
    roots = ["--img-data", data / "images.zip", "--seg-data", data / "masks.zip"]
    return ["--outdir", outdir, "--cfg", "debug", "--device", "cpu", *roots, "--image-ticks", 1000, *more]


def plan(*arguments) -> dict:
    return json.loads(succeed("train.py", *arguments, "--dry-run").stdout)


def only_run(outdir: Path) -> Path:
    (run_dir,) = [path for path in outdir.iterdir() if path.is_dir()]
    return run_dir


def finish(process) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def same_networks(one: Path, other: Path) -> bool:
    """Whether the newest states of two runs are the same, bit for bit."""
    a, b = state_tensors(list_states(one)[0]), state_tensors(list_states(other)[0])
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", TRAIN_PRESETS)
def test_train_dry_run_prints_the_configuration_and_makes_nothing(data, tmp_path, preset):
    arguments = command(data, tmp_path / "runs")
    arguments[arguments.index("debug")] = preset
    printed = plan(*arguments)
    assert printed["config"]["preset"] == preset
    assert printed["config"]["data"]["resolution"] == SIDE
    assert printed["run"].startswith(f"{preset}-images-gpus1-batch")
    assert not (tmp_path / "runs").exists()


def test_train_dry_run_of_synthetic_data_needs_none(tmp_path):
    config = plan("--outdir", tmp_path, "--cfg", "demo", "--data", "synth:10x3")["config"]
    assert config["data"]["images"][0].startswith(str(tmp_path / "synthetic-heads-64px-10x3"))
    assert config["data"]["masks"]


PUBLISHED_OPTIONS = [
    ("--cond False", "discriminator.c_dim", 0),
    ("--mirror 1", "data.mirror", True),
    ("--aug ada", "augment.mode", "ada"),
    ("--p 0.3", "augment.p", 0.3),
    ("--target 0.5", "augment.target", 0.5),
    ("--freezed 2", "discriminator.freeze_layers", 2),
    ("--batch 8", "loop.batch_size", 8),
    ("--batch-gpu 4", "loop.batch_gpu", 4),
    ("--cbase 512", "discriminator.channel_base", 512),
    ("--cmax 8", "generator.synthesis.channel_max", 8),
    ("--glr 0.001", "optimizer.generator_lr", 0.001),
    ("--dlr 0.001", "optimizer.discriminator_lr", 0.001),
    ("--map-depth 3", "generator.mapping.num_layers", 3),
    ("--mbstd-group 2", "discriminator.mbstd_group_size", 2),
    ("--gamma 5", "loss.r1_gamma", 5.0),
    ("--gamma_seg 2", "loss.r1_gamma_mask", 2.0),
    ("--kimg 3", "loop.total_kimg", 3.0),
    ("--tick 2", "loop.tick_kimg", 2.0),
    ("--snap 7", "loop.snapshot_ticks", 7),
    ("--seed 3", "loop.seed", 3),
    ("--nobench True", "precision.cudnn_benchmark", False),
    ("--workers 2", "loop.workers", 2),
    ("--neural_rendering_resolution_initial 24", "loss.neural_rendering_resolution_initial", 24),
    ("--neural_rendering_resolution_final 32", "loss.neural_rendering_resolution_final", 32),
    ("--neural_rendering_resolution_fade_kimg 9", "loss.neural_rendering_resolution_fade_kimg", 9.0),
    ("--blur_fade_kimg 32", "loss.blur_fade_kimg", 4.0),
    ("--gen_pose_cond True", "generator.conditioning.zero", False),
    ("--c-scale 0.5", "generator.conditioning.scale", 0.5),
    ("--gpc_reg_prob 0.6", "loss.conditioning_swap_prob", 0.6),
    ("--gpc_reg_fade_kimg 6", "loss.conditioning_swap_fade_kimg", 6.0),
    ("--disc_c_noise 0.1", "discriminator.disc_c_noise", 0.1),
    ("--sr_noise_mode random", "generator.superresolution.noise_mode", "random"),
    ("--sr_num_fp16_res 0", "generator.superresolution.num_fp16_res", 0),
    ("--g_num_fp16_res 2", "generator.synthesis.conv_clamp", 256.0),
    ("--d_num_fp16_res 0", "discriminator.conv_clamp", None),
    ("--style_mixing_prob 0.9", "loss.style_mixing_prob", 0.9),
    ("--density_reg 0.5", "loss.density_reg", 0.5),
    ("--density_reg_every 8", "optimizer.generator_reg_interval", 8),
    ("--density_reg_p_dist 0.01", "loss.density_reg_perturbation", 0.01),
    ("--reg_type monotonic-fixed", "loss.density_reg_type", "monotonic-fixed"),
    ("--decoder_lr_mul 2", "generator.decoder.lr_multiplier", 2.0),
    ("--g_architecture resnet", "generator.synthesis.architecture", "resnet"),
    ("--density_noise_fade_kimg 5", "loss.density_noise_fade_kimg", 5.0),
    ("--decoder_activation sigmoid", "generator.decoder.activation", "sigmoid"),
    ("--use_torgb_raw False", "generator.raw_torgb", False),
    ("--use_background False", "generator.background", False),
    ("--bcg_reg_prob 0.2", "loss.background_swap_prob", 0.2),
    ("--disc_module DualDiscriminator", "discriminator.variant", "DualDiscriminator"),
    ("--triplane_size 32", "generator.plane_resolution", 32),
    ("--trans_reg 4", "loss.pose_offset_reg", 4.0),
    ("--max_yaw 90", "data.max_yaw_deg", 90.0),
    ("--min_yaw 10", "data.min_yaw_deg", 10.0),
    ("--back_repeat 3", "data.back_repeat", 3),
    ("--ray_start 2", "generator.rendering.ray_start", 2.0),
    ("--ray_end 3.5", "generator.rendering.ray_end", 3.5),
]


@pytest.mark.parametrize(("option", "field", "expected"), PUBLISHED_OPTIONS, ids=[row[0] for row in PUBLISHED_OPTIONS])
def test_train_published_option_sets_its_field(data, tmp_path, option, field, expected):
    value = plan(*command(data, tmp_path, *option.split(" ")))["config"]
    for name in field.split("."):
        value = value[name]
    assert value == expected


def test_train_bf16_is_the_half_precision_of_all_networks(data, tmp_path):
    config = plan(*command(data, tmp_path, "--bf16"))["config"]
    parts = (config["generator"]["synthesis"], config["generator"]["superresolution"], config["discriminator"])
    assert {part["half_precision"] for part in parts} == {"bfloat16"}


def test_train_warmup_options_set_their_fields(data, tmp_path):
    off = plan(*command(data, tmp_path))["config"]["warmup"]
    assert (off["kimg"], off["after_interval"]) == (0, None)
    options = {"kimg": 3, "other-views": 0.75, "kl": 0.001, "glr": 0.004, "after-interval": 8}
    given = [text for name, value in options.items() for text in (f"--warmup-{name}", value)]
    on = plan(*command(data, tmp_path, *given))["config"]["warmup"]
    fields = ("kimg", "other_view_share", "kl_weight", "generator_lr", "after_interval")
    assert [on[name] for name in fields] == list(options.values())
    ended = plan(*command(data, tmp_path, "--warmup-kimg", 3, "--warmup-after-interval", 0))["config"]["warmup"]
    assert (ended["kimg"], ended["after_interval"]) == (3, None)


def test_train_resume_from_changes_schedules_as_published(data, tmp_path):
    config = plan(*command(data, tmp_path, "--resume", "net.pkl", "--resume-kimg", 1000))["config"]
    assert config["resume_from"] == "net.pkl"
    assert (config["augment"]["ada_kimg"], config["loop"]["ema_rampup"]) == (100, None)
    assert (config["loss"]["blur_init_sigma"], config["loop"]["start_nimg"]) == (0, 1_000_000)
    blurred = plan(*command(data, tmp_path, "--resume-from", "net.pkl", "--resume-blur"))["config"]
    assert blurred["loss"]["blur_init_sigma"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", 6], r"batch_gpu: expected a multiple of the minibatch-std group size 4, got 6"),
        (["--batch", 8, "--batch-gpu", 3], r"batch size: expected a multiple of processes x batch_gpu = 1 x 3, got 8"),
        (["--gamma", "nan"], r"expected a finite number"),
        (["--disc-module", "HoloDiscriminator"], r"HoloDiscriminator: expected data.parsing"),
        (["--resume", "absent-folder"], r"absent-folder"),
        (["--resume-from", "absent.pkl"], r"absent.pkl"),
        (["--ray-start", "auto", "--ray-end", 3], r"both numbers or both 'auto'"),
        (["--min-yaw", 179.9], r"at least one of 12 images within yaw 179.9 to 180"),
        (["--device", "cuda:7"], r"device: expected"),
        (["--resolution", 64], r"--resolution: expected none without --data synth, got 64"),
        (["--warmup-after-interval", 4], r"warmup.kimg: expected above 0 with warmup.after_interval, got 0.0"),
        (["--resume-blur"], r"--resume-blur: expected a network to start from"),
        (["--data", "synth"], r"--data synth: expected no other data"),
        (["--resume-from", __file__], r"test_train.py"),
        (["--metrics", "fid50k_full,fud"], r"metric: expected one of .*; came 'fud'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_train_impossible_setting_is_one_line(data, tmp_path, arguments, message):
    line = fail("train.py", *command(data, tmp_path, *arguments))
    assert re.search(message, line), line


def test_train_absent_data_is_named(tmp_path):
    line = fail("train.py", "--outdir", tmp_path, "--cfg", "debug", "--data", tmp_path / "nothing.zip")
    assert "nothing.zip" in line


# Runs -----------------------------------------------------------------------------------------------------------------


def test_train_same_command_again_goes_on_and_its_network_makes_pictures(data, tmp_path):
    whole = command(data, tmp_path / "whole", "--kimg", 0.024, "--snap", 1)
    succeed("train.py", *whole)
    parts = command(data, tmp_path / "parts", "--snap", 1, "--resume", "auto")
    for kimg in (0.008, 0.024, 0.024):
        result = succeed("train.py", *parts, "--kimg", kimg)
    assert "complete" in result.stdout
    one, other = only_run(tmp_path / "whole"), only_run(tmp_path / "parts")
    assert same_networks(one, other)
    rows = [[row["cur_nimg"] for row in read_stats(run / "stats.jsonl")] for run in (one, other)]
    assert rows[0][-1] == rows[1][-1] == 24
    assert len(list_states(other)) == 2  # the last two
    assert json.loads((other / "options.json").read_text())["config"]["loop"]["total_kimg"] == 0.024
    load_generator(other / "network-snapshot-000000.safetensors")


def test_train_metrics_of_every_snapshot_are_kept_and_change_nothing_else(data, tmp_path):
    plain = command(data, tmp_path / "plain", "--kimg", 0.008, "--snap", 1)
    succeed("train.py", *plain)
    measured = command(data, tmp_path / "measured", "--kimg", 0.008, "--snap", 1, "--tick", 0.004)
    out = succeed("train.py", *measured, "--metrics", "ppl4-wend, mv_consistency2").stdout
    run = only_run(tmp_path / "measured")
    assert same_networks(run, only_run(tmp_path / "plain"))
    records = [json.loads(line) for line in (run / "metric-ppl4_wend.jsonl").read_text().splitlines()]
    values = [row["Metrics/ppl4_wend"]["mean"] for row in read_stats(run / "stats.jsonl") if "Metrics/ppl4_wend" in row]
    assert [record["results"]["ppl4_wend"] for record in records] == values and len(values) == 2
    assert {record["snapshot_pkl"] for record in records} == {"network-snapshot-000000.safetensors"}
    assert "metrics: ppl4_wend" in out
    untrained = json.loads((run / "metric-mv_consistency2.jsonl").read_text().splitlines()[0])
    assert untrained["results"] == {} and untrained["not_applicable"]
    # The same numbers as from the command, on the same network.
    again = succeed(
        *("calc_metrics.py", "--network", run / "network-snapshot-000000.safetensors", "--device", "cpu"),
        *("--metrics", "ppl4_wend", "--format", "json"),
    )
    assert json.loads(again.stdout)["results"]["ppl4_wend"] == pytest.approx(values[-1], rel=1e-6)


def test_train_other_configuration_begins_another_run(data, tmp_path):
    succeed("train.py", *command(data, tmp_path, "--kimg", 0.004, "--resume", "auto"))
    succeed("train.py", *command(data, tmp_path, "--kimg", 0.004, "--resume", "auto", "--vico", "none"))
    assert len(list(tmp_path.iterdir())) == 2
    line = fail("train.py", *command(data, tmp_path, "--resume", sorted(tmp_path.iterdir())[0], "--seed", 5))
    assert "loop.seed: 0 instead of 5" in line


@pytest.mark.shared
def test_train_starts_from_a_published_pickle_and_keeps_its_quirks(shared_dir, tmp_path):
    HeadFiles(8, side=128).write(tmp_path, zipped=True)
    shape = ["--cbase", 1024, "--cmax", 32, "--triplane-size", 64, "--pose-offset", "true", "--vico", "none"]
    pickled = shared_dir / "golden" / "spherehead_128.pkl"
    result = succeed("train.py", *command(tmp_path, tmp_path / "runs", "--kimg", 0.004, *shape, "--resume", pickled))
    assert "G_ema: 247 of 247 tensors taken from the snapshot" in result.stdout
    assert "D: 74 of 74 tensors taken" in result.stdout
    run = only_run(tmp_path / "runs")
    config = json.loads((run / "options.json").read_text())["config"]["generator"]
    assert config["rendering"]["depth_clamp"] == "batch"
    assert config["superresolution"]["first_rgb_replaces_raw"]


def wait_for(condition, process, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_train_preemption_saves_and_ends_with_code_0(data, tmp_path, name):
    arguments = ["train.py", *command(data, tmp_path, "--kimg", 10, "--tick", 0.008, "--state-ticks", 1000)]
    process = start(arguments)
    wait_for(lambda: list(tmp_path.glob("*/stats.jsonl")), process)
    process.send_signal(getattr(signal, name))
    out, _ = finish(process)
    assert f"stopping after {name}" in out
    assert len(list_states(only_run(tmp_path))) == 1


def log_lines(outdir: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in outdir.glob("*/log.txt"))


def kill_until_complete(data: Path, outdir: Path, kills: int, seed: int) -> None:
    """Run a command again and again, killing it at a random moment soon after it has begun to train."""
    arguments = ["train.py", *command(data, outdir, "--kimg", 0.06, "--tick", 0.004, "--resume", "auto")]
    random_s, killed = random.Random(seed), 0
    while True:
        process = start(arguments)
        if killed == kills:
            finish(process)
            return
        before = log_lines(outdir)
        wait_for(lambda: log_lines(outdir) > before + 2, process)  # noqa: B023 (called at once)
        time.sleep(random_s.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed += 1


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> Path:
    """Return the folder of a run of 60 images."""
    outdir = tmp_path_factory.mktemp("uninterrupted")
    finish(start(["train.py", *command(data, outdir, "--kimg", 0.06, "--tick", 0.004)]))
    return only_run(outdir)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_train_killed_at_random_moments_ends_with_the_same_bits(data, tmp_path, uninterrupted, kills):
    kill_until_complete(data, tmp_path, kills, seed=kills)
    assert same_networks(only_run(tmp_path), uninterrupted)
    hidden = [path.name for path in only_run(tmp_path).iterdir() if path.name.startswith(".state")]
    assert hidden == []


def test_train_two_processes_on_this_machine(data, tmp_path):
    arguments = command(data, tmp_path, "--kimg", 0.008, "--gpus", 2, "--batch", 8)
    out, _ = finish(start(["train.py", *arguments]))
    assert "complete: 0.008 kimg" in out
    assert only_run(tmp_path).name.startswith("00000-debug-images-gpus2-batch8")


def test_train_dead_process_ends_the_run_with_its_name(data, tmp_path):
    process = start(["train.py", *command(data, tmp_path, "--kimg", 10, "--gpus", 2, "--batch", 8)])
    wait_for(lambda: list(tmp_path.glob("*/stats.jsonl")), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("needs /proc/*/children to find the processes of a run")
    os.kill(int(children.read_text().split()[1]), signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGKILL" in err and "rank" in err
    assert time.monotonic() - began < 60
