"""`attn.update(mask)`: another mask for the kernels at hand, exact whatever the plan, and no search."""

from __future__ import annotations

import contextlib
import math
import re

import numpy as np
import pytest
import torch
from cases import by_degree, case, scattered

import sparsec
from sparsec import buffers, runtime
from sparsec import masks as m
from sparsec.analysis import analyse
from sparsec.backends import cpu, reference
from sparsec.backends.base import Problem, backend
from sparsec.device import detect_cpu
from sparsec.errors import MaskError, UnsupportedError
from sparsec.planner import plans, search
from sparsec.planner.shortlist import shortlist
from sparsec.records import RecordKey, TuningRecord, Workload
from sparsec.template import template

from kernels import running  # isort: skip


HEAVY = [3, 77, 150, 222, 290, 411, 500, 599]
PAIRS = {
    "csr": (scattered(600, 600, 0.01, seed=1), scattered(600, 600, 0.03, seed=2), {}),
    "csr-by-tiles": (scattered(600, 600, 0.3), by_degree([i % 90 for i in range(600)], 600), {}),
    "hybrid": (scattered(600, 600, 0.05), scattered(600, 600, 0.02, seed=3), {"template": "hybrid"}),
    "blocks": tuple(m.random_blocks(3, 16, seed) for seed in (0, 1)) + ({},),
    "random": (m.random_edges(5, 0), m.random_edges(9, 4), {"template": "row_traversal"}),
    "window": (m.window(20, 0) | m.global_tokens(3), m.window(90, 7) | m.global_tokens([9, 500]), {}),
    "reordered": (m.dilated(120, 8), m.dilated(99, 6), {"reorder": "force"}),
    "heavy-rows": (m.window(4, 4) | m.global_tokens(HEAVY), m.window(9, 0) | m.global_tokens([5, 77]), {}),
    "joined": (m.dilated(120, 8) | m.random_edges(2, 0), m.dilated(240, 8) | m.random_edges(3, 5), {}),
    "heads": (
        m.per_head([m.window(3, 3), m.window(3, 3), m.random_edges(2, 0), m.random_edges(2, 0)]),
        m.per_head([m.window(9, 3), m.window(3, 3), m.random_edges(4, 1), m.random_edges(4, 1)]),
        {},
    ),
    "batch-of-heads": (
        m.per_batch([m.per_head([m.random_edges(i, 0), m.random_edges(3, 0)]) for i in (3, 3, 4)]),
        m.per_batch([m.per_head([m.random_edges(i, 1), m.random_edges(4, 1)]) for i in (3, 4, 4)]),
        {"template": "row_traversal"},
    ),
}


@pytest.fixture
def mixed_where_possible(monkeypatch):
    """Of all candidates only those of two launches, for masks that have one."""
    every = search._Search._drafts

    def drafts(self, servers):
        found = list(every(self, servers))
        yield from [draft for draft in found if len(draft.parts) > 1] or found

    monkeypatch.setattr(search._Search, "_drafts", drafts)


def _forbid_search(monkeypatch):
    for place, name in ((runtime, "plan"), (search, "analyse"), (plans, "analyse")):
        monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("searched again"))
    empty = buffers.empty
    monkeypatch.setattr(buffers, "empty", lambda *a, **o: empty(*a, **o).fill_(math.nan))


