"""`sparsec bench`: who takes part, what is checked, what is said."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_cli import PROCESSOR

import sparsec as sparsec_package
from sparsec import masks as m
from sparsec.backends.base import Problem
from sparsec.cli import bench_peers
from sparsec.cli.arguments import known_devices
from sparsec.cli.bench import _break_even, _document, _Line
from sparsec.cli.demo_measure import Error, Timing
from sparsec.cli.entry import run, sparsec
from sparsec.cli.planning import Asked
from sparsec.planner import plan


def asked(**given):
    options = dict.fromkeys(
        ("seq_len", "kv_len", "heads", "kv_heads", "head_dim", "v_dim", "batch", "template", "backend")
    )
    fixed = {"dtype": "fp32", "devices": known_devices(None, None, "cpu"), "reorder": "auto"}
    fixed |= {"needs_grad": False, "tune": "off"}
    return Asked(**(options | fixed | given))


def test_candidates_are_timed_and_checked_beside_their_estimates():
    command = ["bench", "window(20, 5)", "--seq-len", "300", "--heads", "4", "--kv-heads", "2", "--rounds", "1"]
    result = CliRunner().invoke(sparsec, [*command, "--no-peers", "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["plan"]["problem"]["kv_heads"] == 2
    first, *rivals = document["contestants"]
    assert rivals
    for each in (first, *rivals):
        assert each["is_ours"]
        assert each["estimate_us"] > 0
        assert len(each["timings_us"]) >= 1
        assert 0 < each["error"] <= each["allowed_error"]
    assert document["break_even"] is None
    assert_documented(document)
    assert len({each["name"] for each in document["contestants"]}) == len(document["contestants"])


def assert_documented(document):
    described = (Path(sparsec_package.__file__).parent / "report" / "BENCH.md").read_text()
    documented = set(re.findall(r"^\| `([^`]+)`", described, re.MULTILINE))
    assert f"`schema` is {document['schema']};" in described
    (contestant,) = {frozenset(each) for each in document["contestants"]}
    found = set(document) | {f"contestants[].{key}" for key in contestant}
    found |= {f"break_even.{key}" for key in document["break_even"] or ("peer", "calls")}
    assert found == documented


def test_what_a_call_earns_back_is_documented():
    line = _Line("ours", True, False, 1.0, Timing((1e-3,) * 3), Error(0.0, 1.0, 64), 2.0)
    peer = replace(line, name="peer", is_ours=False, timing=Timing((2e-3,) * 3), ready_s=1.0)
    made = plan(m.window(2, 2), Problem(64, 64), PROCESSOR)
    document = _document(made, [line, peer])
    assert document["break_even"] == {"peer": "peer", "calls": -int(-(made.planning_us * 1e-6 + 1.0) // 1e-3)}
    assert_documented(document)


def test_a_mask_for_each_head_is_checked_head_by_head():
    mask = "per_head([causal(), window(9, 2)])"
    result = CliRunner().invoke(sparsec, ["bench", mask, "--seq-len", "200", "--rounds", "1", "--no-peers"])
    assert result.exit_code == 0, result.output
    assert "WRONG" not in result.stdout


def test_a_wrong_answer_is_told_and_fails(monkeypatch):
    monkeypatch.setattr(bench_peers, "_compiled", lambda made, asked, given: lambda: lambda: given.q * 2)
    result = CliRunner().invoke(sparsec, ["bench", "window(9, 9)", "--seq-len", "100", "--rounds", "1", "--no-peers"])
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    assert "not exact" in result.stderr


def test_what_does_not_fit_is_left_out_with_a_reason():
    wanted = asked(seq_len=500, heads=2)
    bound = wanted.bound(m.random_edges(5, 0))
    made = wanted.plan(bound)
    given = bench_peers.tensors(made.problem)
    found = bench_peers.contestants(made, wanted, given, memory_bytes=1000, with_peers=True)
    assert found[0].is_ours
    reasons = {}
    for each in found:
        if not each.is_ours and "all pairs" not in each.name:
            with pytest.raises(bench_peers.RefusedError) as refusal:
                each.prepare()
            reasons[each.name] = str(refusal.value)
    assert "block mask" in reasons["FlexAttention, compiled"]
    assert len(reasons) == 4


def test_flex_attention_is_asked_for_the_same_mask(monkeypatch):
    import torch

    bound = (m.window(20, 5) | m.global_tokens(2)).bind(200)
    given = bench_peers.tensors(asked(seq_len=200, heads=1).problem(bound))

    def attention(q, k, v, block_mask):
        """What the block mask means, pair by pair: compiling FlexAttention takes too long for a test."""
        zero, index = torch.tensor(0), torch.arange(200)
        pairs = block_mask.mask_mod(zero, zero, index[:, None], index[None])
        assert np.array_equal(block_mask.to_dense()[0, 0].numpy() > 0, tiles)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=pairs)

    tiles = np.zeros((2, 2), bool)
    q, kv = np.nonzero(bound.to_dense())
    tiles[q // 128, kv // 128] = True
    monkeypatch.setattr(torch, "compile", lambda function, **_: attention)
    answer = bench_peers._flex_run(bound, given)()
    dense = torch.from_numpy(bound.to_dense())
    assert torch.equal(answer, torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=dense))


def test_calls_until_planning_is_paid_back():
    def line(name, seconds, ready_s, **more):
        error = Error(0.0, 1.0, 1)
        facts = {"is_ours": False, "is_other_mask": False} | more
        return _Line(name, estimate_us=None, timing=Timing((seconds,)), error=error, ready_s=ready_s, **facts)

    class Made:
        planning_us = 1e6

    ours = line("ours", 0.1, 2.0, is_ours=True)
    peers = [line("slow", 9.0, 0.0), line("quick", 0.4, 0.0), line("another mask", 0.01, 0.0, is_other_mask=True)]
    assert _break_even(Made, [ours, *peers]) == ("quick", 10)
    assert _break_even(Made, [ours, line("quicker", 0.05, 0.0)]) is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--seq-len", "64", "--device", "nvidia-h100"), "explain --device"),
        (("--seq-len", "64", "--needs-grad"), "forward"),
        (("--seq-len", "100000000", "--heads", "64"), "fewer"),
        ((), "--seq-len"),
    ],
)
def test_what_cannot_be_timed_is_bad_usage(arguments, expected, capsys):
    assert run(["bench", "window(3, 1)", *arguments]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""
