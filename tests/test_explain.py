"""What explain says is what runs; in a notebook as on the command line."""

import re
from dataclasses import replace

import pytest
from cases import every_constructor
from test_cli import PROCESSOR

import sparsec
from sparsec import masks as m
from sparsec.backends.base import Problem
from sparsec.device import detect_cpu
from sparsec.planner import plan, sampling
from sparsec.planner.advice import advice
from sparsec.planner.ceiling import tile_fill
from sparsec.planner.lengths import at_length, dense_crossover, dense_us
from sparsec.planner.spending import IN_VAIN, USEFUL, spending
from sparsec.planner.text import plan_text
from sparsec.planner.words import duration, size
from sparsec.score import soft_cap


def told(made):
    """Everything a plan says that is not a matter of the moment."""
    return made.to_dict() | {"planning_us": 0.0}


@pytest.mark.parametrize("case", every_constructor(), ids=lambda case: case.id)
def test_the_plan_that_is_explained_is_the_plan_that_runs(case, monkeypatch):
    # Compiling is another matter: what was chosen is known before.
    monkeypatch.setattr(
        "sparsec.specialisation.Specialisation.__init__", lambda self, made, *_, **__: setattr(self, "plan", made)
    )
    problem = case.problem
    attention = sparsec.compile(
        case.bound,
        q_heads=problem.q_heads,
        kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        v_dim=problem.v_dim,
        dtype=problem.dtype,
        device="cpu",
        tune="cached",
    )
    explained = plan(case.bound, problem, detect_cpu())
    assert told(attention.plan) == told(explained)
    assert attention.explain().splitlines()[:-1] == str(explained).splitlines()[:-1]


def test_a_notebook_shows_the_plan():
    made = plan(m.from_expression("q_idx >= kv_idx") & m.window(9, 9), Problem(200, 200), PROCESSOR)
    shown = made._repr_html_()
    assert shown.count("<div>") == shown.count("</div>") == 1
    assert "q_idx &gt;= kv_idx" in shown
    assert "<script" not in shown
    text = str(made).splitlines()
    assert all(re.sub("[<>&\"']", "", line)[:20] in re.sub("&(lt|gt|amp|quot|#x27);", "", shown) for line in text[4:-1])


def test_advice_is_about_the_plan():
    dilated = m.dilated(512, 8)
    kept = plan(dilated, Problem(4096, 4096), PROCESSOR, reorder="off")
    assert any("reorder='auto'" in sentence for sentence in advice(kept))
    assert not any("reorder" in sentence for sentence in advice(plan(dilated, Problem(4096, 4096), PROCESSOR)))
    tiny = advice(plan(m.window(3, 3), Problem(64, 64), PROCESSOR))
    assert any("Starting kernels" in sentence for sentence in tiny)
    half = plan(m.window(127, 0), Problem(2048, 2048, dtype="bf16", head_dim=64), PROCESSOR, tune="off")
    assert any("sparsec tune 'window(127, 0)' --seq-len 2048 --dtype bf16" in sentence for sentence in advice(half))
    assert all(len(advice(each)) <= 2 for each in (kept, half))
    trained = replace(half.problem, q_heads=64, kv_heads=64, needs_grad=True)
    there = " ".join(advice(plan(m.window(127, 0), trained, "nvidia-h100", tune="off")))
    assert "--seq-len 2048 --heads 64 --dtype bf16 --needs-grad --device nvidia-h100`" in there


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80])
def test_a_plan_fits_into_any_width_and_says_the_same(width):
    made = plan(m.window(300, 0) | m.global_tokens(3), Problem(4096, 4096, 4, 4), PROCESSOR, tune="off")
    narrow = plan_text(made, width)
    # A word that is longer than the line is broken.
    assert max(map(len, narrow.splitlines())) <= width
    if width >= 40:
        assert narrow.split() == str(made).split()
    # The text beside a label is one paragraph, not lines broken twice.
    paragraph = narrow[narrow.index("takes ") : narrow.index("at best ")].split("\n")
    assert all(len(line) >= width - 20 for line in paragraph[:-2])


def test_another_length_is_asked_for_as_the_first_one_was():
    asked = {"template": "row_traversal", "backend": "cpu", "scale": 0.3, "tune": "off", "reorder": "off"}
    made = plan(m.dilated(512, 8), Problem(4096, 4096), PROCESSOR, score=soft_cap(5.0), **asked)
    shorter = at_length(made, 1000)
    assert shorter.problem.q_len == 1000
    (step,) = shorter.steps
    assert (step.launch.template.name, step.launch.backend, step.launch.scale) == ("row_traversal", "cpu", 0.3)
    assert step.launch.score is not None
    assert step.launch.work.ordering.q_order is None
    assert shorter.asked == made.asked


SPENT = {
    "tiles": (m.window(1023, 0), "nvidia-h100", {}),
    "tiles and heavy rows": (m.window(127, 0) | m.global_tokens([77, 4000]), PROCESSOR, {}),
    "reordered": (m.dilated(512, 8), PROCESSOR, {"reorder": "force"}),
    "rows": (m.random_edges(16, 0), "nvidia-h100", {"template": "row_traversal"}),
    "hybrid": (m.random_edges(40, 0) | m.window(60, 60), PROCESSOR, {"template": "hybrid"}),
    "dense": (m.full(), PROCESSOR, {"template": "dense"}),
    "packed": (m.random_edges(40, 0) | m.window(60, 60), "nvidia-h200", {"template": "hybrid"}),
    "heads": (m.per_head([m.causal(), m.window(64, 64), m.causal(), m.full()]), "nvidia-a100", {}),
}


