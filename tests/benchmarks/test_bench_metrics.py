"""The benchmark of metrics runs end to end with a tiny detector and writes what it says. Speed is not asserted."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from benchmarks import bench_metrics
from tests.helpers.threads import one_thread  # noqa: F401 (a fixture for every test)
from tests.helpers.tiny import tiny_network
from training.config import SuperresolutionConfig


class MeanColor(torch.nn.Module):
    """A detector that is quick."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


@pytest.fixture
def detector(tmp_path, monkeypatch) -> str:
    small = SuperresolutionConfig(variant="Superresolution2XSmall")
    network = tiny_network(img_resolution=64, neural_rendering_resolution=16, superresolution=small).requires_grad_(
        False
    )
    monkeypatch.setattr(bench_metrics, "load_generator", lambda source, device: network)
    monkeypatch.setattr(bench_metrics, "NUM_FEATURES", 8)
    monkeypatch.setattr(bench_metrics, "NUM_ROWS", 40)
    torch.jit.script(MeanColor()).save(str(tmp_path / "mean.pt"))
    return str(tmp_path / "mean.pt")


def test_benchmark_reports_images_a_second_and_memory_of_every_stage(detector, tmp_path):
    file = tmp_path / "metrics.json"
    arguments = ["--quick", "--images", "64", "--batch", "16", "--device", "cpu", "--detector", detector]
    result = CliRunner().invoke(bench_metrics.benchmark, [*arguments, "--out", str(file)])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert tuple(report["results"]) == bench_metrics.STAGES
    for stage in report["results"].values():
        assert stage["difference"] < 1e-6  # variants do the same
        for numbers in stage["variants"].values():
            assert numbers["images_per_s"] == pytest.approx(stage["images"] / numbers["median_s"])
            assert numbers["peak_mib"] != 0
    assert set(report["results"]["generated"]["variants"]) == {"ahead", "in turns"}
    assert report["settings"]["side"] == 64


def test_wrong_stage_is_an_error():
    result = CliRunner().invoke(bench_metrics.benchmark, ["--stages", "magic"])
    assert result.exit_code != 0 and "magic" in result.output
