#!/usr/bin/env python3
"""Verifies, tests, tunes and times the GPU kernels on the machine at hand, and writes down what was seen.

    tools/gpu_gate.py list
    tools/gpu_gate.py rehearse [--device nvidia-h200] [--minutes 5]
    tools/gpu_gate.py run [--minutes 25] [--results DIR] [--part verify ...]
    tools/gpu_gate.py report

`list` and `rehearse` need no GPU: the one says what there is to do, the other goes through it with launches that only
compile. `run` needs one. It does the most valuable things first, each part within a share of the time, writes every
result as it comes, and goes on where it was when started again with the same sources and toolchain, however it ended. A
process of its own does the work: a kernel that hangs or ruins the device costs its own check, and the rest goes on; a
package that does so costs its own row. `report` makes GPU.md from those results and from the list of what the tests
lower. docs/gpus.md says what to do in which order. This file decides the order, the shares and the limits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click
from bench.protocol import device_answers
from gate import checks, timing
from gate.ahead import Ahead, compile_for, only_compile, pretend_device, rehearsed
from gate.record import ROOT, Record, Result, Running
from gate.report import gpu_md, summary

from sparsec.device import Device, detect_gpu
from sparsec.device import device as named_device
from sparsec.errors import SparsecError

RESULTS = ROOT / "benchmarks" / "gpu"
JOBS = ROOT / "tools" / "jobs"

Tasks = Iterator[tuple[str, Callable[[], Any]]]


@dataclass(frozen=True)
class Part:
    """Some tasks: their share of the time, and how long one may take before it counts as hung.

    Attributes:
        tasks: Of a device.
        share: Of all the time.
        limit_s: For one task; between two signs of life, where it gives any.
        ahead: Tasks of the same keys whose kernels other cores compile while it goes on; None for none.
        is_timed: Whether they must be done before it begins.
        has_peers: Whether its tasks tell whom they are busy with, and take whom earlier tries have lost.
    """

    tasks: Callable[[Device], Iterator[tuple[str, Callable[..., Any]]]]
    share: float
    limit_s: float
    ahead: Callable[[Device], Tasks] | None = None
    is_timed: bool = False
    has_peers: bool = False


def gpu_tests(device: Device) -> Tasks:
    cores = len(os.sched_getaffinity(0))
    abreast = ("-n", str(min(8, cores // 2))) if importlib.util.find_spec("xdist") is not None and cores > 3 else ()
    command = ("-m", "pytest", "-m", "gpu", "-q", "--no-header", "--maxfail=5", *abreast, "tests")
    yield "tests/pytest-m-gpu", lambda: command_run(*command)


def tuned(device: Device) -> Tasks:
    """The standard jobs of this device, its ceilings first; what they measure goes to `autotune_db/`."""
    tune = ("-m", "sparsec.cli", "tune")
    yield "tune/ceilings", lambda: command_run(*tune, "--calibrate", "--device", device.name)
    job = JOBS / f"{device.name.partition('-')[2]}.yaml"
    if importlib.util.find_spec("optuna") is None:
        yield f"tune/{job.name}", lambda: {"status": "skipped", "why": "optuna is not installed"}
    elif job.is_file():
        # Each run goes on where the one before stopped.
        yield f"tune/{job.name}", lambda: {**command_run(*tune, str(job), "--budget", TUNING_BUDGET), "goes_on": True}
    yield "tune/promoted", lambda: {**command_run("tools/promote_records.py", "--device", device.key), "goes_on": True}
    yield "tune/choice", chosen_by_cost


def chosen_by_cost() -> Result:
    """How the planner's choice without records stands to the best of what was measured on the same masks."""
    command = ("tools/eval_cost.py", "--grid", "gpu_masks", "--device", "gpu", "--budget", str(CHOICE_S))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "choice.json"
        told = command_run(*command, "--json", str(path))
        return {**told, "choice": json.loads(path.read_text())}


def command_run(*arguments: str) -> Result:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(arguments)}: {(done.stdout + done.stderr)[-1500:]}")
    return {"summary": (done.stdout.strip().splitlines() or ["done"])[-1][:300]}


def sanitized(device: Device) -> Tasks:
    """Memory errors and races, under a tool that not every machine has."""
    for each, name in checks.own_kernels(device):
        if name != "cuda":
            continue
        for direction in checks.DIRECTIONS:
            if not checks.computes(each, name, "bf16", direction, device):
                continue
            for tool in ("memcheck", "racecheck", "synccheck"):
                key = f"verify/{each.name}/{name}/bf16/{direction}/long-rows"
                yield f"sanitize/{each.name}/{name}/{direction}/{tool}", lambda t=tool, k=key: sanitize(t, k)


def sanitize(tool: str, key: str) -> Result:
    if shutil.which("compute-sanitizer") is None:
        return {"status": "skipped", "why": "compute-sanitizer is not on the PATH"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "once", key]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"compute-sanitizer --tool {tool}: {(done.stdout + done.stderr)[-1500:]}")
    return {}


