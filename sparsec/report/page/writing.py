"""`sparsec explain --html`: one page that opens from disk, with everything in it.

This file decides what the page says before any script runs, and how data, scripts and plotly are put into it. It must
not know how the map is drawn: `page.js` does.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from sparsec import __version__
from sparsec.errors import BackendMissingError
from sparsec.planner import Plan, Step
from sparsec.planner.advice import advice
from sparsec.planner.ceiling import ceiling, ceiling_words
from sparsec.planner.spending import spending
from sparsec.planner.text import verdict
from sparsec.planner.words import duration, percent, rate, size
from sparsec.planner.works import IDENTITY
from sparsec.report.charts import degrees, locality, roofline
from sparsec.report.history import history
from sparsec.report.views import step_costs, views

_HERE = Path(__file__).parent
_HISTORY = (
    "<figure><figcaption>Tuning history <small>what was measured of this mask here, in order; the best stands out"
    '</small></figcaption><div class="chart" id="history"></div></figure>'
)


def write_page(made: Plan, sources: dict[str, dict[str, str]], path: Path) -> None:
    """Writes the page of a plan.

    Args:
        made: The plan.
        sources: Source texts by launch, then by file.
        path: Where to.

    Raises:
        BackendMissingError: plotly is not here.
    """
    path.write_text(page_text(made, sources), encoding="utf-8")


def page_text(made: Plan, sources: dict[str, dict[str, str]]) -> str:
    """The page's HTML."""
    found = history(made)
    parts = {
        "plotly": _plotly(),
        "title": escape(_shortened(str(made.mask.mask), 80)),
        "style": (_HERE / "page.css").read_text(encoding="utf-8"),
        "head": _head(made),
        "facts": _facts(made),
        "verdict": f"<p>Takes {escape(verdict(made))}.</p><p>At best {escape(ceiling_words(made))}.</p>",
        "spending": _spending(made),
        "advice": "".join(f"<p>{_prose(sentence)}</p>" for sentence in advice(made)),
        "groups": _group_choice(made),
        "steps": "".join(_step(number, step) for number, step in enumerate(made.steps, 1)),
        "candidates": _candidates(made),
        "refusals": _refusals(made),
        "sources": _source_frames(sources),
        "foot": escape(f"sparsec {__version__}, planned in {duration(made.planning_us)}"),
        "history": _HISTORY if found else "",
        "data": _json(_data(made, sources) | {"history": found}),
        "script": (_HERE / "page.js").read_text(encoding="utf-8"),
    }
    text = (_HERE / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"<!--{name}-->", part, 1)
    return text


def _prose(sentence: str) -> str:
    """HTML of a sentence whose commands stand between backticks."""
    return re.sub("`(.*?)`", r"<code>\1</code>", escape(sentence))


