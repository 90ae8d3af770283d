"""Build native libraries with ninja, once, into a cache that survives crashes, torn files and simultaneous starts.

A cache entry is a folder that appears by a rename when it is complete: the library, a record with its SHA-256, and the
log. Simultaneous builds of one entry wait for each other; correctness does not rest on the lock. Object files are kept
too, by what goes into them, so that after a change to one kernel only that one is compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch_utils.native_recipes import LOG_NAME, Edge, NativeBuildError, Plan, Recipe, first_error, run_logged

try:
    import fcntl
except ImportError:  # no advisory locks on Windows, where nothing is built anyway
    fcntl = None

Say = Callable[[str], None]
RECORD_NAME = "build.json"
UNUSED_DAYS = 60
SECONDS_PER_KB = 0.5  # of kernel source, on one core of 2023


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """A library on disk, as recorded."""

    library: Path
    record: dict[str, Any]
    stamp: tuple[int, int]
    """Tells it from one that replaces it under the same name."""


def find_built(folder: Path, content: dict[str, Any]) -> Built | None:
    """Return the library in a folder if it is the recorded one, byte for byte, and fits; otherwise None.

    Loading a truncated library can kill the process, hence the look at every byte.

    Args:
        folder: a cache entry, or where a library was put ahead of time.
        content: what the library has to fit; see ``native_recipes.content_of``.
    """
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        library = folder / record["file"]
        fits = record["content"] == content and _sha256(library) == record["sha256"]
        stamp = _stamp(folder / RECORD_NAME)
    except (OSError, ValueError, KeyError, TypeError):  # absent, or not a record that we wrote
        return None
    if not fits or stamp is None:
        return None
    _touch(library)
    return Built(library=library, record=record, stamp=stamp)


def cached(recipe: Recipe, root: Path, *, say: Say = lambda text: None, broken: Built | None = None) -> Built:
    """Return a library from the cache, after building it if it is not there; simultaneous callers build once.

    Args:
        recipe: how it is built.
        root: folder of the cache, made if absent.
        say: shown one line where this takes long.
        broken: what an earlier call returned and does not load; another one is built, unless somebody else has.

    Raises:
        NativeBuildError: the build failed; the message names the log.
        OSError: ``root`` cannot be written, and what is asked for is not there.
    """
    entry, failure = root / recipe.key, root / f"{recipe.key}.log"

    def found() -> Built | None:
        built = find_built(entry, recipe.content)
        return built if built and (broken is None or built.stamp != broken.stamp) else None

    if built := found():
        return built
    root.mkdir(parents=True, exist_ok=True)
    failed_before = _stamp(failure)
    with _locked(root / f".{recipe.key}.lock", say) as alone:
        if built := found():  # by another process meanwhile
            return built
        if _stamp(failure) not in (None, failed_before):  # the same would happen again
            raise NativeBuildError(f"{failure.read_text(encoding='utf-8').splitlines()[0]} (log: {failure})")
        if alone:
            for left in root.glob(f".{recipe.key}.*.tmp"):  # by a build that was killed
                shutil.rmtree(left, ignore_errors=True)
        _build_entry(recipe, entry, failure, root / "objects", say)
    _remove_unused(root)
    if built := found():
        return built
    raise NativeBuildError(f"{entry}: the library changed right after it was built")


def build_ahead(recipes: Sequence[Recipe], folder: Path, *, say: Say = lambda text: None) -> list[Path]:
    """Build libraries into ``folder / kind``; what was in the folder is replaced once all of them are built.

    Args:
        recipes: how they are built.
        folder: where to.
        say: shown one line per library.

    Returns:
        The libraries.

    Raises:
        NativeBuildError: a build failed; the folder is as it was. The log is beside it.
        OSError: the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    failure = folder.with_name(f"{folder.name}.log")
    try:
        for recipe in recipes:
            _build_entry(recipe, temp / recipe.kind, failure, temp, say)
        for file in temp.glob("*.o"):
            file.unlink()
        temp.chmod(0o755)
        _publish(temp, folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return [folder / recipe.kind / recipe.file_name for recipe in recipes]


# One build ------------------------------------------------------------------------------------------------------------


def find_ninja() -> str:
    """Return the path of ninja: of the Python package, or else on PATH.

    Raises:
        NativeBuildError: there is none.
    """
    with contextlib.suppress(ImportError):
        import ninja

        if os.access(found := Path(ninja.BIN_DIR) / "ninja", os.X_OK):
            return str(found)
    if found := shutil.which("ninja"):
        return found
    raise NativeBuildError("ninja is missing (pip install ninja)")


def _build_entry(recipe: Recipe, entry: Path, failure: Path, objects: Path, say: Say) -> None:
    """Build in a folder beside the entry and move it into place; where that fails, keep the log as ``failure``."""
    temp = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", suffix=".tmp", dir=entry.parent))
    try:
        _build(recipe, temp, objects, say)
        temp.chmod(0o755)  # mkdtemp's is 0700; a cache may be shared
        _publish(temp, entry)
    except NativeBuildError as error:
        log = temp / LOG_NAME
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        failure.write_text(f"{error}\n\n{text}", encoding="utf-8")
        raise NativeBuildError(f"{error} (log: {failure})") from None
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    failure.unlink(missing_ok=True)


def _build(recipe: Recipe, folder: Path, objects: Path, say: Say) -> None:
    """Build a library in an empty folder; the library, its record and the log stay there."""
    ninja = find_ninja()
    plan = recipe.plan(folder)
    objects.mkdir(exist_ok=True)
    made = [objects / _object_name(edge, recipe) for edge in plan.edges]
    reused = [file for file in made if _touch(file)]
    say(f"building native kernels ({recipe.kind}, about {_expected_s(plan, made, reused)} s, once) ...")
    _write_ninja(folder, plan, made, reused, recipe.file_name)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS", "").isdigit() else []
    done = run_logged([ninja, "-v", "-k", "0", *jobs], folder)
    unchanged = {_object_name(edge, recipe) for edge in plan.edges}
    for file in folder.glob("*.o"):
        if file.name in unchanged:
            _fsync(file)
            os.replace(file, objects / file.name)
    if unchanged != {file.name for file in made}:
        raise NativeBuildError("a source was changed while it was compiled; the next start builds again")
    library = folder / recipe.file_name
    if done.returncode != 0 or not library.exists():
        for file in reused:  # in case they are at fault
            file.unlink(missing_ok=True)
        raise NativeBuildError(f"compiling failed: {first_error(done.stdout) or f'exit status {done.returncode}'}")
    for file in folder.iterdir():
        if file.name not in (LOG_NAME, recipe.file_name):
            file.unlink()
    record = {"content": recipe.content, "tools": recipe.tools, "file": library.name, "sha256": _sha256(library)}
    text = json.dumps(record | {"libraries": plan.libraries}, indent=1)
    (folder / RECORD_NAME).write_text(text, encoding="utf-8")
    for file in folder.iterdir():
        _fsync(file)


def _write_ninja(folder: Path, plan: Plan, made: Sequence[Path], reused: Sequence[Path], output: str) -> None:
    """Write build.ninja: compile what is not in the cache of objects, and link."""
    lines, inputs = ["ninja_required_version = 1.5"], []
    for number, (edge, file) in enumerate(zip(plan.edges, made)):
        inputs.append(_ninja_path(file) if file in reused else file.name)
        if file not in reused:
            lines += [f"rule compile{number}", f"  command = {_ninja_command(edge.command)} -c $in -o $out"]
            lines += [f"build {file.name}: compile{number} {_ninja_path(edge.source)}"]
    lines += ["rule link"]
    lines += [f"  command = {_ninja_command(plan.link)} $in -o $out {_ninja_command(plan.libraries)}"]
    lines += [f"build {output}: link {' '.join(inputs)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines), encoding="utf-8")


def _ninja_command(command: Sequence[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def _ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _object_name(edge: Edge, recipe: Recipe) -> str:
    """Return a file name with a hash over what goes into an object: command, PyTorch, source, headers it reaches."""
    headers = {file.name: file for file in recipe.sources.headers}
    reached, waiting = [], [edge.source]
    while waiting:
        file = waiting.pop()
        reached.append(file)
        names = re.findall(rb'^\s*#\s*include\s*"([^"]+)"', file.read_bytes(), re.MULTILINE)
        found = [headers[name.decode()] for name in names if name.decode() in headers]
        waiting += [file for file in found if file not in reached and file not in waiting]
    tools = json.dumps([edge.command, recipe.tools, recipe.torch.version], sort_keys=True)
    digest = hashlib.sha256(tools.encode())
    for file in sorted(reached, key=lambda file: file.name):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return f"{edge.source.stem}-{digest.hexdigest()[:24]}.o"


# Files ----------------------------------------------------------------------------------------------------------------


def _publish(folder: Path, entry: Path) -> None:
    """Move a finished folder into place, for one that is not whole, does not fit or does not load."""
    with contextlib.suppress(FileNotFoundError):
        away = folder.with_name(f"{folder.name}.old.tmp")
        os.rename(entry, away)
        shutil.rmtree(away, ignore_errors=True)
    try:
        os.rename(folder, entry)
    except OSError:  # where the file system knows no locks, another process may have been faster
        if not (entry / RECORD_NAME).exists():
            raise


def _remove_unused(root: Path) -> None:
    """Remove what nobody has used for a long time: entries of old versions, objects, logs."""
    oldest_s = time.time() - UNUSED_DAYS * 86400
    for file in [*root.glob("*/*.so"), *root.glob("objects/*.o"), *root.glob("*.log")]:
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < oldest_s:
                shutil.rmtree(file.parent) if file.suffix == ".so" else file.unlink()


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[bool]:
    """Let one process at a time into the body; yield whether that is certain, which it is not on every file system."""
    with open(path, "ab") as file:
        alone = fcntl is not None
        try:
            if alone:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that builds native kernels ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            alone = False
        yield alone


def _stamp(file: Path) -> tuple[int, int] | None:
    """Return what tells a file from one written later under the same name; None where there is none."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _touch(file: Path) -> bool:
    """Set a file's time to now, the time of its last use; return whether it exists."""
    try:
        os.utime(file)
    except OSError:
        return file.exists()
    return True


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _fsync(file: Path) -> None:
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def _expected_s(plan: Plan, made: Sequence[Path], reused: Sequence[Path]) -> int:
    """Return a rough duration of a build, for the user's patience: by the size of the sources, on this machine."""
    todo = [edge for edge, file in zip(plan.edges, made) if file not in reused]
    # nvcc takes about twice as long as other compilers, for each architecture.
    factors = [2 * sum(flag.startswith("-gencode") for flag in edge.command) or 1 for edge in todo]
    sizes = [edge.source.stat().st_size * factor for edge, factor in zip(todo, factors)]
    longest = max([sum(sizes) / (os.cpu_count() or 1), *sizes])
    return 5 * (1 + int((2 + SECONDS_PER_KB * longest / 1000) / 5))
