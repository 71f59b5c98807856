"""Device code that the Triton templates share: fetching rows, the online softmax, walking rows, writing, merging.

This file decides how scores become a running state and how a state becomes output; it must not know schedules or tile
lists. A state is, for each query of a block, `peak` (the highest score, in units of log 2), `total` (the sum of weights
`2^(score - peak)`) and `acc` (the weighted sum of values, not yet divided), all fp32. A query that has met no key has
`peak = -inf, total = 0, acc = 0`; it yields `out = 0`, `lse = -inf`.

Offsets into tensors are 64-bit throughout. Lengths and positions are below 2³¹.
"""

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def turns(n_programs, PERSISTENT: tl.constexpr):
    """How many of the grid's `n_programs` items this program takes: one, or where the grid is smaller its share."""
    n = 1
    if PERSISTENT:
        rounds = n_programs // tl.num_programs(0)
        n = rounds + (place_in_round(rounds) < n_programs % tl.num_programs(0)).to(tl.int32)
    return n


@triton.jit
def place_in_round(turn):
    """Back and forth: who took the longest item of one round takes the shortest of the next."""
    place = tl.program_id(0)
    return tl.where(turn % 2 == 0, place, tl.num_programs(0) - 1 - place)


@triton.jit
def program_at(turn, PERSISTENT: tl.constexpr):
    """Which program of a grid with one for each item this one stands for at a turn."""
    program = tl.program_id(0)
    if PERSISTENT:
        program = turn * tl.num_programs(0) + place_in_round(turn)
    return program


