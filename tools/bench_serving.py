"""Serving figures: one query over a long cache beside torch's attention, and another mask for the same kernels.

    python tools/bench_serving.py --json FILE

Decode: 1 query, 32 query heads over 8 of k and v, head_dim 128, bf16; torch's `scaled_dot_product_attention` with
`enable_gqa` over all keys. A sparse mask should gain by the keys it leaves out. Update: the package graph of the demo
with its nodes in another order, beside compiling for it anew. Every result is held to dense attention in fp64.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bench.exactness import Verdict, check
from bench.grid import Case, Effort, MaskSource, data_file
from bench.protocol import interleaved
from bench.sheet import Figure, made, measured, timed, write_sheet
from bench.workload import Workload

import sparsec
from sparsec import Problem
from sparsec import masks as m
from sparsec.masks import BoundMask

MASKS = {
    "full": m.full(),
    "window": m.window(8191, 0) | m.global_tokens(4),
    "strided": m.window(1023, 0) | (m.strided(16) & m.causal()),
}
PROTOCOL = (
    "monotonic clock, two calls of each not counted, then all in turn; median and quartiles; the output of each head 0 "
    "and last is compared with dense attention in fp64, under twice the error of a plain attention of the same dtype "
    "plus one rounding unit"
)


@click.command()
@click.option("--keys", type=click.IntRange(min=1024), default=131_072, show_default=True)
@click.option("--kv-heads", type=click.IntRange(min=1, max=32), default=8, show_default=True)
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Of calls, for each.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also writes the results here.")
def bench(keys: int, kv_heads: int, seconds: float, path: Path | None) -> None:
    """Times decoding and updates."""
    effort = Effort(seconds=seconds)
    found = [*decode(keys, kv_heads, effort), *update(effort)]
    for figure in found:
        click.echo(f"{figure.what:28} {measured(figure):>16}  {figure.note}")
    if path is not None:
        about = "Decoding over a long cache, and another mask for compiled kernels, on a CPU"
        write_sheet(path, made("serving", about, PROTOCOL, torch.get_num_threads(), found))


def decode(keys: int, kv_heads: int, effort: Effort) -> list[Figure]:
    torch.manual_seed(0)
    q = torch.randn(1, 32, 1, 128, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, kv_heads, keys, 128, dtype=torch.bfloat16)
    calls: dict[str, Any] = {
        "torch": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    }
    for name, mask in MASKS.items():
        attn = sparsec.compile(mask, keys)
        calls[name] = lambda attn=attn: attn.step(q, k, v)
    rows = {name: mask.bind(keys)[keys - 1 :, :] for name, mask in {**MASKS, "torch": m.full()}.items()}
    verdicts = {name: _verdict(rows[name], q, k, v, calls[name]()) for name in calls}
    timings = interleaved(calls, effort, lambda *_: None)
    shape = {"keys": keys, "query heads": 32, "key heads": kv_heads, "head_dim": 128, "dtype": "bf16"}
    found = []
    for name, timing in timings.items():
        moved = 2 * kv_heads * 128 * 2 * rows[name].nnz
        note = f"{rows[name].nnz:,} keys, {moved / timing.median_us / 1e3:.3g} GB/s of keys and values"
        what = f"one query, {name}" if name != "torch" else "one query, torch"
        base = "" if name == "torch" else "one query, torch"
        found.append(_checked(timed(what, timing, shape, base, note), verdicts[name]))
    return found


def update(effort: Effort) -> list[Figure]:
    with np.load(data_file("debian_depends.npz")) as graph:
        indptr, indices = graph["indptr"], graph["indices"]
    n = len(indptr) - 1
    chance = np.random.default_rng(0)
    orders = []
    for _ in range(2):
        target = chance.permutation(n)
        row = np.repeat(np.arange(n), np.diff(indptr))
        order = np.lexsort((target[indices], target[row]))
        orders.append((np.cumsum(np.bincount(target[row] + 1, minlength=n + 1)), target[indices][order]))
    attn = sparsec.compile(m.from_csr(indptr, indices, n), q_heads=8, head_dim=64, dtype="fp32")
    # By turns, so that no update finds the mask that is there already.
    turns = itertools.cycle(orders)
    current: list[BoundMask] = []

    def updated() -> None:
        mask = m.from_csr(*next(turns), n)
        attn.update(mask)
        current[:] = [mask.bind()]

    def anew() -> None:
        sparsec.compile(m.from_csr(*next(turns), n), q_heads=8, head_dim=64, dtype="fp32")

    timings = interleaved({"update": updated, "compile": anew}, effort, lambda *_: None)
    updated()
    q, k, v = (torch.randn(1, 8, n, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    verdict = _verdict(current[0], q, k, v, attn(q, k, v))
    shape = {"graph": "debian_depends, shuffled", "nodes": n, "edges": len(indices), "heads": 8, "dtype": "fp32"}
    anew_figure = timed("compile anew", timings["compile"], shape, note="kernels are there already")
    figure = timed("update", timings["update"], shape, "compile anew", "checked by the call after the last update")
    return [anew_figure, _checked(figure, verdict)]


def _verdict(bound: BoundMask, q: Any, k: Any, v: Any, out: Any) -> Verdict:
    q_heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[3]
    dtype = "fp32" if q.dtype == torch.float32 else "bf16"
    shape = Problem(bound.q_len, bound.kv_len, q_heads, kv_heads, dim, dim, dtype)
    case = Case("serving", "attention", MaskSource("text", "full()"), heads=q_heads, kv_heads=kv_heads, dtype=dtype)
    return check(Workload(case, bound, shape, q, k, v), out, bound)


def _checked(figure: Figure, verdict: Verdict) -> Figure:
    return replace(figure, error=verdict.error, allowed=verdict.allowed)


if __name__ == "__main__":
    bench()
