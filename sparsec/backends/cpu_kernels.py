"""Calling the CPU kernels: the binary interface, and what a launch becomes when its binary is loaded.

This file decides how index arrays and tensors are handed over through ctypes (`Arguments`, mirrored in
`templates/shared/arguments.hpp`), how the backward pass is divided among threads, and which OpenMP runtime carries the
threads: the one torch has loaded, so that there is one pool of them. It must not know how binaries are made.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from sparsec import buffers
from sparsec.backends.base import MAX_HEADS_SHARING, Launch
from sparsec.expr import Table, Var
from sparsec.layout import RowLists

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_ROW_FORMS: Final = {"edges": 0, "ranges": 1, "offsets": 2}

# dK and dV rows are padded to the widest vector.
_PADDING = 16
# Runs of query blocks a (batch element, key head) is cut into at most, each with its own fp32 dK and dV.
_MAX_PARTS = 64


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
    ]


def _int64s(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names.split()]


def _pointers(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


class Arguments(ctypes.Structure):
    """`sx::Arguments`, field by field; every field is eight bytes wide."""

    _fields_ = [
        *[(name, _Tensor) for name in ("q", "k", "v", "out")],
        *_pointers("lse"),
        *_int64s("lse_batch lse_head batch q_heads kv_heads q_len kv_len head_dim v_dim"),
        *_pointers("heads"),
        *_int64s("n_heads heads_sharing"),
        ("scale", ctypes.c_double),
        *_int64s("first_batch first_query"),
        *_pointers("tables"),
        *_int64s("out_is_fp32 block_q block_kv"),
        *_pointers("tile_indptr tile_columns tile_pattern patterns gathered_indptr gathered_columns gathered_lanes"),
        *_int64s("row_form"),
        *_pointers("row_indptr row_start row_stop row_step"),
        *_int64s("n_offsets"),
        *_pointers("offset_start offset_stop offset_step q_order kv_order"),
        *_int64s("n_items"),
        *_pointers("item_unit item_slot tile_start tile_stop column_start column_stop edge_start edge_stop"),
        *_int64s("n_merges n_slots"),
        *_pointers("merge_unit merge_indptr partial"),
        *[(name, _Tensor) for name in ("d_out", "dq", "dk", "dv")],
        *_pointers("d_lse"),
        *_int64s("d_lse_batch d_lse_head dk_part dv_part n_kv_groups n_parts"),
        *_pointers("kv_group_indptr part_indptr table_gradients table_gradient_pitch"),
        *_pointers("row_edges tile_edges gathered_edge_indptr gathered_edges parallel"),
        *_int64s("threads"),
    ]


class _Prepared:
    """The index arrays of a launch in the form the binary takes, kept alive."""

    def __init__(self, launch: Launch, library: ctypes.CDLL, sources: tuple[Path, ...]) -> None:
        self.launch = launch
        self._library, self._sources = library, sources
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._arguments = Arguments()
        self._fill()
        self._is_whole_batch = launch.batch == tuple(range(launch.problem.batch))

    def rebound(self, launch: Launch) -> Self:
        return type(self)(launch, self._library, self._sources)

    def source(self) -> dict[str, str]:
        generated = {} if self.launch.score is None else {"score modifier": self.launch.score.cpp_header()}
        return {path.name: path.read_text() for path in self._sources} | generated

    def _batches(self) -> list[slice]:
        """The batch elements to serve: all at once, or one at a time."""
        return [slice(0, None)] if self._is_whole_batch else [slice(b, b + 1) for b in self.launch.batch]

    def _tables(self, live: Sequence[torch.Tensor]) -> np.ndarray[Any, Any]:
        """Addresses of the score modifier's arrays, those of a call among those that are kept; to be kept alive."""
        addresses = self._table_addresses
        if not live:
            return addresses
        filled = addresses.copy()
        for place, table in zip(self._live_places, live, strict=True):
            assert table.is_contiguous(), "a live table is contiguous"
            assert str(table.dtype) == "torch.float32", f"a live table is fp32, not {table.dtype}"
            filled[place] = table.data_ptr()
        return filled

    def _prepared(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        tables: np.ndarray[Any, Any],
    ) -> Arguments:
        """A copy of the arguments for these tensors: two threads may call one kernel."""
        import torch

        a = Arguments.from_buffer_copy(self._arguments)
        a.tables = tables.ctypes.data if len(tables) > 1 else None
        a.q, a.k, a.v, a.out = _tensor(q), _tensor(k), _tensor(v), _tensor(out)
        a.batch, a.kv_len = q.shape[0], k.shape[2]
        if lse is not None:
            a.lse, a.lse_batch, a.lse_head = lse.data_ptr(), lse.stride(0), lse.stride(1)
        a.threads, a.parallel = torch.get_num_threads(), openmp_parallel()
        return a

    def _fill(self) -> None:
        launch, a = self.launch, self._arguments
        problem, work = launch.problem, launch.work
        a.q_heads, a.kv_heads = problem.q_heads, problem.kv_heads
        a.q_len, a.head_dim, a.v_dim = work.bound.q_len, problem.head_dim, problem.v_dim
        a.heads, a.n_heads = self._pointer(np.array(launch.heads, np.int32)), len(launch.heads)
        a.heads_sharing = heads_sharing(launch.heads, problem.group)
        a.scale, a.out_is_fp32 = launch.scale, int(launch.is_partial)
        a.first_query = launch.first_query
        a.block_q = work.block_q
        a.q_order, a.kv_order = self._pointer(work.ordering.q_order), self._pointer(work.ordering.kv_order)
        tables = () if launch.score is None else launch.score.tables
        self._live_places = [place for place, table in enumerate(tables) if table.is_live]
        addresses = [0 if table.is_live else self._pointer(table.array) for table in tables]
        self._table_addresses = np.array([*addresses, 0], np.uintp)
        schedule = work.schedule
        a.n_items, a.n_merges, a.n_slots = schedule.n_items, len(schedule.merge_unit), schedule.n_slots
        a.item_unit, a.item_slot = self._pointer(schedule.unit), self._pointer(schedule.slot)
        a.merge_unit, a.merge_indptr = self._pointer(schedule.merge_unit), self._pointer(schedule.merge_indptr)
        if work.tiles is not None:
            tiles = work.tiles
            a.block_kv = tiles.tile_map.block_kv
            a.tile_indptr = self._pointer(tiles.tile_map.indptr)
            a.tile_columns = self._pointer(tiles.tile_map.indices)
            a.tile_pattern = self._pointer(tiles.patterns.index)
            a.patterns = self._pointer(tiles.lane_masks())
        if work.gathered is not None:
            a.gathered_indptr = self._pointer(work.gathered.indptr)
            a.gathered_columns = self._pointer(work.gathered.columns)
            a.gathered_lanes = self._pointer(work.gathered.lanes)
        if work.rows is not None:
            self._fill_rows(work.rows)
        if work.numbers is not None:
            a.row_edges = self._pointer(work.numbers.rows)
            a.tile_edges = self._pointer(work.numbers.tiles)
            a.gathered_edge_indptr = self._pointer(work.numbers.gathered_indptr)
            a.gathered_edges = self._pointer(work.numbers.gathered)
        if work.items is not None:
            for name in ("tile_start", "tile_stop", "column_start", "column_stop", "edge_start", "edge_stop"):
                setattr(a, name, self._pointer(getattr(work.items, name)))
        elif work.tiles is not None:
            a.tile_start, a.tile_stop = self._pointer(schedule.start), self._pointer(schedule.stop)
        else:
            a.edge_start, a.edge_stop = self._pointer(schedule.start), self._pointer(schedule.stop)

    def _fill_rows(self, rows: RowLists) -> None:
        a = self._arguments
        a.row_form = _ROW_FORMS[rows.form]
        a.row_indptr = self._pointer(rows.indptr)
        if rows.form == "edges":
            a.row_start = self._pointer(rows.columns)
        elif rows.form == "ranges":
            a.row_start, a.row_stop, a.row_step = (self._pointer(x) for x in (rows.start, rows.stop, rows.step))
        else:
            a.n_offsets = len(rows.start)
            a.offset_start, a.offset_stop, a.offset_step = (
                self._pointer(x) for x in (rows.start, rows.stop, rows.step)
            )

    def _pointer(self, array: np.ndarray[Any, Any] | None) -> int | None:
        """The address of an array, which is kept alive and contiguous."""
        if array is None:
            return None
        kept = np.ascontiguousarray(array)
        self._arrays.append(kept)
        return int(kept.ctypes.data)


