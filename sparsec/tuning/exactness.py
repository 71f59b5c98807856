"""Whether a result may be timed: a bounded sample of rows and keys in fp64, and every row against the default's.

This file decides which rows and keys are looked at, on the real mask and the real lengths, and how far off a result may
be. The arithmetic is the reference back end's. It must not know which kernel made a result.

The sample is compared with dense attention in fp64 by the tolerances of every other check. The rest is compared with
the default configuration's result, which passed the same sample: a row that a configuration forgets, or leaves as it
found it (buffers start as NaN), cannot hide between the sampled ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from sparsec.backends import reference
from sparsec.backends.base import Dtype
from sparsec.masks import from_dense
from sparsec.masks.mask import BoundMask
from sparsec.tuning.space import Task

if TYPE_CHECKING:
    import torch

_KEYS: Final = 6
# Pairs held dense in fp64 at a time.
_MAX_FORWARD_PAIRS: Final = 1 << 22
_MAX_BACKWARD_PAIRS: Final = 1 << 20

_DTYPES: Final[dict[str, Dtype]] = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}

IntArray = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Inputs:
    """Tensors of a task, on its device; `d_out` and `d_lse` where it is a backward pass."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor | None = None
    d_lse: torch.Tensor | None = None


@dataclass(frozen=True)
class Result:
    """What a run gave, by name: `out` and `lse`, or `dq`, `dk` and `dv`; any part may be missing."""

    parts: dict[str, torch.Tensor]


# Rounding is judged by the gate and the tests; here a configuration is judged, which can forget edges or take them
# twice. An edge of n weighs about 1/n of a value, so that this much more than rounding hides none of a row's first
# hundred thousand.
_TIMES: Final = 2.0
_ROUNDINGS: Final = 8.0


def _tolerated(allowed: float, values: npt.NDArray[np.floating]) -> float:
    """A tolerance for results that are sums over `values`, or of their size."""
    largest = float(np.abs(values).max(initial=0.0))
    return _TIMES * allowed + _ROUNDINGS * reference.unit_roundoff("fp32") * largest


@dataclass(frozen=True, slots=True)
class _Known:
    """Right values of one part of a result on one head, and how far from them rounding may lead."""

    name: str
    batch: int
    head: int
    rows: IntArray
    values: reference.FloatArray
    allowed: float


class Oracle:
    """The right answers of a sample of a task's result.

    Args:
        task: What is computed.
        inputs: From what.
        n_rows: Rows that are looked at.
    """

    def __init__(self, task: Task, inputs: Inputs, n_rows: int = 28) -> None:
        is_forward = task.direction == "forward"
        self._known = _forward(task, inputs, n_rows) if is_forward else _backward(task, inputs, n_rows)
        self._trusted: Result | None = None
        self._terms = {} if is_forward else _terms(task)

    def error(self, result: Result) -> str | None:
        """What is wrong with a result, in one sentence, or None.

        The first result that is right on the sample is kept, and later ones are compared with it as a whole.
        """
        for known in self._known:
            if known.name not in result.parts:
                continue
            found = _float64(result.parts[known.name][known.batch, known.head][known.rows])
            same = found == known.values
            off = float(np.where(same, 0.0, np.abs(found - np.where(same, 0.0, known.values))).max(initial=0.0))
            if not off <= known.allowed:
                return (
                    f"{known.name} of head {known.head} is off by {off:.3g} where {known.allowed:.3g} is allowed, "
                    f"on {len(known.rows)} rows against fp64"
                )
        if self._trusted is None:
            self._trusted = result
            return None
        return self._difference(result, self._trusted)

    def _difference(self, result: Result, trusted: Result) -> str | None:
        for name, found in result.parts.items():
            wanted = trusted.parts.get(name)
            if wanted is None:
                continue
            allowed = max((known.allowed for known in self._known if known.name == name), default=0.0)
            # Rows beyond the sample may be larger than those in it: two more rounding units of the largest of all. They
            # may also be longer sums of terms that grow and cancel, added up in fp32 in another order: the error of a
            # sum grows as the square root of the number of its terms.
            # Source: N. J. Higham and T. Mary, A new approach to probabilistic rounding error analysis (2019).
            dtype = _DTYPES[str(found.dtype)]
            finite = wanted.isfinite()
            largest = float(wanted[finite].abs().max()) if bool(finite.any()) else 0.0
            share = 4.0 * reference.unit_roundoff(dtype)
            share += self._terms.get(name, 0) ** 0.5 * reference.unit_roundoff("fp32")
            allowed = 2.0 * allowed + share * largest
            off = (found.float() - wanted.float()).abs()
            off = off.masked_fill(found == wanted, 0.0)
            worst = float(off.max()) if off.numel() else 0.0
            if not worst <= allowed:
                return f"{name} differs from the default's by {worst:.3g} somewhere, where {allowed:.3g} is allowed"
        return None


