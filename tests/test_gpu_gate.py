"""The tool that verifies kernels on a GPU, as far as a machine without one goes: what it keeps, skips and says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.fixture(scope="module")
def gpu_gate():
    sys.path.insert(0, str(TOOLS))
    try:
        import gpu_gate

        yield gpu_gate
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture
def record(gpu_gate, tmp_path, monkeypatch):
    import torch

    from sparsec.device import device

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    return gpu_gate.Record(device("nvidia-h200"), tmp_path)


def test_results_count_for_the_same_sources_only(gpu_gate, record, monkeypatch):
    record.write("verify/a/triton/bf16/forward/empty", {"status": "passed"})
    record.read()
    assert record.counts()["passed"] == 1
    monkeypatch.setitem(record.about, "sources", "others")
    record.read()
    assert not record.results


def test_results_of_another_toolchain_are_set_aside_and_not_lost(gpu_gate, record, monkeypatch):
    from gate import record as module

    from sparsec.device import device
    from sparsec.template import template

    record.write("verify/a/triton/bf16/forward/empty", {"status": "passed"})
    before = record.path.read_text()
    monkeypatch.setattr(module, "own_kernels", lambda device: [(template("hybrid"), "triton")])
    for number in (1, 2):
        other = gpu_gate.Record(device("nvidia-h200"), record.path.parent)
        assert other.about["toolchain"] != record.about["toolchain"]
        assert not other.results
        assert record.path.with_suffix(".1.old").read_text() == before
        assert not record.path.exists()
        record.path.write_text(before)
        assert len([*record.path.parent.glob("*.old")]) == number


def test_a_back_end_that_is_not_here_is_told(gpu_gate, record, monkeypatch):
    from gate.report import summary

    assert record.about["absent"].keys() >= {"triton"}
    content = {**record.about, "results": {}, "absent": {"cuda": "cuda-python is not installed"}}
    assert "- cuda: nothing was run: cuda-python is not installed" in [*summary(content)]


def test_what_passed_or_was_tried_in_this_run_is_left_alone(gpu_gate):
    assert not gpu_gate.is_settled({"status": "passed", "goes_on": True, "run": "earlier"}, "now")
    assert gpu_gate.is_settled({"status": "passed", "goes_on": True, "run": "now"}, "now")
    assert not gpu_gate.is_settled({"status": "lost", "run": "now"}, "now")
    assert gpu_gate.is_settled({"status": "passed"}, "now")
    assert gpu_gate.is_settled({"status": "failed", "run": "now"}, "now")
    assert not gpu_gate.is_settled({"status": "failed", "run": "earlier"}, "now")
    assert not gpu_gate.is_settled(None, "now")


def _hang(gpu_gate, record, key, **at):
    """A worker that hangs with a task, as its watcher finds it; returns what is written of that."""
    record.begin(key, **at)
    now = json.loads(record._now.read_text())
    record._now.write_text(json.dumps({**now, "since": time.time() - 1e6}))
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    lost = gpu_gate.watched(worker, record, time.time() + 60)
    assert worker.returncode is not None
    gpu_gate.settle(record, lost, "now")
    assert record.running() is None
    return record.results[key]


def test_a_worker_that_hangs_is_ended_and_its_task_has_failed(gpu_gate, record):
    found = _hang(gpu_gate, record, "verify/block_sparse/triton/bf16/forward/empty")
    assert "longer than" in found["error"]
    assert gpu_gate.is_settled(found, "now")


def test_a_package_that_hangs_is_left_out_of_the_next_try(gpu_gate, record):
    key = "bench/gpu_figures/window/n9"
    for who in ("flex", "magi"):
        assert not gpu_gate.is_settled(_hang(gpu_gate, record, key, who=who, stage="call"), "now")
    assert [*gpu_gate.lost_peers(record.results[key])] == ["flex", "magi"]
    # One that was left out cannot be at fault again: whatever it is, it is not tried for ever.
    assert gpu_gate.is_settled(_hang(gpu_gate, record, key, who="flex", stage="call"), "now")


@pytest.mark.parametrize("code", [1, 3])
def test_a_worker_is_started_again_only_where_it_lost_a_task_or_the_device(gpu_gate, record, monkeypatch, code):
    """3 says that the device was lost, of which the worker has written down its part."""
    codes = [code, 0]
    monkeypatch.setattr(gpu_gate, "detect_gpu", lambda: None)
    monkeypatch.setattr(gpu_gate, "Record", lambda device, results: record)
    popen = subprocess.Popen

    def worker(command, cwd, start_new_session):
        assert command[2] == "work"
        assert start_new_session
        return popen([sys.executable, "-c", f"raise SystemExit({codes.pop(0)})"], start_new_session=True)

    monkeypatch.setattr(gpu_gate.subprocess, "Popen", worker)
    done = CliRunner().invoke(gpu_gate.main, ["run", "--minutes", "1"])
    assert done.exit_code == (1 if code == 1 else 0)
    assert codes == ([0] if code == 1 else [])
    assert ("between two tasks" in done.output) == (code == 1)


def test_a_worker_out_of_time_leaves_its_task_for_later(gpu_gate, record):
    record.write("verify/a/triton/bf16/forward/empty", {"status": "passed"})
    record.begin("tests/pytest-m-gpu")
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    assert gpu_gate.watched(worker, record, time.time() - 60) is None
    assert record.running() is None
    assert [*json.loads(record.path.read_text())["results"]] == ["verify/a/triton/bf16/forward/empty"]


def test_the_summary_comes_where_the_gate_is_stopped(gpu_gate, record, monkeypatch):
    """By Ctrl-C or a polite end: what was done is kept and told, what was begun is begun anew."""

    def stopped(*_):
        record.write("verify/hybrid/triton/fp16/forward/empty", {"status": "passed"})
        record.begin("verify/hybrid/triton/bf16/forward/empty")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(gpu_gate, "detect_gpu", lambda: None)
    monkeypatch.setattr(gpu_gate, "Record", lambda device, results: record)
    monkeypatch.setattr(gpu_gate, "work_until", stopped)
    before = signal.getsignal(signal.SIGTERM)
    try:
        done = CliRunner().invoke(gpu_gate.main, ["run", "--minutes", "1"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.exit_code == 0
    assert "1 of" in done.output
    assert record.running() is None


_ORPHANED = """
import os, subprocess, sys, threading, time
sys.path.insert(0, sys.argv[1])
if len(sys.argv) > 2:
    import gpu_gate
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(os.getpid(), child.pid, flush=True)
    gpu_gate._LOOK_S = 0.05
    gpu_gate.end_with(int(sys.argv[3]))