@pytest.mark.parametrize("name", SPENT)
def test_the_time_that_is_told_adds_up_to_the_estimate(name):
    mask, device, options = SPENT[name]
    kv_heads = 1 if name == "packed" else 4
    made = plan(mask, Problem(8192, 8192, 4, kv_heads, dtype="fp16"), device, tune="off", **options)
    assert (made.steps[0].launch.config.get("pack_gqa", 1) > 1) == (name == "packed")
    parts = spending(made)
    assert sum(part.us for part in parts) == pytest.approx(made.estimate.us)
    assert sum(part.share for part in parts) == pytest.approx(1.0)
    assert all(part.us > 0.0 for part in parts)
    assert [part.us for part in parts] == sorted((part.us for part in parts), reverse=True)
    # All useful arithmetic is told as such where it is done in tiles.
    useful = {part.name: part.us for part in parts}.get(USEFUL, 0.0)
    templates = {step.launch.template.name for step in made.steps}
    if templates <= {"block_sparse", "dense"}:
        rate = made.device.matrix_flops.get("fp16", made.device.vector_flops)
        assert useful == pytest.approx(made.estimate.flops / rate * 1e6, rel=1e-3)
    # A packed hybrid may gather all it has.
    assert name == "packed" or (useful == 0.0) == (templates == {"row_traversal"})


def test_pairs_in_vain_are_those_of_partial_tiles():
    problem = Problem(4096, 4096, 4, 4, dtype="bf16")
    blocks = plan(m.blocks([[True, False], [True, True]], 2048), problem, "nvidia-h100", tune="off")
    assert IN_VAIN not in {part.name for part in spending(blocks)}
    window = plan(m.window(100, 0), problem, "nvidia-h100", template="block_sparse", tune="off")
    (vain,) = (part for part in spending(window) if part.name == IN_VAIN)
    fill = tile_fill(window.steps)
    assert f"{1 - fill:.0%} of the pairs in its tiles do not attend" in vain.words
    assert vain.share > 0.2


def test_a_gpu_fetches_for_every_edge():
    problem = Problem(16_384, 16_384, 8, 8, dtype="bf16")
    rows = plan(m.random_edges(16, 0), problem, "nvidia-h100", template="row_traversal", tune="off")
    # 16 keys a query, rows of k and of v of 128 bytes each, 8 heads.
    assert f"fetched for each, {16_384 * 16 * 8 * 256 / 2**20:.0f} MiB" in str(rows)


def test_no_line_ends_between_a_figure_and_its_unit():
    for n_heads in range(1, 40):
        made = plan(m.window(300, 0), Problem(4096, 4096, n_heads, n_heads), PROCESSOR, tune="off")
        lines = str(made).splitlines()
        assert not any(re.match(r" *(µs|ms|s|[KM]iB|[GT]FLOP/s|GB/s)\b", line) for line in lines)
        assert max(map(len, lines)) <= 80
        assert "\N{NO-BREAK SPACE}" not in str(made)


def test_sizes_keep_their_digits():
    assert [size(each) for each in (7, 1536, 1023 * 2**10, 2**20, 1500 * 2**30)] == [
        "7 bytes",
        "1.5 KiB",
        "1,023 KiB",
        "1 MiB",
        "1,500 GiB",
    ]


@pytest.mark.parametrize(
    "mask",
    [m.dilated(2040, 8), m.random_edges(40, 1), m.window(300, 5) | m.global_tokens(3), m.neighborhood((128, 128), 13)],
    ids=str,
)
@pytest.mark.parametrize("device", ["nvidia-h100", PROCESSOR], ids=["h100", "cpu"])
def test_a_sample_of_rows_does_not_change_what_wins(mask, device, monkeypatch):
    problem = Problem(16_384, 16_384, 2, 2, dtype="bf16")
    for name in ("_MANY_TILES", "_MANY_EDGES", "_MANY_RANGES"):
        monkeypatch.setattr(sampling, name, 1 << 60)
    exact = plan(mask, problem, device)
    for name in ("_MANY_TILES", "_MANY_EDGES", "_MANY_RANGES"):
        monkeypatch.setattr(sampling, name, 1)
    by_sample = plan(mask, problem, device)
    assert told(by_sample)["groups"][0]["steps"] == told(exact)["groups"][0]["steps"]
    # What was built is told alike; what was not is behind what runs.
    known = {str(each): each for each in exact.groups[0].alternatives}
    rough = [each for each in by_sample.groups[0].alternatives if each.estimate is None and known[str(each)].estimate]
    assert rough or "neighborhood" in str(mask)
    assert all(each.us > by_sample.us for each in rough)
    assert all(each.us == pytest.approx(known[str(each)].us, rel=0.15) for each in rough)


def test_dense_attention_is_faster_below_the_crossover_and_slower_above():
    made = plan(m.window(1023, 0), Problem(65_536, 65_536, dtype="bf16"), "nvidia-h100")
    crossover = dense_crossover(made)
    assert crossover is not None
    below, above = at_length(made, round(crossover * 0.6)), at_length(made, round(crossover * 1.7))
    assert below.us > dense_us(below)
    assert above.us < dense_us(above)
    # A mask of one length has none.
    assert dense_crossover(plan(m.documents([300, 700]), Problem(1000, 1000), PROCESSOR)) is None


@pytest.mark.parametrize(
    ("us", "words"), [(0.5, "0.5 µs"), (999.4, "999 µs"), (999.6, "1 ms"), (999_600, "1 s"), (2.49e9, "2,490 s")]
)
def test_times_read_well(us, words):
    assert duration(us) == words
