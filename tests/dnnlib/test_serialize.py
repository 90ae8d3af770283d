"""Strict JSON for configuration dataclasses."""

import dataclasses
import json
import math
from typing import Literal, Optional

import pytest

from dnnlib.serialize import ABSENT, JSON, dumps, from_json, loads, to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    kind: Literal["sphere", "grid"] = "sphere"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, str] = (0.5, "x")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other:
    depth: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = "n"
    count: int = 4
    rate: float = 0.25
    flag: bool = True
    clamp: float | None = None
    near: float | Literal["auto"] = "auto"
    level: Literal[1, 2] = 1
    old: Optional[int] = None  # noqa: UP045 - this spelling must work too
    either: int | float = 1
    inner: Inner = Inner()
    maybe: Inner | Other | None = None
    many: tuple[Inner, ...] = (Inner(), Inner(kind="grid"))
    table: dict[str, float] = dataclasses.field(default_factory=lambda: {"a": 1.0})
    extra: dict[str, JSON] = dataclasses.field(default_factory=lambda: {"k": [1, None, {"deep": "x"}]})
    derived: int = dataclasses.field(init=False, default=7)

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count: expected at least 0, came {self.count}")


CASES = [
    Outer(),
    Outer(clamp=1.5, near=2.5, old=3, either=0.5, maybe=Other(depth=1), inner=Inner(sizes=(), pair=(1e-300, ""))),
    Outer(maybe=Inner(kind="grid"), many=(), table={}, extra={}, flag=False, name="ü\n"),
]


@pytest.mark.parametrize("config", CASES)
def test_round_trip_through_text_is_equal(config):
    assert from_json(Outer, json.loads(json.dumps(to_json(config)))) == config
    assert loads(Outer, dumps(config)) == config


def test_to_json_nests_dicts_and_leaves_out_derived_fields():
    data = to_json(Outer())
    assert data["inner"] == {"kind": "sphere", "sizes": [1, 2], "pair": [0.5, "x"]}
    assert "derived" not in data


def test_from_json_int_for_float_becomes_float():
    rate = from_json(Outer, to_json(Outer()) | {"rate": 3}).rate
    assert (rate, type(rate)) == (3.0, float)
    assert type(to_json(Outer(rate=3))["rate"]) is float


def test_from_json_int_in_int_or_float_stays_int():
    assert type(from_json(Outer, to_json(Outer(either=3))).either) is int