@pytest.mark.usefixtures("mixed_where_possible")
@pytest.mark.parametrize("name", PAIRS)
def test_the_result_is_that_of_the_new_mask(name, monkeypatch):
    before, after, options = PAIRS[name]
    tried = case(
        "after", after, 600, 600, 24, v_dim=40, heads=(4, 2) if name == "heads" else (2, 1), batch=after.n_batch or 1
    )
    q, k, v = (tensor.clone().requires_grad_() for tensor in running.inputs(tried))
    attn = sparsec.compile(before, 600, **options)
    attn(q, k, v)[0].sum().backward()
    n_steps = [len(group.steps) for group in attn.plan.groups]
    assert max(n_steps) == (2 if name in ("heavy-rows", "joined") else 1)
    configs = {(s.launch.template.name, s.launch.config, s.launch.work.ordering.name) for s in attn.plan.steps}
    with monkeypatch.context() as patched:
        _forbid_search(patched)
        attn.update(after)
        out, lse = attn(q, k, v, return_lse=True)
    running.check(tried, out.detach(), lse.detach())
    kept = {(s.launch.template.name, s.launch.config, s.launch.work.ordering.name) for s in attn.plan.steps}
    assert kept == configs
    assert attn.plan.groups[0].config_source.endswith("kept for another mask")
    assert attn.plan.groups[0].profile.nnz == after.bind(600).select(0, 0).nnz
    # Gradients against a plan of its own, itself held to the reference elsewhere.
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad(out, (q, k, v), d_out)
    fresh = sparsec.compile(after, 600, template="row_traversal")
    for mine, other in zip(got, torch.autograd.grad(fresh(q, k, v), (q, k, v), d_out), strict=True):
        torch.testing.assert_close(mine, other, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (PAIRS["csr"][0], PAIRS["csr"][1]),
        PAIRS["heads"][:2],
        # Two groups of one mask, with other heads: the plan itself gives them the same launches.
        tuple(
            m.per_batch(
                [m.per_head([m.random_edges(d, 0), m.random_edges(3, 0)]), m.per_head([m.random_edges(3, 0)] * 2)]
            )
            for d in (2, 5)
        ),
    ],
    ids=["edges", "heads", "batch-of-heads"],
)
def test_a_backward_pass_that_records_name_follows_the_new_mask(before, after, no_records):
    bound = after.bind(600)
    heads = bound.n_heads or 2
    problem = Problem(600, 600, heads, heads, 24, 24, batch=bound.n_batch or 1, needs_grad=True)
    rows, tiles = template("row_traversal"), template("block_sparse")
    compiler = backend("cpu").toolchain()
    workload = Workload.of(analyse(before.bind(600).select(0, 0)), heads=heads, batch=problem.batch)
    for each, direction, us in (
        (rows, "forward", 1.0),
        (tiles, "forward", 9.0),
        (template("hybrid"), "forward", 9.0),
        (rows, "backward", 9.0),
        (tiles, "backward", 1.0),
    ):
        key = RecordKey.of(each, "cpu", problem, detect_cpu(), direction)
        config = shortlist(each, "cpu", problem, detect_cpu())[0][0]
        no_records.extend([TuningRecord(key, workload, config, (us,), toolchain=compiler)])
    attn = sparsec.compile(before, 600, reorder="off")
    generator = torch.Generator().manual_seed(5)
    q, k, v, d_out = torch.randn(4, problem.batch, heads, 600, 24, generator=generator)

    def check(bound):
        given = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        attn(*given).backward(d_out)
        by_records = [group.backward for group in attn.plan.groups]
        assert any(launches and launches[0].template is tiles for launches in by_records)
        for b in range(problem.batch):
            for h in range(heads):
                own = bound.select(b, h)
                arrays = [tensor[b, h].double().numpy() for tensor in (q, k, v)]
                above = d_out[b, h].double().numpy(), np.zeros(600)
                expected = reference.gradients(*arrays, own, 24**-0.5, *above)
                allowed = reference.gradient_tolerances(*arrays, own, 24**-0.5, *above, "fp32")
                for name, tensor, wanted, limit in zip("qkv", given, expected, allowed, strict=True):
                    running.check_close(tensor.grad[b, h], wanted, limit, f"d{name} of head {h}, batch element {b}")

    check(before.bind(600))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cpu, "_compile", lambda *_: pytest.fail("compiled again"))
        attn.update(after)
        check(bound)
    group = attn.plan.groups[0]
    assert group.expected_us is None
    assert group.backward is None or group.backward_source.endswith("kept for another mask")
    attn.update(before)
    check(before.bind(600))


def test_a_mask_of_another_structure_is_refused():
    q, k, v = torch.randn(3, 1, 2, 600, 16)
    attn = sparsec.compile(PAIRS["csr"][0], 600)
    out = attn(q, k, v)
    for other in (m.window(5, 5), PAIRS["csr"][1] | m.window(2, 0), ~PAIRS["csr"][1]):
        with pytest.raises(
            MaskError, match=r"update takes a mask built as from_.*built otherwise: compile it on its own"
        ):
            attn.update(other)
    full = sparsec.compile(m.window(600, 600), 600, template="dense")
    full(q, k, v)
    with pytest.raises(MaskError, match=r"as dense attention, which window\(3, 3\) is not"):
        full.update(m.window(3, 3))
    assert torch.equal(attn(q, k, v), out)


