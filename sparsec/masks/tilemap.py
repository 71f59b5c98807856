"""Non-empty tiles of a mask, and the bit patterns of the partial ones.

`TileMap` is the second exact view of a bound mask: block CSR of the tiles that hold at least one edge, with the number of
edges in each. `TilePatterns` stores what a partial tile looks like, repeated shapes once. This file decides how both are
built from rows, in time and memory of ranges and tiles; it must not know what a mask is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class TileMap:
    """The non-empty tiles of a mask of `shape`, cut into `block_q × block_kv` tiles.

    Attributes:
        shape: `(q_len, kv_len)` in tokens; tiles at the ragged edge count only what lies inside.
        block_q: Queries a tile, a power of two ≥ 8.
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
