"""Where the time of the package graph goes: attention beside the fetching of its rows alone, and without misses.

    python tools/bench_profile.py --json FILE

A call fetches a row of K and one of V for each edge and head. Beside it stand a copy of memory; a sum of the same rows
by torch's `embedding_bag`, which fetches them and does next to nothing else; and attention itself over nearly the same
graph with so few keys that they stay in the cache. This file decides what a fetched byte is; kernels do not know it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bench.exactness import check
from bench.grid import Case, Effort, MaskSource
from bench.protocol import interleaved
from bench.sheet import Figure, made, measured, timed, write_sheet
from bench.workload import Workload, make_workload

import sparsec
from sparsec import masks as m

COPY_BYTES = 256 << 20
# Neighbouring keys become one, so that K and V of a head take two megabytes.
TOGETHER = 16
PROTOCOL = (
    "monotonic clock, two calls of each not counted, then all in turn; median and quartiles; attention is compared "
    "with dense attention in fp64 on sampled rows"
)


@click.command()
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Of calls, for each.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also writes the results here.")
def main(seconds: float, path: Path | None) -> None:
    """Times the graph, and what bounds it."""
    found = figures(Effort(seconds))
    for figure in found:
        click.echo(f"{figure.what:44} {measured(figure):>16}  {figure.note}")
    if path is not None:
        about = "Where the time of debian_depends goes, on a CPU"
        write_sheet(path, made("profile", about, PROTOCOL, torch.get_num_threads(), found))


def figures(effort: Effort) -> list[Figure]:
    work = make_workload(Case("debian_depends", "attention", MaskSource("file", "debian_depends.npz"), heads=8))
    near = _near(work)
    csr = work.bound.to_csr()
    columns, offsets = torch.from_numpy(csr.indices.astype(np.int64)), torch.from_numpy(csr.indptr.astype(np.int64))
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)

    def rows() -> None:
        for tensor in (work.k, work.v):
            for head in tensor[0]:
                torch.nn.functional.embedding_bag(columns, head, offsets, mode="sum", include_last_offset=True)

    attention, near_attention = sparsec.compile(work.bound), sparsec.compile(near.bound)
    calls: dict[str, Callable[[], Any]] = {
        "attention": lambda: attention(work.q, work.k, work.v),
        "its rows of K and V, fetched and summed": rows,
        "attention, keys that stay in the cache": lambda: near_attention(near.q, near.k, near.v),
        "copy": lambda: target.copy_(source),
    }
    verdicts = {
        "attention": check(work, calls["attention"](), work.bound),
        "attention, keys that stay in the cache": check(
            near, calls["attention, keys that stay in the cache"](), near.bound
        ),
    }
    # Each fetches both rows of an edge; a copy reads and writes.
    moved = {
        "attention": _row_bytes(work),
        "its rows of K and V, fetched and summed": _row_bytes(work),
        "attention, keys that stay in the cache": _row_bytes(near),
        "copy": 2 * source.nbytes,
    }
    edges = {name: (near if "cache" in name else work).bound.nnz * 8 for name in calls if name != "copy"}
    found = []
    for name, timing in interleaved(calls, effort, lambda *_: None).items():
        note = f"{moved[name] / 1e9:.3g} GB, {moved[name] / timing.median_us / 1e3:.3g} GB/s"
        if name in edges:
            note += f"; {edges[name]:,} edges of all heads, {timing.median_us * 1e3 / edges[name]:.3g} ns each"
        shape: dict[str, int | float | str] = {}
        if name != "copy":
            shape = {"graph": "debian_depends", "heads": 8, "head_dim": 64, "dtype": "fp32"}
        figure = timed(name, timing, shape, "attention" if name.startswith("its") else "", note)
        if name in verdicts:
            figure = replace(figure, error=verdicts[name].error, allowed=verdicts[name].allowed)
        found.append(figure)
    return found


def _row_bytes(work: Workload) -> int:
    return 2 * work.bound.nnz * work.problem.q_heads * work.problem.head_dim * work.problem.itemsize


def _near(work: Workload) -> Workload:
    """The same queries over a sixteenth of the keys: where two of a row's keys become one, an edge is lost."""
    csr = work.bound.to_csr()
    n_keys = -(-work.bound.kv_len // TOGETHER)
    rows = np.repeat(np.arange(work.bound.q_len), np.diff(csr.indptr))
    pairs = np.unique(rows * n_keys + csr.indices // TOGETHER)
    indptr = np.concatenate(([0], np.cumsum(np.bincount(pairs // n_keys, minlength=work.bound.q_len))))
    bound = m.from_csr(indptr, pairs % n_keys, n_keys).bind()
    k, v = (tensor[:, :, :n_keys].contiguous() for tensor in (work.k, work.v))
    return Workload(work.case, bound, replace(work.problem, kv_len=n_keys), work.q, k, v)


if __name__ == "__main__":
    main()
