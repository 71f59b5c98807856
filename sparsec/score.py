"""Score modifiers: what happens to a score before softmax, as an expression with its derivative.

`ScoreMod` is what a user's `score_mod(score, b, h, q_idx, kv_idx)` becomes; the functions below are the common ones by
name. This file decides what a modifier carries and how it is printed for C++. It must not know kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsec.errors import MaskError, UnsupportedError
from sparsec.expr import CPP, Captured, Const, Expr, Table, Var, as_expr, trace_score_mod
from sparsec.expr.tree import apply

FloatArray = npt.NDArray[np.floating]
ScoreFunction = Callable[..., Any]  # of symbolic values


@dataclass(frozen=True)
class ScoreMod:
    """A score modifier.

    Attributes:
        expr: The modified score, of `score` (scaled), `b`, `h`, `q_idx`, `kv_idx` and captured arrays.
    """

    expr: Expr

    @cached_property
    def slope(self) -> Expr:
        """The derivative of the modified score by the score."""
        return self.expr.derivative("score").simplify()

    @property
    def digest(self) -> str:
        return self.expr.digest

    @cached_property
    def tables(self) -> tuple[Captured, ...]:
        """Captured arrays, each once, in the order the printed code takes them."""
        return tuple(dict.fromkeys((*self.expr.tables(), *self.slope.tables())))

    def value(self, score: FloatArray, b: int, h: int, q_idx: npt.NDArray[Any], kv_idx: npt.NDArray[Any]) -> FloatArray:
        """The modified scores, in the dtype of `score`."""
        return _evaluated(self.expr, score, b, h, q_idx, kv_idx)

    def slopes(
        self, score: FloatArray, b: int, h: int, q_idx: npt.NDArray[Any], kv_idx: npt.NDArray[Any]
    ) -> FloatArray:
        """The derivative at each score."""
        return _evaluated(self.slope, score, b, h, q_idx, kv_idx)

    def cpp_header(self) -> str:
        """The generated header of the CPU kernels: `struct Score`, as `templates/shared/score.hpp` expects it."""
        names = {table: f"table{number}_" for number, table in enumerate(self.tables)}
        members = "".join(f"  const {_CPP_TYPES[t.array.dtype.str[1:]]}* {name};\n" for t, name in names.items())
        fills = "".join(
            f"    {name} = (const {_CPP_TYPES[t.array.dtype.str[1:]]}*)tables[{number}];\n"
            for number, (t, name) in enumerate(names.items())
        )
        functions = "".join(
            _CPP_FUNCTION.format(name=name, expr=expr, body=_cpp_body(expr, names))
            for name, expr in (("value", self.expr), ("slope", self.slope))
        )
        return _CPP_HEADER.format(members=members, fills=fills, functions=functions)

    def __str__(self) -> str:
        return str(self.expr)


def as_score_mod(score_mod: ScoreMod | Expr | ScoreFunction) -> ScoreMod:
    """A modifier from whatever `compile` takes.

    Raises:
        MaskError: It cannot be traced; names the line.
        UnsupportedError: It captures a tensor that requires a gradient.
    """
    if isinstance(score_mod, ScoreMod):
        made = score_mod
    elif isinstance(score_mod, Expr):
        made = ScoreMod(score_mod.simplify())
    elif callable(score_mod):
        made = ScoreMod(trace_score_mod(score_mod).simplify())
    else:
        raise MaskError(f"score_mod takes a function, an expression or a ScoreMod; got {type(score_mod).__name__}")
    for table in made.tables:
        if table.is_trainable:
            raise UnsupportedError(
                f"score_mod captures {table.name!r}, which requires a gradient; gradients of captured tensors are not "
                "built yet: detach it"
            )
    return made


def alibi(slopes: object) -> ScoreMod:
    """`score + slopes[h] * (kv_idx - q_idx)`.

    Args:
        slopes: One a query head.

    Source: Press, Smith and Lewis, "Train Short, Test Long", ICLR 2022.
    """
    table = Captured(slopes, "slopes")
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
        table: `[q_heads, 2 * reach + 1]`.
    """
    captured = Captured(table, "bias")
    if len(captured.shape) != 2 or captured.shape[1] % 2 == 0:
        raise MaskError(f"relative_bias takes an array [q_heads, 2 * reach + 1]; got one of shape {captured.shape}")
    last = captured.shape[1] - 1
    index = apply("min", apply("max", _KV - _Q + last // 2, as_expr(0)), as_expr(last))
    return ScoreMod((_SCORE + Table(captured, (_H, index))).simplify())


def temperature(per_head: object) -> ScoreMod:
    """`score * per_head[h]`."""
    return ScoreMod((_SCORE * Table(Captured(per_head, "temperature"), (_H,))).simplify())


_SCORE, _H, _Q, _KV = Var("score"), Var("h"), Var("q_idx"), Var("kv_idx")
_CPP_TYPES = {"f4": "float", "f8": "double", "i4": "int32_t", "i8": "int64_t", "b1": "bool"}

_CPP_HEADER = """\
// Generated: a score modifier and its derivative by the score.
namespace sx {{
struct Score {{
  int32_t b, h;
{members}  Score(const void* const* tables, int32_t batch, int32_t head) : b(batch), h(head) {{
    (void)tables;
{fills}  }}
{functions}}};
}}  // namespace sx
"""
_CPP_FUNCTION = """\
  // {expr}
  template <class Q, class K> SX_INLINE vf {name}(vf score, Q q_idx, K kv_idx) const {{
{body}  }}
"""


def _cpp_body(expr: Expr, names: dict[Captured, str]) -> str:
    code = CPP.code((expr,), tables=names)
    return "".join(f"    {line}\n" for line in (*code.statements, f"return as_vf({code.results[0]});"))


def _evaluated(
    expr: Expr, score: FloatArray, b: int, h: int, q_idx: npt.NDArray[Any], kv_idx: npt.NDArray[Any]
) -> FloatArray:
    if isinstance(expr, Const):
        return np.full(score.shape, expr.value, score.dtype)
    values = expr.evaluate(score=score, b=np.array(b), h=np.array(h), q_idx=q_idx, kv_idx=kv_idx)
    shaped: FloatArray = np.broadcast_to(values, score.shape).astype(score.dtype)
    return shaped
