"""Inversions of photos: the files they leave, and that nothing is lost or done twice, whenever they are stopped.

Most tests put cheap stand-ins in the place of the two stages; the last ones run the real ones.
"""

import dataclasses
import errno
import json

import imageio
import numpy as np
import pytest
import torch
from PIL import Image

from inference import inversion_run
from inference.inversion_request import InversionRequest, ResultSettings
from inference.inversion_results import RESULT_FILES
from inference.inversion_run import InversionStopped, invert_photos
from inference.inversion_settings import InversionSettings, ProjectionSettings, TuningSettings
from inference.inversion_work import Work
from inference.loading import load_generator
from tests.cli.running import contents
from tests.helpers.photos import SIDE, small_generator, write_network, write_photos

SETTINGS = InversionSettings(
    projection=ProjectionSettings(num_steps=5, num_w_samples=50), tuning=TuningSettings(num_steps=4)
)
VIDEO = ResultSettings(video_interval=2, video_interval_pti=2)
KEPT = dataclasses.replace(VIDEO, save_video=False)
FRAMES = ["w 0", "w 2", "w 4", "w 5", "pti 2", "pti 4"]
BY_DEFAULT = set(RESULT_FILES) - {"tuned_full.safetensors"}
WITHOUT_VIDEO = BY_DEFAULT - {"proj.mp4"}


class FakeStage:
    """A stage whose latent and picture depend on all steps so far."""

    def __init__(self, name, generator, photo, num_steps, ws, label, log):
        self.name, self.generator, self.num_steps, self.log = name, generator, num_steps, log
        self.ws, self.label, self.step_index = ws.clone(), label, 0
        self.noise_buffers = {"backbone.b4.noise": torch.ones(4, 4)} if name == "w" else {}

    finished = property(lambda self: self.step_index == self.num_steps)

    def step(self):
        self.step_index += 1
        self.ws = self.ws * 1.1 + self.step_index
        self.log.append(f"step {self.name} {self.step_index}")
        return {"loss": float(self.ws.mean())}

    def render(self):
        self.log.append(f"render {self.name} {self.step_index}")
        grey = torch.tanh(self.ws.mean() / 30)
        return grey.expand(1, 3, SIDE, SIDE).clone()

    def state_dict(self):
        return {"ws": self.ws, "step": torch.tensor(self.step_index)}

    def load_state_dict(self, state):
        self.ws, self.step_index = state["ws"].clone(), int(state["step"])


class FlatDistance:
    """Difference of mean colours; counts how often features of an image are computed."""

    name = "flat"

    def __init__(self):
        self.num_features = 0

    def features(self, image):
        self.num_features += 1
        return (image.mean(dim=(2, 3)),)

    def distance(self, image, target):
        return (image.mean(dim=(2, 3)) - target[0]).square().mean(dim=1)


@pytest.fixture(scope="module")
def generator():
    """Return the generator that all runs with stand-ins share."""
    return small_generator().requires_grad_(False)


@pytest.fixture
def log(monkeypatch, generator):
    """Replace what is expensive, and return the list of what the stand-ins did."""
    done: list[str] = []

    def projection(generator, photo, distance, settings, initial_ws=None):
        ws = torch.zeros(1, generator.backbone.num_ws, 512) if initial_ws is None else initial_ws
        distance.features(photo.image)
        return FakeStage("w", generator, photo, settings.projection.num_steps, ws, photo.label, done)

    def tuning(generator, photo, distance, settings, ws, label, noise_buffers=None):
        distance.features(photo.image)
        assert list(noise_buffers) == ["backbone.b4.noise"]
        return FakeStage("pti", generator, photo, settings.tuning.num_steps, ws, label, done)

    monkeypatch.setattr(inversion_run, "Projection", projection)
    monkeypatch.setattr(inversion_run, "PivotalTuning", tuning)
    monkeypatch.setattr(inversion_run, "load_generator", lambda *_: done.append("load") or generator)
    monkeypatch.setattr(inversion_run, "load_perceptual_distance", lambda *_: FlatDistance())
    views = [np.full((SIDE, SIDE, 3), grey, np.uint8) for grey in (10, 20, 30)]
    monkeypatch.setattr(inversion_run.results, "other_views", lambda *_: views)
    return done


