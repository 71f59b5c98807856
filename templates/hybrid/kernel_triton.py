"""hybrid on GPUs: single edges, contiguous tiles and gathered columns of a block of queries, in one launch.

A program takes one work item: a stretch of each of the block's three lists. Tiles and gathered columns go to the matrix
units, a gathered column being a key row fetched by its index with one bit a query; single edges go to the vector units.
"""

import triton
import triton.language as tl

from ..shared.gradient_triton import add_up, backward, prepare
from ..shared.kernel_triton import (
    LOG2_E,
    add_full_tiles,
    add_partial_tiles,
    attend,
    describe,
    empty_state,
    finish,
    load_queries,
    load_rows,
    locate,
    merge,
    modified,
    program_at,
    rank_among,
    save,
    score,
    tokens_at,
    turns,
    walk,
)

__all__ = ["add_up", "backward", "forward", "merge", "prepare"]


@triton.jit
def add_columns(
    q, q_base, q_offsets, inside, k_base, k_row, v_base, v_row, columns, lanes, n_columns, edge_indptr,
    edges, lane, kv_order, who, peak, total, acc, scale,
    MODIFY: tl.constexpr, NEGATE: tl.constexpr, STEP_KV: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The state after gathered columns; bit `i` of a column's lanes says that query `i` of the block attends it.

    edge_indptr, edges: the numbers of each column's edges, or None.
    """
    for done in range(0, n_columns, STEP_KV):
        nth = done + tl.arange(0, STEP_KV)
        live = nth < n_columns
        token = tokens_at(kv_order, tl.load(columns + nth, mask=live, other=0), live)
        scores = score(q, q_base, q_offsets, inside, k_base, token * k_row, live, NEGATE, STEP_KV, DIMS, CHUNK)
        v = load_rows(v_base, token * v_row, live, DIMS[2], DIMS[3])
        bits = tl.load(lanes + nth, mask=live, other=0)
        attended = ((bits[None, :] >> lane[:, None].to(tl.int64)) & 1) != 0
        if MODIFY is None:
            peak, total, acc = attend(scores, v, attended, peak, total, acc, scale, False)
        else:
            edge = None
            if edges is not None:
                first_edge = tl.load(edge_indptr + nth, mask=live, other=0)
                edge = tl.load(edges + first_edge[None, :] + rank_among(attended, 0), mask=attended, other=0)
            scores = modified(scores, scale, who, who[2], token[None, :], edge, MODIFY)
            peak, total, acc = attend(scores, v, attended, peak, total, acc, LOG2_E, True)
    return peak, total, acc


@triton.jit(
    do_not_specialize=["n_items", "n_slots", "n_batches", "n_heads", "abreast", "q_len", "kv_len", "first_query"]
)
def forward(
    q, k, v, out, lse, partial,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    lse_batch, lse_head,
    batches, heads, item_unit, item_slot, item_tile, item_full, item_partial, item_column, item_column_stop,
    item_edge, item_edge_stop, tile_column, tile_pattern, patterns, gathered_columns, gathered_lanes,
    row_indptr, row_first, tile_edges, gathered_edge_indptr, gathered_edges, row_edges,
    q_order, kv_order, score_tables, mask_tables,
    n_items, n_slots, n_batches, n_heads, abreast, q_len, kv_len, first_query, scale,
    GROUP: tl.constexpr, MODIFY: tl.constexpr, ATTENDS: tl.constexpr, NEGATE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STEP_KV: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr,
    CHUNK: tl.constexpr, DESCRIBED: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """`out` and `lse` of the launch's rows; a split unit goes to `partial`, for `merge`.

    Index arrays: as in `block_sparse`, `GatheredTiles` and `RowLists` (edges). DIMS is (head_dim, head_width, v_dim,
    v_width), a width being the power of two that holds a dimension; CHUNK is head_width, or what goes at a time where
    there are no matrix units. MODIFY and ATTENDS are generated functions or None, as in `block_sparse`. DESCRIBED lets
    the copy engine fetch contiguous tiles.
    """
    for turn in tl.range(turns(n_items * n_batches * n_heads, PERSISTENT), disable_licm=True):
        item, copy, batch, head = locate(program_at(turn, PERSISTENT), n_items, n_heads, abreast, batches, heads)
        kv_head = head // GROUP
        lane = tl.arange(0, BLOCK_Q)
        position = tl.load(item_unit + item) * BLOCK_Q + lane
        inside = position < q_len
        token = tokens_at(q_order, position, inside)
        q_base = q + batch * q_batch + head * q_head
        q_offsets = token * q_row
        k_base = k + batch * k_batch + kv_head * k_head
        v_base = v + batch * v_batch + kv_head * v_head

        query = first_query + token
        who = (batch, head, query[:, None], position[:, None], score_tables, mask_tables)

        # Single edges come first: their state then needs no place beside that of the tiles.
        peak, total, acc = empty_state(BLOCK_Q, DIMS[3])
        edge, edge_stop = tl.load(item_edge + item), tl.load(item_edge_stop + item)
        if edge < edge_stop:
            first_edge = tl.load(row_indptr + position, mask=inside, other=0)
            degree = tl.load(row_indptr + position + 1, mask=inside, other=0) - first_edge
            start = tl.minimum(tl.maximum(edge - first_edge, 0), degree)
            stop = tl.minimum(tl.maximum(edge_stop - first_edge, 0), degree)
            singles = load_rows(q_base, q_offsets, inside, DIMS[0], DIMS[1]).to(tl.float32)
            peak, total, acc = walk(
                singles, k_base, k_row, v_base, v_row, position.to(tl.int64), start, stop, row_indptr, row_first, None,
                None, row_edges, 0, kv_order, kv_len, (batch, head, query, None, score_tables), scale, "edges",
                BLOCK_Q, KEYS, MODIFY, NEGATE, DIMS,
            )  # fmt: skip

        keys, values = None, None
        if DESCRIBED:
            keys = describe(k_base, kv_len, k_row, STEP_KV, DIMS[0], DIMS[1])
            values = describe(v_base, kv_len, v_row, STEP_KV, DIMS[2], DIMS[3])
        queries = load_queries(q_base, q_offsets, inside, DIMS, CHUNK)
        first_tile = tl.load(item_tile + item)
        n_full = tl.load(item_full + item)
        first_partial = first_tile + n_full
        full_edges = None if tile_edges is None else tile_edges + first_tile * BLOCK_Q
        partial_edges = None if tile_edges is None else tile_edges + first_partial * BLOCK_Q
        peak, total, acc = add_full_tiles(
            queries, q_base, q_offsets, inside, k_base, k_row, v_base, v_row, keys, values, tile_column + first_tile,
            n_full, full_edges, lane, kv_order, who, peak, total, acc, scale, MODIFY, NEGATE, BLOCK_Q, BLOCK_KV,
            STEP_KV, DIMS, CHUNK,
        )  # fmt: skip
        peak, total, acc = add_partial_tiles(
            queries, q_base, q_offsets, inside, k_base, k_row, v_base, v_row, keys, values, tile_column + first_partial,
            tile_pattern + first_partial, tl.load(item_partial + item), patterns, partial_edges, lane, kv_order,
            kv_len, who, peak, total, acc, scale, ATTENDS, MODIFY, NEGATE, BLOCK_Q, BLOCK_KV, STEP_KV, DIMS, CHUNK,
        )  # fmt: skip
        column = tl.load(item_column + item)
        n_columns = (tl.load(item_column_stop + item) - column).to(tl.int32)
        column_edges = None if gathered_edges is None else gathered_edge_indptr + column
        peak, total, acc = add_columns(
            queries, q_base, q_offsets, inside, k_base, k_row, v_base, v_row, gathered_columns + column,
            gathered_lanes + column, n_columns, column_edges, gathered_edges, lane, kv_order, who, peak, total,
            acc, scale, MODIFY, NEGATE, STEP_KV, DIMS, CHUNK,
        )  # fmt: skip

        slot = tl.load(item_slot + item)
        if slot < 0:
            out_offsets = batch * out_batch + head * out_head + token * out_row
            lse_offsets = batch * lse_batch + head * lse_head + token
            finish(out, lse, out_offsets, lse_offsets, inside, peak, total, acc, DIMS[2], DIMS[3])
        else:
            save(partial, (copy * n_slots + slot) * BLOCK_Q + lane, inside, peak, total, acc, DIMS[2], DIMS[3])
