"""Which number each edge of a layout has in the mask's own order: query by query, and by key within a query.

A score modifier may hold a number for every edge. This file decides how a layout's edges are numbered: nothing is
stored where single edges lie in the mask's order, one number for each query of a tile (its keys follow each other), one
for each edge of a gathered column. It must not know what the numbers are for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsec.layout.ordering import Ordering
from sparsec.layout.rows import RowLists
from sparsec.layout.tiles import BlockTiles, GatheredTiles
from sparsec.masks.mask import BoundMask
from sparsec.masks.ranges import IntArray

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class EdgeNumbers:
    """The numbers of a layout's edges.

    Attributes:
        mask: The mask that is numbered, in the tokens' own order.
        rows: int32 `[edges]`, of single edges as they are stored; None where edge i is number i.
        tiles: int32 `[n_tiles, block_q]`, of each query's first edge in a tile.
        gathered_indptr: int64 `[n_columns + 1]`.
        gathered: int32 `[gathered edges]`, by column, then query.
    """

    mask: BoundMask
    rows: Numbers | None = None
    tiles: Numbers | None = None
    gathered_indptr: IntArray | None = None
    gathered: Numbers | None = None

    @property
    def nbytes(self) -> int:
        arrays = (self.rows, self.tiles, self.gathered_indptr, self.gathered)
        return sum(array.nbytes for array in arrays if array is not None)


class EdgeOrder:
    """The edges of a mask, so that any can be looked up."""

    def __init__(self, mask: BoundMask) -> None:
        assert mask.nnz < 1 << 31, "edges are numbered in int32"
        self.mask = mask
        edges = mask.to_csr()
        rows = np.repeat(np.arange(mask.q_len, dtype=np.int64), np.diff(edges.indptr))
        self._keys: IntArray = rows * mask.kv_len + edges.indices

    def of_rows(self, rows: RowLists, ordering: Ordering) -> EdgeNumbers:
        """Those of single edges, which stand in an order of their own."""
        assert rows.form == "edges", "only single edges are numbered"
        if ordering.q_order is None and ordering.kv_order is None:
            return EdgeNumbers(self.mask, None if rows.nnz == len(self._keys) else self._of_edges(rows))
        return EdgeNumbers(self.mask, self._of_edges(rows, ordering))

    def of_tiles(self, tiles: BlockTiles) -> EdgeNumbers:
        """Those of tiles in the tokens' own order; a tile holds all that its queries attend among its keys."""
        return EdgeNumbers(self.mask, tiles=self._of_tiles(tiles))

    def of_hybrid(self, tiles: BlockTiles, gathered: GatheredTiles, leftovers: RowLists) -> EdgeNumbers:
        """Those of a hybrid's three lists, in the tokens' own order."""
        indptr = np.concatenate(([0], np.cumsum(np.bitwise_count(gathered.lanes), dtype=np.int64)))
        numbers = self._look_up(*gathered.edges())
        return EdgeNumbers(self.mask, self._of_edges(leftovers), self._of_tiles(tiles), indptr, numbers)

    def _of_edges(self, rows: RowLists, ordering: Ordering | None = None) -> Numbers:
        query = np.repeat(np.arange(rows.shape[0], dtype=np.int64), np.diff(rows.indptr))
        key = rows.columns.astype(np.int64)
        if ordering is not None:
            query = query if ordering.q_order is None else ordering.q_order[query].astype(np.int64)
            key = key if ordering.kv_order is None else ordering.kv_order[key].astype(np.int64)
        return self._look_up(query, key)

    def _of_tiles(self, tiles: BlockTiles) -> Numbers:
        tile_map = tiles.tile_map
        block = np.repeat(np.arange(len(tile_map.indptr) - 1, dtype=np.int64), np.diff(tile_map.indptr))
        query = block[:, None] * tile_map.block_q + np.arange(tile_map.block_q)
        key = tile_map.indices.astype(np.int64)[:, None] * tile_map.block_kv
        return self._look_up(query, np.broadcast_to(key, query.shape))

    def _look_up(self, query: IntArray, key: IntArray) -> Numbers:
        """The number of an edge, or of the first that follows the place."""
        found = np.searchsorted(self._keys, query * self.mask.kv_len + key)
        return found.astype(np.int32)
