"""The list of mask constructors, for the reader of expressions, the command line and the documentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from sparsec.masks.blocks import blocks, random_blocks
from sparsec.masks.explicit import from_csr, from_dense, from_graph, from_sparse
from sparsec.masks.mask import Mask
from sparsec.masks.neighborhood import neighborhood
from sparsec.masks.predicate import from_block_mask, from_expression, from_mask_mod
from sparsec.masks.published import bigbird, longformer
from sparsec.masks.random import random_edges
from sparsec.masks.structured import dilated_2d, documents, global_tokens, prefix
from sparsec.masks.toeplitz import causal, dilated, full, strided, window
from sparsec.masks.varying import per_batch, per_head


class Constructor(NamedTuple):
    """One way to make a mask.

    Attributes:
        function: The constructor.
        summary: What it means, in a line.
        example: A small expression that `parse` reads, or empty where the arguments cannot be written as text.
    """

    function: Callable[..., Mask]
    summary: str
    example: str


CONSTRUCTORS: Mapping[str, Constructor] = MappingProxyType(
    {
        "full": Constructor(full, "every key", "full()"),
        "causal": Constructor(causal, "keys up to the query", "causal()"),
        "window": Constructor(window, "keys from q - left to q + right", "window(3, 1)"),
        "dilated": Constructor(dilated, "keys within reach, a multiple of the dilation away", "dilated(6, 2)"),
        "dilated_2d": Constructor(
            dilated_2d, "every dilation-th token of a block attends those of the same block", "dilated_2d(8, 2)"
        ),
        "strided": Constructor(strided, "keys a multiple of the stride away", "strided(4)"),
        "global_tokens": Constructor(global_tokens, "some tokens attend, and are attended by, all", "global_tokens(2)"),
        "prefix": Constructor(prefix, "the first n keys", "prefix(5) | causal()"),
        "documents": Constructor(documents, "tokens of the same document", "documents([5, 3, 8])"),
        "neighborhood": Constructor(
            neighborhood, "neighbours on a 1-, 2- or 3-dimensional grid", "neighborhood((4, 4), 3)"
        ),
        "blocks": Constructor(blocks, "whole blocks by a mask over blocks", "blocks([[0], [0, 1], [2], [0, 3]], 4)"),
        "random_blocks": Constructor(random_blocks, "random key blocks for each query block", "random_blocks(2, 4, 0)"),
        "random_edges": Constructor(random_edges, "random keys for each query", "random_edges(4, 0)"),
        "longformer": Constructor(longformer, "a sliding window and global tokens", "longformer(4, 1)"),
        "bigbird": Constructor(bigbird, "window, global and random blocks", "bigbird(2, 3, 1, 1, 0)"),
        "from_dense": Constructor(
            from_dense, "the True entries of an array", "from_dense([[True, False], [True, True]])"
        ),
        "from_csr": Constructor(from_csr, "edges in CSR", "from_csr([0, 1, 3, 4], [0, 0, 1, 2], 3)"),
        "from_sparse": Constructor(from_sparse, "the non-zero entries of a SciPy or torch sparse array", ""),
        "from_graph": Constructor(from_graph, "the edges of a graph", "from_graph([[0, 1, 2, 3], [1, 2, 3, 0]])"),
        "from_mask_mod": Constructor(from_mask_mod, "a predicate fn(b, h, q_idx, kv_idx), traced", ""),
        "from_expression": Constructor(
            from_expression, "a predicate written as text", 'from_expression("kv_idx <= q_idx + h")'
        ),
        "from_block_mask": Constructor(from_block_mask, "a BlockMask of FlexAttention", ""),
        "per_head": Constructor(per_head, "one mask a query head", "per_head([causal(), window(2, 2)])"),
        "per_batch": Constructor(per_batch, "one mask a batch element", "per_batch([prefix(3), full()])"),
    }
)
