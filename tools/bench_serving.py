"""Serving figures: one query over a long cache beside torch's attention, and another mask for the same kernels.

    python tools/bench_serving.py --json FILE

Decode: 1 query, 32 query heads over 8 of k and v, head_dim 128, bf16; torch's `scaled_dot_product_attention` with
`enable_gqa` over all keys. A sparse mask should gain by the keys it leaves out. Update: the package graph of the demo
with its nodes in another order. Every decode is first checked against the dense one.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import click
import numpy as np
import torch
from bench.grid import Effort
from bench.protocol import interleaved
from bench.provenance import provenance

import sparsec
from sparsec import masks as m

MASKS = {
    "full": m.full(),
    "window": m.window(8191, 0) | m.global_tokens(4),
    "strided": m.window(1023, 0) | (m.strided(16) & m.causal()),
}


@click.command()
@click.option("--keys", type=click.IntRange(min=1024), default=131_072, show_default=True)
@click.option("--kv-heads", type=click.IntRange(min=1, max=32), default=8, show_default=True)
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Of calls, for each.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also writes the results here.")
def bench(keys: int, kv_heads: int, seconds: float, path: Path | None) -> None:
    """Times decoding and updates."""
    effort = Effort(seconds=seconds)
    results = {"decode": decode(keys, kv_heads, effort), "update": update(effort)}
    if path is not None:
        path.write_text(json.dumps({"provenance": asdict(provenance()), **results}, indent=1) + "\n")


def decode(keys: int, kv_heads: int, effort: Effort) -> dict[str, object]:
    q = torch.randn(1, 32, 1, 128, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, kv_heads, keys, 128, dtype=torch.bfloat16)
    calls = {"torch": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)}
    for name, mask in MASKS.items():
        attn = sparsec.compile(mask, keys)
        row = torch.from_numpy(mask.bind(keys)[keys - 1 :, :].to_dense())
        dense = torch.nn.functional.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=row, enable_gqa=True
        )
        torch.testing.assert_close(attn.step(q, k, v).float(), dense, atol=2e-3, rtol=2e-2)
        calls[name] = lambda attn=attn: attn.step(q, k, v)
    timings = interleaved(calls, effort, lambda *_: None)
    moved = 2 * kv_heads * keys * 128 * 2
    for name, timing in timings.items():
        share = MASKS[name].bind(keys).rows(keys - 1, keys).nnz / keys if name in MASKS else 1.0
        click.echo(
            f"decode  {name:8} {timing.median_us / 1e3:9.2f} ms, {timing.q25_us / 1e3:.2f} to {timing.q75_us / 1e3:.2f}"
            f"  {moved * share / timing.median_us / 1e3:5.1f} GB/s"
            f"  {timings['torch'].median_us / timing.median_us:7.1f}× as fast as torch, {1 / share:.1f}× fewer keys"
        )
    return {name: asdict(timing) for name, timing in timings.items()}


def update(effort: Effort) -> dict[str, object]:
    with np.load(str(files("sparsec") / "demo_data" / "debian_depends.npz")) as graph:
        indptr, indices = graph["indptr"], graph["indices"]
    n = len(indptr) - 1
    chance = np.random.default_rng(0)
    target = chance.permutation(n)
    row = np.repeat(np.arange(n), np.diff(indptr))
    order = np.lexsort((target[indices], target[row]))
    shuffled = np.cumsum(np.bincount(target[row] + 1, minlength=n + 1)), target[indices][order]
    attn = sparsec.compile(m.from_csr(indptr, indices, n), q_heads=8, head_dim=64, dtype="fp32")
    timings = interleaved({"update": lambda: attn.update(m.from_csr(*shuffled, n))}, effort, lambda *_: None)
    timing = timings["update"]
    click.echo(f"update  {timing.median_us / 1e3:9.2f} ms, {timing.q25_us / 1e3:.2f} to {timing.q75_us / 1e3:.2f}")
    return {"update": asdict(timing)}


if __name__ == "__main__":
    bench()
