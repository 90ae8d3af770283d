"""Published snapshots become live networks with the settings they hold; what does not fit is one ValueError."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickle
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dnnlib import sources
from legacy import load_network_pkl, load_snapshot
from tests.helpers.published import (
    fill_weights,
    fixture_cameras,
    fixture_latents,
    tiny_generator,
    tiny_generator_kwargs,
)
from tests.helpers.threads import one_thread  # noqa: F401 (a fixture for every test)
from tests.inference import published_pickle
from tests.torch_utils import fake_snapshot as fake
from training.config import DiscriminatorConfig
from training.dual_discriminator import VARIANTS, Discriminator
from training.network_difference import KIND, network_fingerprint, write_difference
from training.published_kwargs import generator_config_from_kwargs
from training.snapshots import save_networks
from training.triplane import TriPlaneGenerator

KEYS = {"G", "D", "G_ema", "training_set_kwargs", "augment_pipe"}
SYSTEMS = ("sphere", "pano", "eg3d")
GOLDEN = ("spherehead_128", "spherehead_parsing_256", "spherehead_512", "panohead_128", "eg3d_128")


cached_generator = functools.cache(tiny_generator)
"""Tiny generators, which tests must not change: filling their weights takes longer than pickling them."""


def generator_record(system: str = "sphere") -> nn.Module:
    """Return what a published snapshot pickles for the tiny generator of a system; its own to change."""
    return published_pickle._published(cached_generator(system), system)


def discriminator_record(discriminator: Discriminator, **kwargs: Any) -> nn.Module:
    """Return what a published snapshot pickles for a discriminator."""
    record = published_pickle._persistent(discriminator)
    type(record).__name__ = discriminator.config.variant
    record._init_args, record._init_kwargs = (), kwargs
    return record


def named_file(content: bytes) -> io.BytesIO:
    file = io.BytesIO(content)
    file.name = "some.pkl"
    return file


def load(snapshot: Any, **kwargs: Any) -> dict[str, Any]:
    """Pickle a snapshot in the published format and load it from a file object."""
    return load_network_pkl(named_file(fake.dump(snapshot)), **kwargs)


# Generators.


@pytest.fixture(scope="module", params=SYSTEMS)
def loaded(request) -> tuple[str, dict[str, Any]]:
    snapshot = {"training_set_kwargs": fake.EasyDict(path="a", weights=np.ones(2)), "G": None, "D": None}
    return request.param, load({**snapshot, "G_ema": generator_record(request.param), "augment_pipe": None})


def test_load_network_pkl_returns_the_published_keys(loaded):
    _, networks = loaded
    assert set(networks) == KEYS
    assert networks["G"] is networks["D"] is networks["augment_pipe"] is None
    assert networks["training_set_kwargs"]["path"] == "a" and type(networks["training_set_kwargs"]) is dict


def test_load_network_pkl_generator_is_live_and_frozen(loaded):
    generator = loaded[1]["G_ema"]
    assert isinstance(generator, TriPlaneGenerator) and not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())
    assert {tensor.device.type for tensor in generator.state_dict().values()} == {"cpu"}


def test_load_network_pkl_generator_has_the_settings_of_the_file(loaded):
    system, networks = loaded
    expected = generator_config_from_kwargs(**tiny_generator_kwargs(system), neural_rendering_resolution=16)
    assert networks["G_ema"].config == expected
    assert networks["G_ema"].config.rendering.depth_clamp == "batch"
    assert networks["G_ema"].config.rendering.auto_range_of_misses == "nearest"
    assert networks["G_ema"].config.superresolution.first_rgb_replaces_raw


@torch.no_grad()
def test_load_network_pkl_generator_renders_as_the_one_that_was_saved(loaded):
    system, networks = loaded
    z, c, images = fixture_latents(), fixture_cameras(), []
    original = cached_generator(system)
    for (name, ours), theirs in zip(networks["G_ema"].state_dict().items(), original.state_dict().values()):
        assert ours.equal(theirs), name
    for generator in (networks["G_ema"], original):
        torch.manual_seed(0)
        images.append(generator(z, c, noise_mode="const"))
    assert all(images[0][key].equal(images[1][key]) for key in images[0])


def test_load_network_pkl_settings_of_the_instance_come_before_those_of_its_construction():
    record = generator_record()
    record._init_kwargs["rendering_kwargs"]["ray_start"] = 1.0
    record.rendering_kwargs["ray_start"] = 2.0
    record.rendering_kwargs["my_hint"] = fake.EasyDict(a=[1, (2, None)])
    record.neural_rendering_resolution = 128
    config = load({"G_ema": record})["G_ema"].config
    assert config.rendering.ray_start == 2.0 and config.neural_rendering_resolution == 128
    assert config.extras["my_hint"] == {"a": [1, [2, None]]}


def test_load_network_pkl_without_settings_of_the_instance_takes_those_of_its_construction():
    record = generator_record()
    record._init_kwargs["rendering_kwargs"]["ray_start"] = 1.0
    del record.rendering_kwargs, record.neural_rendering_resolution
    config = load({"G_ema": record})["G_ema"].config
    assert config.rendering.ray_start == 1.0 and config.neural_rendering_resolution == 64


def test_load_network_pkl_density_noise_of_training_is_removed():
    record = generator_record()
    record.rendering_kwargs["density_noise"] = 0.5
    generator = load({"G_ema": record})["G_ema"]
    assert generator.config.rendering.density_noise == 0 and generator.rendering_kwargs["density_noise"] == 0


def test_load_network_pkl_numpy_scalars_become_numbers():
    record = generator_record()
    record.rendering_kwargs["box_warp"] = np.float64(1.5)
    record._init_kwargs["z_dim"] = np.int64(64)
    config = load({"G_ema": record})["G_ema"].config
    assert type(config.rendering.box_warp) is float and type(config.z_dim) is int


def test_load_network_pkl_positional_constructor_arguments_are_understood():
    record = generator_record()
    names = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")
    record._init_args = tuple(record._init_kwargs.pop(name) for name in names)
    assert load({"G_ema": record})["G_ema"].z_dim == 64


def test_load_network_pkl_statistic_of_the_training_labels_is_tolerated():
    record = generator_record()
    record.register_buffer("dataset_label_std", torch.ones(25))
    assert "dataset_label_std" not in load({"G_ema": record})["G_ema"].state_dict()


def test_load_network_pkl_generators_in_one_file_do_not_share_memory():
    record = generator_record("pano")
    networks = load({"G": record, "D": None, "G_ema": record})
    assert networks["G"] is not networks["G_ema"]
    networks["G"].decoder.net[0].weight += 1
    assert not networks["G"].decoder.net[0].weight.equal(networks["G_ema"].decoder.net[0].weight)


@pytest.mark.parametrize("only", [["G_ema"], ("G", "D"), set()])
def test_load_network_pkl_only_builds_what_was_asked_for(only):
    record = generator_record("pano")
    networks = load({"G": record, "D": None, "G_ema": record}, only=only)
    assert set(networks) == KEYS
    assert {name for name in ("G", "D", "G_ema") if networks[name] is not None} == set(only) - {"D"}


def test_load_network_pkl_reads_from_where_the_file_stands():
    content = fake.dump({"G_ema": generator_record("pano")})
    file = named_file(b"some other bytes" + content)
    file.seek(16)
    assert load_network_pkl(file)["G_ema"] is not None


def test_load_network_pkl_reads_what_save_networks_wrote(tmp_path: Path):
    generator = cached_generator("pano")
    save_networks(tmp_path / "a.safetensors", {"G_ema": generator}, {})
    with open(tmp_path / "a.safetensors", "rb") as file:
        networks = load_network_pkl(file)
    assert set(networks) == KEYS and networks["G"] is None
    assert networks["G_ema"].config == generator.config


# Discriminators.


@pytest.mark.parametrize("variant", VARIANTS)
def test_load_network_pkl_discriminator_equals_the_one_that_was_saved(variant):
    arguments = {"c_dim": 25, "img_resolution": 16, "img_channels": 3, "channel_base": 64, "channel_max": 4}
    discriminator = Discriminator(
        DiscriminatorConfig(variant=variant, seg_resolution=8, parsing_channels=2, **arguments)
    )
    fill_weights(discriminator)
    record = discriminator_record(
        discriminator,
        **arguments,
        seg_resolution=8,
        parsing_channels=2,
        block_kwargs=fake.EasyDict(freeze_layers=0),
        mapping_kwargs=fake.EasyDict(),
        epilogue_kwargs=fake.EasyDict(mbstd_group_size=4),
    )
    ours = load({"G": None, "D": record, "G_ema": None})["D"]
    assert isinstance(ours, Discriminator) and ours.config == discriminator.config and not ours.training
    assert all(a.equal(b) for a, b in zip(ours.state_dict().values(), discriminator.state_dict().values(), strict=True))


# What is refused.


@pytest.mark.parametrize(
    ("snapshot", "came"),
    [
        ([1, 2], "list"),
        ("G_ema", "str"),
        (None, "NoneType"),
        ({}, "a dict"),
        ({"weights": 1, "epoch": 2}, "weights, epoch"),
        (("G", "D", "G_ema"), "tuple"),
    ],
)
def test_load_network_pkl_other_contents_raise_value_error_that_says_what_came(snapshot, came):
    with pytest.raises(ValueError, match=rf"^some\.pkl: expected a dict with G, D, G_ema, got .*{came}"):
        load(snapshot)


@pytest.mark.parametrize("value", [5, "G", [1], {"state": {}}, np.ones(3)])
def test_load_network_pkl_network_that_is_none_raises_value_error(value):
    with pytest.raises(ValueError, match=r"^some\.pkl: G_ema: expected a network, got"):
        load({"G_ema": value})


def test_load_network_pkl_half_precision_request_raises_value_error():
    with pytest.raises(ValueError, match="force_fp16"):
        load({"G_ema": generator_record("pano")}, force_fp16=True)


def set_argument(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda record: record._init_kwargs.__setitem__(name, value)


def set_rendering(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda record: record.rendering_kwargs.__setitem__(name, value)


def set_attribute(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda record: setattr(record, name, value)


def nested_list(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def list_in_itself() -> list:
    value: list = []
    value.append(value)
    return value


def rename_class(name: str) -> Callable[[nn.Module], None]:
    return lambda record: setattr(type(record), "__name__", name)


def set_weight(path: str, value: torch.Tensor | None) -> Callable[[nn.Module], None]:
    def change(record: nn.Module) -> None:
        module, _, name = path.rpartition(".")
        parameters = record.get_submodule(module)._parameters
        if value is None:
            del parameters[name]
        else:
            parameters[name] = nn.Parameter(value)

    return change


BAD_RECORDS: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "unknown class": (rename_class("StyleNeRF"), r"StyleNeRF"),
    "missing tensor": (set_weight("decoder.net.0.weight", None), r"missing tensors: decoder\.net\.0\.weight"),
    "extra tensor": (set_weight("decoder.evil", torch.ones(2)), r"unknown tensors: decoder\.evil"),
    "other shape": (
        set_weight("decoder.net.0.weight", torch.ones(64, 31)),
        r"'decoder\.net\.0\.weight': expected shape \(64, 32\), got \(64, 31\)",
    ),
    "unknown argument": (set_argument("colour", 1), "colour"),
    "argument of another type": (set_argument("z_dim", "64"), "z_dim"),
    "argument that is a tensor": (set_argument("z_dim", torch.ones(1)), "plain data"),
    "argument out of range": (set_argument("w_dim", 256), "w_dim"),
    "a billion latents": (set_argument("z_dim", 10**9), r"expected shape"),
    "more latents than fit": (set_argument("z_dim", 10**30), ""),
    "a billion channels": (set_argument("channel_max", 10**9), r"expected shape|missing"),
    "too few channels": (set_argument("channel_base", 16), r"channel_base"),
    "a billion layers": (set_argument("mapping_kwargs", {"num_layers": 10**9}), r"num_layers"),
    "mapping a list": (set_argument("mapping_kwargs", [1, 2]), ""),
    "superresolution a list": (set_argument("sr_kwargs", [1, 2]), ""),
    "superresolution a text": (set_argument("sr_kwargs", "abc"), ""),
    "nested too deep": (set_argument("mapping_kwargs", {"num_layers": nested_list(50)}), "nested"),
    "contains itself": (set_rendering("my_hint", list_in_itself()), "many|nested"),
    "too many values": (set_rendering("my_hint", [0] * 20_000), "many"),
    "not a number": (set_rendering("my_hint", float("nan")), "my_hint"),
    "rendering a list": (set_attribute("rendering_kwargs", [1, 2]), ""),
    "rendering a number": (set_attribute("rendering_kwargs", 5), ""),
    "resolution a text": (set_attribute("neural_rendering_resolution", "64"), "neural_rendering_resolution"),
    "resolution none": (set_attribute("neural_rendering_resolution", None), "neural_rendering_resolution"),
    "arguments a number": (set_attribute("_init_args", 5), "constructor arguments"),
    "too many arguments": (set_attribute("_init_args", tuple(range(9))), "constructor arguments"),
    "keywords a list": (set_attribute("_init_kwargs", [1]), "constructor arguments"),
    "no superresolution": (set_rendering("superresolution_module", 5), "superresolution_module"),
    "unknown superresolution": (set_rendering("superresolution_module", "os.system"), r"os\.system"),
    "superresolution of another size": (
        set_rendering("superresolution_module", "training.superresolution.SuperresolutionHybrid8X"),
        "output resolution",
    ),
    "no samples": (set_rendering("depth_resolution", 0), "depth_resolution"),
    "samples a list": (set_rendering("depth_resolution", [12]), "depth_resolution"),
    "box a text": (set_rendering("box_warp", "large"), "box_warp"),
    "unknown clamp mode": (set_rendering("clamp_mode", "relu"), "clamp_mode"),
    "planes of another size": (set_rendering("triplane_size", 64), r"backbone"),
    "planes of no size": (set_rendering("triplane_size", 33), "plane_resolution"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_load_network_pkl_network_that_does_not_fit_raises_value_error_that_names_it(name):
    change, message = BAD_RECORDS[name]
    record = generator_record("pano")
    change(record)
    content = named_file(fake.dump({"G_ema": record}))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=rf"^some\.pkl: G_ema.*({message})") as caught:
        load_network_pkl(content)
    assert time.perf_counter() - start < 20  # nothing was built at the size that was asked for
    assert "\n" not in str(caught.value)


def test_load_network_pkl_truncated_snapshot_raises_value_error():
    content = fake.dump({"G_ema": generator_record("pano")})
    for offset in [0, 1, 9, len(content) - 1, *random.Random(0).sample(range(len(content)), 10)]:
        with pytest.raises(ValueError, match=r"^some\.pkl"):
            load_network_pkl(named_file(content[:offset]))


# Differences.


def tune(base: TriPlaneGenerator, size: float = 0.5) -> TriPlaneGenerator:
    """Return a copy with one changed tensor and one changed setting."""
    tuned = copy.deepcopy(base).requires_grad_(False)
    tuned.decoder.net[0].bias += size
    tuned.rendering_kwargs["ray_start"] = 2.35
    return tuned


@functools.cache
def pano_pickle() -> bytes:
    """Return a published snapshot with the tiny generator of PanoHead."""
    return fake.dump({"G": None, "D": None, "G_ema": generator_record("pano")})


@functools.cache
def pano_base() -> TriPlaneGenerator:
    """Return the generator that is loaded from it; nobody's to change."""
    return load_network_pkl(io.BytesIO(pano_pickle()))["G_ema"]


