"""Names of networks are told apart: paths, URLs, the bundled network, presets."""

import re
from pathlib import Path

import pytest

from dnnlib import sources

KINDS = {
    "demo": "demo",
    "./demo": "path",
    "demo.pkl": "path",
    "init:debug": "preset",
    "init:": "preset",
    "a/init:debug.pkl": "path",
    "C:\\nets\\a.pkl": "path",
    "file:///tmp/a.pkl": "file",
    "FILE:///tmp/a.pkl": "file",
    "https://example.org/a.pkl": "url",
    "hf://org/repo/a.pkl": "url",
    "ftp://example.org/a.pkl": "url",
}


@pytest.mark.parametrize("source", KINDS)
def test_kinds_of_sources_are_told_apart(source):
    kind = KINDS[source]
    assert sources.is_demo(source) == (kind == "demo")
    assert sources.is_untrained(source) == (kind == "preset")
    assert (sources.local_path(source) is None) == (kind not in ("path", "file"))
    assert (sources.url_scheme(source) != "") == (kind in ("file", "url"))


def test_paths_are_taken_like_texts():
    assert sources.local_path(Path("a/b.pkl")) == sources.local_path("a/b.pkl") == Path("a/b.pkl")
    assert sources.local_path("file:///tmp/a%20b.pkl") == Path("/tmp/a b.pkl")


def test_resolve_demo_replaces_the_name_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEMO_PATH", tmp_path / "demo.safetensors")
    with pytest.raises(FileNotFoundError, match=re.escape(f"demo: expected the bundled network at {tmp_path}")):
        sources.resolve_demo("demo")
    sources.DEMO_PATH.write_bytes(b"")
    assert sources.resolve_demo("demo") == str(tmp_path / "demo.safetensors")
    for other in ("demo.pkl", "./demo", "init:debug", "https://example.org/demo"):
        assert sources.resolve_demo(other) == other


def test_bundled_network_is_in_the_checkout(repo_root):
    assert sources.DEMO_PATH == repo_root / "models" / "demo.safetensors"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("a/b c.pkl", "b c.pkl"),
        ("file:///a/b%20c.pkl", "b c.pkl"),
        ("https://example.org/a/b%20c.pkl?x=/y#sha256=00", "b c.pkl"),
        ("https://example.org", ""),
        ("hf://org/repo/a/b.pkl@main", "b.pkl"),
        ("hf://org/repo@main/b.pkl", "b.pkl"),
        ("hf://org/repo/b.pkl@refs/pr/1#sha256=00", "b.pkl"),
        ("demo", ""),
        ("init:debug", ""),
    ],
)
def test_file_name_is_that_behind_a_path_or_url(source, name):
    assert sources.file_name(source) == name


@pytest.mark.parametrize(
    ("url", "beside"),
    [
        ("https://example.org/a/t.safetensors?x=/y#z", "https://example.org/a/b%20c%3F.pkl"),
        ("http://me:pw@example.org:80/t", "http://me:pw@example.org:80/b%20c%3F.pkl"),
        ("http://example.org", "http://example.org/b%20c%3F.pkl"),
        ("hf://org/repo/t.safetensors", "hf://org/repo/b c?.pkl"),
        ("hf://org/repo/a/t.safetensors@v/2#sha256=00", "hf://org/repo/a/b c?.pkl@v/2"),
        ("hf://org/repo@v2/a/t.safetensors", "hf://org/repo@v2/a/b c?.pkl"),
        ("hf://org/t", None),
        ("a/t.safetensors", None),
        ("ftp://example.org/a", None),
        ("demo", None),
    ],
)
def test_url_beside_stays_in_the_folder(url, beside):
    assert sources.url_beside(url, "b c?.pkl") == beside


@pytest.mark.parametrize("name", ["", ".", "..", "../a.pkl", "a/b.pkl", "a\\b.pkl", "/a", "a@b", "a\nb", "a\0b"])
def test_url_beside_names_that_lead_elsewhere_give_none(name):
    assert sources.url_beside("https://example.org/a/t", name) is None
    assert sources.url_beside("hf://org/repo/a/t", name) is None


@pytest.mark.parametrize("name", ["https://evil.org", "//evil.org", "?a=b", "#a", "%2e%2e", "a:b@evil"])
def test_url_beside_names_cannot_change_the_host(name):
    url = sources.url_beside("https://example.org/a/t", name)
    assert url is None or url.startswith("https://example.org/a/%")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:secret@example.org/a", "https://example.org/a"),
        ("http://token@example.org", "http://example.org"),
        ("https://a:b@c@example.org/x", "https://example.org/x"),
        ("https://example.org/a@b?c=d@e", "https://example.org/a@b?c=d@e"),
        ("hf://org/repo/a@v", "hf://org/repo/a@v"),
        ("a@b/c.pkl", "a@b/c.pkl"),
    ],
)
def test_without_credentials_removes_them_alone(url, shown):
    assert sources.without_credentials(url) == shown
