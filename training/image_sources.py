"""Folders and zip files of images: list what is in them, and read it.

Nothing is ever extracted, so that names in a zip file cannot reach outside; names that try are refused nevertheless,
because other tools would follow them.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

MAX_MEMBER_BYTES = 1 << 28  # of an image file, after decompression; a 16k x 5k image without compression
MAX_LABELS_BYTES = 1 << 30  # of dataset.json: some millions of labels
LABELS_NAME = "dataset.json"
IMAGE_EXTENSIONS = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm .tga .jp2 .avif".split()
)

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_FOREIGN = re.compile(r"^/|\\|\0|^[A-Za-z]:|(^|/)\.\.(/|$)")  # absolute, of another system, or leaving the root


class BadImage(ValueError):
    """One image, or what belongs to it, cannot be used; the message says why."""


class Source(Protocol):
    """Where files are read from; instances can be transferred to other processes."""

    path: str
    """Absolute path of the folder or zip file."""
    names: list[str]
    """Relative paths of the image files, with forward slashes, sorted."""
    refused: list[tuple[str, str]]
    """Names of files that are never read, each with the reason."""

    def read(self, name: str, limit: int = MAX_MEMBER_BYTES) -> bytes:
        """Return the contents of a file.

        Raises:
            KeyError: there is no such file.
            BadImage: it is larger than `limit` bytes, or damaged.
            OSError: the file system fails.
        """

    def stamp(self, name: str) -> str:
        """Return what tells whether a file has changed, without reading it."""


def open_source(path: str | os.PathLike, kind: str = "images") -> FolderSource | ZipSource:
    """Open a folder (with all folders below) or a zip file.

    Hidden files, and the `__MACOSX` folders that some packers add, are passed over. Image files are those with an
    extension of `IMAGE_EXTENSIONS`.

    Differs from the published code, which takes every extension that Pillow knows, among them .h5, .pdf and .mpg.

    Args:
        path: folder or zip file.
        kind: what it is called in error messages.

    Raises:
        ValueError: it is neither, or a zip file that cannot be read.
    """
    path = os.path.abspath(path)
    if os.path.isdir(path):
        return FolderSource(path)
    if not os.path.isfile(path):
        raise ValueError(f"{kind}: expected a folder or a zip file, came {path}, which is absent or neither")
    try:
        return ZipSource(path)
    except (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, ValueError, OverflowError) as error:
        raise ValueError(f"{kind}: expected a folder or a zip file, came {path}: {error}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a position before the start of the file
            raise
        raise ValueError(f"{kind}: expected a folder or a zip file, came {path}, which is damaged") from None


def is_image_name(name: str) -> bool:
    """Return whether a name has an extension of `IMAGE_EXTENSIONS`, in any case."""
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def without_extension(name: str) -> str:
    """Return a relative path without its extension, by which masks are matched to images."""
    return os.path.splitext(name)[0]


def printable(name: str) -> str:
    """Return a name that every terminal and log can take."""
    return name.encode("utf-8", "backslashreplace").decode()


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


class FolderSource:
    """A folder and all folders below it; links to folders are not followed. See `Source`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.names: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self._walk("")
        self.names.sort()
        self.refused.sort()

    def _walk(self, below: str) -> None:
        with os.scandir(os.path.join(self.path, below)) as entries:
            for entry in entries:
                name = below + entry.name
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    self._walk(name + "/")
                elif not is_image_name(name):
                    continue
                elif entry.is_file():
                    self.names.append(name)
                else:
                    self.refused.append((name, "expected a regular file; came a link to nothing, a pipe or a device"))

    def read(self, name: str, limit: int = MAX_MEMBER_BYTES) -> bytes:
        """Return the contents of a file; see `Source`."""
        try:
            with open(os.path.join(self.path, name), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > limit:
                    raise BadImage(f"expected at most {limit} bytes, came a file of {size}")
                return file.read()
        except FileNotFoundError:
            raise KeyError(name) from None

    def head(self, name: str, num_bytes: int) -> tuple[bytes, bytes]:
        """Return the first and the last bytes of a file, as many as asked for if it has them; raises as `read`."""
        try:
            with open(os.path.join(self.path, name), "rb") as file:
                first = file.read(num_bytes)
                file.seek(max(os.fstat(file.fileno()).st_size - num_bytes, 0))
                return first, file.read(num_bytes)
        except FileNotFoundError:
            raise KeyError(name) from None

    def stamp(self, name: str) -> str:
        """Return what tells whether a file has changed: its size, and the time of its last change."""
        status = os.stat(os.path.join(self.path, name))
        return f"{status.st_size} bytes of {status.st_mtime_ns} ns"

    def __contains__(self, name: str) -> bool:
        return os.path.isfile(os.path.join(self.path, name))


class ZipSource:
    """A zip file, stored or deflated. See `Source`.

    Its table of contents is read once. Members are then read without the `zipfile` module, by position: several threads
    can do so at once, and a copy that was transferred to another process need not read the table again.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.names: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self._members: dict[str, tuple[int, int, int, int, int]] = {}  # offset, stored size, size, CRC, method
        self._closer: _Descriptor | None = None
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                self._add(info)
        self.names.sort()
        self.refused.sort()

    def _add(self, info: zipfile.ZipInfo) -> None:
        name = info.orig_filename
        if info.is_dir() or not (is_image_name(name) or name == LABELS_NAME):
            return
        reason = None
        if _FOREIGN.search(name):
            reason = "expected a relative path with forward slashes and without '..'"
        elif _is_hidden(name):
            return
        elif name in self._members:
            reason = "expected one member of this name, came several"
        elif info.flag_bits & 0x1:
            reason = "expected no encryption"
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            reason = f"expected a stored or deflated member, came compression method {info.compress_type}"
        elif stat.S_ISLNK(info.external_attr >> 16):
            reason = "expected a regular file, came a link"
        if reason is not None:
            self.refused.append((name, reason))
            return
        sizes = (info.compress_size, info.file_size, info.CRC, info.compress_type)
        self._members[name] = (info.header_offset, *sizes)
        if name != LABELS_NAME:
            self.names.append(name)

    def read(self, name: str, limit: int = MAX_MEMBER_BYTES) -> bytes:
        """Return the contents of a member, whose checksum is right; see `Source`."""
        _, stored, size, checksum, method = self._members[name]
        if max(size, stored) > limit:
            raise BadImage(f"expected at most {limit} bytes, came a member of {max(size, stored)}")
        data = self._pread(name, 0, stored)
        if method == zipfile.ZIP_DEFLATED:
            data = _inflate(data, size)
        if len(data) != size or zlib.crc32(data) != checksum:
            raise BadImage("damaged: size or checksum differ from those in the zip file")
        return data

    def head(self, name: str, num_bytes: int) -> tuple[bytes, bytes]:
        """Return the first and the last bytes of a member; raises as `read`."""
        _, stored, _, _, method = self._members[name]
        if method == zipfile.ZIP_DEFLATED:
            data = self.read(name)
            return data[:num_bytes], data[-num_bytes:]
        first = self._pread(name, 0, min(num_bytes, stored))
        return first, self._pread(name, max(stored - num_bytes, 0), min(num_bytes, stored))

    def _pread(self, name: str, start: int, count: int) -> bytes:
        """Read stored bytes of a member, counted from the first of its data."""
        offset = self._members[name][0]
        if self._closer is None:
            self._closer = _Descriptor(self.path)
        file = self._closer.number
        header = os.pread(file, _LOCAL_HEADER.size, offset) if offset >= 0 else b""
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise BadImage("damaged: the zip file has no member where its table of contents says so")
        name_size, extra_size = _LOCAL_HEADER.unpack(header)[-2:]
        data = os.pread(file, count, offset + len(header) + name_size + extra_size + start)
        if len(data) != count:
            raise BadImage("damaged: the zip file ends within this member")
        return data

    def stamp(self, name: str) -> str:
        """Return what tells whether a member has changed: its size and its checksum."""
        _, _, size, checksum, _ = self._members[name]
        return f"{size} bytes of CRC {checksum:08x}"

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_closer": None}


class _Descriptor:
    """An open file, closed with the last reference."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        number = getattr(self, "number", None)
        if number is not None:
            os.close(number)


def _inflate(data: bytes, size: int) -> bytes:
    """Decompress, to at most one byte more than what was announced."""
    decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        return decompressor.decompress(data, size + 1)
    except zlib.error as error:
        raise BadImage(f"damaged: {error}") from None


def read_labels_file(source: FolderSource | ZipSource) -> bytes | None:
    """Return the contents of `dataset.json`, or None where there is none; ValueError where it is too large."""
    if LABELS_NAME not in source:
        return None
    try:
        return source.read(LABELS_NAME, MAX_LABELS_BYTES)
    except BadImage as error:
        raise ValueError(f"{Path(source.path) / LABELS_NAME}: {error}") from None