class Files:
    """A folder with a base network as a published pickle and a difference from it."""

    def __init__(self, folder: Path) -> None:
        self.base_path, self.path = folder / "nets" / "base.pkl", folder / "out" / "a photo" / "tuned.safetensors"
        for path in (self.base_path, self.path):
            path.parent.mkdir(parents=True)
        self.base_path.write_bytes(pano_pickle())
        self.base = pano_base()
        self.tuned = tune(self.base)
        self.write()

    def write(self, base_source: Any = None) -> None:
        write_difference(self.path, self.base, self.tuned, base_source or self.base_path, provenance={})

    def is_found(self) -> bool:
        generator = load_snapshot(self.path)["G_ema"]
        same = network_fingerprint(generator) == network_fingerprint(self.tuned)
        return same and generator.config == self.tuned.config

    def error(self) -> str:
        """Return the message of loading the difference, which must fail."""
        with pytest.raises(ValueError) as caught:
            load_snapshot(self.path)
        message = str(caught.value)
        assert message.startswith(f"{self.path}: ") and "\n" not in message
        return message


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.delenv("SPHEREHEAD_BASE", raising=False)
    return Files(tmp_path)


def test_load_snapshot_difference_is_the_tuned_network_with_its_settings(files):
    snapshot = load_snapshot(files.path)
    assert set(snapshot) == KEYS and snapshot["G"] is snapshot["D"] is None
    assert files.is_found()
    assert snapshot["G_ema"].config.rendering.ray_start == 2.35 and not snapshot["G_ema"].training
    assert load_snapshot(files.path, only=["G", "D"])["G_ema"] is None  # for which no base is needed


