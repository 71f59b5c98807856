"""What a launch asks of the CUDA kernels: bins of rows, geometry, arguments, what they are specialised on.

This file decides which rows go to a few lanes, to a warp, to a block or to several blocks, and how the arguments of
`templates/row_traversal/*.cuh` are laid out in memory. It must not know how kernels are compiled or run, and imports
neither torch nor cuda.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sparsec.backends.base import Launch, Problem
from sparsec.backends.cuda_printed import MAX_TABLES, SCORE_HEADER, Extents, score_header
from sparsec.layout import RowLists, schedule

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]

LOG2_E: Final = 1.4426950408889634
WARP: Final = 32
# The most a grid may have in its first dimension.
MAX_BLOCKS: Final = 2**31 - 1
# Threads of the kernels that join pieces.
JOIN_THREADS: Final = 128
# Widths in which rows can be fetched.
_WIDTHS: Final = (16, 8, 4, 2)
_FORMS: Final = {"offsets": 0, "ranges": 1, "edges": 2}
_TYPES: Final = {"fp32": "float", "fp16": "sx::half", "bf16": "sx::bfloat"}
# Blocks of the row kernels that are resident on a multiprocessor, about.
_RESIDENT: Final = 4
# Registers that a key under way may take more where rows are progressions: by this it is judged what fits at all.
_PROGRESSION: Final = 10
# Teams of a warp wait for the longest of their rows; rows are sorted where that would cost more than this.
_UNEVEN: Final = 1.1


# Bins of rows.


@dataclass(frozen=True, slots=True)
class RowBin:
    """Rows of one kind: `rows`, or where that is None the `count` rows from `first` on."""

    first: int
    count: int
    rows: npt.NDArray[np.int32] | None

    @classmethod
    def of(cls, rows: IntArray) -> RowBin:
        if not len(rows):
            return cls(0, 0, None)
        is_run = int(rows[-1]) - int(rows[0]) + 1 == len(rows) and bool((np.diff(rows) == 1).all())
        return cls(int(rows[0]), len(rows), None if is_run else rows.astype(np.int32))

    def to_array(self) -> IntArray:
        return np.arange(self.first, self.first + self.count) if self.rows is None else self.rows.astype(np.int64)


@dataclass(frozen=True, slots=True)
class Bins:
    """Every row in exactly one bin; of a split row, every key in exactly one piece.

    Attributes:
        teams: Short rows, a team of lanes each, several a warp.
        warps: Middling rows, a warp each.
        piece_row: Of each piece of the long rows, a block each, longest first.
        piece_start: Which of the row's keys: `piece_start … piece_stop - 1`.
        piece_stop: One past its last.
        piece_slot: Where its state goes; -1 where it is the whole row.
        merge_row: Rows that were split.
        merge_indptr: Their slots.
    """

    teams: RowBin
    warps: RowBin
    piece_row: npt.NDArray[np.int32]
    piece_start: npt.NDArray[np.int32]
    piece_stop: npt.NDArray[np.int32]
    piece_slot: npt.NDArray[np.int32]
    merge_row: npt.NDArray[np.int32]
    merge_indptr: IntArray

    @property
    def n_slots(self) -> int:
        """States to hold, for one copy."""
        return int(self.merge_indptr[-1])


def bin_rows(degrees: IntArray, *, short: int, long: int, shape: TeamShape, workers: int, copies: int) -> Bins:
    """Rows by degree: a team takes up to `short` keys, a warp up to `long`, a block more; much more is split.

    Args:
        degrees: Keys of each row.
        short: The longest row of a team.
        long: The longest row of a warp; no piece is cut shorter.
        shape: Teams of a warp and the keys they take at a time.
        workers: Blocks that run at once.
        copies: How often the list is run (batch × heads).
    """
    is_short, is_long = degrees <= short, degrees > long
    teams = _evened(np.flatnonzero(is_short), degrees, shape)
    warps = np.flatnonzero(~is_short & ~is_long)
    rows = np.flatnonzero(is_long)
    indptr = np.concatenate(([0], np.cumsum(degrees[rows])))
    planned = schedule(indptr, 1.0, workers=workers, copies=copies, min_piece=float(long))
    if not len(rows):
        planned = schedule(np.zeros(1, np.int64), 1.0, workers=workers)
    base = indptr[planned.unit]
    return Bins(
        teams=RowBin.of(teams),
        warps=RowBin.of(warps),
        piece_row=rows[planned.unit].astype(np.int32),
        piece_start=(planned.start - base).astype(np.int32),
        piece_stop=(planned.stop - base).astype(np.int32),
        piece_slot=planned.slot,
        merge_row=rows[planned.merge_unit].astype(np.int32),
        merge_indptr=planned.merge_indptr,
    )


def _evened(rows: IntArray, degrees: IntArray, shape: TeamShape) -> IntArray:
    """Short rows in their order, or by trips where teams of one warp would wait much for each other."""
    trips = -(-degrees[rows] // shape.keys)
    whole = len(rows) // shape.teams * shape.teams
    waited = trips[:whole].reshape(-1, shape.teams).max(axis=1, initial=0).sum() * shape.teams
    if waited <= _UNEVEN * trips[:whole].sum() + shape.teams:
        return rows
    return rows[np.argsort(-trips, kind="stable")]


# What a kernel is specialised on.


@dataclass(frozen=True, slots=True)
class TeamShape:
    """How lanes share a row.

    Attributes:
        lanes: Of a team, a power of two.
        keys: That a team has in flight.
        pack: Query heads that share each row of K and V fetched.
        warps: Of a block.
        rows_per_warp: Rows (or rounds of rows) a warp takes one after the other.
    """

    lanes: int
    keys: int
    pack: int
    warps: int
    rows_per_warp: int

    @property
    def teams(self) -> int:
        return WARP // self.lanes

    def blocks(self, bins: Bins) -> int:
        """Blocks of one copy: `n_jobs` of rows.cuh."""
        warp_rows = self.warps * self.rows_per_warp
        team_rows = warp_rows * self.teams
        return len(bins.piece_row) + -(-bins.warps.count // warp_rows) + -(-bins.teams.count // team_rows)


@dataclass(frozen=True, slots=True)
class Held:
    """What a lane of a kernel keeps in registers from one key to the next.

    Attributes:
        rows: How often its slice of head_dim and of v_dim elements, for each head of a pack.
        others: Registers for lists, addresses and loops, by what the compiler was seen to need.
        progressions: What a key under way takes more where rows are progressions, likewise.
        most: Registers for all but those at most, likewise.
    """

    rows: tuple[int, int]
    others: int
    progressions: int
    most: int

    def registers(self, problem: Problem, widths: tuple[int, int], lanes: int, pack: int, keys: int) -> int:
        """Of slices, rows under way and scores; `widths` are the bytes that a lane fetches at once."""
        # Of each key and head a score, and a weight or another product.
        registers = 2 * pack * keys
        for rows, dim, width in zip(self.rows, (problem.head_dim, problem.v_dim), widths, strict=True):
            elements = width // problem.itemsize
            vectors = -(-(dim // elements) // lanes)
            # Slices in fp32, and of each key under way a slice as it was fetched.
            registers += rows * pack * vectors * elements + keys * vectors * max(1, width // 4)
        return registers


def team_shape(launch: Launch, rows: RowLists, held: Held, *, pack: int) -> TeamShape:
    """The shape of a launch's teams, for such rows: fewer keys at a time, and heads, than fit registers at most."""
    config, problem = launch.config, launch.problem
    row_bytes = max(problem.head_dim, problem.v_dim) * problem.itemsize
    wanted = -(-row_bytes // config["lane_bytes"])
    lanes = min(WARP, 1 << (wanted - 1).bit_length())
    widths = (fetch_bytes(problem.head_dim, problem.itemsize, ()), fetch_bytes(problem.v_dim, problem.itemsize, ()))
    keys, of_a_key = config["keys"], 0 if rows.form == "edges" else _PROGRESSION
    while held.registers(problem, widths, lanes, pack, keys) + of_a_key * keys > held.most and keys * pack > 1:
        keys, pack = (keys // 2, pack) if keys > 1 else (keys, pack // 2)
    warps, rows_per_warp = config["num_warps"], config["rows_per_warp"]
    n_rows = rows.shape[0] * (len(launch.heads) // pack) * problem.batch
    # Several rows a warp overlap the look-up of the next with the work on this one, where enough warps remain.
    while rows_per_warp > 1 and n_rows < 2 * _RESIDENT * launch.device.units * warps * rows_per_warp:
        rows_per_warp //= 2
    return TeamShape(lanes, keys, pack, warps, rows_per_warp)


def packed_heads(launch: Launch) -> int:
    """Heads that go together: at most what the configuration says, and whole runs of heads of one group."""
    group = launch.problem.q_heads // launch.problem.kv_heads
    pack = launch.config.get("pack_gqa", 1)
    while pack > 1:
        first = launch.heads[::pack]
        runs = tuple(head + i for head in first for i in range(pack))
        if group % pack == 0 and runs == launch.heads and all(head % pack == 0 for head in first):
            return pack
        pack //= 2
    return 1


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a tensor's rows lie: what decides how wide they can be fetched.

    Attributes:
        address: Of its first element.
        strides: Of batch elements, heads and rows, in elements.
        itemsize: Bytes of an element.
    """

    address: int
    strides: tuple[int, int, int]
    itemsize: int


def fetch_bytes(dim: int, itemsize: int, placed: Sequence[Placed]) -> int:
    """The most bytes of a row that one lane can fetch at once from, or write to, tensors placed so."""
    for width in _WIDTHS:
        elements = width // itemsize
        if elements and dim % elements == 0 and all(_is_aligned(tensor, elements) for tensor in placed):
            return width
    return itemsize


def _is_aligned(tensor: Placed, elements: int) -> bool:
    unit = min(16, elements * tensor.itemsize)
    return tensor.address % unit == 0 and all(stride * tensor.itemsize % unit == 0 for stride in tensor.strides)


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel file and what it is specialised on.

    Attributes:
        template: Whose folder holds it.
        arch: What it is compiled for, `sm_90`.
        defines: Of the preprocessor.
        resident: Blocks that a multiprocessor is to hold, which bounds a thread's registers; fewer where they would
            spill. None where the compiler is left alone.
        headers: Names and texts of what was generated for it: how scores are modified, which query attends which key.
    """

    template: str
    arch: str
    defines: tuple[tuple[str, str], ...]
    resident: int | None = None
    headers: tuple[tuple[str, str], ...] = ()


def program(
    launch: Launch,
    walk: Walk,
    widths: tuple[int, int],
    *,
    with_scatter: bool = False,
    **more: object,
) -> Program:
    """The program of a launch, for K and V rows fetched in such widths.

    Args:
        launch: The launch.
        walk: Who walks what.
        widths: Bytes that a lane fetches at once.
        with_scatter: Whether it sums up gradients of a score modifier's tables.
        more: Definitions of its own.
    """
    problem, shape = launch.problem, walk.shape
    values: dict[str, object] = {
        **element_types(launch),
        "SX_HEAD_DIM": problem.head_dim,
        "SX_V_DIM": problem.v_dim,
        "SX_K_BYTES": widths[0],
        "SX_V_BYTES": widths[1],
        "SX_LANES": shape.lanes,
        "SX_KEYS": shape.keys,
        "SX_PACK": shape.pack,
        "SX_WARPS": shape.warps,
        "SX_FORM": _FORMS[walk.form],
        **more,
    }
    made = with_score(launch, values, with_scatter=with_scatter)
    registers = walk.held.registers(problem, widths, shape.lanes, shape.pack, shape.keys) + walk.held.others
    registers += 0 if walk.form == "edges" else walk.held.progressions * shape.keys
    # The more blocks are there, the more bytes are on their way to them.
    resident = launch.device.registers_per_unit // (WARP * shape.warps * registers)
    return replace(made, resident=max(1, resident))


def element_types(launch: Launch) -> dict[str, str]:
    """Of the inputs and the output."""
    dtype = launch.problem.dtype
    return {"SX_T": _TYPES[dtype], "SX_OUT": _TYPES["fp32" if launch.is_partial else dtype]}


def with_score(launch: Launch, values: Mapping[str, object], *, with_scatter: bool = False) -> Program:
    """The program of a launch with such definitions, and with the header of its score modifier where it has one."""
    defines = tuple((name, str(value)) for name, value in values.items())
    if launch.score is None:
        return Program(launch.template.name, launch.device.arch, defines)
    header = score_header(launch.score, Extents.of(launch), with_scatter=with_scatter)
    asked = {"SX_SCORE": True, "SX_EDGES": launch.score.needs_edges, "SX_SCATTER": with_scatter}
    defines += tuple((name, "1") for name, is_asked in asked.items() if is_asked)
    return Program(launch.template.name, launch.device.arch, defines, headers=((SCORE_HEADER, header),))


# Arguments, as the kernels' headers declare them.


class TensorArgument(ctypes.Structure):
    """`Tensor` of shared/device.cuh."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
    )


_POINTERS: Final = (
    *("indptr", "first", "last", "step", "row_order", "key_order", "batches", "heads"),
    *("piece_row", "piece_start", "piece_stop", "piece_slot", "warp_rows", "team_rows", "merge_row", "merge_indptr"),
    "edges",
)
_NUMBERS: Final = (
    *("n_pieces", "n_warp_rows", "n_team_rows", "warp_first", "team_first"),
    *("n_slots", "n_merges", "n_heads", "abreast", "rows_per_warp"),
    *("n_offsets", "row_len", "key_len", "group", "first_query"),
)


class ListsArgument(ctypes.Structure):
    """`Lists` of row_traversal/rows.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int32) for name in _NUMBERS),
        ("tables", ctypes.c_void_p * MAX_TABLES),
    )