def _terms(task: Task) -> dict[str, int]:
    """The most terms that a sum of each gradient has."""
    group = task.problem.q_heads // task.problem.kv_heads
    by_key = group * int(task.bound.degrees("kv").max(initial=0))
    return {"dq": int(task.bound.degrees("q").max(initial=0)), "dk": by_key, "dv": by_key}


def _heads(task: Task) -> list[tuple[int, int]]:
    """The batch elements and heads that are looked at: the first and the last."""
    return sorted({(task.batch[0], task.heads[0]), (task.batch[-1], task.heads[-1])})


def _forward(task: Task, inputs: Inputs, n_rows: int) -> list[_Known]:
    bound, problem = task.bound, task.problem
    rows, keys, attended = _dense(bound, sampled_rows(bound, n_rows), _MAX_FORWARD_PAIRS)
    found = []
    for b, h in _heads(task):
        kv = h // (problem.q_heads // problem.kv_heads)
        q, k, v = _float64(inputs.q[b, h][rows]), _float64(inputs.k[b, kv][keys]), _float64(inputs.v[b, kv][keys])
        if not attended.any():
            found.append(_Known("out", b, h, rows, np.zeros((len(rows), problem.v_dim)), 0.0))
            continue
        small = from_dense(attended).bind()
        out, lse = reference.attention(q, k, v, small, task.scale)
        allowed_out, allowed_lse = reference.tolerances(q, k, v, small, task.scale, problem.dtype)
        found += [
            _Known("out", b, h, rows, out, _tolerated(allowed_out, v)),
            _Known("lse", b, h, rows, lse, _TIMES * allowed_lse),
        ]
    return found


def _backward(task: Task, inputs: Inputs, n_rows: int) -> list[_Known]:
    """Gradients of a few keys with every query that attends them, and of those queries."""
    return _gradients_at(task, inputs, _small_problem(task.bound, n_rows))


@dataclass(frozen=True, slots=True)
class _Corner:
    """A part of a mask that is whole for its keys of interest: all their queries, with all keys of those."""

    rows: IntArray
    keys: IntArray
    attended: Bools
    whole: IntArray


def _small_problem(bound: BoundMask, n_rows: int) -> _Corner:
    """As many sampled keys as their queries, and the keys of those, can be held dense."""
    rng = np.random.default_rng(5)
    transposed = bound.T
    degrees = bound.degrees("kv")
    live = np.flatnonzero(degrees)
    wanted = [0, bound.kv_len - 1, *(live[rng.integers(0, len(live), _KEYS)].tolist() if len(live) else [])]
    rows = np.zeros(0, np.int64)
    whole: list[int] = []
    for key in dict.fromkeys(wanted):
        more = np.union1d(rows, _members(transposed, key))
        n_keys = len(_members_of(bound, more[:4096]))
        if len(more) <= 4096 and len(more) * max(n_keys, 1) <= _MAX_BACKWARD_PAIRS:
            rows, whole = more, [*whole, key]
    # Beside them rows alone, whose dq is whole: most keys may be attended by too many.
    keys = _members_of(bound, rows)
    for row in sampled_rows(bound, n_rows):
        more, wider = np.union1d(rows, row), np.union1d(keys, _members(bound, int(row)))
        if not len(rows) or len(more) * len(wider) <= _MAX_BACKWARD_PAIRS:
            rows, keys = more, wider
    keys = np.union1d(keys, np.array(whole, np.int64))
    return _Corner(rows, keys, _attended(bound, rows, keys), np.array(whole, np.int64))


