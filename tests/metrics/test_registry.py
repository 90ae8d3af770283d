"""Names of metrics."""

import pytest

from metrics import registry
from metrics.registry import Curve, metric_list, parse_metric, register


class Named:
    def __init__(self, **arguments):
        self.arguments = arguments
        self.name = arguments["name"]


@pytest.fixture(autouse=True)
def families(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", [])
    register(r"fd(?P<part>_random)?(?P<num>\d+k?)(?P<full>_full)?", "fd[_random]N[_full]", "a distance")(Named)
    register(r"other", "other", "has no number")(Named)


def test_parse_metric_gives_the_parts_of_a_name():
    expected = {"name": "fd_random500_full", "part": "_random", "full": "_full", "num_images": 500}
    assert parse_metric("fd_random500_full").arguments == expected
    assert parse_metric("fd50k").arguments == {"name": "fd50k", "part": None, "full": None, "num_images": 50_000}
    assert parse_metric("other").arguments == {"name": "other"}


@pytest.mark.parametrize("name", ["FD-Random500-full", " fd_random500_full "])
def test_parse_metric_reads_dashes_capitals_and_blanks(name):
    assert parse_metric(name).name == "fd_random500_full"


@pytest.mark.parametrize("name", ["", "fd", "fd500_half", "xfd500", "fd500_full "[:-2] + "x"])
def test_parse_metric_of_an_unknown_name_lists_those_that_there_are(name):
    with pytest.raises(ValueError, match=r"expected one of fd\[_random\]N\[_full\], other, .*; came"):
        parse_metric(name)


@pytest.mark.parametrize("name", ["fd0", "fd1", "fd10000001", "fd99999k"])
def test_parse_metric_with_an_impossible_number_of_images_is_an_error(name):
    with pytest.raises(ValueError, match=f"metric {name}: expected from 2 to 10 million images"):
        parse_metric(name)


def test_parse_metric_with_thousands_of_digits_or_other_digits_is_an_error():
    with pytest.raises(ValueError, match="from 2 to 10 million images, got '9{40}'$"):
        parse_metric("fd" + "9" * 5000)
    with pytest.raises(ValueError, match="expected one of"):
        parse_metric("fd\N{ARABIC-INDIC DIGIT EIGHT}")
    assert parse_metric("fd10000000").arguments["num_images"] == parse_metric("fd10000k").arguments["num_images"]


def test_metric_list_is_for_people():
    assert metric_list() == [("fd[_random]N[_full]", "a distance"), ("other", "has no number")]


def test_curve_needs_a_value_for_each_place():
    with pytest.raises(ValueError, match="curve: expected 2 values"):
        Curve(x_name="yaw_deg", x=(0.0, 1.0), y_name="fd", y=(1.0,))
