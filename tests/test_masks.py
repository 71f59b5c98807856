"""Every constructor against its naive definition, and what each refuses."""

from __future__ import annotations

import math
import sys

import naive_masks as naive
import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec import masks as m
from sparsec.errors import MaskError
from sparsec.masks import random, ranges
from sparsec.masks.random import permuted


@st.composite
def neighborhoods(draw):
    rank = draw(st.integers(1, 3))
    grid = tuple(draw(st.integers(1, {1: 40, 2: 9, 3: 5}[rank])) for _ in range(rank))
    kernel = tuple(draw(st.integers(1, size)) for size in grid)
    stride = tuple(draw(st.integers(1, k)) for k in kernel)
    dilation = tuple(draw(st.integers(1, size // k)) for size, k in zip(grid, kernel, strict=True))
    causal = tuple(draw(st.booleans()) for _ in grid)
    return grid, kernel, stride, dilation, causal


@settings(max_examples=100, deadline=None)
@given(neighborhoods())
def test_neighborhood_is_the_published_one(arguments):
    dense = naive.neighborhood(*arguments)
    mask = m.neighborhood(*arguments)
    bound = mask.bind()
    assert np.array_equal(bound.to_dense(), dense)
    assert bound.nnz == dense.sum()
    assert bound.degrees("q").tolist() == dense.sum(axis=1).tolist()
    assert bound.degrees("kv").tolist() == dense.sum(axis=0).tolist()
    assert np.array_equal(bound.T.to_dense(), dense.T)
    assert bound.T.degrees("q").tolist() == dense.sum(axis=0).tolist()
    q, kv = np.indices(bound.shape)
    assert np.array_equal(np.broadcast_to(bound.predicate.evaluate(q_idx=q, kv_idx=kv), bound.shape), dense)
    assert m.parse(repr(mask)) == mask


def test_neighborhood_of_every_query_has_the_whole_kernel():
    assert set(m.neighborhood((11, 13), (5, 7)).bind().degrees("q").tolist()) == {35}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(0, 2**64 - 1), st.data())
def test_random_edges(kv_len, seed, data):
    degree = data.draw(st.integers(0, kv_len))
    bound = m.random_edges(degree, seed).bind(20, kv_len)
    dense = bound.to_dense()
    assert set(dense.sum(axis=1).tolist()) == {degree}
    assert np.array_equal(bound[5:9, 0:kv_len].to_dense(), dense[5:9])


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 50), st.integers(0, 6), st.data())
def test_random_edges_that_avoid(kv_len, degree, data):
    degree = min(degree, kv_len)
    avoiding = data.draw(st.sampled_from([m.window(3, 2), m.strided(3), m.global_tokens(4), m.full()]))
    shape = (30, kv_len)
    avoided = avoiding.bind(*shape).to_dense()
    mask = m.random_edges(degree, 7, avoiding=avoiding)
    dense = mask.bind(*shape).to_dense()
    assert not (dense & avoided).any()
    assert dense.sum(axis=1).tolist() == np.minimum(degree, kv_len - avoided.sum(axis=1)).tolist()
    assert m.parse(repr(mask)) == mask


def test_no_random_blocks_beyond_the_window():
    # The last rows have no window among so few keys, so that nothing at all is avoided or drawn there.
    bound = m.bigbird(3, 1, 0, 0, 3).bind(33, 15)
    assert np.array_equal(bound.to_dense(), naive.blocks((33, 15), np.eye(11, 5, dtype=bool), 3))
    assert bound.rows(20, 33).nnz == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**64 - 1), st.data())
