"""What a launch of tiles asks of the CUDA kernels: geometry, shared memory, arguments, what they are specialised on.

This file decides how many keys go at a time and how many stages of them are held, so that they fit the device, and how
the arguments of `templates/shared/tiles.cuh` are laid out in memory. It must not know how kernels are compiled or run,
and imports neither torch nor cuda.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from sparsec.backends.base import Launch
from sparsec.backends.cuda_calls import (
    FORWARD_FIELDS,
    JOIN_THREADS,
    LOG2_E,
    WARP,
    Array,
    Program,
    element_types,
    packed_heads,
    with_score,
)
from sparsec.backends.cuda_printed import MASK_HEADER, MAX_TABLES, PrintedPredicate, printed_predicate
from sparsec.backends.tile_lists import tile_arrays

_MATRIX: Final = 16
# Of a step: the words of a pattern hold so many keys.
_MOST_KEYS: Final = 64
# Registers of a thread for sums and scores; fragments, addresses and peaks take the rest of 255.
_REGISTERS: Final = 150
# Of those, what a second 16 rows of a warp need beside sums and scores where columns are gathered.
_SECOND_ROWS: Final = 24
# kHoldsQueries: what of queries, sums and scores a thread holds at most.
_HELD: Final = 160
# Two warps for each of a multiprocessor's four schedulers.
_LEAST_WARPS: Final = 8
# Shared memory that the system keeps of each block.
_KEPT_BYTES: Final = 1024
# Single edges that a team has in flight.
_SINGLES: Final = 4
# Rows that a block of `merge` joins: kMergeWarps.
_MERGED_ROWS: Final = JOIN_THREADS // WARP


@dataclass(frozen=True, slots=True)
class TileShape:
    """How a launch's rows and keys are cut; follows from launch and device alone.

    Attributes:
        pack: Query heads packed into the rows of a block.
        rows: Of a block: queries times heads.
        warps: Of a block.
        step_kv: Keys that go to the matrix units at a time.
        stages: Steps whose keys are in shared memory: the one at hand, and those on their way.
        shared_bytes: Of a block.
    """

    pack: int
    rows: int
    warps: int
    step_kv: int
    stages: int
    shared_bytes: int


def tile_shape(launch: Launch) -> TileShape:
    """The shape of a launch's kernel: what the configuration says, cut until it fits registers and shared memory."""
    config, pack = launch.config, packed_heads(launch)
    rows, stages = config["block_q"] * pack, config["num_stages"]
    step = min(config["block_kv"], config["step_kv"], _MOST_KEYS)
    if config["warp_rows"] == 2 * _MATRIX <= rows:
        shape = _fitted(launch, TileShape(pack, rows, rows // (2 * _MATRIX), step, stages, 0))
        if _is_worth_it(launch, shape, step):
            return shape
    return _fitted(launch, TileShape(pack, rows, rows // _MATRIX, step, stages, 0))


def _is_worth_it(launch: Launch, shape: TileShape, step: int) -> bool:
    """Whether warps of 32 rows are: each reads a step's keys and values from shared memory once, not once for 16 rows.

    They are not where their queries would be read again instead, for want of registers, nor where so few of them fit a
    multiprocessor that nobody works while others wait. A score modifier has the registers of the second 16 rows.
    """
    problem, device = launch.problem, launch.device
    # A thread holds of its warp half a row's sums and scores for each 16 rows, and a quarter of its queries.
    held = 2 * (padded(problem.v_dim) // 2 + step // 2 + padded(problem.head_dim) // 4)
    blocks = (device.shared_bytes_per_block + _KEPT_BYTES) // (shape.shared_bytes + _KEPT_BYTES)
    return launch.score is None and held <= _HELD and blocks * shape.warps >= _LEAST_WARPS


def _fitted(launch: Launch, shape: TileShape) -> TileShape:
    """The shape with so few keys at a time, and so few stages, that it fits registers and shared memory."""
    parts = shape.rows // shape.warps // _MATRIX
    most = _REGISTERS - (_SECOND_ROWS * (parts - 1) if launch.template.layout == "hybrid" else 0)
    while parts * (padded(launch.problem.v_dim) + shape.step_kv) // 2 > most and shape.step_kv > _MATRIX:
        shape = replace(shape, step_kv=shape.step_kv // 2)
    while shared_bytes(launch, shape) > launch.device.shared_bytes_per_block and (
        shape.stages > 2 or shape.step_kv > _MATRIX
    ):
        if shape.stages > 2:
            shape = replace(shape, stages=shape.stages - 1)
        else:
            shape = replace(shape, step_kv=shape.step_kv // 2)
    return replace(shape, shared_bytes=shared_bytes(launch, shape))


def shared_bytes(launch: Launch, shape: TileShape) -> int:
    """Shared memory of a block: its queries and the stages, or in the end its output."""
    problem = launch.problem
    k_row, v_row = staged_row_bytes(problem.head_dim), staged_row_bytes(problem.v_dim)
    a_key = k_row + v_row + (8 if launch.template.layout == "hybrid" else 0) + (0 if launch.score is None else 4)
    # Partial output, which is fp32, goes straight from the registers.
    out_row = 0 if launch.is_partial else padded(problem.v_dim) * problem.itemsize + 16
    # The states of single edges pass through it first.
    state_row = (problem.v_dim + 2) * 4 if launch.template.layout == "hybrid" else 0
    return max(shape.rows * k_row + shape.stages * shape.step_kv * a_key, shape.rows * max(out_row, state_row))


def padded(dim: int) -> int:
    """A dimension as matrix units take it."""
    return -(-dim // _MATRIX) * _MATRIX


def staged_row_bytes(dim: int) -> int:
    """`Staged::kRowBytes`: chunks of 16 bytes, as many as fill whole turns of the banks, or one more."""
    chunks = padded(dim) // 8
    return (chunks if chunks % 8 == 0 else chunks + 1) * 16


_POINTERS: Final = (
    *("item_unit", "item_slot", "item_tile", "item_full", "item_partial", "tile_column", "tile_pattern", "patterns"),
    *("item_column", "item_column_stop", "gathered_columns", "gathered_lanes"),
    *("item_edge", "item_edge_stop", "row_indptr", "row_first"),
    *("q_order", "kv_order", "batches", "heads", "merge_unit", "merge_indptr"),
)
_NUMBERS: Final = ("n_items", "n_slots", "n_merges", "n_heads", "abreast", "q_len", "kv_len", "group", "first_query")


class TileListsArgument(ctypes.Structure):
    """`TileLists` of shared/tiles.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int32) for name in _NUMBERS),
        ("tables", ctypes.c_void_p * MAX_TABLES),
    )


class TileArguments(ctypes.Structure):
    """`Arguments` of shared/tiles.cuh."""

    _fields_ = (("lists", TileListsArgument), *FORWARD_FIELDS, ("flip", ctypes.c_uint32))


@dataclass(frozen=True, slots=True)
class TileWalk:
    """The items of a launch and who takes them: one kernel's `TileLists`, but for the batch.

    Attributes:
        shape: Of the kernel.
        arrays: Index arrays by their name in `TileLists`; None where there is none.
        numbers: Its integers.
        n_copies: Entries of `heads`.
        predicate: What says which pairs of a partial tile are attended, instead of patterns; or None.
    """

    shape: TileShape
    arrays: Mapping[str, Array | None]
    numbers: Mapping[str, int]
    n_copies: int
    predicate: PrintedPredicate | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its index arrays."""
        return sum(array.nbytes for array in self.arrays.values() if array is not None)

    @property
    def n_states(self) -> int:
        """Rows whose states are held, for one batch element."""
        return self.numbers["n_slots"] * self.n_copies * self.shape.rows

    @property
    def merged_blocks(self) -> int:
        """Blocks of `merge` for one copy."""
        return self.numbers["n_merges"] * (self.shape.rows // _MERGED_ROWS)

    def arguments(self, addresses: Mapping[str, int | None]) -> TileListsArgument:
        """The structure, given where the arrays and the batch elements are."""
        made = TileListsArgument()
        for name in _POINTERS:
            setattr(made, name, addresses[name])
        for name in _NUMBERS:
            setattr(made, name, self.numbers[name])
        return made


def tile_walk(launch: Launch) -> TileWalk:
    """How a launch walks its tiles."""
    work, problem = launch.work, launch.problem
    assert work.tiles is not None, "matrix units walk tiles"
    schedule, shape = work.schedule, tile_shape(launch)
    firsts = launch.heads[:: shape.pack]
    items = work.items
    start, stop = (schedule.start, schedule.stop) if items is None else (items.tile_start, items.tile_stop)
    arrays: dict[str, Array | None] = {
        **dict.fromkeys(_POINTERS),
        **tile_arrays(work.tiles, start, stop),
        "item_unit": schedule.unit,
        "item_slot": schedule.slot,
        "q_order": work.ordering.q_order,
        "kv_order": work.ordering.kv_order,
        "heads": np.array(firsts, np.int32),
        "merge_unit": schedule.merge_unit,
        "merge_indptr": schedule.merge_indptr,
    }
    if items is not None:
        gathered, rows = work.gathered, work.rows
        assert gathered is not None, "a hybrid has gathered columns"
        assert rows is not None, "a hybrid has single edges"
        arrays |= {
            "item_column": items.column_start,
            "item_column_stop": items.column_stop,
            "gathered_columns": gathered.columns,
            "gathered_lanes": gathered.lanes.view(np.int64),
            "item_edge": items.edge_start,
            "item_edge_stop": items.edge_stop,
            "row_indptr": rows.indptr,
            "row_first": rows.columns,
        }
    # The batch elements are known when it is called.
    del arrays["batches"]
    predicate = None
    if launch.config.get("by_predicate", 0) == 1:
        predicate = printed_predicate(work.bound, 0 if launch.score is None else len(launch.score.tables))
    if predicate is not None:
        arrays |= {"tile_pattern": None, "patterns": None}
    numbers = {
        "n_items": schedule.n_items,
        "n_slots": schedule.n_slots,
        "n_merges": len(schedule.merge_unit),
        "n_heads": len(firsts),
        # Packs of one group share their keys: they take the same items side by side.
        "abreast": max(1, math.gcd(len(firsts), problem.group // shape.pack)),
        "q_len": work.bound.q_len,
        "kv_len": work.bound.kv_len,
        "group": problem.group,
        "first_query": launch.first_query,
    }
    return TileWalk(shape, arrays, numbers, len(firsts), predicate)


def tile_scale(launch: Launch) -> tuple[float, int]:
    """`(scale, flip)`: a scale below 0 turns the sign bits of the queries round, which is exact."""
    if launch.score is not None:
        return launch.scale, 0
    # A scale of 0 must not turn -inf into a NaN.
    return max(abs(launch.scale), 1e-30) * LOG2_E, 0x80008000 if launch.scale < 0 else 0


@dataclass(frozen=True, slots=True)
class TileWidths:
    """Bytes of a row that one lane moves at once."""

    q: int
    k: int
    v: int
    out: int


def tile_program(launch: Launch, walk: TileWalk, widths: TileWidths) -> Program:
    """The program of a launch, for rows moved in such widths."""
    problem, work, shape = launch.problem, launch.work, walk.shape
    assert work.tiles is not None, "matrix units walk tiles"
    values: dict[str, object] = {
        **element_types(launch),
        "SX_HEAD_DIM": problem.head_dim,
        "SX_V_DIM": problem.v_dim,
        "SX_Q_BYTES": widths.q,
        "SX_K_BYTES": widths.k,
        "SX_V_BYTES": widths.v,
        "SX_OUT_BYTES": widths.out,
        "SX_BLOCK_Q": work.block_q,
        "SX_PACK": shape.pack,
        "SX_BLOCK_KV": work.tiles.tile_map.block_kv,
        "SX_STEP": shape.step_kv,
        "SX_STAGES": shape.stages,
        "SX_WARPS": shape.warps,
        "SX_SHARED_BYTES": shape.shared_bytes,
        "SX_ARGUMENT_BYTES": ctypes.sizeof(TileArguments),
    }
    if launch.template.layout == "hybrid":
        row_bytes = max(problem.head_dim, problem.v_dim) * problem.itemsize
        lanes = min(WARP, 1 << (-(-row_bytes // 16) - 1).bit_length())
        keys = min(_SINGLES, 2 * _SINGLES // shape.pack)
        # A single edge's row of K is fetched as its query's row of Q is.
        both = min(widths.q, widths.k)
        values |= {"SX_Q_BYTES": both, "SX_K_BYTES": both, "SX_GATHERS": 1, "SX_LANES": lanes, "SX_KEYS": keys}
    made = with_score(launch, values)
    if walk.predicate is None:
        return made
    header = (MASK_HEADER, walk.predicate.header)
    return replace(made, defines=(*made.defines, ("SX_PREDICATE", "1")), headers=(*made.headers, header))