@pytest.fixture
def request_of(tmp_path):
    """Return a function that makes requests for photos in a folder."""
    (tmp_path / "tiny.safetensors").write_bytes(b"a network")

    def make(names=("a.png",), outdir="out", unlabelled=(), **fields):
        photos = tmp_path / "photos"
        if not photos.exists():
            write_photos(photos, list(names), unlabelled)
        fields = {"settings": SETTINGS, "kept": KEPT, "state_interval_s": 1e6, "indices": None, **fields}
        network = fields.pop("network", str(tmp_path / "tiny.safetensors"))
        return InversionRequest(network=network, target=photos, outdir=tmp_path / outdir, **fields)

    return make


def run(request, stop_at=None):
    """Invert, and return outcomes and lines; `stop_at` stops at that question of whether to stop."""
    asked, lines = [], []

    def should_stop():
        asked.append(1)
        return stop_at is not None and len(asked) >= stop_at

    outcomes = [(outcome.status, outcome.message) for outcome in invert_photos(request, lines.append, should_stop)]
    return outcomes, lines


def comparable(folder):
    """Return the files of a folder, without the times in metrics.json."""
    files = contents(folder)
    for name in files:
        if name.endswith("metrics.json"):
            metrics = json.loads(files[name])
            for stage in metrics["stages"].values():
                assert stage.pop("seconds") >= 0
            files[name] = metrics
    return files


# Results --------------------------------------------------------------------------------------------------------------


def test_run_leaves_its_results_and_no_scratch(log, request_of, tmp_path):
    request = request_of(kept=VIDEO)
    outcomes, lines = run(request)
    folder = tmp_path / "out" / "tiny" / "a"
    assert outcomes == [("made", f"wrote {folder}")]
    assert lines == ["perceptual distance: flat; --vgg FILE takes the published one"]
    assert set(contents(folder)) == BY_DEFAULT
    with np.load(folder / "latent.npz", allow_pickle=False) as latent:
        assert latent["w"].shape[0::2] == (1, 512) and latent["w"].dtype == np.float32
        assert latent["c"].shape == (1, 25)
        assert json.loads(str(latent["settings"]))["projection"]["num_steps"] == 5
        assert (int(latent["seed"]), str(latent["network"])) == (303, request.network)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["distance"] == "flat"
    for stage, steps in (("w", 5), ("pti", 4)):
        values = metrics["stages"][stage]
        assert set(values) == {"steps", "l2", "perceptual", "psnr_db", "ssim", "seconds"}
        assert values["steps"] == steps
    assert Image.open(folder / "strip.png").size == (6 * SIDE, SIDE)


def test_strip_shows_target_both_stages_and_three_other_views(log, request_of, tmp_path):
    run(request_of())
    folder = tmp_path / "out" / "tiny" / "a"
    strip = np.asarray(Image.open(folder / "strip.png"))
    for place, name in enumerate(("target.png", "proj_w.png", "proj.png")):
        np.testing.assert_array_equal(
            strip[:, place * SIDE : (place + 1) * SIDE], np.asarray(Image.open(folder / name))
        )
    assert [int(strip[0, place * SIDE, 0]) for place in (3, 4, 5)] == [10, 20, 30]


def test_video_has_the_target_beside_each_frame_that_was_due(log, request_of, tmp_path):
    run(request_of(kept=VIDEO))
    folder = tmp_path / "out" / "tiny" / "a"
    with imageio.get_reader(folder / "proj.mp4", format="FFMPEG") as reader:
        frames = np.stack([np.asarray(frame) for frame in reader])
        assert reader.get_meta_data()["fps"] == 30
    assert frames.shape == (len(FRAMES), SIDE, 2 * SIDE, 3)
    target = np.asarray(Image.open(folder / "target.png")).astype(int)
    # After lossy coding in 4:2:0.
    assert np.abs(frames[:, :, :SIDE] - target).mean() < 6
    assert np.all(np.diff(frames[:, :, SIDE:].mean(axis=(1, 2, 3))) > 0.5)  # the stand-in gets brighter


def test_nothing_is_rendered_that_is_not_shown(log, request_of):
    run(request_of(kept=VIDEO))
    assert [entry.removeprefix("render ") for entry in log if entry.startswith("render")] == FRAMES


