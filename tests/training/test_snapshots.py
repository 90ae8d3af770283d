"""Network snapshots come back bit by bit; damaged and hostile ones give one ValueError and cost nothing."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dnnlib import serialize
from tests.helpers.published import fill_weights
from tests.helpers.tiny import labels, latents, tiny_config, tiny_network
from torch_utils import checkpoint
from training.config import DiscriminatorConfig
from training.dual_discriminator import VARIANTS, Discriminator
from training.snapshots import load_networks, save_networks

PROVENANCE = {"source": "somewhere", "steps": 3}


def small_discriminator(variant: str = "HoloDiscriminator") -> Discriminator:
    discriminator = Discriminator(
        DiscriminatorConfig(
            variant=variant, img_resolution=16, channel_base=64, channel_max=4, seg_resolution=8, parsing_channels=2
        )
    )
    fill_weights(discriminator)
    return discriminator


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    states = a.state_dict(), b.state_dict()
    return list(states[0]) == list(states[1]) and all(x.equal(y) for x, y in zip(*(s.values() for s in states)))


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.Module]:
    generator = tiny_network(parsing_classes=2)
    return {"G": generator, "D": small_discriminator(), "G_ema": generator}


@pytest.fixture(scope="module")
def content(networks, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("snapshots") / "all.safetensors"
    save_networks(path, networks, PROVENANCE)
    return path.read_bytes()


@pytest.fixture(scope="module")
def small_content(tmp_path_factory) -> bytes:
    """Return a snapshot of a discriminator alone, which is quicker to read."""
    path = tmp_path_factory.mktemp("snapshots") / "small.safetensors"
    save_networks(path, {"D": small_discriminator("SingleDiscriminator")}, PROVENANCE)
    return path.read_bytes()


def load(content: bytes, **kwargs: Any) -> dict[str, torch.nn.Module]:
    return load_networks(io.BytesIO(content), "some.file", **kwargs)


# Round trips.


def test_snapshot_round_trip_is_bit_exact(networks, content):
    loaded = load(content)
    assert set(loaded) == set(networks)
    for name, network in loaded.items():
        assert type(network) is type(networks[name]) and network.config == networks[name].config
        assert same_state(network, networks[name])
        assert not network.training and not any(p.requires_grad for p in network.parameters())


@torch.no_grad()
def test_snapshot_round_trip_renders_the_same(networks, content):
    loaded = load(content, only=["G_ema"])["G_ema"]
    images = []
    for generator in (networks["G_ema"], loaded):
        torch.manual_seed(0)
        images.append(generator(latents(1), labels(1), noise_mode="const"))
    assert all(images[0][key].equal(images[1][key]) for key in images[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_snapshot_round_trip_of_every_discriminator(variant, tmp_path):
    discriminator = small_discriminator(variant)
    save_networks(tmp_path / "a", {"D": discriminator}, {})
    loaded = load((tmp_path / "a").read_bytes())["D"]
    assert loaded.config == discriminator.config and same_state(loaded, discriminator)


@pytest.mark.parametrize("representation", ["dual_spherical", "tri_grid", "tri_plane"])
def test_snapshot_round_trip_keeps_changed_settings(representation, tmp_path):
    generator = tiny_network(representation)
    generator.rendering_kwargs["ray_start"] = 2.35
    generator.rendering_kwargs["my_hint"] = [1, {"a": None}]
    generator.neural_rendering_resolution = 13
    save_networks(tmp_path / "a", {"G_ema": generator}, {})
    loaded = load((tmp_path / "a").read_bytes())["G_ema"]
    assert loaded.config == generator.config and loaded.neural_rendering_resolution == 13


def test_snapshot_frozen_layers_stay_buffers(tmp_path):
    config = DiscriminatorConfig(img_resolution=16, channel_base=64, channel_max=4, freeze_layers=2)
    save_networks(tmp_path / "a", {"D": Discriminator(config)}, {})
    loaded = load((tmp_path / "a").read_bytes())["D"]
    assert "b16.conv0.weight" in dict(loaded.named_buffers())


def test_snapshot_header_holds_kinds_configurations_and_provenance(networks, content):
    _, header = checkpoint.read_checkpoint(io.BytesIO(content))
    assert header["provenance"] == PROVENANCE
    assert {name: entry["kind"] for name, entry in header["networks"].items()} == {
        "G": "generator",
        "D": "discriminator",
        "G_ema": "generator",
    }
    assert header["networks"]["D"]["config"] == serialize.to_json(networks["D"].config)


@pytest.mark.parametrize("only", [["D"], ["G", "G_ema"], []])
def test_load_networks_only_builds_what_was_asked_for(content, only):
    assert set(load(content, only=only)) == set(only)


def test_save_networks_failing_leaves_no_file(tmp_path):
    generator = tiny_network()
    generator.rendering_kwargs["my_hint"] = object()
    with pytest.raises(ValueError, match="my_hint"):
        save_networks(tmp_path / "a.safetensors", {"G_ema": generator}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [["generator"], ["G_ema", "augment_pipe"]])
def test_save_networks_of_another_name_raises_value_error(names, tmp_path):
    with pytest.raises(ValueError, match=rf"G, D, G_ema.*{names[-1]}"):
        save_networks(tmp_path / "a", dict.fromkeys(names, small_discriminator()), {})
    assert not list(tmp_path.iterdir())


# Rounded to float16.


def test_save_networks_half_is_half_as_large_and_rounds_each_weight(networks, content, tmp_path):
    save_networks(tmp_path / "a", networks, PROVENANCE, half=True)
    assert (tmp_path / "a").stat().st_size < 0.55 * len(content)
    loaded = load((tmp_path / "a").read_bytes())
    for name, network in networks.items():
        assert loaded[name].config == network.config
        for key, tensor in loaded[name].state_dict().items():
            expected = network.state_dict()[key]
            assert tensor.dtype == expected.dtype
            # float16 has 11 binary digits, and below 2^-14 fixed steps of 2^-24
            torch.testing.assert_close(tensor, expected, rtol=2**-11, atol=2**-25)


def test_save_networks_half_keeps_what_float16_cannot_hold(tmp_path):
    generator = tiny_network().requires_grad_(False)
    generator.torgb.bias[:] = torch.tensor([1e5, 1 + 2**-20, 0.0])
    generator.decoder.net[0].bias[0] = float("inf")
    save_networks(tmp_path / "a", {"G_ema": generator}, {}, half=True)
    loaded = load((tmp_path / "a").read_bytes())["G_ema"]
    assert loaded.torgb.bias.equal(generator.torgb.bias)
    assert loaded.decoder.net[0].bias[0] == float("inf")


# Hostile files.


def split(content: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors, header = checkpoint.read_checkpoint(io.BytesIO(content))
    return header, tensors


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def config_value(name: str, value: Any) -> Change:
    """Return a change of one value of the discriminator's configuration."""
    return config_values(**{name: value})


