"""The benchmark of inversion runs end to end on a small network and writes what it says. Speed is not asserted."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from click.testing import CliRunner

from benchmarks import bench_inversion
from benchmarks.inversion_clock import SECTIONS
from tests.helpers.threads import one_thread  # noqa: F401 (a fixture for every test)
from tests.helpers.tiny import tiny_network
from training.config import SuperresolutionConfig
from training.perceptual import load_perceptual_distance


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    small = SuperresolutionConfig(variant="Superresolution2XSmall")
    network = tiny_network(img_resolution=64, superresolution=small).requires_grad_(False)
    monkeypatch.setattr(bench_inversion, "load_generator", lambda source, device: network)
    few_samples = dataclasses.replace(bench_inversion._SETTINGS.projection, num_w_samples=100)
    settings = dataclasses.replace(bench_inversion._SETTINGS, projection=few_samples)
    monkeypatch.setattr(bench_inversion, "_SETTINGS", settings)
    monkeypatch.setattr(bench_inversion, "fma_gflops", lambda threads: 100.0)  # it takes seconds


@pytest.mark.parametrize("stage", bench_inversion.STAGES)
def test_both_ways_lose_the_same_in_the_first_steps(stage):
    subject = bench_inversion.Subject(
        stage, bench_inversion.load_generator("", "cpu"), load_perceptual_distance(None, torch.device("cpu"))
    )
    # The first step of a projection has a learning rate of 0, that of tuning changes weights by Adam's sign.
    for _ in range(1 if stage == "projection" else 2):
        torch.testing.assert_close(subject.step_ours(), subject.step_plain(), rtol=1e-4, atol=0)


def test_plain_tuning_keeps_copies(monkeypatch):
    monkeypatch.setattr(bench_inversion, "PUBLISHED_COPY_STEPS", 2)
    subject = bench_inversion.Subject(
        "tuning", bench_inversion.load_generator("", "cpu"), load_perceptual_distance(None, torch.device("cpu"))
    )
    copies = []
    for _ in range(3):
        subject.step_plain()
        copies.append(len(subject._plain._copies))
    assert copies == [1, 1, 2]
    assert subject.network_mib > 0


def test_benchmark_reports_times_and_where_they_go(tmp_path):
    file = tmp_path / "inversion.json"
    arguments = ["--quick", "--stages", "tuning", "--device", "cpu", "--json", str(file)]
    result = CliRunner().invoke(bench_inversion.benchmark, arguments)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(file.read_text())["results"].values()
    assert set(found["variants"]) == {"ours", "plain"}
    assert found["ratio"] > 0 and found["bound_s"] > 0
    assert all(found["sections_s"][name] > 0 for name in SECTIONS), found
    assert float(re.search(r"differ by at most ([0-9.e+-]+)\.", result.output)[1]) < 1e-4


def test_wrong_stage_is_an_error():
    result = CliRunner().invoke(bench_inversion.benchmark, ["--stages", "magic"])
    assert result.exit_code != 0 and "magic" in result.output
