"""Whether gradients may be used: those of sampled queries and keys against dense attention in fp64.

This file decides which are looked at, and what a plain computation of the same dtype may lose there. The gradient of
a query needs the keys that it attends; that of a key needs all queries that attend it, each with all of its own keys.
Nothing beyond those is touched, so that a heavy key of a large graph can be checked too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bench.exactness import Rows, Verdict, dense_rows, float64, modifier, sampled_rows, worse
from sparsec import masks
from sparsec.backends import reference

if TYPE_CHECKING:
    import torch

    from bench.workload import Workload
    from sparsec.masks import BoundMask

NAMES = ("dq", "dk", "dv")
# Queries whose dense rows are held at a time.
_QUERIES = 256
# Pairs of queries and attended keys that are worked out for the sampled keys, beyond those of the first key.
_MAX_PAIRS = 2**27


@dataclass(frozen=True, slots=True)
class _Sample:
    """What some tokens of one head of a gradient must be.

    Attributes:
        name: Of the gradient.
        batch: The batch element.
        head: The head: of the queries for dq, else of the keys.
        tokens: Which rows.
        exact: Those rows in fp64.
        allowed: The largest error a correct result may have there.
    """

    name: str
    batch: int
    head: int
    tokens: Rows
    exact: reference.FloatArray
    allowed: float


class GradientCheck:
    """The expected gradients of one work, worked out once for each mask that some peer computes."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        self._samples: dict[str, tuple[_Sample, ...]] = {}

    def __call__(self, found: tuple[torch.Tensor, ...], bound: BoundMask) -> Verdict:
        """How far gradients are from exact ones under `bound`.

        Args:
            found: dq, dk, dv, each `[batch, heads, tokens, head_dim]`. Where there are more heads of dk and dv than
                key heads, those of a group are added up.
            bound: The mask of the attention they are gradients of.
        """
        if bound.digest not in self._samples:
            self._samples[bound.digest] = tuple(_expected(self._work, bound))
        group = self._work.problem.q_heads // self._work.problem.kv_heads
        verdicts = []
        for sample in self._samples[bound.digest]:
            tensor = found[NAMES.index(sample.name)]
            is_expanded = sample.name != "dq" and tensor.shape[1] != self._work.problem.kv_heads
            heads = slice(sample.head * group, (sample.head + 1) * group) if is_expanded else [sample.head]
            got = float64(tensor[sample.batch, heads][:, sample.tokens]).sum(axis=0)
            verdicts.append(Verdict(float(np.abs(got - sample.exact).max()), sample.allowed, sample.name))
        return worse(verdicts)


def _expected(work: Workload, bound: BoundMask) -> Iterator[_Sample]:
    problem = work.problem
    group = problem.q_heads // problem.kv_heads
    for b in sorted({0, problem.batch - 1}):
        for kv_head in sorted({0, problem.kv_heads - 1}):
            heads = range(kv_head * group, (kv_head + 1) * group)
            bounds = [bound.select(b, h) if bound.varies_by_head or bound.varies_by_batch else bound for h in heads]
            yield _of_queries(work, bounds[0], b, heads[0])
            keys = sampled_keys(bounds[0])
            sums = [_Sums.of(work, each, b, h, keys) for h, each in zip(heads, bounds, strict=True)]
            dtype = problem.dtype
            for name in ("dk", "dv"):
                exact = sum(getattr(each, name) for each in sums)
                plain = sum(getattr(each, f"plain_{name}") for each in sums)
                yield _Sample(name, b, kv_head, keys, exact, reference.allowed_error(plain, exact, dtype))


def sampled_keys(bound: BoundMask) -> Rows:
    """The key that most queries attend, the one that fewest do, both ends, and random ones, while there is room."""
    degrees = bound.degrees("q")
    chosen: list[int] = []
    queries = np.zeros(0, np.int64)
    drawn = sampled_rows(bound.T)
    fullest = int(bound.degrees("kv").argmax())
    for key in [fullest, *(key for key in drawn.tolist() if key != fullest)]:
        together = np.union1d(queries, _queries_of(bound, key))
        if chosen and degrees[together].sum() > max(_MAX_PAIRS, degrees[queries].sum()):
            continue
        chosen.append(key)
        queries = together
    return np.array(sorted(chosen), np.int64)