def test_without_video_only_the_last_pictures_are_rendered(log, request_of, tmp_path):
    run(request_of())
    assert [entry for entry in log if entry.startswith("render")] == ["render w 5", "render pti 4"]
    assert set(contents(tmp_path / "out" / "tiny" / "a")) == WITHOUT_VIDEO


def test_features_of_the_target_are_computed_once(log, request_of, monkeypatch):
    distance = FlatDistance()
    monkeypatch.setattr(inversion_run, "load_perceptual_distance", lambda *_: distance)
    run(request_of())
    assert distance.num_features == 1


def test_latent_to_start_from_is_used_and_must_be_one(log, request_of, tmp_path, generator):
    num_ws = generator.backbone.num_ws
    results = {}
    for name, w in {"zero": np.zeros((1, num_ws, 512)), "one": np.ones((1, num_ws, 512))}.items():
        np.savez(tmp_path / f"{name}.npz", w=w)
        run(request_of(outdir=name, latent=tmp_path / f"{name}.npz"))
        results[name] = np.load(tmp_path / name / "tiny" / "a" / "latent.npz")["w"]
    assert np.all(results["one"] > results["zero"])
    np.savez(tmp_path / "two.npz", w=np.zeros((2, num_ws, 512)))
    with pytest.raises(ValueError, match="two.npz: w: expected one latent, got 2"):
        run(request_of(outdir="two", latent=tmp_path / "two.npz"))


# Stopping and going on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [[1] * 9, [10], [11], [12]], ids=str)
def test_run_that_is_stopped_goes_on_to_the_same_files_and_renders_nothing_twice(log, request_of, tmp_path, stops):
    """It is asked whether to stop after each of the 5 and 4 steps, and three times between the results."""
    run(request_of(kept=VIDEO, outdir="whole"))
    whole, log[:] = list(log), []
    for stop_at in stops:
        with pytest.raises(InversionStopped, match="a: stopped after .* the same command goes on from there"):
            run(request_of(kept=VIDEO, outdir="stopped"), stop_at)
    folder = tmp_path / "stopped" / "tiny" / "a"
    assert not (folder / "metrics.json").exists()
    _, lines = run(request_of(kept=VIDEO, outdir="stopped"))
    assert f"{folder}: goes on where it stopped, after 0 s of work" in lines
    assert comparable(tmp_path / "stopped") == comparable(tmp_path / "whole")
    # Between the results, the last picture is rendered again, because only 8 bits of it were kept.
    again = ["render pti 4"] if stops[0] >= 10 else []
    assert [entry for entry in log if entry != "load"] == [entry for entry in whole if entry != "load"] + again


@pytest.mark.parametrize("interval_s", [0, 1e6])
def test_run_that_dies_at_every_picture_goes_on_to_the_same_files(log, request_of, tmp_path, monkeypatch, interval_s):
    """With the state of the last step, or with that of the last stage."""
    run(request_of(kept=VIDEO, outdir="whole"))
    render, deaths = FakeStage.render, []

    def render_or_die(self):
        if (self.name, self.step_index) not in deaths:
            deaths.append((self.name, self.step_index))
            raise ZeroDivisionError
        return render(self)

    monkeypatch.setattr(FakeStage, "render", render_or_die)
    for _ in FRAMES:
        with pytest.raises(ZeroDivisionError):
            run(request_of(kept=VIDEO, outdir="died", state_interval_s=interval_s))
    run(request_of(kept=VIDEO, outdir="died", state_interval_s=interval_s))
    assert [f"{name} {step}" for name, step in deaths] == FRAMES
    assert comparable(tmp_path / "died") == comparable(tmp_path / "whole")


def test_state_after_every_step_is_where_a_killed_run_goes_on(log, request_of, monkeypatch):
    step = FakeStage.step

    def step_until_killed(self):
        if (self.name, self.step_index) == ("pti", 3):
            raise ZeroDivisionError
        return step(self)

    monkeypatch.setattr(FakeStage, "step", step_until_killed)
    with pytest.raises(ZeroDivisionError):
        run(request_of(state_interval_s=0))
    monkeypatch.setattr(FakeStage, "step", step)
    log.clear()
    run(request_of(state_interval_s=0))
    assert [entry for entry in log if entry.startswith("step")] == ["step pti 4"]


