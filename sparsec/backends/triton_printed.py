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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sparsec.expr import TRITON, Captured, Expr, Var, needs_int64
from sparsec.expr.tree import postorder
from sparsec.masks.mask import BoundMask
from sparsec.score import ScoreMod

Array = npt.NDArray[Any]

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
def {name}(score, b, h, q_idx, kv_idx, tables):
    """{text}"""
{casts}{body}    return tl.zeros(score.shape, tl.float32) + ({result})
'''
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
        tables: The arrays its functions take as the tuple `tables`: fp32, int32, int64, or bytes for booleans.
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


def printed_score(score: ScoreMod, bound: BoundMask) -> Printed:
    """`value` and `slope` of `(score, b, h, q_idx, kv_idx, tables)`; natural units, in the shape of `score`."""
    names = _names(score.tables)
    source = _HEAD.format(what="a score modifier and its derivative by the score")
    for name, expr in (("value", score.expr), ("slope", score.slope)):
        code = TRITON.code((expr,), tables=names)
        source += _SCORE_FUNCTION.format(
            name=name,
            text=_text(expr),
            casts=_casts(("b", "h", "q_idx", "kv_idx"), expr, names, bound),
            body="".join(f"    {line}\n" for line in code.statements),
            result=code.results[0],
        )
    return Printed(source, tuple(_passed(table.array) for table in names))


def printed_predicate(bound: BoundMask) -> Printed | None:
    """`attends(q_idx, kv_idx, tables)` of positions; None where the mask is known by its edges alone."""
    expr = bound.predicate
    if expr is None or {node.name for node in postorder((expr,)) if isinstance(node, Var)} - {"q_idx", "kv_idx"}:
        return None
    names = _names(expr.tables())
    code = TRITON.code((expr,), tables=names)
    source = _HEAD.format(what="which query attends which key") + _PREDICATE.format(
        text=_text(expr),
        casts=_casts(("q_idx", "kv_idx"), expr, names, bound),
        body="".join(f"    {line}\n" for line in code.statements),
        result=code.results[0],
    )
    return Printed(source, tuple(_passed(table.array) for table in names))


def _names(tables: tuple[Captured, ...]) -> Mapping[Captured, str]:
    return {table: f"tables[{number}]" for number, table in enumerate(dict.fromkeys(tables))}


def _casts(indices: tuple[str, ...], expr: Expr, names: Mapping[Captured, str], bound: BoundMask) -> str:
    """Indices in 32 bits where all that is made of them fits, else in 64."""
    ranges = {"q_idx": (0, bound.q_len + _RAGGED), "kv_idx": (0, bound.kv_len + _RAGGED)}
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
