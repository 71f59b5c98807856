"""What a launch asks of Triton: its kernels, the arrays they walk, the constants they are specialised on.

This file decides tile steps, warps and stages from the launch and its device, and the form of the index arrays. It must
not know how kernels are compiled or run, and imports neither torch nor Triton.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sparsec.backends.base import Launch, Problem, Work
from sparsec.backends.tile_lists import tile_arrays
from sparsec.backends.triton_printed import Printed, printed_predicate, printed_score
from sparsec.device import Device
from sparsec.errors import UnsupportedError
from sparsec.layout import Ordering
from sparsec.template import Config, Template

Array = npt.NDArray[Any]

LOG2_E: Final = 1.4426950408889634
# Of tensors that the copy engine reads: of their address and of every stride but the last.
ALIGNMENT_BYTES: Final = 16
# Kernels count programs, whether each is one of the grid or a turn of one that stays, in 32 bits.
_MOST_PROGRAMS: Final = 2**31
# Of a tile on matrix units; fewer are filled up with rows that nobody reads.
LEAST_ROWS: Final = 16
# From here on, tiles go to the matrix units of whole warp groups on Hopper and newer.
GROUP_ROWS: Final = 64
# Rows a merge program joins: few, so that 256 columns of fp32 stay in registers.
MERGE_ROWS: Final = 16
# Of the accumulator, so many fp32 a thread at most: the scores, weights and addresses need most of 255 registers.
ACCUMULATOR_PER_THREAD: Final = 64
# Row kernels, and those that look up for each score: without a limit, the assembler spills a few registers to reach the
# next occupancy.
ROW_REGISTERS: Final = 255
# Values a thread can hold at all before most of them live in memory: 255 registers, or 512 on AMD, less the rest's.
_NVIDIA_VALUES: Final = 256
_AMD_VALUES: Final = 384
# Of a thread, beside its accumulators: addresses, scores, operands.
_LEAST_REGISTERS: Final = 40
# Scores a thread holds at most, likewise.
_SCORES_PER_THREAD: Final = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """What a launch's kernel is specialised on beyond its problem; follows from launch and device alone.

    Attributes:
        dims: As `dims_of` has them.
        pack: Query heads packed into the query tile.
        step_kv: Keys that go to the matrix units at a time.
        chunk: Dimensions of q and k that go at a time; head_width on matrix units.
        keys: Keys a row that go to the vector units at a time.
        num_warps: At least what the configuration says; more where the accumulator would not fit the registers.
        num_stages: At most what the configuration says; fewer where the stages would not fit the shared memory.
        shared_bytes: What the kernel should ask for, at most.
    """

    dims: tuple[int, int, int, int]
    pack: int
    step_kv: int
    chunk: int
    keys: int
    num_warps: int
    num_stages: int
    shared_bytes: int


def shape_of(launch: Launch) -> Shape:
    """The shape of a launch's kernel."""
    config, problem = launch.config, launch.problem
    pack = packed_heads(launch)
    dims = dims_of(problem)
    rows = max(config["block_q"] * pack, LEAST_ROWS)
    warp = 64 if launch.device.kind == "amd" else 32
    warps = config["num_warps"]
    if launch.template.layout != "rows":
        while rows * dims[3] > ACCUMULATOR_PER_THREAD * warp * warps and warps < 8:
            warps *= 2
    threads = warp * warps
    row_bytes = max(dims[1], dims[3]) * problem.itemsize
    keys = max(1, config.get("fetch", 64) * threads // (rows * row_bytes))
    if launch.template.layout == "rows":
        return Shape(dims, pack, 0, dims[1], keys, warps, 1, 0)
    # Beside each score that is looked up for stand its place in the table and what is found there.
    looks_up = launch.score is not None and bool(launch.score.tables)
    scores = _SCORES_PER_THREAD // 4 if looks_up else _SCORES_PER_THREAD
    step = min(config["block_kv"], max(16, scores * threads // rows))
    stages, chunk = config["num_stages"], dims[1]
    if launch.device.kind == "nvidia" and problem.dtype == "fp32":
        # No matrix units: operands are held by threads, so they are cut small, and nothing is staged.
        step, stages, chunk = 16, 1, 16
    device, itemsize = launch.device, problem.itemsize
    least_buffers = 2 if is_described(launch, launch.work.ordering) else 1
    # A step in use needs no buffer of the stages, but where matrix units work on by themselves and still read the one
    # before. The copy engine fills two at least.
    lasting = int(rows >= GROUP_ROWS and warps >= 4 and bool({"wgmma", "tcgen05"} & set(device.features)))

    def needed() -> int:
        buffers = max(stages - 1 + lasting, least_buffers)
        return shared_bytes(
            device, rows, step, dims, buffers, itemsize, has_singles=_has_singles(launch.template, config)
        )

    while needed() > shared_limit(config, device) and (step > 16 or stages > 1):
        # Two tiles in flight hide most of what can be hidden; smaller steps than that cost less.
        if stages > 2 or step == 16:
            stages -= 1
        else:
            step //= 2
    return Shape(dims, pack, step, chunk, keys, warps, stages, needed())


def shared_bytes(
    device: Device,
    rows: int,
    step_kv: int,
    dims: tuple[int, int, int, int],
    buffers: int,
    itemsize: int,
    *,
    has_singles: bool = False,
) -> int:
    """Shared memory of a tile kernel, at most.

    NVIDIA: the queries stay there, K and V have as many buffers as are told, and weights pass through; in fp32, V and
    chunks of the others pass through. AMD: the queries pass through before the first tile, and so do the sums of single
    edges, on their way from the threads that hold a row to matrix units. The tests hold this against what Triton
    allocates.
    """
    queries = rows * dims[1] * itemsize
    tiles = buffers * step_kv * (dims[1] + dims[3]) * itemsize
    passing = rows * (step_kv + 8) * 4 + 2048
    if device.kind == "amd":
        return max(queries, tiles + passing, rows * dims[3] * 4 if has_singles else 0)
    if itemsize == 4:
        return step_kv * dims[3] * itemsize + passing + 16384
    return queries + tiles + passing


def _has_singles(template: Template, config: Config) -> bool:
    """Whether tiles may have single edges beside them."""
    return template.layout == "hybrid" and config["column_queries"] > 1


def shared_limit(config: Config, device: Device) -> int:
    """Bytes of shared memory a program may have: those that stay on a multiprocessor share what one of them could."""
    return device.shared_bytes_per_block // max(1, config.get("persistent", 0))


def too_large(template: Template, config: Config, problem: Problem, device: Device) -> str | None:
    """What of a configuration the device has not, or does not fit its shared memory or its registers, or None.

    Everything that can be cut smaller is taken at its smallest: steps, stages, warps.
    """
    reason = _undescribable(problem, device) if config.get("descriptors", 0) else None
    if reason is not None:
        return f"{config}: {reason}"
    dims = dims_of(problem)
    warp, most = (64, _AMD_VALUES) if device.kind == "amd" else (32, _NVIDIA_VALUES)
    if template.layout == "rows":
        # Queries, accumulators and the keys at hand; in the backward pass two of each.
        values = config["block_q"] * (dims[1] + dims[3]) * (3 if problem.needs_grad else 2)
        held, what = values // (warp * config["num_warps"]), "queries and keys"
    else:
        pack = _packed_at_most(config, problem)
        rows = config["block_q"] * pack
        if rows < LEAST_ROWS:
            return (
                f"{config}: with {pack} of the {problem.group} heads of a group, a tile has {rows} of the {LEAST_ROWS} "
                "rows that matrix units take"
            )
        staying = config.get("persistent", 0)
        has_singles = _has_singles(template, config)
        least = shared_bytes(device, rows, 16, dims, 1, problem.itemsize, has_singles=has_singles)
        limit = shared_limit(config, device)
        if least > limit:
            return (
                f"{config} needs at least {least / 1024:.0f} KiB of shared memory, "
                f"and {device.name} has {limit / 1024:.0f} KiB a block"
                + (f" where {staying} share a multiprocessor" if staying > 1 else "")
            )
        # dK and dV of a tile, on as many warps as the kernels take.
        values = config["block_kv"] * (dims[1] + dims[3]) * 2 if problem.needs_grad else 0
        held, what = values // (warp * max(8, config["num_warps"])), "gradients of keys and values"
        accumulated = max(rows * dims[3], values // 2) + _LEAST_REGISTERS * warp * config["num_warps"]
        if accumulated * staying > device.registers_per_unit:
            return (
                f"{config}: {staying} programs hold {accumulated} registers each at least, "
                f"and a multiprocessor of {device.name} has {device.registers_per_unit}"
            )
    if held >= most:
        return f"{config}: a thread would hold {held} values of {what}, and {device.name} has registers for {most - 1}"
    return None


def _packed_at_most(config: Config, problem: Problem) -> int:
    """Heads of one group in a query tile, whichever heads a launch serves."""
    return math.gcd(config.get("pack_gqa", 1), problem.q_heads // problem.kv_heads)


def dims_of(problem: Problem) -> tuple[int, int, int, int]:
    """`(head_dim, head_width, v_dim, v_width)`: a width is a power of two, at least 16, that holds a dimension."""
    return problem.head_dim, width(problem.head_dim), problem.v_dim, width(problem.v_dim)


def width(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


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
class Call:
    """One kernel of a launch: its arguments but for addresses and strides.

    Attributes:
        name: The kernel's name in the template's file.
        programs: Its grid for one copy: a batch element and an entry of the array `heads`.
        tensors: The tensor behind each pointer parameter; None where there is none. Parameters named after it with
            `_batch`, `_head` and `_row` are its strides.
        arrays: Index arrays by parameter.
        numbers: Integers and floats by parameter.
        constants: `tl.constexpr` parameters.
        functions: Generated functions by the `tl.constexpr` parameter that names them: module and function, or None.
        tables: The arrays of those functions, as tuples, by parameter; None where there are none.
        sum_types: Of the tuple that the function SCATTER adds to, the element types; empty where there is none.
        most_programs: Of its grid for all copies, where its programs take one item after the other; None: an item each.
        num_warps: Warps a program.
        num_stages: Depth of software pipelining.
        max_registers: 32-bit registers a thread may have; None lets the compiler choose.
    """

    name: str
    programs: int
    tensors: Mapping[str, str | None]
    arrays: Mapping[str, Array | None]
    numbers: Mapping[str, int | float]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
    most_programs: int | None = None
    max_registers: int | None = None
    functions: Mapping[str, tuple[Printed, str] | None] = field(default_factory=dict)
    tables: Mapping[str, tuple[Array, ...] | None] = field(default_factory=dict)
    sum_types: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its index arrays and tables."""
        tables = [table for given in self.tables.values() if given is not None for table in given]
        return sum(array.nbytes for array in [*self.arrays.values(), *tables] if array is not None)

    def grid(self, batch: int) -> int:
        """Programs for so many batch elements."""
        heads = self.arrays["heads"]
        assert heads is not None, "every kernel runs over heads"
        programs = self.programs * batch * len(heads)
        if programs >= _MOST_PROGRAMS:
            raise UnsupportedError(
                f"{self.name} is asked for {programs:,} items of all heads and batch elements, and a grid counts to "
                f"{_MOST_PROGRAMS - 1:,}: give it fewer batch elements at a time, or larger tiles"
            )
        return programs if self.most_programs is None else min(programs, self.most_programs)


def calls_of(launch: Launch) -> tuple[Call, ...]:
    """The kernels of a launch, in the order they run."""
    shape, work, problem = shape_of(launch), launch.work, launch.problem
    schedule, ordering = work.schedule, work.ordering
    group = problem.q_heads // problem.kv_heads
    heads = np.array(launch.heads[:: shape.pack], np.int32)
    # Heads of one group share their keys: they walk an item side by side.
    abreast = max(1, math.gcd(len(heads), group // shape.pack))
    common_arrays = {"heads": heads, "q_order": ordering.q_order}
    common_numbers = {"n_slots": schedule.n_slots, "n_heads": len(heads), "q_len": work.bound.q_len}
    arrays, constants = _LISTS[launch.template.layout](launch, shape)
    printed = functions_of(launch, work)
    is_crowded = launch.template.layout == "rows" or (launch.score is not None and bool(launch.score.tables))
    numbers: dict[str, int | float] = {
        "n_items": schedule.n_items,
        "abreast": abreast,
        "kv_len": work.bound.kv_len,
        "first_query": launch.first_query,
        "scale": kernel_scale(launch),
    }
    if launch.template.layout != "rows":
        numbers["n_batches"] = len(launch.batch)
    else:
        numbers["n_offsets"] = len(work.rows.start) if work.rows is not None and work.rows.form == "offsets" else 0
    forward = Call(
        name="forward",
        programs=schedule.n_items,
        tensors={name: name for name in ("q", "k", "v", "out", "lse", "partial")},
        arrays={
            **common_arrays,
            "kv_order": ordering.kv_order,
            "item_unit": schedule.unit,
            "item_slot": schedule.slot,
            **arrays,
        },
        numbers={**common_numbers, **numbers},
        constants={
            "GROUP": group,
            "NEGATE": launch.scale < 0 and launch.score is None,
            "BLOCK_Q": work.block_q,
            "DIMS": shape.dims,
            **constants,
        },
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        most_programs=most_programs(launch),
        max_registers=ROW_REGISTERS if is_crowded and launch.device.kind == "nvidia" else None,
        functions=printed.functions,
        tables=printed.tables,
    )
    if not len(schedule.merge_unit):
        return (forward,)
    rows = min(MERGE_ROWS, work.block_q * shape.pack)
    merge = Call(
        name="merge",
        programs=len(schedule.merge_unit) * (work.block_q * shape.pack // rows),
        tensors={name: name for name in ("out", "lse", "partial")},
        arrays={**common_arrays, "merge_unit": schedule.merge_unit, "merge_indptr": schedule.merge_indptr},
        numbers={**common_numbers, "n_merges": len(schedule.merge_unit)},
        constants={
            "BLOCK_Q": work.block_q,
            "PACK": shape.pack,
            "ROWS": rows,
            "V_DIM": shape.dims[2],
            "V_WIDTH": shape.dims[3],
        },
        num_warps=4,
        num_stages=1,
    )
    return forward, merge


def most_programs(launch: Launch) -> int | None:
    """The size of a grid whose programs stay and take item after item; None where each item has its program."""
    per_unit = launch.config.get("persistent", 0)
    return launch.device.units * per_unit if per_unit else None


def kernel_scale(launch: Launch) -> float:
    """Takes scores to units of log 2, or, for a modifier, to their own."""
    # A scale of 0 must not turn -inf into a NaN.
    return launch.scale if launch.score is not None else max(abs(launch.scale), 1e-30) * LOG2_E


@dataclass(frozen=True, slots=True)
class Functions:
    """Generated functions and their tables, by the parameters of the kernels that take them."""

    functions: dict[str, tuple[Printed, str] | None]
    tables: dict[str, tuple[Array, ...] | None]


def functions_of(launch: Launch, work: Work, *, with_slope: bool = False, with_scatter: bool = False) -> Functions:
    """The score modifier and, where the configuration wants it and the mask has one, the predicate of partial tiles."""
    score = None
    if launch.score is not None:
        # By keys too, queries are those of the mask. Its first may be one of a longer sequence's.
        q_len, kv_len = launch.work.bound.shape
        n_edges = 0 if launch.work.numbers is None else launch.work.numbers.mask.nnz
        lengths = (launch.first_query + q_len, kv_len)
        is_packed = packed_heads(launch) > 1
        score = printed_score(launch.score, lengths, launch.problem.q_heads, n_edges, is_packed=is_packed)
    functions: dict[str, tuple[Printed, str] | None] = {"MODIFY": None if score is None else (score, "value")}
    if with_slope:
        functions["SLOPE"] = None if score is None else (score, "slope")
        functions["SCATTER"] = (score, "scatter") if score is not None and with_scatter else None
    tables = {"score_tables": None if score is None else score.tables or None}
    if work.tiles is not None or with_slope:
        is_wanted = work.tiles is not None and launch.config.get("by_predicate", 0) == 1
        mask = printed_predicate(work.bound) if is_wanted else None
        functions["ATTENDS"] = None if mask is None else (mask, "attends")
        tables["mask_tables"] = None if mask is None else mask.tables or None
    return Functions(functions, tables)


Lists = tuple[dict[str, Array | None], dict[str, object]]


def _row_lists(launch: Launch, shape: Shape) -> Lists:
    rows, schedule = launch.work.rows, launch.work.schedule
    assert rows is not None, "row_traversal walks rows"
    is_edges = rows.form == "edges"
    arrays: dict[str, Array | None] = {
        "item_start": schedule.start,
        "item_stop": schedule.stop,
        "row_indptr": None if rows.form == "offsets" else rows.indptr,
        "row_first": rows.columns if is_edges else rows.start,
        "row_last": None if is_edges else rows.stop,
        "row_step": None if is_edges else rows.step,
        "row_edges": row_edges(launch.work),
    }
    return arrays, {"KEYS": shape.keys, "FORM": rows.form}


def row_edges(work: Work) -> Array | None:
    """The numbers of single edges, as they are stored; None where no score modifier asks for them."""
    if work.numbers is None or work.rows is None:
        return None
    return np.arange(len(work.rows.columns), dtype=np.int32) if work.numbers.rows is None else work.numbers.rows


def _tile_lists(launch: Launch, shape: Shape) -> Lists:
    tiles, schedule = launch.work.tiles, launch.work.schedule
    assert tiles is not None, "block_sparse walks tiles"
    arrays = tile_arrays(tiles, schedule.start, schedule.stop, launch.work.numbers)
    constants = {"PACK": shape.pack, "BLOCK_KV": tiles.tile_map.block_kv}
    constants["DESCRIBED"] = is_described(launch, launch.work.ordering)
    return arrays, {**constants, **_steps(shape), "PERSISTENT": most_programs(launch) is not None}


def is_described(launch: Launch, ordering: Ordering) -> bool:
    """Whether the copy engine fetches what tiles stream: asked for, possible, and tokens at their own positions."""
    return (
        launch.config.get("descriptors", 0) == 1
        and ordering.kv_order is None
        and _undescribable(launch.problem, launch.device) is None
    )


def _undescribable(problem: Problem, device: Device) -> str | None:
    """Why the copy engine cannot fetch the tiles of such a problem, or None."""
    if "tma" not in device.features:
        return f"{device.name} has no copy engine that takes tensor descriptors"
    if problem.dtype == "fp32":
        return "fp32 tiles go to no matrix units, and are not staged"
    uneven = [dim for dim in (problem.head_dim, problem.v_dim) if dim * problem.itemsize % ALIGNMENT_BYTES]
    if uneven:
        return f"rows of {uneven[0]} dimensions do not begin at multiples of {ALIGNMENT_BYTES} bytes"
    return None


def _hybrid_lists(launch: Launch, shape: Shape) -> Lists:
    work = launch.work
    tiles, gathered, rows, items = work.tiles, work.gathered, work.rows, work.items
    assert tiles is not None, "hybrid walks tiles"
    assert gathered is not None, "hybrid walks gathered columns"
    assert rows is not None, "hybrid walks single edges"
    assert items is not None, "a hybrid's items name stretches of three lists"
    singles: dict[str, Array | None] = {
        "item_edge": items.edge_start,
        "item_edge_stop": items.edge_stop,
        "row_indptr": rows.indptr,
        "row_first": rows.columns,
        "row_edges": row_edges(work),
    }
    # By the configuration, not by what this mask has: update must not ask for another kernel.
    has_singles = launch.config["column_queries"] > 1
    arrays: dict[str, Array | None] = {
        **tile_arrays(tiles, items.tile_start, items.tile_stop, work.numbers),
        "item_column": items.column_start,
        "item_column_stop": items.column_stop,
        "gathered_columns": gathered.columns,
        "gathered_lanes": None if gathered.block_q == 1 else gathered.lanes.view(np.int64),
        "gathered_edge_indptr": None if work.numbers is None else work.numbers.gathered_indptr,
        "gathered_edges": None if work.numbers is None else work.numbers.gathered,
        **(singles if has_singles else dict.fromkeys(singles)),
    }
    constants = {"PACK": shape.pack, "BLOCK_KV": tiles.tile_map.block_kv, "KEYS": shape.keys, **_steps(shape)}
    constants["DESCRIBED"] = is_described(launch, work.ordering)
    return arrays, {**constants, "PERSISTENT": most_programs(launch) is not None}


def _steps(shape: Shape) -> dict[str, object]:
    return {"STEP_KV": shape.step_kv, "CHUNK": shape.chunk}


_LISTS: Final = {"rows": _row_lists, "tiles": _tile_lists, "hybrid": _hybrid_lists}


def options_of(call: Call) -> dict[str, Any]:  # what Triton's compiler takes
    """Compiler options of a kernel."""
    # Fused multiply-adds are stated: Triton's default for them is about to change.
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages, "enable_fp_fusion": True}
    return options if call.max_registers is None else options | {"maxnreg": call.max_registers}
