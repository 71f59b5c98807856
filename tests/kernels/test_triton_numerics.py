"""The Triton kernels through Triton's interpreter, in fp32 and fp16, against dense attention in fp64.

The interpreter has to be chosen before Triton is imported, so the kernels run in a process of their own. It computes
nothing in bf16; that is lowered (`test_triton_lowering.py`) and run on a device.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import running
import torch
from cases import Case, by_degree, case, scattered

from sparsec import masks as m
from sparsec.backends import reference
from sparsec.backends import triton as triton_backend
from sparsec.backends.base import Launch, Work
from sparsec.backends.reference import Modifier
from sparsec.backends.triton_calls import Call
from sparsec.device import device
from sparsec.layout import EdgeOrder, Ordering, reordered, row_lists, schedule
from sparsec.score import ScoreMod, alibi, as_score_mod, chain, edge_bias, relative_bias, row_bias, soft_cap
from sparsec.score_arguments import with_sinks
from sparsec.template import Config, template

# Not `importorskip`: the interpreter's process imports this file, and must not import Triton before it chose.
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

DEVICE = "nvidia-h100"
TEMPLATES = ("block_sparse", "row_traversal", "hybrid")

# Small, because an interpreted operation takes as long as on a large tile. Blocks of 16 leave several of each kind.
SMALL = {
    "block_sparse": {"block_q": 16, "block_kv": 16},
    "row_traversal": {"block_q": 4},
    "hybrid": {"block_kv": 16},
}


@pytest.fixture(scope="module")
def interpreter():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), running.start_interpreter) as executor:
        yield lambda job, *arguments: executor.submit(job, *arguments).result()


def _config(name: str, **values: int) -> Config:
    chosen = template(name)
    config = Config.of(**{**chosen.default("triton").to_dict(), **values})
    assert chosen.violation("triton", config) is None
    return config


def _launch(name: str, tried: Case, values: dict[str, int] | None = None, **options) -> Launch:
    config = _config(name, **{**SMALL[name], **(values or {})})
    return running.launch(template(name), "triton", tried, config=config, device=device(DEVICE), **options)


def _checked(made: Launch, tried: Case) -> None:
    out, lse = running.poisoned(tried, is_partial=made.is_partial)
    q, k, v = running.inputs(tried)
    triton_backend.backend().lower(made)(q, k, v, out, lse)
    if made.score is None:
        running.check(tried, out, lse)
    else:
        _check_modified(made, tried, out, lse)


def _modifier(made: Launch, b: int, h: int, tables: Sequence[torch.Tensor]) -> Modifier:
    """That of a launch in the tokens' own order, which is that of the case."""
    numbers = made.work.numbers
    return Modifier(made.score.given(tables), b, h, numbered=None if numbers is None else numbers.mask)


