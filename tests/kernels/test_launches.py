"""Launches beyond their mask: strides, orders, split rows, mixtures, threads, and what is not a number."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest
import running
import torch
from cases import Case, by_degree, case, one_full_row, scattered

import sparsec
from sparsec import masks as m
from sparsec.analysis import analyse
from sparsec.backends import cpu, reference
from sparsec.backends.base import DTYPES, Launch, Work, backend
from sparsec.device import detect_cpu
from sparsec.layout import Ordering, reordered, row_lists, schedule
from sparsec.planner import search
from sparsec.planner.parts import heavy_rows_apart, residue_part
from sparsec.planner.works import IDENTITY
from sparsec.template import template, templates

pytestmark = pytest.mark.usefixtures("two_threads")

CPU_TEMPLATES = [name for name, made in templates().items() if "cpu" in made.backends()]


def _call(case: Case, q, k, v, **options):
    """Attention through the public interface; its results have the case's own layout."""
    made = sparsec.compile(case.mask, (case.problem.q_len, case.problem.kv_len), scale=case.scale, **options)
    return made, made(q, k, v, return_lse=True)


# Strides.


def _heads_sliced(tensor):
    wide = torch.full((tensor.shape[0], tensor.shape[1] * 2 + 1, *tensor.shape[2:]), float("nan")).to(tensor)
    wide[:, 1::2] = tensor
    return wide[:, 1::2]


def _from_bshd(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _last_dimension_strided(tensor):
    wide = torch.full((*tensor.shape[:3], tensor.shape[3] * 3), float("nan")).to(tensor)
    wide[..., ::3] = tensor
    return wide[..., ::3]


def _rows_padded(tensor):
    wide = torch.full((*tensor.shape[:3], tensor.shape[3] + 5), float("nan")).to(tensor)
    wide[..., 3:-2] = tensor
    return wide[..., 3:-2]


def _transposed_storage(tensor):
    return tensor.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)


def _reversed_batch_and_heads(tensor):
    return tensor.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)


STRIDED = case("strided-inputs", scattered(65, 67, 0.3), 65, 67, 40, v_dim=24, heads=(4, 2), batch=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        _heads_sliced,
        _from_bshd,
        _last_dimension_strided,
        _rows_padded,
        _transposed_storage,
        _reversed_batch_and_heads,
    ],
)
@pytest.mark.parametrize("name", CPU_TEMPLATES)
def test_strided_inputs(name, view, dtype):
    tried = STRIDED.with_dtype(dtype)
    views = [view(tensor) for tensor in running.inputs(tried)]
    assert not any(tensor.is_contiguous() for tensor in views)
    _, (out, lse) = _call(tried, *views, template=name)
    running.check(tried, out, lse)
    # As of torch's own attention: where q has its heads within its rows, so has the output.
    has_heads_in_rows = views[0].stride(1) < views[0].stride(2)
    assert (out.transpose(1, 2) if has_heads_in_rows else out).is_contiguous()


@pytest.mark.parametrize("name", CPU_TEMPLATES)
def test_expanded_keys_and_values(name):
    tried = STRIDED.with_dtype("fp32")
    q, k, v = running.inputs(tried)
    k, v = k[:1, :1], v[:1, :1]
    _, (out, lse) = _call(tried, q, k.expand(2, 2, -1, -1), v.expand(2, 2, -1, -1), template=name)
    _, (wanted, wanted_lse) = _call(
        tried, q, k.repeat(2, 2, 1, 1).contiguous(), v.repeat(2, 2, 1, 1).contiguous(), template=name
    )
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_for_all_keys(dtype):
    q, k, v = (torch.randn(1, 1, 50, 32).to(running.inputs(STRIDED.with_dtype(dtype))[0].dtype) for _ in range(3))
    k, v = k[:, :, :1].expand(-1, -1, 50, -1), v[:, :, :1].expand(-1, -1, 50, -1)
    out = sparsec.compile(m.window(9, 3), 50)(q, k, v)
    assert torch.allclose(out, v.expand_as(out), rtol=1e-2 if dtype != "fp32" else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*CPU_TEMPLATES, "dense"])
