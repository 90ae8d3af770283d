"""Every script that takes a network takes a difference, at a path or a URL, and the bundled network by its name."""

from __future__ import annotations

import copy
import functools
import http.server
import json
import threading
import types
from pathlib import Path

import pytest

import train
from dnnlib import sources
from dnnlib.util import file_sha256
from inference.loading import load_generator
from tests.cli.running import contents, fail, succeed
from training.network_difference import network_fingerprint, write_difference
from training.snapshots import save_networks

FAST = ("--nrr", 8, "--seeds", 0)
VIDEO = (*FAST, "--w-frames", 2)
SCRIPTS = {"gen_samples.py": FAST, "gen_videos.py": VIDEO, "gen_videos_interp.py": (*VIDEO, "--seeds", "0-1")}


@pytest.fixture(autouse=True)
def _no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPHEREHEAD_BASE", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, a difference from it, and the network that the two mean."""
    folder = tmp_path_factory.mktemp("difference")
    base = load_generator("init:debug")
    tuned = copy.deepcopy(base)
    tuned.decoder.net[-1].bias[0] += 1000  # matter everywhere
    save_networks(folder / "base.safetensors", {"G_ema": base}, {})
    save_networks(folder / "whole.safetensors", {"G_ema": tuned}, {})
    write_difference(folder / "tuned.safetensors", base, tuned, folder / "base.safetensors", provenance={})
    return folder


def outputs(script: str, network: object, outdir: Path) -> list[bytes]:
    """Return the contents of what a script writes."""
    succeed(script, "--network", network, *SCRIPTS[script], "--outdir", outdir)
    return list(contents(outdir).values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_difference_gives_the_pictures_of_the_whole_network(script, folder, tmp_path):
    whole = outputs(script, folder / "whole.safetensors", tmp_path / "whole")
    assert whole and outputs(script, folder / "tuned.safetensors", tmp_path / "tuned") == whole
    if script == "gen_samples.py":  # pictures can tell the two networks apart
        assert outputs(script, folder / "base.safetensors", tmp_path / "base") != whole


def test_difference_at_a_url_gives_the_pictures_of_the_whole_network(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SPHEREHEAD_CACHE_DIR", str(tmp_path / "cache"))
    published = tmp_path / "published"
    published.mkdir()
    for name in ("base.safetensors", "tuned.safetensors"):
        (published / name).write_bytes((folder / name).read_bytes())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(published))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        sha256 = file_sha256(folder / "tuned.safetensors")
        url = f"http://127.0.0.1:{server.server_port}/tuned.safetensors#sha256={sha256}"
        came = outputs("gen_samples.py", url, tmp_path / "url")
        server.shutdown()
    assert came == outputs("gen_samples.py", folder / "whole.safetensors", tmp_path / "whole")


@pytest.mark.parametrize("script", SCRIPTS)
def test_difference_without_its_base_is_one_line(script, folder, tmp_path):
    base = load_generator("init:debug")
    write_difference(tmp_path / "t.safetensors", base, base, "https://example.org/absent.pkl", provenance={})
    message = fail(script, "--network", tmp_path / "t.safetensors", *SCRIPTS[script], "--outdir", tmp_path / "out")
    assert "t.safetensors" in message and "https://example.org/absent.pkl" in message and "SPHEREHEAD_BASE" in message
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize("script", SCRIPTS)
def test_bundled_network_goes_by_its_name(script, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEMO_PATH", folder / "whole.safetensors")
    plan = json.loads(succeed(script, "--network", "demo", *SCRIPTS[script], "--outdir", "o", "--dry-run").stdout)
    assert plan["network"] == "demo" and "o/demo_90" in json.dumps(plan)
    monkeypatch.setattr(sources, "DEMO_PATH", tmp_path / "models" / "demo.safetensors")
    message = fail(script, "--network", "demo", *SCRIPTS[script], "--outdir", tmp_path / "out")
    assert str(tmp_path / "models" / "demo.safetensors") in message
    assert not contents(tmp_path / "out")


def test_bundled_network_gives_its_pictures(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEMO_PATH", folder / "whole.safetensors")
    result = succeed("gen_samples.py", "--network", "demo", *FAST, "--outdir", tmp_path / "demo")
    assert "untrained" not in result.stdout + result.stderr
    expected = outputs("gen_samples.py", folder / "whole.safetensors", tmp_path / "whole")
    assert list(contents(tmp_path / "demo").values()) == expected


def test_training_starts_from_a_difference(folder):
    networks = train._load_start(types.SimpleNamespace(resume_from=str(folder / "tuned.safetensors")))
    assert set(networks) == {"G_ema"}
    assert network_fingerprint(networks["G_ema"]) == network_fingerprint(load_generator(folder / "whole.safetensors"))
