"""Rows of a mask as disjoint arithmetic progressions, and the Boolean algebra of such rows.

`RowRanges` is the first of the two exact views every bound mask has (the other is `TileMap`): for a run of consecutive
queries, the keys of each as few disjoint progressions. This file decides how unions, intersections, differences and
complements of such rows are computed, in time and memory of the ranges involved; it must not know what a mask is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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


def empty(n_rows: int) -> RowRanges:
    """`n_rows` rows without keys."""
    none = np.zeros(0, np.int64)
    return RowRanges(np.zeros(n_rows + 1, np.int64), none, none, none)


def from_rows(
    n_rows: int,
    row: IntArray,
    start: IntArray,
    stop: IntArray,
    step: IntArray | None = None,
    *,
    is_sorted: bool = False,
) -> RowRanges:
    """Rows from disjoint ranges in any order: empty ones dropped, ends tightened, touching intervals joined.

    Args:
        n_rows: How many rows there are.
        row: int64 `[n]`, the row of each range.
        start: int64 `[n]`.
        stop: int64 `[n]`, one past the last key or further (not as far as the next key of a progression).
        step: int64 `[n]`, or None for 1.
        is_sorted: The ranges come by row, then by start.
    """
    keep = stop > start
    if not keep.all():
        row, start, stop = row[keep], start[keep], stop[keep]
        step = None if step is None else step[keep]
    if not is_sorted and len(row) > 1:
        order = np.lexsort((start, row))
        row, start, stop = row[order], start[order], stop[order]
        step = None if step is None else step[order]
    if step is None:
        step = np.ones_like(start)
    else:
        stop = start + (stop - 1 - start) // step * step + 1
        step = np.where(stop - start == 1, 1, step)
    if len(row) > 1:
        joins = (row[1:] == row[:-1]) & (start[1:] == stop[:-1]) & (step[1:] == 1) & (step[:-1] == 1)
        if joins.any():
            first = np.concatenate(([True], ~joins))
            last = np.concatenate((~joins, [True]))
            row, start, step, stop = row[first], start[first], step[first], stop[last]
    indptr = np.zeros(n_rows + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=n_rows), out=indptr[1:])
    return RowRanges(indptr, start, stop, step)


def row_of_range(rows: RowRanges) -> IntArray:
    """int64 `[n_ranges]`: the row each range belongs to."""
    return np.repeat(np.arange(rows.n_rows, dtype=np.int64), np.diff(rows.indptr))


def lengths(rows: RowRanges) -> IntArray:
    """int64 `[n_ranges]`: the keys in each range."""
    return (rows.stop - 1 - rows.start) // rows.step + 1


def degrees(rows: RowRanges) -> IntArray:
    """int64 `[n_rows]`: the keys in each row."""
    total = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths(rows))))
    return total[rows.indptr[1:]] - total[rows.indptr[:-1]]


def expand(counts: IntArray) -> tuple[IntArray, IntArray]:
    """For item `i` repeated `counts[i]` times: the item, and the number of the repetition from 0."""
    item = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    first = np.cumsum(counts) - counts
    return item, np.arange(len(item), dtype=np.int64) - np.repeat(first, counts)


def run_starts(values: npt.NDArray[np.signedinteger[Any]]) -> IntArray:
    """Where each run of equal neighbours begins."""
    if not len(values):
        return np.zeros(0, np.int64)
    return np.concatenate(([0], np.flatnonzero(values[1:] != values[:-1]) + 1))


def to_edges(rows: RowRanges) -> tuple[IntArray, IntArray]:
    """`(row, key)` of every edge, int64, ascending by row then key."""
    item, nth = expand(lengths(rows))
    row = row_of_range(rows)[item]
    key = rows.start[item] + nth * rows.step[item]
    if (rows.step != 1).any():
        order = np.lexsort((key, row))
        row, key = row[order], key[order]
    return row, key


def from_edges(n_rows: int, row: IntArray, key: IntArray, min_progression: int = 3) -> RowRanges:
    """Rows from distinct edges that ascend by row then key.

    Runs of equally spaced keys become one range; a run with a step other than 1 must have `min_progression` keys, else
    its keys stay single.
    """
    n = len(key)
    if n == 0:
        return empty(n_rows)
    gap = np.diff(key)
    gap[row[1:] != row[:-1]] = 0
    # A run of equal gaps; gap 0 marks a row end. A key that ends one run may not begin the next.
    new_run = np.concatenate(([True], gap[1:] != gap[:-1])) if n > 1 else np.zeros(0, np.bool_)
    run_first = np.flatnonzero(new_run)
    run_size = np.diff(np.concatenate((run_first, [n - 1])))
    run_gap = gap[run_first] if n > 1 else gap
    wanted = (run_gap == 1) | ((run_gap > 1) & (run_size >= min_progression - 1))
    # Where two wanted runs share a key, intervals take it first, then whichever comes first.
    first, last, step = run_first[wanted], (run_first + run_size)[wanted], run_gap[wanted]
    if len(first) > 1:
        shared = first[1:] == last[:-1]
        give_up_last = shared & (step[1:] == 1) & (step[:-1] != 1)
        give_up_first = shared & ~give_up_last
        last[:-1] -= give_up_last
        first[1:] += give_up_first
    keep = (last - first + 1 >= np.where(step == 1, 2, min_progression)) & (last > first)
    first, last, step = first[keep], last[keep], step[keep]
    begins = np.ones(n, np.bool_)
    item, nth = expand(last - first)
    begins[first[item] + 1 + nth] = False
    range_first = np.flatnonzero(begins)
    range_last = np.concatenate((range_first[1:], [n])) - 1
    range_step = np.ones(len(range_first), np.int64)
    range_step[np.searchsorted(range_first, first)] = step
    return from_rows(n_rows, row[range_first], key[range_first], key[range_last] + 1, range_step, is_sorted=True)


def from_csr(indptr: IntArray, indices: npt.NDArray[np.signedinteger[Any]]) -> RowRanges:
    """Rows from CSR with ascending columns."""
    n_rows = len(indptr) - 1
    row = np.repeat(np.arange(n_rows, dtype=np.int64), np.diff(indptr))
    return from_edges(n_rows, row, indices.astype(np.int64))


def contains(rows: RowRanges, row: IntArray, key: IntArray) -> npt.NDArray[np.bool_]:
    """bool `[n]`: whether row `row[i]` holds `key[i]`."""
    if not len(rows.start) or not len(key):
        return np.zeros(len(key), np.bool_)
    intervals, steps = _split(rows)
    low = min(int(rows.start.min()), int(key.min()))
    width = max(int(rows.stop.max()), int(key.max()) + 1) - low + 1
    held = np.zeros(len(key), np.bool_)
    if len(intervals.start):
        base = row_of_range(intervals) * width - low
        at = np.searchsorted(intervals.start + base, key + row * width - low, side="right") - 1
        held |= (at >= 0) & (key + row * width - low < (intervals.stop + base)[at])
    depth = np.diff(steps.indptr)[row]
    for nth in range(int(depth.max(initial=0))):
        some = np.flatnonzero(depth > nth)
        at = steps.indptr[row[some]] + nth
        ahead = key[some] - steps.start[at]
        held[some] |= (ahead >= 0) & (key[some] < steps.stop[at]) & (ahead % steps.step[at] == 0)
    return held


def concatenate(parts: Sequence[RowRanges]) -> RowRanges:
    """The rows of all parts, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    bases = np.cumsum([0, *(len(part.start) for part in parts)])
    indptr = [part.indptr[:-1] + base for part, base in zip(parts, bases, strict=False)]
    return RowRanges(
        np.concatenate([*indptr, bases[-1:]]).astype(np.int64),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.stop for part in parts]),
        np.concatenate([part.step for part in parts]),
    )


