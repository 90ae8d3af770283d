"""Ranks are started with what they need, signals reach them, none survives, and the first failure is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPO_ROOT
from tests.helpers.ranks import Launch, is_running, wait_for
from torch_utils.launch import launch

# The ranks of these tests are small programs without PyTorch. Each writes its process id when ready.
READY = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(os.environ["FOLDER"])
def ready():
    (folder / f"pid{rank}.tmp").write_text(str(os.getpid()))
    os.replace(folder / f"pid{rank}.tmp", folder / f"pid{rank}")
"""
SLEEP = READY + "ready()\ntime.sleep(1000)"
STOP_ON_SIGNAL = f"""{READY}
def stop(number, frame):
    (folder / f"came{{rank}}").write_text(signal.Signals(number).name)
    sys.exit(0)
for number in {[int(signal.SIGTERM), int(signal.SIGINT), int(signal.SIGUSR1)]}:
    signal.signal(number, stop)
ready()
time.sleep(1000)
"""
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and parent-death signals")


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a launch whose ranks know the folder, and kill what is left at the end."""
    launches = []

    def begin(command, **options):
        launches.append(Launch(command, environment={"FOLDER": str(tmp_path)}, **options))
        return launches[-1]

    yield begin
    for one in launches:
        one.kill()


def wait_for_ranks(folder, one: Launch, ranks: int = 2) -> list[int]:
    """Wait until all ranks are ready; return their process ids."""
    wait_for(lambda: all((folder / f"pid{rank}").exists() for rank in range(ranks)), one)
    return [int((folder / f"pid{rank}").read_text()) for rank in range(ranks)]


# Starting -------------------------------------------------------------------------------------------------------------


def test_launch_ranks_get_what_torchrun_would_set_and_rank_0_is_shown(start, tmp_path):
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
    print_them = f"import json, os; print(json.dumps([os.environ[name] for name in {names}]))"
    outcome = start(print_them, processes=3, log_dir=tmp_path / "logs").finish()
    assert (outcome.status, outcome.err) == (0, "")
    others = [(tmp_path / "logs" / f"rank{rank}.log").read_text() for rank in (1, 2)]
    values = [json.loads(text) for text in (outcome.out, *others)]
    port, threads = values[0][-2:]
    assert values == [[str(rank), "3", str(rank), "3", "127.0.0.1", port, threads] for rank in range(3)]
    assert 1 <= int(port) <= 65535
    assert 1 <= int(threads) <= max(os.cpu_count() // 3, 1)


def test_launch_without_a_command_runs_that_of_this_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom torch_utils.launch import launch\n"
        "print(os.environ['RANK'], sys.argv[1:]) if 'RANK' in os.environ else launch(2)\n"
    )
    command = [sys.executable, "-W", "error", str(script), "a b", "--x"]
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0 ['a b', '--x']\n", "")


def test_launch_needs_no_torch():
    program = "import sys, torch_utils.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO_ROOT, timeout=60).returncode == 0


def test_launch_without_processes_raises():
    with pytest.raises(ValueError, match="processes: expected at least 1, came 0"):
        launch(0, ["true"])


def test_launch_within_a_rank_raises(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="expected one launcher, but this is rank 3 of another already"):
        launch(2, ["true"])


def test_launch_program_that_is_not_there_raises_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match="no-such-program"):
        launch(2, ["no-such-program"])
    assert not list(tmp_path.iterdir())


# Failures -------------------------------------------------------------------------------------------------------------


def test_launch_exception_on_a_rank_names_rank_and_error_and_shows_the_traceback(start, tmp_path):
    fail = "if rank == 1:\n    raise ValueError('the image a.png is broken')\ntime.sleep(0.5)"
    outcome = start(READY + fail, log_dir=tmp_path / "logs").finish()
    assert outcome.status == 1
    log = tmp_path / "logs" / "rank1.log"
    expected = "rank 1 of 2 failed: ValueError: the image a.png is broken (exit status 1)"
    assert outcome.message == f"Error: {expected}; see {log}"
    assert "[rank 1] Traceback (most recent call last):" in outcome.err


@linux_only
def test_launch_killed_rank_ends_all_with_their_children_and_is_named(start, tmp_path):
    """The children as those that load data, which may not notice."""
    child = "import subprocess\nif rank == 0:\n    child = subprocess.Popen(['sleep', '1000'])\n"
    program = f"{READY}{child}    (folder / 'child').write_text(str(child.pid))\nready()\ntime.sleep(1000)"
    one = start(program, processes=3)
    pids = wait_for_ranks(tmp_path, one, 3)
    pids.append(int((tmp_path / "child").read_text()))
    os.kill(pids[2], signal.SIGKILL)
    assert is_running(pids[0]) and is_running(pids[3])
    began = time.monotonic()
    outcome = one.finish()
    assert outcome.status == 1
    assert outcome.message == "Error: rank 2 of 3 failed: killed by SIGKILL, perhaps for want of memory"
    assert not any(map(is_running, pids))
    assert time.monotonic() - began < 30


def test_launch_rank_that_fails_silently_is_named_with_its_status(start):
    outcome = start("import os, sys; sys.exit(7 * int(os.environ['RANK']))").finish()
    assert outcome.message == "Error: rank 1 of 2 failed: it printed nothing (exit status 7)"


@pytest.mark.parametrize("first", [0, 1])
def test_launch_the_first_failure_is_told_not_those_that_follow(start, first):
    """Both leave reports: one its own error, the other, which ends earlier, that it lost the first."""
    program = f"""{READY}