else:
    subprocess.Popen([sys.executable, __file__, sys.argv[1], "worker", str(os.getpid())], start_new_session=True)
    time.sleep(60)
"""


def test_a_worker_whose_watcher_was_killed_ends_with_all_it_has_started(tmp_path):
    path = tmp_path / "orphaned.py"
    path.write_text(_ORPHANED)
    with subprocess.Popen([sys.executable, str(path), str(TOOLS)], stdout=subprocess.PIPE, text=True) as watcher:
        pids = [int(pid) for pid in watcher.stdout.readline().split()]
        assert len(pids) == 2
        watcher.kill()
        # The pipe is at its end once none of them holds it.
        assert watcher.stdout.read() == ""
    # A process lets go of its files a moment before it has ended.
    deadline = time.monotonic() + 60
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "they go on"
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_case_of_a_grid_for_gpus_is_a_task(gpu_gate):
    from bench.grid import ON_GPU, find_grid, load_grid
    from gate.timing import GRIDS, benchmarks, compilations

    keys = [key for key, _ in benchmarks(None)]
    cases = [(name, case) for name in GRIDS for case in load_grid(find_grid(name)).cases]
    assert keys == [f"bench/{name}/{case.id}" for name, case in cases]
    assert {case.measure for _, case in cases} <= {*ON_GPU}
    assert {key for key, _ in compilations(None)} == {
        key for key, (_, case) in zip(keys, cases, strict=True) if case.measure == "attention"
    }


def _compiled(key: str) -> None:
    """As a process that compiles: one task ends it, another is at it for long."""
    if key == "ruins":
        os._exit(1)
    Path(key).write_text("compiled")


def test_kernels_are_compiled_ahead_and_what_fails_there_is_left_to_the_task(gpu_gate, tmp_path):
    from gate.ahead import Ahead

    keys = [str(tmp_path / name) for name in "abc"]
    with Ahead(_compiled, keys, processes=2) as ahead:
        ahead.wait(keys[1])
        assert Path(keys[1]).read_text() == "compiled"
        ahead.wait("verify/nobody/compiles/this")
        ahead.wait_for_all()
        assert all(Path(key).is_file() for key in keys)
    with Ahead(_compiled, ["ruins", *keys], processes=1) as ahead:
        for key in ("ruins", *keys):
            ahead.wait(key)
    with Ahead(_compiled, keys, processes=0) as ahead:
        ahead.wait(keys[0])


@pytest.fixture
def pretended(gpu_gate, monkeypatch):
    """As if every back end ran here, on the CPU's tensors."""
    from gate import checks

    monkeypatch.setattr(checks, "_where", "cpu")
    monkeypatch.setattr(checks, "_is_pretended", True)
    return checks


