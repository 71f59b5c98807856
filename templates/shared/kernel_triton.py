"""Device code that the Triton templates share: fetching rows, the online softmax, walking rows, writing, merging.

This file decides how scores become a running state and how a state becomes output; it must not know schedules or tile
lists. A state is, for each query of a block, `m` (the highest score, in units of log 2), `l` (the sum of weights
`2^(score - m)`) and `acc` (the weighted sum of values, not yet divided), all fp32. A query that has met no key has
`m = -inf, l = 0, acc = 0`; it yields `out = 0`, `lse = -inf`.

Offsets into tensors are 64-bit throughout. Lengths and positions are below 2³¹.
"""

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(n_items, n_heads, abreast, batches, heads):
    """`(item, copy, batch element, first head)` of this program.

    `abreast` heads walk an item side by side, so that heads that share keys find them in the cache; then come the items
    of those heads, longest first.
    """
    program = tl.program_id(0)
    inner = program % abreast
    rest = program // abreast
    copy = rest // n_items * abreast + inner
    batch = tl.load(batches + copy // n_heads).to(tl.int64)
    head = tl.load(heads + copy % n_heads).to(tl.int64)
    return rest % n_items, copy.to(tl.int64), batch, head


@triton.jit
def tokens_at(order, position, inside):
    """The tokens at some positions; `order` None means that each stands at its own."""
    tokens = position
    if order is not None:
        tokens = tl.load(order + position, mask=inside, other=0)
    return tokens.to(tl.int64)


@triton.jit
def load_rows(base, offsets, live, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """`[rows, WIDTH]` from `base + offsets`; zero beyond DIM and where not `live` (None: all rows are there)."""
    column = tl.arange(0, WIDTH)
    at = base + offsets[:, None] + column[None, :]
    if live is None:
        if DIM == WIDTH:
            rows = tl.load(at)
        else:
            rows = tl.load(at, mask=column[None, :] < DIM, other=0.0)
    elif DIM == WIDTH:
        rows = tl.load(at, mask=live[:, None], other=0.0)
    else:
        rows = tl.load(at, mask=live[:, None] & (column[None, :] < DIM), other=0.0)
    return rows


@triton.jit
def empty_state(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    m = tl.full([ROWS], NEG_INF, tl.float32)
    return m, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def attend(q, k, v, attended, m, l, acc, scale):
    """The state after a block of keys on matrix units.

    q: [queries, head_dim], k: [keys, head_dim], v: [keys, v_dim], attended: bool [queries, keys] or None for all;
    scale > 0 takes scores to units of log 2.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if attended is not None:
        scores = tl.where(attended, scores, NEG_INF)
    highest = tl.maximum(m, tl.max(scores, 1) * scale)
    base = highest
    if attended is not None:
        # A query without a key so far: -inf less -inf is not a number, -inf less 0 is a weight of 0.
        base = tl.where(highest == NEG_INF, 0.0, highest)
    weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(m - base)
    l = l * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return highest, l, acc


@triton.jit
def add_full_tiles(
    q, k_base, k_row, v_base, v_row, columns, n_tiles, kv_order, m, l, acc, scale,
    BLOCK_KV: tl.constexpr, STEP_KV: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The state after tiles whose every pair is attended, all inside the key sequence."""
    steps: tl.constexpr = BLOCK_KV // STEP_KV
    within = tl.arange(0, STEP_KV)
    for i in range(0, n_tiles * steps):
        first = tl.load(columns + i // steps) * BLOCK_KV + i % steps * STEP_KV
        if kv_order is None:
            # One 64-bit addition a tile; the offsets inside it stay what they are.
            k = load_rows(k_base + first.to(tl.int64) * k_row, within.to(tl.int64) * k_row, None, DIMS[0], DIMS[1])
            v = load_rows(v_base + first.to(tl.int64) * v_row, within.to(tl.int64) * v_row, None, DIMS[2], DIMS[3])
        else:
            token = tl.load(kv_order + first + within).to(tl.int64)
            k = load_rows(k_base, token * k_row, None, DIMS[0], DIMS[1])
            v = load_rows(v_base, token * v_row, None, DIMS[2], DIMS[3])
        m, l, acc = attend(q, k, v, None, m, l, acc, scale)
    return m, l, acc


@triton.jit
def add_partial_tiles(
    q, k_base, k_row, v_base, v_row, columns, which, n_tiles, patterns, lane, kv_order, kv_len, m, l, acc, scale,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STEP_KV: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The state after tiles that attend by pattern.

    lane: which query of the block each row is. A pattern has for each query the words of 64 keys; keys beyond the
    sequence have no bit.
    """
    steps: tl.constexpr = BLOCK_KV // STEP_KV
    words: tl.constexpr = (BLOCK_KV + 63) // 64
    within = tl.arange(0, STEP_KV)
    for i in range(0, n_tiles * steps):
        offset = i % steps * STEP_KV
        key = tl.load(columns + i // steps) * BLOCK_KV + offset + within
        inside = key < kv_len
        token = tokens_at(kv_order, key, inside)
        k = load_rows(k_base, token * k_row, inside, DIMS[0], DIMS[1])
        v = load_rows(v_base, token * v_row, inside, DIMS[2], DIMS[3])
        at = patterns + (tl.load(which + i // steps).to(tl.int64) * BLOCK_Q + lane) * words + offset // 64
        bit = (offset % 64 + within)[None, :]
        word = tl.load(at)[:, None]
        if STEP_KV > 64:
            word = tl.where(bit < 64, word, tl.load(at + 1)[:, None])
            bit = bit % 64
        attended = ((word >> bit.to(tl.int64)) & 1) != 0
        m, l, acc = attend(q, k, v, attended, m, l, acc, scale)
    return m, l, acc


@triton.jit
def attend_singly(q, k_base, k_row, v_base, v_row, tokens, live, m, l, acc, scale, DIMS: tl.constexpr):
    """The state after each query met keys of its own, without matrix units.

    q: fp32 [queries, head_width], tokens and live: [queries, keys]. DIMS is (head_dim, head_width, v_dim, v_width).
    """
    column = tl.arange(0, DIMS[1])[None, None, :]
    v_column = tl.arange(0, DIMS[3])[None, None, :]
    k_at = k_base + (tokens * k_row)[:, :, None] + column
    v_at = v_base + (tokens * v_row)[:, :, None] + v_column
    # Both fetches are under way before the first is used.
    k = tl.load(k_at, mask=live[:, :, None] & (column < DIMS[0]), other=0.0)
    v = tl.load(v_at, mask=live[:, :, None] & (v_column < DIMS[2]), other=0.0)
    scores = tl.sum(q[:, None, :] * k.to(tl.float32), 2)
    scores = tl.where(live, scores, NEG_INF)
    highest = tl.maximum(m, tl.max(scores, 1) * scale)
    base = tl.where(highest == NEG_INF, 0.0, highest)
    weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(m - base)
    l = l * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * v.to(tl.float32), 1)
    return highest, l, acc


@triton.jit
def join(m, l, acc, other_m, other_l, other_acc):
    """The state of both key sets together."""
    highest = tl.maximum(m, other_m)
    base = tl.where(highest == NEG_INF, 0.0, highest)
    mine, theirs = tl.exp2(m - base), tl.exp2(other_m - base)
    return highest, l * mine + other_l * theirs, acc * mine[:, None] + other_acc * theirs[:, None]


@triton.jit
def progression(p, rows, live, indptr, first, last, step, kv_len, FORM: tl.constexpr):
    """`(begin, step, count)` of the p-th run of keys of some rows: begin, begin + step, … below a bound; int64 [rows]."""
    if FORM == "offsets":
        by = tl.load(step + p) + rows * 0
        begin = rows + tl.load(first + p)
        end = tl.minimum(rows + tl.load(last + p), kv_len)
        # A progression that starts before key 0 enters at its first term that is a key.
        begin = tl.where(begin < 0, begin + (by - 1 - begin) // by * by, begin)
    else:
        at = tl.load(indptr + rows, mask=live, other=0) + p
        live = live & (at < tl.load(indptr + rows + 1, mask=live, other=0))
        begin = tl.load(first + at, mask=live, other=0).to(tl.int64)
        end = tl.load(last + at, mask=live, other=0).to(tl.int64)
        by = tl.load(step + at, mask=live, other=1).to(tl.int64)
    count = tl.where(live & (begin < end), (end - begin + by - 1) // by, 0)
    return begin, by, count


@triton.jit
def n_progressions(rows, live, indptr, n_offsets, FORM: tl.constexpr):
    """The most runs of keys that one of these rows has."""
    if FORM == "offsets":
        n = n_offsets
    else:
        low = tl.load(indptr + rows, mask=live, other=0)
        high = tl.load(indptr + rows + 1, mask=live, other=0)
        n = tl.max(high - low, 0).to(tl.int32)
    return n


@triton.jit
def degrees(rows, live, indptr, first, last, step, n_offsets, kv_len, FORM: tl.constexpr):
    """Keys of each row, int64 [rows]."""
    if FORM == "edges":
        high = tl.load(indptr + rows + 1, mask=live, other=0)
        total = high - tl.load(indptr + rows, mask=live, other=0)
    else:
        total = rows * 0
        for p in range(0, n_progressions(rows, live, indptr, n_offsets, FORM)):
            begin, by, count = progression(p, rows, live, indptr, first, last, step, kv_len, FORM)
            total += count
    return total


@triton.jit
def walk(
    q, k_base, k_row, v_base, v_row, rows, start, stop, indptr, first, last, step, n_offsets, kv_order, kv_len, scale,
    FORM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The state of rows that meet their keys `start … stop - 1`, KEYS at a time.

    q: fp32 [ROWS, head_width]; rows, start, stop: int64 [ROWS]. The keys of a row are numbered in the order of its
    progressions; FORM "edges" has them in `first`.
    """
    m, l, acc = empty_state(ROWS, DIMS[3])
    nth = tl.arange(0, KEYS).to(tl.int64)[None, :]
    live = start < stop
    if FORM == "edges":
        begin = tl.load(indptr + rows, mask=live, other=0) + start
        count = tl.where(live, stop - start, 0)
        for done in range(0, tl.max(count, 0).to(tl.int32), KEYS):
            is_key = nth + done < count[:, None]
            position = tl.load(first + begin[:, None] + (nth + done), mask=is_key, other=0)
            tokens = tokens_at(kv_order, position, is_key)
            m, l, acc = attend_singly(q, k_base, k_row, v_base, v_row, tokens, is_key, m, l, acc, scale, DIMS)
    else:
        passed = rows * 0
        for p in range(0, n_progressions(rows, live, indptr, n_offsets, FORM)):
            begin, by, count = progression(p, rows, live, indptr, first, last, step, kv_len, FORM)
            low = tl.minimum(tl.maximum(start - passed, 0), count)
            high = tl.minimum(tl.maximum(stop - passed, 0), count)
            passed += count
            for done in range(0, tl.max(high - low, 0).to(tl.int32), KEYS):
                key = low[:, None] + (nth + done)
                is_key = key < high[:, None]
                position = tl.where(is_key, begin[:, None] + key * by[:, None], 0)
                tokens = tokens_at(kv_order, position, is_key)
                m, l, acc = attend_singly(q, k_base, k_row, v_base, v_row, tokens, is_key, m, l, acc, scale, DIMS)
    return m, l, acc


@triton.jit
def walk_block(
    q, q_base, q_offsets, k_base, k_row, v_base, v_row, rows, start, stop, indptr, first, last, step, n_offsets,
    kv_order, kv_len, scale,
    FORM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, NEGATE: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The state of a block of rows: side by side as far as the first keys go, then what long rows have left, one by one.

    One long row among short ones would otherwise leave the rest of the program idle. Arguments as in `walk`;
    `q_base + q_offsets` is where the rows of q lie.
    """
    abreast: tl.constexpr = ROWS * KEYS
    together = tl.minimum(stop, start + abreast)
    m, l, acc = walk(
        q, k_base, k_row, v_base, v_row, rows, start, together, indptr, first, last, step, n_offsets, kv_order, kv_len,
        scale, FORM, ROWS, KEYS, DIMS,
    )  # fmt: skip
    if ROWS > 1:
        for i in range(0, ROWS):
            is_row = tl.arange(0, ROWS) == i
            low = tl.sum(tl.where(is_row, together, 0), 0)
            high = tl.sum(tl.where(is_row, stop, 0), 0)
            if low < high:
                none = tl.zeros([1], tl.int64)
                row = tl.sum(tl.where(is_row, rows, 0), 0) + none
                offset = tl.sum(tl.where(is_row, q_offsets, 0), 0) + none
                one_q = load_rows(q_base, offset, None, DIMS[0], DIMS[1]).to(tl.float32)
                if NEGATE:
                    one_q = -one_q
                one_m, one_l, one_acc = walk(
                    one_q, k_base, k_row, v_base, v_row, row, low + none, high + none, indptr, first, last, step,
                    n_offsets, kv_order, kv_len, scale, FORM, 1, abreast, DIMS,
                )  # fmt: skip
                one_m = tl.where(is_row, one_m, NEG_INF)
                m, l, acc = join(m, l, acc, one_m, one_l, one_acc)
    return m, l, acc


@triton.jit
def finish(out, lse, out_offsets, lse_offsets, inside, m, l, acc, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr):
    """Writes the normalised rows, and their log-sum-exp where `lse` is not None."""
    column = tl.arange(0, V_WIDTH)
    # A sum that is not a number is not 0: it goes through to the output.
    inverse = tl.where(l == 0.0, 0.0, 1.0 / l)
    rows = (acc * inverse[:, None]).to(out.dtype.element_ty)
    tl.store(out + out_offsets[:, None] + column[None, :], rows, mask=inside[:, None] & (column[None, :] < V_DIM))
    if lse is not None:
        tl.store(lse + lse_offsets, tl.where(l == 0.0, NEG_INF, (m + tl.log2(l)) * LN_2), mask=inside)


@triton.jit
def save(partial, slot_row, m, l, acc, ROWS: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr):
    """Keeps the state of one piece of a split unit; a saved row is [m, l, acc...]."""
    column = tl.arange(0, V_WIDTH)
    at = partial + (slot_row + tl.arange(0, ROWS)) * (V_DIM + 2)
    tl.store(at, m)
    tl.store(at + 1, l)
    tl.store(at[:, None] + 2 + column[None, :], acc, mask=column[None, :] < V_DIM)


@triton.jit(do_not_specialize=["n_merges", "n_slots", "n_heads", "q_len"])
def merge(
    out, lse, partial,
    out_batch, out_head, out_row, lse_batch, lse_head,
    batches, heads, merge_unit, merge_indptr, q_order,
    n_merges, n_slots, n_heads, q_len,
    BLOCK_Q: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr,
):  # fmt: skip
    """Joins the pieces of each split unit in their order, ROWS rows a program: deterministic."""
    n_parts: tl.constexpr = BLOCK_Q * PACK // ROWS
    program = tl.program_id(0)
    part = program % n_parts
    merged = program // n_parts % n_merges
    copy = (program // n_parts // n_merges).to(tl.int64)
    batch = tl.load(batches + copy // n_heads).to(tl.int64)
    first_head = tl.load(heads + copy % n_heads).to(tl.int64)

    row = part * ROWS + tl.arange(0, ROWS)
    position = tl.load(merge_unit + merged) * BLOCK_Q + row // PACK
    inside = position < q_len
    token = tokens_at(q_order, position, inside)
    head = first_head + row % PACK

    column = tl.arange(0, V_WIDTH)
    m, l, acc = empty_state(ROWS, V_WIDTH)
    first_slot = tl.load(merge_indptr + merged)
    for i in range(0, (tl.load(merge_indptr + merged + 1) - first_slot).to(tl.int32)):
        slot_row = (copy * n_slots + first_slot + i) * (BLOCK_Q * PACK) + row
        at = partial + slot_row * (V_DIM + 2)
        more = tl.load(at[:, None] + 2 + column[None, :], mask=column[None, :] < V_DIM, other=0.0)
        m, l, acc = join(m, l, acc, tl.load(at), tl.load(at + 1), more)
    out_offsets = batch * out_batch + head * out_head + token * out_row
    finish(out, lse, out_offsets, batch * lse_batch + head * lse_head + token, inside, m, l, acc, V_DIM, V_WIDTH)
