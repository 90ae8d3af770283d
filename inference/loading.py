"""Load a generator from wherever it is."""

from __future__ import annotations

from pathlib import Path

import torch

from dnnlib.sources import is_untrained as is_untrained
from legacy import load_snapshot
from torch_utils.distributed import resolve_device
from torch_utils.memory import keep_freed_memory
from training.config import require
from training.triplane import TriPlaneGenerator
from training.volumetric_rendering.renderer import RendererChoice


def load_generator(
    source: str | Path, device: torch.device | str = "cpu", renderer: RendererChoice = "auto"
) -> TriPlaneGenerator:
    """Load a generator for inference.

    Args:
        source: a published pickle, a converted safetensors file or a difference from another network, as a path, an
            http(s) URL or `hf://org/repo/file`; `demo`, the bundled network; or `init:PRESET`, an untrained generator
            (always the same weights).
        device: where to put it; 'auto' is a GPU if there is one. For a GPU, cuDNN is told to be deterministic; for a
            CPU, freed memory is kept (see `torch_utils.memory.keep_freed_memory`).
        renderer: what renders the volume; see `ImportanceRenderer`.

    Returns:
        The moving average of the generator (`G_ema`), in eval mode, not requiring gradients.

    Raises:
        ValueError: the file is no snapshot, or holds no `G_ema`; or it is a difference whose base is not found; or the
            device is not there; or a fused renderer is asked for and not there.
        OSError: the file cannot be read.
    """
    device = resolve_device(str(device))
    if device.type == "cuda":
        # The same command is to make the same picture: no algorithms that are chosen by timing, or that race.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    if device.type == "cpu":
        keep_freed_memory()
    generator = load_snapshot(source, only=["G_ema"])["G_ema"]
    require(generator is not None, str(source), "a network G_ema", None)
    generator.renderer.choose(renderer, device)
    return generator.to(device)
