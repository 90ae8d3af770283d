"""Two real ranks of which one fails, dies, hangs or stops: all end soon, with the error of that one."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.ranks import Launch, Outcome, is_running
from torch_utils.motion import Motion
from torch_utils.watchdog import Beat, standstill

SCENARIOS = Path(__file__).with_name("rank_scenarios.py")
FAILURES = ("fail", "vanish", "hang", "freeze", "leave_early")
MUCH_LATER_S = 60  # what is promised for the default of 45 s; here ranks get 3 s


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Outcome]:
    """Return how launches end; they run at the same time, because they mostly wait."""
    folders = {name: tmp_path_factory.mktemp(name) for name in FAILURES}
    launches = {
        name: Launch(
            [sys.executable, str(SCENARIOS), name, str(folder)],
            environment={"SPHEREHEAD_PEER_TIMEOUT": "3", "OMP_NUM_THREADS": "1"},
        )
        for name, folder in folders.items()
    }
    try:
        ends = {name: one.finish(MUCH_LATER_S) for name, one in launches.items()}
    finally:
        for one in launches.values():
            one.kill()
    assert not is_running(int((folders["freeze"] / "pid").read_text()))
    return ends


def test_session_exception_on_a_rank_is_the_error_of_all(outcomes):
    outcome = outcomes["fail"]
    assert outcome.status == 1
    assert outcome.message == "Error: rank 1 of 2 failed: ValueError: the image a.png is broken"
    assert "[rank 1]" in outcome.err and "in fail" in outcome.err, "the traceback of rank 1 is shown"
    assert "rank 1 failed: ValueError: the image a.png is broken; rank 0 ends" in outcome.err


def test_session_rank_killed_in_a_collective_is_named(outcomes):
    outcome = outcomes["vanish"]
    assert outcome.status == 1
    assert outcome.message == "Error: rank 1 of 2 failed: killed by SIGKILL, perhaps for want of memory"


def test_session_hanging_rank_is_named_with_its_place(outcomes):
    outcome = outcomes["hang"]
    assert outcome.status == 1
    assert outcome.message.startswith("Error: no rank has moved for 3 s: rank 1 at rank_scenarios.py:")
    assert outcome.message.endswith("(hang)")


def test_session_stopped_rank_is_named(outcomes):
    outcome = outcomes["freeze"]
    assert outcome.status == 1
    assert outcome.message.startswith("Error: rank 1 has given no sign of life for ")
    assert "rank_scenarios.py:" in outcome.message


def test_init_rank_that_ends_without_shutdown_has_failed(outcomes):
    outcome = outcomes["leave_early"]
    assert outcome.status == 1
    assert outcome.message == "Error: rank 1 failed: the process ended before training did"


# What counts as hanging -----------------------------------------------------------------------------------------------


def beat(**changes) -> Beat:
    return Beat(**{"number": 1, "still_s": 50.0, "where": "at a.py:1 (f)", "waits": False, "task": "", **changes})


def test_standstill_all_still_and_one_waiting_names_the_others():
    waiting = beat(waits=True, where="waits at b.py:2 (g)")
    verdict = "no rank has moved for 50 s: rank 1 at a.py:1 (f)"
    assert standstill({0: waiting, 1: beat()}, 45, True) == verdict
    assert standstill({0: waiting, 1: beat(still_s=60.0)}, 45, True) == verdict


def test_standstill_all_waiting_names_all():
    waiting = {rank: beat(waits=True, where=f"waits at {rank}") for rank in range(6)}
    expected = "rank 0 waits at 0; rank 1 waits at 1; rank 2 waits at 2; rank 3 waits at 3 and 2 more"
    assert standstill(waiting, 45, True) == f"no rank has moved for 50 s: {expected}"


@pytest.mark.parametrize("changes", [{"still_s": 44.0}, {"task": "saving"}])
def test_standstill_one_that_moves_or_has_a_task_is_none(changes):
    assert standstill({0: beat(waits=True), 1: beat(**changes)}, 45, True) is None


def test_standstill_without_anyone_in_a_collective_depends_on_the_device():
    beats = {0: beat(), 1: beat()}
    assert standstill(beats, 45, counts_cpu=True) is None
    assert (
        standstill(beats, 45, counts_cpu=False)
        == "no rank has moved for 50 s: rank 0 at a.py:1 (f); rank 1 at a.py:1 (f)"
    )


# Motion ---------------------------------------------------------------------------------------------------------------

ONE_CALL_THAT_COMPUTES = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


def still_seconds(action: Callable[[list[Motion]], object]) -> tuple[float, float]:
    """Return for how long the main thread seems to stand still at the end of an action: on a CPU, and with a GPU."""
    motions, done = [Motion(counts_cpu, suspicious_s=0.3) for counts_cpu in (True, False)], threading.Event()

    def watch():
        while not done.wait(0.1):
            for motion in motions:
                motion.sample(0.1)
                motion.look_elsewhere()

    thread = threading.Thread(target=watch)
    thread.start()
    action(motions)
    still_s = motions[0].still_s, motions[1].still_s  # before what follows counts as motion
    done.set()
    thread.join()
    return still_s


def test_motion_main_thread_that_sleeps_stands_still(repo_root):
    # In a process of its own: what others left running in this one may compute, which is motion.
    code = "import time, tests.torch_utils.test_watchdog as t; print(*t.still_seconds(lambda _: time.sleep(1.2)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert min(map(float, result.stdout.split())) > 0.8


def test_motion_computing_counts_unless_there_is_a_gpu():
    def compute(_):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3 * 10**6)  # one call, without the lock, as in PyTorch

    with_cpu, with_gpu = still_seconds(compute)
    assert with_gpu > with_cpu + 0.2


def test_motion_changing_places_and_noted_progress_count():
    def go_on(motions):
        for _ in range(10):
            time.sleep(0.05)
            time.sleep(0.05)

    def note(motions):
        for _ in range(10):
            for motion in motions:
                motion.progress += 1
            time.sleep(0.1)

    assert max(still_seconds(go_on)) < 0.8
    assert max(still_seconds(note)) < 0.8


def test_motion_of_child_processes_counts():
    child = subprocess.Popen([sys.executable, "-c", ONE_CALL_THAT_COMPUTES])
    try:
        assert max(still_seconds(lambda _: time.sleep(2))) < 1.3
    finally:
        child.kill()
        child.wait()


def test_motion_where_names_the_line_that_uses_the_library():
    here, waits = Motion(True, 1.0).where()
    assert here.startswith("at test_watchdog.py:") and here.endswith(
        "(test_motion_where_names_the_line_that_uses_the_library)"
    )
    assert not waits
