"""What a mask looks like: the facts that choosing and costing a kernel needs.

This file decides which facts those are and how each is had cheaply: in closed form for a translation-invariant mask,
exactly where the ranges and tiles are few enough, and from a stated sample of rows otherwise. It must not know what
follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparsec.analysis.fill import FILL_BLOCKS, TileFill, toeplitz_fill
from sparsec.analysis.sampling import UNIT, Run, n_units, sample_runs, units_of
from sparsec.errors import MaskError
from sparsec.masks import ranges
from sparsec.masks.mask import BoundMask, Mask
from sparsec.masks.ranges import IntArray, RowRanges
from sparsec.masks.tilemap import TileMap

# Work (see `_work`) before a sample has to do: 0.2 to 0.4 s on one core.
_WORK_LIMIT = 3_000_000

# The work is judged by this many units.
_PROBES = 8

# Heavy rows and columns are counted always, named up to here.
_HEAVY_LISTED = 4096

# Keys a range must hold before its step counts as a habit of the mask: any two keys are a progression.
_HABIT_KEYS = 4


@dataclass(frozen=True, slots=True)
class DegreeStats:
    """Keys a query, or queries a key.

    Attributes:
        mean: Over all rows, empty ones included.
        max: The largest.
        cv: Coefficient of variation, the standard deviation over the mean; 0 for an empty mask.
        n_empty: Rows without an edge.
        n_heavy: Rows of more than `max(8 * mean, 512)` edges.
        heavy: The first of those, by index.
    """

    mean: float
    max: int
    cv: float
    n_empty: int
    n_heavy: int
    heavy: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MaskProfile:
    """A mask's shape as a graph.

    Attributes:
        shape: `(q_len, kv_len)` in tokens.
        nnz: Edges, exact.
        density: `nnz / (q_len * kv_len)`.
        q: Keys of each query, exact.
        kv: Queries of each key, exact.
        tiles: Tile counts and fill at each size of `FILL_BLOCKS`.
        bandwidth_max: The largest `|kv - q * kv_len / q_len|` over the edges, in tokens.
        bandwidth_mean: The mean of that.
        period: For a translation-invariant mask the greatest common divisor of its offsets, which is the number of
            residue classes that do not attend each other; otherwise 1.
        common_step: The step > 1 by which most of the edges progress along their rows, or 1.
        keys_per_range: Keys in an arithmetic progression of a row, on average; near 1 where edges are scattered.
        is_toeplitz: Whether the mask depends on `kv - q` alone.
        sampled: The share of the rows that tiles, bandwidth and steps were taken from; None when that was all.
    """

    shape: tuple[int, int]
    nnz: int
    density: float
    q: DegreeStats
    kv: DegreeStats
    tiles: tuple[TileFill, ...]
    bandwidth_max: float
    bandwidth_mean: float
    period: int
    common_step: int
    keys_per_range: float
    is_toeplitz: bool
    sampled: float | None

    def fill(self, block: int) -> TileFill:
        """The tile count and fill at `block`, one of `FILL_BLOCKS`."""
        return self.tiles[FILL_BLOCKS.index(block)]


def analyse(mask: Mask | BoundMask, seq_len: int | tuple[int, int] | None = None) -> MaskProfile:
    """The profile of a mask. Deterministic.

    Args:
        mask: A mask, or one with its lengths.
        seq_len: The length, or `(q_len, kv_len)`; may be left out where the mask knows.

    Raises:
        MaskError: The lengths do not fit, or the mask differs by head or batch element (analyse one of them:
            `bound.select(batch, head)`).
    """
    if isinstance(mask, BoundMask):
        bound = mask
    else:
        if not isinstance(mask, Mask):
            raise MaskError(f"analyse takes a mask of sparsec.masks; got {type(mask).__name__}")
        q_len, kv_len = seq_len if isinstance(seq_len, tuple) else (seq_len, None)
        bound = mask.bind(q_len, kv_len)
    offsets = bound.offsets
    # Degrees first: where the mask is known by its rows alone, they give the number of edges as well.
    rows = _degree_stats(bound.degrees("q"))
    nnz = bound.nnz
    columns = _degree_stats(bound.degrees("kv"))
    looked = _look_at_offsets(bound, offsets) if offsets is not None else _look_at_rows(bound, rows.heavy)
    return MaskProfile(
        shape=bound.shape,
        nnz=nnz,
        density=nnz / (bound.q_len * bound.kv_len),
        q=rows,
        kv=columns,
        tiles=looked.tiles,
        bandwidth_max=looked.bandwidth_max,
        bandwidth_mean=looked.bandwidth_mean,
        period=1 if offsets is None else _common_divisor(offsets),
        common_step=looked.steps.commonest(),
        keys_per_range=looked.steps.keys_per_range(),
        is_toeplitz=offsets is not None,
        sampled=looked.sampled,
    )


@dataclass(frozen=True, slots=True)
class _Look:
    """What is not had from degrees."""

    tiles: tuple[TileFill, ...]
    bandwidth_max: float
    bandwidth_mean: float
    steps: _Steps
    sampled: float | None


def _degree_stats(degrees: IntArray) -> DegreeStats:
    mean = float(degrees.mean())
    heavy = np.flatnonzero(degrees > max(8.0 * mean, 512.0))
    return DegreeStats(
        mean=mean,
        max=int(degrees.max()),
        cv=float(degrees.std()) / mean if mean else 0.0,
        n_empty=int((degrees == 0).sum()),
        n_heavy=len(heavy),
        heavy=tuple(heavy[:_HEAVY_LISTED].tolist()),
    )


def _common_divisor(offsets: RowRanges) -> int:
    """The greatest common divisor of all offsets; 1 when there is none."""
    several = ranges.lengths(offsets) > 1
    return max(1, math.gcd(*offsets.start.tolist(), *offsets.step[several].tolist()))


def _look_at_offsets(bound: BoundMask, offsets: RowRanges) -> _Look:
    tiles = tuple(toeplitz_fill(bound.shape, offsets, block) for block in FILL_BLOCKS)
    steps = _Steps()
    steps.add(offsets)
    if bound.q_len == bound.kv_len:
        span = _Span()
        for start, stop, step in zip(offsets.start, offsets.stop, offsets.step, strict=True):
            offset = np.arange(start, stop, step)
            span.add_distances(np.abs(offset).astype(np.float64), bound.q_len - np.abs(offset))
        return _Look(tiles, span.max, span.mean, steps, None)
    return _look_at_ranges(bound, tiles, steps)


def _look_at_ranges(bound: BoundMask, tiles: tuple[TileFill, ...], steps: _Steps) -> _Look:
    """The bandwidth from rows alone: of a translation-invariant mask that is not square."""
    ranges_per_unit = max(len(bound.rows(0, min(UNIT, bound.q_len)).start), UNIT)
    runs = sample_runs(n_units(bound), _WORK_LIMIT // ranges_per_unit)
    span = _Span()
    for run in runs:
        start, stop = run.rows(bound)
        span.add_rows(bound.rows(start, stop), start, bound.kv_len / bound.q_len, run.weight)
    return _Look(tiles, span.max, span.mean, steps, _share(runs, bound))


def _look_at_rows(bound: BoundMask, heavy: tuple[int, ...]) -> _Look:
    """Tiles, bandwidth and steps from all rows where they are few enough, else from evenly spread runs of them."""
    total = n_units(bound)
    probes = sample_runs(total, _PROBES)
    work_per_unit = max(sum(_work(bound, run) for run in probes) / sum(run.length for run in probes), 1.0)
    # Heavy rows hold tiles out of proportion to their number: where they are few, each is looked at.
    runs = sample_runs(total, int(_WORK_LIMIT / work_per_unit), units_of(heavy))
    span, steps, fills = _Span(), _Steps(), _Fills(bound)
    for run in _chunked(runs, max(1, int(_WORK_LIMIT / 8 / work_per_unit))):
        start, stop = run.rows(bound)
        rows = bound.rows(start, stop)
        span.add_rows(rows, start, bound.kv_len / bound.q_len, run.weight)
        steps.add(rows, run.weight)
        fills.add(run)
    return _Look(fills.total(), span.max, span.mean, steps, _share(runs, bound))


def _work(bound: BoundMask, run: Run) -> int:
    """Ranges and smallest tiles in a run; a progression is followed from tile to tile, an interval is not."""
    block = FILL_BLOCKS[0]
    rows = bound.rows(*run.rows(bound))
    followed = np.minimum(ranges.lengths(rows), (rows.stop - rows.start) // block + 1)
    steps = int(np.where(rows.step > 1, followed, 1).sum())
    return steps + bound.tiles(block, block, run.tile_rows(bound, block)).n_tiles


def _share(runs: list[Run], bound: BoundMask) -> float | None:
    """The share of the rows in `runs`, None for all."""
    looked = sum(run.length for run in runs)
    return None if looked == n_units(bound) else looked / n_units(bound)


def _chunked(runs: list[Run], length: int) -> Iterator[Run]:
    for run in runs:
        for start in range(run.first, run.last, length):
            yield Run(start, min(start + length, run.last), run.weight)


class _Span:
    """The distances of edges from the diagonal, as they are added."""

    def __init__(self) -> None:
        self.max = 0.0
        self._sum = 0.0
        self._edges = 0.0

    @property
    def mean(self) -> float:
        return self._sum / self._edges if self._edges else 0.0

    def add_distances(self, distance: np.ndarray[tuple[int], np.dtype[np.float64]], edges: IntArray) -> None:
        if len(distance):
            self.max = max(self.max, float(distance.max()))
            self._sum += float((distance * edges).sum())
            self._edges += float(edges.sum())

    def add_rows(self, rows: RowRanges, first_row: int, keys_per_query: float, weight: float) -> None:
        if not len(rows.start):
            return
        row = np.repeat(np.arange(first_row, first_row + rows.n_rows), np.diff(rows.indptr))
        centre = row * keys_per_query
        start, step = rows.start.astype(np.float64), rows.step.astype(np.float64)
        last = (rows.stop - 1).astype(np.float64)
        self.max = max(self.max, float(np.maximum(np.abs(start - centre), np.abs(last - centre)).max()))
        # The sum of |key - centre| over a progression: its keys left of the centre, then the others.
        keys = ranges.lengths(rows).astype(np.float64)
        left = np.ceil((centre - start) / step).clip(0.0, keys)
        left_sum = left * start + step * left * (left - 1.0) / 2.0
        all_sum = keys * start + step * keys * (keys - 1.0) / 2.0
        distance = left * centre - left_sum + (all_sum - left_sum) - (keys - left) * centre
        self._sum += float(distance.sum()) * weight
        self._edges += float(keys.sum()) * weight


class _Steps:
    """Edges by the step of their range, and ranges, as they are added."""

    def __init__(self) -> None:
        self._edges: dict[int, float] = {}
        self._n_ranges = 0.0

    def add(self, rows: RowRanges, weight: float = 1.0) -> None:
        self._n_ranges += len(rows.start) * weight
        keys = ranges.lengths(rows)
        step = np.where(keys >= _HABIT_KEYS, rows.step, 1)
        steps, which = np.unique(step, return_inverse=True)
        edges = np.bincount(which, weights=keys, minlength=len(steps))
        for each, count in zip(steps.tolist(), edges.tolist(), strict=True):
            self._edges[each] = self._edges.get(each, 0.0) + count * weight

    def keys_per_range(self) -> float:
        return sum(self._edges.values()) / max(self._n_ranges, 1.0)

    def commonest(self) -> int:
        """The step of at least half of the edges, or 1."""
        if not self._edges:
            return 1
        step, edges = max(self._edges.items(), key=lambda item: item[1])
        return step if 2 * edges >= sum(self._edges.values()) else 1


class _Fills:
    """Tiles of all sizes, counted from the smallest as runs of rows are added."""

    def __init__(self, bound: BoundMask) -> None:
        self._bound = bound
        self._n_tiles = dict.fromkeys(FILL_BLOCKS, 0.0)
        self._n_full = dict.fromkeys(FILL_BLOCKS, 0.0)
        self._edges = 0.0

    def add(self, run: Run) -> None:
        block = FILL_BLOCKS[0]
        tiles = self._bound.tiles(block, block, run.tile_rows(self._bound, block))
        row, column, count = _tile_coordinates(tiles)
        self._edges += float(count.sum()) * run.weight
        for block in FILL_BLOCKS:
            if block > FILL_BLOCKS[0]:
                row, column, count = _coarsened(row, column, count, -(-self._bound.kv_len // block))
            is_full = count == _tile_area(self._bound.shape, block, row, column)
            self._n_tiles[block] += len(count) * run.weight
            self._n_full[block] += int(is_full.sum()) * run.weight

    def total(self) -> tuple[TileFill, ...]:
        return tuple(
            TileFill(
                block=block,
                n_tiles=round(self._n_tiles[block]),
                n_full=round(self._n_full[block]),
                fill=self._edges / max(self._n_tiles[block] * block * block, 1.0),
            )
            for block in FILL_BLOCKS
        )


def _tile_coordinates(tiles: TileMap) -> tuple[IntArray, IntArray, IntArray]:
    row = np.repeat(np.arange(len(tiles.indptr) - 1), np.diff(tiles.indptr))
    return row, tiles.indices.astype(np.int64), tiles.count.astype(np.int64)


def _coarsened(row: IntArray, column: IntArray, count: IntArray, n_columns: int) -> tuple[IntArray, IntArray, IntArray]:
    """Tiles of twice the size, from those of one size."""
    key = (row >> 1) * n_columns + (column >> 1)
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1]))) if len(key) else np.zeros(0, np.int64)
    total = np.add.reduceat(count[order], first) if len(key) else count
    row, column = np.divmod(key[first], n_columns)
    return row, column, total


def _tile_area(shape: tuple[int, int], block: int, row: IntArray, column: IntArray) -> IntArray:
    """Pairs of each tile that lie inside `shape`."""
    return np.minimum(block, shape[0] - row * block) * np.minimum(block, shape[1] - column * block)
