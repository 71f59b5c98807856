"""Times on a GPU: the cases of the benchmark suite's grids for GPUs, each measured as the suite measures it.

This file decides which grids are run in minutes and in which order, and what of ours is compiled beforehand. How a call
is timed, who else is asked and what is checked is the suite's. It must not know what is recorded of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from bench.grid import ON_GPU, Case, Grid, find_grid, load_grid
from bench.measure import measure_case
from bench.names import family
from bench.peers import peer
from bench.results import PeerRow
from bench.workload import make_workload

from sparsec.device import Device

Result = dict[str, Any]  # one JSON object of a record
# Of the task that is at it: the peer and what it does.
Announce = Callable[[str, str], None]

# Most telling first.
GRIDS = ("gpu_figures", "gpu_masks", "gpu_longer_attention_span")


def silent(peer: str, stage: str) -> None:
    """Tells nobody."""


def cases() -> Iterator[tuple[str, Grid, Case]]:
    """`(key, grid, case)`."""
    for name in GRIDS:
        grid = load_grid(find_grid(name))
        for case in grid.cases:
            if case.measure in ON_GPU:
                yield f"bench/{name}/{case.id}", grid, case


def benchmarks(device: Device) -> Iterator[tuple[str, Callable[..., Result]]]:
    """`(key, measure)`; `measure(announce, lost)` is told whom earlier tries have lost."""
    for key, grid, case in cases():
        yield key, partial(measured, grid, case)


def measured(
    grid: Grid, case: Case, announce: Announce = silent, lost: dict[str, str] | None = None, device: str = "cuda"
) -> Result:
    """The suite's row of a case; failed where ours is wrong or has failed, whatever became of the others."""
    gone = [PeerRow(name, "crashed", why) for name, why in (lost or {}).items()]
    row = measure_case(case, grid.effort, len(os.sched_getaffinity(0)), announce, gone, device=device)
    # A template may refuse the work; somebody must do it.
    may_refuse = {"ours": ("ok",)}
    ours = [
        each
        for each in row.peers
        if family(each.peer) == "ours" and each.status not in may_refuse.get(each.peer, ("ok", "skipped"))
    ]
    result: Result = {"row": row.to_dict()}
    if ours:
        said = "; ".join(f"{each.peer} {each.status}: {each.reason}" for each in ours)
        return result | {"status": "failed", "error": said[:2000]}
    return result


def compilations(device: Device) -> Iterator[tuple[str, Callable[[], None]]]:
    """By the same keys, what compiles our kernels of a case where launches only compile."""
    for key, _, case in cases():
        if case.measure == "attention":
            yield key, partial(compiled, case)


def compiled(case: Case, device: str = "cuda") -> None:
    work = make_workload(case, device)
    for name in case.peers:
        if family(name) == "ours":
            _call(name, work)


def _call(name: str, work: Any) -> None:
    import torch

    out = peer(name).prepare(work).call()
    if work.d_out is not None:
        torch.autograd.grad(out, (work.q, work.k, work.v), work.d_out)
