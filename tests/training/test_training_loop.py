"""The training loop: steps, resuming, several processes, skipped steps, files."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dnnlib import serialize
from inference.loading import load_generator
from tests.helpers.training import (
    assert_networks_equal_up_to_order,
    debug_config,
    debug_data,
    request,
    run,
    state_tensors,
)
from torch_utils import gradients
from torch_utils.launch import launch
from training.run_log import RunLog, read_stats
from training.skipped_steps import TrainingDivergedError
from training.training_loop import Trainer
from training.training_state import list_states


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return debug_data(tmp_path_factory.mktemp("data"))


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    return state_tensors(list_states(run_dir)[0])


def trainer(config, run_dir: Path, **fields) -> Trainer:
    return Trainer(request(config, run_dir, **fields), RunLog(run_dir, is_main=False))


def spoil_gradients(monkeypatch, name: str, value: float, when: Callable[[Trainer], bool]) -> None:
    """Overwrite the gradient of a parameter before gradients are averaged, at some steps."""
    average, run_phase = gradients.average_gradients, Trainer.run_phase
    current = []

    def noted(self, *arguments):
        current[:] = [self]
        run_phase(self, *arguments)

    def spoiled(parameters):
        if name in parameters and when(current[0]):
            parameters[name].grad.fill_(value)
        return average(parameters)

    monkeypatch.setattr(Trainer, "run_phase", noted)
    monkeypatch.setattr(gradients, "average_gradients", spoiled)


EVERYTHING = {
    "loss__density_reg": 0.25,
    "loss__style_mixing_prob": 0.5,
    "loss__density_noise_fade_kimg": 1.0,
    "loss__background_swap_prob": 0.5,
    "augment__mode": "ada",
    "augment__ada_kimg": 0.1,
    "vico__mode": "both",
    "vico__source": "both",
    "data__mirror": True,
}


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["debug", "everything"])
def test_training_resumed_twice_equals_uninterrupted_bit_for_bit(data, tmp_path, settings):
    config = debug_config(data, **settings)
    run(config, tmp_path / "whole", 0.024)
    for kimg in (0.008, 0.02, 0.024):
        assert run(config, tmp_path / "parts", kimg)
    whole, parts = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    different = [name for name in whole if not whole[name].equal(parts[name])]
    assert different == []
    assert not any(value.isnan().any() for value in whole.values())


def test_training_moves_every_network_and_keeps_their_average_apart(data, tmp_path):
    config = debug_config(data, loop__ema_kimg=10.0, loop__ema_rampup=None)
    before = trainer(config, tmp_path / "fresh")
    run(config, tmp_path / "run", 0.016)
    after = final_state(tmp_path / "run")
    for name in ("G", "D"):
        start = getattr(before, name).state_dict()
        still = [key for key, _ in getattr(before, name).named_parameters() if start[key].equal(after[f"{name}/{key}"])]
        # Noise strengths of layers that see no random noise, and what only other settings use, may stay.
        assert len(still) < 0.1 * len(start), still
    key = "G_ema/decoder.net.0.weight"
    assert not after[key].equal(after["G/decoder.net.0.weight"])


def test_training_two_processes_equal_one(data, tmp_path):
    config = debug_config(
        data,
        loop__batch_size=8,
        loop__batch_gpu=4,
        loop__tick_kimg=1.0,
        loss__background_swap_prob=0.5,
        loss__conditioning_swap_prob=0.7,
        generator__conditioning__zero=False,
        generator__pose_offset=True,
        loss__pose_offset_reg=10.0,
    )
    path = tmp_path / "config.json"
    path.write_text(serialize.dumps(config))
    for processes in (1, 2):
        command = [sys.executable, "-m", "tests.helpers.training", str(path), str(tmp_path / str(processes)), "0.024"]
        launch(processes, command, log_dir=tmp_path / "logs")
    one, two = (final_state(tmp_path / name) for name in "12")
    assert_networks_equal_up_to_order(one, two, ("G/", "D/", "G_ema/"))


def test_training_non_finite_gradient_skips_the_step_and_names_the_images(data, tmp_path, monkeypatch):
    config = debug_config(data, loop__tick_kimg=1.0)
    spoil_gradients(monkeypatch, "decoder.net.0.weight", math.nan, lambda trainer: trainer.progress.cur_nimg == 8)
    run(config, tmp_path, 0.016)
    log = (tmp_path / "log.txt").read_text()
    assert log.count("step skipped") == 1
    assert "Gboth: step skipped at 0.008 kimg, gradients were not finite; images: " in log
    assert "images.zip/" in log
    assert all(value.isfinite().all() for value in final_state(tmp_path).values())
    assert read_stats(tmp_path / "stats.jsonl")[-1]["Progress/skipped_steps"]["mean"] == 1


def test_training_ends_with_a_diagnosis_after_many_skipped_steps(data, tmp_path, monkeypatch):
    config = debug_config(data, loop__max_skipped_steps=3)
    spoil_gradients(monkeypatch, "b4.out.weight", math.inf, lambda trainer: True)
    with pytest.raises(TrainingDivergedError, match=r"of D .* 3 steps in a row.*D: gradients not finite in b4.out"):
        run(config, tmp_path, 1.0)


def test_training_signal_saves_within_a_step_and_goes_on(data, tmp_path, monkeypatch):
    config = debug_config(data, loop__tick_kimg=1.0)
    whole = Trainer.step

    def interrupted(self, batch):
        whole(self, batch)
        if self.progress.cur_nimg == 8:
            signal.raise_signal(signal.SIGTERM)

    run(config, tmp_path / "whole", 0.016)
    monkeypatch.setattr(Trainer, "step", interrupted)
    assert not run(config, tmp_path / "parts", 0.016)
    assert list_states(tmp_path / "parts")[0].name == "state-000000008.safetensors"
    assert run(config, tmp_path / "parts", 0.016)
    whole_state, parts = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    assert all(whole_state[name].equal(parts[name]) for name in whole_state)


def test_training_snapshot_is_a_network_without_training_noise(data, tmp_path):
    config = debug_config(data, loop__snapshot_ticks=1, loss__density_noise_fade_kimg=5.0)
    run(config, tmp_path, 0.004)
    generator = load_generator(tmp_path / "network-snapshot-000000.safetensors")
    assert generator.config.rendering.density_noise == 0
    assert generator.img_resolution == 64


def test_training_starts_from_a_snapshot_by_name(data, tmp_path):
    config = debug_config(data, loop__snapshot_ticks=1)
    run(config, tmp_path / "first", 0.004)
    start = {"G_ema": load_generator(tmp_path / "first" / "network-snapshot-000000.safetensors")}
    second = trainer(config, tmp_path / "second", start=start)
    key = "decoder.net.0.weight"
    assert second.G.state_dict()[key].equal(start["G_ema"].state_dict()[key])
    assert second.G_ema.state_dict()[key].equal(start["G_ema"].state_dict()[key])


def test_training_start_of_another_shape_raises_value_error(data, tmp_path):
    config = debug_config(data, loop__snapshot_ticks=1)
    run(config, tmp_path / "first", 0.004)
    start = {"G_ema": load_generator(tmp_path / "first" / "network-snapshot-000000.safetensors")}
    wide = debug_config(data, generator__synthesis__channel_base=512)
    with pytest.raises(ValueError, match=r"expected shape .*, got"):
        trainer(wide, tmp_path / "second", start=start)


def test_training_state_of_other_data_is_refused(data, tmp_path):
    config = debug_config(data)
    run(config, tmp_path / "run", 0.004)
    other = dataclasses.replace(config, data=debug_data(tmp_path / "other", count=8))
    with pytest.raises(ValueError, match=r"expected the data set that this run began with"):
        run(other, tmp_path / "run", 0.008)


def test_training_complete_run_does_nothing_more(data, tmp_path, capsys):
    config = debug_config(data)
    run(config, tmp_path, 0.008)
    before = final_state(tmp_path)
    assert run(config, tmp_path, 0.008)
    assert "complete: 0.008 of 0.008 kimg" in capsys.readouterr().out
    assert all(before[name].equal(value) for name, value in final_state(tmp_path).items())


def test_training_writes_pictures_of_reals_and_fakes(data, tmp_path):
    config = debug_config(data, loop__image_ticks=1)
    run(config, tmp_path, 0.004)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert {"reals.png", "fakes000000.png", "fakes000000_depth.png", "fakes000000_mask.png"} <= names
