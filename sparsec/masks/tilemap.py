"""Non-empty tiles of a mask, and the bit patterns of the partial ones.

`TileMap` is the second exact view of a bound mask: block CSR of the tiles that hold at least one edge, with the number
of edges in each. `TilePatterns` stores what a partial tile looks like, repeated shapes once. This file decides how both
are built from rows, in time and memory of ranges and tiles; it must not know what a mask is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsec.masks.ranges import IntArray, RowRanges, expand, row_of_range, run_starts


@dataclass(frozen=True, slots=True)
class TileMap:
    """The non-empty tiles of a mask of `shape`, cut into `block_q × block_kv` tiles.

    Attributes:
        shape: `(q_len, kv_len)` in tokens; tiles at the ragged edge count only what lies inside.
        block_q: Queries a tile, a power of two.
        block_kv: Keys a tile, a power of two ≥ 8.
        indptr: int64 `[n_q_tiles + 1]`.
        indices: int32 `[n_tiles]`, key-tile index, ascending within a row of tiles.
        count: int32 `[n_tiles]`, edges in the tile (never 0).
        is_full: bool `[n_tiles]`: every (query, key) of the tile that lies inside `shape` is an edge.
    """

    shape: tuple[int, int]
    block_q: int
    block_kv: int
    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    count: npt.NDArray[np.int32]
    is_full: npt.NDArray[np.bool_]

    @property
    def n_tiles(self) -> int:
        return len(self.indices)

    @property
    def nnz(self) -> int:
        return int(self.count.sum(dtype=np.int64))


@dataclass(frozen=True, slots=True)
class TilePatterns:
    """What the partial tiles of a `TileMap` look like: a dictionary of bit patterns.

    Attributes:
        index: int32 `[n_tiles]`: the tile's entry in `bits`, or -1 where the tile is full.
        bits: uint8 `[n_patterns, block_q, block_kv // 8]`, little-endian bit order: key `j` of query `i` is bit `j % 8`
            of byte `j // 8`. Bits outside `shape` are 0. No two entries are equal.
    """

    index: npt.NDArray[np.int32]
    bits: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Grid:
    """The tiles of a shape. A tile's key is `tile_row * n_kv_tiles + tile_column`."""

    shape: tuple[int, int]
    block_q: int
    block_kv: int

    @property
    def n_q_tiles(self) -> int:
        return -(-self.shape[0] // self.block_q)

    @property
    def n_kv_tiles(self) -> int:
        return -(-self.shape[1] // self.block_kv)

    def heights(self, tile_rows: IntArray) -> IntArray:
        """Queries in each of the tile rows."""
        return np.minimum(self.block_q, self.shape[0] - tile_rows * self.block_q)

    def widths(self, tile_columns: IntArray) -> IntArray:
        """Keys in each of the tile columns."""
        return np.minimum(self.block_kv, self.shape[1] - tile_columns * self.block_kv)

    def areas(self, keys: IntArray) -> IntArray:
        """Pairs inside the shape, tile by tile."""
        areas = np.full(len(keys), self.block_q * self.block_kv, np.int64)
        ragged = self.ragged(keys)
        row = keys[ragged] // self.n_kv_tiles
        areas[ragged] = self.heights(row) * self.widths(keys[ragged] - row * self.n_kv_tiles)
        return areas

    def ragged(self, keys: IntArray) -> IntArray:
        """Which of the tiles reach over the shape's edge: int64, ascending."""
        outside = np.zeros(len(keys), np.bool_)
        if self.shape[0] % self.block_q:
            outside |= keys >= (self.n_q_tiles - 1) * self.n_kv_tiles
        if self.shape[1] % self.block_kv:
            # Without a remainder, which numpy is slow to take.
            outside |= (keys + 1) // self.n_kv_tiles * self.n_kv_tiles == keys + 1
        return np.flatnonzero(outside)

    def keys(self, tile_rows: range) -> IntArray:
        """Every tile of these tile rows."""
        n = self.n_kv_tiles
        return np.arange(tile_rows.start * n, max(tile_rows.start, tile_rows.stop) * n, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class TileBits:
    """The contents of some tiles.

    Attributes:
        index: int32 `[n]`: the tile's entry in `bits`, or FULL or EMPTY.
        bits: uint8 `[n_patterns, block_q, block_kv // 8]`, as in `TilePatterns`, but entries may be
            unused, full, empty or equal.
        is_distinct: No two entries are known to be equal.
    """

    index: npt.NDArray[np.int32]
    bits: npt.NDArray[np.uint8]
    is_distinct: bool = False


FULL, EMPTY = -1, -2
# A chunk of tiles whose patterns are painted at a time, in bytes.
PAINT_BYTES = 2**25


def keys_of(tile_map: TileMap, which: IntArray | None = None) -> IntArray:
    """int64: the key of every tile, or of the tiles `which`."""
    n_kv_tiles = -(-tile_map.shape[1] // tile_map.block_kv)
    if which is not None and len(which) * 8 < tile_map.n_tiles:
        row = np.searchsorted(tile_map.indptr, which, side="right") - 1
        return row * n_kv_tiles + tile_map.indices[which]
    row = np.repeat(np.arange(len(tile_map.indptr) - 1, dtype=np.int64), np.diff(tile_map.indptr))
    keys: IntArray = row * n_kv_tiles + tile_map.indices
    return keys if which is None else keys[which]


def from_counts(grid: Grid, keys: IntArray, counts: IntArray) -> TileMap:
    """The tile map of tiles `keys` (ascending) that hold `counts` edges; tiles without edges are dropped."""
    return from_parts(grid, [(keys, counts)])


def from_parts(grid: Grid, parts: Iterable[tuple[IntArray, IntArray]]) -> TileMap:
    """The tile map of consecutive parts, `(keys, counts)` each as in `from_counts`.

    A part is made as small as it will be before the next one is asked for.
    """
    indptr = np.zeros(grid.n_q_tiles + 1, np.int64)
    indices, count, is_full = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
    for keys, counts in parts:
        keep = counts > 0
        if not keep.all():
            keys, counts = keys[keep], counts[keep]
        if not len(keys):
            continue
        row = keys // grid.n_kv_tiles
        first = int(row[0])
        in_row = np.bincount(row - first)
        indptr[first + 1 : first + 1 + len(in_row)] += in_row
        indices.append((keys - row * grid.n_kv_tiles).astype(np.int32))
        count.append(counts.astype(np.int32))
        is_full.append(counts == grid.areas(keys))
    np.cumsum(indptr, out=indptr)
    return TileMap(
        grid.shape,
        grid.block_q,
        grid.block_kv,
        indptr,
        np.concatenate(indices),
        np.concatenate(count),
        np.concatenate(is_full),
    )


def coarsened(tile_map: TileMap, times_q: int, times_kv: int) -> TileMap:
    """The same mask in tiles of so many times the queries and keys, powers of two."""
    fine = Grid(tile_map.shape, tile_map.block_q, tile_map.block_kv)
    grid = Grid(fine.shape, fine.block_q * times_q, fine.block_kv * times_kv)
    row = np.repeat(np.arange(fine.n_q_tiles, dtype=np.int64) // times_q, np.diff(tile_map.indptr))
    key = row * grid.n_kv_tiles + tile_map.indices // times_kv
    # Neighbours in a row often fall together: the rest is less to sort.
    first = run_starts(key)
    key, count = key[first], np.add.reduceat(tile_map.count, first, dtype=np.int64) if len(first) else first
    order = np.argsort(key, kind="stable")
    key, count = key[order], count[order]
    first = run_starts(key)
    return from_counts(grid, key[first], np.add.reduceat(count, first) if len(first) else first)


def distinct_rows(grid: Grid, keys: IntArray) -> IntArray:
    """The tile rows of `keys` (ascending), each once."""
    row = keys // grid.n_kv_tiles
    return row[run_starts(row)]


def counts_from_rows(grid: Grid, rows: RowRanges, first_row: int) -> tuple[IntArray, IntArray]:
    """`(keys, counts)` of the non-empty tiles of whole tile rows.

    Args:
        grid: The tiles.
        rows: Their rows, `first_row` (a multiple of block_q) and on.
        first_row: The query of row 0.
    """
    first = first_row // grid.block_q
    tile_row = np.arange(rows.n_rows, dtype=np.int64) // grid.block_q
    return counts_from_weighted_rows(grid, rows, tile_row, None, range(first, first + -(-rows.n_rows // grid.block_q)))


def counts_from_weighted_rows(
    grid: Grid, rows: RowRanges, tile_row: IntArray, weight: IntArray | None, tile_rows: range
) -> tuple[IntArray, IntArray]:
    """`(keys, counts)` of the non-empty tiles of `tile_rows`.

    Args:
        grid: The tiles.
        rows: Rows, any number for each tile row.
        tile_row: int64 `[n_rows]`, ascending: the tile row of each, counted from `tile_rows.start`.
        weight: int64 `[n_rows]`, how many queries each row stands for; None for 1.
        tile_rows: A run of tile rows.
    """
    # A count per tile column is the running sum of changes; one column more takes the changes past the end.
    width = grid.n_kv_tiles + 1
    row = row_of_range(rows)
    at, change = _changes(grid.block_kv, rows, tile_row[row] * width, None if weight is None else weight[row])
    if not len(at):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    base = tile_rows.start * grid.n_kv_tiles
    n_tile_rows = len(tile_rows)
    if n_tile_rows * width <= 8 * len(at):
        sums = np.bincount(at, weights=change, minlength=n_tile_rows * width).reshape(n_tile_rows, width)
        counts = np.rint(np.cumsum(sums, axis=1)[:, :-1]).astype(np.int64).reshape(-1)
        keys = np.flatnonzero(counts)
        return keys + base, counts[keys]
    order = np.argsort(at, kind="stable")
    at = at[order]
    total = np.cumsum(change[order])
    settled = np.flatnonzero(np.concatenate((at[1:] != at[:-1], [True])))
    at, total = at[settled], total[settled]
    # Between two places of change every tile has the same count; a row ends with 0.
    held = np.flatnonzero(total)
    item, nth = expand(at[held + 1] - at[held])
    place = at[held][item] + nth
    return place - place // width + base, total[held][item]


def _changes(block_kv: int, rows: RowRanges, base: IntArray, weight: IntArray | None) -> tuple[IntArray, IntArray]:
    """Changes of the edge count from one tile column to the next: places (`base` + column), and by how much."""
    intervals = rows.step == 1
    start, stop, interval_base = rows.start, rows.stop, base
    if not intervals.all():
        start, stop, interval_base = start[intervals], stop[intervals], base[intervals]
    first, last = start // block_kv, (stop - 1) // block_kv
    alone = first == last
    in_first = np.where(alone, stop - start, (first + 1) * block_kv - start)
    in_last = stop - last * block_kv
    first, last = first + interval_base, last + interval_base
    places = [first, first + 1, last[~alone], last[~alone] + 1]
    changes = [
        in_first,
        np.where(alone, -in_first, block_kv - in_first),
        (in_last - block_kv)[~alone],
        -in_last[~alone],
    ]
    if weight is not None:
        own = weight[intervals]
        changes = [change * by for change, by in zip(changes, (own, own, own[~alone], own[~alone]), strict=True)]
    if not intervals.all():
        places_of_steps, counts, item = _tiles_of_progressions(
            block_kv, *(column[~intervals] for column in (rows.start, rows.stop, rows.step, base))
        )
        if weight is not None:
            counts = counts * weight[~intervals][item]
        places += [places_of_steps, places_of_steps + 1]
        changes += [counts, -counts]
    return np.concatenate(places), np.concatenate(changes)


def _tiles_of_progressions(
    block_kv: int, start: IntArray, stop: IntArray, step: IntArray, base: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Every tile column a progression touches, one by one: its place, its keys, and which progression."""
    n_keys = (stop - 1 - start) // step + 1
    first = start // block_kv
    spanned = (stop - 1) // block_kv - first + 1
    sparse = step >= block_kv
    item, nth = expand(np.where(sparse, n_keys, spanned))
    place = np.where(sparse[item], (start[item] + nth * step[item]) // block_kv, first[item] + nth)

    def keys_before(column: IntArray) -> IntArray:
        reached = -((start[item] - column * block_kv) // step[item])
        below: IntArray = np.clip(reached, 0, n_keys[item])
        return below

    counts = np.where(sparse[item], 1, keys_before(place + 1) - keys_before(place))
    return place + base[item], counts, item


def look_up(keys: IntArray, found: IntArray, values: IntArray) -> IntArray:
    """`values` of the tiles `keys` where `found` (ascending) has them, else 0."""
    if not len(found):
        return np.zeros(len(keys), np.int64)
    at = np.minimum(np.searchsorted(found, keys), len(found) - 1)
    return np.where(found[at] == keys, values[at], 0)


@dataclass(frozen=True, slots=True)
class Strips:
    """Parts of tiles: neighbouring queries that attend the same progression of a tile's keys. int64 `[n]` each.

    Attributes:
        tile: Which of the tiles asked for.
        first: The first query, counted from the tile's own.
        last: One past the last.
        start: The first key, counted from the tile's own.
        stop: One past the last key, or further (not as far as the next one, within the tile).
        step: At least 1.
    """

    tile: IntArray
    first: IntArray
    last: IntArray
    start: IntArray
    stop: IntArray
    step: IntArray

    def of(self, which: IntArray) -> Strips:
        """Some of them, in that order."""
        return Strips(*(getattr(self, name)[which] for name in self.__slots__))


def strips(grid: Grid, keys: IntArray, rows: RowRanges, tile_row: IntArray, first: IntArray, last: IntArray) -> Strips:
    """What rows hold of the tiles `keys` (ascending); row `i` is the queries `first[i]:last[i]` of `tile_row[i]`."""
    row = row_of_range(rows)
    row_key = tile_row[row] * grid.n_kv_tiles
    # Which of the tiles each range reaches: a run of `keys`.
    low = np.searchsorted(keys, row_key + rows.start // grid.block_kv)
    high = np.searchsorted(keys, row_key + (rows.stop - 1) // grid.block_kv, side="right")
    item, nth = expand(high - low)
    tile = low[item] + nth
    first_key = (keys[tile] - row_key[item]) * grid.block_kv
    start, stop, step = rows.start[item], rows.stop[item], rows.step[item]
    start = start + np.maximum(0, -((start - first_key) // step)) * step - first_key
    stop = np.minimum(stop - first_key, grid.block_kv)
    query = row[item]
    return Strips(tile, first[query], last[query], start, stop, step)


def paint(grid: Grid, n_tiles: int, parts: Strips) -> npt.NDArray[np.uint8]:
    """Bits uint8 `[n_tiles, block_q, block_kv // 8]` of the tiles that `parts` make up."""
    word = min(grid.block_kv, 64)
    words_a_row = grid.block_kv // word
    words = np.zeros(n_tiles * grid.block_q * words_a_row, np.uint64)
    start, stop, step = parts.start, parts.stop, parts.step
    place = (parts.tile * grid.block_q + parts.first) * words_a_row
    if (parts.last - parts.first != 1).any():
        item, nth = expand(parts.last - parts.first)
        start, stop, step, place = start[item], stop[item], step[item], place[item] + nth * words_a_row
    single = step == 1
    # Intervals fill words from `start` to `stop`; progressions set bits one by one.
    _fill_words(words, word, place[single], start[single], stop[single])
    if not single.all():
        start, stop, step, place = start[~single], stop[~single], step[~single], place[~single]
        bit_of, nth = expand(np.maximum(0, (stop - 1 - start) // step + 1))
        bit = start[bit_of] + nth * step[bit_of]
        np.bitwise_or.at(words, place[bit_of] + bit // word, np.uint64(1) << (bit % word).astype(np.uint64))
    as_bytes = words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : word // 8]
    return np.ascontiguousarray(as_bytes).reshape(n_tiles, grid.block_q, grid.block_kv // 8)


def alike(parts: Strips, areas: IntArray) -> tuple[Strips, IntArray, IntArray]:
    """Tiles of the same area that are made up of the same strips.

    Tiles of different kinds may still look the same.

    Returns:
        The strips by tile, the first tile of each kind, and the kind of each tile.
    """
    n_tiles = len(areas)
    parts = parts.of(np.argsort(parts.tile, kind="stable"))
    n_strips = np.bincount(parts.tile, minlength=n_tiles)
    # Odd multipliers from a fixed generator; equal hashes are compared strip by strip below.
    factors = np.random.Generator(np.random.PCG64(1)).integers(0, 2**63, 5, dtype=np.uint64) * 2 + 1
    fields = (parts.first, parts.last, parts.start, parts.stop, parts.step)
    hashes = np.zeros(len(parts.tile), np.uint64)
    for field, factor in zip(fields, factors, strict=True):
        hashes = (hashes ^ field.astype(np.uint64)) * factor
        hashes ^= hashes >> np.uint64(29)
    before = np.concatenate(([0], np.cumsum(n_strips)))
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(hashes)))
    of_tile = sums[before[1:]] - sums[before[:-1]] + areas.astype(np.uint64)
    _, first, kind = np.unique(of_tile, return_index=True, return_inverse=True)
    model = first[kind]
    is_same = (n_strips == n_strips[model]) & (areas == areas[model])
    if is_same.all():
        theirs = before[model][parts.tile] + np.arange(len(parts.tile)) - before[parts.tile]
        is_same = np.logical_and.reduce([field == field[theirs] for field in fields])
    if not is_same.all():
        first = kind = np.arange(n_tiles, dtype=np.int64)
    return parts, first, kind


def _fill_words(words: npt.NDArray[np.uint64], word: int, place: IntArray, start: IntArray, stop: IntArray) -> None:
    first, last = start // word, (stop - 1) // word
    item, nth = expand(np.maximum(0, last - first + 1))
    at = first[item] + nth
    low = np.maximum(start[item] - at * word, 0)
    high = np.minimum(stop[item] - at * word, word)
    ones = np.uint64(2**64 - 1)
    mask = (ones << low.astype(np.uint64)) & (ones >> (64 - high).astype(np.uint64))
    np.bitwise_or.at(words, place[item] + at, mask)


def distinct(bits: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], IntArray]:
    """The different patterns among `bits`, in order of first appearance, and the entry of each."""
    n = len(bits)
    if n <= 1:
        return bits, np.zeros(n, np.int64)
    flat = np.ascontiguousarray(bits).reshape(n, -1)
    if flat.shape[1] % 8:
        flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 8)))
    wide = flat.view(np.uint64)
    # Odd multipliers from a fixed generator; equal hashes are compared byte by byte below.
    factors = np.random.Generator(np.random.PCG64(0)).integers(0, 2**63, wide.shape[1], dtype=np.uint64) * 2 + 1
    hashes = np.einsum("ij,j->i", wide ^ (wide >> np.uint64(29)), factors)
    _, first, entry = np.unique(hashes, return_index=True, return_inverse=True)
    repeats = np.ones(n, np.bool_)
    repeats[first] = False
    if not np.array_equal(wide[first[entry[repeats]]], wide[repeats]):
        void = flat.view(f"V{flat.shape[1]}").reshape(-1)
        _, first, entry = np.unique(void, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return bits[first[order]], rank[entry]


def popcounts(bits: npt.NDArray[np.uint8]) -> IntArray:
    """int64 `[n]`: the edges in each pattern."""
    counts: IntArray = np.bitwise_count(bits).sum(axis=(1, 2), dtype=np.int64)
    return counts


def classify(grid: Grid, keys: IntArray, bits: npt.NDArray[np.uint8]) -> TileBits:
    """The tiles `keys` whose bits are given one by one: repeats, empty and full ones recognised."""
    patterns, entry = distinct(bits)
    counts = popcounts(patterns)
    index = entry.astype(np.int32)
    if len(keys):
        index[counts[entry] == 0] = EMPTY
        index[counts[entry] == grid.areas(keys)] = FULL
    return TileBits(index, patterns, is_distinct=True)


def gather(parts: Sequence[TileBits], grid: Grid) -> TileBits:
    """The tiles of all parts, one after the other, with one dictionary."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return TileBits(np.zeros(0, np.int32), np.zeros((0, grid.block_q, grid.block_kv // 8), np.uint8))
    patterns, entry = distinct(np.concatenate([part.bits for part in parts]))
    indices, base = [], 0
    for part in parts:
        index = part.index.copy()
        named = index >= 0
        index[named] = entry[base + index[named]]
        indices.append(index)
        base += len(part.bits)
    return TileBits(np.concatenate(indices), patterns, is_distinct=True)


def only_used(tile_bits: TileBits) -> TileBits:
    """Without the patterns no tile has, equal ones joined, in order of first appearance."""
    named = np.flatnonzero(tile_bits.index >= 0)
    if not len(named):
        return TileBits(tile_bits.index, tile_bits.bits[:0])
    is_used = np.zeros(len(tile_bits.bits), np.bool_)
    is_used[tile_bits.index[named]] = True
    patterns = tile_bits.bits if is_used.all() else tile_bits.bits[is_used]
    tile_entry = (np.cumsum(is_used) - 1)[tile_bits.index[named]]
    if not tile_bits.is_distinct:
        patterns, entry = distinct(patterns)
        tile_entry = entry[tile_entry]
    first = np.full(len(patterns), len(named), np.int64)
    np.minimum.at(first, tile_entry, np.arange(len(named)))
    order = np.argsort(first)
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    index = tile_bits.index.copy()
    index[named] = rank[tile_entry]
    in_order = bool((order[1:] > order[:-1]).all())
    return TileBits(index, patterns if in_order else patterns[order], is_distinct=True)


def full_bits(grid: Grid, keys: IntArray) -> npt.NDArray[np.uint8]:
    """Bits of the tiles `keys` were they full: ones inside the shape."""
    queries = np.arange(grid.block_q) < grid.heights(keys // grid.n_kv_tiles)[:, None]
    columns = np.arange(grid.block_kv) < grid.widths(keys % grid.n_kv_tiles)[:, None]
    row = np.packbits(columns, axis=1, bitorder="little")
    return np.where(queries[:, :, None], row[:, None, :], np.uint8(0))
