"""Compile native kernels with ninja, once per machine, into a cache that survives crashes and simultaneous starts.

One shared library per instruction set, and one for CUDA: a process loads only the one that fits its machine, so that
inline functions which several variants share cannot be taken from the wrong one. This module knows nothing of loading;
see :mod:`torch_utils.native`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # no advisory locks on Windows: simultaneous builds are then merely wasteful
    fcntl = None

FORMAT = 1  # part of every key; raise it where the layout of cache entries changes
RECORD_NAME, LOG_NAME = "build.json", "build.log"
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512")
ISA_FLAGS = {"baseline": (), "avx2": AVX2_FLAGS, "avx512": AVX2_FLAGS + AVX512_FLAGS}  # from weakest to strongest
COMPILE_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
UNUSED_DAYS = 60


class NativeBuildError(RuntimeError):
    """No library could be had; the message is one line that gives the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """The files of one set of kernels."""

    shared: tuple[Path, ...]
    """Compiled once, without flags of an instruction set; may include PyTorch's headers."""
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

    def digest(self, files: Sequence[Path]) -> str:
        """Return a hash over names and contents of some files and of the headers."""
        digest = hashlib.sha256()
        for file in (*files, *self.headers):
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode())
            digest.update(content)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchFacts:
    """What compiling and linking need to know of the installed PyTorch."""

    version: str
    include_dir: Path
    library_dir: Path
    cxx11_abi: bool

    @staticmethod
    def installed() -> TorchFacts:
        """Return the facts of the PyTorch that is imported."""
        import torch

        root = Path(torch.__file__).resolve().parent
        return TorchFacts(
            version=torch.__version__,
            include_dir=root / "include",
            library_dir=root / "lib",
            cxx11_abi=torch.compiled_with_cxx11_abi(),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiler:
    """A command and what it says of itself."""

    command: tuple[str, ...]
    version: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one shared library is made."""

    file_name: str
    content: dict[str, Any]
    """What decides whether a library fits, wherever it was built: sources, PyTorch, platform."""
    tools: dict[str, Any]
    """What else tells builds apart: compilers and flags."""
    write: Callable[[Path], dict[str, Any]]
    """Writes ``build.ninja`` into a folder, after trying the compiler there; returns notes for the record."""

    @property
    def key(self) -> str:
        """Name of the cache entry: instruction set or 'cuda', and a hash over everything."""
        text = json.dumps([FORMAT, self.content, self.tools], sort_keys=True)
        return f"{self.content['kind']}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """A library on disk."""

    library: Path
    record: dict[str, Any]


# Tools ----------------------------------------------------------------------------------------------------------------


def find_compiler() -> Compiler:
    """Return the C++ compiler: $CXX, which may hold arguments as in "ccache g++", or else g++, c++ or clang++.

    Raises:
        NativeBuildError: there is none, or it does not start.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))
    if not wanted:
        wanted = [name for name in ("g++", "c++", "clang++") if shutil.which(name)][:1]
    if not wanted:
        raise NativeBuildError("no C++ compiler found (looked for $CXX, g++, c++, clang++)")
    program = shutil.which(wanted[0])
    if program is None:
        raise NativeBuildError(f"no C++ compiler found (CXX={os.environ['CXX']}: no such program)")
    return describe_compiler([program, *wanted[1:]])