# What follows the index arrays in the arguments of every forward pass.
FORWARD_FIELDS: Final = (
    ("q", TensorArgument),
    ("k", TensorArgument),
    ("v", TensorArgument),
    ("out", TensorArgument),
    ("lse", ctypes.c_void_p),
    ("lse_batch", ctypes.c_int64),
    ("lse_head", ctypes.c_int64),
    ("partial", ctypes.c_void_p),
    ("scale", ctypes.c_float),
)


class ForwardArguments(ctypes.Structure):
    """`Arguments` of row_traversal/kernel_cuda.cu."""

    _fields_ = (("lists", ListsArgument), *FORWARD_FIELDS)


@dataclass(frozen=True, slots=True)
class Walk:
    """Rows, the keys they walk, and who walks them: one kernel's `Lists`, but for the batch.

    Attributes:
        form: Of the rows.
        shape: Of the teams.
        held: What a lane keeps in registers.
        bins: Of the rows.
        arrays: Index arrays by their name in `Lists`; None where there is none.
        numbers: Its integers.
        n_copies: Entries of `heads`.
    """

    form: str
    shape: TeamShape
    held: Held
    bins: Bins
    arrays: Mapping[str, Array | None]
    numbers: Mapping[str, int]
    n_copies: int

    @property
    def nbytes(self) -> int:
        """Bytes of its index arrays."""
        return sum(array.nbytes for array in self.arrays.values() if array is not None)

    @property
    def n_states(self) -> int:
        """States to hold, for one batch element."""
        return self.bins.n_slots * self.n_copies * self.shape.pack

    def arguments(self, addresses: Mapping[str, int | None]) -> ListsArgument:
        """The structure, given where the arrays and the batch elements are."""
        made = ListsArgument()
        for name in _POINTERS:
            setattr(made, name, addresses[name])
        for name in _NUMBERS:
            setattr(made, name, self.numbers[name])
        return made


