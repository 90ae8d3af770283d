"""Load a generator from wherever it is."""

from __future__ import annotations

from pathlib import Path

import torch

from dnnlib.util import open_url
from legacy import load_network_pkl
from torch_utils.distributed import resolve_device
from torch_utils.memory import keep_freed_memory
from training.config import require
from training.presets import generator_preset
from training.triplane import TriPlaneGenerator
from training.volumetric_rendering.renderer import RendererChoice

_INIT_PREFIX = "init:"
_INIT_SEED = 0


def is_untrained(source: str | Path) -> bool:
    """Whether a source names a preset, whose weights are random."""
    return str(source).startswith(_INIT_PREFIX)


def load_generator(
    source: str | Path, device: torch.device | str = "cpu", renderer: RendererChoice = "auto"
) -> TriPlaneGenerator:
    """Load a generator for inference.

    Args:
        source: a published pickle or a converted safetensors file, as a path, an http(s) URL or `hf://org/repo/file`;
            or `init:PRESET`, an untrained generator (always the same weights).
        device: where to put it; 'auto' is a GPU if there is one. For a GPU, cuDNN is told to be deterministic; for a
            CPU, freed memory is kept (see `torch_utils.memory.keep_freed_memory`).
        renderer: what renders the volume; see `ImportanceRenderer`.

    Returns:
        The moving average of the generator (`G_ema`), in eval mode, not requiring gradients.

    Raises:
        ValueError: the file is no snapshot, or holds no `G_ema`; or the device is not there; or a fused renderer is
            asked for and not there.
        OSError: the file cannot be read.
    """
    device = resolve_device(str(device))
    if device.type == "cuda":
        # The same command is to make the same picture: no algorithms that are chosen by timing, or that race.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    if device.type == "cpu":
        keep_freed_memory()
    if is_untrained(source):
        config = generator_preset(str(source).removeprefix(_INIT_PREFIX))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_INIT_SEED)
            generator = TriPlaneGenerator.from_config(config).eval().requires_grad_(False)
    else:
        with open_url(str(source)) as file:
            generator = load_network_pkl(file, only=["G_ema"])["G_ema"]
        require(generator is not None, str(source), "a network G_ema", None)
    generator.renderer.choose(renderer, device)
    return generator.to(device)
