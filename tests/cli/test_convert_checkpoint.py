"""Published pickles become safetensors files with the same networks, and nothing else."""

import copy
import errno
import json
import os

import pytest
import safetensors
import torch

import legacy
from dnnlib import sources
from dnnlib.util import file_sha256
from tests.cli.running import contents, fail, start, succeed
from tests.inference.published_pickle import write_snapshot
from training.network_difference import network_fingerprint, write_difference

SCRIPT = "convert_checkpoint.py"


def read_networks(path):
    with open(path, "rb") as file:
        return legacy.load_network_pkl(file)


def read_header(path) -> dict:
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["header"])


@pytest.fixture(scope="module")
def pair_pickle(tmp_path_factory):
    """Return a snapshot whose `G` is the same network as its `G_ema`."""
    path = tmp_path_factory.mktemp("networks") / "pair.pkl"
    write_snapshot(path, "eg3d", both=True)
    return path


def test_converted_networks_equal_the_pickled(pair_pickle, tmp_path):
    result = succeed(SCRIPT, pair_pickle, tmp_path / "new" / "a.safetensors")
    assert result.stdout.startswith(f"wrote G, G_ema to {tmp_path / 'new' / 'a.safetensors'} (")
    pickled, converted = read_networks(pair_pickle), read_networks(tmp_path / "new" / "a.safetensors")
    assert converted["D"] is None
    for name in ("G", "G_ema"):
        assert converted[name].config == pickled[name].config
        ours, expected = converted[name].state_dict(), pickled[name].state_dict()
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_converted_file_gives_the_same_pictures(sphere_pickle, tmp_path):
    converted = tmp_path / "sphere.safetensors"
    succeed(SCRIPT, sphere_pickle, converted)
    for source, outdir in ((sphere_pickle, "a"), (converted, "b")):
        shapes = ("--shapes", "--shape-format", "ply", "--shape-res", 12)
        succeed("gen_samples.py", "--network", source, "--nrr", 8, "--seeds", 0, *shapes, "--outdir", tmp_path / outdir)
    assert len(contents(tmp_path / "a")) == 2
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_converted_file_says_where_it_comes_from(sphere_pickle, tmp_path):
    succeed(SCRIPT, sphere_pickle, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert header["provenance"] == {"converted_from": "sphere", "source_sha256": file_sha256(sphere_pickle)}
    assert set(header["networks"]) == {"G_ema"}


def test_converting_twice_gives_the_same_bytes(sphere_pickle, tmp_path):
    for name in ("a", "b"):
        assert start([SCRIPT, sphere_pickle, tmp_path / f"{name}.safetensors"]).wait() == 0
    files = contents(tmp_path)
    assert files["a.safetensors"] == files["b.safetensors"]


def test_networks_keeps_those_named_alone(pair_pickle, tmp_path):
    succeed(SCRIPT, pair_pickle, tmp_path / "small.safetensors", "--networks", "G_ema")
    succeed(SCRIPT, pair_pickle, tmp_path / "both.safetensors", "--networks", "G_ema", "--networks", "G")
    assert set(read_header(tmp_path / "small.safetensors")["networks"]) == {"G_ema"}
    assert set(read_header(tmp_path / "both.safetensors")["networks"]) == {"G", "G_ema"}


def test_networks_that_the_snapshot_lacks_are_an_error(sphere_pickle, tmp_path):
    message = fail(SCRIPT, sphere_pickle, tmp_path / "a.safetensors", "--networks", "G_ema", "--networks", "D")
    assert "sphere.pkl: expected D" in message
    write_snapshot(tmp_path / "empty.pkl", G_ema=None)
    message = fail(SCRIPT, tmp_path / "empty.pkl", tmp_path / "a.safetensors")
    assert "empty.pkl: expected G, D, G_ema" in message
    assert not (tmp_path / "a.safetensors").exists()


def test_converted_file_can_be_made_smaller(pair_pickle, tmp_path):
    succeed(SCRIPT, pair_pickle, tmp_path / "both.safetensors")
    succeed(SCRIPT, tmp_path / "both.safetensors", tmp_path / "small.safetensors", "--networks", "G_ema")
    both, small = (read_networks(tmp_path / f"{name}.safetensors") for name in ("both", "small"))
    assert small["G"] is None
    expected = both["G_ema"].state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in small["G_ema"].state_dict().items())


def test_half_is_half_as_large_and_says_so(sphere_pickle, tmp_path):
    succeed(SCRIPT, sphere_pickle, tmp_path / "a.safetensors")
    result = succeed(SCRIPT, sphere_pickle, tmp_path / "b.safetensors", "--half")
    sizes = [(tmp_path / name).stat().st_size for name in ("a.safetensors", "b.safetensors")]
    assert sizes[1] < 0.55 * sizes[0]
    assert result.stdout.endswith(f"b.safetensors ({sizes[1] / 1e6:.1f} MB, rounded to float16)\n")
    assert read_header(tmp_path / "b.safetensors")["provenance"]["rounded_to"] == "float16"
    whole, rounded = (read_networks(tmp_path / name)["G_ema"] for name in ("a.safetensors", "b.safetensors"))
    assert rounded.config == whole.config
    expected = whole.state_dict()
    for name, tensor in rounded.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        # float16 has 11 binary digits, and below 2^-14 fixed steps of 2^-24
        torch.testing.assert_close(tensor, expected[name], rtol=2**-11, atol=2**-25)