def heads_sharing(heads: tuple[int, ...], group: int) -> int:
    """How many neighbours of `heads` the row kernel runs side by side: runs of so many share a key head."""
    runs = [len(list(run)) for _, run in itertools.groupby(heads, lambda head: head // group)]
    common = math.gcd(*runs)
    return max(n for n in range(1, MAX_HEADS_SHARING + 1) if common % n == 0)


class CpuKernel(_Prepared):
    """A forward kernel bound to one launch."""

    def __init__(self, launch: Launch, library: ctypes.CDLL, sources: tuple[Path, ...]) -> None:
        super().__init__(launch, library, sources)
        self._run = library.forward
        self._run.argtypes, self._run.restype = [ctypes.POINTER(Arguments)], None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays) + self._partial_words(len(self.launch.batch)) * 4

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        tables: Sequence[torch.Tensor] = (),
    ) -> None:
        addresses = self._tables(tables)
        for b in self._batches():
            a = self._prepared(q[b], k[b], v[b], out[b], None if lse is None else lse[b], addresses)
            a.first_batch = b.start
            partial = np.empty(self._partial_words(a.batch), np.float32)
            a.partial = partial.ctypes.data
            self._run(ctypes.byref(a))

    def _partial_words(self, batch: int) -> int:
        launch = self.launch
        slots = launch.work.schedule.n_slots * batch * len(launch.heads)
        return slots * (launch.problem.v_dim + 2) * launch.work.block_q


