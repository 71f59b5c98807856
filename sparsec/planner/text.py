"""A plan as plain text, 80 columns wide: what `print(attn.plan)` and `sparsec explain` show.

This file decides the words and the order of what is told. It must not decide anything else: every figure is a plan's.
"""

from __future__ import annotations

import textwrap

from sparsec.analysis import MaskProfile
from sparsec.backends.base import Launch, Problem
from sparsec.planner.advice import advice
from sparsec.planner.ceiling import ceiling, fetched_bytes, tile_fill, tile_rate_share
from sparsec.planner.graphs import graph_of
from sparsec.planner.plans import Candidate, Group, Plan, Step
from sparsec.planner.words import duration, rate, size

WIDTH = 80
_SHOWN_ALTERNATIVES = 6
# Fewer keys in a run than this are no run.
_FEW_KEYS = 4.0
# A loss below a twentieth is not told.
_NEARLY_FULL = 0.95


def plan_text(plan: Plan) -> str:
    """The plan, told in the order a reader asks: what it is for, what runs, what else was weighed, what could not."""
    problem = plan.problem
    lines = [
        *_wrapped("mask     ", _shortened(str(plan.mask.mask))),
        *_wrapped(
            "problem  ",
            f"{problem.q_len:,} queries × {problem.kv_len:,} keys, "
            f"{_heads(problem)}, head_dim {problem.head_dim}"
            + (f", v_dim {problem.v_dim}" if problem.v_dim != problem.head_dim else "")
            + f", {problem.dtype}"
            + (f", batch {problem.batch}" if problem.batch > 1 else ""),
        ),
        *_wrapped("device   ", f"{plan.device.name}: {plan.device.label} ({plan.device.key})"),
    ]
    for group in plan.groups:
        lines += ["", *_group_lines(plan, group)]
    lines += ["", *_wrapped("ceiling  ", ceiling_words(plan))]
    sentences = advice(plan)
    if sentences:
        lines += ["", "advice"]
        for sentence in sentences:
            lines += _wrapped("  ", sentence)
    lines += ["", f"planned in {duration(plan.planning_us)}"]
    return "\n".join(lines)


def _group_lines(plan: Plan, group: Group) -> list[str]:
    lines = []
    if len(plan.groups) > 1:
        lines += _wrapped("heads    ", f"{_listed(group.heads)} of batch elements {_listed(group.batch)}")
        lines += _wrapped("mask     ", _shortened(str(group.bound.mask)))
    lines += _profile_lines(group)
    lines.append("")
    lines.append("what runs" + (", joined by log-sum-exp" if group.is_joined else ""))
    for number, step in enumerate(group.steps, 1):
        lines += _step_lines(number, step)
    estimate = group.estimate
    useful = rate(estimate.flops / group.us * 1e-3)
    by_records = "" if group.expected_us is None else f"{duration(group.us)} by records, "
    lines += _wrapped(
        "  total  ",
        f"{by_records}estimated {duration(estimate.us)}, {useful} of useful work; "
        f"most of it goes to {estimate.limiter} (configuration from the {group.config_source})",
    )
    if group.backward is not None:
        lines += _wrapped("  backward  ", "; ".join(map(_launch_words, group.backward)))
        lines += _wrapped("            ", f"(configuration from the {group.backward_source})")
    if group.alternatives:
        lines += ["", "what else could run"]
        for candidate in group.alternatives[:_SHOWN_ALTERNATIVES]:
            lines += _candidate_lines(candidate, group.us)
        hidden = len(group.alternatives) - _SHOWN_ALTERNATIVES
        if hidden > 0:
            lines.append(f"  and {hidden} slower {'one' if hidden == 1 else 'ones'}")
    if group.refusals:
        lines += ["", "what could not"]
        for refusal in group.refusals:
            lines += _wrapped("  ", str(refusal))
    return lines


def _launch_words(launch: Launch) -> str:
    order = launch.work.ordering
    settings = ", ".join(filter(None, [str(launch.config), order.name if order.nbytes else ""]))
    return f"{launch.template.name} on {launch.backend} ({settings})"


def _profile_lines(group: Group) -> list[str]:
    profile = group.profile
    fills = ", ".join(f"{_percent(tile.fill)} at {tile.block}" for tile in profile.tiles)
    heavy = f"; {profile.q.n_heavy:,} heavy" if profile.q.n_heavy else ""
    empty = f"; {profile.q.n_empty:,} empty" if profile.q.n_empty else ""
    sampled = f" (from {profile.sampled:.0%} of the rows)" if profile.sampled is not None else ""
    rows = (
        ("edges    ", f"{profile.nnz:,}, density {profile.density:.3%}; {_form(profile)}"),
        ("degrees  ", f"{profile.q.mean:,.1f} keys a query, at most {profile.q.max:,}{heavy}{empty}"),
        ("         ", f"{profile.kv.mean:,.1f} queries a key, at most {profile.kv.max:,}"),
        ("tiles    ", f"filled {fills}{sampled}"),
        ("reach    ", f"{profile.bandwidth_mean:,.0f} tokens from the diagonal, at most {profile.bandwidth_max:,.0f}"),
        ("graph    ", _graph_words(group)),
    )
    return [line for label, text in rows for line in _wrapped(label, text)]


def _percent(share: float) -> str:
    """In whole percents; what is there is not told as nothing."""
    return "<1%" if 0.0 < share < 0.005 else f"{share:.0%}"


