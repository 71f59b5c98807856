"""Masks whose neighbouring queries share their keys: blocks, documents, and tokens that see all.

A run of equal rows is one row with a weight. This file decides how degrees, tiles and edge counts follow from runs, so
that they cost what the runs do and not what the rows would; it must not know which masks have runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from sparsec.masks import derive, ranges, tilemap
from sparsec.masks.ahead import in_order
from sparsec.masks.mask import Axis, Mask, Shape
from sparsec.masks.ranges import IntArray, RowRanges
from sparsec.masks.tilemap import Grid, TileBits, TileMap

ROWS_A_STEP = 2**22


class RunMask(Mask):
    """A leaf that states its rows as runs: `_runs` is its one obligation."""

    def _runs(self, shape: Shape, start: int, stop: int) -> tuple[IntArray, RowRanges]:
        """Where runs of equal rows begin (int64 `[n + 1]`, from `start` to `stop`), and the keys of each."""
        raise NotImplementedError

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges:
        bounds, rows = self._runs(shape, start, stop)
        return ranges.repeat_rows(rows, np.diff(bounds))

    def _run_weight(self, shape: Shape) -> float:
        """About how many ranges a query has, counted once a run."""
        return 1.0

    def _run_chunks(self, shape: Shape, start: int, stop: int) -> Iterator[tuple[IntArray, RowRanges]]:
        size = max(
            1, min(ROWS_A_STEP, int(4 * derive.RANGES_PER_CHUNK / max(self._run_weight(shape), 1.0 / ROWS_A_STEP)))
        )
        for low in range(start, stop, size):
            yield self._runs(shape, low, min(low + size, stop))

    def _nnz(self, shape: Shape) -> int:
        total = 0
        for bounds, rows in self._run_chunks(shape, 0, shape[0]):
            total += int((np.diff(bounds) * ranges.degrees(rows)).sum())
        return total

    def _degrees(self, shape: Shape, axis: Axis) -> IntArray:
        if axis == "q":
            return np.concatenate(
                [
                    np.repeat(ranges.degrees(rows), np.diff(bounds))
                    for bounds, rows in self._run_chunks(shape, 0, shape[0])
                ]
            )
        change = np.zeros(shape[1] + 1, np.int64)
        for bounds, rows in self._run_chunks(shape, 0, shape[0]):
            derive.add_key_degrees(change, rows, np.diff(bounds))
        return np.cumsum(change[:-1])

    def _tiles(self, shape: Shape, block_q: int, block_kv: int, tile_rows: range) -> TileMap:
        grid = Grid(shape, block_q, block_kv)
        step = self._tile_rows_a_step(grid)

        def counts(first: int) -> tuple[IntArray, IntArray]:
            return self._run_counts(grid, first, min(first + step, tile_rows.stop))

        return tilemap.from_parts(grid, in_order(counts, range(tile_rows.start, tile_rows.stop, step)))

    def _counts_at(self, grid: Grid, keys: IntArray) -> IntArray:
        return derive.counts_at(self, grid, keys, self._run_counts)

    def _bits_at(self, grid: Grid, keys: IntArray) -> TileBits:
        parts = []
        wanted = tilemap.distinct_rows(grid, keys)
        step = self._tile_rows_a_step(grid)
        at = 0
        while at < len(wanted):
            end = int(np.searchsorted(wanted, wanted[at] + step))
            low, high = np.searchsorted(keys, (wanted[at] * grid.n_kv_tiles, (wanted[end - 1] + 1) * grid.n_kv_tiles))
            parts.append(self._run_bits(grid, keys[low:high]))
            at = end
        return tilemap.gather(parts, grid)

    def _run_bits(self, grid: Grid, keys: IntArray) -> TileBits:
        """Tiles of few tile rows: each kind of tile is painted once."""
        first, stop = int(keys[0] // grid.n_kv_tiles), int(keys[-1] // grid.n_kv_tiles) + 1
        cuts, pieces = self._pieces(grid, first, stop)
        tile_row, lane = np.divmod(cuts[:-1], grid.block_q)
        strips = tilemap.strips(grid, keys, pieces, tile_row, lane, lane + np.diff(cuts))
        strips, kinds, kind = tilemap.alike(strips, grid.areas(keys))
        before = np.searchsorted(strips.tile, kinds), np.searchsorted(strips.tile, kinds, side="right")
        limit = max(1, tilemap.PAINT_BYTES * 8 // (grid.block_q * grid.block_kv))
        parts = []
        for begin in range(0, len(kinds), limit):
            some = kinds[begin : begin + limit]
            low, high = (each[begin : begin + limit] for each in before)
            item, nth = ranges.expand(high - low)
            own = replace(strips.of(low[item] + nth), tile=item)
            parts.append(tilemap.classify(grid, keys[some], tilemap.paint(grid, len(some), own)))
        painted = tilemap.gather(parts, grid)
        return TileBits(painted.index[kind], painted.bits, painted.is_distinct)

    def _tile_rows_a_step(self, grid: Grid) -> int:
        weight = max(self._run_weight(grid.shape), 1.0 / grid.block_q)
        return max(1, min(ROWS_A_STEP, int(derive.RANGES_PER_CHUNK / weight)) // grid.block_q)

    def _pieces(self, grid: Grid, first: int, stop: int) -> tuple[IntArray, RowRanges]:
        """The runs of the tile rows `first:stop`, cut where tile rows begin: where pieces begin, and their keys."""
        start, end = first * grid.block_q, min(stop * grid.block_q, grid.shape[0])
        bounds, rows = self._runs(grid.shape, start, end)
        cuts = np.union1d(bounds, np.append(np.arange(start, end, grid.block_q), end))
        return cuts, ranges.pick_rows(rows, np.searchsorted(bounds, cuts[:-1], side="right") - 1)

    def _run_counts(self, grid: Grid, first: int, stop: int) -> tuple[IntArray, IntArray]:
        """`(keys, counts)` of the tile rows `first:stop`."""
        cuts, pieces = self._pieces(grid, first, stop)
        # Each piece is one row of ranges, as heavy as it is high.
        return tilemap.counts_from_weighted_rows(
            grid, pieces, cuts[:-1] // grid.block_q - first, np.diff(cuts), range(first, stop)
        )
