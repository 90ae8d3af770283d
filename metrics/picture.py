"""Curves of metrics of several networks as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dnnlib.atomic import atomic_path
from dnnlib.extras import import_extra
from training.config import require

if TYPE_CHECKING:
    from metrics.metric_main import MetricResult
    from metrics.registry import Curve

FORMATS = ("png", "svg", "pdf")
_EXTRA = "plots"
_PANEL_INCH = 4.8, 3.6
_DPI = 110
_YAW_NAME, _YAW_TICKS_DEG = "yaw_deg", (-180, -90, 0, 90, 180)
# Colours that stay apart for colour-blind readers (Okabe and Ito), and markers for those who print in black.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*X"


def check_picture(path: Path) -> None:
    """Find out whether a picture can be drawn, before anything is computed.

    Raises:
        ValueError: the name of the file tells no format that is known.
        MissingExtraError: matplotlib is not installed.
    """
    known = path.suffix.lower().removeprefix(".") in FORMATS
    require(known, "picture", f"a file name that ends in one of .{', .'.join(FORMATS)}", str(path))
    import_extra("matplotlib.figure", _EXTRA)


def curves_by_metric(columns: Mapping[str, Sequence[MetricResult]]) -> dict[str, dict[str, Curve]]:
    """Return the curves of results, by metric and network; metrics and networks without are left out.

    Args:
        columns: results by the name of the network.
    """
    panels: dict[str, dict[str, Curve]] = {}
    for network, results in columns.items():
        for result in results:
            if result.values is not None and result.values.curve is not None:
                panels.setdefault(result.metric, {})[network] = result.values.curve
    return panels


def draw_curves(path: Path, panels: Mapping[str, Mapping[str, Curve]]) -> None:
    """Draw a panel for each metric with a line for each network; the file appears when it is complete.

    The same curves make the same bytes, with the same version of matplotlib.

    Args:
        path: ends in one of `FORMATS`.
        panels: curves by metric and network, at least one. A gap in a line is where a curve has no value.

    Raises:
        ValueError: nothing to draw, or another file format.
        MissingExtraError: matplotlib is not installed.
    """
    check_picture(path)
    require(any(panels.values()), "picture", "a metric with a curve, such as fd_yaw500_full", list(panels))
    networks = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    size = _PANEL_INCH[0] * columns, _PANEL_INCH[1] * rows
    figure = import_extra("matplotlib.figure", _EXTRA).Figure(figsize=size, layout="constrained")
    for position, (metric, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, position + 1)
        for network, curve in curves.items():
            number = networks.index(network)
            y = [math.nan if value is None else value for value in curve.y]
            style = {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number % len(_MARKERS)]}
            axes.plot(curve.x, y, markersize=4, label=network, **style)
        _label(axes, metric, next(iter(curves.values())))
        if len(networks) > 1 or len(panels) > 1:
            axes.legend(fontsize=8)
    fixed = import_extra("matplotlib", _EXTRA).rc_context({"svg.hashsalt": "curves"})  # random names in SVG otherwise
    with fixed, atomic_path(path) as temporary:
        # No date and no version in the file.
        unset = {"png": ["Software"], "svg": ["Date"], "pdf": ["CreationDate"]}[path.suffix.lower().removeprefix(".")]
        figure.savefig(temporary, dpi=_DPI, metadata=dict.fromkeys(unset))


def _label(axes: object, metric: str, curve: Curve) -> None:
    axes.set_title(metric)
    axes.set_xlabel("yaw, degrees (0 is the front)" if curve.x_name == _YAW_NAME else curve.x_name)
    axes.set_ylabel(curve.y_name)
    if curve.x_name == _YAW_NAME and min(curve.x) < 0:
        axes.set_xticks(_YAW_TICKS_DEG)
        axes.set_xlim(_YAW_TICKS_DEG[0], _YAW_TICKS_DEG[-1])
    axes.grid(alpha=0.3)
