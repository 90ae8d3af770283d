"""The scratch folder of an inversion: states, frames, locks, and what killed runs leave behind."""

import numpy as np
import pytest
import torch

from inference.inversion_work import Progress, Work, first_difference, read_json


@pytest.fixture
def work(tmp_path):
    """Return the scratch folder of a photo, empty."""
    return Work(tmp_path / "photo", interval_s=0)


def test_state_comes_back_as_it_was_saved(work):
    progress = Progress(
        stage="pti",
        seconds={"w": 1.5, "pti": 0.25},
        results={"w": {"l2": 0.5, "psnr_db": None}},
        stepper={"step": torch.tensor(3), "adam.w.exp_avg": torch.randn(2, 3)},
        pivot={"ws": torch.randn(1, 4, 5), "noise/b4.noise": torch.randn(4, 4)},
    )
    work.save(progress)
    loaded = work.load()
    assert (loaded.stage, loaded.seconds, loaded.results) == ("pti", progress.seconds, progress.results)
    for name in ("stepper", "pivot"):
        saved, came = getattr(progress, name), getattr(loaded, name)
        assert saved.keys() == came.keys()
        assert all(torch.equal(saved[key], came[key]) for key in saved)


def test_state_is_the_beginning_where_there_is_none_and_says_whether_a_stage_has_begun(work):
    assert work.load() == Progress()
    work.save(Progress(stage="pti", pivot={"ws": torch.zeros(1)}))
    assert work.load().stepper is None


def test_damaged_state_is_an_error_that_says_what_to_do(work):
    work.save(Progress(stepper={"step": torch.tensor(3)}))
    state = work.path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"state.safetensors: .*cut off.*--resume false"):
        work.load()


def test_states_are_as_far_apart_as_asked_and_saving_takes_little_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("inference.inversion_work.write_tensor_file", lambda *_: now.__setitem__(0, now[0] + 3))
    work = Work(tmp_path, interval_s=30)
    due = []
    for _ in range(200):
        now[0] += 1
        if work.is_save_due():
            due.append(now[0])
            work.save(Progress())
    assert due == [30, 93, 156]  # after 30 s; then every 60 s, which is 20 times as long as saving takes


def test_state_after_every_step_where_the_interval_is_0(work):
    assert work.is_save_due()
    work.save(Progress())
    assert work.is_save_due()


def test_lock_keeps_another_run_out_until_the_first_has_ended(work):
    pytest.importorskip("fcntl")
    with work.locked(), pytest.raises(ValueError, match="no other process at work here"):
        with Work(work.path.parent, 0).locked():
            pass
    with Work(work.path.parent, 0).locked():
        pass


def test_frames_come_in_the_order_of_stages_and_steps(work):
    for stage, step, grey in (("pti", 10, 200), ("w", 0, 50), ("w", 1000, 150), ("w", 20, 100)):
        work.save_frame(stage, step, np.full((8, 8, 3), grey, np.uint8))
    means = [frame.mean() for frame in work.frames(("w", "pti"))]
    np.testing.assert_allclose(means, [50, 100, 150, 200], atol=1)  # JPEG
    assert work.frame_path("w", 20).exists()


def test_plan_is_what_was_noted_and_goes_first(work):
    assert work.plan() is None
    work.begin({"seed": 3})
    assert work.plan() == {"seed": 3}
    work.save(Progress())
    work.save_frame("w", 0, np.zeros((8, 8, 3), np.uint8))
    work.clear()
    assert work.plan() is None
    assert not [path for path in work.path.rglob("*") if path.is_file()]
    work.remove()
    assert not work.path.exists()


def test_left_overs_of_killed_writes_are_removed_and_nothing_else(work):
    folder = work.path.parent
    work.begin({})
    keep = [folder / "notes.txt", folder / ".mine.12-ab.tmp.txt", folder / "strip.png", work.path / "run.json"]
    for path in keep[:3]:
        path.write_bytes(b"precious")
    for path in (folder / ".strip.12-abcd0123.tmp.png", work.path / ".state.12-abcd0123.tmp.safetensors"):
        path.write_bytes(b"half")
    work.remove_stale_temps(["strip.png", "latent.npz"])
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(keep)


def test_first_difference_names_the_place():
    before, now = {"a": {"b": 1, "c": [1, 2]}, "d": None}, {"a": {"b": 1, "c": [1, 3]}, "d": None}
    assert first_difference(before, before) is None
    assert first_difference(before, now) == "a.c was [1, 2], and is [1, 3] now"
    assert first_difference({}, {"e": "x" * 99}).startswith('e was null, and is "xxxx')
    assert first_difference({"old": 1}, {}) == "old was 1, and is null now"


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_json_that_is_none_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json: expected a JSON object"):
        read_json(tmp_path / "a.json")
    assert read_json(tmp_path / "absent.json") is None
