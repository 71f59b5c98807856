"""Masks that depend on `kv - q` alone: full, causal, windows, dilation, stride, and everything `& | ~ -` makes of them.

Such a mask is a set of offsets `d = kv - q`, one row of progressions, so this file decides everything in one dimension:
composition is set algebra on that row, and edges, degrees, tiles and patterns are closed forms of it. It must not know
masks of any other kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import and_, or_
from typing import Literal

import numpy as np
import numpy.typing as npt

from sparsec.errors import MaskError
from sparsec.expr import Const, Expr, Var
from sparsec.masks import ranges, tilemap
from sparsec.masks.arguments import MAX_LENGTH, checked_int
from sparsec.masks.mask import Axis, Key, Mask, Not, Shape, complement_of
from sparsec.masks.ranges import IntArray, RowRanges, expand
from sparsec.masks.tilemap import EMPTY, FULL, Grid, TileBits, TileMap

Align = Literal["top_left", "bottom_right"]

# Offsets of a mask without lengths lie within ± this; lengths are shorter.
LIMIT = MAX_LENGTH
# Products of two steps stay within 64 bits.
MAX_STEP = 2**31 - 1
# Without lengths a set is split into at most this many progressions before it stays a composition.
MAX_SYMBOLIC_RANGES = 2048
# A finite set of so few offsets is brought to one form by listing it.
MAX_LISTED_OFFSETS = 2**12


@dataclass(frozen=True, eq=False, repr=False)
class Toeplitz(Mask):
    """The pairs whose `kv - q`, less the anchor's own offset, is in a set.

    Attributes:
        text: How the mask was written.
        offsets: One row; within ±LIMIT before lengths are known, within `(-q_len, kv_len)` after.
        align: `"top_left"` counts offsets from the main diagonal, `"bottom_right"` from the one through the last pair.
    """

    text: str
    offsets: RowRanges
    align: Align = "top_left"

    def _text(self, show: Callable[[object], str]) -> str:
        return self.text

    def _key(self) -> Key:
        parts = (self.offsets.start, self.offsets.stop, self.offsets.step)
        return ("Toeplitz", self.align, *(tuple(part.tolist()) for part in parts))

    @property
    def _depends_on_lengths(self) -> bool:  # type: ignore[override]
        return self.align == "bottom_right"

    # -- Algebra -------------------------------------------------------------------------------------------------

    def _normal(self, shape: Shape | None, negated: bool, transposed: bool) -> Mask:
        leaf = self._transpose(None) if transposed else self
        if shape is not None:
            leaf = leaf._placed(shape)
        if negated:
            return complement_of(leaf, shape)
        return Toeplitz(leaf.text, _one_form(leaf.offsets), leaf.align)

    def _placed(self, shape: Shape) -> Toeplitz:
        """This mask at these lengths: aligned top left, only the offsets there are."""
        by = shape[1] - shape[0] if self.align == "bottom_right" else 0
        moved = ranges.shift(self.offsets, by) if by else self.offsets
        return Toeplitz(self.text, ranges.clip(moved, 1 - shape[0], shape[1]))

    def _transpose(self, shape: Shape | None) -> Toeplitz:
        d = self.offsets
        flipped = ranges.from_rows(1, np.zeros_like(d.start), 1 - d.stop, 1 - d.start, d.step)
        return Toeplitz(f"{self.text}.T", flipped, self.align)

    def _complement(self, shape: Shape | None) -> Mask | None:
        low, high = _bounds(shape)
        if shape is None and int(self.offsets.step.sum()) > MAX_SYMBOLIC_RANGES:
            return None
        return Toeplitz(
            f"~({self.text})", _one_form(ranges.difference(_one_range(low, high), self.offsets)), self.align
        )

    def _merge(self, other: Mask, op: Literal["and", "or"], shape: Shape | None) -> Mask | None:
        if not isinstance(other, Toeplitz) or other.align != self.align:
            return None
        if shape is None and len(self.offsets.start) * len(other.offsets.start) > MAX_SYMBOLIC_RANGES:
            return None
        # The denser first, so that unions are the same whichever way they are written.
        a, b = sorted((self, other), key=lambda m: (-m.offsets.nnz, m.offsets.start[:1].tolist()))
        if shape is None and op == "or" and int(a.offsets.step.sum()) * len(b.offsets.start) > MAX_SYMBOLIC_RANGES:
            return None
        combine, sign = (ranges.intersect, "&") if op == "and" else (ranges.union, "|")
        offsets = _one_form(combine(a.offsets, b.offsets))
        return Toeplitz(f"({self.text} {sign} {other.text})", offsets, self.align)

    def _lean(self, shape: Shape) -> Mask:
        """The complement of a set that has far fewer ranges, where there is one."""
        if len(self.offsets.start) <= 8:
            return self
        other = self._complement(shape)
        assert isinstance(other, Toeplitz)
        return Not(other) if len(other.offsets.start) * 2 <= len(self.offsets.start) else self

    def _sliced(self, shape: Shape, q: tuple[int, int], kv: tuple[int, int]) -> Mask | None:
        moved = Toeplitz(self.text, ranges.shift(self.offsets, q[0] - kv[0]))
        return moved._normal((q[1] - q[0], kv[1] - kv[0]), False, False)

    def _constant(self, shape: Shape | None) -> bool | None:
        d, (low, high) = self.offsets, _bounds(shape)
        if not len(d.start):
            return False
        return True if len(d.start) == 1 and d.step[0] == 1 and d.start[0] == low and d.stop[0] == high else None

    # -- What is asked once the lengths are known ----------------------------------------------------------------

    def _offsets(self, shape: Shape) -> RowRanges | None:
        return self.offsets

    def _row_weight(self, shape: Shape) -> float:
        return float(len(self.offsets.start))

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges:
        d, n_rows = self.offsets, stop - start
        n = len(d.start)
        q = np.arange(start, stop, dtype=np.int64)[:, None]
        first = (d.start + q).reshape(-1)
        last = (d.stop + q).reshape(-1)
        step = np.tile(d.step, n_rows)
        first += np.maximum(0, -(first // step)) * step
        np.minimum(last, shape[1], out=last)
        row = np.repeat(np.arange(n_rows, dtype=np.int64), n)
        all_intervals = bool((d.step == 1).all())
        return ranges.from_rows(n_rows, row, first, last, None if all_intervals else step, is_sorted=all_intervals)

    def _nnz(self, shape: Shape) -> int:
        q_len, kv_len = shape
        d = self.offsets
        total = 0
        # A diagonal's length rises, stays, and falls: three stretches, linear in the offset on each. Exact integers.
        low, high = min(0, kv_len - q_len), max(0, kv_len - q_len)
        for begin, end in ((1 - q_len, low), (low, high + 1), (high + 1, kv_len)):
            part = ranges.clip(d, begin, end)
            for a, b, n in zip(part.start.tolist(), part.stop.tolist(), ranges.lengths(part).tolist(), strict=True):
                total += n * (_diagonal(shape, a) + _diagonal(shape, b - 1)) // 2
        return total

    def _degrees(self, shape: Shape, axis: Axis) -> IntArray:
        q_len, kv_len = shape
        if axis == "kv":
            return self._transpose(shape)._degrees((kv_len, q_len), "q")
        d = self.offsets
        # Query 0 sees the offsets 0 … kv_len - 1. From q to q + 1 offset -q - 1 comes in and kv_len - q - 1 goes out.
        degrees = np.zeros(q_len, np.int64)
        incoming = ranges.clip(d, 1 - q_len, 0)
        outgoing = ranges.clip(d, kv_len - q_len + 1, kv_len)
        for part, base, sign in ((incoming, 0, 1), (outgoing, kv_len, -1)):
            for a, b, step in zip(part.start.tolist(), part.stop.tolist(), part.step.tolist(), strict=True):
                degrees[base - b + 1 : base - a + 1 : step] += sign
        degrees[0] = ranges.clip(d, 0, kv_len).nnz
        return np.cumsum(degrees, out=degrees)

    def _tiles(self, shape: Shape, block_q: int, block_kv: int, tile_rows: range) -> TileMap:
        grid = Grid(shape, block_q, block_kv)
        keys, counts = self._tile_counts(grid, tile_rows)
        return tilemap.from_counts(grid, keys, counts)

    def _tile_counts(self, grid: Grid, tile_rows: range) -> tuple[IntArray, IntArray]:
        classes = self._touched_classes(grid)
        n_classes = len(classes.start)
        if not tile_rows or not n_classes:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        q_ratio, kv_ratio = _ratios(grid)
        # The columns of a tile row: column * kv_ratio - row * q_ratio runs over the classes.
        base = np.arange(tile_rows.start, tile_rows.stop, dtype=np.int64)[:, None] * q_ratio
        first = np.maximum(0, -((-classes.start - base) // kv_ratio))
        last = np.minimum(grid.n_kv_tiles, (classes.stop - 1 + base) // kv_ratio + 1)
        # Tiles of the first interior class run on: count each class once, then look it up.
        item, nth = expand(np.maximum(0, last - first).reshape(-1))
        column = first.reshape(-1)[item] + nth
        tile_row = item // n_classes + tile_rows.start
        shift_class = column * kv_ratio - tile_row * q_ratio
        low, high = int(classes.start[0]), int(classes.stop[-1])
        keys = tile_row * grid.n_kv_tiles + column
        if high - low <= 4 * len(keys):
            unit = min(grid.block_q, grid.block_kv)
            table = self._pairs(np.arange(low, high, dtype=np.int64) * unit, grid.block_q, grid.block_kv)
            counts = table[shift_class - low]
        else:
            counts = self._counts_at(grid, keys)
        ragged = grid.ragged(keys)
        if len(ragged):
            counts[ragged] = self._counts_at(grid, keys[ragged])
        return keys, counts

    def _touched_classes(self, grid: Grid) -> RowRanges:
        """Shifts `column * block_kv - row * block_q`, in units of the smaller block, of tiles that may hold an edge."""
        d, unit = self.offsets, min(grid.block_q, grid.block_kv)
        start, stop = d.start, d.stop
        span = grid.block_q + grid.block_kv - 1
        # Keys further apart than a tile reaches leave classes out between them.
        apart = d.step > span
        if apart.any():
            item, nth = expand(ranges.lengths(d)[apart])
            key = start[apart][item] + nth * d.step[apart][item]
            start, stop = np.concatenate((start[~apart], key)), np.concatenate((stop[~apart], key + 1))
        # Offset d is in a tile of shift s when s - block_q < d < s + block_kv.
        low = -((grid.block_kv - 1 - start) // unit)
        high = (stop - 1 + grid.block_q - 1) // unit + 1
        order = np.argsort(low, kind="stable")
        low, high = low[order], np.maximum.accumulate(high[order])
        # Overlapping runs become one.
        opens = np.concatenate(([True], low[1:] > high[:-1]))[: len(low)]
        closes = np.concatenate((opens[1:], [True]))[: len(low)]
        begin, end = low[opens], high[closes]
        return RowRanges(np.array([0, len(begin)], np.int64), begin, end, np.ones_like(begin))

    def _counts_at(self, grid: Grid, keys: IntArray) -> IntArray:
        row = keys // grid.n_kv_tiles
        column = keys - row * grid.n_kv_tiles
        shift = column * grid.block_kv - row * grid.block_q
        return self._pairs(shift, grid.heights(row), grid.widths(column))

    def _pairs(self, shift: IntArray, height: IntArray | int, width: IntArray | int) -> IntArray:
        """Edges in tiles of the given shifts and sizes: a second difference of the twice summed offset set.

        With `N(t)` the number of offsets below t, tile row x holds `N(shift - x + width) - N(shift - x)` edges; summing
        over x telescopes in `P(t) = Σ_{u ≤ t} N(u) = Σ_{d < t} (t - d)`.
        """
        p = self._twice_summed
        return p(shift + width) - p(shift + width - height) - p(shift) + p(shift - height)

    def _twice_summed(self, t: IntArray) -> IntArray:
        """`Σ (t - d)` over offsets `d < t`; int64 that may wrap, as differences of it do not."""
        total = np.zeros_like(t)
        intervals = self._intervals
        if len(intervals.start):
            at = np.searchsorted(intervals.start, t, side="left")
            keys, sums = self._interval_sums
            whole = np.maximum(at - 1, 0)
            inside = np.where(at > 0, np.minimum(t, intervals.stop[whole]) - intervals.start[whole], 0)
            key = keys[whole] * (at > 0) + inside
            total += key * t - sums[whole] * (at > 0) - _arithmetic_sum(intervals.start[whole], inside, 1)
        for a, n, step in self._progressions:
            below = np.clip(-((a - t) // step), 0, n)
            total += below * t - _arithmetic_sum(a, below, step)
        return total

    @cached_property
    def _intervals(self) -> RowRanges:
        single = self.offsets.step == 1
        return RowRanges(
            np.array([0, int(single.sum())], np.int64),
            self.offsets.start[single],
            self.offsets.stop[single],
            self.offsets.step[single],
        )

    @cached_property
    def _interval_sums(self) -> tuple[IntArray, IntArray]:
        """Before each interval: how many offsets, and their sum (which may wrap)."""
        d = self._intervals
        n = d.stop - d.start
        sums = _arithmetic_sum(d.start, n, 1)
        return np.cumsum(n) - n, np.cumsum(sums) - sums

    @cached_property
    def _progressions(self) -> list[tuple[int, int, int]]:
        """`(start, keys, step)` of each progression."""
        d = self.offsets
        columns = zip(d.start.tolist(), ranges.lengths(d).tolist(), d.step.tolist(), strict=True)
        return [(a, n, step) for a, n, step in columns if step != 1]

    def _bits_at(self, grid: Grid, keys: IntArray) -> TileBits:
        if not len(keys):
            return tilemap.gather([], grid)
        row = keys // grid.n_kv_tiles
        column = keys - row * grid.n_kv_tiles
        q_ratio, kv_ratio = _ratios(grid)
        shift_class = column * kv_ratio - row * q_ratio
        low, high = int(shift_class.min()), int(shift_class.max()) + 1
        if high - low <= 4 * len(keys):
            seen = np.zeros(high - low, np.bool_)
            seen[shift_class - low] = True
            classes = np.flatnonzero(seen) + low
            number = np.cumsum(seen) - 1
            entry = number[shift_class - low]
        else:
            classes, entry = np.unique(shift_class, return_inverse=True)
        whole = self._paint(grid, classes * min(grid.block_q, grid.block_kv))
        index, bits, is_distinct = whole.index[entry], whole.bits, whole.is_distinct
        ragged = grid.ragged(keys)
        if len(ragged):
            # A ragged tile is its class's pattern cut to the shape; the few different cuts get entries of their own.
            own = tilemap.full_bits(grid, keys[ragged])
            inner = index[ragged]
            named = inner >= 0
            own[named] &= bits[inner[named]]
            own[inner == EMPTY] = 0
            cut = tilemap.classify(grid, keys[ragged], own)
            index[ragged] = np.where(cut.index >= 0, cut.index + len(bits), cut.index)
            bits, is_distinct = np.concatenate((bits, cut.bits)), False
        return TileBits(index, bits, is_distinct)

    def _paint(self, grid: Grid, shifts: IntArray) -> TileBits:
        """Whole tiles of the given shifts."""
        area = grid.block_q * grid.block_kv
        counts = self._pairs(shifts, grid.block_q, grid.block_kv)
        index = np.where(counts == 0, EMPTY, FULL).astype(np.int32)
        partial = np.flatnonzero((counts > 0) & (counts < area))
        limit = max(1, tilemap.PAINT_BYTES // area)
        parts = []
        for begin in range(0, len(partial), limit):
            some = shifts[partial[begin : begin + limit]]
            held = self._contains(some[:, None] + np.arange(1 - grid.block_q, grid.block_kv, dtype=np.int64))
            # Row x of a tile is the diagonal strip seen from block_q - 1 - x on.
            windows = np.lib.stride_tricks.sliding_window_view(held, grid.block_kv, axis=1)[:, ::-1]
            patterns, entry = tilemap.distinct(np.packbits(windows, axis=2, bitorder="little"))
            parts.append(TileBits(entry.astype(np.int32), patterns, is_distinct=True))
        painted = tilemap.gather(parts, grid)
        index[partial] = painted.index
        return TileBits(index, painted.bits, painted.is_distinct)

    def _contains(self, offset: IntArray) -> npt.NDArray[np.bool_]:
        held = np.zeros(offset.shape, np.bool_)
        intervals = self._intervals
        if len(intervals.start):
            at = np.searchsorted(intervals.start, offset, side="right") - 1
            held |= (at >= 0) & (offset < intervals.stop[at])
        for a, n, step in self._progressions:
            nth = (offset - a) // step
            held |= (nth >= 0) & (nth < n) & (offset - a == nth * step)
        return held

    def _predicate(self, shape: Shape) -> Expr | None:
        placed = self._normal(shape, False, False)
        assert isinstance(placed, Toeplitz)
        constant = placed._constant(shape)
        if constant is not None:
            return Const(constant)
        low, high = _bounds(shape)
        offset = Var("kv_idx") - Var("q_idx")
        d = placed.offsets
        tests: list[Expr] = []
        for a, b, step in zip(d.start.tolist(), d.stop.tolist(), d.step.tolist(), strict=True):
            # Ends that every pair meets are not tested.
            parts: list[Expr] = []
            if a - step >= low:
                parts.append(offset >= a)
            if b - 1 + step < high:
                parts.append(offset < b)
            if step != 1:
                parts.append(((offset - a % step if a % step else offset) % step).eq(0))
            tests.append(reduce(and_, parts))
        return reduce(or_, tests)


def full() -> Mask:
    """Every query attends every key."""
    return Toeplitz("full()", _one_range(-LIMIT, LIMIT + 1))


def causal(align: Align = "top_left") -> Mask:
    """`kv ≤ q`; with `align="bottom_right"` the last query attends the last key: `kv ≤ q + kv_len - q_len`."""
    if align not in ("top_left", "bottom_right"):
        raise MaskError(f'causal(align={align!r}): align is "top_left" or "bottom_right"')
    text = "causal()" if align == "top_left" else f"causal({align!r})"
    return Toeplitz(text, _one_range(-LIMIT, 1), align)


def window(left: int, right: int) -> Mask:
    """`q - left ≤ kv ≤ q + right`.

    Args:
        left: Keys before the query, its own not counted.
        right: Keys after it. Either may be negative, as long as `left + right ≥ 0`.
    """
    left, right = (
        checked_int(value, "window", name, 1 - LIMIT, LIMIT - 1) for name, value in (("left", left), ("right", right))
    )
    if left + right < 0:
        raise MaskError(f"window({left}, {right}) holds no key: left + right must be ≥ 0")
    return Toeplitz(f"window({left}, {right})", _one_range(-left, right + 1))


def dilated(reach: int, dilation: int) -> Mask:
    """`|q - kv| ≤ reach` and `(q - kv) % dilation == 0`; dilation is a step as in convolutions, 1 is dense."""
    step = checked_int(dilation, "dilated", "dilation", most=MAX_STEP)
    reach = checked_int(reach, "dilated", "reach", least=0)
    return Toeplitz(f"dilated({reach}, {step})", _multiples(step, reach))


def strided(stride: int) -> Mask:
    """`(q - kv) % stride == 0`."""
    step = checked_int(stride, "strided", "stride", most=MAX_STEP)
    return Toeplitz(f"strided({step})", _multiples(step, LIMIT))


def _one_range(start: int, stop: int, step: int = 1) -> RowRanges:
    values = (np.array([value], np.int64) for value in (start, stop, step))
    return RowRanges(np.array([0, 1], np.int64), *values)


def _multiples(step: int, reach: int) -> RowRanges:
    most = reach // step * step
    return _one_range(-most, most + 1, step if most else 1)


def _bounds(shape: Shape | None) -> tuple[int, int]:
    return (-LIMIT, LIMIT + 1) if shape is None else (1 - shape[0], shape[1])


def _one_form(offsets: RowRanges) -> RowRanges:
    """The same set in a form that does not remember how it came about, where the set is small enough to list."""
    if bool((offsets.step == 1).all()) or offsets.nnz > MAX_LISTED_OFFSETS:
        return offsets
    return ranges.from_edges(1, *ranges.to_edges(offsets))


def _diagonal(shape: Shape, offset: int) -> int:
    """Pairs with this offset."""
    return min(shape[0], shape[1] - offset) - max(0, -offset)


def _arithmetic_sum(first: IntArray | int, n: IntArray, step: int) -> IntArray:
    """`first + (first + step) + …`, n terms; may wrap."""
    # n * (n - 1) / 2 with the even factor halved first, so that wrapping stays exact.
    half = np.where(n % 2 == 0, (n // 2) * (n - 1), n * ((n - 1) // 2))
    result: IntArray = first * n + step * half
    return result


def _ratios(grid: Grid) -> tuple[int, int]:
    """block_q and block_kv in units of the smaller (both are powers of two)."""
    unit = min(grid.block_q, grid.block_kv)
    return grid.block_q // unit, grid.block_kv // unit
