"""Rows of a mask as disjoint arithmetic progressions, and the Boolean algebra of such rows.

`RowRanges` is the first of the two exact views every bound mask has (the other is `TileMap`): for a run of consecutive
queries, the keys of each as few disjoint progressions. This file decides how unions, intersections, differences and
complements of such rows are computed, in time and memory of the ranges involved; it must not know what a mask is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowRanges:
    """The keys of consecutive queries.

    Query `i` of the run (counted from 0) attends, for each `r` in `indptr[i]:indptr[i + 1]`, the keys
    `range(start[r], stop[r], step[r])`.

    Attributes:
        indptr: int64 `[n_rows + 1]`.
        start: int64 `[n_ranges]`, the first key of each range; ascending within a row.
        stop: int64 `[n_ranges]`, one past the last key (so `(stop - 1 - start) % step == 0`).
        step: int64 `[n_ranges]`, ≥ 1; a single key has step 1.

    Ranges of one row are disjoint as sets (two progressions may interleave) and never empty.
    """

    indptr: IntArray
    start: IntArray
    stop: IntArray
    step: IntArray

    @property
    def n_rows(self) -> int:
        return len(self.indptr) - 1

    @property
    def nnz(self) -> int:
        """The number of keys over all rows."""
        return int(((self.stop - 1 - self.start) // self.step + 1).sum())
