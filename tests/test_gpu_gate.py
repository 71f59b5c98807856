"""The tool that verifies kernels on a GPU, as far as a machine without one goes: what it keeps, skips and says."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def test_a_worker_out_of_time_leaves_its_task_for_later(gpu_gate, record):
    record.write("tests/pytest-m-gpu", {"status": "running", "started": time.time()})
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert gpu_gate.watched(worker, record, time.time() - 60) is None
    assert not json.loads(record.path.read_text())["results"]


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