def describe_compiler(command: Sequence[str]) -> Compiler:
    """Return a command with the first line that it prints for ``--version``."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{command[0]} does not start ({_one_line(str(error))})") from None
    if done.returncode != 0:
        shown = _one_line(done.stderr or done.stdout) or f"exit status {done.returncode}"
        raise NativeBuildError(f"{shlex.join(command)} --version failed ({shown})")
    return Compiler(command=tuple(command), version=" / ".join(done.stdout.split("\n\n")[0].splitlines()))


def find_ninja() -> str:
    """Return the path of ninja: of the Python package, or else on PATH.

    Raises:
        NativeBuildError: there is none.
    """
    with contextlib.suppress(ImportError):
        import ninja

        if found := shutil.which("ninja", path=ninja.BIN_DIR):
            return found
    if found := shutil.which("ninja"):
        return found
    raise NativeBuildError("ninja is missing (pip install ninja)")


# Recipes --------------------------------------------------------------------------------------------------------------


def cpu_recipe(sources: Sources, isa: str, torch: TorchFacts, compiler: Compiler | None) -> Recipe:
    """Return how the library for an instruction set is made.

    Args:
        sources: what to compile.
        isa: a key of ISA_FLAGS.
        torch: PyTorch to link with.
        compiler: None gives a recipe that only serves to tell whether a library built elsewhere fits.
    """
    files = (*sources.shared, *sources.cpu)
    content = _content(isa, sources.digest(files), torch)
    tools = {} if compiler is None else dataclasses.asdict(compiler) | {"flags": [*COMPILE_FLAGS, *ISA_FLAGS[isa]]}

    def write(folder: Path) -> dict[str, Any]:
        assert compiler is not None
        command = [*compiler.command, *COMPILE_FLAGS]
        openmp = _try_compiler(compiler, folder)
        torch_flags = [f"-I{torch.include_dir}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}", *openmp]
        isa_flags = [*ISA_FLAGS[isa], f"-DSPHEREHEAD_ISA={isa}"]
        edges = [(command + torch_flags, file) for file in sources.shared]
        edges += [(command + isa_flags, file) for file in sources.cpu]
        link = [*compiler.command, "-shared", f"-L{torch.library_dir}"]
        libraries = ["-ltorch_cpu", "-lc10", *_openmp_library(openmp, torch)]
        if sys.platform == "darwin":
            libraries.append(f"-Wl,-rpath,{torch.library_dir}")
        _write_ninja(folder, edges, link, libraries, f"spherehead_{isa}.so")
        return {"flags": [*COMPILE_FLAGS, *isa_flags, *openmp]}

    return Recipe(file_name=f"spherehead_{isa}.so", content=content, tools=tools, write=write)


def _content(kind: str, digest: str, torch: TorchFacts) -> dict[str, Any]:
    return {"kind": kind, "sources": digest, "torch": torch.version, "platform": sysconfig.get_platform()}


def _try_compiler(compiler: Compiler, folder: Path) -> list[str]:
    """Check that the compiler makes shared libraries of C++20; return ["-fopenmp"] where it can, as Apple's cannot."""
    probe = folder / "probe.cpp"
    probe.write_text(
        "#include <cstdint>\ntemplate <class T> concept C = sizeof(T) > 0;\nint f(C auto x) { return x; }\n"
    )
    command = [*compiler.command, "-std=c++20", "-fPIC", "-shared", str(probe), "-o", str(folder / "probe.so")]
    if (done := _run(command, folder)).returncode != 0:
        _append_log(folder, done.stdout)
        raise NativeBuildError(f"{shlex.join(compiler.command)} cannot compile C++20: {first_error(done.stdout)}")
    return ["-fopenmp"] if _run([*command, "-fopenmp"], folder).returncode == 0 else []


def _openmp_library(openmp: list[str], torch: TorchFacts) -> list[str]:
    """Return how to link OpenMP: with the very file that PyTorch brings, so that both share one pool of threads."""
    bundled = sorted(torch.library_dir.glob("libgomp*.so*"))
    return [str(bundled[0])] if openmp and len(bundled) == 1 else openmp


def _write_ninja(
    folder: Path, edges: Sequence[tuple[list[str], Path]], link: list[str], libraries: list[str], output: str
) -> None:
    """Write build.ninja: one object per edge (command, source), and the link."""
    lines, objects = ["ninja_required_version = 1.5"], []
    for number, (command, source) in enumerate(edges):
        made = f"{source.stem}.o"
        objects.append(made)
        lines += [f"rule compile{number}", f"  command = {_ninja_command(command)} -c $in -o $out"]
        lines += [f"build {made}: compile{number} {_ninja_path(source)}"]
    lines += ["rule link", f"  command = {_ninja_command(link)} $in -o $out {_ninja_command(libraries)}"]
    lines += [f"build {output}: link {' '.join(objects)}", f"default {output}", ""]
    (folder / "build.ninja").write_text("\n".join(lines), encoding="utf-8")


