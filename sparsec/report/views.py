"""What the page's map draws: views of a group's mask, each in layers by who takes which edges.

A view is the mask in one order of tokens. Where the plan reorders them, the tokens' own order is one view and each
reordered launch another. This file decides the views, their layers and what each tile costs. It must not know how they
are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sparsec.backends.base import Work
from sparsec.cost import CostModel, cost_model
from sparsec.layout.tiles import BlockTiles
from sparsec.masks import BoundMask, ranges
from sparsec.masks.ranges import IntArray
from sparsec.planner import Group, Plan, Step
from sparsec.planner.works import IDENTITY, heads_sharing, is_scattered, packed_heads, span_of
from sparsec.report.runs import Runs, pack, runs_of_edges, runs_of_mask
from sparsec.report.territory import KINDS, cell_size, cells, is_listed, territory

# Tiles whose costs are told one by one; of more, what a full and a partial one costs on average.
_MOST_TILES: Final = 400_000
# Edges of a reordered launch that are put back among the tokens one by one.
_MOST_MOVED: Final = 600_000
_OVERVIEW_CELLS: Final = 256
_MAIN_KINDS: Final = {"rows": "rows", "tiles": "tiles", "hybrid": "tiles", "none": "dense"}

Json = dict[str, Any]  # Any: JSON values have no common type


@dataclass(frozen=True, slots=True)
class _Layer:
    """Edges that one part of one launch takes; None for `runs` means all that the other layers leave."""

    kind: str
    step: int
    runs: Runs


def views(made: Plan, group: Group) -> list[Json]:
    """The views of a group: the tokens' own order first."""
    first = made.steps.index(group.steps[0])
    found = [_token_view(group, first)]
    for number, step in enumerate(group.steps):
        work = step.launch.work
        if work.ordering.q_order is not None:
            layers = _own_layers(step, first + number, work.bound)
            overview = _overview(work.bound, _MAIN_KINDS[step.launch.template.layout])
            found.append(_view(f"as run: {work.ordering.name}", work.bound, layers, overview, first + number))
    return found


def step_costs(made: Plan, step: Step, group: Group) -> Json:
    """What the parts of a launch cost, nanoseconds on one worker for one head."""
    launch, work = step.launch, step.launch.work
    model = cost_model(made.problem, made.device)
    is_rows = launch.template.layout == "rows"
    shared = heads_sharing(made.problem, made.device, len(launch.heads)) if is_rows else 1
    together = packed_heads(launch.config, made.problem, len(launch.heads))
    costs: Json = {
        "unit": round(model.unit(work.block_q, is_rows=is_rows, is_scattered=is_scattered(work.ordering)), 2),
        "blockQ": work.block_q,
        "edge": round(model.edge(span_of(group.profile), shared), 3),
    }
    if work.gathered is not None:
        costs["column"] = round(model.columns(work.gathered, together) / together, 3)
    if work.tiles is not None:
        costs["tiles"] = _tile_costs(work.tiles, model, together)
    return costs


def _token_view(group: Group, first: int) -> Json:
    layers: list[_Layer] = []
    rest: Step | None = None
    for number, step in enumerate(group.steps):
        work = step.launch.work
        if work.ordering.q_order is None:
            layers += _own_layers(step, first + number, work.bound)
        elif is_listed(step) or work.bound.nnz <= _MOST_MOVED or work.ordering.kv_order is None:
            layers += _moved_layers(step, first + number)
        else:
            rest = step
            everything = runs_of_mask(group.bound, group.profile.keys_per_range)
            kind = _MAIN_KINDS[step.launch.template.layout]
            layers.insert(0, _Layer(kind, first + number, everything))
    is_moved = any(step.launch.work.ordering.q_order is not None for step in group.steps)
    title = IDENTITY.name if is_moved else "the mask"
    held = territory(group)
    overview = {
        "block": held.block,
        "rows": held.counts.shape[1],
        "columns": held.counts.shape[2],
        "counts": {kind: pack(held.counts[KINDS.index(kind)].ravel().clip(max=2**31 - 1)) for kind in held.kinds},
    }
    is_needed = not all(layer.runs.is_whole for layer in layers)
    view = _view(title, group.bound, layers, overview if is_needed else None, None)
    # The first layer then holds every edge, and the others take theirs from it.
    return view | {"firstHoldsAll": rest is not None and len(layers) > 1}