def take_rows(rows: RowRanges, start: int, stop: int) -> RowRanges:
    """Rows `start:stop`, as views."""
    first, last = rows.indptr[start], rows.indptr[stop]
    indptr = rows.indptr[start : stop + 1] - first
    return RowRanges(indptr, rows.start[first:last], rows.stop[first:last], rows.step[first:last])


def repeat_row(row: RowRanges, n_rows: int) -> RowRanges:
    """`n_rows` copies of the only row of `row`."""
    n = len(row.start)
    return RowRanges(
        np.arange(n_rows + 1, dtype=np.int64) * n,
        np.tile(row.start, n_rows),
        np.tile(row.stop, n_rows),
        np.tile(row.step, n_rows),
    )


def pick_rows(rows: RowRanges, which: IntArray) -> RowRanges:
    """The rows `which`, in that order; rows may repeat."""
    counts = np.diff(rows.indptr)[which]
    item, nth = expand(counts)
    at = rows.indptr[which][item] + nth
    indptr = np.zeros(len(which) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    return RowRanges(indptr, rows.start[at], rows.stop[at], rows.step[at])


def repeat_rows(rows: RowRanges, times: IntArray) -> RowRanges:
    """Row `i` repeated `times[i]` times."""
    return pick_rows(rows, np.repeat(np.arange(rows.n_rows, dtype=np.int64), times))


def shift(rows: RowRanges, by: int) -> RowRanges:
    """Every key moved by `by`."""
    return RowRanges(rows.indptr, rows.start + by, rows.stop + by, rows.step)


def clip(rows: RowRanges, low: int, high: int) -> RowRanges:
    """Only the keys in `low:high`."""
    ahead = np.maximum(0, -((rows.start - low) // rows.step))
    start = rows.start + ahead * rows.step
    stop = np.minimum(rows.stop, high)
    # Progressions keep their order unless the clip moved their first keys past one another.
    return from_rows(rows.n_rows, row_of_range(rows), start, stop, rows.step, is_sorted=bool((rows.step == 1).all()))


def complement(rows: RowRanges, kv_len: int) -> RowRanges:
    """The keys of `range(kv_len)` that are not there."""
    everything = RowRanges(np.arange(2, dtype=np.int64), *(np.array([x], np.int64) for x in (0, kv_len, 1)))
    return difference(repeat_row(everything, rows.n_rows), rows)


def union(a: RowRanges, b: RowRanges) -> RowRanges:
    """Keys in either, row by row."""
    if not len(b.start):
        return a
    if not len(a.start):
        return b
    if _is_intervals(a) and _is_intervals(b):
        return _sweep(a, b, np.logical_or)
    extra = difference(b, a)
    return _joined(a.n_rows, [_parts(a), _parts(extra)])


def intersect(a: RowRanges, b: RowRanges) -> RowRanges:
    """Keys in both, row by row."""
    if not len(a.start) or not len(b.start):
        return empty(a.n_rows)
    if _is_intervals(a) and _is_intervals(b):
        return _sweep(a, b, np.logical_and)
    (a_intervals, a_steps), (b_intervals, b_steps) = _split(a), _split(b)
    return _joined(
        a.n_rows,
        [
            _parts(_sweep(a_intervals, b_intervals, np.logical_and)),
            _clipped_to(a_steps, b_intervals),
            _clipped_to(b_steps, a_intervals),
            _common_keys(a_steps, b_steps),
        ],
    )


def difference(a: RowRanges, b: RowRanges) -> RowRanges:
    """Keys in `a` and not in `b`, row by row."""
    if not len(a.start) or not len(b.start):
        return a
    if _is_intervals(a) and _is_intervals(b):
        return _sweep(a, b, _and_not)
    (a_intervals, a_steps), (b_intervals, b_steps) = _split(a), _split(b)
    kept = _sweep(a_intervals, b_intervals, _and_not)
    if len(a_steps.start):
        gaps = _gaps_of(b_intervals, int(a.start.min()), int(a.stop.max()))
        kept = _joined(a.n_rows, [_parts(kept), _clipped_to(a_steps, gaps)])
    # One progression of each row at a time: their number is small, or the rows are short.
    depth = np.diff(b_steps.indptr)
    for nth in range(int(depth.max(initial=0))):
        rows = np.flatnonzero(depth > nth)
        at = b_steps.indptr[rows] + nth
        kept = _without(kept, rows, b_steps.start[at], b_steps.stop[at], b_steps.step[at])
    return kept


# Ranges in no order: row, start, stop, step.
_Parts = tuple[IntArray, IntArray, IntArray, IntArray]


def _parts(rows: RowRanges) -> _Parts:
    return row_of_range(rows), rows.start, rows.stop, rows.step


def _joined(n_rows: int, parts: Sequence[_Parts]) -> RowRanges:
    row, start, stop, step = (np.concatenate(column) for column in zip(*parts, strict=True))
    return from_rows(n_rows, row, start, stop, step)


def _is_intervals(rows: RowRanges) -> bool:
    return bool((rows.step == 1).all())


def _and_not(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    return a & ~b


def _split(rows: RowRanges) -> tuple[RowRanges, RowRanges]:
    """The intervals and the progressions of the same rows."""
    row = row_of_range(rows)
    halves = []
    for chosen in (rows.step == 1, rows.step != 1):
        indptr = np.zeros(rows.n_rows + 1, np.int64)
        np.cumsum(np.bincount(row[chosen], minlength=rows.n_rows), out=indptr[1:])
        halves.append(RowRanges(indptr, rows.start[chosen], rows.stop[chosen], rows.step[chosen]))
    return halves[0], halves[1]


def _sweep(
    a: RowRanges,
    b: RowRanges,
    decide: Callable[[npt.NDArray[np.bool_], npt.NDArray[np.bool_]], npt.NDArray[np.bool_]],
) -> RowRanges:
    """Rows of intervals combined: all rows laid on one line, far enough apart, and swept once."""
    ends = [end for end in (a.start, a.stop, b.start, b.stop) if len(end)]
    if not ends:
        return empty(a.n_rows)
    low = min(int(end.min()) for end in ends)
    width = max(int(end.max()) for end in ends) - low + 1
    a_base, b_base = (row_of_range(rows) * width - low for rows in (a, b))
    events = np.concatenate((a.start + a_base, a.stop + a_base, b.start + b_base, b.stop + b_base))
    # The two operands' states in one number: a counts 1, b counts 2.
    change = np.repeat(np.array([1, -1, 2, -2], np.int8), [len(a.start), len(a.stop), len(b.start), len(b.stop)])
    order = np.argsort(events, kind="stable")
    events = events[order]
    state = np.cumsum(change[order], dtype=np.int8)
    settled = np.concatenate((events[1:] != events[:-1], [True]))
    events, state = events[settled], state[settled]
    inside = decide((state & 1).astype(np.bool_), (state & 2).astype(np.bool_))
    edge = inside != np.concatenate(([False], inside[:-1]))
    bounds = events[edge]
    begin, end = bounds[0::2], bounds[1::2]
    row = begin // width
    base = row * width - low
    return from_rows(a.n_rows, row, begin - base, end - base, is_sorted=True)


def _gaps_of(intervals: RowRanges, low: int, high: int) -> RowRanges:
    """`low:high` without the intervals, row by row."""
    everything = RowRanges(np.arange(2, dtype=np.int64), *(np.array([x], np.int64) for x in (low, high, 1)))
    return _sweep(repeat_row(everything, intervals.n_rows), intervals, _and_not)


def _clipped_to(steps: RowRanges, intervals: RowRanges) -> _Parts:
    """Progressions ∩ intervals: a progression clipped to every interval it spans."""
    if not len(steps.start) or not len(intervals.start):
        return _NO_PARTS
    low = min(int(steps.start.min()), int(intervals.start.min()))
    width = max(int(steps.stop.max()), int(intervals.stop.max())) - low + 1
    row = row_of_range(steps)
    base = row * width - low
    interval_base = row_of_range(intervals) * width - low
    first = np.searchsorted(intervals.stop + interval_base, steps.start + base, side="right")
    last = np.searchsorted(intervals.start + interval_base, steps.stop + base, side="left")
    item, nth = expand(np.maximum(0, last - first))
    at = first[item] + nth
    start, step = steps.start[item], steps.step[item]
    start = start + np.maximum(0, -((start - intervals.start[at]) // step)) * step
    stop = np.minimum(steps.stop[item], intervals.stop[at])
    return row[item], start, stop, step


def _common_keys(a: RowRanges, b: RowRanges) -> _Parts:
    """Progressions ∩ progressions, every pair of a row, by the Chinese remainder theorem."""
    if not len(a.start) or not len(b.start):
        return _NO_PARTS
    a_row = row_of_range(a)
    item, nth = expand(np.diff(b.indptr)[a_row])
    at = b.indptr[a_row[item]] + nth
    start, stop, step = _meet(a.start[item], a.stop[item], a.step[item], b.start[at], b.stop[at], b.step[at])
    keep = stop > start
    return a_row[item][keep], start[keep], stop[keep], step[keep]


def _meet(
    a_start: IntArray, a_stop: IntArray, a_step: IntArray, b_start: IntArray, b_stop: IntArray, b_step: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """The common progression of two, pair by pair; `stop ≤ start` where there is none."""
    low, high = np.maximum(a_start, b_start), np.minimum(a_stop, b_stop)
    shared = np.gcd(a_step, b_step)
    solvable = (b_start - a_start) % shared == 0
    modulus = b_step // shared
    turns = (b_start - a_start) // shared % modulus * _inverse(a_step // shared, modulus) % modulus
    step = a_step * modulus
    # Adding whole steps keeps the product below 2**63: start is already the least solution at or above a_start.
    start = a_start + a_step * turns
    start = start + np.maximum(0, -((start - low) // step)) * step
    return start, np.where(solvable, high, start), step


def _inverse(value: IntArray, modulus: IntArray) -> IntArray:
    """`value**-1 mod modulus`, element by element, where they are coprime."""
    pairs, back = np.unique(np.stack((value % modulus, modulus), axis=1), axis=0, return_inverse=True)
    inverses = np.array([pow(int(v), -1, int(m)) if m > 1 else 0 for v, m in pairs], np.int64)
    return inverses[back.reshape(-1)]


def _without(kept: RowRanges, rows: IntArray, start: IntArray, stop: IntArray, step: IntArray) -> RowRanges:
    """`kept` without one progression in each of `rows` (ascending)."""
    row = row_of_range(kept)
    which = np.searchsorted(rows, row)
    which[which == len(rows)] = 0
    candidate = np.flatnonzero(rows[which] == row)
    at = which[candidate]
    x_start, x_stop, x_step = kept.start[candidate], kept.stop[candidate], kept.step[candidate]
    c_start, c_stop, c_step = _meet(x_start, x_stop, x_step, start[at], stop[at], step[at])
    hit = np.flatnonzero(c_stop > c_start)
    if not len(hit):
        return kept
    # In units of x's own step, counted from its start: what goes is first, first + stride, … , n_gone of them.
    x_start, x_step = x_start[hit], x_step[hit]
    n_keys = (x_stop[hit] - 1 - x_start) // x_step + 1
    first = (c_start[hit] - x_start) // x_step
    stride = c_step[hit] // x_step
    n_gone = (c_stop[hit] - 1 - c_start[hit]) // c_step[hit] + 1
    last = first + (n_gone - 1) * stride
    x_row = row[candidate[hit]]

    def in_keys(item: IntArray, low: IntArray, high: IntArray, every: IntArray | int) -> _Parts:
        begin = x_start[item] + low * x_step[item]
        final = x_start[item] + (high - 1) * x_step[item]
        return x_row[item], begin, np.where(high > low, final + 1, begin), x_step[item] * every

    every_hit = np.arange(len(hit))
    pieces = [
        in_keys(every_hit, np.zeros_like(first), first, 1),
        in_keys(every_hit, last + 1, n_keys, 1),
    ]
    # Between the first and the last gone key: the gaps, or the residues, whichever are fewer.
    by_gap = np.flatnonzero(n_gone - 1 <= stride - 1)
    item, nth = expand(n_gone[by_gap] - 1)
    item = by_gap[item]
    low = first[item] + nth * stride[item] + 1
    pieces.append(in_keys(item, low, low + stride[item] - 1, 1))
    by_residue = np.flatnonzero(n_gone - 1 > stride - 1)
    item, nth = expand(stride[by_residue] - 1)
    item = by_residue[item]
    low = first[item] + 1 + nth
    pieces.append(in_keys(item, low, low + (n_gone[item] - 2) * stride[item] + 1, stride[item]))
    untouched = np.ones(len(row), np.bool_)
    untouched[candidate[hit]] = False
    rest = (row[untouched], kept.start[untouched], kept.stop[untouched], kept.step[untouched])
    return _joined(kept.n_rows, [rest, *pieces])


_NONE = np.zeros(0, np.int64)
_NO_PARTS: _Parts = (_NONE, _NONE, _NONE, _NONE)
