"""Index arrays of the two tiled layouts: contiguous tiles and gathered tiles, each with its transpose.

This file decides how tiles and their bit patterns are stored and turned around. It must not know which edges of a mask
go to which layout (`hybrid.py` does), nor what a kernel does with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsec.layout.edges import pack
from sparsec.masks import ranges
from sparsec.masks.mask import BoundMask
from sparsec.masks.ranges import IntArray, run_starts
from sparsec.masks.tilemap import TileMap, TilePatterns

# Queries that a gathered row block may have: as many as one word has bits.
ROW_BLOCKS = (1, 2, 4, 8, 16, 32, 64)

# Bits unpacked to bytes at a time while patterns are turned around.
_CHUNK_BITS = 1 << 25


@dataclass(frozen=True, slots=True)
class BlockTiles:
    """Contiguous tiles of a mask: which are there, and what the partial ones look like."""

    tile_map: TileMap
    patterns: TilePatterns

    @property
    def n_patterns(self) -> int:
        return len(self.patterns.bits)

    @property
    def nbytes(self) -> int:
        tiles, patterns = self.tile_map, self.patterns
        arrays = (tiles.indptr, tiles.indices, tiles.count, tiles.is_full, patterns.index, patterns.bits)
        return sum(array.nbytes for array in arrays)

    def transpose(self) -> BlockTiles:
        """The same edges with the roles of queries and keys swapped."""
        from scipy import sparse

        tiles = self.tile_map
        tile = sparse.csr_array(
            (np.arange(1, tiles.n_tiles + 1), tiles.indices, tiles.indptr),
            shape=(len(tiles.indptr) - 1, -(-tiles.shape[1] // tiles.block_kv)),
        ).tocsc()
        order = tile.data - 1
        return BlockTiles(
            TileMap(
                shape=(tiles.shape[1], tiles.shape[0]),
                block_q=tiles.block_kv,
                block_kv=tiles.block_q,
                indptr=tile.indptr.astype(np.int64),
                indices=tile.indices.astype(np.int32),
                count=tiles.count[order],
                is_full=tiles.is_full[order],
            ),
            TilePatterns(self.patterns.index[order], _transposed(self.patterns.bits)),
        )

    def row_masks(self) -> npt.NDArray[np.uint64]:
        """For each query of a pattern the keys it attends.

        Returns:
            uint64 `[n_patterns, block_q, ceil(block_kv / 64)]`; key `j` is bit `j % 64` of word `j // 64`.
        """
        return _words(self.patterns.bits)

    def lane_masks(self) -> npt.NDArray[np.uint64]:
        """For each key of a pattern the queries that attend it.

        Returns:
            uint64 `[n_patterns, block_kv]`; query `i` is bit `i`. Only for `block_q ≤ 64`.
        """
        assert self.tile_map.block_q <= 64, f"one word holds 64 queries, not {self.tile_map.block_q}"
        return _words(_transposed(self.patterns.bits))[:, :, 0]


def block_tiles(bound: BoundMask, block_q: int, block_kv: int) -> BlockTiles:
    """All edges of `bound` as contiguous tiles."""
    tile_map = bound.tiles(block_q, block_kv)
    return BlockTiles(tile_map, bound.patterns(tile_map))


@dataclass(frozen=True, slots=True)
class GatheredTiles:
    """For each row block the distinct key columns of its edges, and which of its queries attend each.

    Attributes:
        shape: `(q_len, kv_len)` in tokens.
        block_q: Queries a row block, a power of two up to 64.
        indptr: int64 `[n_q_tiles + 1]`.
        columns: int32 `[n]`, ascending within a row block.
        lanes: uint64 `[n]`; bit `i` says that query `i` of the row block attends the column. Never 0. Of row blocks of
            one query, a view of a single 1: its columns are its keys, and nothing is stored.
    """

    shape: tuple[int, int]
    block_q: int
    indptr: IntArray
    columns: npt.NDArray[np.int32]
    lanes: npt.NDArray[np.uint64]

    @property
    def nnz(self) -> int:
        return int(np.bitwise_count(self.lanes).sum(dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.indptr.nbytes + self.columns.nbytes + (0 if self.block_q == 1 else self.lanes.nbytes)

    def edges(self) -> tuple[IntArray, IntArray]:
        """`(row, column)` of every edge, by row block, then column, then row."""
        block = np.repeat(np.arange(len(self.indptr) - 1, dtype=np.int64), np.diff(self.indptr))
        step = max(1, _CHUNK_BITS // self.block_q)
        rows, columns = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for start in range(0, len(self.lanes), step):
            lanes = self.lanes[start : start + step]
            octets = lanes.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : -(-self.block_q // 8)]
            entry, lane = np.nonzero(np.unpackbits(octets, axis=1, bitorder="little"))
            rows.append(block[start + entry] * self.block_q + lane)
            columns.append(self.columns[start + entry].astype(np.int64))
        return np.concatenate(rows), np.concatenate(columns)

    def transpose(self, block: int | None = None) -> GatheredTiles:
        """The same edges gathered for blocks of `block` keys (default `block_q`); `columns` are then queries."""
        block = block or self.block_q
        row, column = self.edges()
        keys = pack(column, row, self.shape[0], block)
        keys.sort()
        return gathered_from_keys(keys, (self.shape[1], self.shape[0]), block)


def gathered_from_keys(keys: IntArray, shape: tuple[int, int], block_q: int) -> GatheredTiles:
    """Gathered tiles of the edges given as sorted packed keys (see `edges.pack`)."""
    assert block_q in ROW_BLOCKS, f"a gathered row block has a power of two of queries up to 64, not {block_q}"
    n_blocks = -(-shape[0] // block_q)
    lane_bits = block_q.bit_length() - 1
    pair = keys >> lane_bits
    starts = run_starts(pair)
    block, column = np.divmod(pair[starts], max(shape[1], 1))
    if block_q == 1:
        lanes = _alone(len(starts))
    else:
        lane = np.uint64(1) << (keys & (block_q - 1)).astype(np.uint64)
        lanes = np.bitwise_or.reduceat(lane, starts) if len(starts) else lane
    indptr = np.concatenate(([0], np.cumsum(np.bincount(block, minlength=n_blocks))))
    return GatheredTiles(shape, block_q, indptr, column.astype(np.int32), lanes)


def gathered_from_parts(parts: Iterable[IntArray], shape: tuple[int, int], block_q: int) -> GatheredTiles:
    """The same of keys that come in parts, each a run of whole row blocks; one part at a time is held as keys."""
    indptr = np.zeros(-(-shape[0] // block_q) + 1, np.int64)
    columns, lanes = [np.zeros(0, np.int32)], [np.zeros(0, np.uint64)]
    for keys in parts:
        part = gathered_from_keys(keys, shape, block_q)
        indptr += part.indptr
        columns.append(part.columns)
        lanes.append(part.lanes)
    all_columns = np.concatenate(columns)
    all_lanes = _alone(len(all_columns)) if block_q == 1 else np.concatenate(lanes)
    return GatheredTiles(shape, block_q, indptr, all_columns, all_lanes)


def _alone(n: int) -> npt.NDArray[np.uint64]:
    return np.broadcast_to(np.uint64(1), n)


def pattern_keys(tiles: BlockTiles, start: int, stop: int) -> IntArray:
    """Packed keys of the edges of the partial tiles `start … stop - 1`, unsorted."""
    tile_map, patterns = tiles.tile_map, tiles.patterns
    tile_row = np.searchsorted(tile_map.indptr, np.arange(start, stop), side="right") - 1
    used, which = np.unique(patterns.index[start:stop], return_inverse=True)
    entry, lane, key = np.nonzero(np.unpackbits(patterns.bits[used], axis=2, bitorder="little"))
    edges_per_pattern = np.bincount(entry, minlength=len(used))
    first = np.cumsum(edges_per_pattern) - edges_per_pattern
    tile, nth = ranges.expand(edges_per_pattern[which])
    source = first[which][tile] + nth
    row = (tile_row * tile_map.block_q)[tile] + lane[source]
    column = (tile_map.indices[start:stop].astype(np.int64) * tile_map.block_kv)[tile] + key[source]
    return pack(row, column, tile_map.shape[1], tile_map.block_q)


def _transposed(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """`[n, block_q, block_kv // 8]` → `[n, block_kv, ⌈block_q / 8⌉]`, bit `j` of row `i` to bit `i` of row `j`."""
    n, block_q, kv_bytes = bits.shape
    out = np.empty((n, kv_bytes * 8, -(-block_q // 8)), np.uint8)
    step = max(1, _CHUNK_BITS // (block_q * kv_bytes * 8))
    for start in range(0, n, step):
        unpacked = np.unpackbits(bits[start : start + step], axis=2, bitorder="little")
        out[start : start + step] = np.packbits(unpacked.transpose(0, 2, 1), axis=2, bitorder="little")
    return out


def _words(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """`[n, rows, bytes]` → little-endian uint64 `[n, rows, ceil(bytes / 8)]`, padded with zero bits."""
    n, rows, n_bytes = bits.shape
    padded = np.zeros((n, rows, -(-n_bytes // 8) * 8), np.uint8)
    padded[:, :, :n_bytes] = bits
    return padded.view("<u8").astype(np.uint64, copy=False)
