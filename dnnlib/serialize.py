"""Turn configuration dataclasses into JSON and back, strictly: what does not fit is an error that names its place.

Understood annotations: bool, int, float, str, None, ``Literal``, unions, ``tuple[X, ...]``, ``tuple[X, Y]``,
``list[X]``, ``dict[str, X]``, :data:`JSON`, and dataclasses of these.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import reprlib
import types
import typing
from typing import Any, Literal, TypeAlias, TypeVar, Union

JSON: TypeAlias = Any  # any JSON value, checked at run time: null, bool, number, string, list, or dict with string keys
Config = TypeVar("Config")
ABSENT = "absent"
"""Key of a field's metadata: the JSON value that is meant by files which are older than the field."""


def to_json(config: Any, where: str = "config") -> dict[str, Any]:
    """Return a dataclass instance as plain JSON data, nested dataclasses as nested dicts.

    Args:
        config: instance of a dataclass.
        where: name for the whole in error messages.

    Returns:
        A dict with one entry per field, for which ``from_json(type(config), to_json(config)) == config``.

    Raises:
        TypeError: ``config`` is not a dataclass instance.
        ValueError: a value is not what its annotation says; the message names the dotted path. Also where JSON cannot
            tell the value from another one, such as a tuple in a field of :data:`JSON`.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"{where}: expected an instance of a dataclass, came {_came(config)}")
    # Reading back checks every value, and makes an int that stands for a float a float.
    read_back = from_json(type(config), _encode(config), where)
    if read_back != config:
        raise ValueError(f"{where}: expected a value equal to what its JSON reads as, {read_back}; came {config}")
    return _encode(read_back)


def from_json(cls: type[Config], data: JSON, where: str = "config") -> Config:
    """Build a dataclass from JSON data, checking every key and every type.

    Every field must be there, also one with a default: a file then means the same when a default changes. Only fields
    whose metadata have `ABSENT` may be left out. An int is accepted for a float, a bool is not accepted for an int.

    Args:
        cls: dataclass to build.
        data: what ``json.load`` returned.
        where: name for the whole in error messages.

    Returns:
        An instance of ``cls``.

    Raises:
        TypeError: ``cls`` is not a dataclass, or has an annotation that is not understood.
        ValueError: an unknown or missing key, a wrong type, a value outside a Literal, or a number that is not finite;
            the message names the dotted path, what was expected and what came.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{where}: expected a dataclass to build, came {cls!r}")
    return _decode(cls, data, where)


def dumps(config: Any, indent: int | None = None) -> str:
    """Return a dataclass instance as JSON text; raises as :func:`to_json`."""
    return json.dumps(to_json(config), indent=indent, allow_nan=False)


def loads(cls: type[Config], text: str | bytes, where: str = "config") -> Config:
    """Build a dataclass from JSON text; raises as :func:`from_json`, and ValueError for text that is no strict JSON."""
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError(f"{where}: expected JSON of reasonable depth, came one nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: expected JSON, came text that is not: {error}") from error
    return from_json(cls, data, where)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return result


