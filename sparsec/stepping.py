"""Attention of the newest tokens over a cache of keys that grows: what generation does, one token or a few at a time.

This file decides which rows of a mask a step is, and how the index arrays of a step are made in microseconds: rows are
read from the mask some hundreds at a time, and the kernel was chosen and compiled for the signature once. It must not
know how that was done, nor any kernel.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sparsec import buffers
from sparsec.backends.base import Kernel, Launch, Problem, Work
from sparsec.errors import MaskError
from sparsec.layout import RowLists, even_schedule
from sparsec.masks import ranges
from sparsec.masks.mask import BoundMask
from sparsec.masks.ranges import RowRanges
from sparsec.planner import Plan
from sparsec.specialisation import Specialisation, rebinding, rows_contiguous

if TYPE_CHECKING:
    import torch

# Queries of a step at most that nothing is planned for; more are planned like any call.
MAX_STEP = 16
# Rows read from the mask at a time.
_ROWS_AHEAD = 256
# Keys that are worth another thread's while.
_MIN_PIECE = 512
_PROMPTS_KEPT = 8


class Planner(Protocol):
    """Plans a mask for a problem on a device (by its torch name)."""

    def __call__(self, bound: BoundMask, problem: Problem, device_name: str, *, in_rows: bool = False) -> Plan:
        """`in_rows`: for `row_traversal`, in the tokens' own order."""
        ...


class Stepper:
    """The steps of one mask, whatever their signature: the last `q_len` of `kv_len` tokens attend.

    Args:
        square: The mask of as many queries as keys as the cache will hold.
        planned: How a mask is planned.
    """

    def __init__(self, square: BoundMask, planned: Planner) -> None:
        self._square = square
        self._planned = planned
        self._few: dict[tuple[Problem, str], list[_Part]] = {}
        self._many: OrderedDict[tuple[Problem, str], Specialisation] = OrderedDict()

    def check(self, q_len: int, kv_len: int) -> None:
        """Raises where these are no step of the mask.

        Raises:
            MaskError: Says why.
        """
        if self._square.q_len != self._square.kv_len:
            raise MaskError(
                f"step counts positions from 0 to seq_len, and the mask is bound to {self._square.q_len} queries and "
                f"{self._square.kv_len} keys: compile it for one seq_len, the most tokens the cache will hold"
            )
        if not q_len <= kv_len <= self._square.kv_len:
            raise MaskError(
                f"step was given {q_len} queries over {kv_len} keys, under a mask of {self._square.kv_len} tokens: q "
                "holds the newest of the tokens in k and v, and those are at most the mask's; compile for more where "
                "the cache grows further"
            )

    def __call__(
        self,
        problem: Problem,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tables: Sequence[torch.Tensor] = (),
        *,
        with_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output and log-sum-exp of tensors `[batch, heads, length, dim]` whose `problem` this is."""
        import torch

        from sparsec import torch_ops

        device, n = str(q.device), problem.kv_len
        if problem.q_len > MAX_STEP:
            return self._for_many(problem, device).forward(q, k, v, tables, with_lse=with_lse)
        out = torch_ops.new_output(q, v.shape[3], partial(buffers.empty, dtype=q.dtype, device=q.device))
        lse = buffers.empty(q.shape[:3], torch.float32, q.device) if with_lse else None
        q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
        also = (tables,) if tables else ()
        for part in self._for_few(problem, device):
            part.kernel(part.launch(n - problem.q_len, n, q.shape[0]))(q, k, v, out, lse, *also)
        return out, lse

    def _for_few(self, problem: Problem, device: str) -> list[_Part]:
        """Launches that any step of so many queries takes over, planned for the last one of all."""
        square = self._square
        key = replace(problem, kv_len=square.kv_len), device
        if key not in self._few:
            last = square[square.q_len - problem.q_len :, :]
            made = self._planned(last, key[0], device, in_rows=True)
            self._few[key] = [
                _Part(launch, kernel, _member(square, launch.batch[0], launch.heads[0]))
                for launch, kernel in Specialisation(made).kernels()
            ]
        return self._few[key]

    def _for_many(self, problem: Problem, device: str) -> Specialisation:
        """A prompt's plan; the latest few are kept."""
        key = problem, device
        found = self._many.get(key)
        if found is None:
            first, n = problem.kv_len - problem.q_len, problem.kv_len
            made = self._planned(self._square[first:n, :n], problem, device)
            found = self._many[key] = Specialisation(_moved(made, first))
            # Another thread's prompts may push this one out before it has run.
            while len(self._many) > _PROMPTS_KEPT:
                self._many.popitem(last=False)
        return found


class _Part:
    """The steps of heads and batch elements that share one mask."""

    def __init__(self, launch: Launch, kernel: Kernel, square: BoundMask) -> None:
        self._launch, self.kernel = launch, rebinding(launch, kernel)
        self._square = square
        self._read: tuple[int, RowRanges] = 0, ranges.empty(0)

    def launch(self, first: int, n: int, batch: int) -> Launch:
        """The launch of queries `first … n - 1` over the keys before `n`."""
        launch = self._launch
        rows = _before(self._rows(first, n), n)
        lists = RowLists.of_ranges((n - first, n), rows)
        schedule = launch.work.schedule
        copies = batch * schedule.copies // launch.problem.batch
        pieces = min(-(-4 * launch.device.units // copies), max(1, rows.nnz // _MIN_PIECE))
        work = Work(
            self._square[first:n, :n],
            launch.work.ordering,
            launch.work.block_q,
            even_schedule(rows.nnz, pieces, copies=copies),
            rows=lists,
        )
        return replace(launch, work=work, first_query=first)

    def _rows(self, first: int, n: int) -> RowRanges:
        begin, read = self._read
        if not begin <= first <= n <= begin + read.n_rows:
            begin, read = first, self._square.rows(first, min(first + _ROWS_AHEAD, self._square.q_len))
            self._read = begin, read
        return ranges.take_rows(read, first - begin, n - begin)


def _member(square: BoundMask, batch: int, head: int) -> BoundMask:
    return square.select(batch, head) if square.varies_by_head or square.varies_by_batch else square


def _moved(made: Plan, first: int) -> Plan:
    """The plan of queries that are called `first` and up in a score modifier."""
    groups = []
    for group in made.groups:
        steps = tuple(replace(step, launch=replace(step.launch, first_query=first)) for step in group.steps)
        groups.append(replace(group, steps=steps))
    return replace(made, groups=tuple(groups))


def _before(rows: RowRanges, n: int) -> RowRanges:
    """The keys below `n`."""
    if not len(rows.stop) or int(rows.stop.max()) <= n:
        return rows
    kept = np.flatnonzero(rows.start < n)
    indptr = np.searchsorted(kept, rows.indptr)
    start, step = rows.start[kept], rows.step[kept]
    stop = start + (np.minimum(rows.stop[kept], n) - 1 - start) // step * step + 1
    return RowRanges(indptr, start, stop, step)