def changed(path, value):
    """Return the JSON of the default configuration with one value replaced; ``...`` removes the key."""
    data = to_json(Outer())
    *parents, last = path.split(".")
    place = data
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if value is ...:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("typo", 1, "config.typo: unknown key; expected only name, count,"),
        ("inner.typo", 1, "config.inner.typo: unknown key; expected only kind, sizes, pair; came int 1"),
        ("rate", ..., "config.rate: missing key; expected a finite float, came nothing"),
        ("inner.kind", ..., "config.inner.kind: missing key"),
        ("derived", 7, "config.derived: unknown key"),
        ("name", 1, "config.name: expected str, came int 1"),
        ("count", True, "config.count: expected int, came bool True"),
        ("count", 1.0, "config.count: expected int, came float 1.0"),
        ("count", "1", "config.count: expected int, came str '1'"),
        ("count", None, "config.count: expected int, came null"),
        ("count", -1, "config: count: expected at least 0, came -1"),
        ("rate", True, "config.rate: expected a finite float, came bool True"),
        ("rate", math.nan, "config.rate: expected a finite float, came float nan"),
        ("rate", math.inf, "config.rate: expected a finite float, came float inf"),
        ("rate", 10**400, "config.rate: expected a finite float, came int"),
        ("flag", 1, "config.flag: expected bool, came int 1"),
        ("clamp", "x", "config.clamp: expected a finite float or null, came str 'x'"),
        ("clamp", math.nan, "config.clamp: expected a finite float or null, came float nan"),
        ("near", "never", "config.near: expected a finite float or 'auto', came str 'never'"),
        ("level", True, "config.level: expected one of 1, 2, came bool True"),
        ("level", 1.0, "config.level: expected one of 1, 2, came float 1.0"),
        ("old", 1.5, "config.old: expected int or null, came float 1.5"),
        ("inner", None, r"config.inner: expected an object \(Inner\), came null"),
        ("inner.kind", "cube", "config.inner.kind: expected one of 'sphere', 'grid', came str 'cube'"),
        ("inner.kind", 0, "config.inner.kind: expected one of 'sphere', 'grid', came int 0"),
        ("inner.sizes", "12", "config.inner.sizes: expected a list of int, came str '12'"),
        ("inner.sizes", [1, "2"], r"config.inner.sizes\[1\]: expected int, came str '2'"),
        ("inner.pair", [0.5], "config.inner.pair: expected 2 items, came 1"),
        ("inner.pair", ["x", 0.5], r"config.inner.pair\[0\]: expected a finite float, came str 'x'"),
        ("many.1.kind", "cube", r"config.many\[1\].kind: expected one of"),
        ("maybe", {"depth": "3"}, r"config.maybe: expected an object \(Inner\) or an object \(Other\) or null"),
        ("table.a", "1", "config.table.a: expected a finite float, came str '1'"),
        ("table", [], "config.table: expected an object of a finite float, came list"),
        ("table", {1: 1.0}, "config.table: expected string keys, came int 1"),
        ("extra", {"a": [math.nan]}, r"config.extra.a\[0\]: expected a JSON value, came float nan"),
        ("extra", {"a": {"b": b"x"}}, "config.extra.a.b: expected a JSON value, came bytes"),
        ("extra", {"a": {2: 1}}, "config.extra.a: expected string keys"),
    ],
)
def test_from_json_misfit_raises_value_error_with_the_path(path, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        from_json(Outer, changed(path, value))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": math.nan}, "net.rate: expected a finite float"),
        ({"count": 1.5}, "net.count: expected int"),
        ({"inner": Inner(kind="cube")}, "net.inner.kind: expected one of"),
        ({"inner": Inner(sizes=[1])}, "net: expected a value equal to"),
        ({"extra": {"a": (1, 2)}}, "net: expected a value equal to"),
    ],
)
def test_to_json_value_that_would_not_return_raises_value_error(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        to_json(Outer(**values), "net")


@pytest.mark.parametrize("text", ["", "{", b"\xff", '{"depth": NaN}', '{"depth": 1, "depth": 2}', "[]", "[" * 100_000])
def test_loads_text_that_is_no_strict_json_raises_value_error(text):
    with pytest.raises(ValueError, match="^header"):
        loads(Other, text, "header")


def test_loads_duplicate_key_is_named():
    with pytest.raises(ValueError, match="duplicate key 'depth'"):
        loads(Other, '{"depth": 1, "depth": 2}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grown:
    first: int
    later: str = dataclasses.field(default="new", metadata={ABSENT: "old"})


def test_from_json_field_that_is_younger_than_the_file_has_the_value_of_its_metadata():
    assert from_json(Grown, {"first": 1}) == Grown(first=1, later="old")
    assert from_json(Grown, to_json(Grown(first=1))) == Grown(first=1, later="new")
    with pytest.raises(ValueError, match=r"config\.first: missing key"):
        from_json(Grown, {"later": "new"})
    with pytest.raises(ValueError, match=r"config\.later: "):
        from_json(Grown, {"first": 1, "later": 2})


@pytest.mark.parametrize("call", [lambda: to_json({"a": 1}), lambda: to_json(Outer), lambda: from_json(dict, {})])
def test_not_a_dataclass_raises_type_error(call):
    with pytest.raises(TypeError, match="dataclass"):
        call()


def test_from_json_annotation_not_understood_raises_type_error():
    bad = dataclasses.make_dataclass("Bad", [("z", complex)])
    with pytest.raises(TypeError, match="complex"):
        from_json(bad, {"z": 1})