def _encode(value: Any) -> Any:
    """Replace dataclasses by dicts and tuples by lists; everything else stays, and is checked on reading back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    return value


def _decode(expected: Any, value: Any, where: str) -> Any:
    """Return ``value`` as the annotation ``expected`` has it, or raise ValueError naming ``where``."""
    origin = typing.get_origin(expected)
    if expected is Any:
        return _decode_any(value, where)
    if origin in (Union, types.UnionType):
        return _decode_union(expected, value, where)
    if not _fits(expected, value):
        raise _mismatch(expected, value, where)
    if dataclasses.is_dataclass(expected):
        return _decode_dataclass(expected, value, where)
    if origin is tuple:
        return _decode_tuple(expected, value, where)
    if origin is list:
        (item_type,) = typing.get_args(expected)
        return [_decode(item_type, item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        _check_keys_are_str(value, where)
        return {key: _decode(typing.get_args(expected)[1], item, f"{where}.{key}") for key, item in value.items()}
    return float(value) if expected is float else value


def _fits(expected: Any, value: Any) -> bool:
    """Say whether the JSON kind of ``value`` (scalar, list, object) can be what ``expected`` asks for."""
    origin = typing.get_origin(expected)
    if dataclasses.is_dataclass(expected) or origin is dict:
        return isinstance(value, dict)
    if origin in (tuple, list):
        return isinstance(value, (list, tuple))
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(expected))
    if expected is None or expected is types.NoneType:
        return value is None
    if expected is float:
        return type(value) in (int, float) and _is_finite(value)
    if expected in (bool, int, str):
        return type(value) is expected
    raise TypeError(f"annotation {expected!r} is not understood; expected one of those listed in dnnlib.serialize")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def _decode_union(expected: Any, value: Any, where: str) -> Any:
    """Decode by the members that ``value`` can be: an exact scalar type before a converting one, then in order."""
    members = typing.get_args(expected)
    if Any in members:
        return _decode_any(value, where)
    fitting = sorted((member for member in members if _fits(member, value)), key=lambda member: member is float)
    if not fitting:
        raise _mismatch(expected, value, where)
    if len(fitting) == 1:  # its own message names the place more precisely
        return _decode(fitting[0], value, where)
    for member in fitting:
        try:
            return _decode(member, value, where)
        except ValueError:
            continue
    raise _mismatch(expected, value, where)


def _decode_dataclass(cls: Any, data: dict[str, Any], where: str) -> Any:
    expected = _field_types(cls)
    for key, value in data.items():
        if key not in expected:
            raise ValueError(f"{where}.{key}: unknown key; expected only {', '.join(expected)}; came {_came(value)}")
    data = {**_absent_values(cls), **data}
    for name, annotation in expected.items():
        if name not in data:
            raise ValueError(f"{where}.{name}: missing key; expected {_describe(annotation)}, came nothing")
    arguments = {name: _decode(annotation, data[name], f"{where}.{name}") for name, annotation in expected.items()}
    try:
        return cls(**arguments)
    except ValueError as error:  # from __post_init__, which does not know where it stands
        raise ValueError(f"{where}: {error}") from error


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    """Return name -> resolved annotation of the fields that the constructor takes."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


@functools.cache
def _absent_values(cls: type) -> dict[str, Any]:
    return {field.name: field.metadata[ABSENT] for field in dataclasses.fields(cls) if ABSENT in field.metadata}


def _decode_tuple(expected: Any, value: Any, where: str) -> tuple[Any, ...]:
    item_types = typing.get_args(expected)
    if len(item_types) == 2 and item_types[1] is Ellipsis:
        item_types = (item_types[0],) * len(value)
    elif len(value) != len(item_types):
        raise ValueError(f"{where}: expected {len(item_types)} items, came {len(value)}: {reprlib.repr(value)}")
    return tuple(
        _decode(item_type, item, f"{where}[{index}]")
        for index, (item_type, item) in enumerate(zip(item_types, value, strict=True))
    )


def _decode_any(value: Any, where: str) -> Any:
    """Check that ``value`` is JSON through and through, and return it."""
    if isinstance(value, dict):
        _check_keys_are_str(value, where)
        return {key: _decode_any(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_decode_any(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if type(value) not in (bool, int, float, str, types.NoneType) or (type(value) is float and not _is_finite(value)):
        raise _mismatch(Any, value, where)
    return value


def _check_keys_are_str(data: dict[Any, Any], where: str) -> None:
    for key in data:
        if type(key) is not str:
            raise ValueError(f"{where}: expected string keys, came {_came(key)}")


def _mismatch(expected: Any, value: Any, where: str) -> ValueError:
    return ValueError(f"{where}: expected {_describe(expected)}, came {_came(value)}")


def _came(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"


def _describe(expected: Any) -> str:
    """Return an annotation in words."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return "a JSON value"
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(repr(choice) for choice in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} ({', '.join(map(_describe, arguments))})"
    if origin in (tuple, list):
        return f"a list of {_describe(arguments[0])}"
    if origin is dict:
        return f"an object of {_describe(arguments[1])}"
    if dataclasses.is_dataclass(expected):
        return f"an object ({expected.__name__})"
    names = {None: "null", types.NoneType: "null", float: "a finite float"}
    return names.get(expected) or expected.__name__
