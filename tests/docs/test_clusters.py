"""The batch script of docs/clusters.md starts ranks, passes signals on, and requeues; with stand-ins for SLURM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.docs.pages import REPO_ROOT

PAGE = REPO_ROOT / "docs" / "clusters.md"
# Starts two tasks, passes SIGUSR1 on to them, and ends with the highest status, as srun does.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
tasks = []
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
assert sys.argv[1] == "--kill-on-bad-exit=1"
for number in "01":
    environment = {{**os.environ, "SLURM_NTASKS": "2", "SLURM_PROCID": number, "SLURM_LOCALID": number}}
    tasks.append(subprocess.Popen(sys.argv[2:], env=environment))
sys.exit(max(abs(task.wait()) for task in tasks))
"""
# What a rank does: says who it is, and waits for SIGUSR1 unless told to end.
RANK = f"""#!{sys.executable}
import os, signal, sys, time
def stop(*_):
    sys.exit(0)
signal.signal(signal.SIGUSR1, stop)
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
sys.stdout.write(" ".join([*(os.environ[name] for name in names), *sys.argv[1:3]]) + "\\n")
sys.stdout.flush()
if "END" in os.environ:
    sys.exit(int(os.environ["END"]))
time.sleep(60)
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "scontrol $*"; fi
"""
RANKS = [f"{rank} {rank} 2 node7 24321 train.py --outdir" for rank in (0, 1)]


def start_batch_script(folder, **environment) -> subprocess.Popen:
    scripts = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(scripts) == 1
    for name, text in {"srun": SRUN, "python": RANK, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "job.sh").write_text(scripts[0])
    slurm = {"SLURM_JOB_ID": "1234321", "SLURM_JOB_NODELIST": "node[7-8]"}
    return subprocess.Popen(
        ["bash", str(folder / "job.sh")],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **slurm, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("status", [0, 3])
def test_batch_script_that_ends_by_itself_is_not_requeued(tmp_path, status):
    job = start_batch_script(tmp_path, END=str(status))
    out, _ = job.communicate(timeout=60)
    assert (job.returncode, sorted(out.splitlines())) == (status, RANKS)


def test_batch_script_near_the_time_limit_stops_the_ranks_and_requeues(tmp_path):
    job = start_batch_script(tmp_path)
    lines = [job.stdout.readline().strip() for _ in RANKS]
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=60)
    assert sorted(lines) == RANKS
    assert (job.returncode, out) == (0, "scontrol requeue 1234321\n")
