"""The benchmark of training steps runs end to end on a tiny network and writes what it says. Speed is not asserted."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import bench_train_step, operation_counts
from benchmarks.step_clock import SECTIONS, StepClock
from benchmarks.train_setups import Variant, images_per_step, make_config, write_data
from tests.helpers.threads import one_thread  # noqa: F401 (a fixture for every test)
from torch_utils import native
from torch_utils.memory import stop_keeping_memory

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(native.load() is None, reason=f"no native kernels: {native.reason()}")


def run(*arguments: str):
    arguments = ["--config", "debug", "--device", "cpu", "--threads", "1", "--quick", *arguments]
    return CliRunner().invoke(bench_train_step.benchmark, arguments)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory):
    renderer = "fused" if native.load() is not None else "reference"
    folder = tmp_path_factory.mktemp("run")
    yield bench_train_step.Subject("debug", Variant(renderer=renderer), folder, CPU)
    stop_keeping_memory()


class WorkerHere:
    """Stands in for a process."""

    def __init__(self, subject) -> None:
        self.step = subject.step
        self.prepared = {"prepare_s": 1.0, **subject.first_step(count=True), **subject.memory()}

    def close(self) -> None:
        pass


def test_benchmark_writes_table_and_file_for_every_variant(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train_step, "fma_gflops", lambda threads: 100.0)  # it takes seconds
    monkeypatch.setattr(bench_train_step, "Worker", lambda *arguments: WorkerHere(subject))
    file = tmp_path / "steps.json"
    result = run("--variants", "reference, fused+compile", "--json", str(file))
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert report["settings"] == {"config": "debug", "batch_size": 4, "repeats": 1}
    assert list(report["results"]) == ["reference", "fused+compile"]
    assert report["results"]["reference"]["ratio"] == 1
    for found in report["results"].values():
        assert len(found["steps"]) == 1 and found["median_s_per_kimg"] > 0 and found["peak_mib"] != 0
        assert found["bound_s_per_kimg"] == pytest.approx(
            250 * sum(report["results"]["reference"]["gflop"].values()) / 100
        )
    lines = [line for line in result.output.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1


@needs_kernels
@pytest.mark.slow
def test_benchmark_in_processes_of_their_own_variants_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train_step, "fma_gflops", lambda threads: 100.0)
    monkeypatch.setenv("SPHEREHEAD_NATIVE", "auto")
    file = tmp_path / "steps.json"
    assert run("--variants", "plain,fused,fused+free", "--json", str(file)).exit_code == 0
    results = json.loads(file.read_text())["results"]
    # Loss and gradient norm, float32 after the whole network: other orders of sums, and Winograd's method.
    assert max(found["difference"] for found in results.values()) < 1e-4
    assert results["plain"]["gflop"]["renderer"] == 0 < results["fused"]["gflop"]["renderer"]


def test_worker_that_cannot_train_tells_why(tmp_path):
    class Pipe:
        def send(self, message):
            self.sent = message

    pipe = Pipe()
    bench_train_step.serve(pipe, "huge", Variant(), str(tmp_path), "cpu", 1)
    assert pipe.sent == {"error": "KeyError: 'huge'"}
    results = {"fused": {"error": "KeyError: 'huge'", "steps": []}}
    bench_train_step.summarise(results, 4, 100.0)
    assert "KeyError: 'huge'" in bench_train_step.results_table(results)


def test_step_divides_all_of_its_time_among_its_parts(subject):
    start_s = time.perf_counter()
    step = subject.step()
    elapsed_s = time.perf_counter() - start_s
    sections = step["sections"]
    assert set(sections) == set(SECTIONS)
    assert {name for name, seconds in sections.items() if seconds == 0} == {"density"}  # weight 0 in this preset
    # All phases ran; the regulariser of D counts a sixteenth.
    assert 0.5 * elapsed_s < sum(sections.values()) + 15 * sections["R1"] <= elapsed_s


def test_step_runs_all_phases_and_its_own_code_afterwards(subject):
    original, names = bench_train_step.Trainer.run_phase, []

    def noted(number, phase, *rest):
        names.append(phase.name)
        original(subject.trainer, number, phase, *rest)

    subject.trainer.run_phase = noted
    for _ in range(2):
        subject.step()
    del subject.trainer.run_phase
    assert names == ["Gboth", "Dmain", "Dreg"] * 2
    assert bench_train_step.Trainer.run_phase is original


def test_first_step_counts_phases_as_often_as_they_are_due(subject):
    seen = subject.first_step(count=True)
    assert math.isfinite(seen["loss"]) and seen["gradient"] > 0
    counts = {}
    for interval in (1, 16):
        with subject._counting(counts.setdefault(interval, {"networks": 0.0, "renderer": 0.0})):
            batch = next(subject.loader)
            subject.trainer.progress.cur_nimg = subject.next_nimg + (interval == 1) * len(batch[0]["index"])
            subject.trainer.step(batch)
    assert seen["gflop"]["networks"] == pytest.approx(counts[16]["networks"])
    assert seen["gflop"]["renderer"] == pytest.approx(counts[16]["renderer"], rel=0.1)  # other cameras
    assert 0 < counts[16]["networks"] / counts[1]["networks"] - 1 < 0.1  # a sixteenth of R1


def test_clock_gives_moments_to_the_innermost_section_and_whole_phases_their_parts(monkeypatch):
    now = {"perf_counter": 0.0, "process_time": 0.0}
    for name in now:
        monkeypatch.setattr(f"benchmarks.step_clock.time.{name}", lambda name=name: now[name])

    def work(seconds: float) -> None:
        now["perf_counter"] += seconds
        now["process_time"] += 2 * seconds

    clock = StepClock(CPU)
    clock.begin()
    work(1)
    with clock.section("R1"):
        with clock.section("D forward"):
            work(2)
        clock.switch("G backward")
        with clock.section("optimiser"):
            work(4)
    with clock.section("D backward"):
        work(8)
        clock.switch("G backward")
        work(16)
    clock.weight = 0.5
    with clock.section("optimiser"):
        work(32)
    sections, cpu_s = clock.times()
    found = {name: seconds for name, seconds in sections.items() if seconds}
    assert found == {"other": 1, "R1": 2, "optimiser": 4 + 16, "D backward": 8, "G backward": 16}
    assert cpu_s == 2 * sum(found.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fused", Variant(renderer="fused")),
        ("reference+compile+free", Variant(renderer="reference", compile=True, memory="free")),
        ("plain", Variant(renderer="plain", memory="free")),
        ("plain+glibc", Variant(renderer="plain", memory="glibc")),
    ],
)
def test_variant_names_are_read(text, expected):
    assert Variant.parse(text) == expected


@pytest.mark.parametrize("text", ["", "magic", "fused+magic", "fused+free+glibc", "compile"])
def test_variant_unknown_name_is_an_error(text):
    assert run("--variants", text).exit_code != 0
    with pytest.raises(ValueError, match="variant"):
        Variant.parse(text)


def test_variants_with_raised_thresholds_are_told_by_name_and_environment():
    variants = bench_train_step.parse_variants("plain, fused+free, fused", glibc=True)
    assert list(variants) == ["plain+glibc", "fused+glibc", "fused"]
    values = {name: bench_train_step.variant_environment(variant) for name, variant in variants.items()}
    assert "mmap_threshold" in values["plain+glibc"]["GLIBC_TUNABLES"]
    assert values["plain+glibc"]["SPHEREHEAD_NATIVE"] == "0" and "SPHEREHEAD_NATIVE" not in values["fused"]
    assert values["fused"] == {"SPHEREHEAD_KEEP_MEMORY": "1", "GLIBC_TUNABLES": ""}


def test_medium_configuration_is_the_one_that_is_reported(tmp_path: Path):
    write_data(tmp_path, 128)
    config = make_config("medium", tmp_path, Variant(compile=True))
    generator, rendering = config.generator, config.generator.rendering
    assert (generator.plane_resolution, generator.neural_rendering_resolution) == (128, 64)
    assert (rendering.depth_resolution, rendering.depth_resolution_importance) == (48, 48)
    assert (generator.synthesis.channel_base, generator.synthesis.channel_max) == (8192, 256)
    assert config.discriminator.variant == "MaskDualDiscriminatorV2" and config.loop.batch_size == 4
    assert config.optimizer.discriminator_reg_interval == 16 and config.precision.compile
    assert [images_per_step(name) for name in ("demo", "medium", "debug")] == [8, 4, 4]


def test_operations_of_the_renderer_count_points_that_are_not_cropped():
    options = ("dual_spherical", "none", 8, 8, 1.0, None, 0.0, False)
    work = operation_counts.point_flop("dual_spherical", 32, 64)
    assert work == {"texels": 2 * 24 * 32, "hidden": 2 * 32 * 64, "rest": 4 * 64}
    rays = torch.tensor([[[0.0, 0.0, 2.7], [3.0, 0.0, 2.7]]])
    forward = torch.tensor([[[0.0, 0.0, -1.0]] * 2])
    limits = torch.full((1, 2), 2.25), torch.full((1, 2), 3.3)
    tensors = (torch.zeros(1), torch.zeros(64, 32), *[torch.zeros(1)] * 3, rays, forward, *limits)
    parsed = operation_counts.Options(*options)
    assert operation_counts.num_points(tensors, parsed) == 2 * 16
    cropped = operation_counts.num_points(tensors, parsed._replace(crop_margin=0.1))
    assert 0 < cropped <= 16  # the second ray passes beside the box
