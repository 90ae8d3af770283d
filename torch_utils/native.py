"""Load the native kernels of this project; build them first where that has not been done yet.

``load()`` gives the library or None, and None is never an error: every op has a reference in plain PyTorch. The
environment variable SPHEREHEAD_NATIVE chooses: ``auto`` (default) falls back to the references with one line on stderr,
``0`` never loads, ``1`` raises instead of falling back. ``python -m torch_utils.native`` prints the state.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from torch_utils import native_build
from torch_utils.native_build import ISA_FLAGS, NativeBuildError, Sources, TorchFacts

SOURCE_DIR = Path(__file__).resolve().parent / "ops" / "csrc"
Kernel = Any  # a ctypes function pointer that returns int: 0 is success, 1 out of memory


class NativeLibrary:
    """The loaded kernels of this machine's instruction set."""

    def __init__(self, built: native_build.Built, isa: str) -> None:
        self.path, self.isa, self.record = built.library, isa, built.record
        self._library = ctypes.CDLL(str(built.library))
        self._cpu: dict[str, Kernel | None] = {}

    def cpu(self, name: str) -> Kernel | None:
        """Return the CPU kernel of that name, or None where there is none."""
        try:
            return self._cpu[name]
        except KeyError:
            return self._cpu.setdefault(name, _symbol(self._library, f"{name}__{self.isa}"))

    def cuda(self, name: str) -> Kernel | None:
        """Return the launcher of the CUDA kernel of that name, or None where there is none."""
        return None


def _symbol(library: ctypes.CDLL, name: str) -> Kernel | None:
    try:
        function = library[name]
    except AttributeError:
        return None
    function.restype = ctypes.c_int
    return function


_lock = threading.RLock()
_tried = False
_library: NativeLibrary | None = None
_reason = ""
_disabled = 0


def load() -> NativeLibrary | None:
    """Return the native kernels, or None where they cannot be had; see ``reason()``.

    Raises:
        RuntimeError: SPHEREHEAD_NATIVE=1, and they cannot be had.
        ValueError: SPHEREHEAD_NATIVE is neither auto, 0 nor 1.
    """
    if not _tried:
        _load_once()
    return None if _disabled else _library


def reason() -> str:
    """Return why ``load()`` gives None; '' where it gives a library."""
    load()
    return "switched off by native.disabled()" if _disabled else _reason


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Let every thread of this process use the references while the body runs."""
    global _disabled
    with _lock:
        _disabled += 1
    try:
        yield
    finally:
        with _lock:
            _disabled -= 1


def cache_dir() -> Path:
    """Return the folder that builds are kept in: native/ in $SPHEREHEAD_CACHE_DIR, or else in ~/.cache/spherehead."""
    return Path(os.environ.get("SPHEREHEAD_CACHE_DIR") or "~/.cache/spherehead").expanduser() / "native"


def instruction_set() -> str:
    """Return the instruction set to use: $SPHEREHEAD_ISA, or else the best one of this machine."""
    forced = os.environ.get("SPHEREHEAD_ISA")
    if forced:
        if forced not in ISA_FLAGS:
            raise ValueError(f"SPHEREHEAD_ISA: expected one of {', '.join(ISA_FLAGS)}, came {forced!r}")
        return forced
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "baseline"
    capability = torch.backends.cpu.get_cpu_capability()
    return "avx512" if capability.startswith("AVX512") else "avx2" if capability == "AVX2" else "baseline"


def _load_once() -> None:
    global _tried, _library, _reason
    with _lock:
        if _tried:
            return
        mode = os.environ.get("SPHEREHEAD_NATIVE") or "auto"
        if mode not in ("auto", "0", "1"):
            raise ValueError(f"SPHEREHEAD_NATIVE: expected auto, 0 or 1, came {mode!r}")
        try:
            if mode == "0":
                raise NativeBuildError("SPHEREHEAD_NATIVE=0")
            _library = _build_and_open()
        except (NativeBuildError, OSError) as error:
            if mode == "1":
                raise RuntimeError(f"SPHEREHEAD_NATIVE=1, but there are no native kernels: {error}") from error
            _reason = str(error)
            _say(f"no native kernels, using the slower reference: {error}")
        _tried = True


def _build_and_open() -> NativeLibrary:
    isa = instruction_set()
    recipe = native_build.cpu_recipe(Sources.of(SOURCE_DIR), isa, TorchFacts.installed(), native_build.find_compiler())
    built = native_build.cached(recipe, cache_dir(), say=_say)
    try:
        return NativeLibrary(built, isa)
    except OSError:
        return NativeLibrary(native_build.cached(recipe, cache_dir(), say=_say, rebuild=True), isa)


def _say(text: str) -> None:
    """Print one line to stderr, in one process per machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
