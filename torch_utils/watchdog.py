"""Notice that another rank is dead or hangs, while this one is blocked in a collective.

A thread of each rank writes a sign of life (a *beat*) to the store through which the ranks found each other, and reads
those of others. It goes on while the main thread computes, so that slowness is no fault. A rank ends with a message

* when another one has left its error in the store,
* when another one has written no beat for `peer_timeout_s`: killed, stopped, its machine gone,
* when no rank has moved for that long, and some wait in a collective for the rest: a hanging rank,
* when the store does not answer, or the launcher is gone.

What *moving* is, `torch_utils.motion` says; a rank that has announced a long task counts as moving. So one rank may
work for minutes while others wait for it. Rank 0 reads all beats, other ranks only that of rank 0: the work grows
linearly with the number of ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch.distributed as dist

from torch_utils.failures import REPORT_VARIABLE, describe, give_way, report_text
from torch_utils.motion import Motion

_BEATS_PER_TIMEOUT = 20
_SAMPLES_PER_BEAT = 8
_MIN_BEAT_S, _MIN_SAMPLE_S = 0.25, 0.1  # more often, and the watchdog itself would look like work


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A sign of life."""

    number: int
    still_s: float
    """For how long the rank has not moved."""
    where: str
    """Where its main thread is."""
    waits: bool
    """Whether that is in a collective."""
    task: str
    """The long task that it has announced, or ''."""


