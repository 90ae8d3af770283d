"""The picture of a comparison: panels, lines and gaps, and what cannot be drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dnnlib.extras import MissingExtraError
from metrics.metric_main import MetricResult
from metrics.picture import FORMATS, check_picture, curves_by_metric, draw_curves
from metrics.registry import Curve, MetricValues


def curve(*y: float | None) -> Curve:
    x = np.linspace(-157.5, 157.5, len(y)).tolist()
    return Curve(x_name="yaw_deg", x=tuple(x), y_name="frechet distance", y=y)


@pytest.fixture
def panels() -> dict[str, dict[str, Curve]]:
    pytest.importorskip("matplotlib", reason="needs matplotlib, the extra plots")
    return {"fd_yaw8_full": {"before": curve(5.0, None, 2.0, 3.0), "after": curve(1.0, 2.0, 2.0, 1.0)}}


def draw(path: Path, panels: dict[str, dict[str, Curve]]) -> np.ndarray:
    draw_curves(path, panels)
    return np.asarray(Image.open(path).convert("RGB"))


def has_color(pixels: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((np.abs(pixels.astype(int) - color).max(axis=-1) <= 2).any())


def test_draw_curves_has_a_line_of_its_own_colour_for_each_network(tmp_path, panels):
    pixels = draw(tmp_path / "curves.png", panels)
    assert has_color(pixels, (0, 0x72, 0xB2)) and has_color(pixels, (0xD5, 0x5E, 0))


def test_draw_curves_network_keeps_its_colour_where_another_has_no_curve(tmp_path, panels):
    panels["mv_consistency8"] = {"after": curve(1.0, 2.0)}
    pixels = draw(tmp_path / "curves.png", panels)
    second = pixels[:, pixels.shape[1] // 2 :]
    assert has_color(second, (0xD5, 0x5E, 0)) and not has_color(second, (0, 0x72, 0xB2))


def test_draw_curves_is_wider_for_more_panels(tmp_path, panels):
    one = draw(tmp_path / "one.png", panels)
    two = draw(tmp_path / "two.png", {**panels, "view_accuracy8": panels["fd_yaw8_full"]})
    assert two.shape[1] > 1.8 * one.shape[1] and two.shape[0] == one.shape[0]


@pytest.mark.parametrize("suffix", FORMATS)
def test_draw_curves_same_curves_make_the_same_bytes(tmp_path, panels, suffix):
    files = [tmp_path / f"{name}.{suffix}" for name in ("one", "again")]
    for file in files:
        draw_curves(file, panels)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_size > 1000


@pytest.mark.parametrize("nothing", [{}, {"fd_yaw8_full": {}}])
def test_draw_curves_nothing_is_refused(tmp_path, panels, nothing):
    with pytest.raises(ValueError, match="expected a metric with a curve"):
        draw_curves(tmp_path / "curves.png", nothing)
    assert not list(tmp_path.iterdir())


def test_check_picture_names_the_formats():
    with pytest.raises(ValueError, match=r"ends in one of \.png, \.svg, \.pdf, got 'curves.jpg'"):
        check_picture(Path("curves.jpg"))


def test_check_picture_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib.*\.\[plots\]"):
        check_picture(Path("curves.png"))


def test_curves_by_metric_leaves_out_what_has_none():
    flat = MetricResult(metric="fd8_full", values=MetricValues(values={"fd8_full": 1.0}))
    bent = MetricResult(metric="fd_yaw8_full", values=MetricValues(values={"fd_yaw8_full": 1.0}, curve=curve(1.0)))
    absent = MetricResult(metric="fd_yaw8_full", values=None, reason="no such views")
    assert curves_by_metric({"a": [flat, bent], "b": [flat, absent]}) == {"fd_yaw8_full": {"a": curve(1.0)}}
