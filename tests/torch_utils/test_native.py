"""Building, caching and loading native kernels, with sources of a few lines; one test builds the real ones.

Most tests build in this process. Those of simultaneous and killed builds start processes that do not import PyTorch.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from torch_utils import native, native_build, native_cli, native_recipes
from torch_utils.native_recipes import NativeBuildError, Sources, TorchFacts, cpu_recipe

REPO_ROOT = Path(__file__).resolve().parents[2]
SHARED = "int shared_answer() { return 40; }\n"
KERNEL = """
#include "answer.h"
#include "export.h"
int shared_answer();
SPHEREHEAD_EXPORT(int, answer)() { return shared_answer() + ANSWER; }
SPHEREHEAD_EXPORT(int, longer_answer)() { return 1; }
"""
NO_TORCH = TorchFacts(version="0", include_dir=Path("/none"), library_dir=Path("/none"))
BUILD_SCRIPT = """
import sys
from pathlib import Path
from torch_utils.native_build import cached
from torch_utils.native_recipes import Sources, TorchFacts, cpu_recipe
assert "torch" not in sys.modules
facts = TorchFacts(version="0", include_dir=Path("/none"), library_dir=Path("/none"))
print(cached(cpu_recipe(Sources.of(Path(sys.argv[1])), "baseline", facts), Path(sys.argv[2])).library)
"""

has_compiler = bool(shutil.which("g++") or shutil.which("c++") or shutil.which("clang++"))
needs_compiler = pytest.mark.skipif(not has_compiler, reason="needs a C++ compiler; none of g++, c++, clang++ is there")


class Project:
    """Small sources, a cache and a compiler that counts, in folders whose names a shell would take apart."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "it's $HOME: a & b"
        self.csrc, self.cache, self.ahead = (self.folder / name for name in ("csrc", "cache", "lib"))
        self.csrc.mkdir(parents=True)
        self.monkeypatch = monkeypatch
        self.write("answer.h", "#define ANSWER 2\n")
        self.write("unused.h", "")
        self.write("shared.cpp", SHARED)
        self.write("answer_cpu.cpp", KERNEL)
        shutil.copy(native.SOURCE_DIR / "export.h", self.csrc)
        monkeypatch.setattr(native, "SOURCE_DIR", self.csrc)
        monkeypatch.setattr(native, "AHEAD_DIR", self.ahead)
        monkeypatch.setattr(native_cli, "SOURCE_DIR", self.csrc)
        for name in ("SPHEREHEAD_NATIVE", "SPHEREHEAD_ISA", "CXX", "LOCAL_RANK", "MAX_JOBS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("SPHEREHEAD_CACHE_DIR", str(self.cache))
        # Trying OpenMP takes longer than all of these sources.
        monkeypatch.setattr(native_recipes, "_openmp_flags", lambda compiler, torch, folder: ([], []))
        self.forget()

    def write(self, name: str, text: str) -> None:
        (self.csrc / name).write_text(text)

    def forget(self) -> None:
        """Let the next load() be the first one."""
        self.monkeypatch.setattr(native, "_state", native._State())

    def compiler(self, script: str) -> str:
        """Make a compiler that runs some lines of shell first, and $CXX name it; return its path."""
        path = self.folder.parent / "compiler"
        real = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
        path.write_text(f'#!/bin/sh\n{script}\nexec {real} "$@"\n')
        path.chmod(0o755)
        self.monkeypatch.setenv("CXX", str(path))
        return str(path)

    def count_compilations(self, script: str = ":") -> Path:
        """Make a compiler that writes a line per object file; return the file of lines."""
        log = self.folder.parent / "compilations"
        log.touch()
        self.compiler(f'case "$*" in *" -c /"*) echo "$*" >>{log}; {script} ;; esac')
        return log

    def sources(self) -> Sources:
        return Sources.of(self.csrc)

    def recipe(self) -> native_recipes.Recipe:
        return cpu_recipe(self.sources(), "baseline", NO_TORCH)

    def start(self) -> subprocess.Popen:
        """Start a process that builds."""
        command = [sys.executable, "-c", BUILD_SCRIPT, str(self.csrc), str(self.cache)]
        return subprocess.Popen(
            command, cwd=REPO_ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True, env=dict(os.environ)
        )


@pytest.fixture
def project(tmp_path, monkeypatch):
    return Project(tmp_path, monkeypatch)


def answer(library):
    return library.cpu("answer")()


def leftovers(root):
    return [path.name for path in root.rglob("*.tmp")]


# Loading --------------------------------------------------------------------------------------------------------------


@needs_compiler
def test_load_first_time_builds_and_second_time_takes_the_cache(project, capsys):
    log = project.count_compilations()
    first = native.load()
    assert answer(first) == 42
    assert native.reason() == ""
    assert native.load() is first
    assert first.built.library.is_relative_to(project.cache / "native")
    assert capsys.readouterr().err.count("building native kernels") == 1
    project.forget()
    assert answer(native.load()) == 42
    assert len(log.read_text().splitlines()) == 2
    assert capsys.readouterr().err == ""
    assert not leftovers(project.cache)


@needs_compiler
def test_load_kernels_are_the_same_object_every_time_and_none_where_absent(project):
    library = native.load()
    assert library.cpu("answer") is library.cpu("answer")
    assert library.cpu("answer").restype is ctypes.c_int
    assert library.cpu("nothing") is None
    assert library.cpu_kernels() == ("answer", "longer_answer")  # one name ends the other


@needs_compiler
def test_load_from_many_threads_builds_once(project):
    log = project.count_compilations()
    found = []
    threads = [threading.Thread(target=lambda: found.append(native.load())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [native.load()] * 4
    assert len(log.read_text().splitlines()) == 2


@needs_compiler
def test_load_disabled_gives_none_only_inside(project):
    library = native.load()
    with native.disabled(), native.disabled():
        assert native.load() is None
        assert native.reason() == "switched off by native.disabled()"
    assert native.load() is library


@needs_compiler
@pytest.mark.parametrize("isa", native_recipes.instruction_sets())
def test_load_forced_instruction_set_has_its_own_library(project, isa, monkeypatch):
    monkeypatch.setenv("SPHEREHEAD_ISA", isa)
    project.write("isa_cpu.cpp", f'#include "export.h"\nSPHEREHEAD_EXPORT(int, isa)() {{ return {len(isa)}; }}\n')
    library = native.load()
    assert library.isa == isa
    assert library.built.library.name == f"spherehead_{isa}.so"
    assert library.cpu("isa")() == len(isa)  # constants only, so that it runs on every machine


def test_load_unknown_instruction_set_is_an_error(project, monkeypatch):
    monkeypatch.setenv("SPHEREHEAD_ISA", "mmx")
    with pytest.raises(ValueError, match="SPHEREHEAD_ISA: expected one of baseline.* came 'mmx'"):
        native.load()


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("AVX512", "avx512"), ("AVX2", "avx2"), ("DEFAULT", "baseline"), ("NO AVX", "baseline"), ("SVE256", "baseline")],
)
def test_instruction_set_follows_pytorch(monkeypatch, capability, expected):
    monkeypatch.delenv("SPHEREHEAD_ISA", raising=False)
    monkeypatch.setattr(native_recipes.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(native.torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert native.instruction_set() == expected
    monkeypatch.setattr(native_recipes.platform, "machine", lambda: "aarch64")
    assert native.instruction_set() == "baseline"


# Falling back ---------------------------------------------------------------------------------------------------------


def test_load_switched_off_gives_none_with_one_line(project, monkeypatch, capsys):
    monkeypatch.setenv("SPHEREHEAD_NATIVE", "0")
    assert native.load() is None
    assert native.load() is None
    assert native.reason() == "SPHEREHEAD_NATIVE=0"
    expected = "no native kernels, using the slower reference in PyTorch: SPHEREHEAD_NATIVE=0\n"
    assert capsys.readouterr().err == expected
    assert not project.cache.exists()


@pytest.mark.parametrize("value", ["2", "yes", "AUTO"])
def test_load_bad_mode_is_an_error(project, monkeypatch, value):
    monkeypatch.setenv("SPHEREHEAD_NATIVE", value)
    with pytest.raises(ValueError, match=f"SPHEREHEAD_NATIVE: expected auto, 0 or 1, came '{value}'"):
        native.load()


BROKEN_PARTS = {
    "no-compiler-on-path": "no C++ compiler found (looked for $CXX, g++, c++, clang++)",
    "no-such-compiler": "no C++ compiler found (CXX=/none/g++ -m64: no such program)",
    "odd-quotes": 'CXX=g++ "-m64: No closing quotation',
    "compiler-does-not-start": "--version failed (exit status 3)",
    "compiler-is-no-compiler": "cannot compile C++20: this is not a compiler (log: ",
    "ninja-missing": "ninja is missing (pip install ninja)",
    "sources-missing": "no sources of kernels",
}


def break_part(project, part, monkeypatch):
    if part == "no-compiler-on-path":
        monkeypatch.setenv("PATH", str(project.folder))
    elif part == "no-such-compiler":
        monkeypatch.setenv("CXX", "/none/g++ -m64")
    elif part == "odd-quotes":
        monkeypatch.setenv("CXX", 'g++ "-m64')
    elif part == "compiler-does-not-start":
        project.compiler("exit 3")
    elif part == "compiler-is-no-compiler":
        project.compiler('test "$1" = --version && echo fake 1.0 && exit 0; echo "this is not a compiler" >&2; exit 1')
    elif part == "ninja-missing":
        project.compiler('test "$1" = --version && echo fake 1.0 && exit 0')
        monkeypatch.setenv("PATH", "/none")
        monkeypatch.setitem(sys.modules, "ninja", None)
    elif part == "sources-missing":
        (project.csrc / "answer_cpu.cpp").unlink()


@pytest.mark.parametrize("part", BROKEN_PARTS)
def test_load_without_a_part_falls_back_with_one_line_or_raises(project, monkeypatch, capsys, part):
    break_part(project, part, monkeypatch)
    assert native.load() is None
    assert native.load() is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("no native kernels, using the slower reference in PyTorch: ")
    assert BROKEN_PARTS[part] in lines[0]
    assert native.reason() in lines[0]
    assert not leftovers(project.cache)
    project.forget()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert native.load() is None
    assert capsys.readouterr().err == ""  # the process of rank 0 says it
    project.forget()
    monkeypatch.setenv("SPHEREHEAD_NATIVE", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="^SPHEREHEAD_NATIVE=1, but there are no native kernels: ") as raised:
            native.load()
        assert BROKEN_PARTS[part] in str(raised.value)


@needs_compiler
def test_load_source_with_an_error_names_it_and_the_log_and_heals(project, capsys):
    project.write("answer_cpu.cpp", KERNEL.replace("ANSWER", "NO_ANSWER"))
    assert native.load() is None
    assert "NO_ANSWER" in native.reason()
    assert "error:" in native.reason()
    log = Path(native.reason().partition("(log: ")[2].rstrip(")"))
    assert "was not declared" in log.read_text() or "undeclared" in log.read_text()
    assert "-c " in log.read_text()
    assert not leftovers(project.cache)
    project.write("answer_cpu.cpp", KERNEL)
    project.forget()
    assert answer(native.load()) == 42


@needs_compiler
def test_load_compiler_with_arguments_is_called_with_them(project, monkeypatch):
    path = project.compiler('echo "$*" >>"$0.calls"')
    monkeypatch.setenv("CXX", f"{path} -DANSWERS='40 2'")
    assert answer(native.load()) == 42
    assert "-DANSWERS=40 2 -O3" in Path(f"{path}.calls").read_text()


@needs_compiler
@pytest.mark.parametrize("lacks", ["*-fopenmp*", "*openmp.cpp*", "*openmp.so*"], ids=["option", "header", "library"])
def test_openmp_is_not_used_where_a_part_is_missing(tmp_path, monkeypatch, lacks):
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in {lacks}) exit 1 ;; esac\nexit 0\n')
    compiler.chmod(0o755)
    assert native_recipes._openmp_flags([str(compiler)], NO_TORCH, tmp_path) == ([], [])


@needs_compiler
def test_openmp_library_of_another_compiler_is_not_linked(tmp_path):
    compiler = native_recipes.find_compiler()
    facts = TorchFacts(version="0", include_dir=tmp_path, library_dir=tmp_path / "lib")
    facts.library_dir.mkdir()
    if native_recipes._openmp_flags(compiler, facts, tmp_path) != (["-fopenmp"], ["-fopenmp"]):
        pytest.skip("needs a compiler with OpenMP")
    bundled = facts.library_dir / "libgomp-0123.so.1"
    (tmp_path / "empty.cpp").touch()
    subprocess.run([*compiler, "-shared", tmp_path / "empty.cpp", "-o", bundled], check=True)
    assert native_recipes._openmp_flags(compiler, facts, tmp_path) == (["-fopenmp"], ["-fopenmp"])
    found = native_recipes._openmp_flags(compiler, TorchFacts.installed(), tmp_path)
    assert found[0] == ["-fopenmp"]


@needs_compiler
def test_load_cache_not_writable_uses_a_private_temporary_folder(project, monkeypatch, tmp_path):
    project.cache.write_text("a file where the folder should be")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path / "tmp"))
    assert answer(native.load()) == 42
    private = tmp_path / "tmp" / f"spherehead-{os.getuid()}"
    assert native.load().built.library.is_relative_to(private)
    assert private.stat().st_mode & 0o077 == 0
    private.chmod(0o777)  # anybody could put a library there
    project.forget()
    assert native.load() is None
    assert "the cache cannot be written" in native.reason()
    assert "expected a folder that only this user can write" in native.reason()


