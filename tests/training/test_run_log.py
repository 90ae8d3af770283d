"""Logs hold every tick once, survive kills and full disks, and never stop a run."""

import json
import math
import sys
import types

import numpy as np
import pytest
from PIL import Image

from dnnlib.extras import MissingExtraError
from torch_utils.training_stats import Stat
from training.run_log import RunLog, cut_stats, read_stats

STATS = {
    "Loss/G/loss": Stat(8, 1.5, 0.25),
    "Loss/bad": Stat(0, math.nan, math.nan, 3),
    "Loss/part": Stat(2, 1.0, 0.0, 1),
}


def write_ticks(run_dir, *cur_nimg, **arguments):
    with RunLog(run_dir, **arguments) as log:
        for nimg in cur_nimg:
            log.tick(STATS, {"Progress/kimg": nimg / 1000, "Timing/eta_sec": math.nan}, nimg)


def nimgs(run_dir):
    return [row["cur_nimg"] for row in read_stats(run_dir / "stats.jsonl")]


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# Lines and rows.


def test_line_goes_to_standard_output_and_log_txt_at_once(tmp_path, capsys):
    log = RunLog(tmp_path)
    log.line("first")
    log.line("schön")
    assert capsys.readouterr().out == "first\nschön\n"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "first\nschön\n"


def test_tick_writes_a_row_of_strict_json_and_the_progress_line(tmp_path, capsys):
    write_ticks(tmp_path, 4000)
    (line,) = (tmp_path / "stats.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row.pop("timestamp") > 1.6e9
    assert row == {
        "cur_nimg": 4000,
        "Loss/G/loss": {"num": 8, "mean": 1.5, "std": 0.25},
        "Loss/bad": {"num": 0, "mean": None, "std": None, "nonfinite": 3},
        "Loss/part": {"num": 2, "mean": 1.0, "std": 0.0, "nonfinite": 1},
        "Progress/kimg": {"num": 1, "mean": 4.0, "std": 0.0},
        "Timing/eta_sec": {"num": 0, "mean": None, "std": None, "nonfinite": 1},
    }
    assert capsys.readouterr().out == "kimg 4.0        left ?\n"
    assert names(tmp_path) == ["log.txt", "stats.jsonl"]


def test_other_processes_write_and_print_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "run", is_main=False, tensorboard=True, wandb_project="a") as log:
        log.line("a")
        log.tick(STATS, {}, 1)
        log.images("fakes", "absent.png", 1)
    assert not (tmp_path / "run").exists() and capsys.readouterr() == ("", "")


def test_exception_is_written_to_log_txt_and_raised(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="hour 30"), RunLog(tmp_path):
        raise RuntimeError("at hour 30")
    text = (tmp_path / "log.txt").read_text()
    assert text.startswith("Traceback") and text.endswith("RuntimeError: at hour 30\n")


# Going on.


def test_rows_beyond_where_the_run_goes_on_are_cut_and_lines_appended(tmp_path):
    write_ticks(tmp_path, 4, 4000, 8000, 12000)
    with RunLog(tmp_path, start_nimg=8000) as log:
        log.line("goes on")
        log.tick({}, {}, 12000)
    assert nimgs(tmp_path) == [4, 4000, 8000, 12000]
    assert (tmp_path / "log.txt").read_text().count("kimg") == 4  # what was said stays said
    assert "goes on\n" in (tmp_path / "log.txt").read_text()


def test_cut_stats_removes_damaged_rows_and_replaces_the_file_once(tmp_path):
    path = tmp_path / "stats.jsonl"
    whole = [b'{"cur_nimg": 1}\n', b'{"cur_nimg": 2, "a": {"num": 1}}\n']
    damaged = [b'{"cur_nimg": 2, "a\n', b"\xff\xfe\n", b"[1]\n", b'{"a": 1}\n', b'{"cur_nimg": 3}\n', b'{"cur_ni']
    path.write_bytes(b"".join([whole[0], *damaged[:3], whole[1], *damaged[3:]]))
    assert cut_stats(path, 2) == 6
    assert path.read_bytes() == b"".join(whole)
    inode = path.stat().st_ino
    assert cut_stats(path, 2) == 0 and path.stat().st_ino == inode
    assert cut_stats(tmp_path / "absent", 2) == 0 and names(tmp_path) == ["stats.jsonl"]


