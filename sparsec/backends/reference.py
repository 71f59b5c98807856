"""The reference back end: dense masked attention in NumPy and fp64, the oracle of every check.

This file decides what is correct. It shares no code with the templates, knows nothing of layouts, and is slow on
purpose: it walks the rows of a mask and computes each by the textbook.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sparsec.backends.base import Dtype, Launch, Problem
from sparsec.device import Device
from sparsec.expr.tree import Apply
from sparsec.masks.mask import BoundMask
from sparsec.score import Places, ScoreMod
from sparsec.template import Config, Template

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]

# Queries whose dense rows are held at a time.
_ROWS = 256
# Of the dimensions, in which a plain computation is done to see what it may lose.
_ORDERS_OF_SUMMATION = 4
# Operations that are a series or an approximation on a processor, and how many units in the last place they may be off:
# tanh is 5 at most on a CPU, and half a unit on average.
_FUNCTIONS = frozenset({"exp", "exp2", "log", "log2", "tanh", "rsqrt", "sigmoid", "sin", "cos", "pow"})
_FUNCTION_UNITS = 5.0


@dataclass(frozen=True, slots=True)
class Modifier:
    """A score modifier for one head of one batch element.

    Attributes:
        score: The modifier.
        batch: The batch element.
        head: The query head.
        q_tokens: Which query stands at each row; row i by default.
        kv_tokens: Which key stands at each column; likewise.
        numbered: The mask whose edges are numbered, in the tokens' own order, where the modifier counts them.
    """

    score: ScoreMod
    batch: int
    head: int
    q_tokens: Integers | None = None
    kv_tokens: Integers | None = None
    numbered: BoundMask | None = None

    @property
    def has_functions(self) -> bool:
        """Whether it has elementary functions, such as tanh."""
        return any(isinstance(node, Apply) and node.op in _FUNCTIONS for node in self.score.expr.walk())

    def value(self, scaled: Floats, rows: Integers) -> Floats:
        return self.score.value(scaled, self._places(scaled, rows))

    def slope(self, scaled: Floats, rows: Integers) -> Floats:
        return self.score.slopes(scaled, self._places(scaled, rows))

    def add_gradients(
        self, d_value: Floats, scaled: Floats, rows: Integers, into: Sequence[Floats], *, sizes: bool = False
    ) -> None:
        """Adds what these rows contribute to the gradients of the modifier's live tables."""
        self.score.add_gradients(d_value, scaled, self._places(scaled, rows), into, sizes=sizes)

    def zeros(self, dtype: type[np.floating] = np.float64) -> list[Floats]:
        """An array for the gradient of each live table."""
        return [np.zeros(table.shape, dtype) for table in self.score.live_tables]

    def _places(self, scaled: Floats, rows: Integers) -> Places:
        queries = rows if self.q_tokens is None else self.q_tokens[rows]
        keys = np.arange(scaled.shape[1]) if self.kv_tokens is None else self.kv_tokens
        edge = None if self.numbered is None else _edge_numbers(self.numbered, queries)[:, keys]
        return Places(self.batch, self.head, queries[:, None], keys[None], edge)


def _edge_numbers(mask: BoundMask, queries: Integers) -> Integers:
    """`[queries, kv_len]`: how many edges come before each pair."""
    dense = np.concatenate([_dense_rows(mask, queries[i : i + 1]) for i in range(len(queries))])
    before = np.concatenate(([0], np.cumsum(mask.degrees("q"))))[queries]
    numbers: Integers = before[:, None] + np.cumsum(dense, axis=1) - dense
    return numbers


def modifier_of(launch: Launch, batch: int, head: int, tables: Sequence[torch.Tensor] = ()) -> Modifier | None:
    """The launch's score modifier at one head, for rows and columns in its order of tokens."""
    if launch.score is None:
        return None
    order, numbers = launch.work.ordering, launch.work.numbers
    numbered = None if numbers is None else numbers.mask
    queries = launch.first_query + _tokens(order.q_order, launch.work.bound.q_len)
    return Modifier(launch.score.given(tables), batch, head, queries, order.kv_order, numbered)


