"""Import packages that only some uses of the project need."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


class MissingExtraError(ImportError):
    """A package of an optional extra is not installed."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module, or say which extra brings it.

    Raises:
        MissingExtraError: the module's package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise MissingExtraError(
            f"this needs {package}, which is not installed; in the project's folder: pip install -e '.[{extra}]'"
        ) from None


def has_extra(module: str) -> bool:
    """Whether a module of an optional extra is installed; it is not imported."""
    return importlib.util.find_spec(module) is not None
