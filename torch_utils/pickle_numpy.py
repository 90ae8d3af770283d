"""Make NumPy scalars and arrays of numbers from what pickles of them hold, after checking type and length.

Only numeric types exist here. An object array would be a second pickle inside the first, and a structured type brings
text that NumPy parses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from torch_utils.pickle_limits import Budget, CorruptPickleError, UnsafePickleError, show
from torch_utils.pickle_machine import Symbol

MAX_DIMENSIONS = 16

_CODES = frozenset("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split())  # kind and size in bytes
_STATE_VERSION = 3  # of the state of a numpy.dtype without metadata


@dataclass
class NumpyType:
    """Hold a numeric type. Pickles create it first and set the byte order in a second step.

    Args:
        code: kind and size in bytes, such as ``f8``.
        byte_order: ``<``, ``>``, ``=`` or ``|``.
    """

    code: str
    byte_order: str = "="

    def apply_state(self, state: object, source: str) -> None:
        """Set the byte order from the state that NumPy stores: (3, byte order, None, None, None, -1, -1, 0).

        Raises:
            CorruptPickleError: any other state.
        """
        if type(state) is not tuple or len(state) != 8 or type(state[0]) is not int or state[0] != _STATE_VERSION:
            raise CorruptPickleError(f"{source}: a numpy dtype has a state of unknown form")
        if any(value is not None for value in state[2:5]) or any(type(value) is not int for value in state[5:]):
            raise CorruptPickleError(f"{source}: a numpy dtype has fields or subarrays, expected plain numbers")
        if type(state[1]) is not str or state[1] not in ("<", ">", "=", "|"):
            raise CorruptPickleError(f"{source}: a numpy dtype has byte order {show(state[1])}")
        self.byte_order = state[1]

    def dtype(self) -> np.dtype:
        """Return the NumPy type."""
        return np.dtype(self.code).newbyteorder(self.byte_order)


def build_type(arguments: tuple, source: str) -> NumpyType:
    """Make the type that ``numpy.dtype(code, align, copy)`` names.

    Raises:
        UnsafePickleError: a type that is not numeric, such as object.
        CorruptPickleError: malformed arguments.
    """
    if len(arguments) != 3 or type(arguments[0]) is not str:
        raise CorruptPickleError(f"{source}: a numpy dtype is not made of a code and two flags")
    if arguments[0] not in _CODES:
        raise UnsafePickleError(f"{source}: numpy dtype {show(arguments[0])} is not a plain number")
    return NumpyType(arguments[0])


def build_scalar(arguments: tuple, source: str) -> np.generic:
    """Make the scalar that ``numpy.core.multiarray.scalar(dtype, bytes)`` makes.

    Raises:
        CorruptPickleError: malformed arguments, or a number of bytes other than that of the type.
    """
    if len(arguments) != 2 or type(arguments[0]) is not NumpyType or type(arguments[1]) is not bytes:
        raise CorruptPickleError(f"{source}: a numpy scalar is not made of a dtype and bytes")
    dtype, raw = arguments[0].dtype(), arguments[1]
    if len(raw) != dtype.itemsize:
        raise CorruptPickleError(f"{source}: a numpy scalar of type {dtype} has {len(raw)} bytes")
    return np.frombuffer(raw, dtype)[0]


def build_array(arguments: tuple, source: str) -> np.ndarray:
    """Make the empty array that ``numpy.core.multiarray._reconstruct(numpy.ndarray, (0,), b'b')`` makes.

    Raises:
        CorruptPickleError: another class than ``numpy.ndarray``; what follows the class is always the same.
    """
    kind = arguments[0] if len(arguments) == 3 else None
    if type(kind) is not Symbol or (kind.module, kind.name) != ("numpy", "ndarray"):
        raise CorruptPickleError(f"{source}: a numpy array is of a class other than numpy.ndarray")
    return np.empty(0, np.int8)


def apply_array_state(array: np.ndarray, state: object, budget: Budget, source: str) -> None:
    """Fill an array from `build_array` in place, so that other references to it see the content.

    Args:
        array: the array; its shape, type and content are replaced.
        state: (1, shape, dtype, Fortran order, bytes).
        budget: limits; the bytes of the array are taken from it.
        source: how messages call the data.

    Raises:
        CorruptPickleError: malformed state, or a number of bytes other than that of the shape.
    """
    if type(state) is not tuple or len(state) != 5 or type(state[0]) is not int or state[0] != 1:
        raise CorruptPickleError(f"{source}: a numpy array has a state of unknown form")
    _, shape, kind, fortran, raw = state
    if type(kind) is not NumpyType or type(fortran) is not bool or type(raw) is not bytes:
        raise CorruptPickleError(f"{source}: a numpy array is not made of numbers")
    if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS:
        raise CorruptPickleError(f"{source}: the shape of a numpy array is no tuple of at most {MAX_DIMENSIONS} sizes")
    if any(type(length) is not int or not 0 <= length < 2**31 for length in shape):
        raise CorruptPickleError(f"{source}: the shape of a numpy array holds something other than 0 to 2^31 - 1")
    num_bytes = math.prod(shape) * kind.dtype().itemsize
    if num_bytes != len(raw) or math.prod(length or 1 for length in shape) >= 2**31:
        raise CorruptPickleError(
            f"{source}: a numpy array of shape {shape} and type {kind.dtype()} has {len(raw)} bytes"
        )
    budget.spend_bytes(num_bytes, source)
    array.__setstate__((1, shape, kind.dtype(), fortran, raw))
