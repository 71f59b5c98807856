"""A planner with records: what was measured outweighs what is estimated, and says where it comes from."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from test_cli import PROCESSOR

import sparsec
from sparsec import masks as m
from sparsec.analysis import analyse
from sparsec.backends import cpu
from sparsec.backends.base import Problem
from sparsec.records import RecordKey, TuningRecord, Workload
from sparsec.template import Config, template

PROBLEM = Problem(1000, 1000, 4, 2, 64, 64)
WINDOW = m.window(100, 0)


@pytest.fixture(autouse=True)
def a_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "compiler", lambda: cpu.Compiler(("g++",), "g++ 12"))


def measured(
    name: str, us: float, config: Config | None = None, mask=WINDOW, problem=PROBLEM, **more
) -> list[TuningRecord]:
    """A configuration of a template, and its default, which takes twice as long."""
    each = template(name)
    default = each.default("cpu")
    direction = more.pop("direction", "forward")
    key = RecordKey.of(each, "cpu", problem, more.pop("device", PROCESSOR), direction)
    workload = Workload.of(analyse(mask.bind(problem.q_len, problem.kv_len)), heads=problem.q_heads, batch=1)
    found = [TuningRecord(key, workload, default, (us if config in (None, default) else 2 * us,), toolchain="g++ 12")]
    if config not in (None, default):
        found.append(TuningRecord(key, workload, config, (us,), toolchain="g++ 12", **more))
    return found


def planned(mask=WINDOW, problem=PROBLEM, **more) -> sparsec.Plan:
    return sparsec.plan(mask, problem, PROCESSOR, **more)


def estimates(**more) -> dict[str, float]:
    """What the cost model says of each template, in its best configuration."""
    made = planned(tune="off", reorder="off", **more)
    found = {candidate.template: candidate.us for candidate in reversed(made.groups[0].alternatives)}
    return found | {made.steps[0].launch.template.name: made.estimate.us}


def test_without_records_the_cost_model_decides_and_says_so():
    assert planned().config_source == "cost model"
    assert str(planned()).partition("planned in")[0] == str(planned(tune="off")).partition("planned in")[0]
    assert planned().groups[0].expected_us is None


def test_a_measured_configuration_is_taken_and_told(no_records):
    small = Config.of(block_q=16, block_kv=32)
    no_records.extend(measured("block_sparse", 100.0, small))
    made = planned(template="block_sparse")
    step, group = made.steps[0], made.groups[0]
    assert step.launch.config == small
    assert step.launch.work.tiles.tile_map.block_kv == 32
    assert made.config_source == "records of such a mask on this device (1 measurement)"
    assert group.expected_us == pytest.approx(100.0)
    assert "100 µs by records, estimated" in str(made)
    assert "records of such a mask on this device" in " ".join(str(made).split())
    told = json.loads(json.dumps(made.to_dict()))["groups"][0]
    assert told["config_source"] == told["steps"][0]["config_source"] == made.config_source
    assert told["expected_us"] == 100.0
    off = planned(template="block_sparse", tune="off")
    assert off.config_source == "cost model"
    assert off.steps[0].launch.config != small


def test_records_overrule_the_cost_model_between_templates(no_records):
    assert planned(reorder="off").steps[0].launch.template.name == "block_sparse"
    no_records.extend(measured("block_sparse", 1000.0) + measured("row_traversal", 900.0))
    made = planned(reorder="off")
    assert made.steps[0].launch.template.name == "row_traversal"
    other = next(each for each in made.groups[0].alternatives if each.template == "block_sparse")
    assert other.us == pytest.approx(1000.0)


@pytest.mark.parametrize("slowdown", [0.2, 1.0, 5.0])
def test_estimates_of_what_was_not_measured_are_scaled_to_the_machine(no_records, slowdown):
    """A machine five times as slow as the cost model thinks does not make what was never measured look quick."""
    before = estimates()
    no_records.extend(measured("block_sparse", slowdown * before["block_sparse"]))
    made = planned(reorder="off")
    assert made.steps[0].launch.template.name == "block_sparse"
    after = {candidate.template: candidate.us for candidate in reversed(made.groups[0].alternatives)}
    # The default's own estimate may be above that of the shortlist's best.
    assert after["row_traversal"] == pytest.approx(slowdown * before["row_traversal"], rel=0.3)


def test_what_was_passed_over_is_scaled_too(no_records):
    """By a sample of a long mask `block_sparse` is hopeless: it is told, and its index arrays are never made."""
    mask, problem = m.random_edges(8, 0), replace(PROBLEM, q_len=20_000, kv_len=20_000)
    before = planned(mask, problem, reorder="off")
    assert before.steps[0].launch.template.name == "row_traversal"
    no_records.extend(measured("row_traversal", 5 * before.estimate.us, mask=mask, problem=problem))
    after = planned(mask, problem, reorder="off")
    told = [{each.template: each.us for each in made.groups[0].alternatives} for made in (before, after)]
    assert set(told[0]) == {"hybrid", "block_sparse"}
    assert told[1] == pytest.approx({name: 5 * us for name, us in told[0].items()})


def test_a_like_mask_lends_its_configuration_and_a_near_one_its_time(no_records):
    small = Config.of(block_q=16, block_kv=32)
    no_records.extend(measured("block_sparse", 100.0, small))
    near = planned(m.window(101, 0), template="block_sparse")
    assert near.config_source.startswith("nearest records on this device (distance 0.0")
    assert near.groups[0].expected_us == pytest.approx(101.0, rel=0.01)
    like = planned(m.window(50, 0), template="block_sparse")
    assert like.steps[0].launch.config == small
    assert like.groups[0].expected_us is None


def test_another_device_of_the_architecture_lends_its_configuration(no_records):
    small = Config.of(block_q=16, block_kv=32)
    bigger = replace(PROCESSOR, units=64)
    no_records.extend(measured("block_sparse", 100.0, small, device=bigger))
    made = planned(template="block_sparse")
    assert made.steps[0].launch.config == small
    assert made.config_source.startswith(f"nearest records of {bigger.key}, of the same architecture")
    assert made.groups[0].expected_us is None


def test_the_backward_pass_has_a_configuration_of_its_own(no_records):
    small, wide = Config.of(block_q=16, block_kv=32), Config.of(block_q=64, block_kv=128)
    no_records.extend(measured("block_sparse", 100.0, wide))
    no_records.extend(measured("block_sparse", 300.0, small, direction="backward"))
    problem = replace(PROBLEM, needs_grad=True)
    group = planned(problem=problem, template="block_sparse").groups[0]
    assert group.steps[0].launch.config == wide
    assert [launch.config for launch in group.backward_launches] == [small]
    assert group.backward_launches[0].work.block_q == 16
    # Another kernel takes the backward pass where both were measured, and it is faster by more than noise.
    no_records.extend(measured("row_traversal", 299.0, direction="backward"))
    group = planned(problem=problem, reorder="off").groups[0]
    assert group.steps[0].launch.template.name == "block_sparse"
    assert [launch.template.name for launch in group.backward_launches] == ["block_sparse"]
    no_records.extend(measured("row_traversal", 200.0, direction="backward"))
    made = planned(problem=problem, reorder="off")
    assert made.groups[0].steps[0].launch.template.name == "block_sparse"
    assert made.groups[0].backward_launches[0].template.name == "row_traversal"
    assert "backward" in str(made)
    assert made.to_dict()["groups"][0]["backward"]["steps"][0]["template"] == "row_traversal"
    assert planned(reorder="off").to_dict()["groups"][0]["backward"] is None


def test_parts_of_a_mixture_take_their_own_records(no_records):
    mask = m.window(4, 4) | m.global_tokens([3, 77, 150, 222, 290, 411, 500, 599])
    problem = replace(PROBLEM, q_len=600, kv_len=600)
    made = planned(mask, problem)
    # Whatever it is made of, a record of the whole mask for one template does not hide the others.
    no_records.extend(measured("row_traversal", 1e6, mask=mask, problem=problem))
    again = planned(mask, problem)
    assert [step.launch.template.name for step in again.steps] == [step.launch.template.name for step in made.steps]