@triton.jit
def locate(program, n_items, n_heads, abreast, batches, heads):
    """`(item, copy, batch element, first head)` of a program.

    `abreast` heads walk an item side by side, so that heads that share keys find them in the cache; then come the items
    of those heads, longest first.
    """
    inner = program % abreast
    rest = program // abreast
    copy = rest // n_items * abreast + inner
    batch = tl.load(batches + copy // n_heads).to(tl.int64)
    head = tl.load(heads + copy % n_heads).to(tl.int64)
    return rest % n_items, copy.to(tl.int64), batch, head


@triton.jit
def rows_of(unit, first_head, q_len, BLOCK_Q: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr):
    """`(row, query of the block, position, whether there is such a row, head)` of each row of a query tile.

    The rows are PACK heads for each query; where they are fewer than ROWS, rows that nobody reads fill them up.
    """
    row = tl.arange(0, ROWS)
    lane = row // PACK
    if BLOCK_Q * PACK < ROWS:
        lane = tl.minimum(lane, BLOCK_Q - 1)
    position = unit * BLOCK_Q + lane
    inside = position < q_len
    if BLOCK_Q * PACK < ROWS:
        inside = inside & (row < BLOCK_Q * PACK)
    return row, lane, position, inside, first_head + row % PACK


@triton.jit
def load_live(at, live):
    """What stands at some places, 0 where not `live` (None: all are there)."""
    return tl.load(at) if live is None else tl.load(at, mask=live, other=0)


@triton.jit
def look_up(list, place, is_there):
    """An entry of a list, a step before it is needed.

    Where a loop looks up in the same turn where to fetch from, one stage of its pipeline is gone for that, and the
    fetches begin a turn later.
    """
    return tl.load(list + place, mask=is_there, other=0)


@triton.jit
def tokens_at(order, position, inside):
    """The tokens at some positions; `order` None means that each stands at its own."""
    tokens = position
    if order is not None:
        tokens = load_live(order + position, inside)
    return tokens.to(tl.int64)


@triton.jit
def load_rows(base, offsets, live, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """`[rows, WIDTH]` from `base + offsets`; zero beyond DIM and where not `live` (None: all rows are there)."""
    column = tl.arange(0, WIDTH)
    at = base + offsets[:, None] + column[None, :]
    if live is None:
        rows = tl.load(at) if DIM == WIDTH else tl.load(at, mask=column[None, :] < DIM, other=0.0)
    elif DIM == WIDTH:
        rows = tl.load(at, mask=live[:, None], other=0.0)
    else:
        rows = tl.load(at, mask=live[:, None] & (column[None, :] < DIM), other=0.0)
    return rows


@triton.jit
def empty_state(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    peak = tl.full([ROWS], NEG_INF, tl.float32)
    return peak, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def load_queries(q_base, q_offsets, inside, DIMS: tl.constexpr, CHUNK: tl.constexpr):
    """`[queries, head_width]` kept through all tiles, or None where they are read again a CHUNK at a time."""
    queries = None
    if DIMS[1] == CHUNK:
        queries = load_rows(q_base, q_offsets, inside, DIMS[0], DIMS[1])
    return queries


@triton.jit
def score(
    q, q_base, q_offsets, inside, k_base, k_offsets, live,
    NEGATE: tl.constexpr, STEP_KV: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`[queries, keys]`, fp32, not yet scaled.

    On matrix units the whole head_dim goes at once. Without them (fp32 on NVIDIA) a thread would have to hold all of
    it, for its queries and its keys: there, CHUNK dimensions go at a time, and q comes from the cache.
    """
    if DIMS[1] == CHUNK:
        scores = tl.dot(q, tl.trans(load_rows(k_base, k_offsets, live, DIMS[0], DIMS[1])), input_precision="ieee")
    else:
        scores = tl.zeros([q_offsets.shape[0], STEP_KV], tl.float32)
        for first in tl.range(0, DIMS[1], CHUNK, num_stages=1):
            column = first + tl.arange(0, CHUNK)
            is_q, is_k = (column < DIMS[0])[None, :], (column < DIMS[0])[None, :]
            if inside is not None:
                is_q = is_q & inside[:, None]
            if live is not None:
                is_k = is_k & live[:, None]
            q_part = tl.load(q_base + q_offsets[:, None] + column[None, :], mask=is_q, other=0.0)
            k_part = tl.load(k_base + k_offsets[:, None] + column[None, :], mask=is_k, other=0.0)
            scores = tl.dot(q_part, tl.trans(k_part), scores, input_precision="ieee")
    if NEGATE:
        scores = -scores
    return scores


@triton.jit
def describe(base, length, row, STEP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Rows from `base` on as the copy engine takes them, STEP at a time; zero beyond the length and DIM."""
    return tl.make_tensor_descriptor(base, [length, DIM], [row, 1], [STEP, WIDTH])


@triton.jit
def score_rows(q, rows, NEGATE: tl.constexpr):
    """`[queries, keys]`, fp32, not yet scaled, of keys that are already here."""
    scores = tl.dot(q, tl.trans(rows), input_precision="ieee")
    if NEGATE:
        scores = -scores
    return scores


@triton.jit
def modified(scores, scale, who, q_token, kv_token, edge, FUNCTION: tl.constexpr):
    """What a generated function makes of scores, in natural units; who: (batch element, heads, ..., tables).

    edge: the numbers of the edges, or None where no function asks for them.
    """
    return FUNCTION(scores * scale, who[0], who[1], q_token, kv_token, edge, who[4])


@triton.jit
def rank_among(attended, AXIS: tl.constexpr):
    """How many of those before it along an axis are attended; int32."""
    marks = attended.to(tl.int32)
    return tl.cumsum(marks, AXIS) - marks


@triton.jit
def attend(scores, v, attended, peak, total, acc, scale, IS_MODIFIED: tl.constexpr):
    """The state after a block of keys on matrix units.

    scores: fp32 [queries, keys], v: [keys, v_dim], attended: bool [queries, keys] or None for all; scale > 0 takes
    scores to units of log 2. Modified scores may all be -inf.
    """
    if attended is not None:
        scores = tl.where(attended, scores, NEG_INF)
    highest = tl.maximum(peak, tl.max(scores, 1) * scale)
    base = highest
    if IS_MODIFIED or attended is not None:
        # A query without a key so far: -inf less -inf is not a number, -inf less 0 is a weight of 0.
        base = tl.where(highest == NEG_INF, 0.0, highest)
    weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return highest, total, acc


@triton.jit
def add_full_tiles(
    q, q_base, q_offsets, inside, k_base, k_row, v_base, v_row, keys, values, columns, n_tiles, edges, lane, kv_order,
    who, peak, total, acc, scale,
    MODIFY: tl.constexpr, NEGATE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STEP_KV: tl.constexpr,
    DIMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The state after tiles whose every pair is attended, all inside the key sequence.

    keys, values: descriptors of K and V, or None. who: what generated functions are told: (batch element, head of each
    row, tokens and positions of the queries, all but the first as columns, tables of the modifier, tables of the mask).
    edges: for each tile the number of every query's first edge, or None; lane: which query of the block each row is.
    """
    steps: tl.constexpr = BLOCK_KV // STEP_KV
    n_steps = n_tiles * steps
    within = tl.arange(0, STEP_KV)
    column = look_up(columns, 0, n_steps > 0)
    for i in range(n_steps):
        first = column * BLOCK_KV + i % steps * STEP_KV
        column = look_up(columns, (i + 1) // steps, i + 1 < n_steps)
        if kv_order is None:
            # One 64-bit addition a tile; the offsets inside it stay what they are.
            k_tile, v_tile = k_base + first.to(tl.int64) * k_row, v_base + first.to(tl.int64) * v_row
            token = within.to(tl.int64)
        else:
            k_tile, v_tile = k_base, v_base
            token = tl.load(kv_order + first + within).to(tl.int64)
        if keys is not None:
            scores = score_rows(q, keys.load([first, 0]), NEGATE)
            v = values.load([first, 0])
        else:
            scores = score(q, q_base, q_offsets, inside, k_tile, token * k_row, None, NEGATE, STEP_KV, DIMS, CHUNK)
            v = load_rows(v_tile, token * v_row, None, DIMS[2], DIMS[3])
        if MODIFY is None:
            peak, total, acc = attend(scores, v, None, peak, total, acc, scale, False)
        else:
            key = first + within if kv_order is None else token
            edge = None
            if edges is not None:
                edge = tl.load(edges + (lane * 0 + i // steps).to(tl.int64) * BLOCK_Q + lane)[:, None]
                edge += (i % steps * STEP_KV + within)[None, :]
            scores = modified(scores, scale, who, who[2], key[None, :], edge, MODIFY)
            peak, total, acc = attend(scores, v, None, peak, total, acc, LOG2_E, True)
    return peak, total, acc


@triton.jit
def add_partial_tiles(
    q, q_base, q_offsets, inside, k_base, k_row, v_base, v_row, keys, values, columns, which, n_tiles, patterns, edges,
    lane, kv_order, kv_len, who, peak, total, acc, scale,
    ATTENDS: tl.constexpr, MODIFY: tl.constexpr, NEGATE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    STEP_KV: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The state after tiles that attend by ATTENDS, the mask's predicate, or where that is None by pattern.

    lane: which query of the block each row is. A pattern has for each query the words of 64 keys; keys beyond the
    sequence have no bit. edges: as above.
    """
    steps: tl.constexpr = BLOCK_KV // STEP_KV
    n_steps = n_tiles * steps
    words: tl.constexpr = (BLOCK_KV + 63) // 64
    within = tl.arange(0, STEP_KV)
    passed = lane * 0
    column = look_up(columns, 0, n_steps > 0)
    pattern = look_up(which, 0, n_steps > 0) if ATTENDS is None else 0
    for i in range(n_steps):
        offset = i % steps * STEP_KV
        first = column * BLOCK_KV + offset
        column = look_up(columns, (i + 1) // steps, i + 1 < n_steps)
        key = first + within
        live = key < kv_len
        token = tokens_at(kv_order, key, live)
        if keys is not None:
            scores = score_rows(q, keys.load([first, 0]), NEGATE)
            v = values.load([first, 0])
        else:
            scores = score(q, q_base, q_offsets, inside, k_base, token * k_row, live, NEGATE, STEP_KV, DIMS, CHUNK)
            v = load_rows(v_base, token * v_row, live, DIMS[2], DIMS[3])
        if ATTENDS is not None:
            attended = ATTENDS(who[3], key[None, :], who[5]) & live[None, :]
        else:
            at = patterns + (pattern.to(tl.int64) * BLOCK_Q + lane) * words + offset // 64
            pattern = look_up(which, (i + 1) // steps, i + 1 < n_steps)
            bit = (offset % 64 + within)[None, :]
            word = tl.load(at)[:, None]
            if STEP_KV > 64:
                word = tl.where(bit < 64, word, tl.load(at + 1)[:, None])
                bit = bit % 64
            attended = ((word >> bit.to(tl.int64)) & 1) != 0
        if MODIFY is None:
            peak, total, acc = attend(scores, v, attended, peak, total, acc, scale, False)
        else:
            edge = None
            if edges is not None:
                # A query's edges in a tile follow each other.
                passed = tl.where(offset == 0, 0, passed)
                edge = tl.load(edges + (lane * 0 + i // steps).to(tl.int64) * BLOCK_Q + lane) + passed
                edge = edge[:, None] + rank_among(attended, 1)
                passed += tl.sum(attended.to(tl.int32), 1)
            scores = modified(scores, scale, who, who[2], token[None, :], edge, MODIFY)
            peak, total, acc = attend(scores, v, attended, peak, total, acc, LOG2_E, True)
    return peak, total, acc


@triton.jit
def attend_singly(
    q, k_base, k_row, v_base, v_row, tokens, edge, live, who, peak, total, acc, scale,
    MODIFY: tl.constexpr, NEGATE: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The state after each query met keys of its own, without matrix units.

    q: fp32 [queries, head_width], tokens, edge (or None) and live: [keys, queries]. Queries come before keys among the
    threads, so that a query's sums stay with the threads that hold it.
    """
    column = tl.arange(0, DIMS[1])[None, None, :]
    v_column = tl.arange(0, DIMS[3])[None, None, :]
    k_at = k_base + (tokens * k_row)[:, :, None] + column
    v_at = v_base + (tokens * v_row)[:, :, None] + v_column
    # Both fetches are under way before the first is used.
    k = tl.load(k_at, mask=live[:, :, None] & (column < DIMS[0]), other=0.0)
    v = tl.load(v_at, mask=live[:, :, None] & (v_column < DIMS[2]), other=0.0)
    scores = tl.sum(q[None, :, :] * k.to(tl.float32), 2)
    if NEGATE:
        scores = -scores
    unit = scale
    if MODIFY is not None:
        scores = modified(scores, scale, who, who[2][None, :], tokens, edge, MODIFY)
        unit = LOG2_E
    scores = tl.where(live, scores, NEG_INF)
    highest = tl.maximum(peak, tl.max(scores, 0) * unit)
    base = tl.where(highest == NEG_INF, 0.0, highest)
    weights = tl.exp2(scores * unit - base[None, :])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 0)
    acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * v.to(tl.float32), 0)
    return highest, total, acc


@triton.jit
def join(peak, total, acc, other_peak, other_total, other_acc):
    """The state of both key sets together."""
    highest = tl.maximum(peak, other_peak)
    base = tl.where(highest == NEG_INF, 0.0, highest)
    mine, theirs = tl.exp2(peak - base), tl.exp2(other_peak - base)
    return highest, total * mine + other_total * theirs, acc * mine[:, None] + other_acc * theirs[:, None]


@triton.jit
def progression(p, rows, live, indptr, first, last, step, kv_len, FORM: tl.constexpr):
    """`(begin, step, count)` of the p-th run of keys of some rows; int64 [rows]."""
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
        for p in range(n_progressions(rows, live, indptr, n_offsets, FORM)):
            _, _, count = progression(p, rows, live, indptr, first, last, step, kv_len, FORM)
            total += count
    return total


@triton.jit
def walk(
    q, k_base, k_row, v_base, v_row, rows, start, stop, indptr, first, last, step, edges, n_offsets, kv_order, kv_len,
    who, scale,
    FORM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MODIFY: tl.constexpr, NEGATE: tl.constexpr,
    DIMS: tl.constexpr,
):  # fmt: skip
    """The state of rows that meet their keys `start … stop - 1`, KEYS at a time.

    who: (batch element, head, tokens of the rows, None, tables of the modifier), for generated functions.

    q: fp32 [ROWS, head_width]; rows, start, stop: int64 [ROWS]. The keys of a row are numbered in the order of its
    progressions; FORM "edges" has them in `first`, and where a modifier asks their numbers in `edges`.
    """
    peak, total, acc = empty_state(ROWS, DIMS[3])
    nth = tl.arange(0, KEYS).to(tl.int64)[:, None]
    live = start < stop
    if FORM == "edges":
        begin = tl.load(indptr + rows, mask=live, other=0) + start
        count = tl.where(live, stop - start, 0)
        for done in range(0, tl.max(count, 0).to(tl.int32), KEYS):
            is_key = nth + done < count[None, :]
            at = begin[None, :] + (nth + done)
            position = tl.load(first + at, mask=is_key, other=0)
            tokens = tokens_at(kv_order, position, is_key)
            edge = None
            if edges is not None:
                edge = tl.load(edges + at, mask=is_key, other=0)
            peak, total, acc = attend_singly(
                q, k_base, k_row, v_base, v_row, tokens, edge, is_key, who, peak, total, acc, scale, MODIFY, NEGATE,
                DIMS,
            )  # fmt: skip
    else:
        passed = rows * 0
        for p in range(n_progressions(rows, live, indptr, n_offsets, FORM)):
            begin, by, count = progression(p, rows, live, indptr, first, last, step, kv_len, FORM)
            low = tl.minimum(tl.maximum(start - passed, 0), count)
            high = tl.minimum(tl.maximum(stop - passed, 0), count)
            passed += count
            for done in range(0, tl.max(high - low, 0).to(tl.int32), KEYS):
                key = low[None, :] + (nth + done)
                is_key = key < high[None, :]
                position = tl.where(is_key, begin[None, :] + key * by[None, :], 0)
                tokens = tokens_at(kv_order, position, is_key)
                peak, total, acc = attend_singly(
                    q, k_base, k_row, v_base, v_row, tokens, None, is_key, who, peak, total, acc, scale, MODIFY, NEGATE,
                    DIMS,
                )  # fmt: skip
    return peak, total, acc


@triton.jit
def finish(out, lse, out_offsets, lse_offsets, inside, peak, total, acc, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr):
    """Writes the normalised rows, and their log-sum-exp where `lse` is not None."""
    column = tl.arange(0, V_WIDTH)
    # A sum that is not a number is not 0: it goes through to the output.
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    rows = (acc * inverse[:, None]).to(out.dtype.element_ty)
    tl.store(out + out_offsets[:, None] + column[None, :], rows, mask=inside[:, None] & (column[None, :] < V_DIM))
    if lse is not None:
        tl.store(lse + lse_offsets, tl.where(total == 0.0, NEG_INF, (peak + tl.log2(total)) * LN_2), mask=inside)


@triton.jit
def save(partial, slot_rows, inside, peak, total, acc, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr):
    """Keeps the state of one piece of a split unit; a saved row is [peak, total, acc...]."""
    column = tl.arange(0, V_WIDTH)
    at = partial + slot_rows * (V_DIM + 2)
    tl.store(at, peak, mask=inside)
    tl.store(at + 1, total, mask=inside)
    tl.store(at[:, None] + 2 + column[None, :], acc, mask=inside[:, None] & (column[None, :] < V_DIM))


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
    peak, total, acc = empty_state(ROWS, V_WIDTH)
    first_slot = tl.load(merge_indptr + merged)
    for i in range((tl.load(merge_indptr + merged + 1) - first_slot).to(tl.int32)):
        slot_row = (copy * n_slots + first_slot + i) * (BLOCK_Q * PACK) + row
        at = partial + slot_row * (V_DIM + 2)
        more_peak = tl.load(at, mask=inside, other=NEG_INF)
        more_total = tl.load(at + 1, mask=inside, other=0.0)
        is_value = inside[:, None] & (column[None, :] < V_DIM)
        more_acc = tl.load(at[:, None] + 2 + column[None, :], mask=is_value, other=0.0)
        peak, total, acc = join(peak, total, acc, more_peak, more_total, more_acc)
    out_offsets = batch * out_batch + head * out_head + token * out_row
    finish(out, lse, out_offsets, batch * lse_batch + head * lse_head + token, inside, peak, total, acc, V_DIM, V_WIDTH)
