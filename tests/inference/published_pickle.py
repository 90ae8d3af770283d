"""Write live networks as pickles in the published snapshot format, for tests that need a complete one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tests.helpers.published import tiny_generator, tiny_generator_kwargs
from tests.torch_utils import fake_snapshot as fake
from training.triplane import TriPlaneGenerator

# Arguments that only this project's constructor knows.
_OUR_ARGUMENTS = ("representation", "pose_offset")
_OUR_RENDERING = ("depth_clamp", "auto_range_of_misses", "importance_draws", "crop_margin")


def write_snapshot(path: Path, system: str = "sphere", both: bool = False, **networks: Any) -> TriPlaneGenerator:
    """Write a snapshot with the tiny generator of a system ('sphere', 'pano' or 'eg3d') as `G_ema`.

    Args:
        path: where to.
        system: whose generator.
        both: store it as `G` too.
        **networks: other values for entries of the snapshot, such as `G_ema=None`.

    Returns:
        The generator in it.
    """
    generator = tiny_generator(system)
    record = _published(generator, system)
    snapshot = {"training_set_kwargs": None, "G": record if both else None, "D": None, "G_ema": record}
    path.write_bytes(fake.dump({**snapshot, "augment_pipe": None, **networks}))
    return generator


def _published(generator: TriPlaneGenerator, system: str) -> nn.Module:
    arguments = tiny_generator_kwargs(system)
    rendering = {key: value for key, value in arguments.pop("rendering_kwargs").items() if key not in _OUR_RENDERING}
    sr_kwargs = {key: value for key, value in arguments.pop("sr_kwargs").items() if key != "first_rgb_replaces_raw"}
    kept = {key: value for key, value in arguments.items() if key not in _OUR_ARGUMENTS}
    record = _persistent(generator)
    record._init_args = ()
    record._init_kwargs = fake.EasyDict(**kept, rendering_kwargs=fake.EasyDict(rendering), sr_kwargs=sr_kwargs)
    record.rendering_kwargs = fake.EasyDict(rendering)
    record.neural_rendering_resolution = generator.neural_rendering_resolution
    return record


def _persistent(module: nn.Module) -> nn.Module:
    """Return an object that pickles as a published persistent object with the tensors of a module."""
    # Any persistent class will do as a base: what is pickled is the name of the class and the tensors.
    record_class = type(type(module).__name__, (fake.FullyConnectedLayer,), {})
    record = record_class.__new__(record_class)
    nn.Module.__init__(record)
    record.eval()
    record._parameters.update(module._parameters)
    record._buffers.update(module._buffers)
    record._modules.update(
        {name: None if child is None else _persistent(child) for name, child in module._modules.items()}
    )
    return record