def test_row_that_was_cut_off_by_a_kill_does_not_spoil_the_next(tmp_path):
    log = RunLog(tmp_path)
    log.tick({}, {}, 1)
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('{"cur_nimg": 2, "timesta')
    log.tick({}, {}, 3)
    assert nimgs(tmp_path) == [1, 3]


# What fails.


def test_full_disk_is_reported_once_and_does_not_stop_the_run(tmp_path, capsys):
    resource = pytest.importorskip("resource")
    log = RunLog(tmp_path)
    log.tick(STATS, {}, 1)
    limit = (tmp_path / "stats.jsonl").stat().st_size + 10
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        log.tick(STATS, {}, 2)
        log.tick(STATS, {}, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.tick(STATS, {}, 4)  # there is space again
    assert nimgs(tmp_path) == [1, 4]
    error = capsys.readouterr().err
    assert error.count("warning: stats.jsonl: ") == 1 and "File too large; what cannot be written is dropped" in error


def test_closed_standard_output_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path)
    closed = open(tmp_path / "out", "w")
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    log.line("still here")
    assert (tmp_path / "log.txt").read_text() == "still here\n"
    assert "warning: standard output: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [({"tensorboard": True}, "tensorboard", "tracking"), ({"wandb_project": "a"}, "wandb", "wandb")],
)
def test_missing_extra_is_one_error_at_the_start(tmp_path, monkeypatch, arguments, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"this needs {package}, .* pip install -e '.\[{extra}\]'"):
        RunLog(tmp_path, **arguments)


# TensorBoard and Weights & Biases.


def test_tensorboard_gets_means_and_pictures(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install -e '.[tracking]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "a.png")
    with RunLog(tmp_path / "run", tensorboard=True) as log:
        log.tick(STATS, {}, 4000)
        log.images("fakes", tmp_path / "a.png", 4000)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["Loss/G/loss", "Loss/part"]
    (scalar,) = events.Scalars("Loss/G/loss")
    assert (scalar.step, scalar.value) == (4000, 1.5)
    assert [(image.width, image.height) for image in events.Images("fakes")] == [(3, 2)]


def test_tensorboard_of_a_run_that_goes_on_drops_later_steps(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install -e '.[tracking]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_ticks(tmp_path, 1000, 2000, 3000, tensorboard=True)
    write_ticks(tmp_path, 3000, 4000, tensorboard=True, start_nimg=2000)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [scalar.step for scalar in events.Scalars("Progress/kimg")] == [1000, 2000, 3000, 4000]


class FakeWandb(types.ModuleType):
    """Stands in for the package; `fails` names the calls that raise."""

    def __init__(self, *fails):
        super().__init__("wandb")
        self.fails, self.calls = fails, []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name in self.fails:
                raise ConnectionError("no network")
            return self if name == "init" else f"{name} of {args}"

        return call


def test_wandb_gets_means_and_pictures_and_the_same_run_when_it_goes_on(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        with RunLog(tmp_path / "00001-a", wandb_project="heads") as log:
            log.tick(STATS, {}, 4000)
            log.images("fakes", "a.png", 4000)
    assert [call[0] for call in fake.calls] == ["init", "log", "Image", "log", "finish"] * 2
    settings = fake.calls[0][2]
    assert (settings["project"], settings["name"], settings["resume"]) == ("heads", "00001-a", "allow")
    assert settings["id"] == fake.calls[5][2]["id"]
    assert fake.calls[1][1] == ({"Loss/G/loss": 1.5, "Loss/part": 1.0, "cur_nimg": 4000},)


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_wandb_that_fails_is_reported_once_and_does_not_stop_the_run(tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails))
    write_ticks(tmp_path, 1, 2, wandb_project="heads")
    assert nimgs(tmp_path) == [1, 2]
    assert capsys.readouterr().err.count("warning: Weights & Biases: no network") == 1
