"""The sheet of `sparsec explain --png`, and whose edges are whose on it."""

import io
import struct
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from test_cli import PROCESSOR

from sparsec import masks as m
from sparsec.backends.base import Problem
from sparsec.cli.entry import run, sparsec
from sparsec.planner import plan
from sparsec.planner.spending import spending
from sparsec.report.figure import figure
from sparsec.report.territory import KINDS, territory

# What shows every kind of part, in and out of the tokens' own order.
PLANS = {
    "tiles": (m.window(20, 5), 600, {}),
    "reordered": (m.dilated(200, 8), 1000, {"reorder": "force"}),
    "rows": (m.random_edges(5, 0), 500, {"template": "row_traversal"}),
    "hybrid": (m.random_edges(40, 0) | m.window(30, 30), 700, {"template": "hybrid"}),
    "hybrid, reordered": (m.random_edges(40, 0) | m.window(30, 30), 700, {"template": "hybrid", "reorder": "force"}),
    "heavy rows": (m.window(127, 0) | m.global_tokens([77, 4000]), 8192, {}),
    "joined": (m.dilated(2048, 16) | m.window(64, 64), 8192, {}),
    "dense": (m.full(), 300, {"template": "dense"}),
}


def planned(name):
    mask, length, options = PLANS[name]
    return plan(mask, Problem(length, length), PROCESSOR, **options)


@pytest.mark.parametrize("name", PLANS)
def test_every_edge_is_somebodys(name):
    made = planned(name)
    held = territory(made.groups[0])
    assert (held.counts >= 0).all()
    q, kv = np.nonzero(made.mask.to_dense()) if made.mask.q_len <= 1000 else (None, None)
    if q is not None:
        expected = np.zeros(held.counts.shape[1:], np.int64)
        np.add.at(expected, (q // held.block, kv // held.block), 1)
        assert np.array_equal(held.counts.sum(axis=0), expected)
    assert held.counts.sum() == made.mask.nnz
    layouts = {step.launch.template.layout for step in made.steps}
    assert ("dense" in held.kinds) == ("none" in layouts)
    assert ("rows" in held.kinds) == ("rows" in layouts)
    if "hybrid" in layouts:
        tiles, gathered, rows = (step.launch.work for step in made.steps for _ in range(3))
        assert held.counts[KINDS.index("gathered columns")].sum() == gathered.gathered.nnz
        assert held.counts[KINDS.index("single edges")].sum() == len(rows.rows.columns)
        assert held.counts[KINDS.index("tiles")].sum() == tiles.tiles.tile_map.nnz


def test_cells_are_where_the_tokens_stand_not_the_positions():
    """Of a reordered mask: the band around the diagonal stays one."""
    held = territory(planned("reordered").groups[0])
    row, column = np.nonzero(held.counts.sum(axis=0))
    assert np.abs(row - column).max() * held.block <= 200 + held.block


@pytest.mark.parametrize("name", ["reordered", "hybrid", "heavy rows"])
def test_the_sheet_has_its_panels(name):
    made = planned(name)
    panels = figure(made).axes
    assert len(panels) == 6
    titles = [axes.get_title(loc="left") for axes in panels]
    assert str(made.mask.mask)[:40] in titles[0]
    assert [title[:6] for title in (*titles[1:4], titles[5])] == ["Degree", "Ceilin", "Blocks", "Where "]
    # The map, and the block graph before and after.
    orders = sum(step.launch.work.ordering.q_order is not None for step in made.steps)
    assert [len(axes.images) for axes in panels] == [1, 0, 0, 1, min(orders, 1), 0]
    shown = panels[0].images[0].get_array()
    assert (shown < 1.0).any(axis=2).sum() == (territory(made.groups[0]).counts.sum(axis=0) > 0).sum()
    # The plan is below its ceiling, and so is every candidate.
    roof, *points = panels[2].lines
    highest = roof.get_ydata().max()
    assert all(point.get_ydata().max() <= highest * 1.01 for point in points)
    # A bar for each part of the time.
    parts = spending(made)
    assert [bar.get_width() for bar in panels[5].patches] == [part.share for part in parts[:6]]
    assert [label.get_text() for label in panels[5].get_yticklabels()] == [part.name for part in parts[:6]]


@pytest.mark.parametrize("name", PLANS)
def test_no_words_of_the_sheet_are_cut_off(name):
    sheet = figure(planned(name))
    sheet.savefig(io.BytesIO(), dpi=100, format="png")
    width, height = sheet.canvas.get_width_height()
    for axes in sheet.axes:
        for text in [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]:
            if text.get_text():
                box = text.get_window_extent()
                assert box.x0 >= 0, text
                assert box.y0 >= 0, text
                assert box.x1 <= width, text
                assert box.y1 <= height, text


def test_a_file_is_written_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["sparsec.device"], "detect_cpu", lambda: PROCESSOR)
    target = tmp_path / "sheet.png"
    result = CliRunner().invoke(sparsec, ["explain", "window(9, 9)", "--seq-len", "256", "--png", str(target)])
    assert result.exit_code == 0
    assert str(target) in result.stderr
    assert result.stdout.startswith("mask     window(9, 9)")
    content = target.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1650, 1260)


@pytest.mark.parametrize("place", ["missing/sheet.png", "."])
def test_an_unwritable_file_is_met_before_anything_is_planned(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sparsec.planner.plan", None)
    code = run(["explain", "window(9, 9)", "--seq-len", "256", "--png", str(tmp_path / place)])
    captured = capsys.readouterr()
    assert code in (1, 2)
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert str(tmp_path) in captured.err
