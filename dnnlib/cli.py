"""Build the command lines: parameter types, option groups that the scripts share, and one-line errors.

Option groups are factories of decorators and are always called: ``@network_option()``, ``@truncation_options(psi=1)``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from dnnlib.extras import MissingExtraError
from dnnlib.sources import DEMO_NAME, is_untrained

MAX_SEEDS = 1_000_000
MAX_SEED = 2**32 - 1  # the largest that numpy.random.RandomState takes
Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]


# ---------------------------------------------------------------------------------------------------------------------
# Parameter types


def parse_seeds(text: str) -> list[int]:
    """Parse a list of seeds and inclusive ranges; order and repetitions are kept.

    >>> parse_seeds("0-3,7")
    [0, 1, 2, 3, 7]

    Raises:
        ValueError: names the token that is not a seed or an ascending range, or that makes more than a million seeds.
    """
    seeds: list[int] = []
    for token in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", token)
        if match is None:
            raise ValueError(f"seeds: expected numbers and ranges such as 0-3,7; came {token!r} in {text[:80]!r}")
        first = int(match.group(1)[:20])  # 20 digits are too large already, and int() refuses thousands of them
        last = int(match.group(2)[:20]) if match.group(2) else first
        if last < first:
            raise ValueError(f"seeds: expected an ascending range, came {token!r}")
        if last > MAX_SEED:
            raise ValueError(f"seeds: expected seeds up to {MAX_SEED}, came {token[:40]!r}")
        if len(seeds) + last - first + 1 > MAX_SEEDS:
            raise ValueError(f"seeds: expected at most {MAX_SEEDS} seeds, came more with {token!r}")
        seeds.extend(range(first, last + 1))
    return seeds


class SeedList(click.ParamType):
    """Seeds such as ``0-3,7`` as a list of int; see :func:`parse_seeds`."""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Return the list; a list passes through."""
        if not isinstance(value, str):
            return list(value)
        try:
            return parse_seeds(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class FiniteFloat(click.FloatRange):
    """A float that is neither NaN nor infinite, optionally in a range; arguments as ``click.FloatRange``."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        with contextlib.suppress(TypeError, ValueError):
            if not math.isfinite(float(value)):
                self.fail(f"expected a finite number, came {value!r}", param, ctx)
        return super().convert(value, param, ctx)

    def _describe_range(self) -> str:
        return super()._describe_range() if (self.min, self.max) != (None, None) else "a number"


class FloatVector(click.ParamType):
    """Numbers such as ``0,0,0.2`` (commas or blanks between) as a tuple of float.

    Args:
        length: how many are expected.
    """

    name = "numbers"

    def __init__(self, length: int) -> None:
        self.length = length

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the tuple; a sequence of numbers passes through after the same checks."""
        tokens = re.split(r"\s*,\s*|\s+", value.strip()) if isinstance(value, str) else list(value)
        try:
            numbers = tuple(float(token) for token in tokens)
        except (TypeError, ValueError):
            self.fail(f"expected {self.length} numbers such as 0,0,0.2; came {value!r}", param, ctx)
        if len(numbers) != self.length or not all(map(math.isfinite, numbers)):
            self.fail(f"expected {self.length} finite numbers, came {value!r}", param, ctx)
        return numbers

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return what the help text shows, such as ``X,Y,Z``."""
        return ",".join("XYZ"[: self.length]) if self.length <= 3 else f"{self.length} NUMBERS"


class Grid(click.ParamType):
    """Columns and rows such as ``4x2`` as a tuple (columns, rows) of positive int; ``4,2`` means the same."""

    name = "grid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return the pair; a pair passes through."""
        if not isinstance(value, str):
            return tuple(value)
        match = re.fullmatch(r"\s*([1-9][0-9]{0,4})\s*[xX,]\s*([1-9][0-9]{0,4})\s*", value)
        if match is None:
            self.fail(f"expected COLUMNSxROWS such as 4x2, both at least 1; came {value!r}", param, ctx)
        return int(match.group(1)), int(match.group(2))

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return what the help text shows."""
        return "COLSxROWS"


class Device(click.ParamType):
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a string. Whether there is such a device is not checked here."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name in lower case."""
        name = str(value).strip().lower()
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name):
            self.fail(f"expected auto, cpu, cuda or cuda:N; came {value!r}", param, ctx)
        return name

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return what the help text shows."""
        return "auto|cpu|cuda[:N]"


class Suffix(click.Choice):
    """One of some file formats, with or without a leading dot, in any case; without the dot as a result."""

    name = "format"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the format in lower case."""
        return super().convert(str(value).lower().removeprefix("."), param, ctx)


