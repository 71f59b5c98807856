"""row_traversal on GPUs: each query walks its own keys, so the work is exactly nnz dot products on the vector units.

A program takes one work item: a block of BLOCK_Q consecutive queries, or where that was split a stretch of the block's
edges, numbered from its first. Keys come from CSR, from ranges, or from offsets with nothing stored. Rows go side by
side, KEYS keys each at a time; what a long row has beyond that is then walked by the whole program.
"""

import triton
import triton.language as tl

from ..shared.kernel_triton import degrees, finish, load_rows, locate, merge, save, tokens_at, walk_block

__all__ = ["forward", "merge"]


@triton.jit(do_not_specialize=["n_items", "n_slots", "n_heads", "abreast", "q_len", "kv_len", "n_offsets"])
def forward(
    q, k, v, out, lse, partial,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    lse_batch, lse_head,
    batches, heads, item_unit, item_slot, item_start, item_stop, row_indptr, row_first, row_last, row_step,
    q_order, kv_order,
    n_items, n_slots, n_heads, abreast, q_len, kv_len, n_offsets, scale,
    GROUP: tl.constexpr, NEGATE: tl.constexpr,
    BLOCK_Q: tl.constexpr, KEYS: tl.constexpr, FORM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """`out` and `lse` of the launch's rows; a split unit goes to `partial`, for `merge`.

    Index arrays: item_* [n_items], row_* as in `RowLists` (FORM "edges" has its columns in `row_first`). DIMS is
    (head_dim, head_width, v_dim, v_width), a width being the power of two that holds a dimension.
    """
    item, copy, batch, head = locate(n_items, n_heads, abreast, batches, heads)
    kv_head = head // GROUP
    row = (tl.load(item_unit + item) * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    inside = row < q_len
    token = tokens_at(q_order, row, inside)
    q_base = q + batch * q_batch + head * q_head
    queries = load_rows(q_base, token * q_row, inside, DIMS[0], DIMS[1]).to(tl.float32)

    degree = degrees(row, inside, row_indptr, row_first, row_last, row_step, n_offsets, kv_len, FORM)
    slot = tl.load(item_slot + item)
    start = degree * 0
    stop = degree
    if slot >= 0:
        before = tl.cumsum(degree, 0) - degree
        start = tl.minimum(tl.maximum(tl.load(item_start + item) - before, 0), degree)
        stop = tl.minimum(tl.maximum(tl.load(item_stop + item) - before, 0), degree)
    peak, total, acc = walk_block(
        queries, q_base, token * q_row, k + batch * k_batch + kv_head * k_head, k_row,
        v + batch * v_batch + kv_head * v_head, v_row, row, start, stop, row_indptr, row_first, row_last, row_step,
        n_offsets, kv_order, kv_len, scale, FORM, BLOCK_Q, KEYS, NEGATE, DIMS,
    )  # fmt: skip

    if slot < 0:
        out_offsets = batch * out_batch + head * out_head + token * out_row
        lse_offsets = batch * lse_batch + head * lse_head + token
        finish(out, lse, out_offsets, lse_offsets, inside, peak, total, acc, DIMS[2], DIMS[3])
    else:
        save(partial, (copy * n_slots + slot) * BLOCK_Q, peak, total, acc, BLOCK_Q, DIMS[2], DIMS[3])