def test_layout_bshd(name, dtype):
    mask = m.full() if name == "dense" else STRIDED.mask
    tried = replace(STRIDED, mask=mask, problem=replace(STRIDED.problem, v_dim=40)).with_dtype(dtype)
    q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in running.inputs(tried))
    _, (out, lse) = _call(tried, q, k, v, template=name, layout="bshd")
    assert out.shape == q.shape
    assert out.is_contiguous()
    running.check(tried, out.transpose(1, 2), lse)


@pytest.mark.parametrize("name", CPU_TEMPLATES)
def test_strides_beyond_two_to_the_31(name):
    # Pages that are never touched cost nothing: rows 2^30 elements apart, heads and batch elements as well.
    tried = case("far-apart", by_degree([3, 0, 5, 1, 4], 5), 5, 5, 8, heads=(2, 2), batch=2).with_dtype("fp16")
    apart = 2**28
    virtual = torch.empty(5 * 2 * 2 * apart, dtype=torch.float16)
    views = []
    for tensor in running.inputs(tried):
        view = virtual.as_strided(tensor.shape, (10 * apart, 5 * apart, apart, 1), 64 * len(views))
        view.copy_(tensor)
        views.append(view)
    assert max(view.stride(0) + view.stride(1) for view in views) > 2**31
    _, (out, lse) = _call(tried, *views, template=name)
    running.check(tried, out, lse)


# Orders of tokens.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CPU_TEMPLATES)
def test_any_order_of_queries_and_keys(name, dtype):
    tried = case("shuffled", scattered(90, 130, 0.1), 90, 130, 40, v_dim=24, heads=(2, 1)).with_dtype(dtype)
    rng = np.random.default_rng(2)
    ordering = Ordering("shuffled", rng.permutation(90).astype(np.int32), rng.permutation(130).astype(np.int32))
    bound = reordered(tried.bound, ordering)
    made = running.launch(template(name), "cpu", tried, ordering=ordering, bound=bound)
    running.check(tried, *running.run(made, tried))


