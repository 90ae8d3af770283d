"""Write data sets to folders or zip files so that an interrupted run can go on, and nobody sees half a data set."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, Protocol

try:
    import fcntl
except ImportError:  # another system: two runs at once are not noticed there
    fcntl = None

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_DATE = (1980, 1, 1, 0, 0, 0)  # of every member, so that the same content gives the same file
_ENDINGS = (b"IEND\xaeB`\x82", b"\xff\xd9")  # of whole PNG and JPEG files


def partial_path(path: Path) -> Path:
    """Return where a data set is while it is being written."""
    return path.with_name(f".{path.name}.partial")


def journal_path(path: Path) -> Path:
    """Return where the notes on a data set are while it is being written."""
    return path.with_name(f".{path.name}.journal")


class Writer(Protocol):
    """A data set that is being written."""

    path: Path

    def recovered(self) -> list[str]:
        """Return the names of the files that an earlier run has written, in order."""

    def keep(self, names: list[str]) -> None:
        """Go on after these files, the first of the recovered ones; forget all others."""

    def add(self, name: str, data: bytes) -> None:
        """Write a file."""

    def seal(self) -> None:
        """Complete the data set on disk; then `publish` gives it its name."""

    def close(self) -> None:
        """Stop writing; what is there stays for another run."""


def open_writer(path: Path, resume: bool) -> Writer:
    """Start to write a zip file, if the path ends in .zip, or a folder.

    Args:
        path: what the data set will be called.
        resume: keep what an earlier run has written, instead of removing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return ZipWriter(path, resume) if path.suffix.lower() == ".zip" else FolderWriter(path, resume)


def publish(path: Path) -> None:
    """Give a data set that is sealed its name, unless it has it already."""
    partial = partial_path(path)
    if partial.is_dir():
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()  # an empty folder may stand there
    if partial.exists():
        os.replace(partial, path)


class ZipWriter:
    """A zip file of stored members. See `Writer`.

    The table of contents of a zip file is written last. After an interruption it is made again from the headers of the
    members; those whose checksum is wrong were being written.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self._partial = partial_path(path)
        self._file: IO[bytes] = open(self._partial, "r+b" if resume and self._partial.exists() else "w+b")
        self._found = _members(self._file)
        self._archive: zipfile.ZipFile | None = None

    def recovered(self) -> list[str]:
        """Return names of whole members, see `Writer`."""
        return [info.filename for info in self._found]

    def keep(self, names: list[str]) -> None:
        """Cut off all members but the first ones, see `Writer`."""
        kept = self._found[: len(names)]
        if [info.filename for info in kept] != names:
            raise ValueError(f"{self._partial}: expected other members; remove it to start again")
        end = 0
        if kept:
            last = kept[-1]
            end = last.header_offset + len(last.FileHeader()) + last.file_size
        self._file.seek(end)
        self._file.truncate()
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)  # starts where the file stands
        for info in kept:
            self._archive.filelist.append(info)
            self._archive.NameToInfo[info.filename] = info

    def add(self, name: str, data: bytes) -> None:
        """Write a member, see `Writer`."""
        info = zipfile.ZipInfo(name, _DATE)
        info.external_attr = 0o644 << 16
        self._archive.writestr(info, data)

    def seal(self) -> None:
        """Write the table of contents, see `Writer`."""
        self._archive.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Leave the members for another run, see `Writer`."""
        if self._archive is not None:
            self._archive.fp = None  # so that it writes no table of contents when it is collected
        self._file.close()


