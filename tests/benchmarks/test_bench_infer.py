"""The benchmark of inference runs end to end on a tiny network and writes what it says. Speed is not asserted."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import bench_infer
from benchmarks.measure import markdown_table, measure
from inference.sampling import strip_labels
from tests.helpers.threads import one_thread  # noqa: F401 (a fixture for every test)
from torch_utils import native
from training.triplane import TriPlaneGenerator

CPU = torch.device("cpu")
STRIP_VIEWS, ORBIT_FRAMES = 3, 2  # few, which is faster
STAGES = (
    "mapping",
    "backbone",
    "projection",
    "background",
    "renderer",
    "superresolution",
    "planes",
    "image",
    "strip",
    "orbit",
    "grid",
)


def run(*arguments: str):
    return CliRunner().invoke(bench_infer.benchmark, ["--config", "debug", "--device", "cpu", *arguments])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """Return the JSON and the text of a quick run with few frames and voxels, and a chunk that the grid exceeds."""
    file = tmp_path_factory.mktemp("benchmark") / "results.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_infer, "ORBIT_FRAMES", ORBIT_FRAMES)
        patch.setattr(bench_infer, "strip_labels", lambda generator: strip_labels(generator)[:STRIP_VIEWS])
        patch.setattr(bench_infer, "GRID_RESOLUTION", 8)
        patch.setattr(bench_infer, "PUBLISHED_CHUNK_POINTS", 300)
        result = run("--quick", "--nrr", "8", "--out", str(file))
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text()), result.output


def test_report_has_every_stage_with_finite_numbers(report):
    results = report[0]["results"]
    assert set(results) == set(STAGES)
    for result in results.values():
        for numbers in result["variants"].values():
            assert len(numbers["seconds"]) == 1
            assert numbers["median_s"] > 0 and numbers["peak_mib"] != 0
        assert result["variants"]["reference"]["gflop"] > 0


def test_report_names_settings_and_machine(report):
    assert report[0]["settings"] == {"config": "debug", "nrr": 8, "repeats": 1}
    assert report[0]["environment"]["torch"] == torch.__version__
    assert report[0]["environment"]["threads"] == 1
    assert report[0]["environment"]["gpu"] is None


def test_report_variants_agree(report):
    for name in STAGES:
        # float32: other orders of sums of up to 512 products, Winograd's method, and two passes of rays
        assert report[0]["results"][name]["difference"] < 1e-4, name


def test_report_plain_views_count_the_networks_as_often_as_they_run(report):
    plain = {name: report[0]["results"][name]["variants"]["reference"]["gflop"] for name in ("image", "strip", "orbit")}
    assert plain["strip"] == pytest.approx(STRIP_VIEWS * plain["image"])
    assert plain["orbit"] == pytest.approx(ORBIT_FRAMES * plain["image"])


@pytest.mark.parametrize("ours", [True, False])
def test_subject_planes_are_computed_once_or_for_every_view(ours, monkeypatch):
    subject, calls = bench_infer.Subject(bench_infer.load_generator("init:debug")), []
    original = TriPlaneGenerator.radiance_field
    monkeypatch.setattr(TriPlaneGenerator, "radiance_field", lambda *a, **k: calls.append(1) or original(*a, **k))
    subject.render_views(subject.strip[:3], ours=ours)
    assert len(calls) == (1 if ours else 3)


@pytest.mark.skipif(native.load() is None, reason=f"no native kernels: {native.reason()}")
def test_subject_variants_differ_in_kernels_and_are_undone(monkeypatch):
    subject = bench_infer.Subject(bench_infer.load_generator("init:debug"))
    with subject.variant(ours=False):
        assert native.load() is None and subject.generator.renderer.choice == "reference"
    with subject.variant(ours=True):
        assert native.load() is not None and subject.generator.renderer.choice == "auto"


def test_table_has_a_line_for_each_variant(report):
    lines = [line for line in report[1].splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 * len(STAGES)
    assert len({len(line) for line in lines}) == 1


def test_stages_chosen_by_name_run_alone(tmp_path: Path):
    file = tmp_path / "results.json"
    assert run("--stages", "mapping, planes", "--repeats", "2", "--out", str(file)).exit_code == 0
    results = json.loads(file.read_text())["results"]
    assert list(results) == ["mapping", "planes"]
    assert len(results["planes"]["variants"]["ours"]["seconds"]) == 2


def test_stages_unknown_name_is_an_error():
    result = run("--stages", "planes,magic")
    assert result.exit_code != 0
    assert "magic" in result.output and "superresolution" in result.output


def test_measure_runs_in_turns_after_two_untimed_runs():
    order = []
    actions = {name: lambda name=name: torch.tensor(float(order.append(name) is None)) for name in "AB"}
    measurements, difference = measure(actions, 2, CPU, long_s=60, report=lambda: None)
    assert "".join(order) == "ABABABAB"
    assert [len(m.seconds) for m in measurements.values()] == [2, 2]
    assert difference == 0


def test_measure_runs_long_actions_once():
    order = []

    def action() -> torch.Tensor:
        time.sleep(0.002)
        return torch.tensor(float(len(order) + (order.append(0) or 0)))

    measurements, difference = measure({"A": action, "B": action}, 3, CPU, long_s=0.001, report=lambda: None)
    assert len(order) == 2
    assert [len(m.seconds) for m in measurements.values()] == [1, 1]
    assert measurements["A"].seconds[0] >= 0.002
    assert difference == 1


def test_measure_counts_operations_traffic_and_memory():
    def action() -> torch.Tensor:
        a = torch.ones(1000, 2000)
        return a.T @ a

    measurement = measure({"A": action}, 1, CPU, long_s=60, report=lambda: None)[0]["A"]
    assert measurement.gflop == pytest.approx(2 * 2000 * 1000 * 2000 / 1e9)
    matrix, product = 4 * 1000 * 2000, 4 * 2000 * 2000
    assert measurement.gbyte == pytest.approx((matrix + 2 * matrix + product) / 1e9)  # fill, read twice, write
    if measurement.extra_mib is not None:
        assert (matrix + product) / 2**20 <= measurement.extra_mib + 1 < 200


def test_measure_forgets_the_memory_of_earlier_actions():
    if measure({"A": lambda: torch.ones(1)}, 1, CPU, 60, lambda: None)[0]["A"].extra_mib is None:
        pytest.skip("this system does not reset its peak memory")
    actions = {"large": lambda: torch.ones(50_000_000).sum(), "small": lambda: torch.ones(1).sum()}
    measurements, _ = measure(actions, 1, CPU, long_s=60, report=lambda: None)
    assert measurements["large"].extra_mib > 180
    assert measurements["small"].extra_mib < 20


def test_markdown_table_aligns_columns():
    assert markdown_table([["a", "bb"], ["ccc", "d"]]) == "| a   | bb |\n|-----|----|\n| ccc | d  |"
