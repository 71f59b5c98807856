"""What mask constructors are given: checks of plain arguments, and how arguments are written back.

Every constructor checks here, once, so that a wrong argument is named with its value and the values that would do.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from sparsec.errors import MaskError
from sparsec.masks.ranges import IntArray

MAX_LENGTH = 2**40


def is_int(value: object) -> TypeGuard[int]:
    """Whether this is an int of Python or numpy, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def checked_int(value: object, name: str, what: str, least: int = 1, most: int = MAX_LENGTH) -> int:
    """The value as a Python int.

    Raises:
        MaskError: No int, or not from `least` to `most`; `name` and `what` say whose argument it is.
    """
    if not is_int(value):
        raise MaskError(f"{name}: {what} = {value!r} must be an int")
    if not least <= value <= most:
        raise MaskError(f"{name}: {what} = {value} must be {f'≥ {least}' if value < least else f'≤ {most}'}")
    return int(value)


def int_array(values: object, name: str, what: str) -> IntArray:
    """A one-dimensional int64 copy of what the user gave.

    Raises:
        MaskError: Not a flat sequence of integers.
    """
    return flat_ints(values, name, what).astype(np.int64)


def flat_ints(values: object, name: str, what: str) -> npt.NDArray[np.integer[Any]]:
    """What the user gave as a one-dimensional array of integers, of its own dtype; not copied where it is one.

    Raises:
        MaskError: Not a flat sequence of integers.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise MaskError(f"{name}: {what} must be a flat sequence of ints ({error})") from error
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise MaskError(
            f"{name}: {what} must be a flat sequence of ints, and is {array.dtype} with shape {array.shape}"
        )
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