# The cache ------------------------------------------------------------------------------------------------------------


@needs_compiler
def test_cached_changed_source_compiles_only_what_it_reaches(project):
    log = project.count_compilations()

    def compiled():
        log.write_text("")
        library = native_build.cached(project.recipe(), project.cache).library
        return library, sorted(Path(line.split()[-1]).name.split("-")[0] for line in log.read_text().splitlines())

    first, names = compiled()
    assert names == ["answer_cpu", "shared"]
    assert compiled() == (first, [])
    project.write("answer.h", "#define ANSWER 3\n")
    second, names = compiled()
    assert names == ["answer_cpu"]
    assert second != first
    project.write("unused.h", "// changed\n")
    third, names = compiled()
    assert names == []
    assert third not in (first, second)
    assert ctypes.CDLL(str(third)).answer__baseline() == 43


def test_key_tells_builds_apart(project, monkeypatch, tmp_path):
    project.compiler('test "$1" = --version && echo fake 1.0 && exit 0')
    sources = project.sources()
    keys = {cpu_recipe(sources, isa, NO_TORCH).key for isa in native_recipes.ISA_FLAGS}
    keys.add(cpu_recipe(sources, "baseline", TorchFacts(version="1", include_dir=tmp_path, library_dir=tmp_path)).key)
    monkeypatch.setattr(native_recipes.sysconfig, "get_platform", lambda: "other")
    keys.add(project.recipe().key)
    monkeypatch.setattr(native_recipes.platform, "libc_ver", lambda: ("glibc", "1"))
    keys.add(project.recipe().key)
    project.compiler('test "$1" = --version && echo fake 1.1 && exit 0')
    keys.add(project.recipe().key)
    project.write("answer.h", "#define ANSWER 3\n")
    keys.add(project.recipe().key)
    assert len(keys) == 8
    project.write("answer_cuda.cu", "")
    project.write("answer.cuh", "")
    assert project.recipe().key in keys  # the CPU kernels are the same


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "no-record", "not-a-record", "not-loadable"])
def test_load_damaged_library_is_built_once_more(project, damage):
    built = native.load().built
    record = built.library.parent / native_build.RECORD_NAME
    content = built.library.read_bytes()
    built.library.unlink()  # this process has it mapped
    if damage == "no-record":
        record.unlink()
    elif damage == "not-a-record":
        record.write_text("[]")
    elif damage == "not-loadable":  # but recorded so
        content = b"not a library"
        digest = native_build.hashlib.sha256(content).hexdigest()
        record.write_text(json.dumps(built.record | {"sha256": digest}))
    built.library.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    project.forget()
    assert answer(native.load()) == 42
    assert native.load().built.library == built.library
    assert native_build.find_built(built.library.parent, built.record["content"]) is not None
    assert not leftovers(project.cache)


