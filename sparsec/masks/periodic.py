"""Masks most of whose rows come again and again, each time some tokens further along: neighbourhoods on a grid.

This file decides how tiles of such a mask are had from those of one period. It must not know which masks have periods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sparsec.masks import derive, tilemap
from sparsec.masks.mask import Mask, Shape
from sparsec.masks.ranges import IntArray
from sparsec.masks.tilemap import Grid, TileBits, TileMap

# Tiles with more tokens a side are put together from tiles of so many, whose period is shorter.
_FINE = 128


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
        times_q, times_kv = max(1, block_q // _FINE), max(1, block_kv // _FINE)
        if times_q * times_kv > 1 and len(tile_rows) == grid.n_q_tiles:
            fine = self._repeats(Grid(shape, block_q // times_q, block_kv // times_kv))
            if fine is not None:
                return tilemap.coarsened(self._repeated(fine, range(fine.grid.n_q_tiles)), times_q, times_kv)
        repeats = self._repeats(grid)
        if repeats is not None and len(tile_rows) > repeats.n_rows:
            return self._repeated(repeats, tile_rows)
        return derive.tiles(self, grid, tile_rows)

    def _repeated(self, repeats: _Repeats, tile_rows: range) -> TileMap:
        """Each of `tile_rows` takes the tiles of its source, as many columns on as it is rows below."""
        grid = repeats.grid
        wanted = np.arange(tile_rows.start, tile_rows.stop, dtype=np.int64)
        source = repeats.source_rows(wanted)
        own = np.flatnonzero(np.bincount(source))
        parts = [
            derive.tiles(self, grid, range(int(run[0]), int(run[-1]) + 1))
            for run in np.split(own, np.flatnonzero(np.diff(own) > 1) + 1)
        ]
        first = np.zeros(grid.n_q_tiles, np.int64)
        n_tiles = np.zeros(grid.n_q_tiles, np.int64)
        before = 0
        for part in parts:
            n_tiles += np.diff(part.indptr)
            first += np.where(np.diff(part.indptr) > 0, part.indptr[:-1] + before, 0)
            before += part.n_tiles
        indptr = np.zeros(grid.n_q_tiles + 1, np.int64)
        indptr[wanted + 1] = n_tiles[source]
        np.cumsum(indptr, out=indptr)
        n_wanted = n_tiles[source]
        at = np.arange(int(indptr[-1])) + np.repeat(first[source] - indptr[wanted], n_wanted)
        moved = ((wanted - source) // repeats.n_rows * repeats.n_columns).astype(np.int32)
        indices = np.concatenate([part.indices for part in parts])[at] + np.repeat(moved, n_wanted)
        count = np.concatenate([part.count for part in parts])[at]
        is_full = np.concatenate([part.is_full for part in parts])[at]
        if grid.shape[1] % grid.block_kv:
            # A ragged tile is full where a whole one is not.
            ragged = np.flatnonzero(indices == grid.n_kv_tiles - 1)
            row = np.searchsorted(indptr, ragged, side="right") - 1
            is_full[ragged] = count[ragged] == grid.heights(row) * grid.widths(indices[ragged].astype(np.int64))
        return TileMap(grid.shape, grid.block_q, grid.block_kv, indptr, indices, count, is_full)

    def _counts_at(self, grid: Grid, keys: IntArray) -> IntArray:
        repeats = self._repeats(grid)
        if repeats is None:
            return derive.counts_at(self, grid, keys)
        own, which = repeats.sources(keys)
        return derive.counts_at(self, grid, own)[which]

    def _bits_at(self, grid: Grid, keys: IntArray) -> TileBits:
        repeats = self._repeats(grid)
        if repeats is None:
            return derive.bits_at(self, grid, keys)
        own, which = repeats.sources(keys)
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

    def sources(self, keys: IntArray) -> tuple[IntArray, IntArray]:
        """The first tile of each kind that is the same, area included, and which one each of `keys` (ascending) is."""
        row = keys // self.grid.n_kv_tiles
        column = keys - row * self.grid.n_kv_tiles
        periods = (row - self.source_rows(row)) // self.n_rows
        # What would come from before the first key is empty.
        periods[column < periods * self.n_columns] = 0
        if self.grid.shape[1] % self.grid.block_kv:
            # A ragged tile is full where a whole one is not.
            periods[column == self.grid.n_kv_tiles - 1] = 0
        source = keys - periods * self.key_step
        # Most often the sources are asked for as well.
        own = keys[periods == 0]
        which = np.searchsorted(own, source)
        if len(own) and bool((own[np.minimum(which, len(own) - 1)] == source).all()):
            return own, which
        return np.unique(source, return_inverse=True)
