"""The warm-up in the training loop: resuming, several processes, what is trained when, what states hold."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

from dnnlib import serialize
from tests.helpers.head_data import HeadFiles
from tests.helpers.training import (
    SIDE,
    assert_networks_equal_up_to_order,
    debug_config,
    debug_data,
    request,
    run,
    state_tensors,
)
from torch_utils import gradients
from torch_utils.launch import launch
from training.phases import WARMUP, due_phases, make_phases
from training.run_log import RunLog, read_stats
from training.train_presets import make_train_config
from training.training_loop import Trainer
from training.training_state import list_states

NO_TICKS = {"loop__tick_kimg": 1.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return the data of four heads with three views of each, with masks."""
    files = HeadFiles(12, side=SIDE)
    files.identities = {name: number // 3 for number, name in enumerate(files.images)}
    return files.write(tmp_path_factory.mktemp("data"), zipped=True, parsing=(), parsing_classes=0)


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    return state_tensors(list_states(run_dir)[0])


def parts_of(state: dict[str, torch.Tensor]) -> set[str]:
    return {name.partition("/")[0] for name in state}


def trainer(config, run_dir: Path) -> Trainer:
    return Trainer(request(config, run_dir), RunLog(run_dir, is_main=False))


# Which phases are due.


def due(config, kimg: float) -> list[str]:
    return [phase.name for _, phase in due_phases(make_phases(config), config, int(kimg * 1000))]


def test_due_phases_warm_up_first_and_count_intervals_from_its_end(data):
    config = debug_config(data, warmup__kimg=0.010, optimizer__discriminator_reg_interval=2)
    assert config.warmup_end_nimg == 12  # whole batches of 4
    assert [due(config, kimg) for kimg in (0, 0.008)] == [[WARMUP], [WARMUP]]
    assert [due(config, kimg) for kimg in (0.012, 0.016, 0.020)] == [
        ["Gboth", "Dmain", "Dreg"],
        ["Gboth", "Dmain"],
        ["Gboth", "Dmain", "Dreg"],
    ]


def test_due_phases_keep_reconstructing_in_every_nth_iteration(data):
    config = debug_config(data, warmup__kimg=0.004, warmup__after_interval=2)
    assert [WARMUP in due(config, 0.004 * iteration) for iteration in range(5)] == [True, True, False, True, False]


def test_schedules_stand_still_during_the_warm_up(data):
    config = debug_config(data, warmup__kimg=0.010, loop__start_nimg=100)
    assert [config.schedule_nimg(nimg) for nimg in (100, 108, 112, 116)] == [100, 100, 100, 104]
    without = debug_config(data, loop__start_nimg=100)
    assert [without.schedule_nimg(nimg) for nimg in (100, 108)] == [100, 108]


def test_warmup_interval_after_none_is_an_error(data):
    with pytest.raises(ValueError, match=r"warmup\.kimg: expected above 0 with warmup\.after_interval, got 0"):
        debug_config(data, warmup__after_interval=4)


# The loop.


@pytest.mark.parametrize("after_interval", [None, 2])
def test_warmup_resumed_in_and_after_it_equals_uninterrupted_bit_for_bit(data, tmp_path, after_interval):
    config = debug_config(data, warmup__kimg=0.008, warmup__after_interval=after_interval, augment__mode="ada")
    run(config, tmp_path / "whole", 0.016)
    for kimg in (0.004, 0.008, 0.016):
        assert run(config, tmp_path / "parts", kimg)
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not whole[name].equal(parts[name])] == []


def test_warmup_trains_generator_and_encoder_alone_and_reports(data, tmp_path):
    config = debug_config(data, warmup__kimg=0.008, loop__ema_kimg=10.0, loop__ema_rampup=None)
    before = trainer(config, tmp_path / "fresh")
    start = {"G": before.G, "D": before.D, "E": before.reconstruction.encoder}
    run(config, tmp_path / "run", 0.004)
    state = tensors(tmp_path / "run")
    moved = {
        name: sum(not p.equal(state[f"{name}/{key}"]) for key, p in network.named_parameters())
        for name, network in start.items()
    }
    assert moved["D"] == 0 and moved["E"] == len(list(start["E"].parameters()))
    assert moved["G"] > 0.9 * len(list(start["G"].parameters()))
    average = state["G_ema/decoder.net.0.weight"]
    assert not average.equal(start["G"].decoder.net[0].weight) and not average.equal(state["G/decoder.net.0.weight"])
    assert not state["G/backbone.mapping.w_avg"].equal(start["G"].backbone.mapping.w_avg)
    reported = read_stats(tmp_path / "run" / "stats.jsonl")[-1]
    names = {name.removeprefix("Loss/") for name in reported if name.startswith("Loss/")}
    assert names == {f"warmup/{term}" for term in ("image", "raw", "mask", "perceptual", "kl", "loss")}
    assert "50% of targets are another view, of 4 identities" in (tmp_path / "run" / "log.txt").read_text()