def test_tasks_have_names_of_their_own_and_what_is_compiled_ahead_is_one_of_them(gpu_gate, pretended):
    from sparsec.device import device

    here = device("nvidia-h200")
    for name, part in gpu_gate.PARTS.items():
        keys = [key for key, _ in part.tasks(here)]
        assert len(keys) == len(set(keys)) > 0
        assert {key.partition("/")[0] for key in keys} == {name}
        if part.ahead is not None:
            assert len({key for key, _ in part.ahead(here)} & {*keys}) > 8


def test_every_value_of_every_tunable_is_tried(pretended):
    """From what the templates declare: a new tunable, or a new value of one, is covered by itself."""
    from sparsec.device import device
    from sparsec.template import templates

    here = device("nvidia-h200")
    keys = [key.split("/") for key, _ in pretended.other_configurations(here)]
    for each in templates().values():
        for name in ("triton", "cuda"):
            if not each.tunables_of(name):
                continue
            tried = pretended.tried_configs(each, name)
            assert all(each.violation(name, config) is None for config in tried)
            assert each.default(name) not in tried
            values = {item for config in tried for item in config.items} | {*each.default(name).items}
            assert values >= {(t.name, value) for t in each.tunables_of(name) for value in t.values}
            mine = [key for key in keys if key[1:3] == [each.name, name]]
            assert len([key for key in mine if key[4] == "forward"]) > len(tried) * 0.7
            assert any(key[4] == "backward" for key in mine) == each.has_backward(name)


_INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from gate import checks
from sparsec import masks as m
from sparsec.backends.base import Problem
from sparsec.device import device
from sparsec.template import template

checks.pretend()
here = device("nvidia-h200")
small = checks.Case("small", m.window(9, 2) | m.from_dense(checks.np.eye(40, 50, 7) > 0), Problem(40, 50, 4, 2, 16, 8))
other = replace(small, mask=m.window(9, 3))
for name in ("block_sparse", "row_traversal", "hybrid"):
    values = {"block_q": 16, "block_kv": 16}
    each = template(name)
    default = each.default("triton").to_dict()
    config = checks._nearest(each, "triton", {k: values.get(k, v) for k, v in default.items()}, "")
    for direction in checks.DIRECTIONS:
        launch = checks.launch_of(each, "triton", small, "fp32", here, config)
        checks.verify(launch, direction)
        # The kernel of another mask must not pass.
        wrong = checks.launch_of(each, "triton", other, "fp32", here, config)
        held = wrong.work.bound
        try:
            object.__setattr__(wrong.work, "bound", launch.work.bound)
            if wrong.work.tiles is None and direction == "backward":
                continue
            checks.verify(wrong, direction)
        except AssertionError as error:
            assert "is off by" in str(error), error
        else:
            raise SystemExit(f"{name} {direction}: another mask passed")
