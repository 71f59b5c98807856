"""The backward pass of every template on the CPU, in every dtype, against gradients worked out in fp64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import pytest
import running
import torch
from cases import HARD, Case, by_degree, case, cases, one_full_row, scattered

import sparsec
from sparsec import masks as m
from sparsec.analysis import analyse
from sparsec.backends import reference
from sparsec.backends.base import DTYPES, Launch, Problem, backend
from sparsec.device import _ISA_LEVELS, detect_cpu
from sparsec.layout import Ordering, reordered
from sparsec.masks import BoundMask
from sparsec.planner import search
from sparsec.records import RecordKey, TuningRecord, Workload
from sparsec.template import template, templates

pytestmark = pytest.mark.usefixtures("two_threads")

TEMPLATES = [name for name, made in templates().items() if "cpu" in made.backends()]

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Given:
    """What a backward pass is given: a forward pass that is right up to its rounding, and the gradients above it."""

    case: Case
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    results: tuple[torch.Tensor, torch.Tensor]
    above: tuple[torch.Tensor, torch.Tensor]

    @cached_property
    def expected(self) -> dict[tuple[int, int], tuple[tuple[np.ndarray, ...], tuple[float, ...]]]:
        """dq, dk, dv of each head, and how far each may be off."""
        p, scale, found = self.case.problem, running.scale_of(self.case), {}
        for b, h in np.ndindex(p.batch, p.q_heads):
            heads = _head(self.inputs, b, h, p)
            rows = tuple(t[b, h].double().numpy() for t in self.above)
            bound = _member(self.case, b, h)
            found[b, h] = (
                reference.gradients(*heads, bound, scale, *rows),
                reference.gradient_tolerances(*heads, bound, scale, *rows, p.dtype),
            )
        return found


@cache
def given(case: Case, *, is_fine: bool = False) -> Given:
    """Inputs of a case with all that follows from them.

    q and k are coarse unless `is_fine`: their products add up without rounding in any order, so that every difference
    from the reference is the backward pass's own.
    """
    p = case.problem
    q, k, v = running.inputs(case)
    if not is_fine:
        q, k = ((t.double() / step * 8).round().div(8).mul(step).to(t) for t, step in ((q, case.magnitude), (k, 1.0)))
    out, lse = running.poisoned(case)
    for b, h in np.ndindex(p.batch, p.q_heads):
        exact = reference.attention(*_head((q, k, v), b, h, p), _member(case, b, h), running.scale_of(case))
        out[b, h], lse[b, h] = map(torch.from_numpy, exact)
    generator = torch.Generator().manual_seed(p.q_len + 17 * p.v_dim)
    d_out = torch.randn(out.shape, generator=generator).to(q)
    return Given(case, (q, k, v), (out, lse), (d_out, torch.randn(lse.shape, generator=generator)))


def _head(inputs: tuple[torch.Tensor, ...], b: int, h: int, p: Problem) -> tuple[np.ndarray, ...]:
    q, k, v = inputs
    kv = h // (p.q_heads // p.kv_heads)
    return tuple(t.double().numpy() for t in (q[b, h], k[b, kv], v[b, kv]))


def _member(case: Case, b: int, h: int) -> BoundMask:
    bound = case.bound
    return bound.select(b, h) if bound.varies_by_head or bound.varies_by_batch else bound


def check(given: Given, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> None:
    """Raises where a gradient is further from the reference than a correct kernel's may be."""
    p = given.case.problem
    group = p.q_heads // p.kv_heads
    for b, kv in np.ndindex(p.batch, p.kv_heads):
        members = {h: given.expected[b, h] for h in range(kv * group, (kv + 1) * group)}
        for h, (expected, allowed) in members.items():
            running.check_close(dq[b, h], expected[0], allowed[0], f"dq of head {h}, batch element {b}")
        for which, (name, got) in enumerate((("dk", dk), ("dv", dv)), 1):
            expected = sum(expected[which] for expected, _ in members.values())
            allowed = sum(allowed[which] for _, allowed in members.values())
            running.check_close(got[b, kv], expected, allowed, f"{name} of key head {kv}, batch element {b}")


def buffers(given: Given) -> Gradients:
    """dq full of NaN, so that what a kernel does not write is found; dk and dv are added to."""
    q, k, v = given.inputs
    return torch.full_like(q, float("nan")), torch.zeros(k.shape), torch.zeros(v.shape)


