"""The plan of another mask of the same structure: what was chosen stays, only index arrays are made.

This file decides which masks have the same structure, and how each launch of a plan is taken over: its template, back
end, configuration and order of tokens, over the same part of the mask. Nothing is analysed or weighed; whatever the new
mask's edges, the result is exact. It must not know how the choice was made.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import reduce
from operator import add

import numpy as np

from sparsec.backends.base import Launch, Problem, Work
from sparsec.cost import estimate
from sparsec.device import Device
from sparsec.errors import MaskError
from sparsec.layout import EdgeOrder, Ordering, reordered
from sparsec.masks.mask import BoundMask, Mask
from sparsec.planner.parts import distinct_masks, residue_part, rows_apart
from sparsec.planner.plans import Group, Plan
from sparsec.planner.works import build_work


def structure(mask: Mask) -> tuple[object, ...]:
    """How a mask is built: its constructors and how they are combined, whatever their arguments.

    Edges are edges, whether they came from CSR, a dense or sparse array, or a graph.
    """
    return type(mask).__name__, *(structure(operand) for operand in mask._operands())


def check_structure(old: Mask, new: Mask) -> None:
    """Raises where two masks are built in different ways.

    Raises:
        MaskError: Says both.
    """
    if structure(old) != structure(new):
        raise MaskError(
            f"update takes a mask built as {old} is, with other numbers or edges; {new} is built otherwise: compile it "
            "on its own"
        )


def renewed(plan: Plan, bound: BoundMask) -> Plan:
    """The plan with another mask of the same structure and lengths in place of its own.

    Raises:
        MaskError: The mask has another structure, or the plan rests on what the new mask lacks.
    """
    started = time.perf_counter()
    check_structure(plan.mask.mask, bound.mask)
    group_of = {(b, h): group for group in plan.groups for b in group.batch for h in group.heads}
    groups: list[Group] = []
    for each, heads, batch in distinct_masks(bound, plan.problem):
        twin = next((group for group in groups if group.bound is each), None)
        if twin is None:
            groups.append(_renewed_group(plan, group_of[batch[0], heads[0]], each, heads, batch))
        else:
            groups.append(shared_group(twin, heads, batch, plan.problem, plan.device))
    return replace(plan, mask=bound, groups=tuple(groups), planning_us=(time.perf_counter() - started) * 1e6)


def shared_group(
    twin: Group, heads: tuple[int, ...], batch: tuple[int, ...], problem: Problem, device: Device
) -> Group:
    """Other heads and batch elements of the same mask: the same launches, over the same index arrays."""

    def shared(launch: Launch) -> Launch:
        schedule = launch.work.schedule
        copies = max(1, schedule.copies * len(heads) // len(twin.heads))
        work = replace(launch.work, schedule=replace(schedule, copies=copies))
        return replace(launch, work=work, heads=heads, batch=batch)

    steps = []
    for step in twin.steps:
        launch = shared(step.launch)
        is_dense = launch.template.layout == "none"
        cost = step.estimate if is_dense else estimate(launch.work, problem, device, len(heads))
        steps.append(replace(step, launch=launch, estimate=cost))
    return replace(
        twin,
        heads=heads,
        batch=batch,
        is_whole_batch=batch == tuple(range(problem.batch)),
        steps=tuple(steps),
        estimate=reduce(add, (step.estimate for step in steps)),
        expected_us=None,
        backward=None if twin.backward is None else tuple(map(shared, twin.backward)),
    )


def _renewed_group(plan: Plan, group: Group, bound: BoundMask, heads: tuple[int, ...], batch: tuple[int, ...]) -> Group:
    edges = _edges(group, bound)

    def taken_over(launch: Launch, part: BoundMask) -> Launch:
        return replace(launch, work=_renewed_work(plan, launch, part, len(heads), edges), heads=heads, batch=batch)

    steps, parts = [], list(_parts(group, bound))
    for step, part in zip(group.steps, parts, strict=True):
        launch = taken_over(step.launch, part)
        is_dense = launch.template.layout == "none"
        cost = step.estimate if is_dense else estimate(launch.work, plan.problem, plan.device, len(heads))
        steps.append(replace(step, launch=launch, estimate=cost))
    backward = group.backward
    if backward is not None:
        # One launch for the whole mask, or one for each step.
        if len(backward) == 1:
            parts = [_in_order(bound, backward[0].work.ordering)]
        backward = tuple(taken_over(launch, part) for launch, part in zip(backward, parts, strict=True))
    return replace(
        group,
        bound=bound,
        heads=heads,
        batch=batch,
        is_whole_batch=batch == tuple(range(plan.problem.batch)),
        known_profile=None,
        steps=tuple(steps),
        estimate=reduce(add, (step.estimate for step in steps)),
        config_source=_kept(group.config_source),
        # What was measured was another mask.
        expected_us=None,
        backward=backward,
        backward_source=_kept(group.backward_source) if backward is not None else "",
    )


_KEPT = ", kept for another mask"


def _kept(source: str) -> str:
    return f"{source.removesuffix(_KEPT)}{_KEPT}"


def _edges(group: Group, bound: BoundMask) -> EdgeOrder | None:
    """What numbers the new mask's edges, where the score modifier counts them."""
    score = group.steps[0].launch.score
    if score is None or not score.needs_edges:
        return None
    score.check({"edge": bound.nnz})
    return EdgeOrder(bound)


def _renewed_work(plan: Plan, launch: Launch, part: BoundMask, n_heads: int, edges: EdgeOrder | None) -> Work:
    before = launch.work
    if launch.template.layout == "none":
        if part.nnz != before.bound.nnz or part != before.bound:
            raise MaskError(
                f"this plan runs {before.bound.mask} as dense attention, which {part.mask} is not: compile it on "
                "its own"
            )
        return before
    return build_work(
        launch.template,
        launch.config,
        part,
        plan.problem,
        plan.device,
        heads=n_heads,
        ordering=before.ordering,
        rows=before.rows.form if before.rows is not None and before.rows.form == "edges" else None,
        edges=edges,
    )


def _in_order(bound: BoundMask, order: Ordering) -> BoundMask:
    """The mask in an order of tokens."""
    return bound if order.q_order is None and order.kv_order is None else reordered(bound, order)


def _parts(group: Group, bound: BoundMask) -> tuple[BoundMask, ...]:
    """The mask of each step, in its order of tokens: the same parts that the group's own mask was taken apart into."""
    orders = [step.launch.work.ordering for step in group.steps]
    if len(group.steps) == 1:
        return (_in_order(bound, orders[0]),)
    if not group.is_joined:
        rows = orders[1].q_order
        assert rows is not None, "heavy rows have an order of their own"
        apart = rows_apart(bound, rows.astype(np.int64))
        if apart is not None:
            return apart
        what = "rows apart that now have too many edges to list"
    else:
        split = residue_part(bound)
        before = residue_part(group.bound)
        if split is not None and before is not None and split[2] == before[2]:
            return reordered(split[0], orders[0]), split[1]
        what = "a part of another period"
    raise MaskError(
        f"this plan runs {group.bound.mask} in two parts, and {bound.mask} has {what}: compile it on its own"
    )
