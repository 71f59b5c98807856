"""What a plan chooses, refuses and says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import pytest
from cases import cases, scattered
from test_cli import PROCESSOR

import sparsec
from sparsec import masks as m
from sparsec.analysis import analyse
from sparsec.backends.base import DTYPES, Problem
from sparsec.device import detect_cpu, devices
from sparsec.errors import MaskError, SparsecError, UnsupportedError
from sparsec.planner import search
from sparsec.planner.parts import heavy_rows_apart, residue_part
from sparsec.template import templates

N = 1000
PROBLEM = Problem(N, N, 4, 2, 64, 64)
WINDOW = m.window(30, 0)


def _told(made: sparsec.Plan) -> None:
    """Raises where a plan's text is wider than a terminal, or its dictionary no JSON."""
    wide = [line for line in str(made).splitlines() if len(line) > 80]
    assert wide == []
    told = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert told["schema"] == 1
    assert len(told["groups"]) == len(made.groups)
    assert told["layout_bytes"] == made.layout_bytes == sum(step.launch.work.nbytes for step in made.steps)


def test_of_what_the_cost_model_cannot_tell_apart_the_simplest_wins(monkeypatch):
    def chosen(margin: float) -> sparsec.Plan:
        monkeypatch.setattr(search, "_NEAR", margin)
        return sparsec.plan(m.random_edges(8, 0) | WINDOW, PROBLEM, PROCESSOR, tune="off", reorder="off")

    fastest = chosen(1.0)
    assert [step.launch.template.name for step in fastest.steps] == ["hybrid"]
    rows = next(each for each in fastest.groups[0].alternatives if each.template == "row_traversal")
    behind = rows.us / fastest.estimate.us
    assert chosen(0.99 * behind).steps[0].launch.template.name == "hybrid"
    assert chosen(1.01 * behind).steps[0].launch.template.name == "row_traversal"


# Every case, as a whole.


@pytest.mark.parametrize("tried", cases(), ids=lambda tried: tried.id)
def test_every_case_is_planned(tried):
    made = sparsec.plan(tried.mask, tried.problem)
    _told(made)
    for group in made.groups:
        edges = [step.launch.work.bound.nnz for step in group.steps]
        assert sum(edges) == group.bound.nnz == group.profile.nnz
        assert all(candidate.us > 0 for candidate in group.alternatives)
        assert group.refusals or group.alternatives
        chosen = group.estimate.us
        exact = [candidate.us for candidate in group.alternatives if candidate.estimate is not None]
        # Nearer than the model can tell apart, the simpler one wins.
        assert chosen <= min(exact, default=chosen) * 1.03
    for step in made.steps:
        launch = step.launch
        assert launch.template.violation(launch.backend, launch.config) is None
        assert launch.scale == tried.problem.head_dim**-0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", devices(), ids=lambda device: device.name)
def test_planning_for_every_device(device, dtype):
    for mask in (WINDOW, m.full(), m.longformer(16, 2), scattered(N, N, 0.01)):
        made = _plan_or_refusal(mask, replace(PROBLEM, dtype=dtype), device)
        if isinstance(made, UnsupportedError):
            assert device.kind != "cpu"
            assert made.refusals
            assert all(refusal.reason for refusal in made.refusals)
            assert device.name in str(made)
        else:
            assert made.device == device
            _told(made)


def _plan_or_refusal(mask, problem, device) -> sparsec.Plan | UnsupportedError:
    try:
        return sparsec.plan(mask, problem, device)
    except UnsupportedError as error:
        return error


def test_a_device_by_name():
    assert sparsec.plan(WINDOW, PROBLEM, "cpu").device == detect_cpu()
    with pytest.raises(SparsecError, match="did you mean nvidia-h100"):
        sparsec.plan(WINDOW, PROBLEM, "nvidia-h10")


def _without_time(made: sparsec.Plan) -> dict[str, object]:
    return made.to_dict() | {"planning_us": 0.0}