class CpuGradient(_Prepared):
    """A backward kernel bound to one launch."""

    def __init__(self, launch: Launch, library: ctypes.CDLL, sources: tuple[Path, ...]) -> None:
        super().__init__(launch, library, sources)
        self._run = library.backward
        self._run.argtypes, self._run.restype = [ctypes.POINTER(Arguments)], None
        group = launch.problem.q_heads // launch.problem.kv_heads
        heads = np.sort(np.array(launch.heads, np.int32))
        cuts = np.flatnonzero(np.diff(heads // group)) + 1
        indptr = np.concatenate(([0], cuts, [len(heads)])).astype(np.int64)
        a = self._arguments
        a.heads, a.kv_group_indptr, a.n_kv_groups = self._pointer(heads), self._pointer(indptr), len(indptr) - 1

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

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
        addresses = self._tables(tables)
        for b in self._batches():
            a = self._prepared(q[b], k[b], v[b], out[b], lse[b], addresses)
            a.first_batch = b.start
            a.d_out, a.dq = _tensor(d_out[b]), _tensor(dq[b])
            if d_lse is not None:
                a.d_lse, a.d_lse_batch, a.d_lse_head = d_lse[b].data_ptr(), d_lse.stride(0), d_lse.stride(1)
            n_parts = self._n_parts(a.batch * a.n_kv_groups, a.threads)
            parts = self._part_indptr(n_parts)
            a.n_parts, a.part_indptr = n_parts, parts.ctypes.data
            dk_sums, dv_sums = (_sums(n_parts, total[b]) for total in (dk, dv))
            a.dk, a.dv = _tensor(dk_sums[0]), _tensor(dv_sums[0])
            a.dk_part, a.dv_part = dk_sums.stride(0), dv_sums.stride(0)
            table_sums = self._table_sums(a, d_tables)
            sum_addresses = np.array([0 if t is None else t.data_ptr() for t in table_sums], np.uintp)
            pitches = np.array([[0] * 3 if t is None else _pitches(t) for t in table_sums], np.int64)
            if any(address for address in sum_addresses):
                a.table_gradients, a.table_gradient_pitch = sum_addresses.ctypes.data, pitches.ctypes.data
            self._run(ctypes.byref(a))
            # Parts are added in their order, whichever thread made them.
            for total, copies in zip(d_tables, table_sums, strict=True):
                if total is not None and copies is not None:
                    total += copies.sum((0, 1, 2))
            for sums, total in ((dk_sums, dk[b]), (dv_sums, dv[b])):
                if sums.data_ptr() != total.data_ptr():
                    for part in sums[1:]:
                        sums[0] += part
                    total += sums[0, ..., : total.shape[3]]

    def _table_sums(self, a: Arguments, d_tables: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """fp32 zeros `[parts, batch, groups of key heads, *table]` for the gradient of each live table.

        A dimension of copies is 1 where the table's own dimensions keep the shares apart: those that are indexed by the
        head, the batch element, or the query or edge (parts are runs of queries).
        """
        import torch

        score = self.launch.score
        found: list[torch.Tensor | None] = []
        for number, d_table in enumerate(d_tables):
            assert score is not None, "gradients of tables without a score modifier"
            if d_table is None:
                found.append(None)
                continue
            look_ups = [node for at, node, _ in score.look_ups if at == number]
            shares = (
                (a.n_parts, {"q_idx": a.q_len, "edge": 0}),
                (a.batch, {"b": a.first_batch + a.batch}),
                (a.n_kv_groups, {"h": a.q_heads}),
            )
            copies = [1 if _keeps_apart(look_ups, names) else n for n, names in shares]
            found.append(torch.zeros(*copies, *d_table.shape, dtype=torch.float32, device=d_table.device))
        return found

    def _n_parts(self, shares: int, threads: int) -> int:
        """Runs of query blocks a share is cut into, so that the threads are evenly busy."""
        n_units = -(-self.launch.work.bound.q_len // self.launch.work.block_q)
        even = next((parts for parts in range(1, threads + 1) if shares * parts % threads == 0), threads)
        wanted = 1 if shares >= 4 * threads else even
        return max(1, min(wanted, n_units, _MAX_PARTS))

    def _part_indptr(self, n_parts: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Boundaries of `n_parts` runs of units of even cost."""
        schedule = self.launch.work.schedule
        n_units = -(-self.launch.work.bound.q_len // self.launch.work.block_q)
        cost = np.bincount(schedule.unit, weights=schedule.cost, minlength=n_units)
        before = np.concatenate(([0.0], np.cumsum(cost)))
        inner = np.searchsorted(before, before[-1] * np.arange(1, n_parts) / n_parts)
        return np.concatenate(([0], inner, [n_units])).astype(np.int64)


def _keeps_apart(look_ups: Sequence[Table], extents: Mapping[str, int]) -> bool:
    """Whether one dimension of a table, long enough, is indexed in every look-up by one of these variables alone."""
    return any(
        all(node.args[d] == Var(name) and node.captured.shape[d] >= extent for node in look_ups)
        for d in range(len(look_ups[0].args))
        for name, extent in extents.items()
    )


def _pitches(copies: torch.Tensor) -> list[int]:
    """How far apart copies are, in numbers; 0 in a dimension that has one."""
    return [stride if n > 1 else 0 for n, stride in zip(copies.shape[:3], copies.stride()[:3], strict=True)]


def _tensor(t: torch.Tensor) -> _Tensor:
    return _Tensor(t.data_ptr(), *t.stride()[:3])


def _sums(n_parts: int, total: torch.Tensor) -> torch.Tensor:
    """What a kernel adds to, `[n_parts, batch, kv_heads, kv_len, dimension]` in fp32, the last padded to whole vectors.

    The total itself where it has that form; else zeros, to be added to it.
    """
    import torch

    padded = -(-total.shape[3] // _PADDING) * _PADDING
    if n_parts == 1 and padded == total.shape[3] and total.is_contiguous():
        return total.unsqueeze(0)
    return buffers.zeros((n_parts, *total.shape[:3], padded), torch.float32, total.device)


@cache
def openmp_parallel() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP runtime torch has loaded; None where it has none (one thread)."""
    import torch

    beside_torch = str(Path(torch.__file__).parent)
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    names = ("libgomp", "libiomp5", "libomp")
    runtimes = [path for path in loaded if Path(path).name.startswith(names)]
    for path in sorted(runtimes, key=lambda path: not path.startswith(beside_torch)):
        function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value
    logger.warning("torch has loaded no OpenMP runtime; sparsec's CPU kernels run on one thread")
    return None
