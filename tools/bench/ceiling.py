"""What this machine could do at most, measured.

This file decides what a peak is: registers only, every vector unit busy, on the threads that torch uses. It is timed as
one more call among the peers, so that a share of the peak compares like with like even where the clock moves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from bench.protocol import timed_ns
from bench.results import Ceiling
from sparsec.backends import cpu
from sparsec.backends.cpu_kernels import openmp_parallel
from sparsec.device import detect_cpu

_SOURCE = Path(__file__).with_name("peak.cpp")
# Long enough that starting a team of threads does not count.
_CALL_NS = 10_000_000


class Peak:
    """A loop of multiply-adds, or of bf16 dot products where the CPU has them (`unit` says which)."""

    def __init__(self, dtype: str, threads: int) -> None:
        # The dtype of the key only tells binaries apart: there is one.
        self._library = ctypes.CDLL(str(cpu.compiled((_SOURCE,), "fp32", detect_cpu())))
        self._library.run.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
        self._library.run.restype = None
        self._library.flops_per_iteration.restype = ctypes.c_int64
        self._library.has_dot_units.restype = ctypes.c_int64
        self._is_dot = dtype == "bf16" and bool(self._library.has_dot_units())
        self._threads = threads
        self._parallel: int | None = None
        self._iterations = 1000
        # One thread alone, and the quickest of a few: waiting for others says nothing about the work in a call.
        while (took := min(timed_ns(self) for _ in range(5))) < _CALL_NS:
            self._iterations = int(self._iterations * min(10.0, max(1.2, 1.2 * _CALL_NS / took)))
        self._parallel = openmp_parallel() if threads > 1 else None

    def __call__(self) -> None:
        self._library.run(self._iterations, int(self._is_dot), self._parallel, self._threads)

    @property
    def unit(self) -> str:
        return "bf16 dot" if self._is_dot else "fp32 FMA"

    @property
    def flops(self) -> int:
        """Of one call, all threads together."""
        per_thread: int = self._library.flops_per_iteration(int(self._is_dot)) * self._iterations
        return per_thread * (self._threads if self._parallel is not None else 1)


def peak_call(dtype: str, threads: int) -> tuple[Callable[[], object], int]:
    """A call to time, and its floating-point operations."""
    made = Peak(dtype, threads)
    return made, made.flops


def ceilings(threads: int) -> tuple[Ceiling, ...]:
    """The best of a second of calls, for fp32 and for bf16, on one thread and on all."""
    found = []
    for dtype in ("fp32", "bf16"):
        rates = []
        for team in (1, threads):
            made = Peak(dtype, team)
            rates.append(made.flops / min(timed_ns(made) for _ in range(40)) * 1e9)
        found.append(Ceiling(dtype, made.unit, *rates))
    return tuple(found)