@pytest.mark.parametrize("mask", [WINDOW, m.longformer(16, 2), m.dilated(200, 8), scattered(N, N, 0.01)])
def test_planning_is_deterministic(mask):
    assert _without_time(sparsec.plan(mask, PROBLEM)) == _without_time(sparsec.plan(mask, PROBLEM))


# What is considered.


def _runs(made: sparsec.Plan) -> set[tuple[str, str]]:
    return {(step.launch.template.name, step.launch.backend) for step in made.steps}


@pytest.mark.parametrize("name", ["row_traversal", "block_sparse", "hybrid"])
def test_a_template_that_is_named_is_taken(name):
    made = sparsec.plan(scattered(N, N, 0.01), PROBLEM, template=name)
    assert _runs(made) == {(name, "cpu")}
    assert all(candidate.template == name for group in made.groups for candidate in group.alternatives)


def test_a_template_that_cannot_is_refused_with_its_reason():
    with pytest.raises(UnsupportedError, match=r"nothing can run window\(30, 0\) on cpu with dense") as caught:
        sparsec.plan(WINDOW, PROBLEM, template="dense")
    assert any("neither full nor causal" in refusal.reason for refusal in caught.value.refusals)


def test_a_back_end_that_cannot_is_refused_with_its_reason():
    with pytest.raises(UnsupportedError) as caught:
        sparsec.plan(WINDOW, PROBLEM, backend="torch")
    assert any("no such kernel" in refusal.reason for refusal in caught.value.refusals)
    with pytest.raises(UnsupportedError, match="one head_dim for k and v") as caught:
        sparsec.plan(m.full(), replace(PROBLEM, v_dim=32), template="dense")


def test_a_dense_mask_may_be_handed_over():
    for mask in (m.full(), m.causal(), m.causal() | m.window(3, 0), ~(~m.full())):
        made = sparsec.plan(mask, PROBLEM, template="dense")
        assert _runs(made) == {("dense", "torch")}
    for mask in (m.causal("bottom_right") & m.window(500, 0), m.prefix(3), m.causal() - m.window(0, 0)):
        with pytest.raises(UnsupportedError):
            sparsec.plan(mask, PROBLEM, template="dense")


def test_a_rectangle_is_causal_to_torch_only_where_it_is_square():
    wide = Problem(500, N, 4, 2)
    for align in ("top_left", "bottom_right"):
        with pytest.raises(UnsupportedError):
            sparsec.plan(m.causal(align), wide, template="dense")
    assert _runs(sparsec.plan(m.full(), wide, template="dense")) == {("dense", "torch")}


def test_the_reference_serves_when_it_is_named_and_never_else():
    for mask in (WINDOW, m.full(), m.dilated(200, 8), scattered(N, N, 0.01)):
        assert {backend for _, backend in _runs(sparsec.plan(mask, PROBLEM, backend="reference"))} == {"reference"}
        made = sparsec.plan(mask, PROBLEM)
        assert "reference" not in {candidate.backend for candidate in made.groups[0].alternatives}


def test_names_that_are_none():
    with pytest.raises(SparsecError, match="no template 'flash'"):
        sparsec.plan(WINDOW, PROBLEM, template="flash")
    with pytest.raises(SparsecError, match="no back end 'metal'"):
        sparsec.plan(WINDOW, PROBLEM, backend="metal")
    with pytest.raises(SparsecError, match="reorder='maybe'"):
        sparsec.plan(WINDOW, PROBLEM, reorder="maybe")


def test_far_slower_candidates_are_listed_all_the_same():
    made = sparsec.plan(m.window(400, 0), Problem(4096, 4096, 4, 4))
    seen = {candidate.template for candidate in made.groups[0].alternatives} | {name for name, _ in _runs(made)}
    refused = {refusal.what.split()[0] for refusal in made.refusals}
    assert seen | refused == set(templates())


