"""Times on a GPU: our kernels beside torch's own, some rows of each held to the fp64 reference before it is timed.

This file decides what is worth timing in minutes; the tuner measures the rest. It must not know what is recorded of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
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


def bench_cases() -> Iterator[tuple[str, Mask, Problem]]:
    wide = Problem(32_768, 32_768, 64, 8, 128, 128, "bf16")
    plain = Problem(32_768, 32_768, 16, 16, 128, 128, "bf16")
    yield "window-1023-gqa8", m.window(1023, 0), wide
    yield "causal", m.causal(), plain
    yield "bigbird", m.bigbird(64, 3, 2, 3, 0), plain
    yield "dilated", m.dilated(2048, 16), plain
    graph = m.load(GRAPH)
    length = graph.bind(None).q_len
    yield "debian-graph", graph, Problem(length, length, 8, 8, 64, 64, "fp16")


def benchmarks(device: Device) -> Iterator[tuple[str, Callable[[], Result]]]:
    for name, mask, problem in bench_cases():
        for each, server in own_kernels(device):
            key = f"bench/{name}/{each.name} on {server}"
            yield key, lambda e=each, s=server, n=name, a=mask, p=problem: time_own(e, s, Case(n, a, p), device)
        yield f"bench/{name}/flex_attention", lambda a=mask, p=problem: time_flex(a, p)
        if name == "causal":
            yield f"bench/{name}/sdpa", lambda p=problem: time_sdpa(p)


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
    timed = median_us(lambda: kernel(q, k, v, out, lse))
    return timed | {"tflops": p.flops(launch.work.bound.nnz) / timed["us"] * 1e-6, "config": str(launch.config)}


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


def time_flex(mask: Mask, p: Problem) -> Result:
    """FlexAttention, compiled with max-autotune; where the mask has no predicate it is not a peer."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    predicate = {
        "window(1023, 0)": lambda b, h, q, kv: (q >= kv) & (q - kv <= 1023),
        "causal()": lambda b, h, q, kv: q >= kv,
        "dilated(2048, 16)": lambda b, h, q, kv: ((q - kv).abs() <= 2048) & ((q - kv) % 16 == 0),
    }.get(str(mask))
    if predicate is None:
        return {"status": "skipped", "why": f"no predicate is written for {mask}"}
    block_mask = create_block_mask(predicate, None, None, p.q_len, p.kv_len, device="cuda")
    compiled = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs", dynamic=False)
    q, k, v = bench_inputs(p)
    grouped, bound = p.q_heads != p.kv_heads, mask.bind(p.q_len, p.kv_len)
    check_rows(q, k, v, compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped), bound, p)
    timed = median_us(lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped))
    return timed | {"tflops": p.flops(bound.nnz) / timed["us"] * 1e-6}


def time_sdpa(p: Problem) -> Result:
    import torch

    q, k, v = bench_inputs(p)
    attend = torch.nn.functional.scaled_dot_product_attention
    check_rows(q, k, v, attend(q, k, v, is_causal=True), m.causal().bind(p.q_len, p.kv_len), p)
    timed = median_us(lambda: attend(q, k, v, is_causal=True))
    return timed | {"tflops": p.flops(p.q_len * (p.q_len + 1) // 2) / timed["us"] * 1e-6}


def median_us(call: Callable[[], object], repeats: int = 30) -> Result:
    """Median and spread of device time, microseconds, each with a cold L2."""
    import torch

    for _ in range(3):
        call()
    flushed = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        flushed.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    low, _, high = statistics.quantiles(times, n=4)
    return {"us": statistics.median(times), "spread_us": high - low}
