"""Neighbourhoods on 1-, 2- and 3-dimensional grids of tokens.

This file decides which tokens of a grid are neighbours, dimension by dimension; a row's keys are the product of its
windows, the last dimension as one range.

Source: Hassani et al., Generalized Neighborhood Attention, arXiv 2504.16922; windows shift at the edges so that every
query keeps its `kernel` keys, dilation splits a dimension into residue classes, a stride makes `stride` neighbouring
queries share the window of their centre (causal: of their last), and a causal window ends at its query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np

from sparsec.errors import MaskError
from sparsec.expr import Expr, Table, Var
from sparsec.expr.captured import Captured
from sparsec.masks import ranges
from sparsec.masks.arguments import checked_int
from sparsec.masks.mask import Axis, Mask, Shape, call_text
from sparsec.masks.periodic import PeriodicMask, Stretch
from sparsec.masks.ranges import IntArray, RowRanges, expand

Ints = int | Sequence[int]


@dataclass(frozen=True, eq=False, repr=False)
class Neighborhood(PeriodicMask):
    """Tokens of a grid (the last dimension runs fastest) attend their neighbourhood, or are attended by it."""

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    is_transposed: bool = False

    def _text(self, show: Callable[[object], str]) -> str:
        options: dict[str, object] = {}
        for name, value, default in (
            ("stride", self.stride, 1),
            ("dilation", self.dilation, 1),
            ("causal", self.causal, False),
        ):
            if any(v != default for v in value):
                options[name] = _short(value)
        shape = self.grid[0] if len(self.grid) == 1 else self.grid
        text = call_text(show, "neighborhood", shape, _short(self.kernel), **options)
        return f"{text}.T" if self.is_transposed else text

    def _transpose(self, shape: Shape | None) -> Mask:
        return replace(self, is_transposed=not self.is_transposed)

    def _fixed_lengths(self) -> tuple[int | None, int | None]:
        return prod(self.grid), prod(self.grid)

    def _row_weight(self, shape: Shape) -> float:
        return float(prod(self.kernel[:-1]))

    def _nnz(self, shape: Shape) -> int:
        return prod(int(count.sum()) for _, count in self._windows)

    def _degrees(self, shape: Shape, axis: Axis) -> IntArray:
        sides = (
            self._windows
            if axis == "q"
            else [_inverted(*axis) for axis in zip(self._windows, self.dilation, strict=True)]
        )
        degrees = sides[0][1]
        for _, count in sides[1:]:
            degrees = (degrees[:, None] * count).reshape(-1)
        return degrees

    @cached_property
    def _windows(self) -> list[Window]:
        """The window of each coordinate, dimension by dimension."""
        axes = zip(self.grid, self.kernel, self.stride, self.dilation, self.causal, strict=True)
        windows = [_window(*axis) for axis in axes]
        if self.is_transposed:
            return [_inverted(window, step) for window, step in zip(windows, self.dilation, strict=True)]
        return windows

    @cached_property
    def _stretch(self) -> Stretch | None:
        """Away from the edges, windows along the outermost dimension move on with their queries, a stride at a time."""
        first, count = self._windows[0]
        period = self.stride[0] * self.dilation[0]
        goes_on = (first[period:] - first[:-period] == period) & (count[period:] == count[:-period])
        breaks = np.flatnonzero(np.concatenate(([True], ~goes_on, [True])))
        longest = int(np.argmax(np.diff(breaks)))
        start, stop = int(breaks[longest]), int(breaks[longest + 1]) - 1 + period
        inner = prod(self.grid[1:])
        return Stretch(start * inner, stop * inner, period * inner) if stop - start > period else None

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges:
        q = np.arange(start, stop, dtype=np.int64)
        row = np.arange(stop - start, dtype=np.int64)
        # Outer dimensions are enumerated, one after the other: `base` is where the grid line of keys begins.
        base = np.zeros(stop - start, np.int64)
        for axis in range(len(self.grid) - 1):
            inner = prod(self.grid[axis + 1 :])
            coordinate = q[row] // inner % self.grid[axis]
            first, count = self._windows[axis]
            item, nth = expand(count[coordinate])
            base = base[item] + (first[coordinate[item]] + nth * self.dilation[axis]) * inner
            row = row[item]
        first, count = self._windows[-1]
        coordinate = q[row] % self.grid[-1]
        step = self.dilation[-1]
        begin = base + first[coordinate]
        end = begin + (count[coordinate] - 1) * step + 1
        return ranges.from_rows(
            stop - start, row, begin, end, None if step == 1 else np.full_like(begin, step), is_sorted=True
        )

    def _predicate(self, shape: Shape) -> Expr | None:
        q, kv = Var("q_idx"), Var("kv_idx")
        tests = []
        for axis, (size, step, (first, count)) in enumerate(zip(self.grid, self.dilation, self._windows, strict=True)):
            inner = prod(self.grid[axis + 1 :])
            q_at, kv_at = q // inner % size, kv // inner % size
            low = Table(Captured(first.astype(np.int32), f"first_{axis}"), (q_at,))
            high = Table(Captured((first + (count - 1) * step).astype(np.int32), f"last_{axis}"), (q_at,))
            test = (kv_at >= low) & (kv_at <= high)
            tests.append(test if step == 1 else test & ((kv_at - low) % step).eq(0))
        result = tests[0]
        for test in tests[1:]:
            result = result & test
        return result


# By coordinate: the first neighbour, and how many there are, `dilation` apart.
Window = tuple[IntArray, IntArray]


def _inverted(window: Window, dilation: int) -> Window:
    """Who has each coordinate in its window.

    Along a residue class neither end of the windows ever moves back, so these too are runs.
    """
    first, count = window
    inverse_first, inverse_count = np.zeros_like(first), np.zeros_like(count)
    for residue in range(dilation):
        own_first = (first[residue::dilation] - residue) // dilation
        own_stop = own_first + count[residue::dilation]
        coordinate = np.arange(len(own_first), dtype=np.int64)
        begin = np.searchsorted(own_stop, coordinate, side="right")
        end = np.searchsorted(own_first, coordinate, side="right")
        inverse_first[residue::dilation] = begin * dilation + residue
        inverse_count[residue::dilation] = np.maximum(0, end - begin)
    return inverse_first, inverse_count


def _window(size: int, kernel: int, stride: int, dilation: int, causal: bool) -> Window:
    coordinate = np.arange(size, dtype=np.int64)
    # Within a residue class tokens are numbered anew, and the class may be one shorter than the others.
    residue, own = coordinate % dilation, coordinate // dilation
    class_size = (size - residue + dilation - 1) // dilation
    group = own // stride * stride
    if causal:
        leader = np.minimum(group + stride - 1, class_size - 1)
        first = np.maximum(leader - kernel + 1, 0)
        count = own + 1 - first
    else:
        leader = np.minimum(group + stride // 2, class_size - 1)
        first = np.clip(leader - kernel // 2, 0, class_size - kernel)
        count = np.full(size, kernel, np.int64)
    return first * dilation + residue, count


def neighborhood(
    shape: Ints, kernel: Ints, stride: Ints = 1, dilation: Ints = 1, causal: bool | Sequence[bool] = False
) -> Mask:
    """NATTEN's neighbourhood attention on a grid of tokens.

    Args:
        shape: The grid, 1 to 3 dimensions; tokens are numbered with the last dimension fastest.
        kernel: Keys of a query along each dimension; at an edge the window shifts inwards.
        stride: So many neighbouring queries share a window; at most `kernel`.
        dilation: The step between keys; `kernel * dilation` must fit the grid.
        causal: Along these dimensions no key comes after its query, and windows are shorter at the start.

    Raises:
        MaskError: A value that is no positive int, a wrong number of dimensions, or a window that does not fit.
    """
    grid = _ints(shape, None, "shape")
    if not 1 <= len(grid) <= 3:
        raise MaskError(f"neighborhood: shape = {grid} has {len(grid)} dimensions; give 1, 2 or 3")
    rank = len(grid)
    kernels, strides, dilations = (
        _ints(value, rank, name) for value, name in ((kernel, "kernel"), (stride, "stride"), (dilation, "dilation"))
    )
    flags = (causal,) * rank if isinstance(causal, (bool, np.bool_)) else tuple(causal)
    if len(flags) != rank or not all(isinstance(flag, (bool, np.bool_)) for flag in flags):
        raise MaskError(f"neighborhood: causal = {causal!r} must be a bool, or {rank} of them")
    for axis, (size, k, s, d) in enumerate(zip(grid, kernels, strides, dilations, strict=True)):
        if k * d > size:
            raise MaskError(
                f"neighborhood: along dimension {axis} kernel {k} × dilation {d} = {k * d} does not fit {size} tokens; "
                "use a smaller kernel or dilation"
            )
        if s > k:
            raise MaskError(f"neighborhood: along dimension {axis} stride {s} is more than the kernel {k}")
    return Neighborhood(grid, kernels, strides, dilations, tuple(bool(flag) for flag in flags))


def _ints(value: Ints, rank: int | None, name: str) -> tuple[int, ...]:
    values = (value,) * (rank or 1) if isinstance(value, int | np.integer) else tuple(value)
    if rank is not None and len(values) != rank:
        raise MaskError(f"neighborhood: {name} = {value!r} must be an int, or {rank} of them")
    return tuple(checked_int(v, "neighborhood", name) for v in values)


def _short(values: tuple[int, ...]) -> object:
    return values[0] if all(v == values[0] for v in values) else values
