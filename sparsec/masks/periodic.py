"""Masks most of whose rows come again and again, each time some tokens further along: neighbourhoods on a grid.

This file decides how tiles of such a mask are had from those of one period. It must not know which masks have periods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sparsec.masks import derive, ranges, tilemap
from sparsec.masks.mask import Mask, Shape
from sparsec.masks.ranges import IntArray
from sparsec.masks.tilemap import Grid, TileBits, TileMap


@dataclass(frozen=True, slots=True)
class Stretch:
    """The queries `start:stop`, of which any attends what the one `period` before it does, `period` keys further."""

    start: int
    stop: int
    period: int


class PeriodicMask(Mask):
    """A leaf that may name such a stretch: `_stretch` is what it says besides its rows."""

    @cached_property
    def _stretch(self) -> Stretch | None:
        raise NotImplementedError

    def _tiles(self, shape: Shape, block_q: int, block_kv: int, tile_rows: range) -> TileMap:
        grid = Grid(shape, block_q, block_kv)
        repeats = self._repeats(grid)
        if repeats is None or len(tile_rows) <= repeats.n_rows:
            return derive.tiles(self, grid, tile_rows)
        wanted = np.arange(tile_rows.start, tile_rows.stop, dtype=np.int64)
        source = repeats.source_rows(wanted)
        own = np.unique(source)
        parts = [
            derive.tiles(self, grid, range(int(run[0]), int(run[-1]) + 1))
            for run in np.split(own, np.flatnonzero(np.diff(own) > 1) + 1)
        ]
        keys, counts = tilemap.merge_counts([(tilemap.keys_of(part), part.count.astype(np.int64)) for part in parts])
        # Each wanted row of tiles takes those of its source, as many columns on as it is rows below.
        first, last = (np.searchsorted(keys, (source + i) * grid.n_kv_tiles) for i in (0, 1))
        row, nth = ranges.expand(last - first)
        moved = (wanted - source) // repeats.n_rows * repeats.key_step
        return tilemap.from_counts(grid, keys[first[row] + nth] + moved[row], counts[first[row] + nth])

    def _counts_at(self, grid: Grid, keys: IntArray) -> IntArray:
        repeats = self._repeats(grid)
        if repeats is None:
            return derive.counts_at(self, grid, keys)
        own, which = np.unique(repeats.source_keys(keys), return_inverse=True)
        return derive.counts_at(self, grid, own)[which]

    def _bits_at(self, grid: Grid, keys: IntArray) -> TileBits:
        repeats = self._repeats(grid)
        if repeats is None:
            return derive.bits_at(self, grid, keys)
        own, which = np.unique(repeats.source_keys(keys), return_inverse=True)
        found = derive.bits_at(self, grid, own)
        return TileBits(found.index[which], found.bits, found.is_distinct)

    def _repeats(self, grid: Grid) -> _Repeats | None:
        """None where hardly any tiles come twice."""
        stretch = self._stretch
        if stretch is None:
            return None
        tokens = math.lcm(stretch.period, grid.block_q, grid.block_kv)
        first, stop = -(-stretch.start // grid.block_q), stretch.stop // grid.block_q
        n_rows = tokens // grid.block_q
        return _Repeats(grid, first, stop, n_rows, tokens // grid.block_kv) if stop - first > 2 * n_rows else None


@dataclass(frozen=True, slots=True)
class _Repeats:
    """The tile rows `first:stop` come again every `n_rows`, `n_columns` tile columns further."""

    grid: Grid
    first: int
    stop: int
    n_rows: int
    n_columns: int

    @property
    def key_step(self) -> int:
        """From a tile's key to that of the same tile a period later."""
        return self.n_rows * self.grid.n_kv_tiles + self.n_columns

    def source_rows(self, tile_rows: IntArray) -> IntArray:
        """The first tile row that is the same but for its place."""
        inside = (tile_rows >= self.first) & (tile_rows < self.stop)
        return np.where(inside, self.first + (tile_rows - self.first) % self.n_rows, tile_rows)

    def source_keys(self, keys: IntArray) -> IntArray:
        """The first tile that is the same, area included."""
        row = keys // self.grid.n_kv_tiles
        periods = (row - self.source_rows(row)) // self.n_rows
        if self.grid.shape[1] % self.grid.block_kv:
            # A ragged tile is full where a whole one is not.
            periods[keys - row * self.grid.n_kv_tiles == self.grid.n_kv_tiles - 1] = 0
        sources: IntArray = keys - periods * self.key_step
        return sources