def test_done_photo_is_passed_over_without_loading_a_network(log, request_of, tmp_path):
    run(request_of())
    before, log[:] = contents(tmp_path), []
    outcomes, lines = run(request_of())
    assert outcomes == [("done before", f"{tmp_path / 'out' / 'tiny' / 'a'}: done already")]
    assert (log, lines, contents(tmp_path)) == ([], [], before)


CHANGES = {
    "settings.projection.num_steps was 5, and is 6 now": {
        "settings": dataclasses.replace(SETTINGS, projection=ProjectionSettings(num_steps=6, num_w_samples=50))
    },
    "settings.seed was 303, and is 1 now": {"settings": dataclasses.replace(SETTINGS, seed=1)},
    "results.fps was 30, and is 25 now": {"kept": dataclasses.replace(KEPT, fps=25)},
    'vgg was null, and is "https://example.org/vgg16.pt" now': {"vgg": "https://example.org/vgg16.pt"},
    "network was": {"network": "init:debug"},
}


@pytest.mark.parametrize(("difference", "stop_at"), [*((name, None) for name in CHANGES), ([*CHANGES][0], 3)])
def test_other_settings_are_an_error_that_names_one_and_replace_only_if_allowed(
    log, request_of, tmp_path, monkeypatch, difference, stop_at
):
    monkeypatch.setattr("inference.inversion_request.source_name", lambda _: "tiny")
    try:
        run(request_of(), stop_at)
    except InversionStopped:
        pass
    before = contents(tmp_path / "out")
    [(status, message)], _ = run(request_of(**CHANGES[difference]))
    assert status == "failed"
    kind = "result" if stop_at is None else "unfinished run"
    assert f"{tmp_path / 'out' / 'tiny' / 'a'} holds the {kind} of another command: {difference}" in message
    assert message.endswith("give --overwrite to replace it")
    assert contents(tmp_path / "out") == before
    assert run(request_of(**CHANGES[difference], overwrite=True))[0][0][0] == "made"
    assert run(request_of(**CHANGES[difference], overwrite=True))[0][0][0] == "done before"


def test_run_that_never_got_anywhere_is_not_in_the_way(log, request_of, monkeypatch):
    step = FakeStage.step
    monkeypatch.setattr(FakeStage, "step", lambda self: die())
    with pytest.raises(ZeroDivisionError):
        run(request_of())
    monkeypatch.setattr(FakeStage, "step", step)
    settings = dataclasses.replace(SETTINGS, seed=1)
    assert run(request_of(settings=settings))[0][0][0] == "made"


def die():
    raise ZeroDivisionError


def test_changed_photo_is_not_taken_for_the_one_before(log, request_of, tmp_path):
    run(request_of())
    Image.fromarray(np.full((SIDE, SIDE, 3), 99, np.uint8)).save(tmp_path / "photos" / "a.png")
    [(status, message)], _ = run(request_of())
    assert status == "failed" and ": photo was " in message


@pytest.mark.parametrize("changed", ["camera", "mask", "latent"])
def test_changed_camera_mask_or_latent_is_not_taken_for_the_one_before(log, request_of, tmp_path, generator, changed):
    request = request_of()
    label = json.loads((tmp_path / "photos" / "dataset.json").read_text())["labels"][0][1]
    Image.new("L", (SIDE, SIDE), 255).save(tmp_path / "mask.png")
    np.savez(tmp_path / "start.npz", w=np.zeros((1, generator.backbone.num_ws, 512)))
    label[16] *= 1.5
    given = {
        "camera": {"camera": json.dumps(label), "target": request.target / "a.png"},
        "mask": {"mask": tmp_path / "mask.png"},
        "latent": {"latent": tmp_path / "start.npz"},
    }
    run(request)
    [(status, message)], _ = run(dataclasses.replace(request, **given[changed]))
    assert status == "failed" and f"of another command: {changed}" in message


def test_files_of_others_are_not_replaced(log, request_of, tmp_path):
    folder = tmp_path / "out" / "tiny" / "a"
    folder.mkdir(parents=True)
    (folder / "proj.png").write_bytes(b"precious")
    [(status, message)], _ = run(request_of())
    assert (status, contents(folder)) == ("failed", {"proj.png": b"precious"})
    assert message == f"{folder / 'proj.png'} is there already; give --overwrite to replace it"
    assert run(request_of(overwrite=True))[0][0][0] == "made"
    assert set(contents(folder)) == WITHOUT_VIDEO