class Watchdog:
    """Sends this rank's beats and looks at those of others; see the text of this module.

    Args:
        host, port: of the store.
        rank, ranks: this rank, and how many there are.
        device_type: `cpu` or `cuda`; a process that waits for a GPU spins, so that its computing time says nothing.
        peer_timeout_s: see above.
    """

    def __init__(self, host: str, port: int, rank: int, ranks: int, device_type: str, peer_timeout_s: float) -> None:
        self._address, self._rank, self._ranks = f"{host}:{port}", rank, ranks
        self._counts_cpu = device_type == "cpu"
        self._timeout_s = peer_timeout_s
        self._beat_s = max(peer_timeout_s / _BEATS_PER_TIMEOUT, _MIN_BEAT_S)
        store = dist.TCPStore(
            *(host, port, None, False), timeout=datetime.timedelta(seconds=300), wait_for_workers=False
        )  # a connection of its own: another one may be blocked
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self._store = dist.PrefixStore(f"watchdog/attempt{attempt}", store)
        self._motion = Motion(self._counts_cpu, peer_timeout_s / 2)
        self._number, self._task = 0, ""
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> number of its last beat, when it was new
        self._looked_at, self._unanswered_s = time.monotonic(), 0.0
        self._launcher = os.getppid() if _has_launcher() else None
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=run, name=run.__name__.strip("_"), daemon=True)
            for run in (self._watch_itself, self._watch_others)
        ]

    # For the main thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; hanging is not noticed before `note_joined`."""
        self._motion.is_exempt = True
        self._beat()
        for thread in self._threads:
            thread.start()

    def note_joined(self) -> None:
        """Say that all ranks have found each other."""
        self._motion.is_exempt = False

    def note_progress(self) -> None:
        """Say that the main thread gets on, though it may be at the same place whenever someone looks."""
        self._motion.progress += 1

    @contextlib.contextmanager
    def long_task(self, name: str) -> Iterator[None]:
        """Announce work during which this rank may be silent and still."""
        before, self._task = self._task, name
        self._beat()
        try:
            yield
        finally:
            self._motion.progress += 1
            self._task = before

    def halt(self) -> None:
        """Stop."""
        self._stop.set()
        for thread in self._threads:
            thread.join(self._beat_s)  # no longer, as one may wait for a store that does not answer

    def fail(self, error: BaseException | None) -> None:
        """Stop, and leave this rank's error for the others."""
        self.halt()
        with contextlib.suppress(RuntimeError):
            self._publish(f"rank {self._rank} failed: {describe(error)}")

    def wait_for_verdict(self) -> str | None:
        """Return which rank is at fault, after a connection broke; None if that cannot be found out soon.

        A few missing beats are enough then.
        """
        self.halt()
        deadline = time.monotonic() + 8 * self._beat_s
        while time.monotonic() < deadline:
            verdict = self._turn(is_connection_lost=True)
            if verdict is not None:
                return verdict
            time.sleep(self._beat_s / 4)
        return None

    # The threads ------------------------------------------------------------------------------------------------------

    def _watch_itself(self) -> None:
        interval_s = max(self._beat_s / _SAMPLES_PER_BEAT, _MIN_SAMPLE_S)
        while not self._stop.wait(interval_s):
            self._motion.sample(interval_s)
            self._unanswered_s += interval_s  # not by the clock, which goes on while this process is stopped
            if self._unanswered_s > self._timeout_s:
                self._end(f"the store at {self._address} has not answered for {self._timeout_s:.0f} s")

    def _watch_others(self) -> None:
        while not self._stop.wait(self._beat_s):
            self._motion.look_elsewhere()
            verdict = self._turn()
            self._unanswered_s = 0.0
            if verdict is not None and not self._stop.is_set():
                self._end(verdict)

    def _turn(self, is_connection_lost: bool = False) -> str | None:
        """Send a beat, look around, and return what makes it impossible to go on."""
        if self._launcher is not None and os.getppid() != self._launcher:
            return f"the launcher, process {self._launcher}, is gone"
        try:
            self._beat()
            if self._store.check(["verdict"]):
                return self._store.get("verdict").decode()
            verdict = self._look(is_connection_lost)
            return None if verdict is None else self._publish(verdict)
        except RuntimeError:
            return f"the connection to {self._address} is lost: rank 0, or the launcher of rank 0, is gone"

    def _beat(self) -> None:
        self._number += 1
        where, waits = self._motion.where()
        beat = Beat(number=self._number, still_s=self._motion.still_s, where=where, waits=waits, task=self._task)
        self._store.set(f"beat{self._rank}", json.dumps(asdict(beat)))

    def _publish(self, verdict: str) -> str:
        """Leave a verdict in the store, and return the one that was there first."""
        return self._store.compare_set("verdict", "", verdict).decode()

    def _look(self, is_connection_lost: bool) -> str | None:
        """Read beats; return a verdict if a rank is silent, or none moves.

        After a lost connection each rank looks at all others, a few missing beats are enough, and no task excuses.
        """
        looks_at_all = self._rank == 0 or is_connection_lost
        ranks = range(self._ranks) if looks_at_all else (0, self._rank)
        keys = [f"beat{rank}" for rank in ranks]
        if not self._store.check(keys):  # some have not begun yet
            return None
        beats = {rank: Beat(**json.loads(text)) for rank, text in zip(ranks, self._store.multi_get(keys))}
        longest_s = 3 * self._beat_s if is_connection_lost else self._timeout_s
        for rank, silent_s in self._silences(beats).items():
            if silent_s > longest_s and (is_connection_lost or not beats[rank].task):
                return f"rank {rank} has given no sign of life for {silent_s:.0f} s; last seen {beats[rank].where}"
        return standstill(beats, self._timeout_s, self._counts_cpu) if looks_at_all else None

    def _silences(self, beats: Mapping[int, Beat]) -> dict[int, float]:
        """Return for how many seconds each rank has sent nothing new."""
        now = time.monotonic()
        if now - self._looked_at > 4 * self._beat_s:  # this process did not run; it cannot tell who else did
            self._seen.clear()
        self._looked_at = now
        for rank, beat in beats.items():
            if rank not in self._seen or self._seen[rank][0] != beat.number:
                self._seen[rank] = (beat.number, now)
        return {rank: now - self._seen[rank][1] for rank in beats}

    def _end(self, verdict: str) -> None:
        """End the process, whose main thread may be blocked for good."""
        self._stop.set()
        report_text(verdict, self._rank, is_secondary=True)
        os.write(2, f"Error: {verdict}; rank {self._rank} ends\n".encode())
        give_way()
        os._exit(1)


def standstill(beats: Mapping[int, Beat], timeout_s: float, counts_cpu: bool) -> str | None:
    """Return a verdict if no rank has moved for `timeout_s`, and some wait for others; else None.

    Args:
        beats: of all ranks.
        timeout_s: for how long.
        counts_cpu: whether a rank that waits for others can be told by its place; not on a GPU, where it may be
            anywhere.
    """
    if any(beat.task or beat.still_s < timeout_s for beat in beats.values()):
        return None
    if counts_cpu and not any(beat.waits for beat in beats.values()):
        return None
    still_s = min(beat.still_s for beat in beats.values())
    stuck = [f"rank {rank} {beat.where}" for rank, beat in sorted(beats.items()) if not beat.waits]
    stuck = stuck or [f"rank {rank} {beat.where}" for rank, beat in sorted(beats.items())]
    more = f" and {len(stuck) - 4} more" if len(stuck) > 4 else ""
    return f"no rank has moved for {still_s:.0f} s: {'; '.join(stuck[:4])}{more}"


def _has_launcher() -> bool:
    return REPORT_VARIABLE in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