@needs_compiler
def test_load_library_that_never_loads_is_a_reason(project):
    project.write("shared.cpp", "int not_the_answer() { return 0; }\n")  # leaves a symbol without a definition
    project.write(
        "answer_cpu.cpp", KERNEL.replace("() + ANSWER", "() + ANSWER;}\nextern int a; int* b = &a; int f() {return 1")
    )
    assert native.load() is None
    assert "undefined symbol" in native.reason() or "not found" in native.reason()


@needs_compiler
def test_cached_two_processes_build_once(project):
    log = project.count_compilations()
    processes = [project.start() for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    assert len(log.read_text().splitlines()) == 2
    assert not leftovers(project.cache)


@needs_compiler
def test_cached_killed_build_heals(project, tmp_path):
    slow = tmp_path / "slow"
    slow.touch()
    project.compiler(f'case "$*" in *" -c /"*) while [ -e {slow} ]; do sleep 0.05; done ;; esac')
    process = project.start()
    deadline_s = time.monotonic() + 60
    while not list(project.cache.glob(".*.tmp/build.ninja")):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert leftovers(project.cache)
    slow.unlink()
    built = native_build.cached(project.recipe(), project.cache)
    assert ctypes.CDLL(str(built.library)).answer__baseline() == 42
    assert not leftovers(project.cache)


@needs_compiler
def test_cached_failure_of_the_process_waited_for_is_not_repeated(project):
    log = project.count_compilations("sleep 0.2")  # so that the second one comes before the first one fails
    project.write("answer_cpu.cpp", "#error broken\n")
    recipe, said, failures = project.recipe(), [], []

    def build():
        with pytest.raises(NativeBuildError, match="broken.*log: ") as raised:
            native_build.cached(recipe, project.cache, say=said.append)
        failures.append(str(raised.value))

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 2
    assert failures[0] == failures[1]
    assert sum("answer_cpu" in line for line in log.read_text().splitlines()) == 1
    build()  # a later start tries again
    assert sum("answer_cpu" in line for line in log.read_text().splitlines()) == 2


@needs_compiler
def test_cached_source_changed_while_compiled_is_not_kept(project):
    project.compiler(f"case \"$*\" in *' -c /'*answer_cpu*) echo '// new' >>\"{project.folder.parent}/link\" ;; esac")
    (project.folder.parent / "link").symlink_to(project.csrc / "answer_cpu.cpp")
    with pytest.raises(NativeBuildError, match="a source was changed while it was compiled"):
        native_build.cached(project.recipe(), project.cache)
    assert [file.name.split("-")[0] for file in (project.cache / "objects").iterdir()] == ["shared"]


@needs_compiler
def test_cached_what_was_not_used_for_long_is_removed(project):
    old = native_build.cached(project.recipe(), project.cache).library
    month_ago_s = time.time() - 30 * 86400
    for file in project.cache.glob("*/*"):
        os.utime(file, (month_ago_s, month_ago_s))
    project.write("answer.h", "#define ANSWER 3\n")
    native_build.cached(project.recipe(), project.cache)
    assert old.exists()
    os.utime(old, (0, 0))
    project.write("answer.h", "#define ANSWER 4\n")
    kept = native_build.cached(project.recipe(), project.cache).library
    assert not old.parent.exists()
    assert kept.exists()


# Ahead of time --------------------------------------------------------------------------------------------------------


@needs_compiler
def test_build_all_makes_libraries_that_load_prefers_while_they_fit(project, capsys, monkeypatch):
    libraries = native_cli.build_all(project.ahead)
    assert [library.name for library in libraries] == [
        f"spherehead_{isa}.so" for isa in native_recipes.instruction_sets()
    ]
    assert sorted(path.name for path in project.ahead.iterdir()) == sorted(native_recipes.instruction_sets())
    monkeypatch.setenv("PATH", "/none")  # a machine without a compiler
    capsys.readouterr()
    assert answer(native.load()) == 42
    assert native.status().ahead_of_time
    assert capsys.readouterr().err == ""
    assert not project.cache.exists()
    project.write("answer.h", "#define ANSWER 3\n")
    project.forget()
    assert native.load() is None


@needs_compiler
def test_build_all_failure_leaves_what_was_there(project):
    before = native_cli.build_all(project.ahead)
    project.write("answer_cpu.cpp", "#error broken\n")
    with pytest.raises(NativeBuildError, match="broken"):
        native_cli.build_all(project.ahead)
    assert all(library.exists() for library in before)
    assert not leftovers(project.folder)


# The command ----------------------------------------------------------------------------------------------------------


@needs_compiler
def test_main_prints_the_state(project, capsys):
    assert native_cli.main([]) == 0
    rows = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["native kernels"].strip() == "yes"
    assert rows["CPU kernels"].strip() == "answer, longer_answer"
    assert rows["instruction set"].strip() == native.instruction_set()
    assert Path(rows["library"].strip()).exists()
    assert rows["cache"].strip() == str(project.cache / "native")
    assert {"compiler", "flags", "PyTorch", "CUDA library", "CUDA kernels", "SPHEREHEAD_NATIVE"} <= set(rows)


@pytest.mark.parametrize(("mode", "expected"), [("0", 0), ("auto", 1), ("1", 1), ("2", 1)])
def test_main_exit_status_without_compiler(project, monkeypatch, capsys, mode, expected):
    monkeypatch.setenv("SPHEREHEAD_NATIVE", mode)
    monkeypatch.setenv("PATH", "/none")
    assert native_cli.main([]) == expected
    printed = capsys.readouterr()
    assert ("SPHEREHEAD_NATIVE" if mode in "02" else "no C++ compiler found") in printed.out + printed.err


def test_main_ahead_without_compiler_fails(project, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/none")
    assert native_cli.main(["ahead", "--folder", str(project.ahead)]) == 1
    assert "no C++ compiler found" in capsys.readouterr().err
    assert not project.ahead.exists()


def test_module_runs_as_a_command(tmp_path):
    environment = dict(os.environ) | {"SPHEREHEAD_NATIVE": "0", "SPHEREHEAD_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "torch_utils.native"]
    done = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("native kernels:    no: SPHEREHEAD_NATIVE=0\n")
    assert len(done.stderr.splitlines()) == 1


# CUDA -----------------------------------------------------------------------------------------------------------------


FAKE_NVCC = """#!/bin/sh
# Compiles .cu files as C++, and leaves out what only nvcc knows.
case "$1" in
    --version) echo "nvcc: NVIDIA (R) Cuda compiler driver"; exit 0 ;;
    --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n'; exit 0 ;;
esac
for argument; do
    shift
    case "$argument" in
        -gencode=*) echo "$argument" >>"$0.code" ;;
        -Xcompiler | --threads=*) ;;
        *.cu) set -- "$@" -x c++ "$argument" ;;
        *) set -- "$@" "$argument" ;;
    esac
done
exec g++ "$@"
"""
LAUNCHER = 'extern "C" int launch_answer(void* stream) { return stream ? 1 : 42; }\n'


@pytest.fixture
def nvcc(project, monkeypatch):
    """Return a stand-in for nvcc; PyTorch seems to see a GPU of compute capability 8.6."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    home = project.folder / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(FAKE_NVCC)
    (home / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(native, "_cuda_devices", lambda: ["86"])
    project.write("answer_cuda.cu", LAUNCHER)
    return home / "bin" / "nvcc"


def test_cuda_kernels_are_built_at_the_first_use(project, nvcc, capsys):
    library = native.load()
    assert not Path(f"{nvcc}.code").exists()
    assert library.cuda("launch_answer")(None) == 42
    assert library.cuda("launch_answer") is library.cuda("launch_answer")
    assert library.cuda("nothing") is None
    assert library.cuda_reason() == ""
    assert library.cuda_kernels() == ("launch_answer",)
    assert Path(f"{nvcc}.code").read_text() == "-gencode=arch=compute_80,code=compute_80\n"  # 86 is not in its list
    assert "building native kernels (cuda, " in capsys.readouterr().err


def test_cuda_failure_leaves_the_cpu_kernels(project, nvcc, capsys, monkeypatch):
    project.write("answer_cuda.cu", "#error no such GPU\n")
    assert answer(native.load()) == 42
    capsys.readouterr()
    assert native.load().cuda("launch_answer") is None
    assert native.load().cuda("launch_answer") is None
    assert "no such GPU" in native.load().cuda_reason()
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("no CUDA kernels, using the slower reference")] == lines[1:]
    assert native.reason() == ""
    monkeypatch.setenv("SPHEREHEAD_NATIVE", "1")
    project.forget()
    with pytest.raises(RuntimeError, match="SPHEREHEAD_NATIVE=1, but there are no CUDA kernels: .*no such GPU"):
        native.load().cuda("launch_answer")


def test_cuda_without_nvcc_or_without_gpu_is_a_reason(project, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(
        native_recipes.shutil, "which", lambda name, path=None: None if name == "nvcc" else f"/bin/{name}"
    )
    with pytest.raises(NativeBuildError, match="nvcc not found"):
        native_recipes.find_nvcc()
    monkeypatch.undo()
    monkeypatch.setattr(native, "_cuda_devices", list)
    library = native.NativeLibrary("baseline", None, None)
    assert library.cuda("launch_answer") is None
    assert library.cuda_reason() == "PyTorch sees no CUDA device"


@pytest.mark.parametrize(
    ("devices", "fits"), [(["86"], True), (["80"], True), (["75"], False), (["80", "90"], True), (["100"], False)]
)
def test_cuda_library_built_ahead_fits_devices_it_has_code_for(devices, fits):
    record = {"tools": {"architectures": ["80", "90"]}}
    assert native._runs_on(devices, native_build.Built(library=Path("x"), record=record, stamp=(0, 0))) is fits


def test_build_all_with_cuda_follows_the_list_of_architectures(project, nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;8.0 9.0+PTX")
    libraries = native_cli.build_all(project.ahead, cuda=True)
    assert libraries[-1].name == "spherehead_cuda.so"
    code = Path(f"{nvcc}.code").read_text().splitlines()
    assert code == [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90)]  # it knows no 70
    assert native.load().cuda("launch_answer")(None) == 42
    assert native.load().cuda_library() == libraries[-1]


# The real thing -------------------------------------------------------------------------------------------------------


@needs_compiler
def test_load_builds_the_kernels_of_this_project(monkeypatch):
    for name in ("SPHEREHEAD_NATIVE", "SPHEREHEAD_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(native, "_state", native._State())
    library = native.load()
    assert native.reason() == ""
    sources = "\n".join(file.read_text() for file in Sources.of(native.SOURCE_DIR).cpu)
    assert len(library.cpu_kernels()) >= sources.count("SPHEREHEAD_EXPORT(") > 0


@pytest.mark.slow
def test_cuda_sources_of_this_project_compile_without_a_gpu(tmp_path):
    try:
        native_recipes.find_nvcc()
    except NativeBuildError as error:
        pytest.skip(str(error))
    sources = Sources.of(native.SOURCE_DIR)
    if not sources.cuda:
        pytest.skip("there are no CUDA kernels")
    recipe = native_recipes.cuda_recipe(sources, ["80"], NO_TORCH)
    ctypes.CDLL(str(native_build.cached(recipe, tmp_path).library))  # needs no driver


@pytest.mark.slow
@needs_compiler
def test_wheel_with_native_kernels_needs_no_compiler(tmp_path, repo_root):
    """Build a wheel of a copy with small kernels, unpack it, and load the kernels with an empty PATH."""
    copy, wheels, site = (tmp_path / name for name in ("the copy", "wheels", "site"))
    ignored = shutil.ignore_patterns(".git", "lib", "build", "*.egg-info", "tests", "*_cpu.cpp", "*_cuda.cu")
    shutil.copytree(repo_root, copy, ignore=ignored)
    (copy / "torch_utils/ops/csrc/answer_cpu.cpp").write_text(
        '#include "export.h"\nSPHEREHEAD_EXPORT(int, answer)() { return 42; }\n'
    )
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), "."]
    environment = dict(os.environ) | {"SPHEREHEAD_BUILD_NATIVE": "1", "SPHEREHEAD_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run(pip, cwd=copy, env=environment, check=True)
    (wheel,) = wheels.iterdir()
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    shutil.unpack_archive(wheel, site, "zip")
    script = "from torch_utils import native; print(native.__file__, native.load().cpu('answer')())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"PYTHONPATH": str(site), "PATH": "/none", "SPHEREHEAD_NATIVE": "1"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-1] == "42"
    assert str(site) in done.stdout
    assert done.stderr == ""
