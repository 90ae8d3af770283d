"""Networks that the tests of this folder give to the scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from inference.loading import load_generator
from tests.helpers.threads import one_thread  # noqa: F401 (a fixture for every test)
from tests.inference.published_pickle import write_snapshot
from training.snapshots import save_networks


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the networks below."""
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="session")
def sphere_pickle(networks: Path) -> Path:
    """Return a published SphereHead snapshot of a tiny generator, with a parsing head and strong layer noise."""
    path = networks / "sphere.pkl"
    write_snapshot(path)
    return path


@pytest.fixture(scope="session")
def solid_network(networks: Path) -> Path:
    """Return a network that fills its box with matter."""
    generator = load_generator("init:debug")
    generator.decoder.net[-1].bias[0] += 1000
    path = networks / "solid.safetensors"
    save_networks(path, {"G_ema": generator}, {})
    return path


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
