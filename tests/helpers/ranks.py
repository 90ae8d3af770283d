"""Start programs as several ranks, in a process that a test can send signals to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPO_ROOT

_LAUNCHER = """
import sys
from pathlib import Path
from torch_utils.launch import WorkerFailedError, launch
try:
    launch(int(sys.argv[1]), sys.argv[3:], log_dir=Path(sys.argv[2]) if sys.argv[2] else None)
except (ValueError, WorkerFailedError) as error:
    sys.exit(f"Error: {error}")
"""
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a launch ended."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The last line on stderr."""
        return self.err.strip().splitlines()[-1]


class Launch:
    """A running launcher with its ranks; the leader of a process group of its own.

    Args:
        command: program and arguments of every rank; a str is Python code.
        processes: how many ranks.
        log_dir: as for `torch_utils.launch.launch`.
        environment: variables to add.
        ignored: signals that the launcher ignores from its start on, as `nohup` has it.
    """

    def __init__(
        self,
        command: Sequence[str] | str,
        processes: int = 2,
        *,
        log_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
        ignored: Sequence[signal.Signals] = (),
    ) -> None:
        ranks = [sys.executable, "-c", command] if isinstance(command, str) else list(command)
        arguments = ["-c", _LAUNCHER, str(processes), "" if log_dir is None else str(log_dir), *ranks]
        self._start([sys.executable, *arguments], environment, ignored)

    def _start(
        self, command: Sequence[str], environment: Mapping[str, str] | None, ignored: Sequence[signal.Signals] = ()
    ) -> None:
        clean = {name: value for name, value in os.environ.items() if name not in _OF_TORCHRUN}
        self.process = subprocess.Popen(
            command,
            cwd=REPO_ROOT,
            env={**clean, "PYTHONPATH": str(REPO_ROOT), **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: _set_handlers(ignored),
        )

    def finish(self, timeout_s: float = 60) -> Outcome:
        """Wait for the end; whatever is left of it then is killed."""
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        finally:
            self.kill()
        return Outcome(status=self.process.returncode, out=out, err=err)

    def kill(self) -> None:
        """Kill the launcher, if it runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()


class Torchrun(Launch):
    """The same with torchrun."""

    def __init__(self, script: Sequence[str], environment: Mapping[str, str]) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        self._start([*torchrun, *script], environment)


def _set_handlers(ignored: Sequence[signal.Signals]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that runs the tests in the background ignores it
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def wait_for(condition: Callable[[], object], launch: Launch | None = None, timeout_s: float = 60) -> None:
    """Wait until a condition is met.

    Raises:
        AssertionError: that took too long, or the launcher ended first.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if launch is not None and launch.process.poll() is not None and not condition():
            raise AssertionError(f"ended early: {launch.finish()}")
        if time.monotonic() > deadline:
            raise AssertionError("waited for too long")
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Return whether a process exists and is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
