"""`sparsec explain --png`: a plan on one sheet.

This file decides the panels and how they are drawn, with matplotlib, which it alone imports. It must not know how any
figure on them was found.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from sparsec.errors import BackendMissingError
from sparsec.planner import Group, Plan
from sparsec.planner.ceiling import ceiling
from sparsec.planner.spending import spending
from sparsec.planner.words import duration, percent, rate
from sparsec.report.side_by_side import launches
from sparsec.report.territory import KINDS, Territory, cell_size, cells, territory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that the colour-blind tell apart.
# Source: M. Okabe and K. Ito, "Color universal design", 2008.
COLOURS: Final = {
    "tiles": "#0072B2",
    "gathered columns": "#E69F00",
    "single edges": "#009E73",
    "rows": "#D55E00",
    "dense": "#CC79A7",
}
_INK, _FAINT, _GRID = "#222222", "#767676", "#E4E4E4"
# Candidates on the roofline.
_SHOWN = 7
# Parts of the time.
_PARTS = 6
# Names on the roofline keep this distance, in the logarithm of their rates.
_APART = 0.6
_BLOCKS = 128
# In a line above half a column.
_TITLE_LETTERS = 24


def write_png(made: Plan, path: Path) -> None:
    """Draws the plan of the first group of heads.

    Raises:
        BackendMissingError: matplotlib is not here.
    """
    figure(made).savefig(path, dpi=150, format="png")


def figure(made: Plan) -> Figure:
    """The sheet, not yet written anywhere.

    Raises:
        BackendMissingError: matplotlib is not here.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendMissingError(
            f"--png draws with matplotlib, which is not here ({error}); pip install 'sparsec[plots]'"
        ) from error
    settings: Any = {
        "font.size": 8.5,
        "axes.edgecolor": _FAINT,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
        "text.color": _INK,
        "legend.frameon": False,
    }
    with mpl.rc_context(settings):
        sheet = Figure(figsize=(11.0, 8.4), facecolor="white", layout="constrained")
        halves = sheet.add_gridspec(1, 2, width_ratios=(1.25, 1.0))
        left = halves[0].subgridspec(2, 1, height_ratios=(3.6, 1.0))
        right = halves[1].subgridspec(3, 2, height_ratios=(0.9, 1.0, 1.05))
        group = made.groups[0]
        _draw_map(sheet.add_subplot(left[0]), made, group)
        _draw_degrees(sheet.add_subplot(right[0, :]), group)
        _draw_roofline(sheet.add_subplot(right[1, :]), made, group)
        _draw_orders((sheet.add_subplot(right[2, 0]), sheet.add_subplot(right[2, 1])), group)
        _draw_spending(sheet.add_subplot(left[1]), made)
    return sheet


def _draw_map(axes: Axes, made: Plan, group: Group) -> None:
    from matplotlib.patches import Patch

    held = territory(group)
    q_len, kv_len = group.bound.shape
    axes.imshow(
        _coloured(held, group.bound.shape),
        extent=(0, held.counts.shape[2] * held.block, held.counts.shape[1] * held.block, 0),
        interpolation="nearest",
        aspect="equal",
    )
    axes.set_xlim(0, kv_len)
    axes.set_ylim(q_len, 0)
    axes.spines[["top", "right"]].set_visible(True)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    _thousands(axes)
    mask = str(made.mask.mask)
    mask = mask if len(mask) <= 60 else f"{mask[:57]} …"
    judged = "estimated" if made.us == made.estimate.us else "by records"
    heads = "1 head" if made.problem.q_heads == 1 else f"{made.problem.q_heads} heads"
    axes.set_title(
        f"{mask}\n{duration(made.us)} {judged} on {made.device.name}, {heads}, {made.problem.dtype}: {launches(made)}",
        fontsize=10.5,
    )
    of_all = held.counts.sum()
    axes.legend(
        handles=[
            Patch(color=COLOURS[kind], label=f"{kind}, {held.counts[KINDS.index(kind)].sum() / of_all:.0%} of edges")
            for kind in held.kinds
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.08),
        ncols=2,
        title=f"one cell is {held.block:,} × {held.block:,} tokens; the darker, the more of its pairs attend",
        title_fontsize=8,
    )


