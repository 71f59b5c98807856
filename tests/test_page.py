"""The page of `sparsec explain --html`: what is packed into it, and the page itself in a real browser."""

import base64
import json
import re
import sys
import zlib

import numpy as np
import pytest
from chromium import EXECUTABLE, Page
from click.testing import CliRunner
from test_cli import PROCESSOR
from test_figure import planned

from sparsec import masks as m
from sparsec.backends.base import Problem
from sparsec.cli.entry import run, sparsec
from sparsec.planner import plan
from sparsec.planner.spending import spending
from sparsec.report import plan_sources, runs
from sparsec.report.charts import locality
from sparsec.report.page import page_text

MOST_BYTES = 6e6

MASKS = {
    "window": (m.window(5, 3), 50),
    "window and globals": (m.window(5, 3) | m.global_tokens(3), 60),
    "bigbird": (m.bigbird(8, 3, 1, 2, 0), 96),
    "scattered": (m.random_edges(5, 0), 40),
    "two steps": (m.dilated(20, 4) | m.window(2, 2), 70),
    "neighbourhood": (m.neighborhood((8, 9), 3), 72),
    "documents": (m.documents([5, 7, 20]), 32),
    "strided": (m.causal() & m.strided(3), 40),
    "wide": (m.window(3, 1), (20, 50)),
    "empty": (~m.full(), 9),
}


def drawn(found: runs.Runs, shape: tuple[int, int]) -> np.ndarray:
    """The pairs that runs mean, as the page draws them."""
    out = np.zeros(shape, int)
    for run_, (first, length) in enumerate(zip(found.first, found.length, strict=True)):
        for into in range(length):
            for r in range(found.indptr[run_], found.indptr[run_ + 1]):
                keys = np.arange(
                    found.start[r] + into * found.start_slope[r],
                    found.stop[r] + into * found.stop_slope[r],
                    found.step[r],
                )
                out[first + into, keys[(keys >= 0) & (keys < shape[1])]] += 1
    return out


@pytest.mark.parametrize("name", MASKS)
def test_runs_are_the_mask(name):
    mask, shape = MASKS[name]
    bound = mask.bind(*shape) if isinstance(shape, tuple) else mask.bind(shape)
    dense = bound.to_dense().astype(int)
    assert np.array_equal(drawn(runs.runs_of_mask(bound, 4.0), bound.shape), dense)
    assert np.array_equal(drawn(runs.runs_of_rows(bound.rows, bound.q_len, is_small=True), bound.shape), dense)
    q, kv = np.nonzero(dense)
    assert np.array_equal(drawn(runs.runs_of_edges(bound.q_len, q, kv), bound.shape), dense)


def test_structured_masks_are_few_runs():
    bound = (m.window(255, 0) | m.global_tokens(16)).bind(1 << 18)
    found = runs.runs_of_mask(bound, 100.0)
    assert found.is_whole
    assert found.n_rows == 1 << 18
    assert len(found.start) < 1000


def test_what_is_too_much_is_sampled(monkeypatch):
    monkeypatch.setattr(runs, "MOST_RANGES", 20_000)
    bound = m.random_edges(9, 0).bind(5000)
    found = runs.runs_of_mask(bound, 1.0)
    assert not found.is_whole
    assert 0 < found.n_rows < 5000
    sampled = drawn(found, bound.shape)
    rows = np.flatnonzero(sampled.sum(axis=1))
    assert np.array_equal(sampled[rows], bound.to_dense()[rows])


def test_numbers_survive_packing():
    values = np.array([0, 5, -7, 2**31 - 1, -(2**31), 3], np.int64)
    planes = np.frombuffer(zlib.decompress(base64.b64decode(runs.pack(values))), np.uint8).reshape(4, -1)
    differences = np.ascontiguousarray(planes.T).view("<i4").ravel()
    assert np.array_equal(np.cumsum(differences, dtype=np.int32), values.astype(np.int32))


@pytest.mark.parametrize("name", ["two steps", "scattered", "window and globals"])
def test_distances_are_those_of_the_edges(name):
    mask, length = MASKS[name]
    told = locality(plan(mask, Problem(length, length), PROCESSOR).groups[0])
    q, kv = np.nonzero(mask.bind(length).to_dense())
    buckets = [int(distance).bit_length() for distance in np.abs(q - kv)]
    assert np.allclose(np.bincount(buckets) / len(q), told["y"])
    assert told["isAll"]


