"""Load the native kernels of this project, after building them where that has not been done yet.

``load()`` gives the kernels, or None where they cannot be had: every op has a reference in plain PyTorch. The variable
SPHEREHEAD_NATIVE chooses: ``auto`` (the default) falls back to the references with one line on stderr, ``0`` never
loads, ``1`` raises instead of falling back. ``python -m torch_utils.native`` prints the state; see docs/native.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import shlex
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torch_utils.native_build import Built, cached, find_built
from torch_utils.native_recipes import (
    NativeBuildError,
    Recipe,
    Sources,
    TorchFacts,
    content_of,
    cpu_recipe,
    cuda_recipe,
    instruction_sets,
)

OPS_DIR = Path(__file__).resolve().parent / "ops"
SOURCE_DIR, AHEAD_DIR = OPS_DIR / "csrc", OPS_DIR / "lib"
MODES = ("auto", "0", "1")
Kernel = Any  # a function of ctypes; returns int unless its restype is set: 0 for success, 1 for out of memory


# Kernels --------------------------------------------------------------------------------------------------------------


class NativeUnavailableError(RuntimeError, OSError):
    """There are no native kernels, and SPHEREHEAD_NATIVE=1 forbids to do without; scripts show it as one line."""


class NativeLibrary:
    """The kernels of this machine; :func:`load` makes it."""

    def __init__(self, isa: str, built: Built, library: ctypes.CDLL) -> None:
        self.isa = isa
        self.built = built
        self._library = library
        self._cpu: dict[str, Kernel | None] = {}
        self._cuda: dict[str, Kernel | None] = {}
        self._cuda_library: tuple[Built, ctypes.CDLL] | None = None
        self._cuda_tried = False
        self._cuda_reason = ""
        self._lock = threading.RLock()

    def cpu(self, name: str) -> Kernel | None:
        """Return the CPU kernel ``name``, or None where there is none of that name.

        It is the same object at every call, so that ``restype`` and ``argtypes`` can be set once.
        """
        try:
            return self._cpu[name]
        except KeyError:
            return self._cpu.setdefault(name, _symbol(self._library, f"{name}__{self.isa}"))

    def cuda(self, name: str) -> Kernel | None:
        """Return the launcher ``name`` of a CUDA kernel, or None where there is none; see :meth:`cuda_reason`.

        The first call builds the CUDA kernels, if PyTorch sees a GPU and there is an nvcc.

        Raises:
            RuntimeError: SPHEREHEAD_NATIVE=1, PyTorch sees a GPU, and the kernels cannot be had.
        """
        try:
            return self._cuda[name]
        except KeyError:
            opened = self._open_cuda()
            return self._cuda.setdefault(name, _symbol(opened[1], name) if opened else None)

    def cuda_reason(self) -> str:
        """Return why there are no CUDA kernels; '' where there are."""
        self._open_cuda()
        return self._cuda_reason

    def cpu_kernels(self) -> tuple[str, ...]:
        """Return the names of all CPU kernels."""
        names = set()
        for match in re.findall(rf"(\w+)__{self.isa}\0".encode(), self.built.library.read_bytes()):
            # Linkers store a name that is the end of a longer one only once, as that end.
            ends = {match.decode()[start:] for start in range(len(match))}
            names |= {end for end in ends if _symbol(self._library, f"{end}__{self.isa}")}
        return tuple(sorted(names))

    def cuda_kernels(self) -> tuple[str, ...]:
        """Return the names of the launchers of CUDA kernels, as far as they are spelt out behind ``extern "C"``."""
        source = "\n".join(file.read_text(encoding="utf-8") for file in Sources.of(SOURCE_DIR).cuda)
        names = set(re.findall(r'extern "C"[^;{(]*?(\w+)\s*\(', source))
        return tuple(sorted(name for name in names if self.cuda(name)))

    def cuda_library(self) -> Path | None:
        """Return the file of the CUDA kernels, or None where there are none."""
        opened = self._open_cuda()
        return opened[0].library if opened else None

    def _open_cuda(self) -> tuple[Built, ctypes.CDLL] | None:
        with self._lock:
            if not self._cuda_tried:
                devices = _cuda_devices()
                self._cuda_reason = "" if devices else "PyTorch sees no CUDA device"
                try:
                    self._cuda_library = _open_cuda_library(devices) if devices else None
                except (NativeBuildError, OSError) as error:
                    self._cuda_reason = str(error)
                    _fall_back("CUDA kernels", error)
                self._cuda_tried = True
            return self._cuda_library


def _symbol(library: ctypes.CDLL, name: str) -> Kernel | None:
    try:
        function = library[name]
    except AttributeError:
        return None
    function.restype = ctypes.c_int
    return function


# Loading --------------------------------------------------------------------------------------------------------------


class _State:
    """What is known in this process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.tried = False
        self.library: NativeLibrary | None = None
        self.reason = ""
        self.num_disabled = 0


