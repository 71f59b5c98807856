"""One case measured: every peer prepared, checked, timed among the others, and checked again.

This file decides what becomes of a peer that refuses, fails or is wrong: a row that says so, and no time. It must not
know in which process it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench import figures
from bench.ceiling import device_peak_call, gather_call, peak_call
from bench.exactness import Verdict, check, worse
from bench.gradients import GradientCheck
from bench.grid import Case, Effort
from bench.peers import Peer, Prepared, RefusedError, peer
from bench.protocol import CPU_CLOCKS, WARM, Announce, DeviceClock, device_answers, interleaved, peak_memory
from bench.results import CaseRow, PeerRow, Timing
from bench.workload import Workload, make_workload
from sparsec import analyse, buffers
from sparsec.device import detect_gpu
from sparsec.errors import BackendMissingError, CompileError

PEAK, GATHER = "peak", "gather"
_FORWARD = " forward"


class _CallFailedError(Exception):
    """A timed call raised; carries whose it was."""

    def __init__(self, name: str, cause: Exception) -> None:
        super().__init__(str(cause))
        self.name, self.cause = name, cause


class DeviceLostError(Exception):
    """After what a peer did, the GPU no longer answers this process; the other peers need another one."""


def measure_case(
    case: Case,
    effort: Effort,
    threads: int,
    announce: Announce,
    lost: Sequence[PeerRow] = (),
    make_peer: Callable[[str], Peer] = peer,
    device: str = "cpu",
) -> CaseRow:
    """Everything a grid can ask of one case.

    Args:
        case: What was declared.
        effort: How long to measure.
        threads: Of the CPU.
        announce: Told the peer and the stage before each thing that may hang or crash.
        lost: Rows of peers that hung or crashed before and are left out.
        make_peer: From a name to a peer.
        device: `cpu`, or `cuda` for any GPU.

    Raises:
        DeviceLostError: The peer that was announced last has ruined the device for this process.
    """
    if case.measure != "attention":
        return figures.measure_figure(case, effort, threads, announce, device)
    import torch

    torch.set_num_threads(threads)
    announce("", "making the work")
    work = make_workload(case, device)
    rows = {row.peer: row for row in lost}
    ready: dict[str, _Ready] = {}
    checked = _Checked(work)
    with torch.set_grad_enabled(work.needs_grad):
        for name in case.peers:
            if name in rows:
                continue
            announce(name, "prepare")
            rows[name], prepared = _prepared(name, checked, make_peer)
            if prepared is not None:
                ready[name] = prepared
                if effort.settled_memory:
                    announce(name, "prepare again")
                    rows[name] = replace(rows[name], peak_bytes=_settled_bytes(name, work, make_peer))
        peaks = _time(checked, ready, rows, effort, threads, announce)
    return _case_row(work, threads, tuple(rows[name] for name in case.peers), peaks)


@dataclass(frozen=True, slots=True)
class _Peaks:
    """Of the machine, taken in the same rounds: FLOP/s, and bytes a second of rows of K and V."""

    flops: float | None = None
    gather: float | None = None


class _Ready:
    """A prepared peer, and what is timed of it: the forward pass, and with it the backward pass where that is asked."""

    def __init__(self, prepared: Prepared, work: Workload) -> None:
        self.prepared = prepared
        self._inputs = prepared.inputs or (work.q, work.k, work.v)
        # In the peer's own layout; `to_out` only swaps dimensions, so that it leads back too.
        self._d_out = None if work.d_out is None else prepared.to_out(work.d_out).contiguous()

    def __call__(self) -> tuple[Any, ...]:
        """The output, and the gradients of q, k and v, all in the peer's own layout."""
        import torch

        out = self.prepared.call()
        if self._d_out is None:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, self._inputs, self._d_out))