from torch_utils.failures import report_text
report_text("ValueError: a" if rank == {first} else "connection closed by peer", rank, is_secondary=rank != {first})
time.sleep(0.5 if rank == {first} else 0)
sys.exit(1)
"""
    outcome = start(program).finish()
    assert outcome.message == f"Error: rank {first} of 2 failed: ValueError: a"


def test_launch_verdict_of_another_rank_is_told_as_it_is(start):
    program = f"""{READY}
from torch_utils.failures import report_text
if rank == 0:
    report_text("no rank has moved for 45 s: rank 1 at train.py:1 (main)", rank, is_secondary=True)
    sys.exit(1)
time.sleep(0.5)
"""
    assert start(program).finish().message == "Error: no rank has moved for 45 s: rank 1 at train.py:1 (main)"


# Signals and orphans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_launch_signal_reaches_all_ranks_and_a_clean_end_is_status_0(start, tmp_path, name):
    one = start(STOP_ON_SIGNAL)
    wait_for_ranks(tmp_path, one)
    one.process.send_signal(getattr(signal, name))
    outcome = one.finish()
    assert (outcome.status, outcome.err) == (0, "")
    assert [(tmp_path / f"came{rank}").read_text() for rank in (0, 1)] == [name, name]


def test_launch_signal_that_ends_the_ranks_at_once_is_told(start, tmp_path):
    one = start(SLEEP)
    wait_for_ranks(tmp_path, one)
    one.process.send_signal(signal.SIGTERM)
    outcome = one.finish()
    assert outcome.status == 1
    assert outcome.message in [f"Error: stopped by SIGTERM: rank {rank} ended before it could save" for rank in (0, 1)]


def test_launch_second_interrupt_kills_ranks_that_go_on(start, tmp_path):
    count = "signal.signal(signal.SIGINT, lambda *_: (folder / f'came{rank}').touch())\nready()\n"
    one = start(f"{READY}{count}while True:\n    time.sleep(1)")
    pids = wait_for_ranks(tmp_path, one)
    one.process.send_signal(signal.SIGINT)
    wait_for(lambda: all((tmp_path / f"came{rank}").exists() for rank in (0, 1)), one)
    assert all(map(is_running, pids))
    one.process.send_signal(signal.SIGINT)
    outcome = one.finish()
    assert outcome.status == 1
    assert "Error: stopped by SIGINT" in outcome.message
    assert not any(map(is_running, pids))


def test_launch_under_nohup_goes_on_without_a_terminal(start, tmp_path):
    one = start(STOP_ON_SIGNAL, ignored=[signal.SIGHUP])
    pids = wait_for_ranks(tmp_path, one)
    for pid in (one.process.pid, *pids):
        os.kill(pid, signal.SIGHUP)
    time.sleep(0.3)
    assert all(map(is_running, pids))
    one.process.send_signal(signal.SIGTERM)
    assert one.finish().status == 0


@linux_only
def test_launch_killed_launcher_leaves_no_rank(start, tmp_path):
    one = start(SLEEP)
    pids = wait_for_ranks(tmp_path, one)
    assert all(map(is_running, pids))
    one.process.kill()
    wait_for(lambda: not any(map(is_running, pids)), timeout_s=10)
