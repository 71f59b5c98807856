"""Whether a result may be used: sampled rows against dense attention in fp64.

This file decides which rows are looked at. The reference and the tolerance are sparsec's own, for every peer alike.
Only the keys that sampled rows attend are touched, so that millions of tokens can be checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsec import masks
from sparsec.backends import reference

if TYPE_CHECKING:
    import torch

    from bench.workload import Workload
    from sparsec.masks import BoundMask

_RANDOM_ROWS = 24
# Dense rows of the sample, beside keys and values of what they attend, are held in fp64.
_MAX_SAMPLE_PAIRS = 2**25

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The largest error on the sampled rows of a result, and the largest that is allowed there."""

    error: float
    allowed: float
    name: str = "out"

    @property
    def is_exact(self) -> bool:
        # A NaN is no error that is allowed.
        return bool(self.error <= self.allowed)


def sampled_rows(bound: BoundMask) -> Rows:
    """The fullest and the emptiest row, both ends, and random ones; sorted."""
    rng = np.random.default_rng(5)
    degrees = bound.degrees("q")
    chosen = [0, bound.q_len - 1, int(degrees.argmax()), int(degrees.argmin())]
    chosen += rng.integers(0, bound.q_len, _RANDOM_ROWS).tolist()
    room = max(4, _MAX_SAMPLE_PAIRS // bound.kv_len)
    return np.unique(np.array(chosen[:room], np.int64))


def dense_rows(bound: BoundMask, rows: Rows) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """`(attended [rows, keys], keys)`: the keys that any of the rows attends, and who attends which."""
    parts = []
    for row in rows.tolist():
        ranges = bound.rows(row, row + 1)
        pieces = [np.arange(*each) for each in zip(ranges.start, ranges.stop, ranges.step, strict=True)]
        parts.append(np.concatenate([np.zeros(0, np.int64), *pieces]).astype(np.int64))
    keys = np.unique(np.concatenate(parts))
    attended = np.zeros((len(rows), len(keys)), bool)
    for index, part in enumerate(parts):
        attended[index, np.searchsorted(keys, part)] = True
    return attended, keys


def check(work: Workload, out: torch.Tensor, bound: BoundMask) -> Verdict:
    """How far a result is from exact attention under `bound`.

    Args:
        work: The inputs.
        out: `[batch, heads, q_len, head_dim]`.
        bound: What the peer was to compute: the mask of the work, but for those told to compute another.
    """
    problem = work.problem
    group = problem.q_heads // problem.kv_heads
    verdicts = []
    for b in sorted({0, problem.batch - 1}):
        for h in sorted({0, problem.q_heads - 1}):
            own = bound.select(b, h) if bound.varies_by_head or bound.varies_by_batch else bound
            rows = sampled_rows(own)
            attended, keys = dense_rows(own, rows)
            q, k, v = (
                float64(tensor[b, head][index])
                for tensor, head, index in ((work.q, h, rows), (work.k, h // group, keys), (work.v, h // group, keys))
            )
            small = _Small(q, k, v, attended, modifier(work, b, h, rows, keys))
            verdicts.append(_compared(small, float64(out[b, h][rows]), work))
    return worse(verdicts)


def worse(verdicts: Iterable[Verdict]) -> Verdict:
    """The one of several that is furthest beyond what it allows, or closest to it."""
    return max(verdicts, key=_excess, default=Verdict(0.0, math.inf))


def _excess(verdict: Verdict) -> float:
    """How much of what is allowed was used up; the worst of all is what is no number."""
    if math.isnan(verdict.error):
        return math.inf
    return verdict.error / verdict.allowed if verdict.allowed else (math.inf if verdict.error else 0.0)


def modifier(work: Workload, b: int, h: int, rows: Rows, keys: Rows) -> reference.Modifier | None:
    """The work's score modifier for some queries and keys of one head."""
    return None if work.score is None else reference.Modifier(work.score, b, h, rows, keys)


@dataclass(frozen=True, slots=True)
class _Small:
    """Sampled queries of one head with the keys that any of them attends."""

    q: reference.FloatArray
    k: reference.FloatArray
    v: reference.FloatArray
    attended: npt.NDArray[np.bool_]
    modifier: reference.Modifier | None


def _compared(small: _Small, out: reference.FloatArray, work: Workload) -> Verdict:
    if not small.attended.any():
        return Verdict(float(np.abs(out).max()), 0.0)
    given = (small.q, small.k, small.v, masks.from_dense(small.attended).bind(), work.scale)
    exact, _ = reference.attention(*given, modifier=small.modifier)
    allowed, _ = reference.tolerances(*given, work.problem.dtype, small.modifier)
    return Verdict(float(np.abs(out - exact).max()), allowed)


# Any: an index array of numpy, which torch takes as it is.
def float64(tensor: Any) -> reference.FloatArray:
    array: reference.FloatArray = tensor.detach().double().cpu().numpy()
    return array
