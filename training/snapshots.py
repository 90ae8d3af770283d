"""Network snapshots: generators and discriminators with their configuration, in one safetensors file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from dnnlib import serialize
from torch_utils import checkpoint
from training.config import DiscriminatorConfig, GeneratorConfig
from training.dual_discriminator import Discriminator
from training.train_config import TrainConfig
from training.triplane import TriPlaneGenerator

NETWORK_NAMES = ("G", "D", "G_ema")
# Kind of network in the header -> its configuration and how it is built from one.
_KINDS: dict[str, tuple[type, Callable[[Any], nn.Module]]] = {
    "generator": (GeneratorConfig, TriPlaneGenerator.from_config),
    "discriminator": (DiscriminatorConfig, Discriminator),
}
# Published training snapshots carry this statistic of their data set, which the networks never read.
OPTIONAL_TENSORS = frozenset({"dataset_label_std"})


def snapshot_path(run_dir: Path, cur_nimg: int) -> Path:
    """Return the file of a snapshot after so many images: `network-snapshot-<kimg, six digits>.safetensors`."""
    return run_dir / f"network-snapshot-{cur_nimg // 1000:06d}.safetensors"


def provenance_of(config: TrainConfig, cur_nimg: int) -> dict[str, Any]:
    """Return what a training's snapshot says about where its weights come from."""
    return {
        "preset": config.preset,
        "data": list(config.data.images),
        "cur_nimg": cur_nimg,
        "seed": config.loop.seed,
    }


def save_networks(
    path: str | Path, networks: Mapping[str, nn.Module], provenance: Mapping[str, Any], *, half: bool = False
) -> None:
    """Write networks to a safetensors file.

    Args:
        path: of the file, which appears complete or not at all.
        networks: generators and discriminators by name, of `NETWORK_NAMES`.
        provenance: JSON data that says where the weights come from.
        half: round to float16, which halves the file; loading converts to the types of the modules, and does not bring
            the digits back. A tensor that has a number beyond 65504 keeps its type.

    Raises:
        ValueError: for a network of another name.
    """
    strangers = sorted(set(networks) - set(NETWORK_NAMES))
    if strangers:
        raise ValueError(f"save_networks: expected names of {', '.join(NETWORK_NAMES)}, got {', '.join(strangers)}")
    tensors, header = {}, {"networks": {}, "provenance": dict(provenance)}
    for name, network in networks.items():
        kind = "discriminator" if isinstance(network, Discriminator) else "generator"
        header["networks"][name] = {"kind": kind, "config": serialize.to_json(network.config)}
        state = network.state_dict()
        tensors.update({f"{name}.{key}": _rounded(tensor) if half else tensor for key, tensor in state.items()})
    checkpoint.write_checkpoint(path, tensors, header)


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float16, or as it is where that cannot hold its numbers or they are whole ones."""
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.half()
    return tensor if (rounded.isinf() & ~tensor.isinf()).any() else rounded


def load_networks(
    file: BinaryIO, source: str = "checkpoint", only: Collection[str] | None = None
) -> dict[str, nn.Module]:
    """Read what `save_networks` wrote.

    Args:
        file: open for reading.
        source: how messages call it.
        only: networks to build; None is all.

    Returns:
        live networks by name, in eval mode, not requiring gradients.

    Raises:
        ValueError: the file is damaged, or tensors and configuration do not belong together.
    """
    tensors, header = checkpoint.read_checkpoint(file, source)
    entries = header.get("networks") if isinstance(header, dict) else None
    if not isinstance(entries, dict) or not entries or not set(entries) <= set(NETWORK_NAMES):
        came = entries if isinstance(entries, dict) else header
        names = sorted(came) if isinstance(came, dict) else type(came).__name__
        raise ValueError(f"{source}: expected networks ({', '.join(NETWORK_NAMES)}) in the header, got {names}")
    strangers = [name for name in tensors if name.split(".", 1)[0] not in entries]
    if strangers:
        raise ValueError(f"{source}: tensor '{strangers[0]}' belongs to no network of the header")
    networks = {}
    for name, entry in entries.items():
        if only is not None and name not in only:
            continue
        where = f"{source}: {name}"
        if not isinstance(entry, dict) or set(entry) != {"kind", "config"} or entry["kind"] not in [*_KINDS]:
            raise ValueError(f"{where}: expected a kind ({', '.join(_KINDS)}) and a config in the header")
        config_class, build = _KINDS[entry["kind"]]
        config = serialize.from_json(config_class, entry["config"], where)
        own = {key.split(".", 1)[1]: tensor for key, tensor in tensors.items() if key.startswith(name + ".")}
        networks[name] = checkpoint.build_filled(lambda: build(config), own, where)  # noqa: B023 (called at once)
    return networks
