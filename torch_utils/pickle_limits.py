"""Errors and limits of reading a pickle: what may go wrong, and how much it may cost."""

from __future__ import annotations

from dataclasses import dataclass, fields


class PickleReadError(ValueError):
    """Say that a pickle was not read; the base of every error that reading a pickle raises."""


class UnsafePickleError(PickleReadError):
    """Say that a pickle uses a symbol or an opcode that is not allowed; the message names it."""


class CorruptPickleError(PickleReadError):
    """Say that data are truncated, malformed, larger than the limits, or no pickle at all."""


@dataclass(frozen=True, kw_only=True)
class PickleLimits:
    """Bound what reading one pickle may cost.

    The defaults leave room for the largest published snapshots (512 px with G, D and G_ema: about 1 GB, some 200
    thousand opcodes with those of the storages, 20 levels), and keep a hostile file to a few hundred MB beyond a small
    multiple of its own size.

    Raises:
        ValueError: a limit is not a positive integer.
    """

    max_bytes: int = 4 << 30
    """Size of the whole file, in bytes."""
    max_opcodes: int = 1_000_000
    """Number of opcodes, those of the tensor storages included. Bounds time (about 2 us each) and small objects."""
    max_depth: int = 200
    """Levels of containers within containers, and of modules within modules."""
    max_text_bytes: int = 16 << 20
    """Size of one text, in UTF-8 bytes. Python may hold it in four times as many."""
    max_names: int = 100_000
    """Modules plus tensors that `named_tensors` lists; shared submodules count once per path."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ValueError(f"PickleLimits.{field.name} must be a positive integer, got {value!r}")


class Budget:
    """Count down what is left of the limits, over a pickle and the pickles nested in it.

    Args:
        limits: the limits.
        num_bytes: size of the whole input in bytes. Tensors and arrays may together take twice as much: real data are
            copied out once (twice where protocol 2 stored bytes as text), while a storage that is referred to again
            and again would be copied each time.
    """

    def __init__(self, limits: PickleLimits, num_bytes: int) -> None:
        self.limits = limits
        self.opcodes_left = limits.max_opcodes
        self.bytes_left = 2 * num_bytes

    def spend_opcodes(self, count: int, source: str) -> None:
        """Take ``count`` from the budget of opcodes, for one opcode or for work that counts as much.

        Raises:
            CorruptPickleError: the budget does not hold as many.
        """
        self.opcodes_left -= count
        if self.opcodes_left < 0:
            raise CorruptPickleError(f"{source}: too large: more than {self.limits.max_opcodes} opcodes")

    def spend_bytes(self, num_bytes: int, source: str) -> None:
        """Take ``num_bytes`` from the budget before they are allocated.

        Raises:
            CorruptPickleError: the budget does not hold as much.
        """
        if num_bytes > self.bytes_left:
            raise CorruptPickleError(f"{source}: tensors and arrays claim more bytes than the file holds")
        self.bytes_left -= num_bytes


def show(value: object, max_length: int = 120) -> str:
    """Return ``repr(value)`` of a number or text from a file, cut to a length that fits a message."""
    if not isinstance(value, (str, bytes, int, float, type(None))):
        return f"a {type(value).__name__}"
    text = repr(value[:max_length] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= max_length else text[:max_length] + "..."
