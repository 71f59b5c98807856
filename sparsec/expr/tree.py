"""The expression tree: variables, constants, table look-ups and operations, with their kinds.

One tree serves mask predicates (`bool` over b, h, q_idx, kv_idx) and score modifiers (`float`, with score). This file
decides what a well-formed expression is, how kinds are inferred, equality, the readable text and evaluation with numpy.
It must not know how expressions come from a user's function, nor how they are rewritten or printed for a kernel.

Every walk is iterative and visits a shared subtree once, so a predicate built in a loop over thousands of terms is
fine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from sparsec.errors import MaskError
from sparsec.expr.captured import Captured
from sparsec.expr.ops import OPS, UNARY_PRECEDENCE, Array, Kind

# `edge` numbers the pairs of a mask, row by row and in ascending order of keys within a row.
VARIABLES: dict[str, Kind] = {
    "score": "float",
    "b": "int",
    "h": "int",
    "q_idx": "int",
    "kv_idx": "int",
    "edge": "int",
}
Number = bool | int | float


class Expr:
    """An immutable expression; `==` and `hash` are structural, `.eq()` is the comparison that is an expression."""

    __slots__ = ()

    # Set once by every node class.
    kind: Kind
    args: tuple[Expr, ...]
    _hash: int

    def _key(self) -> tuple[object, ...]:
        """What tells this node from another of its class, besides `args`."""
        raise NotImplementedError

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Expr):
            if isinstance(other, bool | int | float):
                raise TypeError(f"`expr == {other}` compares structure; write expr.eq({other}) for the comparison")
            return NotImplemented
        pairs: list[tuple[Expr, Expr]] = [(self, other)]
        seen: set[tuple[int, int]] = set()
        while pairs:
            left, right = pairs.pop()
            if left is right or (id(left), id(right)) in seen:
                continue
            seen.add((id(left), id(right)))
            if type(left) is not type(right) or left._hash != right._hash or left._key() != right._key():
                return False
            if len(left.args) != len(right.args):
                return False
            pairs.extend(zip(left.args, right.args, strict=True))
        return True

    # Building -------------------------------------------------------------------------------------------------------

    def __add__(self, other: Expr | Number) -> Expr:
        return apply("add", self, other)

    def __radd__(self, other: Number) -> Expr:
        return apply("add", other, self)

    def __sub__(self, other: Expr | Number) -> Expr:
        return apply("sub", self, other)

    def __rsub__(self, other: Number) -> Expr:
        return apply("sub", other, self)

    def __mul__(self, other: Expr | Number) -> Expr:
        return apply("mul", self, other)

    def __rmul__(self, other: Number) -> Expr:
        return apply("mul", other, self)

    def __truediv__(self, other: Expr | Number) -> Expr:
        return apply("div", self, other)

    def __floordiv__(self, other: Expr | Number) -> Expr:
        return apply("floordiv", self, other)

    def __mod__(self, other: Expr | Number) -> Expr:
        return apply("mod", self, other)

    def __neg__(self) -> Expr:
        return apply("neg", self)

    def __abs__(self) -> Expr:
        return apply("abs", self)

    def __and__(self, other: Expr | Number) -> Expr:
        return apply("and", self, other)

    def __or__(self, other: Expr | Number) -> Expr:
        return apply("or", self, other)

    def __xor__(self, other: Expr | Number) -> Expr:
        return apply("xor", self, other)

    def __invert__(self) -> Expr:
        return apply("not", self)

    def __lt__(self, other: Expr | Number) -> Expr:
        return apply("lt", self, other)

    def __le__(self, other: Expr | Number) -> Expr:
        return apply("le", self, other)

    def __gt__(self, other: Expr | Number) -> Expr:
        return apply("gt", self, other)

    def __ge__(self, other: Expr | Number) -> Expr:
        return apply("ge", self, other)

    def eq(self, other: Expr | Number) -> Expr:
        return apply("eq", self, other)

    def ne(self, other: Expr | Number) -> Expr:
        return apply("ne", self, other)

    def __bool__(self) -> bool:
        raise TypeError("an Expr has no truth value; combine predicates with & | ~ and compare structure with ==")

    # Reading --------------------------------------------------------------------------------------------------------

    def walk(self) -> Iterator[Expr]:
        """Every distinct subexpression, operands before what uses them."""
        return postorder((self,))

    def variables(self) -> frozenset[str]:
        """The names of the variables used."""
        return frozenset(node.name for node in self.walk() if isinstance(node, Var))

    def tables(self) -> tuple[Captured, ...]:
        """The distinct arrays used, in order of first use."""
        return tuple(dict.fromkeys(node.captured for node in self.walk() if isinstance(node, Table)))

    @property
    def size(self) -> int:
        """The number of distinct subexpressions."""
        return sum(1 for _ in self.walk())

    @property
    def digest(self) -> str:
        """Hexadecimal digest of structure and captured content, stable across processes.

        The order and grouping of operands joined by `&` or `|` does not enter, nor what live arrays hold.
        """
        numbers = {captured: number for number, captured in enumerate(self.tables())}
        digests: dict[Expr, str] = {}
        chains: dict[Expr, frozenset[str]] = {}
        for node in self.walk():
            operands = [digests[arg] for arg in node.args]
            if isinstance(node, Apply) and node.op in ("and", "or"):
                joined = [
                    chains[arg] if isinstance(arg, Apply) and arg.op == node.op else frozenset({digests[arg]})
                    for arg in node.args
                ]
                chains[node] = joined[0] | joined[1]
                operands = sorted(chains[node])
            key: tuple[object, ...] = node._key()
            if isinstance(node, Table):
                # Live arrays of one shape are told apart by their place.
                key = (node.captured.digest, *([numbers[node.captured]] if node.captured.is_live else []))
            text = f"{type(node).__name__}{key}{operands}"
            digests[node] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return digests[self]

    def __str__(self) -> str:
        texts: dict[Expr, tuple[str, int]] = {}
        for node in self.walk():
            texts[node] = _text(node, [texts[arg] for arg in node.args])
        return texts[self][0]

    def __repr__(self) -> str:
        return f"Expr({str(self)!r})"

    def rebuild(self, args: tuple[Expr, ...]) -> Expr:
        """This node with other operands."""
        if all(new is old for new, old in zip(args, self.args, strict=True)):
            return self
        if isinstance(self, Table):
            return Table(self.captured, args)
        return apply(cast(Apply, self).op, *args)

    def substitute(self, values: Mapping[str, Expr | Number]) -> Expr:
        """This expression with variables replaced."""
        replacement = {name: as_expr(value) for name, value in values.items()}
        return self.replace(lambda node: replacement.get(node.name) if isinstance(node, Var) else None)

    def replace(self, rule: Callable[[Expr], Expr | None]) -> Expr:
        """This expression with each subexpression replaced by what `rule` returns for it, operands first."""
        done: dict[Expr, Expr] = {}
        for node in self.walk():
            rebuilt = node.rebuild(tuple(done[arg] for arg in node.args))
            replaced = rule(rebuilt)
            done[node] = rebuilt if replaced is None else replaced
        return done[self]

    def evaluate(self, **arrays: npt.ArrayLike) -> Array:
        """The value with numpy broadcasting.

        Args:
            arrays: One array or number for each variable used. Integers are computed in int64; floats in the dtype of
                `score`, or in fp32 where there is none.

        Returns:
            A bool, int64 or floating array of the broadcast shape.
        """
        missing = self.variables() - arrays.keys()
        if missing:
            raise MaskError(
                f"{self} needs {', '.join(sorted(missing))}; evaluate() was given {sorted(arrays) or 'nothing'}."
            )
        score = np.asarray(arrays["score"]) if "score" in arrays else None
        float_dtype = np.dtype(np.float32) if score is None or score.dtype.kind != "f" else score.dtype
        dtypes: dict[Kind, npt.DTypeLike] = {"bool": np.bool_, "int": np.int64, "float": float_dtype}
        values: dict[Expr, Array] = {}
        with np.errstate(all="ignore"):
            for node in self.walk():
                operands = [values[arg] for arg in node.args]
                if isinstance(node, Var):
                    value = np.asarray(arrays[node.name])
                elif isinstance(node, Const):
                    value = np.asarray(node.value)
                elif isinstance(node, Table):
                    value = node.captured.gather(operands)
                else:
                    operation = cast(Apply, node)
                    # The only operation whose result depends on the working precision.
                    value = operands[0] if operation.op == "to_float" else OPS[operation.op].numpy(*operands)
                values[node] = np.asarray(value).astype(dtypes[node.kind], copy=False)
        return values[self]

    # Defined in the modules above this one; imported on use, since those import the nodes from here.

    def simplify(self) -> Expr:
        """An equal expression in normal form; see `sparsec.expr.simplify`."""
        from sparsec.expr.simplify import simplify

        return simplify(self)

    def derivative(self, wrt: str | Table) -> Expr:
        """The exact derivative with respect to "score" or a table look-up; see `sparsec.expr.derivative`."""
        from sparsec.expr.derivative import derivative

        return derivative(self, wrt)

    def bounds(self, **boxes: tuple[npt.ArrayLike, npt.ArrayLike]) -> tuple[Array, Array]:
        """Lower and upper bounds over boxes of the variables; see `sparsec.expr.bounds`."""
        from sparsec.expr.bounds import bounds

        return bounds(self, boxes)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Var(Expr):
    """One of the six variables: score, b, h, q_idx, kv_idx, edge."""

    name: str
    kind: Kind = field(init=False)
    args: tuple[Expr, ...] = field(init=False, default=())
    _hash: int = field(init=False)

    def __post_init__(self) -> None:
        if self.name not in VARIABLES:
            raise MaskError(f"no variable is called {self.name!r}; there are {', '.join(VARIABLES)}.")
        object.__setattr__(self, "kind", VARIABLES[self.name])
        object.__setattr__(self, "_hash", hash(("var", self.name)))

    def _key(self) -> tuple[object, ...]:
        return (self.name,)

    def __reduce__(self) -> tuple[object, ...]:
        return Var, (self.name,)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Const(Expr):
    """A number. `Const(1)`, `Const(1.0)` and `Const(True)` differ."""

    value: Number
    kind: Kind = field(init=False)
    args: tuple[Expr, ...] = field(init=False, default=())
    _hash: int = field(init=False)

    def __post_init__(self) -> None:
        kind: Kind = "bool" if isinstance(self.value, bool) else "int" if isinstance(self.value, int) else "float"
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "_hash", hash(("const", *self._key())))

    def _key(self) -> tuple[object, ...]:
        # repr tells 0.0 from -0.0, and makes nan equal to itself.
        return (self.kind, repr(self.value))

    def __reduce__(self) -> tuple[object, ...]:
        return Const, (self.value,)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Table(Expr):
    """The entry of a captured array at integer indices, one for each dimension."""

    captured: Captured
    args: tuple[Expr, ...]
    kind: Kind = field(init=False)
    _hash: int = field(init=False)

    def __post_init__(self) -> None:
        if len(self.args) != len(self.captured.shape):
            raise MaskError(f"{self.captured!r} needs {len(self.captured.shape)} indices; found {len(self.args)}.")
        for index in self.args:
            if index.kind != "int":
                raise MaskError(
                    f"{self.captured!r} is indexed by {index}, which is {index.kind}; an index must be int."
                )
        object.__setattr__(self, "kind", self.captured.kind)
        object.__setattr__(self, "_hash", hash(("table", self.captured, self.args)))

    def _key(self) -> tuple[object, ...]:
        return (self.captured,)

    def __reduce__(self) -> tuple[object, ...]:
        return Table, (self.captured, self.args)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Apply(Expr):
    """An operation of `OPS` on operands that already have the kinds it takes; build it with `apply`."""

    op: str
    args: tuple[Expr, ...]
    kind: Kind
    _hash: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.op, self.args)))

    def _key(self) -> tuple[object, ...]:
        return (self.op,)

    def __reduce__(self) -> tuple[object, ...]:
        return Apply, (self.op, self.args, self.kind)


def as_expr(value: Expr | Number) -> Expr:
    """`value` itself, or the constant it is."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool | int | float):
        return Const(value)
    raise MaskError(
        f"an expression holds numbers, variables and captured arrays; found {type(value).__name__} {value!r}."
    )


