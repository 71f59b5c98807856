"""What explain says is what runs; in a notebook as on the command line."""

import re

import pytest
from cases import every_constructor
from test_cli import PROCESSOR

import sparsec
from sparsec import masks as m
from sparsec.backends.base import Problem
from sparsec.device import detect_cpu
from sparsec.planner import plan
from sparsec.planner.advice import advice
from sparsec.planner.lengths import at_length, dense_crossover, dense_us
from sparsec.planner.words import duration


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
    assert any("reorder='auto'" in sentence for sentence in advice(kept, "off"))
    assert not any("reorder" in sentence for sentence in advice(plan(dilated, Problem(4096, 4096), PROCESSOR)))
    tiny = advice(plan(m.window(3, 3), Problem(64, 64), PROCESSOR))
    assert any("Starting kernels" in sentence for sentence in tiny)
    half = plan(m.window(127, 0), Problem(2048, 2048, dtype="bf16", head_dim=64), PROCESSOR, tune="off")
    assert any("sparsec tune 'window(127, 0)' --seq-len 2048 --dtype bf16" in sentence for sentence in advice(half))
    assert all(len(advice(each)) <= 2 for each in (kept, half))


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
