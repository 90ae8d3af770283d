"""Bases are looked for in known places, and what a file says about them commands nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from training.base_network import BASE_VARIABLE, base_places, missing_base_message
from training.network_difference import BaseReference

FINGERPRINT = "0123456789ab" + 52 * "c"


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BASE_VARIABLE, raising=False)


def reference(source: str = "base.pkl", path: str | None = None, relative: str | None = None) -> BaseReference:
    return BaseReference(source=source, path=path, relative_path=relative, fingerprint=FINGERPRINT)


def places(base: BaseReference, location: Any) -> list[str]:
    return [place.source for place in base_places(base, None if location is None else str(location))]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_local_base_is_looked_for_by_relative_then_absolute_path_then_beside(tmp_path):
    relative, absolute, beside = tmp_path / "nets/base.pkl", tmp_path / "old/base.pkl", tmp_path / "out/p/base.pkl"
    touch(relative, absolute, beside)
    base = reference("base.pkl", str(absolute), "../../nets/base.pkl")
    location = tmp_path / "out" / "p" / "tuned.safetensors"
    assert places(base, location) == [str(relative), str(absolute), str(beside)]
    relative.unlink()
    assert places(base, location) == [str(absolute), str(beside)]
    absolute.unlink()
    assert places(base, location) == [str(beside)]
    beside.unlink()
    assert places(base, location) == []


def test_location_may_be_relative_a_file_url_or_unknown(tmp_path, monkeypatch):
    touch(tmp_path / "base.pkl")
    monkeypatch.chdir(tmp_path)
    base = reference("base.pkl", "/absent/base.pkl", "base.pkl")
    expected = [str(tmp_path / "base.pkl")]
    assert places(base, "t") == places(base, (tmp_path / "t").as_uri()) == expected
    assert places(base, None) == []


def test_same_file_is_yielded_once(tmp_path):
    touch(tmp_path / "base.pkl")
    (tmp_path / "link").symlink_to(tmp_path)
    base = reference("base.pkl", str(tmp_path / "link" / "base.pkl"), "./base.pkl")
    assert len(places(base, tmp_path / "t")) == 1


def test_link_to_the_difference_counts_with_both_folders(tmp_path):
    touch(tmp_path / "a/t", tmp_path / "b/other", tmp_path / "b/base.pkl")
    (tmp_path / "b" / "t").symlink_to(tmp_path / "a" / "t")
    assert places(reference(path="/absent/base.pkl", relative="base.pkl"), tmp_path / "b" / "t") == [
        str(tmp_path / "b" / "base.pkl")
    ]


@pytest.mark.parametrize("name", ["demo", "init:debug"])
def test_names_mean_themselves_and_no_files(tmp_path, name, monkeypatch):
    touch(tmp_path / "demo", tmp_path / "init:debug")
    monkeypatch.chdir(tmp_path)
    base = reference(name, str(tmp_path / "demo"), "demo")
    assert places(base, tmp_path / "t") == places(base, None) == [name]


@pytest.mark.parametrize("location", ["t", "https://example.org/t", None])
def test_variable_comes_first(tmp_path, monkeypatch, location):
    touch(tmp_path / "base.pkl")
    base = reference(path=str(tmp_path / "base.pkl"))
    monkeypatch.setenv(BASE_VARIABLE, " https://example.com/mine.pkl ")
    first = next(base_places(base, location))
    assert first.source == "https://example.com/mine.pkl" and first.may_fetch
    monkeypatch.setenv(BASE_VARIABLE, " ")
    assert next(base_places(base, location)).source == str(tmp_path / "base.pkl")


@pytest.mark.parametrize(
    "url", ["https://example.org/nets/base.pkl?a=b", "http://10.0.0.1/x", "hf://org/repo/base.pkl"]
)
def test_url_of_a_header_is_taken_from_the_cache_only(url, tmp_path):
    (place,) = base_places(reference(url), str(tmp_path / "t"))
    assert place.source == url and not place.may_fetch


def test_url_base_may_lie_beside_the_difference(tmp_path):
    touch(tmp_path / "base.pkl")
    base = reference("https://example.org/nets/base.pkl?a=b")
    assert places(base, tmp_path / "t")[0] == str(tmp_path / "base.pkl")


def test_difference_from_a_url_is_fetched_from_its_own_folder_alone():
    base = reference("nets/base.pkl", "/absent/nets/base.pkl", "../../../../base.pkl")
    (place,) = base_places(base, "https://example.org/a/b/t.safetensors?x=y#sha256=00")
    assert place.source == "https://example.org/a/b/base.pkl" and place.may_fetch


HOSTILE = {
    "ftp": reference("ftp://example.org/base.pkl"),
    "script": reference("javascript://alert"),
    "file url": reference("file:///etc/passwd"),
    "device": reference("x", "/dev/zero", "../../../../../../../../../dev/zero"),
    "folder": reference("x", "/", ".."),
    "share": reference("x", "//example.org/share/base.pkl", "\\\\example.org\\share\\base.pkl"),
    "null byte": reference("x\0", "/a\0b", "a\0b"),
    "long": reference("x" * 10**6, "/" + "x" * 10**6, "x" * 10**6),
    "empty": reference("", "", ""),
    "dots": reference("..", "..", "."),
    "url as path": reference("x", "https://example.org/a", "https://example.org/a"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_hints_lead_nowhere(name, tmp_path):
    assert places(HOSTILE[name], tmp_path / "t") == []


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_hints_never_leave_the_folder_of_a_url(name):
    for place in base_places(HOSTILE[name], "https://example.com/a/t"):
        assert place.source.startswith("https://example.com/a/") and ".." not in place.source


def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "base.pkl")
    assert places(reference(path=str(tmp_path / "base.pkl"), relative="base.pkl"), tmp_path / "t") == []


def test_message_names_the_base_where_it_was_looked_for_and_what_to_do():
    message = missing_base_message("t.safetensors", reference("a.pkl", "/nets/a.pkl"), ["/x/a.pkl: no", "/y/a.pkl: no"])
    for part in (
        "t.safetensors: ",
        "'a.pkl'",
        "/nets/a.pkl",
        "'0123456789ab'",
        "/x/a.pkl: no; /y/a.pkl: no",
        BASE_VARIABLE,
    ):
        assert part in message
    assert FINGERPRINT not in message
    assert "never fetched" not in message


def test_message_says_that_urls_are_not_fetched():
    assert "a URL in a difference is never fetched" in missing_base_message("t", reference("https://a.b/c"), [])


def test_message_shows_hostile_texts_harmlessly():
    base = BaseReference(source="\x1b[2Jx\n" * 1000, path="\n", relative_path=None, fingerprint="\x1b" * 64)
    message = missing_base_message("t", base, [])
    assert message.isprintable() and len(message) < 3000
