"""The table of operations an expression may use.

One row an operation: how it is written, what it takes and returns, and the numpy function that defines its meaning.
This file must not know of expression nodes: evaluation, bounds and text are built on it.

Integer `//` and `%` round towards minus infinity, as in Python and torch; every printer keeps that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["bool", "int", "float"]
# An operand is a numpy array or scalar of any of the three kinds; numpy's own stubs type its functions no closer.
Array = npt.NDArray[Any]

Signature = Literal["arithmetic", "floating", "comparison", "bits", "integer", "where", "cast"]
"""How kinds are inferred.

arithmetic: operands are promoted to int or float, the result is of that kind.
floating: operands become float, and so is the result.
comparison: operands are promoted, the result is bool.
bits: both bool (logical) or both int (bitwise).
integer: operands are int, and so is the result.
where: a bool and two operands of one kind.
cast: one operand, the result's kind is in the name.
"""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    Attributes:
        name: Its key in `OPS`.
        signature: How kinds are inferred.
        arity: The number of operands.
        numpy: Its meaning.
        symbol: Infix or prefix spelling in Python, or "" for a function call.
        precedence: Python's, larger binds tighter; 100 for calls.
    """

    name: str
    signature: Signature
    arity: int
    numpy: Callable[..., Any]
    symbol: str = ""
    precedence: int = 100


def _rsqrt(x: Array) -> Array:
    return np.asarray(1 / np.sqrt(x))


def _sigmoid(x: Array) -> Array:
    # The two branches keep exp from overflowing.
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def _to_int(x: Array) -> Array:
    return np.asarray(x).astype(np.int64)


def _to_bool(x: Array) -> Array:
    return np.asarray(x).astype(np.bool_)


def _to_float(x: Array) -> Array:
    return np.asarray(x).astype(np.float32)


UNARY_PRECEDENCE = 13

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("add", "arithmetic", 2, np.add, "+", 11),
        Op("sub", "arithmetic", 2, np.subtract, "-", 11),
        Op("mul", "arithmetic", 2, np.multiply, "*", 12),
        Op("div", "floating", 2, np.true_divide, "/", 12),
        Op("floordiv", "arithmetic", 2, np.floor_divide, "//", 12),
        Op("mod", "arithmetic", 2, np.mod, "%", 12),
        Op("min", "arithmetic", 2, np.minimum),
        Op("max", "arithmetic", 2, np.maximum),
        Op("neg", "arithmetic", 1, np.negative, "-", UNARY_PRECEDENCE),
        Op("abs", "arithmetic", 1, np.abs),
        Op("floor", "arithmetic", 1, np.floor),
        Op("exp", "floating", 1, np.exp),
        Op("exp2", "floating", 1, np.exp2),
        Op("log", "floating", 1, np.log),
        Op("log2", "floating", 1, np.log2),
        Op("tanh", "floating", 1, np.tanh),
        Op("sqrt", "floating", 1, np.sqrt),
        Op("rsqrt", "floating", 1, _rsqrt),
        Op("sigmoid", "floating", 1, _sigmoid),
        Op("sin", "floating", 1, np.sin),
        Op("cos", "floating", 1, np.cos),
        Op("pow", "floating", 2, np.power),
        Op("lt", "comparison", 2, np.less, "<", 6),
        Op("le", "comparison", 2, np.less_equal, "<=", 6),
        Op("gt", "comparison", 2, np.greater, ">", 6),
        Op("ge", "comparison", 2, np.greater_equal, ">=", 6),
        Op("eq", "comparison", 2, np.equal, "==", 6),
        Op("ne", "comparison", 2, np.not_equal, "!=", 6),
        Op("or", "bits", 2, np.bitwise_or, "|", 7),
        Op("xor", "bits", 2, np.bitwise_xor, "^", 8),
        Op("and", "bits", 2, np.bitwise_and, "&", 9),
        Op("not", "bits", 1, np.invert, "~", UNARY_PRECEDENCE),
        Op("shl", "integer", 2, np.left_shift, "<<", 10),
        Op("shr", "integer", 2, np.right_shift, ">>", 10),
        Op("where", "where", 3, np.where),
        Op("to_bool", "cast", 1, _to_bool),
        Op("to_int", "cast", 1, _to_int),
        Op("to_float", "cast", 1, _to_float),
    )
}

NEGATED_COMPARISON = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}
SWAPPED_COMPARISON = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}
