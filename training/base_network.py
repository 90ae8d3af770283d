"""Where the base network of a difference may be found.

A difference file may come from a stranger. What it says about its base is therefore a hint, never an order: local
files are looked at, and used only if their weights have the right fingerprint; nothing is fetched from a URL that
stands in the file. What may be fetched is named by the user: `SPHEREHEAD_BASE`, or the folder of the URL that the
difference itself was fetched from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dnnlib.sources import file_name, is_demo, is_untrained, local_path, url_beside, url_scheme
from training.network_difference import BaseReference

BASE_VARIABLE = "SPHEREHEAD_BASE"
"""Environment variable with a source (path, URL, name) where the user says that bases are."""
_REMOTE_SCHEMES = ("http", "https", "hf")
_MAX_SHOWN = 300


@dataclass(frozen=True)
class BasePlace:
    """A place where a base network may be."""

    source: str
    """A path, a URL, `demo` or `init:PRESET`."""
    may_fetch: bool = True
    """Whether a URL may be fetched; otherwise only a copy in the cache counts."""

    @property
    def identity(self) -> str:
        """The same text for the same file."""
        return source_identity(self.source)


def source_identity(source: str) -> str:
    """Return a text that is the same for all paths of a file, or for a URL with and without a fragment."""
    path = local_path(source)
    return source.partition("#")[0] if path is None else os.path.realpath(path)


def base_places(base: BaseReference, location: str | None) -> Iterator[BasePlace]:
    """Yield the places where a base network may be, in the order in which to look.

    These are: what `SPHEREHEAD_BASE` says; the name `demo` or `init:PRESET`; the path relative to the difference; the
    absolute path; a file of the same name beside the difference, on disk or at its URL; and for a URL a copy in the
    cache. Local paths are yielded only where a regular file is. Nothing is yielded twice.

    Args:
        base: from the header of the difference.
        location: path or URL of the difference; None if it is not known.
    """
    seen = set()
    for place in _all_places(base, location):
        if place.identity not in seen:
            seen.add(place.identity)
            yield place


def _all_places(base: BaseReference, location: str | None) -> Iterator[BasePlace]:
    if chosen := os.environ.get(BASE_VARIABLE, "").strip():
        yield BasePlace(chosen)
    if is_demo(base.source) or is_untrained(base.source):
        yield BasePlace(base.source)
        return
    difference = None if location is None else local_path(location)
    for path in _local_paths(base, difference):
        if os.path.isfile(path):  # no device, no pipe
            yield BasePlace(os.path.abspath(path))
    name = _base_name(base)
    beside = None if location is None else url_beside(location, name)
    if beside is not None:
        yield BasePlace(beside)
    if url_scheme(base.source) in _REMOTE_SCHEMES:
        yield BasePlace(base.source, may_fetch=False)


def _local_paths(base: BaseReference, difference: Path | None) -> Iterator[str]:
    name = _base_name(base)
    folders = []
    if difference is not None:
        # A link to the difference stands for it: what is beside either of the two counts.
        folders = [os.path.dirname(os.path.realpath(difference)), os.path.dirname(os.path.abspath(difference))]
    if base.relative_path is not None and folders and not _is_share(base.relative_path):
        yield os.path.join(folders[0], base.relative_path)
    if base.path is not None and os.path.isabs(base.path) and not _is_share(base.path):
        yield base.path
    for folder in folders:
        if name:
            yield os.path.join(folder, name)


def _base_name(base: BaseReference) -> str:
    """Return the file name of a base without folders, of whichever system; "" if it has none."""
    name = re.split(r"[/\\]", base.path or file_name(base.source))[-1]
    return "" if name in (".", "..") or "\0" in name else name


def _is_share(path: str) -> bool:
    """Whether a path leads to another computer on some systems, to which it would give the user's name away."""
    return re.match(r"[/\\]{2}", path) is not None


def missing_base_message(source: str, base: BaseReference, reasons: list[str]) -> str:
    """Say in one line which base a difference needs, where it was looked for, and what to do.

    Args:
        source: how messages call the difference.
        base: from its header.
        reasons: one text for each place, with what is wrong there.
    """
    remote = url_scheme(base.source) in _REMOTE_SCHEMES
    looked = "; ".join(reasons) or ("not in the cache" if remote else "no such file where the difference says it was")
    place = "" if base.path is None else f" ({_shown(base.path)})"
    rule = "; a URL in a difference is never fetched" if remote else ""
    return (
        f"{source}: this is a difference from the base network {_shown(base.source)}{place} with the fingerprint "
        f"{_shown(base.fingerprint[:12])}, which was not found: {looked}{rule}. Put the base beside the difference "
        f"under its own name, or set {BASE_VARIABLE} to its path or URL"
    )


def _shown(text: str) -> str:
    """Quote a text from a file, so that it cannot command the terminal or flood it."""
    return repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "...")
