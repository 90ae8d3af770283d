"""Start the processes of a training run on one machine, and supervise them: what `--gpus N` does without torchrun.

Every rank runs the same command line with the variables that torchrun would set, so that there is one way to run. This
module does not import PyTorch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from torch_utils.failures import INTERRUPTED, REPORT_VARIABLE, FailureReport, read_report

FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
_SETTLE_S = 3.0  # for the other ranks to end by themselves after the first failure
_POLL_S = 0.1
_TAIL_LINES = 40
_PR_SET_PDEATHSIG = 1


class WorkerFailedError(RuntimeError, OSError):
    """A rank failed; the message names it and its error. Scripts show it as one line."""


def launch(num_processes: int, command: Sequence[str] | None = None, *, log_dir: Path | None = None) -> None:
    """Run a command as several ranks on this machine, and return when all have ended with status 0.

    What rank 0 prints is shown; what others print goes to files, and is shown where it explains a failure. When one
    rank fails, all others are ended within seconds. SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 are passed on to all
    ranks, which may then save and end; a second SIGINT kills them. On Linux no rank survives this process.

    OMP_NUM_THREADS, if not set, becomes an equal share of the cores. Ranks find each other on 127.0.0.1, by a socket
    that is open before they start, so that no other program can take its port.

    Args:
        num_processes: number of ranks.
        command: program and arguments; None is the command line of this process.
        log_dir: folder for `rank1.log`, ...; made if absent. None keeps them only while this runs.

    Raises:
        ValueError: no processes, or this process is a rank already.
        WorkerFailedError: a rank failed, or was ended by a signal that was passed on.
    """
    if num_processes < 1:
        raise ValueError(f"processes: expected at least 1, came {num_processes}")
    if "RANK" in os.environ:
        raise ValueError(f"processes: expected one launcher, but this is rank {os.environ['RANK']} of another already")
    command = list(command) if command is not None else [sys.executable, *sys.orig_argv[1:]]
    private = Path(tempfile.mkdtemp(prefix="spherehead-ranks-"))
    try:
        logs = private if log_dir is None else log_dir
        logs.mkdir(parents=True, exist_ok=True)
        workers: list[_Worker] = []
        with _forwarding(workers) as forwarded:
            try:
                _start(workers, command, num_processes, private, logs)
                _supervise(workers, forwarded, keeps_logs=log_dir is not None)
            finally:
                _kill(workers)
    finally:
        shutil.rmtree(private, ignore_errors=True)


@dataclass
class _Worker:
    """A rank as a child process."""

    rank: int
    process: subprocess.Popen
    log: Path | None
    """What it prints; None for rank 0, whose output is shown."""
    report_path: Path
    ended_at: float | None = None
    status: int | None = None
    """Its return code, unless it ended because this launcher killed it."""

    def poll(self) -> bool:
        """Return whether it runs, and note its end."""
        if self.ended_at is None and self.process.poll() is not None:
            self.ended_at, self.status = time.time(), self.process.returncode
        return self.ended_at is None

    def report(self) -> FailureReport | None:
        """Return the error that it left."""
        return read_report(self.report_path)


# Starting -------------------------------------------------------------------------------------------------------------


def _start(workers: list[_Worker], command: list[str], ranks: int, private: Path, logs: Path) -> None:
    """Start all ranks and append them to `workers`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for rank in range(ranks):
            report_path, log = private / f"rank{rank}.json", logs / f"rank{rank}.log" if rank else None
            environment = _environment(rank, ranks, listener.getsockname()[1]) | {REPORT_VARIABLE: str(report_path)}
            if rank == 0:
                environment["SPHEREHEAD_STORE_FD"] = str(listener.fileno())
            with open(log, "wb") if log else contextlib.nullcontext() as output:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=[listener.fileno()] if rank == 0 else [],
                    start_new_session=True,  # so that Ctrl-C in a terminal comes here alone, and is passed on once
                    preexec_fn=_die_with_parent(),
                )
            workers.append(_Worker(rank, process, log, report_path))


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    environment |= {
        **{"RANK": str(rank), "WORLD_SIZE": str(ranks)},
        **{"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(cores // ranks, 1)))
    if any(name == "lo" for _, name in socket.if_nameindex()):
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # Gloo would look up the host's name, which may lead nowhere
    return environment


def _die_with_parent() -> Callable[[], None] | None:
    """Return what makes Linux kill a new process when this one ends in whatever way; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def run_in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it ended before that
            os._exit(1)

    return run_in_child


# Supervision ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _forwarding(workers: list[_Worker]) -> Iterator[list[signal.Signals]]:
    """Pass signals on to the ranks, and yield the list of those that came."""
    came: list[signal.Signals] = []

    def forward(number: int, frame: FrameType | None) -> None:
        is_repeated_interrupt = number == signal.SIGINT and signal.SIGINT in came
        passed_on = signal.SIGKILL if is_repeated_interrupt else signal.Signals(number)
        came.append(passed_on)
        for worker in workers:
            worker.process.send_signal(passed_on)

    before = {}
    try:
        for name in FORWARDED:
            number = getattr(signal, name, None)
            # One that is ignored stays so, here and in the ranks: nohup does that.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, forward)
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _supervise(workers: list[_Worker], forwarded: list[signal.Signals], *, keeps_logs: bool) -> None:
    """Wait for all ranks to end.

    Raises:
        WorkerFailedError: one of them did not end with status 0. Others may still run then.
    """
    while _running(workers):
        if any(worker.status for worker in workers):
            _settle(workers)
            break
        time.sleep(_POLL_S)
    failed = [worker for worker in workers if worker.status or worker.report() is not None]
    if not failed:
        return
    culprit = min(failed, key=_blame)
    text, tail = _explain(culprit)
    if forwarded and (text == INTERRUPTED or culprit.status in [-number for number in forwarded]):
        raise WorkerFailedError(f"stopped by {forwarded[0].name}: rank {culprit.rank} ended before it could save")
    if tail:
        print("\n".join(f"[rank {culprit.rank}] {line}" for line in tail), file=sys.stderr, flush=True)
    report = culprit.report()
    if report is not None and report.is_secondary:  # it names the rank at fault, which left nothing itself
        raise WorkerFailedError(text)
    where = f"; see {culprit.log}" if keeps_logs and culprit.log else ""
    raise WorkerFailedError(f"rank {culprit.rank} of {len(workers)} failed: {text}{where}")


def _running(workers: list[_Worker]) -> list[_Worker]:
    return [worker for worker in workers if worker.poll()]


def _settle(workers: list[_Worker]) -> None:
    deadline = time.monotonic() + _SETTLE_S
    while _running(workers) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _blame(worker: _Worker) -> tuple[bool, bool, float]:
    """Return a key that is smallest for the rank that failed first, and not because of others.

    A rank that was killed has left no report, and is seen to have ended a little later than others report that they
    lost it.
    """
    report = worker.report()
    was_killed = worker.status is not None and worker.status in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)
    since = worker.report_path.stat().st_mtime if report else worker.ended_at
    return (report is not None and report.is_secondary, not was_killed, since)


def _explain(worker: _Worker) -> tuple[str, list[str]]:
    """Return the error of a rank as one line, and the end of what it printed, if that has not been shown yet."""
    tail = _last_error(worker.log) if worker.log else []
    report = worker.report()
    if report is not None:
        return report.text, tail
    if worker.status < 0:
        name = signal.Signals(-worker.status).name
        return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else ""), tail
    last = next((line.strip() for line in reversed(tail) if line.strip()), "")
    reason = last.removeprefix("Error: ") or ("see above" if worker.rank == 0 else "it printed nothing")
    return f"{reason} (exit status {worker.status})", tail


def _last_error(log: Path) -> list[str]:
    """Return the last lines of a log, from the last traceback on if there is one."""
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-_TAIL_LINES:]
        starts = [number for number, line in enumerate(lines) if line.startswith("Traceback (")]
        return lines[starts[-1] :] if starts else lines
    return []


def _kill(workers: list[_Worker]) -> None:
    """End the ranks that still run, with their child processes."""
    running = [worker for worker in workers if worker.process.poll() is None]
    for worker in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
    for worker in running:
        worker.process.wait()
