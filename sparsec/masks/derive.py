"""What any mask can answer, derived from its rows; and what a composition can, from its operands' answers.

This file decides how rows are visited (in chunks, so that memory stays bounded at millions of tokens) and how tile
counts and patterns combine under `& | ~` so that rows are only read where two operands are partial in one tile. It
speaks to masks through the leaf protocol alone and must not know any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from sparsec.masks import ranges, tilemap
from sparsec.masks.ahead import in_order
from sparsec.masks.ranges import IntArray, RowRanges
from sparsec.masks.tilemap import EMPTY, FULL, Grid, TileBits, TileMap, TilePatterns

if TYPE_CHECKING:
    import scipy.sparse

Shape = tuple[int, int]
RANGES_PER_CHUNK = 2**17


class HasRows(Protocol):
    """The part of the leaf protocol this file reads."""

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges: ...
    def _row_weight(self, shape: Shape) -> float: ...
    def _nnz_bound(self, shape: Shape) -> int: ...
    def _tiles(self, shape: Shape, block_q: int, block_kv: int, tile_rows: range) -> TileMap: ...
    def _counts_at(self, grid: Grid, keys: IntArray) -> IntArray: ...
    def _bits_at(self, grid: Grid, keys: IntArray) -> TileBits: ...


def _chunk_rows(mask: HasRows, shape: Shape) -> int:
    return max(1, int(RANGES_PER_CHUNK / max(1.0, mask._row_weight(shape))))


def _chunks(mask: HasRows, shape: Shape) -> Iterator[tuple[int, RowRanges]]:
    size = _chunk_rows(mask, shape)

    def read(start: int) -> tuple[int, RowRanges]:
        return start, mask._rows(shape, start, min(start + size, shape[0]))

    return in_order(read, range(0, shape[0], size))


def nnz(mask: HasRows, shape: Shape) -> int:
    return sum(rows.nnz for _, rows in _chunks(mask, shape))


def degrees(mask: HasRows, shape: Shape, axis: Literal["q", "kv"]) -> IntArray:
    if axis == "q":
        return np.concatenate([ranges.degrees(rows) for _, rows in _chunks(mask, shape)])
    change = np.zeros(shape[1] + 1, np.int64)
    for _, rows in _chunks(mask, shape):
        add_key_degrees(change, rows, None)
    return np.cumsum(change[:-1])


def add_key_degrees(change: IntArray, rows: RowRanges, weight: IntArray | None) -> None:
    """Adds to `change` how the number of queries changes from one key to the next; row `i` counts `weight[i]` times."""
    of_range = None if weight is None else weight[ranges.row_of_range(rows)]
    intervals = rows.step == 1
    own = None if of_range is None else of_range[intervals]
    _add_at(change, rows.start[intervals], own, 1)
    _add_at(change, rows.stop[intervals], own, -1)
    if not intervals.all():
        # Progressions are followed key by key.
        steps = ~intervals
        item, nth = ranges.expand(ranges.lengths(rows)[steps])
        key = rows.start[steps][item] + nth * rows.step[steps][item]
        own = None if of_range is None else of_range[steps][item]
        _add_at(change, key, own, 1)
        _add_at(change, key + 1, own, -1)


def _add_at(total: IntArray, place: IntArray, weight: IntArray | None, sign: int) -> None:
    """Adds `sign * weight` at each place, in time of the places and not of the whole."""
    if not len(place):
        return
    low, high = int(place.min()), int(place.max()) + 1
    if high - low > 8 * len(place):
        np.add.at(total, place, sign if weight is None else sign * weight)
    else:
        total[low:high] += sign * np.bincount(place - low, weight, minlength=high - low).astype(np.int64)


def to_csr(mask: HasRows, shape: Shape) -> scipy.sparse.csr_array:
    indptr, columns = [np.zeros(1, np.int64)], []
    # Columns fit the smaller type chunk by chunk; whether all offsets do is only known at the end.
    column_type = index_type(0, shape[1])
    for _, rows in _chunks(mask, shape):
        indptr.append(np.cumsum(ranges.degrees(rows)) + indptr[-1][-1])
        columns.append(ranges.to_edges(rows)[1].astype(column_type))
    return csr_of(np.concatenate(indptr), np.concatenate(columns), shape)


def index_type(nnz: int, kv_len: int) -> type[np.signedinteger[Any]]:
    """Of the offsets and columns of a CSR array, which SciPy wants alike."""
    return np.int32 if max(nnz, kv_len) < 2**31 else np.int64


def csr_of(indptr: IntArray, columns: npt.NDArray[np.signedinteger[Any]], shape: Shape) -> scipy.sparse.csr_array:
    """A CSR array of bool; columns ascend within each row."""
    import scipy.sparse

    own_type = index_type(len(columns), shape[1])
    result = scipy.sparse.csr_array(
        (np.ones(len(columns), np.bool_), columns.astype(own_type, copy=False), indptr.astype(own_type)), shape=shape
    )
    result.has_sorted_indices = True
    return result


def to_dense(mask: HasRows, shape: Shape) -> npt.NDArray[np.bool_]:
    dense = np.zeros(shape, np.bool_)
    for start, rows in _chunks(mask, shape):
        row, key = ranges.to_edges(rows)
        dense[row + start, key] = True
    return dense


def transposed_rows(mask: HasRows, shape: Shape) -> RowRanges:
    """The rows of the transposed mask, from the edges."""
    edges = [(row + start, key) for start, rows in _chunks(mask, shape) for row, key in (ranges.to_edges(rows),)]
    row, key = (np.concatenate(column) for column in zip(*edges, strict=True))
    # Edges come by row, so a stable sort by key leaves them by key, then row.
    order = np.argsort(key, kind="stable")
    return ranges.from_edges(shape[1], key[order], row[order])


# -- Tiles of any mask ---------------------------------------------------------------------------------------------


def _tile_row_runs(mask: HasRows, grid: Grid, wanted: IntArray) -> Iterator[tuple[int, int]]:
    """Runs `(first, stop)` of tile rows that cover `wanted` (ascending, distinct) and fit a chunk each.

    Short stretches that nobody asked for are read along: a call costs more than a few rows.
    """
    size = max(1, _chunk_rows(mask, grid.shape) // grid.block_q)
    at = 0
    while at < len(wanted):
        end = int(np.searchsorted(wanted, wanted[at] + size))
        stops = np.flatnonzero(np.diff(wanted[at:end]) > 16)
        if len(stops):
            end = at + int(stops[0]) + 1
        yield int(wanted[at]), int(wanted[end - 1]) + 1
        at = end


def _rows_of_tile_rows(mask: HasRows, grid: Grid, first: int, stop: int) -> RowRanges:
    return mask._rows(grid.shape, first * grid.block_q, min(stop * grid.block_q, grid.shape[0]))


def tiles(mask: HasRows, grid: Grid, tile_rows: range) -> TileMap:
    def counts(run: tuple[int, int]) -> tuple[IntArray, IntArray]:
        first, stop = run
        return tilemap.counts_from_rows(grid, _rows_of_tile_rows(mask, grid, first, stop), first * grid.block_q)

    runs = _tile_row_runs(mask, grid, np.arange(tile_rows.start, tile_rows.stop))
    return tilemap.from_parts(grid, in_order(counts, runs))


CountRows = Callable[[Grid, int, int], tuple[IntArray, IntArray]]


def counts_at(mask: HasRows, grid: Grid, keys: IntArray, count: CountRows | None = None) -> IntArray:
    """Edges in the tiles `keys`; `count(grid, first, stop)` counts whole tile rows where the mask knows how."""
    counts = np.zeros(len(keys), np.int64)
    for first, stop in _tile_row_runs(mask, grid, tilemap.distinct_rows(grid, keys)):
        low, high = np.searchsorted(keys, (first * grid.n_kv_tiles, stop * grid.n_kv_tiles))
        if count is None:
            rows = _rows_of_tile_rows(mask, grid, first, stop)
            found, values = tilemap.counts_from_rows(grid, rows, first * grid.block_q)
        else:
            found, values = count(grid, first, stop)
        counts[low:high] = tilemap.look_up(keys[low:high], found, values)
    return counts


def bits_at(mask: HasRows, grid: Grid, keys: IntArray) -> TileBits:
    parts = []
    limit = max(1, tilemap.PAINT_BYTES * 8 // (grid.block_q * grid.block_kv))
    for first, stop in _tile_row_runs(mask, grid, tilemap.distinct_rows(grid, keys)):
        low, high = (int(x) for x in np.searchsorted(keys, (first * grid.n_kv_tiles, stop * grid.n_kv_tiles)))
        rows = _rows_of_tile_rows(mask, grid, first, stop)
        tile_row, lane = np.divmod(np.arange(rows.n_rows) + first * grid.block_q, grid.block_q)
        for begin in range(low, high, limit):
            some = keys[begin : min(begin + limit, high)]
            strips = tilemap.strips(grid, some, rows, tile_row, lane, lane + 1)
            parts.append(tilemap.classify(grid, some, tilemap.paint(grid, len(some), strips)))
    return tilemap.gather(parts, grid)


def patterns(mask: HasRows, tile_map: TileMap) -> TilePatterns:
    grid = Grid(tile_map.shape, tile_map.block_q, tile_map.block_kv)
    partial = np.flatnonzero(~tile_map.is_full)
    found = tilemap.only_used(mask._bits_at(grid, tilemap.keys_of(tile_map, partial)))
    index = np.full(tile_map.n_tiles, FULL, np.int32)
    index[partial] = found.index
    return TilePatterns(index, found.bits)


# -- Tiles of compositions -----------------------------------------------------------------------------------------


def _tile_counts(mask: HasRows, grid: Grid, tile_rows: range) -> tuple[IntArray, IntArray]:
    tile_map = mask._tiles(grid.shape, grid.block_q, grid.block_kv, tile_rows)
    return tilemap.keys_of(tile_map), tile_map.count.astype(np.int64)


def complement_tiles(operand: HasRows, grid: Grid, tile_rows: range) -> TileMap:
    keys = grid.keys(tile_rows)
    counts = grid.areas(keys)
    if len(keys):
        inner_keys, inner_counts = _tile_counts(operand, grid, tile_rows)
        counts[inner_keys - keys[0]] -= inner_counts
    return tilemap.from_counts(grid, keys, counts)


def and_tiles(
    mask: HasRows, grid: Grid, tile_rows: range, wanted: Sequence[HasRows], unwanted: Sequence[HasRows]
) -> TileMap:
    if wanted:
        # Only the operand with the fewest edges lists its tiles; the others are asked about those.
        base = min(wanted, key=lambda m: m._nnz_bound(grid.shape))
        keys, counts = _tile_counts(base, grid, tile_rows)
        others = [m for m in wanted if m is not base]
    else:
        keys = grid.keys(tile_rows)
        counts, others = grid.areas(keys), []
    return tilemap.from_counts(grid, *_narrowed(mask, grid, keys, counts, others, unwanted))


def and_counts_at(
    mask: HasRows, grid: Grid, keys: IntArray, wanted: Sequence[HasRows], unwanted: Sequence[HasRows]
) -> IntArray:
    found, counts = _narrowed(mask, grid, keys, grid.areas(keys), wanted, unwanted)
    return tilemap.look_up(keys, found, counts)


def _narrowed(
    mask: HasRows,
    grid: Grid,
    keys: IntArray,
    counts: IntArray,
    wanted: Sequence[HasRows],
    unwanted: Sequence[HasRows],
) -> tuple[IntArray, IntArray]:
    """Tiles `keys` of an intersection, where one operand's `counts` are known; empty ones are dropped.

    A full operand changes nothing and an empty one ends it; only where two are partial must edges be compared.
    """
    areas = grid.areas(keys)
    unsure = np.zeros(len(keys), np.bool_)
    for operand, is_wanted in [*((m, True) for m in wanted), *((m, False) for m in unwanted)]:
        if not len(keys):
            break
        other = operand._counts_at(grid, keys)
        if not is_wanted:
            other = areas - other
        unsure |= (counts < areas) & (other < areas)
        counts = np.minimum(counts, other)
        keep = counts > 0
        if not keep.all():
            keys, counts, areas, unsure = keys[keep], counts[keep], areas[keep], unsure[keep]
    if unsure.any():
        counts = counts.copy()
        counts[unsure] = counts_at(mask, grid, keys[unsure])
    return keys, counts


def or_tiles(mask: HasRows, grid: Grid, tile_rows: range, operands: Sequence[HasRows]) -> TileMap:
    lists = [_tile_counts(operand, grid, tile_rows) for operand in operands]
    all_keys = np.concatenate([keys for keys, _ in lists])
    order = np.argsort(all_keys, kind="stable")
    sorted_keys = all_keys[order]
    is_new = np.concatenate(([True], sorted_keys[1:] != sorted_keys[:-1]))[: len(sorted_keys)]
    keys = sorted_keys[is_new]
    if not len(keys):
        return tilemap.from_counts(grid, keys, keys)
    first = np.flatnonzero(is_new)
    values = np.concatenate([counts for _, counts in lists])[order]
    largest = np.maximum.reduceat(values, first)
    n_operands = np.diff(np.concatenate((first, [len(values)])))
    unsure = (n_operands > 1) & (largest < grid.areas(keys))
    if unsure.any():
        largest[unsure] = counts_at(mask, grid, keys[unsure])
    return tilemap.from_counts(grid, keys, largest)


def or_counts_at(mask: HasRows, grid: Grid, keys: IntArray, operands: Sequence[HasRows]) -> IntArray:
    areas = grid.areas(keys)
    largest = np.zeros(len(keys), np.int64)
    unsure = np.zeros(len(keys), np.bool_)
    for operand in operands:
        other = operand._counts_at(grid, keys)
        unsure |= (largest > 0) & (other > 0)
        largest = np.maximum(largest, other)
    unsure &= largest < areas
    if unsure.any():
        largest[unsure] = counts_at(mask, grid, keys[unsure])
    return largest


def combined_bits_at(
    operands: Sequence[HasRows],
    grid: Grid,
    keys: IntArray,
    combine: Callable[[npt.NDArray[np.uint8], npt.NDArray[np.uint8]], Any],
) -> TileBits:
    """Bits of an intersection or a union: every different pair of patterns is combined once."""
    result = operands[0]._bits_at(grid, keys)
    for operand in operands[1:]:
        result = _combined(result, operand._bits_at(grid, keys), grid, keys, combine)
    return result


def _combined(
    a: TileBits,
    b: TileBits,
    grid: Grid,
    keys: IntArray,
    combine: Callable[[npt.NDArray[np.uint8], npt.NDArray[np.uint8]], Any],
) -> TileBits:
    # FULL and EMPTY take part as patterns of all ones (cut to the shape when classified) and all zeros.
    pair = (a.index.astype(np.int64) + 2) * (len(b.bits) + 2) + (b.index + 2)
    pairs, first, which = np.unique(pair, return_index=True, return_inverse=True)
    limit = max(1, tilemap.PAINT_BYTES * 8 // (grid.block_q * grid.block_kv))
    parts = []
    for begin in range(0, len(pairs), limit):
        some = first[begin : begin + limit]
        bits = combine(_bits_of(a, some, grid), _bits_of(b, some, grid))
        distinct, entry = tilemap.distinct(bits)
        parts.append(TileBits(entry.astype(np.int32), distinct))
    merged = tilemap.gather(parts, grid)
    return _settled(TileBits(merged.index[which], merged.bits), grid, keys)


def _bits_of(part: TileBits, tiles: IntArray, grid: Grid) -> npt.NDArray[np.uint8]:
    index = part.index[tiles]
    constants = np.zeros((2, grid.block_q, grid.block_kv // 8), np.uint8)
    constants[0] = 255
    bits = np.concatenate((constants, part.bits)) if len(part.bits) * 4 <= len(tiles) else None
    if bits is not None:
        return bits[np.where(index == FULL, 0, np.where(index == EMPTY, 1, index + 2))]
    result = part.bits[np.maximum(index, 0)]
    result[index == FULL] = 255
    result[index == EMPTY] = 0
    return result


def _settled(tile_bits: TileBits, grid: Grid, keys: IntArray) -> TileBits:
    """Full and empty tiles recognised; bits outside the shape are cleared where a tile is ragged."""
    index, bits = tile_bits.index.copy(), tile_bits.bits
    areas = grid.areas(keys)
    ragged = np.flatnonzero((areas < grid.block_q * grid.block_kv) & (index >= 0))
    if len(ragged):
        own = bits[index[ragged]] & tilemap.full_bits(grid, keys[ragged])
        extra, entry = tilemap.distinct(own)
        index[ragged] = entry + len(bits)
        bits = np.concatenate((bits, extra))
    counts = tilemap.popcounts(bits)
    named = np.flatnonzero(index >= 0)
    count = counts[index[named]]
    index[named[count == 0]] = EMPTY
    index[named[count == areas[named]]] = FULL
    return TileBits(index, bits)


def complement_bits_at(operand: HasRows, grid: Grid, keys: IntArray) -> TileBits:
    inner = operand._bits_at(grid, keys)
    index = inner.index.copy()
    index[inner.index == FULL] = EMPTY
    index[inner.index == EMPTY] = FULL
    return _settled(TileBits(index, ~inner.bits), grid, keys)
