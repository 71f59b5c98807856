"""Where the time of a plan goes: the cost model's estimate taken apart, so that a person sees why a mask is slow.

This file decides the parts and their names. They add up to the estimate; none is measured. It must not know how an
estimate is made beyond what a cost model tells of tiles, columns, edges and units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sparsec.backends.base import Launch, Problem, Work
from sparsec.cost import CostModel, cost_model
from sparsec.device import Device
from sparsec.layout import BlockTiles, block_tiles
from sparsec.masks import full
from sparsec.planner.ceiling import matrix_rate, tile_fill
from sparsec.planner.plans import Plan, Step
from sparsec.planner.words import rate, size
from sparsec.planner.works import heads_sharing, is_scattered, packed_heads


@dataclass(frozen=True, slots=True)
class Spent:
    """One part of a plan's estimated time.

    Attributes:
        name: In a few words, for tables and keys.
        words: In a sentence's place, with the figures behind it.
        us: Microseconds of wall time.
        share: Of the estimate, 0 … 1.
    """

    name: str
    words: str
    us: float
    share: float


# What the parts are called, in the order in which they are told where they take as long.
USEFUL, BELOW_PEAK, IN_VAIN, GATHERED, SINGLE, BLOCKS, IDLE, MEMORY, STARTING = (
    "useful arithmetic",
    "below full rate",
    "pairs in vain",
    "gathered columns",
    "single edges",
    "loading and writing",
    "uneven work",
    "memory",
    "starting",
)


def spending(plan: Plan) -> tuple[Spent, ...]:
    """The parts of a plan's estimate, the largest first; their times add up to it."""
    times: dict[str, float] = {}
    for step in plan.steps:
        for name, us in _step_parts(step):
            times[name] = times.get(name, 0.0) + us
    total = sum(times.values())
    words = _words(plan)
    parts = [Spent(name, words[name], us, us / total) for name, us in times.items() if us > 0.0]
    return tuple(sorted(parts, key=lambda part: -part.us))


def _step_parts(step: Step) -> Iterator[tuple[str, float]]:
    """Names and microseconds; they add up to the step's estimate."""
    launch, estimate = step.launch, step.estimate
    work, problem, device = launch.work, launch.problem, launch.device
    if launch.template.layout == "none":
        useful = min(estimate.flops / matrix_rate(problem, device) * 1e6, estimate.compute_us)
        yield USEFUL, useful
        yield BELOW_PEAK, estimate.compute_us - useful
    else:
        model, pack = cost_model(problem, device), packed_heads(launch.config, problem, len(launch.heads))
        # Nanoseconds of one worker, of one copy of the list, to microseconds of all.
        scale = work.schedule.copies / model.workers * 1e-3
        units_ns = _units_ns(launch, model)
        spent_ns = float(work.schedule.cost.sum(dtype=np.float64))
        yield BLOCKS, min(units_ns, spent_ns) * scale
        rest_ns = max(spent_ns - units_ns, 0.0)
        if launch.template.layout == "rows":
            yield SINGLE, rest_ns * scale
        else:
            tiles_ns, columns_ns = rest_ns, 0.0
            if work.gathered is not None and work.tiles is not None:
                tiles_ns = min(float(model.tiles(work.tiles, pack).sum(dtype=np.float64)), rest_ns)
                columns_ns = len(work.gathered.columns) * model.columns(work.gathered, pack)
                columns_ns = min(columns_ns, rest_ns - tiles_ns)
                yield GATHERED, columns_ns * scale
                yield SINGLE, (rest_ns - tiles_ns - columns_ns) * scale
            yield from _tile_parts(work, launch, model, tiles_ns * scale)
    yield IDLE, estimate.idle_us
    yield MEMORY, max(estimate.memory_us - estimate.compute_us - estimate.idle_us, 0.0)
    yield STARTING, estimate.launch_us