def test_an_unwritable_page_and_a_missing_plotly_are_met_with_a_message(tmp_path, monkeypatch, capsys):
    command = ["explain", "window(9, 9)", "--seq-len", "256", "--html"]
    assert run([*command, str(tmp_path / "missing" / "page.html")]) == 1
    assert "there is no directory" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert run([*command, str(tmp_path / "page.html")]) == 1
    captured = capsys.readouterr()
    assert "pip install 'sparsec[plots]'" in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "page.html").exists()


def test_a_full_disk_is_met_with_a_message(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsec.report.page.write_page", full)
    target = tmp_path / "page.html"
    assert run(["explain", "window(9, 9)", "--seq-len", "256", "--html", str(target)]) == 1
    assert capsys.readouterr().err.strip().endswith(f"cannot write {target}: No space left on device")


def test_a_page_is_written_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["sparsec.device"], "detect_cpu", lambda: PROCESSOR)
    target = tmp_path / "page.html"
    mask = "from_expression('kv_idx <= q_idx') & window(9, 9)"
    result = CliRunner().invoke(sparsec, ["explain", mask, "--seq-len", "256", "--html", str(target)])
    assert result.exit_code == 0, result.output
    assert str(target) in result.stderr
    text = target.read_text()
    assert len(text) < MOST_BYTES
    assert "q_idx &gt;= kv_idx" in text
    assert "<h1><code>from_expression" in text
    # Nothing is fetched.
    own = re.sub(r'<script type="text/plain".*?</script>', "", text)
    assert not re.search(r'(?:src|href)\s*=\s*"|@import|url\(', own)


# In a browser.