def attention(
    q: npt.NDArray[np.floating],
    k: npt.NDArray[np.floating],
    v: npt.NDArray[np.floating],
    bound: BoundMask,
    scale: float,
    rows: npt.NDArray[np.integer] | None = None,
    modifier: Modifier | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Output and log-sum-exp of one head, in fp64.

    Args:
        q: `[q_len, head_dim]`.
        k: `[kv_len, head_dim]`.
        v: `[kv_len, v_dim]`.
        bound: The mask.
        scale: Of the scores.
        rows: The queries to compute; all by default.
        modifier: What happens to scores before softmax.

    Returns:
        `out [rows, v_dim]` and `lse [rows]`; an empty row gives 0 and -inf.
    """
    rows = np.arange(bound.q_len) if rows is None else rows
    out = np.zeros((len(rows), v.shape[1]))
    lse = np.full(len(rows), -np.inf)
    k, v = k.astype(np.float64), v.astype(np.float64)
    for first in range(0, len(rows), _ROWS):
        chosen = rows[first : first + _ROWS]
        attended = _dense_rows(bound, chosen)
        scaled = q[chosen].astype(np.float64) @ k.T * scale
        scores = np.where(attended, scaled if modifier is None else modifier.value(scaled, chosen), -np.inf)
        peak = scores.max(axis=1, initial=-np.inf)
        finite_peak = np.where(np.isneginf(peak), 0.0, peak)
        weights = np.exp(scores - finite_peak[:, None])
        total = weights.sum(axis=1)
        # A row without keys, or of which a modifier forbids all, has none.
        attends = total != 0
        # A key nobody attends must not spoil a row even if it is not a number: 0 · NaN is taken as 0.
        live = attended.any(axis=0)
        out[first : first + _ROWS][attends] = (weights[attends][:, live] @ v[live]) / total[attends, None]
        with np.errstate(divide="ignore"):
            lse[first : first + _ROWS] = np.where(attends, np.log(total) + finite_peak, -np.inf)
    return out, lse


def _dense_rows(bound: BoundMask, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    dense = np.zeros((len(rows), bound.kv_len), bool)
    # Stretches of consecutive rows are asked for together: a composition has a price for each question.
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
        if first == last:
            continue
        ranges = bound.rows(int(rows[first]), int(rows[last - 1]) + 1)
        owner = np.repeat(np.arange(first, last), np.diff(ranges.indptr))
        for i, start, stop, step in zip(owner, ranges.start, ranges.stop, ranges.step, strict=True):
            dense[i, start:stop:step] = True
    return dense


def gradients(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    bound: BoundMask,
    scale: float,
    d_out: FloatArray,
    d_lse: FloatArray,
    modifier: Modifier | None = None,
    d_tables: Sequence[Floats] = (),
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Gradients of one head's q, k and v, in fp64, given those of its output and log-sum-exp.

    Where `d_tables` has an array for each live table of the modifier, their gradients are added to it.

    Source: the chain rule through softmax; an empty row has none.
    """
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    q, k, v, d_out = (array.astype(np.float64) for array in (q, k, v, d_out))
    for first in range(0, bound.q_len, _ROWS):
        rows = np.arange(first, min(first + _ROWS, bound.q_len))
        attended = _dense_rows(bound, rows)
        attends = attended.any(axis=1)
        rows, attended = rows[attends], attended[attends]
        if not len(rows):
            continue
        scaled = q[rows] @ k.T * scale
        scores = np.where(attended, scaled if modifier is None else modifier.value(scaled, rows), -np.inf)
        peak = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - np.where(np.isneginf(peak), 0.0, peak))
        total = weights.sum(axis=1, keepdims=True)
        # A modifier may forbid all that the mask allows: a row without weights, like one without keys.
        weights /= np.where(total == 0, 1.0, total)
        d_weights = d_out[rows] @ v.T
        mean = (weights * d_weights).sum(axis=1, keepdims=True)
        d_scores = weights * (d_weights - mean + d_lse[rows, None])
        if modifier is not None:
            if d_tables:
                modifier.add_gradients(np.where(attended, d_scores, 0.0), scaled, rows, d_tables)
            d_scores = chained(np.where(attended, d_scores, 0.0), modifier.slope(scaled, rows))
        dq[rows] = d_scores @ k * scale
        dk += d_scores.T @ q[rows] * scale
        dv += weights.T @ d_out[rows]
    return dq, dk, dv


def rounded(array: npt.NDArray[np.floating], dtype: Dtype) -> FloatArray:
    """The nearest values a dtype can hold (ties to even), as fp64."""
    if dtype == "fp32":
        return array.astype(np.float32).astype(np.float64)
    if dtype == "fp16":
        return array.astype(np.float16).astype(np.float64)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(array), bits.view(np.float32), array).astype(np.float64)


