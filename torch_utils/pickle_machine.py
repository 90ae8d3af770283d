"""Interpret the opcodes of a pickle without calling anything that the pickle names.

A pickle is a program for a small stack machine. The machine of the standard library imports and calls whatever the
program asks for; this one has no such instruction. It knows the opcodes that `pickle` writes for protocols 2 to 4,
builds plain containers, numbers, text and bytes itself, and hands every name to a table of `Symbol` entries. Only the
functions in that table, which are this project's own, ever run.

What this rules out by construction:

* Any opcode outside `_ACTIONS` (PERSID, EXT1, INST, OBJ, BYTEARRAY8, NEXT_BUFFER, DUP, text-mode numbers ...) is
  refused before its argument is read.
* Names are exact keys of a table: no import, no attribute walk, so ``os`` or ``load.__globals__`` lead nowhere. A name
  outside the table is refused as soon as it is pushed, whether or not it is called.
* BUILD sets no attributes: it acts only where the dialect says so.
* The memo is a dict, so a huge memo index costs one entry. Lengths are compared with the bytes that are really there
  before anything is allocated.
* Dict keys and set items are text, bytes or 64-bit integers. Nested tuples would be hashed recursively, and chosen
  large integers all collide.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch_utils.pickle_limits import Budget, CorruptPickleError, PickleReadError, UnsafePickleError, show


@dataclass(frozen=True)
class Symbol:
    """Stand for a name that a pickle may use. What it stands for is never imported.

    Args:
        module: module part of the name.
        name: attribute part of the name.
        reduce: function that REDUCE runs instead of the named one, on the tuple of arguments; None: not callable.
        create: function that NEWOBJ runs instead of the named class; None: no class.
        takes_view: a long byte string pushed right after this symbol is its argument, and arrives as a `ByteView`.
    """

    module: str
    name: str
    reduce: Callable[[tuple], object] | None = None
    create: Callable[[], object] | None = None
    takes_view: bool = False

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class ByteView:
    """Hold a byte string as a window on the input, so that a storage of 100 MB is not copied to be parsed."""

    view: memoryview


@dataclass(frozen=True)
class Dialect:
    """Say what the names, BUILD and persistent ids of a kind of pickle mean.

    Args:
        symbols: allowed names, keyed by (module, name).
        apply_state: what BUILD does with (object, state); it raises a `PickleReadError` for objects without a state.
        load_persistent: what BINPERSID makes of the id; None: not allowed.
    """

    symbols: Mapping[tuple[str, str], Symbol]
    apply_state: Callable[[object, object], None] | None = None
    load_persistent: Callable[[object], object] | None = None


class PickleMachine:
    """Run one pickle out of a buffer.

    Args:
        data: the bytes, one-dimensional, of format ``B``.
        dialect: what names mean.
        budget: limits, shared with nested pickles.
        source: how messages call the data.
        start: offset of the pickle in ``data``, in bytes.
    """

    def __init__(self, data: memoryview, dialect: Dialect, budget: Budget, source: str, start: int = 0) -> None:
        self.position = start
        self._data = data
        self._dialect = dialect
        self._budget = budget
        self._source = source
        self._opcode_position = start
        self._memo: dict[int, object] = {}
        self._stack: list = []
        self._stacks_below: list[list] = []  # one per open MARK: a stack is cut off there, so nothing pops through it

    def run(self) -> object:
        """Run up to STOP and return the value; `position` is then the offset of the byte after it.

        Raises:
            UnsafePickleError: a symbol or opcode that is not allowed.
            CorruptPickleError: malformed or truncated data, or more than the limits allow.
        """
        while True:
            self._budget.spend_opcodes(1, self._source)
            self._opcode_position = self.position
            code = self._take(1)[0]
            if code == _STOP:
                return self._result()
            action = _ACTIONS.get(code)
            if action is None:
                raise self._refused(code)
            action(self)

    def _result(self) -> object:
        if len(self._stack) != 1 or self._stacks_below:
            raise self._corrupt("the pickle stops with unfinished values on its stack")
        return self._stack.pop()

    # Errors.

    def _where(self) -> str:
        position = self._opcode_position
        name = _OPCODE_NAMES.get(self._data[position]) if position < len(self._data) else None
        return f" (opcode {name} at byte {position})" if name else f" (at byte {position})"

    def _corrupt(self, message: str) -> CorruptPickleError:
        return CorruptPickleError(f"{self._source}: {message}{self._where()}")

    def _unsafe(self, message: str) -> UnsafePickleError:
        return UnsafePickleError(f"{self._source}: {message}{self._where()}")

    def _refused(self, code: int) -> PickleReadError:
        if code not in _OPCODE_NAMES:
            return self._corrupt(f"byte 0x{code:02x} is not a pickle opcode")
        return self._unsafe(f"pickle opcode {_OPCODE_NAMES[code]} is not one that published snapshots use")

    # Reading and the stack.

    def _take(self, num_bytes: int) -> memoryview:
        end = self.position + num_bytes
        if end > len(self._data):
            left = len(self._data) - self.position
            raise self._corrupt(f"the data end early: {num_bytes} bytes expected, {left} left; truncated?")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def _number(self, layout: struct.Struct) -> int | float:
        return layout.unpack(self._take(layout.size))[0]

    def _line(self) -> str:
        window = bytes(self._data[self.position : self.position + _MAX_LINE_BYTES])
        line, newline, _ = window.partition(b"\n")
        if not newline:
            raise self._corrupt(f"no end of line within {_MAX_LINE_BYTES} bytes")
        self.position += len(line) + 1
        return self._decode(line)

    def _decode(self, raw: bytes | memoryview) -> str:
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise self._corrupt(f"text is not valid UTF-8: {error.reason}") from None

    def _pop(self) -> object:
        if not self._stack:
            raise self._corrupt("the stack is empty where a value is needed")
        return self._stack.pop()

    def _top(self, kind: type) -> object:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise self._corrupt(f"there is no {kind.__name__} on the stack to add to")
        return self._stack[-1]

    def _pop_to_mark(self) -> list:
        if not self._stacks_below:
            raise self._corrupt("a MARK is missing")
        items = self._stack
        self._stack = self._stacks_below.pop()
        return items

    def _check_keys(self, keys: list) -> None:
        for key in keys:
            if not is_key(key):
                raise self._corrupt(f"{show(key)} cannot be a dict key or set item here")

    # Actions that push a value.

    def _push_text(self, layout: struct.Struct) -> None:
        num_bytes, limit = self._number(layout), self._budget.limits.max_text_bytes
        if num_bytes > limit:
            raise self._corrupt(f"a text of {num_bytes} bytes, at most {limit} are allowed")
        self._stack.append(self._decode(self._take(num_bytes)))

    def _push_bytes(self, layout: struct.Struct) -> None:
        view = self._take(self._number(layout))
        below = self._stack[-1] if self._stack else None
        wants_view = isinstance(below, Symbol) and below.takes_view
        self._stack.append(ByteView(view) if wants_view else bytes(view))

    def _push_long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(_UINT1)), "little", signed=True))

    def _push_symbol(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise self._corrupt("a symbol needs two texts, module and name")
        symbol = self._dialect.symbols.get((module, name))
        if symbol is None:
            raise self._unsafe(
                f"symbol {show(f'{module}.{name}')} is not on the list of those that published snapshots use; "
                "nothing was run"
            )
        self._stack.append(symbol)

    def _push_global(self) -> None:
        module = self._line()
        self._push_symbol(module, self._line())

    def _push_stack_global(self) -> None:
        name = self._pop()
        self._push_symbol(self._pop(), name)

    # Actions that build.

    def _check_protocol(self) -> None:
        protocol = self._number(_UINT1)
        if not 2 <= protocol <= 5:
            raise self._corrupt(f"pickle protocol {protocol}, expected 2 to 5")

    def _check_frame(self) -> None:
        num_bytes = self._number(_UINT8)
        if num_bytes > len(self._data) - self.position:
            raise self._corrupt(f"a frame of {num_bytes} bytes reaches beyond the end of the data; truncated?")

    def _mark(self) -> None:
        if len(self._stacks_below) >= self._budget.limits.max_depth:
            raise self._corrupt(f"nested more than {self._budget.limits.max_depth} levels deep")
        self._stacks_below.append(self._stack)
        self._stack = []

    def _tuple(self, length: int) -> None:
        items = [self._pop() for _ in range(length)]
        self._stack.append(tuple(reversed(items)))

    def _tuple_from_mark(self) -> None:
        items = self._pop_to_mark()
        self._stack.append(tuple(items))

    def _append(self) -> None:
        item = self._pop()
        self._top(list).append(item)

    def _appends(self) -> None:
        items = self._pop_to_mark()
        self._top(list).extend(items)

    def _add_items(self) -> None:
        items = self._pop_to_mark()
        self._check_keys(items)
        self._top(set).update(items)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._check_keys([key])
        self._top(dict)[key] = value

    def _set_items(self) -> None:
        items = self._pop_to_mark()
        if len(items) % 2:
            raise self._corrupt("a dict key has no value")
        self._check_keys(items[::2])
        self._top(dict).update(zip(items[::2], items[1::2]))

    # The memo.

    def _put(self, layout: struct.Struct | None) -> None:
        index = len(self._memo) if layout is None else self._number(layout)
        if not self._stack:
            raise self._corrupt("the stack is empty where a value is to be remembered")
        self._memo[index] = self._stack[-1]

    def _get(self, layout: struct.Struct) -> None:
        index = self._number(layout)
        if index not in self._memo:
            raise self._corrupt(f"memo entry {index} is used before it is set")
        self._stack.append(self._memo[index])

    # Actions that consult the dialect.

    def _call(self) -> None:
        arguments, symbol = self._pop(), self._pop()
        if type(symbol) is not Symbol or type(arguments) is not tuple:
            raise self._corrupt("a call needs a symbol and a tuple of arguments")
        if symbol.reduce is None:
            raise self._unsafe(f"symbol '{symbol}' may not be called")
        self._stack.append(symbol.reduce(arguments))

    def _new_object(self) -> None:
        arguments, symbol = self._pop(), self._pop()
        if type(symbol) is not Symbol or symbol.create is None:
            raise self._unsafe(f"{f'symbol {str(symbol)!r}' if type(symbol) is Symbol else 'a value'} is not a class")
        if type(arguments) is not tuple or arguments:
            raise self._corrupt(f"an object of class {symbol} takes no arguments")
        self._stack.append(symbol.create())

    def _apply_state(self) -> None:
        state = self._pop()
        if not self._stack:
            raise self._corrupt("the stack is empty where an object is needed")
        if type(self._stack[-1]) is Symbol:
            raise self._unsafe(f"symbol '{self._stack[-1]}' may not be given a state")
        if self._dialect.apply_state is None:
            raise self._unsafe("nothing in this pickle may be given a state")
        self._dialect.apply_state(self._stack[-1], state)

    def _load_persistent(self) -> None:
        if self._dialect.load_persistent is None:
            raise self._unsafe("pickle opcode BINPERSID is allowed in tensor storages only")
        self._stack.append(self._dialect.load_persistent(self._pop()))


def is_key(value: object) -> bool:
    """Return whether ``value`` may be a dict key or set item: text, bytes, a 64-bit integer, a bool or None."""
    if type(value) is int:
        return -(2**63) <= value < 2**63
    return type(value) in _KEY_TYPES


_MAX_LINE_BYTES = 256  # longest module or attribute name of a GLOBAL
_KEY_TYPES = frozenset({str, bytes, bool, type(None)})
_UINT1, _UINT2, _UINT4, _UINT8 = (struct.Struct(f"<{letter}") for letter in "BHIQ")
_OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_STOP = ord(".")


def _build_actions() -> dict[int, Callable[[PickleMachine], None]]:
    """Return the action of every allowed opcode, keyed by the opcode's byte."""
    machine, actions = PickleMachine, {}
    constants = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
    empties = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
    numbers = {"BININT1": _UINT1, "BININT2": _UINT2, "BININT": struct.Struct("<i"), "BINFLOAT": struct.Struct(">d")}
    actions |= {name: partial(lambda m, value: m._stack.append(value), value=v) for name, v in constants.items()}
    actions |= {name: partial(lambda m, kind: m._stack.append(kind()), kind=kind) for name, kind in empties.items()}
    actions |= {name: partial(lambda m, s: m._stack.append(m._number(s)), s=layout) for name, layout in numbers.items()}
    for prefix, suffix, layout in (("SHORT_", "", _UINT1), ("", "", _UINT4), ("", "8", _UINT8)):
        actions[f"{prefix}BINUNICODE{suffix}"] = partial(machine._push_text, layout=layout)
        actions[f"{prefix}BINBYTES{suffix}"] = partial(machine._push_bytes, layout=layout)
    for prefix, layout in (("", _UINT1), ("LONG_", _UINT4)):
        actions[f"{prefix}BINPUT"] = partial(machine._put, layout=layout)
        actions[f"{prefix}BINGET"] = partial(machine._get, layout=layout)
    actions |= {f"TUPLE{length}": partial(machine._tuple, length=length) for length in (1, 2, 3)}
    actions |= {"PROTO": machine._check_protocol, "FRAME": machine._check_frame, "LONG1": machine._push_long}
    actions |= {"MARK": machine._mark, "TUPLE": machine._tuple_from_mark, "MEMOIZE": partial(machine._put, layout=None)}
    actions |= {"APPEND": machine._append, "APPENDS": machine._appends, "ADDITEMS": machine._add_items}
    actions |= {"SETITEM": machine._set_item, "SETITEMS": machine._set_items}
    actions |= {"GLOBAL": machine._push_global, "STACK_GLOBAL": machine._push_stack_global}
    actions |= {"REDUCE": machine._call, "NEWOBJ": machine._new_object, "BUILD": machine._apply_state}
    actions |= {"BINPERSID": machine._load_persistent}
    codes = {name: code for code, name in _OPCODE_NAMES.items()}
    return {codes[name]: action for name, action in actions.items()}


_ACTIONS = _build_actions()
