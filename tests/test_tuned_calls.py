"""`compile(tune=...)` and `sparsec tune` from outside: what is measured, when, and what is remembered."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import sparsec
from sparsec import masks as m
from sparsec import score
from sparsec.cli import entry
from sparsec.cli.entry import sparsec as program
from sparsec.device import detect_cpu
from sparsec.planner import plan
from sparsec.planner.plans import COST_MODEL
from sparsec.records import Calibration
from sparsec.tuning import calibrate, first_call, tuner
from sparsec.tuning.measure import LocalMeasurer, Measurement

MASK, LENGTH = m.window(100, 0), 1500


@pytest.fixture
def eager(monkeypatch):
    """First calls measure, however short they are."""
    monkeypatch.setattr(first_call, "_LEAST_US", 0.0)
    monkeypatch.setattr(first_call, "_CALLS", 1e9)


def call(tune: str, scale: float | None = None) -> sparsec.Attention:
    attention = sparsec.compile(MASK, LENGTH, tune=tune, scale=scale)
    q = torch.randn(1, 2, LENGTH, 32)
    out = attention(q, q, q)
    dense = torch.from_numpy(MASK.bind(LENGTH).to_dense())
    wanted = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=dense, scale=scale)
    assert torch.allclose(out, wanted, atol=1e-5)
    return attention


def test_a_first_call_measures_a_short_list_once_and_remembers(no_records, eager):
    first = call("auto")
    kept = list(no_records.records())
    # A contest: the default beside others, all of one kernel.
    assert len({record.contest for record in kept}) == 1
    assert len({record.config for record in kept}) >= 2
    assert {record.key.template for record in kept} == {first.plan.steps[0].launch.template.name}
    again = call("auto")
    assert len(list(no_records.records())) == len(kept)
    assert again.plan.config_source != COST_MODEL


@pytest.mark.parametrize("score_mod", [None, score.soft_cap(5.0)])
def test_what_plain_attention_would_call_wrong_is_not_measured(no_records, eager, score_mod):
    """Of another scale, or of modified scores, a check against plain attention would say that every kernel is wrong."""
    if score_mod is None:
        call("auto", scale=0.9)
    else:
        q = torch.randn(1, 2, LENGTH, 32)
        sparsec.compile(MASK, LENGTH, tune="auto", score_mod=score_mod)(q, q, q)
    assert list(no_records.records()) == []


def test_a_long_first_call_is_left_alone(no_records, eager, monkeypatch):
    made = plan(MASK, sparsec.Problem(LENGTH, LENGTH, 2, 2), detect_cpu(), records=no_records)
    assert first_call.is_welcome(made)
    monkeypatch.setattr(first_call, "_MOST_US", made.estimate.us / 2)
    assert not first_call.is_welcome(made)


def test_a_first_call_lets_go_of_its_tensors_whatever_happens(no_records, eager, monkeypatch):
    closed = []
    close = LocalMeasurer.close
    monkeypatch.setattr(LocalMeasurer, "close", lambda self: (closed.append(self), close(self)))
    monkeypatch.setattr(LocalMeasurer, "compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        call("auto")
    assert len(closed) == 1


def test_a_new_mask_of_the_same_attention_is_not_measured(no_records, eager):
    attention = call("cached")
    before = len(list(no_records.records()))
    attention.update(m.window(300, 0))
    assert len(list(no_records.records())) == before == 0


@pytest.mark.parametrize("reason", ["short", "distributed", "traced", "cached", "off"])
def test_a_first_call_measures_nothing_where_it_may_not(no_records, monkeypatch, request, reason):
    if reason != "short":
        request.getfixturevalue("eager")
    if reason == "distributed":
        monkeypatch.setenv("WORLD_SIZE", "8")
    if reason == "traced":
        monkeypatch.setattr(first_call, "_is_traced", lambda: True)
    call(reason if reason in ("cached", "off") else "auto")
    assert list(no_records.records()) == []


def test_quick_tuning_measures_in_another_process_and_plans_by_it(no_records, monkeypatch):
    monkeypatch.setattr(tuner, "_QUICK_SECONDS", 3.0)
    attention = sparsec.compile(MASK, LENGTH, q_heads=2, head_dim=32, dtype="fp32", tune="quick")
    kept = list(no_records.records())
    assert any(record.timings_us for record in kept)
    assert all(record.failure is None for record in kept)
    assert attention.plan.config_source.startswith("records of such a mask on this device")


# The command.


def run(*arguments: str):
    return CliRunner().invoke(program, ["tune", *arguments])


def test_a_dry_run_needs_no_device_and_lists_what_would_be_searched():
    done = run("window(63, 0)", "--seq-len", "4096", "--dtype", "bf16", "--device", "nvidia-h100", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "block_sparse on triton" in done.stdout
    assert re.search(r"\b\d{3}\b", done.stdout)


def test_bad_jobs_end_with_their_lines_and_the_others_are_planned(tmp_path):
    path = tmp_path / "jobs.yaml"
    path.write_text('jobs:\n  - {mask: "windo(3, 0)", length: 64}\n  - {mask: "window(3, 0)", length: 64}\n')
    done = run(str(path), "--dry-run")
    assert done.exit_code == 1
    assert f"{path}:2:" in done.stderr
    assert "window(3, 0)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "say what to tune"),
        (("causal()",), 1, "length"),
        (("causal()", "--seq-len", "64", "--budget", "soon"), 2, "30m"),
        (("causal()", "--seq-len", "64", "--device", "nvidia-h1000"), 2, "nvidia-h100"),
        (("causal()", "--seq-len", "64", "--storage", "postgresql://x@127.0.0.1:1/y"), 1, "cannot be reached"),
        (("causal()", "--seq-len", "64", "--heads", "4", "--kv-heads", "3"), 1, "multiple"),
    ],
)
def test_what_makes_no_sense_is_said(arguments, code, said, capfd):
    assert entry.run(["tune", *arguments]) == code
    assert said in capfd.readouterr().err


def test_two_workers_tune_a_job_file_and_its_summary_is_told(tmp_path):
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text('jobs:\n  - {name: small, mask: "window(40, 3)", length: 300, heads: 2, head_dim: 32}\n')
    storage = tmp_path / "studies.journal"
    command = ["tune", str(jobs), "--workers", "2", "--trials", "2", "--storage", str(storage)]
    done = subprocess.run(
        [sys.executable, "-m", "sparsec.cli", *command], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("small, 300 tokens, 2 heads, d32, fp32: ")]
    # Each worker says so when it has done.
    assert len(told) == 2
    assert "ended with status" not in done.stderr
    (measured,) = re.findall(r"tried +(\d+)|done +(\d+)", done.stdout)
    assert int("".join(measured)) >= 2
    assert "in the mean" in done.stdout
    assert storage.stat().st_size


# Calibration.


def test_a_calibration_is_used_when_it_is_of_this_cost_model_and_can_be_believed(no_records):
    from sparsec.cost import model_digest

    cpu, problem = detect_cpu(), sparsec.Problem(LENGTH, LENGTH, 2, 2)
    plain = plan(MASK, problem, cpu, template="block_sparse")
    values = (
        ("memory_bandwidth", cpu.memory_bandwidth * 1.5),
        ("vector_flops", cpu.vector_flops * 100),
        ("tiles_fp32", 1.7),
    )
    no_records.append(Calibration(cpu.key, "of another model", values))
    assert plan(MASK, problem, cpu).device == cpu
    no_records.append(Calibration(cpu.key, model_digest(cpu.key), values))
    made = plan(MASK, problem, cpu, template="block_sparse")
    assert (made.device.memory_bandwidth, made.device.key) == (cpu.memory_bandwidth * 1.5, cpu.key)
    assert made.device.vector_flops == cpu.vector_flops
    # The factor is that of all tiles' work.
    assert made.estimate.compute_us == pytest.approx(1.7 * plain.estimate.compute_us, rel=1e-5)
    # Another processor of the same instruction sets and cores may be twice as fast.
    no_records.append(Calibration(cpu.key, model_digest(cpu.key), (("launch_us", cpu.launch_us * 2),), model="amd-0-0"))
    assert plan(MASK, problem, cpu).device == made.device
    own = Calibration(cpu.key, model_digest(cpu.key), (("launch_us", cpu.launch_us * 2),), model=cpu.model)
    no_records.append(own)
    assert plan(MASK, problem, cpu).device.launch_us == cpu.launch_us * 2
    # The latest counts.
    no_records.append(Calibration(cpu.key, model_digest(cpu.key), (("memory_bandwidth", cpu.memory_bandwidth * 1.25),)))
    assert plan(MASK, problem, cpu).device.memory_bandwidth == cpu.memory_bandwidth * 1.25


def test_a_second_calibration_is_not_measured_through_the_first(no_records, monkeypatch):
    took_us: dict[str, float] = {}

    class AsAtFirst(LocalMeasurer):
        """Takes 1.7 times what the model says the first time, and as long the second time."""

        def measure(self, choice, look):
            estimate_us = self._space.group(choice).estimate.us
            us = took_us.setdefault(str(self._space.task), 1.7 * estimate_us)
            return Measurement((us,), estimate_us=estimate_us)

    monkeypatch.setattr(calibrate, "LocalMeasurer", AsAtFirst)
    monkeypatch.setattr(calibrate, "_cpu_ceilings", lambda where: iter([("launch_us", detect_cpu().launch_us)]))
    first = calibrate.calibrate(detect_cpu(), "cpu")
    no_records.append(first)
    assert dict(first.values)["tiles_fp32"] == pytest.approx(1.7)
    assert calibrate.calibrate(detect_cpu(), "cpu").values == first.values
