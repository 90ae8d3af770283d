"""calc_metrics.py: options, where data and lines are, tables, comparisons, and two processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

import calc_metrics
from dnnlib import serialize
from metrics.evaluation import Evaluation, EvaluationSettings
from metrics.metric_main import PRESETS, MetricResult
from metrics.registry import Curve, Metric, MetricValues
from metrics.results import read_records
from tests.cli.running import fail, invoke, start, succeed
from tests.helpers.head_data import HeadFiles
from tests.helpers.tiny import tiny_network
from training.config import SuperresolutionConfig
from training.snapshots import save_networks
from training.train_config import DataConfig

SIDE, COUNT = 64, 12
SCRIPT = "calc_metrics.py"


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> DataConfig:
    """Return a data set of the size of the network below."""
    return HeadFiles(COUNT, side=SIDE).write(tmp_path_factory.mktemp("metrics-data"), zipped=True)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Return a file with a tiny network."""
    small = SuperresolutionConfig(variant="Superresolution2XSmall")
    path = tmp_path_factory.mktemp("metrics-network") / "tiny.safetensors"
    save_networks(path, {"G_ema": tiny_network(img_resolution=SIDE, superresolution=small)}, {})
    return path


@pytest.fixture
def network(weights, data, tmp_path) -> Path:
    """Return a network in the folder of its run."""
    path = tmp_path / "run" / "net.safetensors"
    path.parent.mkdir()
    os.link(weights, path)
    (path.parent / "options.json").write_text(json.dumps({"config": {"data": serialize.to_json(data)}}))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    """Keep the caches of these tests apart."""
    monkeypatch.setattr(calc_metrics, "default_cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


class FakeMetrics:
    """Stands for `compute_metrics`: the value of a metric is the number of real images, and there is nothing behind."""

    def __init__(self) -> None:
        self.evaluations: list[Evaluation] = []
        self.fails_at: str | None = None

    def __call__(self, metrics: Sequence[Metric], evaluation: Evaluation) -> Iterator[MetricResult]:
        self.evaluations.append(evaluation)
        for metric in metrics:
            if metric.name == self.fails_at:
                raise ValueError("network: expected finite pixel values,\ncame NaN")
            curve = None
            if "yaw" in metric.name:
                x = tuple(-180 + 45.0 * i for i in range(8))
                curve = Curve(x_name="yaw_deg", x=x, y_name="frechet distance", y=(None, *range(7)))
            values = MetricValues(values={metric.name: float(len(evaluation.dataset))}, curve=curve)
            yield MetricResult(metric=metric.name, values=values, seconds=1.0)


@pytest.fixture
def fake(monkeypatch) -> FakeMetrics:
    fake = FakeMetrics()
    monkeypatch.setattr(calc_metrics, "compute_metrics", fake)
    return fake


def plan(*arguments) -> dict:
    return json.loads(succeed(SCRIPT, *arguments, "--dry-run").stdout)


def lines(folder: Path, metric: str = "fd8_full") -> list[dict]:
    return read_records(folder / f"metric-{metric}.jsonl")


# Options --------------------------------------------------------------------------------------------------------------


def test_list_names_metrics_and_presets_and_needs_no_network():
    shown = succeed(SCRIPT, "--list").stdout
    for name in ("fid", "view_accuracy", "back_face_rate", "mv_consistency", "quick", "full"):
        assert name in shown


def test_bundled_network_is_the_default_and_measured_with_synthetic_heads():
    given = plan()
    assert given["network"] == "demo" and given["data"] == ["synth"]
    assert plan("--data", "synth:8x2")["data"] == ["synth:8x2"]


def test_options_before_a_command_are_refused():
    line = fail(SCRIPT, "--metrics", "fid50k_full", "compare", "a.pkl", "b.pkl")
    assert "--metrics: expected behind compare, came before it" in line


def test_quick_is_the_default_and_needs_no_download(network):
    assert tuple(plan("--network", network)["metrics"]) == PRESETS["quick"]


def test_dry_run_says_what_would_be_done_and_makes_nothing(network, own_cache):
    before = sorted(network.parent.iterdir())
    shown = plan("--network", network, "--metrics", "fd-random8_full, FD8_full,fd8_full", "--trunc", 0.7, "--seed", 3)
    assert shown["metrics"] == ["fd_random8_full", "fd8_full"]
    assert (shown["settings"]["truncation_psi"], shown["settings"]["seed"]) == (0.7, 3)
    assert shown["settings"]["cache_dir"] == str(own_cache)
    assert shown["folders"] == {"net": str(network.parent)}
    assert sorted(network.parent.iterdir()) == before and not own_cache.exists()


SETTINGS = [
    ("--mode back", "mode", "back"),
    ("--batch 16", "batch_size", 16),
    ("--detector inception", "detector", "inception"),
    ("--segmenter seg.pt", "segmenter", "seg.pt"),
    ("--vgg vgg.pt", "vgg", "vgg.pt"),
    ("--yaw-bins 12", "num_yaw_bins", 12),
    ("--workers 0", "workers", 0),
    ("--render-ahead", "render_ahead", True),
    ("--cache-dir here", "cache_dir", "here"),
    ("--no-cache", "cache_dir", None),
    ("--verbose False", "progress", False),
    ("--trunc-cutoff 7", "truncation_cutoff", 7),
]


@pytest.mark.parametrize(("option", "field", "expected"), SETTINGS, ids=[row[0] for row in SETTINGS])
def test_option_sets_its_field(network, option, field, expected):
    settings = plan("--network", network, "--device", "cpu", *option.split())["settings"]
    assert settings[field] == expected
    assert settings.keys() == {field.name for field in dataclasses.fields(EvaluationSettings)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "fid"], "metric: expected one of .*came 'fid'"),
        (["--metrics", "none"], "--metrics: expected at least one metric, got 'none'"),
        (["--metrics", ","], "came ''"),
        (["--data", "absent.zip"], "absent.zip"),
        (["--data", "synth:0x0"], "--data: expected synth or synth:IDENTITIESxVIEWS"),
        (["--data", "synth", "--seg-data", "m.zip"], "--data synth: expected no other data"),
        (["--seg-data", "masks.zip"], "--seg-data: expected --img-data with it"),
        (["--cache-dir", "here", "--no-cache"], "--cache-dir: expected none together with --no-cache"),
        (["--device", "cuda:7"], "device: expected"),
        (["--network", "absent.pkl"], "absent.pkl: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_option_is_one_line(network, fake, arguments, message):
    line = fail(SCRIPT, "--network", network, *arguments)
    assert re.search(message, line), line


def test_compare_help_has_examples_that_parse():
    text = calc_metrics.compare.help.partition("Examples:\n")[2]
    found = [line.strip() for line in text.splitlines() if line.strip()]
    assert len(found) >= 2
    for line in found:
        words = shlex.split(line)
        assert words[:3] == ["python", SCRIPT, "compare"]
        assert calc_metrics.compare.make_context("compare", words[3:]).params["networks"]


# Data -----------------------------------------------------------------------------------------------------------------


def test_without_data_those_of_the_run_are_taken(network, fake, data):
    succeed(SCRIPT, "--network", network, "--metrics", "fd8_full")
    (evaluation,) = fake.evaluations
    assert evaluation.dataset.config.images == data.images
    assert len(evaluation.dataset) == COUNT and evaluation.dataset.has_masks
    assert evaluation.generator.img_resolution == SIDE


def test_given_data_go_before_those_of_the_run_and_mirror_doubles_them(network, fake, tmp_path):
    other = HeadFiles(3, side=SIDE).write(tmp_path / "other")
    arguments = ["--data", other.images[0], "--seg-data", other.masks[0], "--mirror"]
    succeed(SCRIPT, "--network", network, "--metrics", "fd8_full", *arguments)
    assert lines(network.parent)[0]["results"] == {"fd8_full": 6.0}


def test_synthetic_data_are_made_in_the_cache_once(network, fake, own_cache):
    command = ["--network", network, "--metrics", "fd8_full", "--data", "synth:2x2"]
    assert "synthetic heads" in succeed(SCRIPT, *command).stderr
    assert "synthetic heads" not in succeed(SCRIPT, *command).stderr
    assert (own_cache / f"synthetic-heads-{SIDE}px-2x2" / "images.zip").is_file()
    assert len(fake.evaluations[0].dataset) == 4


def test_without_cache_nothing_is_kept_but_evaluations_share_a_folder(network, fake, own_cache):
    succeed(SCRIPT, "compare", f"a={network}", f"b={network}", "--metrics", "fd8_full", "--no-cache")
    used = {evaluation.settings.cache_dir for evaluation in fake.evaluations}
    assert len(used) == 1 and not used.pop().exists()
    assert not own_cache.exists()


def test_untrained_network_without_data_asks_for_them(fake):
    assert "--data" in fail(SCRIPT, "--network", "init:debug", "--metrics", "fd8_full")


def test_data_of_another_size_are_refused(network, fake, tmp_path):
    other = HeadFiles(2, side=32).write(tmp_path / "other")
    line = fail(SCRIPT, "--network", network, "--metrics", "fd8_full", "--data", other.images[0])
    assert "data: expected images of 64 px, as the network makes, got '32 px in " in line


# Lines and tables -----------------------------------------------------------------------------------------------------


def test_results_go_beside_a_network_of_a_run_and_are_added_to(network, fake):
    for _ in range(2):
        shown = succeed(SCRIPT, "--network", network, "--metrics", "fd8_full,fd_yaw8_full").stdout
    assert [line["snapshot_pkl"] for line in lines(network.parent)] == ["net.safetensors"] * 2
    assert lines(network.parent, "fd_yaw8_full")[0]["curve"]["y"][:2] == [None, 0]
    assert shown.splitlines()[0].split() == ["metric", "value", "time"]
    assert "by yaw_deg" in shown


def test_results_of_a_network_elsewhere_are_shown_and_kept_where_asked(weights, data, fake, tmp_path):
    command = ["--network", weights, "--data", data.images[0], "--metrics", "fd8_full"]
    assert "fd8_full" in succeed(SCRIPT, *command).stdout
    assert list(weights.parent.iterdir()) == [weights]
    succeed(SCRIPT, *command, "--outdir", tmp_path / "new" / "out")
    assert lines(tmp_path / "new" / "out")[0]["snapshot_pkl"] == str(weights)


def test_format_json_prints_the_lines_alone(network, fake):
    shown = succeed(SCRIPT, "--network", network, "--metrics", "fd8_full,kd8_full", "--format", "json").stdout
    assert [json.loads(line) for line in shown.splitlines()] == lines(network.parent) + lines(
        network.parent, "kd8_full"
    )


def test_failure_in_a_metric_is_one_line_below_what_there_is(network, fake):
    fake.fails_at = "kd8_full"
    result = invoke(SCRIPT, "--network", network, "--metrics", "fd8_full,kd8_full")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "Error: network: expected finite pixel values, came NaN"
    assert "fd8_full" in result.stdout and len(lines(network.parent)) == 1


def test_outdir_below_a_file_is_refused_before_anything_is_computed(network, fake, tmp_path):
    (tmp_path / "file").touch()
    assert "file" in fail(SCRIPT, "--network", network, "--outdir", tmp_path / "file" / "out")
    assert not fake.evaluations


# Comparisons ----------------------------------------------------------------------------------------------------------


def test_compare_shows_one_table_and_draws_one_picture(network, weights, data, fake, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib, the extra plots")
    arguments = ["--data", data.images[0], "--metrics", "fd8_full,fd_yaw8_full", "--out", tmp_path / "a" / "c.png"]
    shown = succeed(SCRIPT, "compare", network, f"other={weights}", *arguments).stdout
    assert [line.split()[0] for line in shown.splitlines()[:3]] == ["network", "net", "other"]
    assert shown.splitlines()[-1] == f"wrote {tmp_path / 'a' / 'c.png'}"
    assert Image.open(tmp_path / "a" / "c.png").size[0] > 300
    assert len(lines(network.parent)) == 1  # the network of a run has its line


def test_compare_without_a_curve_says_that_there_is_no_picture(network, fake, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib, the extra plots")
    result = succeed(SCRIPT, "compare", network, "--metrics", "fd8_full", "--out", tmp_path / "c.png")
    assert "nothing to draw" in result.stderr and not (tmp_path / "c.png").exists()


def test_compare_picture_that_cannot_be_drawn_is_refused_first(network, fake, tmp_path, monkeypatch):
    assert "ends in one of .png" in fail(SCRIPT, "compare", network, "--out", tmp_path / "c.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert ".[plots]" in fail(SCRIPT, "compare", network, "--out", tmp_path / "c.png")
    assert not fake.evaluations


def test_compare_networks_of_different_data_asks_for_some(network, weights, fake, tmp_path):
    other = HeadFiles(3, side=SIDE).write(tmp_path / "other")
    (tmp_path / "run2").mkdir()
    os.link(weights, tmp_path / "run2" / "net.safetensors")
    (tmp_path / "run2" / "options.json").write_text(json.dumps({"config": {"data": serialize.to_json(other)}}))
    line = fail(SCRIPT, "compare", network, f"b={tmp_path / 'run2' / 'net.safetensors'}", "--metrics", "fd8_full")
    assert "data of b: expected data that are the same for all, or --data" in line
    assert not fake.evaluations


@pytest.mark.parametrize(
    ("networks", "labels"),
    [
        (["x/a.pkl", "y/b.pkl"], ["a", "b"]),
        (["x/a.pkl", "y/a.pkl"], ["x/a.pkl", "y/a.pkl"]),
        (["one=x/a.pkl", "two two=x/a.pkl"], ["one", "two two"]),
        (["https://example.org/a.pkl?x=1", "init:debug"], ["a", "debug"]),
    ],
)
def test_compare_labels_tell_networks_apart(networks, labels):
    assert list(calc_metrics._labelled(tuple(networks))) == labels


def test_compare_same_label_twice_is_refused():
    assert "before=a.pkl after=b.pkl" in fail(SCRIPT, "compare", "a=x.pkl", "a=y.pkl")


# Processes, with nothing faked ----------------------------------------------------------------------------------------


class Quadrants(torch.nn.Module):
    """Mean colours of the quarters of pictures: a detector that is quick."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    """Return a TorchScript file."""
    path = tmp_path_factory.mktemp("detector") / "quadrants.pt"
    torch.jit.trace(Quadrants(), torch.zeros(1, 3, SIDE, SIDE)).save(str(path))
    return path


def real_command(network: Path, detector: Path, cache: Path, *more) -> list:
    metrics = ["--metrics", "fd10_full,fd_random10_full,kd6_full", "--detector", detector, "--cache-dir", cache]
    return ["--network", network, *metrics, "--device", "cpu", "--verbose", "false", "--workers", 0, *more]


def finish(process) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def test_two_processes_and_one_find_the_same_and_the_cache_changes_nothing(network, detector, tmp_path):
    alone, again = tmp_path / "alone", tmp_path / "again"
    for outdir in (alone, again):
        succeed(SCRIPT, *real_command(network, detector, tmp_path / "kept", "--outdir", outdir))
    command = real_command(network, detector, tmp_path / "other", "--gpus", 2)
    out, _ = finish(start([SCRIPT, *command]))
    assert out.count("fd_random10_full") == 1  # one of the processes prints
    for metric in ("fd10_full", "fd_random10_full", "kd6_full"):
        ((first,), (second,), (shared,)) = (lines(folder, metric) for folder in (alone, again, network.parent))
        assert first["results"][metric] > 0 or metric == "kd6_full"
        assert first["results"] == second["results"]  # real statistics from the cache
        # Sums over two processes are added in another order.
        assert shared["results"] == pytest.approx(first["results"], rel=1e-6, abs=1e-9)
        assert (first["num_gpus"], shared["num_gpus"]) == (1, 2)
        assert first["detectors"][0]["resize"]


def test_nan_in_a_network_is_one_line(weights, data, detector, tmp_path):
    small = SuperresolutionConfig(variant="Superresolution2XSmall")
    generator = tiny_network(img_resolution=SIDE, superresolution=small)
    with torch.no_grad():
        next(generator.superresolution.parameters()).fill_(float("nan"))
    save_networks(tmp_path / "nan.safetensors", {"G_ema": generator}, {})
    command = real_command(tmp_path / "nan.safetensors", detector, tmp_path / "cache", "--data", data.images[0])
    assert "network: expected finite pixel values, came NaN" in fail(SCRIPT, *command)


def test_interrupted_command_ends_with_one_line(network, detector, tmp_path):
    more = ["--metrics", "fd100k_full"]  # hours
    process = start([SCRIPT, *real_command(network, detector, tmp_path / "cache", *more)])
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("statistics/*.safetensors")):  # of real images; then it renders
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == "Error: interrupted" and "Traceback" not in err
