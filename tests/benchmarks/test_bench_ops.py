"""The benchmark of small ops runs and writes what it measured."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from benchmarks import bench_ops
from tests.helpers.threads import one_thread  # noqa: F401  small images
from torch_utils import native

pytestmark = pytest.mark.skipif(native.load() is None, reason=f"no native library: {native.reason()}")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Measure tiny images, and leave this process' allocator alone."""
    monkeypatch.setattr(bench_ops, "memory_gbytes_per_s", lambda device: 2.0)
    monkeypatch.setattr(bench_ops, "keep_freed_memory", lambda: True)
    ops = {
        "upsample_bias": {"tiny": lambda: bench_ops.upsample_actions(3, 4)},
        "modulated_to_image": {"tiny": lambda: bench_ops.to_image_actions(8, 3, 4, 256.0)},
    }
    monkeypatch.setattr(bench_ops, "OPS", ops)


def run(*arguments: str):
    return CliRunner().invoke(bench_ops.benchmark, list(arguments))


def test_bench_ops_prints_a_row_for_each_case_and_writes_every_run(tmp_path):
    result = run("--ops", "upsample_bias, modulated_to_image", "--repeats", "2", "--out", str(tmp_path / "ops.json"))
    assert result.exit_code == 0, result.output
    assert result.output.count("| tiny |") == 2
    report = json.loads((tmp_path / "ops.json").read_text())
    assert report["environment"]["copy_gbyte_per_s"] == 2.0
    for measured in report["results"].values():
        assert measured["difference"] < 1e-6
        assert [len(variant["seconds"]) for variant in measured["variants"].values()] == [2, 2]


def test_bench_ops_unknown_op_is_refused():
    result = run("--ops", "nonsense")
    assert result.exit_code == 2 and "'nonsense'" in result.output


def test_bench_ops_without_native_library_says_why():
    with native.disabled():
        result = run()
    assert result.exit_code == 1 and "switched off" in result.output


def test_measure_chain_times_both_variants(monkeypatch):
    monkeypatch.setattr(bench_ops, "_CHAIN", bench_ops._CHAIN.replace("128, 512, 512", "1, 8, 8"))
    measurements = bench_ops.measure_chain(2)
    assert {name: len(m.seconds) for name, m in measurements.items()} == {"ours": 2, "PyTorch": 2}
