"""Folders of training runs: numbered without races, found again, and used by one process at a time."""

from __future__ import annotations

import re
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NUMBERED = re.compile(r"\.?(\d{5,})[-.].*")
_MAX_ATTEMPTS = 10_000


def make_run_dir(outdir: str | Path, name: str) -> Path:
    """Make the folder of a new run, `<next number, five digits>-<name>`.

    Runs that begin at the same moment, also on other machines with the same file system, get different numbers.

    Args:
        outdir: folder of runs; made where it is missing.
        name: what follows the number.

    Raises:
        ValueError: the name is no name of a folder.
        OSError: the folder cannot be made.
    """
    if not name or Path(name).name != name:
        raise ValueError(f"run name: expected the name of a folder, got {name!r}")
    outdir = Path(outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    for _ in range(_MAX_ATTEMPTS):
        number = _next_number(outdir)
        # The number is claimed first, because folders of the same number but different names would not collide.
        claim = outdir / f".{number:05d}.claim"
        try:
            claim.mkdir()
        except FileExistsError:
            continue
        try:
            if not any(path.name.startswith(f"{number:05d}-") for path in outdir.iterdir()):
                run_dir = outdir / f"{number:05d}-{name}"
                run_dir.mkdir()
                return run_dir
        finally:
            claim.rmdir()
    raise OSError(f"{outdir}: no number for a new run could be claimed in {_MAX_ATTEMPTS} attempts")


def find_run_dirs(outdir: str | Path, name: str) -> list[Path]:
    """Return the folders of the runs of this name, the last one first."""
    outdir = Path(outdir)
    own = [path for path in outdir.iterdir() if path.is_dir()] if outdir.is_dir() else []
    own = [path for path in own if re.fullmatch(r"\d{5,}-" + re.escape(name), path.name)]
    return sorted(own, key=lambda path: int(path.name.split("-")[0]), reverse=True)


def _next_number(outdir: Path) -> int:
    matches = (_NUMBERED.fullmatch(path.name) for path in outdir.iterdir())
    return max((int(match[1]) + 1 for match in matches if match), default=0)


class RunLock:
    """Keeps a second process from training in the same folder, where each would spoil the files of the other.

    A lock of the system on a file: it ends with the process, however that ends, and forked children do not hold it.
    Where the file system has no locks, nothing is checked.
    """

    def __init__(self, run_dir: str | Path) -> None:
        """Lock a folder.

        Raises:
            OSError: another process has locked it.
        """
        self._file = open(Path(run_dir) / ".lock", "a", encoding="utf-8")
        if fcntl is None:
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # either, by the system
            self._file.close()
            raise OSError(f"{run_dir}: another process trains in this folder") from None
        except OSError:
            pass

    def release(self) -> None:
        """Unlock the folder."""
        self._file.close()