def walk(
    launch: Launch,
    rows: RowLists,
    heads: tuple[int, ...],
    held: Held,
    *,
    pack: int,
    group: int,
    orders: tuple[Array | None, Array | None],
    numbers: Array | None = None,
) -> Walk:
    """How a launch walks `rows`.

    Args:
        launch: Its configuration and device.
        rows: Who walks what.
        heads: The heads that own the rows.
        held: What a lane keeps in registers.
        pack: How many of the heads go together, at most.
        group: Heads of the own side that share one of the other's.
        orders: The token at each position, of the rows and of their keys.
        numbers: Of the edges as `rows` lists them, where that is not their order.
    """
    shape = team_shape(launch, rows, held, pack=pack)
    firsts = heads[:: shape.pack]
    bins = bin_rows(
        rows.degrees(),
        short=launch.config["short_keys"],
        long=launch.config["long_keys"],
        shape=shape,
        workers=launch.device.units * _RESIDENT,
        copies=len(firsts) * launch.problem.batch,
    )
    is_edges = rows.form == "edges"
    arrays: dict[str, Array | None] = {
        "indptr": None if rows.form == "offsets" else rows.indptr,
        "first": rows.columns if is_edges else rows.start,
        "last": None if is_edges else rows.stop,
        "step": None if is_edges else rows.step,
        "row_order": orders[0],
        "key_order": orders[1],
        "heads": np.array(firsts, np.int32),
        "piece_row": bins.piece_row,
        "piece_start": bins.piece_start,
        "piece_stop": bins.piece_stop,
        "piece_slot": bins.piece_slot,
        "warp_rows": bins.warps.rows,
        "team_rows": bins.teams.rows,
        "merge_row": bins.merge_row,
        "merge_indptr": bins.merge_indptr,
        "edges": numbers,
    }
    counts = {
        "n_pieces": len(bins.piece_row),
        "n_warp_rows": bins.warps.count,
        "n_team_rows": bins.teams.count,
        "warp_first": bins.warps.first,
        "team_first": bins.teams.first,
        "n_slots": bins.n_slots,
        "n_merges": len(bins.merge_row),
        "n_heads": len(firsts),
        # Packs of one group share their keys: they walk the same rows side by side.
        "abreast": max(1, math.gcd(len(firsts), group // shape.pack)),
        "rows_per_warp": shape.rows_per_warp,
        "n_offsets": len(rows.start) if rows.form == "offsets" else 0,
        "row_len": rows.shape[0],
        "key_len": rows.shape[1],
        "group": group,
        "first_query": launch.first_query,
    }
    return Walk(rows.form, shape, held, bins, arrays, counts, len(firsts))


# A query of each head, and its sums.
_HELD: Final = Held(rows=(1, 1), others=30, progressions=4, most=190)


def forward_walk(launch: Launch) -> Walk:
    """How the forward pass of a launch walks its rows."""
    work, problem = launch.work, launch.problem
    assert work.rows is not None, "row_traversal walks rows"
    orders = (work.ordering.q_order, work.ordering.kv_order)
    group = problem.q_heads // problem.kv_heads
    pack, numbers = packed_heads(launch), None if work.numbers is None else work.numbers.rows
    return walk(launch, work.rows, launch.heads, _HELD, pack=pack, group=group, orders=orders, numbers=numbers)


def forward_program(launch: Launch, walk: Walk, widths: tuple[int, int]) -> Program:
    """The program of a launch's forward pass, for rows of K and V fetched in such widths."""
    size = ctypes.sizeof(ForwardArguments)
    return program(launch, walk, widths, SX_ARGUMENT_BYTES=size)