def test_half_of_half_changes_nothing(sphere_pickle, tmp_path):
    succeed(SCRIPT, sphere_pickle, tmp_path / "a.safetensors", "--half")
    succeed(SCRIPT, tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--half")
    first, second = (read_networks(tmp_path / f"{name}.safetensors")["G_ema"] for name in "ab")
    assert network_fingerprint(first) == network_fingerprint(second)


@pytest.mark.parametrize("half", [False, True])
def test_difference_becomes_a_whole_network(sphere_pickle, tmp_path, half):
    base = read_networks(sphere_pickle)["G_ema"]
    tuned = copy.deepcopy(base)
    tuned.decoder.net[0].bias += 0.5
    tuned.rendering_kwargs["ray_start"] = 2.35
    difference = tmp_path / "tuned.safetensors"
    write_difference(difference, base, tuned, sphere_pickle, half=half, provenance={"photo": "me"})
    expected = read_networks(difference)["G_ema"]
    result = succeed(SCRIPT, difference, tmp_path / "whole.safetensors")
    assert result.stdout.startswith("wrote G_ema to ")
    whole = read_networks(tmp_path / "whole.safetensors")
    assert whole["G"] is None and whole["G_ema"].config == tuned.config
    assert network_fingerprint(whole["G_ema"]) == network_fingerprint(expected)
    if not half:
        assert network_fingerprint(expected) == network_fingerprint(tuned)
    assert read_header(tmp_path / "whole.safetensors")["provenance"] == {
        "converted_from": "tuned",
        "source_sha256": file_sha256(difference),
        "base": {"name": "sphere", "fingerprint": network_fingerprint(base)},
        "difference": {"photo": "me"},
    }


def test_difference_without_its_base_is_one_line_and_leaves_nothing(sphere_pickle, tmp_path, monkeypatch):
    monkeypatch.delenv("SPHEREHEAD_BASE", raising=False)
    base = read_networks(sphere_pickle)["G_ema"]
    write_difference(tmp_path / "tuned.safetensors", base, base, tmp_path / "absent.pkl", provenance={})
    message = fail(SCRIPT, tmp_path / "tuned.safetensors", tmp_path / "out" / "whole.safetensors")
    assert "tuned.safetensors" in message and "absent.pkl" in message and "SPHEREHEAD_BASE" in message
    message = fail(SCRIPT, tmp_path / "tuned.safetensors", tmp_path / "out" / "whole.safetensors", "--networks", "D")
    assert "tuned.safetensors: expected D" in message
    assert not contents(tmp_path / "out")


def test_bundled_network_is_converted_by_its_name(sphere_pickle, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEMO_PATH", sphere_pickle)
    succeed(SCRIPT, "demo", tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors")["provenance"]["converted_from"] == "demo"


def test_existing_file_is_refused_and_untouched_unless_overwriting(sphere_pickle, tmp_path):
    destination = tmp_path / "a.safetensors"
    destination.write_bytes(b"precious")
    assert "a.safetensors is there already; give --overwrite" in fail(SCRIPT, sphere_pickle, destination)
    assert destination.read_bytes() == b"precious"
    succeed(SCRIPT, sphere_pickle, destination, "--overwrite")
    assert read_networks(destination)["G_ema"] is not None


def test_failed_conversion_keeps_the_older_file(tmp_path):
    (tmp_path / "broken.pkl").write_bytes(b"\x80\x04 broken")
    (tmp_path / "a.safetensors").write_bytes(b"precious")
    assert "broken.pkl" in fail(SCRIPT, tmp_path / "broken.pkl", tmp_path / "a.safetensors", "--overwrite")
    assert contents(tmp_path)["a.safetensors"] == b"precious"


def test_full_disk_is_one_line_and_leaves_nothing(sphere_pickle, tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.replace", no_space)
    assert fail(SCRIPT, sphere_pickle, tmp_path / "a.safetensors").startswith("Error: no space left on the disk")
    assert not contents(tmp_path)


@pytest.mark.parametrize("name", ["a.pkl", "a", "a.safetensors.bak"])
def test_other_suffix_is_a_usage_error(sphere_pickle, tmp_path, name):
    assert "expected a name that ends in .safetensors" in fail(SCRIPT, sphere_pickle, tmp_path / name)
    assert not contents(tmp_path)


def test_destination_that_is_a_folder_is_a_usage_error(sphere_pickle, tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    assert "a.safetensors" in fail(SCRIPT, sphere_pickle, tmp_path / "a.safetensors")
