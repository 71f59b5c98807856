"""Score modifiers: what happens to a score before softmax, as an expression with its derivatives.

`ScoreMod` is what a user's `score_mod(score, b, h, q_idx, kv_idx)` becomes; the functions below are the common ones by
name, and `chain` puts several one after the other. This file decides what a modifier carries, which of its arrays are
arguments of a call, and how it is printed for C++. It must not know kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsec.errors import MaskError, SparsecError
from sparsec.expr import CPP, Captured, Const, Expr, Table, Var, as_expr, trace_score_mod
from sparsec.expr.captured import is_torch_tensor
from sparsec.expr.tree import Apply, apply

FloatArray = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]
ScoreFunction = Callable[..., Any]  # of symbolic values


@dataclass(frozen=True, slots=True)
class Places:
    """Where scores stand, as arrays that broadcast to the scores' shape.

    Attributes:
        b: The batch element.
        h: The query head.
        q_idx: Queries.
        kv_idx: Keys.
        edge: Numbers in the mask's order of edges; None where no modifier asks.
    """

    b: int
    h: int
    q_idx: Integers
    kv_idx: Integers
    edge: Integers | None = None


@dataclass(frozen=True)
class ScoreMod:
    """A score modifier.

    Attributes:
        expr: The modified score, of `score` (scaled), `b`, `h`, `q_idx`, `kv_idx`, `edge` and captured arrays.
        sinks: A logit for each query head that enters the denominator of softmax beside the scores, or None.
    """

    expr: Expr
    sinks: Captured | None = None

    @cached_property
    def slope(self) -> Expr:
        """The derivative of the modified score by the score."""
        return self.expr.derivative("score").simplify()

    @property
    def digest(self) -> str:
        """Of all that is fixed when it is made: what live arrays hold does not enter."""
        return self.expr.digest if self.sinks is None else f"{self.expr.digest}-{self.sinks.digest}"

    @cached_property
    def in_kernel(self) -> ScoreMod | None:
        """What kernels apply: all but the sinks; None where that is nothing."""
        if self.expr == _SCORE:
            return None
        return self if self.sinks is None else replace(self, sinks=None)

    @cached_property
    def tables(self) -> tuple[Captured, ...]:
        """Captured arrays of the expression, each once, in the order the printed code takes them."""
        return tuple(dict.fromkeys((*self.expr.tables(), *self.slope.tables())))

    @cached_property
    def live_tables(self) -> tuple[Captured, ...]:
        """Those that kernels are given anew at each call, in their order among `tables`."""
        return tuple(table for table in self.tables if table.is_live)

    @cached_property
    def arguments(self) -> tuple[Captured, ...]:
        """What `score_args` may replace: the live tables, then the sinks where they are live."""
        sinks = (self.sinks,) if self.sinks is not None and self.sinks.is_live else ()
        return (*self.live_tables, *sinks)

    @cached_property
    def look_ups(self) -> tuple[tuple[int, Table, Expr], ...]:
        """Every look-up in a live table: the table's number among those, the look-up, and its derivative."""
        numbers = {table: number for number, table in enumerate(self.live_tables)}
        nodes = [node for node in self.expr.walk() if isinstance(node, Table) and node.captured.is_live]
        return tuple((numbers[node.captured], node, self.expr.derivative(node).simplify()) for node in nodes)

    @cached_property
    def needs_edges(self) -> bool:
        """Whether it asks for the numbers of edges."""
        return "edge" in self.expr.variables()

    @cached_property
    def batch_limit(self) -> int | None:
        """How many batch elements its arrays have entries for; None where none is indexed by the batch element."""
        nodes = [node for node in self.expr.walk() if isinstance(node, Table)]
        sizes = [node.captured.shape[axis] for node in nodes for axis, index in enumerate(node.args) if index == _B]
        return min(sizes, default=None)

    def __reduce__(self) -> tuple[object, ...]:
        # Without what is cached beside the fields.
        return ScoreMod, (self.expr, self.sinks)

    def given(self, tensors: Sequence[Any]) -> ScoreMod:
        """This modifier with other tensors in place of its live tables."""
        made = {
            table: Captured(tensor.detach(), table.name, is_live=True)
            for table, tensor in zip(self.live_tables, tensors, strict=True)
        }

        def rule(node: Expr) -> Expr | None:
            return Table(made[node.captured], node.args) if isinstance(node, Table) and node.captured in made else None

        return replace(self, expr=self.expr.replace(rule)) if made else self

    def value(self, score: FloatArray, places: Places) -> FloatArray:
        """The modified scores, in the dtype of `score`."""
        return _evaluated(self.expr, score, places)

    def slopes(self, score: FloatArray, places: Places) -> FloatArray:
        """The derivative at each score."""
        return _evaluated(self.slope, score, places)

    def add_gradients(
        self,
        d_value: FloatArray,
        score: FloatArray,
        places: Places,
        into: Sequence[npt.NDArray[np.floating]],
        *,
        sizes: bool = False,
    ) -> None:
        """Adds to the gradients of the live tables what those of modified scores contribute.

        Args:
            d_value: Gradients of the modified scores; nothing is added where they are 0.
            score: The scores.
            places: Where they stand.
            into: An array for each live table, of its shape.
            sizes: Whether to add the absolute values instead.
        """
        counted = np.nonzero(d_value)
        for number, look_up, factor in self.look_ups:
            indices = [np.broadcast_to(_integers(index, places), d_value.shape)[counted] for index in look_up.args]
            share = d_value[counted] * _evaluated(factor, score, places)[counted]
            np.add.at(into[number], look_up.captured.wrapped(indices), np.abs(share) if sizes else share)

    def check(self, extents: Mapping[str, int]) -> None:
        """Raises where an array is too short for the variable it is indexed by, or of the wrong length for the edges.

        Args:
            extents: How many values `h`, `q_idx`, `kv_idx` and `edge` take (and `b`, where that is known).

        Raises:
            SparsecError: It names the array, what it has and what it needs.
        """
        for node in self.expr.walk():
            if not isinstance(node, Table):
                continue
            for axis, index in enumerate(node.args):
                wanted = extents.get(index.name) if isinstance(index, Var) else None
                found = node.captured.shape[axis]
                if wanted is not None and (found < wanted or (index == _EDGE and found != wanted)):
                    raise SparsecError(
                        f"score_mod: {node.captured.name!r} of shape {node.captured.shape} is indexed by "
                        f"{_MEANINGS[str(index)]} in dimension {axis}, and there are {wanted:,}: give it one entry each"
                    )
        if self.sinks is not None and self.sinks.shape != (extents["h"],):
            raise SparsecError(
                f"sinks take one logit a query head; found shape {self.sinks.shape} for {extents['h']} query heads"
            )

    def cpp_header(self) -> str:
        """The generated header of the CPU kernels: `struct Score`, as `templates/shared/score.hpp` expects it."""
        names = {table: f"table{number}_" for number, table in enumerate(self.tables)}
        types = {table: _CPP_TYPES[table.dtype.str[1:]] for table in self.tables}
        live = range(len(self.live_tables))
        return _CPP_HEADER.format(
            needs_edges=str(self.needs_edges).lower(),
            n_live=len(self.live_tables),
            members="".join(f"  const {types[table]}* {name};\n" for table, name in names.items())
            + "".join(f"  float* gradient{number}_ = nullptr;\n" for number in live),
            fills="".join(
                f"    {name} = (const {types[table]}*)tables[{number}];\n"
                for number, (table, name) in enumerate(names.items())
            ),
            takes="".join(f"    gradient{number}_ = at({number});\n" for number in live),
            functions="".join(
                _CPP_FUNCTION.format(name=name, expr=expr, body=_cpp_body(expr, names))
                for name, expr in (("value", self.expr), ("slope", self.slope))
            ),
            scatters="".join(_cpp_scatter(*look_up, names) for look_up in self.look_ups),
        )

    def __str__(self) -> str:
        return str(self.expr) if self.sinks is None else f"{self.expr}, with sinks"


