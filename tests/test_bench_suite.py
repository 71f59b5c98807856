"""The benchmark tool: what a grid may say, what becomes of peers that are wrong, crash or hang, and what is written."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import bench_longest  # noqa: E402
import bench_suite  # noqa: E402
from bench import counting, results, sheet, supervisor, tables, verdict  # noqa: E402
from bench.exactness import check, sampled_rows  # noqa: E402
from bench.flex import NoPredicateError, mask_mod  # noqa: E402
from bench.goals import crossings, outcomes  # noqa: E402
from bench.gradients import sampled_keys  # noqa: E402
from bench.grid import GRIDS, Case, Effort, Goal, GridError, MaskSource, find_grid, load_grid  # noqa: E402
from bench.measure import measure_case  # noqa: E402
from bench.peers import Prepared, peer  # noqa: E402
from bench.protocol import interleaved, timing  # noqa: E402
from bench.provenance import provenance  # noqa: E402
from bench.results import CaseRow, Ceiling, PeerRow, Protocol, Run, Timing  # noqa: E402
from bench.workload import bound_mask, document_lengths, make_workload, packed_lengths  # noqa: E402

from sparsec import masks  # noqa: E402
from sparsec.device import detect_cpu, device  # noqa: E402

QUICK = Effort(seconds=0.001, min_repeats=2, max_repeats=2)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _silent(*_):
    pass


def _case(mask="window(5, 3)", peers=("ours",), **options):
    source = mask if isinstance(mask, MaskSource) else MaskSource("text", mask)
    options = {"length": 70, "heads": 2, "head_dim": 16, **options}
    return Case(options.pop("name", "tiny"), "attention", source, peers=peers, **options)


# Grids


def _grid_file(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_grids_say_nothing_wrong(path):
    grid = load_grid(path)
    assert grid.cases
    assert grid.about
    for goal in grid.goals:
        covered = replace(_run(), goals=(goal,), cases=tuple(_row(case) for case in grid.cases))
        assert outcomes(covered), f"no case bears on {goal.what}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cases: []", "cases must be a list of at least one case"),
        ("case: [{mask: full()}]", "the grid.case is not known; did you mean cases"),
        ("cases: [{mask: full(), lenght: 8}]", r"cases\[0\].lenght is not known; did you mean length"),
        ("cases: [{length: 8}]", r"cases\[0\].mask is missing"),
        ('cases: [{mask: "windw(3, 1)"}]', r"cases\[0\].mask cannot read the mask: there is no mask 'windw'"),
        ("cases: [{mask: full(), length: many}]", r"cases\[0\].length must be a whole number"),
        ("cases: [{mask: full(), heads: 0}]", r"cases\[0\].heads must be a whole number of at least 1"),
        ("cases: [{mask: full(), heads: 4, kv_heads: 3}]", "4 heads are no multiple of 3"),
        ("cases: [{mask: full(), dtype: [fp32, bf61]}]", r"cases\[0\].dtype is 'bf61'; did you mean bf16"),
        ("cases: [{mask: full(), direction: backward}]", r"cases\[0\].direction is 'backward'"),
        ("cases: [{mask: full(), peers: [ours, felx]}]", "there is no peer 'felx'; did you mean flex"),
        ("cases: [{mask: full(), peers: [warm]}]", "'warm' is no peer of attention"),
        ('cases: [{mask: full(), peers: ["ours:rows"]}]', "there is no peer 'ours:rows'"),
        ('cases: [{mask: "window({reach}, 0)"}]', r"\{reach\} is no parameter"),
        ('cases: [{mask: "window({r}, 0)", vary: {r: 3}}]', r"cases\[0\].vary must map names to lists"),
        ("cases: [{mask: {file: nowhere.npz}}]", r"cases\[0\].mask.file there is no file 'nowhere.npz'"),
        ("cases: [{mask: {graph: meshes, nodes: 9}}]", r"mask.graph is 'meshes'; did you mean mesh"),
        ("cases: [{mask: {graph: mesh}}]", r"mask.nodes must be a whole number"),
        ("cases: [{mask: full()}, {mask: full()}]", r"two cases are called 'full\(\)/h1/d64/fp32'"),
        ("effort: {seconds: 0}\ncases: [{mask: full()}]", "effort.seconds must be a number above 0"),
        ("cases: [{mask: full()}]\ngoals: [{what: x, value: ratio, cases: y}]", r"goals\[0\].value is 'ratio'"),
        ("plot: pie\ncases: [{mask: full()}]", "plot is 'pie'"),
        ("cases: [{mask: full()", "mine.yaml:2"),
    ],
)
def test_a_mistake_in_a_grid_is_named_and_nothing_runs(tmp_path, text, told):
    path = _grid_file(tmp_path, text)
    with pytest.raises(Exception, match=told) as caught:
        load_grid(path)
    assert str(path) in str(caught.value)
    out = tmp_path / "out.json"
    done = CliRunner().invoke(bench_suite.main, ["run", "--grid", str(path), "--out", str(out)])
    assert done.exit_code == 1
    assert done.output.startswith("Error: ")
    assert not out.exists()


def test_lists_and_parameters_multiply_the_cases(tmp_path):
    text = """
