"""Measuring a choice: exact first, then timed as it will run. `Measurer` is what a search knows of it.

This file decides what is run and timed in this process: kernels warm, outputs allocated as a call allocates them, a
monotonic clock on a CPU and device events on a GPU. Which failures become a `Measurement` is decided here too; any
other exception is a fault of the program and surfaces. It must not know what is searched, nor where records are kept.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Final, Protocol

from sparsec import gate
from sparsec.backends.base import GradientKernel, Kernel, backend
from sparsec.errors import BackendMissingError, CompileError, UnsupportedError
from sparsec.planner import Plan
from sparsec.records import Failure
from sparsec.specialisation import Specialisation
from sparsec.tuning.exactness import Inputs, Oracle, Result, make_inputs
from sparsec.tuning.space import Choice, Space

if TYPE_CHECKING:
    import torch

# Runs before the first timed one.
_WARM_UPS: Final = 1
# Choices whose kernels and index arrays are kept for when they come back as finalists.
_KEPT: Final = 6
# Timings of one choice, at most.
_MOST_RUNS: Final = 100
# Once so long was spent on one choice, so many runs are enough; and in a contest, however long it takes.
_SLOW_S: Final = 1.0
_LEAST_ROUNDS: Final = 3


@dataclass(frozen=True, slots=True)
class Measurement:
    """What came of a choice.

    Attributes:
        timings_us: Every timed run in order; empty where it failed or was passed over.
        failure: Why there are none.
        reason: The same for a person.
        estimate_us: What the cost model said, where it was asked.
        is_passed_over: Whether the cost model put it so far behind that it was not run.
    """

    timings_us: tuple[float, ...] = ()
    failure: Failure | None = None
    reason: str = ""
    estimate_us: float | None = None
    is_passed_over: bool = False

    @property
    def us(self) -> float:
        """The median; infinite where there is none."""
        return median(self.timings_us) if self.timings_us else math.inf


@dataclass(frozen=True, slots=True)
class Look:
    """How closely a choice is looked at.

    Attributes:
        runs: Timed runs, at least; fewer where they take long.
        seconds: Goes on for so long.
        worst_us: Ends after two runs when both took longer: it cannot win.
        estimate_limit_us: Is not run at all when the cost model says more.
        timeout_s: Is ended by force after so long, compiling included, where it runs in a process of its own.
    """

    runs: int
    seconds: float
    worst_us: float = math.inf
    estimate_limit_us: float = math.inf
    timeout_s: float = 120.0


def _is_wanted(timings: Sequence[float], spent_us: float, look: Look) -> bool:
    """Whether another run says more: a call of seconds is told apart by fewer than a call of microseconds."""
    if len(timings) >= _MOST_RUNS:
        return False
    is_slow = spent_us > _SLOW_S * 1e6
    return len(timings) < (min(look.runs, _LEAST_ROUNDS) if is_slow else look.runs) or spent_us < look.seconds * 1e6


class Measurer(Protocol):
    """Where timings come from: this process, a worker process, or records of an earlier search."""

    def measure(self, choice: Choice, look: Look) -> Measurement:
        """Checks a choice against the reference and times it."""
        ...

    def compare(self, choices: Sequence[Choice], rounds: int, seconds: float) -> list[Measurement]:
        """Times choices interleaved: each round runs each once, beginning with another one."""
        ...

    def close(self) -> None:
        """Lets go of whatever it holds."""
        ...


@dataclass(frozen=True)
class _Ready:
    """A choice that can be run and was found exact."""

    run: Callable[[], object]
    estimate_us: float


class LocalMeasurer:
    """Measures in this process.

    Args:
        space: Makes the launches.
        where: The torch device of the tensors.
        n_rows: Rows that are compared with fp64.
    """

    def __init__(self, space: Space, where: str, n_rows: int = 28) -> None:
        self._space, self._where, self._n_rows = space, where, n_rows
        self._inputs: Inputs | None = None
        self._oracle: Oracle | None = None
        self._ready: OrderedDict[Choice, _Ready] = OrderedDict()

    def measure(self, choice: Choice, look: Look) -> Measurement:
        made = self._made_ready(choice, look.estimate_limit_us)
        if isinstance(made, Measurement):
            return made
        timings: list[float] = []
        try:
            self._warm_up(made)
            spent_us = 0.0
            while _is_wanted(timings, spent_us, look):
                timings.append(self._timed_us(made.run))
                spent_us += timings[-1]
                if len(timings) == 2 and min(timings) > look.worst_us:
                    break
        except (RuntimeError, MemoryError) as error:
            return self._failed(choice, "launch", error, made.estimate_us)
        return Measurement(tuple(timings), estimate_us=made.estimate_us)

    def compare(self, choices: Sequence[Choice], rounds: int, seconds: float) -> list[Measurement]:
        made = [self._made_ready(choice, math.inf) for choice in choices]
        able = [index for index, each in enumerate(made) if isinstance(each, _Ready)]
        timings: list[list[float]] = [[] for _ in choices]
        failed: dict[int, Measurement] = {}
        spent_us = 0.0
        for number in range(rounds):
            if number >= _LEAST_ROUNDS and spent_us > seconds * 1e6:
                break
            for place in range(len(able)):
                index = able[(number + place) % len(able)]
                each = made[index]
                if index in failed or isinstance(each, Measurement):
                    continue
                try:
                    if number == 0:
                        self._warm_up(each)
                    timings[index].append(self._timed_us(each.run))
                except (RuntimeError, MemoryError) as error:
                    failed[index] = self._failed(choices[index], "launch", error, each.estimate_us)
                    continue
                spent_us += timings[index][-1]
        return [
            each
            if isinstance(each, Measurement)
            else failed.get(index, Measurement(tuple(timings[index]), estimate_us=each.estimate_us))
            for index, each in enumerate(made)
        ]

    def close(self) -> None:
        self._ready.clear()
        self._inputs = self._oracle = None

    def _made_ready(self, choice: Choice, limit_us: float) -> _Ready | Measurement:
        known = self._ready.get(choice)
        if known is not None:
            self._ready.move_to_end(choice)
            return known
        estimate_us: float | None = None
        try:
            group = self._space.group(choice)
            estimate_us = group.estimate.us
            if estimate_us > limit_us:
                reason = f"the cost model says {estimate_us:.0f} µs, and {limit_us:.0f} µs can win"
                return Measurement(reason=reason, estimate_us=estimate_us, is_passed_over=True)
            ready = _Ready(self._exact_run(choice), estimate_us)
        except _WrongError as error:
            return self._failed(choice, "incorrect", error, estimate_us)
        except (UnsupportedError, BackendMissingError) as error:
            return self._failed(choice, "constraint", error, estimate_us)
        except CompileError as error:
            # The gate's refusal is a kernel that compiled and was wrong.
            return self._failed(choice, "compile" if error.log else "incorrect", error, estimate_us)
        except (RuntimeError, MemoryError) as error:
            return self._failed(choice, "launch", error, estimate_us)
        self._ready[choice] = ready
        while len(self._ready) > _KEPT:
            self._ready.popitem(last=False)
        return ready

    def _exact_run(self, choice: Choice) -> Callable[[], object]:
        """What to time, once its results were found right.

        Raises:
            _WrongError: They were not.
        """
        inputs = self._given()
        if self._oracle is None:
            self._oracle = Oracle(self._space.task, inputs, self._n_rows)
            # What later results are compared with as a whole must be the default's.
            if choice != self._space.default:
                self._made_ready(self._space.default, math.inf)
        run, result = self._prepared(choice, inputs)
        error = self._oracle.error(result)
        if error is not None:
            raise _WrongError(error)
        return run

    def _given(self) -> Inputs:
        if self._inputs is None:
            self._inputs = make_inputs(self._space.task, self._where)
        return self._inputs

    def _prepared(self, choice: Choice, inputs: Inputs) -> tuple[Callable[[], object], Result]:
        """What to time, which is what a call runs; and the result of one run into buffers that held NaN."""
        q, k, v, d_out, d_lse = inputs.q, inputs.k, inputs.v, inputs.d_out, inputs.d_lse
        task, steps = self._space.task, self._space.steps(choice)
        for step in steps:
            launch = step.launch
            gate.ensure(launch.template, launch.backend, task.problem.dtype, task.device, task.direction)
        made = Specialisation(self._plan(choice))
        if task.direction == "forward":
            if len(steps) == 1:
                result = _forward(backend(steps[0].launch.backend).lower(steps[0].launch), inputs)
            else:
                out, lse = made.forward(q, k, v, with_lse=True)
                assert lse is not None, "the log-sum-exp was asked for"
                result = Result({"out": out, "lse": lse})
            return lambda: made.forward(q, k, v, with_lse=False), self._of_its_heads(result)
        assert d_out is not None, "a backward task has gradients of its output"
        assert d_lse is not None, "a backward task has gradients of its log-sum-exp"
        out, lse = self._saved(inputs)

        def backward() -> tuple[torch.Tensor, ...]:
            return made.backward(q, k, v, out, lse, d_out, d_lse)

        if len(steps) == 1:
            result = _backward(backend(steps[0].launch.backend).lower_backward(steps[0].launch), inputs, (out, lse))
        else:
            result = Result(dict(zip(("dq", "dk", "dv"), backward(), strict=True)))
        return backward, self._of_its_heads(result)

    def _of_its_heads(self, result: Result) -> Result:
        """The result with 0 where the task has no heads or batch elements, which its kernels leave alone."""
        task = self._space.task
        group = task.problem.q_heads // task.problem.kv_heads
        for name, tensor in result.parts.items():
            mine = {h // group for h in task.heads} if name in ("dk", "dv") else set(task.heads)
            tensor[:, [h for h in range(tensor.shape[1]) if h not in mine]] = 0.0
            tensor[[b for b in range(len(tensor)) if b not in task.batch]] = 0.0
        return result

    def _plan(self, choice: Choice) -> Plan:
        task = self._space.task
        return Plan(task.bound, task.problem, task.device, (self._space.group(choice),), 0.0)

    def _saved(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp that a backward pass is given: the default plan's."""
        made = self._plan(self._space.default)
        # A forward pass is all that is wanted of it.
        forward_only = replace(made, problem=replace(made.problem, needs_grad=False))
        out, lse = Specialisation(forward_only).forward(inputs.q, inputs.k, inputs.v, with_lse=True)
        assert lse is not None, "the log-sum-exp was asked for"
        return out, lse

    def _warm_up(self, ready: _Ready) -> None:
        for _ in range(_WARM_UPS):
            ready.run()
        self._settle()

    def _settle(self) -> None:
        if self._where != "cpu":
            import torch

            torch.cuda.synchronize(self._where)

    def _timed_us(self, run: Callable[[], object]) -> float:
        if self._where == "cpu":
            started = time.perf_counter_ns()
            kept = run()
            took_us = (time.perf_counter_ns() - started) / 1e3
            del kept  # freed outside the time
            return took_us
        import torch

        # torch's events carry no types.
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        before.record()
        run()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) * 1e3

    def _failed(self, choice: Choice, kind: Failure, error: BaseException, estimate_us: float | None) -> Measurement:
        self._ready.pop(choice, None)
        text = str(error).strip() or type(error).__name__
        return Measurement(failure=kind, reason=text.splitlines()[0][:300], estimate_us=estimate_us)


class _WrongError(Exception):
    """A result was wrong; says how."""


def _forward(kernel: Kernel, inputs: Inputs) -> Result:
    import torch

    q, k, v = inputs.q, inputs.k, inputs.v
    out = q.new_full((*q.shape[:3], v.shape[3]), math.nan)
    lse = torch.full(q.shape[:3], math.nan, dtype=torch.float32, device=q.device)
    kernel(q, k, v, out, lse)
    return Result({"out": out, "lse": lse})


def _backward(kernel: GradientKernel, inputs: Inputs, saved: tuple[torch.Tensor, torch.Tensor]) -> Result:
    import torch

    assert inputs.d_out is not None, "a backward task has gradients of its output"
    q, k, v = inputs.q, inputs.k, inputs.v
    dq = torch.full_like(q, math.nan)
    dk, dv = (torch.zeros_like(each, dtype=torch.float32) for each in (k, v))
    kernel(q, k, v, *saved, inputs.d_out, inputs.d_lse, dq, dk, dv)
    return Result({"dq": dq, "dk": dk.to(k.dtype), "dv": dv.to(v.dtype)})
