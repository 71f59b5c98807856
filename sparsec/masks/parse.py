"""Reads a mask from the text of its expression, without running anything.

Python's own grammar is used and a short list of its nodes is understood: constructor calls with literal arguments, the
operators, `.T`, slices, `.bind(…)` and `.mask`. All else is refused, at its place in the text.
"""

from __future__ import annotations

import ast
import difflib
from typing import Any, NoReturn

from sparsec.errors import MaskError
from sparsec.masks.catalog import CONSTRUCTORS
from sparsec.masks.mask import BoundMask, Mask

MAX_TEXT = 2**24


def parse(text: str) -> Mask:
    """The mask that `text` describes, such as `"window(255, 0) & causal() | global_tokens(16)"`.

    Raises:
        MaskError: The text is no mask expression; the message shows where.
    """
    if not isinstance(text, str):
        raise MaskError(f"parse: a mask expression is text, and this is a {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise MaskError(f"parse: the text has {len(text):,} characters, more than {MAX_TEXT:,}; load edges from a file")
    # Python indents by leading blanks; a mask does not care.
    stripped = text.strip()
    try:
        tree = ast.parse(stripped, mode="eval")
    except SyntaxError as error:
        _refuse(stripped, error.lineno or 1, (error.offset or 1) - 1, f"this is no expression: {error.msg}")
    except (ValueError, RecursionError, MemoryError) as error:
        raise MaskError(f"parse: the text cannot be read: {error}") from error
    try:
        value = _Reader(stripped).value(tree.body)
    except RecursionError as error:
        raise MaskError("parse: the expression is nested too deeply") from error
    if isinstance(value, BoundMask):
        _refuse(
            stripped, 1, 0, "this mask is bound to lengths; leave .bind(…) out and give the lengths beside the mask"
        )
    if not isinstance(value, Mask):
        _refuse(
            stripped, 1, 0, f"this is a {type(value).__name__} and no mask; begin with a constructor, such as causal()"
        )
    return value


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text

    # Any: literals, masks and bound masks all are values here.
    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return node.value
            case ast.List() | ast.Tuple():
                items = [self.value(item) for item in node.elts]
                return items if isinstance(node, ast.List) else tuple(items)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
            case ast.UnaryOp(op=ast.Invert()):
                return ~self.mask(node.operand)
            case ast.BinOp(op=ast.BitAnd() | ast.BitOr() | ast.Sub() as op):
                return self.joined(op, self.mask(node.left), self.mask(node.right))
            case ast.Attribute(attr="T"):
                return self.mask_or_bound(node.value).T
            case ast.Attribute(attr="mask"):
                return self.bound(node.value).mask
            case ast.Subscript():
                return self.guarded(node, lambda: self.mask_or_bound(node.value)[self.index(node.slice)])
            case ast.Call():
                return self.call(node)
            case ast.Name(id=name):
                if name in CONSTRUCTORS:
                    self.refuse(node, f"{name} is a constructor; call it: {CONSTRUCTORS[name].example or name + '(…)'}")
                self.refuse(node, f"{name!r} is not known here; arguments are literals, masks are made by constructors")
        self.refuse(node, "only constructors, literals, & | ~ - and .T, slices and .bind(…) are understood")

    def joined(self, op: ast.operator, left: Mask, right: Mask) -> Mask:
        if isinstance(op, ast.BitAnd):
            return left & right
        return left | right if isinstance(op, ast.BitOr) else left - right

    def call(self, node: ast.Call) -> Any:
        arguments = [self.value(argument) for argument in node.args]
        options = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                self.refuse(keyword.value, "** is not understood; write the options out")
            options[keyword.arg] = self.value(keyword.value)
        match node.func:
            case ast.Attribute(attr="bind"):
                bind = self.mask(node.func.value).bind
                return self.guarded(node, lambda: bind(*arguments, **options))
            case ast.Name(id=name) if name in CONSTRUCTORS:
                return self.guarded(node, lambda: CONSTRUCTORS[name].function(*arguments, **options))
            case ast.Name(id=name):
                near = difflib.get_close_matches(name, CONSTRUCTORS, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(CONSTRUCTORS)}"
                self.refuse(node.func, f"there is no mask {name!r}; {hint}")
        self.refuse(node.func, "only constructors and .bind can be called")

    def index(self, node: ast.expr) -> object:
        parts = node.elts if isinstance(node, ast.Tuple) else [node]
        slices = []
        for part in parts:
            if not isinstance(part, ast.Slice):
                self.refuse(part, "give two slices: mask[q0:q1, k0:k1]")
            ends = (part.lower, part.upper, part.step)
            slices.append(slice(*(None if end is None else self.value(end) for end in ends)))
        return tuple(slices)

    def mask(self, node: ast.expr) -> Mask:
        value = self.value(node)
        if not isinstance(value, Mask):
            self.refuse(node, f"this is a {type(value).__name__}, where a mask is needed")
        return value

    def bound(self, node: ast.expr) -> BoundMask:
        value = self.value(node)
        if not isinstance(value, BoundMask):
            self.refuse(node, ".mask is for a bound mask, such as causal().bind(8)[0:4, 0:4].mask")
        return value

    def mask_or_bound(self, node: ast.expr) -> Mask | BoundMask:
        value = self.value(node)
        if not isinstance(value, (Mask, BoundMask)):
            self.refuse(node, f"this is a {type(value).__name__}, where a mask is needed")
        return value

    # Any: whatever the constructor or method returns.
    def guarded(self, node: ast.expr, make: Any) -> Any:
        """`make()`, with its complaints put at the node."""
        try:
            return make()
        except (MaskError, TypeError, ValueError, OverflowError) as error:
            self.refuse(node, str(error), error)

    def refuse(self, node: ast.expr, reason: str, cause: Exception | None = None) -> NoReturn:
        # Columns of the tree count bytes.
        line = self.text.splitlines()[node.lineno - 1]
        column = len(line.encode()[: node.col_offset].decode(errors="replace"))
        _refuse(self.text, node.lineno, column, reason, cause)


def _refuse(text: str, line_number: int, column: int, reason: str, cause: Exception | None = None) -> NoReturn:
    lines = text.splitlines() or [""]
    line = lines[min(line_number, len(lines)) - 1]
    # A window of the line around the place, so that a long list of edges does not fill the screen.
    start = max(0, column - 60)
    shown = line[start : start + 100]
    raise MaskError(f"cannot read the mask: {reason}\n  {shown}\n  {' ' * (column - start)}^") from cause