def test_warmup_states_lose_the_encoder_when_it_ends(data, tmp_path):
    config = debug_config(data, warmup__kimg=0.004, loop__keep_states=3)
    run(config, tmp_path, 0.008)
    after = parts_of(state_tensors(list_states(tmp_path)[0]))
    assert not after & {"E", "optimizer_warmup"} and {"optimizer_G", "optimizer_D"} <= after
    run(debug_config(data, warmup__kimg=0.008), tmp_path / "longer", 0.004)
    during = parts_of(tensors(tmp_path / "longer"))
    assert {"E", "optimizer_warmup"} <= during and not during & {"optimizer_G", "optimizer_D"}


def test_warmup_without_identities_says_that_views_are_their_own_targets(tmp_path):
    config = debug_config(debug_data(tmp_path / "data"), warmup__kimg=0.004)
    run(config, tmp_path / "run", 0.004)
    assert (
        "warm-up to 0.004 kimg: every view is reconstructed from itself" in (tmp_path / "run" / "log.txt").read_text()
    )


def test_warmup_two_processes_equal_one(data, tmp_path):
    config = debug_config(
        data,
        **NO_TICKS,
        warmup__kimg=0.008,
        warmup__after_interval=1,
        loop__batch_size=8,
        loop__batch_gpu=4,
        loss__conditioning_swap_prob=0.7,
        generator__conditioning__zero=False,
        generator__pose_offset=True,
        loss__pose_offset_reg=10.0,
    )
    path = tmp_path / "config.json"
    path.write_text(serialize.dumps(config))
    run(config, tmp_path / "1", 0.016)
    command = [sys.executable, "-m", "tests.helpers.training", str(path), str(tmp_path / "2"), "0.016"]
    launch(2, command, log_dir=tmp_path / "logs")
    one, two = (tensors(tmp_path / name) for name in "12")
    assert_networks_equal_up_to_order(one, two, ("G/", "E/", "G_ema/"))


def test_warmup_non_finite_gradient_skips_the_step(data, tmp_path, monkeypatch):
    average = gradients.average_gradients

    def spoiled(parameters):
        parameters["encoder.head.0.weight"].grad.fill_(math.nan)
        return average(parameters)

    monkeypatch.setattr(gradients, "average_gradients", spoiled)
    config = debug_config(data, warmup__kimg=0.008)
    before = trainer(config, tmp_path / "fresh")
    run(config, tmp_path / "run", 0.004)
    assert "Gwarmup: step skipped at 0 kimg" in (tmp_path / "run" / "log.txt").read_text()
    after = tensors(tmp_path / "run")
    assert all(p.equal(after[f"G/{name}"]) for name, p in before.G.named_parameters())


@pytest.mark.parametrize("preset", ["spherehead", "panohead", "eg3d"])
def test_warmup_steps_of_published_presets_are_finite(data, tmp_path, preset):
    """Tri-planes of all kinds, with background, camera offsets and conditioning, with and without masks."""
    if preset == "eg3d":
        data = dataclasses.replace(data, masks=())
    small = {
        "generator.plane_resolution": 16,
        "generator.synthesis.channel_base": 256,
        "generator.synthesis.channel_max": 16,
        "generator.rendering.depth_resolution": 6,
        "generator.rendering.depth_resolution_importance": 6,
        "discriminator.channel_base": 512,
        "discriminator.channel_max": 16,
        "loss.neural_rendering_resolution_initial": 16,
    }
    loop = {"loop.batch_size": 4, "loop.workers": 0, "loop.image_ticks": None, "loop.snapshot_ticks": None}
    config = make_train_config(preset, data, {**small, **loop, "warmup.kimg": 0.008})
    run(config, tmp_path, 0.008)
    row = read_stats(tmp_path / "stats.jsonl")[-1]
    assert row["Progress/skipped_steps"]["mean"] == 0
    assert ("Loss/warmup/mask" in row) == bool(data.masks)
    assert ("Loss/warmup/offset" in row) == (preset != "eg3d")
    assert all("nonfinite" not in value for name, value in row.items() if name.startswith("Loss/"))


def test_warmup_reconstructs_parsing_maps_too(tmp_path):
    data = HeadFiles(8, side=SIDE).write(tmp_path / "data", zipped=True)
    config = debug_config(data, warmup__kimg=0.004)
    run(config, tmp_path / "run", 0.004)
    assert "Loss/warmup/parsing" in read_stats(tmp_path / "run" / "stats.jsonl")[-1]
