"""Large CPU tensors take the memory of freed ones, which stays bounded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from torch_utils import memory, native

MIB = 2**20
PAGE_FAULTS = "import resource\ndef page_faults():\n    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
RESIDENT = "import psutil\ndef resident():\n    return psutil.Process().memory_info().rss\n"

needs_native = pytest.mark.skipif(native.load() is None, reason=f"no native library: {native.reason()}")


def run_in_new_process(repo_root, script: str, **environment: str) -> list[str]:
    """Return the words that a script prints in a process whose allocator it may change."""
    script = f"import torch\nfrom torch_utils.memory import *\n{PAGE_FAULTS}{RESIDENT}{script}"
    command, inherited = [sys.executable, "-c", script], {"SPHEREHEAD_KEEP_MEMORY": "1"}
    environment = os.environ | inherited | environment
    run = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


FAULTS_OF_SECOND_TENSOR = f"""
kept = [keep_freed_memory(), keep_freed_memory()]
torch.ones({24 * MIB})
before = page_faults()
torch.ones({24 * MIB})
print(*kept, page_faults() - before)
"""
MAPPED_PAGES = 96 // 2  # of 2 MiB each, the largest there are


@needs_native
def test_keep_freed_memory_second_tensor_finds_its_pages_mapped(repo_root):
    *kept, faults = run_in_new_process(repo_root, FAULTS_OF_SECOND_TENSOR)
    assert kept == ["True", "True"]
    assert int(faults) < MAPPED_PAGES


@pytest.mark.parametrize("environment", [{"SPHEREHEAD_KEEP_MEMORY": "0"}, {"SPHEREHEAD_NATIVE": "0"}])
def test_keep_freed_memory_switched_off_returns_false(repo_root, environment):
    *kept, faults = run_in_new_process(repo_root, FAULTS_OF_SECOND_TENSOR, **environment)
    assert kept == ["False", "False"]
    assert int(faults) >= MAPPED_PAGES


@needs_native
def test_keep_freed_memory_many_sizes_and_small_tensors_stay_bounded(repo_root):
    script = f"""
keep_freed_memory()
before, small = resident(), []
for i in range(60):
    large = torch.ones({8 * MIB} + 40000 * i)  # 32 to 41 MiB
    small.append(torch.ones(1000 + i))
    del large
print(resident() - before)
"""
    (growth,) = run_in_new_process(repo_root, script)
    assert int(growth) < 80 * MIB  # 41 MiB, a quarter more, and what the first tensors load


@needs_native
def test_release_kept_memory_gives_back_what_was_kept(repo_root):
    script = f"""
before = release_kept_memory()
keep_freed_memory()
kept = torch.arange({4 * MIB})
torch.ones({24 * MIB})
full = resident()
print(before, release_kept_memory(), full - resident(), kept[-1].item(), release_kept_memory())
"""
    before, released, shrunk, last, again = map(int, run_in_new_process(repo_root, script))
    assert (before, last, again) == (0, 4 * MIB - 1, 0)
    assert 96 * MIB <= released <= 112 * MIB  # sizes are rounded up by at most an eighth
    assert shrunk > 90 * MIB


@needs_native
def test_stop_keeping_memory_undoes_it_and_it_can_begin_again(repo_root):
    script = f"""
keep_freed_memory()
kept = torch.arange({4 * MIB})
torch.ones({24 * MIB})
stop_keeping_memory()
stop_keeping_memory()
torch.ones({40 * MIB})
print(release_kept_memory(), kept[-1].item())
del kept
keep_freed_memory()
torch.ones({24 * MIB})
print(release_kept_memory())
"""
    stopped, last, begun = map(int, run_in_new_process(repo_root, script))
    assert 96 * MIB <= stopped <= 112 * MIB  # from before it stopped
    assert last == 4 * MIB - 1
    assert begun >= 96 * MIB


@needs_native
def test_keep_freed_memory_results_are_those_of_plain_memory(repo_root):
    script = """
def values():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 300, 300)
    empty, storage = torch.ones(0, 5), x.clone()
    storage.resize_(2, 8, 300, 300)
    for _ in range(3):
        x = torch.nn.functional.conv2d(x, torch.full((8, 8, 3, 3), 0.1), padding=1).sin()
    return x, storage[:1], empty.sum(), torch.from_numpy(x.numpy()).clone()
plain = values()
keep_freed_memory()
print(all(torch.equal(a, b) for _ in range(2) for a, b in zip(plain, values())))
"""
    assert run_in_new_process(repo_root, script) == ["True"]


@needs_native
def test_keep_freed_memory_threads_and_forks_survive(repo_root):
    script = f"""
import os, threading
keep_freed_memory()
def work():
    for i in range(50):
        assert torch.full(({MIB // 2} + 1000 * i,), 3.0).mean() == 3
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
child = os.fork()
if child == 0:
    torch.empty({MIB})
    os._exit(7)
[thread.join() for thread in threads]
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_in_new_process(repo_root, script) == ["7"]


def test_keep_freed_memory_unknown_switch_raises_value_error(monkeypatch):
    monkeypatch.setenv("SPHEREHEAD_KEEP_MEMORY", "yes")
    with pytest.raises(ValueError, match="SPHEREHEAD_KEEP_MEMORY: expected 0 or 1, came 'yes'"):
        memory.keep_freed_memory()
