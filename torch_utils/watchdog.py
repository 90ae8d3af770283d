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
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch.distributed as dist

from torch_utils.failures import REPORT_VARIABLE, describe, report_text
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
        self._timeout_s = self._silence_s = peer_timeout_s
        self._beat_s = max(peer_timeout_s / _BEATS_PER_TIMEOUT, _MIN_BEAT_S)
        self._looks_at_all = rank == 0
        store = dist.TCPStore(
            *(host, port, None, False), timeout=datetime.timedelta(seconds=300), wait_for_workers=False
        )  # a connection of its own: another one may be blocked
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self._store = dist.PrefixStore(f"watchdog/attempt{attempt}", store)
        self._motion = Motion(self._counts_cpu, peer_timeout_s / 2)
        self._number, self._turns, self._task = 0, 0, ""
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> number of its last beat, when it was new
        self._looked_at = time.monotonic()
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

    def finish(self) -> None:
        """Stop, after all ranks have come to the end; rank 0, which may host the store, waits for the others."""
        self._halt()
        with contextlib.suppress(RuntimeError):
            self._store.add("finished", 1)
            deadline = time.monotonic() + 10
            while self._rank == 0 and self._store.add("finished", 0) < self._ranks and time.monotonic() < deadline:
                time.sleep(0.02)

    def fail(self, error: BaseException | None) -> None:
        """Stop, and leave this rank's error for the others."""
        self._halt()
        with contextlib.suppress(RuntimeError):
            self._publish(f"rank {self._rank} failed: {describe(error)}")

    def wait_for_verdict(self) -> str | None:
        """Return which rank is at fault, after a connection broke; None if that cannot be found out soon.

        A few missing beats are enough now.
        """
        self._halt()
        self._looks_at_all, self._silence_s = True, 3 * self._beat_s
        deadline = time.monotonic() + 8 * self._beat_s
        while time.monotonic() < deadline:
            verdict = self._turn()
            if verdict is not None:
                return verdict
            time.sleep(self._beat_s / 4)
        return None

    def _halt(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(self._beat_s)  # no longer, as one may wait for a store that does not answer

    # The threads ------------------------------------------------------------------------------------------------------

    def _watch_itself(self) -> None:
        interval_s = max(self._beat_s / _SAMPLES_PER_BEAT, _MIN_SAMPLE_S)
        turn, samples = 0, 0
        while not self._stop.wait(interval_s):
            self._motion.sample(interval_s)
            turn, samples = (turn, samples + 1) if turn == self._turns else (self._turns, 0)
            if samples * interval_s > self._timeout_s:
                self._end(f"the store at {self._address} has not answered for {self._timeout_s:.0f} s")

    def _watch_others(self) -> None:
        while not self._stop.wait(self._beat_s):
            self._motion.look_elsewhere()
            verdict = self._turn()
            self._turns += 1
            if verdict is not None and not self._stop.is_set():
                self._end(verdict)

    def _turn(self) -> str | None:
        """Send a beat, look around, and return what makes it impossible to go on."""
        if self._launcher is not None and os.getppid() != self._launcher:
            return f"the launcher, process {self._launcher}, is gone"
        try:
            self._beat()
            if self._store.check(["verdict"]):
                return self._store.get("verdict").decode()
            verdict = self._look()
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

    def _look(self) -> str | None:
        others = [rank for rank in range(self._ranks) if rank != self._rank] if self._looks_at_all else [0]
        keys = [f"beat{rank}" for rank in (*others, self._rank)]
        if not self._store.check(keys):  # some have not begun yet
            return None
        *beats, own = (Beat(**json.loads(text)) for text in self._store.multi_get(keys))
        now, by_rank = time.monotonic(), dict(zip(others, beats))
        if now - self._looked_at > 4 * self._beat_s:  # this process did not run; it cannot tell who else did
            self._seen.clear()
        self._looked_at = now
        for rank, beat in by_rank.items():
            if self._seen.get(rank, (-1, now))[0] != beat.number:
                self._seen[rank] = (beat.number, now)
        may_be_silent = self._silence_s == self._timeout_s
        for rank, beat in by_rank.items():
            silent_s = now - self._seen[rank][1]
            if silent_s > self._silence_s and not (beat.task and may_be_silent):
                return f"rank {rank} has given no sign of life for {silent_s:.0f} s; last seen {beat.where}"
        return self._standstill({**by_rank, self._rank: own}) if self._looks_at_all else None

    def _standstill(self, beats: dict[int, Beat]) -> str | None:
        """Return a verdict if no rank moves, and some wait for others."""
        if any(beat.task or beat.still_s < self._timeout_s for beat in beats.values()):
            return None
        if self._counts_cpu and not any(beat.waits for beat in beats.values()):
            return None
        still_s = min(beat.still_s for beat in beats.values())
        stuck = {rank: beat for rank, beat in sorted(beats.items()) if not beat.waits} or beats
        places = "; ".join(f"rank {rank} {beat.where}" for rank, beat in list(stuck.items())[:4])
        more = f" and {len(stuck) - 4} more" if len(stuck) > 4 else ""
        return f"no rank has moved for {still_s:.0f} s: {places}{more}"

    def _end(self, verdict: str) -> None:
        """End the process, whose main thread may be blocked for good."""
        report_text(verdict, self._rank, is_secondary=True)
        os.write(2, f"Error: {verdict}; rank {self._rank} ends\n".encode())
        os._exit(1)


def _has_launcher() -> bool:
    return REPORT_VARIABLE in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
