"""Names of metrics: what a metric is, how its name is read, and which there are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from metrics.requests import StatsRequest
from training.config import require

if TYPE_CHECKING:
    from metrics.evaluation import Evaluation
    from metrics.feature_stats import FeatureStats


class NotApplicable(ValueError):
    """A metric has no meaning for this network or this data; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric as a function of something, such as the yaw."""

    x_name: str
    x: tuple[float, ...]
    y_name: str
    y: tuple[float | None, ...]
    """None where there is no value."""

    def __post_init__(self) -> None:
        require(len(self.x) == len(self.y), "curve", f"{len(self.x)} values", len(self.y))


@dataclass(frozen=True, kw_only=True)
class MetricValues:
    """What a metric found."""

    values: Mapping[str, float]
    """Numbers by name, which begins with that of the metric; the first is the number of the metric."""
    curve: Curve | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    """JSON data: counts, thresholds and the like, that a reader needs to compare."""
    notes: Sequence[str] = ()
    """Lines below a table about what the numbers depend on, such as another network that was used."""


class Metric(Protocol):
    """A metric of a generator: it names the statistics that it needs, and computes numbers from them."""

    @property
    def name(self) -> str:
        """The canonical name, such as fd500_full."""

    def requests(self, evaluation: Evaluation) -> Sequence[StatsRequest]:
        """Return which statistics it needs; none where it renders on its own.

        Raises:
            NotApplicable: the metric has no meaning here.
        """

    def compute(self, evaluation: Evaluation, stats: Mapping[StatsRequest, FeatureStats]) -> MetricValues:
        """Compute the metric, on all ranks together; all return the same.

        Raises:
            NotApplicable: the metric has no meaning here.
        """


class RendersOnItsOwn:
    """What metrics that need no statistics share."""

    def requests(self, evaluation: Evaluation) -> Sequence[StatsRequest]:
        """Return none: it renders on its own."""
        return ()


class _Family(NamedTuple):
    pattern: re.Pattern[str]
    shown: str
    help: str
    make: Callable[..., Metric]


_FAMILIES: list[_Family] = []
_MOST_DIGITS = 8


def register(pattern: str, shown: str, help_text: str) -> Callable[[Callable[..., Metric]], Callable[..., Metric]]:
    """Register a family of metrics: a decorator of the function that makes one.

    Args:
        pattern: regular expression that a whole name matches. Its named groups become keyword arguments; `num`, a count
            such as 500 or 50k, becomes the int `num_images`. The name itself is the argument `name`.
        shown: how the names are shown to people.
        help_text: one line that says what it is.
    """

    def add(make: Callable[..., Metric]) -> Callable[..., Metric]:
        _FAMILIES.append(_Family(re.compile(pattern, re.ASCII), shown, help_text, make))
        return make

    return add


def parse_metric(name: str) -> Metric:
    """Return the metric of a name; dashes are read as underscores.

    Raises:
        ValueError: there is none of this name, or its count is too small.
    """
    canonical = name.strip().lower().replace("-", "_")
    for family in _FAMILIES:
        if match := family.pattern.fullmatch(canonical):
            arguments = match.groupdict()
            if "num" in arguments:
                arguments["num_images"] = _count(arguments.pop("num"), canonical)
            return family.make(name=canonical, **arguments)
    known = ", ".join(family.shown for family in _FAMILIES)
    raise ValueError(f"metric: expected one of {known}, with a number of images N such as 500 or 50k; came {name!r}")


def metric_list() -> list[tuple[str, str]]:
    """Return the names of all families, as they are shown, each with a line of help."""
    return [(family.shown, family.help) for family in _FAMILIES]


def _count(text: str, name: str) -> int:
    """Return the number that a name has, such as 500 or 50k."""
    digits = text.removesuffix("k")
    count = int(digits[:_MOST_DIGITS]) * (1000 if text.endswith("k") else 1)
    fits = len(digits) <= _MOST_DIGITS and 2 <= count <= 10_000_000
    require(fits, f"metric {name[:40]}", "from 2 to 10 million images", text[:40])
    return count