REORDERED = [
    case("dilated", m.dilated(120, 8), 400, 400, 32, heads=(2, 1)),
    case("strided", m.strided(16), 333, 333, 32),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tried", REORDERED, ids=lambda tried: tried.id)
def test_forced_order(tried, dtype):
    tried = tried.with_dtype(dtype)
    made, (out, lse) = _call(tried, *running.inputs(tried), reorder="force")
    assert any(step.launch.work.ordering.q_order is not None for step in made.plan.steps)
    running.check(tried, out, lse)


def test_shuffled_clusters_are_found_again():
    rng = np.random.default_rng(0)
    order = rng.permutation(320)
    dense = (np.kron(np.eye(20), np.ones((16, 16))) > 0)[np.ix_(order, order)]
    tried = case("clusters", m.from_dense(dense), 320, 320, 32)
    made, (out, lse) = _call(tried, *running.inputs(tried), reorder="force")
    assert any(step.launch.work.ordering.q_order is not None for step in made.plan.steps)
    running.check(tried, out, lse)


# Mixed plans.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("progressing", "rest"), [*itertools.permutations(CPU_TEMPLATES, 2)])
def test_parts_joined_by_log_sum_exp(progressing, rest, dtype):
    tried = case("parts", m.dilated(90, 6) | m.random_edges(5, 0), 200, 200, 32, heads=(2, 1)).with_dtype(dtype)
    parts = residue_part(tried.bound)
    assert parts is not None
    part, others, period = parts
    assert part.nnz + others.nnz == tried.bound.nnz
    ordering = _residues(200, period)
    q, k, v = running.inputs(tried)
    results = []
    for name, bound, order in ((progressing, reordered(part, ordering), ordering), (rest, others, IDENTITY)):
        made = running.launch(template(name), "cpu", tried, bound=bound, ordering=order, is_partial=True)
        out, lse = running.poisoned(tried, is_partial=True)
        backend("cpu").lower(made)(q, k, v, out, lse)
        results.append((out.double(), lse.double()))
    log_sums = torch.stack([lse for _, lse in results])
    total = torch.logsumexp(log_sums, 0)
    out = sum(out * (lse - total).exp().unsqueeze(-1) for out, lse in results)
    running.check(tried, out.to(q.dtype), total)


def _residues(length: int, period: int) -> Ordering:
    order = np.concatenate([np.arange(i, length, period) for i in range(period)]).astype(np.int32)
    return Ordering("residues", order, order)


MIXED = m.dilated(120, 8) | m.random_edges(2, 0)


@pytest.fixture
def joined_where_possible(monkeypatch):
    """Of all candidates only those that join two launches, for masks that have one."""
    every = search._Search._drafts

    def drafts(self, servers):
        found = list(every(self, servers))
        yield from [draft for draft in found if draft.is_joined] or found

    monkeypatch.setattr(search._Search, "_drafts", drafts)


def _is_joined(made: sparsec.Attention) -> list[bool]:
    return [group.is_joined for group in made.plan.groups]


@pytest.mark.usefixtures("joined_where_possible")
@pytest.mark.parametrize("dtype", DTYPES)
def test_joined_plan(dtype):
    tried = case("joined", MIXED, 400, 400, 16, heads=(2, 1), batch=2).with_dtype(dtype)
    made, (out, lse) = _call(tried, *running.inputs(tried))
    assert _is_joined(made) == [True]
    running.check(tried, out, lse)
    assert torch.equal(made(*running.inputs(tried)), out)


@pytest.mark.usefixtures("joined_where_possible")
def test_joined_plan_of_some_heads():
    tried = case("joined", m.per_head([MIXED, m.window(3, 3), MIXED]), 400, 400, 16, heads=(3, 3), batch=2)
    made, (out, lse) = _call(tried, *running.inputs(tried))
    assert sorted(_is_joined(made)) == [False, True]
    running.check(tried, out, lse)
    assert torch.equal(made(*running.inputs(tried)), out)


@pytest.mark.usefixtures("joined_where_possible")
@pytest.mark.parametrize("heads", [1, 2])
def test_joined_plan_of_some_batch_elements(heads):
    members = [m.window(3, 3), MIXED, m.dilated(90, 6) | m.random_edges(3, 1), MIXED]
    tried = case("joined", m.per_batch(members), 400, 400, 16, heads=(heads, 1), batch=4)
    made, (out, lse) = _call(tried, *running.inputs(tried))
    assert sorted(_is_joined(made)) == [False, True, True]
    running.check(tried, out, lse)
    assert torch.equal(made(*running.inputs(tried)), out)


@pytest.mark.usefixtures("joined_where_possible")
def test_joined_plan_with_empty_rows():
    # Query i has keys at i + 200, i + 208, … and, where i is no multiple of 5, one more.
    ahead = m.window(-200, 400) & m.strided(8)
    others = by_degree([int(i % 5 > 0) for i in range(400)], 400)
    tried = case("joined", ahead | others, 400, 400, 16)
    made, (out, lse) = _call(tried, *running.inputs(tried))
    assert _is_joined(made) == [True]
    running.check(tried, out, lse)
    is_empty = torch.from_numpy(tried.bound.degrees("q") == 0)
    assert is_empty.sum() == 40
    assert torch.isneginf(lse[0, 0, is_empty]).all()
    assert (out[0, 0, is_empty] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CPU_TEMPLATES)
def test_heavy_rows_apart(name, dtype):
    heavy = [3, 77, 150, 222, 290, 411, 500, 599]
    tried = case("heavy", m.window(4, 4) | m.global_tokens(heavy), 600, 600, 32, heads=(2, 1)).with_dtype(dtype)
    parts = heavy_rows_apart(tried.bound, analyse(tried.bound))
    assert parts is not None
    rest, rows, ordering = parts
    out, lse = running.poisoned(tried)
    for bound, order in ((rest, IDENTITY), (rows, ordering)):
        made = running.launch(template(name), "cpu", tried, bound=bound, ordering=order)
        backend("cpu").lower(made)(*running.inputs(tried), out, lse)
    running.check(tried, out, lse)


# Split rows.


def _split_everything(work: Work, pieces: int) -> Work:
    """The same rows with every unit cut into several items."""
    edges = row_lists(work.bound, work.rows.form)
    before = np.concatenate(([0], np.cumsum(edges.degrees())))
    n_units = -(-work.bound.q_len // work.block_q)
    indptr = before[np.minimum(np.arange(n_units + 1) * work.block_q, work.bound.q_len)]
    cut = schedule(indptr, 1.0, workers=pieces * n_units, max_split=pieces)
    base = indptr[cut.unit]
    return replace(work, rows=edges, schedule=replace(cut, start=cut.start - base, stop=cut.stop - base))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [m.window(40, 20), m.from_dense(np.tri(90, 130, 3) > 0), scattered(90, 130, 0.2)])
@pytest.mark.parametrize("block_q", [16, 64])
def test_rows_split_into_many_items(mask, block_q, dtype):
    rows = template("row_traversal")
    tried = case("split", mask, 90, 130, 40, v_dim=24, heads=(2, 1), batch=2).with_dtype(dtype)
    made = running.launch(rows, "cpu", tried, config=type(rows.default("cpu")).of(block_q=block_q))
    split = replace(made, work=_split_everything(made.work, 7))
    assert split.work.schedule.n_slots > 2 * len(split.work.schedule.merge_unit) > 0
    running.check(tried, *running.run(split, tried))


def _split_tiles(made: Launch, pieces: int) -> Launch:
    """The same tiles with every row of tiles cut into several items."""
    tiles = made.work.tiles.tile_map
    cut = schedule(tiles.indptr, 1.0, workers=pieces * (len(tiles.indptr) - 1), max_split=pieces)
    return replace(made, work=replace(made.work, schedule=cut))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_q", [16, 32, 64])
def test_tiles_split_into_many_items(block_q, dtype):
    tiles = template("block_sparse")
    tried = case("split", scattered(150, 300, 0.2), 150, 300, 40, v_dim=24, heads=(2, 1), batch=2).with_dtype(dtype)
    config = type(tiles.default("cpu")).of(block_q=block_q, block_kv=16)
    split = _split_tiles(running.launch(tiles, "cpu", tried, config=config), 7)
    assert split.work.schedule.n_slots > 2 * len(split.work.schedule.merge_unit) > 0
    running.check(tried, *running.run(split, tried))


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("name", CPU_TEMPLATES)
def test_a_heavy_row_is_split_by_the_planner(name, shift):
    many = replace(detect_cpu(), units=16)
    tried = case("one-full-row", one_full_row(64, 60_000, 33), 64, 60_000, 8, shift=shift)
    made = running.launch(template(name), "cpu", tried, device=many)
    assert made.work.schedule.n_slots > 1
    out, lse = running.run(made, tried)
    q, k, v = (tensor[0, 0].double().numpy() for tensor in running.inputs(tried))
    rows = np.array([0, 7, 33, 34])
    expected, expected_lse = reference.attention(q, k, v, tried.bound, running.scale_of(tried), rows)
    assert np.allclose(out[0, 0, rows], expected, atol=1e-5 if not shift else 2e-3)
    assert np.allclose(lse[0, 0, rows], expected_lse, rtol=1e-6)


# The same bits, whoever calls.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CPU_TEMPLATES)
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(name, dtype):
    tried = case("bits", one_full_row(200, 3000, 65), 200, 3000, 40, heads=(2, 1)).with_dtype(dtype)
    kernel = backend("cpu").lower(running.launch(template(name), "cpu", tried, device=replace(detect_cpu(), units=16)))
    results = []
    for threads in (2, 2, 1, 3, 7):
        torch.set_num_threads(threads)
        out, lse = running.poisoned(tried)
        kernel(*running.inputs(tried), out, lse)
        results.append((out, lse))
    torch.set_num_threads(2)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_four_threads_call_one_attention():
    made = sparsec.compile(m.longformer(32, 4) | m.random_edges(9, 0), 500)
    inputs = [[torch.randn(1, 2, 500, 16 * (1 + i % 2)) for _ in range(3)] for i in range(4)]
    results: list[list[torch.Tensor]] = [[] for _ in inputs]

    def work(i: int) -> None:
        for _ in range(20):
            results[i].append(made(*inputs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (q, k, v) in enumerate(inputs):
        wanted = made(q, k, v)
        assert len(results[i]) == 20
        assert all(torch.equal(out, wanted) for out in results[i])


# Exactly as much work as there are edges.

COUNTING = [
    ("offsets", m.window(30, 5), 200, 220),
    ("offsets", m.dilated(50, 4), 130, 130),
    ("ranges", m.window(30, 5) | m.global_tokens(3), 200, 200),
    ("ranges", m.documents([100, 1, 50, 49]), 200, 200),
    ("edges", m.random_edges(7, 0), 150, 200),
    ("edges", by_degree([i % 12 for i in range(100)], 64), 100, 64),
    ("edges", scattered(70, 131, 0.1), 70, 131),
]


@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize(("form", "mask", "q_len", "kv_len"), COUNTING)
def test_row_traversal_does_exactly_one_dot_product_an_edge(form, mask, q_len, kv_len, head_dim):
    rows = template("row_traversal")
    tried = case("counted", mask, q_len, kv_len, head_dim, heads=(4, 2), batch=3)
    made = running.launch(rows, "cpu", tried)
    made = replace(made, work=replace(made.work, rows=row_lists(tried.bound, form)))
    for launch in (made, replace(made, work=_split_everything(made.work, 5))):
        assert launch.work.rows.form == form
        assert _dot_products(launch, tried) == tried.bound.nnz * 4 * 3


def _dot_products(launch: Launch, tried: Case) -> int:
    import ctypes

    sources = cpu.source_files(launch.template)
    path = cpu.compiled(sources, "fp32", launch.device, defines=("-DSX_COUNT_DOT_PRODUCTS",))
    library = ctypes.CDLL(str(path))
    assert library.sx_abi() == ctypes.sizeof(cpu.Arguments)
    library.sx_dot_products.restype = ctypes.c_int64
    library.sx_dot_products()
    out, lse = running.poisoned(tried)
    cpu.CpuKernel(launch, library, sources)(*running.inputs(tried), out, lse)
    running.check(tried, out, lse)
    return library.sx_dot_products()


# What is not a number.


def _spoilt(tried: Case, which: str, key: int, value: float):
    q, k, v = (tensor.clone() for tensor in running.inputs(tried))
    {"k": k, "v": v}[which][:, :, key] = value
    return q, k, v


def _attends(tried: Case, key: int) -> torch.Tensor:
    return torch.from_numpy(tried.bound.to_dense()[:, key])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_row_traversal_keeps_a_nan_to_the_rows_that_attend_it(which, head_dim, dtype):
    for mask in (scattered(150, 170, 0.04), by_degree([i % 10 for i in range(150)], 170), m.window(9, 30)):
        tried = case("nan", mask, 150, 170, head_dim).with_dtype(dtype)
        made, (clean, _) = _call(tried, *running.inputs(tried), template="row_traversal")
        key = int(tried.bound.degrees("kv").argmax()) if which == "k" else 60
        out = made(*_spoilt(tried, which, key, float("nan")))
        attends = _attends(tried, key)
        assert torch.isnan(out[0, 0, attends]).all()
        assert torch.equal(out[0, 0, ~attends], clean[0, 0, ~attends])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["block_sparse", "hybrid"])
def test_tiles_keep_a_nan_key_to_the_rows_that_attend_it(name, dtype):
    tried = case("nan", scattered(150, 170, 0.04), 150, 170).with_dtype(dtype)
    kernel = backend("cpu").lower(running.launch(template(name), "cpu", tried))
    clean, out, lse = running.poisoned(tried)[0], *running.poisoned(tried)
    kernel(*running.inputs(tried), clean, None)
    for key in (10, 60, 169):
        kernel(*_spoilt(tried, "k", key, float("nan")), out, lse)
        attends = _attends(tried, key)
        assert torch.isnan(out[0, 0, attends]).all()
        assert torch.isnan(lse[0, 0, attends]).all()
        assert torch.equal(out[0, 0, ~attends], clean[0, 0, ~attends])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["block_sparse", "hybrid"])
def test_tiles_keep_a_nan_value_to_the_queries_of_the_tiles_it_is_in(name, dtype):
    # Within a tile, a query that does not attend the key adds 0 · NaN: documented, and as far as it goes.
    tried = case("nan", m.documents([64, 16, 48, 22]) - m.strided(3), 150, 150).with_dtype(dtype)
    made = running.launch(template(name), "cpu", tried)
    kernel = backend("cpu").lower(made)
    clean, out = running.poisoned(tried)[0], running.poisoned(tried)[0]
    kernel(*running.inputs(tried), clean, None)
    block_q, block_kv = made.work.block_q, 64
    for key in (10, 60, 149):
        kernel(*_spoilt(tried, "v", key, float("nan")), out, None)
        attends = _attends(tried, key)
        assert torch.isnan(out[0, 0, attends]).all()
        near = tried.bound.to_dense()[:, key // block_kv * block_kv : key // block_kv * block_kv + block_kv].any(1)
        beside = torch.from_numpy(
            np.repeat([near[i : i + block_q].any() for i in range(0, 150, block_q)], block_q)[:150].copy()
        )
        assert torch.equal(out[0, 0, ~beside], clean[0, 0, ~beside])


@pytest.mark.parametrize("name", [*CPU_TEMPLATES, "dense"])
def test_infinities_are_as_in_dense_attention(name):
    tried = case("infinite", m.full(), 40, 30, 64)
    q, k, v = (tensor.clone() for tensor in running.inputs(tried))
    k[0, 0, 7] = 0.0
    k[0, 0, 7, 0] = float("inf")  # scores of -inf or +inf by the sign of q[0]
    v[0, 0, 9, 5] = float("inf")
    wanted = torch.softmax(q.double() @ k.double().mT / 8, -1) @ v.double()
    assert 5 < torch.isnan(wanted[..., 0]).sum() < 35
    out, lse = running.poisoned(tried)
    where = "cpu" if name in CPU_TEMPLATES else "torch"
    backend(where).lower(running.launch(template(name), where, tried))(q, k, v, out, lse)
    torch.testing.assert_close(out.double(), wanted, equal_nan=True, rtol=1e-5, atol=1e-5)


# One plan serves every batch size, also where heads differ.


@pytest.mark.parametrize("chosen", [{}, {"backend": "reference"}, {"template": "row_traversal"}], ids=str)
def test_masks_by_head_on_any_batch(chosen):
    members = [m.causal(), m.window(3, 3), m.full(), m.causal()]
    tried = case("by-head", m.per_head(members), 100, 100, heads=(4, 2), batch=3)
    made, (out, lse) = _call(tried, *running.inputs(tried), **chosen)
    running.check(tried, out, lse)
    fewer = made(*(tensor[:2] for tensor in running.inputs(tried)))
    assert torch.equal(fewer, out[:2])


def test_dense_heads_are_handed_over_for_every_batch_element():
    members = [m.causal(), m.window(3, 3), m.full(), m.causal()]
    tried = case("by-head", m.per_head(members), 67, 67, heads=(4, 2), batch=3)
    out, lse = running.poisoned(tried)
    for heads, mask in (((0, 3), m.causal()), ((2,), m.full()), ((1,), m.window(3, 3))):
        name, where = ("row_traversal", "cpu") if heads == (1,) else ("dense", "torch")
        bound = mask.bind(67, 67)
        made = running.launch(template(name), where, tried, bound=bound)
        one_plan = replace(made, heads=heads, batch=(0,), problem=replace(made.problem, batch=1))
        backend(where).lower(one_plan)(*running.inputs(tried), out, lse)
    running.check(tried, out, lse)