def _form(profile: MaskProfile) -> str:
    """What its rows look like."""
    steps = f" in steps of {profile.common_step}" if profile.common_step > 1 else ""
    if profile.is_toeplitz:
        return f"every query attends at the same offsets{steps}"
    if profile.keys_per_range < _FEW_KEYS:
        return "keys scattered along the rows"
    return f"rows of runs{steps} of {profile.keys_per_range:,.0f} keys"


def _graph_words(group: Group) -> str:
    graph = graph_of(group)
    if graph is None:
        return "not looked at: too many scattered edges"
    parts = "1 component" if graph.n_components == 1 else f"{graph.n_components:,} components"
    if graph.n_components > 1:
        parts += f", the largest {graph.largest_component:.0%} of it"
    return (
        f"of {graph.n_nodes:,} blocks of {graph.block:,} tokens: {graph.degree_mean:,.1f} neighbours a block, at most "
        f"{graph.degree_max:,}; {graph.near_share:.0%} near the diagonal; {parts}"
    )


def ceiling_words(plan: Plan) -> str:
    """The least time that the device allows, how near the plan comes, and what lies between."""
    roof = ceiling(plan)
    what = (
        f"all useful arithmetic at {rate(roof.flops_per_s * 1e-9)}"
        if roof.bound == "arithmetic"
        else f"q, k, v and out moved once at {roof.bytes_per_s / 1e9:,.0f} GB/s"
    )
    lost = []
    fill = tile_fill(plan.steps)
    if fill is not None and fill < _NEARLY_FULL:
        lost.append(f"{1 - fill:.0%} of the pairs in its tiles do not attend")
    rate_share = tile_rate_share(plan)
    if rate_share is not None:
        lost.append(f"kernels of tiles are taken to reach {rate_share:.0%} of the matrix units' rate")
    fetched = fetched_bytes(plan)
    if fetched is not None and fetched > plan.problem.tensor_bytes:
        lost.append(f"a row of k and of v is fetched for every edge, {size(fetched)} in all")
    estimate = plan.estimate
    for name, us in (("uneven work", estimate.idle_us), ("starting", estimate.launch_us)):
        if us > (1.0 - _NEARLY_FULL) * estimate.us:
            lost.append(f"{name} takes {us / estimate.us:.0%}")
    because = f"; {', '.join(lost)}" if lost else ""
    return f"{duration(roof.us)}, {what}: the estimate reaches {roof.share:.0%} of it{because}"


def _step_lines(number: int, step: Step) -> list[str]:
    launch, work = step.launch, step.launch.work
    lines = _wrapped(f"  {number}. ", f"{launch.template.name} on {launch.backend}: {launch.template.summary}")
    edges = f"{step.edges} ({work.bound.nnz:,} edges)" if launch.template.layout != "none" else step.edges
    lines += _wrapped("     edges    ", edges)
    if work.ordering.q_order is not None:
        fill = tile_fill([step])
        filled = f": its tiles are {fill:.0%} full" if fill is not None else ""
        lines.append(f"     order    {work.ordering.name}{filled}")
    if launch.config.items:
        lines += _wrapped("     config   ", str(launch.config))
    if launch.template.layout == "none":
        return [*lines, f"     estimate {duration(step.estimate.us)}"]
    lines += _wrapped("     walks    ", "; ".join(_work_parts(step)))
    balance = work.schedule.balance(launch.device.units)
    split = f", {len(work.schedule.merge_unit)} blocks split" if work.schedule.n_slots else ""
    lines += _wrapped(
        "     work     ",
        f"{work.schedule.n_items:,} items a head{split}; {balance - 1:.1%} idle on {launch.device.units} workers",
    )
    return [*lines, f"     estimate {duration(step.estimate.us)}"]


def _work_parts(step: Step) -> list[str]:
    work = step.launch.work
    parts = []
    if work.tiles is not None:
        tiles = work.tiles.tile_map
        n_full = int(tiles.is_full.sum())
        parts.append(
            f"{tiles.n_tiles:,} tiles of {tiles.block_q}×{tiles.block_kv} ({n_full:,} full, "
            f"{work.tiles.n_patterns:,} patterns)"
        )
    if work.gathered is not None:
        parts.append(f"{len(work.gathered.columns):,} gathered columns ({work.gathered.nnz:,} edges)")
    if work.rows is not None:
        form = {
            "offsets": f"{len(work.rows.start)} progression{'s' * (len(work.rows.start) > 1)} of offsets",
            "ranges": f"{len(work.rows.start):,} ranges of keys",
            "edges": f"{len(work.rows.columns):,} single edges",
        }[work.rows.form]
        parts.append(form)
    parts.append(f"{size(work.nbytes)} of index arrays")
    return parts


def _candidate_lines(candidate: Candidate, best_us: float) -> list[str]:
    about = "about " if candidate.estimate is None else ""
    return _wrapped("  ", f"{candidate}: {about}{duration(candidate.us)}, {candidate.us / best_us:.2f}×")


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False
    ) or [label.rstrip()]


def _heads(problem: Problem) -> str:
    heads = "1 head" if problem.q_heads == 1 else f"{problem.q_heads} heads"
    return heads if problem.kv_heads == problem.q_heads else f"{heads} over {problem.kv_heads} of k and v"


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:280]} … ({len(text):,} characters)"


def _listed(numbers: tuple[int, ...]) -> str:
    if len(numbers) > 2 and numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
