"""A launch's score modifier as CUDA C++: the generated header, and the arrays it looks values up in.

This file decides the text of the header and how captured arrays are passed. It must not know the kernels that include
it.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sparsec.errors import UnsupportedError
from sparsec.expr import CUDA, CUDA_FUNCTIONS, Expr, needs_int64
from sparsec.masks.mask import BoundMask
from sparsec.score import ScoreMod

# `kMaxTables` of shared/launch.cuh.
MAX_TABLES: Final = 16
# More batch elements and heads than these are in no GPU's memory.
_MOST: Final = 1 << 20
_VARIABLES: Final = frozenset({"score", "b", "h", "q_idx", "kv_idx"})
_TYPES: Final = {"f4": "float", "f8": "float", "i4": "int", "i8": "long long", "b1": "bool"}
_HEADER: Final = """\
// Generated: a score modifier and its derivative by the score.
#pragma once
namespace sx {{
{given}
struct Score {{
{functions}}};
}}  // namespace sx
"""
_FUNCTION: Final = """\
  // {expr}
  static SX_INLINE float {name}(const void* const* tables, float score, int b, int h, int q_idx, int kv_idx) {{
{body}    return static_cast<float>({result});
  }}
"""


def score_header(score: ScoreMod, bound: BoundMask) -> str:
    """`Score::value` and `Score::slope` of `(tables, score, b, h, q_idx, kv_idx)`, in natural units.

    Raises:
        UnsupportedError: It needs what these kernels do not give.
    """
    names = {
        table: f"((const {_TYPES[table.array.dtype.str[1:]]}*)tables[{number}])"
        for number, table in enumerate(score.tables)
    }
    if len(names) > MAX_TABLES:
        raise UnsupportedError(f"score_mod captures {len(names)} arrays, and the CUDA kernels take {MAX_TABLES}")
    functions = ""
    for name, expr in (("value", score.expr), ("slope", score.slope)):
        _check(expr, bound)
        code = CUDA.code((expr,), tables=names)
        functions += _FUNCTION.format(
            name=name,
            expr=_text(expr),
            body="".join(f"    {line}\n" for line in code.statements),
            result=code.results[0],
        )
    return _HEADER.format(given=CUDA_FUNCTIONS, functions=functions)


def score_tables(score: ScoreMod) -> tuple[npt.NDArray[Any], ...]:
    """The arrays of `tables`, contiguous; doubles as floats."""
    arrays = (np.array(table.array, order="C") for table in score.tables)
    return tuple(array.astype(np.float32) if array.dtype == np.float64 else array for array in arrays)


def _check(expr: Expr, bound: BoundMask) -> None:
    ranges = {"q_idx": (0, bound.q_len), "kv_idx": (0, bound.kv_len), "b": (0, _MOST), "h": (0, _MOST)}
    unknown = expr.variables() - _VARIABLES
    if unknown:
        raise UnsupportedError(f"score_mod asks for {', '.join(sorted(unknown))}, which the CUDA kernels do not give")
    if any(math.prod(table.shape) > 2**31 - 1 for table in expr.tables()) or needs_int64(expr, ranges):
        raise UnsupportedError("score_mod makes integers beyond 32 bits, which the CUDA kernels do not hold")


def _text(expr: Expr) -> str:
    """The expression for a reader, in one line."""
    text = str(expr).replace("\\", "/")
    return text if len(text) <= 200 else text[:200] + " …"
