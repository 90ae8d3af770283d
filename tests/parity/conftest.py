"""Fixtures of this folder."""

from tests.helpers.threads import one_thread  # noqa: F401 (a fixture for every test)
