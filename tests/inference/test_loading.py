"""Networks come from files, URLs and presets, always the same, and whatever is wrong is one clear error."""

import copy
import functools
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import training.snapshots
from dnnlib import serialize, sources
from dnnlib.util import file_sha256
from inference.loading import is_untrained, load_generator
from tests.inference.published_pickle import write_snapshot
from torch_utils.tensor_file import write_tensor_file
from training.network_difference import KIND, BaseReference, DifferenceHeader, write_difference


def assert_same_weights(ours, expected):
    ours, expected = ours.state_dict(), expected.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.fixture
def server(snapshot_path, tmp_path, monkeypatch):
    """Serve the folder of the snapshot; yields its URL and the requested paths, with an empty cache."""
    requested = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            requested.append(self.path)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("SPHEREHEAD_CACHE_DIR", str(tmp_path / "cache"))
    handler = functools.partial(Handler, directory=str(snapshot_path.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/tiny%20sphere.pkl", requested
        httpd.shutdown()


@pytest.mark.parametrize("form", [str, Path, lambda path: path.as_uri()], ids=["str", "Path", "file-url"])
def test_load_generator_file_gives_a_generator_for_inference(snapshot_path, parsing_generator, form):
    generator = load_generator(form(snapshot_path))
    assert_same_weights(generator, parsing_generator)
    assert not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())


def test_load_generator_converted_file_equals_the_pickle(snapshot_path, tmp_path):
    pickled = load_generator(snapshot_path)
    training.snapshots.save_networks(tmp_path / "a.safetensors", {"G_ema": pickled}, {})
    converted = load_generator(tmp_path / "a.safetensors")
    assert converted.config == pickled.config
    assert_same_weights(converted, pickled)


def test_load_generator_url_is_downloaded_once_and_checked(server, snapshot_path, parsing_generator):
    url, requested = server
    sha256 = file_sha256(snapshot_path)
    for source in (url, url, f"{url}#sha256={sha256}"):
        assert_same_weights(load_generator(source), parsing_generator)
    assert requested == ["/tiny%20sphere.pkl"]


@pytest.fixture
def tuned(parsing_generator):
    """Return a copy of the generator of the snapshot with one changed tensor."""
    tuned = copy.deepcopy(parsing_generator)
    tuned.decoder.net[0].bias += 0.5
    return tuned


@pytest.fixture
def difference(snapshot_path, parsing_generator, tuned, tmp_path, monkeypatch):
    """Return a difference from the snapshot, which is at another place by now."""
    monkeypatch.delenv("SPHEREHEAD_BASE", raising=False)
    path = tmp_path / "difference" / "tuned.safetensors"
    write_difference(path, parsing_generator, tuned, tmp_path / "gone" / snapshot_path.name, provenance={})
    return path


def test_load_generator_difference_from_a_url_finds_its_base_there(server, difference, snapshot_path, tuned):
    url, requested = server
    served = snapshot_path.parent / "tuned.safetensors"
    served.write_bytes(difference.read_bytes())
    url = url.replace(url.rpartition("/")[2], "tuned.safetensors")
    try:
        for source in (url, f"{url}?download=1", f"{url}#sha256={file_sha256(difference)}"):
            assert_same_weights(load_generator(source), tuned)
    finally:
        served.unlink()
    assert requested == ["/tuned.safetensors", "/tiny%20sphere.pkl", "/tuned.safetensors?download=1"]


def test_load_generator_difference_from_a_url_whose_base_is_not_there_raises(
    server, parsing_generator, tuned, snapshot_path, tmp_path
):
    url, requested = server
    served = snapshot_path.parent / "tuned.safetensors"
    base = BaseReference(source="x", path="/gone/other.pkl", relative_path="../tiny sphere.pkl", fingerprint="0" * 64)
    header = DifferenceHeader(base=base, config=tuned.config, scales={}, provenance={})
    write_tensor_file(served, KIND, {}, serialize.to_json(header))
    url = url.replace(url.rpartition("/")[2], "tuned.safetensors")
    try:
        with pytest.raises(ValueError, match=rf"^{url}: .*other\.pkl.*expected status 200, came 404.*SPHEREHEAD_BASE"):
            load_generator(url)
    finally:
        served.unlink()
    assert requested == ["/tuned.safetensors", "/other.pkl"]  # and nothing outside of its folder


def test_load_generator_base_of_a_difference_comes_from_the_cache_or_by_the_users_word(
    server, parsing_generator, tuned, tmp_path, monkeypatch
):
    url, requested = server
    monkeypatch.delenv("SPHEREHEAD_BASE", raising=False)
    write_difference(tmp_path / "tuned.safetensors", parsing_generator, tuned, url, provenance={})
    with pytest.raises(ValueError, match=r"not in the cache.*a URL in a difference is never fetched"):
        load_generator(tmp_path / "tuned.safetensors")
    assert requested == []
    monkeypatch.setenv("SPHEREHEAD_BASE", url)
    assert_same_weights(load_generator(tmp_path / "tuned.safetensors"), tuned)
    monkeypatch.delenv("SPHEREHEAD_BASE")
    assert_same_weights(load_generator(tmp_path / "tuned.safetensors"), tuned)
    assert requested == ["/tiny%20sphere.pkl"]


def test_load_generator_demo_is_the_bundled_network(snapshot_path, parsing_generator, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEMO_PATH", snapshot_path)
    assert_same_weights(load_generator("demo"), parsing_generator)
    monkeypatch.setattr(sources, "DEMO_PATH", tmp_path / "demo.safetensors")
    with pytest.raises(FileNotFoundError, match=f"demo: expected the bundled network at {tmp_path}"):
        load_generator("demo")


def test_load_generator_url_with_another_checksum_raises(server, tmp_path):
    url, _ = server
    with pytest.raises(ValueError, match="sha256|SHA-256"):
        load_generator(f"{url}#sha256={'0' * 64}")
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < 10_000  # not the network of megabytes


def test_load_generator_preset_is_reproducible_and_leaves_random_numbers_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = load_generator("init:debug")
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(6)
    assert_same_weights(load_generator("init:debug"), first)
    assert not first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_is_untrained_knows_presets():
    assert is_untrained("init:debug")
    assert not is_untrained("a/init:debug.pkl")
    assert not is_untrained(Path("spherehead.pkl"))
    assert not is_untrained("demo")


@pytest.mark.parametrize("source", ["init:nope", "init:"])
def test_load_generator_unknown_preset_raises_and_lists_the_known(source):
    with pytest.raises(ValueError, match="preset: expected one of spherehead, .*debug"):
        load_generator(source)


def test_load_generator_without_g_ema_raises_and_names_the_file(tmp_path):
    generator = write_snapshot(tmp_path / "a.pkl", G_ema=None, D="not read, because only G_ema is")
    with pytest.raises(ValueError, match=r"a\.pkl: expected a network G_ema"):
        load_generator(tmp_path / "a.pkl")
    training.snapshots.save_networks(tmp_path / "b.safetensors", {"G": generator}, {})
    with pytest.raises(ValueError, match=r"b\.safetensors: expected a network G_ema"):
        load_generator(tmp_path / "b.safetensors")


@pytest.mark.parametrize(("name", "error"), [("absent.pkl", FileNotFoundError), ("", IsADirectoryError)])
def test_load_generator_no_file_raises(tmp_path, name, error):
    with pytest.raises(error, match=name or "directory"):
        load_generator(tmp_path / name)


@pytest.mark.parametrize("source", ["init:debug", "absent.pkl"])
def test_load_generator_absent_device_raises_before_anything_is_read(source):
    with pytest.raises(ValueError, match="device: .*'cuda:123'"):
        load_generator(source, "cuda:123")


def test_load_generator_auto_device_is_one_that_is_there():
    generator = load_generator("init:debug", "auto")
    assert next(generator.parameters()).device.type == ("cuda" if torch.cuda.is_available() else "cpu")
