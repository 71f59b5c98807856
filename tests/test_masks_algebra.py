"""Mask expressions: rows, degrees, equality, slices, transposes and text, against dense numpy."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_strategies import bound_masks, leaves, masks, shapes

from sparsec import masks as m
from sparsec.errors import MaskError
from sparsec.masks import derive


@settings(max_examples=200, deadline=None)
@given(bound_masks(), st.data())
def test_every_answer_is_the_dense_one(case, data):
    bound, dense = case
    assert np.array_equal(bound.to_dense(), dense)
    assert bound.nnz == dense.sum()
    assert bound.degrees("q").tolist() == dense.sum(axis=1).tolist()
    assert bound.degrees("kv").tolist() == dense.sum(axis=0).tolist()
    assert bound.degrees("q").dtype == bound.degrees("kv").dtype == np.int64
    csr = bound.to_csr()
    assert csr.dtype == bool
    assert np.array_equal(csr.toarray(), dense)
    assert np.array_equal(bound.T.to_dense(), dense.T)
    start = data.draw(st.integers(0, bound.q_len))
    stop = data.draw(st.integers(start, bound.q_len))
    rows = bound.rows(start, stop)
    assert rows.n_rows == stop - start
    listed = [
        sorted(
            k
            for r in range(rows.indptr[i], rows.indptr[i + 1])
            for k in range(rows.start[r], rows.stop[r], rows.step[r])
        )
        for i in range(rows.n_rows)
    ]
    row = np.repeat(np.arange(rows.n_rows), np.diff(rows.indptr))
    assert ((np.diff(rows.start) > 0) | (np.diff(row) > 0)).all()
    assert ((rows.stop - 1 - rows.start) % rows.step == 0).all()
    assert ((rows.stop - rows.start > 1) | (rows.step == 1)).all()
    assert listed == [np.flatnonzero(row).tolist() for row in dense[start:stop]]


@settings(max_examples=100, deadline=None)
@given(bound_masks())
def test_text_reads_back(case):
    bound, dense = case
    again = m.parse(repr(bound.mask))
    assert again == bound.mask
    assert hash(again) == hash(bound.mask)
    assert np.array_equal(again.bind(*bound.shape).to_dense(), dense)
    assert eval(repr(bound), vars(m)) == bound


@settings(max_examples=60, deadline=None)
@given(bound_masks())
def test_offsets_and_predicates_mean_the_mask(case):
    bound, dense = case
    q, kv = np.indices(bound.shape)
    if (offsets := bound.offsets) is not None:
        held = {d for a, b, s in zip(offsets.start, offsets.stop, offsets.step, strict=True) for d in range(a, b, s)}
        assert np.array_equal(np.isin(kv - q, list(held)), dense)
    if (predicate := bound.predicate) is not None:
        got = np.broadcast_to(predicate.evaluate(q_idx=q, kv_idx=kv), bound.shape)
        assert np.array_equal(got, dense)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equal_masks_are_equal_when_dense(data):
    shape = data.draw(shapes)
    (a, dense_a), (b, dense_b) = data.draw(masks(shape, 1)), data.draw(masks(shape, 1))
    if a == b:
        assert np.array_equal(dense_a, dense_b)
    if a.bind(*shape) == b.bind(*shape):
        assert np.array_equal(dense_a, dense_b)
        assert a.bind(*shape).digest == b.bind(*shape).digest


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_laws_hold_by_meaning(data):
    shape = data.draw(shapes)
    a, b, c = (data.draw(leaves(shape))[0] for _ in range(3))
    for left, right in (
        (a & b, b & a),
        (a | b, b | a),
        ((a & b) & c, a & (b & c)),
        ((a | b) | c, c | (b | a)),
        (a & a, a),
        (a | a, a),
        (~~a, a),
        (~(a & b), ~a | ~b),
        (~(a | b), ~a & ~b),
        (a - b, a & ~b),
        ((a & b).T, a.T & b.T),
        ((~a).T, ~a.T),
        (a.T.T, a),
        (a & m.full(), a),
        (a | ~m.full(), a),
    ):
        assert left == right
        assert hash(left) == hash(right)
    assert (a | m.full()).bind(*shape) == m.full().bind(*shape)
    assert (a - m.full()).bind(*shape) == (~m.full()).bind(*shape)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (m.causal() & m.window(5, 5), m.window(5, 0)),
        (m.window(3, 0) | m.window(0, 4), m.window(3, 4)),
        (m.causal() | ~m.causal(), m.full()),
        (m.causal().T & m.causal(), m.window(0, 0)),
        (m.strided(2) & m.strided(3), m.strided(6)),
        (m.strided(2) | m.strided(4), m.strided(2)),
        (m.strided(1), m.full()),
        (m.dilated(9, 1), m.window(9, 9)),
        (m.dilated(7, 3), m.dilated(6, 3)),
        (m.strided(2) & m.window(4, 4), m.dilated(4, 2)),
        (m.global_tokens([0, 1, 2]), m.global_tokens(3)),
        (m.documents([3, 0, 4]), m.documents(cu_seqlens=[0, 3, 7])),
        (m.longformer(8, 2), m.window(4, 4) | m.global_tokens(2)),
        (m.longformer(8, 2, 3), m.dilated(12, 3) | m.global_tokens(2)),
        (m.blocks(m.causal(), 4) & m.blocks(m.window(2, 2), 4), m.blocks(m.window(2, 0), 4)),
        (m.per_head([m.causal(), m.full()]) & m.window(2, 2), m.per_head([m.window(2, 0), m.window(2, 2)])),
        (m.prefix(3).T & m.prefix(3), m.prefix(3) & m.prefix(3).T),
        (m.window(9, 9)[2:8, 2:8], m.full()[0:6, 0:6]),
    ],
    ids=str,
)
def test_equal_by_meaning(left, right):
    assert left == right
    assert hash(left) == hash(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (m.causal(), m.causal("bottom_right")),
        (m.window(3, 0), m.window(0, 3)),
        (m.random_edges(3, 0), m.random_edges(3, 1)),
        (m.global_tokens(3), m.prefix(3)),
        (m.causal(), m.per_head([m.causal()])),
    ],
    ids=str,
)
def test_different_masks_differ(left, right):
    assert left != right


def test_bound_masks_compare_at_their_lengths():
    assert m.causal("bottom_right").bind(8) == m.causal().bind(8)
    assert m.causal("bottom_right").bind(8, 12) != m.causal().bind(8, 12)
    assert m.window(99, 99).bind(8) == m.full().bind(8)
    assert m.full().bind(8) != m.full().bind(8, 9)


def test_digest_is_the_same_in_another_process():
    mask = m.bigbird(2, 3, 1, 1, 0) & ~m.documents([3, 9, 4]) | m.causal("bottom_right")
    code = f"from sparsec.masks import *; print(parse({str(repr(mask))!r}).bind(16).digest)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == mask.bind(16).digest


@pytest.mark.parametrize("shape", [(90, 90), (90, 71), (71, 90)], ids=str)
@pytest.mark.parametrize(
    "mask",
    [
        m.window(5, 3) | m.global_tokens(4),
        m.dilated(20, 4) | m.global_tokens([0, 9, 10, 69]),
        m.window(3, 0) | m.strided(11) | m.prefix(3),
        m.causal("bottom_right") | m.prefix(5).T,
    ],
    ids=str,
)
def test_degrees_of_unions_with_tokens_need_no_rows(mask, shape, monkeypatch):
    bound = mask.bind(*shape)
    dense = bound.to_dense()
    monkeypatch.setattr(derive, "degrees", None)
    assert bound.degrees("q").tolist() == dense.sum(axis=1).tolist()
    assert bound.degrees("kv").tolist() == dense.sum(axis=0).tolist()


def test_slices():
    assert m.causal()[2:6, 0:4] == m.window(99, 2)[0:4, 0:4]
    inner = m.documents([4, 6])[3:7, :]
    assert inner.bind().shape == (4, 10)
    bound = m.random_edges(2, 0).bind(12)
    assert np.array_equal(bound[3:9, 2:11].to_dense(), bound.to_dense()[3:9, 2:11])


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: m.causal()[0:8:2, 0:8], "step 2"),
        (lambda: m.causal()[0:8], "two slices"),
        (lambda: m.causal()[0:, 0:8], "no stop"),
        (lambda: m.causal("bottom_right")[0:4, 0:4], "bind it first"),
        (lambda: m.random_edges(2, 0)[0:4, 0:4], "bind it first"),
        (lambda: m.documents([4])[0:5, 0:2], "stop ≤ 4"),
        (lambda: m.documents([4])[2:2, 0:2], "0 ≤ start < stop"),
        (lambda: m.documents([4]).bind(5), "cannot be bound to q_len = 5"),
        (lambda: m.documents([4]) & m.documents([5]) == 1 or (m.documents([4]) & m.documents([5])).bind(4), "4 and 5"),
        (lambda: m.causal().bind(), "does not know its length"),
        (lambda: m.causal().bind(0), "q_len = 0 must be ≥ 1"),
        (lambda: m.causal().bind(2.5), "must be an int"),
        (lambda: bool(m.causal()), "no truth value"),
        (lambda: m.full().bind(2**15).to_dense(), "268,435,456"),
        (lambda: m.causal().bind(4).degrees("k"), "axis"),
        (lambda: m.causal().bind(4).rows(2, 5), "0 ≤ start"),
        (lambda: m.per_head([m.causal(), m.full()]).bind(4).nnz, r"select\(batch, head\)"),
        (lambda: m.per_head([m.causal(), m.full()]).bind(4).select(0, 2), "no head 2"),
        (lambda: (m.per_head([m.full()] * 2) & m.per_head([m.full()] * 3)).bind(4).n_heads, "2 and 3 heads"),
    ],
)
def test_refusals_say_what_and_what_to_do(make, complaint):
    with pytest.raises(MaskError, match=complaint):
        make()


def test_varying_masks_select_and_distribute():
    mask = m.per_batch([m.per_head([m.causal(), m.window(1, 1)]), m.per_head([m.full(), m.prefix(2)])]) - m.prefix(1)
    bound = mask.bind(6)
    assert (bound.n_batch, bound.n_heads) == (2, 2)
    assert bound.varies_by_head
    assert bound.varies_by_batch
    for batch, members in enumerate([[m.causal(), m.window(1, 1)], [m.full(), m.prefix(2)]]):
        for head, member in enumerate(members):
            want = member.bind(6).to_dense() & ~m.prefix(1).bind(6).to_dense()
            assert np.array_equal(bound.select(batch, head).to_dense(), want)
    assert m.parse(repr(mask)) == mask
    assert m.random_blocks(2, 4, [0, 1, 2]).n_heads == 3
    assert m.bigbird(4, 3, 2, 1, seed=[5, 6]).bind(32).select(head=1) == m.bigbird(4, 3, 2, 1, 6).bind(32)


def test_masks_of_more_than_two_to_the_31_edges():
    n = 2_000_000
    bound = m.window(2000, 0).bind(n)
    nnz = n * 2001 - 2000 * 2001 // 2
    assert bound.nnz == nnz > 2**31
    assert bound.degrees("q").sum() == bound.degrees("kv").sum() == nnz
    assert bound.tiles(128, 128).nnz == nnz
    union = (m.window(2000, 0) | m.global_tokens(16)).bind(n)
    assert union.tiles(128, 128).nnz == union.nnz == 16 * n + 16 * n - 256 + nnz - _band_in_global(n, 2000, 16)


def _band_in_global(n, left, g):
    """Pairs of window(left, 0) with a query or a key below g."""
    in_rows = sum(q + 1 for q in range(g))
    in_columns = sum(min(left, n - 1 - kv) + 1 for kv in range(g))
    both = sum(q + 1 for q in range(g))
    return in_rows + in_columns - both


def test_dense_masks_cost_their_ranges_and_not_their_area():
    n = 10_000_000
    assert m.causal().bind(n).nnz == n * (n + 1) // 2
    assert (~m.window(10, 10)).bind(n).nnz == n * n - (21 * n - 110)
    lengths = [1000] * 10_000
    causal_documents = (m.documents(lengths) & m.causal()).bind()
    assert causal_documents.tiles(128, 128, range(4)).n_tiles == 10