def cast_to(kind: Kind, value: Expr) -> Expr:
    """`value` converted to `kind`: to int truncates, to bool compares with zero."""
    if value.kind == kind:
        return value
    if isinstance(value, Const):
        number = value.value
        if kind == "bool":
            return Const(bool(number))
        if kind == "float":
            return Const(float(number))
        if abs(number) < float("inf"):
            return Const(int(number))
    return Apply(f"to_{kind}", (value,), kind)


def apply(op: str, *operands: Expr | Number) -> Expr:
    """The operation `op` of `OPS` on operands, which are converted to the kinds it takes.

    Raises:
        MaskError: The operation does not take operands of these kinds.
    """
    row, args = OPS[op], tuple(as_expr(operand) for operand in operands)
    assert len(args) == row.arity, (op, args)
    kinds = {arg.kind for arg in args}
    if op == "pow":
        return _power(args[0], args[1])
    if row.signature == "cast":
        return cast_to(cast(Kind, op.removeprefix("to_")), args[0])
    if row.signature == "arithmetic":
        if op == "floor" and kinds != {"float"}:
            return cast_to("int", args[0])
        kind: Kind = "float" if "float" in kinds else "int"
        return Apply(op, tuple(cast_to(kind, arg) for arg in args), kind)
    if row.signature == "floating":
        return Apply(op, tuple(cast_to("float", arg) for arg in args), "float")
    if row.signature == "comparison":
        common: Kind = "float" if "float" in kinds else "int"
        if kinds == {"bool"} and op in ("eq", "ne"):
            common = "bool"
        return Apply(op, tuple(cast_to(common, arg) for arg in args), "bool")
    if row.signature in ("bits", "integer"):
        if "float" in kinds:
            raise MaskError(
                f"`{row.symbol}` takes bool or int operands; found {', '.join(f'{a} ({a.kind})' for a in args)}."
            )
        common = "bool" if kinds == {"bool"} and row.signature == "bits" else "int"
        return Apply(op, tuple(cast_to(common, arg) for arg in args), common)
    condition, *branches = args
    branch_kinds = {branch.kind for branch in branches}
    common = "float" if "float" in branch_kinds else "int" if "int" in branch_kinds else "bool"
    return Apply(op, (cast_to("bool", condition), *(cast_to(common, branch) for branch in branches)), common)


