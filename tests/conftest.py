"""Set up the suite: where the reference data lie, and which marked tests can run here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Processes of `pytest -n` share the cores; PyTorch, in which each would otherwise take all, reads this when it starts.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _THREADS = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _THREADS)))

REPO_ROOT = Path(__file__).resolve().parents[1]
SHARED_DIR = REPO_ROOT.parent / "shared"  # specification fixtures and golden outputs, beside the checkout
NO_SHARED = f"needs the reference data in {SHARED_DIR}, which is absent"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--runslow``."""
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")


def _skip_reasons(config: pytest.Config) -> dict[str, str]:
    """Return the markers whose tests cannot run here, each with the reason."""
    reasons = {}
    if not config.getoption("--runslow"):
        reasons["slow"] = "slow; runs with --runslow"
    if not SHARED_DIR.is_dir():
        reasons["shared"] = NO_SHARED
    return reasons


def _has_cuda() -> bool:
    import torch  # heavy: imported only where a test marked gpu was collected

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the marked tests that cannot run here, each with a printed reason."""
    reasons = _skip_reasons(config)
    if any(item.get_closest_marker("gpu") for item in items) and not _has_cuda():
        reasons["gpu"] = "needs a CUDA device; torch.cuda.is_available() is false"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Return the root of the checkout."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Return the folder of reference data beside the checkout, or skip the test where there is none."""
    if not SHARED_DIR.is_dir():
        pytest.skip(NO_SHARED)
    return SHARED_DIR
