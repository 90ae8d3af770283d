"""The command ``python -m torch_utils.native``: print the state of the native kernels, or build them ahead of time."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from torch_utils.native import AHEAD_DIR, SOURCE_DIR, status
from torch_utils.native_build import build_ahead
from torch_utils.native_recipes import (
    CUDA_ARCHITECTURES,
    NativeBuildError,
    Sources,
    TorchFacts,
    cpu_recipe,
    cuda_recipe,
    find_nvcc,
    instruction_sets,
)


def build_all(folder: Path, *, cuda: bool | None = None) -> list[Path]:
    """Build the kernels for all instruction sets of machines like this one, and for GPUs, into a folder.

    Args:
        folder: what is in it is replaced once everything is built. Libraries are found in AHEAD_DIR only.
        cuda: None builds CUDA kernels if this PyTorch has CUDA and there is an nvcc. They are compiled for
            $TORCH_CUDA_ARCH_LIST, such as "8.0;9.0", or else for the usual ones.

    Returns:
        The libraries.

    Raises:
        NativeBuildError: a compiler is missing or failed.
        OSError: the folder cannot be written.
    """
    sources, facts = Sources.of(SOURCE_DIR), TorchFacts.installed()
    recipes = [cpu_recipe(sources, isa, facts) for isa in instruction_sets()]
    if cuda is None:
        with contextlib.suppress(NativeBuildError):
            cuda = bool(sources.cuda and torch.version.cuda and find_nvcc())
    if cuda:
        listed = re.findall(r"(\d+)\.(\d)", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
        recipes.append(cuda_recipe(sources, ["".join(pair) for pair in listed] or CUDA_ARCHITECTURES, facts))
    return build_ahead(recipes, folder, say=lambda text: print(text, file=sys.stderr, flush=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the state of the native kernels, or build them ahead of time; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m torch_utils.native", description=main.__doc__)
    parser.add_argument("command", nargs="?", choices=("state", "ahead"), default="state", help="state if left out")
    parser.add_argument("--folder", type=Path, default=AHEAD_DIR, help="ahead: build elsewhere than in the package")
    parser.add_argument("--cuda", action=argparse.BooleanOptionalAction, help="ahead: build CUDA kernels or fail")
    options = parser.parse_args(arguments)
    try:
        if options.command == "ahead":
            for library in build_all(options.folder, cuda=options.cuda):
                print(library)
            return 0
        found = status()
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(found)
    return 1 if found.reason and found.mode != "0" else 0
