"""What the benchmarks measure on GPUs alone, as far as a machine without one goes: what is computed and checked."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

from bench import ceiling, device_figures, measure  # noqa: E402
from bench.goals import outcomes  # noqa: E402
from bench.grid import Case, Effort, Goal, MaskSource, find_grid, load_grid  # noqa: E402
from bench.peers import RefusedError, peer  # noqa: E402
from bench.results import CaseRow, PeerRow, Protocol, Provenance, Run, Timing, decode  # noqa: E402
from bench.workload import make_workload  # noqa: E402

import sparsec  # noqa: E402
from sparsec import masks as m  # noqa: E402

EFFORT = Effort(seconds=1e-9, min_repeats=2, max_repeats=3)


def _silent(*_):
    pass


def _case(measure="attention", text="window(6, 6)", length=300, **options):
    source = MaskSource("turns", text, {"other": "window(4, 8)"}) if measure == "update" else MaskSource("text", text)
    return Case("tiny", measure, source, length, head_dim=16, **{"dtype": "bf16", **options})


def _measured(case):
    return device_figures.measured(case, EFFORT, 2, _silent, "cpu")


@pytest.mark.parametrize("measure", ["upload", "update", "longest"])
def test_what_is_measured_is_checked(measure, monkeypatch, two_threads):
    found = _measured(_case(measure))
    assert found.row("ours").status == "ok"
    assert found.row("ours").us >= (0 if measure == "longest" else device_figures._LEAST_US)
    assert decode(CaseRow, found.to_dict(), "") == found

    class Other:
        """Attention under another mask, whatever it is told."""

        def __init__(self, bound, **_):
            self.bound = bound
            self._other = sparsec.attention

        def update(self, mask):
            self.bound = mask.bind(*self.bound.shape)

        def __call__(self, q, k, v):
            return self._other(q, k, v, m.window(2, 2))

    monkeypatch.setattr(device_figures.sparsec, "compile", Other)
    assert _measured(_case(measure)).row("ours").status == "wrong"


def test_the_longest_context_is_as_long_as_memory_admits(monkeypatch, two_threads):
    """It is tried once more with less where it does not fit after all."""
    attended, tried = device_figures._attended, []

    def limited(case, *rest):
        tried.append(case.length)
        if case.length > 290:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return attended(case, *rest)

    monkeypatch.setattr(device_figures, "_attended", limited)
    found = _measured(_case("longest"))
    assert tried == [300, 294, 288]
    assert found.q_len == 288
    assert found.edges == m.window(6, 6).bind(288).nnz


def _run(goal, *rows):
    at = Provenance("", "", False, "", "", "", "", 1, 1, "")
    return Run(1, "g", "", "", "bars", "length", Protocol(), at, 1, (), (goal,), rows)


def _row(**us):
    peers = {"ours": "ours", "cuda": "ours:row_traversal@cuda", "triton": "ours:row_traversal@triton", "sdpa": "sdpa"}
    rows = tuple(PeerRow(peers[name], "ok", timing=Timing(each, each, each, each, 3)) for name, each in us.items())
    # 1,000 edges of 2 · 16 · 2 bytes and 4 · 16 operations.
    return CaseRow(_case(), 1, 300, 300, 1000, 0.1, 0.5, 64_000, 1, None, rows, gather_bytes_per_s=16e9)


@pytest.mark.parametrize(
    ("goal", "value"),
    [
        ({"value": "tflops"}, 0.016),
        ({"value": "edge_tb_s"}, 0.016),
        ({"value": "gather_share"}, 1.0),
        ({"value": "gather_share", "peer": "ours:row_traversal@cuda"}, 2.0),
        ({"value": "tokens"}, 300.0),
        ({"value": "ratio:sdpa"}, 2.0),
        ({"value": "ratio:sdpa", "peer": "ours:row_traversal@cuda"}, 4.0),
        ({"value": "ratio:ours:row_traversal@triton", "peer": "ours:row_traversal@cuda"}, 3.0),
    ],
    ids=lambda value: str(value.get("peer", "")) + value["value"] if isinstance(value, dict) else "",
)
def test_goals_of_a_gpu(goal, value):
    (found,) = outcomes(_run(Goal("it", cases=("*",), at_least=1.0, **goal), _row(ours=4, cuda=2, triton=6, sdpa=8)))
    assert found.value == pytest.approx(value)
    absent = _row(sdpa=8) if goal["value"] != "tokens" else _row()
    (nothing,) = outcomes(_run(Goal("it", cases=("*",), at_least=1.0, **goal), absent))
    assert nothing.value is None


def test_without_a_gather_ceiling_there_is_no_share_of_it():
    row = replace(_row(ours=4), gather_bytes_per_s=None)
    (found,) = outcomes(_run(Goal("it", "gather_share", ("*",), at_least=1.0), row))
    assert found.value is None
    assert "gather_bytes_per_s" not in row.to_dict()


@pytest.mark.parametrize("name", ["gpu_figures", "gpu_masks", "gpu_longer_attention_span"])
def test_every_goal_of_a_gpu_names_peers_that_its_cases_have(name):
    grid = load_grid(find_grid(name))
    rows = {case.id: CaseRow(case, 1, 1, 1, 1, 0.1, None, 1, 1, None, _all_ok(case), 1.0) for case in grid.cases}
    for goal in grid.goals:
        (found,) = outcomes(replace(_run(goal), cases=tuple(rows.values())))
        assert found.value is not None, goal.what


def _all_ok(case):
    return tuple(PeerRow(name, "ok", timing=Timing(1.0, 1.0, 1.0, 1.0, 3)) for name in case.peers)


def test_so_many_queries_of_a_longer_sequence():
    case = _case()
    part = replace(case, mask=MaskSource("queries_of", "random_edges(7, 0)", {"queries": 20, "keys": 90}), length=None)
    work = make_workload(part)
    assert work.bound.shape == (20, 90)
    assert work.q.shape[2] == 20
    assert work.k.shape[2] == 90
    assert work.bound == m.random_edges(7, 0).bind(20, 90)


# Fetching alone.


def test_the_gather_ceiling_reads_the_rows_of_k_and_v_of_every_edge():
    work = make_workload(replace(_case(text="random_edges(5, 0)", length=40), heads=2))
    rows, picked = ceiling.picked_rows(work)
    array = work.bound.to_csr()
    expected = []
    for head in range(2):
        for key in array.indices:
            expected += [work.k[0, head, key], work.v[0, head, key]]
    assert torch.equal(rows[picked.long()], torch.stack(expected))


@pytest.mark.parametrize(
    ("text", "length", "options"),
    [
        ("full()", 2000, {}),
        ("window(6, 6)", 40, {"heads": 4, "kv_heads": 2}),
        ("window(6, 6)", 40, {"batch": 2}),
        ("window(6, 6)", 40, {"head_dim": 24}),
    ],
)
def test_where_fetching_bounds_nothing_it_is_not_measured(text, length, options):
    case = replace(_case(text=text, length=length), **options)
    assert ceiling.gather_call(make_workload(case)) is None


_INTERPRETED = """
import numpy as np, torch
from bench.ceiling import gather_call, picked_rows, _added
from bench.grid import Case, MaskSource
from bench.workload import make_workload
case = Case("tiny", "attention", MaskSource("text", "random_edges(5, 0)"), 33, 2, head_dim=16, dtype="fp16")
work = make_workload(case)
sums = gather_call(work, ((4, 2),))()
rows, picked = picked_rows(work)
wanted = rows[picked.long()].double()
pieces = torch.split(wanted, 8)
torch.testing.assert_close(sums.double(), torch.stack([piece.sum(0) for piece in pieces]), rtol=1e-5, atol=1e-5)
"""


def test_the_gather_kernel_adds_up_what_is_picked():
    pytest.importorskip("triton")
    path = os.pathsep.join([str(TOOLS), str(TOOLS.parent)])
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# The published CSR kernel, pretended.


def _spfa_forward(q, k, v, row_off, columns, values, peak, total, out, use_nan):
    """As its page describes it: what it finds in `peak`, `total` and `out` is gone on with."""
    assert (row_off.dtype, columns.dtype) == (torch.uint64, torch.uint32)
    assert torch.isinf(peak).all()
    assert not total.any()
    assert not out.any()
    indptr, indices = row_off.to(torch.int64), columns.to(torch.int64)
    for row in range(len(q)):
        keys = indices[indptr[row] : indptr[row + 1]]
        weights = torch.softmax((k[keys].float() @ q[row].float()) * q.shape[1] ** -0.5, 0)
        out[row] = (weights @ v[keys].float()).to(out.dtype)
        peak[row] = total[row] = 1.0
    return out


def test_the_published_csr_kernel_is_asked_for_the_same_mask(monkeypatch):
    monkeypatch.setitem(sys.modules, "spfa_csr", SimpleNamespace(forward=_spfa_forward))
    case = _case(text="random_edges(5, 0)", length=40, dtype="fp32")
    work = replace(make_workload(case), device="cuda")
    prepared = peer("spfa_csr").prepare(work)
    for _ in range(2):
        assert measure.check(work, prepared.to_out(prepared.call()), work.bound).is_exact
    for changed in (replace(case, heads=2), replace(case, dtype="bf16")):
        with pytest.raises(RefusedError, match="one head"):
            peer("spfa_csr").prepare(replace(make_workload(changed), device="cuda"))
    assert not np.isnan(prepared.call().numpy()).any()


def test_ours_can_be_named_with_its_back_end():
    chosen = peer("ours:row_traversal@cuda")
    assert (chosen.template, chosen.backend) == ("row_traversal", "cuda")
    assert (peer("ours:hybrid").template, peer("ours:hybrid").backend) == ("hybrid", None)
    assert (peer("ours").template, peer("ours").backend) == (None, None)