def _queries_of(bound: BoundMask, key: int) -> Rows:
    """Who attends a key."""
    ranges = bound.T.rows(key, key + 1)
    parts = [np.arange(*each) for each in zip(ranges.start, ranges.stop, ranges.step, strict=True)]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def _of_queries(work: Workload, bound: BoundMask, b: int, h: int) -> _Sample:
    """dq of sampled queries."""
    rows = sampled_rows(bound)
    piece = _Piece.of(work, bound, b, h, rows)
    if piece is None:
        return _Sample("dq", b, h, rows, np.zeros((len(rows), work.problem.head_dim)), 0.0)
    return _Sample("dq", b, h, rows, piece.exact()[0], piece.tolerances()[0])


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some queries of one head with all that they attend: a small problem of its own.

    Attributes:
        keys: What its columns are called in the whole.
        arguments: Of `reference.gradients`: q, k, v, mask, scale, and the gradients of out and log-sum-exp.
        dtype: Of the work.
        modifier: Of the scores.
    """

    keys: npt.NDArray[np.int64]
    # Any: as `reference` takes them, in its order.
    arguments: tuple[Any, ...]
    dtype: Any
    modifier: reference.Modifier | None

    @classmethod
    def of(cls, work: Workload, bound: BoundMask, b: int, h: int, rows: Rows) -> _Piece | None:
        """None where the queries attend nothing."""
        attended, keys = dense_rows(bound, rows)
        if not attended.any():
            return None
        kv = h // (work.problem.q_heads // work.problem.kv_heads)
        q, d_out = (float64(tensor[b, h][rows]) for tensor in (work.q, work.d_out))
        k, v = (float64(tensor[b, kv][keys]) for tensor in (work.k, work.v))
        small = masks.from_dense(attended).bind()
        arguments = (q, k, v, small, work.scale, d_out, np.zeros(len(rows)))
        return cls(keys, arguments, work.problem.dtype, modifier(work, b, h, rows, keys))

    def exact(self) -> tuple[reference.FloatArray, ...]:
        return reference.gradients(*self.arguments, self.modifier)

    def tolerances(self) -> tuple[float, float, float]:
        dq, dk, dv = reference.gradient_tolerances(*self.arguments, self.dtype, self.modifier)[:3]
        return dq, dk, dv

    def plain(self) -> tuple[reference.Floats, reference.Floats]:
        return reference.plain_weights(*self.arguments, self.dtype, self.modifier)


@dataclass(frozen=True, slots=True)
class _Sums:
    """dk and dv of sampled keys `[keys, head_dim]`: exact, and as a loop over the queries in fp32 adds them up."""

    dk: reference.FloatArray
    dv: reference.FloatArray
    plain_dk: reference.Floats
    plain_dv: reference.Floats

    @classmethod
    def of(cls, work: Workload, bound: BoundMask, b: int, h: int, keys: Rows) -> _Sums:
        queries = np.unique(np.concatenate([_queries_of(bound, key) for key in keys.tolist()]))
        shape = (len(keys), work.problem.head_dim)
        dk, dv = np.zeros(shape), np.zeros(shape)
        # Of every query, at the sampled keys.
        weights, d_scores = (np.zeros((len(queries), len(keys)), np.float32) for _ in range(2))
        for first in range(0, len(queries), _QUERIES):
            rows = slice(first, first + _QUERIES)
            piece = _Piece.of(work, bound, b, h, queries[rows])
            # Each of them attends a sampled key.
            assert piece is not None
            there = np.flatnonzero(np.isin(keys, piece.keys))
            columns = np.searchsorted(piece.keys, keys[there])
            _, piece_dk, piece_dv = piece.exact()
            dk[there] += piece_dk[columns]
            dv[there] += piece_dv[columns]
            piece_weights, piece_d_scores = piece.plain()
            weights[rows, there] = piece_weights[:, columns]
            d_scores[rows, there] = piece_d_scores[:, columns]
        q, d_out = (float64(tensor[b, h][queries]).astype(np.float32) for tensor in (work.q, work.d_out))
        plain_dk = reference.summed_in_order(d_scores.T, q) * np.float32(work.scale)
        return cls(dk, dv, plain_dk, reference.summed_in_order(weights.T, d_out))
