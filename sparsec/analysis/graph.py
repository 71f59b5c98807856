"""What a mask looks like as a graph of blocks, through networkx.

This file decides how coarse the blocks are, so that the graph stays small whatever the mask, and which facts of it are
told. It is the only one that knows networkx, and imports it when asked. The token graph is never built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsec.masks.mask import BoundMask
from sparsec.masks.ranges import IntArray

MAX_NODES = 2_000
MAX_EDGES = 50_000

# Nodes whose clustering is averaged: its cost grows with the square of their degrees.
_CLUSTERING_NODES = 64

# An edge is near the diagonal when it spans at most this share of the nodes.
_NEAR_SHARE = 1 / 16


@dataclass(frozen=True, slots=True)
class BlockGraphProfile:
    """The graph whose nodes are blocks of `block` tokens, joined where any of their tokens attend each other.

    A square mask has one node a block and undirected edges; any other has one node a block of queries and one a block
    of keys.

    Attributes:
        block: Tokens a node; the size asked for, doubled until nodes ≤ `MAX_NODES` and edges ≤ `MAX_EDGES`.
        n_nodes: Blocks.
        n_edges: Edges, self-loops not counted.
        n_components: Connected components.
        largest_component: The share of the nodes in the largest.
        degree_mean: Neighbours a node.
        degree_max: The most neighbours.
        degree_histogram: `degree_histogram[i]` nodes have `2**i - 1 ≤ degree < 2**(i + 1) - 1`.
        density: Edges over possible edges.
        locality: The mean of `|i - j|` over the edges, over the number of nodes a side; ⅓ for a random graph.
        near_share: The share of the edges with `|i - j|` at most a sixteenth of the nodes a side.
        clustering: The mean clustering coefficient, over at most 64 evenly spread nodes; 0 where queries and keys are
            apart.
    """

    block: int
    n_nodes: int
    n_edges: int
    n_components: int
    largest_component: float
    degree_mean: float
    degree_max: int
    degree_histogram: tuple[int, ...]
    density: float
    locality: float
    near_share: float
    clustering: float


def block_graph(bound: BoundMask, block: int = 64) -> BlockGraphProfile:
    """The block graph of `bound`, with blocks of at least `block` tokens (a power of two ≥ 8)."""
    import networkx as nx

    block, row, column = _block_edges(bound, block)
    n_rows, n_columns = -(-bound.q_len // block), -(-bound.kv_len // block)
    is_square = bound.q_len == bound.kv_len
    graph: Any = nx.Graph()
    if is_square:
        row, column = np.minimum(row, column), np.maximum(row, column)
        graph.add_nodes_from(range(n_rows))
        graph.add_edges_from(zip(row.tolist(), column.tolist(), strict=True))
        graph.remove_edges_from(list(nx.selfloop_edges(graph)))
        possible = n_rows * (n_rows - 1) / 2
    else:
        graph.add_nodes_from(range(n_rows + n_columns))
        graph.add_edges_from(zip(row.tolist(), (column + n_rows).tolist(), strict=True))
        possible = n_rows * n_columns
    pairs = np.array(graph.edges, dtype=np.int64).reshape(-1, 2)
    if is_square:
        distance = np.abs(pairs[:, 0] - pairs[:, 1]) / n_rows
    else:
        pairs = np.sort(pairs, axis=1)
        distance = np.abs(pairs[:, 0] / n_rows - (pairs[:, 1] - n_rows) / n_columns)
    sizes = [len(component) for component in nx.connected_components(graph)]
    degrees = np.array([degree for _, degree in graph.degree()], dtype=np.int64)
    n_nodes, n_edges = graph.number_of_nodes(), graph.number_of_edges()
    spread = np.unique(np.linspace(0, n_nodes - 1, min(n_nodes, _CLUSTERING_NODES)).astype(np.int64)).tolist()
    return BlockGraphProfile(
        block=block,
        n_nodes=n_nodes,
        n_edges=n_edges,
        n_components=len(sizes),
        largest_component=max(sizes) / n_nodes,
        degree_mean=float(degrees.mean()),
        degree_max=int(degrees.max()),
        degree_histogram=tuple(np.bincount(np.log2(degrees + 1).astype(np.int64)).tolist()),
        density=n_edges / possible if possible else 0.0,
        locality=float(distance.mean()) if n_edges else 0.0,
        near_share=float((distance <= _NEAR_SHARE).mean()) if n_edges else 0.0,
        clustering=float(nx.average_clustering(graph, nodes=spread)) if is_square else 0.0,
    )


def _block_edges(bound: BoundMask, block: int) -> tuple[int, IntArray, IntArray]:
    """`(block, row, column)` of the non-empty tiles, at the first doubling of `block` at which they are few enough."""
    sides = 1 if bound.q_len == bound.kv_len else 2
    while -(-bound.q_len // block) + (sides - 1) * -(-bound.kv_len // block) > MAX_NODES:
        block *= 2
    # Not worth asking for tiles that are certain to be too many.
    while bound.nnz > MAX_EDGES * block * block:
        block *= 2
    while True:
        tiles = bound.tiles(block, block)
        if tiles.n_tiles <= MAX_EDGES:
            row = np.repeat(np.arange(len(tiles.indptr) - 1), np.diff(tiles.indptr))
            return block, row, tiles.indices.astype(np.int64)
        block *= 2