def run(made: Launch, given: Given) -> Gradients:
    gradients = buffers(given)
    kernel = backend(made.backend).lower_backward(made)
    kernel(*given.inputs, *given.results, *given.above, *gradients)
    return gradients


def call(given: Given, **options) -> tuple[sparsec.Attention, Gradients]:
    """The backward pass of a whole plan, which may be several launches."""
    case = given.case
    made = sparsec.compile(case.mask, (case.problem.q_len, case.problem.kv_len), scale=case.scale, **options)
    return made, made.backward(*given.inputs, *given.results, *given.above)


def differentiate(
    made: sparsec.Attention, inputs: tuple[torch.Tensor, ...], above: tuple[torch.Tensor, ...]
) -> Gradients:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(made(*leaves, return_lse=True), leaves, above)


@pytest.fixture
def memory_is_nan():
    """Memory that torch hands out is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _sums_are_long(tried: Case, name: str) -> bool:
    """Whether `test_long_sums_of_single_edges` is about this one."""
    return name == "row_traversal" and tried.bound.degrees("kv").max() > 256


def _matrix(every):
    for tried, dtype, name in itertools.product(every, DTYPES, TEMPLATES):
        if _sums_are_long(tried, name):
            continue
        yield pytest.param(name, tried.with_dtype(dtype), id=f"{tried.id}-{dtype}-{name}")


@pytest.mark.parametrize(("name", "tried"), [*_matrix(cases())])
def test_backward(name, tried: Case):
    check(given(tried), *run(running.launch(template(name), "cpu", tried), given(tried)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_configuration(name, dtype):
    tried = HARD.with_dtype(dtype)
    for config in template(name).configs("cpu"):
        check(given(tried), *run(running.launch(template(name), "cpu", tried, config=config), given(tried)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_adds_to_dk_and_dv(name):
    tried = HARD.with_dtype("fp32")
    kernel = backend("cpu").lower_backward(running.launch(template(name), "cpu", tried))
    tensors = (*given(tried).inputs, *given(tried).results, *given(tried).above)
    once, again = buffers(given(tried)), buffers(given(tried))
    kernel(*tensors, *once)
    kernel(*tensors, *again)
    kernel(*tensors, *again)
    assert torch.equal(again[0], once[0])
    for twice, single in zip(again[1:], once[1:], strict=True):
        torch.testing.assert_close(twice, 2 * single, rtol=1e-5, atol=1e-6 * float(single.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_gradient_of_the_log_sum_exp_is_a_gradient_of_zero(name, dtype):
    tried = HARD.with_dtype(dtype)
    kernel = backend("cpu").lower_backward(running.launch(template(name), "cpu", tried))
    d_out, d_lse = given(tried).above
    without, zero = buffers(given(tried)), buffers(given(tried))
    kernel(*given(tried).inputs, *given(tried).results, d_out, None, *without)
    kernel(*given(tried).inputs, *given(tried).results, d_out, torch.zeros_like(d_lse), *zero)
    assert all(torch.equal(a, b) for a, b in zip(without, zero, strict=True))


@pytest.mark.usefixtures("memory_is_nan")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_empty_rows_and_columns_have_no_gradient(name, dtype):
    tried = HARD.with_dtype(dtype)
    _, (dq, dk, dv) = call(given(tried), template=name)
    check(given(tried), dq, dk, dv)
    no_keys, no_queries = (torch.from_numpy(tried.bound.degrees(axis) == 0) for axis in ("q", "kv"))
    assert no_keys.any()
    assert no_queries.any()
    assert (dq[:, :, no_keys] == 0).all()
    assert (dk[:, :, no_queries] == 0).all()
    assert (dv[:, :, no_queries] == 0).all()


FINE = [
    HARD,
    case("window", m.window(20, 5), 63, 130, heads=(4, 2), batch=2),
    case("scattered", scattered(65, 67, 0.3), 65, 67, 17, v_dim=3),
    case("scattered", scattered(65, 67, 0.3), 65, 67, 64, magnitude=3.0),
    case("short-rows", by_degree([i % 10 for i in range(41)], 40), 41, 40, 32, heads=(6, 2), batch=2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tried", FINE, ids=lambda tried: tried.id)
@pytest.mark.parametrize("name", TEMPLATES)
def test_inputs_of_every_digit(name, tried, dtype):
    fine = given(tried.with_dtype(dtype), is_fine=True)
    check(fine, *run(running.launch(template(name), "cpu", fine.case), fine))


# Strides.

STRIDED = case("strided", scattered(65, 67, 0.3), 65, 67, 40, v_dim=24, heads=(4, 2), batch=2)


def _bshd(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _last_dimension_strided(tensor):
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] * 3), float("nan")).to(tensor)
    wide[..., ::3] = tensor
    return wide[..., ::3]


def _rows_padded(tensor):
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan")).to(tensor)
    wide[..., 3:-2] = tensor
    return wide[..., 3:-2]


@pytest.mark.usefixtures("memory_is_nan")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [_bshd, _last_dimension_strided, _rows_padded])
@pytest.mark.parametrize("name", TEMPLATES)
def test_strided_inputs_and_gradients(name, view, dtype):
    tried = given(STRIDED.with_dtype(dtype))
    made = sparsec.compile(STRIDED.mask, (65, 67), template=name)
    d_out, d_lse = tried.above
    wanted = differentiate(made, tried.inputs, tried.above)
    strided = d_lse.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    found = differentiate(made, [view(tensor) for tensor in tried.inputs], (view(d_out), strided))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_layout_bshd(name, dtype):
    tried = given(STRIDED.with_dtype(dtype))
    made = sparsec.compile(STRIDED.mask, (65, 67), template=name, layout="bshd")
    d_out, d_lse = tried.above
    inputs = [tensor.transpose(1, 2).contiguous() for tensor in tried.inputs]
    found = differentiate(made, inputs, (d_out.transpose(1, 2), d_lse))
    wanted = differentiate(sparsec.compile(STRIDED.mask, (65, 67), template=name), tried.inputs, tried.above)
    assert all(torch.equal(a.transpose(1, 2), b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (2,), (0, 1)])
@pytest.mark.parametrize("name", TEMPLATES)
def test_expanded_gradient(name, dims):
    tried = STRIDED.with_dtype("fp32")
    kernel = sparsec.compile(tried.mask, (65, 67), template=name)
    d_out, d_lse = given(tried).above
    for dim in dims:
        d_out = d_out.narrow(dim, 0, 1)
        d_lse = d_lse.narrow(dim, 0, 1) if dim < 3 else d_lse
    shape = given(tried).above[0].shape
    expanded = d_out.expand(shape), d_lse.expand(shape[:3])
    leaves = [tensor.detach().requires_grad_() for tensor in given(tried).inputs]
    out = kernel(*leaves, return_lse=True)
    found = torch.autograd.grad(out, leaves, expanded, retain_graph=True)
    wanted = torch.autograd.grad(out, leaves, tuple(t.contiguous() for t in expanded))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", TEMPLATES)
def test_expanded_keys_and_values(name):
    tried = STRIDED.with_dtype("fp32")
    made = sparsec.compile(tried.mask, (65, 67), template=name)
    q, k, v = (tensor.detach() for tensor in given(tried).inputs)
    shared = [k[:1, :1].clone().requires_grad_(), v[:1, :1].clone().requires_grad_()]
    whole = [tensor.detach().repeat(2, 2, 1, 1).requires_grad_() for tensor in shared]
    found = torch.autograd.grad(made(q, *(t.expand(2, 2, -1, -1) for t in shared)), shared, given(tried).above[0])
    wanted = torch.autograd.grad(made(q, *whole), whole, given(tried).above[0])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.sum((0, 1), keepdim=True))


# Orders of tokens.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_any_order_of_queries_and_keys(name, dtype):
    tried = case("shuffled", scattered(90, 130, 0.1), 90, 130, 40, v_dim=24, heads=(2, 1)).with_dtype(dtype)
    rng = np.random.default_rng(2)
    ordering = Ordering("shuffled", rng.permutation(90).astype(np.int32), rng.permutation(130).astype(np.int32))
    bound = reordered(tried.bound, ordering)
    made = running.launch(template(name), "cpu", tried, ordering=ordering, bound=bound)
    check(given(tried), *run(made, given(tried)))


@pytest.mark.usefixtures("memory_is_nan")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tried",
    [
        case("dilated", m.dilated(120, 8), 400, 400, 32, heads=(2, 1)),
        case("strided", m.strided(16), 333, 333, 32),
    ],
    ids=lambda tried: tried.id,
)
def test_forced_order(tried, dtype):
    tried = tried.with_dtype(dtype)
    made, found = call(given(tried), reorder="force")
    assert any(step.launch.work.ordering.q_order is not None for step in made.plan.steps)
    check(given(tried), *found)


# Plans of several launches.

MIXED = m.dilated(120, 8) | m.random_edges(2, 0)
HEAVY = m.window(4, 4) | m.global_tokens([3, 77, 150, 222, 290, 411, 500, 599])


@pytest.fixture
def prefer(monkeypatch):
    """Of all candidates only those that satisfy a condition, for masks that have one."""
    every = search._Search._drafts

    def only(condition):
        def drafts(self, servers):
            found = list(every(self, servers))
            yield from [draft for draft in found if condition(draft)] or found

        monkeypatch.setattr(search._Search, "_drafts", drafts)

    return only


JOINED = [
    case("joined", MIXED, 400, 400, 16, heads=(2, 1), batch=2),
    case("joined-heads", m.per_head([MIXED, m.window(3, 3), MIXED]), 400, 400, 16, heads=(3, 3), batch=2),
    case("joined-grouped-heads", m.per_head([MIXED, m.window(3, 3)] * 2), 400, 400, 16, heads=(4, 2), batch=2),
    case("joined-batch", m.per_batch([m.window(3, 3), MIXED, ~m.full(), MIXED]), 400, 400, 16, heads=(2, 1), batch=4),
    case(
        "joined-empty-rows",
        m.window(-200, 400) & m.strided(8) | by_degree([int(i % 5 > 0) for i in range(400)], 400),
        *(400, 400, 16),
    ),
]


@pytest.mark.usefixtures("memory_is_nan")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tried", JOINED, ids=lambda tried: tried.id)
def test_joined_plan(prefer, tried, dtype):
    prefer(lambda draft: draft.is_joined)
    tried = tried.with_dtype(dtype)
    made, found = call(given(tried))
    assert any(group.is_joined for group in made.plan.groups)
    check(given(tried), *found)


@pytest.mark.usefixtures("memory_is_nan")
@pytest.mark.parametrize("chosen", [{}, {"backend": "reference"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_heavy_rows_apart(prefer, dtype, chosen):
    prefer(lambda draft: len(draft.parts) == 2 and not draft.is_joined)
    tried = case("heavy", HEAVY, 600, 600, 32, heads=(2, 1)).with_dtype(dtype)
    made, found = call(given(tried), **chosen)
    assert len(made.plan.steps) == 2
    check(given(tried), *found)


@pytest.mark.usefixtures("memory_is_nan")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backward_pass_by_records_of_another_template(no_records, dtype):
    tried = case("window", m.window(40, 5), 300, 300, 32, heads=(4, 2)).with_dtype(dtype)
    problem = replace(tried.problem, needs_grad=True)
    workload = Workload.of(analyse(tried.mask.bind(300, 300)), heads=4, batch=1)
    for name, direction in itertools.product(("block_sparse", "row_traversal"), ("forward", "backward")):
        us = 1.0 if (name == "block_sparse") == (direction == "forward") else 9.0
        key = RecordKey.of(template(name), "cpu", problem, detect_cpu(), direction)
        no_records.append(TuningRecord(key, workload, template(name).default("cpu"), (us,)))
    made, found = call(given(tried), reorder="off")
    group = made.plan.groups[0]
    assert [step.launch.template.name for step in group.steps] == ["block_sparse"]
    assert [launch.template.name for launch in group.backward_launches] == ["row_traversal"]
    check(given(tried), *found)


@pytest.mark.parametrize("order", [{"reorder": "force"}, {"reorder": "off"}], ids=str)
def test_the_reference_back_end(order):
    tried = case("dilated", m.dilated(60, 8), 150, 150, 32, heads=(2, 1)).with_dtype("fp32")
    check(given(tried), *call(given(tried), backend="reference", **order)[1])


@pytest.mark.usefixtures("memory_is_nan")
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_heads(dtype):
    members = [m.causal(), m.window(3, 3), m.full(), m.causal(), ~m.full(), m.random_edges(3, 1)]
    tried = case("per-head", m.per_head(members), 100, 100, 24, heads=(6, 2), batch=2).with_dtype(dtype)
    made, found = call(given(tried))
    assert len(made.plan.groups) == 5
    check(given(tried), *found)
    # One plan serves any batch.
    whole = given(tried)
    one = replace(tried, problem=replace(tried.problem, batch=1))
    fewer = Given(one, *(tuple(t[:1] for t in group) for group in (whole.inputs, whole.results, whole.above)))
    check(fewer, *made.backward(*fewer.inputs, *fewer.results, *fewer.above))


@pytest.mark.usefixtures("memory_is_nan")
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_elements_of_their_own(dtype):
    members = [m.causal(), m.window(3, 3), m.causal(), ~m.full()]
    tried = case("per-batch", m.per_batch(members), 100, 100, 24, heads=(2, 1), batch=4).with_dtype(dtype)
    check(given(tried), *call(given(tried))[1])


# Threads.


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


MANY_THREADS = [
    case("full-row-and-column", scattered(200, 300, 0.05), 200, 300, 40, v_dim=24),
    case("heavy-column", one_full_row(30, 3000, 7).T, 3000, 30, 16),
    case("grouped", scattered(200, 300, 0.05), 200, 300, 16, heads=(6, 2)),
    case("one-query", m.full(), 1, 257, 16),
    case("empty", ~m.full(), 100, 50, 16),
]


@pytest.mark.parametrize(("name", "tried"), [*_matrix(MANY_THREADS)])
def test_several_parts(name, tried, threads):
    made = running.launch(template(name), "cpu", tried)
    for count in (1, 2, 3, 7):
        threads(count)
        found = run(made, given(tried))
        check(given(tried), *found)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(run(made, given(tried)), found, strict=True))


@pytest.mark.parametrize("length", [257, 3000])
def test_long_sums_of_single_edges(length, threads):
    # Row by row, a key's gradient is added up one query after the other: as good as such a sum in fp32 can be.
    threads(1)
    tried = given(case("one-key", m.full(), length, 1, 16).with_dtype("fp32"))
    _, dk, dv = run(running.launch(template("row_traversal"), "cpu", tried.case), tried)
    d_out, d_lse = (tensor[0, 0] for tensor in tried.above)
    _, expected_k, expected_v = tried.expected[0, 0][0]
    for got, terms, expected in (
        (dk[0, 0], d_lse[:, None] * tried.inputs[0][0, 0] / 4, expected_k),
        (dv[0, 0], d_out, expected_v),
    ):
        plain = np.cumsum(terms.numpy(), axis=0)[-1:]
        error = np.abs(plain - expected).max() + reference.unit_roundoff("fp32") * np.abs(expected).max()
        running.check_close(got, expected, 2 * error, "a long sum")


@pytest.mark.parametrize("name", TEMPLATES)
def test_same_bits_from_run_to_run(name):
    tried = case("bits", scattered(200, 300, 0.05), 200, 300, 40, heads=(4, 2), batch=2).with_dtype("fp32")
    made, _ = call(given(tried), template=name)
    found = differentiate(made, given(tried).inputs, given(tried).above)
    for _ in range(5):
        again = differentiate(made, given(tried).inputs, given(tried).above)
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


# All three lists of a hybrid.


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_columns_and_single_edges_in_one_launch(dtype):
    rng = np.random.default_rng(4)
    dense = np.zeros((200, 300), bool)
    dense[:64, 32:160] = rng.random((64, 128)) < 0.9
    dense[70:180, [3, 111, 200, 299]] = rng.random((110, 4)) < 0.8
    dense[rng.integers(0, 200, 300), rng.integers(0, 300, 300)] = True
    dense[190:] = False
    tried = case("three-lists", m.from_dense(dense), 200, 300, 40, v_dim=24, heads=(2, 1)).with_dtype(dtype)
    made = running.launch(template("hybrid"), "cpu", tried)
    assert made.work.tiles.tile_map.indptr[-1] > 0
    assert made.work.gathered.indptr[-1] > 0
    assert made.work.rows.degrees().sum() > 0
    check(given(tried), *run(made, given(tried)))


# Instruction sets below the one this machine has.


def _lower_levels() -> list[str]:
    levels = list(_ISA_LEVELS[detect_cpu().arch])
    return [level for level in levels[: levels.index(detect_cpu().isa)] if level != "avx512"]


ISA_CASES = [
    HARD,
    case("scattered", scattered(65, 67, 0.3), 65, 67, 17, v_dim=3),
    case("scattered", scattered(65, 67, 0.3), 65, 67, 64, heads=(4, 2), batch=2),
    case("short-rows", by_degree([i % 10 for i in range(41)], 40), 41, 40, 32),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["hybrid", "row_traversal"])
@pytest.mark.parametrize("level", _lower_levels())
def test_lower_instruction_sets(level, name, dtype):
    device = replace(detect_cpu(), features=_ISA_LEVELS[detect_cpu().arch][level])
    for tried in ISA_CASES:
        tried = tried.with_dtype(dtype)
        check(given(tried), *run(running.launch(template(name), "cpu", tried, device=device), given(tried)))