def config_values(**values: Any) -> Change:
    return lambda header, _tensors: header["networks"]["D"]["config"].update(values)


def entry(**changes: Any) -> Change:
    return lambda header, _tensors: header["networks"]["D"].update(changes)


def without(key: str) -> Change:
    return lambda header, _tensors: header["networks"]["D"].pop(key)


def tensor(name: str, value: torch.Tensor | None) -> Change:
    def change(_header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


def rename_network(name: str) -> Change:
    def change(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        header["networks"] = {name: header["networks"]["D"]}
        for key in list(tensors):
            tensors[name + key[1:]] = tensors.pop(key)

    return change


HOSTILE: dict[str, tuple[Change, str]] = {
    "no networks": (lambda header, _: header.pop("networks"), "networks"),
    "networks empty": (lambda header, _: header.update(networks={}), "networks"),
    "networks a list": (lambda header, _: header.update(networks=[1]), "networks"),
    "entry a list": (lambda header, _: header["networks"].update(D=[1]), "D: "),
    "unknown kind": (entry(kind="encoder"), "kind"),
    "kind a list": (entry(kind=["discriminator"]), "kind"),
    "kind of the other": (entry(kind="generator"), "D"),
    "no kind": (without("kind"), "kind"),
    "no config": (without("config"), "config"),
    "more than kind and config": (entry(code="print(1)"), "kind"),
    "config null": (entry(config=None), "D"),
    "config of a generator": (entry(config=serialize.to_json(tiny_config())), "D"),
    "config with an unknown key": (config_value("evil", 1), r"D\.evil"),
    "config value of another type": (config_value("img_resolution", "16"), r"D\.img_resolution"),
    "config value nested": (config_value("variant", {"a": {}}), r"D\.variant"),
    "unknown variant": (config_value("variant", "EvilDiscriminator"), "EvilDiscriminator"),
    "other variant": (config_value("variant", "HoloDiscriminator"), "resample_filter"),
    "other resolution": (config_value("img_resolution", 32), "b32"),
    "a billion channels": (config_value("channel_max", 10**9), "expected shape"),
    "a billion channels everywhere": (config_values(channel_base=10**12, channel_max=10**9), "D: "),
    "more channels than fit": (config_values(channel_base=10**30, channel_max=10**30), "D: "),
    "a billion layers": (config_value("mapping_layers", 10**9), r"mapping\.num_layers"),
    "negative labels": (config_value("c_dim", -5), "D: "),
    "resolution of 2^60": (config_value("img_resolution", 2**60), "D: "),
    "missing tensor": (tensor("D.b4.fc.weight", None), r"missing.*b4\.fc\.weight"),
    "extra tensor": (tensor("D.evil", torch.ones(1)), "unknown.*evil"),
    "tensor of no network": (tensor("X.weight", torch.ones(1)), r"X\.weight"),
    "tensor without network": (tensor("weight", torch.ones(1)), "weight"),
    "tensor of another shape": (tensor("D.b4.fc.weight", torch.ones(4, 63)), r"b4\.fc\.weight.*\(4, 64\).*\(4, 63\)"),
    "network of another name": (rename_network("training_set_kwargs"), "networks.*training_set_kwargs"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_load_networks_hostile_header_or_tensors_raise_value_error_that_names_them(name, small_content, tmp_path):
    change, message = HOSTILE[name]
    header, tensors = split(small_content)
    header = copy.deepcopy(header)
    change(header, tensors)
    checkpoint.write_checkpoint(tmp_path / "a", tensors, header)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=rf"^some\.file: .*{message}"):
        load((tmp_path / "a").read_bytes())
    assert time.perf_counter() - start < 10  # nothing was built at the size that was asked for


@pytest.mark.parametrize("header", [None, 5, "networks", [], [{"networks": {}}]])
def test_load_networks_header_that_is_no_object_raises_value_error(header, tmp_path):
    checkpoint.write_checkpoint(tmp_path / "a", {}, header)
    with pytest.raises(ValueError, match=r"^some\.file: "):
        load((tmp_path / "a").read_bytes())


def test_load_networks_generator_with_a_billion_channels_costs_nothing(content, tmp_path):
    header, tensors = split(content)
    tensors = {name: value for name, value in tensors.items() if name.startswith("G_ema.")}
    header["networks"] = {"G_ema": header["networks"]["G_ema"]}
    for section in ("channel_base", "channel_max"):
        header["networks"]["G_ema"]["config"]["synthesis"][section] = 10**9
    checkpoint.write_checkpoint(tmp_path / "a", tensors, header)
    with pytest.raises(ValueError, match=r"^some\.file: G_ema: .*expected shape"):
        load((tmp_path / "a").read_bytes())


@pytest.mark.parametrize("changed", ["representation", "plane_resolution", "parsing_classes"])
def test_load_networks_tensors_of_another_generator_raise_value_error(changed, content, tmp_path):
    header, tensors = split(content)
    value = {"representation": "tri_grid", "plane_resolution": 32, "parsing_classes": 3}[changed]
    header["networks"]["G"]["config"][changed] = value
    checkpoint.write_checkpoint(tmp_path / "a", tensors, header)
    with pytest.raises(ValueError, match=r"^some\.file: G: "):
        load((tmp_path / "a").read_bytes())


def test_load_networks_truncated_anywhere_raises_value_error(small_content):
    size = len(small_content)
    (length,) = struct.unpack("<Q", small_content[:8])
    offsets = [0, 1, 8, 9, 8 + length, size - 1, *random.Random(0).sample(range(size), 40)]
    for offset in offsets:
        with pytest.raises(ValueError, match=r"^some\.file: "):
            load(small_content[:offset])


def test_load_networks_plain_safetensors_file_raises_value_error(tmp_path: Path):
    from safetensors.torch import save

    with pytest.raises(ValueError, match=r"^some\.file: .*format"):
        load(save({"weight": torch.ones(2)}, {"format": "pt"}))


def test_load_networks_not_a_number_in_the_configuration_raises_value_error(small_content):
    (length,) = struct.unpack("<Q", small_content[:8])
    outer = json.loads(small_content[8 : 8 + length])
    inner = json.loads(outer["__metadata__"]["header"])
    inner["networks"]["D"]["config"]["disc_c_noise"] = float("nan")
    outer["__metadata__"]["header"] = json.dumps(inner)
    header = json.dumps(outer).encode()
    with pytest.raises(ValueError, match=r"^some\.file: D\.disc_c_noise"):
        load(struct.pack("<Q", len(header)) + header + small_content[8 + length :])
