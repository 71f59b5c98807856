"""What is measured without peers: planning, first calls, metadata; on a GPU (`device_figures`) others.

This file decides what is inside those times and what is not: masks are read, tensors made and packages imported
beforehand.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import sparsec
from bench import device_figures
from bench.grid import ON_GPU, Case, Effort
from bench.process import answer
from bench.protocol import Announce, timing
from bench.results import CaseRow, PeerRow
from bench.workload import bound_mask, length_of, mask_of, problem

if TYPE_CHECKING:
    from bench.results import PlanFacts

_FIRST_CALLS = 5


def measure_figure(case: Case, effort: Effort, threads: int, announce: Announce, device: str = "cpu") -> CaseRow:
    if case.measure in ON_GPU:
        return device_figures.measured(case, effort, threads, announce, device)
    announce("", "making the work")
    bound = bound_mask(case)
    shape = problem(case, bound)
    is_first_call = case.measure == "first_call"
    rows = first_calls(case, threads, announce) if is_first_call else (planning(case, effort, announce),)
    edges = 0 if bound.varies_by_head or bound.varies_by_batch else bound.nnz * case.heads * case.batch
    return CaseRow(
        case=case,
        threads=threads,
        q_len=shape.q_len,
        kv_len=shape.kv_len,
        edges=edges,
        density=edges / (case.heads * case.batch * shape.q_len * shape.kv_len),
        tile_fill=None,
        flops=0,
        tensor_bytes=shape.tensor_bytes,
        peak_flops=None,
        peers=rows,
    )


def planning(case: Case, effort: Effort, announce: Announce) -> PeerRow:
    """`sparsec.plan` of a mask that has just been read, binding included; set-up is what the first takes more."""
    announce("ours", "plan")
    first_us, _ = _planned(case)
    samples: list[float] = []
    facts = None
    while len(samples) < effort.max_repeats:
        if len(samples) >= effort.min_repeats and sum(samples) >= effort.seconds * 1e6:
            break
        announce("ours", "plan")
        took_us, facts = _planned(case)
        samples.append(took_us)
    taken = timing(samples)
    return PeerRow("ours", "ok", timing=taken, setup_us=round(max(0.0, first_us - taken.median_us), 1), plan=facts)


def _planned(case: Case) -> tuple[float, PlanFacts]:
    from bench.peers import plan_facts

    mask = mask_of(case.mask)
    started = time.perf_counter_ns()
    bound = mask.bind(length_of(case))
    plan = sparsec.plan(bound, problem(case, bound))
    took_us = (time.perf_counter_ns() - started) / 1e3
    return took_us, plan_facts(plan)


def first_calls(case: Case, threads: int, announce: Announce) -> tuple[PeerRow, ...]:
    """`compile` and the first call in fresh processes: with an empty cache, then with the one that left."""
    samples: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(_FIRST_CALLS):
        with tempfile.TemporaryDirectory(prefix="sparsec-bench-") as cache:
            for name in ("cold", "warm"):
                announce(name, "first call")
                request = {"case": asdict(case), "threads": threads}
                samples[name].append(float(answer("first_call", request, {"SPARSEC_CACHE_DIR": cache})))
    return tuple(PeerRow(name, "ok", timing=timing(samples[name])) for name in case.peers)
