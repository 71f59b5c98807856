from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import sparse

from sparsec import masks as m
from sparsec.analysis import (
    FILL_BLOCKS,
    MaskProfile,
    analyse,
    block_graph,
    candidate_orderings,
    cluster_ordering,
    popularity_ordering,
    rcm_ordering,
    residue_ordering,
    signature,
)
from sparsec.analysis import profile as profile_module
from sparsec.errors import MaskError
from sparsec.layout import reordered
from sparsec.masks.mask import BoundMask


def _random(q_len: int, kv_len: int, density: float, seed: int) -> BoundMask:
    rng = np.random.default_rng(seed)
    dense = rng.random((q_len, kv_len)) < density
    dense[q_len // 3] = False
    dense[q_len // 2] = True
    return m.from_dense(dense).bind(q_len, kv_len)


CASES = {
    "random-197x197": lambda: _random(197, 197, 0.01, 0),
    "random-230x61": lambda: _random(230, 61, 0.2, 1),
    "random-64x357": lambda: _random(64, 357, 0.01, 2),
    "one-query": lambda: _random(1, 300, 0.3, 3),
    "one-key": lambda: m.full().bind(77, 1),
    "empty": lambda: m.from_dense(np.zeros((150, 70), bool)).bind(150, 70),
    "nothing": lambda: m.window(500, -400).bind(300),
    "full-200x190": lambda: m.full().bind(200, 190),
    "full-256": lambda: m.full().bind(256),
    "causal-250": lambda: m.causal().bind(250),
    "causal-300x200": lambda: m.causal().bind(300, 200),
    "window-400": lambda: m.window(70, 7).bind(400),
    "window-163x330": lambda: m.window(17, 0).bind(163, 330),
    "off-diagonal": lambda: m.window(-40, 160).bind(290),
    "dilated-330": lambda: m.dilated(48, 3).bind(330),
    "dilated-100x300": lambda: m.dilated(48, 3).bind(100, 300),
    "strided-causal": lambda: (m.strided(7) & m.causal()).bind(311),
    "longformer": lambda: (m.dilated(64, 2) | m.global_tokens(3)).bind(340),
    "documents": lambda: (m.documents([140, 1, 59, 133]) & m.causal()).bind(333),
    "dilated-2d": lambda: m.dilated_2d(96, 4).bind(350),
    "neighborhood": lambda: m.neighborhood((17, 19), (5, 3), dilation=(2, 1)).bind(323),
    "bigbird": lambda: m.bigbird(16, 1, 1, 2, seed=0).bind(320),
}


def _check_profile(bound: BoundMask, profile: MaskProfile) -> None:
    dense = bound.to_dense()
    q_len, kv_len = dense.shape
    assert profile.shape == dense.shape
    assert profile.nnz == dense.sum()
    assert profile.density == pytest.approx(dense.mean())
    for stats, axis in ((profile.q, 1), (profile.kv, 0)):
        degrees = dense.sum(axis=axis)
        assert stats.mean == pytest.approx(degrees.mean())
        assert stats.max == degrees.max()
        assert stats.n_empty == (degrees == 0).sum()
        assert stats.cv == pytest.approx(degrees.std() / degrees.mean() if degrees.any() else 0.0)
    for block in FILL_BLOCKS:
        rows, columns = -(-q_len // block), -(-kv_len // block)
        padded = np.zeros((rows * block, columns * block), bool)
        padded[:q_len, :kv_len] = dense
        inside = np.zeros_like(padded)
        inside[:q_len, :kv_len] = True
        count, area = (array.reshape(rows, block, columns, block).sum(axis=(1, 3)) for array in (padded, inside))
        fill = profile.fill(block)
        assert fill.block == block
        assert fill.n_tiles == (count > 0).sum()
        assert fill.n_full == (count == area).sum()
        assert fill.fill == pytest.approx(dense.sum() / max((count > 0).sum(), 1) / block**2)
    q, kv = np.nonzero(dense)
    distance = np.abs(kv - q * kv_len / q_len)
    assert profile.bandwidth_max == pytest.approx(distance.max() if len(q) else 0.0)
    assert profile.bandwidth_mean == pytest.approx(distance.mean() if len(q) else 0.0)


@pytest.mark.parametrize("case", CASES)
def test_profile_is_exact(case: str) -> None:
    bound = CASES[case]()
    profile = analyse(bound)
    assert profile.sampled is None
    assert profile.is_toeplitz == (bound.offsets is not None)
    _check_profile(bound, profile)


def test_many_progressions_have_the_same_closed_form() -> None:
    offsets = np.random.default_rng(0).choice(np.arange(-299, 300), 90, replace=False).tolist()
    mask = m.window(-offsets[0], offsets[0])
    for offset in offsets[1:]:
        mask = mask | m.window(-offset, offset)
    bound = mask.bind(300, 310)
    assert bound.offsets is not None
    assert len(bound.offsets.start) > 32
    _check_profile(bound, analyse(bound))


def test_lengths_come_from_the_call_or_from_the_mask() -> None:
    assert analyse(m.causal(), 100).shape == (100, 100)
    assert analyse(m.causal(), (100, 50)).shape == (100, 50)
    assert analyse(m.documents([30, 40])).shape == (70, 70)
    with pytest.raises(MaskError):
        analyse(m.causal())


def test_heavy_rows_and_columns() -> None:
    profile = analyse(m.window(3, 3) | m.global_tokens([5, 900]), 2000)
    assert profile.q.heavy == (5, 900)
    assert profile.kv.n_heavy == 2
    assert analyse(m.full(), 2000).q.n_heavy == 0


def test_period_and_common_step() -> None:
    assert analyse(m.window(8, 0), 500).period == 1
    assert analyse(m.dilated(64, 4), 500).period == 4
    assert analyse(m.dilated(64, 4) | m.dilated(60, 6), 500).period == 2
    assert analyse(m.strided(9) & m.causal(), 500).period == 9
    longformer = analyse(m.dilated(64, 4) | m.global_tokens(2), 500)
    assert (longformer.period, longformer.common_step) == (1, 4)
    assert analyse(_random(300, 300, 0.05, 0)).common_step == 1


def test_keys_per_range_tells_scattered_edges() -> None:
    assert analyse(m.window(255, 0), 500).keys_per_range == 256
    assert analyse(m.documents([50] * 10), 500).keys_per_range == 50
    assert analyse(_random(300, 300, 0.02, 0)).keys_per_range < 3


def test_a_sample_is_stated_and_close(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = (m.documents([900] * 20) & m.window(64, 64) | m.global_tokens(2)).bind(18_000)
    exact = analyse(bound)
    monkeypatch.setattr(profile_module, "_WORK_LIMIT", 30_000)
    sampled = analyse(bound)
    assert exact.sampled is None
    assert sampled.sampled is not None
    assert 0.0 < sampled.sampled < 1.0
    assert (sampled.nnz, sampled.q, sampled.kv) == (exact.nnz, exact.q, exact.kv)
    for block in FILL_BLOCKS:
        assert sampled.fill(block).fill == pytest.approx(exact.fill(block).fill, rel=0.2)
        assert sampled.fill(block).n_tiles == pytest.approx(exact.fill(block).n_tiles, rel=0.2)
    assert signature(sampled).distance(signature(exact)) <= 1.0


def test_long_masks_cost_nothing_of_their_square() -> None:
    profile = analyse(m.window(4096, 0), 10_000_000)
    assert profile.fill(128).fill == pytest.approx(4097 / (33 * 128), rel=1e-3)
    assert profile.bandwidth_max == 4096


def test_block_graph_of_known_graphs() -> None:
    chain = block_graph(m.window(10, 0).bind(640), 64)
    assert (chain.n_nodes, chain.n_edges, chain.n_components) == (10, 9, 1)
    assert chain.locality == pytest.approx(0.1)
    assert chain.degree_max == 2
    assert chain.degree_histogram == (0, 10)
    islands = block_graph(m.documents([128, 128, 64]).bind(320), 64)
    assert islands.n_components == 3
    assert islands.largest_component == pytest.approx(0.4)
    complete = block_graph(m.full().bind(512), 64)
    assert (complete.density, complete.clustering) == (1.0, 1.0)
    assert complete.locality == pytest.approx(1 / 3, abs=0.06)
    pairs = block_graph(m.window(63, 63).bind(640, 1280), 64)
    assert (pairs.n_nodes, pairs.clustering) == (30, 0.0)
    nothing = block_graph(m.from_dense(np.zeros((100, 100), bool)).bind(100), 16)
    assert (nothing.n_edges, nothing.n_components, nothing.locality) == (0, 7, 0.0)


def test_block_graph_stays_small() -> None:
    for bound in (m.causal().bind(100_000), m.window(64, 64).bind(1_000_000), m.full().bind(40_000, 70_000)):
        graph = block_graph(bound, 8)
        assert graph.n_nodes <= 2000
        assert graph.n_edges <= 50_000


def _hidden_clusters(n: int, size: int, seed: int) -> tuple[BoundMask, np.ndarray]:
    """Dense clusters of `size` tokens, scattered; and each token's cluster."""
    rng = np.random.default_rng(seed)
    cluster = rng.permutation(n) // size
    q = np.repeat(np.arange(n), 12)
    members = np.argsort(cluster, kind="stable")
    kv = members[cluster[q] * size + rng.integers(0, size, len(q))]
    edges = sparse.csr_array((np.ones(len(q), bool), (q, kv)), shape=(n, n))
    return m.from_csr(edges.indptr, edges.indices, n).bind(n, n), cluster


@pytest.mark.parametrize("find", [rcm_ordering, cluster_ordering])
def test_graph_orders_find_hidden_clusters(find) -> None:  # type: ignore[no-untyped-def]
    bound, cluster = _hidden_clusters(2048, 32, 0)
    ordering = find(bound)
    assert sorted(ordering.q_order) == list(range(2048))
    np.testing.assert_array_equal(ordering.q_order, find(bound).q_order)
    together = (np.diff(cluster[ordering.q_order]) == 0).mean()
    assert together > 0.9
    before, after = analyse(bound).fill(64).fill, analyse(reordered(bound, ordering)).fill(64).fill
    assert after > 4 * before


def test_popularity_brings_rows_with_shared_keys_together() -> None:
    rng = np.random.default_rng(0)
    q = np.arange(1024)
    kv = rng.choice([3, 500, 700, 1900], 1024)
    edges = sparse.csr_array((np.ones(1024, bool), (q, kv)), shape=(1024, 2000))
    ordering = popularity_ordering(m.from_csr(edges.indptr, edges.indices, 2000).bind(1024, 2000))
    assert ordering.kv_order is None
    assert (np.diff(kv[ordering.q_order]) != 0).sum() == 3


def test_residue_order_fills_tiles() -> None:
    bound = m.dilated(512, 8).bind(4096)
    ordering = residue_ordering(bound, 8)
    before, after = analyse(bound), analyse(reordered(bound, ordering))
    assert after.nnz == before.nnz
    assert after.fill(16).fill > 5 * before.fill(16).fill


def test_only_orders_that_could_pay_are_proposed() -> None:
    def names(bound: BoundMask) -> list[str]:
        return [ordering.name for ordering in candidate_orderings(bound, analyse(bound))]

    assert names(m.window(255, 0).bind(4096)) == []
    assert names(m.full().bind(4096)) == []
    assert names(m.dilated(64, 4).bind(4096)) == ["residue 4"]
    assert names((m.dilated(256, 4) | m.global_tokens(1)).bind(4096)) == ["residue 4"]
    assert names(m.window(-300, 300).bind(301)) == []
    assert names(_hidden_clusters(1024, 32, 0)[0]) == ["cluster", "rcm", "popularity"]
    assert names(_random(400, 800, 0.005, 0)) == ["popularity"]


def test_orders_of_an_edgeless_graph() -> None:
    bound = m.from_dense(np.zeros((40, 40), bool)).bind(40, 40)
    for find in (rcm_ordering, cluster_ordering, popularity_ordering):
        assert sorted(find(bound).q_order) == list(range(40))


def test_signatures_are_near_for_like_masks() -> None:
    small, double, other = (
        signature(analyse(mask, 4096)) for mask in (m.window(255, 0), m.window(511, 0), m.strided(64))
    )
    assert small == signature(analyse(m.window(250, 0), 4100))
    assert small.distance(small) == 0.0
    assert 0.0 < small.distance(double) < small.distance(other)
    assert small.distance(other) == other.distance(small)
    assert signature(analyse(m.full(), 1024)).tile_fill == 0
    assert math.isfinite(signature(analyse(m.from_dense(np.zeros((9, 9), bool)))).distance(small))


def test_analysis_loads_networkx_and_scipy_only_where_used() -> None:
    code = "import sys, sparsec.analysis; assert not {'networkx', 'scipy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
