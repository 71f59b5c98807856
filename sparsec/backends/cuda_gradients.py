"""What the backward pass of a launch asks of the CUDA kernels: delta, then dQ by queries, then dK and dV by keys.

This file decides the transposed lists and how the arguments of `templates/row_traversal/backward.cuh` are laid out in
memory. It must not know how kernels are compiled or run, and imports neither torch nor cuda.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

import numpy as np

from sparsec.backends.base import Launch
from sparsec.backends.cuda_calls import (
    Array,
    Held,
    ListsArgument,
    Program,
    TensorArgument,
    Walk,
    packed_heads,
    program,
    walk,
)
from sparsec.backends.cuda_printed import MAX_TABLES
from sparsec.layout import EdgeOrder, Ordering, row_lists


class GradientArguments(ctypes.Structure):
    """`Arguments` of row_traversal/backward.cuh."""

    _fields_ = (
        ("lists", ListsArgument),
        *((name, TensorArgument) for name in ("own_1", "own_2", "stream_1", "stream_2", "into_1", "into_2", "out")),
        *((name, ctypes.c_void_p) for name in ("lse", "d_lse", "delta")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("lse", "d_lse", "delta") for axis in ("batch", "head")),
        *((name, ctypes.c_void_p) for name in ("head_indptr", "stream_heads", "partial")),
        ("sums", ctypes.c_void_p * MAX_TABLES),
        ("scale", ctypes.c_float),
    )


# Own rows of both dimensions, and the sums of one or of both.
_HELD_BY_QUERIES: Final = Held(rows=(2, 1), others=60, progressions=0, most=200)
_HELD_BY_KEYS: Final = Held(rows=(2, 2), others=60, progressions=10, most=180)


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two sides that own gradient rows.

    Attributes:
        is_dq: Whether queries own the rows.
        walk: Who walks what.
        head_indptr: For each own head, where its stream heads begin.
        stream_heads: The heads that meet it; where queries own rows, not looked at.
    """

    is_dq: bool
    walk: Walk
    head_indptr: Array
    stream_heads: Array

    @property
    def state_words(self) -> tuple[int, int]:
        """How often a state holds head_dim and v_dim floats."""
        return (1, 0) if self.is_dq else (1, 1)


def sides(launch: Launch) -> tuple[Side, Side]:
    """Queries, then keys, of a launch."""
    problem, work = launch.problem, launch.work
    assert work.rows is not None, "row_traversal walks rows"
    group = problem.q_heads // problem.kv_heads
    q_order, kv_order = work.ordering.q_order, work.ordering.kv_order
    by_queries = walk(
        launch,
        work.rows,
        launch.heads,
        _HELD_BY_QUERIES,
        pack=packed_heads(launch),
        group=group,
        orders=(q_order, kv_order),
        numbers=None if work.numbers is None else work.numbers.rows,
    )
    kv_heads = tuple(sorted({head // group for head in launch.heads}))
    meeting = [[head for head in sorted(launch.heads) if head // group == kv_head] for kv_head in kv_heads]
    transposed = row_lists(work.bound.T, None if work.numbers is None else "edges")
    numbers = None
    if work.numbers is not None:
        ordering = Ordering(work.ordering.name, kv_order, q_order)
        numbers = EdgeOrder(work.numbers.mask).of_rows(transposed, ordering, by_keys=True).rows
    by_keys = walk(
        launch, transposed, kv_heads, _HELD_BY_KEYS, pack=1, group=1, orders=(kv_order, q_order), numbers=numbers
    )
    none = np.zeros(1, np.int32)
    return (
        Side(True, by_queries, none, none),
        Side(
            False,
            by_keys,
            np.concatenate(([0], np.cumsum([len(heads) for heads in meeting]))).astype(np.int32),
            np.array([head for heads in meeting for head in heads], np.int32),
        ),
    )


def prepared_blocks(walk: Walk) -> int:
    """Blocks of the kernel that computes delta, for one copy."""
    return -(-walk.numbers["row_len"] // (walk.shape.warps * walk.shape.teams))


def gradient_program(launch: Launch, side: Side, widths: tuple[int, int], *, with_sums: bool = False) -> Program:
    """The program of one side, for rows fetched in such widths; dK and dV are fp32.

    With sums, the side of the queries adds up the gradients of the score modifier's tables.
    """
    more: dict[str, object] = {
        "SX_BACKWARD": 1,
        "SX_DQ": int(side.is_dq),
        "SX_ARGUMENT_BYTES": ctypes.sizeof(GradientArguments),
    }
    if not side.is_dq:
        more["SX_OUT"] = "float"
    return program(launch, side.walk, widths, with_scatter=with_sums and side.is_dq, **more)
