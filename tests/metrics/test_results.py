"""Lines of results that are whole or absent, and tables that people read."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from metrics import results as module
from metrics.evaluation import EvaluationSettings
from metrics.metric_main import MetricResult
from metrics.registry import Curve, MetricValues
from metrics.results import (
    ResultContext,
    append_record,
    comparison_table,
    prepare_folder,
    read_records,
    result_record,
    results_table,
)
from training.train_config import DataConfig

DATA = DataConfig(images=("imgs.zip",), resolution=64)
VIEW = {"name": "view (trained on this data: 9 images)", "resize": "area, to 64", "sha256": None, "source": "imgs.zip"}
PUBLISHED_KEYS = {
    *("results", "metric", "total_time", "total_time_str", "num_gpus", "mode", "snapshot_pkl", "timestamp"),
}


def result(name: str = "fd8_full", value: float = 1.5, **fields) -> MetricResult:
    values = MetricValues(values={name: value, "median": math.nan}, details={"counts": np.arange(2)})
    return MetricResult(**{"metric": name, "values": values, "detectors": (VIEW,), "seconds": 185.2, **fields})


def with_curve(name: str = "fd_yaw8_full", y=(1.0, None)) -> MetricResult:
    curve = Curve(x_name="yaw_deg", x=(-90.0, 90.0), y_name="frechet distance", y=y)
    return result(name, values=MetricValues(values={name: 2.0}, curve=curve))


def not_applicable() -> MetricResult:
    return result(
        "background_swap8", values=None, reason="background_swap8: the network has no background network", detectors=()
    )


def context(network: str = "net.pkl", **fields) -> ResultContext:
    return ResultContext(network=network, data=DATA, settings=EvaluationSettings(cache_dir=Path("cache")), **fields)


# Lines ----------------------------------------------------------------------------------------------------------------


def test_record_has_the_published_keys_and_is_strict_json():
    record = result_record(result(), context(num_ranks=2))
    assert PUBLISHED_KEYS < set(record)
    assert record["results"] == {"fd8_full": 1.5, "median": None}  # NaN is no JSON
    assert (record["total_time_str"], record["num_gpus"], record["mode"]) == ("3m 05s", 2, "all")
    assert record["details"] == {"counts": [0, 1]}
    assert record["detectors"][0]["resize"] == "area, to 64"
    assert record["data"]["images"] == ["imgs.zip"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_record_settings_are_those_that_numbers_depend_on():
    settings = result_record(result(), context())["settings"]
    assert {"seed", "batch_size", "truncation_psi", "num_yaw_bins"} <= set(settings)
    assert not {"cache_dir", "progress", "workers"} & set(settings)


def test_record_of_a_metric_that_is_not_applicable_says_why():
    record = result_record(not_applicable(), context())
    assert record["results"] == {} and record["curve"] is None
    assert record["not_applicable"] == "background_swap8: the network has no background network"


@pytest.mark.parametrize(
    ("network", "shown"),
    [("https://me:secret@example.org/net.pkl", "https://example.org/net.pkl"), ("init:debug", "init:debug")],
)
def test_record_names_the_network_without_credentials(network, shown):
    assert result_record(result(), context(network))["snapshot_pkl"] == shown


def test_record_in_a_run_folder_names_the_file_alone(tmp_path):
    network = str(tmp_path / "net.pkl")
    assert result_record(result(), context(network))["snapshot_pkl"] == network
    (tmp_path / "options.json").touch()
    assert result_record(result(), context(network))["snapshot_pkl"] == "net.pkl"
    assert result_record(result(), context(network, is_beside_network=False))["snapshot_pkl"] == network


def test_append_adds_lines_that_are_read_back(tmp_path):
    records = [result_record(result(value=value), context()) for value in (1.0, 2.0)]
    for record in records:
        path = append_record(tmp_path, record)
    assert path == tmp_path / "metric-fd8_full.jsonl"
    assert read_records(path) == records


def test_append_after_half_a_line_keeps_both_apart(tmp_path):
    path = tmp_path / "metric-fd8_full.jsonl"
    path.write_text('{"results": {"fd8')
    append_record(tmp_path, result_record(result(), context()))
    assert [record["metric"] for record in read_records(path)] == ["fd8_full"]
    assert path.read_text().count("\n") == 2


def test_append_to_a_full_disk_leaves_no_part_of_a_line(tmp_path, monkeypatch):
    class HalfFull(io.FileIO):
        def write(self, data):
            return super().write(bytes(data)[:10])

    append_record(tmp_path, result_record(result(), context()))
    path = tmp_path / "metric-fd8_full.jsonl"
    before = path.read_bytes()
    monkeypatch.setattr(
        module, "open", lambda path, mode, buffering: HalfFull(path, mode.replace("b", "")), raising=False
    )
    with pytest.raises(OSError) as error:
        append_record(tmp_path, result_record(result(), context()))
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(path)
    assert path.read_bytes() == before


def _append_many(folder: Path, number: int) -> None:
    for _ in range(20):
        append_record(folder, {"metric": "m", "number": number, "filling": "x" * 5000})


def test_append_by_several_processes_mixes_no_lines(tmp_path):
    processes = [multiprocessing.get_context("fork").Process(target=_append_many, args=(tmp_path, i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert len(read_records(tmp_path / "metric-m.jsonl")) == 60


def test_prepare_folder_below_a_file_names_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        prepare_folder(tmp_path / "file" / "folder")


# Tables ---------------------------------------------------------------------------------------------------------------


def test_results_table_shows_numbers_times_curves_reasons_and_filters():
    lines = results_table([result(), with_curve(), not_applicable()]).splitlines()
    assert lines[:5] == [
        "metric            value    time",
        "fd8_full            1.5  3m 05s",
        "  median              -",
        "fd_yaw8_full          2  3m 05s",
        "background_swap8      -  3m 05s",
    ]
    assert lines[6:8] == ["by yaw_deg    -90  90", "fd_yaw8_full    1   -"]
    assert lines[9:] == [
        "background_swap8: not applicable: the network has no background network",
        "detector view (trained on this data: 9 images); resize: area, to 64",
    ]


def test_tables_show_notes_once():
    noted = result(values=MetricValues(values={"fd8_full": 1.0}, notes=("segmenter a.pt; resize: none",)))
    for text in (results_table([noted, noted]), comparison_table({"one": [noted], "two": [noted]})):
        assert text.splitlines().count("segmenter a.pt; resize: none") == 1


def test_comparison_table_has_a_row_for_each_network():
    columns = {"before": [result(value=10.0), with_curve()], "after": [result(value=9.0), with_curve(y=(0.5, 0.25))]}
    lines = comparison_table(columns).splitlines()
    assert lines[0].split() == ["network", "fd8_full", "fd_yaw8_full"]
    assert [line.split() for line in lines[1:3]] == [["before", "10", "2"], ["after", "9", "2"]]
    assert lines[5].split() == ["fd_yaw8_full,", "before", "1", "-"]
    assert lines[6].split() == ["fd_yaw8_full,", "after", "0.5", "0.25"]


def test_comparison_table_of_a_network_that_was_interrupted_shows_what_there_is():
    lines = comparison_table({"one": [result(), with_curve()], "other": [result()]}).splitlines()
    assert lines[2].split() == ["other", "1.5", "-"]


def test_comparison_table_shows_both_numbers_of_a_metric_that_has_two():
    pair = MetricValues(values={"pr8_full_precision": 0.5, "pr8_full_recall": 0.25, "other": 1.0})
    lines = comparison_table({"one": [result("pr8_full", values=pair)]}).splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["network", "pr8_full_precision", "pr8_full_recall"],
        ["one", "0.5", "0.25"],
    ]


def test_tables_of_curves_over_different_places_stand_apart():
    other = dataclasses.replace(with_curve("mv_consistency8").values.curve, x_name="gap_deg")
    odd = result("mv_consistency8", values=MetricValues(values={"mv_consistency8": 1.0}, curve=other))
    text = results_table([with_curve(), odd])
    assert "by yaw_deg" in text and "by gap_deg" in text