_state = _State()


def load() -> NativeLibrary | None:
    """Return the native kernels, or None where they cannot be had or are switched off; see :func:`reason`.

    The first call builds them where necessary; all others cost nothing. Safe to call from any thread.

    Raises:
        RuntimeError: SPHEREHEAD_NATIVE=1, and they cannot be had.
        ValueError: SPHEREHEAD_NATIVE or SPHEREHEAD_ISA has a value that it cannot have.
    """
    state = _state
    if not state.tried:
        _load_once(state)
    return None if state.num_disabled else state.library


def reason() -> str:
    """Return why :func:`load` gives None, in one line; '' where it gives the kernels."""
    if load() is not None:
        return ""
    return "switched off by native.disabled()" if _state.num_disabled else _state.reason


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Let :func:`load` give None, in all threads, while the body runs: for comparisons with the references."""
    state = _state
    with state.lock:
        state.num_disabled += 1
    try:
        yield
    finally:
        with state.lock:
            state.num_disabled -= 1


def _load_once(state: _State) -> None:
    with state.lock:
        if state.tried:
            return
        mode, isa = _mode(), instruction_set()
        try:
            if mode == "0":
                raise NativeBuildError("SPHEREHEAD_NATIVE=0")
            state.library = _open_cpu_library(isa)
        except (NativeBuildError, OSError) as error:
            state.reason = str(error)
            _fall_back("native kernels", error)
        state.tried = True


def _mode() -> str:
    mode = os.environ.get("SPHEREHEAD_NATIVE") or "auto"
    if mode not in MODES:
        raise ValueError(f"SPHEREHEAD_NATIVE: expected auto, 0 or 1, came {mode!r}")
    return mode


def instruction_set() -> str:
    """Return the instruction set that kernels are loaded for: $SPHEREHEAD_ISA, or else the best that PyTorch uses.

    PyTorch's choice knows the operating system's part in it, and can be limited by $ATEN_CPU_CAPABILITY.

    Raises:
        ValueError: SPHEREHEAD_ISA is not one that kernels are compiled for on such machines.
    """
    known = instruction_sets()
    forced = os.environ.get("SPHEREHEAD_ISA")
    if forced:
        if forced not in known:
            raise ValueError(f"SPHEREHEAD_ISA: expected one of {', '.join(known)}, came {forced!r}")
        return forced
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return next((isa for isa in reversed(known) if capability.startswith(isa)), "baseline")


def _open_cpu_library(isa: str) -> NativeLibrary:
    sources, facts = Sources.of(SOURCE_DIR), TorchFacts.installed()
    if not sources.cpu:
        raise NativeBuildError(f"{SOURCE_DIR}: no sources of kernels")
    built, library = _open(isa, content_of(isa, sources, facts), partial(cpu_recipe, sources, isa, facts))
    return NativeLibrary(isa, built, library)


def _open_cuda_library(devices: Sequence[str]) -> tuple[Built, ctypes.CDLL]:
    sources, facts = Sources.of(SOURCE_DIR), TorchFacts.installed()
    if not sources.cuda:
        raise NativeBuildError(f"{SOURCE_DIR}: no sources of CUDA kernels")
    recipe = partial(cuda_recipe, sources, devices, facts)
    return _open("cuda", content_of("cuda", sources, facts), recipe, partial(_runs_on, devices))


def _open(
    kind: str,
    content: dict[str, Any],
    make_recipe: Callable[[], Recipe],
    fits: Callable[[Built], bool] = lambda built: True,
) -> tuple[Built, ctypes.CDLL]:
    """Open what was built ahead of time, if it fits, or else what is in the cache, after building it if need be."""
    built = find_built(AHEAD_DIR / kind, content)
    if built and fits(built):
        with contextlib.suppress(OSError):
            return built, ctypes.CDLL(str(built.library))
    recipe = make_recipe()
    built = _from_cache(recipe)
    try:
        return built, ctypes.CDLL(str(built.library))
    except OSError:  # such as one that needs system libraries of another version
        built = _from_cache(recipe, broken=built)
        return built, ctypes.CDLL(str(built.library))


def _cuda_devices() -> list[str]:
    """Return the compute capabilities of the devices that PyTorch sees, such as ["90"]."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    devices = range(torch.cuda.device_count())
    return sorted({"{}{}".format(*torch.cuda.get_device_capability(device)) for device in devices})