class _Checked:
    """A work, and the one place where results of it are held to the reference."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self._gradients = GradientCheck(work)

    def verdict(self, ready: _Ready, returned: tuple[Any, ...]) -> Verdict:
        prepared = ready.prepared
        out, *gradients = (prepared.to_out(tensor) for tensor in returned)
        verdict = check(self.work, out, prepared.computes)
        return worse([verdict, self._gradients(tuple(gradients), prepared.computes)]) if gradients else verdict


def _prepared(name: str, checked: _Checked, make_peer: Callable[[str], Peer]) -> tuple[PeerRow, _Ready | None]:
    """A row with set-up, memory and exactness; and the peer, where it may be timed."""
    memory = peak_memory(checked.work.device)
    started = time.perf_counter_ns()
    try:
        prepared = make_peer(name).prepare(checked.work)
        ready = _Ready(prepared, checked.work)
        returned = ready()
        _finish(checked.work)
        setup_us = (time.perf_counter_ns() - started) / 1e3
        peak_bytes = memory.bytes()
        verdict = checked.verdict(ready, returned)
        plan = prepared.plan() if prepared.plan is not None else None
    except RefusedError as error:
        return PeerRow(name, "skipped", str(error)), None
    # Whatever a peer raises is its own row, and must not cost the others theirs.
    except Exception as error:
        return _failed(name, error, checked.work), None
    row = PeerRow(
        name,
        "ok" if verdict.is_exact else "wrong",
        "" if verdict.is_exact else _wrong(verdict),
        error=verdict.error,
        allowed=verdict.allowed,
        setup_us=round(setup_us, 1),
        peak_bytes=peak_bytes,
        plan=plan,
        note=prepared.note,
    )
    return row, ready if verdict.is_exact else None


def _settled_bytes(name: str, work: Workload, make_peer: Callable[[str], Peer]) -> int | None:
    """What another preparation and call add to a process that has gone through one."""
    # Ours would write over the block of the result that has gone.
    buffers.release()
    memory = peak_memory(work.device)
    _Ready(make_peer(name).prepare(work), work)()
    return memory.bytes()


def _time(
    checked: _Checked,
    ready: dict[str, _Ready],
    rows: dict[str, PeerRow],
    effort: Effort,
    threads: int,
    announce: Announce,
) -> _Peaks:
    """Fills in the times; returns what the machine did at most in the same rounds."""
    work = checked.work
    calls: dict[str, Callable[[], object]] = {}
    for name, each in ready.items():
        calls[name] = partial(_guarded, name, each)
        if work.needs_grad:
            calls[name + _FORWARD] = partial(_guarded, name, each.prepared.call)
    peak_flops = 0
    # Without a compiler there is no peak to compare with.
    with suppress(BackendMissingError, CompileError):
        calls[PEAK], peak_flops = _peak(work, threads)
    if work.device != "cpu" and ready and not work.needs_grad:
        announce("", "fetching alone")
        # Without that ceiling, the peers are measured all the same.
        with suppress(ImportError, RuntimeError, AssertionError):
            gather = gather_call(work)
            if gather is not None:
                calls[GATHER] = gather
    clocks = CPU_CLOCKS if work.device == "cpu" else DeviceClock(detect_gpu()).clocks
    while calls.keys() - {PEAK, GATHER}:
        try:
            times = interleaved(calls, effort, lambda name, stage: announce(name.removesuffix(_FORWARD), stage), clocks)
        except _CallFailedError as error:
            rows[error.name] = _failed(error.name, error.cause, work)
            calls = {name: call for name, call in calls.items() if name.removesuffix(_FORWARD) != error.name}
            continue
        for name in calls.keys() & ready.keys():
            announce(name, "check")
            row = replace(rows[name], forward=times.get(name + _FORWARD), warm=times.get(name + WARM))
            rows[name] = _timed(row, times[name], checked, ready[name])
        return _Peaks(
            peak_flops / times[PEAK].median_us * 1e6 if peak_flops else None,
            _edge_bytes(work) / times[GATHER].median_us * 1e6 if GATHER in times else None,
        )
    return _Peaks()


def _edge_bytes(work: Workload) -> int:
    """Of the rows of K and V of every edge, where one mask serves all heads."""
    p = work.problem
    return int(work.bound.nnz * p.q_heads * p.batch * (p.head_dim + p.v_dim) * p.itemsize)


def _peak(work: Workload, threads: int) -> tuple[Callable[[], object], int]:
    return peak_call(work.case.dtype, threads) if work.device == "cpu" else device_peak_call(work.case.dtype)


def _finish(work: Workload) -> None:
    """What a call has begun on a GPU is done on return, or has failed."""
    if work.device != "cpu":
        import torch

        torch.cuda.synchronize()


def _guarded(name: str, call: Callable[[], object]) -> object:
    try:
        return call()
    # As above: its own row.
    except Exception as error:
        raise _CallFailedError(name, error) from error


def _timed(row: PeerRow, timing: Timing, checked: _Checked, ready: _Ready) -> PeerRow:
    """The row with its time, or as wrong where the peer is no longer exact after all those calls."""
    verdict = checked.verdict(ready, ready())
    setup_us = None if row.setup_us is None else round(max(0.0, row.setup_us - timing.median_us), 1)
    row = replace(row, timing=timing, setup_us=setup_us)
    if verdict.is_exact:
        return row
    return replace(row, status="wrong", reason=_wrong(verdict), error=verdict.error, allowed=verdict.allowed)


def _wrong(verdict: Verdict) -> str:
    what = "" if verdict.name == "out" else f"{verdict.name} is "
    return f"{what}off by {verdict.error:.3g} where {verdict.allowed:.3g} is allowed"


def _failed(name: str, error: Exception, work: Workload) -> PeerRow:
    """A row that says why.

    Raises:
        DeviceLostError: Nothing else can be measured in this process.
    """
    text = str(error).strip().splitlines()
    is_memory = isinstance(error, MemoryError) or any(
        words in line for line in text for words in ("allocate memory", "out of memory")
    )
    said = f"{type(error).__name__}: {text[0][:300] if text else ''}"
    if work.device != "cpu" and not device_answers():
        raise DeviceLostError(said) from error
    return PeerRow(name, "failed", f"out of memory ({said})" if is_memory else said)


def _case_row(work: Workload, threads: int, rows: tuple[PeerRow, ...], peaks: _Peaks) -> CaseRow:
    bound, problem = work.bound, work.problem
    edges, fill = edges_of(bound, problem.q_heads, problem.batch)
    # Two products forward, and five backward: the scores again, then the gradients of weights, q, k and v.
    n_products = 7 if work.needs_grad else 2
    return CaseRow(
        case=work.case,
        threads=threads,
        q_len=problem.q_len,
        kv_len=problem.kv_len,
        edges=edges,
        density=edges / (problem.batch * problem.q_heads * problem.q_len * problem.kv_len),
        tile_fill=fill,
        flops=n_products * edges * (problem.head_dim + problem.v_dim),
        tensor_bytes=problem.tensor_bytes,
        peak_flops=peaks.flops,
        peers=rows,
        gather_bytes_per_s=peaks.gather,
    )


# Any: a bound mask; its type is not worth an import here.
def edges_of(bound: Any, heads: int, batch: int) -> tuple[int, float | None]:
    """Edges of all heads and batch elements, and the fill of 64×64 tiles where one mask serves all."""
    if bound.varies_by_head or bound.varies_by_batch:
        each = (bound.select(b, h).nnz for b in range(batch) for h in range(heads))
        return sum(each), None
    return bound.nnz * heads * batch, round(float(analyse(bound).fill(64).fill), 4)