def as_score_mod(score_mod: ScoreMod | Expr | ScoreFunction) -> ScoreMod:
    """A modifier from whatever `compile` takes.

    Raises:
        MaskError: It cannot be traced; names the line.
    """
    if isinstance(score_mod, ScoreMod):
        return score_mod
    if isinstance(score_mod, Expr):
        return ScoreMod(score_mod.simplify())
    if callable(score_mod):
        return ScoreMod(trace_score_mod(score_mod))
    raise MaskError(f"score_mod takes a function, an expression or a ScoreMod; got {type(score_mod).__name__}")


def chain(*score_mods: ScoreMod | Expr | ScoreFunction) -> ScoreMod:
    """Several modifiers as one: the first is given the scaled score, each other what the one before it made.

    Raises:
        MaskError: As for `compile`; or two of them have sinks.
    """
    expr: Expr = _SCORE
    found: Captured | None = None
    for each in map(as_score_mod, score_mods):
        expr = each.expr.substitute({"score": expr})
        if found is not None and each.sinks is not None:
            raise MaskError(
                "chain: two of its modifiers have sinks, and softmax has one for each head: add their logits"
            )
        found = each.sinks if found is None else found
    return ScoreMod(expr.simplify(), found)


def alibi(slopes: object) -> ScoreMod:
    """`score + slopes[h] * (kv_idx - q_idx)`.

    Args:
        slopes: One a query head.

    Source: Press, Smith and Lewis, "Train Short, Test Long", ICLR 2022.
    """
    table = _captured(slopes, "slopes", (1,), "alibi takes one slope a query head")
    return ScoreMod((_SCORE + Table(table, (_H,)) * (_KV - _Q)).simplify())