def _runs_on(devices: Sequence[str], built: Built) -> bool:
    """Tell whether a CUDA library has code for all devices: of the same major capability, and no newer."""
    there = [int(name) for name in built.record["tools"]["architectures"]]
    return all(any(other // 10 == int(name) // 10 and other <= int(name) for other in there) for name in devices)


# Where libraries are kept, and what is said about them ----------------------------------------------------------------


def cache_dir() -> Path:
    """Return the folder of the cache: native/ in $SPHEREHEAD_CACHE_DIR, or else in ~/.cache/spherehead."""
    return Path(os.environ.get("SPHEREHEAD_CACHE_DIR") or "~/.cache/spherehead").expanduser() / "native"


def _temporary_cache_dir() -> Path:
    """Return a folder of this user in the temporary folder, which is shared: nobody else may write there.

    Raises:
        OSError: it cannot be made, or is somebody else's.
    """
    folder = Path(tempfile.gettempdir()) / f"spherehead-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder}: expected a folder that only this user can write")
    return folder / "native"


def _from_cache(recipe: Recipe, broken: Built | None = None) -> Built:
    """Return a library from the cache, or from a temporary one where the cache cannot be written."""
    problems = []
    for choose in (cache_dir, _temporary_cache_dir):
        try:
            return cached(recipe, choose(), say=_say, broken=broken)
        except NativeBuildError:
            raise
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
            problems.append(str(error))
    raise NativeBuildError(f"the cache cannot be written ({'; '.join(problems)})")


def _fall_back(what: str, error: Exception) -> None:
    """Say that references are used, or raise where SPHEREHEAD_NATIVE=1 forbids that."""
    if _mode() == "1":
        raise NativeUnavailableError(f"SPHEREHEAD_NATIVE=1, but there are no {what}: {error}") from error
    _say(f"no {what}, using the slower reference in PyTorch: {error}")


def _say(text: str) -> None:
    """Print a line to stderr, in one process per machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


# State ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeStatus:
    """What :func:`status` found."""

    reason: str
    """Why there are no native kernels; '' where there are."""
    mode: str
    """Of SPHEREHEAD_NATIVE."""
    instruction_set: str
    cache_dir: str
    library: Path | None = None
    ahead_of_time: bool = False
    """Whether the library was built into the package, not into the cache."""
    compiler: str = ""
    flags: tuple[str, ...] = ()
    cpu_kernels: tuple[str, ...] = ()
    cuda_library: Path | None = None
    cuda_kernels: tuple[str, ...] = ()
    cuda_reason: str = ""
    """Why there are no CUDA kernels; '' where there are, or where there are no native kernels at all."""

    def __str__(self) -> str:
        rows = {
            "native kernels": f"no: {self.reason}" if self.reason else "yes",
            "SPHEREHEAD_NATIVE": self.mode,
            "instruction set": self.instruction_set,
            "PyTorch": torch.__version__,
            "cache": self.cache_dir,
        }
        if self.library is not None:
            rows |= {
                "library": f"{self.library}{' (built ahead of time)' if self.ahead_of_time else ''}",
                "compiler": self.compiler,
                "flags": shlex.join(self.flags),
                "CPU kernels": ", ".join(self.cpu_kernels),
                "CUDA library": f"none: {self.cuda_reason}" if self.cuda_reason else str(self.cuda_library),
                "CUDA kernels": ", ".join(self.cuda_kernels) or "none",
            }
        return "\n".join(f"{name + ':':18} {value}" for name, value in rows.items())


def status() -> NativeStatus:
    """Return the state of the native kernels, CUDA included, after building them if need be.

    Raises:
        RuntimeError, ValueError: as :func:`load`.
    """
    library = load()
    try:
        cache = str(cache_dir())
    except RuntimeError as error:
        cache = f"none: {error}"
    common = {"reason": reason(), "mode": _mode(), "instruction_set": instruction_set(), "cache_dir": cache}
    if library is None:
        return NativeStatus(**common)
    tools = library.built.record["tools"]
    return NativeStatus(
        **common,
        library=library.built.library,
        ahead_of_time=library.built.library.is_relative_to(AHEAD_DIR),
        compiler=f"{shlex.join(tools['command'])} ({tools['compiler']})",
        flags=(*tools["flags"], *library.built.record["libraries"]),
        cpu_kernels=library.cpu_kernels(),
        cuda_library=library.cuda_library(),
        cuda_kernels=library.cuda_kernels(),
        cuda_reason=library.cuda_reason(),
    )


if __name__ == "__main__":
    from torch_utils.native_cli import main

    sys.exit(main())
