"""Tiles in the order in which the GPU kernels walk them.

This file decides that order and the form of its arrays. It must not know any back end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sparsec.layout import BlockTiles, EdgeNumbers

Array = npt.NDArray[Any]


def tile_arrays(
    tiles: BlockTiles, start: Array, stop: Array, numbers: EdgeNumbers | None = None
) -> dict[str, Array | None]:
    """Tiles in the order the kernels walk them: of each item the full ones, then the partial ones.

    A full tile that the end of the key sequence cuts off becomes a partial one, so that no full tile needs a bound.
    `numbers` are those of the tiles' edges, where a score modifier asks for them.
    """
    tile_map = tiles.tile_map
    pattern = tiles.patterns.index.copy()
    masks = tiles.row_masks().view(np.int64)
    ragged = tile_map.shape[1] % tile_map.block_kv
    if ragged:
        is_cut = tile_map.is_full & (tile_map.indices == tile_map.shape[1] // tile_map.block_kv)
        pattern[is_cut] = len(masks)
        keys = np.arange(masks.shape[2] * 64) < ragged
        words = np.packbits(keys, bitorder="little").view("<i8")
        masks = np.concatenate([masks, np.broadcast_to(words, (1, *masks.shape[1:]))])
    is_partial = pattern >= 0
    # Items are disjoint stretches that cover all tiles: sorting by (first tile of the item, partial) stays inside them.
    first = np.sort(start[start < stop])
    item = np.searchsorted(first, np.arange(tile_map.n_tiles), side="right")
    order = np.lexsort((is_partial, item))
    before = np.concatenate(([0], np.cumsum(is_partial)))
    n_partial = before[stop] - before[start]
    return {
        "item_tile": start,
        "item_full": (stop - start - n_partial).astype(np.int32),
        "item_partial": n_partial.astype(np.int32),
        "tile_column": tile_map.indices[order],
        "tile_pattern": pattern[order],
        "patterns": masks,
        "tile_edges": None if numbers is None or numbers.tiles is None else numbers.tiles[order],
    }