in_browser = pytest.mark.skipif(EXECUTABLE is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def browser():
    page = Page()
    yield page
    page.close()


def opened(browser, made, folder):
    path = folder / "page.html"
    path.write_text(page_text(made, plan_sources(made)))
    assert path.stat().st_size < MOST_BYTES
    browser.size(1280, 900)
    browser.open(path)
    return path


@in_browser
def test_the_page_says_what_the_plan_says(browser, tmp_path):
    made = planned("heavy rows")
    opened(browser, made, tmp_path)
    count = "document.querySelectorAll('{}').length".format
    group = made.groups[0]
    assert browser.run(count("article")) == len(made.steps) == 2
    assert browser.run(count("tbody tr")) == 1 + len(group.alternatives)
    assert browser.run(count(".refusals li")) == len(set(made.refusals))
    parts = spending(made)
    assert browser.run(count(".spending li")) == len(parts)
    bars = browser.run("[...document.querySelectorAll('.spending i')].map((bar) => parseFloat(bar.style.width))")
    assert bars == [pytest.approx(100.0 * part.share, abs=0.051) for part in parts]
    assert browser.run(count("details")) == sum(map(len, plan_sources(made).values()))
    assert browser.run("document.querySelectorAll('#legend div').length") == 2
    browser.wait("document.querySelectorAll('.chart .main-svg').length >= 3")
    # A source is unpacked and highlighted when it is opened.
    browser.run("document.querySelectorAll('details')[1].open = true")
    browser.wait("document.querySelectorAll('details code .k').length > 3")
    shown = browser.run("document.querySelectorAll('details code')[1].textContent")
    files = [text for each in plan_sources(made).values() for text in each.values()]
    assert shown == files[1]
    assert browser.run("performance.getEntriesByType('resource').length") == 0
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.faults == []


@in_browser
@pytest.mark.parametrize("name", ["tiles", "reordered", "rows", "hybrid", "hybrid, reordered", "heavy rows"])
def test_the_map_holds_every_edge_and_nothing_else(name, browser, tmp_path):
    made = planned(name)
    opened(browser, made, tmp_path)
    bound = made.mask
    rng = np.random.default_rng(0)
    views = browser.run("currentGroup().views.length")
    reordered = [step for step in made.steps if step.launch.work.ordering.q_order is not None]
    assert views == 1 + len(reordered)
    for view, seen in enumerate([bound, *(step.launch.work.bound for step in reordered)]):
        browser.run(f"chooseView({view})")
        for row in rng.integers(0, seen.q_len, 12).tolist():
            keys = browser.run(
                f"currentView().layers.flatMap((layer) => [...progressions(layer.runs, {row}, currentView().kvLen)]"
                ".flatMap(([start, stop, step]) => "
                "Array.from({length: Math.ceil((stop - start) / step)}, (_, i) => start + i * step)))"
            )
            holds_all = browser.run("currentView().firstHoldsAll")
            rows = seen.rows(row, row + 1)
            expected = [key for each in zip(rows.start, rows.stop, rows.step, strict=True) for key in range(*each)]
            assert sorted(set(keys) if holds_all else keys) == sorted(expected)
        # The picture of the whole holds as much as there is.
        total = browser.run(
            "currentView().layers.slice(0, currentView().firstHoldsAll ? 1 : undefined).map((layer) => "
            "raster(layer.runs, wholeBox(currentView()), 200, 200, currentView().kvLen).reduce((a, b) => a + b, 0))"
            ".reduce((a, b) => a + b, 0)"
        )
        assert total == pytest.approx(seen.nnz, rel=0.03)
    assert browser.faults == []


@in_browser
def test_a_tile_is_hovered_and_zoomed_into(browser, tmp_path):
    made = plan(m.window(100, 20), Problem(4096, 4096), PROCESSOR)
    opened(browser, made, tmp_path)
    browser.run("canvas.scrollIntoView()")
    area = browser.run("(() => { const a = canvas.getBoundingClientRect(); return [a.left, a.top, a.width]; })()")
    x, y = area[0] + area[2] / 2, area[1] + area[2] / 2
    for _ in range(12):
        browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300)
    browser.wait("state.box.q1 - state.box.q0 < 400")
    browser.mouse("mouseMoved", x + 1, y + 1)
    browser.wait("!!document.querySelector('#inspector dl')")
    told = browser.run("document.getElementById('inspector').innerText")
    tile = made.steps[0].launch.work.tiles.tile_map
    place = browser.run("[state.over.q, state.over.kv]")
    row, column = place[0] // tile.block_q, place[1] // tile.block_kv
    assert f"Tile {row}, {column}" in told
    inside = made.mask.to_dense()[
        row * tile.block_q : (row + 1) * tile.block_q, column * tile.block_kv : (column + 1) * tile.block_kv
    ]
    assert f"{inside.sum():,} edges" in told
    assert "block_sparse on cpu" in told
    assert re.search(r"cost\s+[\d.]+ [nµm]?s a head", told)
    # Down to pairs: each pixel has the colour of its pair.
    browser.run("show({q0: 2000, q1: 2024, kv0: 1990, kv1: 2014})")
    browser.run("state.over = null, draw()")
    colours = browser.run(
        "Array.from({length: 24}, (_, i) => Array.from({length: 24}, (_, j) => { const s = canvas.width / 24; "
        "return [...pen.getImageData((j + 0.5) * s, (i + 0.5) * s, 1, 1).data].slice(0, 3).join(); }))"
    )
    attending = browser.run("state.colours.kind.tiles.join()")
    assert np.array_equal(np.array(colours) == attending, made.mask.to_dense()[2000:2024, 1990:2014])
    assert browser.faults == []


@in_browser
def test_a_million_tokens_are_whole(browser, tmp_path):
    length = 1 << 20
    made = plan(m.window(255, 0) | m.global_tokens(16), Problem(length, length), PROCESSOR)
    opened(browser, made, tmp_path)
    assert browser.run("currentView().isWhole")
    assert browser.run("keysIn(currentView().layers[0].runs, 700000, 0, 1 << 20, 1 << 20)") == 256 + 16
    # The global rows are seen from afar.
    browser.wait("raster(currentView().layers[0].runs, wholeBox(currentView()), 300, 300, 1 << 20)[250] > 1000")


@in_browser
@pytest.mark.parametrize("is_dark", [False, True])
def test_a_phone_in_either_light_has_room_for_it(is_dark, browser, tmp_path):
    opened(browser, planned("hybrid"), tmp_path)
    browser.size(360, 740, is_dark=is_dark, is_phone=True)
    browser.wait("canvas.clientWidth < 340")
    browser.wait("document.documentElement.scrollWidth <= 360")
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", paper))) < 60) == is_dark
    assert browser.faults == []
    screenshot = tmp_path / "phone.png"
    browser.screenshot(screenshot, is_whole=False)
    assert screenshot.stat().st_size > 5000


def test_the_data_is_strict_json():
    for name in ("reordered", "hybrid", "dense"):
        text = page_text(planned(name), {})
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
        assert json.loads(found.group(1), parse_constant=pytest.fail)["steps"]