# Most valuable first.
PARTS: dict[str, Part] = {
    "verify": Part(checks.verifications, 0.26, 120.0, checks.verifications),
    "bench": Part(timing.benchmarks, 0.28, 240.0, timing.compilations, is_timed=True, has_peers=True),
    "offsets": Part(checks.far_offsets, 0.06, 180.0),
    "modified": Part(checks.modified, 0.08, 120.0, checks.modified),
    "tunables": Part(checks.other_configurations, 0.08, 120.0, checks.other_configurations),
    "graph": Part(checks.captured, 0.02, 120.0),
    "tune": Part(tuned, 0.12, 600.0),
    "tests": Part(gpu_tests, 0.07, 600.0),
    "sanitize": Part(sanitized, 0.03, 300.0),
}
# Of the jobs; what they have measured when the time is over is kept.
TUNING_BUDGET = "4m"
# Of the masks on which the planner's choice is raced against the others.
CHOICE_S = 120
# What a worker exits with when the device no longer answers, and another process must go on.
_RUINED = 3
# After its time, a worker may finish what it is at for so long.
_GRACE_S = 20.0
# How often a worker looks whether whoever watches it is still there.
_LOOK_S = 1.0

results_option = click.option(
    "--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="Where results are kept."
)


@click.group()
def main() -> None:
    """Verifies, tests, tunes and times the GPU kernels on the machine at hand."""


@main.command("list")
@click.option("--device", "name", default="nvidia-h200", show_default=True, help="As if this device were here.")
def list_tasks(name: str) -> None:
    """Says what there is to do for a device; needs none."""
    device = named_device(name)
    checks.pretend()
    for part, each in PARTS.items():
        counts = Counter("/".join(key.split("/")[1:-1][:2]) for key, _ in each.tasks(device))
        click.echo(f"{part}: {sum(counts.values())} tasks, {each.share:.0%} of the time")
        for what, count in counts.items():
            click.echo(f"  {count:4} {what}")


# Parts whose tasks can be gone through on the tensors of a CPU.
REHEARSED = ("verify", "tunables", "modified")


@main.command()
@click.option("--device", "name", default="nvidia-h200", show_default=True, help="As if this device were here.")
@click.option("--minutes", default=5.0, show_default=True, help="For everything.")
@click.option("--part", "parts", multiple=True, type=click.Choice(REHEARSED), default=REHEARSED, help="Only this part.")
@click.option("--only", default="", metavar="TEXT", help="Only tasks whose key has this in it.")
def rehearse(name: str, minutes: float, parts: tuple[str, ...], only: str) -> None:
    """Goes through tasks in shuffled order with launches that only compile; needs no GPU."""
    device, until = named_device(name), time.time() + 60 * minutes
    checks.pretend()
    only_compile()
    pretend_device(device)
    tasks = [item for part in parts for item in PARTS[part].tasks(device) if only in item[0]]
    random.Random(0).shuffle(tasks)
    wrong, done = 0, 0
    for key, task in tasks:
        if time.time() > until:
            break
        error = rehearsed(task)
        done, wrong = done + 1, wrong + (error is not None)
        if error is not None:
            click.echo(f"{key}: {error[:500]}")
    click.echo(f"{done} of {len(tasks)} tasks rehearsed for {device.name}, {wrong} would fail")
    if wrong:
        raise SystemExit(1)


@main.command()
@click.option("--minutes", default=25.0, show_default=True, help="For everything.")
@click.option("--part", "parts", multiple=True, type=click.Choice([*PARTS]), help="Only this part.")
@results_option
def run(minutes: float, parts: tuple[str, ...], results: Path) -> None:
    """Runs what is not recorded yet; started again, it goes on."""
    try:
        record, wanted = Record(detect_gpu(), results), parts or tuple(PARTS)
    except SparsecError as error:
        raise click.ClickException(str(error)) from None
    until, run_id = time.time() + 60 * minutes, uuid.uuid4().hex[:8]
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        work_until(record, wanted, until, run_id)
    except KeyboardInterrupt:
        # What it was at is not at fault, and is done when the gate is started again.
        record.rest()
        click.echo("stopped; start again to go on", err=True)
    record.read()
    counts = record.counts()
    click.echo("\n".join(summary({**record.about, "results": record.results})))
    click.echo(json.dumps({**record.about, **counts, "record": str(record.path)}))
    if counts["failed"]:
        raise SystemExit(1)


