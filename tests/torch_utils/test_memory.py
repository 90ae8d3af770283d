"""Freed memory stays with the process where the C library can be told so."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from torch_utils import memory

# Prints what the calls return, and the page faults of the second allocation of 96 MiB, after the first has been freed.
SCRIPT = """
import ctypes, resource
import torch
from torch_utils.memory import keep_freed_memory
kept = [keep_freed_memory(), keep_freed_memory()]
torch.ones(24 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
total = torch.ones(24 * 2**20).sum()
print(*kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
MAPPED_PAGES = 96 * 2**20 // 2**21  # at the most generous, with huge pages


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Forget earlier calls; leave this process' allocator alone."""
    monkeypatch.setattr(memory, "_kept", None)
    monkeypatch.setattr(memory, "_OPTIONS", {})
    monkeypatch.delenv("SPHEREHEAD_KEEP_MEMORY", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)


def has_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def allocate_twice(repo_root, **environment) -> list[str]:
    """Return what SCRIPT prints in a process of its own."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "THP_MEM_ALLOC_ENABLE")}
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(
        command, cwd=repo_root, env=inherited | environment, capture_output=True, text=True, check=True
    )
    return run.stdout.split()


@pytest.mark.skipif(not has_glibc(), reason="the C library is not glibc")
def test_keep_freed_memory_second_allocation_finds_its_pages_mapped(repo_root):
    *kept, faults = allocate_twice(repo_root)
    assert kept == ["True", "True"]
    assert int(faults) < MAPPED_PAGES


@pytest.mark.skipif(not has_glibc(), reason="the C library is not glibc")
@pytest.mark.parametrize(
    "environment", [{"SPHEREHEAD_KEEP_MEMORY": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=131072"}]
)
def test_keep_freed_memory_switched_off_leaves_the_allocator_alone(repo_root, environment):
    *kept, faults = allocate_twice(repo_root, **environment)
    assert kept == ["False", "False"]
    assert int(faults) >= MAPPED_PAGES


def test_keep_freed_memory_unknown_switch_raises_value_error(monkeypatch):
    monkeypatch.setenv("SPHEREHEAD_KEEP_MEMORY", "yes")
    with pytest.raises(ValueError, match="SPHEREHEAD_KEEP_MEMORY: expected 0 or 1, came 'yes'"):
        memory.keep_freed_memory()


@pytest.mark.parametrize("library", [object(), None])
def test_keep_freed_memory_with_another_c_library_returns_false(monkeypatch, library):
    def open_library(name):
        if library is None:
            raise OSError("no such library")
        return library

    monkeypatch.setattr(ctypes, "CDLL", open_library)
    assert memory.keep_freed_memory() is False


def test_keep_freed_memory_refused_option_returns_false(monkeypatch):
    class Refusing:
        gnu_get_libc_version = None

        def mallopt(self, option, value):
            return 0

    monkeypatch.setattr(memory, "_OPTIONS", {-4: 0})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Refusing())
    assert memory.keep_freed_memory() is False