# Orders of tokens, mixtures.


def test_reordering():
    dilated = m.dilated(400, 16)
    never = sparsec.plan(dilated, PROBLEM, reorder="off")
    assert all(step.launch.work.ordering.q_order is None for step in never.steps)
    always = sparsec.plan(dilated, PROBLEM, reorder="force")
    assert any(step.launch.work.ordering.q_order is not None for step in always.steps)
    best = sparsec.plan(dilated, PROBLEM)
    assert best.estimate.us <= 1.03 * min(never.estimate.us, always.estimate.us)


def test_an_order_is_refused_where_there_is_none():
    with pytest.raises(UnsupportedError, match="the tokens' own order") as caught:
        sparsec.plan(m.window(5, 5), PROBLEM, reorder="force")
    assert caught.value.refusals


def test_heavy_rows_make_a_part_of_their_own():
    bound = (m.window(4, 4) | m.global_tokens([3, 77, 150, 222, 290, 411, 500, 599])).bind(600)
    rest, heavy, ordering = heavy_rows_apart(bound, analyse(bound))
    assert rest.nnz + heavy.nnz == bound.nnz
    assert rest.degrees("q")[ordering.q_order].sum() == 0
    assert heavy.shape == (8, 600)
    assert heavy_rows_apart(m.window(4, 4).bind(600), analyse(m.window(4, 4).bind(600))) is None


def test_what_residue_classes_make_dense_is_a_part_of_its_own():
    bound = (m.dilated(90, 6) | m.random_edges(5, 0)).bind(600)
    progressing, rest, period = residue_part(bound)
    assert period == 6
    assert progressing.nnz + rest.nnz == bound.nnz
    for mask in (m.dilated(90, 6), m.random_edges(5, 0), m.window(3, 3) | m.random_edges(5, 0)):
        assert residue_part(mask.bind(600)) is None


# Heads and batch elements.


def test_equal_masks_are_planned_together():
    made = sparsec.plan(m.per_head([WINDOW, m.full(), m.window(30, 0), m.full()]), PROBLEM)
    assert [(group.heads, group.batch) for group in made.groups] == [((0, 2), (0,)), ((1, 3), (0,))]
    _told(made)
    made = sparsec.plan(m.per_head([WINDOW] * 4), PROBLEM)
    assert [group.heads for group in made.groups] == [(0, 1, 2, 3)]
    made = sparsec.plan(m.per_batch([WINDOW, m.full(), WINDOW]), replace(PROBLEM, batch=3))
    assert [(group.heads, group.batch) for group in made.groups] == [((0, 1, 2, 3), (0, 2)), ((0, 1, 2, 3), (1,))]
    _told(made)


def test_equal_masks_share_index_arrays_whatever_their_heads():
    a, b = m.random_edges(4, 0), m.random_edges(7, 1)
    members = [m.per_head([a] * 4), m.per_head([a, b, a, b]), m.per_head([a] * 4)]
    problem = replace(PROBLEM, batch=3)
    made = sparsec.plan(m.per_batch(members), problem, template="row_traversal")
    assert [(group.heads, group.batch) for group in made.groups] == [
        ((0, 1, 2, 3), (0, 2)),
        ((0, 2), (1,)),
        ((1, 3), (1,)),
    ]
    rows = [step.launch.work.rows for step in made.steps]
    assert rows[0] is rows[1]
    assert rows[0] is not rows[2]
    assert made.groups[1].estimate.flops * 4 == made.groups[0].estimate.flops * 2
    _told(made)


