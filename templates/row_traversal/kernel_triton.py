"""row_traversal on GPUs: each query walks its own keys, so the work is exactly nnz dot products on the vector units.

A program takes one work item: a block of BLOCK_Q consecutive queries, or where that was split a stretch of the block's
edges, numbered from its first. Keys come from CSR, from ranges, or from offsets with nothing stored. Short rows go side
by side, KEYS keys each at a time; then each long row is walked by the whole program, so that one among short ones
leaves nothing idle.
"""

import triton
import triton.language as tl

from ..shared.gradient_triton import add_up, backward, prepare
from ..shared.kernel_triton import degrees, finish, load_rows, locate, merge, save, tokens_at, walk

__all__ = ["add_up", "backward", "forward", "merge", "prepare"]


@triton.jit
def one_of(vector, i, N: tl.constexpr):
    """Element `i` of an integer vector, as a vector of one."""
    return tl.sum(tl.where(tl.arange(0, N) == i, vector, 0), 0) + tl.zeros([1], vector.dtype)


@triton.jit(
    do_not_specialize=["n_items", "n_slots", "n_heads", "abreast", "q_len", "kv_len", "n_offsets", "first_query"]
)
def forward(
    q, k, v, out, lse, partial,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    lse_batch, lse_head,
    batches, heads, item_unit, item_slot, item_start, item_stop, row_indptr, row_first, row_last, row_step,
    row_edges, q_order, kv_order, score_tables,
    n_items, n_slots, n_heads, abreast, q_len, kv_len, n_offsets, first_query, scale,
    GROUP: tl.constexpr, MODIFY: tl.constexpr, NEGATE: tl.constexpr,
    BLOCK_Q: tl.constexpr, KEYS: tl.constexpr, FORM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """`out` and `lse` of the launch's rows; a split unit goes to `partial`, for `merge`.

    Index arrays: item_* [n_items], row_* as in `RowLists` (FORM "edges" has its columns in `row_first`, and in
    `row_edges` their numbers where a modifier asks). DIMS is (head_dim, head_width, v_dim, v_width), a width being the
    power of two that holds a dimension. MODIFY is the score modifier, a generated function, or None.
    """
    item, copy, batch, head = locate(tl.program_id(0), n_items, n_heads, abreast, batches, heads)
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
    k_base, v_base = k + batch * k_batch + kv_head * k_head, v + batch * v_batch + kv_head * v_head
    slot_rows = (copy * n_slots + slot) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    out_offsets = batch * out_batch + head * out_head + token * out_row
    lse_offsets = batch * lse_batch + head * lse_head + token

    abreast_keys: tl.constexpr = BLOCK_Q * KEYS
    is_long = (stop - start > abreast_keys) & (BLOCK_Q > 1)
    peak, total, acc = walk(
        queries, k_base, k_row, v_base, v_row, row, start, tl.where(is_long, start, stop), row_indptr, row_first,
        row_last, row_step, row_edges, n_offsets, kv_order, kv_len,
        (batch, head, first_query + token, None, score_tables), scale, FORM, BLOCK_Q, KEYS, MODIFY, NEGATE, DIMS,
    )  # fmt: skip
    if slot < 0:
        finish(out, lse, out_offsets, lse_offsets, inside & ~is_long, peak, total, acc, DIMS[2], DIMS[3])
    else:
        save(partial, slot_rows, inside & ~is_long, peak, total, acc, DIMS[2], DIMS[3])

    if BLOCK_Q > 1:
        for i in range(BLOCK_Q):
            low, high = one_of(start, i, BLOCK_Q), one_of(stop, i, BLOCK_Q)
            if tl.max(high - low, 0) > abreast_keys:
                is_here = low < high
                query = load_rows(q_base, one_of(token * q_row, i, BLOCK_Q), is_here, DIMS[0], DIMS[1])
                who = (batch, head, first_query + one_of(token, i, BLOCK_Q), None, score_tables)
                one_peak, one_total, one_acc = walk(
                    query.to(tl.float32), k_base, k_row, v_base, v_row, one_of(row, i, BLOCK_Q), low, high,
                    row_indptr, row_first, row_last, row_step, row_edges, n_offsets, kv_order, kv_len, who, scale,
                    FORM, 1, abreast_keys, MODIFY, NEGATE, DIMS,
                )  # fmt: skip
                if slot < 0:
                    to, lse_to = one_of(out_offsets, i, BLOCK_Q), one_of(lse_offsets, i, BLOCK_Q)
                    finish(out, lse, to, lse_to, is_here, one_peak, one_total, one_acc, DIMS[2], DIMS[3])
                else:
                    save(
                        partial, one_of(slot_rows, i, BLOCK_Q), is_here, one_peak, one_total, one_acc, DIMS[2], DIMS[3]
                    )
