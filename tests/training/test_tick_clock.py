"""Ticks tell how fast training is, how long it takes, and how much memory."""

import math

import psutil
import pytest

from training.tick_clock import TickClock, format_duration, progress_line


class Time:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def test_tick_measures_training_and_maintenance_apart():
    time = Time()
    clock = TickClock(1000, 10_000, elapsed_s=50.0, now=time)
    time.seconds += 30
    first = clock.tick(4000)
    time.seconds += 6
    clock.end_maintenance()
    time.seconds += 12
    second = clock.tick(5000)
    assert (first["Timing/sec_per_tick"], first["Timing/sec_per_kimg"]) == (30, 10)
    assert (first["Timing/maintenance_sec"], first["Timing/total_sec"]) == (0, 80)
    assert first["Timing/eta_sec"] == pytest.approx(6 * 10)
    assert (second["Timing/sec_per_tick"], second["Timing/sec_per_kimg"]) == (12, 12)
    assert (second["Timing/maintenance_sec"], second["Timing/total_sec"]) == (6, 98)
    assert second["Timing/eta_sec"] == pytest.approx(5 * 48 / 4)  # 48 s for 4 kimg, maintenance included
    assert clock.elapsed_s == 98


def test_tick_without_images_or_beyond_the_end_has_no_rate_and_nothing_left():
    clock = TickClock(1000, 500, now=Time())
    scalars = clock.tick(1000)
    assert math.isnan(scalars["Timing/sec_per_kimg"]) and scalars["Timing/eta_sec"] == 0
    assert "kimg" not in progress_line({"Timing/eta_sec": scalars["Timing/eta_sec"]})


def test_tick_reports_the_memory_of_the_process():
    expected = psutil.Process().memory_info().rss / 2**30
    scalars = TickClock(0, 1).tick(0)
    assert scalars["Resources/cpu_mem_gb"] == pytest.approx(expected, rel=0.1)  # the process lives on between
    assert "Resources/gpu_mem_gb" not in scalars


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (185, "3m 05s"), (3599, "59m 59s"), (3600, "1h 00m")],
        *[(7380, "2h 03m"), (86399, "23h 59m"), (86400, "1d 00h"), (4 * 86400 + 5 * 3600, "4d 05h"), (math.nan, "?")],
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_progress_line_shows_what_is_there_in_a_fixed_order():
    scalars = {"Resources/cpu_mem_gb": 1.5, "Progress/kimg": 12.0, "Progress/tick": 3, "Loss/G": 1.0}
    assert progress_line(scalars) == "tick 3      kimg 12.0       cpu GB 1.50"


@pytest.mark.gpu
def test_tick_reports_the_memory_of_a_gpu_and_its_peak_within_the_tick():
    import torch

    clock = TickClock(0, 1, "cuda")
    clock.tick(0)
    block = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del block
    scalars = clock.tick(0)
    assert scalars["Resources/peak_gpu_mem_gb"] >= scalars["Resources/gpu_mem_gb"] + 0.25
    assert clock.tick(0)["Resources/peak_gpu_mem_gb"] < scalars["Resources/peak_gpu_mem_gb"]
