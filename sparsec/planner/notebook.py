"""A plan in a notebook: what matters at a glance, and the whole text folded below it.

This file decides which figures a glance takes in. It must not decide anything else: every figure is the plan's.
"""

from __future__ import annotations

from html import escape

from sparsec.planner.ceiling import ceiling_words
from sparsec.planner.plans import Plan
from sparsec.planner.spending import spending
from sparsec.planner.text import plan_text, verdict
from sparsec.planner.words import percent, size

# Of the time, at a glance.
_PARTS = 3


def plan_html(plan: Plan) -> str:
    """An HTML fragment without scripts or styles of its own, readable on light and dark."""
    mask = str(plan.mask.mask)
    mask = mask if len(mask) <= 120 else f"{mask[:117]} …"
    runs = []
    for step in plan.steps:
        order = step.launch.work.ordering
        runs.append(
            f"{step.launch.template.name} on {step.launch.backend}"
            + (f" ({step.launch.config})" if step.launch.config.items else "")
            + (f", {order.name}" if order.q_order is not None else "")
        )
    facts = {
        "runs": "; ".join(runs),
        "takes": verdict(plan),
        "at best": ceiling_words(plan),
        "time goes to": "; ".join(f"{percent(part.share)} {part.words}" for part in spending(plan)[:_PARTS]),
        "edges": f"{plan.groups[0].profile.nnz:,}, density {plan.groups[0].profile.density:.3%}",
        "index arrays": size(plan.layout_bytes),
    }
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in facts.items()
    )
    return (
        f"<div><code>{escape(mask)}</code> on {escape(plan.device.name)}<table>{rows}</table>"
        f"<details><summary>the whole plan</summary><pre>{escape(plan_text(plan))}</pre></details></div>"
    )
