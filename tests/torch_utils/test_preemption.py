"""Signals are noted, and all processes agree on the step after which they stop."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from torch_utils.preemption import SignalWatch

WATCHED = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
TWO_PROCESSES = """
import os, signal, sys
import torch
import torch.distributed as dist
from torch_utils.preemption import SignalWatch

torch.set_num_threads(1)
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
with SignalWatch() as watch:
    for step in range(1000):
        if rank == 1 and step == 7:
            os.kill(os.getpid(), signal.SIGUSR1)
        if watch.any_rank_requested():
            break
    print(step, watch.requested, watch.reason)
dist.destroy_process_group()  # or threads of the group may still run when Python ends, which aborts it
"""


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers():
    """Check that every test leaves the handlers of signals as they were."""
    before = [signal.getsignal(number) for number in WATCHED]
    yield before
    assert [signal.getsignal(number) for number in WATCHED] == before


def test_without_a_signal_nothing_is_requested():
    with SignalWatch() as watch:
        assert not watch.requested and watch.reason is None
        assert not watch.any_rank_requested()


@pytest.mark.parametrize("number", WATCHED)
def test_first_signal_is_noted_and_does_not_interrupt(number):
    with SignalWatch() as watch:
        send(number)
        assert watch.requested and watch.any_rank_requested()
        assert watch.reason == number.name
    assert watch.requested  # also after the end


def test_second_interrupt_is_immediate():
    with pytest.raises(KeyboardInterrupt), SignalWatch():
        send(signal.SIGINT)
        send(signal.SIGINT)


def test_interrupt_after_another_signal_is_graceful_once():
    with pytest.raises(KeyboardInterrupt), SignalWatch() as watch:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert watch.requested
        send(signal.SIGINT)


def test_repeated_warnings_stay_graceful_and_the_first_is_the_reason():
    with SignalWatch() as watch:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            send(number)
        assert watch.reason == "SIGUSR1"


def test_handlers_come_back_after_an_exception():
    with pytest.raises(RuntimeError), SignalWatch():
        raise RuntimeError  # the fixture compares


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system lacks")
@pytest.mark.parametrize("number", WATCHED)
def test_forked_child_dies_of_a_signal_as_usual(number):
    with SignalWatch() as watch:
        pid = os.fork()
        if pid == 0:
            try:
                signal.pause()
            finally:
                os._exit(3)
        time.sleep(0.05)  # the handler is inherited; only pause() should have begun
        os.kill(pid, number)
        assert os.waitpid(pid, 0)[1] == number
        assert not watch.requested


def test_outside_the_main_thread_raises():
    errors = []

    def watch():
        try:
            SignalWatch().__enter__()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


def test_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path, repo_root):
    command = [sys.executable, "-c", TWO_PROCESSES]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], cwd=repo_root, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == ["7 True a signal to another process\n", "7 True SIGUSR1\n"]