defaults: {length: [64, 128], dtype: [fp32, bf16]}
cases:
  - {name: near, mask: "window({reach}, {length})", vary: {reach: [1, 2]}, heads: 4, kv_heads: 2}
"""
    cases = load_grid(_grid_file(tmp_path, text)).cases
    assert len(cases) == 8
    assert cases[0].id == "near/reach=1/n64/h4x2/d64/fp32"
    assert cases[-1].mask.text == "window(2, 128)"


def test_an_unknown_grid_lists_those_there_are():
    with pytest.raises(GridError, match="quick"):
        find_grid("quik")


def test_the_digest_of_a_grid_is_that_of_the_work(tmp_path):
    text = "about: {}\ncases: [{{mask: full(), length: {}}}]"
    digests = [load_grid(_grid_file(tmp_path, text.format(*each))).digest for each in (("a", 8), ("b", 8), ("a", 9))]
    assert digests[0] == digests[1] != digests[2]


# Work


def test_documents_are_taken_in_order_and_the_last_is_cut():
    lengths = document_lengths(MaskSource("documents", "stdlib_token_lengths.csv", {"total": 1000}))
    assert lengths[:3] == [546, 59, 393]
    assert lengths[3:] == [2]


def test_packed_sequences_keep_to_themselves():
    source = MaskSource(
        "packed", "bigbird(16, 3, 2, 1, 0)", {"block": 16, "count": 3, "mean": 128, "max": 160, "seed": 0}
    )
    lengths = packed_lengths(source)
    dense = bound_mask(_case(source, length=None)).to_dense()
    first = 0
    for length in lengths:
        own = slice(first, first + length)
        assert (dense[own, own] == bound_mask(_case("bigbird(16, 3, 2, 1, 0)", length=length)).to_dense()).all()
        dense[own, own] = False
        first += length
    assert not dense.any()


@pytest.mark.parametrize("kind", ["power_law", "small_world", "mesh", "bipartite"])
def test_generated_graphs_have_each_edge_both_ways(kind):
    bound = bound_mask(_case(MaskSource("graph", kind, {"nodes": 200, "degree": 6}), length=None))
    dense = bound.to_dense()
    assert (dense == dense.T).all()
    assert 0.6 * 200 * 6 <= bound.nnz <= 1.4 * 200 * 6


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("causal()", 50),
        ("window(7, 3)", 50),
        ("window(7, 0)", 50),
        ("dilated(12, 4)", 50),
        ("dilated_2d(16, 2)", 50),
        ("strided(7)", 50),
        ("prefix(9) | causal()", 50),
        ("window(9, 9) - window(2, 2)", 50),
        ("~causal() & global_tokens(3)", 50),
        ("global_tokens([3, 20])", 50),
        ("documents([20, 5, 25])", None),
        ("longformer(8, 2)", 50),
        ("bigbird(8, 3, 2, 1, 0)", 100),
        ("random_blocks(2, 8, 0)", 50),
        ("random_edges(4, 0)", 50),
        ("neighborhood((6, 9), (3, 4))", None),
        ("neighborhood((6, 9), 3, dilation=2)", None),
    ],
)
def test_flex_predicates_are_the_masks(text, length):
    source = MaskSource("text", text)
    bound = bound_mask(_case(source, length=length))
    q, kv = torch.arange(bound.q_len)[:, None], torch.arange(bound.kv_len)[None]
    zero = torch.tensor(0)
    found = mask_mod(source, bound)(zero, zero, q, kv).expand(bound.shape)
    assert np.array_equal(found.numpy(), bound.to_dense())


def test_an_irregular_mask_too_large_for_a_lookup_has_no_predicate():
    source = MaskSource("text", "random_edges(2, 0)")
    with pytest.raises(NoPredicateError, match="GiB"):
        mask_mod(source, bound_mask(_case(source, length=100_000)))


# Measuring


@pytest.mark.parametrize(
    ("mask", "dtype"), [("window(5, 3)", "fp32"), ("causal()", "bf16"), ("random_edges(4, 0) - window(3, 3)", "fp32")]
)
def test_every_peer_is_exact_or_says_why_it_takes_no_part(mask, dtype):
    peers = ("ours", "ours:row_traversal", "sdpa", "sdpa_masked", "sdpa_unmasked", "torch_sparse", "gather_scatter")
    row = measure_case(_case(mask, peers, dtype=dtype, heads=4, kv_heads=2, batch=2), QUICK, 1, _silent)
    status = {each.peer: each.status for each in row.peers}
    expected = dict.fromkeys(peers, "ok")
    if mask != "causal()":
        expected["sdpa"] = "skipped"
    if dtype != "fp32":
        expected["torch_sparse"] = "skipped"
    assert status == expected, [each for each in row.peers if each.status != expected[each.peer]]
    assert all(each.reason for each in row.peers if each.status != "ok")
    assert row.edges == 8 * bound_mask(row.case).nnz
    assert row.flops == 4 * row.edges * 16
    own = row.row("ours")
    assert own.plan.runs
    assert own.timing.repeats == 2
    assert row.peak_flops > 1e8


class _Planted:
    """A peer that can be told what to do."""

    name = "sdpa_masked"

    def __init__(self, spoil):
        self.spoil = spoil

    def prepare(self, work):
        prepared = peer("sdpa_masked").prepare(work)
        return Prepared(lambda: self.spoil(prepared.call()), work.bound)


def _measure_planted(spoil):
    def make(name):
        return _Planted(spoil) if name == "sdpa_masked" else peer(name)

    row = measure_case(_case(peers=("gather_scatter", "sdpa_masked")), QUICK, 1, _silent, make_peer=make)
    assert row.row("gather_scatter").us is not None
    return row


def _slightly_off(out):
    # The row that is always looked at: the last one.
    out[0, -1, -1, 3] += 1e-3
    return out


@pytest.mark.parametrize("spoil", [_slightly_off, lambda out: out * float("nan"), lambda out: out.roll(1, 1)])
def test_a_wrong_peer_is_listed_as_wrong_and_not_timed(spoil):
    row = _measure_planted(spoil)
    planted = row.row("sdpa_masked")
    assert planted.status == "wrong"
    assert planted.us is None
    assert not planted.error <= planted.allowed
    assert row.best("sdpa_masked") is None
    assert "| wrong |" in tables.attention_table([row])


def test_a_peer_that_turns_wrong_while_it_is_timed_is_wrong():
    calls = []

    def later(out):
        calls.append(out)
        return out if len(calls) < 3 else out * 2

    assert _measure_planted(later).row("sdpa_masked").status == "wrong"


def test_a_peer_that_raises_costs_its_own_row():
    def fail(out):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    planted = _measure_planted(fail).row("sdpa_masked")
    assert planted.status == "failed"
    assert planted.reason.startswith("out of memory")


def test_a_peer_that_raises_while_it_is_timed_costs_its_own_row():
    calls = []

    def fail_later(out):
        calls.append(out)
        if len(calls) > 1:
            raise ValueError("not again")
        return out

    assert _measure_planted(fail_later).row("sdpa_masked").reason == "ValueError: not again"


def test_the_sample_holds_the_fullest_and_the_emptiest_row():
    bound = bound_mask(_case("global_tokens([777]) - prefix(1)", length=3000))
    rows = sampled_rows(bound)
    degrees = bound.degrees("q")
    assert degrees[rows].max() == degrees.max()
    assert degrees[rows].min() == degrees.min()
    assert {0, 2999} <= set(rows.tolist())


def test_an_empty_row_must_be_zero():
    work = make_workload(_case("full() - full()"))
    out = torch.zeros_like(work.q)
    assert check(work, out, work.bound).is_exact
    assert not check(work, out + 1e-30, work.bound).is_exact


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [("window(5, 3)", "fp32"), ("causal() | prefix(3)", "bf16"), ("random_edges(4, 0) - window(9, 9)", "fp32")],
)
def test_every_peer_has_exact_gradients_or_says_why_it_takes_no_part(mask, dtype):
    peers = ("ours", "ours:row_traversal", "flex", "sdpa_masked", "torch_sparse")
    # In bf16 torch adds up what was gathered from one row in bf16, and that is not exact.
    peers += ("gather_scatter",) if dtype == "fp32" else ()
    case = _case(mask, peers, dtype=dtype, heads=4, kv_heads=2, batch=2, direction="forward_backward")
    row = measure_case(case, QUICK, 1, _silent)
    skipped = {"flex"} if dtype == "fp32" else {"flex", "torch_sparse"}
    expected = {name: "skipped" if name in skipped else "ok" for name in peers}
    assert {each.peer: each.status for each in row.peers} == expected, row.peers
    assert "no backward pass on a CPU" in row.row("flex").reason
    assert row.flops == 14 * row.edges * 16
    for each in row.peers:
        if each.status == "ok":
            assert each.backward_over_forward == each.us / each.forward.median_us - 1
    text = tables.attention_table([row])
    assert f" {row.row('ours').backward_over_forward:.2f} |" in text


class _Spoiled(torch.autograd.Function):
    """The same number, and one entry of its gradient changed."""

    @staticmethod
    def forward(ctx, tensor, share):
        ctx.share = share
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        # Of the last row, which is always looked at.
        gradient[0, -1, -1, 3] += ctx.share * gradient.abs().max()
        return gradient, None


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
@pytest.mark.parametrize(("dtype", "share"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_a_peer_with_a_wrong_gradient_is_wrong_and_not_timed(name, dtype, share):
    class Planted:
        def prepare(self, work):
            inputs = [work.q, work.k, work.v]

            def call():
                given = list(inputs)
                index = ("dq", "dk", "dv").index(name)
                given[index] = _Spoiled.apply(given[index], share)
                mask = torch.from_numpy(work.bound.to_dense())
                return torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=mask, scale=work.scale)

            return Prepared(call, work.bound)

    case = _case(peers=("sdpa_masked",), direction="forward_backward", dtype=dtype)
    row = measure_case(case, QUICK, 1, _silent, make_peer=lambda _: Planted()).row("sdpa_masked")
    assert row.status == "wrong"
    assert row.reason.startswith(f"{name} is off by")
    assert row.us is None
    assert row.backward_over_forward is None


def test_the_sampled_keys_hold_the_fullest_and_the_emptiest():
    bound = bound_mask(_case("global_tokens([777]) - (prefix(1) & ~window(1, 1))", length=3000))
    keys = sampled_keys(bound)
    degrees = bound.degrees("kv")
    assert degrees[keys].max() == degrees.max()
    assert degrees[keys].min() == degrees.min()
    assert {0, 777, 2999} <= set(keys.tolist())


def test_backward_over_forward_can_be_aimed_at():
    case = _case(direction="forward_backward")
    row = _row(case, ours=350.0)
    row = replace(row, peers=(replace(row.peers[0], forward=Timing(100.0, 99.0, 101.0, 98.0, 9)),))
    goal = Goal("backward", "backward_over_forward", ("*/forward_backward",), at_most=2.0)
    (reached,) = outcomes(replace(_run(row), goals=(goal,)))
    assert reached.value == pytest.approx(2.5)
    assert not reached.is_met


def test_calls_are_interleaved_in_shuffled_orders():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(calls, Effort(seconds=1e-9, min_repeats=20, max_repeats=50), _silent)
    warm_up, rounds = "".join(order[:6]), ["".join(order[at : at + 3]) for at in range(6, len(order), 3)]
    assert warm_up == "aabbcc"
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 3
    assert times["a"].repeats == len(rounds) == 20


def test_timing_is_median_and_quartiles_of_the_samples():
    assert timing([4.0, 1.0, 3.0, 2.0, 100.0]) == Timing(3.0, 2.0, 4.0, 1.0, 5)
    assert timing([7.0]) == Timing(7.0, 7.0, 7.0, 7.0, 1)


# Workers


def test_a_hanging_worker_is_ended():
    case = _case()
    row = supervisor.run_case(case, QUICK, 1, supervisor.Limits(0.05, 0), _silent)
    assert row.row("ours").status == "timed out"
    assert "0.05 s" in row.row("ours").reason


def test_a_crashed_worker_says_what_it_died_of():
    case = _case(MaskSource("documents", "stdlib_token_lengths.csv", {"total": 10**9}))
    row = supervisor.run_case(case, QUICK, 1, supervisor.Limits(120.0, 0), _silent)
    assert row.row("ours").status == "crashed"
    assert "689,458 tokens in all" in row.row("ours").reason


def test_a_peer_that_crashes_is_left_out_of_the_next_attempt(monkeypatch):
    asked = []
    death = supervisor._Death("sdpa_masked", "call", "crashed", "ended by SIGSEGV during call")

    def ask(request, timeout_s, threads, heard):
        asked.append([row["peer"] for row in request["lost"]])
        if len(asked) == 1:
            return death
        case = results.decode(Case, request["case"], "")
        lost = [results.decode(PeerRow, row, "") for row in request["lost"]]
        row = measure_case(case, QUICK, 1, _silent, lost)
        return json.loads(json.dumps(row, default=lambda each: {name: getattr(each, name) for name in each.__slots__}))

    monkeypatch.setattr(supervisor, "ask", ask)
    row = supervisor.run_case(
        _case(peers=("gather_scatter", "sdpa_masked")), QUICK, 1, supervisor.Limits(60.0, 0), _silent
    )
    assert asked == [[], ["sdpa_masked"]]
    assert row.row("sdpa_masked").reason == "ended by SIGSEGV during call"
    assert row.row("gather_scatter").us is not None


def test_a_small_grid_from_end_to_end(tmp_path):
    text = """