_LARGEST_UNROLLED_POWER = 64


def _power(base: Expr, exponent: Expr) -> Expr:
    """`base ** exponent` for a constant exponent; small whole ones become multiplications, halves become roots."""
    if not isinstance(exponent, Const):
        raise MaskError(f"{base} ** {exponent}: the exponent must be a number; write exp2(y * log2(x)) for others.")
    value = exponent.value
    if value == int(value) and abs(value) <= _LARGEST_UNROLLED_POWER:
        if exponent.kind == "float":
            base = cast_to("float", base)
        result: Expr | None = None
        square, count = base, abs(int(value))
        while count:
            if count & 1:
                result = square if result is None else apply("mul", result, square)
            count >>= 1
            if count:
                square = apply("mul", square, square)
        if result is None:
            return Const(1.0 if base.kind == "float" else 1)
        return apply("div", 1.0, result) if value < 0 else result
    if value in (0.5, -0.5):
        return apply("sqrt" if value > 0 else "rsqrt", base)
    return Apply("pow", (cast_to("float", base), Const(float(value))), "float")


def postorder(roots: tuple[Expr, ...]) -> Iterator[Expr]:
    """Every distinct subexpression of `roots`, operands before what uses them."""
    done: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        node, is_ready = stack.pop()
        if node in done:
            continue
        if is_ready or not node.args:
            done.add(node)
            yield node
        else:
            stack.append((node, True))
            stack.extend((arg, False) for arg in reversed(node.args))


def _text(node: Expr, operands: list[tuple[str, int]]) -> tuple[str, int]:
    """Python-like text of a node and its precedence, from those of its operands."""
    if isinstance(node, Var):
        return node.name, 100
    if isinstance(node, Const):
        text = repr(node.value)
        return text, UNARY_PRECEDENCE if text.startswith("-") else 100
    if isinstance(node, Table):
        return f"{node.captured.name}[{', '.join(text for text, _ in operands)}]", 100
    row = OPS[cast(Apply, node).op]
    if not row.symbol:
        return f"{row.name.removeprefix('to_')}({', '.join(text for text, _ in operands)})", 100
    if row.arity == 1:
        text, precedence = operands[0]
        return row.symbol + (text if precedence > row.precedence else f"({text})"), row.precedence
    (left, left_precedence), (right, right_precedence) = operands
    # Comparisons do not chain, so an equal precedence is bracketed on both sides there.
    left_binds = left_precedence > row.precedence or (
        left_precedence == row.precedence and row.signature != "comparison"
    )
    left = left if left_binds else f"({left})"
    right = right if right_precedence > row.precedence else f"({right})"
    return f"{left} {row.symbol} {right}", row.precedence
