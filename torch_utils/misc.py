"""The names that third-party scripts of the EG3D family import from here."""

from __future__ import annotations

import torch
from torch import nn


def named_params_and_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return all parameters and buffers of a module with their dotted names."""
    return [*module.named_parameters(), *module.named_buffers()]


def params_and_buffers(module: nn.Module) -> list[torch.Tensor]:
    """Return all parameters and buffers of a module."""
    return [tensor for _, tensor in named_params_and_buffers(module)]


def copy_params_and_buffers(src_module: nn.Module, dst_module: nn.Module, require_all: bool = False) -> None:
    """Copy parameters and buffers by name.

    Args:
        src_module: where to copy from.
        dst_module: where to copy to; `requires_grad` of its tensors stays.
        require_all: whether every tensor of the destination must exist in the source.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    source = dict(named_params_and_buffers(src_module))
    with torch.no_grad():
        for name, tensor in named_params_and_buffers(dst_module):
            if name not in source:
                if require_all:
                    raise ValueError(
                        f"copy_params_and_buffers: expected '{name}' in the source module, but it has none"
                    )
                continue
            if source[name].shape != tensor.shape:
                expected, came = tuple(tensor.shape), tuple(source[name].shape)
                raise ValueError(f"copy_params_and_buffers: '{name}': expected shape {expected}, got {came}")
            tensor.copy_(source[name])
