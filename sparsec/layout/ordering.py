"""Orders of tokens, and a mask seen in another order.

This file decides what a reordering is and how a mask is rewritten by one, in closed form where the mask allows. It must
not know which order pays (`analysis` proposes, the planner decides).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import or_

import numpy as np
import numpy.typing as npt

from sparsec import masks
from sparsec.masks import ranges
from sparsec.masks.mask import And, BoundMask, Mask, Named, Not, Or
from sparsec.masks.ranges import IntArray, RowRanges
from sparsec.masks.structured import Tokens

Order = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Ordering:
    """Which token stands at each position; None leaves an axis as it is.

    Attributes:
        name: What explains it: `"residue 4"`, `"rcm"`, `"cluster"`, …
        q_order: int32 `[q_len]`, position → query.
        kv_order: int32 `[kv_len]`, position → key.
    """

    name: str
    q_order: Order | None
    kv_order: Order | None

    @property
    def nbytes(self) -> int:
        return sum(order.nbytes for order in (self.q_order, self.kv_order) if order is not None)


def inverse(order: npt.NDArray[np.signedinteger]) -> npt.NDArray[np.signedinteger]:
    """Token → position, from position → token."""
    position = np.empty_like(order)
    position[order] = np.arange(len(order), dtype=order.dtype)
    return position


def residue_order(length: int, period: int) -> Order:
    """Tokens by residue class modulo `period`, ascending within a class."""
    grid = np.arange(-(-length // period) * period, dtype=np.int32).reshape(-1, period)
    tokens = grid.T.ravel()
    return tokens[tokens < length]


def reordered(bound: BoundMask, ordering: Ordering) -> BoundMask:
    """`bound` in position space: query `i` attends key `j` where `q_order[i]` attends `kv_order[j]`.

    Residue classes turn a square translation-invariant mask whose offsets are multiples of the period into documents
    (one a class) of another such mask; compositions are rewritten operand by operand. What has no closed form goes
    through its edges, in time and memory of those.
    """
    return _Rewriter(bound.shape, ordering).rewrite(bound.mask).bind(*bound.shape)


class _Rewriter:
    """Rewrites masks of one shape into position space, through as few stored edges as it can."""

    def __init__(self, shape: tuple[int, int], ordering: Ordering) -> None:
        self._shape = shape
        self._ordering = ordering
        self._period = _residue_period(shape, ordering)

    def rewrite(self, mask: Mask) -> Mask:
        closed = self._closed_form(mask)
        if closed is not None:
            return closed
        if isinstance(mask, Named):
            return self.rewrite(mask.operand)
        if isinstance(mask, (And, Or, Not)) and self._n_stored(mask) < mask.bind(*self._shape).nnz:
            if isinstance(mask, Not):
                return ~self.rewrite(mask.operand)
            return type(mask)(tuple(self.rewrite(operand) for operand in mask.operands))
        return self._by_edges(mask.bind(*self._shape))

    def _n_stored(self, mask: Mask) -> int:
        """How many edges the rewritten mask stores."""
        if self._closed_form(mask) is not None:
            return 0
        if isinstance(mask, Named):
            return self._n_stored(mask.operand)
        n_edges = mask.bind(*self._shape).nnz
        if isinstance(mask, Not):
            return min(n_edges, self._n_stored(mask.operand))
        if isinstance(mask, (And, Or)):
            return min(n_edges, sum(self._n_stored(operand) for operand in mask.operands))
        return n_edges

    def _closed_form(self, mask: Mask) -> Mask | None:
        return self._by_tokens(mask) if isinstance(mask, Tokens) else self._by_classes(mask)

    def _by_tokens(self, mask: Tokens) -> Mask | None:
        """Global tokens are global at any position, as long as a token stands at one position on both axes."""
        if mask._depends_on_lengths:
            return None
        queries = _positions(mask.queries, self._shape[0], self._ordering.q_order)
        keys = _positions(mask.keys, self._shape[1], self._ordering.kv_order)
        return masks.global_tokens(queries) if np.array_equal(queries, keys) else None

    def _by_classes(self, mask: Mask) -> Mask | None:
        """The closed form, where every offset is a multiple of the period."""
        period = self._period
        offsets = None if period is None else mask.bind(*self._shape).offsets
        if period is None or offsets is None:
            return None
        if not len(offsets.start):
            return ~masks.full()
        class_sizes = -(-(self._shape[0] - np.arange(period)) // period)
        classes = masks.documents(class_sizes[class_sizes > 0].tolist())
        furthest = int(class_sizes.max()) - 1
        parts: list[Mask] = []
        for start, stop, step in zip(offsets.start.tolist(), offsets.stop.tolist(), offsets.step.tolist(), strict=True):
            if start % period or (step % period and stop - start > 1):
                return None
            first, last, step = start // period, (stop - 1) // period, max(step // period, 1)
            if first % step:
                return None
            if step == 1 and first <= -furthest and last >= furthest:
                return classes
            within = masks.window(-first, last)
            parts.append(within & masks.strided(step) if step > 1 else within)
        return classes & reduce(or_, parts)

    def _by_edges(self, bound: BoundMask) -> Mask:
        q_order, kv_order = self._ordering.q_order, self._ordering.kv_order
        edges = bound.to_csr()
        if q_order is not None:
            edges = edges[q_order]
        if kv_order is not None:
            edges.indices = inverse(kv_order)[edges.indices]
            edges.has_sorted_indices = False
            edges.sort_indices()
        return masks.from_csr(edges.indptr, edges.indices, bound.kv_len)


def _positions(tokens: RowRanges, length: int, order: Order | None) -> IntArray:
    """Where a row of tokens stands, ascending; those beyond the length are left out."""
    token = ranges.to_edges(tokens)[1]
    token = token[token < length]
    return token if order is None else np.sort(inverse(order)[token]).astype(np.int64)


def _residue_period(shape: tuple[int, int], ordering: Ordering) -> int | None:
    """The period whose residue classes `ordering` lists, for queries and keys alike; None for any other order."""
    q_order, kv_order = ordering.q_order, ordering.kv_order
    if shape[0] != shape[1] or q_order is None or kv_order is None or len(q_order) < 2:
        return None
    period = int(q_order[1]) - int(q_order[0])
    if period < 1:
        return None
    expected = residue_order(shape[0], period)
    return period if np.array_equal(q_order, expected) and np.array_equal(kv_order, expected) else None
