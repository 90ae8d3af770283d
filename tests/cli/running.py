"""Run the scripts of the repository's root, in this process or in one of their own."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import torch
from click.testing import CliRunner, Result

import calc_metrics
import convert_checkpoint
import demo
import gen_samples
import gen_videos
import gen_videos_interp
import projector
import train

REPO_ROOT = Path(__file__).resolve().parents[2]
COMMANDS: dict[str, click.Command] = {
    "demo.py": demo.demo,
    "gen_samples.py": gen_samples.generate_samples,
    "gen_videos.py": gen_videos.generate_videos,
    "gen_videos_interp.py": gen_videos_interp.generate_interpolations,
    "projector.py": projector.project,
    "convert_checkpoint.py": convert_checkpoint.convert,
    "train.py": train.train_command,
    "calc_metrics.py": calc_metrics.calc_metrics,
}
# click 8.1 joins the two streams unless told otherwise; later versions know no other way than apart.
_SEPARATE = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}


def invoke(script: str, *arguments: Any) -> Result:
    """Run a script in this process; faults of the program, which a script does not turn into a message, are raised."""
    result = CliRunner(**_SEPARATE).invoke(COMMANDS[script], [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(script: str, *arguments: Any) -> Result:
    """Run a script in this process, and check that it succeeds."""
    result = invoke(script, *arguments)
    assert result.exit_code == 0, result.stderr
    return result


def fail(script: str, *arguments: Any) -> str:
    """Run a script in this process, check that it fails with one line, and return that line.

    A usage error, which is one of the command line itself, has click's hint at the help text above it.
    """
    result = invoke(script, *arguments)
    assert result.exit_code != 0, result.stdout
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    if result.exit_code == click.UsageError.exit_code:
        assert lines[0].startswith("Usage: ")
        assert lines[1].startswith("Try ")
        lines = lines[2:]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


def start(arguments: list[Any], **options: Any) -> subprocess.Popen:
    """Start Python on arguments, such as a script and its own, as a process group at the repository's root."""
    # As many threads as here, because the order of sums may depend on it.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(REPO_ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=REPO_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Shells let background jobs ignore Ctrl-C, and children inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder by relative name, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