def unit_roundoff(dtype: Dtype) -> float:
    """Half the distance between 1 and the next number of a dtype."""
    return {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}[dtype]


def tolerances(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    bound: BoundMask,
    scale: float,
    dtype: Dtype,
    modifier: Modifier | None = None,
) -> tuple[float, float]:
    """The largest errors of output and log-sum-exp that a correct kernel of a dtype may show on one head.

    Twice the sum of what a plain attention in that dtype loses against fp64 (scores and sums in fp32, one term after
    the other; weights and output rounded to the dtype) and one rounding unit of the largest result. The log-sum-exp is
    fp32 whatever the dtype: its errors are those of fp32 dot products. Where a score modifier has elementary functions,
    which NumPy rounds nearly correctly and kernels do not, it is done with several such functions, and what the worst
    loses counts.

    Source: the same-dtype reference of FlashAttention's tests, with the rounding emulated where NumPy lacks the type.
    """
    exact, exact_lse = attention(q, k, v, bound, scale, modifier=modifier)
    attended = bound.to_dense()
    q32, k32, v32 = (array.astype(np.float32) for array in (q, k, v))
    scaled = summed_in_order(q32, k32.T) * np.float32(scale)
    modified = scaled if modifier is None else modifier.value(scaled, np.arange(bound.q_len))
    largest = float(np.abs(exact).max(initial=0.0))
    attends = ~np.isneginf(exact_lse)
    plain_error = lse_error = 0.0
    for each in _as_functions_are(modified, modifier):
        scores = np.where(attended, each, np.float32(-np.inf))
        peak = scores.max(axis=1, initial=-np.inf, keepdims=True)
        base = np.where(np.isneginf(peak), np.float32(0.0), peak)
        weights = np.exp(scores - base)
        total = summed_in_order(weights, np.ones((len(k), 1), np.float32))
        sums = summed_in_order(rounded(weights, dtype).astype(np.float32), v32)
        plain = sums / np.where(total > 0, total, np.float32(1.0))
        plain_error = max(plain_error, np.abs(rounded(plain, dtype) - exact)[attends].max(initial=0.0))
        with np.errstate(divide="ignore"):
            plain_lse = np.log(total[:, 0]) + base[:, 0]
        lse_error = max(lse_error, np.abs(plain_lse[attends] - exact_lse[attends]).max(initial=0.0))
    # Scores are summed in another order than NumPy's: their own size bounds what that can change.
    counts = attended & ~np.isneginf(modified)
    largest_score = float(np.abs(np.where(counts, modified, 0.0)).max(initial=0.0)) + 1.0
    fp32 = unit_roundoff("fp32")
    return (
        2.0 * (plain_error + unit_roundoff(dtype) * largest),
        2.0 * (lse_error + 8.0 * fp32 * largest_score),
    )


def _as_functions_are(modified: Floats, modifier: Modifier | None) -> Iterator[Floats]:
    """Modified scores in fp32, and as functions that round less well would have them: some units off."""
    yield modified
    if modifier is None or not modifier.has_functions:
        return
    for seed in range(_ORDERS_OF_SUMMATION):
        units = np.random.default_rng(seed).uniform(-_FUNCTION_UNITS, _FUNCTION_UNITS, modified.shape)
        yield modified * (1.0 + units * unit_roundoff("fp32")).astype(np.float32)


def summed_in_order(a: Floats, b: Floats) -> Floats:
    """The matrix product in fp32, one term after the other, as a loop would do it."""
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for x in range(a.shape[1]):
        total += a[:, x, None] * b[x]
    return total


