"""Helpers that know nothing of networks: files and URLs, JSON configuration, command lines. Never imports torch."""

from dnnlib import util
from dnnlib.util import EasyDict

__all__ = ["EasyDict", "util"]
