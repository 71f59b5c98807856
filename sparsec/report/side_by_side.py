"""Plans side by side: one mask on every device, at several lengths, or two masks.

This file decides which figures are compared and in which words. It must not know how a plan is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, RenderableType

from sparsec.errors import UnsupportedError
from sparsec.planner import Plan
from sparsec.planner.ceiling import ceiling, ceiling_words, tile_fill
from sparsec.planner.lengths import dense_us
from sparsec.planner.spending import USEFUL, spending
from sparsec.planner.words import duration, percent, rate, size
from sparsec.report.tables import Column, table

# Times nearer to each other than this are the same.
_SAME = 1.02

# Parts of the time that are named for a device.
_REASONS = 3

# A figure of a comparison, and how it reads.
Facts = dict[str, str]


def devices_table(plans: Sequence[tuple[str, Plan | UnsupportedError]], console: Console) -> RenderableType:
    """One row a device, the quickest first; those that cannot serve come last, with the reason."""
    columns = [
        Column("device"),
        Column("estimate", "right"),
        Column("useful", "right"),
        Column("of ceiling", "right"),
        Column("runs"),
    ]
    made = [(name, each) for name, each in plans if isinstance(each, Plan)]
    made.sort(key=lambda pair: pair[1].us)
    rows = [
        [name, duration(each.us), _useful(each), f"{ceiling(each).share:.0%}", launches(each)] for name, each in made
    ]
    rows += [[name, "–", "–", "–", "nothing can run it"] for name, each in plans if isinstance(each, UnsupportedError)]
    return table(columns, rows, console)


def devices_reasons(plans: Sequence[tuple[str, Plan | UnsupportedError]]) -> Iterator[str]:
    """For each device, the quickest first, what its ceiling is and what most of the time goes to beyond it."""
    made = [(name, each) for name, each in plans if isinstance(each, Plan)]
    for name, each in sorted(made, key=lambda pair: pair[1].us):
        lost = [part for part in spending(each) if part.name != USEFUL][:_REASONS]
        parts = ", ".join(f"{percent(part.share)} {part.name}" for part in lost)
        yield f"{name}: at best {ceiling_words(each)}. Of its time are {parts}."


def lengths_table(plans: Sequence[Plan], console: Console) -> RenderableType:
    """One row a length."""
    columns = [
        Column("tokens", "right"),
        Column("edges", "right"),
        Column("density", "right"),
        Column("estimate", "right"),
        Column("dense", "right"),
        Column("runs"),
    ]
    rows = []
    for each in plans:
        nnz = sum(len(group.heads) * group.profile.nnz for group in each.groups) / each.problem.q_heads
        density = nnz / (each.problem.q_len * each.problem.kv_len)
        rows.append(
            [
                f"{each.problem.q_len:,}",
                f"{nnz:,.0f}",
                f"{density:.3%}",
                duration(each.us),
                duration(dense_us(each)),
                launches(each),
            ]
        )
    return table(columns, rows, console)


def masks_table(plans: tuple[Plan, Plan], console: Console) -> RenderableType:
    """One row a fact, the two masks beside each other."""
    first, second = (_facts(each) for each in plans)
    rows = [[name, first[name], second[name]] for name in first]
    return table([Column(""), Column("A", "right"), Column("B", "right")], rows, console)


def masks_verdict(first: Plan, second: Plan) -> str:
    """Which of two masks is the slower one, and what of it is due to more edges."""
    is_swapped = second.us < first.us
    fast, slow = (second, first) if is_swapped else (first, second)
    times = slow.us / fast.us
    if times < _SAME:
        return "Both take the same time" + "".join(_on_orders(first, second)) + "."
    edges = slow.estimate.flops / max(fast.estimate.flops, 1.0)
    worse = ceiling(slow), ceiling(fast)
    names = ("A", "B") if is_swapped else ("B", "A")
    text = f"{names[0]} takes {times:.2f}× as long as {names[1]}, with {edges:.2f}× the edges"
    fills = tile_fill(slow.steps), tile_fill(fast.steps)
    if None not in fills and abs(fills[0] - fills[1]) > 0.05:  # type: ignore[operator]  # neither is None
        text += f"; its tiles are {fills[0]:.0%} full, the other's {fills[1]:.0%}"
    return f"{text}; it reaches {worse[0].share:.0%} of its ceiling, the other {worse[1].share:.0%}."


def refused(error: UnsupportedError) -> list[dict[str, str]]:
    """What could not run and why, as JSON values."""
    return [{"what": str(getattr(each, "what", "")), "reason": each.reason} for each in error.refusals]


def launches(made: Plan) -> str:
    """What a plan runs, in a few words."""
    words = []
    for step in made.steps:
        order = step.launch.work.ordering
        words.append(step.launch.template.name + (f" ({order.name})" if order.q_order is not None else ""))
    return " + ".join(dict.fromkeys(words))


def _on_orders(first: Plan, second: Plan) -> Iterator[str]:
    for name, made in (("A", first), ("B", second)):
        for step in made.steps:
            order = step.launch.work.ordering
            if order.q_order is not None:
                yield f"; {name} in another order of tokens ({order.name})"


def _facts(made: Plan) -> Facts:
    group = made.groups[0]
    profile = group.profile
    runs = tile_fill(made.steps)
    return {
        "edges": f"{profile.nnz:,}",
        "density": f"{profile.density:.3%}",
        "keys a query": f"{profile.q.mean:,.1f}",
        "at most": f"{profile.q.max:,}",
        "heavy rows": f"{profile.q.n_heavy:,}",
        "from the diagonal": f"{profile.bandwidth_mean:,.0f}",
        "tiles of 64 filled": percent(profile.fill(64).fill),
        "tiles run filled": "–" if runs is None else f"{runs:.0%}",
        "runs": launches(made),
        "index arrays": size(made.layout_bytes),
        "estimate": duration(made.us),
        "useful": _useful(made),
        "of ceiling": f"{ceiling(made).share:.0%}",
        "most time goes to": spending(made)[0].name,
    }


def _useful(made: Plan) -> str:
    return rate(made.estimate.flops / made.us * 1e-3)


def side_by_side(kind: str, plans: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:  # Any: JSON values
    """The JSON document of several plans."""
    from sparsec.planner.plans import PLAN_SCHEMA

    return {"schema": PLAN_SCHEMA, **more, kind: list(plans)}