def _view(title: str, bound: BoundMask, layers: list[_Layer], overview: Json | None, step: int | None) -> Json:
    is_whole = all(layer.runs.is_whole for layer in layers)
    return {
        "title": title,
        "qLen": bound.q_len,
        "kvLen": bound.kv_len,
        "nnz": bound.nnz,
        "step": step,
        "firstHoldsAll": False,
        "isWhole": is_whole,
        "sampledRows": 0 if is_whole else max(layer.runs.n_rows for layer in layers if not layer.runs.is_whole),
        "overview": None if is_whole else overview,
        "layers": [{"kind": layer.kind, "step": layer.step, "runs": layer.runs.packed()} for layer in layers],
    }


def _overview(bound: BoundMask, kind: str) -> Json:
    block = cell_size(bound, _OVERVIEW_CELLS)
    counts = cells(bound, block)
    packed = pack(counts.ravel().clip(max=2**31 - 1))
    return {"block": block, "rows": counts.shape[0], "columns": counts.shape[1], "counts": {kind: packed}}


def _own_layers(step: Step, number: int, bound: BoundMask) -> list[_Layer]:
    """A launch's edges, where its kernel sees them."""
    if step.launch.template.layout == "hybrid":
        return [
            _Layer(kind, number, runs_of_edges(bound.q_len, q, kv))
            for kind, (q, kv) in _hybrid_edges(step.launch.work).items()
            if len(q)
        ]
    kind = _MAIN_KINDS[step.launch.template.layout]
    sample = bound.rows(0, min(bound.q_len, 1 << 12))
    keys_per_range = sample.nnz / max(len(sample.start), 1)
    return [_Layer(kind, number, runs_of_mask(bound, keys_per_range))]


def _moved_layers(step: Step, number: int) -> list[_Layer]:
    """A launch's edges, where the tokens stand."""
    work = step.launch.work
    if step.launch.template.layout == "hybrid":
        parts = _hybrid_edges(work)
    else:
        parts = {_MAIN_KINDS[step.launch.template.layout]: ranges.to_edges(work.bound.rows(0, work.bound.q_len))}
    q_order, kv_order = work.ordering.q_order, work.ordering.kv_order
    layers = []
    for kind, (q, kv) in parts.items():
        if not len(q):
            continue
        q = q if q_order is None else q_order[q].astype(np.int64)
        kv = kv if kv_order is None else kv_order[kv].astype(np.int64)
        layers.append(_Layer(kind, number, runs_of_edges(step.launch.problem.q_len, q, kv)))
    return layers


def _hybrid_edges(work: Work) -> dict[str, tuple[IntArray, IntArray]]:
    """Edges in contiguous tiles, in gathered columns, and single ones, by position."""
    assert work.gathered is not None, "a hybrid has gathered columns"
    assert work.rows is not None, "a hybrid has single edges"
    gathered = work.gathered.edges()
    single = np.repeat(np.arange(work.bound.q_len), np.diff(work.rows.indptr)), work.rows.columns.astype(np.int64)
    q, kv = ranges.to_edges(work.bound.rows(0, work.bound.q_len))
    others = np.concatenate([each[0] * work.bound.kv_len + each[1] for each in (gathered, single)])
    is_left = ~np.isin(q * work.bound.kv_len + kv, others)
    return {"tiles": (q[is_left], kv[is_left]), "gathered columns": gathered, "single edges": single}


def _tile_costs(tiles: BlockTiles, model: CostModel, together: int) -> Json:
    tile_map = tiles.tile_map
    costs = model.tiles(tiles, together) / together if tile_map.n_tiles else np.zeros(0, np.float32)
    full, partial = costs[tile_map.is_full], costs[~tile_map.is_full]
    told: Json = {
        "blockQ": tile_map.block_q,
        "blockKv": tile_map.block_kv,
        "count": tile_map.n_tiles,
        "fullCount": int(tile_map.is_full.sum()),
        "full": round(float(full.mean()), 2) if len(full) else None,
        "partial": round(float(partial.mean()), 2) if len(partial) else None,
    }
    if 0 < tile_map.n_tiles <= _MOST_TILES:
        table, which = np.unique(np.round(costs, -1), return_inverse=True)
        told |= {
            "indptr": pack(tile_map.indptr),
            "indices": pack(tile_map.indices),
            "table": [round(float(cost), 1) for cost in table],
            "which": pack(which),
        }
    return told