def _gradients_at(task: Task, inputs: Inputs, corner: _Corner) -> list[_Known]:
    assert inputs.d_out is not None, "a backward task has gradients of its output"
    assert inputs.d_lse is not None, "a backward task has gradients of its log-sum-exp"
    problem, (b, first) = task.problem, _heads(task)[0]
    if not corner.attended.any():
        return []
    group = problem.q_heads // problem.kv_heads
    kv = first // group
    small = from_dense(corner.attended).bind()
    k, v = _float64(inputs.k[b, kv][corner.keys]), _float64(inputs.v[b, kv][corner.keys])
    dk, dv = np.zeros_like(k), np.zeros_like(v)
    allowed_k = allowed_v = 0.0
    found = []
    for h in (head for head in task.heads if head // group == kv):
        q = _float64(inputs.q[b, h][corner.rows])
        above = (_float64(inputs.d_out[b, h][corner.rows]), _float64(inputs.d_lse[b, h][corner.rows]))
        dq_part, dk_part, dv_part = reference.gradients(q, k, v, small, task.scale, *above)
        allowed = reference.gradient_tolerances(q, k, v, small, task.scale, *above, problem.dtype)
        found.append(_Known("dq", b, h, corner.rows, dq_part, _tolerated(allowed[0], dq_part)))
        dk, dv = dk + dk_part, dv + dv_part
        allowed_k, allowed_v = allowed_k + allowed[1], allowed_v + allowed[2]
    at = np.searchsorted(corner.keys, corner.whole)
    return [
        *found,
        _Known("dk", b, kv, corner.whole, dk[at], _tolerated(allowed_k, dk)),
        _Known("dv", b, kv, corner.whole, dv[at], _tolerated(allowed_v, dv)),
    ]


def sampled_rows(bound: BoundMask, n_rows: int) -> IntArray:
    """So many rows, sorted, or all where there are fewer: both ends, the fullest, the emptiest, and random ones."""
    degrees = bound.degrees("q")
    marked = [0, bound.q_len - 1, int(degrees.argmax()), int(degrees.argmin())]
    drawn = np.random.default_rng(5).choice(bound.q_len, min(n_rows, bound.q_len), replace=False)
    return np.array(sorted([*dict.fromkeys([*marked, *drawn.tolist()])][:n_rows]), np.int64)


def _dense(bound: BoundMask, rows: IntArray, most_pairs: int) -> tuple[IntArray, IntArray, Bools]:
    """`(rows, keys, attended)`: as many rows as fit, the keys that any of them attends, and who attends which."""
    parts = [_members(bound, int(row)) for row in rows]
    kept, keys = 0, np.zeros(0, np.int64)
    for part in parts:
        more = np.union1d(keys, part)
        if kept and (kept + 1) * len(more) > most_pairs:
            break
        kept, keys = kept + 1, more
    rows = rows[:kept]
    return rows, keys, _attended(bound, rows, keys)


def _attended(bound: BoundMask, rows: IntArray, keys: IntArray) -> Bools:
    attended = np.zeros((len(rows), len(keys)), bool)
    for index, row in enumerate(rows):
        attended[index] = np.isin(keys, _members(bound, int(row)), assume_unique=True)
    return attended


def _members(bound: BoundMask, row: int) -> IntArray:
    found = bound.rows(row, row + 1)
    pieces = [np.arange(*each) for each in zip(found.start, found.stop, found.step, strict=True)]
    members: IntArray = np.concatenate([np.zeros(0, np.int64), *pieces]).astype(np.int64)
    return members


def _members_of(bound: BoundMask, rows: IntArray) -> IntArray:
    """The keys that any of these rows attends, sorted."""
    return np.unique(np.concatenate([np.zeros(0, np.int64), *(_members(bound, int(row)) for row in rows)]))


def make_inputs(task: Task, where: str) -> Inputs:
    """Standard normal tensors of a task, the same in every process."""
    import torch

    problem = task.problem
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[problem.dtype]
    generator = torch.Generator(where).manual_seed(17)

    def normal(heads: int, length: int, dim: int, kind: Any = dtype) -> torch.Tensor:  # Any: a torch dtype
        shape = (problem.batch, heads, length, dim) if dim else (problem.batch, heads, length)
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=where).to(kind)

    q = normal(problem.q_heads, problem.q_len, problem.head_dim)
    k = normal(problem.kv_heads, problem.kv_len, problem.head_dim)
    v = normal(problem.kv_heads, problem.kv_len, problem.v_dim)
    if task.direction == "forward":
        return Inputs(q, k, v)
    d_out = normal(problem.q_heads, problem.q_len, problem.v_dim)
    return Inputs(q, k, v, d_out, normal(problem.q_heads, problem.q_len, 0, torch.float32))


# Any: an index array of numpy, which torch takes as it is.
def _float64(tensor: Any) -> reference.FloatArray:
    array: reference.FloatArray = tensor.detach().double().cpu().numpy()
    return array