def _coloured(held: Territory, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    """`[rows, columns, 3]`: the colour of who does most of a cell, paler where few of its pairs attend.

    The scale is logarithmic, from one edge to the fullest cell.
    """
    from matplotlib.colors import to_rgb

    palette = np.array([to_rgb(COLOURS[kind]) for kind in KINDS])
    rows, columns = held.counts.shape[1:]
    height = np.minimum(held.block, shape[0] - np.arange(rows) * held.block)
    width = np.minimum(held.block, shape[1] - np.arange(columns) * held.block)
    count = held.counts.sum(axis=0)
    share = count / (height[:, None] * width[None, :])
    fullest = max(float(share.max(initial=0.0)), 1e-12)
    least = 1.0 / held.block**2
    depth = np.log(np.maximum(share, least) / least) / max(np.log(fullest / least), 1e-9)
    strength = np.where(count > 0, 0.3 + 0.7 * np.minimum(depth, 1.0), 0.0)[..., None]
    mixed: npt.NDArray[np.float64] = 1.0 - strength * (1.0 - palette[held.counts.argmax(axis=0)])
    return mixed


def _draw_degrees(axes: Axes, group: Group) -> None:
    drawn = (("q", COLOURS["tiles"], "-", "keys a query"), ("kv", COLOURS["rows"], "--", "queries a key"))
    for axis, colour, style, label in drawn:
        degrees = group.bound.degrees("q" if axis == "q" else "kv")
        share = np.arange(len(degrees), 0, -1) / len(degrees)
        ascending = np.sort(degrees)
        first = np.unique(ascending, return_index=True)[1]
        # Dashed, and thinner: where the two are alike, both are seen.
        width = 2.4 if axis == "q" else 1.6
        axes.step(ascending[first], share[first], where="pre", color=colour, label=label, lw=width, ls=style)
        axes.plot(ascending[-1:], share[first[-1:]], "o", color=colour, ms=4)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_yscale("log")
    axes.set_ylim(min(0.05, axes.get_ylim()[0]), 1.6)
    axes.set_xlim(left=0.9)
    _plain_ticks(axes, lambda value, _: f"{value:,.0f}", lambda value, _: f"{100.0 * value:.3g}%")
    axes.set_title("Degrees")
    axes.set_xlabel("edges")
    axes.set_ylabel("tokens with so many or more")
    axes.grid(color=_GRID, lw=0.6)
    axes.legend(loc="lower left", fontsize=8)


def _plain_ticks(axes: Axes, x: Callable[[float, float], str], y: Callable[[float, float], str]) -> None:
    """Figures as text at whole powers of ten, and none between."""
    for axis, words in ((axes.xaxis, x), (axes.yaxis, y)):
        axis.set_major_formatter(words)
        axis.set_minor_formatter(lambda *_: "")


def _draw_roofline(axes: Axes, made: Plan, group: Group) -> None:
    roof = ceiling(made)
    ridge = roof.flops_per_s / roof.bytes_per_s
    low, high = min(roof.intensity, ridge) / 16.0, max(roof.intensity, ridge) * 16.0
    x = np.geomspace(low, high, 200)
    tensor_bytes = made.problem.tensor_bytes
    axes.plot(x, np.minimum(roof.flops_per_s, x * roof.bytes_per_s), color=_INK, lw=1.4)
    small: Any = {"fontsize": 7.5, "color": _FAINT}
    axes.annotate(
        f"arithmetic: {rate(roof.flops_per_s * 1e-9)}", (high, roof.flops_per_s), ha="right", va="bottom", **small
    )
    flops = group.estimate.flops
    slowest = max([group.us, *(each.us for each in group.alternatives[:_SHOWN])])
    bottom = min(flops / slowest * 1e6 / 3.0, roof.flops_per_s / 100.0)
    # Beside the slope, in the corner where nothing can be.
    axes.annotate(
        f"memory: {roof.bytes_per_s / 1e9:,.0f} GB/s", (0.02, 0.95), xycoords="axes fraction", va="top", **small
    )
    named: list[float] = []
    for each in group.alternatives[:_SHOWN]:
        at = flops / (tensor_bytes + each.layout_bytes), flops / each.us * 1e6
        axes.plot(*at, "x", color=_FAINT, ms=5)
        # Names that would stand on each other are left out: the text has them all.
        if all(abs(np.log(at[1] / other)) > _APART for other in named):
            axes.annotate(each.template, at, (7, 0), textcoords="offset points", va="center", **small)
            named.append(at[1])
    at = flops / (tensor_bytes + group.layout_bytes), flops / group.us * 1e6
    axes.plot(*at, "o", color=COLOURS["tiles"], ms=7)
    axes.annotate(
        "this plan",
        at,
        (0, 7),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=COLOURS["tiles"],
        path_effects=_halo(),
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, roof.flops_per_s * 6.0)
    axes.set_title(f"Ceilings: {percent(roof.share)} reached, bound by {roof.bound}")
    axes.set_xlabel("useful operations for each byte of q, k, v, out and index arrays")
    axes.grid(color=_GRID, lw=0.6)
    _plain_ticks(axes, lambda value, _: f"{value:,.4g}", lambda value, _: rate(value * 1e-9))


def _halo() -> list[Any]:  # Any: matplotlib's path effects have no common type
    """Keeps words readable on lines."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground="white")]


def _draw_spending(axes: Axes, made: Plan) -> None:
    parts = spending(made)[:_PARTS]
    places = np.arange(len(parts))
    axes.barh(places, [part.share for part in parts], color=COLOURS["tiles"], height=0.62)
    for place, part in zip(places, parts, strict=True):
        axes.annotate(
            f"{percent(part.share)}, {duration(part.us)}",
            (part.share, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(places, [part.name for part in parts])
    axes.tick_params(axis="y", length=0, labelcolor=_INK)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.2 * parts[0].share)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    of_estimate = "" if made.us == made.estimate.us else f" of the estimated {duration(made.estimate.us)}"
    axes.set_title(f"Where the time{of_estimate} goes")


def _draw_orders(panels: tuple[Axes, Axes], group: Group) -> None:
    moved = next((step.launch.work for step in group.steps if step.launch.work.ordering.q_order is not None), None)
    before = ("Blocks, tokens' own order", group.bound)
    shown = [before] if moved is None else [before, (f"As run: {moved.ordering.name}", moved.bound)]
    for axes, (title, bound) in zip(panels, shown, strict=False):
        block = cell_size(bound, _BLOCKS)
        counts = cells(bound, block)
        axes.imshow(np.where(counts > 0, np.log1p(counts), np.nan), cmap="Blues", vmin=0.0, interpolation="nearest")
        axes.set_title(textwrap.fill(title, _TITLE_LETTERS), fontsize=8.5)
        axes.set_xlabel(f"blocks of {block:,}")
        axes.spines[["top", "right"]].set_visible(True)
    for axes in panels[len(shown) :]:
        axes.axis("off")
        axes.text(0.0, 0.5, "No other order of tokens\nis used by this plan.", color=_FAINT, va="center")


def _thousands(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
