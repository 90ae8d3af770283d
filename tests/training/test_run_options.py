"""Which folder a training command works in."""

from __future__ import annotations

import dataclasses
import json

import pytest

from training.run_options import OPTIONS_NAME, Run, choose_run, difference, run_name, write_options
from training.train_config import DataConfig
from training.train_presets import make_train_config, replace_fields
from training.training_state import save_state


@pytest.fixture(scope="module")
def config():
    return make_train_config("debug", DataConfig(images=("a/heads.zip",), masks=("m.zip",), resolution=64), {})


def begin(outdir, config, resume="auto", name="run") -> Run:
    run = choose_run(outdir, name, config, resume)
    write_options(run.run_dir, config, ["train.py"], {})
    return run


def test_run_name_is_the_published_one(config):
    assert run_name(config, 2, None) == "debug-heads-gpus2-batch4-gamma0.2"
    assert run_name(config, 1, "try") == "debug-heads-gpus1-batch4-gamma0.2-try"


def test_choose_run_auto_finds_the_last_one_of_the_same_configuration(config, tmp_path):
    first = begin(tmp_path, config)
    assert first.state is None and first.run_dir.name == "00000-run"
    begin(tmp_path, replace_fields(config, {"loop.seed": 1}))
    assert begin(tmp_path, config).run_dir == first.run_dir
    assert begin(tmp_path, config, "never").run_dir.name == "00002-run"
    assert begin(tmp_path, config).run_dir.name == "00002-run"
    assert begin(tmp_path, config, name="other").run_dir.name == "00003-other"


def test_difference_is_none_for_what_two_parts_of_a_run_may_differ_in(config, tmp_path):
    run_dir = begin(tmp_path, config).run_dir
    free = {"loop.total_kimg": 1.0, "loop.workers": 7, "loop.keep_states": 5, "precision.tf32": True}
    assert difference(run_dir, replace_fields(config, free)) is None
    assert "loss.r1_gamma: 0.2 instead of 9" in difference(run_dir, replace_fields(config, {"loss.r1_gamma": 9.0}))


def test_choose_run_path_takes_other_learning_rates_and_gammas_and_tells_them(config, tmp_path):
    run_dir = begin(tmp_path, config).run_dir
    state = save_state(run_dir, 8, {"counters": {}})
    gentler = replace_fields(config, {"optimizer.generator_lr": 1e-4, "warmup.encoder_lr": 1e-5, "loss.r1_gamma": 2.0})
    lines = (
        "optimizer.generator_lr: 0.0001 from here on, 0.0025 before",
        "warmup.encoder_lr: 1e-05 from here on, 0.0005 before",
        "loss.r1_gamma: 2 from here on, 0.2 before",
    )
    for path in (run_dir, state):
        assert choose_run(tmp_path, "run", gentler, str(path)) == Run(run_dir, state, lines)
        assert choose_run(tmp_path, "run", config, str(path)) == Run(run_dir, state)
    assert choose_run(tmp_path, "run", gentler, "auto").run_dir != run_dir
    with pytest.raises(ValueError, match=r"loop.seed: 0 instead of 9"):
        choose_run(tmp_path, "run", replace_fields(gentler, {"loop.seed": 9}), str(run_dir))


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"config": {}}', '{"config": {"preset": 1}}'])
def test_difference_says_what_is_wrong_with_the_file(config, tmp_path, text):
    if text is not None:
        (tmp_path / OPTIONS_NAME).write_text(text)
    assert OPTIONS_NAME in difference(tmp_path, config)


def test_choose_run_path_must_hold_a_state_of_this_configuration(config, tmp_path):
    run_dir = begin(tmp_path, config).run_dir
    with pytest.raises(ValueError, match=r"expected a whole training state, got \[\]"):
        choose_run(tmp_path, "run", config, str(run_dir))
    state = run_dir / "state-000000008.safetensors"
    state.write_bytes(b"damaged")
    lines = []
    with pytest.raises(ValueError, match=r"expected a whole training state, got \['state-000000008.safetensors'\]"):
        choose_run(tmp_path, "run", config, str(run_dir), lines.append)
    assert "not used" in lines[0]
    run = choose_run(tmp_path, "run", config, str(state))  # named itself: loading it says what is wrong
    assert run.state == state and run.start_nimg(config) == 8
    with pytest.raises(ValueError, match=r"another loop.seed: 0 instead of 3.*--resume-from"):
        choose_run(tmp_path, "run", replace_fields(config, {"loop.seed": 3}), str(run_dir))
    with pytest.raises(ValueError, match=r"resume: expected auto, never, a run folder or a training state, got 'x'"):
        choose_run(tmp_path, "run", config, "x")


def test_run_without_state_begins_where_the_configuration_says(config, tmp_path):
    moved = dataclasses.replace(config, loop=dataclasses.replace(config.loop, start_nimg=1000))
    assert Run(tmp_path, None).start_nimg(moved) == 1000


def test_write_options_is_json_with_the_command(config, tmp_path):
    write_options(tmp_path, config, ["train.py", "--cfg", "debug"], {"torch": "2"})
    contents = json.loads((tmp_path / OPTIONS_NAME).read_text())
    assert contents["command"][1:] == ["--cfg", "debug"] and contents["versions"] == {"torch": "2"}
    assert difference(tmp_path, config) is None