def test_load_snapshot_difference_of_a_moved_folder_is_found(files, tmp_path):
    (tmp_path / "moved").mkdir()
    for name in ("nets", "out"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    files.path = tmp_path / "moved" / files.path.relative_to(tmp_path)
    assert files.is_found()


def test_load_snapshot_difference_moved_alone_finds_the_absolute_path(files, tmp_path):
    files.path = files.path.rename(tmp_path / "tuned.safetensors")
    assert files.is_found()


@pytest.mark.parametrize("converted", [False, True])
def test_load_snapshot_difference_finds_its_base_beside_it_also_converted(files, converted, tmp_path):
    files.base_path.unlink()
    beside = files.path.parent / "base.pkl"  # the name counts, the content is looked at
    if converted:
        save_networks(beside, {"G_ema": files.base}, {})
    else:
        beside.write_bytes(pano_pickle())
    assert files.is_found()


def test_load_network_pkl_difference_from_memory_needs_a_location_or_the_absolute_path(files, tmp_path):
    content = files.path.read_bytes()
    assert load_network_pkl(io.BytesIO(content))["G_ema"] is not None
    files.base_path.rename(files.path.parent / "base.pkl")
    with pytest.raises(ValueError, match=r"^snapshot: .*'base\.pkl'|^snapshot: .*base\.pkl"):
        load_network_pkl(io.BytesIO(content))
    assert load_network_pkl(io.BytesIO(content), location=str(files.path))["G_ema"] is not None


def test_load_snapshot_difference_wrong_bases_are_passed_over_for_the_right_one(files):
    files.base_path.rename(files.path.parent / "base.pkl")
    save_networks(files.base_path, {"G_ema": tune(files.base, 2.0)}, {})
    assert files.is_found()


def write_other_base(path: Path) -> None:
    save_networks(path, {"G_ema": tune(cached_generator("pano"), 2.0)}, {})


BAD_BASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda path: None, "no such file where the difference says it was"),
    "another network": (write_other_base, r"has another network, with the fingerprint [0-9a-f]{12};? ?"),
    "another system": (
        lambda path: path.write_bytes(fake.dump({"G_ema": generator_record("eg3d")})),
        "another network",
    ),
    "pickle of something else": (
        lambda path: path.write_bytes(pickle.dumps([1, 2])),
        "expected a dict with G, D, G_ema",
    ),
    "pickle that runs": (lambda path: path.write_bytes(pickle.dumps({"G_ema": os.system})), "system"),
    "no G_ema": (lambda path: path.write_bytes(fake.dump({"G": None, "G_ema": None})), "has no G_ema"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "cut off": (
        lambda path: path.write_bytes(pano_pickle()[:10_000]),
        "truncated|end",
    ),
    "folder": (lambda path: path.mkdir(), "no such file"),
    "pipe": (os.mkfifo, "no such file"),
}


