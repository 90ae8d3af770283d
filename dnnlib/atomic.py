"""Write files so that nobody ever sees a half-written one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` when the body ends without an exception.

    For libraries that insist on a file name. The temporary name has the suffix of ``path``, because such libraries
    choose the format by it. The finished file is fsynced before the rename; on any exception it is removed, and what
    stood under ``path`` before stays. A symbolic link at ``path`` is kept: the file that it points to is replaced.

    Args:
        path: the final name. Missing parent directories are created.

    Raises:
        IsADirectoryError: ``path`` is a directory.
        OSError: ``path`` is a device or a pipe, or the file system refuses.
        FileNotFoundError: the body wrote nothing.
    """
    path = Path(path)
    final = Path(os.path.realpath(path))
    if final.is_dir():
        raise IsADirectoryError(f"{path}: expected a file name, came a directory")
    if final.exists() and not final.is_file():
        raise OSError(f"{path}: expected a regular file, came a device or a pipe, which cannot be replaced")
    final.parent.mkdir(parents=True, exist_ok=True)
    temp = final.parent / f".{path.stem[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}"
    try:
        yield temp
        if not temp.exists():
            raise FileNotFoundError(f"{path}: nothing was written")
        with open(temp, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temp, final)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise
    _fsync_directory(final.parent)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", **open_kwargs: Any) -> Iterator[IO[Any]]:
    """Yield a file object whose contents appear under ``path`` only when the body ends without an exception.

    Args:
        path: the final name; see :func:`atomic_path`.
        mode: "wb" or "w".
        **open_kwargs: passed to ``open``, such as ``encoding``.

    Raises:
        ValueError: another mode.
        OSError: as :func:`atomic_path`; also a full disk.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode: expected 'w' or 'wb', came {mode!r}")
    with atomic_path(path) as temp, open(temp, mode, **open_kwargs) as file:
        yield file


def _fsync_directory(directory: Path) -> None:
    """Make a rename durable, where the system can open a directory."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
