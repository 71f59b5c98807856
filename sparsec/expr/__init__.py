"""Expressions: mask predicates and score modifiers as one small elementwise tree.

`trace_mask_mod` and `trace_score_mod` make an `Expr` of a user's function; it can be evaluated, bounded over boxes,
simplified, differentiated and printed for every back end.
"""

from sparsec.expr.bounds import all_bounds, bounds
from sparsec.expr.captured import Captured
from sparsec.expr.derivative import derivative
from sparsec.expr.ops import Kind
from sparsec.expr.printers import (
    CPP,
    CUDA,
    CUDA_FUNCTIONS,
    TRITON,
    TRITON_FUNCTIONS,
    Code,
    Cpp,
    Cuda,
    Dialect,
    Triton,
    needs_int64,
    torch_function,
)
from sparsec.expr.simplify import depends_on_offset_only, linear_form, offset_form, simplify
from sparsec.expr.trace import trace_mask_mod, trace_score_mod
from sparsec.expr.tree import VARIABLES, Apply, Const, Expr, Table, Var, apply, as_expr

__all__ = [
    "CPP",
    "CUDA",
    "CUDA_FUNCTIONS",
    "TRITON",
    "TRITON_FUNCTIONS",
    "VARIABLES",
    "Apply",
    "Captured",
    "Code",
    "Const",
    "Cpp",
    "Cuda",
    "Dialect",
    "Expr",
    "Kind",
    "Table",
    "Triton",
    "Var",
    "all_bounds",
    "apply",
    "as_expr",
    "bounds",
    "depends_on_offset_only",
    "derivative",
    "linear_form",
    "needs_int64",
    "offset_form",
    "simplify",
    "torch_function",
    "trace_mask_mod",
    "trace_score_mod",
]
