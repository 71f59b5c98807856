"""Attention masks as expressions: which query attends which key."""

from sparsec.masks.blocks import blocks, random_blocks
from sparsec.masks.catalog import CONSTRUCTORS, Constructor
from sparsec.masks.explicit import from_csr, from_dense, from_graph, from_sparse
from sparsec.masks.files import load
from sparsec.masks.mask import BoundMask, Mask
from sparsec.masks.neighborhood import neighborhood
from sparsec.masks.parse import parse
from sparsec.masks.predicate import from_block_mask, from_expression, from_mask_mod
from sparsec.masks.published import bigbird, longformer
from sparsec.masks.random import random_edges
from sparsec.masks.ranges import RowRanges
from sparsec.masks.structured import dilated_2d, documents, global_tokens, prefix
from sparsec.masks.tilemap import TileMap, TilePatterns
from sparsec.masks.toeplitz import causal, dilated, full, strided, window
from sparsec.masks.varying import per_batch, per_head

__all__ = [
    "CONSTRUCTORS",
    "BoundMask",
    "Constructor",
    "Mask",
    "RowRanges",
    "TileMap",
    "TilePatterns",
    "bigbird",
    "blocks",
    "causal",
    "dilated",
    "dilated_2d",
    "documents",
    "from_block_mask",
    "from_csr",
    "from_dense",
    "from_expression",
    "from_graph",
    "from_mask_mod",
    "from_sparse",
    "full",
    "global_tokens",
    "load",
    "longformer",
    "neighborhood",
    "parse",
    "per_batch",
    "per_head",
    "prefix",
    "random_blocks",
    "random_edges",
    "strided",
    "window",
]
