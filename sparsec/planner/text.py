"""A plan as plain text, 80 columns wide: what `print(attn.plan)` and `sparsec explain` show.

This file decides the words and the order of what is told. It must not decide anything else: every figure is a plan's.
"""

from __future__ import annotations

import re
import textwrap

from sparsec.analysis import MaskProfile
from sparsec.backends.base import Launch, Problem
from sparsec.planner.advice import advice
from sparsec.planner.ceiling import ceiling_words, tile_fill
from sparsec.planner.graphs import graph_of
from sparsec.planner.lengths import dense_us
from sparsec.planner.plans import Candidate, Group, Plan, Step
from sparsec.planner.spending import spending
from sparsec.planner.words import duration, percent, rate, size
from sparsec.planner.works import packed_heads

WIDTH = 80
_WIDE = 60
_SHOWN_ALTERNATIVES = 6
# Fewer keys in a run than this are no run.
_FEW_KEYS = 4.0
# Parts of the time below this are told together.
_LEAST_SHARE = 0.02
# What attends more of the pairs is not set beside attention over all of them.
_NEARLY_DENSE = 0.45
_MANY_TIMES = 100.0
_UNITS = "(?:µs|ms|s|bytes|[KMG]iB|[GT]B/s|[GT]FLOP/s)"


# A line as it stands, or a label and a text that is wrapped beside it.
Line = str | tuple[str, str]


