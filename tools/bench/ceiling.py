"""What this machine could do at most, measured.

This file decides what a peak is: registers only, every vector unit busy, on the threads that torch uses; on a GPU, what
a large product of matrices reaches. It is timed as one more call among the peers, so that a share of the peak compares
like with like even where the clock moves.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.protocol import timed_ns
from bench.results import Ceiling
from sparsec.device import detect_cpu
from sparsec.tuning.calibrate import Peak


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
