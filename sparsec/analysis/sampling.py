"""Which rows stand for all of them, where looking at all would take long.

This file decides how a sample is spread: runs of whole tile rows at even distances, and heavy rows besides. It must not
know what is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sparsec.analysis.fill import FILL_BLOCKS
from sparsec.masks.mask import BoundMask
from sparsec.masks.ranges import IntArray

# Rows are looked at in multiples of the largest tile.
UNIT = FILL_BLOCKS[-1]

# A sample is this many runs of tile rows, evenly spread.
SAMPLE_RUNS = 24


def n_units(bound: BoundMask) -> int:
    """Units of `UNIT` rows, the last one perhaps short."""
    return -(-bound.q_len // UNIT)


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive units of `UNIT` rows, and how many units each of them stands for."""

    first: int
    last: int
    weight: float

    @property
    def length(self) -> int:
        return self.last - self.first

    def rows(self, bound: BoundMask) -> tuple[int, int]:
        return self.first * UNIT, min(self.last * UNIT, bound.q_len)

    def tile_rows(self, bound: BoundMask, block: int) -> range:
        start, stop = self.rows(bound)
        return range(start // block, -(-stop // block))


def units_of(heavy: Iterable[int]) -> IntArray:
    """The units of heavy rows, to be looked at whatever the sample; none where they are too many."""
    units = np.unique(np.array(list(heavy), np.int64) // UNIT)
    return units if len(units) <= SAMPLE_RUNS else units[:0]


def sample_runs(total: int, wanted: int, always: IntArray | None = None) -> list[Run]:
    """About `wanted` of `total` units as evenly spread runs, and `always` those; one of all if that is enough."""
    if wanted >= total:
        return [Run(0, total, 1.0)]
    always = np.zeros(0, np.int64) if always is None else always
    others = np.delete(np.arange(total), always)
    n_runs = max(1, min(SAMPLE_RUNS, wanted, len(others)))
    length = min(max(1, wanted // n_runs), len(others))
    # One run in the middle of each equal share of the rows.
    starts = [(2 * i + 1) * len(others) // (2 * n_runs) - length // 2 for i in range(n_runs)]
    weight = len(others) / max(n_runs * length, 1)
    runs = [Run(unit, unit + 1, 1.0) for unit in always.tolist()]
    for start in starts:
        units = others[start : start + length]
        gaps = np.flatnonzero(np.diff(units) > 1) + 1
        runs += [Run(int(part[0]), int(part[-1]) + 1, weight) for part in np.split(units, gaps) if len(part)]
    return runs
