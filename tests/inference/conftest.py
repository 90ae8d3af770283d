"""Networks that the tests of this folder share; none of the tests changes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from inference.loading import load_generator
from tests.helpers.threads import one_thread  # noqa: F401 (a fixture for every test)
from tests.inference.published_pickle import write_snapshot
from training.triplane import TriPlaneGenerator


@pytest.fixture(scope="session")
def generator() -> TriPlaneGenerator:
    """Return the `debug` preset at a neural rendering resolution of 8, which is fast."""
    network = load_generator("init:debug")
    network.neural_rendering_resolution = 8
    return network


@pytest.fixture(scope="session")
def snapshot_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a published SphereHead snapshot of a tiny generator with a parsing head."""
    path = tmp_path_factory.mktemp("snapshots") / "tiny sphere.pkl"
    write_snapshot(path)
    return path


@pytest.fixture(scope="session")
def parsing_generator(snapshot_path: Path) -> TriPlaneGenerator:
    """Return the generator of that snapshot."""
    network = load_generator(snapshot_path)
    network.neural_rendering_resolution = 8
    return network


@pytest.fixture(scope="session")
def frontal_generator(tmp_path_factory: pytest.TempPathFactory) -> TriPlaneGenerator:
    """Return a tiny EG3D generator."""
    path = tmp_path_factory.mktemp("snapshots") / "eg3d.pkl"
    write_snapshot(path, "eg3d")
    network = load_generator(path)
    network.neural_rendering_resolution = 8
    return network