def gradient_tolerances(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    bound: BoundMask,
    scale: float,
    d_out: FloatArray,
    d_lse: FloatArray,
    dtype: Dtype,
    modifier: Modifier | None = None,
) -> tuple[float, ...]:
    """The largest errors of one head's dq, dk, dv and the gradients of live tables that a correct kernel may show.

    By the rule of `tolerances`: the plain computation is in fp32, one term after the other whatever this machine's BLAS
    would do, with probabilities, the output and the gradients of the scores rounded to the dtype. Where a row has few
    keys, what it loses hangs on a few differences of dot products that nearly cancel, and so on luck: it is done with
    the dimensions in several orders, and what the worst of them loses counts.
    """
    tables = [] if modifier is None else modifier.zeros()
    exact = (*gradients(q, k, v, bound, scale, d_out, d_lse, modifier, tables), *tables)
    q32, k32, d_out32 = (array.astype(np.float32) for array in (q, k, d_out))
    allowed = [0.0] * len(exact)
    for seed in range(_ORDERS_OF_SUMMATION):
        shuffle = np.random.default_rng(seed)
        dims, v_dims = shuffle.permutation(q.shape[1]), shuffle.permutation(v.shape[1])
        plain_tables = [] if modifier is None else modifier.zeros(np.float32)
        weights, d_scores = plain_weights(
            q[:, dims], k[:, dims], v[:, v_dims], bound, scale, d_out[:, v_dims], d_lse, dtype, modifier, plain_tables
        )
        plain = (
            summed_in_order(d_scores, k32) * np.float32(scale),
            summed_in_order(d_scores.T, q32) * np.float32(scale),
            summed_in_order(weights.T, d_out32),
        )
        errors = (allowed_error(got, wanted, dtype) for got, wanted in zip((*plain, *plain_tables), exact, strict=True))
        allowed = [max(most, error) for most, error in zip(allowed, errors, strict=True)]
    if modifier is not None and tables:
        # An entry is a sum over any number of edges, in another order than here: fp32 rounds by the size of its terms.
        sizes, every = modifier.zeros(), np.arange(bound.q_len)
        scaled = q @ k.T * scale
        slopes = np.abs(modifier.slope(scaled, every))
        terms = np.abs(d_scores) / np.where(slopes > 0, slopes, 1.0)
        modifier.add_gradients(terms, scaled, every, sizes, sizes=True)
        for i, size in enumerate(sizes, 3):
            allowed[i] += 2.0 * unit_roundoff("fp32") * float(size.max())
    return tuple(allowed)


def plain_weights(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    bound: BoundMask,
    scale: float,
    d_out: FloatArray,
    d_lse: FloatArray,
    dtype: Dtype,
    modifier: Modifier | None = None,
    d_tables: Sequence[Floats] = (),
) -> tuple[Floats, Floats]:
    """Probabilities and gradients of the scores `[q_len, kv_len]` of a plain computation in a dtype, in fp32.

    Where `d_tables` has an fp32 array for each live table of the modifier, their gradients are added to it.
    """
    attended = bound.to_dense()
    q32, k32, v32, d_out32 = (array.astype(np.float32) for array in (q, k, v, d_out))
    scaled, every = summed_in_order(q32, k32.T) * np.float32(scale), np.arange(bound.q_len)
    modified = scaled if modifier is None else modifier.value(scaled, every)
    scores = np.where(attended, modified, np.float32(-np.inf))
    # Probabilities are recomputed from the log-sum-exp, which is kept in fp32.
    lse = attention(q, k, v, bound, scale, modifier=modifier)[1].astype(np.float32)
    weights = np.exp(scores - np.where(np.isneginf(lse), np.float32(0.0), lse)[:, None])
    halves = rounded(weights, dtype).astype(np.float32)
    out = rounded(summed_in_order(halves, v32), dtype).astype(np.float32)
    # Summed apart from d_out @ v.T, so not in its order either: their errors do not cancel.
    delta = np.cumsum((out * d_out32)[:, ::-1], axis=1)[:, -1:] - d_lse.astype(np.float32)[:, None]
    d_values = np.where(attended, weights * (summed_in_order(d_out32, v32.T) - delta), np.float32(0.0))
    if modifier is None:
        return halves, rounded(d_values, dtype).astype(np.float32)
    if d_tables:
        modifier.add_gradients(rounded(d_values, dtype).astype(np.float32), scaled, every, d_tables)
    return halves, rounded(chained(d_values, modifier.slope(scaled, every)), dtype).astype(np.float32)


def chained(d_values: Floats, slopes: Floats) -> Floats:
    """Gradients of scores from those of what a modifier made of them; 0 where those are 0, whatever the slope."""
    return np.multiply(d_values, slopes, out=np.zeros_like(d_values), where=d_values != 0)


def allowed_error(plain: Floats, exact: Floats, dtype: Dtype) -> float:
    """Twice what a plain computation loses, its result rounded to the dtype, and one rounding unit of the largest."""
    error = np.abs(rounded(plain, dtype) - exact).max(initial=0.0)
    return 2.0 * float(error + unit_roundoff(dtype) * np.abs(exact).max(initial=0.0))


