"""Masks given by a few numbers: tokens that all see, prefixes, documents, dilated blocks.

One class and one constructor each; what they cannot say in closed form they leave to `runs.py` and `derive.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sparsec.errors import MaskError
from sparsec.expr import Const, Expr, Table, Var
from sparsec.expr.captured import Captured
from sparsec.masks import derive, ranges, tilemap
from sparsec.masks.arguments import checked_int, int_array, is_int
from sparsec.masks.mask import Axis, Mask, Shape, call_text
from sparsec.masks.ranges import IntArray, RowRanges, expand
from sparsec.masks.runs import RunMask
from sparsec.masks.tilemap import Grid, TileBits, TileMap

_Q, _KV = Var("q_idx"), Var("kv_idx")


@dataclass(frozen=True, eq=False, repr=False)
class Tokens(RunMask):
    """Some queries attend every key, and some keys are attended by every query.

    Attributes:
        queries: One row: those queries. Keys from the end are negative, and put in place once the length is known.
        keys: One row: those keys.
        strict: Every one of them must exist; else those beyond the length are left out.
        text: How the mask was written, or empty to write the tokens out.
    """

    queries: RowRanges
    keys: RowRanges
    strict: bool
    text: str

    def _text(self, show: Callable[[object], str]) -> str:
        return self.text or call_text(show, "global_tokens", ranges.to_edges(self.keys)[1])

    def _key(self) -> tuple[object, ...]:
        def listed(row: RowRanges) -> tuple[object, ...]:
            return tuple(row.start.tolist()), tuple(row.stop.tolist()), tuple(row.step.tolist())

        return ("Tokens", listed(self.queries), listed(self.keys))

    @property
    def _depends_on_lengths(self) -> bool:  # type: ignore[override]
        return any(bool((row.start < 0).any()) for row in (self.queries, self.keys))

    def _check(self, shape: Shape) -> None:
        last = max((int(row.stop.max(initial=0)) - 1 for row in (self.queries, self.keys)), default=-1)
        if self.strict and last >= max(shape):
            raise MaskError(
                f"{self}: token {last} does not exist in a mask of {shape[0]} queries and {shape[1]} keys; "
                "leave it out, or bind more tokens"
            )

    def _normal(self, shape: Shape | None, negated: bool, transposed: bool) -> Mask:
        leaf = self._transpose(None) if transposed else self
        if shape is not None:
            queries, keys = (_placed(row, n) for row, n in zip((leaf.queries, leaf.keys), shape, strict=True))
            leaf = Tokens(queries, keys, self.strict, leaf.text)
        return Mask._normal(leaf, shape, negated, False)

    def _transpose(self, shape: Shape | None) -> Tokens:
        same = self._key()[1] == self._key()[2]
        return Tokens(self.keys, self.queries, self.strict, self.text if same or not self.text else f"{self.text}.T")

    def _constant(self, shape: Shape | None) -> bool | None:
        if not len(self.queries.start) and not len(self.keys.start):
            return False
        if shape is None:
            return None
        return True if self.queries.nnz == shape[0] or self.keys.nnz == shape[1] else None

    @cached_property
    def _query_list(self) -> IntArray:
        return ranges.to_edges(self.queries)[1]

    @cached_property
    def _key_list(self) -> IntArray:
        return ranges.to_edges(self.keys)[1]

    def _row_weight(self, shape: Shape) -> float:
        return 1.0 + len(self.keys.start)

    def _runs(self, shape: Shape, start: int, stop: int) -> tuple[IntArray, RowRanges]:
        marked = ranges.clip(self.queries, start, stop)
        if not (marked.step == 1).all():
            tokens = ranges.to_edges(marked)[1]
            marked = ranges.from_rows(1, np.zeros_like(tokens), tokens, tokens + 1)
        bounds = np.unique(np.concatenate((np.array([start, stop]), marked.start, marked.stop)))
        is_marked = np.isin(bounds[:-1], marked.start).astype(np.int64)
        every = RowRanges(np.array([0, 1], np.int64), *(np.array([x], np.int64) for x in (0, shape[1], 1)))
        return bounds, ranges.pick_rows(ranges.concatenate((self.keys, every)), is_marked)

    def _nnz(self, shape: Shape) -> int:
        n_q, n_kv = self.queries.nnz, self.keys.nnz
        return n_q * shape[1] + n_kv * shape[0] - n_q * n_kv

    def _degrees(self, shape: Shape, axis: Axis) -> IntArray:
        if axis == "kv":
            return self._transpose(None)._degrees((shape[1], shape[0]), "q")
        degrees = np.full(shape[0], self.keys.nnz, np.int64)
        degrees[self._query_list] = shape[1]
        return degrees

    def _union_degrees(self, other: Mask, shape: Shape, axis: Axis) -> IntArray | None:
        offsets = other._offsets(shape)
        if offsets is None or self.keys.nnz * len(offsets.start) > shape[0] or self.queries.nnz > shape[0]:
            return None
        if axis == "kv":
            transposed = other._transpose(shape)
            swapped = (shape[1], shape[0])
            return None if transposed is None else self._transpose(None)._union_degrees(transposed, swapped, "q")
        degrees = other._degrees(shape, "q") + self.keys.nnz
        # A key that all attend is counted once by those that attend it by offset as well.
        key = np.repeat(self._key_list, len(offsets.start))
        n_keys = len(self._key_list)
        first = key - np.tile(offsets.stop - 1, n_keys)
        both = RowRanges(
            np.arange(n_keys + 1) * len(offsets.start),
            first,
            key + 1 - np.tile(offsets.start, n_keys),
            np.tile(offsets.step, n_keys),
        )
        twice = np.zeros(shape[0] + 1, np.int64)
        derive.add_key_degrees(twice, ranges.clip(both, 0, shape[0]), None)
        degrees -= np.cumsum(twice[:-1])
        degrees[self._query_list] = shape[1]
        return degrees

    def _tiles(self, shape: Shape, block_q: int, block_kv: int, tile_rows: range) -> TileMap:
        grid = Grid(shape, block_q, block_kv)
        columns = np.unique(self._key_list // block_kv)
        rows = np.arange(tile_rows.start, tile_rows.stop, dtype=np.int64)
        is_marked = np.isin(rows, self._query_list // block_q)
        item, nth = expand(np.where(is_marked, grid.n_kv_tiles, len(columns)))
        if len(columns):
            nth = np.where(is_marked[item], nth, columns[np.minimum(nth, len(columns) - 1)])
        keys = rows[item] * grid.n_kv_tiles + nth
        return tilemap.from_counts(grid, keys, self._counts_at(grid, keys))

    def _counts_at(self, grid: Grid, keys: IntArray) -> IntArray:
        row = keys // grid.n_kv_tiles
        column = keys - row * grid.n_kv_tiles
        n_q = np.bincount(self._query_list // grid.block_q, minlength=grid.n_q_tiles)[row]
        n_kv = np.bincount(self._key_list // grid.block_kv, minlength=grid.n_kv_tiles)[column]
        result: IntArray = n_q * grid.widths(column) + n_kv * grid.heights(row) - n_q * n_kv
        return result

    def _bits_at(self, grid: Grid, keys: IntArray) -> TileBits:
        row = keys // grid.n_kv_tiles
        column = keys - row * grid.n_kv_tiles
        row_class, row_marks = _side(self._query_list, row, grid.block_q, grid.shape[0])
        column_class, column_marks = _side(self._key_list, column, grid.block_kv, grid.shape[1])
        pair = row_class * len(column_marks) + column_class
        pairs, first, entry = np.unique(pair, return_index=True, return_inverse=True)
        limit = max(1, tilemap.PAINT_BYTES // (grid.block_q * grid.block_kv))
        parts = []
        for begin in range(0, len(pairs), limit):
            some = first[begin : begin + limit]
            marked_rows, marked_columns = row_marks[row_class[some]], column_marks[column_class[some]]
            bits = np.packbits(marked_rows[:, :, None] | marked_columns[:, None, :], axis=2, bitorder="little")
            bits &= tilemap.full_bits(grid, keys[some])
            parts.append(tilemap.classify(grid, keys[some], bits))
        merged = tilemap.gather(parts, grid)
        return TileBits(merged.index[entry], merged.bits)

    def _predicate(self, shape: Shape) -> Expr | None:
        placed = self._normal(shape, False, False)
        assert isinstance(placed, Tokens)
        tests = [test for row, index in ((placed.queries, _Q), (placed.keys, _KV)) for test in _in_ranges(row, index)]
        result: Expr = tests[0] if tests else Const(False)
        for test in tests[1:]:
            result = result | test
        return result


def _side(tokens: IntArray, tile: IntArray, block: int, length: int) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """One side of some tiles: a class for each tile, and which places of the block are marked in each class.

    Class 0 has no mark and is whole; tiles with marks and the ragged last one have a class each.
    """
    special = np.unique(tokens // block)
    if length % block:
        special = np.union1d(special, [length // block])
    marks = np.zeros((len(special) + 1, block), np.bool_)
    marks[np.searchsorted(special, tokens // block) + 1, tokens % block] = True
    if not len(special):
        return np.zeros(len(tile), np.int64), marks
    at = np.minimum(np.searchsorted(special, tile), len(special) - 1)
    return np.where(special[at] == tile, at + 1, 0), marks


def _placed(row: RowRanges, length: int) -> RowRanges:
    """Tokens counted from the end put in place, and those beyond the length left out."""
    from_end = np.flatnonzero(row.start < 0)
    if not len(from_end):
        return ranges.clip(row, 0, length)
    # Ranges ascend, so those counted from the end come first.
    n = len(from_end)
    halves = (
        RowRanges(np.array([0, n]), row.start[:n] + length, row.stop[:n] + length, row.step[:n]),
        RowRanges(np.array([0, len(row.start) - n]), row.start[n:], row.stop[n:], row.step[n:]),
    )
    at_end, at_start = (ranges.clip(half, 0, length) for half in halves)
    return ranges.union(at_end, at_start)


def _in_ranges(row: RowRanges, index: Expr) -> list[Expr]:
    tests = []
    for start, stop, step in zip(row.start.tolist(), row.stop.tolist(), row.step.tolist(), strict=True):
        if stop == start + 1:
            tests.append(index.eq(start))
            continue
        test = index < stop if start == 0 else (index >= start) & (index < stop)
        tests.append(test if step == 1 else test & ((index - start) % step).eq(0))
    return tests


def global_tokens(n_or_indices: int | Sequence[int] | IntArray) -> Mask:
    """Some tokens attend, and are attended by, all: the first `n`, or those listed.

    Raises:
        MaskError: A negative number or index, or no integers.
    """
    if is_int(n_or_indices):
        row = _first(n_or_indices, "global_tokens")
        return Tokens(row, row, False, f"global_tokens({int(n_or_indices)})")
    tokens = int_array(n_or_indices, "global_tokens", "indices")
    if len(tokens) and tokens.min() < 0:
        raise MaskError(f"global_tokens: index {tokens.min()} is negative; count tokens from 0")
    tokens = np.unique(tokens)
    row = ranges.from_edges(1, np.zeros_like(tokens), tokens)
    return Tokens(row, row, True, "")


def prefix(n: int) -> Mask:
    """Every query attends the keys `< n`."""
    return Tokens(ranges.empty(1), _first(n, "prefix"), False, f"prefix({n})")


def end_tokens(first: int, last: int) -> Mask:
    """The `first` first and the `last` last tokens attend, and are attended by, all."""
    # Counted from the end and from the start: they touch at 0, and must not become one range.
    ends = np.array([[-last, 0], [0, first]], np.int64)
    ends = ends[ends[:, 0] < ends[:, 1]]
    row = RowRanges(np.array([0, len(ends)]), ends[:, 0], ends[:, 1], np.ones(len(ends), np.int64))
    return Tokens(row, row, False, f"end_tokens({first}, {last})")


def _first(n: int, name: str) -> RowRanges:
    n = checked_int(n, name, "n", least=0)
    return ranges.from_rows(1, np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([n], np.int64))


@dataclass(frozen=True, eq=False, repr=False)
class Documents(RunMask):
    """Tokens attend within their document.

    Attributes:
        bounds: int64 `[n + 1]`: where documents begin, and the end.
    """

    bounds: IntArray

    def _text(self, show: Callable[[object], str]) -> str:
        return call_text(show, "documents", np.diff(self.bounds))

    def _fixed_lengths(self) -> tuple[int | None, int | None]:
        return int(self.bounds[-1]), int(self.bounds[-1])

    def _transpose(self, shape: Shape | None) -> Mask | None:
        return self

    def _row_weight(self, shape: Shape) -> float:
        return 1.0

    def _run_weight(self, shape: Shape) -> float:
        return len(self.bounds) / max(1, shape[0])

    def _runs(self, shape: Shape, start: int, stop: int) -> tuple[IntArray, RowRanges]:
        first = int(np.searchsorted(self.bounds, start, side="right")) - 1
        end = int(np.searchsorted(self.bounds, stop, side="left"))
        starts, stops = self.bounds[first:end], self.bounds[first + 1 : end + 1]
        rows = RowRanges(np.arange(len(starts) + 1, dtype=np.int64), starts, stops, np.ones_like(starts))
        return np.concatenate(([start], starts[1:], [stop])), rows

    def _nnz(self, shape: Shape) -> int:
        return int((np.diff(self.bounds) ** 2).sum())

    def _degrees(self, shape: Shape, axis: Axis) -> IntArray:
        sizes = np.diff(self.bounds)
        return np.repeat(sizes, sizes)

    def _counts_at(self, grid: Grid, keys: IntArray) -> IntArray:
        row = keys // grid.n_kv_tiles
        column = keys - row * grid.n_kv_tiles
        # Most tiles are within one document, or between documents that do not meet.
        first_of_row, last_of_row = self._ends(grid.shape[0], grid.block_q)
        first_of_column, last_of_column = self._ends(grid.shape[1], grid.block_kv)
        low, high = first_of_row[row], last_of_row[row]
        other_low, other_high = first_of_column[column], last_of_column[column]
        counts = np.zeros(len(keys), np.int64)
        is_within = (low == high) & (other_low == other_high)
        within = np.flatnonzero(is_within & (low == other_low))
        counts[within] = grid.areas(keys[within])
        rest = np.flatnonzero(~is_within & (low <= other_high) & (other_low <= high))
        row, column = row[rest], column[rest]
        q, kv = row * grid.block_q, column * grid.block_kv
        q_end, kv_end = q + grid.heights(row), kv + grid.widths(column)
        counts[rest] = (
            self._before(q_end, kv_end) - self._before(q, kv_end) - self._before(q_end, kv) + self._before(q, kv)
        )
        return counts

    def _ends(self, length: int, block: int) -> tuple[IntArray, IntArray]:
        """The documents of the first and of the last token of each block."""
        first = np.arange(0, length, block, dtype=np.int64)
        last = np.minimum(first + block, length) - 1
        low, high = (np.searchsorted(self.bounds, token, side="right") - 1 for token in (first, last))
        return low, high

    def _before(self, q: IntArray, kv: IntArray) -> IntArray:
        """Edges between the first `q` queries and the first `kv` keys."""
        low, high = np.minimum(q, kv), np.maximum(q, kv)
        last = (np.searchsorted(self.bounds, low, side="right") - 1).clip(max=len(self.bounds) - 2)
        start, stop = self.bounds[last], self.bounds[last + 1]
        squares = np.concatenate(([0], np.cumsum(np.diff(self.bounds) ** 2)))
        edges: IntArray = squares[last] + (low - start) * (np.minimum(high, stop) - start)
        return edges

    def _predicate(self, shape: Shape) -> Expr | None:
        return Table(self._owner, (_Q,)).eq(Table(self._owner, (_KV,)))

    @cached_property
    def _owner(self) -> Captured:
        sizes = np.diff(self.bounds)
        return Captured(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), "document")


def documents(
    lengths: Sequence[int] | IntArray | None = None, *, cu_seqlens: Sequence[int] | IntArray | None = None
) -> Mask:
    """Block-diagonal over documents: tokens attend within their own.

    Args:
        lengths: The length of each document.
        cu_seqlens: Or where they begin, `[0, …, total]`.

    Raises:
        MaskError: Both or neither given, a negative length, or bounds that do not begin at 0 or that decrease.
    """
    if (lengths is None) == (cu_seqlens is None):
        raise MaskError("documents: give either lengths or cu_seqlens")
    if cu_seqlens is None:
        sizes = int_array(lengths, "documents", "lengths")
        if len(sizes) and sizes.min() < 0:
            at = int(np.argmin(sizes))
            raise MaskError(f"documents: length {at} is {sizes[at]}; lengths must be ≥ 0")
        bounds = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
    else:
        bounds = int_array(cu_seqlens, "documents", "cu_seqlens")
        if not len(bounds) or bounds[0] != 0:
            raise MaskError(f"documents: cu_seqlens must begin at 0, and begins {bounds[:3].tolist()}")
        if (np.diff(bounds) < 0).any():
            at = int(np.argmax(np.diff(bounds) < 0))
            raise MaskError(f"documents: cu_seqlens decreases from {bounds[at]} to {bounds[at + 1]} at entry {at + 1}")
    bounds = np.unique(bounds)
    if bounds[-1] == 0:
        raise MaskError("documents: there are no tokens; give at least one length ≥ 1")
    return Documents(bounds)


@dataclass(frozen=True, eq=False, repr=False)
class DilatedBlocks(Mask):
    """Every `dilation`-th token of a block attends every `dilation`-th token of the same block."""

    block: int
    dilation: int

    def _text(self, show: Callable[[object], str]) -> str:
        return call_text(show, "dilated_2d", self.block, self.dilation)

    def _nnz_bound(self, shape: Shape) -> int:
        in_block = -(-self.block // self.dilation)
        return -(-shape[0] // self.block) * in_block**2

    def _transpose(self, shape: Shape | None) -> Mask | None:
        return self

    def _row_weight(self, shape: Shape) -> float:
        return 1.0

    def _rows(self, shape: Shape, start: int, stop: int) -> RowRanges:
        q = np.arange(start, stop, dtype=np.int64)
        q = q[(q % self.block) % self.dilation == 0]
        first = q // self.block * self.block
        last = np.minimum(first + self.block, shape[1])
        step = np.full_like(q, self.dilation)
        return ranges.from_rows(stop - start, q - start, first, last, step, is_sorted=True)

    def _predicate(self, shape: Shape) -> Expr | None:
        same = (_Q // self.block).eq(_KV // self.block)
        if self.dilation == 1:
            return same
        return same & (_Q % self.block % self.dilation).eq(0) & (_KV % self.block % self.dilation).eq(0)


def dilated_2d(block: int, dilation: int) -> Mask:
    """Same diagonal block, and both `q % block` and `kv % block` multiples of `dilation`; other rows are empty."""
    block = checked_int(block, "dilated_2d", "block")
    return DilatedBlocks(block, min(block, checked_int(dilation, "dilated_2d", "dilation")))
