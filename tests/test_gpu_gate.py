"""The tool that verifies kernels on a GPU, as far as a machine without one goes: what it keeps, skips and says."""

from __future__ import annotations

import json
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
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
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

    def worker(command, cwd):
        assert command[2] == "work"
        return popen([sys.executable, "-c", f"raise SystemExit({codes.pop(0)})"])

    monkeypatch.setattr(gpu_gate.subprocess, "Popen", worker)
    done = CliRunner().invoke(gpu_gate.main, ["run", "--minutes", "1"])
    assert done.exit_code == (1 if code == 1 else 0)
    assert codes == ([0] if code == 1 else [])
    assert ("between two tasks" in done.output) == (code == 1)


def test_a_worker_out_of_time_leaves_its_task_for_later(gpu_gate, record):
    record.write("tests/pytest-m-gpu", {"status": "running", "started": time.time()})
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert gpu_gate.watched(worker, record, time.time() - 60) is None
    assert not json.loads(record.path.read_text())["results"]


def test_the_masks_that_are_timed_are_there(gpu_gate):
    from gate.timing import bench_cases

    lengths = {name: (mask.bind(p.q_len, p.kv_len).nnz, p.q_len) for name, mask, p in bench_cases()}
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
