"""Orders of tokens that could bring edges together.

This file decides how each order is found and for which masks it is worth proposing; all are deterministic. It must not
decide which one is used: the planner estimates each and takes the permutation's own cost into account.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsec.analysis.profile import MaskProfile
from sparsec.layout.ordering import Ordering, inverse, residue_order
from sparsec.layout.rows import MIN_KEYS_PER_RANGE
from sparsec.masks.mask import BoundMask
from sparsec.masks.ranges import IntArray, run_starts

# A node with more neighbours than this many times the mean says nothing about which cluster its neighbours belong to.
_HUB_DEGREE = 32

# Rounds of label propagation before a graph is contracted, and contractions. On dependency and citation graphs the
# labels change little after these.
_ROUNDS = 4
_LEVELS = 6

# A row is placed by its most popular keys, as many as this.
_POPULAR_KEYS = 8

# Orders for graphs pay only where tiles are badly filled, and are found only where the edges are few enough to search.
_LOW_FILL = 0.25
_MAX_GRAPH_EDGES = 2_000_000

_LABEL_BITS = 31


def residue_ordering(bound: BoundMask, period: int) -> Ordering:
    """Tokens by residue class modulo `period`: what attends at multiples of it becomes contiguous."""
    q_order = residue_order(bound.q_len, period)
    kv_order = q_order if bound.q_len == bound.kv_len else residue_order(bound.kv_len, period)
    return Ordering(f"residue {period}", q_order, kv_order)


def rcm_ordering(bound: BoundMask) -> Ordering:
    """Reverse Cuthill–McKee on the symmetrised graph of a square mask: small bandwidth.

    Source: E. Cuthill and J. McKee, "Reducing the bandwidth of sparse symmetric matrices", ACM 1969, by SciPy.
    """
    assert bound.q_len == bound.kv_len, f"queries and keys of a {bound.shape} mask are not the same tokens"
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    order = reverse_cuthill_mckee(_symmetrised(bound), symmetric_mode=True).astype(np.int32)
    return Ordering("rcm", order, order)


def cluster_ordering(bound: BoundMask) -> Ordering:
    """Clusters of a square mask's graph together, and within a cluster rows that share keys together.

    Label propagation on the symmetrised graph without its hubs, contracted and repeated; clusters stand by their parent
    clusters, the rows of one by their most popular keys.

    Source: U. N. Raghavan, R. Albert and S. Kumara, "Near linear time algorithm to detect community structures in
    large-scale networks", Phys. Rev. E 76 (2007), with half of the nodes updated a round so that labels settle.
    """
    assert bound.q_len == bound.kv_len, f"queries and keys of a {bound.shape} mask are not the same tokens"
    graph = _symmetrised(bound)
    degree = np.diff(graph.indptr)
    node = np.repeat(np.arange(bound.q_len, dtype=np.int64), degree)
    other = graph.indices.astype(np.int64)
    is_hub = degree > _HUB_DEGREE * max(degree.mean(), 1.0)
    votes = ~is_hub[node] & ~is_hub[other] & (node != other)
    levels = _cluster_levels(node[votes], other[votes], bound.q_len)
    order = np.lexsort((*reversed(_popular_keys(bound)), *levels)).astype(np.int32)
    return Ordering("cluster", order, order)


def popularity_ordering(bound: BoundMask) -> Ordering:
    """Rows by their most popular keys, so that neighbours share them; keys stay where they are unless the mask is
    square.

    For masks with hub columns this is most of what clustering finds, in a fraction of its time.
    """
    order = np.lexsort(tuple(reversed(_popular_keys(bound)))).astype(np.int32)
    return Ordering("popularity", order, order if bound.q_len == bound.kv_len else None)


def candidate_orderings(bound: BoundMask, profile: MaskProfile) -> list[Ordering]:
    """The orders that could pay for a mask of this profile; often none.

    - Residue classes for a translation-invariant mask of period > 1, and for a mask most of whose edges progress by one
      step (a dilated window beside something else).
    - Clusters, popular keys and, for a square mask, reverse Cuthill–McKee, where edges are scattered and even small
      tiles are badly filled.
    """
    proposals = []
    period = profile.period if profile.period > 1 else profile.common_step
    if 1 < period <= min(profile.shape) // 2:
        proposals.append(residue_ordering(bound, period))
    is_graph = profile.keys_per_range < MIN_KEYS_PER_RANGE and not profile.is_toeplitz
    if is_graph and 0 < profile.nnz <= _MAX_GRAPH_EDGES and profile.fill(64).fill < _LOW_FILL:
        if bound.q_len == bound.kv_len:
            proposals += [cluster_ordering(bound), rcm_ordering(bound)]
        proposals.append(popularity_ordering(bound))
    return proposals


def _symmetrised(bound: BoundMask):  # type: ignore[no-untyped-def]  # SciPy carries no types.
    from scipy import sparse

    edges = bound.to_csr()
    # One byte an edge, and both directions of a pair stay one nonzero.
    graph = sparse.csr_array((np.ones(len(edges.indices), np.int8), edges.indices, edges.indptr), shape=edges.shape)
    return (graph + graph.T).tocsr()


def _popular_keys(bound: BoundMask) -> npt.NDArray[np.int64]:
    """`[_POPULAR_KEYS, q_len]`: the ranks of each row's most popular keys, ascending; `kv_len` where it has no more.

    A row's own token does not count: no other row would look for it.
    """
    edges = bound.to_csr()
    row = np.repeat(np.arange(bound.q_len, dtype=np.int64), np.diff(edges.indptr))
    popularity = np.bincount(edges.indices, minlength=bound.kv_len)
    rank = inverse(np.argsort(-popularity, kind="stable").astype(np.int64))
    is_other = edges.indices != row
    keys = row[is_other] * bound.kv_len + rank[edges.indices[is_other]]
    keys.sort()
    row, rank_of_key = np.divmod(keys, bound.kv_len)
    first = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=bound.q_len))))
    place = np.arange(len(row)) - first[row]
    popular = np.full((_POPULAR_KEYS, bound.q_len), bound.kv_len, np.int64)
    shown = place < _POPULAR_KEYS
    popular[place[shown], row[shown]] = rank_of_key[shown]
    return popular


def _cluster_levels(node: IntArray, other: IntArray, n_tokens: int) -> list[IntArray]:
    """Each token's cluster at successive contractions, the finest first."""
    levels: list[IntArray] = []
    cluster = np.arange(n_tokens, dtype=np.int64)
    weight = np.ones(len(node), np.int64)
    n_nodes = n_tokens
    for _ in range(_LEVELS):
        if not len(node):
            break
        names, label = np.unique(_propagated(node, other, weight, n_nodes), return_inverse=True)
        cluster = label[cluster]
        levels.append(cluster)
        node, other = label[node], label[other]
        is_between = node != other
        key = node[is_between] * len(names) + other[is_between]
        order = np.argsort(key)
        key = key[order]
        first = run_starts(key)
        weight = np.add.reduceat(weight[is_between][order], first) if len(first) else weight[:0]
        node, other = np.divmod(key[first], len(names))
        n_nodes = len(names)
    return levels


def _propagated(node: IntArray, other: IntArray, weight: IntArray, n_nodes: int) -> IntArray:
    """A label for each node, after a few rounds of taking the label that weighs most among its neighbours."""
    label = np.arange(n_nodes, dtype=np.int64)
    # A fixed scattering of the nodes into two halves that take turns (Knuth's multiplicative hash).
    half = (label * 2_654_435_761 >> 9) & 1
    for turn in range(_ROUNDS):
        is_voted = half[node] == turn & 1
        key = node[is_voted] * n_nodes + label[other[is_voted]]
        if not len(key):
            continue
        order = np.argsort(key)
        key = key[order]
        first = run_starts(key)
        votes = np.add.reduceat(weight[is_voted][order], first)
        voter, choice = np.divmod(key[first], n_nodes)
        # The heaviest label of each node, the smallest among equals.
        ballot = (votes << _LABEL_BITS) | (n_nodes - 1 - choice)
        first_of_voter = run_starts(voter)
        best = np.maximum.reduceat(ballot, first_of_voter)
        label[voter[first_of_voter]] = n_nodes - 1 - (best & ((1 << _LABEL_BITS) - 1))
    return label
