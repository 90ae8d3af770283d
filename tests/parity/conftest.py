"""Fixtures of this folder."""

from collections.abc import Iterator

import pytest

from tests.helpers.threads import one_thread  # noqa: F401 (a fixture for every test)
from torch_utils import native


@pytest.fixture(scope="module", params=["native kernels", "plain PyTorch"])
def kernels(request) -> Iterator[str]:
    """Run a module with the native kernels of this machine, and once more without."""
    if request.param == "plain PyTorch":
        with native.disabled():
            yield request.param
    elif native.load() is None:
        pytest.skip(f"no native kernels: {native.reason()}")
    else:
        yield request.param