@pytest.mark.parametrize("name", BAD_BASES)
def test_load_snapshot_difference_without_its_base_raises_and_says_what_to_do(files, name):
    make, reason = BAD_BASES[name]
    files.base_path.unlink()
    make(files.base_path)
    message = files.error()
    for part in (str(files.base_path), network_fingerprint(files.base)[:12], "SPHEREHEAD_BASE"):
        assert part in message
    assert re.search(reason, message)


def test_load_snapshot_difference_takes_the_base_that_the_user_names(files, tmp_path, monkeypatch):
    files.base_path.rename(tmp_path / "elsewhere.pkl")
    for source in (str(tmp_path / "elsewhere.pkl"), (tmp_path / "elsewhere.pkl").as_uri()):
        monkeypatch.setenv("SPHEREHEAD_BASE", source)
        assert files.is_found()
    monkeypatch.setenv("SPHEREHEAD_BASE", "absent.pkl")
    assert "absent.pkl: no such file" in files.error()
    monkeypatch.setenv("SPHEREHEAD_BASE", "init:debug")
    assert "init:debug has another network" in files.error()


def test_load_snapshot_difference_named_base_may_be_of_other_differences(files, tmp_path, monkeypatch):
    monkeypatch.setenv("SPHEREHEAD_BASE", "init:debug")
    assert files.is_found()


