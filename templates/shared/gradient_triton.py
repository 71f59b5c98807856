"""Device code of the backward pass, which all Triton templates share.

With P the probabilities, dP = dO·Vᵀ and dS = P ∘ (dP - delta), where delta = rowsum(dO ∘ O) - dLSE,

    dQ = scale · dS·K      dK = scale · dSᵀ·Q      dV = Pᵀ·dO

A score modifier's derivative is a factor of dS; its derivative by an entry of a table, of what that entry is given.

One kernel makes either side. Its programs own a block of *rows* and run through the other side, the *stream*: queries
own rows for dQ and stream keys; keys own rows for dK and dV and stream queries, over the transposed lists. So each
result row has one owner, and the order of sums is fixed, without atomics; those for a modifier's tables are of
integers, which may come in any order. This file must not know how the lists were made.

PACK query heads of one key head go together, a query's heads side by side: as rows of the tile that owns dQ, which then
fetches keys and values once for all of them; as columns of a step of the stream, whose sums into dK and dV are then
those of the matrix product. `member` says which of the PACK heads a row or column is of; None where there is one.

Source: Dao et al., "FlashAttention", NeurIPS 2022, algorithm 4 and appendix B.
"""

import triton
import triton.language as tl

from .kernel_triton import (
    LOG2_E,
    NEG_INF,
    degrees,
    describe,
    load_rows,
    locate,
    modified,
    n_progressions,
    program_at,
    progression,
    rank_among,
    score,
    score_rows,
    tokens_at,
    turns,
)

# Sums of tables' gradients: `backends/table_gradients.py`.
DIGIT_BITS = tl.constexpr(28)
DIGIT_MASK = tl.constexpr((1 << 28) - 1)
WORDS = tl.constexpr(11)