@cache
def _plotly() -> str:
    """plotly's script, deflated.

    Raises:
        BackendMissingError: It is not here.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise BackendMissingError(
            f"--html draws its charts with plotly, which is not here ({error}); pip install 'sparsec[plots]'"
        ) from error
    return _deflated(get_plotlyjs())


def _data(made: Plan, sources: dict[str, dict[str, str]]) -> dict[str, Any]:  # Any: JSON values
    groups = []
    for group in made.groups:
        groups.append(
            {
                "title": _group_title(group.heads, group.batch),
                "views": views(made, group),
                "degrees": degrees(group.bound),
                "locality": locality(group),
                "roofline": roofline(made, group),
            }
        )
    steps = [
        {
            "title": f"{step.launch.template.name} on {step.launch.backend}",
            "config": str(step.launch.config),
            "us": step.estimate.us,
            "costs": step_costs(made, step, group),
        }
        for group in made.groups
        for step in group.steps
    ]
    return {
        "groups": groups,
        "steps": steps,
        "sources": {launch: _deflated(json.dumps(files)) for launch, files in sources.items()},
    }


def _json(value: object) -> str:
    # What ends a script element must not stand in one.
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")


def _deflated(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


# What stands on the page before any script runs.


def _head(made: Plan) -> str:
    problem, device = made.problem, made.device
    heads = "1 head" if problem.q_heads == 1 else f"{problem.q_heads} heads"
    if problem.kv_heads != problem.q_heads:
        heads += f" over {problem.kv_heads} of k and v"
    shape = (
        f"{problem.q_len:,} queries × {problem.kv_len:,} keys, {heads}, head_dim {problem.head_dim}, {problem.dtype}"
        + (f", batch {problem.batch}" if problem.batch > 1 else "")
    )
    mask = escape(_shortened(str(made.mask.mask), 240))
    where = f"<b>{escape(device.name)}</b> ({escape(device.label)})"
    return f"<h1><code>{mask}</code></h1><p>{escape(shape)}, on {where}</p>"


def _facts(made: Plan) -> str:
    roof = ceiling(made)
    useful = rate(made.estimate.flops / made.us * 1e-3)
    profile = made.groups[0].profile
    limit = "arithmetic" if roof.bound == "arithmetic" else "memory"
    facts = [
        (
            "estimate" if made.us == made.estimate.us else "by records",
            duration(made.us),
            f"largest part: {spending(made)[0].name}",
        ),
        ("useful work", useful, f"{roof.share:.0%} of what its {limit} allows"),
        ("edges", f"{profile.nnz:,}", f"{profile.density:.3%} of all pairs"),
        ("keys a query", f"{profile.q.mean:,.1f}", f"at most {profile.q.max:,}"),
        ("tiles of 64×64", f"{percent(profile.fill(64).fill)} full", f"{profile.fill(64).n_tiles:,} of them"),
        ("index arrays", size(made.layout_bytes), f"beside {size(made.problem.tensor_bytes)} of tensors"),
    ]
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in facts
    )


def _spending(made: Plan) -> str:
    return "".join(
        f"<li><span>{percent(part.share)}</span><span>{escape(duration(part.us))}</span>"
        f'<i style="width:{part.share:.1%}"></i><span>{escape(part.words)}</span></li>'
        for part in spending(made)
    )


def _group_title(heads: tuple[int, ...], batch: tuple[int, ...]) -> str:
    shown = f"heads {heads[0]} to {heads[-1]}" if len(heads) > 1 else f"head {heads[0]}"
    return shown + (f", batch elements {batch[0]} to {batch[-1]}" if len(batch) > 1 else "")


def _group_choice(made: Plan) -> str:
    if len(made.groups) == 1:
        return ""
    options = "".join(
        f'<option value="{number}">{escape(_group_title(group.heads, group.batch))}</option>'
        for number, group in enumerate(made.groups)
    )
    return f'<label>mask of <select id="group">{options}</select></label>'


def _step(number: int, step: Step) -> str:
    work, launch = step.launch.work, step.launch
    facts = [("edges", f"{step.edges} ({work.bound.nnz:,})"), ("config", str(launch.config) or "–")]
    if work.ordering.q_order is not None:
        facts.append(("order", work.ordering.name))
    if work.tiles is not None:
        tiles = work.tiles.tile_map
        facts.append(
            ("tiles", f"{tiles.n_tiles:,} of {tiles.block_q}×{tiles.block_kv}, {int(tiles.is_full.sum()):,} full")
        )
    if work.gathered is not None:
        facts.append(("gathered", f"{len(work.gathered.columns):,} columns ({work.gathered.nnz:,} edges)"))
    idle = work.schedule.balance(launch.device.units) - 1.0
    facts += [
        ("index arrays", size(work.nbytes)),
        ("work", f"{work.schedule.n_items:,} items a head, {idle:.1%} idle"),
        ("estimate", duration(step.estimate.us)),
    ]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return (
        f"<article><h3>{number}. {escape(launch.template.name)} on {escape(launch.backend)}</h3>"
        f"<p>{escape(launch.template.summary)}</p><dl>{rows}</dl></article>"
    )


def _candidates(made: Plan) -> str:
    rows = []
    for group in made.groups:
        best = group.us
        chosen = " + ".join(dict.fromkeys(step.launch.template.name for step in group.steps))
        orders = [step.launch.work.ordering for step in group.steps]
        order = next((each.name for each in orders if each.q_order is not None), "")
        config, backend = str(group.steps[0].launch.config), group.steps[0].launch.backend
        rows.append(_row(chosen, backend, config, order, duration(best), 1.0, size(group.layout_bytes), is_chosen=True))
        for each in group.alternatives:
            order = "" if each.ordering == IDENTITY.name else each.ordering
            about = "about " if each.estimate is None else ""
            held = size(each.layout_bytes) if each.layout_bytes else "not built"
            time = f"{about}{duration(each.us)}"
            rows.append(_row(each.template, each.backend, str(each.config), order, time, each.us / best, held))
    return "".join(rows)


def _row(
    template: str,
    backend: str,
    config: str,
    order: str,
    time: str,
    ratio: float,
    held: str,
    *,
    is_chosen: bool = False,
) -> str:
    marked = ' class="chosen"' if is_chosen else ""
    bar = f'<i style="width:{min(100.0, 100.0 / ratio):.1f}%"></i>'
    before, after = (
        "".join(f"<td>{escape(each)}</td>" for each in cells)
        for cells in ((template, backend, order, time), (held, config))
    )
    return f'<tr{marked}>{before}<td class="ratio">{bar}{ratio:.2f}×</td>{after}</tr>'


def _refusals(made: Plan) -> str:
    return "".join(
        f"<li><b>{escape(each.what)}</b> {escape(each.reason)}</li>" for each in dict.fromkeys(made.refusals)
    )


def _source_frames(sources: dict[str, dict[str, str]]) -> str:
    frames = []
    for launch, files in sources.items():
        for name, text in files.items():
            lines = text.count("\n") + 1
            frames.append(
                f'<details data-launch="{escape(launch)}" data-file="{escape(name)}">'
                f"<summary>{escape(launch)}: {escape(name)} <small>{lines:,} line{'s' * (lines > 1)}</small></summary>"
                "<pre><code></code></pre></details>"
            )
    return "".join(frames)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 2]} …"
