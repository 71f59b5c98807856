"""Times on a GPU: our kernels beside torch's own, some rows of each held to the fp64 reference before it is timed.

This file decides what is worth timing in minutes; the tuner measures the rest. It must not know what is recorded of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

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
        for each, server in own_kernels(device):
            if each.name in chosen:
                key, case = f"bench/{name}/{each.name} on {server}", Case(name, mask, problem)
                yield key, lambda e=each, s=server, c=case: time_own(e, s, c, device)
        if str(mask) in PREDICATES:
            yield f"bench/{name}/flex_attention", lambda a=mask, p=problem: time_flex(a, p)
        if name in ("causal", "full"):
            yield f"bench/{name}/sdpa", lambda a=mask, p=problem: time_sdpa(a, p)


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
    return timed(lambda: kernel(q, k, v, out, lse), p, launch.work.bound) | {"config": str(launch.config)}


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


# By mask, as FlexAttention takes them; other masks have it as no peer.
PREDICATES: dict[str, Callable[..., Any]] = {
    "window(1023, 0)": lambda b, h, q, kv: (q >= kv) & (q - kv <= 1023),
    "causal()": lambda b, h, q, kv: q >= kv,
    "dilated(2048, 16)": lambda b, h, q, kv: ((q - kv).abs() <= 2048) & ((q - kv) % 16 == 0),
}


def time_flex(mask: Mask, p: Problem) -> Result:
    """FlexAttention, compiled with max-autotune."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = create_block_mask(PREDICATES[str(mask)], None, None, p.q_len, p.kv_len, device="cuda")
    compiled = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs", dynamic=False)
    q, k, v = bench_inputs(p)
    grouped, bound = p.q_heads != p.kv_heads, mask.bind(p.q_len, p.kv_len)

    def call() -> Any:
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped)

    check_rows(q, k, v, call(), bound, p)
    return timed(call, p, bound)


def time_sdpa(mask: Mask, p: Problem) -> Result:
    import torch

    q, k, v = bench_inputs(p)
    is_causal, bound = str(mask) == "causal()", mask.bind(p.q_len, p.kv_len)

    def call() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    check_rows(q, k, v, call(), bound, p)
    return timed(call, p, bound)


def timed(call: Callable[[], object], p: Problem, bound: BoundMask) -> Result:
    """Time of a call, useful work over it, and the bytes of K and V rows that each edge reads over it."""
    found = median_us(*as_graph(call))
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


def median_us(call: Callable[[], object], is_graph: bool) -> Result:
    """Median and spread of device time, microseconds, each with a cold L2; about a second of them."""
    import torch

    flushed = torch.empty(2**28, dtype=torch.uint8, device="cuda")

    def once() -> float:
        flushed.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop) * 1e3)

    for _ in range(3):
        first = once()
    times = [once() for _ in range(max(5, min(50, int(1e6 / first))))]
    low, _, high = statistics.quantiles(times, n=4)
    return {"us": statistics.median(times), "spread_us": high - low, "repeats": len(times), "is_graph": is_graph}
