"""Index arrays from a bound mask: tiles, gathered tiles, row lists, their schedules, and orders of tokens.

Everything is vectorised and chunked: memory grows with edges and tiles, never with `q_len × kv_len`. Offsets are int64,
tile, column and token indices int32. This package decides how edges are stored; it must not know what any of it costs,
nor which kernel reads it.
"""

from sparsec.layout.hybrid import HybridItems, HybridLayout, gathered_tiles, hybrid_split
from sparsec.layout.numbering import EdgeNumbers, EdgeOrder
from sparsec.layout.ordering import Ordering, reordered, residue_order
from sparsec.layout.rows import RowForm, RowLists, row_lists
from sparsec.layout.scheduling import Schedule, even_schedule, schedule
from sparsec.layout.tiles import BlockTiles, GatheredTiles, block_tiles

__all__ = [
    "BlockTiles",
    "EdgeNumbers",
    "EdgeOrder",
    "GatheredTiles",
    "HybridItems",
    "HybridLayout",
    "Ordering",
    "RowForm",
    "RowLists",
    "Schedule",
    "block_tiles",
    "even_schedule",
    "gathered_tiles",
    "hybrid_split",
    "reordered",
    "residue_order",
    "row_lists",
    "schedule",
]
