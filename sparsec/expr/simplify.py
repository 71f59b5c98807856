"""Equal expressions in a normal form.

Constants are folded, identities removed, sums of integers brought to `Σ coefficient × atom + constant`, and integer
comparisons to such a sum against a constant, so that `q_idx >= kv_idx` and `q_idx - kv_idx >= 0` become one expression.
This file decides the normal form; what it returns has the same value everywhere, to the last bit of a float in whatever
precision it is computed (nan, signed zeros and what leaves the range of fp32 apart), and it must not know what the
expression is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import cast

import numpy as np

from sparsec.expr.ops import NEGATED_COMPARISON, OPS, SWAPPED_COMPARISON
from sparsec.expr.tree import VARIABLES, Apply, Const, Expr, Table, Var, apply

TRUE, FALSE = Const(True), Const(False)
_VARIABLE_ORDER = {name: index for index, name in enumerate(VARIABLES)}
# Integers are computed in int64; what might leave it is not rearranged.
_LARGEST_COEFFICIENT = 1 << 40
# Repeated and contradicting operands are looked for in chains up to this long: the search is quadratic.
_LONGEST_CHAIN = 64


def simplify(expr: Expr) -> Expr:
    """An equal expression in normal form; simplifying it again changes nothing."""
    for _ in range(8):
        simpler = expr.replace(_simplify_node)
        if simpler == expr:
            break
        expr = simpler
    return expr


def linear_form(expr: Expr) -> tuple[dict[str, int], int] | None:
    """`expr` as a sum of integer multiples of variables.

    Returns:
        ({variable: coefficient}, constant) without zero coefficients, or None when `expr` is no such sum.
    """
    if expr.kind != "int":
        return None
    terms, constant = _Linear.of(expr.simplify()).parts
    if not all(isinstance(atom, Var) for atom in terms):
        return None
    return {cast(Var, atom).name: coefficient for atom, coefficient in terms.items()}, constant


def offset_form(expr: Expr) -> Expr | None:
    """`expr` as a function of the offset `kv_idx - q_idx`.

    Returns:
        An equal expression at query 0, so that its `kv_idx` is the offset (which may be negative), or None when `expr`
        uses a position in any other way.
    """
    shifted = expr.substitute({"kv_idx": Var("kv_idx") + Var("q_idx")}).simplify()
    return None if "q_idx" in shifted.variables() else shifted


def depends_on_offset_only(expr: Expr) -> bool:
    """Whether positions enter only through `kv_idx - q_idx`."""
    return offset_form(expr) is not None


class _Linear:
    """A sum of integer multiples of atoms: int expressions that are no sums themselves."""

    __slots__ = ("constant", "terms")

    def __init__(self, terms: dict[Expr, int], constant: int) -> None:
        self.terms = {atom: coefficient for atom, coefficient in terms.items() if coefficient}
        self.constant = constant

    @property
    def parts(self) -> tuple[dict[Expr, int], int]:
        return self.terms, self.constant

    @staticmethod
    def of(expr: Expr) -> _Linear:
        """The sum `expr` is; walks nested sums without recursion."""
        terms: dict[Expr, int] = {}
        constant = 0
        stack = [(expr, 1)]
        while stack:
            node, factor = stack.pop()
            op = node.op if isinstance(node, Apply) else None
            if isinstance(node, Const):
                constant += factor * int(node.value)
            elif op == "add":
                stack += [(arg, factor) for arg in node.args]
            elif op == "sub":
                stack += [(node.args[0], factor), (node.args[1], -factor)]
            elif op == "neg":
                stack.append((node.args[0], -factor))
            elif op == "mul" and (scaled := _constant_factor(node)) is not None:
                stack.append((scaled[0], factor * scaled[1]))
            else:
                terms[node] = terms.get(node, 0) + factor
        return _Linear(terms, constant)

    def scaled(self, factor: int) -> _Linear:
        return _Linear({atom: c * factor for atom, c in self.terms.items()}, self.constant * factor)

    @property
    def is_safe(self) -> bool:
        return all(abs(value) <= _LARGEST_COEFFICIENT for value in (*self.terms.values(), self.constant))

    def ordered(self) -> list[tuple[Expr, int]]:
        """Terms in a fixed order: variables first."""
        return sorted(self.terms.items(), key=lambda term: _order(term[0]))

    def expr(self) -> Expr:
        """The sum: positive terms first, a common factor taken out."""
        terms = self.ordered()
        factor = math.gcd(self.constant, *self.terms.values()) if len(terms) + (self.constant != 0) > 1 else 1
        if factor > 1:
            return apply("mul", _Linear({a: c // factor for a, c in terms}, self.constant // factor).expr(), factor)
        terms.sort(key=lambda term: term[1] < 0)
        result: Expr | None = None
        for atom, coefficient in terms:
            term = atom if abs(coefficient) == 1 else apply("mul", atom, abs(coefficient))
            if result is None:
                result = term if coefficient > 0 else apply("neg", term)
            else:
                result = apply("add" if coefficient > 0 else "sub", result, term)
        if result is None:
            return Const(self.constant)
        if self.constant:
            result = apply("add" if self.constant > 0 else "sub", result, abs(self.constant))
        return result


def _constant_factor(node: Expr) -> tuple[Expr, int] | None:
    left, right = node.args
    if isinstance(right, Const):
        return left, int(right.value)
    if isinstance(left, Const):
        return right, int(left.value)
    return None


def _order(atom: Expr) -> tuple[int, int, str]:
    if isinstance(atom, Var):
        return 0, _VARIABLE_ORDER[atom.name], ""
    # Text orders look-ups of one array; their digests, arrays of one name.
    digests = "".join(captured.digest for captured in atom.tables())
    return 1, min((_VARIABLE_ORDER[name] for name in atom.variables()), default=9), f"{atom}{digests}"


def _simplify_node(node: Expr) -> Expr | None:
    """A simpler equal expression for a node whose operands are in normal form, or None."""
    if isinstance(node, Table) and all(isinstance(index, Const) for index in node.args):
        if node.captured.is_live:
            return None
        value = node.captured.gather([np.asarray(cast(Const, index).value) for index in node.args]).item()
        # Tables of float64 are read in fp32.
        return Const(float(np.float32(value)) if node.kind == "float" else value)
    if not isinstance(node, Apply):
        return None
    if all(isinstance(arg, Const) for arg in node.args):
        return _folded(node)
    if node.op in NEGATED_COMPARISON and node.args[0].kind == "int":
        return _comparison(node)
    if node.kind == "int" and node.op in ("add", "sub", "neg", "mul"):
        linear = _Linear.of(node)
        return linear.expr() if linear.is_safe else None
    rule = _RULES.get(node.op)
    return rule(node) if rule else None


def _folded(node: Apply) -> Expr | None:
    if node.op == "to_int" and node.args[0].kind == "float":
        return None
    values = [np.asarray(cast(Const, arg).value) for arg in node.args]
    with np.errstate(all="ignore"):
        value = np.asarray(OPS[node.op].numpy(*values)).item()
        if any(each.dtype.kind == "f" for each in values):
            # What fp32 would round is left to be computed in the precision of the rest.
            in_fp32 = [each.astype(np.float32) if each.dtype.kind == "f" else each for each in values]
            if np.asarray(OPS[node.op].numpy(*in_fp32)).item() != value:
                return None
    if node.kind == "int" and abs(value) > _LARGEST_COEFFICIENT:
        return None
    return Const({"bool": bool, "int": int, "float": float}[node.kind](value))


def _comparison(node: Apply) -> Expr | None:
    """Σ terms compared with a constant: leading coefficient positive, common factor divided out, no strict order."""
    linear = _Linear.of(apply("sub", *node.args))
    if not linear.is_safe:
        return None
    op, terms = node.op, linear.ordered()
    if not terms:
        return Const(bool(OPS[op].numpy(linear.constant, 0)))
    if terms[0][1] < 0:
        linear, op = linear.scaled(-1), SWAPPED_COMPARISON[op]
    factor, bound = math.gcd(*linear.terms.values()), -linear.constant
    if op in ("lt", "gt"):
        op, bound = ("le", bound - 1) if op == "lt" else ("ge", bound + 1)
    if op in ("eq", "ne"):
        if bound % factor:
            return Const(op == "ne")
        bound //= factor
    else:
        bound = bound // factor if op == "le" else -(-bound // factor)
    left = _Linear({atom: c // factor for atom, c in linear.terms.items()}, 0)
    if op in ("eq", "ne") and (periodic := _same_remainder(op, left, bound)) is not None:
        return periodic
    if bound == 0 and sorted(left.terms.values()) == [-1, 1]:
        first, second = (atom for atom, _ in left.ordered())
        return apply(op, first, second)
    return apply(op, left.expr(), bound)


def _same_remainder(op: str, left: _Linear, bound: int) -> Expr | None:
    """`(a - b) % m == 0` for `a % m == b % m`, and `x % m == 0` for `-x % m == 0`."""
    atoms = [atom for atom, _ in left.ordered()]
    remainders = [atom for atom in atoms if isinstance(atom, Apply) and atom.op == "mod"]
    if len(remainders) != len(atoms) or bound != 0 or len({atom.args[1] for atom in remainders}) != 1:
        return None
    modulus = remainders[0].args[1]
    if not isinstance(modulus, Const):
        return None
    if len(atoms) == 2 and sorted(left.terms.values()) == [-1, 1]:
        inner = _Linear.of(apply("sub", remainders[0].args[0], remainders[1].args[0]))
    elif len(atoms) == 1:
        inner = _Linear.of(remainders[0].args[0])
        if not inner.terms or inner.ordered()[0][1] > 0:
            return None
    else:
        return None
    if inner.terms and inner.ordered()[0][1] < 0:
        inner = inner.scaled(-1)
    return apply(op, apply("mod", inner.expr(), modulus), 0)


def _conjunction(node: Apply) -> Expr | None:
    """`&` and `|` of bools: neutral, absorbing, repeated and contradicting operands."""
    if node.kind != "bool":
        return None
    absorbing, neutral = Const(node.op == "or"), Const(node.op == "and")
    left, right = node.args
    if absorbing in (left, right):
        return absorbing
    if neutral in (left, right):
        return right if left == neutral else left
    parts: list[Expr] = []
    stack = [right, left]
    while stack:
        part = stack.pop()
        if isinstance(part, Apply) and part.op == node.op:
            stack.extend(reversed(part.args))
        else:
            parts.append(part)
        if len(parts) + len(stack) > _LONGEST_CHAIN:
            return None
    kept = dict.fromkeys(parts)
    if any(_negated(part) in kept for part in kept):
        return absorbing
    if len(kept) == len(parts):
        return None
    return reduce(partial(apply, node.op), kept)


def _negated(part: Expr) -> Expr:
    inner = cast(Apply, apply("not", part))
    moved = _not(inner)
    return inner if moved is None else moved


def _not(node: Apply) -> Expr | None:
    (inner,) = node.args
    if not isinstance(inner, Apply):
        return None
    if inner.op == "not":
        return inner.args[0]
    if inner.op in NEGATED_COMPARISON and inner.args[0].kind == "int":
        return _comparison(cast(Apply, apply(NEGATED_COMPARISON[inner.op], *inner.args)))
    if inner.op in ("and", "or") and node.kind == "bool":
        # De Morgan, where both sides take the negation without growing.
        sides = [apply("not", arg) for arg in inner.args]
        moved = [_not(cast(Apply, side)) for side in sides]
        if all(side is not None for side in moved):
            return apply("or" if inner.op == "and" else "and", *cast(list[Expr], moved))
    return None


def _xor(node: Apply) -> Expr | None:
    left, right = node.args
    if node.kind != "bool":
        return None
    for a, b in ((left, right), (right, left)):
        if isinstance(b, Const):
            return apply("not", a) if b.value else a
    return FALSE if left == right else None


def _bool_equality(node: Apply) -> Expr | None:
    if node.args[0].kind != "bool":
        return None
    differs = apply("xor", *node.args)
    return differs if node.op == "ne" else apply("not", differs)


def _where(node: Apply) -> Expr | None:
    condition, a, b = node.args
    if isinstance(condition, Const):
        return a if condition.value else b
    if a == b:
        return a
    if node.kind != "bool":
        return None
    if isinstance(a, Const):
        return apply("or", condition, b) if a.value else apply("and", apply("not", condition), b)
    if isinstance(b, Const):
        return apply("or", apply("not", condition), a) if b.value else apply("and", condition, a)
    return None


def _floordiv(node: Apply) -> Expr | None:
    a, b = node.args
    if node.kind == "int" and isinstance(b, Const):
        if b.value == 1:
            return a
        linear, divisor = _Linear.of(a), int(b.value)
        if divisor > 0 and linear.is_safe and all(c % divisor == 0 for c in (*linear.terms.values(), linear.constant)):
            return _Linear({t: c // divisor for t, c in linear.terms.items()}, linear.constant // divisor).expr()
    return None


def _mod(node: Apply) -> Expr | None:
    a, b = node.args
    if node.kind != "int" or not isinstance(b, Const) or int(b.value) <= 0:
        return None
    modulus, linear = int(b.value), _Linear.of(a)
    # Coefficients modulo m, the one of the two representatives that is smaller in magnitude.
    reduced = _Linear({atom: _balanced(c, modulus) for atom, c in linear.terms.items()}, linear.constant % modulus)
    if not reduced.terms:
        return Const(reduced.constant)
    if reduced.terms == linear.terms and reduced.constant == linear.constant:
        return None
    return apply("mod", reduced.expr(), modulus)


def _balanced(value: int, modulus: int) -> int:
    if abs(value) * 2 <= modulus:
        return value
    value %= modulus
    return value - modulus if value * 2 > modulus else value


def _float_sum(node: Apply) -> Expr | None:
    a, b = node.args
    if _is(b, 0):
        return a
    if _is(a, 0):
        return b if node.op == "add" else apply("neg", b)
    if isinstance(b, Apply) and b.op == "neg":
        return apply("sub" if node.op == "add" else "add", a, b.args[0])
    return None


def _float_product(node: Apply) -> Expr | None:
    a, b = node.args
    if _is(b, 1):
        return a
    if _is(b, -1):
        return apply("neg", a)
    if node.op == "mul":
        if isinstance(a, Const):
            # Constants last, so that nested ones meet.
            return apply("mul", b, a)
        if isinstance(b, Const) and isinstance(a, Apply) and a.op == "mul" and isinstance(a.args[1], Const):
            first, second = float(a.args[1].value), float(b.value)
            # Two factors are one where a product with either is exact.
            if _is_power_of_two(first) or _is_power_of_two(second):
                return apply("mul", a.args[0], first * second)
        for x, y in ((a, b), (b, a)):
            if isinstance(x, Apply) and x.op == "neg":
                return apply("neg", apply("mul", x.args[0], y))
    elif isinstance(b, Const) and _is_power_of_two(b.value):
        # The reciprocal of a power of two is exact.
        return apply("mul", a, 1.0 / b.value)
    return None


def _is_power_of_two(value: float) -> bool:
    return math.frexp(value)[0] in (0.5, -0.5)


def _negation(node: Apply) -> Expr | None:
    (a,) = node.args
    if isinstance(a, Apply) and a.op == "neg":
        return a.args[0]
    if isinstance(a, Apply) and a.op == "sub":
        return apply("sub", a.args[1], a.args[0])
    if isinstance(a, Apply) and a.op == "mul" and isinstance(a.args[1], Const):
        return apply("mul", a.args[0], -a.args[1].value)
    return None


def _extremum(node: Apply) -> Expr | None:
    a, b = node.args
    if a == b:
        return a
    if isinstance(a, Const):
        return apply(node.op, b, a)
    if isinstance(b, Const) and isinstance(a, Apply) and a.op == node.op and isinstance(a.args[1], Const):
        choose = min if node.op == "min" else max
        return apply(node.op, a.args[0], choose(a.args[1].value, b.value))
    return None


def _absolute(node: Apply) -> Expr | None:
    (a,) = node.args
    if isinstance(a, Apply) and a.op in ("abs", "neg"):
        return apply("abs", a.args[0])
    if node.kind == "int":
        linear = _Linear.of(a)
        if linear.terms and linear.ordered()[0][1] < 0 and linear.is_safe:
            return apply("abs", linear.scaled(-1).expr())
    return None


def _cast(node: Apply) -> Expr | None:
    (a,) = node.args
    if node.op == "to_bool" and a.kind in ("int", "float"):
        return apply("ne", a, 0)
    return None


def _is(expr: Expr, value: float) -> bool:
    return isinstance(expr, Const) and expr.kind == "float" and expr.value == value


_RULES: dict[str, Callable[[Apply], Expr | None]] = {
    "and": _conjunction,
    "or": _conjunction,
    "not": _not,
    "xor": _xor,
    "eq": _bool_equality,
    "ne": _bool_equality,
    "where": _where,
    "floordiv": _floordiv,
    "mod": _mod,
    "add": _float_sum,
    "sub": _float_sum,
    "mul": _float_product,
    "div": _float_product,
    "neg": _negation,
    "min": _extremum,
    "max": _extremum,
    "abs": _absolute,
    "to_bool": _cast,
}
