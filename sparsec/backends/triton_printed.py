"""A launch's expressions as Triton functions: its score modifier with the derivative, its mask's predicate.

This file decides the text of the generated module, how captured arrays reach it, and how it is imported without a file.
It must not know the kernels that call it, and imports Triton only to load a module.
"""

from __future__ import annotations

import hashlib
import linecache
import math
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sparsec.backends.table_gradients import is_by_edge
from sparsec.expr import TRITON, TRITON_FUNCTIONS, Captured, Const, Expr, Var, apply, needs_int64
from sparsec.expr.tree import cast_to, postorder
from sparsec.masks.mask import BoundMask
from sparsec.score import ScoreMod, offset_of

Array = npt.NDArray[Any]
Ranges = Mapping[str, tuple[int, int]]

_INT32_MAX: Final = 2**31 - 1
_PACKAGE: Final = "sparsec_printed"
# Kernels evaluate positions beyond the end of a ragged tile, never by more than this.
_RAGGED: Final = 1024

_HEAD: Final = '''\
"""Generated: {what}."""

import triton
import triton.language as tl

'''
_SCORE_FUNCTION: Final = '''
@triton.jit
def {name}(score, b, h, q_idx, kv_idx, edge, tables):
    """{text}"""
{casts}{body}    return tl.zeros(score.shape, tl.float32) + ({result})
'''
_SCATTER_FUNCTION: Final = '''
@triton.jit
def scatter(d_value, score, b, h, q_idx, kv_idx, edge, tables, sums, ADD: tl.constexpr):
    """What modified scores of gradients `d_value` add to the gradients of live tables."""
{body}'''
# `share` has the shape of the scores; the sums of one edge, head and batch element are added to once.
_SCATTER_BY_EDGE: Final = """\
    if sums[{number}] is not None:
{statements}        share = tl.where(d_value == 0.0, 0.0, d_value * ({factor}))
        at = (b.to(tl.int64) * {q_heads} + h.to(tl.int64)) * {n_edges} + edge
        tl.store(sums[{number}] + at, share, mask=d_value != 0.0)
"""
_SCATTER: Final = """\
    if sums[{number}] is not None:
{statements}        share = tl.where(d_value == 0.0, 0.0, d_value * ({factor}))
{reduced}        ADD(sums[{number}], tl.zeros(share.shape, tl.int64) + ({index}), share)
"""
# Scores of one entry are added up before: queries may lie along either axis, keys along the second or both.
_REDUCED: Final = {
    frozenset(): "        share = tl.sum(tl.sum(share, 1, keep_dims=True), 0, keep_dims=True)\n",
    frozenset({"q_idx"}): """\
        if q_idx.shape[0] == 1:
            share = tl.sum(share, 0, keep_dims=True)
        else:
            share = tl.sum(share, 1, keep_dims=True)
""",
    frozenset({"kv_idx"}): """\
        if kv_idx.shape[0] == 1:
            share = tl.sum(share, 0, keep_dims=True)
""",
}
_PREDICATE: Final = '''
@triton.jit
def attends(q_idx, kv_idx, tables):
    """{text}"""
{casts}{body}    return {result}
'''


@dataclass(frozen=True)
class Printed:
    """A generated module.

    Attributes:
        source: Its text.
        tables: The arrays its functions take as the tuple `tables`: fp32, int32, int64, or bytes for booleans; of those
            that are given anew at each call, a stand-in.
    """

    source: str
    tables: tuple[Array, ...]

    @cached_property
    def name(self) -> str:
        """Of the module: another text is another name, so that no two functions are ever taken for one."""
        return f"{_PACKAGE}_{hashlib.sha256(self.source.encode()).hexdigest()[:20]}"

    def function(self, name: str) -> Any:  # a triton.JITFunction, or the interpreter's
        """One of its functions, compiled when it is first called."""
        module = sys.modules.get(self.name)
        if module is None:
            file = f"<{self.name}>"
            # Triton reads a function's source, which this module has nowhere but here.
            linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
            module = types.ModuleType(self.name)
            module.__file__ = file
            exec(compile(self.source, file, "exec"), module.__dict__)
            sys.modules[self.name] = module
        return getattr(module, name)


