"""What this machine could do at most, measured.

This file decides what a peak is: registers only, every vector unit busy, on the threads that torch uses; on a GPU, what
a large product of matrices reaches, and for masks of short rows what fetching the rows of K and V of every edge takes
without doing anything with them. Each is timed as one more call among the peers, so that a share of the peak compares
like with like even where the clock moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from bench.protocol import timed_ns
from bench.results import Ceiling
from sparsec.device import detect_cpu
from sparsec.tuning.calibrate import Peak

if TYPE_CHECKING:
    import torch

    from bench.workload import Workload


def peak_call(dtype: str, threads: int) -> tuple[Callable[[], object], int]:
    """A call to time, and its floating-point operations."""
    made = Peak(detect_cpu(), dtype, threads)
    return made, made.flops


# So large that neither its launch nor its edges count.
_MATRIX = 8192


def device_peak_call(dtype: str) -> tuple[Callable[[], object], int]:
    """On a GPU, torch's product of two square matrices, and its floating-point operations."""
    import torch

    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    a, b = (torch.randn(_MATRIX, _MATRIX, device="cuda").to(kind) for _ in range(2))
    return lambda: a @ b, 2 * _MATRIX**3


# Longer rows are read by tiles, and more edges than that are not listed for this.
_SHORT_KEYS = 1024
_MAX_PICKED = 2**28
# Rows a program adds up at a time, and how often: which is fastest depends on the device.
_GATHER_SHAPES = ((16, 4), (32, 4), (32, 16))


def gather_call(work: Workload, shapes: tuple[tuple[int, int], ...] = _GATHER_SHAPES) -> Callable[[], object] | None:
    """On a GPU, the rows of K and V of every edge read in the mask's order; None where that is no bound of the work.

    Raises:
        AssertionError: The sums are not those of the rows.
    """
    bound, p = work.bound, work.problem
    is_varied = bound.varies_by_head or bound.varies_by_batch
    if is_varied or p.batch > 1 or p.group > 1 or p.head_dim != p.v_dim or p.head_dim & (p.head_dim - 1):
        return None
    if not 0 < bound.nnz < _SHORT_KEYS * bound.q_len or 2 * bound.nnz * p.q_heads > _MAX_PICKED:
        return None
    rows, picked = picked_rows(work)
    calls = [_added(rows, picked, *shape) for shape in shapes]
    if len(calls) == 1:
        return calls[0]
    from bench.protocol import between_events_ns

    return min(calls, key=lambda call: min(between_events_ns(call) for _ in range(3)))


def picked_rows(work: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    """`(rows [2 · heads · kv_len, head_dim], picked [2 · heads · edges])`: K and V, and which row each edge needs."""
    import torch

    p = work.problem
    columns = torch.from_numpy(work.bound.to_csr().indices.astype(np.int32)).to(work.q.device)
    rows = torch.cat([work.k[0].detach(), work.v[0].detach()]).flatten(0, 1)
    # A key, then its value.
    pairs = torch.stack([columns, columns + p.kv_heads * p.kv_len], dim=1).flatten()
    return rows, torch.cat([pairs + head * p.kv_len for head in range(p.kv_heads)])


def _added(rows: torch.Tensor, picked: torch.Tensor, block: int, steps: int) -> Callable[[], object]:
    import torch

    from bench.gather_triton import add_rows

    n, dim = len(picked), rows.shape[1]
    programs = -(-n // (block * steps))
    sums = torch.full((programs, dim), float("nan"), device=rows.device)

    def call() -> torch.Tensor:
        add_rows[(programs,)](rows, picked, sums, n, DIM=dim, BLOCK=block, STEPS=steps, num_warps=4)
        return sums

    last = picked[(programs - 1) * block * steps :].long()
    torch.testing.assert_close(call()[-1], rows[last].float().sum(0), rtol=1e-3, atol=1e-2)
    return call


def ceilings(threads: int) -> tuple[Ceiling, ...]:
    """The best of a second of calls, for fp32 and for bf16, on one thread and on all."""
    found = []
    for dtype in ("fp32", "bf16"):
        rates = []
        for team in (1, threads):
            made = Peak(detect_cpu(), dtype, team)
            rates.append(made.flops / min(timed_ns(made) for _ in range(40)) * 1e9)
        found.append(Ceiling(dtype, made.unit, *rates))
    return tuple(found)
