"""What the backward pass of a launch asks of Triton: delta, then dQ by queries, then dK and dV by keys.

This file decides the transposed lists, their schedule and the shapes of the kernels of `shared/gradient_triton.py`. It
must not know how kernels are compiled or run, and imports neither torch nor Triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from sparsec.backends.base import Launch, Work
from sparsec.backends.table_gradients import sum_types
from sparsec.backends.tile_lists import tile_arrays
from sparsec.backends.triton_calls import (
    ACCUMULATOR_PER_THREAD,
    LEAST_ROWS,
    MERGE_ROWS,
    ROW_REGISTERS,
    Array,
    Call,
    dims_of,
    functions_of,
    is_described,
    kernel_scale,
    most_programs,
    packed_heads,
    row_edges,
    shared_limit,
    width,
)
from sparsec.layout import EdgeOrder, Ordering, RowLists, row_lists, schedule
from sparsec.layout.hybrid import HybridItems, HybridLayout

# Queries that one program of the pre-pass takes.
_PREPARED_ROWS = 16
# Of a tile that Hopper's matrix units read from shared memory; of lower ones, threads hold the operands.
_WGMMA_ROWS = 64


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two sides that own gradient rows.

    Attributes:
        is_dq: Whether queries own the rows.
        work: Lists by those rows.
        length: Of the sequence that owns rows.
        stream_length: Of the other.
        heads: Own heads; of query heads, the first of each pack.
        stream_heads: For each of them, the heads that meet it; likewise.
        pack: Query heads that go together.
    """

    is_dq: bool
    work: Work
    length: int
    stream_length: int
    heads: tuple[int, ...]
    stream_heads: tuple[tuple[int, ...], ...]
    pack: int

    @property
    def own_pack(self) -> int:
        """Heads in the tile that owns rows."""
        return self.pack if self.is_dq else 1

    @property
    def stream_pack(self) -> int:
        """Heads in each step of the stream."""
        return 1 if self.is_dq else self.pack

    @property
    def rows(self) -> int:
        """Of the tile that owns gradients."""
        rows = self.work.block_q * self.own_pack
        return rows if self.work.tiles is None else max(rows, LEAST_ROWS)