print("all held")
"""


def test_a_check_holds_a_kernel_to_its_mask_and_refuses_that_of_another():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED, str(TOOLS)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=TOOLS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("all held\n"), done.stderr


def test_a_machine_without_a_gpu_is_told_so(gpu_gate, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(gpu_gate.main, ["run", "--minutes", "1"])
    assert done.exit_code == 1
    assert "sees none" in done.output


def test_the_summary_tells_failures_and_times(gpu_gate, record):
    from gate.report import aimed_lines, summary

    record.write("verify/hybrid/triton/fp16/forward/empty", {"status": "failed", "error": "out is off"})
    empty = [*aimed_lines([])]
    assert sum("| not run |" in line for line in empty) == len([line for line in empty if line.startswith("| ")]) - 1
    key, row = _timed(us=2e4, peer="ours")
    record.write(key, {"status": "passed", "row": row.to_dict()})
    content = json.loads(record.path.read_text())
    told = "\n".join(summary(content))
    assert "FAILED verify/hybrid/triton/fp16/forward/empty: out is off" in told
    assert "| window | " in told
    assert "20 ms" in told
    aimed = "\n".join(aimed_lines([content]))
    assert f"useful TFLOP/s | ≥ 450 | {row.flops / 2e4 * 1e-6:.4g}, missed by" in aimed
    # Of two cases that one goal needs, one was measured.
    assert "full and causal as planned, against SDPA's best | ≥ 1 | not run |" in aimed


def _timed(us, peer):
    from bench.grid import find_grid, load_grid
    from bench.results import CaseRow, PeerRow, Timing

    case = next(case for case in load_grid(find_grid("gpu_figures")).cases if case.name == "window")
    rows = (PeerRow(peer, "ok", timing=Timing(us, us, us, us, 5)),)
    return f"bench/gpu_figures/{case.id}", CaseRow(case, 1, 9, 9, 1, 0.1, 0.9, 10**12, 1, None, rows)


def test_a_failure_is_a_result(gpu_gate):
    def wrong() -> None:
        raise AssertionError("out is off")

    assert gpu_gate.outcome(wrong) == {"status": "failed", "error": "AssertionError: out is off"}
    assert gpu_gate.outcome(lambda: {"status": "skipped", "why": "no tool"})["status"] == "skipped"


def test_the_page_says_verified_only_where_every_case_passed(gpu_gate, record):
    from gate.checks import hard_cases
    from gate.report import verified_rows

    names = [case.name for case in hard_cases()]
    for name in names:
        record.write(f"verify/hybrid/triton/bf16/forward/{name}", {"status": "passed"})
    record.write(f"verify/hybrid/triton/fp32/forward/{names[0]}", {"status": "passed"})
    record.write(f"verify/hybrid/triton/fp16/forward/{names[0]}", {"status": "failed", "error": "off"})
    said = {row[3]: state for row, state in verified_rows(json.loads(record.path.read_text()))}
    assert said["bf16"].startswith("verified on A GPU")
    assert said["fp32"].startswith(f"1 of {len(names)} cases")
    assert "failed" in said["fp16"]


def test_the_reference_is_worked_out_once_for_all_kernels_of_a_case(pretended, monkeypatch):
    """It takes longer than any kernel. What a kernel gives is held to it all the same."""
    import numpy as np

    from sparsec import masks as m
    from sparsec.backends import reference
    from sparsec.backends.base import Problem
    from sparsec.device import device
    from sparsec.template import template

    case = pretended.Case("small", m.window(4, 1) | m.from_dense(np.eye(20) > 0), Problem(20, 20, 2, 1, 16, 8))
    calls, shift = [], [0.0]

    class Server:
        def lower(self, launch):
            exact = reference.ReferenceKernel(launch)
            return lambda q, k, v, out, lse: (exact(q, k, v, out, lse), out.add_(shift[0]))

        def lower_backward(self, launch):
            exact = reference.ReferenceGradient(launch)
            return lambda *tensors: (exact(*tensors), tensors[7].add_(shift[0]))

    monkeypatch.setattr(pretended, "backend", lambda name: Server())
    for name in ("tolerances", "gradient_tolerances"):
        told = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *given, told=told, name=name: (calls.append(name), told(*given))[1])
    for number, direction in enumerate(pretended.DIRECTIONS, 1):
        for each in ("row_traversal", "hybrid"):
            made = pretended.launch_of(template(each), "triton", case, "fp32", device("nvidia-h200"))
            pretended.verify(made, direction)
        assert len(calls) == 2 * number, "two heads, once"
        shift[0] = 0.01
        with pytest.raises(AssertionError, match="is off by"):
            pretended.verify(made, direction)
        shift[0] = float("nan")
        with pytest.raises(AssertionError, match="is off by nan"):
            pretended.verify(made, direction)
        shift[0] = 0.0


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("raise AssertionError('head 0: the output is off by nan where 1 is allowed')", None),
        ("raise AssertionError('a message of another kind')", "another kind"),
        ("raise ValueError('no such kernel')", "ValueError: no such kernel"),
        ("pass", "nothing was launched"),
    ],
)
def test_a_rehearsal_expects_that_nothing_was_written(gpu_gate, task, told):
    found = gpu_gate.rehearsed(lambda: exec(task))
    assert found is None if told is None else told in found


def test_a_task_can_be_rehearsed_without_a_gpu(gpu_gate):
    pytest.importorskip("triton")
    pytest.importorskip("cuda.bindings.nvrtc")
    tasks = ["verify/row_traversal/triton/bf16/forward/empty", "verify/block_sparse/cuda/bf16/forward/long-rows"]
    for key in tasks:
        command = [sys.executable, str(TOOLS / "gpu_gate.py"), "rehearse", "--part", "verify", "--only", key]
        done = subprocess.run(command, cwd=TOOLS.parent, capture_output=True, text=True, check=False)
        assert "1 of 1 tasks rehearsed for nvidia-h200, 0 would fail" in done.stdout, done.stdout + done.stderr


def test_the_page_on_gpus_lists_the_parts_with_their_shares(gpu_gate):
    page = (TOOLS.parent / "docs" / "gpus.md").read_text()
    for name, part in gpu_gate.PARTS.items():
        assert f"| `{name}` | {part.share:.0%} |".replace("%", " %") in page
    assert sum(part.share for part in gpu_gate.PARTS.values()) == pytest.approx(1.0)


# The cost model of GPUs, on records that were made up.


def _gpu_records(template, us, estimate_us):
    """Of one mask on one template: timings, and what the cost model thought of them."""
    from sparsec.analysis.signatures import MaskSignature
    from sparsec.device import device
    from sparsec.records import RecordKey, TuningRecord, Workload
    from sparsec.template import template as named

    chosen = named(template)
    key = RecordKey(
        device("nvidia-h200").key, template, chosen.digest_of("triton"), "triton", "forward", "bf16", 64, 64, 1
    )
    workload = Workload(MaskSignature(5, 6, 1, 9, -3), 4096, 4096, 4, 1, 100_000)
    return TuningRecord(key, workload, chosen.default("triton"), (us,) * 5, toolchain="none", estimate_us=estimate_us)


@pytest.mark.parametrize(("rows_us", "is_good"), [(100.0, True), (85.0, True), (80.0, False)])
def test_the_choice_without_records_is_held_to_the_best_that_was_measured(gpu_gate, rows_us, is_good):
    """The model prefers tiles, which take 100 µs: within 20 % of the best is near on a GPU."""
    import eval_cost

    records = [_gpu_records("block_sparse", 100.0, 50.0), _gpu_records("row_traversal", rows_us, 60.0)]
    (found,) = eval_cost.choices(records)
    assert found.chosen == "block_sparse on triton"
    assert found.regret == pytest.approx(100.0 / rows_us - 1.0)
    assert found.is_good == is_good
    off = {error.kernel.partition(" ")[0]: error.median for error in eval_cost.errors(records)}
    assert off == pytest.approx({"block_sparse": 2.0, "row_traversal": rows_us / 60.0})


def test_what_a_gpu_was_measured_to_do_moves_its_plans(tmp_path):
    """A calibration of a GPU: rates of its own, and factors for tiles and for single edges."""
    import sparsec
    from sparsec import masks as m
    from sparsec.backends.base import Problem
    from sparsec.cost import model_digest
    from sparsec.device import device
    from sparsec.records import Calibration, RecordBase

    here, mask, problem = device("nvidia-h200"), m.random_edges(24, 0), Problem(4096, 4096, 8, 8, 64, 64, "bf16")

    def planned(**values):
        base = RecordBase([], tmp_path / str(len(list(tmp_path.iterdir()))))
        base.append(Calibration(here.key, model_digest(here.key), tuple(values.items()), "none", here.label))
        return sparsec.plan(mask, problem, here, backend="triton", records=base)

    usual = planned(rows_bf16=1.0, tiles_bf16=1.0)
    dear = planned(rows_bf16=3.0, tiles_bf16=1.0)
    assert usual.steps[0].launch.template.name == "row_traversal"
    assert dear.steps[0].launch.template.name != "row_traversal"
    slow = planned(memory_bandwidth=here.memory_bandwidth / 2)
    assert slow.steps[0].launch.template.name != "row_traversal"
    # What cannot be believed counts for nothing.
    assert planned(rows_bf16=1000.0, tiles_bf16=1.0).estimate == usual.estimate
