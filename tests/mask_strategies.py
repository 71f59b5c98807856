"""Random masks beside their dense meaning, for property tests."""

from __future__ import annotations

import naive_masks as naive
import numpy as np
from hypothesis import strategies as st

from sparsec import masks as m

SHAPES = [(37, 37), (29, 53), (53, 29), (64, 64), (1, 9), (9, 1), (40, 17)]


@st.composite
def leaves(draw, shape):
    """A mask that fits `shape`, and its dense form."""
    q_len, kv_len = shape
    small = st.integers(0, 12)
    kinds = [
        "full",
        "causal",
        "bottom_right",
        "window",
        "dilated",
        "dilated_2d",
        "strided",
        "tokens",
        "listed",
        "prefix",
    ]
    kinds += ["blocks", "dense", "block_mask", "mod"]
    if q_len == kv_len:
        kinds += ["documents", "neighborhood"]
    match draw(st.sampled_from(kinds)):
        case "full":
            return m.full(), naive.full(shape)
        case "causal":
            return m.causal(), naive.causal(shape)
        case "bottom_right":
            return m.causal("bottom_right"), naive.causal(shape, "bottom_right")
        case "window":
            left, right = draw(small), draw(small)
            return m.window(left, right), naive.window(shape, left, right)
        case "dilated":
            reach, dilation = draw(st.integers(0, 60)), draw(st.integers(1, 9))
            return m.dilated(reach, dilation), naive.dilated(shape, reach, dilation)
        case "dilated_2d":
            block, dilation = draw(st.integers(1, 20)), draw(st.integers(1, 5))
            return m.dilated_2d(block, dilation), naive.dilated_2d(shape, block, min(dilation, block))
        case "strided":
            stride = draw(st.integers(1, 30))
            return m.strided(stride), naive.strided(shape, stride)
        case "tokens":
            n = draw(small)
            return m.global_tokens(n), naive.global_tokens(shape, n)
        case "listed":
            tokens = draw(st.lists(st.integers(0, max(shape) - 1), max_size=6))
            return m.global_tokens(tokens), naive.global_tokens(shape, tokens)
        case "prefix":
            n = draw(small)
            return m.prefix(n), naive.prefix(shape, n)
        case "documents":
            cuts = sorted(draw(st.lists(st.integers(0, q_len), max_size=5)))
            lengths = np.diff([0, *cuts, q_len]).tolist()
            return m.documents(lengths), naive.documents(shape, lengths)
        case "neighborhood":
            kernel = draw(st.integers(1, min(7, q_len)))
            stride = draw(st.integers(1, kernel))
            dilation = draw(st.integers(1, q_len // kernel))
            causal = draw(st.booleans())
            dense = naive.neighborhood((q_len,), (kernel,), (stride,), (dilation,), (causal,))
            return m.neighborhood(q_len, kernel, stride, dilation, causal), dense
        case "blocks":
            block = draw(st.sampled_from([1, 3, 8, 16]))
            n_q, n_kv = -(-q_len // block), -(-kv_len // block)
            pattern = np.random.default_rng(draw(st.integers(0, 99))).random((n_q, n_kv)) < 0.4
            return m.blocks(pattern, block), naive.blocks(shape, pattern, block)
        case "dense":
            rng = np.random.default_rng(draw(st.integers(0, 99)))
            dense = rng.random(shape) < draw(st.sampled_from([0.02, 0.3, 0.9]))
            return m.from_dense(dense), dense
        case "block_mask":
            block = draw(st.sampled_from([4, 8]))
            inner = m.window(1, 0) | m.global_tokens(1)
            n_q, n_kv = -(-q_len // block), -(-kv_len // block)
            pattern = naive.window((n_q, n_kv), 1, 0) | naive.global_tokens((n_q, n_kv), 1)
            return m.blocks(inner, block), naive.blocks(shape, pattern, block)
        case "mod":
            size = draw(st.integers(2, 9))
            mask = m.from_mask_mod(lambda b, h, q, kv: (q // size == kv // size) | (kv < 2))
            return mask, naive.pairs(shape, lambda q, kv: q // size == kv // size or kv < 2)
    raise AssertionError


@st.composite
def masks(draw, shape, depth=2):
    """A composition that fits `shape`, and its dense form."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(leaves(shape))
    kind = draw(st.sampled_from(["and", "or", "sub", "not", "transpose", "slice"]))
    if kind == "transpose":
        mask, dense = draw(masks((shape[1], shape[0]), depth - 1))
        return mask.T, dense.T
    if kind == "slice":
        left, top = draw(st.integers(0, 5)), draw(st.integers(0, 5))
        right, bottom = draw(st.integers(0, 5)), draw(st.integers(0, 5))
        within = (top + shape[0] + bottom, left + shape[1] + right)
        mask, dense = draw(masks(within, depth - 1))
        part = mask.bind(*within)[top : top + shape[0], left : left + shape[1]]
        return part.mask, dense[top : top + shape[0], left : left + shape[1]]
    a, dense_a = draw(masks(shape, depth - 1))
    if kind == "not":
        return ~a, ~dense_a
    b, dense_b = draw(masks(shape, depth - 1))
    match kind:
        case "and":
            return a & b, dense_a & dense_b
        case "or":
            return a | b, dense_a | dense_b
    return a - b, dense_a & ~dense_b


shapes = st.sampled_from(SHAPES)


@st.composite
def bound_masks(draw):
    """A bound mask, and its dense form."""
    shape = draw(shapes)
    mask, dense = draw(masks(shape))
    assert dense.shape == shape
    return mask.bind(*shape), dense
