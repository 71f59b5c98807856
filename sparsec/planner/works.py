"""Index arrays for a template and configuration: a mask becomes the `Work` of a launch.

This file decides how each layout is built and scheduled, at the costs of the device. It must not know which template,
configuration or order is best.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from sparsec.analysis import MaskProfile
from sparsec.backends.base import MAX_HEADS_SHARING, Problem, Work
from sparsec.cost import CostModel, cost_model
from sparsec.device import Device
from sparsec.layout import (
    EdgeOrder,
    Ordering,
    RowForm,
    RowLists,
    Schedule,
    block_tiles,
    hybrid_split,
    row_lists,
    schedule,
)
from sparsec.masks.mask import BoundMask
from sparsec.template import Config, Template

IDENTITY = Ordering("tokens' own order", None, None)

# What index arrays depend on, of a configuration.
LAYOUT_TUNABLES = ("block_q", "block_kv", "tile_percent", "column_queries", "pack_gqa")

# The CUDA kernels bin rows by degree themselves; for the estimate, their work comes in blocks of so many.
_COSTED_ROWS = 8

# An order is scattered when more than this share of its steps differ from the first.
_IRREGULAR_SHARE = 0.1


def build_work(
    template: Template,
    config: Config,
    bound: BoundMask,
    problem: Problem,
    device: Device,
    *,
    heads: int,
    ordering: Ordering = IDENTITY,
    span_keys: float | None = None,
    rows: RowForm | RowLists | None = None,
    edges: EdgeOrder | None = None,
    is_sample: bool = False,
) -> Work:
    """The index arrays of a launch.

    Args:
        template: Decides the layout.
        config: Its tile sizes and thresholds.
        bound: The mask, already in position space.
        problem: The shape, for the costs.
        device: Whose costs.
        heads: How many heads run it.
        ordering: Which token stands at each position of `bound`.
        span_keys: Among how many keys a row's keys lie, for the cost of fetching them; all by default.
        rows: The rows, where they are at hand, or how they are stored, where that is known to suit; the smallest form
            that fits is found otherwise.
        edges: What numbers the edges, where the score modifier asks for it; tiles are then in the tokens' own order.
        is_sample: `bound` is a few rows of the mask: its work is costed, and not cut up.
    """
    model = cost_model(problem, device)
    # A whole mask's units are cut up for all workers; a few sampled ones would all look heavy.
    cut = partial(schedule, workers=1, max_split=1) if is_sample else partial(schedule, workers=model.workers)
    copies = heads * problem.batch
    span = float(bound.kv_len) if span_keys is None else span_keys
    if template.layout == "rows":
        shared = heads_sharing(problem, device, heads)
        if not isinstance(rows, RowLists):
            rows = row_lists(bound, rows if edges is None else "edges")
        work = _row_work(bound, config, model, cut, (copies // shared, shared), ordering, span, rows)
        if edges is None or work.rows is None:
            return work
        return replace(work, numbers=edges.of_rows(work.rows, ordering))
    assert edges is None or ordering is IDENTITY, "only rows are numbered in another order of tokens"
    pack = packed_heads(config, problem, heads)
    shares = copies // pack, pack
    if template.layout == "tiles":
        work = _tile_work(bound, config, model, cut, shares, ordering)
        return work if edges is None or work.tiles is None else replace(work, numbers=edges.of_tiles(work.tiles))
    if template.layout == "hybrid":
        work = _hybrid_work(bound, config, model, cut, shares, ordering, span)
        if edges is None or work.tiles is None or work.gathered is None or work.rows is None:
            return work
        return replace(work, numbers=edges.of_hybrid(work.tiles, work.gathered, work.rows))
    empty = schedule(np.zeros(2, np.int64), 0.0, workers=1, copies=copies)
    return Work(bound, ordering, bound.q_len, empty)


def is_scattered(ordering: Ordering) -> bool:
    """Whether neighbouring positions are tokens far apart in no regular way."""
    order = ordering.q_order
    if order is None or len(order) < 3:
        return False
    steps = np.diff(order[: 1 << 12])
    return bool((steps != steps[0]).mean() > _IRREGULAR_SHARE)


def span_of(profile: MaskProfile) -> float:
    """Among about how many keys the keys of neighbouring rows lie."""
    return min(float(profile.shape[1]), 2.0 * profile.bandwidth_mean + 256.0)


def heads_sharing(problem: Problem, device: Device, heads: int) -> int:
    """How many query heads the row kernel runs side by side over the same keys, where all heads have one mask."""
    if device.kind != "cpu" or heads != problem.q_heads:
        return 1
    return max(n for n in range(1, MAX_HEADS_SHARING + 1) if problem.group % n == 0)


def packed_heads(config: Config, problem: Problem, heads: int) -> int:
    """How many heads of a group a tile takes together, of so many that a launch serves."""
    return math.gcd(config.get("pack_gqa", 1), problem.group, heads)


def _row_work(
    bound: BoundMask,
    config: Config,
    model: CostModel,
    cut: Callable[..., Schedule],
    copies: tuple[int, int],
    ordering: Ordering,
    span: float,
    rows: RowLists,
) -> Work:
    """`copies`: how often the list is run, and the heads that walk it together each time."""
    n_copies, shared = copies
    block_q = config.get("block_q", _COSTED_ROWS)
    before = np.concatenate(([0], np.cumsum(rows.degrees())))
    n_units = -(-bound.q_len // block_q)
    indptr = before[np.minimum(np.arange(n_units + 1) * block_q, bound.q_len)]
    edge = model.edge(span, shared) * shared
    planned = cut(
        indptr,
        edge,
        copies=n_copies,
        item_cost=model.unit(block_q, is_rows=True, is_scattered=is_scattered(ordering)) * shared,
        min_piece=4096 * edge,
    )
    # The kernel counts edges from the first of the unit.
    base = indptr[planned.unit]
    planned = replace(planned, start=planned.start - base, stop=planned.stop - base)
    return Work(bound, ordering, block_q, planned, rows=rows)


def _tile_work(
    bound: BoundMask,
    config: Config,
    model: CostModel,
    cut: Callable[..., Schedule],
    shared: tuple[int, int],
    ordering: Ordering,
) -> Work:
    """`shared`: how often the list is run, and the heads that are packed into each tile."""
    copies, pack = shared
    block_q = config["block_q"]
    tiles = block_tiles(bound, block_q, config["block_kv"])
    unit = model.unit(block_q, is_rows=False, is_scattered=is_scattered(ordering))
    planned = cut(
        tiles.tile_map.indptr,
        model.tiles(tiles, pack),
        copies=copies,
        item_cost=unit,
        min_piece=20.0 * unit,
    )
    return Work(bound, ordering, block_q, planned, tiles=tiles)


def _hybrid_work(
    bound: BoundMask,
    config: Config,
    model: CostModel,
    cut: Callable[..., Schedule],
    shared: tuple[int, int],
    ordering: Ordering,
    span: float,
) -> Work:
    """`shared`: as for tiles."""
    copies, pack = shared
    block_q, block_kv = config["block_q"], config["block_kv"]
    threshold = max(1, config["tile_percent"] * block_q * block_kv // 100)
    layout = hybrid_split(bound, block_q, block_kv, threshold, config["column_queries"])
    tile_costs = model.tiles(layout.tiles, pack)
    costs = layout.entry_costs(0.0, model.columns(layout.gathered, pack), model.edge(span, pack) * pack)
    indptr = layout.entry_indptr()
    # A unit's tiles are its first entries.
    n_tiles = np.diff(layout.tiles.tile_map.indptr)
    costs[np.arange(len(tile_costs)) + np.repeat(indptr[:-1] - layout.tiles.tile_map.indptr[:-1], n_tiles)] = tile_costs
    # A row with single edges is taken up again by the row kernel; its block's last entry bears that.
    has_edges = np.flatnonzero(layout.leftovers.degrees())
    rows_again = np.bincount(has_edges // block_q, minlength=len(indptr) - 1)
    blocks = np.flatnonzero(rows_again)
    costs[indptr[blocks + 1] - 1] += (rows_again[blocks] * pack * model.unit(1, is_rows=True)).astype(np.float32)
    unit = model.unit(block_q, is_rows=False, is_scattered=is_scattered(ordering))
    planned = cut(
        indptr,
        costs,
        copies=copies,
        item_cost=unit,
        min_piece=20.0 * unit,
    )
    return Work(
        bound,
        ordering,
        block_q,
        planned,
        items=layout.items(planned),
        tiles=layout.tiles,
        gathered=layout.gathered,
        rows=layout.leftovers,
    )
