"""The block graph of a group's mask, where it is cheap to have.

This file decides for which masks the block graph is made when a plan is told. It must not know what it says.
"""

from __future__ import annotations

from sparsec.analysis import BlockGraphProfile, block_graph
from sparsec.planner.plans import Group

# Above so many edges, a mask whose rows are not a few long progressions has tiles that take seconds to count.
_MAX_EDGES = 4_000_000
_KEYS_PER_RANGE = 8.0
# Tokens a block, doubled until there are so few blocks: of more, networkx takes longer than a reader waits.
_BLOCK, _MOST_BLOCKS = 64, 512


def graph_of(group: Group) -> BlockGraphProfile | None:
    """The block graph, or None where finding it would take longer than planning did."""
    profile = group.profile
    if profile.nnz > _MAX_EDGES and profile.keys_per_range < _KEYS_PER_RANGE:
        return None
    block = _BLOCK
    while max(profile.shape) > _MOST_BLOCKS * block:
        block *= 2
    return block_graph(group.bound, block)
