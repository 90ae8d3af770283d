"""Errors of ranks, and how they travel: to the other ranks, to the launcher, to the user."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

REPORT_VARIABLE = "SPHEREHEAD_ERROR_FILE"  # where torch_utils.launch wants to find a rank's error
INTERRUPTED = "interrupted"
_HEAD_START_S = 2.0  # torchrun compares whole seconds
_LOST_CONNECTION = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")


class PeerFailedError(RuntimeError, OSError):
    """Another rank failed, and this one cannot go on; the message is that rank's error. Scripts show it as one line."""


@dataclass(frozen=True, kw_only=True)
class FailureReport:
    """What a rank leaves behind about its error."""

    rank: int
    text: str
    """One line."""
    is_secondary: bool = False
    """Whether it only failed because another rank had failed before."""


def describe(error: BaseException | None) -> str:
    """Return an error as one line; None is a process that ended early without one."""
    if error is None:
        return "the process ended before training did"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit):
        return f"exit with status {error.code!r}"
    text = error.format_message() if hasattr(error, "format_message") else str(error)  # the former are click's
    text = " ".join(text.split())
    if hasattr(error, "format_message") or isinstance(error, PeerFailedError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_clean_exit(error: BaseException) -> bool:
    """Return whether an exception ends the process with status 0: `sys.exit(0)`, or click's way to do so."""
    if isinstance(error, SystemExit):
        return error.code in (None, 0)
    return getattr(error, "exit_code", None) == 0


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error is what a collective raises when another rank is gone."""
    if isinstance(error, PeerFailedError):
        return True
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return type(error) is RuntimeError and any(sign in str(error) for sign in _LOST_CONNECTION)


def report(error: BaseException, rank: int, *, is_secondary: bool) -> None:
    """Leave an error for the launcher, if there is one that asks for it: ours, or torchrun."""
    if os.environ.get(REPORT_VARIABLE):
        report_text(describe(error), rank, is_secondary=is_secondary)
    elif os.environ.get("TORCHELASTIC_ERROR_FILE") and not is_secondary and isinstance(error, Exception):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with contextlib.suppress(Exception):  # what is at stake is only how torchrun shows the error
            get_error_handler().record_exception(error)


def report_text(text: str, rank: int, *, is_secondary: bool) -> None:
    """Leave a line for the launcher; the first one stays."""
    path = os.environ.get(REPORT_VARIABLE)
    if not path or os.path.exists(path):
        return
    content = json.dumps(asdict(FailureReport(rank=rank, text=text, is_secondary=is_secondary)))
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself
        Path(path + ".tmp").write_text(content, encoding="utf-8")
        os.replace(path + ".tmp", path)


def give_way() -> None:
    """Wait a moment before ending because of another rank's error; torchrun blames the rank that it sees end first."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(_HEAD_START_S)


def read_report(path: Path) -> FailureReport | None:
    """Return what a rank left, or None."""
    try:
        return FailureReport(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
