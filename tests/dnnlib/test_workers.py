"""Worker processes. Handlers are functions that every interpreter has."""

import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from dnnlib.workers import Worker, WorkerDied, WorkerPool, map_ordered


def child_pids() -> set[int]:
    return {process.pid for process in psutil.Process().children()}


def test_map_ordered_keeps_the_order_and_ends_its_processes():
    before = child_pids()
    assert list(map_ordered(math.factorial, range(20), workers=2)) == [math.factorial(i) for i in range(20)]
    assert child_pids() == before


def test_map_ordered_without_workers_computes_here():
    assert list(map_ordered(os.getpgid, [0, 0], workers=0)) == [os.getpgid(0)] * 2


@pytest.mark.parametrize("workers", [0, 1])
def test_exception_of_a_handler_comes_back(workers):
    with WorkerPool(math.factorial, workers) as pool:
        with pytest.raises(ValueError, match="negative"):
            pool.submit(-1).result()
        assert pool.submit(4).result() == 24


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_written_where_the_caller_wants_it(workers):
    room = np.ones((2, 3, 5))
    with WorkerPool(np.zeros, workers) as pool:
        assert pool.submit((2, 3, 5), memoryview(room).cast("B")).result() is None
    assert (room == 0).all()


def test_dying_worker_is_replaced_once_for_a_task():
    with WorkerPool(os._exit, 1) as pool:
        with pytest.raises(WorkerDied, match="exit code 7"):
            pool.submit(7).result()
        assert pool.num_deaths == 2
        with pytest.raises(WorkerDied, match="exit code 8"):  # the pool goes on
            pool.submit(8).result()


def test_killed_worker_is_named_by_its_signal():
    worker = Worker(math.factorial)
    worker.call(1)
    (process,) = psutil.Process().children()[-1:]
    process.kill()
    with pytest.raises(WorkerDied, match="SIGKILL"):
        worker.call(2)
    assert worker.call(3) == 6
    worker.close()


def test_signals_that_ask_to_stop_do_not_end_a_worker():
    worker = Worker(math.factorial)
    before = child_pids()
    assert worker.call(3) == 6
    (pid,) = child_pids() - before
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        os.kill(pid, number)
    assert worker.call(4) == 24
    worker.close()
    assert not psutil.pid_exists(pid)


def test_close_does_not_wait_for_a_task():
    start = time.monotonic()
    with WorkerPool(time.sleep, 1) as pool:
        future = pool.submit(60)
        time.sleep(0.2)
    assert time.monotonic() - start < 10
    assert isinstance(future.exception(), WorkerDied)


def test_workers_end_with_a_killed_parent():
    code = """
import math, os, psutil
from dnnlib.workers import Worker
workers = [Worker(math.factorial) for _ in range(2)]
assert [worker.call(3) for worker in workers] == [6, 6]
print(*[child.pid for child in psutil.Process().children()], flush=True)
os.kill(os.getpid(), 9)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 2, result.stderr
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)
    assert result.stderr == ""


def test_terminated_parent_leaves_no_traceback_of_workers():
    code = """
import math, os, signal
from dnnlib.workers import WorkerPool
pool = WorkerPool(math.factorial, 2)
print(pool.submit(3).result(), flush=True)
os.killpg(0, signal.SIGTERM)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), start_new_session=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGTERM, "6\n", "")


def test_workers_import_nothing_that_the_task_does_not_need():
    worker = Worker(eval)
    assert worker.call("'torch' in __import__('sys').modules") is False
    worker.close()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
