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

CPU = torch.device("cpu")
COMPARED = ("planes", "image", "strip", "orbit", "grid")
STRIP_VIEWS, ORBIT_FRAMES = 3, 2  # few, which is faster
STAGES = ("mapping", "backbone", "projection", "background", "renderer", "superresolution", *COMPARED)


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
            assert numbers["median_s"] > 0 and numbers["gbyte"] > 0 and numbers["gflop"] > 0


def test_report_names_settings_and_machine(report):
    assert report[0]["settings"] == {"config": "debug", "nrr": 8, "repeats": 1}
    assert report[0]["environment"]["torch"] == torch.__version__
    assert report[0]["environment"]["threads"] == 1
    assert report[0]["environment"]["gpu"] is None


def test_report_variants_agree(report):
    for name in COMPARED:
        # float32: folding the projections changes the order of sums of up to 512 products
        assert report[0]["results"][name]["difference"] < 1e-4, name


def test_report_from_scratch_computes_more(report):
    for name in COMPARED:
        variants = report[0]["results"][name]["variants"]
        assert variants["from scratch"]["gflop"] > variants["ours"]["gflop"], name


def test_report_of_views_counts_the_networks_as_often_as_they_run(report):
    results = report[0]["results"]
    ours, scratch = (
        {name: results[name]["variants"][v]["gflop"] for name in COMPARED} for v in ("ours", "from scratch")
    )
    once = results["mapping"]["variants"]["ours"]["gflop"] + ours["planes"]
    once += results["background"]["variants"]["ours"]["gflop"]
    per_view = ours["image"] - once
    assert ours["strip"] == pytest.approx(once + STRIP_VIEWS * per_view)
    assert ours["orbit"] == pytest.approx(once + ORBIT_FRAMES * per_view)
    assert scratch["strip"] == pytest.approx(STRIP_VIEWS * scratch["image"])


def test_table_has_a_line_for_each_variant(report):
    lines = [line for line in report[1].splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(STAGES) + len(COMPARED)
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
