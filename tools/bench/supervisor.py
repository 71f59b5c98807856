"""Runs the cases of a grid, each in a process of its own, and keeps the result file up to date.

This file decides what becomes of a process that crashes or hangs: the peer it was busy with gets a row that says so,
and the case is run again without it. It must not know how anything is measured.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from bench.grid import Case, Effort, Grid
from bench.results import CaseRow, Ceiling, PeerRow, Run, Status, decode, write_run

_TOOLS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a process may take.

    Attributes:
        timeout_s: Between two signs of life.
        memory_bytes: Of data; 0 for no limit.
        device: Where its tensors lie: `cpu`, or `cuda` for any GPU.
    """

    timeout_s: float
    memory_bytes: int
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class _Death:
    """How a process ended without a result, and what it was busy with."""

    peer: str
    stage: str
    status: Status
    reason: str


Progress = Callable[[Case, str], None]


def run_grid(
    grid: Grid, run: Run, cases: Sequence[Case], threads: int, limits: Limits, out: Path, progress: Progress
) -> Run:
    """Measures `cases`, writes the file after each, and returns the whole run.

    Args:
        grid: Gives the order in the file.
        run: What is known already: provenance, and the cases of an earlier run.
        cases: What is to be measured now.
        threads: Where a case does not say.
        limits: Of each process.
        out: The result file.
        progress: Told what is going on.
    """
    done = {row.case.id: row for row in run.cases}
    for case in cases:
        progress(case, "")
        done[case.id] = run_case(case, grid.effort, case.threads or threads, limits, progress)
        run = replace(run, cases=tuple(done[each.id] for each in grid.cases if each.id in done))
        write_run(out, run)
    return run


def run_case(case: Case, effort: Effort, threads: int, limits: Limits, progress: Progress) -> CaseRow:
    """One case; peers that crash or hang are left out of the next attempt."""
    lost: list[PeerRow] = []
    while True:
        request = {
            "task": "case",
            "case": asdict(case),
            "effort": asdict(effort),
            "threads": threads,
            "memory_bytes": limits.memory_bytes,
            "device": limits.device,
            "lost": [asdict(row) for row in lost],
        }
        answer = ask(request, limits.timeout_s, threads, lambda peer, stage: progress(case, f"{peer} {stage}"))
        if not isinstance(answer, _Death):
            return decode(CaseRow, answer, "the worker's answer")
        if answer.peer not in case.peers or answer.peer in {row.peer for row in lost}:
            return _nothing(case, threads, lost, answer)
        lost.append(PeerRow(answer.peer, answer.status, answer.reason))


def measure_ceilings(threads: int, limits: Limits) -> tuple[Ceiling, ...]:
    """What the machine can do; empty where it cannot be measured, and for a GPU, which is measured in each case."""
    if limits.device != "cpu":
        return ()
    request = {"task": "ceilings", "threads": threads, "memory_bytes": 0}
    answer = ask(request, limits.timeout_s, threads, lambda peer, stage: None)
    return () if isinstance(answer, _Death) else tuple(decode(Ceiling, each, "a ceiling") for each in answer)


def _nothing(case: Case, threads: int, lost: list[PeerRow], death: _Death) -> CaseRow:
    """A case that could not even begin."""
    known = {row.peer: row for row in lost}
    rows = tuple(known.get(name, PeerRow(name, death.status, death.reason)) for name in case.peers)
    return CaseRow(case, threads, 0, 0, 0, 0.0, None, 0, 0, None, rows)


# Any: what JSON holds.
def ask(request: dict[str, Any], timeout_s: float, threads: int, heard: Callable[[str, str], None]) -> Any | _Death:
    """A worker's answer, or how it died."""
    reading, writing = os.pipe()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as errors, os.fdopen(reading) as events:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", str(writing)],
            cwd=_TOOLS,
            stdin=subprocess.PIPE,
            stdout=errors,
            stderr=errors,
            text=True,
            env=environment,
            pass_fds=(writing,),
            # A group of its own, so that what it started ends with it.
            start_new_session=True,
        )
        os.close(writing)
        try:
            assert process.stdin is not None
            # It may die before it reads; its end says why.
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps(request))
            return _listen(process, events, errors, timeout_s, heard)
        finally:
            _end(process)


def _listen(
    process: subprocess.Popen[str],
    events: IO[str],
    errors: IO[str],
    timeout_s: float,
    heard: Callable[[str, str], None],
) -> Any | _Death:
    peer, stage = "", "start"
    pending = b""
    while True:
        if not select.select([events], [], [], timeout_s)[0]:
            return _Death(peer, stage, "timed out", f"no sign of life for {timeout_s:g} s during {stage}")
        piece = os.read(events.fileno(), 1 << 16)
        if not piece:
            return _death(process, errors, peer, stage)
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if "result" in event:
                return event["result"]
            peer, stage = event["peer"], event["stage"]
            heard(peer, stage)


def _death(process: subprocess.Popen[str], errors: IO[str], peer: str, stage: str) -> _Death:
    code = process.wait()
    errors.seek(0)
    said = [line for line in errors.read().splitlines() if line.strip()][-1:]
    if code < 0:
        name = signal.Signals(-code).name
        cause = f"ended by {name}" + (", perhaps for want of memory" if -code == signal.SIGKILL else "")
    else:
        cause = f"ended with status {code}"
    return _Death(peer, stage, "crashed", f"{cause} during {stage}" + (f": {said[0][:300]}" if said else ""))


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process and all it started; one that is done is only waited for."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
