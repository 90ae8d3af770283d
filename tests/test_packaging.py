"""The files that set the project up: pyproject.toml, environment.yml and run.sh.

run.sh runs beside a copy of pyproject.toml with a stand-in for Python, a shell script that writes down its calls.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

IMPORT_NAMES = {"pillow": "PIL", "scikit-image": "skimage", "imageio-ffmpeg": "imageio_ffmpeg"}
FAKE_PYTHON = """#!/usr/bin/env bash
# FAKE_TORCH: has torch; FAKE_PROBE: the CPU index answers; FAKE_FAIL: pip fails.
printf '%s|' "$(basename "$(dirname "$(dirname "$0")")")" "$@" >>"$FAKE_LOG"
printf '\\n' >>"$FAKE_LOG"
case "$1 ${2:-}" in
    "-V "*) echo "Python 3.11.7" ;;
    "-c "*torch*) [[ -n ${FAKE_TORCH:-} || -e $FAKE_LOG.torch ]] ;;
    "-c "*) exit 0 ;;
    "- "*) cat >/dev/null; [[ -n ${FAKE_PROBE:-} ]] ;;
    "-m pip")
        [[ "$*" != *install* || -z ${FAKE_FAIL:-} ]] || { echo "pip failed" >&2; exit 3; }
        if [[ "$*" == *torch==* ]]; then touch "$FAKE_LOG.torch"; fi
        ;;
    "-m venv") mkdir -p "${!#}/bin"; cp "$0" "${!#}/bin/python" ;;
    *) pwd >>"$FAKE_LOG"; exit "${FAKE_EXIT:-0}" ;;
