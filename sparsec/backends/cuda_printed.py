"""A launch's expressions as CUDA C++: its score modifier, its mask's predicate, and the arrays that they look up.

This file decides the text of the generated headers and how captured arrays are passed. It must not know the kernels
that include them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sparsec.backends.base import Launch
from sparsec.backends.table_gradients import is_by_edge
from sparsec.errors import UnsupportedError
from sparsec.expr import CUDA, CUDA_FUNCTIONS, Captured, Expr, apply, needs_int64
from sparsec.expr.tree import cast_to
from sparsec.masks.mask import BoundMask
from sparsec.score import ScoreMod, offset_of

# What the kernels call the headers that a program carries.
SCORE_HEADER: Final = "score_generated.cuh"
MASK_HEADER: Final = "mask_generated.cuh"
# `kMaxTables` of shared/launch.cuh.
MAX_TABLES: Final = 16
# Kernels ask for positions beyond the end of a ragged tile, never by more than this.
_RAGGED: Final = 128
# More batch elements and heads than these are in no GPU's memory.
_MOST: Final = 1 << 20
_TYPES: Final = {"f4": "float", "f8": "float", "i4": "int", "i8": "long long", "b1": "bool"}
_HEADER: Final = """\
// Generated: {what}.
#pragma once
namespace sx {{
#if !defined(SX_FUNCTIONS)
#define SX_FUNCTIONS
{given}
#endif
struct {name} {{
{functions}}};
}}  // namespace sx
"""
_FUNCTION: Final = """\
  // {expr}
  static SX_INLINE float {name}(
      const void* const* tables, float score, int b, int h, int q_idx, int kv_idx, int edge = 0) {{
{body}    return static_cast<float>({result});
  }}
"""
# Positions in the tokens' order of the launch; 64 bits wide where what is made of them asks for it.
_PREDICATE: Final = """\
  using Index = {index};
  // {expr}
  static SX_INLINE bool holds(const void* const* tables, Index q_idx, Index kv_idx) {{
{body}    return static_cast<bool>({result});
  }}
"""
# `kept` are sums over a row's edges of what goes to one entry, which is added once.
_SCATTER: Final = """\
  static constexpr int kKept = {n_kept};
  static SX_INLINE void scatter(
      const void* const* tables, void* const* sums, float d_value, float score, int b, int h, int q_idx, int kv_idx,
      int edge, float* kept) {{
{bodies}  }}
  static SX_INLINE void scatter_kept(
      const void* const* tables, void* const* sums, int b, int h, int q_idx, const float* kept) {{
{kept}  }}
"""
_SCATTER_BODY: Final = """\
    if (sums[{number}]) {{
{statements}      const float share = chained(d_value, static_cast<float>({factor}));
      {added}
    }}
"""
_BY_EDGE: Final = "((float*)sums[{number}])[((i64)b * {q_heads} + h) * {n_edges} + edge] = share;"
_KEPT_BODY: Final = """\
    if (sums[{number}]) {{
{statements}      add_exactly(sums[{number}], {index}, kept[{place}]);
    }}
"""


@dataclass(frozen=True, slots=True)
class Extents:
    """How many values the variables of a modifier take; `edges` is 0 where it counts none."""

    queries: int
    keys: int
    q_heads: int
    edges: int = 0

    @classmethod
    def of(cls, launch: Launch) -> Extents:
        q_len, kv_len = launch.work.bound.shape
        numbers = launch.work.numbers
        n_edges = 0 if numbers is None else numbers.mask.nnz
        return cls(launch.first_query + q_len, kv_len, launch.problem.q_heads, n_edges)


def score_header(score: ScoreMod, extents: Extents, *, with_scatter: bool = False) -> str:
    """`Score::value` and `Score::slope` of `(tables, score, b, h, q_idx, kv_idx, edge)`, in natural units.

    Args:
        score: The modifier.
        extents: Of its variables.
        with_scatter: Whether to say, too, what scores add to the gradients of live tables (`scatter`, `scatter_kept`).

    Raises:
        UnsupportedError: It needs what these kernels do not give.
    """
    names = _pointers(score.tables)
    if len(names) > MAX_TABLES:
        raise UnsupportedError(f"score_mod captures {len(names)} arrays, and the CUDA kernels take {MAX_TABLES}")
    functions = ""
    for name, expr in (("value", score.expr), ("slope", score.slope)):
        _check(expr, extents)
        code = CUDA.code((expr,), tables=names)
        functions += _FUNCTION.format(
            name=name,
            expr=_text(expr),
            body="".join(f"    {line}\n" for line in code.statements),
            result=code.results[0],
        )
    if with_scatter:
        functions += _scatter(score, names, extents)
    what = "a score modifier and its derivative by the score"
    return _HEADER.format(what=what, given=CUDA_FUNCTIONS, name="Score", functions=functions)


@dataclass(frozen=True, slots=True)
class PrintedPredicate:
    """A mask's predicate: the header, and the arrays it looks up, which follow those of the score modifier."""

    header: str
    tables: tuple[npt.NDArray[Any], ...]


