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
        tiles: int32 `[n_tiles, queries of a tile]`, of each query's first edge in a tile.
        gathered_indptr: int64 `[n_columns + 1]`.
        gathered: int32 `[gathered edges]`, by column, then row.
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

    def of_rows(self, rows: RowLists, ordering: Ordering, *, by_keys: bool = False) -> EdgeNumbers:
        """Those of single edges, which stand in an order of their own.

        Args:
            rows: The single edges.
            ordering: Which token stands at each position.
            by_keys: Whether `rows` and `ordering` are those of the transposed mask: rows are keys, columns queries.
        """
        assert rows.form == "edges", "only single edges are numbered"
        is_in_order = ordering.q_order is None and ordering.kv_order is None and not by_keys
        is_listed = not is_in_order or rows.nnz != len(self._keys)
        return EdgeNumbers(self.mask, self._of_edges(rows, ordering, by_keys=by_keys) if is_listed else None)

    def of_tiles(self, tiles: BlockTiles, *, by_keys: bool = False) -> EdgeNumbers:
        """Those of tiles in the tokens' own order; a tile holds all that its queries attend among its keys."""
        return EdgeNumbers(self.mask, tiles=self._of_tiles(tiles, by_keys=by_keys))

    def of_hybrid(
        self, tiles: BlockTiles, gathered: GatheredTiles, leftovers: RowLists, *, by_keys: bool = False
    ) -> EdgeNumbers:
        """Those of a hybrid's three lists, in the tokens' own order."""
        indptr = np.concatenate(([0], np.cumsum(np.bitwise_count(gathered.lanes), dtype=np.int64)))
        numbers = self._look_up(*gathered.edges(), by_keys=by_keys)
        rows = self._of_edges(leftovers, by_keys=by_keys)
        return EdgeNumbers(self.mask, rows, self._of_tiles(tiles, by_keys=by_keys), indptr, numbers)

    def _of_edges(self, rows: RowLists, ordering: Ordering | None = None, *, by_keys: bool) -> Numbers:
        row = np.repeat(np.arange(rows.shape[0], dtype=np.int64), np.diff(rows.indptr))
        column = rows.columns.astype(np.int64)
        if ordering is not None:
            row = row if ordering.q_order is None else ordering.q_order[row].astype(np.int64)
            column = column if ordering.kv_order is None else ordering.kv_order[column].astype(np.int64)
        return self._look_up(row, column, by_keys=by_keys)

    def _of_tiles(self, tiles: BlockTiles, *, by_keys: bool) -> Numbers:
        tile_map = tiles.tile_map
        first_row = np.repeat(np.arange(len(tile_map.indptr) - 1, dtype=np.int64), np.diff(tile_map.indptr))
        first_row, first_column = first_row * tile_map.block_q, tile_map.indices.astype(np.int64) * tile_map.block_kv
        if by_keys:
            query, key = first_column[:, None] + np.arange(tile_map.block_kv), first_row[:, None]
        else:
            query, key = first_row[:, None] + np.arange(tile_map.block_q), first_column[:, None]
        return self._look_up(query, np.broadcast_to(key, query.shape))

    def _look_up(self, query: IntArray, key: IntArray, *, by_keys: bool = False) -> Numbers:
        """The number of an edge, or of the first that follows the place; `by_keys` exchanges the two."""
        query, key = (key, query) if by_keys else (query, key)
        found = np.searchsorted(self._keys, query * self.mask.kv_len + key)
        return found.astype(np.int32)
