"""Keep the memory of freed CPU tensors for the next ones."""

from __future__ import annotations

import ctypes
import os

from torch_utils import native


def keep_freed_memory() -> bool:
    """Let large CPU tensors take the memory of freed ones, for the rest of the process.

    By default the C library asks the system for every large block, and returns it when it is freed; the system clears
    each page of it on first touch, 4 KiB at a time. Image networks allocate several such blocks per layer, and spend a
    sixth to a half of their time on that. Results do not change.

    An allocator of the native library, in front of PyTorch's own, keeps freed blocks of 1 MiB and more. Blocks in use
    and kept blocks together take at most a quarter more than blocks in use ever took; that stays with the process, see
    `release_kept_memory`. glibc's own options (`mallopt`, GLIBC_TUNABLES) can do the same without native code, but were
    seen to fragment: a loop over one tensor of 96 MiB and small ones that stay took another 30 MiB each time.

    Does nothing with SPHEREHEAD_KEEP_MEMORY=0 in the environment, without the native library, or where the process has
    set an allocator of its own in PyTorch. Calling it again does nothing more.

    Returns:
        Whether freed memory is kept.

    Raises:
        ValueError: SPHEREHEAD_KEEP_MEMORY is neither 0 nor 1.
    """
    switch = os.environ.get("SPHEREHEAD_KEEP_MEMORY") or "1"
    if switch not in ("0", "1"):
        raise ValueError(f"SPHEREHEAD_KEEP_MEMORY: expected 0 or 1, came {switch!r}")
    if switch == "0":
        return False
    library = native.load()
    return library is not None and library.cpu("keep_freed_memory")() == 1


def stop_keeping_memory() -> None:
    """Undo `keep_freed_memory`, for comparisons: tensors from now on are made by PyTorch's own allocator.

    What is kept stays, for when keeping begins again; `release_kept_memory` gives it back.
    """
    library = native.load()
    if library is not None:
        library.cpu("stop_keeping_memory")()


def release_kept_memory() -> int:
    """Give the kept memory back to the C library; returns its bytes. Keeping goes on from there."""
    library = native.load()
    num_bytes = ctypes.c_int64(0)
    if library is not None:
        library.cpu("release_kept_memory")(ctypes.byref(num_bytes))
    return num_bytes.value