def _check_modified(
    made: Launch, tried: Case, out: torch.Tensor, lse: torch.Tensor, tables: Sequence[torch.Tensor] = ()
) -> None:
    q, k, v = running.inputs(tried)
    group = tried.problem.q_heads // tried.problem.kv_heads
    for b, h in np.ndindex(lse.shape[:2]):
        heads = tuple(t.double().numpy() for t in (q[b, h], k[b, h // group], v[b, h // group]))
        modifier = _modifier(made, b, h, tables)
        wanted = reference.attention(*heads, tried.bound, made.scale, modifier=modifier)
        allowed = reference.tolerances(*heads, tried.bound, made.scale, tried.problem.dtype, modifier)
        running.check_close(out[b, h], wanted[0], allowed[0], f"output of head {h}, batch element {b}")
        running.check_close(lse[b, h], wanted[1], allowed[1], f"log-sum-exp of head {h}, batch element {b}")


# What runs in the interpreter's process.


def _run(name: str, tried: Case, values: dict[str, int]) -> None:
    _checked(_launch(name, tried, values), tried)


def _run_split(name: str, tried: Case, values: dict[str, int] | None = None) -> None:
    made = _launch(name, tried, values)
    pieces = split(made.work)
    assert pieces.schedule.n_slots > (4 if values is None else 1)
    _checked(replace(made, work=pieces), tried)


def _run_shuffled(name: str, tried: Case, values: dict[str, int] | None = None) -> None:
    rng = np.random.default_rng(2)
    orders = (rng.permutation(length).astype(np.int32) for length in tried.bound.shape)
    ordering = Ordering("shuffled", *orders)
    bound = reordered(tried.bound, ordering)
    _checked(_launch(name, tried, values, ordering=ordering, bound=bound), tried)


def _run_persistent(name: str, tried: Case, direction: str) -> None:
    """Three programs take every item of every head, one after the other; each result has the bits of a whole grid's."""
    few = replace(device(DEVICE), units=3)
    staying, whole = (replace(_launch(name, tried, {"persistent": k}), device=few) for k in (1, 0))
    calls = calls_of(staying, direction)
    wanted = [calls_of(whole, direction)[i].grid(tried.problem.batch) for i in range(len(calls))]
    grids = [call.grid(tried.problem.batch) for call in calls]
    n_persistent = sum(call.constants.get("PERSISTENT", False) for call in calls)
    assert n_persistent == (1 if direction == "forward" else 2)
    assert grids.count(3) == n_persistent
    assert max(wanted) > 9
    if direction == "backward":
        _check_gradient(staying, tried)
        return
    _checked(staying, tried)
    (out, lse), (wanted_out, wanted_lse) = running.poisoned(tried), running.poisoned(tried)
    triton_backend.backend().lower(staying)(*running.inputs(tried), out, lse)
    triton_backend.backend().lower(whole)(*running.inputs(tried), wanted_out, wanted_lse)
    assert torch.equal(out, wanted_out)
    assert torch.equal(lse, wanted_lse)


def calls_of(made: Launch, direction: str) -> tuple[Call, ...]:
    return triton_backend.calls_of(made) if direction == "forward" else triton_backend.gradient_calls_of(made)


def _run_replayed(name: str, reaches: tuple[int, ...], is_in_place: bool) -> None:
    """What a captured graph does once its mask has been updated: it runs the old calls on the buffers they had."""
    tried = [case("replayed", m.window(n, 2), 41, 41, 16, heads=(2, 1)).with_dtype("fp32") for n in reaches]
    captured, *others = (triton_backend.backend().lower(_launch(name, each)) for each in tried)

    def check(kernel, each: Case) -> None:
        out, lse = running.poisoned(each)
        kernel(*running.inputs(each), out, lse)
        running.check(each, out, lse)

    def places(kernel) -> list[int]:
        buffers = [each for held in kernel._arrays_on(torch.device("cpu")) for each in held.values()]
        return [each.data_ptr() for each in buffers if each is not None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "_is_capturing", lambda device: True)
        check(captured, tried[0])
    old = captured
    for new, each in zip(others, tried[1:], strict=True):
        new.take_over(old)
        assert (places(new) == places(captured)) == is_in_place
        check(new, each)
        check(captured, each if is_in_place else tried[0])
        old = new


def _run_partial(name: str, tried: Case) -> None:
    _checked(_launch(name, tried, is_partial=True), tried)


def _run_some_heads(name: str, tried: Case, values: dict[str, int] | None = None) -> None:
    made = replace(_launch(name, tried, values), heads=(1, 2), batch=(1,))
    out, lse = running.poisoned(tried)
    triton_backend.backend().lower(made)(*running.inputs(tried), out, lse)
    whole_out, whole_lse = running.poisoned(tried)
    triton_backend.backend().lower(_launch(name, tried, values))(*running.inputs(tried), whole_out, whole_lse)
    written = torch.zeros_like(lse, dtype=torch.bool)
    written[1, 1:3] = True
    assert torch.equal(~torch.isnan(lse), written)
    assert torch.equal(~torch.isnan(out).any(-1), written)
    if values is None:
        assert torch.equal(out[1, 1:3], whole_out[1, 1:3])
        assert torch.equal(lse[1, 1:3], whole_lse[1, 1:3])
    else:
        # Where fewer heads are packed, the matrix units take other rows.
        running.check(tried, whole_out, whole_lse)
        torch.testing.assert_close(out[1, 1:3], whole_out[1, 1:3])
        torch.testing.assert_close(lse[1, 1:3], whole_lse[1, 1:3])


def _far_apart(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same values, their rows, heads and batch elements gigabytes apart; pages never touched cost nothing."""
    apart = 2**28
    virtual = torch.empty(5 * 2 * 2 * apart, dtype=torch.float16)
    views = []
    for tensor in tensors:
        view = virtual.as_strided(tensor.shape, (10 * apart, 5 * apart, apart, 1), 64 * len(views))
        view.copy_(tensor)
        views.append(view)
    assert max(view.stride(0) + view.stride(1) for view in views) > 2**31
    return views


def _run_far_apart(name: str, tried: Case) -> None:
    views = _far_apart([*running.inputs(tried), running.poisoned(tried)[0]])
    lse = running.poisoned(tried)[1]
    triton_backend.backend().lower(_launch(name, tried))(*views, lse)
    running.check(tried, views[3], lse)


def _run_gradient_far_apart(name: str, tried: Case) -> None:
    """The bits of the gradients of the same values side by side, which other tests hold to the reference."""
    made = _launch(name, tried)
    (out, lse), q = running.poisoned(tried), running.inputs(tried)[0]
    triton_backend.backend().lower(made)(*running.inputs(tried), out, lse)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).half()
    near = [*running.inputs(tried), out, d_out, torch.full_like(q, float("nan"))]
    results = []
    for q, k, v, out, d_out, dq in (near, _far_apart(near)):
        dk, dv = torch.zeros(k.shape), torch.zeros(v.shape)
        triton_backend.backend().lower_backward(made)(q, k, v, out, lse, d_out, None, dq, dk, dv)
        results.append((dq, dk, dv))
    for wanted, got in zip(*results, strict=True):
        assert torch.equal(wanted, got)
        assert wanted.abs().max() > 0


def _run_rows_as(form: str, tried: Case) -> None:
    made = _launch("row_traversal", tried)
    rows = row_lists(tried.bound, form)
    assert rows.form == form
    _checked(replace(made, work=replace(made.work, rows=rows)), tried)


def _run_gradient(name: str, tried: Case, values: dict[str, int] | None = None, *, is_split: bool = False) -> None:
    made = _launch(name, tried, values)
    _check_gradient(replace(made, work=split(made.work)) if is_split else made, tried)


def _run_gradient_packed(name: str, tried: Case, values: dict[str, int], is_split: bool) -> None:
    made = _launch(name, tried, values)
    sides = [call for call in triton_backend.gradient_calls_of(made) if call.name == "backward"]
    # A step of the stream holds no more heads than rows, and beside single edges one.
    by_keys = min(values["pack_gqa"], sides[1].constants["STEP"]) if sides[1].constants["FORM"] is None else 1
    assert [call.constants["PACK"] for call in sides] == [values["pack_gqa"], by_keys]
    _check_gradient(replace(made, work=split(made.work)) if is_split else made, tried)


def _run_gradient_of_heads(tried: Case, heads: tuple[int, ...]) -> None:
    """Heads that make no whole pack leave rows and columns of low tiles empty."""
    made = replace(_launch("block_sparse", tried, {"block_q": 8, "pack_gqa": 2}), heads=heads)
    sides = [call for call in triton_backend.gradient_calls_of(made) if call.name == "backward"]
    assert {call.constants["PACK"] for call in sides} == {1 + (heads[0] % 2 == 0)}
    _check_gradient(made, tried)


def modifiers() -> dict[str, ScoreMod]:
    """What a modifier may do: look up by head and distance, bend scores, depend on everything, or forbid pairs."""
    rng = np.random.default_rng(4)
    bias = rng.normal(size=(4, 33)).astype(np.float32)
    chosen, shift = rng.random(50) < 0.7, rng.integers(-3, 4, 35)
    return {
        "alibi": alibi(rng.random(4)),
        "soft-cap": soft_cap(1.5),
        "relative-bias": relative_bias(bias),
        "everything": as_score_mod(
            lambda score, b, h, q, kv: (score * (h + 1) / (kv % 3 + 1) + shift[q] * 0.25 - b * kv / 64).where(
                chosen[kv], score * -0.5
            )
        ),
        "steep": as_score_mod(
            lambda score, b, h, q, kv: (
                score + torch.log(torch.clamp(score, max=9e9) - score + 1.0 - (kv % 5) // 4)  # of 0 for every fifth key
            )
        ),
        "constant": as_score_mod(lambda score, b, h, q, kv: 0.5),
        "forbids": as_score_mod(lambda score, b, h, q, kv: score.where(kv % 4 != 1, float("-inf"))),
    }


def _run_modified(name: str, tried: Case, modifier: str, direction: str) -> None:
    made = replace(
        _launch(name, tried, {} if name == "row_traversal" else {"pack_gqa": 2}), score=modifiers()[modifier]
    )
    if direction == "forward":
        _checked(made, tried)
    else:
        _check_gradient(made, tried)


def _run_modified_shuffled(name: str, tried: Case) -> None:
    """A modifier is told tokens, whatever their order."""
    rng = np.random.default_rng(2)
    orders = (rng.permutation(length).astype(np.int32) for length in tried.bound.shape)
    ordering = Ordering("shuffled", *orders)
    made = _launch(name, tried, ordering=ordering, bound=reordered(tried.bound, ordering))
    made = replace(made, score=modifiers()["relative-bias"])
    _checked(made, tried)
    _check_gradient(made, tried)


def live_modifiers(nnz: int) -> dict[str, ScoreMod]:
    """Captured tensors by every kind of index, whose gradients are added up in as many ways."""
    bias, gain, shift, slopes = (torch.zeros(*shape, requires_grad=True) for shape in ((4, 33), (4,), (2, 50), (4,)))
    edges, own_edges = (torch.zeros(*shape, requires_grad=True) for shape in ((nnz,), (2, 4, nnz)))
    return {
        "by-places": as_score_mod(
            lambda score, b, h, q, kv: (
                (score * (1.5 + gain[h]) + bias[h, kv - q + 16] + shift[b, kv]) * (1.0 + 0.25 * shift[0, q])
            )
        ),
        "by-edges": chain(
            alibi(slopes),
            edge_bias(edges),
            lambda score, b, h, q, kv: 20.0 * torch.tanh(score / 20.0) + torch.sigmoid(score),
            edge_bias(own_edges),
        ),
    }


def _run_live(name: str, tried: Case, modifier: str, values: dict[str, int] | None = None) -> None:
    """Captured tensors that are given anew at each call, and their gradients."""
    score = live_modifiers(tried.bound.nnz)[modifier]
    made = replace(_launch(name, tried, values, edges=EdgeOrder(tried.bound)), score=score)
    if modifier == "by-places":
        made = replace(made, work=replace(made.work, numbers=None))
    kernel = triton_backend.backend().lower(made)
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        given = [torch.randn(table.shape, generator=generator) / 2 for table in score.live_tables]
        out, lse = running.poisoned(tried)
        kernel(*running.inputs(tried), out, lse, given)
        _check_modified(made, tried, out, lse, given)
    _check_gradient(made, tried, tables=given)
    # Where no gradient of theirs is wanted, another kernel runs.
    _check_gradient(made, tried, tables=given, are_wanted=False)


def _run_edges(name: str, tried: Case, values: dict[str, int]) -> None:
    """Another bias for every edge, head and batch element."""
    p, rng = tried.problem, np.random.default_rng(6)
    bias = rng.normal(size=(p.batch, p.q_heads, tried.bound.nnz)).astype(np.float32)
    slopes = torch.rand(p.q_heads, generator=torch.Generator().manual_seed(6))
    score = chain(edge_bias(bias), alibi(slopes.numpy()), soft_cap(4.0))
    _checked(replace(_launch(name, tried, values, edges=EdgeOrder(tried.bound)), score=score), tried)


def _run_step(name: str, tried: Case) -> None:
    """Queries of a longer sequence: what a modifier is told of the first is not 0."""
    score, first = alibi([0.5, 0.25, 0.125, 0.0625]), 23
    made = replace(_launch(name, tried), score=chain(score, row_bias(np.arange(99) % 7 / 8)), first_query=first)
    out, lse = running.poisoned(tried)
    triton_backend.backend().lower(made)(*running.inputs(tried), out, lse)
    wanted_out, wanted_lse = running.poisoned(tried)
    reference.ReferenceKernel(made)(*running.inputs(tried), wanted_out, wanted_lse)
    torch.testing.assert_close(out, wanted_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)


def _run_sunk(name: str, tried: Case) -> None:
    """Sinks enter what the kernels made, and what they differentiate, against dense attention in fp64."""
    made, p = _launch(name, tried), tried.problem
    group = p.q_heads // p.kv_heads
    q, k, v = (tensor.requires_grad_() for tensor in (tensor.clone() for tensor in running.inputs(tried)))
    logits = torch.tensor([0.5, -torch.inf, 3.0, -2.0], requires_grad=True)
    plain, log_sums = running.poisoned(tried)
    triton_backend.backend().lower(made)(q.detach(), k.detach(), v.detach(), plain, log_sums)
    leaves = plain.requires_grad_(), log_sums.requires_grad_()
    out, lse = with_sinks(*leaves, logits)
    exact = [tensor.detach().double().requires_grad_() for tensor in (q, k, v, logits)]
    scores = exact[0] @ exact[1].repeat_interleave(group, 1).transpose(2, 3) * made.scale
    scores = scores.masked_fill(~torch.from_numpy(tried.bound.to_dense()), -torch.inf)
    sunk = torch.cat((scores, exact[3][None, :, None, None].expand(*scores.shape[:3], 1)), 3)
    # Without keys and with no sink there is nothing to divide by.
    weights = torch.softmax(sunk, 3).nan_to_num(0.0)[..., :-1]
    wanted = weights @ exact[2].repeat_interleave(group, 1), torch.logsumexp(sunk, 3)
    for got, right in zip((out, lse), wanted, strict=True):
        torch.testing.assert_close(got.detach().double(), right.detach(), rtol=1e-5, atol=1e-5)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    above = torch.autograd.grad(out, (*leaves, logits), d_out)
    dq, dk, dv = torch.full_like(q, float("nan")), torch.zeros(k.shape), torch.zeros(v.shape)
    gradient = triton_backend.backend().lower_backward(made)
    with torch.no_grad():
        gradient(q, k, v, plain, log_sums, *above[:2], dq, dk, dv)
    for got, right in zip((dq, dk, dv, above[2]), torch.autograd.grad(wanted[0], exact, d_out.double()), strict=True):
        torch.testing.assert_close(got.double(), right.nan_to_num(0.0), rtol=1e-4, atol=1e-5)


def _run_by_predicate(name: str, tried: Case) -> None:
    made = _launch(name, tried, {"by_predicate": 1})
    assert triton_backend.calls_of(made)[0].functions["ATTENDS"] is not None
    _checked(made, tried)
    _check_gradient(made, tried)


def _run_described(name: str, tried: Case, is_aligned: bool, direction: str) -> None:
    """Tiles fetched through descriptors, or not where a view of them is not aligned for that."""
    made = _launch(name, tried, {"descriptors": 1})
    described = [call.constants.get("DESCRIBED", False) for call in calls_of(made, direction)]
    assert sum(described) == (1 if direction == "forward" else 2)
    if direction == "backward":
        _check_gradient(made, tried)
        return
    if is_aligned:
        _checked(made, tried)
        return
    q, k, v = running.inputs(tried)
    apart = [torch.zeros(*tensor.shape[:3], tensor.shape[3] + 3, dtype=tensor.dtype) for tensor in (k, v)]
    views = [wide[..., 3:].copy_(tensor) for wide, tensor in zip(apart, (k, v), strict=True)]
    out, lse = running.poisoned(tried)
    triton_backend.backend().lower(made)(q, *views, out, lse)
    running.check(tried, out, lse)


def _run_gradient_split(name: str, tried: Case) -> None:
    _run_gradient(name, tried, is_split=True)


def _run_gradient_shuffled(name: str, tried: Case) -> None:
    rng = np.random.default_rng(2)
    orders = (rng.permutation(length).astype(np.int32) for length in tried.bound.shape)
    ordering = Ordering("shuffled", *orders)
    _check_gradient(_launch(name, tried, ordering=ordering, bound=reordered(tried.bound, ordering)), tried)


def _run_gradient_of_some_heads(name: str, tried: Case) -> None:
    _check_gradient(replace(_launch(name, tried), heads=(1, 2), batch=(1,)), tried, with_d_lse=False)


def _check_gradient(
    made: Launch,
    tried: Case,
    *,
    with_d_lse: bool = True,
    tables: Sequence[torch.Tensor] = (),
    are_wanted: bool = True,
) -> None:
    """Holds dq, and what is added to dk, dv and gradients of tables, to the reference, given exact results."""
    p, scale = tried.problem, running.scale_of(tried)
    group = p.q_heads // p.kv_heads
    q, k, v = running.inputs(tried)
    # Coarse, so that scores are exact in any order of sums, and every error is the backward pass's own.
    q, k = (tensor.mul(8).round().div(8) for tensor in (q, k))
    out, lse = running.poisoned(tried)
    everything = {"heads": tuple(range(p.q_heads)), "batch": tuple(range(p.batch)), "score": made.score}
    whole = _launch(made.template.name, tried)
    whole = replace(whole, work=replace(whole.work, numbers=made.work.numbers), **everything)
    reference.ReferenceKernel(whole)(q, k, v, out, lse, tables)
    generator = torch.Generator().manual_seed(13)
    d_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    d_lse = torch.randn(lse.shape, generator=generator)
    dq, dk, dv = torch.full_like(q, float("nan")), torch.ones(k.shape), torch.ones(v.shape)
    d_tables = [torch.ones(table.shape) if are_wanted else None for table in tables]
    expected_tables, allowed_tables = [np.ones(table.shape) for table in tables], [1e-5] * len(tables)
    gradient = triton_backend.backend().lower_backward(made)
    gradient(q, k, v, out, lse, d_out, d_lse if with_d_lse else None, dq, dk, dv, tables, d_tables)
    written = torch.zeros(lse.shape, dtype=torch.bool)
    allowed_k, allowed_v = np.full(k.shape[:2], 1e-5), np.full(v.shape[:2], 1e-5)
    expected_k, expected_v = np.ones(k.shape), np.ones(v.shape)
    for b in made.elements(p.batch):
        for h in made.heads:
            heads = tuple(t.double().numpy() for t in (q[b, h], k[b, h // group], v[b, h // group]))
            above = d_out[b, h].double().numpy(), d_lse[b, h].double().numpy() * with_d_lse
            modifier = None if made.score is None else _modifier(made, b, h, tables)
            wanted = reference.gradients(*heads, tried.bound, scale, *above, modifier, expected_tables)
            allowed = reference.gradient_tolerances(*heads, tried.bound, scale, *above, p.dtype, modifier)
            running.check_close(dq[b, h], wanted[0], allowed[0], f"dq of head {h}, batch element {b}")
            written[b, h] = True
            expected_k[b, h // group] += wanted[1]
            expected_v[b, h // group] += wanted[2]
            allowed_k[b, h // group] += allowed[1]
            allowed_v[b, h // group] += allowed[2]
            allowed_tables = [total + own for total, own in zip(allowed_tables, allowed[3:], strict=True)]
    assert torch.equal(~torch.isnan(dq).any(-1), written)
    for b, h in np.ndindex(p.batch, p.kv_heads):
        running.check_close(dk[b, h], expected_k[b, h], allowed_k[b, h], f"dk of head {h}, batch element {b}")
        running.check_close(dv[b, h], expected_v[b, h], allowed_v[b, h], f"dv of head {h}, batch element {b}")
    for number, (got, expected, limit) in enumerate(zip(d_tables, expected_tables, allowed_tables, strict=True)):
        if got is not None:
            running.check_close(got, expected, limit, f"gradient of table {number}, {made.score.live_tables[number]}")


def split(work: Work) -> Work:
    """The same work with every unit in several pieces."""
    entries = np.zeros(int(work.schedule.unit.max()) + 1, np.int64)
    np.add.at(entries, work.schedule.unit, work.schedule.stop - work.schedule.start)
    indptr = np.concatenate(([0], np.cumsum(entries)))
    planned = schedule(indptr, 1.0, workers=10_000, max_split=3)
    if work.items is not None:
        # Pieces of a hybrid's units: each list is cut in the same proportion.
        return replace(work, schedule=planned, items=_pieces(work, planned, indptr))
    if work.tiles is None:
        base = indptr[planned.unit]
        planned = replace(planned, start=planned.start - base, stop=planned.stop - base)
    return replace(work, schedule=planned)


def _pieces(work: Work, planned, indptr):
    items, unit_of_item = work.items, work.schedule.unit
    whole = {int(unit): i for i, unit in enumerate(unit_of_item)}
    made = {name: np.zeros(planned.n_items, np.int64) for name in items.__slots__}
    for piece, unit in enumerate(planned.unit.tolist()):
        length = max(int(indptr[unit + 1] - indptr[unit]), 1)
        for kind in ("tile", "column", "edge"):
            low = int(getattr(items, f"{kind}_start")[whole[unit]])
            count = int(getattr(items, f"{kind}_stop")[whole[unit]]) - low
            for end, entry in (("start", planned.start[piece]), ("stop", planned.stop[piece])):
                made[f"{kind}_{end}"][piece] = low + count * (int(entry) - int(indptr[unit])) // length
    return type(items)(**made)


# Tests.


def spread(value: object) -> object:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.spread)


SPREAD_FP16 = spread("fp16")
# Tiles in which the heads of a group fill the rows of few queries, down to one.
MANY = case("many-heads", scattered(7, 150, 0.2), 7, 150, 20, v_dim=8, heads=(32, 2))
LOW = {
    "hybrid": [
        {"block_q": 1, "pack_gqa": 16, "column_queries": 1, "tile_percent": 100},
        {"block_q": 2, "pack_gqa": 8, "column_queries": 1},
        {"block_q": 4, "pack_gqa": 4, "column_queries": 1},
        {"block_q": 16, "pack_gqa": 4, "column_queries": 3},
    ],
    "block_sparse": [{"block_q": 1, "pack_gqa": 16}, {"block_q": 2, "pack_gqa": 16}],
}
HARD = case("hard", scattered(41, 67, 0.06), 41, 67, 24, v_dim=40, heads=(2, 1))
GROUPED = case("grouped", scattered(19, 37, 0.15), 19, 37, 20, v_dim=8, heads=(4, 2), batch=2)
FAR = case("far-apart", by_degree([3, 0, 5, 1, 4], 5), 5, 5, 8, heads=(2, 2), batch=2)
LONG_ROWS = case("long-rows", by_degree([2, 150, 0, 1, 3, 1, 150, 149, 5], 150), 9, 150, 16)


@pytest.mark.parametrize("dtype", ["fp32", SPREAD_FP16])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("job", [_run_split, _run_shuffled, _run_partial], ids=["split", "shuffled", "partial"])
def test_launches(interpreter, job, name, dtype):
    interpreter(job, name, HARD.with_dtype(dtype))


@pytest.mark.parametrize("name", ["block_sparse", spread("row_traversal"), spread("hybrid")])
def test_some_heads_of_some_batch_elements(interpreter, name):
    interpreter(_run_some_heads, name, GROUPED.with_dtype("fp32"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_strides_beyond_two_to_the_31(interpreter, name):
    interpreter(_run_far_apart, name, FAR.with_dtype("fp16"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_gradients_at_strides_beyond_two_to_the_31(interpreter, name):
    interpreter(_run_gradient_far_apart, name, FAR.with_dtype("fp16"))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_everything_at_once(interpreter, name, dtype):
    interpreter(_run, name, GROUPED.with_dtype(dtype), {})


@pytest.mark.parametrize("dtype", ["fp32", SPREAD_FP16])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "tried",
    [
        case("full-ragged", m.full(), 19, 37, 16, v_dim=1),
        case("empty", ~m.full(), 19, 37, 1, v_dim=16),
        case("window", m.window(9, 2), 40, 40, 80),
        case("dilated", m.dilated(20, 3), 40, 50, 17),
        LONG_ROWS,
        replace(HARD, scale=-0.2),
        replace(HARD, scale=0.0),
    ],
    ids=lambda tried: tried.id,
)
def test_masks(interpreter, tried, name, dtype):
    interpreter(_run, name, tried.with_dtype(dtype), {})


@pytest.mark.parametrize("dtype", [spread("fp32"), "fp16"])
@pytest.mark.parametrize(
    "values",
    [
        {"block_q": 64, "block_kv": 64},
        {"block_q": 32, "block_kv": 128, "num_warps": 8},
        {"block_q": 16, "block_kv": 32, "pack_gqa": 2},
        {"block_q": 16, "block_kv": 64, "pack_gqa": 8},
        {"block_q": 8, "block_kv": 16, "pack_gqa": 4},
    ],
    ids=str,
)
def test_tile_sizes_and_packed_heads(interpreter, values, dtype):
    interpreter(_run, "block_sparse", GROUPED.with_dtype(dtype), values)


def _low():
    for name, configs in LOW.items():
        for number, values in enumerate(configs):
            is_quick = (name, number) in (("hybrid", 0), ("hybrid", 3), ("block_sparse", 0))
            dtype = "fp32" if (name, number) == ("hybrid", 0) else "fp16"
            label = f"{name}-{values['block_q']}x{values['pack_gqa']}-{dtype}"
            yield pytest.param(name, values, dtype, id=label, marks=() if is_quick else pytest.mark.spread)


@pytest.mark.parametrize(("name", "values", "dtype"), [*_low()])
def test_heads_fill_tiles_of_few_queries(interpreter, name, values, dtype):
    """Every list in pieces, and whole in another order of tokens; rows without keys, and with nearly all."""
    tried = MANY.with_dtype(dtype)
    assert np.diff(tried.bound.to_csr().indptr).min() == 0
    assert np.diff(tried.bound.to_csr().indptr).max() == 149
    interpreter(_run_split, name, tried, values)
    interpreter(_run_shuffled, name, tried, values)


@pytest.mark.parametrize("name", ["block_sparse", "hybrid"])
def test_heads_that_do_not_fill_a_tile(interpreter, name):
    """A launch of heads of different groups packs none: rows that nobody reads fill its tiles up."""
    values = {"block_q": 8, "pack_gqa": 2, **({"column_queries": 1} if name == "hybrid" else {})}
    interpreter(_run_some_heads, name, GROUPED.with_dtype("fp32"), values)


@pytest.mark.parametrize(
    ("name", "values"),
    [("hybrid", LOW["hybrid"][0]), ("hybrid", LOW["hybrid"][3]), ("block_sparse", LOW["block_sparse"][0])],
    ids=["one-query", "single-edges", "tiles"],
)
def test_packed_rows_are_told_their_heads_and_edges(interpreter, name, values):
    """By contiguous tiles, gathered columns and single edges."""
    tried = case("packed-edges", scattered(7, 70, 0.2), 7, 70, 16, heads=(16, 1), batch=2)
    interpreter(_run_edges, name, tried.with_dtype("fp32"), values)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", ["block_sparse", "hybrid"])
def test_programs_that_stay(interpreter, name, direction):
    interpreter(_run_persistent, name, GROUPED.with_dtype("fp32"), direction)


@pytest.mark.parametrize(
    ("name", "reaches", "is_in_place"),
    [
        ("block_sparse", (20, 9, 19), True),
        ("block_sparse", (2, 30), False),
        ("hybrid", (20, 9), False),
        ("row_traversal", (9, 20), True),
    ],
)
def test_a_captured_kernel_takes_over_another_mask(interpreter, name, reaches, is_in_place):
    interpreter(_run_replayed, name, reaches, is_in_place)


def test_a_decoding_step(interpreter):
    """Queries of all heads of a group in one tile, their keys in pieces."""
    tried = case("decode", m.window(150, 0)[100:103, 0:103], 3, 103, 16, heads=(8, 1), batch=2)
    interpreter(_run_split, "block_sparse", tried.with_dtype("fp32"), {"block_q": 8, "pack_gqa": 8})


@pytest.mark.parametrize("values", [{"block_q": 1}, {"block_q": 16, "fetch": 16}, {"num_warps": 1}], ids=str)
def test_rows_abreast(interpreter, values):
    interpreter(_run, "row_traversal", LONG_ROWS.with_dtype("fp32"), values)


@pytest.mark.parametrize("form", ["offsets", "ranges", "edges"])
def test_forms_of_rows(interpreter, form):
    mask = m.dilated(9, 2) | m.window(2, 1)
    interpreter(_run_rows_as, form, case("two-steps", mask, 27, 31, 16).with_dtype("fp32"))


@pytest.mark.parametrize("dtype", ["fp32", SPREAD_FP16])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("job", [_run_gradient_split, _run_gradient_shuffled], ids=["split", "shuffled"])
def test_gradients_of_launches(interpreter, job, name, dtype):
    interpreter(job, name, HARD.with_dtype(dtype))


@pytest.mark.parametrize("name", ["block_sparse", spread("row_traversal"), spread("hybrid")])
def test_gradients_of_some_heads(interpreter, name):
    interpreter(_run_gradient_of_some_heads, name, GROUPED.with_dtype("fp32"))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "tried",
    [
        GROUPED.with_dtype("fp32"),
        GROUPED.with_dtype("fp16"),
        spread(case("full-ragged", m.full(), 19, 37, 16, v_dim=1).with_dtype("fp32")),
        case("empty", ~m.full(), 19, 37, 1, v_dim=16).with_dtype("fp32"),
        spread(case("dilated", m.dilated(20, 3), 40, 50, 17).with_dtype("fp16")),
        LONG_ROWS.with_dtype("fp32"),
        spread(replace(HARD, scale=-0.2).with_dtype("fp32")),
    ],
    ids=lambda tried: f"{tried.id}-{tried.problem.dtype}",
)
def test_gradients(interpreter, tried, name):
    interpreter(_run_gradient, name, tried)


@pytest.mark.spread
@pytest.mark.parametrize("values", [{"block_q": 64, "block_kv": 32}, {"block_q": 16, "block_kv": 128}], ids=str)
def test_gradients_in_tiles_of_other_sizes(interpreter, values):
    interpreter(_run_gradient, "block_sparse", GROUPED.with_dtype("fp32"), values)


def with_heads(tried: Case, q_heads: int, kv_heads: int) -> Case:
    return replace(tried, problem=replace(tried.problem, q_heads=q_heads, kv_heads=kv_heads))


TALL = case("tall", scattered(150, 20, 0.3), 150, 20, 16, v_dim=8, heads=(4, 1))


@pytest.mark.parametrize(
    ("name", "tried", "values", "is_split"),
    [
        ("block_sparse", GROUPED, {"block_q": 16, "pack_gqa": 2}, True),
        # Eight queries of two heads: as few rows, and as few columns, as matrix units take.
        ("block_sparse", GROUPED, {"block_q": 8, "pack_gqa": 2}, True),
        spread(("block_sparse", with_heads(GROUPED, 8, 2), {"block_q": 8, "pack_gqa": 4}, False)),
        # Keys whose queries are cut into pieces, each of all heads.
        ("block_sparse", TALL, {"block_q": 8, "pack_gqa": 2}, False),
        spread(("block_sparse", TALL, {"block_q": 32, "pack_gqa": 4}, True)),
        # Three kinds of lists; then every key gathered for one query of all heads, and more heads than a step holds.
        ("hybrid", with_heads(HARD, 4, 1), {"block_q": 16, "pack_gqa": 4}, True),
        ("hybrid", with_heads(HARD, 16, 1), {"block_q": 1, "pack_gqa": 16, "column_queries": 1}, True),
        spread(("hybrid", with_heads(HARD, 8, 1), {"block_q": 4, "pack_gqa": 8, "column_queries": 1}, False)),
        ("hybrid", with_heads(FAR, 64, 1), {"block_q": 1, "pack_gqa": 64, "column_queries": 1}, False),
    ],
    ids=str,
)
def test_gradients_of_packed_heads(interpreter, name, tried, values, is_split):
    interpreter(_run_gradient_packed, name, tried.with_dtype("fp32"), values, is_split)


@pytest.mark.parametrize("heads", [(0, 1), (1, 2)], ids=["packed", "apart"])
def test_gradients_of_heads_that_are_packed_or_not(interpreter, heads):
    interpreter(_run_gradient_of_heads, TALL.with_dtype("fp32"), heads)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("modifier", [name if name == "everything" else spread(name) for name in modifiers()])
def test_modifiers(interpreter, modifier, name, direction):
    dtype = "fp32" if modifier in ("everything", "forbids") else "fp16"
    interpreter(_run_modified, name, GROUPED.with_dtype(dtype), modifier, direction)


@pytest.mark.parametrize("dtype", ["fp32", SPREAD_FP16])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("modifier", ["by-places", "by-edges"])
def test_captured_tensors_and_their_gradients(interpreter, modifier, name, dtype):
    interpreter(_run_live, name, GROUPED.with_dtype(dtype), modifier)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("block_sparse", {"block_q": 8, "pack_gqa": 2}),
        ("hybrid", {"block_q": 16, "pack_gqa": 2}),
        ("hybrid", {"block_q": 8, "pack_gqa": 2, "column_queries": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("modifier", [spread("by-places"), "by-edges"])
def test_captured_tensors_of_packed_heads_and_their_gradients(interpreter, modifier, name, values):
    interpreter(_run_live, name, GROUPED.with_dtype("fp32"), modifier, values)


@pytest.mark.parametrize("name", TEMPLATES)
def test_modifiers_are_told_queries_of_a_longer_sequence(interpreter, name):
    interpreter(_run_step, name, GROUPED.with_dtype("fp32"))


@pytest.mark.parametrize("name", ["block_sparse", spread("row_traversal"), spread("hybrid")])
def test_sinks_enter_results_and_gradients(interpreter, name):
    interpreter(_run_sunk, name, GROUPED.with_dtype("fp32"))


@pytest.mark.spread
@pytest.mark.parametrize("name", TEMPLATES)
def test_modifiers_in_another_order_of_tokens(interpreter, name):
    interpreter(_run_modified_shuffled, name, HARD.with_dtype("fp32"))


@pytest.mark.parametrize("name", ["block_sparse", "hybrid"])
@pytest.mark.parametrize("mask", [m.window(9, 2), m.documents([7, 21, 13]), m.dilated(30, 3) | m.prefix(5)], ids=str)
def test_partial_tiles_by_predicate(interpreter, mask, name):
    interpreter(_run_by_predicate, name, case("predicate", mask, 41, 41, 16, heads=(2, 1)).with_dtype("fp32"))


@pytest.mark.parametrize(
    ("name", "is_aligned", "direction"),
    [
        ("block_sparse", True, "forward"),
        ("block_sparse", False, "forward"),
        ("block_sparse", True, "backward"),
        ("hybrid", True, "forward"),
        spread(("hybrid", True, "backward")),
    ],
)
def test_descriptors(interpreter, name, is_aligned, direction):
    tried = case("described", scattered(35, 45, 0.15), 35, 45, 24, v_dim=40, heads=(4, 2), batch=2)
    interpreter(_run_described, name, tried.with_dtype("fp16"), is_aligned, direction)