def test_resume_false_starts_anew_and_replaces_results_only_if_allowed(log, request_of):
    with pytest.raises(InversionStopped):
        run(request_of(), stop_at=4)
    log.clear()
    run(request_of(resume=False))
    assert log[1] == "step w 1"
    [(status, message)], _ = run(request_of(resume=False))
    assert status == "failed" and "is done already; give --overwrite to make it anew" in message
    log.clear()
    assert run(request_of(resume=False, overwrite=True))[0][0][0] == "made"
    assert "step w 1" in log


def test_damaged_notes_of_a_run_are_in_the_way(log, request_of, tmp_path):
    with pytest.raises(InversionStopped):
        run(request_of(), stop_at=4)
    (tmp_path / "out" / "tiny" / "a" / ".work" / "run.json").write_text("{")
    [(status, message)], _ = run(request_of())
    assert status == "failed" and "run.json: expected a JSON object" in message
    assert run(request_of(overwrite=True))[0][0][0] == "made"


# Several photos -------------------------------------------------------------------------------------------------------


def test_bad_photos_do_not_keep_the_others_from_it(log, request_of, tmp_path):
    request = request_of(["a.png", "b ü.png", "c.png", "d.png"], unlabelled=("c.png",))
    (tmp_path / "photos" / "a.png").write_bytes((tmp_path / "photos" / "a.png").read_bytes()[:60])
    outcomes, _ = run(request)
    assert [status for status, _ in outcomes] == ["failed", "made", "failed", "made"]
    assert "a.png" in outcomes[0][1]
    assert "c.png" in outcomes[2][1] and "label" in outcomes[2][1]
    assert set(contents(tmp_path / "out" / "tiny" / "b ü")) == WITHOUT_VIDEO
    assert not (tmp_path / "out" / "tiny" / "c").exists()


def test_diverged_photo_fails_and_keeps_its_state(log, request_of, tmp_path, monkeypatch):
    def diverge(self):
        raise ValueError("tuning, step 0: expected a finite loss")

    step = FakeStage.step
    monkeypatch.setattr(FakeStage, "step", lambda self: diverge(self) if self.name == "pti" else step(self))
    [(status, message)], _ = run(request_of())
    assert (status, message) == ("failed", "tuning, step 0: expected a finite loss")
    assert Work(tmp_path / "out" / "tiny" / "a", 0).load().stage == "pti"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_disk_that_takes_nothing_ends_the_run(log, request_of, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "the disk takes nothing")

    monkeypatch.setattr(inversion_run, "save_png", refuse)
    with pytest.raises(OSError, match="the disk takes nothing"):
        run(request_of(["a.png", "b.png"]))