def _tile_parts(work: Work, launch: Launch, model: CostModel, tiles_us: float) -> Iterator[tuple[str, float]]:
    """Of contiguous tiles: their edges at the device's full rate, what a full tile loses to that, and the rest."""
    tiles = work.tiles
    if tiles is None or not tiles.tile_map.n_tiles:
        return
    tile_map, problem = tiles.tile_map, launch.problem
    copies, pack = len(launch.heads) * len(launch.batch), packed_heads(launch.config, problem, len(launch.heads))
    flops = 2.0 * tile_map.nnz * (problem.head_dim + problem.v_dim) * copies
    full_tile = float(model.tiles(_full_tile(tile_map.block_q, tile_map.block_kv), pack)[0])
    if_full_ns = full_tile * tile_map.nnz / (tile_map.block_q * tile_map.block_kv)
    share = min(if_full_ns / float(model.tiles(tiles, pack).sum(dtype=np.float64)), 1.0)
    useful = min(flops / matrix_rate(problem, launch.device) * 1e6, tiles_us * share)
    yield USEFUL, useful
    yield BELOW_PEAK, tiles_us * share - useful
    yield IN_VAIN, tiles_us * (1.0 - share)


@lru_cache(maxsize=32)
def _full_tile(block_q: int, block_kv: int) -> BlockTiles:
    return block_tiles(full().bind(block_q, block_kv), block_q, block_kv)


def _units_ns(launch: Launch, model: CostModel) -> float:
    """Of taking up and writing out what each item of the schedule yields."""
    work = launch.work
    is_rows = launch.template.layout == "rows"
    each = model.unit(work.block_q, is_rows=is_rows, is_scattered=is_scattered(work.ordering))
    shared = heads_sharing(launch.problem, launch.device, len(launch.heads)) if is_rows else 1
    return each * work.schedule.n_items * shared


def _words(plan: Plan) -> dict[str, str]:
    problem, device, steps = plan.problem, plan.device, plan.steps
    is_dense = any(step.launch.template.layout == "none" for step in steps)
    kernels = "torch's kernel" if is_dense else "kernels of tiles"
    n_items = sum(step.launch.work.schedule.n_items * step.launch.work.schedule.copies for step in steps)
    return {
        USEFUL: f"arithmetic of the edges, at the device's full {rate(matrix_rate(problem, device) * 1e-9)}",
        BELOW_PEAK: f"{kernels} run below that rate: softmax, and loads they wait for",
        IN_VAIN: f"pairs computed in vain: {_in_vain(steps, device)}",
        GATHERED: "gathered columns: keys and values fetched one by one, then multiplied as tiles",
        SINGLE: f"single edges: {_single(steps, problem, device)}",
        BLOCKS: f"loading q and writing out, for {n_items:,} block{'s' * (n_items > 1)} of queries",
        IDLE: f"uneven work: some of the {device.units} workers wait for the last",
        MEMORY: f"waiting for memory: q, k, v and out are {size(problem.tensor_bytes)}",
        STARTING: f"starting {'one kernel' if len(steps) == 1 else f'{len(steps)} kernels'}",
    }


def _in_vain(steps: tuple[Step, ...], device: Device) -> str:
    fill = tile_fill(steps)
    if fill is None:
        return "none"
    skipped = ", and keys that no vector of queries attends are skipped" if device.kind == "cpu" else ""
    return f"{1.0 - fill:.0%} of the pairs in its tiles do not attend{skipped}"


def _single(steps: tuple[Step, ...], problem: Problem, device: Device) -> str:
    """A GPU's row kernels fetch a row of k and of v for every edge; a CPU's caches hold many of them."""
    edges = sum(
        step.launch.work.rows.nnz * len(step.launch.heads) * len(step.launch.batch)
        for step in steps
        if step.launch.work.rows is not None
    )
    if device.kind == "cpu":
        return f"{edges:,} dot products, one at a time"
    return (
        f"a row of k and of v fetched for each, {size(edges * (problem.head_dim + problem.v_dim) * problem.itemsize)}"
    )