about: Small
effort: {seconds: 0.001, min_repeats: 2, max_repeats: 2}
cases:
  - {name: near, mask: "window(20, 20)", length: 256, peers: [ours, flex, torch_sparse]}
  - {name: plan, mask: "window(20, 20)", length: 256, measure: planning}
  - {name: arrays, mask: "window(20, 20)", length: 256, measure: metadata}
goals: [{what: near, value: "ratio:flex", cases: near/*, at_least: 1}]
"""
    out = tmp_path / "deep" / "out.json"
    arguments = ["run", "--grid", str(_grid_file(tmp_path, text)), "--out", str(out), "--threads", "1"]
    done = CliRunner().invoke(bench_suite.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    run = results.read_run(out)
    assert [each.status for row in run.cases for each in row.peers] == ["ok"] * 5, done.output
    assert run.ceilings[0].one_thread > 1e8
    assert run.cases[0].ratio("flex") > 0
    assert "× FlexAttention" in done.output


# Result files


def _row(case=None, **us):
    case = case or _case(peers=tuple(us))
    rows = []
    for name in case.peers:
        took = us.get(name, 100.0)
        rows.append(PeerRow(name, "ok", timing=Timing(took, took * 0.99, took * 1.01, took * 0.98, 9), setup_us=10.0))
    return CaseRow(case, 2, 70, 70, 1000, 0.2, 0.5, 64_000, 35_840, 1e9, tuple(rows))


def _run(*rows):
    return Run(
        results.SCHEMA, "mine", "Mine", "digest", "bars", "length", Protocol(), provenance(), 2, (), (), tuple(rows)
    )


def test_results_come_back_as_they_were(tmp_path):
    wrong = PeerRow("sdpa", "wrong", "off by nan", error=float("nan"), allowed=1e-6)
    row = _row(_case(peers=("ours", "flex", "sdpa")), ours=10.0, flex=30.0)
    row = replace(row, peers=(*row.peers[:2], wrong))
    run = replace(_run(row), goals=(Goal("all", "ratio:flex", ("*",), at_least=2.0),))
    path = tmp_path / "results.json"
    results.write_run(path, run)
    found = results.read_run(path)
    assert replace(found, cases=()) == replace(run, cases=())
    assert found.cases[0].peers[:2] == row.peers[:2]
    # JSON has no NaN.
    assert found.cases[0].peers[2] == replace(wrong, error=None)
    written = json.loads(path.read_text())
    assert written["cases"][0]["derived"]["ratio"]["flex"] == 3.0
    assert written["cases"][0]["derived"]["gflops"]["ours"] == pytest.approx(6.4)
    assert list(written)[:2] == ["schema", "grid"]
    assert list(written)[-1] == "cases"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": 99}, "schema 99"),
        ({"extra": 1}, "not known: extra"),
        ({"threads": "two"}, "threads must be a int"),
        ({"cases": [{"case": {}}]}, "missing"),
        ({"plot": "pie"}, "plot is 'pie'"),
    ],
)
def test_a_file_of_another_schema_is_refused_by_name(tmp_path, change, told):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**json.loads(_run().to_json()), **change}))
    with pytest.raises(results.ResultError, match=told):
        results.read_run(path)


def test_break_even_counts_the_calls_that_win_back_the_set_up():
    case = _case(peers=("ours", "flex"))
    row = _row(case, ours=10.0, flex=30.0)
    ours, flex = row.peers
    slow = replace(row, peers=(replace(ours, setup_us=110.0), flex))
    assert slow.break_even_calls("flex") == 5.0
    assert row.break_even_calls("flex") == 0.0
    never = replace(row, peers=(replace(ours, setup_us=110.0, timing=flex.timing), flex))
    assert never.break_even_calls("flex") is None


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    text = "cases: [{name: a, mask: full()}, {name: b, mask: full()}, {name: c, mask: full()}]"
    grid = _grid_file(tmp_path, text)
    out = tmp_path / "out.json"
    measured = []

    def run_case(case, effort, threads, limits, progress):
        if case.name == "b" and "b" not in measured:
            measured.append("b")
            raise KeyboardInterrupt
        measured.append(case.name)
        return _row(case)

    monkeypatch.setattr(supervisor, "run_case", run_case)
    monkeypatch.setattr(bench_suite, "measure_ceilings", lambda threads, limits: ())
    arguments = ["run", "--grid", str(grid), "--out", str(out)]
    assert CliRunner().invoke(bench_suite.main, arguments).exit_code != 0
    assert [row.case.name for row in results.read_run(out).cases] == ["a"]
    assert CliRunner().invoke(bench_suite.main, arguments).exit_code == 0
    assert measured == ["a", "b", "b", "c"]
    assert [row.case.name for row in results.read_run(out).cases] == ["a", "b", "c"]
    # Nor is that of another processor, whatever its device key.
    other = results.read_run(out)
    results.write_run(out, replace(other, provenance=replace(other.provenance, processor="another")))
    refused = CliRunner().invoke(bench_suite.main, arguments)
    assert refused.exit_code == 1
    assert "another processor" in refused.output
    results.write_run(out, other)
    # Other work is never put into the same file.
    grid.write_text(text.replace("name: c", "name: d"))
    refused = CliRunner().invoke(bench_suite.main, arguments)
    assert refused.exit_code == 1
    assert "another grid" in refused.output
    assert CliRunner().invoke(bench_suite.main, [*arguments, "--fresh"]).exit_code == 0
    assert results.read_run(out).cases[-1].case.name == "d"


def test_nothing_half_written_where_the_folder_is_not_writable(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results.write_run(path, _run())
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Exception, match="No space left"):
        results.write_run(path, _run(_row(ours=5.0)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# Comparing


@pytest.mark.parametrize(
    ("old", "new", "judgement"),
    [
        ((100, 98, 102), (80, 78, 82), "faster"),
        ((100, 98, 102), (120, 118, 122), "slower"),
        ((100, 98, 102), (101.5, 101.4, 101.6), "same"),
        ((100, 80, 130), (120, 90, 140), "same"),
        ((100, 99.9, 100.1), (102.5, 102.4, 102.6), "same"),
    ],
)
def test_a_difference_counts_only_beyond_the_noise_of_both(old, new, judgement):
    before, after = (Timing(*each, each[1], 9) for each in (old, new))
    assert verdict.faster_or_slower(before, after) == judgement


def test_compare_tells_what_became_of_each_peer(tmp_path):
    old, new = _row(ours=100.0, flex=200.0), _row(ours=200.0, flex=200.0)
    lost = replace(new, peers=(replace(new.peers[0], status="wrong"), new.peers[1]))
    changes = verdict.compare(_run(old), _run(lost))
    assert [(each.peer, each.judgement) for each in changes] == [("ours", "no longer exact"), ("flex", "same")]
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, row in zip(paths, (old, new), strict=True):
        results.write_run(path, _run(row))
    done = CliRunner().invoke(bench_suite.main, ["compare", *map(str, paths)])
    assert done.exit_code == 0
    assert "0.50× | slower" in done.output
    assert CliRunner().invoke(bench_suite.main, ["compare", "--strict", *map(str, paths)]).exit_code == 1


# Tables and plots


def _shown_run():
    rows = [
        _row(
            _case(name="near", peers=("ours", "flex", "flex:64"), dtype="fp32"),
            ours=10.0,
            flex=40.0,
            **{"flex:64": 20.0},
        ),
        _row(_case(name="far", peers=("ours", "flex"), dtype="fp32"), ours=10.0, flex=80.0),
    ]
    rows[1] = replace(rows[1], peers=(*rows[1].peers, PeerRow("sdpa", "crashed", "ended by SIGKILL during prepare")))
    goals = (
        Goal("both", "ratio:flex", ("near/*", "far/*"), at_least=5.0),
        Goal("near alone", "ratio:flex", ("near/*",), at_least=1.0),
        Goal("nobody", "ratio:flex", ("elsewhere/*",), at_least=1.0),
        Goal("near against SDPA", "ratio:sdpa", ("near/*",), at_least=1.0),
    )
    return replace(_run(*rows), goals=goals)


def test_tables_show_ratios_means_reasons_and_goals():
    text = tables.markdown(_shown_run())
    lines = text.splitlines()
    near = next(line for line in lines if line.startswith("| near |"))
    # The faster of the two ways to ask FlexAttention counts.
    assert near.split(" | ")[6:] == ["2.00", "– |"]
    assert next(line for line in lines if line.startswith("| far |")).endswith("| 8.00 | crashed |")
    assert next(line for line in lines if "geometric mean" in line).split(" | ")[6] == "4.00"
    assert "SDPA crashed (far): ended by SIGKILL during prepare" in text
    assert "| both | ≥ 5 | 4 | missed by 20% |" in text
    assert "| near alone | ≥ 1 | 2 | met |" in text
    assert "| near against SDPA | ≥ 1 | not measured |  |" in text
    assert "nobody" not in text


def test_a_readme_gets_its_tables_between_the_markers(tmp_path):
    results_file, readme = tmp_path / "results.json", tmp_path / "README.md"
    results.write_run(results_file, _shown_run())
    arguments = ["table", str(results_file), "--write", str(readme)]
    readme.write_text("# Title\n")
    assert "must hold <!-- benchmarks:begin -->" in CliRunner().invoke(bench_suite.main, arguments).output
    readme.write_text(f"# Title\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n")
    assert CliRunner().invoke(bench_suite.main, [*arguments, "--check"]).exit_code == 1
    assert "old" in readme.read_text()
    assert CliRunner().invoke(bench_suite.main, arguments).exit_code == 0
    text = readme.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith(f"{tables.END}\n\nafter\n")
    assert "| near |" in text
    assert "old" not in text
    assert CliRunner().invoke(bench_suite.main, [*arguments, "--check"]).exit_code == 0


def test_what_was_measured_where_is_told_of_all_results():
    run = _shown_run()
    rotated = replace(
        run,
        grid="older",
        protocol=replace(
            run.protocol, order="interleaved: every round calls each peer once, each begins with the next"
        ),
        provenance=replace(run.provenance, processor="Another, family 9 model 1", commit="", is_dirty=True),
    )
    lines = [line.strip("| ").split(" | ") for line in tables.overview([run, rotated], [_sheet()]).splitlines()[2:]]
    assert [line[0] for line in lines] == ["mine", "older", "mine"]
    assert [line[1] for line in lines] == [
        run.provenance.processor,
        "Another, family 9 model 1",
        run.provenance.processor,
    ]
    assert [line[6] for line in lines[:2]] == [tables.overview([run], []).split(" | ")[-2], "– with changes"]
    assert [line[7] for line in lines[:2]] == ["in a shuffled order of its own", "each begins with the next"]


def test_what_a_run_left_out_of_its_grid_is_named():
    grid = load_grid(find_grid("quick"))
    rows = [replace(_row(case), case=case) for case in grid.cases]
    whole = replace(_run(*rows), grid="quick", grid_digest=grid.digest)
    left = replace(whole, cases=whole.cases[2:])
    told = f"Of the grid, not measured: {grid.cases[0].id}, {grid.cases[1].id}."
    assert "not measured: " not in tables.markdown(whole)
    assert told in tables.markdown(left)
    assert told not in tables.markdown(left, is_part=True)
    # What another grid of that name had cannot be known.
    assert told not in tables.markdown(replace(left, grid_digest="0"))


def test_processors_that_call_themselves_the_same_are_told_apart():
    cpu = replace(detect_cpu(), model="amd-26-2")
    assert provenance(cpu).processor == f"{cpu.label}, amd-26-2"
    assert provenance(replace(cpu, model="")).processor == cpu.label
    assert provenance(device("nvidia-h100")).processor == device("nvidia-h100").label


def test_more_names_than_colours_have_hollow_markers(monkeypatch):
    pytest.importorskip("matplotlib")
    from bench import plots

    monkeypatch.setattr(plots, "_COLOURS", plots._COLOURS[:2])
    rows = [_row(_case(name=name, peers=("ours",), dtype="fp32"), ours=10.0) for name in "abc"]
    figure = plots._lines(replace(_run(*rows), plot="lines"), rows)
    looks = [(line.get_color(), line.get_fillstyle()) for line in figure.axes[0].lines]
    assert len(looks) == len(set(looks)) == 3


@pytest.mark.parametrize("kind", ["bars", "lines"])
def test_plots_are_the_same_for_the_same_results(tmp_path, kind):
    pytest.importorskip("matplotlib")
    results_file = tmp_path / "results.json"
    results.write_run(results_file, replace(_shown_run(), plot=kind))
    contents = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        done = CliRunner().invoke(bench_suite.main, ["plot", str(results_file), "--out", str(folder)])
        assert done.exit_code == 0, done.output
        device = results.read_run(results_file).provenance.device
        assert sorted(path.name for path in folder.iterdir()) == [f"mine-{device}.png", f"mine-{device}.svg"]
        contents.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert contents[0] == contents[1]


# Slopes and crossings


def _at(length, us, peak_bytes=None, **options):
    row = _row(_case(name="near", peers=tuple(us), length=length, **options), **us)
    peers = tuple(replace(each, peak_bytes=peak_bytes) for each in row.peers)
    return replace(row, q_len=length, density=1 / length, peers=peers)


@pytest.mark.parametrize(("power", "is_met"), [(1.0, True), (1.1, False), (0.9, False)])
def test_a_slope_is_that_of_the_logarithms_and_must_lie_between_its_bounds(power, is_met):
    rows = [_at(n, {"ours": 3.0 * n**power}, round(7 * n**power)) for n in (1000, 4000, 64_000)]
    goals = tuple(
        Goal("near", what, ("near/*",), at_least=0.95, at_most=1.05) for what in ("slope:time", "slope:memory")
    )
    for outcome in outcomes(replace(_run(*rows), goals=goals)):
        assert outcome.value == pytest.approx(power, abs=1e-4)
        assert outcome.is_met is is_met
    lost = replace(rows[0], peers=())
    assert [each.value for each in outcomes(replace(_run(lost, *rows[1:]), goals=goals))] == [None, None]
    assert "| ≥ 0.95, ≤ 1.05 |" in tables.markdown(replace(_run(*rows), goals=goals))


def test_lines_cross_where_the_lead_changes():
    rows = [_at(n, {"ours": float(n), "sdpa": float(n) ** 2 / 100}) for n in (1000, 10, 30, 300)]
    (crossing,) = crossings(_run(*rows))
    assert (crossing.faster, crossing.slower) == ("ours", "sdpa")
    assert crossing.at == pytest.approx(100)
    assert "| near | fp32 |  | 100 | sparsec | SDPA |" in tables.markdown(replace(_run(*rows), plot="lines"))


def test_a_share_is_of_the_larger_peak():
    row = _row(ours=10.0)
    own = row.peers[0]
    assert row.peak_flops == 1e9
    alone = row.share_of_peak(own, ())
    ceiling = Ceiling("fp32", "fp32 FMA", 1e9, 2e9)
    assert row.share_of_peak(own, (ceiling, Ceiling("bf16", "bf16 dot", 9e9, 9e9))) == pytest.approx(alone / 2)
    assert row.share_of_peak(own, (replace(ceiling, all_threads=5e8),)) == alone


def test_memory_may_be_that_of_a_settled_process():
    # Large enough for the blocks that results leave to each other.
    row = measure_case(_case(length=65_536), replace(QUICK, settled_memory=True), 1, _silent)
    out_bytes = 2 * 65_536 * 16 * 4
    assert out_bytes <= row.row("ours").peak_bytes < 8 * out_bytes


# Sheets


def _sheet(*figures):
    return sheet.made("mine", "Mine", "by hand", 2, list(figures))


def test_sheets_come_back_as_they_were_and_become_tables(tmp_path):
    shape = {"mask": "full()", "tokens": 4096}
    slow = sheet.timed("theirs", Timing(3000.0, 2990.0, 3010.0, 2980.0, 9), shape)
    quick = replace(
        sheet.timed("mine", Timing(1500.0, 1490.0, 1510.0, 1480.0, 9), shape, "theirs"), error=1e-7, allowed=1e-6
    )
    wrong = sheet.Figure("off", 2e9, "bytes/s", error=1.0, allowed=1e-6)
    path = tmp_path / "deep" / "sheet.json"
    sheet.write_sheet(path, _sheet(slow, quick, wrong))
    assert sheet.is_sheet(path)
    assert sheet.read_sheet(path).figures == (slow, quick, wrong)
    text = CliRunner().invoke(bench_suite.main, ["table", str(path)]).output
    assert "| mine | mask full(), tokens 4,096 | 1.5 ms ± 1% | 2.00× as fast as theirs | off by 1e-07" in text
    assert "| off |  | 2 GB/s |  | wrong: off by 1, allowed 1e-06 |" in text
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2}))
    refused = CliRunner().invoke(bench_suite.main, ["table", str(path)])
    assert refused.exit_code == 1
    assert "schema 2" in refused.output


def test_sheets_are_compared_by_what_they_count(tmp_path):
    def counted(what, value):
        return sheet.Figure(what, value, "instructions", {"dtype": "fp32"}, error=0.0, allowed=1.0)

    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    sheet.write_sheet(paths[0], _sheet(counted("a", 1e6), counted("b", 1e6), counted("c", 1e6), counted("gone", 1.0)))
    spoiled = replace(counted("c", 1e6), error=2.0)
    sheet.write_sheet(paths[1], _sheet(counted("a", 1.01e6), counted("b", 1.0005e6), spoiled))
    done = CliRunner().invoke(bench_suite.main, ["compare", *map(str, paths)])
    lines = done.output.splitlines()
    judged = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip("| ") for line in lines if "dtype fp32" in line
    }
    assert judged == {"a": "slower", "b": "same", "c": "no longer exact"}
    assert CliRunner().invoke(bench_suite.main, ["compare", "--strict", *map(str, paths)]).exit_code == 1


def test_instructions_are_counted_inside_the_kernels_alone(tmp_path):
    dump = tmp_path / "dump.1"
    dump.write_text(
        "positions: line\nevents: Ir\ndesc: Trigger: Client Request: 3 ours:hybrid\n"
        "ob=(1) /cache/cpu/hybrid.so\nfn=(1) forward\n10 100\n+2 20\n"
        "cob=(2) /lib/libm.so\ncfn=(2) expf\ncalls=5 0\n* 9000\n-1 3\n"
        "\nob=(2)\nfn=(2)\n0 9000\nob=(1)\nfn=(3) other\n7 4\n"
    )
    assert counting._counted(dump, Path("/cache/cpu")) == ("3 ours:hybrid", 127)


def test_where_valgrind_is_absent_counting_says_so(monkeypatch):
    monkeypatch.setattr(counting.shutil, "which", lambda name: None)
    done = CliRunner().invoke(bench_suite.main, ["count"])
    assert done.exit_code == 1
    assert "valgrind is not installed" in done.output


# Beyond memory


def test_slices_in_order_are_the_attention_of_the_whole(tmp_path):
    n, rows = 300, 64
    torch.manual_seed(0)
    given = torch.randn(3, 1, 1, n, 64).bfloat16()
    paths = [tmp_path / name for name in "qkv"]
    q, k, v = (
        torch.from_file(str(path), shared=True, size=n * 64, dtype=torch.bfloat16).view(1, 1, n, 64) for path in paths
    )
    for mapped, content in zip((q, k, v), given, strict=True):
        mapped.copy_(content)
    mask = masks.window(64, 64)
    bench_longest.attend_in_order(mask, q, k, v, rows)
    work = make_workload(_case("window(64, 64)", length=n, heads=1, head_dim=64, dtype="bf16"))
    work = replace(work, q=given[0], k=given[1], v=given[2])
    assert check(work, q, work.bound).is_exact
    assert not check(work, given[0], work.bound).is_exact
    # The result is in the file.
    stored = torch.from_file(str(paths[0]), size=n * 64, dtype=torch.bfloat16).view(1, 1, n, 64)
    assert torch.equal(stored, q)


def test_a_part_that_fails_says_why():
    said = bench_longest.ask("in_memory", n=1000, limit_bytes=1 << 20)
    assert isinstance(said, str)
    assert said


# What is committed


ROOT = Path(__file__).parents[1]
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def test_the_pages_hold_the_tables_of_the_committed_results():
    checked = CliRunner().invoke(bench_suite.main, ["figures", "--check"])
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_committed_plots_are_of_the_committed_results(path):
    run = results.read_run(path)
    if not any(row.case.measure == "attention" for row in run.cases):
        return
    for suffix in ("svg", "png"):
        drawn = ROOT / "benchmarks" / "plots" / f"{run.grid}-{run.provenance.device}.{suffix}"
        assert f"results {run.digest}".encode() in drawn.read_bytes(), (
            f"{drawn.name} is out of date: run `make figures`"
        )