def printed_score(
    score: ScoreMod, lengths: tuple[int, int], q_heads: int, n_edges: int, *, is_packed: bool = False
) -> Printed:
    """`value` and `slope` of `(score, b, h, q_idx, kv_idx, edge, tables)`, and `scatter` where it has live tables.

    `value` and `slope` are in natural units, in the shape of `score`. `scatter` adds what `table_gradients.py` sums up.

    Args:
        score: The modifier.
        lengths: Queries and keys it may be asked for.
        q_heads: Query heads.
        n_edges: Edges of the mask whose edges are numbered, or 0.
        is_packed: Whether `scatter` is told several heads at once, each row's.
    """
    names, ranges = _names(score.tables), _ranges(lengths, n_edges)
    source = ""
    for name, expr in (("value", score.expr), ("slope", score.slope)):
        code = TRITON.code((expr,), tables=names)
        source += _SCORE_FUNCTION.format(
            name=name,
            text=_text(expr),
            casts=_casts(_INDICES, expr, names, ranges),
            body="".join(f"    {line}\n" for line in code.statements),
            result=code.results[0],
        )
    if score.live_tables:
        source += _SCATTER_FUNCTION.format(body="".join(_scatters(score, names, ranges, q_heads, n_edges, is_packed)))
    tables = (np.zeros(1, np.float32) if table.is_live else _passed(table.array) for table in names)
    return Printed(_module("a score modifier and its derivative by the score", source), tuple(tables))


def _scatters(
    score: ScoreMod, names: Mapping[Captured, str], ranges: Ranges, q_heads: int, n_edges: int, is_packed: bool
) -> Iterator[str]:
    for place, (number, look_up, factor) in enumerate(score.look_ups):
        index = Const(0) if is_by_edge(score, number) else offset_of(look_up)
        code = TRITON.code((index, factor), tables=names, prefix=f"t{place}_")
        casts = _casts(_INDICES, apply("add", cast_to("float", index), factor), names, ranges)
        lines = (line.strip() for line in (*casts.splitlines(), *code.statements))
        statements = "".join(f"        {line}\n" for line in lines)
        template = _SCATTER_BY_EDGE if is_by_edge(score, number) else _SCATTER
        # Packed heads lie along the axis of the queries.
        along = {"q_idx" if name == "h" and is_packed else name for name in index.variables()} - {"b", "h"}
        yield template.format(
            number=number,
            statements=statements,
            factor=code.results[1],
            index=code.results[0],
            reduced=_REDUCED.get(frozenset(along), ""),
            q_heads=q_heads,
            n_edges=n_edges,
        )


def printed_predicate(bound: BoundMask) -> Printed | None:
    """`attends(q_idx, kv_idx, tables)` of positions; None where the mask is known by its edges alone."""
    expr = bound.predicate
    if expr is None or {node.name for node in postorder((expr,)) if isinstance(node, Var)} - {"q_idx", "kv_idx"}:
        return None
    names = _names(expr.tables())
    code = TRITON.code((expr,), tables=names)
    source = _PREDICATE.format(
        text=_text(expr),
        casts=_casts(("q_idx", "kv_idx"), expr, names, _ranges(bound.shape)),
        body="".join(f"    {line}\n" for line in code.statements),
        result=code.results[0],
    )
    return Printed(_module("which query attends which key", source), tuple(_passed(table.array) for table in names))


def _module(what: str, functions: str) -> str:
    given = f"\n{TRITON_FUNCTIONS}" if "sx_" in functions else ""
    return _HEAD.format(what=what) + given + functions


def _names(tables: tuple[Captured, ...]) -> Mapping[Captured, str]:
    return {table: f"tables[{number}]" for number, table in enumerate(dict.fromkeys(tables))}


_INDICES: Final = ("b", "h", "q_idx", "kv_idx", "edge")


def _ranges(lengths: tuple[int, int], n_edges: int = 0) -> Ranges:
    q_len, kv_len = lengths
    # A pair that is not attended has the number of a neighbour, a few tiles away at most.
    return {"q_idx": (0, q_len + _RAGGED), "kv_idx": (0, kv_len + _RAGGED), "edge": (0, n_edges + _RAGGED)}


def _casts(indices: tuple[str, ...], expr: Expr, names: Mapping[Captured, str], ranges: Ranges) -> str:
    """Indices in 32 bits where all that is made of them fits, else in 64."""
    is_wide = any(math.prod(table.shape) > _INT32_MAX for table in names) or needs_int64(expr, ranges)
    width = "tl.int64" if is_wide else "tl.int32"
    used = {node.name for node in postorder((expr,)) if isinstance(node, Var)}
    return "".join(f"    {index} = {index}.to({width})\n" for index in indices if index in used)


def _text(expr: Expr) -> str:
    """The expression for a reader, in one line that cannot end the docstring."""
    text = str(expr).replace("\\", "/").replace('"', "'")
    return text if len(text) <= 200 else text[:200] + " …"


def _passed(array: Array) -> Array:
    if array.dtype == np.bool_:
        return array.view(np.uint8)
    return array.astype(np.float32) if array.dtype == np.float64 else array
