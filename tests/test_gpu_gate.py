"""The tool that verifies kernels on a GPU, as far as a machine without one goes: what it keeps, skips and says."""

from __future__ import annotations

import json
import os
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


def test_what_passed_or_was_tried_in_this_run_is_left_alone(gpu_gate):
    assert gpu_gate.is_settled({"status": "passed"}, "now")
    assert gpu_gate.is_settled({"status": "failed", "run": "now"}, "now")
    assert not gpu_gate.is_settled({"status": "failed", "run": "earlier"}, "now")
    assert not gpu_gate.is_settled({"status": "running", "started": 0.0}, "now")
    assert not gpu_gate.is_settled(None, "now")


def test_a_worker_that_hangs_is_ended_and_its_task_has_failed(gpu_gate, record):
    key = "verify/block_sparse/triton/bf16/forward/empty"
    record.write(key, {"status": "running", "started": time.time() - 1e6})
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    lost = gpu_gate.watched(worker, record, time.time() + 60)
    assert worker.returncode is not None
    gpu_gate.settle(record, lost, "now")
    assert "longer than" in record.results[key]["error"]
    assert gpu_gate.is_settled(record.results[key], "now")


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
    record.write("tests/pytest-m-gpu", {"status": "running", "started": time.time()})
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    assert gpu_gate.watched(worker, record, time.time() - 60) is None
    assert not json.loads(record.path.read_text())["results"]


def test_the_masks_that_are_timed_are_there(gpu_gate):
    from gate.timing import bench_cases

    from sparsec.template import templates

    lengths = {name: (mask.bind(p.q_len, p.kv_len).nnz, p.q_len) for name, mask, p, _ in bench_cases()}
    assert all(templates().keys() >= {*chosen} for *_, chosen in bench_cases())
    assert lengths["debian-graph"] == (340_845, 63_666)
    assert lengths["causal"][0] == 32_768 * 32_769 // 2


def test_what_is_timed_is_checked(gpu_gate):
    import torch
    from gate.timing import check_rows

    from sparsec import masks as m
    from sparsec.backends.base import Problem

    torch.manual_seed(5)
    q, k, v = torch.randn(1, 4, 50, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    p = Problem(50, 50, 4, 2, 16, 16)
    check_rows(q, k, v, out, m.causal().bind(50), p)
    with pytest.raises(AssertionError, match="a timed row is off"):
        check_rows(q, k, v, out, m.window(9, 0).bind(50), p)


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


def test_what_is_compiled_ahead_are_tasks_of_ours_in_triton(gpu_gate, monkeypatch):
    """By the keys of the tasks themselves, as if every back end were here."""
    from gate import checks

    from sparsec.device import device
    from sparsec.template import templates

    kernels = [(each, name) for each in templates().values() for name in ("triton", "cuda") if name in each.backends()]
    monkeypatch.setattr(checks, "own_kernels", lambda device: kernels)
    monkeypatch.setattr(gpu_gate.timing, "own_kernels", lambda device: kernels)
    for name in ("verify", "bench", "modified", "tunables"):
        part = gpu_gate.PARTS[name]
        keys = [key for key, _ in part.tasks(device("nvidia-h200"))]
        assert part.is_ahead
        assert len(keys) == len(set(keys)) > 8
        assert all(key.startswith(f"{name}/") for key in keys)
        ahead = [key for key in keys if gpu_gate.is_of_triton(key)]
        assert 0 < len(ahead) < len(keys) or name == "tunables"
        assert not any("cuda" in key or "flex" in key or "sdpa" in key for key in ahead)
    every = [key for part in gpu_gate.PARTS.values() for key, _ in part.tasks(device("nvidia-h200"))]
    assert {key.partition("/")[0] for key in every} == gpu_gate.PARTS.keys()


def test_a_machine_without_a_gpu_is_told_so(gpu_gate, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(gpu_gate.main, ["run", "--minutes", "1"])
    assert done.exit_code == 1
    assert "sees none" in done.output


def test_the_summary_tells_failures_and_times(gpu_gate, record):
    from gate.report import summary

    record.write("verify/hybrid/triton/fp16/forward/empty", {"status": "failed", "error": "out is off"})
    record.write(
        "bench/causal/sdpa", {"status": "passed", "us": 12.0, "spread_us": 1.0, "tflops": 3.0, "edge_tb_s": 2.0}
    )
    told = "\n".join(summary(json.loads(record.path.read_text())))
    assert "FAILED verify/hybrid/triton/fp16/forward/empty: out is off" in told
    assert "| causal | sdpa | 12 (1) | 3.0 | 2.00 |" in told


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