def printed_predicate(bound: BoundMask, n_before: int) -> PrintedPredicate | None:
    """`Predicate::holds(tables, q_idx, kv_idx)` of positions; None where the mask is known by its edges alone.

    Args:
        bound: The mask in position space.
        n_before: Tables of the score modifier, which come first.
    """
    expr = bound.predicate
    if expr is None or not expr.variables() <= {"q_idx", "kv_idx"}:
        return None
    tables = tuple(dict.fromkeys(expr.tables()))
    if n_before + len(tables) > MAX_TABLES:
        return None
    q_len, kv_len = bound.shape
    ranges = {"q_idx": (0, q_len + _RAGGED), "kv_idx": (0, kv_len + _RAGGED)}
    is_wide = any(math.prod(table.shape) > 2**31 - 1 for table in tables) or needs_int64(expr, ranges)
    code = CUDA.code((expr,), tables=_pointers(tables, n_before), ranges=ranges)
    function = _PREDICATE.format(
        index="long long" if is_wide else "int",
        expr=_text(expr),
        body="".join(f"    {line}\n" for line in code.statements),
        result=code.results[0],
    )
    what = "which query attends which key"
    header = _HEADER.format(what=what, given=CUDA_FUNCTIONS, name="Predicate", functions=function)
    return PrintedPredicate(header, tuple(_passed(table) for table in tables))


def _pointers(tables: Iterable[Captured], first: int = 0) -> dict[Captured, str]:
    return {
        table: f"((const {_TYPES[table.dtype.str[1:]]}*)tables[{number}])" for number, table in enumerate(tables, first)
    }


def _passed(table: Captured) -> npt.NDArray[Any]:
    array = np.array(table.array, order="C")
    return array.astype(np.float32) if array.dtype == np.float64 else array


def score_tables(score: ScoreMod) -> tuple[npt.NDArray[Any] | None, ...]:
    """The arrays of `tables`, contiguous, doubles as floats; None for those that are given at each call."""
    return tuple(None if table.is_live else _passed(table) for table in score.tables)


def _scatter(score: ScoreMod, names: Mapping[Captured, str], extents: Extents) -> str:
    bodies, kept, n_kept = "", "", 0
    for number, look_up, factor in score.look_ups:
        index = offset_of(look_up)
        _check(apply("add", cast_to("float", index), factor), extents)
        is_of_row = index.variables() <= {"b", "h", "q_idx"}
        code = CUDA.code((factor,) if is_of_row or is_by_edge(score, number) else (factor, index), tables=names)
        if is_by_edge(score, number):
            added = _BY_EDGE.format(number=number, q_heads=extents.q_heads, n_edges=extents.edges)
        elif is_of_row:
            added = f"kept[{n_kept}] += share;"
            place = CUDA.code((index,), tables=names)
            kept += _KEPT_BODY.format(
                number=number, statements=_lines(place.statements), index=place.results[0], place=n_kept
            )
            n_kept += 1
        else:
            added = f"add_exactly(sums[{number}], {code.results[1]}, share);"
        bodies += _SCATTER_BODY.format(
            number=number, statements=_lines(code.statements), factor=code.results[0], added=added
        )
    return _SCATTER.format(n_kept=n_kept, bodies=bodies, kept=kept)


def _lines(statements: tuple[str, ...]) -> str:
    return "".join(f"      {line}\n" for line in statements)


def _check(expr: Expr, extents: Extents) -> None:
    ranges = {
        "q_idx": (0, extents.queries),
        "kv_idx": (0, extents.keys),
        "edge": (0, extents.edges),
        "b": (0, _MOST),
        "h": (0, _MOST),
    }
    if any(math.prod(table.shape) > 2**31 - 1 for table in expr.tables()) or needs_int64(expr, ranges):
        raise UnsupportedError("score_mod makes integers beyond 32 bits, which the CUDA kernels do not hold")


def _text(expr: Expr) -> str:
    """The expression for a reader, in one line."""
    text = str(expr).replace("\\", "/")
    return text if len(text) <= 200 else text[:200] + " …"
