"""Index arrays for row-by-row traversal: progressions where they say it all, single edges where they do not.

This file decides which of three forms the rows of a mask take and how each is transposed. It must not know how a kernel
walks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sparsec.masks import ranges
from sparsec.masks.mask import BoundMask
from sparsec.masks.ranges import IntArray, RowRanges

RowForm = Literal["offsets", "ranges", "edges"]

# A range costs three integers and a loop of its own; below this many keys a range, plain columns are smaller and
# faster.
MIN_KEYS_PER_RANGE = 4

_CHUNK_ROWS = 1 << 15
# Stretches of rows that say whether reading all of them is in vain, and the rows of each.
_PROBES, _PROBED_ROWS = 16, 64


@dataclass(frozen=True, slots=True)
class RowLists:
    """The keys of each query, in one of three forms.

    - `"offsets"`: query `q` attends `q + d` for every `d` of `range(start[r], stop[r], step[r])`, as far as that lies
      in `[0, kv_len)`. The same few progressions serve all rows; nothing is stored per row. int64; `start` may be
      negative.
    - `"ranges"`: query `q` attends `range(start[r], stop[r], step[r])` for `r` in `indptr[q]:indptr[q + 1]`. int32.
    - `"edges"`: query `q` attends `columns[indptr[q]:indptr[q + 1]]`, ascending.

    Attributes:
        form: Which of the three; the arrays a form does not use are empty.
        shape: `(q_len, kv_len)` in tokens.
        indptr: int64 `[q_len + 1]`.
        columns: int32 `[nnz]`.
        start: First key (or offset) of each range.
        stop: One past the last.
        step: At least 1.
    """

    form: RowForm
    shape: tuple[int, int]
    indptr: IntArray
    columns: npt.NDArray[np.int32]
    start: npt.NDArray[np.signedinteger]
    stop: npt.NDArray[np.signedinteger]
    step: npt.NDArray[np.signedinteger]

    @classmethod
    def of_offsets(cls, shape: tuple[int, int], offsets: RowRanges) -> RowLists:
        start, stop, step = (array.astype(np.int64) for array in (offsets.start, offsets.stop, offsets.step))
        return cls("offsets", shape, np.zeros(0, np.int64), np.zeros(0, np.int32), start, stop, step)

    @classmethod
    def of_ranges(cls, shape: tuple[int, int], rows: RowRanges) -> RowLists:
        start, stop, step = (array.astype(np.int32) for array in (rows.start, rows.stop, rows.step))
        return cls("ranges", shape, rows.indptr, np.zeros(0, np.int32), start, stop, step)

    @classmethod
    def of_edges(
        cls, shape: tuple[int, int], indptr: npt.NDArray[np.signedinteger], columns: npt.NDArray[np.signedinteger]
    ) -> RowLists:
        none = np.zeros(0, np.int32)
        return cls("edges", shape, indptr.astype(np.int64), columns.astype(np.int32, copy=False), none, none, none)

    @property
    def nnz(self) -> int:
        return int(self.degrees().sum())

    @property
    def nbytes(self) -> int:
        arrays = (self.indptr, self.columns, self.start, self.stop, self.step)
        return sum(array.nbytes for array in arrays)

    def degrees(self) -> IntArray:
        """The number of keys of each query, int64 `[q_len]`."""
        if self.form == "edges":
            return np.diff(self.indptr)
        if self.form == "offsets":
            return _offset_degrees(self.shape, self.start, self.stop, self.step)
        return ranges.degrees(self._ranges())

    def transpose(self) -> RowLists:
        """The queries of each key.

        `"offsets"` stay offsets. `"ranges"` become `"edges"` in memory of the edges; `row_lists(bound.T)` costs only
        the ranges of the transposed mask, and is the better way where the mask is at hand.
        """
        from scipy import sparse

        q_len, kv_len = self.shape
        if self.form == "offsets":
            order = np.argsort(-(self.stop - 1), kind="stable")
            start, stop = 1 - self.stop[order], 1 - self.start[order]
            return RowLists("offsets", (kv_len, q_len), self.indptr, self.columns, start, stop, self.step[order])
        indptr, columns = self.indptr, self.columns
        if self.form == "ranges":
            indptr = np.concatenate(([0], np.cumsum(self.degrees())))
            columns = ranges.to_edges(self._ranges())[1].astype(np.int32)
        data = np.ones(len(columns), np.bool_)
        by_key = sparse.csr_array((data, columns, indptr), shape=self.shape).tocsc()
        return RowLists.of_edges((kv_len, q_len), by_key.indptr, by_key.indices)

    def _ranges(self) -> RowRanges:
        start, stop, step = (array.astype(np.int64) for array in (self.start, self.stop, self.step))
        return RowRanges(self.indptr, start, stop, step)


def row_lists(bound: BoundMask, form: RowForm | None = None) -> RowLists:
    """The rows of `bound` in the smallest form that fits, or in `form`.

    Offsets where the mask is translation-invariant, ranges where they hold `MIN_KEYS_PER_RANGE` keys on average, edges
    otherwise. A `form` of `"offsets"` asserts that the mask has them.
    """
    offsets = bound.offsets
    if offsets is not None and form in (None, "offsets"):
        return RowLists.of_offsets(bound.shape, offsets)
    assert form != "offsets", "only a translation-invariant mask has offsets"
    if form != "edges":
        limit = bound.nnz // MIN_KEYS_PER_RANGE if form is None else None
        rows = _all_rows(bound, limit)
        if rows is not None:
            return RowLists.of_ranges(bound.shape, rows)
    csr = bound.to_csr()
    return RowLists.of_edges(bound.shape, csr.indptr, csr.indices)


def _all_rows(bound: BoundMask, limit: int | None) -> RowRanges | None:
    """All rows, or None as soon as their ranges are more than `limit`, or rows here and there have no long ones."""
    parts: list[RowRanges] = []
    if limit is not None and _are_scattered(bound):
        return None
    n_ranges = 0
    for first in range(0, bound.q_len, _CHUNK_ROWS):
        parts.append(bound.rows(first, min(first + _CHUNK_ROWS, bound.q_len)))
        n_ranges += len(parts[-1].start)
        if limit is not None and n_ranges > limit:
            return None
    return ranges.concatenate(parts)


def _are_scattered(bound: BoundMask) -> bool:
    """Whether a few stretches of a long mask's rows have less than half the keys a range that ranges are worth."""
    if bound.q_len <= _CHUNK_ROWS:
        return False
    starts = np.linspace(0, bound.q_len - _PROBED_ROWS, _PROBES).astype(np.int64).tolist()
    probes = [bound.rows(start, start + _PROBED_ROWS) for start in starts]
    n_ranges = sum(len(probe.start) for probe in probes)
    return 2 * sum(probe.nnz for probe in probes) < MIN_KEYS_PER_RANGE * n_ranges


def _offset_degrees(
    shape: tuple[int, int],
    start: npt.NDArray[np.signedinteger],
    stop: npt.NDArray[np.signedinteger],
    step: npt.NDArray[np.signedinteger],
) -> IntArray:
    q = np.arange(shape[0], dtype=np.int64)
    degrees = np.zeros(shape[0], np.int64)
    for first, end, stride in zip(start.tolist(), stop.tolist(), step.tolist(), strict=True):
        # Terms of the progression below kv_len - q, less those below -q.
        length = (end - 1 - first) // stride + 1
        below_end = -((first - shape[1] + q) // stride)
        below_start = -((first + q) // stride)
        degrees += below_end.clip(0, length) - below_start.clip(0, length)
    return degrees
