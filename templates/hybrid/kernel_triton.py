"""hybrid on GPUs: contiguous tiles, then gathered columns, then single edges of a block of queries, in one launch.

A program takes one work item: a stretch of each of the block's three lists. Tiles and gathered columns go to the matrix
units, a gathered column being a key row fetched by its index with one bit a query; single edges go to the vector units.
"""

import triton
import triton.language as tl

from ..shared.kernel_triton import (
    add_full_tiles,
    add_partial_tiles,
    attend,
    empty_state,
    finish,
    join,
    load_rows,
    locate,
    merge,
    save,
    tokens_at,
    walk_block,
)

__all__ = ["forward", "merge"]


@triton.jit
def add_columns(
    q, k_base, k_row, v_base, v_row, columns, lanes, n_columns, lane, kv_order, m, l, acc, scale,
    STEP_KV: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The state after gathered columns; bit `i` of a column's lanes says that query `i` of the block attends it."""
    for done in range(0, n_columns, STEP_KV):
        nth = done + tl.arange(0, STEP_KV)
        inside = nth < n_columns
        token = tokens_at(kv_order, tl.load(columns + nth, mask=inside, other=0), inside)
        k = load_rows(k_base, token * k_row, inside, DIMS[0], DIMS[1])
        v = load_rows(v_base, token * v_row, inside, DIMS[2], DIMS[3])
        bits = tl.load(lanes + nth, mask=inside, other=0)
        attended = ((bits[None, :] >> lane[:, None].to(tl.int64)) & 1) != 0
        m, l, acc = attend(q, k, v, attended, m, l, acc, scale)
    return m, l, acc


@triton.jit(do_not_specialize=["n_items", "n_slots", "n_heads", "abreast", "q_len", "kv_len"])
def forward(
    q, k, v, out, lse, partial,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    lse_batch, lse_head,
    batches, heads, item_unit, item_slot, item_tile, item_full, item_partial, item_column, item_column_stop,
    item_edge, item_edge_stop, tile_column, tile_pattern, patterns, gathered_columns, gathered_lanes,
    row_indptr, row_first,
    q_order, kv_order,
    n_items, n_slots, n_heads, abreast, q_len, kv_len, scale,
    GROUP: tl.constexpr, NEGATE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STEP_KV: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """`out` and `lse` of the launch's rows; a split unit goes to `partial`, for `merge`.

    Index arrays: as in `block_sparse`, `GatheredTiles` and `RowLists` (edges). DIMS is (head_dim, head_width, v_dim,
    v_width), a width being the power of two that holds a dimension.
    """
    item, copy, batch, head = locate(n_items, n_heads, abreast, batches, heads)
    kv_head = head // GROUP
    lane = tl.arange(0, BLOCK_Q)
    position = tl.load(item_unit + item) * BLOCK_Q + lane
    inside = position < q_len
    token = tokens_at(q_order, position, inside)
    q_base = q + batch * q_batch + head * q_head
    queries = load_rows(q_base, token * q_row, inside, DIMS[0], DIMS[1])
    if NEGATE:
        queries = -queries
    k_base = k + batch * k_batch + kv_head * k_head
    v_base = v + batch * v_batch + kv_head * v_head

    first_tile = tl.load(item_tile + item)
    n_full = tl.load(item_full + item)
    m, l, acc = empty_state(BLOCK_Q, DIMS[3])
    m, l, acc = add_full_tiles(
        queries, k_base, k_row, v_base, v_row, tile_column + first_tile, n_full, kv_order, m, l, acc, scale,
        BLOCK_KV, STEP_KV, DIMS,
    )  # fmt: skip
    first_partial = first_tile + n_full
    m, l, acc = add_partial_tiles(
        queries, k_base, k_row, v_base, v_row, tile_column + first_partial, tile_pattern + first_partial,
        tl.load(item_partial + item), patterns, lane, kv_order, kv_len, m, l, acc, scale,
        BLOCK_Q, BLOCK_KV, STEP_KV, DIMS,
    )  # fmt: skip
    column = tl.load(item_column + item)
    n_columns = (tl.load(item_column_stop + item) - column).to(tl.int32)
    m, l, acc = add_columns(
        queries, k_base, k_row, v_base, v_row, gathered_columns + column, gathered_lanes + column, n_columns, lane,
        kv_order, m, l, acc, scale, STEP_KV, DIMS,
    )  # fmt: skip

    edge, edge_stop = tl.load(item_edge + item), tl.load(item_edge_stop + item)
    if edge < edge_stop:
        first_edge = tl.load(row_indptr + position, mask=inside, other=0)
        degree = tl.load(row_indptr + position + 1, mask=inside, other=0) - first_edge
        start = tl.minimum(tl.maximum(edge - first_edge, 0), degree)
        stop = tl.minimum(tl.maximum(edge_stop - first_edge, 0), degree)
        # The same queries again, in the layout of the vector units and in fp32.
        singles = load_rows(q_base, token * q_row, inside, DIMS[0], DIMS[1]).to(tl.float32)
        if NEGATE:
            singles = -singles
        edge_m, edge_l, edge_acc = walk_block(
            singles, q_base, token * q_row, k_base, k_row, v_base, v_row, position.to(tl.int64), start, stop,
            row_indptr, row_first, None, None, 0, kv_order, kv_len, scale, "edges", BLOCK_Q, KEYS, NEGATE, DIMS,
        )  # fmt: skip
        m, l, acc = join(m, l, acc, edge_m, edge_l, edge_acc)

    slot = tl.load(item_slot + item)
    if slot < 0:
        out_offsets = batch * out_batch + head * out_head + token * out_row
        lse_offsets = batch * lse_batch + head * lse_head + token
        finish(out, lse, out_offsets, lse_offsets, inside, m, l, acc, DIMS[2], DIMS[3])
    else:
        save(partial, (copy * n_slots + slot) * BLOCK_Q, m, l, acc, BLOCK_Q, DIMS[2], DIMS[3])