def test_permutations_are_the_network_as_it_is_defined(length, seed, data):
    """In Python's own integers, one position at a time."""
    count = data.draw(st.integers(0, length))
    rows = data.draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
    found = permuted(seed, np.array(rows), count, length)
    a = math.isqrt(length - 1) + 1
    b = -(-length // a)

    def mix(z):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    def walk(row, position):
        x, y = divmod(position, b)
        for i in range(6):
            key = mix(mix((seed + i) % 2**64) ^ row)
            if i % 2 == 0:
                x = (x + mix(y ^ key) % a) % a
            else:
                y = (y + mix(x ^ key) % b) % b
        position = x * b + y
        return position if position < length else walk(row, position)

    assert found.tolist() == [[walk(row, position) for position in range(count)] for row in rows]


def test_random_edges_of_many_chunks(monkeypatch):
    """Degrees and CSR are drawn without rows being made, some rows at a time and on several threads."""
    bound = m.random_edges(5, 11).bind(300, 90)
    rows = bound.rows()
    monkeypatch.setattr(random, "KEYS_A_CHUNK", 64)
    monkeypatch.setattr(random, "WALKED_AT_ONCE", 32)
    csr = bound.to_csr()
    assert np.array_equal(csr.indices, ranges.to_edges(rows)[1])
    assert np.array_equal(bound.degrees("kv"), csr.sum(axis=0))
    assert np.array_equal(bound.rows().start, rows.start)


def test_random_edges_are_drawn_evenly():
    counts = m.random_edges(8, 3).bind(20_000, 100).degrees("kv")
    assert abs(counts - 1600).max() < 6 * np.sqrt(1600)
    assert m.random_edges(8, 3) != m.random_edges(8, 4)


def test_bigbird_blocks():
    bound = m.bigbird(4, 3, 2, 3, 0).bind(64)
    blocks = bound.to_dense()[::4, ::4]
    assert np.array_equal(np.kron(blocks, np.ones((4, 4), bool)), bound.to_dense())
    assert blocks[0].all()
    assert blocks[-1].all()
    assert blocks[:, 0].all()
    assert blocks[:, -1].all()
    # Window, two global and three random blocks; beside a global block the window's own block is one of them.
    assert blocks[2:-2].sum(axis=1).tolist() == [8] * 12
    assert blocks[[1, -2]].sum(axis=1).tolist() == [7, 7]


def test_longformer_window_is_all_told():
    dense = m.longformer(4, [5]).bind(12).to_dense()
    assert np.array_equal(dense, naive.window((12, 12), 2, 2) | naive.global_tokens((12, 12), [5]))
    dense = m.longformer(4, 1, 3).bind(20).to_dense()
    assert np.array_equal(dense, naive.dilated((20, 20), 6, 3) | naive.global_tokens((20, 20), 1))


def test_sparse_arrays_mean_their_dense_form():
    dense = np.random.default_rng(0).random((12, 20)) < 0.3
    for kind in (sp.coo_array, sp.csr_array, sp.csc_array, sp.bsr_array, sp.csr_matrix):
        assert np.array_equal(m.from_sparse(kind(dense)).bind().to_dense(), dense)
        assert m.from_sparse(kind(dense)) == m.from_dense(dense)
    # Explicit zeros are no edges; repeated entries are one.
    coo = sp.coo_array(([1.0, 0.0, 2.0, 3.0, 1.0, -1.0], ([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 0, 0])), shape=(3, 2))
    assert np.array_equal(m.from_sparse(coo).bind().to_dense(), coo.toarray() != 0)


def test_a_csr_is_the_callers_own():
    """SciPy drops zeros in place: the mask must not notice."""
    dense = np.random.default_rng(1).random((12, 20)) < 0.3
    mask = m.from_dense(dense)
    csr = mask.bind().to_csr()
    csr.data[::2] = False
    csr.eliminate_zeros()
    assert np.array_equal(mask.bind().to_dense(), dense)
    assert mask == m.from_dense(dense)


def test_torch_sparse_tensors():
    torch = pytest.importorskip("torch")
    dense = torch.rand(8, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    for convert in ("to_sparse_coo", "to_sparse_csr"):
        sparse = getattr(dense.to(torch.float32), convert)()
        assert np.array_equal(m.from_sparse(sparse).bind().to_dense(), dense.numpy())
    sparse = dense.to(torch.float32).to_sparse_bsr((4, 4))
    assert np.array_equal(m.from_sparse(sparse).bind().to_dense(), dense.numpy())
    assert np.array_equal(m.from_sparse(dense.to(torch.bfloat16).to_sparse_coo()).bind().to_dense(), dense.numpy())
    assert m.from_dense(dense) == m.from_dense(dense.numpy())
    tiny = torch.tensor([[1e-300, 0.0], [0.0, 5e-324]], dtype=torch.float64).to_sparse_coo()
    assert m.from_sparse(tiny) == m.from_dense(np.eye(2, dtype=bool))
    with pytest.raises(MaskError, match="NaN"):
        m.from_sparse(torch.tensor([[float("nan"), 0.0]]).to_sparse_coo())


def test_graphs():
    directed = nx.DiGraph([("a", "b"), ("b", "c"), ("c", "c")])
    want = np.array([[0, 1, 0], [0, 0, 1], [0, 0, 1]], bool)
    assert np.array_equal(m.from_graph(directed).bind().to_dense(), want)
    undirected = nx.Graph([(0, 1), (1, 2), (2, 2)])
    assert np.array_equal(m.from_graph(undirected).bind().to_dense(), want | want.T)
    index = np.array([[0, 1, 2, 0], [1, 2, 2, 1]])
    assert np.array_equal(m.from_graph(index).bind().to_dense(), want)
    assert m.from_graph(index, num_nodes=5).bind().shape == (5, 5)


def test_big_arrays_are_short_in_str_and_whole_in_repr():
    mask = m.documents([3] * 100)
    assert len(str(mask)) < 40
    assert m.parse(repr(mask)) == mask
    assert m.from_csr(np.arange(101), np.arange(100), 100) == m.parse(
        repr(m.from_csr(np.arange(101), np.arange(100), 100))
    )


def test_masks_cannot_be_changed_through_what_made_them():
    dense = np.eye(4, dtype=bool)
    lengths = np.array([2, 2])
    a, b = m.from_dense(dense), m.documents(lengths)
    before = a.bind().to_dense().copy(), b.bind().to_dense().copy()
    dense[:] = True
    lengths[:] = 1
    assert np.array_equal(a.bind().to_dense(), before[0])
    assert np.array_equal(b.bind().to_dense(), before[1])
    indices = np.array([0, 1])
    c = m.from_csr([0, 1, 2], indices, 2)
    indices[:] = 0
    assert np.array_equal(c.bind().to_dense(), np.eye(2, dtype=bool))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: m.causal("left"), "top_left"),
        (lambda: m.window(-3, 2), "holds no key"),
        (lambda: m.window(1.5, 0), "must be an int"),
        (lambda: m.dilated(4, 0), "dilation = 0"),
        (lambda: m.dilated(-1, 1), "reach = -1"),
        (lambda: m.strided(0), "stride = 0"),
        (lambda: m.dilated_2d(0, 1), "block = 0"),
        (lambda: m.global_tokens(-1), "-1"),
        (lambda: m.global_tokens([0, -4]), "index -4 is negative"),
        (lambda: m.global_tokens([0.5]), "flat sequence of ints"),
        (lambda: m.global_tokens([9]).bind(8), "token 9 does not exist"),
        (lambda: m.prefix(-2), "-2"),
        (m.documents, "either lengths or cu_seqlens"),
        (lambda: m.documents([3], cu_seqlens=[0, 3]), "either lengths or cu_seqlens"),
        (lambda: m.documents([3, -1]), "length 1 is -1"),
        (lambda: m.documents([]), "no tokens"),
        (lambda: m.documents(cu_seqlens=[1, 2]), "begin at 0"),
        (lambda: m.documents(cu_seqlens=[0, 5, 3]), "decreases from 5 to 3"),
        (lambda: m.neighborhood((4, 4, 4, 4), 1), "4 dimensions"),
        (lambda: m.neighborhood(8, 5, dilation=2), "does not fit 8"),
        (lambda: m.neighborhood(8, 3, stride=4), "stride 4 is more than the kernel 3"),
        (lambda: m.neighborhood((8, 8), (3, 3, 3)), "kernel"),
        (lambda: m.neighborhood(8, 3, causal="yes"), "causal"),
        (lambda: m.blocks("yes", 4), "bool array"),
        (lambda: m.blocks(np.eye(2, dtype=bool), 0), "block = 0"),
        (lambda: m.blocks(np.eye(2, dtype=bool), 4).bind(9), "2 blocks of 4 do not fit q_len = 9"),
        (lambda: m.random_blocks(9, 4, 0).bind(16), "9 different keys of 4"),
        (lambda: m.random_edges(-1, 0), "degree = -1"),
        (lambda: m.random_edges(1, -1), "seed = -1"),
        (lambda: m.bigbird(4, 2, 1, 1, 0), "must be odd"),
        (lambda: m.longformer(0, 1), "window = 0"),
        (lambda: m.from_dense(np.ones((2, 2))), "float64"),
        (lambda: m.from_dense(np.ones(3, bool)), "shape"),
        (lambda: m.from_dense([[True], [True, False]]), "no array"),
        (lambda: m.from_csr([0, 2], [1, 0], 2), "row 0 has unsorted columns: 1, then 0"),
        (lambda: m.from_csr([0, 0, 2], [1, 1], 2), "row 1 has a repeated column: 1"),
        (lambda: m.from_csr([0, 1], [2], 2), "row 0 has column 2"),
        (lambda: m.from_csr([0, 1], [-1], 2), "row 0 has column -1"),
        (lambda: m.from_csr([0, 2, 1], [0, 1], 2), "decreases at row 1, from 2 to 1"),
        (lambda: m.from_csr([0, 1], [0, 1], 2), "ends at 1"),
        (lambda: m.from_csr([1, 2], [0, 1], 2), "begins"),
        (lambda: m.from_csr([0, 1], [0.5], 2), "flat sequence of ints"),
        (lambda: m.from_csr([0, 1], [0], 0), "kv_len = 0"),
        (lambda: m.from_sparse(np.eye(2)), "no sparse array"),
        (lambda: m.from_sparse(sp.csr_array(np.array([[np.nan, 1.0]]))), "NaN"),
        (lambda: m.from_graph(np.array([0, 1])), "edge index"),
        (lambda: m.from_graph(np.array([[0, -1], [1, 0]])), "-1"),
        (lambda: m.from_graph(np.array([[0, 3], [1, 0]]), num_nodes=3), "3"),
        (lambda: m.from_graph(nx.Graph()), "at least one"),
        (lambda: m.per_head([]), "empty"),
        (lambda: m.per_head([m.full(), 3]), "entry 1 is a int"),
        (lambda: m.per_head([m.per_head([m.full()])]), "differs by head itself"),
        (lambda: m.per_head([m.per_batch([m.full()])]), "nest the other way"),
    ],
)
def test_refusals_say_what_was_found(make, complaint):
    with pytest.raises(MaskError, match=complaint):
        make()


def test_the_catalog_is_whole_and_its_examples_read():
    assert set(m.CONSTRUCTORS) <= set(m.__all__)
    for name, constructor in m.CONSTRUCTORS.items():
        assert getattr(m, name) is constructor.function
        assert constructor.summary
        if constructor.example:
            m.parse(constructor.example)


def test_importing_masks_loads_no_torch():
    import subprocess

    code = "import sys, sparsec.masks; print(sorted({'torch', 'networkx', 'scipy.sparse', 'yaml'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
