"""Times on a GPU: our kernels beside others, some rows of each held to the fp64 reference before it is timed.

This file decides what is worth timing in minutes; the tuner measures the rest. How a call is timed and how others are
asked is the benchmark suite's. It must not know what is recorded of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench import grid
from bench.peers import RefusedError, peer
from bench.protocol import WARM, DeviceClock, interleaved
from bench.workload import Workload

import sparsec
from gate.checks import TORCH_NAMES, Case, launch_of, own_kernels
from sparsec import masks as m
from sparsec.backends import reference
from sparsec.backends.base import Problem, backend
from sparsec.device import Device
from sparsec.masks.mask import BoundMask, Mask
from sparsec.template import Template

GRAPH = Path(sparsec.__file__).parent / "demo_data" / "debian_depends.npz"

Result = dict[str, Any]  # one JSON object of a record


def bench_cases() -> Iterator[tuple[str, Mask, Problem, tuple[str, ...]]]:
    """Name, mask, problem, and the templates that are worth the time on it; most telling first."""
    wide = Problem(32_768, 32_768, 64, 8, 128, 128, "bf16")
    plain = Problem(32_768, 32_768, 16, 16, 128, 128, "bf16")
    tiles, every = ("block_sparse", "hybrid"), ("block_sparse", "hybrid", "row_traversal")
    yield "window-1023-gqa8", m.window(1023, 0), wide, tiles
    yield "causal", m.causal(), plain, ("block_sparse",)
    million = Problem(2**20, 2**20, 1, 1, 128, 128, "fp16")
    yield "random-64-1m", m.random_edges(64, 0), million, ("row_traversal",)
    yield "dilated", m.dilated(2048, 16), plain, every
    yield "bigbird", m.bigbird(64, 3, 2, 3, 0), plain, tiles
    graph = m.load(GRAPH)
    length = graph.bind(None).q_len
    yield "debian-graph", graph, Problem(length, length, 8, 8, 64, 64, "fp16"), ("row_traversal", "hybrid")
    yield "decode-128k", m.full(), Problem(1, 2**17, 64, 8, 128, 128, "bf16"), every
    yield "full", m.full(), replace(plain, q_len=16_384, kv_len=16_384), ("block_sparse",)


def benchmarks(device: Device) -> Iterator[tuple[str, Callable[[], Result]]]:
    for name, mask, problem, chosen in bench_cases():
        case = Case(name, mask, problem)
        for each, server in own_kernels(device):
            if each.name in chosen:
                key = f"bench/{name}/{each.name} on {server}"
                yield key, lambda e=each, s=server, c=case: time_own(e, s, c, device)
        for title in PEERS.get(name, ()):
            yield f"bench/{name}/{title}", lambda t=title, c=case: time_peer(t, c, device)


def bench_inputs(p: Problem) -> tuple[Any, Any, Any]:
    import torch

    dtype = getattr(torch, TORCH_NAMES[p.dtype])
    shapes = ((p.q_heads, p.q_len, p.head_dim), (p.kv_heads, p.kv_len, p.head_dim), (p.kv_heads, p.kv_len, p.v_dim))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, *shape, dtype=dtype, device="cuda") for shape in shapes)
    return q, k, v


def time_own(each: Template, name: str, case: Case, device: Device) -> Result:
    import torch

    p = case.problem
    launch = launch_of(each, name, case, p.dtype, device)
    kernel = backend(launch.backend).lower(launch)
    q, k, v = bench_inputs(p)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device="cuda")
    kernel(q, k, v, out, lse)
    check_rows(q, k, v, out, launch.work.bound, p)
    return timed(lambda: kernel(q, k, v, out, lse), p, launch.work.bound, device) | {"config": str(launch.config)}


def check_rows(q: Any, k: Any, v: Any, out: Any, bound: BoundMask, p: Problem) -> None:
    """Holds a few rows to the reference: whatever is timed computes this mask."""
    rows = np.unique(np.linspace(0, bound.q_len - 1, 24).astype(int))
    heads = tuple(t.double().cpu().numpy() for t in (q[0, -1], k[0, -1], v[0, -1]))
    wanted, _ = reference.attention(*heads, bound, p.head_dim**-0.5, rows)
    got = out[0, -1].double().cpu().numpy()[rows]
    limit = 8 * reference.unit_roundoff(p.dtype) * max(1.0, float(np.abs(wanted).max()))
    error = float(np.abs(got - wanted).max())
    if not error <= limit:
        raise AssertionError(f"a timed row is off by {error:.3g}, and {limit:.3g} is allowed")


# Who else computes these masks; whoever is not installed says so.
PEERS = {
    "window-1023-gqa8": ("flex:max-autotune", "flash_attn", "flash_attn:3", "magi"),
    "causal": ("flex:max-autotune", "sdpa", "sdpa:cudnn", "flash_attn", "flash_attn:3"),
    "dilated": ("flex:max-autotune",),
    "bigbird": ("flex:max-autotune", "flashinfer:blocks"),
    "full": ("sdpa", "sdpa:cudnn", "flash_attn", "flash_attn:3"),
}


def time_peer(title: str, case: Case, device: Device) -> Result:
    """One of the benchmark suite's peers."""
    p = case.problem
    q, k, v = bench_inputs(p)
    declared = grid.Case(case.name, "attention", grid.MaskSource("text", str(case.mask)))
    work = Workload(declared, case.mask.bind(p.q_len, p.kv_len), p, q, k, v, device="cuda")
    try:
        prepared = peer(title).prepare(work)
        out = prepared.to_out(prepared.call())
    except RefusedError as error:
        return {"status": "skipped", "why": str(error)}
    check_rows(q, k, v, out, work.bound, p)
    return timed(prepared.call, p, work.bound, device)


def timed(call: Callable[[], object], p: Problem, bound: BoundMask, device: Device) -> Result:
    """Time of a call, useful work over it, and the bytes of K and V rows that each edge reads over it."""
    found = median_us(*as_graph(call), device)
    edge_bytes = bound.nnz * p.q_heads * p.batch * (p.head_dim + p.v_dim) * p.itemsize
    return found | {"tflops": p.flops(bound.nnz) / found["us"] * 1e-6, "edge_tb_s": edge_bytes / found["us"] * 1e-6}


def as_graph(call: Callable[[], object]) -> tuple[Callable[[], object], bool]:
    """The call as a graph replays it, without what Python takes to launch it, or as it is where it takes no capture."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call, False
    return graph.replay, True


# About a second of calls.
EFFORT = grid.Effort(seconds=1.0, min_repeats=5, max_repeats=50)


def median_us(call: Callable[[], object], is_graph: bool, device: Device) -> Result:
    """Median and spread of device time with a cold L2, and the median with a warm one, in microseconds."""
    times = interleaved({"": call}, EFFORT, lambda name, stage: None, DeviceClock(device).clocks)
    cold, warm = times[""], times[WARM]
    return {
        "us": cold.median_us,
        "spread_us": cold.q75_us - cold.q25_us,
        "warm_us": warm.median_us,
        "repeats": cold.repeats,
        "is_graph": is_graph,
    }