@pytest.mark.parametrize("name", ["csr", "window", "heads"])
def test_a_gradient_is_that_of_the_mask_of_its_forward_pass(name):
    before, after, options = PAIRS[name]
    heads = 4 if name == "heads" else 2
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(1, heads, 600, 24, generator=generator).requires_grad_() for _ in "qkv")
    attn = sparsec.compile(before, 600, **options)
    wanted = torch.autograd.grad(attn(q, k, v).square().sum(), (q, k, v))
    first = attn(q, k, v)
    attn.update(after)
    second = attn(q, k, v)
    attn.update(before)
    wanted_second = torch.autograd.grad(sparsec.compile(after, 600, **options)(q, k, v).square().sum(), (q, k, v))
    for out, expected in ((second, wanted_second), (first, wanted)):
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("with_copies", [False, True], ids=["kept", "copied"])
def test_a_compiled_gradient_is_that_of_the_mask_of_its_forward_pass(with_copies):
    """A compiled graph knows the attention's number alone; where it cannot be right, it says so."""
    torch._dynamo.reset()
    before, after, _ = PAIRS["csr"]
    generator = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(1, 2, 600, 24, generator=generator).requires_grad_() for _ in "qkv")
    attn = sparsec.compile(before, 600)

    def loss(q, k, v):
        return (attn(q, k, v) * 2.0).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(loss(q, k, v), (q, k, v))
    found = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    torch.testing.assert_close(found, wanted)
    hooks = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t)
    with hooks if with_copies else contextlib.nullcontext():
        first = compiled(q, k, v)
    attn.update(after)
    if with_copies:
        with pytest.raises(UnsupportedError, match="copy of its forward pass's log-sum-exp"):
            torch.autograd.grad(first, (q, k, v))
        # Without a graph in between, who computed it is kept beside what was saved.
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
            eager = loss(q, k, v)
        attn.update(before)
        wanted = torch.autograd.grad(sparsec.compile(after, 600)(q, k, v).mul(2.0).square().sum(), (q, k, v))
        torch.testing.assert_close(torch.autograd.grad(eager, (q, k, v)), wanted, atol=3e-5, rtol=3e-5)
        return
    second = compiled(q, k, v)
    torch.testing.assert_close(torch.autograd.grad(first, (q, k, v)), wanted)
    wanted = torch.autograd.grad(sparsec.compile(after, 600)(q, k, v).mul(2.0).square().sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(second, (q, k, v)), wanted, atol=3e-5, rtol=3e-5)


def test_steps_follow_the_new_mask():
    q, k, v = torch.randn(3, 1, 2, 60, 16)
    attn = sparsec.compile(m.window(20, 0), 60)
    attn.step(q[:, :, 29:30], k[:, :, :30], v[:, :, :30])
    attn.update(m.window(3, 0))
    out = attn.step(q[:, :, 29:30], k[:, :, :30], v[:, :, :30])
    torch.testing.assert_close(out, sparsec.attention(q, k, v, m.window(3, 0))[:, :, 29:30])


def test_csr_is_checked_in_three_passes():
    """Whatever is wrong is named; what is right costs no more than reading the indices three times."""
    good = np.array([0, 2, 5], np.int32), np.array([1, 3, 0, 2, 4], np.int32)
    reads = []

    class Counted(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
            reads.append(f"{ufunc.__name__} {method}")
            plain = [x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs]
            return getattr(ufunc, method)(*plain, **kwargs)

        def astype(self, *args, **kwargs):
            reads.append("astype")
            return self.view(np.ndarray).astype(*args, **kwargs)

    monitored = good[1].view(Counted)
    asarray = np.asarray
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(np, "asarray", lambda x, *a, **o: x if x is monitored else asarray(x, *a, **o))
        mask = m.from_csr(good[0], monitored, 5)
    assert len(reads) <= 3, reads
    assert mask == m.from_csr(*good, 5)
    for indptr, indices, found in (
        ([0, 2, 4], [1, 3, 0, 5], "row 1 has column 5"),
        ([0, 2, 4], [-1, 3, 0, 4], "row 0 has column -1"),
        ([0, 0, 3], [2, 1, 4], "row 1 has unsorted columns: 2, then 1"),
        ([0, 2, 4], [1, 1, 0, 2], "row 0 has a repeated column: 1, then 1"),
    ):
        with pytest.raises(MaskError, match=re.escape(found)):
            m.from_csr(indptr, indices, 5)
    # A row may begin below where the one before it ends, and rows may be empty anywhere.
    assert m.from_csr([0, 0, 2, 2, 3, 3], [3, 4, 0], 5).bind().degrees("q").tolist() == [0, 2, 0, 1, 0]


def test_kernels_take_over_from_those_they_replace(monkeypatch):
    """Where a kernel can: those of a GPU, which a captured graph may hold."""
    from sparsec.backends.cpu_kernels import CpuKernel

    seen = []
    monkeypatch.setattr(CpuKernel, "take_over", lambda new, old: seen.append((new, old)), raising=False)
    made = sparsec.compile(m.window(9, 0), 64, tune="off")
    q = torch.randn(1, 1, 64, 16)
    made(q, q, q)
    before = [kernel for _, kernel in made._latest.kernels()]
    made.update(m.window(5, 0))
    after = [kernel for _, kernel in made._latest.kernels()]
    assert seen == list(zip(after, before, strict=True))
    assert seen