@triton.jit(do_not_specialize=["n_heads", "q_len"])
def prepare(
    out, d_out, d_lse, delta,
    out_batch, out_head, out_row, d_out_batch, d_out_head, d_out_row, d_lse_batch, d_lse_head, delta_batch, delta_head,
    batches, heads, n_heads, q_len,
    ROWS: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr,
):  # fmt: skip
    """`delta [batch, q_heads, q_len]`, fp32, for all queries of the launch's heads; `d_lse` may be None."""
    blocks = (q_len + ROWS - 1) // ROWS
    program = tl.program_id(0)
    copy = program // blocks
    batch = tl.load(batches + copy // n_heads).to(tl.int64)
    head = tl.load(heads + copy % n_heads).to(tl.int64)
    row = (program % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < q_len
    o = load_rows(out, batch * out_batch + head * out_head + row * out_row, inside, V_DIM, V_WIDTH)
    do = load_rows(d_out, batch * d_out_batch + head * d_out_head + row * d_out_row, inside, V_DIM, V_WIDTH)
    found = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if d_lse is not None:
        found -= tl.load(d_lse + batch * d_lse_batch + head * d_lse_head + row, mask=inside, other=0.0)
    tl.store(delta + batch * delta_batch + head * delta_head + row, found, mask=inside)


@triton.jit
def members(rows, PACK: tl.constexpr):
    """Which of PACK heads side by side each row is of, 64-bit."""
    member = None
    if PACK > 1:
        member = (rows % PACK).to(tl.int64)
    return member


@triton.jit
def offsets_of(token, member, row_stride, head_stride):
    """Offsets of tokens' rows from token 0 of the first head."""
    offsets = token * row_stride
    if member is not None:
        offsets += member * head_stride
    return offsets


@triton.jit
def statistics(lse, delta, offsets, delta_offsets, inside):
    """`(lse in units of log 2, delta)` of some queries; a query without keys has nothing to recompute."""
    base = tl.load(lse + offsets, mask=inside, other=0.0)
    base = tl.where(base == NEG_INF, 0.0, base * LOG2_E)
    return base, tl.load(delta + delta_offsets, mask=inside, other=0.0)


@triton.jit
def add_exactly(sums, index, x):
    """Adds fp32 numbers to the sums at some indices, in integers: the result is the same in any order."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 255
    mantissa = (bits & 0x7FFFFF) | tl.where(exponent > 0, 1 << 23, 0)
    place = tl.maximum(exponent, 1) - 1
    wide = mantissa.to(tl.int64) << (place % DIGIT_BITS).to(tl.int64)
    low, high = wide & DIGIT_MASK, wide >> DIGIT_BITS
    is_finite, is_negative = exponent < 255, bits < 0
    special = tl.where(x != x, (1 << 32) + 1, tl.where(is_negative, 1 << 32, 1))
    low = tl.where(is_finite, tl.where(is_negative, -low, low), special)
    high = tl.where(is_finite, tl.where(is_negative, -high, high), 0)
    at = sums + index * WORDS + tl.where(is_finite, place // DIGIT_BITS, WORDS - 1)
    tl.atomic_add(at, low, mask=low != 0, sem="relaxed")
    tl.atomic_add(at + 1, high, mask=high != 0, sem="relaxed")


@triton.jit
def chained(d_value, factor):
    """Of what a modified score was made of, the gradient: 0 where the score has none, though the factor be infinite."""
    return tl.where(d_value == 0.0, 0.0, d_value * factor)


@triton.jit
def add_tile(
    rows, row_base, row_delta, stream, first, token, member, edge, live, attended, who, acc_1, acc_2, scale,
    MODIFY: tl.constexpr, SLOPE: tl.constexpr, SCATTER: tl.constexpr, IS_DQ: tl.constexpr, NEGATE: tl.constexpr,
    STEP: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr, CHUNK_2: tl.constexpr,
):  # fmt: skip
    """The gradients after a block of the stream, on matrix units.

    rows: (first, second, first pointer, first offsets, second pointer, second offsets, inside); stream: (first pointer,
    its row and head strides, second pointer, its strides, lse, delta, the head strides of both, descriptors of both or
    None), pointers being to token 0 of the first head; first: where the block begins, for descriptors, or None where it
    is gathered; who: (batch element, query head, tokens and positions of the own rows as columns, tables of the
    modifier, tables of the mask, sums of the modifier's tables); edge: the numbers of the edges, or None.
    """
    one_offsets = offsets_of(token, member, stream[1], stream[2])
    two_offsets = offsets_of(token, member, stream[4], stream[5])
    query_head = who[1]
    if member is not None:
        query_head += member[None, :]
    one, two = None, None
    if first is not None and stream[10] is not None:
        one, two = stream[10].load([first, 0]), stream[11].load([first, 0])
        scores = score_rows(rows[0], one, NEGATE)
        d_weights = score_rows(rows[1], two, False)
    else:
        scores = score(rows[0], rows[2], rows[3], rows[6], stream[0], one_offsets, live, NEGATE, STEP, DIMS, CHUNK)
        # The second operands, V and dO, are v_dim wide.
        dims_2: tl.constexpr = (DIMS[2], DIMS[3])
        d_weights = score(
            rows[1], rows[4], rows[5], rows[6], stream[3], two_offsets, live, False, STEP, dims_2, CHUNK_2
        )
    if IS_DQ:
        base, delta = row_base[:, None], row_delta[:, None]
    else:
        stream_base, stream_delta = statistics(
            stream[6], stream[7], offsets_of(token, member, 1, stream[8]), offsets_of(token, member, 1, stream[9]), live
        )
        base, delta = stream_base[None, :], stream_delta[None, :]
    told = (who[0], query_head, None, None, who[4])
    if MODIFY is None:
        weights = tl.exp2(scores * scale - base)
    else:
        q_token, kv_token = (who[2], token[None, :]) if IS_DQ else (token[None, :], who[2])
        weights = tl.exp2(modified(scores, scale, told, q_token, kv_token, edge, MODIFY) * LOG2_E - base)
    if attended is not None:
        weights = tl.where(attended, weights, 0.0)
    d_scores = weights * (d_weights - delta)
    if SLOPE is not None:
        if SCATTER is not None:
            # A pair that is not there has no number, nor any place in a table.
            is_pair = rows[6][:, None] & live[None, :]
            if attended is not None:
                is_pair = is_pair & attended
            d_value = tl.where(is_pair, d_scores, 0.0)
            SCATTER(
                d_value, scores * scale, who[0], query_head, q_token, kv_token, edge, who[4], who[6], add_exactly
            )  # fmt: skip
        d_scores = chained(d_scores, modified(scores, scale, told, q_token, kv_token, edge, SLOPE))
    if one is None:
        one = load_rows(stream[0], one_offsets, live, DIMS[0], DIMS[1])
    acc_1 = tl.dot(d_scores.to(one.dtype), one, acc_1, input_precision="ieee")
    if not IS_DQ:
        if two is None:
            two = load_rows(stream[3], two_offsets, live, DIMS[2], DIMS[3])
        acc_2 = tl.dot(weights.to(two.dtype), two, acc_2, input_precision="ieee")
    return acc_1, acc_2


@triton.jit
def add_tiles(
    rows, row_base, row_delta, stream, columns, which, n_tiles, patterns, edges, lane, order, length, who, acc_1, acc_2,
    scale,
    ATTENDS: tl.constexpr, MODIFY: tl.constexpr, SLOPE: tl.constexpr, SCATTER: tl.constexpr, IS_PARTIAL: tl.constexpr,
    IS_DQ: tl.constexpr, NEGATE: tl.constexpr, BLOCK: tl.constexpr, STREAM: tl.constexpr, STEP: tl.constexpr,
    PACK: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr, CHUNK_2: tl.constexpr,
):  # fmt: skip
    """The gradients after tiles of BLOCK tokens and STREAM tokens of the stream, full, by predicate or by pattern.

    lane: which token of the block each own row is of. edges: for each tile the number of every query's first edge, or
    None. PACK: heads of each token of the stream.
    """
    taken: tl.constexpr = STEP // PACK
    steps: tl.constexpr = STREAM // taken if taken < STREAM else 1
    words: tl.constexpr = (STREAM + 63) // 64
    column = tl.arange(0, STEP)
    member = members(column, PACK)
    within = column // PACK
    is_there = None
    if taken > STREAM:
        # A step that a tile does not fill is filled up with columns that stand for nothing.
        is_there = within < STREAM
        within = tl.minimum(within, STREAM - 1)
    passed = lane * 0
    for i in range(n_tiles * steps):
        offset = i % steps * taken
        first = tl.load(columns + i // steps) * STREAM + offset
        position = first + within
        live = position < length
        if is_there is not None:
            live = live & is_there
        token = tokens_at(order, position, live)
        if IS_PARTIAL and ATTENDS is not None:
            attended = ATTENDS(who[3], position[None, :], who[5]) & live[None, :]
        elif IS_PARTIAL:
            at = patterns + (tl.load(which + i // steps).to(tl.int64) * BLOCK + lane) * words + offset // 64
            bit = (offset % 64 + within)[None, :]
            attended = ((tl.load(at)[:, None] >> bit.to(tl.int64)) & 1) != 0
            if is_there is not None:
                attended = attended & is_there[None, :]
        elif is_there is not None:
            attended = live[None, :] & (lane[:, None] >= 0)
        else:
            attended = None
        edge = None
        if edges is not None:
            # A query's edges in a tile follow each other.
            if IS_DQ:
                first_edge = tl.load(edges + (lane * 0 + i // steps).to(tl.int64) * BLOCK + lane)[:, None]
                if IS_PARTIAL:
                    passed = tl.where(offset == 0, 0, passed)
                    edge = first_edge + passed[:, None] + rank_among(attended, 1)
                    passed += tl.sum(attended.to(tl.int32), 1)
                else:
                    edge = first_edge + (offset + within)[None, :]
            else:
                first_edge = tl.load(edges + (within * 0 + i // steps).to(tl.int64) * STREAM + offset + within)[None, :]
                edge = first_edge + (rank_among(attended, 0) if IS_PARTIAL else lane[:, None])
        acc_1, acc_2 = add_tile(
            rows, row_base, row_delta, stream, first, token, member, edge, live, attended, who, acc_1, acc_2, scale,
            MODIFY, SLOPE, SCATTER, IS_DQ, NEGATE, STEP, DIMS, CHUNK, CHUNK_2,
        )  # fmt: skip
    return acc_1, acc_2


@triton.jit
def add_columns(
    rows, row_base, row_delta, stream, columns, lanes, n_columns, edge_indptr, edges, lane, order, who, acc_1, acc_2,
    scale,
    MODIFY: tl.constexpr, SLOPE: tl.constexpr, SCATTER: tl.constexpr, IS_DQ: tl.constexpr, NEGATE: tl.constexpr,
    STEP: tl.constexpr, OWN_PACK: tl.constexpr, PACK: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_2: tl.constexpr,
):  # fmt: skip
    """The gradients after gathered columns; edge_indptr, edges: the numbers of each column's edges, or None.

    lanes: bit `i` of a column's says that own token `i` of the block meets it; None where there is one, which meets
    them all. OWN_PACK, PACK: heads of each own token, and of each of the stream.
    """
    within = tl.arange(0, STEP)
    member = members(within, PACK)
    for done in range(0, n_columns, STEP // PACK):
        nth = done + within // PACK
        live = nth < n_columns
        token = tokens_at(order, tl.load(columns + nth, mask=live, other=0), live)
        attended = live[None, :] & (lane[:, None] >= 0)
        if lanes is not None:
            bits = tl.load(lanes + nth, mask=live, other=0)
            attended = ((bits[None, :] >> lane[:, None].to(tl.int64)) & 1) != 0
        edge = None
        if edges is not None:
            first_edge = tl.load(edge_indptr + nth, mask=live, other=0)
            # A column's edges follow each other by own token, whose heads share their number.
            rank = rank_among(attended, 0) // OWN_PACK
            # Rows that fill a low tile up have no number.
            edge = tl.load(edges + first_edge[None, :] + rank, mask=attended & rows[6][:, None], other=0)
        acc_1, acc_2 = add_tile(
            rows, row_base, row_delta, stream, None, token, member, edge, live, attended, who, acc_1, acc_2, scale,
            MODIFY, SLOPE, SCATTER, IS_DQ, NEGATE, STEP, DIMS, CHUNK, CHUNK_2,
        )  # fmt: skip
    return acc_1, acc_2


@triton.jit
def add_singly(
    one, two, row_base, row_delta, stream, position, live, start, stop, indptr, first, last, step, edges, n_offsets,
    order, length, who, acc_1, acc_2, scale,
    MODIFY: tl.constexpr, SLOPE: tl.constexpr, SCATTER: tl.constexpr, FORM: tl.constexpr, IS_DQ: tl.constexpr,
    NEGATE: tl.constexpr, KEYS: tl.constexpr, PACK: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The gradients after rows met their partners `start … stop - 1`, KEYS at a time, without matrix units.

    one, two: fp32 rows of both operands. Partners are numbered in the order of a row's progressions, and of each all
    PACK heads are among KEYS. who: as above, the tokens as a row.
    """
    lane = tl.arange(0, KEYS)[:, None]
    nth = (lane // PACK).to(tl.int64)
    member = members(lane, PACK)
    query_head = who[1]
    if member is not None:
        query_head += member
    told = (who[0], query_head, None, None, who[4])
    column_1, column_2 = tl.arange(0, DIMS[1])[None, None, :], tl.arange(0, DIMS[3])[None, None, :]
    passed = position * 0
    n = 1
    if FORM != "edges":
        n = n_progressions(position, live, indptr, n_offsets, FORM)
    for p in range(n):
        if FORM == "edges":
            begin = tl.load(indptr + position, mask=live, other=0)
            count = tl.load(indptr + position + 1, mask=live, other=0) - begin
            by = begin * 0 + 1
        else:
            begin, by, count = progression(p, position, live, indptr, first, last, step, length, FORM)
        low = tl.minimum(tl.maximum(start - passed, 0), count)
        high = tl.minimum(tl.maximum(stop - passed, 0), count)
        passed += count
        for done in range(0, tl.max(high - low, 0).to(tl.int32), KEYS // PACK):
            index = low[None, :] + (nth + done)
            is_here = index < high[None, :]
            partner = tl.where(is_here, begin[None, :] + index * by[None, :], 0)
            edge = None
            if edges is not None:
                edge = tl.load(edges + partner, mask=is_here, other=0)
            if FORM == "edges":
                partner = tl.load(first + partner, mask=is_here, other=0)
            token = tokens_at(order, partner, is_here)
            one_at = stream[0] + offsets_of(token, member, stream[1], stream[2])[:, :, None] + column_1
            two_at = stream[3] + offsets_of(token, member, stream[4], stream[5])[:, :, None] + column_2
            other_1 = tl.load(one_at, mask=is_here[:, :, None] & (column_1 < DIMS[0]), other=0.0).to(tl.float32)
            other_2 = tl.load(two_at, mask=is_here[:, :, None] & (column_2 < DIMS[2]), other=0.0).to(tl.float32)
            scores = tl.sum(one[None, :, :] * other_1, 2)
            if NEGATE:
                scores = -scores
            if IS_DQ:
                base, delta = row_base[None, :], row_delta[None, :]
            else:
                lse_at = offsets_of(token, member, 1, stream[8])
                base, delta = statistics(
                    stream[6], stream[7], lse_at, offsets_of(token, member, 1, stream[9]), is_here
                )  # fmt: skip
            if MODIFY is None:
                weights = tl.exp2(scores * scale - base)
            else:
                q_token, kv_token = (who[2], token) if IS_DQ else (token, who[2])
                weights = tl.exp2(modified(scores, scale, told, q_token, kv_token, edge, MODIFY) * LOG2_E - base)
            weights = tl.where(is_here, weights, 0.0)
            d_scores = weights * (tl.sum(two[None, :, :] * other_2, 2) - delta)
            if SLOPE is not None:
                if SCATTER is not None:
                    d_value = tl.where(is_here, d_scores, 0.0)
                    SCATTER(
                        d_value, scores * scale, who[0], query_head, q_token, kv_token, edge, who[4], who[6],
                        add_exactly,
                    )  # fmt: skip
                d_scores = chained(d_scores, modified(scores, scale, told, q_token, kv_token, edge, SLOPE))
            acc_1 += tl.sum(d_scores[:, :, None] * other_1, 0)
            if not IS_DQ:
                acc_2 += tl.sum(weights[:, :, None] * other_2, 0)
    return acc_1, acc_2


@triton.jit(
    do_not_specialize=[
        "n_items", "n_slots", "n_batches", "n_heads", "abreast", "length", "stream_length", "n_offsets",
    ]
)  # fmt: skip
def backward(
    own_1, own_2, stream_1, stream_2, lse, delta, into_1, into_2, partial,
    own_1_batch, own_1_head, own_1_row, own_2_batch, own_2_head, own_2_row,
    stream_1_batch, stream_1_head, stream_1_row, stream_2_batch, stream_2_head, stream_2_row,
    into_1_batch, into_1_head, into_1_row, into_2_batch, into_2_head, into_2_row,
    lse_batch, lse_head, delta_batch, delta_head,
    batches, heads, head_indptr, stream_heads, item_unit, item_slot,
    item_tile, item_full, item_partial, tile_column, tile_pattern, patterns,
    item_column, item_column_stop, gathered_columns, gathered_lanes,
    item_start, item_stop, row_indptr, row_first, row_last, row_step,
    tile_edges, gathered_edge_indptr, gathered_edges, row_edges,
    order, stream_order, score_tables, mask_tables, score_sums,
    n_items, n_slots, n_batches, n_heads, abreast, length, stream_length, n_offsets, scale, plain_scale,
    ATTENDS: tl.constexpr, MODIFY: tl.constexpr, SLOPE: tl.constexpr, SCATTER: tl.constexpr,
    FORM: tl.constexpr, IS_DQ: tl.constexpr, NEGATE: tl.constexpr, BLOCK: tl.constexpr, STREAM: tl.constexpr,
    STEP: tl.constexpr, KEYS: tl.constexpr, PACK: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_2: tl.constexpr, DESCRIBED: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """dQ, written, or dK and dV, added to what is there; a split unit goes to `partial`, for `add_up`.

    Own and stream operands are (q, dO) and (k, v) for dQ, the other way round for dK and dV. A program serves one own
    head and all stream heads that meet it, in their order; of query heads, either list names the first of each PACK.
    None arrays mean that there is no such list; FORM None that there are no single edges. ATTENDS is the mask's
    predicate, MODIFY and SLOPE the score modifier and its derivative: generated functions, or None; SCATTER is another,
    which adds to `score_sums`. `scale` takes scores to units of log 2, or, modified, to their own. DESCRIBED lets the
    copy engine fetch the stream's tiles; their rows must be aligned to 16 bytes, and `stream_order` None.
    """
    OWN_PACK: tl.constexpr = PACK if IS_DQ else 1
    STREAM_PACK: tl.constexpr = 1 if IS_DQ else PACK
    PACKED: tl.constexpr = BLOCK * OWN_PACK
    # Matrix units take 16 rows: what is missing is filled up with rows that nobody reads.
    ROWS: tl.constexpr = 16 if PACKED < 16 and item_tile is not None else PACKED
    for turn in tl.range(turns(n_items * n_batches * n_heads, PERSISTENT), disable_licm=True):
        item, copy, batch, head = locate(program_at(turn, PERSISTENT), n_items, n_heads, abreast, batches, heads)
        head_index = copy % n_heads
        row = tl.arange(0, ROWS)
        member = members(row, OWN_PACK)
        lane = row // OWN_PACK
        if PACKED < ROWS:
            lane = tl.minimum(lane, BLOCK - 1)
        position = tl.load(item_unit + item) * BLOCK + lane
        inside = position < length
        if PACKED < ROWS:
            inside = inside & (row < PACKED)
        token = tokens_at(order, position, inside)
        base_1 = own_1 + batch * own_1_batch + head * own_1_head
        base_2 = own_2 + batch * own_2_batch + head * own_2_head
        offsets_1 = offsets_of(token, member, own_1_row, own_1_head)
        offsets_2 = offsets_of(token, member, own_2_row, own_2_head)
        row_base, row_delta = None, None
        if IS_DQ:
            row_base, row_delta = statistics(
                lse, delta, batch * lse_batch + head * lse_head + offsets_of(token, member, 1, lse_head),
                batch * delta_batch + head * delta_head + offsets_of(token, member, 1, delta_head), inside,
            )  # fmt: skip
        rows_1, rows_2 = None, None
        if item_tile is not None:
            if DIMS[1] == CHUNK:
                rows_1 = load_rows(base_1, offsets_1, inside, DIMS[0], DIMS[1])
            if DIMS[3] == CHUNK_2:
                rows_2 = load_rows(base_2, offsets_2, inside, DIMS[2], DIMS[3])
        rows = (rows_1, rows_2, base_1, offsets_1, base_2, offsets_2, inside)
        # Triton 3.6 takes no element of a tuple as part of a shape.
        width_1: tl.constexpr = DIMS[1]
        width_2: tl.constexpr = DIMS[3]
        acc_1 = tl.zeros([ROWS, width_1], tl.float32)
        acc_2 = tl.zeros([ROWS, width_2], tl.float32)

        for i in range(tl.load(head_indptr + head_index), tl.load(head_indptr + head_index + 1)):
            other_head = tl.load(stream_heads + i).to(tl.int64)
            query_head = head if IS_DQ else other_head
            from_1 = stream_1 + batch * stream_1_batch + other_head * stream_1_head
            from_2 = stream_2 + batch * stream_2_batch + other_head * stream_2_head
            described_1, described_2 = None, None
            if DESCRIBED:
                described_1 = describe(from_1, stream_length, stream_1_row, STEP, DIMS[0], DIMS[1])
                described_2 = describe(from_2, stream_length, stream_2_row, STEP, DIMS[2], DIMS[3])
            stream = (
                from_1, stream_1_row, stream_1_head, from_2, stream_2_row, stream_2_head,
                lse + batch * lse_batch + query_head * lse_head, delta + batch * delta_batch + query_head * delta_head,
                lse_head, delta_head, described_1, described_2,
            )  # fmt: skip
            # A modifier of several own heads at once is told each row's.
            row_head = query_head if OWN_PACK == 1 else (query_head + member)[:, None]
            who = (batch, row_head, token[:, None], position[:, None], score_tables, mask_tables, score_sums)
            if FORM is not None:
                start, stop = tl.load(item_start + item), tl.load(item_stop + item)
                if start < stop or item_tile is None:
                    place = position.to(tl.int64)
                    degree = degrees(
                        place, inside, row_indptr, row_first, row_last, row_step, n_offsets, stream_length, FORM
                    )
                    # Each token's partners stand in the sum once for each of its heads so far.
                    before = (tl.cumsum(degree, 0) - degree * (row % OWN_PACK + 1)) // OWN_PACK
                    low = tl.minimum(tl.maximum(start - before, 0), degree)
                    high = tl.minimum(tl.maximum(stop - before, 0), degree)
                    singles_head = query_head if OWN_PACK == 1 else (query_head + member)[None, :]
                    row_who = (batch, singles_head, token[None, :], None, score_tables, None, score_sums)
                    one = load_rows(base_1, offsets_1, inside, DIMS[0], DIMS[1]).to(tl.float32)
                    two = load_rows(base_2, offsets_2, inside, DIMS[2], DIMS[3]).to(tl.float32)
                    acc_1, acc_2 = add_singly(
                        one, two, row_base, row_delta, stream, place, inside, low, high, row_indptr, row_first,
                        row_last, row_step, row_edges, n_offsets, stream_order, stream_length, row_who, acc_1, acc_2,
                        scale, MODIFY, SLOPE, SCATTER, FORM, IS_DQ, NEGATE, KEYS, STREAM_PACK, DIMS,
                    )  # fmt: skip
            if item_tile is not None:
                first_tile, n_full = tl.load(item_tile + item), tl.load(item_full + item)
                first_partial = first_tile + n_full
                # A tile has a number for each of its queries.
                queries: tl.constexpr = BLOCK if IS_DQ else STREAM
                full_edges = None if tile_edges is None else tile_edges + first_tile * queries
                partial_edges = None if tile_edges is None else tile_edges + first_partial * queries
                acc_1, acc_2 = add_tiles(
                    rows, row_base, row_delta, stream, tile_column + first_tile, None, n_full, None, full_edges, lane,
                    stream_order, stream_length, who, acc_1, acc_2, scale, ATTENDS, MODIFY, SLOPE, SCATTER, False,
                    IS_DQ, NEGATE, BLOCK, STREAM, STEP, STREAM_PACK, DIMS, CHUNK, CHUNK_2,
                )  # fmt: skip
                acc_1, acc_2 = add_tiles(
                    rows, row_base, row_delta, stream, tile_column + first_partial, tile_pattern + first_partial,
                    tl.load(item_partial + item), patterns, partial_edges, lane, stream_order, stream_length, who,
                    acc_1, acc_2, scale, ATTENDS, MODIFY, SLOPE, SCATTER, True, IS_DQ, NEGATE, BLOCK, STREAM, STEP,
                    STREAM_PACK, DIMS, CHUNK, CHUNK_2,
                )  # fmt: skip
            if item_column is not None:
                column = tl.load(item_column + item)
                n_columns = (tl.load(item_column_stop + item) - column).to(tl.int32)
                lanes = None if gathered_lanes is None else gathered_lanes + column
                column_edges = None if gathered_edges is None else gathered_edge_indptr + column
                acc_1, acc_2 = add_columns(
                    rows, row_base, row_delta, stream, gathered_columns + column, lanes, n_columns, column_edges,
                    gathered_edges, lane, stream_order, who, acc_1, acc_2, scale, MODIFY, SLOPE, SCATTER,
                    IS_DQ, NEGATE, STEP, OWN_PACK, STREAM_PACK, DIMS, CHUNK, CHUNK_2,
                )  # fmt: skip

        acc_1 *= plain_scale
        slot = tl.load(item_slot + item)
        column_1, column_2 = tl.arange(0, DIMS[1])[None, :], tl.arange(0, DIMS[3])[None, :]
        is_1, is_2 = inside[:, None] & (column_1 < DIMS[0]), inside[:, None] & (column_2 < DIMS[2])
        to_1 = batch * into_1_batch + head * into_1_head + offsets_of(token, member, into_1_row, into_1_head)
        at_1 = into_1 + to_1[:, None] + column_1
        if slot >= 0:
            width: tl.constexpr = DIMS[0] if IS_DQ else DIMS[0] + DIMS[2]
            at = partial + (((copy * n_slots + slot) * PACKED + row) * width)[:, None]
            tl.store(at + column_1, acc_1, mask=is_1)
            if not IS_DQ:
                tl.store(at + DIMS[0] + column_2, acc_2, mask=is_2)
        elif IS_DQ:
            tl.store(at_1, acc_1.to(into_1.dtype.element_ty), mask=is_1)
        else:
            at_2 = into_2 + (batch * into_2_batch + head * into_2_head + token * into_2_row)[:, None] + column_2
            tl.store(at_1, tl.load(at_1, mask=is_1, other=0.0) + acc_1, mask=is_1)
            tl.store(at_2, tl.load(at_2, mask=is_2, other=0.0) + acc_2, mask=is_2)


@triton.jit(do_not_specialize=["n_merges", "n_slots", "n_heads", "length"])
def add_up(
    into_1, into_2, partial,
    into_1_batch, into_1_head, into_1_row, into_2_batch, into_2_head, into_2_row,
    batches, heads, merge_unit, merge_indptr, order,
    n_merges, n_slots, n_heads, length,
    IS_DQ: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Sums the pieces of each split unit in their order, ROWS rows a program: deterministic.

    PACK: heads of each own token.
    """
    PACKED: tl.constexpr = BLOCK * PACK
    n_parts: tl.constexpr = PACKED // ROWS
    program = tl.program_id(0)
    merged = program // n_parts % n_merges
    copy = (program // n_parts // n_merges).to(tl.int64)
    batch = tl.load(batches + copy // n_heads).to(tl.int64)
    head = tl.load(heads + copy % n_heads).to(tl.int64)
    row = program % n_parts * ROWS + tl.arange(0, ROWS)
    member = members(row, PACK)
    position = tl.load(merge_unit + merged) * BLOCK + row // PACK
    inside = position < length
    token = tokens_at(order, position, inside)

    width: tl.constexpr = DIMS[0] if IS_DQ else DIMS[0] + DIMS[2]
    column_1, column_2 = tl.arange(0, DIMS[1])[None, :], tl.arange(0, DIMS[3])[None, :]
    is_1, is_2 = inside[:, None] & (column_1 < DIMS[0]), inside[:, None] & (column_2 < DIMS[2])
    width_1: tl.constexpr = DIMS[1]
    width_2: tl.constexpr = DIMS[3]
    sum_1 = tl.zeros([ROWS, width_1], tl.float32)
    sum_2 = tl.zeros([ROWS, width_2], tl.float32)
    first_slot = tl.load(merge_indptr + merged)
    for i in range((tl.load(merge_indptr + merged + 1) - first_slot).to(tl.int32)):
        at = partial + (((copy * n_slots + first_slot + i) * PACKED + row) * width)[:, None]
        sum_1 += tl.load(at + column_1, mask=is_1, other=0.0)
        if not IS_DQ:
            sum_2 += tl.load(at + DIMS[0] + column_2, mask=is_2, other=0.0)
    to_1 = batch * into_1_batch + head * into_1_head + offsets_of(token, member, into_1_row, into_1_head)
    at_1 = into_1 + to_1[:, None] + column_1
    if IS_DQ:
        tl.store(at_1, sum_1.to(into_1.dtype.element_ty), mask=is_1)
    else:
        at_2 = into_2 + (batch * into_2_batch + head * into_2_head + token * into_2_row)[:, None] + column_2
        tl.store(at_1, tl.load(at_1, mask=is_1, other=0.0) + sum_1, mask=is_1)
        tl.store(at_2, tl.load(at_2, mask=is_2, other=0.0) + sum_2, mask=is_2)