def _interrupted(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def work_until(record: Record, parts: tuple[str, ...], until: float, run_id: str) -> None:
    """Has workers do what there is time for, each after the one that was lost before."""
    while time.time() < until:
        told = ("work", run_id, str(until), str(os.getpid()), "--results", str(record.path.parent))
        command = [sys.executable, __file__, *told]
        # A session of its own, so that what it has started ends with it.
        worker = subprocess.Popen([*command, *(f"--part={name}" for name in parts)], cwd=ROOT, start_new_session=True)
        try:
            lost = watched(worker, record, until)
        finally:
            end(worker)
        if lost is None:
            return
        if record.running() is None and worker.returncode != _RUINED:
            # No task is at fault: the next worker would end the same way.
            raise click.ClickException(f"the process that does the work ended between two tasks: {lost}; see above")
        settle(record, lost, run_id)


def watched(worker: subprocess.Popen[bytes], record: Record, until: float) -> str | None:
    """How the worker was lost, or None where it has done what there was time for."""
    while True:
        try:
            code = worker.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            pass
        else:
            record.read()
            return f"exit code {code}" if code else None
        running = record.running()
        if running is not None:
            limit_s = PARTS[running.key.partition("/")[0]].limit_s
            if time.time() - running.since > limit_s:
                end(worker)
                record.read()
                return f"it took longer than {limit_s:.0f} s"
        if time.time() > until + _GRACE_S:
            # What it was at is not at fault, and is done when the gate is started again.
            end(worker)
            record.read()
            record.rest()
            return None


def end(worker: subprocess.Popen[bytes]) -> None:
    """Ends a worker and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def settle(record: Record, lost: str, run_id: str) -> None:
    """Writes down what a lost worker was at, so that the next one leaves it alone."""
    running = record.running()
    if running is not None:
        record.write(running.key, blamed(running, record.results.get(running.key), lost) | {"run": run_id})
        click.echo(f"lost     {running.key} {running.who} {lost}", err=True)


def blamed(running: Running, earlier: Result | None, lost: str) -> Result:
    """What is written of a task that took its process along: a peer of it is left out of the next try."""
    said = f"its process was lost: {lost}" + (f" during {running.stage}" if running.stage else "")
    known = lost_peers(earlier)
    if not running.who or running.who in known:
        return {"status": "failed", "error": said}
    return {"status": "lost", "error": f"{running.who}: {said}", "lost": {**known, running.who: said}}


def lost_peers(result: Result | None) -> dict[str, str]:
    """Whom earlier tries of a task have lost, and how."""
    return dict((result or {}).get("lost", {}))


@main.command(hidden=True)
@click.argument("run_id")
@click.argument("until", type=float)
@click.argument("watcher", type=int)
@click.option("--part", "parts", multiple=True, type=click.Choice([*PARTS]))
@results_option
def work(run_id: str, until: float, watcher: int, parts: tuple[str, ...], results: Path) -> None:
    """Does the work of `run`, which watches it."""
    threading.Thread(target=end_with, args=(watcher,), daemon=True).start()
    device = detect_gpu()
    record = Record(device, results)
    for number, name in enumerate(parts):
        share = PARTS[name].share / sum(PARTS[later].share for later in parts[number:])
        part_until = time.time() + (until - time.time()) * share
        work_through(name, device, record, part_until, run_id)


def end_with(parent: int) -> None:
    """Ends this process and all that it has started as soon as its parent is gone, or where it is gone already."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os.killpg(0, signal.SIGKILL)


def work_through(name: str, device: Device, record: Record, until: float, run_id: str) -> None:
    """The tasks of a part, as far as there is time."""
    part = PARTS[name]
    tasks = [(key, task) for key, task in part.tasks(device) if not is_settled(record.results.get(key), run_id)]
    known = {key for key, _ in part.ahead(device)} if part.ahead is not None and tasks else set()
    compiled = [key for key, _ in tasks if key in known]
    with Ahead(partial(compile_for, part.ahead), compiled) as ahead:
        if part.is_timed:
            ahead.wait_for_all()
        for key, task in tasks:
            ahead.wait(key)
            if time.time() > until:
                click.echo(f"{name}: out of time; start again to go on", err=True)
                return
            started, earlier = time.time(), record.results.get(key)
            record.begin(key)
            result = outcome(partial(task, partial(record.begin, key), lost_peers(earlier)) if part.has_peers else task)
            is_ruined = result["status"] == "failed" and not device_answers()
            running = record.running()
            if is_ruined and running is not None and running.who:
                result = blamed(running, earlier, result["error"])
            if lost := lost_peers(earlier) | lost_peers(result):
                result["lost"] = lost
            record.write(key, {**result, "seconds": round(time.time() - started, 2), "run": run_id})
            click.echo(f"{result['status']:8} {key} {result.get('error', '')}", err=True)
            if is_ruined:
                raise SystemExit(_RUINED)


def is_settled(result: Result | None, run_id: str) -> bool:
    """Whether a task has passed for good, or was tried in this run already with all who are left of it."""
    if result is None or result["status"] == "lost":
        return False
    return (result["status"] == "passed" and not result.get("goes_on")) or result.get("run") == run_id


def outcome(task: Callable[[], Any]) -> Result:
    """What came of a task; a failure is a result, and the others go on."""
    try:
        found = task()
    except Exception as error:  # a kernel may fail in any way; whatever it is, it is recorded
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
    return {"status": "passed", **(found or {})}


@main.command()
@click.argument("key")
def once(key: str) -> None:
    """Runs one verification, for a tool that watches it."""
    dict(checks.verifications(detect_gpu()))[key]()


@main.command()
@results_option
def report(results: Path) -> None:
    """Makes GPU.md from the results and from what the tests lower."""
    (ROOT / "GPU.md").write_text(gpu_md(results))


if __name__ == "__main__":
    main()