def test_a_predicate_of_heads_and_batch_elements():
    made = sparsec.plan(m.from_mask_mod(lambda b, h, q, kv: kv <= q + h // 2 + b), replace(PROBLEM, batch=2))
    covered = sorted((b, h) for group in made.groups for b in group.batch for h in group.heads)
    assert covered == [(b, h) for b in range(2) for h in range(4)]


# Bad input.


@pytest.mark.parametrize(
    ("problem", "error", "message"),
    [
        ({"q_len": 999}, MaskError, "1000 queries.*999"),
        ({"kv_len": 1001}, MaskError, "1000 keys.*1001"),
        ({"kv_heads": 3}, UnsupportedError, "4 query heads over 3 key heads"),
        ({"kv_heads": 0}, UnsupportedError, "4 query heads over 0 key heads"),
        ({"q_heads": 0}, UnsupportedError, "0 query heads"),
        ({"q_heads": -4}, UnsupportedError, "-4 query heads"),
        ({"head_dim": 0}, UnsupportedError, "head_dim=0.*1 to 256"),
        ({"head_dim": 257}, UnsupportedError, "head_dim=257.*1 to 256"),
        ({"v_dim": 0}, UnsupportedError, "v_dim=0"),
        ({"v_dim": 300}, UnsupportedError, "v_dim=300"),
        ({"dtype": "fp64"}, UnsupportedError, "fp64"),
        ({"batch": 0}, UnsupportedError, "batch"),
    ],
    ids=str,
)
def test_problems_that_cannot_be(problem, error, message):
    with pytest.raises(error, match=message):
        sparsec.plan(WINDOW.bind(N), replace(PROBLEM, **problem))


def test_masks_of_other_heads_and_batch_elements():
    with pytest.raises(MaskError, match="each of 3 heads, and the problem has 4"):
        sparsec.plan(m.per_head([WINDOW] * 3), PROBLEM)
    with pytest.raises(MaskError, match="each of 2 batch elements, and the problem has 1"):
        sparsec.plan(m.per_batch([WINDOW] * 2), PROBLEM)


@pytest.mark.parametrize("mask", [None, "window(3, 3)", 5, [[True]]], ids=str)
def test_what_is_no_mask(mask):
    with pytest.raises(MaskError, match="mask"):
        sparsec.plan(mask, PROBLEM)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number(scale):
    with pytest.raises(SparsecError, match="scale"):
        sparsec.plan(WINDOW, PROBLEM, scale=scale)


# Text.


def test_the_widest_plan_is_80_columns():
    members = [m.window(i, 0) | m.global_tokens([i, 10**5 - 1 - i]) for i in range(3)]
    mask = m.per_head([members[i % 3] for i in range(32)])
    problem = Problem(100_000, 100_000, 32, 8, 128, 64, "bf16", batch=16)
    _told(sparsec.plan(mask, problem))
    _told(sparsec.plan(WINDOW, Problem(10_000_000, 10_000_000, 128, 8, 128, 64, "bf16", batch=1024)))
    _told(sparsec.plan(scattered(N, N, 0.01), PROBLEM, template="hybrid"))


def test_the_text_says_what_runs():
    text = str(sparsec.plan(m.longformer(16, 2), PROBLEM))
    for part in ("longformer(16, 2)", "1,000 queries", "4 heads over 2", "what runs", "estimate", "planned in"):
        assert part in text


# Size.


def test_ten_million_tokens_take_bounded_memory():
    problem = Problem(10_000_000, 10_000_000, 1, 1, 64, 64, "bf16")
    tracemalloc.start()
    try:
        made = sparsec.plan(m.window(255, 0), problem)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**30
    assert made.layout_bytes < 0.05 * problem.tensor_bytes


def test_planning_imports_neither_torch_nor_a_gpu_package(tmp_path):
    program = """
import sys, sparsec
from sparsec import masks as m
for mask in (m.window(30, 0), m.dilated(300, 8), m.causal(), m.longformer(16, 2) | m.random_edges(3, 0)):
    print(str(sparsec.plan(mask, sparsec.Problem(1000, 1000, 4, 2, 64, 64, "bf16")))[:20])
heavy = {"torch", "triton", "cuda", "optuna"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"SPARSEC_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()
