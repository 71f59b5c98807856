"""Expressions from text: the inverse of `str(expr)`.

A small reader over Python's own grammar; nothing is evaluated. It decides which Python spellings are expressions and
must not know where the text comes from.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

import numpy.typing as npt

from sparsec.errors import MaskError
from sparsec.expr.captured import Captured
from sparsec.expr.ops import OPS
from sparsec.expr.tree import VARIABLES, Const, Expr, Table, Var, apply

_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Pow: "pow",
    ast.BitAnd: "and",
    ast.BitOr: "or",
    ast.BitXor: "xor",
    ast.LShift: "shl",
    ast.RShift: "shr",
    ast.Invert: "not",
    ast.USub: "neg",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Eq: "eq",
    ast.NotEq: "ne",
}
_NUMBERS = {"inf": float("inf"), "nan": float("nan")}


def parse_expr(text: str, tables: Mapping[str, npt.ArrayLike] | None = None) -> Expr:
    """The expression a text means.

    Args:
        text: As `str(expr)` prints it, such as `q_idx - kv_idx <= 255`.
        tables: The arrays it indexes, by name.

    Raises:
        MaskError: The text is not an expression.
    """
    captured = {name: Captured(array, name) for name, array in (tables or {}).items()}
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise MaskError(f"expression {text!r}: {error.msg} at column {error.offset}") from error
    try:
        return _read(tree.body, captured)
    except MaskError as error:
        raise MaskError(f"expression {text!r}: {error}") from error


def _read(node: ast.expr, tables: Mapping[str, Captured]) -> Expr:
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return Const(value)
        case ast.Name(id=name) if name in VARIABLES:
            return Var(name)
        case ast.Name(id=name) if name in _NUMBERS:
            return Const(_NUMBERS[name])
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return Const(-value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return apply(_OPERATORS[type(op)], _read(operand, tables))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return (
                _chain(node, left, tables)
                if isinstance(op, ast.BitOr | ast.BitAnd)
                else apply(_OPERATORS[type(op)], _read(left, tables), _read(right, tables))
            )
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            return apply(_OPERATORS[type(op)], _read(left, tables), _read(right, tables))
        case ast.Subscript(value=ast.Name(id=name), slice=index) if name in tables:
            indices = index.elts if isinstance(index, ast.Tuple) else [index]
            return Table(tables[name], tuple(_read(part, tables) for part in indices))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            op_name = next((n for n in (name, f"to_{name}") if n in OPS and not OPS[n].symbol), None)
            if op_name is not None and len(args) == OPS[op_name].arity:
                return apply(op_name, *(_read(arg, tables) for arg in args))
    known = ", ".join((*VARIABLES, *tables))
    raise MaskError(f"cannot read {ast.unparse(node)!r}; there are numbers, {known}, operators and functions")


def _chain(node: ast.expr, left: ast.expr, tables: Mapping[str, Captured]) -> Expr:
    """`a | b | c …`, which a program may have written thousands of terms long, without recursion."""
    terms: list[tuple[str, ast.expr]] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.BitAnd):
        terms.append((_OPERATORS[type(node.op)], node.right))
        node = node.left
    result = _read(node, tables)
    for op, term in reversed(terms):
        result = apply(op, result, _read(term, tables))
    return result
