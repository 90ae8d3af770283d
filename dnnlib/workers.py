"""Let other processes compute for this one, each as a fresh interpreter that imports nothing but what its task needs.

A worker is started by `subprocess`, not by forking: it inherits no threads, no CUDA context and no memory, and does not
import the main script again. Requests and results go through a socket, whose end of file ends the worker, also when
this process is killed. Signals that ask to stop are for this process alone: batch systems and terminals send them to
workers as well, which hold them back, so that this process can still finish its step with their help.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from typing import Any

_HELD_BACK = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]
_GRACE_SECONDS = 1.0  # for a worker to notice that the socket was closed, before it is killed
_STILL = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # workers are the parallelism


class WorkerDied(RuntimeError):
    """A worker process ended before it answered."""


class Worker:
    """One process, started at the first call.

    Args:
        handler: called there with each task; an instance or function that pickle can transfer. What it returns is
            transferred by pickle, and memory (bytes, a contiguous NumPy array) as it is where the caller has room.
    """

    def __init__(self, handler: Callable[[Any], Any]) -> None:
        self._handler = handler
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None

    def call(self, task: Any, into: memoryview | None = None) -> Any:
        """Compute a task.

        Args:
            task: transferred by pickle.
            into: contiguous memory of the size of the result, which is written there.

        Returns:
            What the handler returned; None with `into`.

        Raises:
            WorkerDied: the process was killed; the next call starts another one.
            Exception: what the handler raised.
        """
        try:
            if self._process is None:
                self._start()
            self._connection.send((task, into is not None))
            kind, value = self._connection.recv()
            if kind == "memory":
                self._connection.recv_bytes_into(into)
        except (EOFError, ConnectionError):
            code = self.close()
            raise WorkerDied(f"a worker process ended unexpectedly ({_exit_text(code)})") from None
        if kind == "error":
            raise value
        return value

    def _start(self) -> None:
        ours, theirs = Pipe()
        code = f"import sys; sys.path[:] = {sys.path!r}; from dnnlib.workers import serve; serve(int(sys.argv[1]))"
        # The mask is inherited, so that there is no moment at which a signal ends the worker.
        with theirs, _signals_held_back():
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_STILL},
            )
        self._connection = ours
        ours.send(self._handler)

    def kill(self) -> None:
        """End the process at once; a call that another thread waits for raises `WorkerDied`."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> int | None:
        """End the process and reap it; return its exit code, or None where there was none."""
        process, self._process = self._process, None
        if process is None:
            return None
        self._connection.close()
        try:
            return process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


class WorkerPool:
    """Several workers that take tasks from one queue.

    Args:
        handler: as for `Worker`.
        workers: how many; 0 computes in this process, at `submit`.
    """

    def __init__(self, handler: Callable[[Any], Any], workers: int) -> None:
        self._handler = handler
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="worker") if workers > 0 else None
        self._idle = [Worker(handler) for _ in range(workers)]
        self._workers = list(self._idle)
        self._lock = threading.Lock()
        self._closed = False
        self.num_deaths = 0
        """Processes that ended unexpectedly, and were replaced."""

    def submit(self, task: Any, into: memoryview | None = None) -> Future:
        """Queue a task; the future's result is that of `Worker.call`.

        A task whose worker dies is tried once more.
        """
        if self._threads is not None:
            return self._threads.submit(self._call, task, into)
        future: Future = Future()
        try:
            result = self._handler(task)
            if into is not None:
                into.cast("B")[:] = memoryview(result).cast("B")
            future.set_result(None if into is not None else result)
        except Exception as error:
            future.set_exception(error)
        return future

    def _call(self, task: Any, into: memoryview | None) -> Any:
        with self._lock:
            worker = self._idle.pop()  # there are as many workers as threads
        try:
            for attempt in itertools.count():
                try:
                    return worker.call(task, into)
                except WorkerDied:
                    self.num_deaths += 1
                    if attempt > 0 or self._closed:
                        raise
        finally:
            with self._lock:
                self._idle.append(worker)

    def close(self) -> None:
        """Drop what is queued, end all processes and reap them."""
        self._closed = True
        if self._threads is None:
            return
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def map_ordered(
    handler: Callable[[Any], Any], tasks: Iterable[Any], workers: int, look_ahead: int = 4
) -> Iterator[Any]:
    """Yield `handler(task)` for each task, in order, computed by worker processes.

    Args:
        handler: as for `Worker`.
        tasks: read as far as needed.
        workers: how many; 0 computes in this process.
        look_ahead: tasks that are queued or finished, for each worker.

    Raises:
        WorkerDied: a task ended two workers.
        Exception: what the handler raised.
    """
    tasks = iter(tasks)
    with WorkerPool(handler, workers) as pool:
        pending: collections.deque[Future] = collections.deque()
        while True:
            room = max(workers * look_ahead, 1) - len(pending)
            pending.extend(pool.submit(task) for task in itertools.islice(tasks, room))
            if not pending:
                return
            yield pending.popleft().result()


def serve(descriptor: int) -> None:
    """Be a worker: answer requests on a socket until its end."""
    sys.stdout = sys.stderr  # libraries that print must not mix into the output of a script
    with contextlib.suppress(EOFError, ConnectionError), Connection(descriptor) as connection:
        handler = connection.recv()
        while True:
            task, as_memory = connection.recv()
            try:
                result = handler(task)
            except Exception as error:
                connection.send(("error", _transferable(error)))
                continue
            if as_memory:
                connection.send(("memory", None))
                connection.send_bytes(memoryview(result).cast("B"))
            else:
                connection.send(("value", result))


def _transferable(error: Exception) -> Exception:
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # whatever a class does there
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_text(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
