"""The edges of a mask in few numbers, for a page that draws them at any zoom.

Consecutive rows whose progressions only slide (a window's do, and a block's stand still) are one *run*: the
progressions of its first row, and by how much each moves from row to row. A window of a million tokens is one run; a
graph has about one for each row. This file decides how runs are found and packed, and that masks with too many are
sampled. It must not know how they are drawn.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sparsec.masks import BoundMask, ranges
from sparsec.masks.ranges import IntArray, RowRanges

# Progressions that a page holds, and rows looked at in one go.
MOST_RANGES = 900_000
_CHUNK_ROWS = 1 << 16
# Progressions looked through to find runs; more take seconds.
_MOST_LOOKED_AT = 24_000_000
# Where a mask is sampled: so many stretches of so many rows.
_STRETCHES, _STRETCH_ROWS = 48, 32

# From a first row and one past the last to their progressions.
Rows = Callable[[int, int], RowRanges]


@dataclass(frozen=True, slots=True)
class Runs:
    """Rows in runs; the arrays are int64.

    Attributes:
        first: The first row of each run.
        length: Rows of each run.
        indptr: Progressions before each run, and their number.
        start: First key of each progression in the run's first row; may be negative, as `stop` may be past the end.
        stop: One past its last key there.
        step: At least 1.
        start_slope: By how much `start` moves from row to row.
        stop_slope: Likewise `stop`.
        is_whole: Whether every row is in a run; otherwise a sample is.
    """

    first: IntArray
    length: IntArray
    indptr: IntArray
    start: IntArray
    stop: IntArray
    step: IntArray
    start_slope: IntArray
    stop_slope: IntArray
    is_whole: bool

    @property
    def n_rows(self) -> int:
        return int(self.length.sum())

    def packed(self) -> dict[str, object]:
        """The same as JSON values."""
        return {
            "first": pack(self.first),
            "length": pack(self.length),
            "indptr": pack(self.indptr),
            "start": pack(self.start),
            "span": pack(self.stop - self.start),
            "step": pack(self.step),
            "startSlope": pack(self.start_slope),
            "stopSlope": pack(self.stop_slope),
            "whole": self.is_whole,
        }


def pack(values: npt.NDArray[np.integer]) -> str:
    """Integers of up to 32 bits as text: differences, deflated, in base 64."""
    differences = np.diff(values.astype(np.int64), prepend=0).astype("<i4")
    # Bytes of like weight together: the high ones are nearly all zero.
    planes = differences.view(np.uint8).reshape(-1, 4).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()


def runs_of_mask(bound: BoundMask, keys_per_range: float) -> Runs:
    """The runs of a mask, or of a sample of its rows where they are too many."""
    offsets = bound.offsets
    if offsets is not None and len(offsets.start) <= MOST_RANGES:
        ones = np.ones(len(offsets.start), np.int64)
        whole = np.array([0, len(offsets.start)])
        return Runs(
            np.array([0]), np.array([bound.q_len]), whole, offsets.start, offsets.stop, offsets.step, ones, ones, True
        )
    n_ranges = bound.nnz / max(keys_per_range, 1.0)
    return runs_of_rows(bound.rows, bound.q_len, is_small=n_ranges <= _MOST_LOOKED_AT)


def runs_of_edges(n_rows: int, q: IntArray, kv: IntArray) -> Runs:
    """The runs of listed edges, in any order."""
    order = np.lexsort((kv, q))
    rows = ranges.from_edges(n_rows, q[order], kv[order])
    return runs_of_rows(lambda start, stop: ranges.take_rows(rows, start, stop), n_rows, is_small=True)


def runs_of_rows(rows: Rows, n_rows: int, *, is_small: bool) -> Runs:
    """The runs of rows that can be asked for; of a sample of them where they are too many."""
    if is_small:
        found = _Collected()
        for first in range(0, n_rows, _CHUNK_ROWS):
            found.add(rows(first, min(first + _CHUNK_ROWS, n_rows)), first)
            if found.n_ranges > MOST_RANGES:
                break
        else:
            return found.runs(is_whole=True)
    sampled = _Collected()
    for first in np.unique(np.linspace(0, max(n_rows - _STRETCH_ROWS, 0), _STRETCHES).astype(np.int64)).tolist():
        part = rows(first, min(first + _STRETCH_ROWS, n_rows))
        if sampled.n_ranges + len(part.start) <= MOST_RANGES:
            sampled.add(part, first)
    return sampled.runs(is_whole=False)


@dataclass(slots=True)
class _Collected:
    """Runs as they are found, chunk by chunk."""

    parts: list[tuple[IntArray, ...]] = field(default_factory=list)
    n_ranges: int = 0

    def add(self, rows: RowRanges, first_row: int) -> None:
        first, length = _run_bounds(rows)
        if not len(first):
            return
        counts = np.diff(rows.indptr)
        run, nth = ranges.expand(counts[first])
        source = rows.indptr[first][run] + nth
        # Where a run has a second row, its progressions stand as many places further on.
        following = np.where(length[run] > 1, source + counts[first][run], source)
        self.parts.append(
            (
                first + first_row,
                length,
                counts[first],
                rows.start[source],
                rows.stop[source],
                rows.step[source],
                rows.start[following] - rows.start[source],
                rows.stop[following] - rows.stop[source],
            )
        )
        self.n_ranges += len(source)

    def runs(self, *, is_whole: bool) -> Runs:
        none = np.zeros(0, np.int64)
        columns = [np.concatenate([none, *column]) for column in zip(*self.parts, strict=True)] or [none] * 8
        first, length, counts, start, stop, step, start_slope, stop_slope = columns
        indptr = np.concatenate(([0], np.cumsum(counts)))
        return Runs(first, length, indptr, start, stop, step, start_slope, stop_slope, is_whole)


def _run_bounds(rows: RowRanges) -> tuple[IntArray, IntArray]:
    """`(first row, rows)` of each run; rows without keys are in none."""
    counts = np.diff(rows.indptr)
    slides = np.zeros(rows.n_rows, bool)
    same = np.zeros(rows.n_rows, bool)
    same[1:] = (counts[1:] == counts[:-1]) & (counts[1:] > 0)
    for kind in _differences(rows, counts, same):
        slides[kind] = True
    # Row i goes on sliding where it, and the row before it, slid as the row before did.
    starts = np.flatnonzero(slides & ~np.concatenate(([False], slides[:-1])))
    stops = np.flatnonzero(slides & ~np.concatenate((slides[1:], [False]))) + 1
    # The two rows before the first that goes on are in the run, unless another run has the earlier one.
    heads = starts - 2
    heads[1:] = np.maximum(heads[1:], stops[:-1])
    covered = np.zeros(rows.n_rows + 1, np.int64)
    np.add.at(covered, heads, 1)
    np.add.at(covered, stops, -1)
    alone = np.flatnonzero((np.cumsum(covered[:-1]) == 0) & (counts > 0))
    first = np.concatenate((heads, alone))
    length = np.concatenate((stops - heads, np.ones(len(alone), np.int64)))
    order = np.argsort(first, kind="stable")
    return first[order], length[order]


def _differences(rows: RowRanges, counts: IntArray, same: npt.NDArray[np.bool_]) -> Iterator[IntArray]:
    """The rows whose progressions moved from the row before as that one's did from its own."""
    candidates = np.flatnonzero(same[1:] & same[:-1]) + 1
    if not len(candidates):
        return
    row, nth = ranges.expand(counts[candidates])
    here = rows.indptr[candidates][row] + nth
    before = here - counts[candidates][row]
    earlier = before - counts[candidates][row]
    moves = (
        (rows.start[here] - rows.start[before] == rows.start[before] - rows.start[earlier])
        & (rows.stop[here] - rows.stop[before] == rows.stop[before] - rows.stop[earlier])
        & (rows.step[here] == rows.step[before])
        & (rows.step[before] == rows.step[earlier])
    )
    wrong = np.bincount(row[~moves], minlength=len(candidates))
    yield candidates[wrong == 0]
