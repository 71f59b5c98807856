"""Exact symbolic derivatives of score modifiers.

Forward differentiation, one rule an operation. Comparisons, floor and integer operations are piecewise constant, so
their derivative is zero; abs, min, max and where are differentiated piece by piece. At a kink the derivative is that of
the first operand (min, max) or zero (abs). This file must not know how a derivative is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

from sparsec.errors import MaskError
from sparsec.expr.tree import VARIABLES, Apply, Const, Expr, Table, Var, apply

_ZERO = Const(0.0)
# Factors further from 1 than this are left as they are: their product might leave the range of fp32.
_SMALL = 1e-30
# A partial derivative with respect to each operand, given the node; None where it is zero.
_Rule = Callable[[Apply], tuple[Expr | None, ...]]


def derivative(expr: Expr, wrt: str | Table) -> Expr:
    """The derivative of `expr`.

    Args:
        expr: A float expression.
        wrt: "score", or one look-up of a float table (a node of `expr`): the result is then the factor between the
            gradient of `expr` and that of the entry the look-up reads.

    Raises:
        MaskError: `expr` is not float, or `wrt` is not a float quantity.
    """
    target = Var(wrt) if isinstance(wrt, str) and wrt in VARIABLES else wrt
    if not isinstance(target, Expr) or target.kind != "float" or not isinstance(target, Var | Table):
        raise MaskError(f"derivative of {expr} with respect to {wrt}: choose 'score' or a look-up of a float table.")
    if expr.kind != "float":
        raise MaskError(f"derivative of {expr}: it is {expr.kind}, and only a float expression has one.")
    slopes: dict[Expr, Expr] = {}
    for node in expr.walk():
        if node == target:
            slopes[node] = Const(1.0)
        elif isinstance(node, Apply) and node.kind == "float":
            inner = [slopes.get(arg) for arg in node.args]
            if any(slope is not None for slope in inner):
                slope = _chain(node, inner)
                if slope is not None:
                    slopes[node] = slope
    return slopes.get(expr, _ZERO).simplify().replace(_with_one_factor).simplify()


def _with_one_factor(node: Expr) -> Expr | None:
    """Constants combined and `(x * c) * d` as `x * (c * d)`: rounded otherwise, which a derivative may be."""
    if not (isinstance(node, Apply) and node.kind == "float" and node.op in ("mul", "div")):
        return None
    a, b = node.args
    if isinstance(a, Const) and node.op == "mul":
        a, b = b, a
    if not isinstance(b, Const) or not b.value:
        return None
    factor = float(b.value) if node.op == "mul" else 1.0 / float(b.value)
    if isinstance(a, Const):
        return Const(float(a.value) * factor)
    if isinstance(a, Apply) and a.op == "mul" and isinstance(a.args[1], Const):
        joined = float(a.args[1].value) * factor
        if _SMALL < abs(joined) < 1.0 / _SMALL:
            return apply("mul", a.args[0], joined)
    return apply(node.op, a, b)


def _chain(node: Apply, inner: list[Expr | None]) -> Expr | None:
    if node.op == "where":
        return apply("where", node.args[0], *(_ZERO if slope is None else slope for slope in inner[1:]))
    if node.op in ("min", "max"):
        a, b = node.args
        picks_first = apply("le" if node.op == "min" else "ge", a, b)
        return apply("where", picks_first, *(_ZERO if slope is None else slope for slope in inner))
    total: Expr | None = None
    for slope, partial in zip(inner, _PARTIALS.get(node.op, _piecewise_constant)(node), strict=True):
        if slope is None or partial is None:
            continue
        term = _times(slope, partial)
        total = term if total is None else apply("add", total, term)
    return total


def _times(slope: Expr, partial: Expr) -> Expr:
    """`slope · partial`, branch by branch: a constant branch has slope 0 even where `partial` is infinite."""
    if slope == Const(1.0):
        return partial
    if slope == _ZERO:
        return _ZERO
    if isinstance(slope, Apply) and slope.op == "where":
        condition, chosen, other = slope.args
        return apply("where", condition, _times(chosen, partial), _times(other, partial))
    return apply("mul", slope, partial)


def _piecewise_constant(node: Apply) -> tuple[Expr | None, ...]:
    return (None,) * len(node.args)


def _product(node: Apply) -> tuple[Expr | None, ...]:
    return node.args[1], node.args[0]


def _quotient(node: Apply) -> tuple[Expr | None, ...]:
    return apply("div", 1.0, node.args[1]), -(node / node.args[1])


def _remainder(node: Apply) -> tuple[Expr | None, ...]:
    a, b = node.args
    return Const(1.0), -apply("floor", a / b)


def _absolute(node: Apply) -> tuple[Expr | None, ...]:
    (a,) = node.args
    return (apply("where", a > 0.0, 1.0, apply("where", a < 0.0, -1.0, 0.0)),)


def _power(node: Apply) -> tuple[Expr | None, ...]:
    base, exponent = node.args[0], float(cast(Const, node.args[1]).value)
    return apply("pow", base, exponent - 1.0) * exponent, None


_PARTIALS: dict[str, _Rule] = {
    "add": lambda node: (Const(1.0), Const(1.0)),
    "sub": lambda node: (Const(1.0), Const(-1.0)),
    "mul": _product,
    "div": _quotient,
    "mod": _remainder,
    "neg": lambda node: (Const(-1.0),),
    "abs": _absolute,
    "exp": lambda node: (node,),
    "exp2": lambda node: (node * math.log(2.0),),
    "log": lambda node: (apply("div", 1.0, node.args[0]),),
    "log2": lambda node: (apply("div", 1.0 / math.log(2.0), node.args[0]),),
    "tanh": lambda node: (1.0 - node * node,),
    "sqrt": lambda node: (apply("div", 0.5, node),),
    "rsqrt": lambda node: (node / node.args[0] * -0.5,),
    "sigmoid": lambda node: (node * (1.0 - node),),
    "sin": lambda node: (apply("cos", node.args[0]),),
    "cos": lambda node: (-apply("sin", node.args[0]),),
    "pow": _power,
}
