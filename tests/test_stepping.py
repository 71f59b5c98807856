"""Generation: the newest tokens over a cache that grows, against the same rows of the whole mask."""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np
import pytest
import torch

import sparsec
from sparsec import buffers, score, stepping
from sparsec import masks as m
from sparsec.backends import reference
from sparsec.errors import MaskError, SparsecError, UnsupportedError

CAPACITY = 150
MASKS = {
    "window-global": m.window(20, 0) | m.global_tokens(3),
    "causal": m.causal(),
    "looks-ahead": m.window(5, 9) | m.strided(7) | m.random_edges(11, seed=2),
    "ahead-in-steps": m.strided(3) - m.causal(),
    "empty-rows": m.dilated_2d(50, 3),
    "heads": m.per_head([m.window(9, 0), m.causal(), m.window(9, 0), m.strided(4)]),
    "batch": m.per_batch([m.window(9, 0), m.causal() & m.strided(3)]),
}


def _tensors(q_heads=4, kv_heads=2, head_dim=24, v_dim=40, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(7)
    shapes = ((q_heads, head_dim), (kv_heads, head_dim), (kv_heads, v_dim))
    return tuple(torch.randn(batch, h, CAPACITY, d, generator=generator).to(dtype) for h, d in shapes)


@cache
def _allowed(mask, dtype, heads):
    """Of one head of the whole mask: a single row says too little of what rounding does."""
    arrays = [tensor[0, 0].double().numpy() for tensor in _tensors(*heads, dtype=dtype)]
    name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    return reference.tolerances(*arrays, mask.bind(CAPACITY).select(0, 0), arrays[0].shape[1] ** -0.5, name)


def _check(mask, q, k, v, first, n, out, lse, modifier=None):
    """The rows `first … n - 1` of the mask, columns before `n`."""
    bound = mask.bind(CAPACITY)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            rows = bound.select(b, h)[first:n, :n]
            arrays = [t.double().numpy() for t in (q[b, h, first:n], k[b, h // group, :n], v[b, h // group, :n])]
            places = None if modifier is None else reference.Modifier(modifier, b, h, np.arange(first, n))
            scale = q.shape[3] ** -0.5
            expected, expected_lse = reference.attention(*arrays, rows, scale, modifier=places)
            allowed, allowed_lse = _allowed(mask, q.dtype, (q.shape[1], k.shape[1]))
            assert np.abs(out[b, h].double().numpy() - expected).max() <= allowed
            close = np.isclose(lse[b, h].double().numpy(), expected_lse, rtol=0.0, atol=allowed_lse)
            assert close.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", MASKS)
def test_steps_are_rows_of_the_mask(name, dtype, monkeypatch):
    mask = MASKS[name]
    q, k, v = _tensors(dtype=dtype)
    # Keys that are not there yet must not be read.
    cache_k, cache_v = torch.full_like(k, math.nan), torch.full_like(v, math.nan)
    empty = buffers.empty
    monkeypatch.setattr(buffers, "empty", lambda *a, **o: empty(*a, **o).fill_(math.nan))
    attn = sparsec.compile(mask, CAPACITY, backend="cpu")
    n = 0
    for q_len in (37, 1, 1, 16, 1, 3, 90, 1):
        first, n = n, n + q_len
        cache_k[:, :, first:n], cache_v[:, :, first:n] = k[:, :, first:n], v[:, :, first:n]
        out, lse = attn.step(q[:, :, first:n], cache_k[:, :, :n], cache_v[:, :, :n], return_lse=True)
        _check(mask, q, k, v, first, n, out, lse)
    assert n == CAPACITY
    assert torch.equal(attn.step(q[:, :, -1:], k, v), out)


def test_a_step_plans_nothing(monkeypatch):
    q, k, v = _tensors()
    attn = sparsec.compile(MASKS["window-global"], CAPACITY)
    attn.step(q[:, :, 39:40], k[:, :, :40], v[:, :, :40])
    from sparsec import runtime

    monkeypatch.setattr(runtime, "plan", lambda *_, **__: pytest.fail("planned again"))
    for n in (41, 42, 7, CAPACITY):
        _check(
            MASKS["window-global"],
            *(q, k, v, n - 1, n),
            *attn.step(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], return_lse=True),
        )


def test_keys_are_split_among_threads(monkeypatch):
    monkeypatch.setattr(stepping, "_MIN_PIECE", 8)
    q, k, v = _tensors(8, 1)
    attn = sparsec.compile(MASKS["looks-ahead"], CAPACITY)
    out, lse = attn.step(q[:1, :, 100:104], k[:1, :, :104], v[:1, :, :104], return_lse=True)
    ((part,),) = attn._stepper._few.values()
    assert part.launch(100, 104, 1).work.schedule.n_items > 1
    _check(MASKS["looks-ahead"], q[:1], k, v, 100, 104, out, lse)


@pytest.mark.parametrize("q_len", [1, 30])
def test_score_modifiers_count_positions_from_the_beginning(q_len):
    q, k, v = _tensors()
    modifier = score.alibi([0.5, 0.25, 0.125, 1.0])
    attn = sparsec.compile(m.causal(), CAPACITY, score_mod=modifier)
    for n in (60, 61):
        out, lse = attn.step(q[:, :, n - q_len : n], k[:, :, :n], v[:, :, :n], return_lse=True)
        _check(m.causal(), q, k, v, n - q_len, n, out, lse, modifier)


@pytest.mark.parametrize("q_len", [1, 30])
def test_sinks_enter_a_step(q_len):
    q, k, v = _tensors()
    logits = torch.randn(4, generator=torch.Generator().manual_seed(1))
    mask = MASKS["window-global"]
    plain, sunk = (sparsec.compile(mask, CAPACITY, score_mod=each) for each in (None, score.sinks(logits)))
    some = q[:, :, 90 - q_len : 90], k[:, :, :90], v[:, :, :90]
    out, lse = plain.step(*some, return_lse=True)
    joined = torch.logaddexp(lse.double(), logits.double()[:, None])
    wanted = out.double() * (lse.double() - joined).exp().unsqueeze(-1)
    got, got_lse = sunk.step(*some, return_lse=True)
    torch.testing.assert_close(got_lse.double(), joined, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(sunk.step(*some), got)


def test_a_prompt_that_others_push_out_runs_all_the_same(monkeypatch):
    monkeypatch.setattr(stepping, "_PROMPTS_KEPT", 0)
    q, k, v = torch.randn(3, 1, 2, 80, 16)
    attn = sparsec.compile(m.window(9, 0), 90)
    torch.testing.assert_close(attn.step(q, k, v), sparsec.attention(q, k, v, m.window(9, 0)))


def test_layouts_and_strided_caches():
    q, k, v = _tensors()
    mask = MASKS["window-global"]
    expected = sparsec.compile(mask, CAPACITY).step(q[:, :, 70:72], k[:, :, :72], v[:, :, :72])
    bshd = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    attn = sparsec.compile(mask, CAPACITY, layout="bshd")
    got = attn.step(bshd[0][:, 70:72], bshd[1][:, :72], bshd[2][:, :72])
    torch.testing.assert_close(got.transpose(1, 2), expected)


def test_what_is_no_step():
    q, k, v = _tensors()
    attn = sparsec.compile(m.causal(), CAPACITY)
    longer = torch.cat((k, k), dim=2)
    for tried, asked, found in (
        (attn, (q[:, :, :1], longer, torch.cat((v, v), dim=2)), "under a mask of 150 tokens"),
        (attn, (q, k[:, :, :9], v[:, :, :9]), "150 queries over 9 keys"),
        (sparsec.compile(m.causal(), (3, CAPACITY)), (q[:, :, :1], k, v), "bound to 3 queries and 150 keys"),
    ):
        with pytest.raises(MaskError, match=re.escape(found)):
            tried.step(*asked)
    with pytest.raises(UnsupportedError, match="no backward pass"):
        attn.step(q[:, :, :1].requires_grad_(), k, v)
    with pytest.raises(UnsupportedError, match="steps run on row_traversal"):
        sparsec.compile(m.causal(), CAPACITY, template="block_sparse").step(q[:, :, :1], k, v)
    # Rows in another order of tokens would be written where others belong.
    with pytest.raises(UnsupportedError, match="steps keep the tokens' own order"):
        sparsec.compile(m.dilated(40, 4), CAPACITY, reorder="force").step(q[:, :, :1], k, v)
    with pytest.raises(SparsecError, match="compile was told q_heads=8"):
        sparsec.compile(m.causal(), CAPACITY, q_heads=8).step(q[:, :, :1], k, v)


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("q_len", [1, 5, 64])
@pytest.mark.parametrize("heads", [(4, 4), (8, 1)], ids=["mha", "mqa"])
def test_lengths_that_differ(align, q_len, heads):
    q, k, v = _tensors(*heads)
    mask = m.causal(align=align)
    out = sparsec.compile(mask, (q_len, CAPACITY))(q[:, :, :q_len], k, v)
    allowed = torch.tensor(mask.bind(q_len, CAPACITY).to_dense())
    shift = CAPACITY - q_len if align == "bottom_right" else 0
    assert torch.equal(allowed, torch.ones(q_len, CAPACITY, dtype=torch.bool).tril(shift))
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(t.double() for t in (q[:, :, :q_len], k, v)), attn_mask=allowed, enable_gqa=True
    )
    torch.testing.assert_close(out.double(), dense, atol=2e-6, rtol=0.0)