def plan_text(plan: Plan, width: int = WIDTH) -> str:
    """The plan, told in the order a reader asks: what it takes and why, what runs, what else was weighed or could not.

    Args:
        plan: The plan.
        width: Columns to keep to, 20 or more.
    """
    problem = plan.problem
    lines: list[Line] = [
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
    lines += ["", *_wrapped("takes    ", verdict(plan)), *_wrapped("at best  ", ceiling_words(plan))]
    estimated = "" if plan.us == plan.estimate.us else f", of the estimated {duration(plan.estimate.us)}"
    lines += ["", f"where the time goes{estimated}", *spending_lines(plan)]
    for group in plan.groups:
        lines += ["", *_group_lines(plan, group)]
    sentences = advice(plan)
    if sentences:
        lines += ["", "advice"]
        for sentence in sentences:
            lines += _wrapped("  ", sentence)
    lines += ["", f"planned in {duration(plan.planning_us)}"]
    return "\n".join(text for line in lines for text in _laid_out(line, width))


def _group_lines(plan: Plan, group: Group) -> list[Line]:
    lines: list[Line] = []
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
        f"configuration from the {group.config_source}",
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


def _profile_lines(group: Group) -> list[Line]:
    profile = group.profile
    first, *others = profile.tiles
    fills = f"of {first.block}×{first.block} are {percent(first.fill)} full"
    fills += "".join(f", {tile.block}×{tile.block} {percent(tile.fill)}" for tile in others)
    heavy = f"; {_rows(profile.q.n_heavy)} heavy" if profile.q.n_heavy else ""
    empty = f"; {_rows(profile.q.n_empty)} empty" if profile.q.n_empty else ""
    sampled = f" (from {profile.sampled:.0%} of the rows)" if profile.sampled is not None else ""
    rows = (
        ("edges    ", f"{profile.nnz:,}, density {profile.density:.3%}; {_form(profile)}"),
        ("degrees  ", f"{profile.q.mean:,.1f} keys a query, at most {profile.q.max:,}{heavy}{empty}"),
        ("         ", f"{profile.kv.mean:,.1f} queries a key, at most {profile.kv.max:,}"),
        ("tiles    ", f"{fills}{sampled}"),
        (
            "reach    ",
            f"{_tokens(profile.bandwidth_mean)} from the diagonal on average, at most {profile.bandwidth_max:,.0f}",
        ),
        ("graph    ", _graph_words(group)),
    )
    return [line for label, text in rows for line in _wrapped(label, text)]


def _rows(count: int) -> str:
    return "1 row is" if count == 1 else f"{count:,} rows are"


def _tokens(mean: float) -> str:
    return "1 token" if round(mean) == 1 else f"{mean:,.0f} tokens"


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
    blocks = "1 block" if graph.n_nodes == 1 else f"{graph.n_nodes:,} blocks"
    return (
        f"of {blocks} of {graph.block:,} tokens: {graph.degree_mean:,.1f} neighbours a block, at most "
        f"{graph.degree_max:,}; {graph.near_share:.0%} near the diagonal; {parts}"
    )


def verdict(plan: Plan) -> str:
    """What a call takes, beside dense attention."""
    by_records = plan.us != plan.estimate.us
    text = f"{duration(plan.us)} a call, {'by records' if by_records else 'estimated by the cost model'}"
    dense, density = dense_us(plan), max(group.profile.density for group in plan.groups)
    if any(step.launch.template.layout == "none" for step in plan.steps) or density > _NEARLY_DENSE:
        return text
    times = dense / plan.us
    beside = f"{times:,.0f}×" if times >= _MANY_TIMES else f"{times:.2g}×"
    return f"{text}; dense attention over all pairs takes {duration(dense)}, {beside} as long"


def spending_lines(plan: Plan) -> list[Line]:
    """The parts of the estimate, the largest first, small ones together."""
    parts = spending(plan)
    shown = [part for part in parts if part.share >= _LEAST_SHARE]
    rest = sum(part.us for part in parts) - sum(part.us for part in shown)
    rows = [(part.share, part.us, part.words) for part in shown]
    if len(shown) < len(parts):
        rows.append((rest / sum(part.us for part in parts), rest, "all else"))
    return [
        line for share, us, words in rows for line in _wrapped(f"  {percent(share):>4}  {duration(us):>8}  ", words)
    ]


def _step_lines(number: int, step: Step) -> list[Line]:
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
    n_split = len(work.schedule.merge_unit)
    split = f", {n_split:,} block{'s' * (n_split > 1)} of queries split" if n_split else ""
    pack = 1 if work.tiles is None else packed_heads(launch.config, launch.problem, len(launch.heads))
    if pack > 1:
        queries = "1 query" if work.block_q == 1 else f"{work.block_q} queries"
        rows = f"{queries} × {pack} heads are {work.block_q * pack} rows"
        lines += _wrapped("     packs    ", f"{pack} heads of a group share each key fetched: {rows}")
    whose = "a head" if pack == 1 else f"for {pack} heads"
    idle = f"{balance - 1:.1%} idle on {launch.device.units} workers"
    lines += _wrapped("     work     ", f"{work.schedule.n_items:,} items {whose}{split}; {idle}")
    return [*lines, f"     estimate {duration(step.estimate.us)}"]


def _work_parts(step: Step) -> list[str]:
    work = step.launch.work
    parts = []
    if work.tiles is not None:
        tiles = work.tiles.tile_map
        n_full = int(tiles.is_full.sum())
        n_patterns = work.tiles.n_patterns
        partial = f", {n_patterns:,} pattern{'s' * (n_patterns > 1)} of partial ones" if n_patterns else ""
        parts.append(f"{tiles.n_tiles:,} tiles of {tiles.block_q}×{tiles.block_kv} ({n_full:,} full{partial})")
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


def _candidate_lines(candidate: Candidate, best_us: float) -> list[Line]:
    about = "about " if candidate.estimate is None else ""
    return _wrapped("  ", f"{candidate}: {about}{duration(candidate.us)}, {candidate.us / best_us:.2f}×")


def _wrapped(label: str, text: str) -> list[Line]:
    return [(label, text)]


def _laid_out(line: Line, width: int) -> list[str]:
    """Lines no wider than that, none of which ends between a figure and its unit."""
    label, text = ("", line) if isinstance(line, str) else line
    if isinstance(line, str) and len(line) <= width:
        return [line]
    kept = re.sub(rf"(?<=\d) (?={_UNITS}\b)", "\N{NO-BREAK SPACE}", text)
    if isinstance(line, str):
        label = " " * (len(line) - len(line.lstrip()))
    lines = textwrap.wrap(
        kept.lstrip(),
        width,
        initial_indent=label,
        # Where there is little room, it is not spent on blanks.
        subsequent_indent=" " * (len(label) if width >= _WIDE else min(len(label), width // 8)),
        break_on_hyphens=False,
    )
    return [each.replace("\N{NO-BREAK SPACE}", " ") for each in lines] or [label.rstrip()]


def _heads(problem: Problem) -> str:
    heads = "1 head" if problem.q_heads == 1 else f"{problem.q_heads} heads"
    return heads if problem.kv_heads == problem.q_heads else f"{heads} over {problem.kv_heads} of k and v"


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:280]} … ({len(text):,} characters)"


def _listed(numbers: tuple[int, ...]) -> str:
    if len(numbers) > 2 and numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
