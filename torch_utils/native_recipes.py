"""Say how native kernels are compiled: which files, which compilers, which flags.

One shared library per instruction set, and one for CUDA. A process loads only the one that fits its machine: were the
variants in one library, the linker would merge the inline functions that they share, and code for the weakest machine
could end up in a function compiled for the strongest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORMAT = 1  # part of every key; raise it where the meaning of a recipe changes
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512")
ISA_FLAGS = {"baseline": (), "avx2": AVX2_FLAGS, "avx512": AVX2_FLAGS + AVX512_FLAGS}
COMPILE_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
NVCC_FLAGS = ("-O3", "-std=c++20", "-Xcompiler", "-fPIC")
# Compute capabilities to build for where the GPU is not there yet; nvcc drops those that it does not know.
CUDA_ARCHITECTURES = ("70", "75", "80", "86", "89", "90", "100", "120")


class NativeBuildError(RuntimeError):
    """No library could be had; the message is one line that gives the reason."""


# What to compile ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """The files of one set of kernels."""

    shared: tuple[Path, ...]
    """Compiled without flags of an instruction set; only these may include PyTorch's headers."""
    cpu: tuple[Path, ...]
    """Compiled for an instruction set, with SPHEREHEAD_ISA defined as its name."""
    cuda: tuple[Path, ...]
    """Compiled by nvcc."""
    headers: tuple[Path, ...]

    @staticmethod
    def of(folder: Path) -> Sources:
        """Return what a folder holds: ``*_cpu.cpp``, ``*_cuda.cu``, other ``*.cpp``, and headers."""
        cpu = sorted(folder.glob("*_cpu.cpp"))
        return Sources(
            shared=tuple(sorted(set(folder.glob("*.cpp")) - set(cpu))),
            cpu=tuple(cpu),
            cuda=tuple(sorted(folder.glob("*_cuda.cu"))),
            headers=tuple(sorted([*folder.glob("*.h"), *folder.glob("*.cuh")])),
        )

    def digest(self, kind: str) -> str:
        """Return a hash over names and contents of what goes into the library of a kind."""
        if kind == "cuda":
            files = (*self.cuda, *self.headers)
        else:
            files = (*self.shared, *self.cpu, *(file for file in self.headers if file.suffix != ".cuh"))
        digest = hashlib.sha256()
        for file in files:
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode())
            digest.update(content)
        return digest.hexdigest()

    def need_torch(self) -> bool:
        """Tell whether a file includes PyTorch's headers, so that the library has to be linked with PyTorch."""
        pattern = re.compile(rb"^\s*#\s*include\s*<(ATen|c10|torch)/", re.MULTILINE)
        return any(pattern.search(file.read_bytes()) for file in self.shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchFacts:
    """What compiling and linking need to know of PyTorch."""

    version: str
    include_dir: Path
    library_dir: Path
    cxx11_abi: bool = True
    """Whether its std::string is the one of C++11; older wheels were built with the other."""

    @staticmethod
    def installed() -> TorchFacts:
        """Return the facts of the PyTorch that this process imports."""
        import torch  # here, because everything else in this module does without

        root = Path(torch.__file__).resolve().parent
        return TorchFacts(
            version=torch.__version__,
            include_dir=root / "include",
            library_dir=root / "lib",
            cxx11_abi=torch.compiled_with_cxx11_abi(),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edge:
    """One object file: a command, to which input and output are added, and the source."""

    command: tuple[str, ...]
    source: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The commands that make a library."""

    edges: tuple[Edge, ...]
    link: tuple[str, ...]
    """Before the objects."""
    libraries: tuple[str, ...]
    """After the objects."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one shared library is made, as far as that is known without running the compiler on anything."""

    kind: str
    """An instruction set, or 'cuda'."""
    content: dict[str, Any]
    """What decides whether a library fits, wherever it was built: sources, PyTorch, platform."""
    tools: dict[str, Any]
    """What else tells builds apart: compiler, flags, architectures, system libraries."""
    sources: Sources
    torch: TorchFacts

    @property
    def file_name(self) -> str:
        """Name of the library."""
        return f"spherehead_{self.kind}.so"

    @property
    def key(self) -> str:
        """Name of the cache entry: the kind, and a hash over everything that tells builds apart."""
        text = json.dumps([FORMAT, self.content, self.tools], sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"

    def plan(self, folder: Path) -> Plan:
        """Return the commands, after trying the compiler in ``folder``.

        Raises:
            NativeBuildError: the compiler is not up to it.
        """
        return _cuda_plan(self, folder) if self.kind == "cuda" else _cpu_plan(self, folder)


def content_of(kind: str, sources: Sources, torch: TorchFacts) -> dict[str, Any]:
    """Return what decides whether a library of a kind fits: sources, PyTorch, platform."""
    platform_name = sysconfig.get_platform()
    return {"kind": kind, "sources": sources.digest(kind), "torch": torch.version, "platform": platform_name}


# CPU ------------------------------------------------------------------------------------------------------------------


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that kernels are compiled for on machines like this one, the weakest first."""
    return tuple(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ("baseline",)


def cpu_recipe(sources: Sources, isa: str, torch: TorchFacts) -> Recipe:
    """Return how the library for an instruction set is made here.

    Raises:
        NativeBuildError: no compiler was found, or it does not start.
    """
    command = find_compiler()
    tools = {
        "command": command,
        "compiler": version_of(command),
        "flags": [*COMPILE_FLAGS, *ISA_FLAGS[isa]],
        "libc": platform.libc_ver(),  # a home directory may be shared by machines of different age
    }
    return Recipe(kind=isa, content=content_of(isa, sources, torch), tools=tools, sources=sources, torch=torch)


def find_compiler() -> list[str]:
    """Return the C++ compiler: $CXX, which may hold arguments as in "ccache g++", or else g++, c++ or clang++.

    Raises:
        NativeBuildError: there is none.
    """
    if sys.platform == "win32":
        raise NativeBuildError("native kernels are not built on Windows")
    try:
        wanted = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise NativeBuildError(f"CXX={os.environ['CXX']}: {error}") from None
    if wanted:
        program = shutil.which(wanted[0])
        if program is None:
            raise NativeBuildError(f"no C++ compiler found (CXX={os.environ['CXX']}: no such program)")
        return [program, *wanted[1:]]
    for name in ("g++", "c++", "clang++"):
        if program := shutil.which(name):
            return [program]
    raise NativeBuildError("no C++ compiler found (looked for $CXX, g++, c++, clang++)")


def version_of(command: Sequence[str]) -> str:
    """Return what a compiler says of itself.

    Raises:
        NativeBuildError: it does not start.
    """
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{command[0]} does not start ({one_line(str(error))})") from None
    if done.returncode != 0:
        shown = one_line(done.stderr or done.stdout) or f"exit status {done.returncode}"
        raise NativeBuildError(f"{shlex.join(command)} --version failed ({shown})")
    return one_line(done.stdout.strip().partition("\n")[0])


def _cpu_plan(recipe: Recipe, folder: Path) -> Plan:
    compiler, torch = recipe.tools["command"], recipe.torch
    _check_language(compiler, folder)
    openmp, libraries = _openmp_flags(compiler, torch, folder)
    shared = [*compiler, *COMPILE_FLAGS, *openmp]
    if recipe.sources.need_torch():
        shared += [f"-I{torch.include_dir}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}"]
        libraries = [f"-L{torch.library_dir}", "-ltorch_cpu", "-lc10", *libraries]
        if sys.platform == "darwin":  # Linux finds the libraries that PyTorch has loaded by their names
            libraries.append(f"-Wl,-rpath,{torch.library_dir}")
    cpu = [*compiler, *recipe.tools["flags"], f"-DSPHEREHEAD_ISA={recipe.kind}"]
    edges = [Edge(command=tuple(shared), source=file) for file in recipe.sources.shared]
    edges += [Edge(command=tuple(cpu), source=file) for file in recipe.sources.cpu]
    return Plan(edges=tuple(edges), link=(*compiler, "-shared"), libraries=tuple(libraries))


def _check_language(compiler: list[str], folder: Path) -> None:
    """Raise NativeBuildError unless the compiler makes shared libraries of C++20."""
    concept = "template <class T> concept Sized = sizeof(T) > 0;\n"
    (folder / "language.cpp").write_text(f"#include <cstdint>\n{concept}int f(Sized auto x) {{ return x; }}\n")
    command = [*compiler, "-std=c++20", "-fPIC", "-shared", "language.cpp", "-o", "language.so"]
    done = run_logged(command, folder)
    if done.returncode != 0:
        shown = first_error(done.stdout) or f"exit status {done.returncode}"
        raise NativeBuildError(f"{shlex.join(compiler)} cannot compile C++20: {shown}")


def _openmp_flags(compiler: list[str], torch: TorchFacts, folder: Path) -> tuple[list[str], list[str]]:
    """Return how to compile and how to link with OpenMP; nothing where it is not there, as in Apple's compiler.

    Linking with the very file that PyTorch brings lets both share one pool of threads. Clang, whose code calls another
    library, cannot, and takes its own.
    """
    loop = "int f() {\n    int n = 0;\n#pragma omp parallel\n    n = omp_get_num_threads();\n    return n;\n}\n"
    (folder / "openmp.cpp").write_text(f"#include <omp.h>\n{loop}")
    bundled = sorted(map(str, torch.library_dir.glob("libgomp*.so*")))
    whole = [] if sys.platform == "darwin" else ["-Wl,-z,defs"]  # a symbol that is missing is an error
    objects = [*compiler, "-fopenmp", "-fPIC", "-c", "openmp.cpp", "-o", "openmp.o"]
    if run_logged(objects, folder).returncode == 0:
        for libraries in ([bundled] if len(bundled) == 1 else []) + [["-fopenmp"]]:
            link = [*compiler, "-shared", *whole, "openmp.o", "-o", "openmp.so", *libraries]
            if run_logged(link, folder).returncode == 0:
                return ["-fopenmp"], libraries
    return [], []


# CUDA -----------------------------------------------------------------------------------------------------------------


def cuda_recipe(sources: Sources, architectures: Sequence[str], torch: TorchFacts) -> Recipe:
    """Return how the CUDA library is made here.

    Args:
        sources: what to compile.
        architectures: compute capabilities without a point, such as "90"; those that nvcc does not know are left out,
            and a newer GPU gets intermediate code for the newest that it does know.
        torch: for its version only; the library is not linked with it.

    Raises:
        NativeBuildError: no nvcc was found, or it does not start.
    """
    nvcc = find_nvcc()
    steering = {name: os.environ.get(name, "") for name in ("CXX", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS")}
    tools = {
        "command": [nvcc],
        "compiler": version_of([nvcc]),
        "flags": list(NVCC_FLAGS),
        "architectures": sorted(set(architectures), key=int),
        "environment": steering,
        "libc": platform.libc_ver(),
    }
    return Recipe(kind="cuda", content=content_of("cuda", sources, torch), tools=tools, sources=sources, torch=torch)


def find_nvcc() -> str:
    """Return the path of nvcc: in $CUDA_HOME or $CUDA_PATH, on PATH, or in /usr/local/cuda.

    Raises:
        NativeBuildError: there is none.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for home in filter(None, homes):
        if os.access(found := Path(home) / "bin" / "nvcc", os.X_OK):
            return str(found)
    if found := shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"):
        return found
    raise NativeBuildError("nvcc not found (looked in $CUDA_HOME, $CUDA_PATH, $PATH and /usr/local/cuda)")


def _cuda_plan(recipe: Recipe, folder: Path) -> Plan:
    (nvcc,) = recipe.tools["command"]
    flags = [*NVCC_FLAGS, *_host_compiler(), *_code_flags(nvcc, recipe.tools["architectures"], folder)]
    flags.append("--threads=0")  # the architectures of a file side by side
    edges = [Edge(command=(nvcc, *flags), source=file) for file in recipe.sources.cuda]
    return Plan(edges=tuple(edges), link=(nvcc, "-shared", *_host_compiler()), libraries=())


def _host_compiler() -> list[str]:
    """Return nvcc's option for $CXX; nvcc takes a program without arguments, and has a variable of its own."""
    with contextlib.suppress(NativeBuildError):
        if os.environ.get("CXX") and not os.environ.get("NVCC_CCBIN"):
            return ["-ccbin", [part for part in find_compiler() if not part.startswith("-")][-1]]
    return []


def _code_flags(nvcc: str, architectures: Sequence[str], folder: Path) -> list[str]:
    """Return -gencode options: machine code for what nvcc knows, intermediate code for what is newer."""
    listed = run_logged([nvcc, "--list-gpu-arch"], folder).stdout
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", listed)}
    flags = []
    for number in map(int, architectures):
        if number in known:
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        elif older := [other for other in known if other < number]:
            flags.append(f"-gencode=arch=compute_{max(older)},code=compute_{max(older)}")
    if not flags:
        raise NativeBuildError(f"{nvcc} knows none of the compute capabilities {', '.join(architectures)}")
    return list(dict.fromkeys(flags))


# Running compilers ----------------------------------------------------------------------------------------------------

LOG_NAME = "build.log"


def run_logged(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, and append it and what it prints to the log there."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with open(folder / LOG_NAME, "a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n{done.stdout}")
    return done


def first_error(output: str) -> str:
    """Return the first line of a compiler's output that tells of an error, or else its first line; '' of nothing."""
    lines = [line for line in output.splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"\berror\b|not found|cannot find|undefined", line, re.IGNORECASE)]
    return one_line((told or lines or [""])[0])


def one_line(text: str) -> str:
    """Return a text in one line of at most 300 characters."""
    return " ".join(text.split())[:300]
