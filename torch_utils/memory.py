"""Tell the C library what to do with freed memory."""

from __future__ import annotations

import ctypes
import os

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2  # names of mallopt(3) in glibc's malloc.h
_OPTIONS = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 * 2**20}
"""No blocks of their own from the system; never give memory back; ask the system for 64 MiB at a time."""

_kept: bool | None = None


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks for the next request, for the rest of the process.

    By default glibc asks the system for every block above some size (128 KiB, growing to 32 MiB), and returns it when
    it is freed. The system clears every page of it on first touch, 4 KiB at a time. Image networks allocate several
    such blocks per layer, and spend a sixth to a half of their time on that. Results do not change.

    It costs memory between calls: what the process once needed stays with it until it ends, or until
    `malloc_trim(0)` of the C library. The peak hardly grows, by what does not fit together any more.

    Does nothing where the C library is not glibc (macOS, Windows, musl), where another allocator takes its place
    (jemalloc and tcmalloc keep memory anyway), where GLIBC_TUNABLES already has something to say about malloc, or with
    SPHEREHEAD_KEEP_MEMORY=0 in the environment. Calling it again does nothing more.

    Returns:
        Whether freed memory is kept by this.

    Raises:
        ValueError: SPHEREHEAD_KEEP_MEMORY is neither 0 nor 1.
    """
    global _kept
    if _kept is None:
        _kept = _is_wanted() and _set_options()
    return _kept


def _is_wanted() -> bool:
    switch = os.environ.get("SPHEREHEAD_KEEP_MEMORY") or "1"
    if switch not in ("0", "1"):
        raise ValueError(f"SPHEREHEAD_KEEP_MEMORY: expected 0 or 1, came {switch!r}")
    return switch == "1" and "glibc.malloc." not in os.environ.get("GLIBC_TUNABLES", "")


def _set_options() -> bool:
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  mallopt of other libraries numbers its options otherwise
        return all(library.mallopt(option, value) == 1 for option, value in _OPTIONS.items())
    except (AttributeError, OSError, TypeError):  # another C library; TypeError is what Windows has for CDLL(None)
        return False
