"""Parameters and buffers are copied by name, as scripts of the EG3D family expect."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_utils.misc import copy_params_and_buffers, named_params_and_buffers, params_and_buffers


class Block(nn.Module):
    def __init__(self, value: float, width: int = 2, with_buffer: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1, bias=False)
        nn.init.constant_(self.layer.weight, value)
        if with_buffer:
            self.register_buffer("mean", torch.full([3], value))


def test_named_params_and_buffers_lists_both_with_dotted_names():
    module = Block(1.0)
    named = named_params_and_buffers(module)
    assert [name for name, _ in named] == ["layer.weight", "mean"]
    assert [tensor is expected for (_, tensor), expected in zip(named, (module.layer.weight, module.mean))] == [
        True
    ] * 2
    assert all(a is b for a, (_, b) in zip(params_and_buffers(module), named, strict=True))


def test_copy_params_and_buffers_copies_values_and_keeps_requires_grad():
    source, target = Block(5.0), Block(1.0)
    target.layer.weight.requires_grad_(False)
    weight = target.layer.weight
    copy_params_and_buffers(source, target, require_all=True)
    assert target.layer.weight is weight and not weight.requires_grad
    assert source.layer.weight.requires_grad
    assert (target.layer.weight == 5).all() and (target.mean == 5).all()
    source.mean.zero_()
    assert (target.mean == 5).all()  # a copy, not the same memory


def test_copy_params_and_buffers_missing_name_stays_unless_all_are_required():
    source, target = Block(5.0, with_buffer=False), Block(1.0)
    copy_params_and_buffers(source, target)
    assert (target.layer.weight == 5).all() and (target.mean == 1).all()
    with pytest.raises(ValueError, match="'mean'"):
        copy_params_and_buffers(source, target, require_all=True)


def test_copy_params_and_buffers_extra_name_in_the_source_is_ignored():
    copy_params_and_buffers(Block(5.0), target := Block(1.0, with_buffer=False), require_all=True)
    assert (target.layer.weight == 5).all()


def test_copy_params_and_buffers_other_shape_raises_value_error_with_both_shapes():
    with pytest.raises(ValueError, match=r"'layer.weight'.*\(1, 2\).*\(1, 3\)"):
        copy_params_and_buffers(Block(5.0, width=3), Block(1.0))


def test_copy_params_and_buffers_other_dtype_converts():
    copy_params_and_buffers(Block(0.5).double(), target := Block(1.0))
    assert target.layer.weight.dtype == torch.float32 and (target.layer.weight == 0.5).all()