def _tokens(order: npt.NDArray[np.int32] | None, length: int) -> npt.NDArray[np.int64]:
    """Which token stands at each position."""
    return np.arange(length) if order is None else order.astype(np.int64)


@dataclass(frozen=True, slots=True)
class ReferenceKernel:
    """A launch computed by `attention`, head by head."""

    launch: Launch

    @property
    def nbytes(self) -> int:
        return 0

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        tables: Sequence[torch.Tensor] = (),
    ) -> None:
        import torch

        launch = self.launch
        group = launch.problem.q_heads // launch.problem.kv_heads
        for b in launch.elements(q.shape[0]):
            for h in launch.heads:
                q64, k64, v64 = (
                    t.detach().double().cpu().numpy() for t in (q[b, h], k[b, h // group], v[b, h // group])
                )
                rows = _tokens(launch.work.ordering.q_order, len(q64))
                keys = _tokens(launch.work.ordering.kv_order, len(k64))
                modifier = modifier_of(launch, b, h, tables)
                values, log_sums = attention(
                    q64[rows], k64[keys], v64[keys], launch.work.bound, launch.scale, modifier=modifier
                )
                out[b, h, torch.from_numpy(rows)] = torch.from_numpy(values).to(out)
                if lse is not None:
                    lse[b, h, torch.from_numpy(rows)] = torch.from_numpy(log_sums).to(lse)

    def source(self) -> dict[str, str]:
        from pathlib import Path

        return {"reference.py": Path(__file__).read_text()}


@dataclass(frozen=True, slots=True)
class ReferenceGradient:
    """The backward pass of a launch by `gradients`, head by head."""

    launch: Launch

    @property
    def nbytes(self) -> int:
        return 0

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        d_out: torch.Tensor,
        d_lse: torch.Tensor | None,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        tables: Sequence[torch.Tensor] = (),
        d_tables: Sequence[torch.Tensor | None] = (),
    ) -> None:
        import torch

        launch = self.launch
        group = launch.problem.q_heads // launch.problem.kv_heads
        sums: list[Floats] = [np.zeros(tuple(table.shape)) for table in tables]
        for b in launch.elements(q.shape[0]):
            for h in launch.heads:
                heads = (q[b, h], k[b, h // group], v[b, h // group], d_out[b, h])
                q64, k64, v64, d_out64 = (t.detach().double().cpu().numpy() for t in heads)
                d_lse64 = np.zeros(q.shape[2]) if d_lse is None else d_lse[b, h].double().cpu().numpy()
                rows = _tokens(launch.work.ordering.q_order, len(q64))
                keys = _tokens(launch.work.ordering.kv_order, len(k64))
                dq_rows, dk_rows, dv_rows = gradients(
                    q64[rows],
                    k64[keys],
                    v64[keys],
                    launch.work.bound,
                    launch.scale,
                    d_out64[rows],
                    d_lse64[rows],
                    modifier_of(launch, b, h, tables),
                    sums,
                )
                dq[b, h, torch.from_numpy(rows)] = torch.from_numpy(dq_rows).to(dq)
                dk[b, h // group, torch.from_numpy(keys)] += torch.from_numpy(dk_rows).to(dk)
                dv[b, h // group, torch.from_numpy(keys)] += torch.from_numpy(dv_rows).to(dv)
        for total, d_table in zip(sums, d_tables, strict=True):
            if d_table is not None:
                d_table += torch.from_numpy(total).to(d_table)

    def source(self) -> dict[str, str]:
        from pathlib import Path

        return {"reference.py": Path(__file__).read_text()}


class ReferenceBackend:
    """Serves every problem on every device, slowly."""

    name = "reference"

    def serves(self, device: Device) -> bool:
        return True

    def missing(self, device: Device) -> str | None:
        return None

    def refusal(self, template: Template, problem: Problem, device: Device) -> str | None:
        return None

    def config_refusal(self, template: Template, config: Config, problem: Problem, device: Device) -> str | None:
        return None

    def toolchain(self) -> str:
        return f"numpy {np.__version__}"

    def lower(self, launch: Launch) -> ReferenceKernel:
        return ReferenceKernel(launch)

    def lower_backward(self, launch: Launch) -> ReferenceGradient:
        return ReferenceGradient(launch)


@cache
def backend() -> ReferenceBackend:
    return ReferenceBackend()
