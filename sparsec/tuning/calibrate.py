"""What a device can really do: its ceilings, and how far the cost model is off on the kernels of each kind.

This file decides the probes. What a data sheet or the system says of rates is an estimate; here each is the best of
repeated runs, on all units, with the threads that torch uses. The factors are measured afterwards, against the cost
model with those rates: one for tiles and one for single edges in each dtype, which is what choosing between templates
hangs on. It must not know where calibrations are kept, nor who uses them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Final

from sparsec import masks
from sparsec.backends import cpu
from sparsec.backends.base import DTYPES, Dtype, Problem
from sparsec.backends.cpu_kernels import openmp_parallel
from sparsec.cost import model_digest
from sparsec.device import Device, calibrated
from sparsec.errors import SparsecError
from sparsec.records import Calibration
from sparsec.tuning.measure import LocalMeasurer, Look
from sparsec.tuning.space import Space, Task

_PEAK_SOURCE: Final = Path(__file__).with_name("peak.cpp")
# A call of the peak loop takes about so long, so that starting a team of threads does not count.
_CALL_NS: Final = 10_000_000
_REPEATS: Final = 15
# Tensors that no cache holds.
_CPU_BYTES: Final = 256 << 20
_GPU_BYTES: Final = 1 << 30
# A row of K or V, as single edges fetch it.
_ROW_FLOATS: Final = 64
_MATMUL: Final = 8192
# What factors are measured of: the template of each, and a mask that suits it.
_KINDS: Final[dict[str, tuple[str, masks.Mask]]] = {
    "tiles": ("block_sparse", masks.window(511, 511)),
    "rows": ("row_traversal", masks.random_edges(32, 0)),
}


def calibrate(device: Device, where: str, tell: Callable[[str], None] = lambda what: None) -> Calibration:
    """The ceilings of a device and the factors of the cost model, measured here and now.

    Args:
        device: What is measured.
        where: The torch device.
        tell: Told what is being measured.

    Raises:
        SparsecError: Nothing could be measured.
    """
    values: dict[str, float] = {}
    probes = _cpu_ceilings(where) if device.kind == "cpu" else _gpu_ceilings(where)
    for name, value in probes:
        tell(name)
        values[name] = value
    # The model as it is without factors, an earlier calibration's among them: they are what is measured.
    plain = {f"{kind}_{dtype}": 1.0 for kind in _KINDS for dtype in DTYPES}
    known = calibrated(device, values | plain)
    for dtype in DTYPES:
        for kind in _KINDS:
            tell(f"{kind} in {dtype}")
            factor = _factor(known, where, dtype, kind)
            if factor is not None:
                values[f"{kind}_{dtype}"] = factor
    if not values:
        raise SparsecError(f"nothing of {device.name} could be measured; see `sparsec doctor`")
    return Calibration(
        device.key,
        model_digest(device.key),
        tuple(values.items()),
        _toolchain(device),
        device.label,
        model=device.model,
    )


def _toolchain(device: Device) -> str:
    import torch

    return cpu.compiler().version if device.kind == "cpu" else f"torch {torch.__version__}"


# Ceilings.


class Peak:
    """A loop of multiply-adds on registers alone, or of bf16 dot products where there are any (`unit` says which)."""

    def __init__(self, device: Device, dtype: str, threads: int) -> None:
        # The dtype of the key only tells binaries apart: there is one.
        self._library = ctypes.CDLL(str(cpu.compiled((_PEAK_SOURCE,), "fp32", device)))
        self._library.run.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
        self._library.run.restype = None
        self._library.flops_per_iteration.restype = ctypes.c_int64
        self._library.has_dot_units.restype = ctypes.c_int64
        self._is_dot = dtype == "bf16" and bool(self._library.has_dot_units())
        self._threads = threads
        self._parallel: int | None = None
        self._iterations = 1000
        # One thread alone, and the quickest of a few: waiting for others says nothing about the work in a call.
        while (took := min(_timed_ns(self) for _ in range(5))) < _CALL_NS:
            self._iterations = int(self._iterations * min(10.0, max(1.2, 1.2 * _CALL_NS / took)))
        self._parallel = openmp_parallel() if threads > 1 else None

    def __call__(self) -> None:
        self._library.run(self._iterations, int(self._is_dot), self._parallel, self._threads)

    def launch(self) -> None:
        """A team of threads that has next to nothing to do."""
        self._library.run(1, int(self._is_dot), self._parallel, self._threads)

    @property
    def unit(self) -> str:
        return "bf16 dot" if self._is_dot else "fp32 FMA"

    @property
    def flops(self) -> int:
        """Of one call, all threads together."""
        per_thread: int = self._library.flops_per_iteration(int(self._is_dot)) * self._iterations
        return per_thread * (self._threads if self._parallel is not None else 1)


def _timed_ns(call: Callable[[], object]) -> int:
    started = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - started


def _cpu_ceilings(where: str) -> Iterator[tuple[str, float]]:
    import torch

    from sparsec.device import detect_cpu

    device, threads = detect_cpu(), torch.get_num_threads()
    # torch's own pool carries the threads: it is there once something ran on it.
    torch.ones(1 << 20).add_(1)
    for name, dtype in (("vector_flops", "fp32"), ("bf16_flops", "bf16")):
        peak = Peak(device, dtype, threads)
        yield name, peak.flops / _best_s(peak, where)
    yield "launch_us", _best_s(peak.launch, where) * 1e6
    yield from _memory(where, _CPU_BYTES)


def _gpu_ceilings(where: str) -> Iterator[tuple[str, float]]:
    import torch

    for name, dtype in (("bf16_flops", torch.bfloat16), ("fp16_flops", torch.float16)):
        a = torch.randn(_MATMUL, _MATMUL, device=where, dtype=torch.float32).to(dtype)
        yield name, 2 * _MATMUL**3 / _best_s(partial(torch.matmul, a, a), where)
    yield from _memory(where, _GPU_BYTES)
    small = torch.zeros(1, device=where)
    many = 100

    def launches() -> None:
        for _ in range(many):
            small.add_(1)

    yield "launch_us", _best_s(launches, where) / many * 1e6


def _memory(where: str, size_bytes: int) -> Iterator[tuple[str, float]]:
    """Bytes a second, read and written: of a copy, and of rows picked at random."""
    import torch

    source = torch.ones(size_bytes // 4 // _ROW_FLOATS, _ROW_FLOATS, device=where)
    target = torch.empty_like(source)
    yield "memory_bandwidth", 2 * source.nbytes / _best_s(lambda: target.copy_(source), where)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(source), generator=generator).to(where)
    yield (
        "gather_bandwidth",
        2 * source.nbytes / _best_s(lambda: torch.index_select(source, 0, order, out=target), where),
    )


def _best_s(call: Callable[[], object], where: str) -> float:
    """Of repeated runs after a first that does not count."""
    call()
    if where == "cpu":
        return min(_timed_ns(call) for _ in range(_REPEATS)) * 1e-9
    import torch

    best = float("inf")
    for _ in range(_REPEATS):
        torch.cuda.synchronize(where)
        started = time.perf_counter()
        call()
        torch.cuda.synchronize(where)
        best = min(best, time.perf_counter() - started)
    return best


# Factors of the cost model.


def _factor(device: Device, where: str, dtype: Dtype, kind: str) -> float | None:
    """Measured over estimated; None where the kernel is not to be had."""
    length = 8192 if device.kind == "cpu" else 32_768
    heads = max(4, device.units // 4)
    template_name, mask = _KINDS[kind]
    problem = Problem(length, length, heads, heads, _ROW_FLOATS, _ROW_FLOATS, dtype)
    try:
        task = Task(mask.bind(length), problem, device, template=template_name, reorder="off")
        space = Space(task)
        with closing(LocalMeasurer(space, where, n_rows=6)) as measurer:
            found = measurer.measure(space.default, Look(runs=_REPEATS, seconds=0.0))
    except SparsecError:
        return None
    if not found.timings_us or not found.estimate_us:
        return None
    return min(found.timings_us) / found.estimate_us
