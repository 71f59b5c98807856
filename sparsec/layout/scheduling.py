"""Work items: which stretch of which unit's entries one worker takes, heavy units split, longest first.

A unit is what yields one piece of output (a row of tiles, or a row); its entries are what it walks (tiles, chunks of
gathered columns, keys). This file decides where units are split, the order of the items, and the slots their partial
results go to. It must not know what an entry is: costs come from the caller, in any unit of time.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsec.masks.ranges import IntArray

FloatArray = npt.NDArray[np.float64]

# A unit is split when it would keep one worker busy for more than this share of a fair division of all work. Where
# entries are fine enough to split so, the makespan is within 1 + 1/4 of the ideal whatever the mask: the last item to
# start does so before the ideal end, and is at most a quarter of it.
# Source: Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17 (1969).
PIECES_PER_WORKER = 4

# Items simulated one by one in `balance`; the smaller ones after them are poured in as a fluid.
_SIMULATED_ITEMS = 1 << 15


@dataclass(frozen=True, slots=True)
class Schedule:
    """Work items, longest first. Every entry of every unit is in exactly one item; an empty unit has one empty item,
    because its output (`out = 0`, `lse = -inf`) must be written all the same.

    Attributes:
        unit: int32 `[n_items]`, the unit an item belongs to.
        start: int64 `[n_items]`, its first entry.
        stop: int64 `[n_items]`, one past its last.
        slot: int32 `[n_items]`, where its partial result goes; -1 where the item is the whole unit.
        cost: float32 `[n_items]`, the estimate it was ordered by.
        merge_unit: int32 `[n_merges]`, the units that were split, ascending.
        merge_indptr: int64 `[n_merges + 1]`; the slots of `merge_unit[i]` are `merge_indptr[i]:merge_indptr[i + 1]`, in
            the order of its entries.
        copies: How often the list is run (batch × heads).
    """

    unit: npt.NDArray[np.int32]
    start: IntArray
    stop: IntArray
    slot: npt.NDArray[np.int32]
    cost: npt.NDArray[np.float32]
    merge_unit: npt.NDArray[np.int32]
    merge_indptr: IntArray
    copies: int

    @property
    def n_items(self) -> int:
        return len(self.unit)

    @property
    def n_slots(self) -> int:
        """Partial results to hold, for one copy."""
        return int(self.merge_indptr[-1])

    @property
    def nbytes(self) -> int:
        arrays = (self.unit, self.start, self.stop, self.slot, self.cost, self.merge_unit, self.merge_indptr)
        return sum(array.nbytes for array in arrays)

    def balance(self, workers: int) -> float:
        """The makespan of `workers` that take items in order, over the ideal (all work divided evenly); at least 1.

        The longest items of all copies are simulated one by one; the rest, short beside them, are poured in evenly, and
        count as if the last of them ended as late as it can.
        """
        total = float(self.cost.sum(dtype=np.float64)) * self.copies
        if total <= 0.0:
            return 1.0
        head = np.repeat(self.cost[: -(-_SIMULATED_ITEMS // self.copies)].astype(np.float64), self.copies)
        head = head[:_SIMULATED_ITEMS]
        loads = [0.0] * workers
        for cost in head.tolist():
            heapq.heapreplace(loads, loads[0] + cost)
        rest = total - float(head.sum())
        ideal = total / workers
        makespan = max(loads)
        if self.n_items * self.copies > len(head):
            next_item = float(self.cost[min(len(head) // self.copies, self.n_items - 1)])
            makespan = max(makespan, (sum(loads) + rest) / workers + next_item * (1.0 - 1.0 / workers))
        return max(makespan / ideal, 1.0)


def schedule(
    indptr: IntArray,
    entry_cost: npt.NDArray[np.floating] | float,
    *,
    workers: int,
    copies: int = 1,
    item_cost: float = 0.0,
    max_split: int = 64,
    min_piece: float = 0.0,
) -> Schedule:
    """Work items over the entries `indptr[u]:indptr[u + 1]` of each unit `u`. Deterministic.

    Args:
        indptr: int64 `[n_units + 1]`.
        entry_cost: The cost of each entry, or one cost for all.
        workers: Who share the work: cores, or resident thread blocks.
        copies: How often the whole list is run (batch × heads).
        item_cost: A fixed cost an item has besides its entries.
        max_split: Pieces a unit is cut into at most; 1 forbids splitting.
        min_piece: What a piece must be worth, so that merging it does not cost more than it saves.
    """
    n_units = len(indptr) - 1
    before = _CostBefore(int(indptr[-1]), entry_cost)
    unit_cost = before(indptr[1:]) - before(indptr[:-1]) + item_cost
    fair_share = float(unit_cost.sum()) * copies / (workers * PIECES_PER_WORKER)
    limit = max(fair_share, min_piece)
    pieces = np.ones(n_units, np.int64)
    if limit > 0.0 and max_split > 1:
        heavy = np.flatnonzero(unit_cost > limit)
        pieces[heavy] = np.ceil(unit_cost[heavy] / limit).clip(1, max_split).astype(np.int64)
        pieces = np.minimum(pieces, np.maximum(np.diff(indptr), 1))
    unit, start, stop = _cut(indptr, pieces, before)

    per_unit = np.bincount(unit, minlength=n_units)
    is_piece = per_unit[unit] > 1
    slot = np.where(is_piece, np.cumsum(is_piece) - 1, -1).astype(np.int32)
    merge_unit = np.flatnonzero(per_unit > 1)
    merge_indptr = np.concatenate(([0], np.cumsum(per_unit[merge_unit])))

    cost = (before(stop) - before(start) + item_cost).astype(np.float32)
    order = np.argsort(-cost, kind="stable")
    return Schedule(
        unit=unit[order].astype(np.int32),
        start=start[order],
        stop=stop[order],
        slot=slot[order],
        cost=cost[order],
        merge_unit=merge_unit.astype(np.int32),
        merge_indptr=merge_indptr.astype(np.int64),
        copies=copies,
    )


def even_schedule(n_entries: int, pieces: int, *, copies: int = 1) -> Schedule:
    """Work items over one unit of like entries, cut into `pieces` of even size; made in microseconds."""
    bounds = np.arange(pieces + 1, dtype=np.int64) * n_entries // pieces
    is_split = pieces > 1
    return Schedule(
        unit=np.zeros(pieces, np.int32),
        start=bounds[:-1],
        stop=bounds[1:],
        slot=np.arange(pieces, dtype=np.int32) if is_split else np.full(1, -1, np.int32),
        cost=np.full(pieces, n_entries / pieces, np.float32),
        merge_unit=np.zeros(int(is_split), np.int32),
        merge_indptr=np.array([0, pieces] if is_split else [0], np.int64),
        copies=copies,
    )


class _CostBefore:
    """The cost of all entries before a given one, and its inverse."""

    def __init__(self, n_entries: int, entry_cost: npt.NDArray[np.floating] | float) -> None:
        self._each: float = 0.0
        self._sums: FloatArray | None = None
        if isinstance(entry_cost, np.ndarray):
            assert len(entry_cost) == n_entries, f"{len(entry_cost)} costs for {n_entries} entries"
            self._sums = np.concatenate(([0.0], np.cumsum(entry_cost, dtype=np.float64)))
        else:
            self._each = float(entry_cost)

    def __call__(self, entry: IntArray) -> FloatArray:
        if self._sums is None:
            return entry.astype(np.float64) * self._each
        cost: FloatArray = self._sums[entry]
        return cost

    def nearest_entry(self, cost: FloatArray) -> IntArray:
        """The boundary whose cost before it is nearest to `cost`."""
        if self._sums is None:
            return np.rint(cost / self._each if self._each else cost * 0.0).astype(np.int64)
        after = np.searchsorted(self._sums, cost).clip(1, len(self._sums) - 1)
        is_nearer_before = cost - self._sums[after - 1] < self._sums[after] - cost
        return np.where(is_nearer_before, after - 1, after)


def _cut(indptr: IntArray, pieces: IntArray, before: _CostBefore) -> tuple[IntArray, IntArray, IntArray]:
    """`(unit, start, stop)` of units cut into about `pieces` pieces of even cost; only empty units have empty ones."""
    unit = np.repeat(np.arange(len(pieces), dtype=np.int64), pieces)
    index = np.arange(len(unit)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    low, high = indptr[unit], indptr[unit + 1]
    # Only inner boundaries are searched for: most units are whole, and their ends are known.
    inner = np.flatnonzero(index > 0)
    start = low.copy()
    cost_low, cost_high = before(low[inner]), before(high[inner])
    share = index[inner] / pieces[unit[inner]]
    start[inner] = before.nearest_entry(cost_low + (cost_high - cost_low) * share).clip(low[inner], high[inner])
    stop = high.copy()
    stop[inner - 1] = start[inner]
    # An entry costlier than a piece swallows boundaries: the pieces that came out empty are dropped.
    kept = (stop > start) | (low == high)
    return unit[kept], start[kept], stop[kept]