def _members(file: IO[bytes]) -> list[zipfile.ZipInfo]:
    """Return the whole stored members from the start of a zip file whose table of contents is missing."""
    found = []
    while True:
        offset = file.tell()
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size:
            return found
        magic, _, flags, method, _, _, checksum, stored, size, name_size, extra_size = _LOCAL_HEADER.unpack(header)
        name, _ = file.read(name_size), file.read(extra_size)
        data = file.read(stored)
        whole = magic == b"PK\x03\x04" and method == zipfile.ZIP_STORED and stored == size == len(data)
        if not whole or flags or extra_size or zlib.crc32(data) != checksum:
            return found
        info = zipfile.ZipInfo(name.decode("ascii", "replace"), _DATE)
        info.external_attr = 0o644 << 16
        info.header_offset, info.CRC, info.compress_size, info.file_size = offset, checksum, stored, size
        found.append(info)


class FolderWriter:
    """A folder of files, each renamed when it is whole. See `Writer`."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self._partial = partial_path(path)
        self._partial.mkdir(exist_ok=True)
        if not resume:
            self._remove(self._files())

    def _files(self) -> list[Path]:
        return sorted(path for path in self._partial.rglob("*") if path.is_file())

    @staticmethod
    def _remove(paths: list[Path]) -> None:
        for path in paths:
            path.unlink()

    def recovered(self) -> list[str]:
        """Return names of whole files, see `Writer`."""
        return [path.relative_to(self._partial).as_posix() for path in self._files() if _is_whole(path)]

    def keep(self, names: list[str]) -> None:
        """Remove all files but these, see `Writer`."""
        kept = {self._partial / name for name in names}
        self._remove([path for path in self._files() if path not in kept])

    def add(self, name: str, data: bytes) -> None:
        """Write a file, see `Writer`."""
        path = self._partial / name
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_name(f".{path.name}.tmp")
        unfinished.write_bytes(data)
        os.replace(unfinished, path)

    def seal(self) -> None:
        """Wait until all files are on the disk, see `Writer`."""
        if hasattr(os, "sync"):
            os.sync()  # once for all files

    def close(self) -> None:
        """Leave the files for another run, see `Writer`."""


def _is_whole(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    with open(path, "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - 16, 0))
        return file.read().endswith(_ENDINGS)


class Journal:
    """Notes beside a data set that is being written: what is being written, and what was left out.

    Args:
        path: of the data set.
        task: describes the run; one with another description starts again.

    Raises:
        ValueError: another process is writing this data set.
    """

    def __init__(self, path: Path, task: str) -> None:
        self.path = journal_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+", encoding="utf-8")
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._file.close()
                raise ValueError(f"{path}: another process is writing it (and holds {self.path})") from None
        self._file.seek(0)
        lines = _json_lines(self._file.read())
        self.resumes = bool(lines) and lines[0] == {"task": task}
        """Whether an earlier run with the same description has left something."""
        self.skipped: dict[int, str] = {}
        """What was left out, by number, each with the reason."""
        self.sizes: dict[int, tuple[int, int]] = {}
        """Width and height of sources whose label depends on them, by number."""
        self.sealed = False
        """Whether all is written, and has only to get its name."""
        if self.resumes:
            self.skipped = {line["skipped"]: line["reason"] for line in lines if "skipped" in line}
            self.sizes = {line["number"]: tuple(line["size"]) for line in lines if "size" in line}
            self.sealed = lines[-1] == {"sealed": True}
        else:
            self._file.truncate(0)
            self._note({"task": task})

    def skip(self, number: int, reason: str) -> None:
        """Note that something was left out."""
        self.skipped[number] = reason
        self._note({"skipped": number, "reason": reason})

    def note_size(self, number: int, size: tuple[int, int]) -> None:
        """Note the size of a source whose label depends on it."""
        self.sizes[number] = size
        self._note({"number": number, "size": size})

    def seal(self) -> None:
        """Note that all is written."""
        os.fsync(self._file.fileno())
        self._note({"sealed": True})

    def _note(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """Remove the notes."""
        self.path.unlink()
        self.close()

    def close(self) -> None:
        """Leave the notes for another run."""
        self._file.close()


def _json_lines(text: str) -> list[dict[str, Any]]:
    """Return whole lines; the last may be cut off by a kill, and then it was not acted upon."""
    lines = []
    for line in text.split("\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
