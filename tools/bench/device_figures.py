"""What is measured of ours alone on a GPU: planning with upload, an update for the same kernels, the longest context.

This file decides what is inside those times: `upload` and `update` are what a first call, or the call after `update`,
takes longer on the host's clock than an ordinary call, with kernels that are there already. It must not know in which
process it runs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sparsec
from bench import shapes
from bench.exactness import Verdict, check, worse
from bench.grid import Case, Effort
from bench.protocol import Announce, timing
from bench.results import CaseRow, PeerRow
from bench.workload import Workload, bound_mask, make_workload, mask_of, problem
from sparsec import Problem, masks

if TYPE_CHECKING:
    import torch

    from sparsec.masks import BoundMask

# Rows of different tokens that the tensors of the longest context repeat; a prime number.
_POOL_ROWS = 250_007
# Of the free memory, what the first try of the longest context takes; each further one takes so much less.
_FIRST_SHARE, _SMALLER = 0.985, 0.98
_TRIES = 4
# What is lost in the noise of calls is still no zero.
_LEAST_US = 1.0
# Queries of a piece that is checked; and so many show how far a window reaches.
_PIECE, _PROBED = 200, 1 << 20


def measured(case: Case, effort: Effort, threads: int, announce: Announce, device: str) -> CaseRow:
    announce("ours", case.measure)
    measures = {"upload": _upload, "update": _update, "longest": _longest}
    shape, row = measures[case.measure](case, effort, device)
    bound = bound_mask(replace(case, length=shape.q_len))
    return CaseRow(
        case=case,
        threads=threads,
        q_len=shape.q_len,
        kv_len=shape.kv_len,
        edges=bound.nnz * case.heads * case.batch,
        density=bound.nnz / (shape.q_len * shape.kv_len),
        tile_fill=None,
        flops=0,
        tensor_bytes=shape.tensor_bytes,
        peak_flops=None,
        peers=(row,),
    )


def _upload(case: Case, effort: Effort, device: str) -> tuple[Problem, PeerRow]:
    """From a mask that was just read to the end of the first call, less an ordinary call."""
    work = make_workload(case, device)
    shape, inputs = work.problem, (work.q, work.k, work.v)

    def anew() -> tuple[float, Any]:
        mask = mask_of(case.mask)
        started = time.perf_counter_ns()
        attention = sparsec.compile(mask.bind(*work.bound.shape), tune="cached")
        out = attention(*inputs)
        _finish(device)
        return (time.perf_counter_ns() - started) / 1e3, (attention, out)

    first_us, (attention, _) = anew()
    ordinary = _ordinary_us(lambda: attention(*inputs), effort, device)
    samples = []
    while not _is_enough(samples, effort):
        took_us, (_, out) = anew()
        samples.append(max(_LEAST_US, took_us - ordinary))
    return shape, _row(samples, check(work, out, work.bound), max(0.0, first_us - ordinary))


def _update(case: Case, effort: Effort, device: str) -> tuple[Problem, PeerRow]:
    """`update` and the call after it, less an ordinary call; two masks take turns."""
    work = make_workload(case, device)
    turns = itertools.cycle([str(case.mask.options["other"]), case.mask.text])
    attention = sparsec.compile(work.bound, tune="cached")

    def updated() -> tuple[float, BoundMask, Any]:
        mask = masks.parse(next(turns))
        started = time.perf_counter_ns()
        attention.update(mask)
        out = attention(work.q, work.k, work.v)
        _finish(device)
        return (time.perf_counter_ns() - started) / 1e3, attention.bound, out

    ordinary = _ordinary_us(lambda: attention(work.q, work.k, work.v), effort, device)
    updated()
    samples = []
    while not _is_enough(samples, effort):
        took_us, bound, out = updated()
        samples.append(max(_LEAST_US, took_us - ordinary))
    return work.problem, _row(samples, check(work, out, bound), 0.0)


def _longest(case: Case, effort: Effort, device: str) -> tuple[Problem, PeerRow]:
    """As many tokens as q, k, v and a new output fill the device's free memory with, or up to the case's length."""
    mask = mask_of(case.mask)
    band = shapes.band(mask.bind(_PROBED))
    if band is None or band.left is None or band.right is None or case.heads * case.batch != 1:
        raise ValueError("the longest context is measured of a window and one head")
    reach = max(band.left, band.right)
    length = _most_tokens(case, device)
    for attempt in range(_TRIES):
        try:
            return _attended(replace(case, length=length), mask, reach, effort, device)
        except RuntimeError as error:
            if "out of memory" not in str(error) or attempt == _TRIES - 1:
                raise
        length = int(length * _SMALLER)
        _forget(device)
    raise AssertionError("the last attempt returns or raises")


def _most_tokens(case: Case, device: str) -> int:
    token_bytes = Problem(1, 1, 1, 1, case.head_dim, case.head_dim, case.dtype).tensor_bytes
    if device == "cpu":
        assert case.length is not None, "on a CPU the case says how long"
        return case.length
    import torch

    free: int = torch.cuda.mem_get_info()[0]
    return min(int(free * _FIRST_SHARE) // token_bytes, case.length or free)


def _forget(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.empty_cache()


def _attended(case: Case, mask: masks.Mask, reach: int, effort: Effort, device: str) -> tuple[Problem, PeerRow]:
    import torch

    bound = bound_mask(case)
    shape, n = problem(case, bound), bound.q_len
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[case.dtype]
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(3, min(_POOL_ROWS, n), case.head_dim, generator=generator).to(dtype).to(device)
    q, k, v = (torch.empty(1, 1, n, case.head_dim, dtype=dtype, device=device) for _ in range(3))
    for tensor, rows in zip((q, k, v), pool, strict=True):
        for first in range(0, n, len(rows)):
            tensor[0, 0, first : first + len(rows)] = rows[: n - first]
    attention = sparsec.compile(bound, tune="cached")
    with torch.no_grad():
        started = time.perf_counter_ns()
        out = attention(q, k, v)
        _finish(device)
        first_us = (time.perf_counter_ns() - started) / 1e3
        samples = []
        while len(samples) < effort.min_repeats:
            del out
            started = time.perf_counter_ns()
            out = attention(q, k, v)
            _finish(device)
            samples.append((time.perf_counter_ns() - started) / 1e3)
    verdict = worse(_piece_verdicts(case, mask, reach, (q, k, v, out)))
    return shape, _row(samples, verdict, first_us)


def _piece_verdicts(case: Case, mask: masks.Mask, reach: int, tensors: tuple[torch.Tensor, ...]) -> Iterator[Verdict]:
    """Of the rows at both ends, at the element 2³¹, and in the middle, with all keys that those attend."""
    n, dim = tensors[0].shape[2:]
    for first in sorted({0, n // 2, min(max(0, 2**31 // dim - _PIECE // 2), max(0, n - _PIECE)), max(0, n - _PIECE)}):
        stop = min(n, first + _PIECE)
        low, high = max(0, first - reach), min(n, stop + reach)
        bound = mask.bind(n)[first:stop, low:high]
        q, k, v = (tensors[0][:, :, first:stop], *(tensor[:, :, low:high] for tensor in tensors[1:3]))
        work = Workload(case, bound, problem(case, bound), q, k, v)
        yield check(work, tensors[3][:, :, first:stop], bound)


def _ordinary_us(call: Callable[[], object], effort: Effort, device: str) -> float:
    """Of a call, its wait included."""
    samples: list[float] = []
    while not _is_enough(samples, effort):
        started = time.perf_counter_ns()
        call()
        _finish(device)
        samples.append((time.perf_counter_ns() - started) / 1e3)
    return timing(samples).median_us


def _is_enough(samples: list[float], effort: Effort) -> bool:
    if len(samples) >= effort.max_repeats:
        return True
    return len(samples) >= effort.min_repeats and sum(samples) >= effort.seconds * 1e6


def _finish(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def _row(samples: list[float], verdict: Verdict, first_us: float) -> PeerRow:
    taken = timing(samples)
    setup_us = round(max(0.0, first_us - taken.median_us), 1)
    told = {"timing": taken, "error": verdict.error, "allowed": verdict.allowed, "setup_us": setup_us}
    if verdict.is_exact:
        return PeerRow("ours", "ok", **told)
    return PeerRow("ours", "wrong", f"off by {verdict.error:.3g} where {verdict.allowed:.3g} is allowed", **told)
