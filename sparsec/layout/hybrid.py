"""Splits the edges of a mask among contiguous tiles, gathered tiles and single edges, each edge exactly once.

This file decides the split for given thresholds, and how the three lists of a row block become one list of entries for
`schedule`. It must not know what a tile, a gathered column or a single edge costs on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsec.layout.edges import CHUNK_EDGES, packed_edges, row_chunks, unpack
from sparsec.layout.rows import RowLists
from sparsec.layout.scheduling import Schedule
from sparsec.layout.tiles import ROW_BLOCKS, BlockTiles, GatheredTiles, gathered_from_parts, pattern_keys
from sparsec.masks import ranges
from sparsec.masks.mask import BoundMask
from sparsec.masks.ranges import IntArray, run_starts
from sparsec.masks.tilemap import TileMap

# Gathered columns, and single edges, that make one entry of a schedule: a tile's worth, so that entries of all three
# kinds are of a like size and a unit can be split anywhere without splitting a vector.
COLUMNS_PER_ENTRY = 64

# Sparse tiles are read from their bit patterns rather than from all rows when they hold less than this share of the
# edges.
_PATTERN_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class HybridItems:
    """The items of a schedule as stretches of the three lists of a `HybridLayout`; int64 `[n_items]` each."""

    tile_start: IntArray
    tile_stop: IntArray
    column_start: IntArray
    column_stop: IntArray
    edge_start: IntArray
    edge_stop: IntArray

    @property
    def nbytes(self) -> int:
        return 6 * self.tile_start.nbytes


@dataclass(frozen=True, slots=True)
class HybridLayout:
    """Disjoint edge sets whose union is the mask.

    A schedule's unit is a row block of `block_q` queries. Its entries are, in this order, its contiguous tiles, its
    gathered columns `COLUMNS_PER_ENTRY` at a time, and its single edges `COLUMNS_PER_ENTRY` at a time.

    Attributes:
        tiles: Contiguous tiles.
        gathered: Gathered columns, for row blocks of the same `block_q`.
        leftovers: Single edges, in the form `"edges"`.
    """

    tiles: BlockTiles
    gathered: GatheredTiles
    leftovers: RowLists

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes + self.gathered.nbytes + self.leftovers.nbytes

    @property
    def nnz(self) -> tuple[int, int, int]:
        """Edges in contiguous tiles, in gathered columns, and single."""
        return self.tiles.tile_map.nnz, self.gathered.nnz, self.leftovers.nnz

    def transpose(self) -> HybridLayout:
        """The same edges with the roles of queries and keys swapped, each in the list of its kind.

        Columns shared by many queries of a block say nothing of queries shared by many keys: `hybrid_split` of the
        transposed mask finds the split that suits the backward pass.
        """
        tiles = self.tiles.transpose()
        block = tiles.tile_map.block_q
        assert block in ROW_BLOCKS, f"row blocks of {block} keys cannot be gathered"
        return HybridLayout(tiles, self.gathered.transpose(block), self.leftovers.transpose())

    def entry_indptr(self) -> IntArray:
        """int64 `[n_row_blocks + 1]`: the entries of each row block, for `schedule`."""
        tiles, columns, edges = self._list_lengths()
        return np.concatenate(([0], np.cumsum(tiles + _entries(columns) + _entries(edges))))

    def entry_costs(self, tile: float, column: float, edge: float) -> npt.NDArray[np.float32]:
        """float32 `[n_entries]`: what each entry costs when a tile, a gathered column, a single edge cost this much."""
        tiles, columns, edges = self._list_lengths()
        column_entries, edge_entries = _entries(columns), _entries(edges)
        entries = tiles + column_entries + edge_entries
        cost = np.full(int(entries.sum()), COLUMNS_PER_ENTRY * column, np.float32)
        base = np.cumsum(entries) - entries
        cost[_positions(base, tiles)] = tile
        cost[_positions(base + tiles + column_entries, edge_entries)] = COLUMNS_PER_ENTRY * edge
        # The last entry of a list is what the full ones leave over.
        has_columns, has_edges = np.flatnonzero(columns), np.flatnonzero(edges)
        last_column = (base + tiles + column_entries - 1)[has_columns]
        cost[last_column] = ((columns[has_columns] - 1) % COLUMNS_PER_ENTRY + 1) * column
        cost[(base + entries - 1)[has_edges]] = ((edges[has_edges] - 1) % COLUMNS_PER_ENTRY + 1) * edge
        return cost

    def items(self, schedule: Schedule) -> HybridItems:
        """What each item of a schedule over these entries covers of the three lists."""
        tiles, columns, edges = (lengths[schedule.unit] for lengths in self._list_lengths())
        base = self.entry_indptr()[schedule.unit]
        start, stop = schedule.start - base, schedule.stop - base
        first_tile = self.tiles.tile_map.indptr[schedule.unit]
        first_column = self.gathered.indptr[schedule.unit]
        first_edge = self._edge_indptr()[schedule.unit]
        before_columns = tiles
        before_edges = tiles + _entries(columns)

        def within(entry: IntArray, before: IntArray, length: IntArray) -> IntArray:
            passed: IntArray = np.minimum(np.maximum(entry - before, 0) * COLUMNS_PER_ENTRY, length)
            return passed

        return HybridItems(
            tile_start=first_tile + np.minimum(start, tiles),
            tile_stop=first_tile + np.minimum(stop, tiles),
            column_start=first_column + within(start, before_columns, columns),
            column_stop=first_column + within(stop, before_columns, columns),
            edge_start=first_edge + within(start, before_edges, edges),
            edge_stop=first_edge + within(stop, before_edges, edges),
        )

    def _edge_indptr(self) -> IntArray:
        """Single edges before each row block."""
        block_q = self.gathered.block_q
        rows = np.arange(len(self.gathered.indptr)) * block_q
        before: IntArray = self.leftovers.indptr[rows.clip(max=self.gathered.shape[0])]
        return before

    def _list_lengths(self) -> tuple[IntArray, IntArray, IntArray]:
        """Tiles, gathered columns and single edges of each row block."""
        return np.diff(self.tiles.tile_map.indptr), np.diff(self.gathered.indptr), np.diff(self._edge_indptr())


def hybrid_split(
    bound: BoundMask, block_q: int, block_kv: int, tile_threshold: int, column_threshold: int
) -> HybridLayout:
    """The edges of `bound` in three lists, each edge in exactly one.

    Args:
        bound: The mask.
        block_q: Queries a row block and a tile, a power of two up to 64.
        block_kv: Keys a tile.
        tile_threshold: A tile with at least this many edges, or with every edge it can have, stays contiguous.
        column_threshold: Of the other edges, those whose key is attended by at least this many queries of the row block
            are gathered; the rest stay single.
    """
    assert block_q in ROW_BLOCKS, f"a row block has a power of two of queries up to 64, not {block_q}"
    tile_map = bound.tiles(block_q, block_kv)
    is_dense = (tile_map.count >= tile_threshold) | tile_map.is_full
    dense = tiles_where(tile_map, is_dense)
    tiles = BlockTiles(dense, bound.patterns(dense))

    single_keys = [np.zeros(0, np.int64)]

    def shared_keys() -> Iterator[IntArray]:
        for keys in _sparse_chunks(bound, tile_map, is_dense):
            if column_threshold <= 1:
                yield keys
                continue
            starts = run_starts(keys >> (block_q.bit_length() - 1))
            multiplicity = np.diff(np.append(starts, len(keys)))
            is_gathered = np.repeat(multiplicity >= column_threshold, multiplicity)
            single_keys.append(keys[~is_gathered])
            yield keys[is_gathered]

    gathered = gathered_from_parts(shared_keys(), bound.shape, block_q)
    return HybridLayout(tiles, gathered, _single_edges(np.concatenate(single_keys), bound.shape, block_q))


def gathered_tiles(bound: BoundMask, block_q: int) -> GatheredTiles:
    """All edges of `bound` as gathered tiles."""
    chunks = row_chunks(bound.degrees("q"), block_q)
    parts = (packed_edges(bound, start, stop, block_q) for start, stop in chunks)
    return gathered_from_parts(parts, bound.shape, block_q)


def tiles_where(tile_map: TileMap, kept: npt.NDArray[np.bool_]) -> TileMap:
    """`tile_map` with only the tiles where `kept`."""
    before = np.concatenate(([0], np.cumsum(kept)))
    return TileMap(
        shape=tile_map.shape,
        block_q=tile_map.block_q,
        block_kv=tile_map.block_kv,
        indptr=before[tile_map.indptr],
        indices=tile_map.indices[kept],
        count=tile_map.count[kept],
        is_full=tile_map.is_full[kept],
    )


def _sparse_chunks(bound: BoundMask, tile_map: TileMap, is_dense: npt.NDArray[np.bool_]) -> Iterator[IntArray]:
    """Sorted packed keys of the edges outside the dense tiles; chunks ascend and end with a row block."""
    sparse_edges = int(tile_map.count[~is_dense].sum(dtype=np.int64))
    if not sparse_edges:
        return
    if sparse_edges < _PATTERN_SHARE * tile_map.nnz:
        yield _keys_from_patterns(bound, tiles_where(tile_map, ~is_dense))
        return
    block_q = tile_map.block_q
    for start, stop in row_chunks(bound.degrees("q"), block_q):
        first, last = tile_map.indptr[start // block_q], tile_map.indptr[-(-stop // block_q)]
        if is_dense[first:last].all():
            continue
        keys = packed_edges(bound, start, stop, block_q)
        # Sorted keys visit the tiles in the tile map's own order, so its counts say which tile each edge is in.
        in_dense = np.repeat(is_dense[first:last], tile_map.count[first:last])
        yield keys[~in_dense]


def _keys_from_patterns(bound: BoundMask, sparse_tiles: TileMap) -> IntArray:
    """The same from the bit patterns of the sparse tiles, in time of those alone."""
    tiles = BlockTiles(sparse_tiles, bound.patterns(sparse_tiles))
    cells = sparse_tiles.block_q * sparse_tiles.block_kv
    step = max(1, (CHUNK_EDGES << 3) // cells)
    chunks = [pattern_keys(tiles, i, min(i + step, sparse_tiles.n_tiles)) for i in range(0, sparse_tiles.n_tiles, step)]
    keys = np.concatenate(chunks)
    keys.sort()
    return keys


def _single_edges(keys: IntArray, shape: tuple[int, int], block_q: int) -> RowLists:
    from scipy import sparse

    row, column = unpack(keys, shape[1], block_q)
    # The conversion is a stable counting sort by row, and columns ascend within a row block: they stay sorted.
    edges = sparse.coo_array((np.ones(len(keys), np.bool_), (row, column)), shape=shape).tocsr()
    return RowLists.of_edges(shape, edges.indptr, edges.indices)


def _entries(lengths: IntArray) -> IntArray:
    return -(-lengths // COLUMNS_PER_ENTRY)


def _positions(first: IntArray, lengths: IntArray) -> IntArray:
    """`first[i], first[i] + 1, …, first[i] + lengths[i] - 1` for every `i`."""
    item, nth = ranges.expand(lengths)
    return first[item] + nth