def gradient_calls_of(launch: Launch) -> tuple[Call, ...]:
    """The kernels of a launch's backward pass, in the order they run."""
    problem, work = launch.problem, launch.work
    q_len, kv_len = work.bound.shape
    group = problem.q_heads // problem.kv_heads
    kv_heads = tuple(sorted({head // group for head in launch.heads}))
    pack = packed_heads(launch)
    first_heads = launch.heads[::pack]
    by_queries = _Side(True, work, q_len, kv_len, first_heads, tuple((h // group,) for h in first_heads), pack)
    turned = transposed_work(launch)

    def by_keys(pack: int) -> _Side:
        meeting = tuple(tuple(h for h in launch.heads[::pack] if h // group == kv_head) for kv_head in kv_heads)
        return _Side(False, turned, kv_len, q_len, kv_heads, meeting, pack)

    # A step of the stream has all packed heads of a query: where there is no room for them, fewer are packed, and none
    # beside single edges, whose queries threads hold.
    has_singles = turned.tiles is not None and _singles(launch, turned) is not None
    room = 1 if has_singles else _steps(launch, by_keys(pack))[0]["STEP"]
    return (_prepare(launch), *_side_calls(launch, by_queries), *_side_calls(launch, by_keys(min(pack, room))))


def transposed_work(launch: Launch) -> Work:
    """The lists of a launch by keys, scheduled anew."""
    work, config = launch.work, launch.config
    bound = work.bound.T
    ordering = Ordering(work.ordering.name, work.ordering.kv_order, work.ordering.q_order)
    group = launch.problem.q_heads // launch.problem.kv_heads
    copies = max(1, len(launch.heads) // group) * launch.problem.batch
    workers = launch.device.units
    edges = None if work.numbers is None else EdgeOrder(work.numbers.mask)
    if launch.template.layout == "rows":
        assert work.rows is not None, "row_traversal walks rows"
        rows = row_lists(bound, None if edges is None else "edges")
        block = config["block_q"]
        before = np.concatenate(([0], np.cumsum(rows.degrees())))
        units = np.arange(-(-bound.q_len // block) + 1)
        indptr = before[np.minimum(units * block, bound.q_len)]
        # A key that many queries attend is cut into pieces of a few hundred edges: its program walks them alone.
        planned = schedule(indptr, 1.0, workers=workers, copies=copies, item_cost=4.0 * block, min_piece=512.0)
        base = indptr[planned.unit]
        planned = replace(planned, start=planned.start - base, stop=planned.stop - base)
        numbers = None if edges is None else edges.of_rows(rows, ordering, by_keys=True)
        return Work(bound, ordering, block, planned, rows=rows, numbers=numbers)
    assert work.tiles is not None, "a tiled launch has tiles"
    if launch.template.layout == "tiles":
        tiles = work.tiles.transpose()
        planned = schedule(tiles.tile_map.indptr, 1.0, workers=workers, copies=copies, item_cost=1.0, min_piece=8.0)
        numbers = None if edges is None else edges.of_tiles(tiles, by_keys=True)
        return Work(bound, ordering, tiles.tile_map.block_q, planned, tiles=tiles, numbers=numbers)
    assert work.gathered is not None, "a hybrid has gathered columns"
    assert work.rows is not None, "a hybrid has single edges"
    layout = HybridLayout(work.tiles, work.gathered, work.rows).transpose()
    # In tiles: a tile's worth of gathered columns costs about as much, single edges four times that.
    costs = layout.entry_costs(1.0, 1 / 64, 1 / 16)
    planned = schedule(layout.entry_indptr(), costs, workers=workers, copies=copies, item_cost=1.0, min_piece=8.0)
    return Work(
        bound,
        ordering,
        layout.gathered.block_q,
        planned,
        items=layout.items(planned),
        tiles=layout.tiles,
        gathered=layout.gathered,
        rows=layout.leftovers,
        numbers=None
        if edges is None
        else edges.of_hybrid(layout.tiles, layout.gathered, layout.leftovers, by_keys=True),
    )


def _prepare(launch: Launch) -> Call:
    # Of every token: the launch's own rows may be a few that lie among all of them.
    problem, q_len = launch.problem, launch.problem.q_len
    return Call(
        name="prepare",
        programs=-(-q_len // _PREPARED_ROWS),
        tensors={name: name for name in ("out", "d_out", "d_lse", "delta")},
        arrays={"heads": np.array(launch.heads, np.int32)},
        numbers={"n_heads": len(launch.heads), "q_len": q_len},
        constants={"ROWS": _PREPARED_ROWS, "V_DIM": problem.v_dim, "V_WIDTH": width(problem.v_dim)},
        num_warps=4,
        num_stages=1,
    )


def _side_calls(launch: Launch, side: _Side) -> tuple[Call, ...]:
    problem, work, is_dq = launch.problem, side.work, side.is_dq
    planned = work.schedule
    dims = dims_of(problem)
    into: dict[str, str | None] = {"into_1": "dq" if is_dq else "dk", "into_2": None if is_dq else "dv"}
    q_side, kv_side = ("q", "d_out"), ("k", "v")
    own, stream = (q_side, kv_side) if is_dq else (kv_side, q_side)
    arrays: dict[str, Array | None] = {"heads": np.array(side.heads, np.int32), "order": work.ordering.q_order}
    numbers: dict[str, int | float] = {
        "n_slots": planned.n_slots,
        "n_heads": len(side.heads),
        "length": side.length,
    }
    rows = _singles(launch, work)
    # Query heads of one key head walk an item side by side, so that what they share is found in the cache.
    group = problem.q_heads // problem.kv_heads
    abreast = max(1, math.gcd(len(side.heads), group // side.pack)) if is_dq else 1
    steps, warps, stages = _steps(launch, side)
    # Kernels that need more than tiles on matrix units: the assembler is not to save registers for occupancy.
    is_crowded = work.tiles is None or work.gathered is not None or problem.dtype == "fp32"
    # Queries own what a score modifier's tables are given: each edge is met once.
    live = () if launch.score is None or not is_dq else sum_types(launch.score)
    printed = functions_of(launch, work, with_slope=True, with_scatter=bool(live))
    backward = Call(
        name="backward",
        programs=planned.n_items,
        tensors={
            "own_1": own[0],
            "own_2": own[1],
            "stream_1": stream[0],
            "stream_2": stream[1],
            **{name: name for name in ("lse", "delta", "partial")},
            **into,
        },
        arrays={
            **arrays,
            "head_indptr": np.concatenate(([0], np.cumsum([len(heads) for heads in side.stream_heads]))).astype(
                np.int32
            ),
            "stream_heads": np.array([head for heads in side.stream_heads for head in heads], np.int32),
            "item_unit": planned.unit,
            "item_slot": planned.slot,
            "stream_order": work.ordering.kv_order,
            **_tiles(work),
            **_gathered(work),
            **_rows(work, rows),
        },
        numbers={
            **numbers,
            "n_items": planned.n_items,
            "n_batches": len(launch.batch),
            "abreast": abreast,
            "stream_length": side.stream_length,
            "n_offsets": len(rows.start) if rows is not None and rows.form == "offsets" else 0,
            "scale": kernel_scale(launch),
            "plain_scale": float(launch.scale),
        },
        constants={
            "FORM": None if rows is None else rows.form,
            "IS_DQ": is_dq,
            "NEGATE": launch.scale < 0 and launch.score is None,
            "BLOCK": work.block_q,
            "PACK": side.pack,
            "DIMS": dims,
            # Rows of several heads are no tile of the copy engine's.
            "DESCRIBED": side.stream_pack == 1 and is_described(launch, work.ordering),
            "PERSISTENT": most_programs(launch) is not None,
            **steps,
        },
        num_warps=warps,
        num_stages=stages,
        most_programs=most_programs(launch),
        max_registers=ROW_REGISTERS if is_crowded and launch.device.kind == "nvidia" else None,
        functions=printed.functions,
        tables=printed.tables,
        sum_types=live,
    )
    if not len(planned.merge_unit):
        return (backward,)
    merged_rows = min(MERGE_ROWS, work.block_q * side.own_pack)
    add_up = Call(
        name="add_up",
        programs=len(planned.merge_unit) * (work.block_q * side.own_pack // merged_rows),
        tensors={**into, "partial": "partial"},
        arrays={**arrays, "merge_unit": planned.merge_unit, "merge_indptr": planned.merge_indptr},
        numbers={**numbers, "n_merges": len(planned.merge_unit)},
        constants={
            "IS_DQ": is_dq,
            "BLOCK": work.block_q,
            "PACK": side.own_pack,
            "ROWS": merged_rows,
            "DIMS": dims,
        },
        num_warps=4,
        num_stages=1,
    )
    return backward, add_up


def _steps(launch: Launch, side: _Side) -> tuple[dict[str, int], int, int]:
    """Constants, warps and stages that fit the registers and the shared memory."""
    config, device, itemsize = launch.config, launch.device, launch.problem.itemsize
    dims = dims_of(launch.problem)
    tiles, block = side.work.tiles, side.rows
    accumulated = dims[1] if side.is_dq else dims[1] + dims[3]
    threads_a_warp = 64 if device.kind == "amd" else 32
    warps = config["num_warps"]
    if tiles is not None:
        while block * accumulated > ACCUMULATOR_PER_THREAD * threads_a_warp * warps and warps < 8:
            warps *= 2
    is_without_matrix_units = device.kind == "nvidia" and itemsize == 4
    is_crowded = not side.is_dq and (side.work.gathered is not None or "tcgen05" in device.features)
    # Rows of packed heads that meet single edges too, in a thread's registers.
    is_packed_singly = side.own_pack > 1 and device.kind == "nvidia" and _singles(launch, side.work) is not None
    is_crowded = is_crowded or is_packed_singly
    has_sums = side.is_dq and launch.score is not None and bool(launch.score.live_tables)
    holds_operands = device.kind == "nvidia" and not {"wgmma", "tcgen05"} & set(device.features)
    if tiles is not None and (is_without_matrix_units or is_crowded or (has_sums and holds_operands)):
        # Operands held by threads; or two accumulators beside three kinds of lists, or beside tensor memory's copies.
        warps = 8
    row_bytes = max(dims[1], dims[3]) * itemsize
    keys = max(1, config.get("fetch", 64) * threads_a_warp * warps // (2 * block * row_bytes))
    constants = {"KEYS": keys, "CHUNK": dims[1], "CHUNK_2": dims[3], "STREAM": 16, "STEP": 16}
    if tiles is None:
        return constants, warps, 1
    stream = max(tiles.tile_map.block_kv * side.stream_pack, LEAST_ROWS)
    constants["STREAM"] = tiles.tile_map.block_kv
    if is_without_matrix_units:
        return constants | {"CHUNK": 16, "CHUNK_2": 16}, warps, 1
    # Both operands of the own rows and of a step of the stream, and the weights and score gradients between.
    # Where a thread holds operands too, or copies of tensor memory beside them, it has room for half of the scores.
    # So it has where a modifier holds its own values beside them, or packed heads the places of their rows.
    is_held_elsewhere = side.is_dq or ("wgmma" in device.features and block >= _WGMMA_ROWS)
    is_roomy = is_held_elsewhere and "tcgen05" not in device.features and launch.score is None and side.own_pack == 1
    step, stages = min(stream, 64 if block * accumulated <= 64 * (128 if is_roomy else 64) else 32), 2
    while step > 16 and (block * (dims[1] + dims[3]) + step * (dims[1] + dims[3]) + 2 * block * step) * itemsize > (
        shared_limit(config, device) - 4096
    ):
        step //= 2
    looks_up = launch.score is not None and bool(launch.score.tables) and "tcgen05" in device.features
    # Of a program that stays, the number of its turn lives beside two accumulators' copies of tensor memory.
    is_turning = "tcgen05" in device.features and not side.is_dq and most_programs(launch) is not None
    needs_edges = launch.score is not None and launch.score.needs_edges
    # Of packed heads, each column of the stream has its own place and head beside two accumulators.
    is_packed_wide = side.stream_pack > 1 and device.kind == "amd"
    if is_turning or is_packed_singly or is_packed_wide or has_sums or looks_up or needs_edges:
        # Edges are counted, and what is added to a table is made, of each score beside its gradient.
        step = 16
    return constants | {"STEP": step}, warps, stages


def _tiles(work: Work) -> dict[str, Array | None]:
    if work.tiles is None:
        names = ("item_tile", "item_full", "item_partial", "tile_column", "tile_pattern", "patterns", "tile_edges")
        return dict.fromkeys(names)
    if work.items is not None:
        return tile_arrays(work.tiles, work.items.tile_start, work.items.tile_stop, work.numbers)
    return tile_arrays(work.tiles, work.schedule.start, work.schedule.stop, work.numbers)


def _gathered(work: Work) -> dict[str, Array | None]:
    if work.gathered is None or work.items is None:
        names = ("item_column", "item_column_stop", "gathered_columns", "gathered_lanes")
        return dict.fromkeys((*names, "gathered_edge_indptr", "gathered_edges"))
    return {
        "item_column": work.items.column_start,
        "item_column_stop": work.items.column_stop,
        "gathered_columns": work.gathered.columns,
        "gathered_lanes": None if work.gathered.block_q == 1 else work.gathered.lanes.view(np.int64),
        "gathered_edge_indptr": None if work.numbers is None else work.numbers.gathered_indptr,
        "gathered_edges": None if work.numbers is None else work.numbers.gathered,
    }


def _singles(launch: Launch, work: Work) -> RowLists | None:
    """The rows that are walked edge by edge; None where a configuration leaves none, whatever the mask."""
    return None if launch.template.layout == "hybrid" and launch.config["column_queries"] == 1 else work.rows


def _rows(work: Work, rows: RowLists | None) -> dict[str, Array | None]:
    if rows is None:
        return dict.fromkeys(
            ("item_start", "item_stop", "row_indptr", "row_first", "row_last", "row_step", "row_edges")
        )
    start, stop = work.schedule.start, work.schedule.stop
    if work.items is not None:
        start, stop = _within_units(work, rows, work.items)
    is_edges = rows.form == "edges"
    return {
        "item_start": start,
        "item_stop": stop,
        "row_indptr": None if rows.form == "offsets" else rows.indptr,
        "row_first": rows.columns if is_edges else rows.start,
        "row_last": None if is_edges else rows.stop,
        "row_step": None if is_edges else rows.step,
        "row_edges": row_edges(work),
    }


def _within_units(work: Work, rows: RowLists, items: HybridItems) -> tuple[Array, Array]:
    """The single edges of a hybrid's items, counted from the first of their unit."""
    first_row = np.minimum(work.schedule.unit.astype(np.int64) * work.block_q, len(rows.indptr) - 1)
    base = rows.indptr[first_row]
    return items.edge_start - base, items.edge_stop - base