def soft_cap(cap: float) -> ScoreMod:
    """`cap * tanh(score / cap)`.

    Source: Gemma 2 technical report (2024), section 2.
    """
    if not cap > 0:
        raise MaskError(f"soft_cap takes a positive number; got {cap}")
    return ScoreMod((apply("tanh", _SCORE / cap) * cap).simplify())


def relative_bias(table: object) -> ScoreMod:
    """`score + table[h, kv_idx - q_idx + reach]`, distances beyond the table's ends taking its ends.

    Args:
        table: `[q_heads, 2 * reach + 1]`, or `[2 * reach + 1]` for all heads.
    """
    wanted = "relative_bias takes an array [q_heads, 2 * reach + 1] or [2 * reach + 1]"
    captured = _captured(table, "bias", (1, 2), wanted)
    if captured.shape[-1] % 2 == 0:
        raise MaskError(f"{wanted}; got one of shape {captured.shape}")
    last = captured.shape[-1] - 1
    index = apply("min", apply("max", _KV - _Q + last // 2, as_expr(0)), as_expr(last))
    return ScoreMod((_SCORE + _look_up(captured, index)).simplify())


def temperature(per_head: object) -> ScoreMod:
    """`score * per_head[h]`."""
    table = _captured(per_head, "temperature", (1,), "temperature takes one factor a query head")
    return ScoreMod((_SCORE * Table(table, (_H,))).simplify())


def head_bias(bias: object) -> ScoreMod:
    """`score + bias[h]`: of use beside sinks, for softmax alone ignores it.

    Args:
        bias: One a query head.
    """
    table = _captured(bias, "bias", (1,), "head_bias takes one number a query head")
    return ScoreMod((_SCORE + Table(table, (_H,))).simplify())


def row_bias(bias: object) -> ScoreMod:
    """`score + bias[..., q_idx]`: of use beside sinks, for softmax alone ignores it.

    Args:
        bias: `[q_len]`, `[q_heads, q_len]` or `[batch, q_heads, q_len]`.
    """
    return _positional(bias, _Q, "row_bias", "q_len")


def column_bias(bias: object) -> ScoreMod:
    """`score + bias[..., kv_idx]`.

    Args:
        bias: `[kv_len]`, `[q_heads, kv_len]` or `[batch, q_heads, kv_len]`.
    """
    return _positional(bias, _KV, "column_bias", "kv_len")


def edge_bias(bias: object) -> ScoreMod:
    """`score + bias[..., edge]`: a number for every pair that the mask attends.

    Edges are in the order of `bound.to_csr()`: query by query, and by key within a query.

    Args:
        bias: `[nnz]`, `[q_heads, nnz]` or `[batch, q_heads, nnz]`; fewer than 2³¹ numbers.

    Source: Ying et al., "Do Transformers Really Perform Bad for Graph Representation?", NeurIPS 2021, section 3.1.3.
    """
    return _positional(bias, _EDGE, "edge_bias", "nnz")


def sinks(logits: object) -> ScoreMod:
    """The score as it is, and one more logit in each head's softmax that no value belongs to.

    With `lse` of the scores alone, `out` is multiplied by `exp(lse - lse')` and the log-sum-exp is
    `lse' = log(exp(lse) + exp(logits[h]))`; an empty row gives `out = 0`, `lse' = logits[h]`.

    Args:
        logits: One a query head; -inf for none.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024; learned, as in the model
    card of gpt-oss (2025), section 2.2.
    """
    return ScoreMod(_SCORE, _captured(logits, "sinks", (1,), "sinks take one logit a query head"))


_SCORE, _B, _H, _Q, _KV = Var("score"), Var("b"), Var("h"), Var("q_idx"), Var("kv_idx")
_EDGE = Var("edge")
_MEANINGS = {
    "b": "the batch element (b)",
    "h": "the query head (h)",
    "q_idx": "the query (q_idx)",
    "kv_idx": "the key (kv_idx)",
    "edge": "the edge of the mask",
}
_CPP_TYPES = {"f4": "float", "f8": "double", "i4": "int32_t", "i8": "int64_t", "b1": "bool"}


def _captured(value: object, name: str, dims: tuple[int, ...], wanted: str) -> Captured:
    captured = Captured(value, name, is_live=True)
    if len(captured.shape) not in dims:
        raise MaskError(f"{wanted}; got one of shape {captured.shape}")
    if is_torch_tensor(value) and not captured.is_live:
        raise MaskError(f"{wanted}, of floats; got a tensor of {value.dtype}")  # type: ignore[attr-defined]  # a tensor's
    return captured


def _positional(value: object, place: Expr, name: str, length: str) -> ScoreMod:
    wanted = f"{name} takes an array [{length}], [q_heads, {length}] or [batch, q_heads, {length}]"
    captured = _captured(value, name, (1, 2, 3), wanted)
    return ScoreMod((_SCORE + _look_up(captured, place)).simplify())


def _look_up(captured: Captured, place: Expr) -> Table:
    """The entry for a place, of this head and batch element where the array tells them apart."""
    return Table(captured, (_B, _H, place)[3 - len(captured.shape) :])


_CPP_HEADER = """\
// Generated: a score modifier, its derivative by the score, and what a score adds to the gradients of live tables.
namespace sx {{
struct Score {{
  static constexpr bool NEEDS_EDGES = {needs_edges};
  static constexpr int LIVE_TABLES = {n_live};
  int32_t b, h;
{members}  Score(const void* const* tables, int32_t batch, int32_t head) : b(batch), h(head) {{
    (void)tables;
{fills}  }}
  template <class At> void take_gradients(At&& at) {{
    (void)at;
{takes}  }}
{functions}  template <class Q, class K, class E>
  SX_INLINE void scatter(vf d_value, vf score, Q q_idx, K kv_idx, E edge, uint32_t live) const {{
{scatters}  }}
}};
}}  // namespace sx
"""
_CPP_FUNCTION = """\
  // {expr}
  template <class Q, class K, class E> SX_INLINE vf {name}(vf score, Q q_idx, K kv_idx, E edge) const {{
{body}  }}
"""
_CPP_SCATTER = """\
    if (gradient{number}_) {{
{statements}      sx_scatter(gradient{number}_, {index}, sx_chained(d_value, as_vf({factor})), live);
    }}
"""


def _cpp_body(expr: Expr, names: dict[Captured, str]) -> str:
    code = CPP.code((expr.replace(_multiplied),), tables=names)
    return "".join(f"    {line}\n" for line in (*code.statements, f"return as_vf({code.results[0]});"))


def _multiplied(node: Expr) -> Expr | None:
    """The product instead of a quotient by a number: one more rounding, and no division."""
    if not (isinstance(node, Apply) and node.op == "div" and isinstance(node.args[1], Const)):
        return None
    divisor = float(node.args[1].value)
    return node.args[0] * (1.0 / divisor) if 1e-30 < abs(divisor) < 1e30 else None


def _cpp_scatter(number: int, look_up: Table, factor: Expr, names: dict[Captured, str]) -> str:
    code = CPP.code((offset_of(look_up), factor.replace(_multiplied)), tables=names)
    statements = "".join(f"      {line}\n" for line in code.statements)
    return _CPP_SCATTER.format(number=number, statements=statements, index=code.results[0], factor=code.results[1])


def offset_of(look_up: Table) -> Expr:
    """Where in its array a look-up reads, counted through all dimensions; as `Captured.wrapped` says."""
    total: Expr = Const(0)
    for index, size in zip(look_up.args, look_up.captured.shape, strict=True):
        from_end = apply("where", index < 0, index + size, index)
        inside = apply("min", apply("max", from_end, as_expr(0)), as_expr(size - 1))
        total = total * size + inside
    return total.simplify()


def _values(places: Places) -> dict[str, npt.ArrayLike]:
    numbered = {} if places.edge is None else {"edge": places.edge}
    return {"b": places.b, "h": places.h, "q_idx": places.q_idx, "kv_idx": places.kv_idx, **numbered}


def _integers(expr: Expr, places: Places) -> Integers:
    found: Integers = np.asarray(expr.evaluate(**_values(places)))
    return found


def _evaluated(expr: Expr, score: FloatArray, places: Places) -> FloatArray:
    if isinstance(expr, Const):
        return np.full(score.shape, expr.value, score.dtype)
    values = expr.evaluate(score=score, **_values(places))
    shaped: FloatArray = np.broadcast_to(values, score.shape).astype(score.dtype)
    return shaped
