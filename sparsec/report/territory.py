"""Who takes which part of a mask: edges counted by square cells of tokens and by the part of a kernel that does them.

This file decides the cells, and what a kernel's parts are called. It must not know how they are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsec.layout import Ordering
from sparsec.masks import BoundMask, ranges
from sparsec.planner import Group, Step

IntArray = npt.NDArray[np.int64]

# Parts of kernels, in the order in which they are told; what a layout does is the same whatever the template.
KINDS = ("tiles", "gathered columns", "single edges", "rows", "dense")

# Cells a side, at most.
_CELLS = 384


@dataclass(frozen=True, slots=True)
class Territory:
    """Edges by cell and kind.

    Attributes:
        block: Tokens a side of a cell, a power of two.
        counts: int64 `[len(KINDS), rows, columns]`.
    """

    block: int
    counts: IntArray

    @property
    def kinds(self) -> list[str]:
        """The kinds that do anything."""
        return [kind for kind, counts in zip(KINDS, self.counts, strict=True) if counts.any()]


def territory(group: Group) -> Territory:
    """The edges of a group's mask in the tokens' own order, by cell and by who does them."""
    block = cell_size(group.bound, _CELLS)
    total = cells(group.bound, block)
    counts = np.zeros((len(KINDS), *total.shape), np.int64)
    # At most one launch has its keys in another order as a whole; it does what the others leave.
    moved = [step for step in group.steps if step.launch.work.ordering.kv_order is not None and not is_listed(step)]
    for step in group.steps:
        if step in moved[:1]:
            continue
        for kind, part in _parts(step, block, total.shape):
            counts[KINDS.index(kind)] += part
    for step in moved[:1]:
        counts[KINDS.index(_main_kind(step))] += total - counts.sum(axis=0)
    return Territory(block, counts)


def cell_size(bound: BoundMask, most: int) -> int:
    """The smallest power of two that divides the longer side into at most so many cells."""
    tokens = max(1, -(-max(bound.shape) // most))
    return max(8, 1 << (tokens - 1).bit_length())


def cells(bound: BoundMask, block: int) -> IntArray:
    """Edges of each cell of `block × block` tokens, int64 `[rows, columns]`."""
    tiles = bound.tiles(block, block)
    counts = np.zeros((-(-bound.q_len // block), -(-bound.kv_len // block)), np.int64)
    row = np.repeat(np.arange(len(counts)), np.diff(tiles.indptr))
    counts[row, tiles.indices] = tiles.count
    return counts


def _main_kind(step: Step) -> str:
    return {"rows": "rows", "tiles": "tiles", "none": "dense"}.get(step.launch.template.layout, "tiles")


def is_listed(step: Step) -> bool:
    """Whether its edges are few enough to be listed one by one: the planner sorts no others into a hybrid."""
    return step.launch.template.layout == "hybrid"


def _parts(step: Step, block: int, shape: tuple[int, ...]) -> Iterator[tuple[str, IntArray]]:
    work = step.launch.work
    if step.launch.template.layout == "hybrid":
        assert work.gathered is not None, "a hybrid has gathered columns"
        assert work.rows is not None, "a hybrid has single edges"
        gathered = _counted(*work.gathered.edges(), work.ordering, block, shape)
        q = np.repeat(np.arange(work.bound.q_len), np.diff(work.rows.indptr))
        single = _counted(q, work.rows.columns, work.ordering, block, shape)
        yield "gathered columns", gathered
        yield "single edges", single
        yield "tiles", _counted(*_edges_of(work.bound), work.ordering, block, shape) - gathered - single
    elif work.ordering.q_order is not None:
        yield _main_kind(step), _counted(*_edges_of(work.bound), work.ordering, block, shape)
    else:
        yield _main_kind(step), cells(work.bound, block)


def _edges_of(bound: BoundMask) -> tuple[IntArray, IntArray]:
    return ranges.to_edges(bound.rows(0, bound.q_len))


def _counted(
    q: npt.NDArray[np.integer], kv: npt.NDArray[np.integer], ordering: Ordering, block: int, shape: tuple[int, ...]
) -> IntArray:
    """Edges of each cell, from positions."""
    if ordering.q_order is not None:
        q = ordering.q_order[q]
    if ordering.kv_order is not None:
        kv = ordering.kv_order[kv]
    cell = (q.astype(np.int64) // block) * shape[1] + kv.astype(np.int64) // block
    counted: IntArray = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
    return counted
