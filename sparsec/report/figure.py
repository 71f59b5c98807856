"""`sparsec explain --png`: a plan on one sheet.

This file decides the panels and how they are drawn, with matplotlib, which it alone imports. It must not know how any
figure on them was found.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from sparsec.errors import BackendMissingError
from sparsec.planner import Group, Plan
from sparsec.planner.ceiling import ceiling
from sparsec.planner.words import duration, rate
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
_BLOCKS = 128


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
        sheet = Figure(figsize=(11.0, 7.6), facecolor="white", layout="constrained")
        grid = sheet.add_gridspec(3, 4, width_ratios=(1.35, 1.35, 1.0, 1.0), height_ratios=(0.85, 1.0, 1.05))
        group = made.groups[0]
        _draw_map(sheet.add_subplot(grid[:, :2]), made, group)
        _draw_degrees(sheet.add_subplot(grid[0, 2:]), group)
        _draw_roofline(sheet.add_subplot(grid[1, 2:]), made, group)
        _draw_orders((sheet.add_subplot(grid[2, 2]), sheet.add_subplot(grid[2, 3])), group)
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
    axes.set_title(
        f"{mask}\n{duration(made.us)} on {made.device.name}: {launches(made)}, {made.problem.dtype}",
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
    for axis, colour, label in (("q", COLOURS["tiles"], "keys a query"), ("kv", COLOURS["rows"], "queries a key")):
        degrees = group.bound.degrees("q" if axis == "q" else "kv")
        share = np.arange(len(degrees), 0, -1) / len(degrees)
        ascending = np.sort(degrees)
        first = np.unique(ascending, return_index=True)[1]
        axes.step(ascending[first], share[first], where="pre", color=colour, label=label, lw=1.8)
        axes.plot(ascending[-1:], share[first[-1:]], "o", color=colour, ms=4)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_yscale("log")
    axes.set_ylim(min(0.2, axes.get_ylim()[0]), 1.6)
    axes.set_xlim(left=0.9)
    axes.set_title("Degrees: share of tokens with so many edges or more")
    axes.grid(color=_GRID, lw=0.6)
    axes.legend(loc="lower left", fontsize=8)


def _draw_roofline(axes: Axes, made: Plan, group: Group) -> None:
    roof, device = ceiling(made), made.device
    ridge = roof.flops_per_s / roof.bytes_per_s
    low, high = min(roof.intensity, ridge) / 16.0, max(roof.intensity, ridge) * 16.0
    x = np.geomspace(low, high, 200)
    tensor_bytes = made.problem.tensor_bytes
    for flops, name in ((roof.flops_per_s, "matrix units"), (device.vector_flops, "vector units")):
        if name == "matrix units" or flops < roof.flops_per_s * 0.9:
            axes.plot(x, np.minimum(flops, x * roof.bytes_per_s), color=_INK, lw=1.4 if "matrix" in name else 0.8)
            axes.annotate(
                f"{name} {rate(flops * 1e-9)}", (high, flops), ha="right", va="bottom", fontsize=7.5, color=_FAINT
            )
    flops = group.estimate.flops
    named: set[str] = set()
    for each in group.alternatives[:_SHOWN]:
        at = flops / (tensor_bytes + each.layout_bytes), flops / each.us * 1e6
        axes.plot(*at, "x", color=_FAINT, ms=5)
        if each.template not in named:
            axes.annotate(each.template, at, (6, -3), textcoords="offset points", fontsize=7.5, color=_FAINT)
        named.add(each.template)
    at = flops / (tensor_bytes + group.layout_bytes), flops / group.us * 1e6
    axes.plot(*at, "o", color=COLOURS["tiles"], ms=7)
    axes.annotate("this plan", at, (-7, -3), textcoords="offset points", ha="right", color=COLOURS["tiles"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    slowest = max([group.us, *(each.us for each in group.alternatives[:_SHOWN])])
    axes.set_ylim(flops / slowest * 1e6 / 3.0, roof.flops_per_s * 4.0)
    axes.set_title(f"Ceilings: the plan reaches {roof.share:.0%}, bound by {roof.bound}")
    axes.set_xlabel("useful operations a byte of q, k, v, out and index arrays")
    axes.grid(color=_GRID, lw=0.6)
    axes.yaxis.set_major_formatter(lambda value, _: rate(value * 1e-9))
    axes.yaxis.set_minor_formatter(lambda value, _: "")


def _draw_orders(panels: tuple[Axes, Axes], group: Group) -> None:
    moved = next((step.launch.work for step in group.steps if step.launch.work.ordering.q_order is not None), None)
    before = ("Blocks, tokens' own order", group.bound)
    shown = [before] if moved is None else [before, (f"As run: {moved.ordering.name}", moved.bound)]
    for axes, (title, bound) in zip(panels, shown, strict=False):
        block = cell_size(bound, _BLOCKS)
        counts = cells(bound, block)
        axes.imshow(np.where(counts > 0, np.log1p(counts), np.nan), cmap="Blues", vmin=0.0, interpolation="nearest")
        axes.set_title(title, fontsize=8.5)
        axes.set_xlabel(f"blocks of {block:,}")
        axes.spines[["top", "right"]].set_visible(True)
    for axes in panels[len(shown) :]:
        axes.axis("off")
        axes.text(0.0, 0.5, "No other order of tokens\nis used by this plan.", color=_FAINT, va="center")


def _thousands(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
