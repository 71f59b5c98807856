"""Tuning: spaces, searches against recorded timings, processes that fail, studies that several processes share."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import tuning_programs
from click.testing import CliRunner
from tuning_programs import space, true_us

from sparsec import masks as m
from sparsec.backends.base import Problem
from sparsec.cost import model_digest
from sparsec.device import detect_cpu
from sparsec.errors import SparsecError
from sparsec.records import NEAR_TIE, Calibration, RecordBase
from sparsec.template import Config, template
from sparsec.tuning.exactness import Oracle, Result, make_inputs
from sparsec.tuning.fleet import spaces_in
from sparsec.tuning.jobs import read_jobs
from sparsec.tuning.measure import LocalMeasurer, Look, Measurement
from sparsec.tuning.recording import Recorder, nearest_choices, recorded_results
from sparsec.tuning.replay import ReplayMeasurer, replay
from sparsec.tuning.search import Budget, search
from sparsec.tuning.space import Arm, Choice, Space, Task, planned_group
from sparsec.tuning.studies import Settings, Study, open_storage
from sparsec.tuning.worker import Host, Limits, WorkerMeasurer

CPU_TASK = Task(m.window(40, 3).bind(300), Problem(300, 300, 2, 1, 32, 32), detect_cpu())
TPE = Settings(seed=1)


def one_kernel() -> Space:
    """A space that is soon exhausted."""
    return Space(replace(CPU_TASK, template="block_sparse", reorder="off"))


def recorded(tried: Space) -> dict[Choice, Measurement]:
    return {choice: Measurement((true_us(choice),) * 9) for choice in tried.choices()}


def searched(tried: Space, results: dict[Choice, Measurement], trials: int = 40):
    measurer = ReplayMeasurer(results)
    study = Study(tried, open_storage(None), TPE)
    return search(tried, measurer, study, Budget(trials=trials)), measurer


# Spaces.


def test_every_choice_is_legal_and_the_default_is_first():
    tried = space(None)
    choices = list(itertools.islice(tried.choices(), 2000))
    assert choices[0] == tried.default
    assert len(set(choices)) == len(choices)
    for choice in choices:
        assert tried.refusal(choice) is None
        assert Choice.from_text(choice.to_text()) == choice
    assert {choice.arm for choice in tried.choices()} == set(tried.arms)
    illegal = replace(choices[0], config=Config.of(**choices[0].config.to_dict() | {"block_q": 128, "pack_gqa": 8}))
    assert "registers" in tried.refusal(illegal)


def test_seeds_are_the_default_and_each_kernels_own():
    tried = space(None)
    seeds = tried.seeds()
    assert seeds[0] == tried.default
    for arm in tried.arms:
        assert Choice(arm, template(arm.template).default(arm.backend)) in seeds


def test_a_task_is_named_by_all_that_it_is():
    other = [
        replace(CPU_TASK, direction="backward"),
        replace(CPU_TASK, template="block_sparse"),
        replace(CPU_TASK, problem=replace(CPU_TASK.problem, dtype="bf16")),
        replace(CPU_TASK, bound=m.window(40, 4).bind(300)),
    ]
    assert len({task.digest for task in [CPU_TASK, *other]}) == 5
    assert Task(m.window(40, 3).bind(300), CPU_TASK.problem, detect_cpu()).digest == CPU_TASK.digest


# Searches.


def test_a_search_comes_near_the_best_of_hundreds_in_40_trials():
    tried = space()
    results = recorded(tried)
    assert len(results) > 400
    regrets = [replay(tried, results, 40, Settings(seed=seed)).regret for seed in range(5)]
    assert median(regrets) <= 0.05


def test_a_search_that_may_try_everything_finds_the_best_and_ends():
    tried = one_kernel()
    outcome, measurer = searched(tried, recorded(tried), trials=300)
    assert sorted(map(str, measurer.asked)) == sorted(map(str, tried.choices()))
    assert true_us(outcome.winner) == min(map(true_us, tried.choices()))


def test_a_wrong_or_failing_choice_never_wins():
    tried = space()
    results = recorded(tried)
    best = min(results, key=true_us)
    for kind in ("incorrect", "launch", "timeout", "compile", "constraint"):
        outcome, _ = searched(tried, results | {best: Measurement(failure=kind, reason="planted")})
        assert outcome.winner != best


def test_where_the_default_failed_what_ran_serves_even_alone():
    tried = one_kernel()
    survivor = next(choice for choice in tried.choices() if choice not in tried.seeds())
    results = {choice: Measurement(failure="launch", reason="planted") for choice in tried.choices()}
    measurer = ReplayMeasurer(results | {survivor: Measurement((70.0,) * 9)})
    study = Study(tried, open_storage(None), TPE)
    outcome = search(tried, measurer, study, Budget(trials=100), near=[survivor])
    assert (outcome.winner, outcome.winner_us, outcome.reason) == (survivor, 70.0, "")


def test_estimates_of_a_space_are_all_of_one_calibration(no_records):
    plain = one_kernel()
    values = tuple((f"{kind}_fp32", 1.7) for kind in ("tiles", "rows"))
    no_records.append(Calibration(plain.task.device.key, model_digest(plain.task.device.key), values))
    tried = one_kernel()
    other = next(choice for choice in tried.choices() if choice not in (tried.default, plain.default))
    us = tried.group(other).estimate.compute_us
    assert us == pytest.approx(1.7 * plain.group(other).estimate.compute_us, rel=1e-5)


def test_dense_attention_as_a_choice_serves_the_heads_of_its_task_alone(no_records):
    task = Task(m.full().bind(300), Problem(300, 300, 4, 4, 32, 32), detect_cpu(), heads=(1, 3))
    by_tiles = planned_group(replace(task, template="block_sparse"))
    dense = Choice(Arm("dense", "torch"), Config())
    (step,) = Space(task, (dense.arm,), by_tiles).steps(dense)
    assert (step.launch.template.name, step.launch.heads) == ("dense", (1, 3))


def test_a_near_tie_goes_to_the_default():
    tried = one_kernel()
    slow = {choice: Measurement((1000.0,) * 9) for choice in tried.choices()}
    rival = next(choice for choice in tried.choices() if choice != tried.default)
    for rival_us, winner in ((1000.0 / NEAR_TIE * 1.001, tried.default), (1000.0 / NEAR_TIE * 0.99, rival)):
        outcome, _ = searched(tried, slow | {rival: Measurement((rival_us,) * 9)}, trials=100)
        assert outcome.winner == winner


def test_a_contest_decides_and_not_a_lucky_first_measurement():
    class Lucky(ReplayMeasurer):
        def measure(self, choice, look):
            found = super().measure(choice, look)
            return replace(found, timings_us=(1.0,) * 5) if choice == lucky else found

    tried = space()
    results = recorded(tried)
    lucky = max(results, key=true_us)
    outcome = search(tried, Lucky(results), Study(tried, open_storage(None), TPE), Budget(trials=30), near=[lucky])
    assert outcome.results[lucky].us == 1.0
    assert outcome.winner != lucky
    assert true_us(outcome.winner) <= true_us(tried.default)


def test_what_is_hopeless_is_not_run_on_and_what_is_far_behind_not_at_all():
    tried = space()
    results = {
        choice: Measurement((us := true_us(choice),) * 9, estimate_us=us if us < 150 else 1e6)
        for choice in tried.choices()
    }
    outcome, _ = searched(tried, results)
    runs = {len(found.timings_us) for choice, found in outcome.results.items()}
    assert {2, 5} <= runs
    passed_over = [choice for choice, found in outcome.results.items() if found.is_passed_over]
    assert passed_over
    assert all(results[choice].estimate_us == 1e6 for choice in passed_over)


def test_a_failing_kernel_is_given_up_after_a_few_choices():
    tried = Space(CPU_TASK)
    failing = next(arm for arm in tried.arms if arm != tried.default.arm)
    tried = tried.only((tried.default.arm, failing))
    results = recorded(tried) | {
        choice: Measurement(failure="compile", reason="planted") for choice in tried.choices() if choice.arm == failing
    }
    _, measurer = searched(tried, results, trials=60)
    assert sum(choice.arm == failing for choice in measurer.asked) == 3


def test_what_a_search_learns_is_in_the_records_and_where_the_next_one_begins(tmp_path):
    tried = one_kernel()
    results = recorded(tried)
    base = RecordBase([], tmp_path)
    study = Study(tried, open_storage(None), TPE)
    outcome = search(tried, ReplayMeasurer(results), study, Budget(trials=50), observers=[Recorder(tried, base)])
    assert outcome.speedup > 1.0
    assert outcome.winner in nearest_choices(tried, base)
    again = recorded_results(tried, base.records())
    assert set(again) == {choice for choice in results if choice in outcome.results}
    assert all(again[choice].us == round(results[choice].us, 3) for choice in again)
    near_task = Task(m.window(41, 3).bind(310), replace(CPU_TASK.problem, q_len=310, kv_len=310), CPU_TASK.device)
    assert outcome.winner in nearest_choices(Space(near_task), base)


# Exactness.


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_row_anywhere_is_seen(direction):
    task = replace(CPU_TASK, direction=direction)
    inputs = make_inputs(task, "cpu")
    right = LocalMeasurer(Space(task), "cpu")._prepared(Space(task).default, inputs)[1]
    oracle = Oracle(task, inputs)
    assert oracle.error(right) is None
    for name, tensor in right.parts.items():
        for row in (0, 137, tensor.shape[2] - 1):
            wrong = {each: part.clone() for each, part in right.parts.items()}
            wrong[name][0, -1, row] += 0.01
            assert oracle.error(Result(wrong)) is not None
        wrong[name] = tensor.clone()
        wrong[name][0, 0, 7] = float("nan")
        assert oracle.error(Result(wrong)) is not None


def test_long_sums_in_another_order_are_no_fault_and_a_lost_tile_is():
    """Of a causal mask only the last keys are in the sample; gradients of the first ones are sums of thousands."""
    import torch

    n = 4096
    task = Task(m.causal().bind(n), Problem(n, n, 1, 1, 64, 64), detect_cpu(), direction="backward")
    inputs = make_inputs(task, "cpu")

    def plain(attended: torch.Tensor) -> Result:
        q, k, v = (each.clone().requires_grad_() for each in (inputs.q, inputs.k, inputs.v))
        scores = (q @ k.mT * task.scale).masked_fill(~attended, float("-inf"))
        above = (inputs.d_out, inputs.d_lse)
        gradients = torch.autograd.grad((scores.softmax(-1) @ v, scores.logsumexp(-1)), (q, k, v), above)
        return Result(dict(zip(("dq", "dk", "dv"), gradients, strict=True)))

    oracle = Oracle(task, inputs)
    tried = Space(task)
    assert oracle.error(LocalMeasurer(tried, "cpu")._prepared(tried.default, inputs)[1]) is None
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    assert oracle.error(plain(causal)) is None
    causal[3000:3016, 64:80] = False
    assert oracle.error(plain(causal)) is not None


def test_a_configuration_with_wrong_results_is_not_timed(monkeypatch):
    from sparsec.backends import cpu

    tried = Space(CPU_TASK)
    right = cpu.CpuBackend.lower
    spoiled = next(choice for choice in tried.choices() if choice.arm == tried.default.arm and choice != tried.default)

    def lower(self, launch):
        kernel = right(self, launch)

        def run(q, k, v, out, lse):
            kernel(q, k, v, out, lse)
            out[0, 0, 211] *= 1.05

        return run if launch.config == spoiled.config else kernel

    monkeypatch.setattr(cpu.CpuBackend, "lower", lower)
    measurer = LocalMeasurer(tried, "cpu")
    found = measurer.measure(spoiled, Look(runs=2, seconds=0.0))
    assert (found.failure, found.timings_us) == ("incorrect", ())
    assert measurer.measure(tried.default, Look(runs=2, seconds=0.0)).timings_us


# Processes that fail.


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_other_heads_and_batch_elements_hold_is_nobodys_fault(direction, no_records):
    problem = Problem(100, 100, 4, 2, 16, 16, batch=3)
    task = Task(
        m.window(9, 0).bind(100), problem, detect_cpu(), direction, heads=(2, 3), batch=(0, 2), template="row_traversal"
    )
    tried = Space(task)
    measurer = LocalMeasurer(tried, "cpu")
    # The other's results are held to the default's as a whole.
    for choice in (tried.default, next(each for each in tried.choices() if each != tried.default)):
        found = measurer.measure(choice, Look(runs=2, seconds=0.0))
        assert (found.failure, found.reason) == (None, "")
        assert len(found.timings_us) >= 2


def test_a_crash_a_hang_and_too_much_memory_cost_one_trial_each(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path / "cache"))
    tried = space()
    base = RecordBase([], tmp_path / "records")
    host = Host("tuning_programs")
    measurer = WorkerMeasurer(tried, "cpu", Limits(60.0, 400 << 20), host)
    monkeypatch.setattr("sparsec.tuning.worker._START_S", 2.0)
    found = {}
    try:
        for block_kv in (64, 16, 64, 32, 64, 128, 64):
            config = Config.of(**tried.default.config.to_dict() | {"block_kv": block_kv})
            choice = Choice(tried.default.arm, config)
            found[block_kv] = measurer.measure(choice, Look(2, 0.0, timeout_s=1.0 if block_kv == 32 else 30.0))
            Recorder(tried, base).tried(choice, found[block_kv])
    finally:
        measurer.close()
        host.close()
    assert {each: found[each].failure for each in found} == {64: None, 16: "launch", 32: "timeout", 128: "launch"}
    assert "SIGABRT" in found[16].reason
    assert "memory" in found[128].reason
    assert sorted(str(record.failure) for record in base.records()) == ["None"] * 4 + ["launch", "launch", "timeout"]


# Studies that several processes share.


def start(storage: str, trials: int) -> subprocess.Popen[str]:
    folder = Path(tuning_programs.__file__).parent
    path = os.pathsep.join([*sys.path, str(folder)])
    return subprocess.Popen(
        [sys.executable, str(folder / "tuning_programs.py"), "search", storage, str(trials)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def check_shared_study(storage: str) -> None:
    """Two processes on one study, one of them ended by force in the middle of a trial."""
    import optuna

    trials = 24
    doomed, other = start(storage, trials), start(storage, trials)
    try:
        measured = (line for line in doomed.stdout if line.startswith("measuring"))
        last = [next(measured) for _ in range(4)][-1].removeprefix("measuring ").strip()
        doomed.send_signal(signal.SIGKILL)
        doomed.wait()
        said, _ = other.communicate(timeout=120)
    finally:
        for each in (doomed, other):
            each.kill()
            each.wait()
    assert other.returncode == 0
    winner = Choice.from_text(said.splitlines()[-1].removeprefix("winner "))
    tried = space()
    study = Study(tried, open_storage(storage))
    all_trials = study._study.get_trials()
    states = optuna.trial.TrialState
    # The last trial of the process that was killed was handed on; nothing is left hanging.
    assert [each.number for each in all_trials if each.state == states.RUNNING] == []
    left = [each for each in all_trials if each.state == states.FAIL and "outcome" not in each.user_attrs]
    assert [each.user_attrs["choice"] for each in left] == [last]
    assert {each.user_attrs.get("retry_of") for each in all_trials} >= {left[0].number}
    results = study.results()
    assert Choice.from_text(last) in results
    assert len(results) >= trials
    assert true_us(winner) <= min(found.us for found in results.values()) * NEAR_TIE
    # Started again, it goes on where it was: there is nothing more to do.
    measurer = ReplayMeasurer(recorded(tried))
    outcome = search(tried, measurer, study, Budget(60.0, trials))
    assert (measurer.asked, outcome.winner) == ([], winner)


def test_a_journal_file_is_shared_and_a_killed_processs_trial_handed_on(tmp_path):
    check_shared_study(str(tmp_path / "studies.journal"))


def _postgres_programs() -> dict[str, str] | None:
    folders = [
        *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True),
        *os.environ["PATH"].split(":"),
    ]
    found = {name: shutil.which(name, path=":".join(folders)) for name in ("initdb", "pg_ctl", "postgres")}
    return found if all(found.values()) else None


@pytest.fixture
def postgres(tmp_path_factory):
    """The URL of a server of this test's own, on loopback."""
    programs = _postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt install postgresql)")
    pytest.importorskip("psycopg")
    # The server refuses to run as root.
    folder = Path(f"/tmp/sparsec-pg-{os.getpid()}")
    folder.mkdir(mode=0o755)
    as_other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    if as_other:
        os.chown(folder, 65534, 65534)

    def run(*command: str) -> None:
        done = subprocess.run([*as_other, *command], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    data = str(folder / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        run(programs["initdb"], "-D", data, "-U", "tuner", "--auth=trust", "--no-sync")
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories='' -c fsync=off"
        run(programs["pg_ctl"], "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
        yield f"postgresql://tuner@127.0.0.1:{port}/postgres"
        run(programs["pg_ctl"], "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_postgresql_study_is_shared_and_a_killed_processs_trial_handed_on(postgres):
    check_shared_study(postgres)


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("postgresql://tuner:secret@127.0.0.1:1/none", "cannot be reached"),
        ("/proc/nowhere/studies.journal", "cannot be written"),
        ("oracle://host/db", "driver"),
    ],
)
def test_a_storage_that_cannot_be_reached_is_named(storage, said):
    with pytest.raises(SparsecError, match=said) as caught:
        open_storage(storage)
    assert "secret" not in str(caught.value)


# Job files.


def test_bad_jobs_are_named_with_their_line_and_the_others_kept(tmp_path):
    path = tmp_path / "jobs.yaml"
    path.write_text(
        "device: nvidia-a100\n"
        "defaults: {heads: 8}\n"
        "jobs:\n"
        '  - {name: good, mask: "window(63, 0)", length: [512, 1024], dtype: [fp16, bf16]}\n'
        "  - name: typo\n"
        "    mask: causal()\n"
        "    lenght: 512\n"
        '  - {name: bad mask, mask: "windw(63, 0)", length: 512}\n'
        "  - {name: no length, mask: causal()}\n"
        "  - {name: heads, mask: causal(), length: 512, kv_heads: 3}\n"
        "  - {name: dims, mask: causal(), length: 512, head_dim: 512}\n"
        '  - {name: shape, mask: "documents([100, 100])", length: 512}\n'
        "  - {name: none, mask: causal(), length: -5}\n"
        "  - {name: file, mask: nowhere.npz}\n"
    )
    fleet = read_jobs(path)
    assert fleet.device.name == "nvidia-a100"
    assert [(each.problem.q_len, each.problem.dtype) for each in fleet.entries] == [
        (512, "fp16"),
        (512, "bf16"),
        (1024, "fp16"),
        (1024, "bf16"),
    ]
    lines = [int(problem.split(":")[1]) for problem in fleet.problems]
    assert lines == [7, 8, 9, 10, 11, 12, 13, 14]
    assert "did you mean 'length'" in fleet.problems[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jobs: 3\n", "list of `jobs`"),
        ("about: x\njobz: []\njobs: []\n", ":2: .*'jobz'"),
        ("device: nvidia-a10\njobs: []\n", ":1: .*nvidia-a100"),
        ("jobs: []\ndefaults: {hedas: 3}\n", ":2: .*'heads'"),
    ],
)
def test_a_file_that_holds_no_jobs_is_refused(tmp_path, text, said):
    path = tmp_path / "jobs.yaml"
    path.write_text(text)
    with pytest.raises(SparsecError, match=said):
        read_jobs(path)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "tools/jobs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_fleets_that_come_with_sparsec_make_sense(path):
    fleet = read_jobs(path)
    assert fleet.problems == ()
    assert len(fleet.entries) >= 20


# The tools that judge all this, on records that were made up.


def test_the_tools_read_what_a_search_wrote(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import eval_cost
    import eval_search

    jobs = tmp_path / "jobs.yaml"
    jobs.write_text('jobs:\n  - {name: made up, mask: "window(40, 3)", length: 300, heads: 2, head_dim: 32}\n')
    (entry,) = read_jobs(jobs).entries
    ((_, tried),) = spaces_in(entry, detect_cpu())
    recorder = Recorder(tried, RecordBase([], tmp_path / "records"))
    slower = {arm: 1.0 + number for number, arm in enumerate(tried.arms)}
    for choice in tried.choices():
        us = true_us(choice) * slower[choice.arm]
        recorder.tried(choice, Measurement((us,) * 5, estimate_us=us / 2))
    replayed = CliRunner().invoke(
        eval_search.main, ["replay", str(tmp_path / "records"), "--jobs", str(jobs), "--trials", "12", "--seeds", "1"]
    )
    assert replayed.exit_code == 0, replayed.output
    assert replayed.output.startswith("1 spaces of ")
    assert "random" in replayed.output
    assert "median regret after 12 trials, on 1 spaces of more: " in replayed.output
    costed = CliRunner().invoke(eval_cost.main, [str(tmp_path / "records")])
    assert costed.exit_code == 0, costed.output
    assert "in 1 of 1 cases" in costed.output
    off = [error.median for error in eval_cost.errors(RecordBase([], tmp_path / "records").records())]
    assert off == pytest.approx([2.0] * len(tried.arms), rel=1e-3)


GRID = "defaults: {length: 300, heads: 2, head_dim: 32, dtype: fp32}\ncases: [{name: made up, mask: 'window(40, 3)'"


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_what_the_records_say_takes_turns_with_the_default(tmp_path, monkeypatch, no_records, direction):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import eval_tuned

    grid, file = tmp_path / "grid.yaml", tmp_path / "tuned.json"
    grid.write_text(f"{GRID}, direction: {direction}}}]\n")

    def row() -> dict[str, object]:
        done = CliRunner().invoke(eval_tuned.main, [str(grid), "--seconds", "0", "--rounds", "7", "--json", str(file)])
        assert done.exit_code == 0, done.output
        (found,) = json.loads(file.read_text())["cases"]
        return found

    same = row()
    assert (same["gain"], same["rounds"], same["tuned"]) == (1.0, 0, same["default"])
    for task in (CPU_TASK, replace(CPU_TASK, direction="backward")):
        tried = Space(replace(task, problem=replace(task.problem, kv_heads=2)))
        results = {choice: Measurement((1000.0,) * 5) for choice in tried.choices() if not choice.arm.is_mixture}
        winner = next(choice for choice in results if choice.arm == tried.default.arm and choice != tried.default)
        Recorder(tried, no_records).contested("planted", results | {winner: Measurement((10.0,) * 5)})
    other = row()
    assert other["rounds"] == 7
    assert other["gain"] == pytest.approx(other["default_us"] / other["tuned_us"])
    assert str(winner.config) in other["tuned"]
    assert other["tuned"] != other["default"] == same["default"]


def test_a_tuned_plan_that_is_wrong_is_not_timed(tmp_path, monkeypatch, no_records):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import eval_tuned
    from bench.grid import load_grid

    grid = tmp_path / "grid.yaml"
    grid.write_text(f"{GRID}}}]\n")
    bound = m.window(40, 3).bind(300)
    problem = Problem(300, 300, 2, 2, 32, 32)
    (case,) = load_grid(grid).cases
    right, wrong = (eval_tuned._compiled(mask, problem, "off") for mask in (bound, m.window(39, 3).bind(300)))
    with pytest.raises(SparsecError, match=r"the tuned .* is wrong: "):
        eval_tuned._checked(bound, problem, {"default": right, "tuned": wrong})
    assert eval_tuned.compared(case, 0.0, 7).gain == 1.0
