"""The benchmark of the renderer runs end to end on small sizes and writes what it says. Speed is not asserted."""

from __future__ import annotations

import json
import re

import pytest
import torch
from click.testing import CliRunner

from benchmarks import bench_render
from tests.helpers.threads import one_thread  # noqa: F401 (a fixture for every test)
from torch_utils import native

pytestmark = pytest.mark.skipif(native.load() is None, reason=f"no native kernels: {native.reason()}")


def run(*arguments: str):
    return CliRunner().invoke(bench_render.benchmark, ["--config", "debug", "--device", "cpu", *arguments])


def test_benchmark_reports_every_case_with_ratio_and_agreement(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_render, "GRID_RESOLUTION", 8)
    monkeypatch.setattr(bench_render, "fma_gflops", lambda threads: 100.0 * threads)  # it takes seconds
    monkeypatch.setattr(bench_render, "memory_gbytes_per_s", lambda device: 10.0)
    file = tmp_path / "render.json"
    result = run("--batch", "1,2", "--side", "6", "--threads", "1", "--repeats", "1", "--out", str(file))
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    cases = [(found["case"], found["batch"]) for found in report["results"]]
    assert cases == [("forward", 1), ("forward", 2), ("gradients", 1), ("gradients", 2), ("grid", 1)]
    assert all(set(found["variants"]) == {"fused", "reference"} for found in report["results"])
    assert report["environment"]["peaks"]["1"] == {"gflop_per_s": 100.0, "gbyte_per_s": 10.0}
    difference = re.search(r"differ by at most ([0-9.e+-]+)\.", result.output)[1]
    assert float(difference) < 1e-2  # float32 gradients jump where a ray crosses a texel edge


def test_subject_counts_the_work_of_both_passes():
    subject = bench_render.Subject("debug", 2, 5, torch.device("cpu"))
    rendering = subject.rendering
    samples = rendering.depth_resolution + rendering.depth_resolution_importance
    assert 0 < subject.num_ray_points <= 2 * 25 * samples
    per_point = 2 * 24 * 32 + 2 * 32 * 64 + 2 * 64 + 2 * 64  # look-ups, hidden layer, density, compositing
    assert subject.gflop("forward") == pytest.approx(1e-9 * subject.num_ray_points * per_point)
    assert subject.gflop("gradients") > 3 * subject.gflop("forward")


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--cases", "forward,magic"], "magic"), (["--batch", "1,x"], "expected positive")]
)
def test_benchmark_wrong_options_are_errors(arguments, message):
    result = run(*arguments)
    assert result.exit_code != 0 and message in result.output