def _ninja_command(command: Sequence[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def _ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


# Building -------------------------------------------------------------------------------------------------------------


def build_into(folder: Path, recipe: Recipe) -> Built:
    """Build a library in an empty folder, and record what it is; only library, record and log stay.

    Raises:
        NativeBuildError: with the first error of the compiler; the log is then in ``folder / LOG_NAME``.
    """
    ninja = find_ninja()
    notes = recipe.write(folder)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS", "").isdigit() else []
    done = _run([ninja, "-v", *jobs], folder)
    _append_log(folder, done.stdout)
    library = folder / recipe.file_name
    if done.returncode != 0 or not library.exists():
        raise NativeBuildError(f"the compiler failed: {first_error(done.stdout)}")
    for file in folder.iterdir():
        if file.name not in (LOG_NAME, recipe.file_name):
            file.unlink()
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    record = {"content": recipe.content, "tools": recipe.tools, "file": library.name, "sha256": digest, **notes}
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=1), encoding="utf-8")
    for file in folder.iterdir():
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
    return Built(library=library, record=record)


def find_built(folder: Path, content: dict[str, Any]) -> Built | None:
    """Return the library in a folder if it is the recorded one, byte for byte, and fits; otherwise None.

    Loading a truncated library can kill the process, hence the look at the bytes.
    """
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        library = folder / record["file"]
        whole = hashlib.sha256(library.read_bytes()).hexdigest() == record["sha256"]
        return Built(library=library, record=record) if whole and record["content"] == content else None
    except (OSError, ValueError, KeyError, TypeError):  # absent, or not a record that we wrote
        return None


def cached(recipe: Recipe, root: Path, *, say: Callable[[str], None], rebuild: bool = False) -> Built:
    """Return a library from the cache, building it if it is not there; simultaneous callers build once.

    Args:
        recipe: what to build.
        root: folder of the cache, made if absent.
        say: shown that a build begins.
        rebuild: the one that is there does not load; build another.

    Raises:
        NativeBuildError: the build failed.
        OSError: ``root`` cannot be written.
    """
    entry = root / recipe.key
    if not rebuild and (built := find_built(entry, recipe.content)):
        return built
    asked_s = time.time()
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f".{recipe.key}.lock") as alone:
        built = find_built(entry, recipe.content)
        if built and (not rebuild or built.library.stat().st_mtime > asked_s):
            return built
        failure = root / f"{recipe.key}.log"
        _raise_failure_of_another(failure, asked_s)
        if alone:
            for stale in root.glob(f".{recipe.key}.*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)
        say("building native kernels")
        folder = Path(tempfile.mkdtemp(prefix=f".{recipe.key}.", suffix=".tmp", dir=root))
        try:
            build_into(folder, recipe)
            _publish(folder, entry)
        except NativeBuildError as error:
            _keep_log(folder / LOG_NAME, failure, str(error))
            raise NativeBuildError(f"{error} (log: {failure})") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        failure.unlink(missing_ok=True)
    if built := find_built(entry, recipe.content):
        return built
    raise NativeBuildError(f"{entry}: the library vanished or changed right after it was built")


def _publish(folder: Path, entry: Path) -> None:
    """Move a finished build into place; where the file system knows no locks, another one may have been faster."""
    if entry.exists():
        away = folder.with_name(f"{folder.name}.old.tmp")
        os.rename(entry, away)
        shutil.rmtree(away, ignore_errors=True)
    with contextlib.suppress(FileExistsError, NotADirectoryError):
        os.rename(folder, entry)


def _keep_log(log: Path, kept: Path, reason: str) -> None:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    kept.write_text(f"{reason}\n\n{text}", encoding="utf-8")


def _raise_failure_of_another(failure: Path, asked_s: float) -> None:
    """Where another process failed while this one waited for it, do not fail the same way once more."""
    with contextlib.suppress(FileNotFoundError):
        if failure.stat().st_mtime > asked_s:
            reason = failure.read_text(encoding="utf-8").split("\n", 1)[0]
            raise NativeBuildError(f"{reason} (log: {failure})")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Let one process at a time into the body; yield whether that is certain, which it is not on every file system."""
    with open(path, "ab") as file:
        alone = fcntl is not None
        if alone:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                alone = False
        yield alone


def first_error(output: str) -> str:
    """Return the first line of a compiler's output that says error, or else its first line, shortened."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|not found|cannot find", line, re.IGNORECASE)]
    return _one_line((errors or lines or ["no message"])[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LC_ALL": "C"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _append_log(folder: Path, text: str) -> None:
    with open(folder / LOG_NAME, "a", encoding="utf-8") as file:
        file.write(text)