def test_photos_are_shared_between_processes(log, request_of, tmp_path, monkeypatch):
    names = ["a.png", "b.png", "c.png"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = {}
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        made[rank] = [message for _, message in run(request_of(names))[0]]
    folder = tmp_path / "out" / "tiny"
    assert made == {"0": [f"wrote {folder / 'a'}", f"wrote {folder / 'c'}"], "1": [f"wrote {folder / 'b'}"]}


def test_photo_that_another_process_works_on_fails(log, request_of, tmp_path):
    pytest.importorskip("fcntl")
    with Work(tmp_path / "out" / "tiny" / "a", 0).locked():
        [(status, message)], _ = run(request_of())
    assert status == "failed" and "no other process at work here" in message


# Requests -------------------------------------------------------------------------------------------------------------


def test_plan_says_what_is_there_and_loads_nothing(log, request_of, tmp_path):
    names = ["a.png", "b.png", "c.png", "d.png", "e.png"]
    run(request_of(names, indices=(0,)))
    with pytest.raises(InversionStopped):
        run(request_of(indices=(1,)), stop_at=1)
    (tmp_path / "out" / "tiny" / "d").mkdir()
    (tmp_path / "out" / "tiny" / "d" / "proj.mp4").write_bytes(b"")
    (tmp_path / "photos" / "dataset.json").write_text(
        json.dumps({"labels": json.loads((tmp_path / "photos" / "dataset.json").read_text())["labels"][:4]})
    )
    log.clear()
    photos = request_of().plan()["photos"]
    assert [photo["status"] for photo in photos] == ["done", "unfinished", "new", "in the way", "defective"]
    assert [photo["index"] for photo in photos] == [0, 1, 2, 3, 4]
    assert photos[0]["reason"] is None and "proj.mp4" in photos[3]["reason"]
    assert not log


def test_indices_choose_photos_in_their_order(request_of):
    jobs = request_of(["a.png", "b.png", "c.png"], indices=(2, 0)).jobs()
    assert [job.file.name for job in jobs] == ["c", "a"]
    with pytest.raises(ValueError, match=r"--idx: expected 0 to 2, 3 photos in .*photos, got 3"):
        request_of(indices=(3,)).jobs()


def test_subfolder_is_one_of_the_output_too(request_of, tmp_path):
    request_of()
    write_photos(tmp_path / "photos" / "sub" / "x", ["b.png"])
    for subfolder in ("sub/x", "sub/x/b.png"):
        (job,) = request_of(subfolder=subfolder).jobs()
        assert job.folder == tmp_path / "out" / "tiny" / "sub" / "x" / "b"
    for bad in ("../photos", "/photos"):
        with pytest.raises(ValueError, match="--filename"):
            request_of(subfolder=bad)


@pytest.mark.parametrize("outdir", ["photos/out", "photos"])
def test_results_beside_the_photos_are_not_taken_for_photos(log, request_of, outdir):
    run(request_of(["a.png"], outdir=outdir))
    assert [status for status, _ in run(request_of(outdir=outdir))[0]] == ["done before"]


def test_local_network_of_other_contents_is_another_network(log, request_of, tmp_path):
    run(request_of())
    (tmp_path / "tiny.safetensors").write_bytes(b"another network")
    [(status, message)], _ = run(request_of())
    assert status == "failed" and "network was" in message


# The real stages ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Return a request with a small network and one photo, and what it makes without interruption."""
    folder = tmp_path_factory.mktemp("real")
    network = write_network(folder / "small.safetensors")
    write_photos(folder / "photos", ["a.png"])
    request = InversionRequest(
        network=str(network),
        target=folder / "photos",
        outdir=folder / "whole",
        settings=dataclasses.replace(
            SETTINGS,
            projection=ProjectionSettings(num_steps=2, num_w_samples=50),
            tuning=TuningSettings(num_steps=2),
        ),
        kept=dataclasses.replace(KEPT, export_full=True),
    )
    assert [outcome.status for outcome in invert_photos(request, lambda _: None)] == ["made"]
    return request, folder / "whole" / "small" / "a"


def test_tuned_network_makes_the_picture_and_is_that_of_the_whole_export(real):
    _, folder = real
    tuned, full = load_generator(folder / "tuned.safetensors"), load_generator(folder / "tuned_full.safetensors")
    torch.testing.assert_close(tuned.state_dict(), full.state_dict(), rtol=0, atol=0)  # exact by default
    assert tuned.config == full.config
    assert tuned.config.rendering.ray_start == 2.35  # published
    with np.load(folder / "latent.npz") as latent:
        ws, label = torch.from_numpy(latent["w"]), torch.from_numpy(latent["c"])
    image = inversion_run.results.colors(tuned.synthesis(ws, label, noise_mode="const")["image"].detach())
    shown = np.asarray(Image.open(folder / "proj.png")).astype(int)
    base = np.asarray(Image.open(folder / "proj_w.png")).astype(int)
    # Ray samples are placed at random, so that the two differ, but less than by the tuning.
    assert np.abs(image - shown).mean() < 0.5 * np.abs(base - shown).mean()


def test_real_run_that_is_stopped_goes_on_to_the_same_files(real, tmp_path):
    request, folder = real
    request = dataclasses.replace(request, outdir=tmp_path)
    for _ in range(3):  # twice in the first stage, once in the second
        with pytest.raises(InversionStopped):
            run(request, stop_at=1)
    run(request)
    whole = comparable(folder)
    for name, file in comparable(tmp_path / "small" / "a").items():
        if name != "tuned.safetensors":  # has the path of its base relative to itself
            assert file == whole[name], name
    tuned = [load_generator(path / "tuned.safetensors") for path in (tmp_path / "small" / "a", folder)]
    torch.testing.assert_close(tuned[0].state_dict(), tuned[1].state_dict(), rtol=0, atol=0)