VEC3 = FloatVector(3)
POSITIVE_INT = click.IntRange(min=1)
POSITIVE_FLOAT = FiniteFloat(min=0, min_open=True)


# ---------------------------------------------------------------------------------------------------------------------
# Options


class _Option(click.Option):
    """An option whose help line leaves out the snake_case spellings."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        opts, secondary = self.opts, self.secondary_opts
        self.opts, self.secondary_opts = _kebab_only(opts), _kebab_only(secondary)
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts, self.secondary_opts = opts, secondary


def _kebab_only(names: list[str]) -> list[str]:
    return [name for name in names if "_" not in name]


def option(*names: str, **attributes: Any) -> Decorator:
    """Declare an option as ``click.option`` does, and accept the snake_case spelling of every kebab-case flag too.

    ``option("--image-mode")`` also takes ``--image_mode``, as the published scripts spell it.

    Args:
        *names: flags, and optionally the parameter name, as for ``click.option``.
        **attributes: as for ``click.option``; ``show_default`` is on unless said otherwise.
    """
    aliases = []
    for name in names:
        alias = re.sub(r"(?<=\w)-(?=\w)", "_", name)
        if name.startswith("--") and alias not in (name, *names):
            aliases.append(alias)
    attributes.setdefault("show_default", True)
    return click.option(*names, *aliases, cls=_Option, **attributes)


def bool_option(*names: str, default: bool, **attributes: Any) -> Decorator:
    """Declare a yes/no option that takes an optional value: ``--shapes``, ``--shapes true``, ``--shapes=False``.

    The published scripts require the value.
    """
    return option(*names, type=click.BOOL, is_flag=False, flag_value=True, default=default, **attributes)


def group(*decorators: Decorator) -> Decorator:
    """Join decorators into one, the first being the first in the help text."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def network_option() -> Decorator:
    """Add ``--network`` (parameter ``network``: str), the bundled network unless given."""
    return option(
        "--network",
        default=DEMO_NAME,
        metavar="NETWORK",
        callback=_not_blank,
        help="Snapshot: a path, an http(s):// URL, hf://org/repo/file, demo for the bundled network, or init:PRESET "
        "for an untrained one. A URL may end in #sha256=<hex>.",
    )


