"""block_sparse on GPUs: contiguous tiles on matrix units, full ones unmasked, partial ones by their bit pattern.

A program takes one work item: a block of queries and a stretch of its tiles, which the back end has put in the order
full, then partial, so that the loop over full tiles carries no mask at all. A tile is taken STEP_KV keys at a time.
With PACK > 1 the rows of the query tile are PACK heads of one group for each query: they share keys and pattern.
"""

import triton
import triton.language as tl

from ..shared.gradient_triton import add_up, backward, prepare
from ..shared.kernel_triton import (
    add_full_tiles,
    add_partial_tiles,
    describe,
    empty_state,
    finish,
    load_queries,
    locate,
    merge,
    program_at,
    rows_of,
    save,
    tokens_at,
    turns,
)

__all__ = ["add_up", "backward", "forward", "merge", "prepare"]


@triton.jit(
    do_not_specialize=["n_items", "n_slots", "n_batches", "n_heads", "abreast", "q_len", "kv_len", "first_query"]
)
def forward(
    q, k, v, out, lse, partial,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    lse_batch, lse_head,
    batches, heads, item_unit, item_slot, item_tile, item_full, item_partial, tile_column, tile_pattern, patterns,
    tile_edges, q_order, kv_order, score_tables, mask_tables,
    n_items, n_slots, n_batches, n_heads, abreast, q_len, kv_len, first_query, scale,
    GROUP: tl.constexpr, PACK: tl.constexpr, MODIFY: tl.constexpr, ATTENDS: tl.constexpr, NEGATE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STEP_KV: tl.constexpr, DIMS: tl.constexpr,
    CHUNK: tl.constexpr, DESCRIBED: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """`out` and `lse` of the launch's rows; a split unit goes to `partial`, for `merge`.

    Strides count elements. Index arrays: item_* [n_items] (first tile, number of full and of partial tiles after it),
    tile_column, tile_pattern and (or None) tile_edges [n, BLOCK_Q] by tile, patterns [n, BLOCK_Q, words] as int64
    words. DIMS is (head_dim, head_width, v_dim, v_width), a width being the power of two that holds a dimension; CHUNK
    is head_width, or what goes at a time where there are no matrix units. MODIFY and ATTENDS are generated functions or
    None: the score modifier, whose `scale` is the scores' own, and the mask's predicate. DESCRIBED lets the copy engine
    fetch K and V; their rows must be aligned to 16 bytes, and `kv_order` None.
    """
    PACKED: tl.constexpr = BLOCK_Q * PACK
    # Matrix units take 16 rows: what is missing is filled up with rows that nobody reads.
    ROWS: tl.constexpr = PACKED if PACKED > 16 else 16
    for turn in tl.range(turns(n_items * n_batches * n_heads, PERSISTENT), disable_licm=True):
        item, copy, batch, first_head = locate(program_at(turn, PERSISTENT), n_items, n_heads, abreast, batches, heads)
        kv_head = first_head // GROUP
        unit = tl.load(item_unit + item)
        row, lane, position, inside, head = rows_of(unit, first_head, q_len, BLOCK_Q, PACK, ROWS)
        token = tokens_at(q_order, position, inside)
        q_offsets = batch * q_batch + head * q_head + token * q_row
        queries = load_queries(q, q_offsets, inside, DIMS, CHUNK)
        k_base = k + batch * k_batch + kv_head * k_head
        v_base = v + batch * v_batch + kv_head * v_head

        keys, values = None, None
        if DESCRIBED:
            keys = describe(k_base, kv_len, k_row, STEP_KV, DIMS[0], DIMS[1])
            values = describe(v_base, kv_len, v_row, STEP_KV, DIMS[2], DIMS[3])
        # A modifier of several heads at once is told each row's.
        row_head = first_head if PACK == 1 else head[:, None]
        who = (batch, row_head, (first_query + token)[:, None], position[:, None], score_tables, mask_tables)

        first_tile = tl.load(item_tile + item)
        n_full = tl.load(item_full + item)
        first_partial = first_tile + n_full
        full_edges = None if tile_edges is None else tile_edges + first_tile * BLOCK_Q
        partial_edges = None if tile_edges is None else tile_edges + first_partial * BLOCK_Q
        peak, total, acc = empty_state(ROWS, DIMS[3])
        peak, total, acc = add_full_tiles(
            queries, q, q_offsets, inside, k_base, k_row, v_base, v_row, keys, values, tile_column + first_tile, n_full,
            full_edges, lane, kv_order, who, peak, total, acc, scale, MODIFY, NEGATE, BLOCK_Q, BLOCK_KV, STEP_KV, DIMS,
            CHUNK,
        )  # fmt: skip
        peak, total, acc = add_partial_tiles(
            queries, q, q_offsets, inside, k_base, k_row, v_base, v_row, keys, values, tile_column + first_partial,
            tile_pattern + first_partial, tl.load(item_partial + item), patterns, partial_edges, lane, kv_order,
            kv_len, who, peak, total, acc, scale, ATTENDS, MODIFY, NEGATE, BLOCK_Q, BLOCK_KV, STEP_KV, DIMS, CHUNK,
        )  # fmt: skip

        slot = tl.load(item_slot + item)
        if slot < 0:
            out_offsets = batch * out_batch + head * out_head + token * out_row
            lse_offsets = batch * lse_batch + head * lse_head + token
            finish(out, lse, out_offsets, lse_offsets, inside, peak, total, acc, DIMS[2], DIMS[3])
        else:
            save(partial, (copy * n_slots + slot) * PACKED + row, inside, peak, total, acc, DIMS[2], DIMS[3])