esac
"""


@pytest.fixture(scope="module")
def pyproject(repo_root):
    return tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project(pyproject):
    return pyproject["project"]


def test_environment_yml_lists_what_pyproject_requires(repo_root, project):
    text = (repo_root / "environment.yml").read_text(encoding="utf-8")
    listed = [line.split(" #")[0].strip() for line in re.findall(r"^      - (.*)$", text, re.MULTILINE)]
    extras = project["optional-dependencies"]
    assert listed == project["dependencies"] + extras["meshes"] + extras["plots"] + extras["test"]
    assert f"- python{project['requires-python']}\n" in text


def imports(path):
    """Yield the top-level names that a source file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_every_imported_package_is_declared(repo_root, pyproject):
    project = pyproject["project"]
    requirements = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    requirements += pyproject["build-system"]["requires"]  # setup.py imports setuptools
    distributions = [re.match(r"[A-Za-z0-9_-]+", requirement).group() for requirement in requirements]
    known = {IMPORT_NAMES.get(name, name) for name in distributions} | set(sys.stdlib_module_names) | {"tomllib"}
    listed = subprocess.run(["git", "ls-files", "-z", "*.py"], cwd=repo_root, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so that the files of the project cannot be told from others")
    files = [repo_root / name for name in listed.stdout.split("\0") if name and (repo_root / name).exists()]
    known |= {path.stem for path in files} | {path.relative_to(repo_root).parts[0] for path in files}
    undeclared = {(name, path.name) for path in files for name in imports(path) if name not in known}
    assert undeclared == set()


class Sandbox:
    """A copy of run.sh in a folder whose name has a blank, with stand-ins for Python and nvidia-smi."""

    def __init__(self, folder, repo_root):
        self.root, self.bin, self.log = folder / "the project", folder / "bin", folder / "log"
        self.root.mkdir()
        for name in ("run.sh", "pyproject.toml"):
            shutil.copy(repo_root / name, self.root)
        self.program("python3", FAKE_PYTHON)
        self.program("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def program(self, name, text):
        self.bin.mkdir(exist_ok=True)
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def environment(self, name="active"):
        """Make a virtual environment of the stand-in."""
        (self.root.parent / name / "bin").mkdir(parents=True)
        shutil.copy(self.bin / "python3", self.root.parent / name / "bin" / "python")
        return str(self.root.parent / name)

    def run(self, *command, cwd=None, **variables):
        """Run ``./run.sh command``; return the finished process and the calls of Python that it made."""
        self.log.write_text("")
        fixed = {"PATH": f"{self.bin}:/usr/bin:/bin", "FAKE_LOG": str(self.log), "HOME": str(self.root.parent)}
        arguments = [str(self.root / "run.sh"), *command]
        done = subprocess.run(arguments, env=fixed | variables, cwd=cwd or self.root, capture_output=True, text=True)
        return done, [line.rstrip("|") for line in self.log.read_text().splitlines()]


@pytest.fixture
def sandbox(tmp_path, repo_root):
    if shutil.which("bash", path="/usr/bin:/bin") is None:
        pytest.skip("needs bash")
    return Sandbox(tmp_path, repo_root)


def installs(calls):
    return [call.split("--no-input|")[1] for call in calls if "|install|" in call]


def test_run_first_time_makes_an_environment_and_second_time_only_runs(sandbox):
    done, calls = sandbox.run("python", "-m", "site")
    editable = f"--editable|{sandbox.root}[meshes,plots,test]"
    assert done.returncode == 0, done.stderr
    assert installs(calls) == ["torch==2.13.0", editable]
    assert [line[:15] for line in done.stderr.splitlines()] == ["run.sh: setting", "run.sh: ready: "]
    started = time.perf_counter()
    done, calls = sandbox.run("python", "-m", "site")
    assert time.perf_counter() - started < 2  # usually 0.03 s; the bound only has to tell it from a set-up
    assert calls == [".venv|-V", ".venv|-m|site", str(sandbox.root)]
    assert done.stderr == ""


def test_run_changed_pyproject_installs_again_without_starting_over(sandbox):
    sandbox.run("python", "x.py")
    kept = sandbox.root / ".venv" / "kept"
    kept.touch()
    with open(sandbox.root / "pyproject.toml", "a") as file:
        file.write("\n")
    _, calls = sandbox.run("python", "x.py")
    assert installs(calls) == [f"--editable|{sandbox.root}[meshes,plots,test]"]
    assert kept.exists()


def test_run_failed_set_up_starts_over_next_time(sandbox):
    done, calls = sandbox.run("python", "x.py", FAKE_FAIL="1")
    assert done.returncode == 1
    assert "the set-up failed" in done.stderr
    assert "x.py" not in "".join(calls)
    left = sandbox.root / ".venv" / "left-over"
    left.touch()
    done, calls = sandbox.run("python", "x.py")
    assert done.returncode == 0, done.stderr
    assert len(installs(calls)) == 2
    assert not left.exists()


def test_run_failed_update_starts_over_next_time(sandbox):
    sandbox.run("python", "x.py")
    left = sandbox.root / ".venv" / "left-over"
    left.touch()
    with open(sandbox.root / "pyproject.toml", "a") as file:
        file.write("\n")
    assert sandbox.run("python", "x.py", FAKE_FAIL="1")[0].returncode == 1
    assert sandbox.run("python", "x.py")[0].returncode == 0
    assert not left.exists()


def test_run_two_at_once_set_up_once(sandbox):
    if shutil.which("flock", path="/usr/bin:/bin") is None:
        pytest.skip("needs flock")
    slow = FAKE_PYTHON.replace('"-m venv")', '"-m venv") sleep 0.3;')
    sandbox.program("python3", slow)
    sandbox.log.write_text("")
    variables = {"PATH": f"{sandbox.bin}:/usr/bin:/bin", "FAKE_LOG": str(sandbox.log), "HOME": "/"}
    command = [str(sandbox.root / "run.sh"), "python", "x.py"]
    runs = [subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL) for _ in range(3)]
    assert [run.wait(timeout=60) for run in runs] == [0, 0, 0]
    calls = sandbox.log.read_text()
    assert calls.count("|-m|venv|") == 1
    assert calls.count("|--editable|") == 1
    assert calls.count("|x.py|") == 3


@pytest.mark.parametrize(
    ("gpu", "variables", "expected"),
    [
        (False, {}, ["torch==2.13.0"]),
        (False, {"FAKE_PROBE": "1"}, ["torch==2.13.0|--extra-index-url|https://download.pytorch.org/whl/cpu"]),
        (True, {"FAKE_PROBE": "1"}, ["torch==2.13.0"]),
        (False, {"FAKE_TORCH": "1", "FAKE_PROBE": "1"}, []),
    ],
    ids=["cpu-index-unreachable", "cpu", "gpu", "torch-is-there"],
)
def test_run_torch_build_follows_the_machine(sandbox, gpu, variables, expected):
    if gpu:
        sandbox.program("nvidia-smi", "#!/bin/sh\nexit 0\n")
    if not sys.platform.startswith("linux"):
        pytest.skip("other systems have one build")
    _, calls = sandbox.run("python", "x.py", VIRTUAL_ENV=sandbox.environment(), **variables)
    assert installs(calls) == [*expected, f"--editable|{sandbox.root}[meshes,plots,test]"]


@pytest.mark.parametrize(("torch", "flag"), [("", False), ("1", True)])
def test_run_new_environment_sees_the_system_only_for_its_torch(sandbox, torch, flag):
    _, calls = sandbox.run("python", "x.py", FAKE_TORCH=torch)
    (made,) = [call for call in calls if "|-m|venv|" in call]
    assert ("--system-site-packages" in made) is flag


@pytest.mark.parametrize(
    ("variables", "used"),
    [
        ({"VIRTUAL_ENV": "active"}, "active"),
        ({"CONDA_PREFIX": "active", "CONDA_DEFAULT_ENV": "work"}, "active"),
        ({"CONDA_PREFIX": "active", "CONDA_DEFAULT_ENV": "base"}, ".venv"),
        ({"VIRTUAL_ENV": "gone"}, ".venv"),
    ],
)
def test_run_active_environment_is_used(sandbox, variables, used):
    active = sandbox.environment()
    variables = {name: active if value == "active" else value for name, value in variables.items()}
    _, calls = sandbox.run("python", "x.py", **variables)
    assert calls[-2] == f"{used}|x.py"
    assert (sandbox.root / ".venv").exists() is (used == ".venv")


def test_run_own_venv_of_the_user_is_never_emptied(sandbox):
    shutil.move(sandbox.environment(), sandbox.root / ".venv")
    kept = sandbox.root / ".venv" / "kept"
    kept.touch()
    sandbox.run("python", "x.py", FAKE_FAIL="1")
    done, calls = sandbox.run("python", "x.py")
    assert done.returncode == 0
    assert kept.exists()
    (sandbox.root / ".venv" / "bin" / "python").unlink()
    done, _ = sandbox.run("python", "x.py")
    assert "came something that run.sh did not make" in done.stderr
    assert kept.exists()


def test_run_no_usable_python_is_one_error(sandbox):
    sandbox.program("python3", "#!/bin/sh\nexit 1\n")
    done, _ = sandbox.run("python", "x.py", PYTHON="python3")
    assert done.returncode == 1
    assert "PYTHON=python3: expected Python 3.10 or newer" in done.stderr


def test_run_exit_code_and_odd_arguments_pass_through(sandbox):
    done, calls = sandbox.run("python", "x.py", "a b", "", "*", FAKE_EXIT="7", VIRTUAL_ENV=sandbox.environment())
    assert done.returncode == 7
    assert calls[-2] == "active|x.py|a b||*"


def test_run_elsewhere_scripts_come_from_the_project_and_paths_stay(sandbox, tmp_path):
    (sandbox.root / "gen_samples.py").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.py").touch()
    options = {"cwd": tmp_path / "elsewhere", "VIRTUAL_ENV": sandbox.environment()}
    _, calls = sandbox.run("python", "gen_samples.py", "--outdir", "out", **options)
    assert calls[-2:] == [f"active|{sandbox.root}/gen_samples.py|--outdir|out", str(tmp_path / "elsewhere")]
    _, calls = sandbox.run("python", "mine.py", **options)
    assert calls[-2] == "active|mine.py"


def test_run_pytest_elsewhere_runs_in_the_project(sandbox, tmp_path):
    (tmp_path / "test_mine.py").touch()
    _, calls = sandbox.run(
        *("pytest", "-x", "tests/a.py", "test_mine.py::test_x"), cwd=tmp_path, VIRTUAL_ENV=sandbox.environment()
    )
    expected = f"active|-m|pytest|-x|tests/a.py|{tmp_path}/test_mine.py::test_x"
    assert calls[-2:] == [expected, str(sandbox.root)]


def test_run_nothing_asked_is_an_error(sandbox):
    done, calls = sandbox.run()
    assert done.returncode == 1
    assert "expected a command" in done.stderr
    assert calls == []


@pytest.mark.parametrize("name", ["run.sh", "gen_pti_script.sh", ".ci/run"])
def test_shell_scripts_are_executable_and_shellcheck_clean(repo_root, name):
    assert os.access(repo_root / name, os.X_OK)
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if checker is None:
        pytest.skip("needs shellcheck, which is not installed")
    subprocess.run([checker, repo_root / name], check=True)