def _not_blank(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not value.strip():
        raise click.BadParameter("expected a path, a URL, demo or init:PRESET; came nothing", ctx=ctx, param=param)
    return value


def warn_if_untrained(network: str) -> None:
    """Say on stderr that a network is an untrained preset, if it is one."""
    if is_untrained(network):
        click.echo(f"{network} is untrained: expect fog, not heads.", err=True)


def device_option() -> Decorator:
    """Add ``--device`` (parameter ``device``: str, one of auto, cpu, cuda, cuda:N)."""
    return option("--device", type=Device(), default="auto", help="Where to compute; auto takes a GPU if there is one.")


def renderer_option() -> Decorator:
    """Add ``--renderer`` (parameter ``renderer``: auto, fused or reference)."""
    return option(
        "--renderer",
        type=click.Choice(["auto", "fused", "reference"]),
        default="auto",
        help="Volume renderer: the fused op where there is one, that op or an error, or plain PyTorch.",
    )


def seeds_option(required: bool = True) -> Decorator:
    """Add ``--seeds`` (parameter ``seeds``: list of int, or None where not required and not given)."""
    return option("--seeds", type=SeedList(), required=required, help="Random seeds, such as 0-3,7.")


def truncation_options(psi: float = 1.0, cutoff: int = 14) -> Decorator:
    """Add ``--trunc`` (parameter ``truncation_psi``: float) and ``--trunc-cutoff`` (``truncation_cutoff``: int).

    Args:
        psi: default of ``--trunc``, also spelled ``--truncation`` and ``--truncation-psi``.
        cutoff: default of ``--trunc-cutoff``, also spelled ``--truncation-cutoff``.
    """
    return group(
        option(
            *("--trunc", "--truncation", "--truncation-psi", "truncation_psi"),
            type=FiniteFloat(),
            default=psi,
            help="Truncation psi; 1 is none.",
        ),
        option(
            *("--trunc-cutoff", "--truncation-cutoff", "truncation_cutoff"),
            type=click.IntRange(min=0),
            default=cutoff,
            help="How many w-layers are truncated, from the coarsest.",
        ),
    )


def reload_modules_option() -> Decorator:
    """Add ``--reload-modules``, which published commands give; it can only be true, and passes no parameter."""
    return bool_option(
        "--reload-modules",
        default=True,
        hidden=True,
        expose_value=False,
        callback=_require_reload,
    )


def _require_reload(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value:
        raise click.BadParameter("expected true: code stored in a network file is never run", ctx=ctx, param=param)


def noise_options() -> Decorator:
    """Add ``--noise-mode`` (parameter ``noise_mode``: const, random, none) and ``--noise-seed`` (``noise_seed``: int).

    Differs from the published code: the published scripts draw fresh noise for every image from an unseeded stream.
    """
    return group(
        option(
            "--noise-mode",
            type=click.Choice(["const", "random", "none"]),
            default="const",
            help="Layer noise: the stored one, fresh per image, or none.",
        ),
        option(
            "--noise-seed",
            type=click.IntRange(min=0, max=MAX_SEED),
            default=0,
            help="Seed of random layer noise and of ray jitter.",
        ),
    )


def output_options(required: bool = False, outdir_help: str = "Folder to write to, made if absent.") -> Decorator:
    """Add ``--outdir`` (parameter ``outdir``: Path or None), ``--overwrite`` and ``--dry-run`` (both bool).

    Args:
        required: whether ``--outdir`` must be given.
        outdir_help: help text of ``--outdir``, which says what None means.
    """
    return group(
        option("--outdir", type=click.Path(file_okay=False, path_type=Path), required=required, help=outdir_help),
        option("--overwrite", is_flag=True, help="Replace files that are there already."),
        option("--dry-run", is_flag=True, help="Print as JSON what would be done, and stop."),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Errors and output


class Interrupted(click.ClickException):
    """The user pressed Ctrl-C."""

    exit_code = 130


@contextlib.contextmanager
def cli_errors() -> Iterator[None]:
    """Turn errors that a user can cause into one-line click errors.

    A context manager, or a decorator below the command. These errors are ValueError, OSError (no such file, disk full,
    ...), running out of memory, and Ctrl-C. Other exceptions are faults of the program and keep their traceback;
    SPHEREHEAD_TRACEBACK=1 keeps it for all.

    Raises:
        click.ClickException: with the message on one line, chained to the original.
    """
    if threading.current_thread() is threading.main_thread():
        # How torchrun and batch systems stop a process: clean up as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except BrokenPipeError:  # click ends quietly where the reader of a pipe is gone
        raise
    except (ValueError, OSError, MissingExtraError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        converted = None if os.environ.get("SPHEREHEAD_TRACEBACK", "0") not in ("", "0") else _as_click(error)
        if converted is None:
            raise
        raise converted from error


def _as_click(error: BaseException) -> click.ClickException | None:
    """Return the click exception for an error that a user can cause, or None for a fault of the program."""
    if isinstance(error, click.exceptions.Exit | click.Abort):  # click's own ways to end, which are RuntimeErrors
        return None
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted")
    if _is_out_of_memory(error):
        return click.ClickException(f"out of memory: {_one_line(error)}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing {error.filename}" if error.filename else ""
        told = error.strerror not in (None, os.strerror(errno.ENOSPC))  # by who knows what could not be written
        return click.ClickException(f"no space left on the disk{where}" + (f": {_one_line(error)}" if told else ""))
    if isinstance(error, OSError) and error.filename is not None:
        return click.ClickException(f"{error.filename}: {error.strerror or type(error).__name__}")
    if isinstance(error, (ValueError, OSError, MissingExtraError)):
        return click.ClickException(_one_line(error))
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Recognise Python's MemoryError, and PyTorch's errors by name because this package does not import torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def print_dry_run(plan: dict[str, Any]) -> None:
    """Print ``plan`` to stdout as indented JSON; paths become strings, dataclasses objects, NumPy scalars numbers."""
    click.echo(json.dumps(plan, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return value.tolist()
    raise TypeError(f"plan: expected JSON, paths or dataclasses; came {type(value).__name__}")
