"""Differences bring tuned weights back, exactly or rounded, and hold nothing that did not change."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from tests.helpers.threads import one_thread  # noqa: F401 (a fixture for every test)
from tests.helpers.tiny import labels, tiny_network
from torch_utils.tensor_file import read_tensor_file, write_tensor_file
from training.network_difference import (
    KIND,
    base_reference,
    is_difference,
    network_fingerprint,
    read_difference,
    write_difference,
)
from training.snapshots import load_networks, save_networks
from training.triplane import TriPlaneGenerator

CHANGED = {"decoder.net.0.weight", "backbone.synthesis.b8.conv0.noise_const", "torgb.bias"}
SIZE = 1e-3  # of the changes


def same_bits(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return network_fingerprint(a) == network_fingerprint(b)


@pytest.fixture(scope="module")
def base() -> TriPlaneGenerator:
    return tiny_network().requires_grad_(False)


@pytest.fixture(scope="module")
def tuned(base) -> TriPlaneGenerator:
    """Return the base with three changed tensors (one a buffer) and settings of its own."""
    tuned = copy.deepcopy(base)
    random_numbers = torch.Generator().manual_seed(0)
    for name, tensor in tuned.state_dict().items():
        if name in CHANGED:
            tensor.add_(SIZE * torch.randn(tensor.shape, generator=random_numbers))
    tuned.rendering_kwargs["ray_start"] = 2.35
    tuned.rendering_kwargs["my_hint"] = [1, {"a": None}]
    tuned.neural_rendering_resolution = 13
    return tuned


@pytest.fixture(scope="module")
def content(base, tuned, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("difference") / "tuned.safetensors"
    write_difference(path, base, tuned, "base.pkl", provenance={"photo": "Zürich"})
    return path.read_bytes()


@pytest.fixture(scope="module")
def half_content(base, tuned, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("difference") / "tuned.safetensors"
    write_difference(path, base, tuned, "base.pkl", half=True, provenance={})
    return path.read_bytes()


def read(content: bytes):
    return read_difference(io.BytesIO(content), "some.file")


# The fingerprint.


def test_network_fingerprint_depends_on_weights_and_not_on_settings(base, tuned):
    fingerprint = network_fingerprint(base)
    assert len(fingerprint) == 64 and fingerprint == network_fingerprint(copy.deepcopy(base))
    assert fingerprint != network_fingerprint(tuned)
    other = copy.deepcopy(base)
    other.rendering_kwargs["ray_start"] = 1.0
    other.neural_rendering_resolution = 99
    assert network_fingerprint(other) == fingerprint


@pytest.mark.parametrize("values", [(0.0, -0.0), (1.0, 1.0 + 2**-23), (0.0, 1e-45)])
def test_network_fingerprint_sees_single_bits(base, values):
    fingerprints = set()
    for value in values:
        generator = copy.deepcopy(base)
        generator.torgb.bias[0] = value
        fingerprints.add(network_fingerprint(generator))
    assert len(fingerprints) == 2


def test_network_fingerprint_is_that_of_the_saved_network_and_ignores_memory_formats(base, tmp_path):
    save_networks(tmp_path / "a", {"G_ema": base}, {})
    with open(tmp_path / "a", "rb") as file:
        assert same_bits(load_networks(file)["G_ema"], base)
    assert same_bits(copy.deepcopy(base).to(memory_format=torch.channels_last), base)


def test_network_fingerprint_stays_the_same_between_versions():
    """Files that people keep hold this number; a change of it would orphan them."""
    generator = tiny_network("tri_plane", parsing_classes=0)
    with torch.no_grad():
        for index, tensor in enumerate(generator.state_dict().values()):
            tensor.fill_(index)
    assert network_fingerprint(generator) == "9bb4d8d8b812ad43cd33335a00a81729c044cb7b58fe81231b1040bbd1d0a84a"


# Round trips.


def test_exact_difference_brings_back_every_bit_and_setting(base, tuned, content):
    loaded = read(content).apply(base)
    assert same_bits(loaded, tuned)
    assert loaded.config == tuned.config
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


@torch.no_grad()
def test_applied_difference_renders_as_the_tuned_network(base, tuned, content):
    ws = torch.randn(1, tuned.backbone.num_ws, 512, generator=torch.Generator().manual_seed(0))
    images = []
    for generator in (tuned, read(content).apply(base)):
        randomness = torch.Generator().manual_seed(0)
        images.append(generator.synthesis(ws, labels(1), noise_mode="const", generator=randomness)["image"])
    assert images[0].equal(images[1])


def test_difference_holds_what_changed_and_nothing_else(content, half_content):
    for data in (content, half_content):
        assert set(read(data).tensors) == CHANGED
    assert not read(content).header.scales and set(read(half_content).header.scales) == CHANGED
    tensors = read(content).tensors
    data_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert data_bytes < len(content) < data_bytes + 10_000


def test_base_stays_as_it_is_and_shares_no_memory(base, content):
    before = network_fingerprint(base)
    loaded = read(content).apply(base)
    for tensor in loaded.state_dict().values():
        tensor.zero_()
    assert network_fingerprint(base) == before


def test_half_difference_is_off_by_a_small_part_of_the_change(base, tuned, half_content):
    loaded = read(half_content).apply(base).state_dict()
    old = base.state_dict()
    for name, new in tuned.state_dict().items():
        change = (new.double() - old[name].double()).abs()
        # 2^-11 of the change by float16, and half a unit in the last place of the weight by float32.
        bound = change * 2**-11 + change.max() * 2**-39 + new.abs().double() * 2**-24
        assert ((loaded[name].double() - new.double()).abs() <= bound).all(), name


def test_half_difference_is_half_as_large(base, tmp_path):
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        parameter.mul_(1.001)
    sizes = []
    for half in (False, True):
        write_difference(tmp_path / "a", base, tuned, "base.pkl", half=half, provenance={})
        sizes.append((tmp_path / "a").stat().st_size)
    assert sizes[1] < 0.55 * sizes[0]


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-8, 1.0, 1e30, 3e38])
def test_half_difference_of_any_size_is_kept(base, tmp_path, size):
    zero, changed = copy.deepcopy(base), copy.deepcopy(base)
    zero.torgb.bias.zero_()
    changed.torgb.bias[:] = size * torch.tensor([1.0, -0.7, 0.0])
    write_difference(tmp_path / "a", zero, changed, "base.pkl", half=True, provenance={})
    loaded = read((tmp_path / "a").read_bytes()).apply(zero)
    # float16 of a scaled number: 2^-11; denormal float32 below 1e-38: 1.4e-45.
    torch.testing.assert_close(loaded.torgb.bias, changed.torgb.bias, rtol=2**-11, atol=1.5e-45)


def test_signs_of_zeros_count_in_exact_files_alone(base, tmp_path):
    positive, negative = copy.deepcopy(base), copy.deepcopy(base)
    positive.torgb.bias.zero_()
    negative.torgb.bias.zero_().neg_()
    for half, names in ((False, {"torgb.bias"}), (True, set())):
        write_difference(tmp_path / "a", positive, negative, "base.pkl", half=half, provenance={})
        assert set(read((tmp_path / "a").read_bytes()).tensors) == names


def test_difference_without_changes_is_empty_and_gives_the_base(base, tmp_path):
    for tuned in (base, copy.deepcopy(base)):
        write_difference(tmp_path / "a", base, tuned, "base.pkl", provenance={})
        difference = read((tmp_path / "a").read_bytes())
        assert not difference.tensors and same_bits(difference.apply(base), base)


def test_tuned_network_may_share_tensors_with_its_base(base, tmp_path):
    tuned = copy.deepcopy(base)
    for name, parameter in base.backbone.named_parameters():
        module, _, last = name.rpartition(".")
        tuned.backbone.get_submodule(module)._parameters[last] = parameter
    tuned.decoder.net[0].bias.add_(1)
    write_difference(tmp_path / "a", base, tuned, "base.pkl", provenance={})
    assert set(read((tmp_path / "a").read_bytes()).tensors) == {"decoder.net.0.bias"}


def test_writing_twice_gives_the_same_bytes(base, tuned, tmp_path, content):
    write_difference(tmp_path / "a", base, tuned, "base.pkl", provenance={"photo": "Zürich"})
    reference = read((tmp_path / "a").read_bytes()).header.base
    write_difference(tmp_path / "b", base, tuned, "base.pkl", provenance={"photo": "Zürich"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert reference.fingerprint == network_fingerprint(base)


def test_file_can_be_looked_at_without_this_project(tuned, content, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        header = json.loads(file.metadata()["header"])
        assert file.metadata()["format"] == KIND and set(file.keys()) == CHANGED
    assert header["provenance"] == {"photo": "Zürich"}
    assert header["config"]["rendering"]["ray_start"] == 2.35


# What cannot be written.


def test_write_difference_of_another_network_raises_and_names_it(base, tmp_path):
    for other, culprit in (
        (tiny_network("tri_grid"), "tensors of the base"),
        (tiny_network(plane_resolution=8), "tensors of the base"),
        (copy.deepcopy(base).double(), "float32.*float64"),
        (tiny_network(z_dim=32), r"fc0|embed|mapping"),
    ):
        with pytest.raises(ValueError, match=rf"^tuned network.*{culprit}"):
            write_difference(tmp_path / "a", base, other, "base.pkl", provenance={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_half_difference_of_broken_weights_raises_and_names_the_tensor(base, tmp_path, value):
    broken = copy.deepcopy(base)
    broken.torgb.bias[0] = value
    with pytest.raises(ValueError, match=r"'torgb\.bias': expected finite"):
        write_difference(tmp_path / "a", base, broken, "base.pkl", half=True, provenance={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("provenance", [{"a": float("nan")}, {"a": object()}, {"a": Path("b")}])
def test_provenance_that_is_no_json_raises_and_writes_nothing(base, tmp_path, provenance):
    with pytest.raises(ValueError, match=r"difference\.provenance\.a"):
        write_difference(tmp_path / "a", base, base, "base.pkl", provenance=provenance)
    assert not list(tmp_path.iterdir())


# How the base is named.


def test_base_reference_of_a_file_has_both_paths(tmp_path, monkeypatch):
    (tmp_path / "out" / "photo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for source in ("nets/a b.pkl", Path("nets/a b.pkl"), (tmp_path / "nets" / "a b.pkl").as_uri()):
        reference = base_reference(source, "out/photo/tuned.safetensors", "0" * 64)
        assert reference.source == str(source)
        assert reference.path == str(tmp_path / "nets" / "a b.pkl")
        assert reference.relative_path == "../../nets/a b.pkl"


def test_base_reference_through_linked_folders_leads_back(tmp_path):
    (tmp_path / "deep" / "er" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er" / "out")
    (tmp_path / "base.pkl").write_bytes(b"here")
    reference = base_reference(tmp_path / "base.pkl", tmp_path / "link" / "t", "0" * 64)
    assert (tmp_path / "deep" / "er" / "out" / reference.relative_path).read_bytes() == b"here"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("demo", "demo"),
        ("init:debug", "init:debug"),
        ("hf://org/repo/a.pkl@v1", "hf://org/repo/a.pkl@v1"),
        ("https://example.org/a.pkl#sha256=00", "https://example.org/a.pkl#sha256=00"),
        ("https://me:secret@example.org/a.pkl?b=c@d", "https://example.org/a.pkl?b=c@d"),
    ],
)
def test_base_reference_of_names_and_urls_has_no_paths_and_no_passwords(source, shown):
    reference = base_reference(source, "t", "0" * 64)
    assert (reference.source, reference.path, reference.relative_path) == (shown, None, None)


# Hostile files.


def test_is_difference_knows_its_own_and_keeps_the_place(content, base, tmp_path):
    file = io.BytesIO(b"before" + content)
    file.seek(6)
    assert is_difference(file) and file.tell() == 6
    save_networks(tmp_path / "a", {"G_ema": base}, {})
    for other in ((tmp_path / "a").read_bytes(), b"", b"\x80\x04pickle", content[:100], b"\xff" * 20):
        assert not is_difference(io.BytesIO(other))


def test_read_difference_cut_off_anywhere_raises_value_error(content):
    (length,) = struct.unpack("<Q", content[:8])
    for offset in [0, 1, 8, 9, 8 + length, len(content) - 1, *random.Random(0).sample(range(len(content)), 20)]:
        with pytest.raises(ValueError, match=r"^some\.file: damaged difference file"):
            read(content[:offset])


def test_read_difference_with_a_flipped_bit_raises_value_error(content):
    for offset in random.Random(1).sample(range(len(content)), 20):
        damaged = bytearray(content)
        damaged[offset] ^= 4
        with pytest.raises(ValueError, match=r"^some\.file: damaged"):
            read(bytes(damaged))


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def at(*keys: str, value: Any) -> Change:
    """Return a change of one value of the header."""

    def change(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


def tensor(name: str, value: torch.Tensor) -> Change:
    return lambda header, tensors: tensors.__setitem__(name, value)


WEIGHT = "decoder.net.0.weight"
HOSTILE: dict[str, tuple[Change, str]] = {
    "no base": (lambda header, _: header.pop("base"), r"base: missing key"),
    "base a path": (at("base", value="base.pkl"), r"base: expected an object"),
    "base null": (at("base", value=None), r"base: expected an object"),
    "no fingerprint": (lambda header, _: header["base"].pop("fingerprint"), r"base\.fingerprint: missing key"),
    "fingerprint a number": (at("base", "fingerprint", value=5), r"base\.fingerprint"),
    "path a list": (at("base", "path", value=["/etc/passwd"]), r"base\.path"),
    "code": (at("code", value="print(1)"), r"code: unknown key"),
    "no config": (lambda header, _: header.pop("config"), r"config: missing key"),
    "config of another size": (at("config", "plane_resolution", value=8), r"G_ema: .*unknown tensors"),
    "config with more layers": (at("config", "mapping", "num_layers", value=3), r"G_ema: missing tensors"),
    "config out of range": (at("config", "rendering", "box_warp", value=-1), r"box_warp"),
    "a billion channels": (at("config", "synthesis", "channel_max", value=10**9), r"G_ema: "),
    "scale not a number": (at("scales", WEIGHT, value=float("nan")), r"scales.decoder\.net\.0\.weight: .*nan"),
    "scale infinite": (at("scales", WEIGHT, value=float("inf")), r"scales.decoder\.net\.0\.weight: .*inf"),
    "scale zero": (at("scales", WEIGHT, value=0.0), r"scales: 'decoder.* positive number"),
    "scale negative": (at("scales", WEIGHT, value=-1.0), r"scales: 'decoder.* positive number"),
    "scale a text": (at("scales", WEIGHT, value="1"), r"scales.decoder"),
    "scale huge": (at("scales", WEIGHT, value=1e300), rf"'{WEIGHT}': expected finite changes"),
    "scale of nothing": (at("scales", "evil", value=1.0), r"scales: expected names of tensors in the file, got 'evil'"),
    "scales a list": (at("scales", value=[1.0]), r"scales: expected an object"),
    "provenance a text": (at("provenance", value="x"), r"provenance: expected an object"),
    "unknown tensor": (tensor("evil", torch.ones(2)), r"'evil': expected the name of a tensor of the base"),
    "other shape": (tensor(WEIGHT, torch.ones(64, 31).half()), r"expected shape and type \(64, 32\).*\(64, 31\)"),
    "other type": (tensor(WEIGHT, torch.ones(64, 32)), r"expected shape and type .*float16, .*float32"),
    "whole numbers": (tensor(WEIGHT, torch.ones(64, 32, dtype=torch.int64)), r"float16, got .*int64"),
    "no scale": (lambda header, _: header["scales"].pop(WEIGHT), r"float32, got .*float16"),
    "not a number": (tensor(WEIGHT, torch.full((64, 32), float("nan")).half()), r"expected finite changes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_difference_raises_value_error_that_names_it(name, base, half_content, tmp_path, monkeypatch):
    change, message = HOSTILE[name]
    tensors, header = read_tensor_file(io.BytesIO(half_content), KIND)
    change(header, tensors)
    monkeypatch.setattr("torch_utils.tensor_file.json.dumps", _dumps_with_nan)
    write_tensor_file(tmp_path / "a", KIND, tensors, header)
    with pytest.raises(ValueError, match=rf"^some\.file: .*{message}") as caught:
        read((tmp_path / "a").read_bytes()).apply(base)
    assert "\n" not in str(caught.value)


_dumps = json.dumps


def _dumps_with_nan(*args: Any, **kwargs: Any) -> str:
    return _dumps(*args, **{**kwargs, "allow_nan": True})


@pytest.mark.parametrize("header", [None, 5, "base", [], [{"base": {}}]])
def test_read_difference_header_that_is_no_object_raises_value_error(header, tmp_path):
    write_tensor_file(tmp_path / "a", KIND, {}, header)
    with pytest.raises(ValueError, match=r"^some\.file: difference: expected an object"):
        read((tmp_path / "a").read_bytes())


def test_apply_to_another_network_raises_value_error(content):
    with pytest.raises(ValueError, match=r"^some\.file: "):
        read(content).apply(tiny_network("tri_plane"))


def test_written_file_is_complete_or_absent(base, tuned, tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, os.strerror(28))

    (tmp_path / "a").write_bytes(b"precious")
    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError):
        write_difference(tmp_path / "a", base, tuned, "base.pkl", provenance={})
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"precious"
