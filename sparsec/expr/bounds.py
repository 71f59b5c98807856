"""Interval evaluation: what an expression can be over many boxes of its variables at once.

Sound for every operation: the value at any point of a box lies between the bounds. A predicate's bounds are a pair of
booleans (certainly true, possibly true). An interval nothing is known about is `(-∞, ∞)` for a float, where the value
may also be nan, and `±UNKNOWN` for an int, where it may also have overflowed. This file decides how tight bounds are;
it must not know what they are used for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import cast

import numpy as np
import numpy.typing as npt

from sparsec.errors import MaskError
from sparsec.expr.ops import OPS, Array
from sparsec.expr.tree import VARIABLES, Apply, Const, Expr, Table, Var, postorder

Interval = tuple[Array, Array]
Boxes = Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]

# Sums of two such values still fit int64.
UNKNOWN = 1 << 61
# fp32 rounds to 2**-24; a few units in the last place for the functions, none of which is less exact than 2**-20.
_FLOAT_SLACK = 2.0**-20
_SMALLEST_FLOAT = 2.0**-126
# What is larger may be infinite in fp32.
_LARGEST_FLOAT = 2.0**127
_EXACT_FLOAT_OPS = frozenset({"neg", "abs", "min", "max", "floor", "where"})


def bounds(expr: Expr, boxes: Boxes) -> Interval:
    """Lower and upper bounds of `expr` over boxes.

    Args:
        expr: Any expression.
        boxes: For each variable used, the least and the largest value in each box (both inclusive), as arrays that
            broadcast.

    Returns:
        (lower, upper), of the broadcast shape or one that broadcasts to it. For a bool expression, (certainly true,
        possibly true). Floats are bounded as computed in fp32 or better.
    """
    return all_bounds((expr,), boxes)[expr]


def all_bounds(roots: tuple[Expr, ...], boxes: Boxes) -> dict[Expr, Interval]:
    """The bounds of every subexpression of `roots`; see `bounds`."""
    known: dict[Expr, Interval] = {}
    with np.errstate(all="ignore"):
        for node in postorder(roots):
            if isinstance(node, Var):
                if node.name not in boxes:
                    raise MaskError(
                        f"bounds() needs an interval for {node.name}; it was given {sorted(boxes) or 'none'}."
                    )
                dtype = np.float64 if VARIABLES[node.name] == "float" else np.int64
                low, high = boxes[node.name]
                known[node] = (np.asarray(low, dtype), np.asarray(high, dtype))
            elif isinstance(node, Const):
                value = np.asarray(node.value)
                known[node] = _rounded((value, value)) if node.kind == "float" else (value, value)
            elif isinstance(node, Table):
                known[node] = _table(node, [known[arg] for arg in node.args])
            else:
                operation = cast(Apply, node)
                known[node] = _apply(operation, [known[arg] for arg in node.args])
    return known


def _table(node: Table, indices: list[Interval]) -> Interval:
    shape = np.broadcast_shapes(*(bound.shape for index in indices for bound in index))
    flat = [[np.broadcast_to(bound, shape).reshape(-1) for bound in index] for index in indices]
    low, high = node.captured.extremes([index[0] for index in flat], [index[1] for index in flat])
    low, high = low.reshape(shape), high.reshape(shape)
    if node.kind == "float":
        # An array of float64 is read in fp32 by kernels.
        return _wild_nan(_rounded((low.astype(np.float64), high.astype(np.float64))))
    return (low, high) if node.kind == "bool" else (low.astype(np.int64), high.astype(np.int64))


def _apply(node: Apply, operands: list[Interval]) -> Interval:
    if node.op in _COMPARISONS:
        return _compare(node, operands)
    result = _RULES[node.op](*operands) if node.op in _RULES else _corners(node.op, operands)
    kinds = [arg.kind for arg in node.args]
    if node.kind == "float":
        result = _wild_nan(result)
        if node.op not in _EXACT_FLOAT_OPS and not (node.op == "to_float" and kinds[0] == "bool"):
            result = _rounded(result)
        if node.op != "where":
            result = _forget(
                result, [_is_wild(x) for x, kind in zip(operands, kinds, strict=True) if kind == "float"], np.inf
            )
        return result
    if node.kind == "int":
        wild = [_is_overflow(x) for x, kind in zip(operands, kinds, strict=True) if kind == "int"]
        if node.op in ("where", "mod", "min", "max"):
            wild = []
        return _forget(result, [*wild, _is_overflow(result)], UNKNOWN)
    return result


def _is_wild(x: Interval) -> Array:
    return np.asarray((x[0] == -np.inf) & (x[1] == np.inf))


def _is_overflow(x: Interval) -> Array:
    return np.asarray((x[0] <= -UNKNOWN) | (x[1] >= UNKNOWN))


def _forget(x: Interval, where: list[Array], limit: float) -> Interval:
    low, high = x
    for mask in where:
        if mask.any():
            low, high = np.where(mask, -limit, low), np.where(mask, limit, high)
    if limit == UNKNOWN:
        low, high = low.astype(np.int64), high.astype(np.int64)
    return low, high


def _wild_nan(x: Interval) -> Interval:
    unknown = np.isnan(x[0]) | np.isnan(x[1])
    return np.where(unknown, -np.inf, x[0]), np.where(unknown, np.inf, x[1])


def _rounded(x: Interval) -> Interval:
    """The interval widened by what a computation in fp32 may be off."""
    low, high = x[0].astype(np.float64), x[1].astype(np.float64)
    low = np.where((low == 0) | np.isinf(low), low, low - np.abs(low) * _FLOAT_SLACK - _SMALLEST_FLOAT)
    high = np.where((high == 0) | np.isinf(high), high, high + np.abs(high) * _FLOAT_SLACK + _SMALLEST_FLOAT)
    return np.where(low < -_LARGEST_FLOAT, -np.inf, low), np.where(high > _LARGEST_FLOAT, np.inf, high)


def _corners(op: str, operands: list[Interval]) -> Interval:
    """Bounds of an operation that is monotone in each operand where the others are fixed."""
    function = OPS[op].numpy
    if len(operands) == 1:
        values = [function(bound) for bound in operands[0]]
    else:
        values = [function(a, b) for a in operands[0] for b in operands[1]]
    low = high = np.asarray(values[0])
    for value in values[1:]:
        low, high = np.minimum(low, value), np.maximum(high, value)
    return low, high


def _add(a: Interval, b: Interval) -> Interval:
    return a[0] + b[0], a[1] + b[1]


def _sub(a: Interval, b: Interval) -> Interval:
    return a[0] - b[1], a[1] - b[0]


def _neg(a: Interval) -> Interval:
    return -a[1], -a[0]


def _magnitude(a: Interval) -> Array:
    return np.asarray(np.maximum(np.abs(a[0].astype(np.float64)), np.abs(a[1].astype(np.float64))))


def _mul(a: Interval, b: Interval) -> Interval:
    low, high = _corners("mul", [a, b])
    if low.dtype.kind == "i":
        overflow = _magnitude(a) * _magnitude(b) >= UNKNOWN
        low, high = np.where(overflow, -UNKNOWN, low), np.where(overflow, UNKNOWN, high)
    return low, high


def _div(a: Interval, b: Interval) -> Interval:
    low, high = _corners("div", [a, b])
    through_zero = (b[0] <= 0) & (b[1] >= 0)
    return np.where(through_zero, -np.inf, low), np.where(through_zero, np.inf, high)


def _floordiv(a: Interval, b: Interval) -> Interval:
    low, high = _corners("floordiv", [a, b])
    through_zero = (b[0] <= 0) & (b[1] >= 0)
    if low.dtype.kind == "f":
        # A floor of a quotient that was rounded first may be one off.
        return np.where(through_zero, -np.inf, low - 1), np.where(through_zero, np.inf, high + 1)
    reach = np.maximum(np.abs(a[0]), np.abs(a[1])) + 1
    return np.where(through_zero, -reach, low), np.where(through_zero, reach, high)


def _mod(a: Interval, b: Interval) -> Interval:
    is_int = a[0].dtype.kind in "ib" and b[0].dtype.kind in "ib"
    one = 1 if is_int else 0
    # The sign of a remainder is that of the divisor.
    low = np.where(b[0] < 0, b[0] + one, 0)
    high = np.where(b[1] > 0, b[1] - one, 0)
    if not is_int:
        # No number is left of infinity, nor over from a division by zero.
        unknown = (b[0] <= 0) & (b[1] >= 0) | np.isinf(a[0]) | np.isinf(a[1])
        return np.where(unknown, -np.inf, low), np.where(unknown, np.inf, high)
    # A dividend between 0 and the least divisor is left alone; more than that, it is at least not increased.
    positive = b[0] > 0
    high = np.where(positive & (a[0] >= 0), np.minimum(high, a[1]), high)
    divisor = np.where(positive & (b[0] == b[1]), b[0], 1)
    same_period = positive & (b[0] == b[1]) & (a[0] // divisor == a[1] // divisor) & ~_is_overflow(a)
    return np.where(same_period, a[0] % divisor, low), np.where(same_period, a[1] % divisor, high)


def _min(a: Interval, b: Interval) -> Interval:
    return np.minimum(a[0], b[0]), np.minimum(a[1], b[1])


def _max(a: Interval, b: Interval) -> Interval:
    return np.maximum(a[0], b[0]), np.maximum(a[1], b[1])


def _abs(a: Interval) -> Interval:
    return np.maximum(np.maximum(a[0], -a[1]), 0), np.maximum(-a[0], a[1])


def _wave(op: str) -> Callable[[Interval], Interval]:
    def rule(a: Interval) -> Interval:
        value, is_point = OPS[op].numpy(a[0]), a[0] == a[1]
        # Of infinity it is no number.
        unknown = np.isinf(a[0]) | np.isinf(a[1])
        low, high = np.where(is_point, value, -1.0), np.where(is_point, value, 1.0)
        return np.where(unknown, -np.inf, low), np.where(unknown, np.inf, high)

    return rule


def _power(a: Interval, exponent: Interval) -> Interval:
    low, high = _corners("pow", [a, exponent])
    unknown = a[0] < 0
    return np.where(unknown, -np.inf, low), np.where(unknown, np.inf, high)


def _rsqrt(a: Interval) -> Interval:
    low, high = _corners("rsqrt", [a])
    return low, np.where(a[0] == 0, np.inf, high)


def _mask_above(*values: Array) -> Array:
    """The least 2**k - 1 that no value exceeds in magnitude."""
    largest = reduce(np.maximum, (np.abs(value) for value in values), np.ones(())).astype(np.float64)
    return np.asarray((np.int64(1) << np.minimum(np.frexp(largest)[1], 61).astype(np.int64)) - 1)


def _bitwise(op: str) -> Callable[[Interval, Interval], Interval]:
    def rule(a: Interval, b: Interval) -> Interval:
        if a[0].dtype.kind == "b":
            return _logical(op, a, b)
        is_point = (a[0] == a[1]) & (b[0] == b[1])
        value = OPS[op].numpy(a[0], b[0])
        reach = _mask_above(*a, *b)
        non_negative = (a[0] >= 0) & (b[0] >= 0)
        low, high = np.where(non_negative, 0, -reach - 1), reach
        if op == "and":
            # One operand that is not negative keeps the result between 0 and itself.
            low = np.where((a[0] >= 0) | (b[0] >= 0), 0, low)
            high = np.minimum(np.where(a[0] >= 0, a[1], high), np.where(b[0] >= 0, b[1], high))
        if op == "or":
            low = np.where(non_negative, np.maximum(a[0], b[0]), low)
        return np.where(is_point, value, low), np.where(is_point, value, high)

    return rule


def _logical(op: str, a: Interval, b: Interval) -> Interval:
    if op == "and":
        return a[0] & b[0], a[1] & b[1]
    if op == "or":
        return a[0] | b[0], a[1] | b[1]
    known = (a[0] == a[1]) & (b[0] == b[1])
    value = a[0] ^ b[0]
    return known & value, ~known | value


def _not(a: Interval) -> Interval:
    return ~a[1], ~a[0]


def _shl(a: Interval, b: Interval) -> Interval:
    low, high = _corners("shl", [a, (np.clip(b[0], 0, 62), np.clip(b[1], 0, 62))])
    overflow = (b[0] < 0) | (b[1] > 60) | (_magnitude(a) * np.exp2(b[1].astype(np.float64)) >= UNKNOWN)
    return np.where(overflow, -UNKNOWN, low), np.where(overflow, UNKNOWN, high)


def _shr(a: Interval, b: Interval) -> Interval:
    low, high = _corners("shr", [a, (np.clip(b[0], 0, 63), np.clip(b[1], 0, 63))])
    unknown = (b[0] < 0) | (b[1] > 63)
    return np.where(unknown, -UNKNOWN, low), np.where(unknown, UNKNOWN, high)


def _where(condition: Interval, a: Interval, b: Interval) -> Interval:
    low = np.where(condition[0], a[0], np.where(condition[1], np.minimum(a[0], b[0]), b[0]))
    high = np.where(condition[0], a[1], np.where(condition[1], np.maximum(a[1], b[1]), b[1]))
    return low, high


def _to_bool(a: Interval) -> Interval:
    return (a[0] > 0) | (a[1] < 0), (a[0] != 0) | (a[1] != 0)


def _to_int(a: Interval) -> Interval:
    if a[0].dtype.kind == "b":
        return a[0].astype(np.int64), a[1].astype(np.int64)
    low, high = np.trunc(a[0]), np.trunc(a[1])
    # int64 and int32 saturate or wrap where a float is larger; nothing is known then.
    unknown = (low <= -(2.0**31)) | (high >= 2.0**31)
    return (
        np.where(unknown, -UNKNOWN, np.nan_to_num(low)).astype(np.int64),
        np.where(unknown, UNKNOWN, np.nan_to_num(high)).astype(np.int64),
    )


def _to_float(a: Interval) -> Interval:
    low, high = a[0].astype(np.float64), a[1].astype(np.float64)
    if a[0].dtype.kind == "b":
        return low, high
    overflow = _is_overflow(a)
    return np.where(overflow, -np.inf, low), np.where(overflow, np.inf, high)


_RULES: dict[str, Callable[..., Interval]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "floordiv": _floordiv,
    "mod": _mod,
    "min": _min,
    "max": _max,
    "neg": _neg,
    "abs": _abs,
    "sin": _wave("sin"),
    "cos": _wave("cos"),
    "pow": _power,
    "rsqrt": _rsqrt,
    "and": _bitwise("and"),
    "or": _bitwise("or"),
    "xor": _bitwise("xor"),
    "not": _not,
    "shl": _shl,
    "shr": _shr,
    "where": _where,
    "to_bool": _to_bool,
    "to_int": _to_int,
    "to_float": _to_float,
}

_COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})


def _compare(node: Apply, operands: list[Interval]) -> Interval:
    a, b = operands
    if node.op in ("eq", "ne"):
        if a[0].dtype.kind == "b":
            certain, possible = _logical("xor", a, b)
            equal = (~possible, ~certain)
        else:
            equal = ((a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0]), (a[0] <= b[1]) & (b[0] <= a[1]))
        result = equal if node.op == "eq" else (~equal[1], ~equal[0])
    else:
        if node.op in ("gt", "ge"):
            a, b = b, a
        less = np.less if node.op in ("lt", "gt") else np.less_equal
        result = (less(a[1], b[0]), less(a[0], b[1]))
    if node.args[0].kind == "float":
        unknown = _is_wild(operands[0]) | _is_wild(operands[1])
        return result[0] & ~unknown, result[1] | unknown
    return result
