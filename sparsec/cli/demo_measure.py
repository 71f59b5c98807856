"""How `sparsec demo` times what it runs, and how it checks every answer.

This file decides the order of runs, how many there are, and which rows are compared with the fp64 reference. It must
not know what is run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from sparsec.backends import reference
from sparsec.backends.base import Dtype
from sparsec.masks import BoundMask, from_dense
from sparsec.tuning.exactness import sampled_rows

if TYPE_CHECKING:
    import torch

    from sparsec.cli.demo_cases import Tensors

# Rows of each head that are compared, where not all are.
_SAMPLED_ROWS: Final = 64
# What runs longer than this is timed in the run that is checked, too: warming up makes no difference to it.
_SLOW_S: Final = 1.0
_VERY_SLOW_S: Final = 3.0
# What is quicker than this is run so often in each round.
_QUICK_S: Final = 0.1
_QUICK_RUNS: Final = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of every run, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest less fastest run, over the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


@dataclass(frozen=True, slots=True)
class Error:
    """How far an answer is from the fp64 reference.

    Attributes:
        largest: The largest difference found.
        allowed: What rounding in this dtype explains.
        rows: Rows compared, over all heads.
    """

    largest: float
    allowed: float
    rows: int

    @property
    def is_exact(self) -> bool:
        return self.largest <= self.allowed


class Oracle:
    """The right answers of some rows of every head, and how far from them rounding may lead.

    All rows of the first `whole_heads` heads are known, and a sample of those of the others.
    """

    def __init__(self, given: Tensors, bound: BoundMask, dtype: Dtype, whole_heads: int) -> None:
        self._given, self._bound, self._dtype, self._whole_heads = given, bound, dtype, whole_heads
        self._known: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]] = []
        self._allowed = 0.0

    def prepare(self, advance: Callable[[], None]) -> None:
        """Computes the answers; calls `advance` after each head."""
        is_varied = self._bound.varies_by_head or self._bound.varies_by_batch
        sampled = _sampled(self._bound.select(0, 0) if is_varied else self._bound)
        whole = np.arange(self._bound.q_len), sampled[1]
        if self._whole_heads:
            whole = whole[0], from_dense(self._bound.to_dense()).bind(*self._bound.shape)
        for head in range(self._given.q.shape[1]):
            if is_varied:
                sampled = _sampled(self._bound.select(0, head))
            rows, bound = whole if head < self._whole_heads else sampled
            group = self._given.q.shape[1] // self._given.k.shape[1]
            q, k, v = (
                tensor[0, each].detach().cpu().double().numpy()
                for tensor, each in zip(self._given, (head, head // group, head // group), strict=True)
            )
            scale = q.shape[1] ** -0.5
            self._known.append((rows, reference.attention(q[rows], k, v, bound, scale)[0]))
            # What is allowed holds for the whole answer, of which every head is a part.
            allowed, _ = reference.tolerances(q[rows], k, v, bound, scale, self._dtype)
            self._allowed = max(self._allowed, allowed)
            advance()

    def compare(self, out: torch.Tensor) -> Error:
        """The error of an output `[1, heads, q_len, v_dim]`."""
        largest = 0.0
        for head, (rows, answer) in enumerate(self._known):
            # A result that is no number is infinitely wrong.
            found = out[0, head].detach().cpu().double().numpy()[rows]
            differences = np.nan_to_num(np.abs(found - answer), nan=np.inf)
            largest = max(largest, float(differences.max(initial=0.0)))
        return Error(largest, self._allowed, sum(len(rows) for rows, _ in self._known))


def _sampled(bound: BoundMask) -> tuple[npt.NDArray[np.int64], BoundMask]:
    """Some rows, and a mask of these alone: explicit edges give up their rows faster than an expression does."""
    rows = sampled_rows(bound, _SAMPLED_ROWS)
    return rows, _only(bound, rows)


def _only(bound: BoundMask, rows: npt.NDArray[np.int64]) -> BoundMask:
    """A mask of these queries alone."""
    dense = np.zeros((len(rows), bound.kv_len), bool)
    for i, row in enumerate(rows.tolist()):
        keys = bound.rows(row, row + 1)
        for start, stop, step in zip(keys.start, keys.stop, keys.step, strict=True):
            dense[i, start:stop:step] = True
    return from_dense(dense).bind(*dense.shape)


# Any: a run returns its output, which only the caller looks at.
def first_run(run: Callable[[], Any]) -> tuple[Any, float]:
    """The output of a run, and its seconds."""
    started = time.perf_counter()
    out = run()
    return out, time.perf_counter() - started


def timings(
    runs: Mapping[str, Callable[[], Any]], first: Mapping[str, float], rounds: int, advance: Callable[[], None]
) -> dict[str, Timing]:
    """Runs everything in turn, round after round, so that a slow moment of the machine meets all alike.

    Args:
        runs: What to run, by name.
        first: Seconds of each one's first run.
        rounds: How often each has its turn; what is slow has fewer, and its first run counts.
        advance: Called after each turn.
    """
    seconds = {name: [first[name]] if first[name] > _SLOW_S else [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            if number < _turns(first[name], rounds):
                for _ in range(_QUICK_RUNS if first[name] < _QUICK_S else 1):
                    seconds[name].append(first_run(run)[1])
            advance()
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def _turns(seconds: float, rounds: int) -> int:
    if seconds > _VERY_SLOW_S:
        return 1
    return max(1, rounds - 1) if seconds > _SLOW_S else rounds
