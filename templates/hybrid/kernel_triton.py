"""hybrid on GPUs: single edges, contiguous tiles and gathered columns of a block of queries, in one launch.

A program takes one work item: a stretch of each of the block's three lists. Tiles and gathered columns go to the matrix
units, a gathered column being a key row fetched by its index with one bit a query; single edges go to the vector units.
With PACK > 1 the rows of the query tile are PACK heads of one group for each query: they share every key row fetched.
A block of one query needs no bits: its columns are exactly its keys, and every whole step of them goes unmasked.
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
    load_live,
    load_queries,
    load_rows,
    locate,
    look_up,
    merge,
    modified,
    program_at,
    rank_among,
    rows_of,
    save,
    score,
    tokens_at,
    turns,
    walk,
)

__all__ = ["add_up", "backward", "forward", "merge", "prepare"]


@triton.jit
def add_columns(
    q, q_base, q_offsets, inside, k_base, k_row, v_base, v_row, columns, lanes, begin, end, edge_indptr, edges, lane,
    kv_order, who, peak, total, acc, scale,
    IS_WHOLE: tl.constexpr, STAGES: tl.constexpr, PACK: tl.constexpr, MODIFY: tl.constexpr, NEGATE: tl.constexpr,
    STEP_KV: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The state after gathered columns `begin … end - 1`.

    lanes: bit `i` of a column's says that query `i` of the block attends it; None where the block is one query, which
    attends them all. lane: which query of the block each row is. edge_indptr, edges: the numbers of each column's
    edges, or None. IS_WHOLE: every row attends every column, and they fill whole steps: nothing is masked.
    """
    nth = begin + tl.arange(0, STEP_KV)
    column = look_up(columns, nth, nth < end)
    for done in tl.range(begin, end, STEP_KV, num_stages=STAGES):
        nth = done + tl.arange(0, STEP_KV)
        live = None if IS_WHOLE else nth < end
        token = tokens_at(kv_order, column, live)
        column = look_up(columns, nth + STEP_KV, nth + STEP_KV < end)
        scores = score(q, q_base, q_offsets, inside, k_base, token * k_row, live, NEGATE, STEP_KV, DIMS, CHUNK)
        v = load_rows(v_base, token * v_row, live, DIMS[2], DIMS[3])
        attended = None if IS_WHOLE else live[None, :]
        if lanes is not None:
            attended = ((load_live(lanes + nth, live)[None, :] >> lane[:, None].to(tl.int64)) & 1) != 0
        if MODIFY is None:
            peak, total, acc = attend(scores, v, attended, peak, total, acc, scale, False)
        else:
            edge = None
            if edges is not None:
                # A column's edges follow each other by query; the heads of a query share their number.
                at = load_live(edge_indptr + nth, live)[None, :] + lane[:, None] * 0
                if lanes is not None:
                    at += rank_among(attended, 0) // PACK
                edge = load_live(edges + at, attended)
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
    GROUP: tl.constexpr, PACK: tl.constexpr, MODIFY: tl.constexpr, ATTENDS: tl.constexpr, NEGATE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STEP_KV: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr,
    CHUNK: tl.constexpr, DESCRIBED: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """`out` and `lse` of the launch's rows; a split unit goes to `partial`, for `merge`.

    Index arrays: as in `block_sparse`, `GatheredTiles` and `RowLists` (edges). gathered_lanes is None where a block is
    one query, row_first where a configuration leaves no single edges. DIMS is (head_dim, head_width, v_dim, v_width), a
    width being the power of two that holds a dimension; CHUNK is head_width, or what goes at a time where there are no
    matrix units. MODIFY and ATTENDS are generated functions or None, as in `block_sparse`. DESCRIBED lets the copy
    engine fetch contiguous tiles.
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
        k_base = k + batch * k_batch + kv_head * k_head
        v_base = v + batch * v_batch + kv_head * v_head

        query = first_query + token
        # Single edges come first: their state then needs no place beside that of the tiles.
        peak, total, acc = empty_state(ROWS, DIMS[3])
        if row_first is not None:
            edge, edge_stop = tl.load(item_edge + item), tl.load(item_edge_stop + item)
            if edge < edge_stop:
                first_edge = tl.load(row_indptr + position, mask=inside, other=0)
                degree = tl.load(row_indptr + position + 1, mask=inside, other=0) - first_edge
                start = tl.minimum(tl.maximum(edge - first_edge, 0), degree)
                stop = tl.minimum(tl.maximum(edge_stop - first_edge, 0), degree)
                singles = load_rows(q, q_offsets, inside, DIMS[0], DIMS[1]).to(tl.float32)
                # A modifier of several heads at once is told each row's.
                walked = first_head if PACK == 1 else head[None, :]
                peak, total, acc = walk(
                    singles, k_base, k_row, v_base, v_row, position.to(tl.int64), start, stop, row_indptr, row_first,
                    None, None, row_edges, 0, kv_order, kv_len,
                    (batch, walked, query, None, score_tables), scale, "edges", ROWS, KEYS, MODIFY, NEGATE, DIMS,
                )  # fmt: skip

        row_head = first_head if PACK == 1 else head[:, None]
        who = (batch, row_head, query[:, None], position[:, None], score_tables, mask_tables)

        keys, values = None, None
        if DESCRIBED:
            keys = describe(k_base, kv_len, k_row, STEP_KV, DIMS[0], DIMS[1])
            values = describe(v_base, kv_len, v_row, STEP_KV, DIMS[2], DIMS[3])
        queries = load_queries(q, q_offsets, inside, DIMS, CHUNK)
        first_tile = tl.load(item_tile + item)
        n_full = tl.load(item_full + item)
        first_partial = first_tile + n_full
        full_edges = None if tile_edges is None else tile_edges + first_tile * BLOCK_Q
        partial_edges = None if tile_edges is None else tile_edges + first_partial * BLOCK_Q
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
        column = tl.load(item_column + item)
        n_columns = (tl.load(item_column_stop + item) - column).to(tl.int32)
        columns = gathered_columns + column
        lanes = None if gathered_lanes is None else gathered_lanes + column
        column_edges = None if gathered_edges is None else gathered_edge_indptr + column
        n_whole = 0
        if lanes is None:
            n_whole = n_columns // STEP_KV * STEP_KV
            peak, total, acc = add_columns(
                queries, q, q_offsets, inside, k_base, k_row, v_base, v_row, columns, lanes, 0, n_whole, column_edges,
                gathered_edges, lane, kv_order, who, peak, total, acc, scale, True, None, PACK, MODIFY, NEGATE, STEP_KV,
                DIMS, CHUNK,
            )  # fmt: skip
        # Of one query's keys, a single step is left at most: there is nothing to overlap.
        peak, total, acc = add_columns(
            queries, q, q_offsets, inside, k_base, k_row, v_base, v_row, columns, lanes, n_whole, n_columns,
            column_edges, gathered_edges, lane, kv_order, who, peak, total, acc, scale, False,
            1 if lanes is None else None, PACK, MODIFY, NEGATE, STEP_KV, DIMS, CHUNK,
        )  # fmt: skip

        slot = tl.load(item_slot + item)
        if slot < 0:
            out_offsets = batch * out_batch + head * out_head + token * out_row
            lse_offsets = batch * lse_batch + head * lse_head + token
            finish(out, lse, out_offsets, lse_offsets, inside, peak, total, acc, DIMS[2], DIMS[3])
        else:
            save(partial, (copy * n_slots + slot) * PACKED + row, inside, peak, total, acc, DIMS[2], DIMS[3])
