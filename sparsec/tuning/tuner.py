"""One call that tunes: a mask and a problem become tasks, each is searched, and the records say the rest.

This file decides what is tuned apart (each distinct mask of the heads, each pass, each part of a mixed plan), how a
budget is shared among that, and which process measures. It must not know how a search proposes, nor how a plan is made
of the records afterwards.

An effort is what a user is ready to wait for: `"quick"` is at most about ten seconds, and tries only kernels that are
compiled already beside the default's; `"full"` goes on until there is little left to try.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from sparsec import gate
from sparsec.backends.base import BACKENDS, Problem, backend
from sparsec.device import Device
from sparsec.errors import BackendMissingError
from sparsec.masks.mask import BoundMask
from sparsec.planner import Plan
from sparsec.planner.plans import Reorder
from sparsec.records import RecordBase, database
from sparsec.template import KERNEL_FILES, template
from sparsec.tuning.measure import Measurer
from sparsec.tuning.recording import Recorder, nearest_choices
from sparsec.tuning.search import Budget, Observer, Outcome, search
from sparsec.tuning.space import Arm, Space, Task, planned
from sparsec.tuning.studies import Study, open_storage
from sparsec.tuning.worker import Host, WorkerMeasurer, default_limits

Effort = Literal["quick", "full"]

# Of all tasks of one call together.
_QUICK_SECONDS: Final = 8.0
# Of each.
_FULL: Final = Budget(seconds=240.0, trials=80)
# A task that is given less than this is not begun.
_LEAST_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked to be tuned.

    Attributes:
        bound: The mask, with its lengths.
        problem: The shape; with `needs_grad` the backward pass is tuned too.
        device: For what.
        where: The torch device of the tensors.
        template: Only this template.
        backend: Only this back end.
        reorder: As in `plan`.
    """

    bound: BoundMask
    problem: Problem
    device: Device
    where: str = "cpu"
    template: str | None = None
    backend: str | None = None
    reorder: Reorder = "auto"


def spaces_of(job: Job) -> list[Space]:
    """What there is to search, most important first.

    Raises:
        MaskError: The mask does not fit the problem.
        UnsupportedError: Nothing can run it.
    """
    return list(_spaces(job, planned(whole_task(job))))


def whole_task(job: Job) -> Task:
    """The task of a mask that is the same for all heads, known without planning; others have one like it."""
    return Task(
        job.bound,
        job.problem,
        job.device,
        template=job.template,
        backend=job.backend,
        reorder=job.reorder,
    )


def _spaces(job: Job, made: Plan) -> Iterator[Space]:
    for group in made.groups:
        whole = replace(whole_task(job), bound=group.bound, heads=group.heads, batch=group.batch)
        passes = [whole, replace(whole, direction="backward")] if job.problem.needs_grad else [whole]
        yield from (Space(each, group=group) for each in passes)
        if len(group.steps) < 2:
            continue
        for step in group.steps:
            # A part of a mixed plan, as its kernel walks it.
            part = step.launch.work.bound
            problem = replace(job.problem, q_len=part.q_len, kv_len=part.kv_len)
            yield from (Space(replace(each, bound=part, problem=problem, reorder="off")) for each in passes)


def tune(
    job: Job,
    effort: Effort | Budget,
    *,
    records: RecordBase | None = None,
    storage: str | None = None,
    observe: Callable[[Space], Sequence[Observer]] = lambda space: (),
) -> list[Outcome]:
    """Searches everything a job asks for; what it learns is in the records when it returns.

    Args:
        job: What to tune.
        effort: How long, in all.
        records: Where to; the user's own by default.
        storage: Of the studies: a file or a URL; none is kept by default.
        observe: Who is told of each search.

    Raises:
        MaskError: The mask does not fit the problem.
        UnsupportedError: Nothing can run it.
        BackendMissingError: The device is not here.
        SparsecError: The storage cannot be reached.
    """
    base = database() if records is None else records
    check_is_here(job.device, job.where)
    spaces = spaces_of(job)
    quick = effort == "quick"
    budget = effort if isinstance(effort, Budget) else replace(_FULL, seconds=_QUICK_SECONDS if quick else math.inf)
    deadline = time.monotonic() + budget.seconds
    outcomes = []
    for number, space in enumerate(spaces):
        share = (deadline - time.monotonic()) / (len(spaces) - number)
        if effort == "full":
            share = _FULL.seconds
        if share < _LEAST_SECONDS and number:
            break
        tried = _compiled_only(space) if quick else space
        mine = replace(budget, seconds=share)
        outcomes.append(search_space(tried, job.where, mine, base, storage, observe(tried)))
    return outcomes


def search_space(
    space: Space,
    where: str,
    budget: Budget,
    base: RecordBase,
    storage: str | None = None,
    observers: Sequence[Observer] = (),
    host: Host | None = None,
) -> Outcome:
    """One search, measured in a process of its own, or in that of `host`."""
    limits = default_limits(space.task, budget.timeout_s)
    if budget.seconds < budget.timeout_s:
        # The contest at the end may not overrun a short budget many times.
        limits = replace(limits, timeout_s=max(2.0 * budget.seconds, 5.0))
    study = Study(space, open_storage(storage))
    measurer: Measurer = WorkerMeasurer(space, where, limits, host)
    try:
        near = nearest_choices(space, base)
        return search(space, measurer, study, budget, near=near, observers=[Recorder(space, base), *observers])
    finally:
        measurer.close()


def check_is_here(device: Device, where: str) -> None:
    """Raises where nothing can be measured for a device on this machine.

    Raises:
        BackendMissingError: The device, or everything that compiles for it, is not here.
    """
    from sparsec.request import torch_device

    found = torch_device(where)
    if found.key != device.key:
        raise BackendMissingError(
            f"tuning for {device.name} ({device.key}) has to run on one, and this machine has {found.name} "
            f"({found.key}); run the same command there, or look at what would be done with --dry-run"
        )
    missing = [
        backend(name).missing(device) for name in BACKENDS if backend(name).serves(device) and name in KERNEL_FILES
    ]
    if missing and None not in missing:
        raise BackendMissingError(f"tuning for {device.name} needs kernels that run here: {missing[0]}")


def _compiled_only(space: Space) -> Space:
    """Without kernels that would have to be compiled first: that takes seconds each on a CPU."""
    ready = tuple(arm for arm in space.arms if arm == space.default.arm or _is_compiled(space.task, arm))
    return space.only(ready)


def _is_compiled(task: Task, arm: Arm) -> bool:
    if arm.is_mixture:
        return False
    return gate.is_passed(template(arm.template), arm.backend, task.problem.dtype, task.device, task.direction)
