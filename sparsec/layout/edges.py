"""Edges of a bound mask as sorted 64-bit keys, a bounded chunk at a time.

This file decides how rows of ranges become single edges and in which order: by row of tiles, then key column, then
query within the row of tiles. In that order the edges of one tile, and of one (row block, column) pair, are neighbours,
so every layout is a pass over sorted keys and none needs a search. It must not know what the layouts are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparsec.masks import ranges
from sparsec.masks.mask import BoundMask
from sparsec.masks.ranges import IntArray

# Edges expanded at a time: 4 MiB of keys sort within the cache of a core.
CHUNK_EDGES = 1 << 19


def row_chunks(degrees: IntArray, align: int, limit: int = CHUNK_EDGES) -> Iterator[tuple[int, int]]:
    """Runs `(start, stop)` of rows that begin at multiples of `align` and hold about `limit` edges at most.

    A run is never shorter than `align` rows, and never longer than `limit` rows.
    """
    n_rows = len(degrees)
    boundaries = np.arange(0, n_rows + align, align).clip(max=n_rows)
    # Rows count as an edge each, so that a run of empty rows is bounded too.
    weight = np.concatenate(([0], np.cumsum(degrees + 1)))[boundaries]
    block, last = 0, len(boundaries) - 1
    while block < last and boundaries[block] < n_rows:
        end = int(np.searchsorted(weight, weight[block] + limit, side="right")) - 1
        end = min(max(end, block + 1), last)
        yield int(boundaries[block]), int(boundaries[end])
        block = end


def pack(row: IntArray, column: IntArray, kv_len: int, block_q: int) -> IntArray:
    """`(block * kv_len + column) * block_q + lane`: sorts by row block, then column, then query within the block."""
    lane_bits = block_q.bit_length() - 1
    return (((row >> lane_bits) * kv_len + column) << lane_bits) | (row & (block_q - 1))


def unpack(keys: IntArray, kv_len: int, block_q: int) -> tuple[IntArray, IntArray]:
    """`(row, column)` of packed keys."""
    lane_bits = block_q.bit_length() - 1
    block, column = np.divmod(keys >> lane_bits, kv_len)
    return (block << lane_bits) | (keys & (block_q - 1)), column


def packed_edges(bound: BoundMask, start: int, stop: int, block_q: int) -> IntArray:
    """Sorted packed keys of the edges of rows `start … stop - 1`."""
    assert bound.q_len * bound.kv_len < 1 << 62, f"edges of a {bound.shape} mask do not fit 64-bit keys"
    rows = bound.rows(start, stop)
    item, nth = ranges.expand(ranges.lengths(rows))
    row = (ranges.row_of_range(rows) + start)[item]
    keys = pack(row, rows.start[item] + nth * rows.step[item], bound.kv_len, block_q)
    keys.sort()
    return keys