@pytest.mark.parametrize("name", ["demo", "init:debug"])
def test_load_snapshot_difference_from_a_named_network(files, name, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEMO_PATH", tmp_path / "models" / "demo.safetensors")
    save_networks(sources.DEMO_PATH, {"G_ema": files.base}, {})
    files.base = load_snapshot(name)["G_ema"]
    files.tuned = tune(files.base)
    files.write(name)
    files.path = files.path.rename(tmp_path / "tuned.safetensors")
    assert files.is_found()
    if name == "demo":
        sources.DEMO_PATH.unlink()
        assert f"demo: expected the bundled network at {sources.DEMO_PATH}" in files.error()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/base.pkl", "https://example.org/base.pkl", "ftp://a.b/c.pkl"])
def test_load_snapshot_difference_never_fetches_what_the_file_names(files, url, tmp_path, monkeypatch):
    monkeypatch.setenv("SPHEREHEAD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("dnnlib.util.open_http", lambda *_, **__: pytest.fail("fetched"))
    files.write(url)
    assert repr(url) in files.error()
    files.base_path.rename(files.path.parent / url.rpartition("/")[2])
    assert files.is_found()


def test_load_snapshot_difference_of_a_difference_is_built_on_it(files, tmp_path):
    middle, middle_path = files.tuned, files.path
    files.base, files.tuned, files.path = middle, tune(middle, -0.25), tmp_path / "out" / "second.safetensors"
    files.write(middle_path)
    assert files.is_found()
    files.base_path.unlink()
    message = files.error()
    assert str(files.base_path) in message and str(middle_path) in message


def test_load_snapshot_difference_of_itself_or_in_a_circle_raises(files, tmp_path):
    files.write(files.path)
    assert "is this difference itself" in files.error()
    other = tmp_path / "out" / "other.safetensors"
    write_difference(other, files.base, files.tuned, files.path, provenance={})
    files.write(other)
    assert "is this difference itself, or one that is built on it" in files.error()


def test_load_snapshot_too_many_differences_on_top_of_each_other_raise(files, tmp_path, monkeypatch):
    monkeypatch.setattr("legacy._MAX_DIFFERENCES", 2)
    last = files.path
    for index in range(2):
        files.path = tmp_path / "out" / f"{index}.safetensors"
        files.base, files.tuned = files.tuned, tune(files.tuned, 0.1)
        files.write(last)
        last = files.path
        if index == 0:
            assert files.is_found()
    assert "at most 2 differences" in files.error()


def test_load_snapshot_difference_cut_off_raises(files):
    content = files.path.read_bytes()
    for offset in (9, len(content) // 2, len(content) - 1):
        files.path.write_bytes(content[:offset])
        assert re.search("damaged|cut off|longer than the file", files.error())


def test_load_snapshot_safetensors_file_of_a_newer_difference_format_raises(files):
    content = files.path.read_bytes().replace(b'"version":"1"', b'"version":"2"')
    files.path.write_bytes(content)
    assert KIND.encode() in content and "expected format version 1, got '2'" in files.error()


# Names.


def test_load_snapshot_reads_paths_urls_and_names_alike(files, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEMO_PATH", files.base_path)
    expected = network_fingerprint(files.base)
    for source in (files.base_path, str(files.base_path), files.base_path.as_uri(), "demo"):
        assert network_fingerprint(load_snapshot(source)["G_ema"]) == expected
    debug = load_snapshot("init:debug")
    assert set(debug) == KEYS and debug["G"] is None and debug["G_ema"].z_dim == 64
    assert load_snapshot("init:debug", only=["D"])["G_ema"] is None


def test_load_snapshot_demo_that_is_absent_raises_and_says_where_it_is_expected(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEMO_PATH", tmp_path / "demo.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_bytes(b"not this one")
    with pytest.raises(FileNotFoundError, match=rf"^demo: .*{tmp_path}.demo\.safetensors"):
        load_snapshot("demo")


# Golden snapshots.


@pytest.mark.shared
def test_load_snapshot_difference_fits_the_golden_pickle_and_its_conversion(shared_dir, tmp_path):
    golden, converted = shared_dir / "golden" / "panohead_128.pkl", tmp_path / "base" / "panohead_128.safetensors"
    base = load_snapshot(golden, only=["G_ema"])["G_ema"]
    tuned = tune(base)
    save_networks(converted, {"G_ema": base}, {})
    for source in (golden, converted):
        write_difference(tmp_path / "t", base, tuned, source, provenance={})
        assert network_fingerprint(load_snapshot(tmp_path / "t")["G_ema"]) == network_fingerprint(tuned)


@pytest.mark.shared
@pytest.mark.parametrize("name", GOLDEN)
def test_load_network_pkl_golden_snapshot_is_complete(name, shared_dir):
    meta = json.loads((shared_dir / "golden" / f"{name}.json").read_text())
    with open(shared_dir / "golden" / f"{name}.pkl", "rb") as file:
        networks = load_network_pkl(file)
    assert set(networks) == KEYS
    assert (networks["G"] is not None) == (name == "spherehead_128") and (networks["D"] is None) == (meta["D"] is None)
    generator = networks["G_ema"]
    assert {key: list(tensor.shape) for key, tensor in generator.state_dict().items()} == meta["G"]
    assert generator.img_resolution == int(name.rsplit("_", 1)[1])
    with torch.device("meta"):
        assert TriPlaneGenerator(*generator.init_args, **generator.init_kwargs).config == generator.config
