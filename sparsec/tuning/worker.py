"""A process that measures and may die of it: `WorkerMeasurer` in the parent, `main` in the child.

This file decides how the two speak (one line of JSON each way), and what a crash, a hang or too much memory becomes: a
`Measurement` with its failure kind, and a fresh process for the next choice. A child is kept between choices, so that
torch is imported and tensors are made once. Nothing is pickled: the mask travels as a saved attention.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

from sparsec import data
from sparsec.backends.base import Problem
from sparsec.tuning.measure import LocalMeasurer, Look, Measurement
from sparsec.tuning.space import Arm, Choice, Space, Task

# What a process needs beside the task's tensors and index arrays: the interpreter, torch, a GPU's runtime.
_BASE_BYTES: Final = 3 << 30
# A child's resident memory is looked at so often.
_WATCH_S: Final = 0.25
# Importing torch, making tensors and working out the right answers, before anything of the kernel runs.
_START_S: Final = 120.0

# What JSON holds: checked by the other end being this same file.
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one choice may take.

    Attributes:
        timeout_s: Of a contest of several; each choice by itself has the time its `Look` gives it.
        memory_bytes: Resident in the child.
        threads: Of torch in the child; 0 leaves them alone.
    """

    timeout_s: float
    memory_bytes: int
    threads: int = 0


def default_limits(task: Task, timeout_s: float = 120.0) -> Limits:
    """Memory for the tensors several times over, and never so much that the machine swaps."""
    wanted = _BASE_BYTES + 12 * task.problem.tensor_bytes + 64 * min(task.bound.nnz, 1 << 28)
    return Limits(timeout_s, int(min(wanted, 0.8 * _machine_bytes())), _threads())


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _threads() -> int:
    torch = sys.modules.get("torch")
    return 0 if torch is None else int(torch.get_num_threads())


class WorkerMeasurer:
    """Measures in a process of its own.

    Args:
        space: What is searched; the child makes the same one.
        where: The torch device of the tensors.
        limits: Of each request.
        host: The process, where it goes on to other tasks afterwards; one of this measurer's own by default.
    """

    def __init__(self, space: Space, where: str, limits: Limits, host: Host | None = None) -> None:
        self._space, self._where, self._limits = space, where, limits
        self._host, self._is_own = host or Host(), host is None
        self._folder = tempfile.TemporaryDirectory(prefix="sparsec-tune-")
        self._mask: Path | None = None

    def measure(self, choice: Choice, look: Look) -> Measurement:
        request = {"measure": choice.to_text(), "look": _finite(asdict(look))}
        answer = self._ask(request, look.timeout_s)
        return answer if isinstance(answer, Measurement) else _measurement(answer["measurement"])

    def compare(self, choices: Sequence[Choice], rounds: int, seconds: float) -> list[Measurement]:
        request = {"compare": [choice.to_text() for choice in choices], "rounds": rounds, "seconds": seconds}
        answer = self._ask(request, self._limits.timeout_s + 10.0 * seconds)
        if isinstance(answer, Measurement):
            # One of them ended the process; which one is not known, and each was fine by itself.
            return [answer for _ in choices]
        return [_measurement(each) for each in answer["measurements"]]

    def close(self) -> None:
        if self._is_own:
            self._host.close()
        self._folder.cleanup()

    def _ask(self, request: Json, timeout_s: float) -> Json | Measurement:
        """The child's answer, or what its end means."""
        if self._host.busy_with is not self:
            request = {"task": self._told()} | request
            timeout_s += _START_S
        child = self._host.child_for(self, self._limits)
        # Processes on one machine measure one at a time, or all of them would measure each other.
        with data.entry_lock(data.cache_dir() / f"measuring-{self._where.replace(':', '-')}"):
            answer = child.ask(request, timeout_s, self._limits.memory_bytes)
        if isinstance(answer, Measurement) or answer.get("is_leaving", False):
            self._host.close()
        return answer

    def _told(self) -> Json:
        """The task, for a process that knows nothing yet."""
        from sparsec.runtime import compile

        task = self._space.task
        if self._mask is None:
            self._mask = Path(self._folder.name) / "mask"
            compile(task.bound, tune="off").save(self._mask)
        return {
            "mask": str(self._mask),
            "problem": asdict(task.problem),
            "device": self._where,
            "direction": task.direction,
            "heads": task.heads,
            "batch": task.batch,
            "arms": [asdict(arm) for arm in self._space.arms],
            "threads": self._limits.threads,
            "memory_bytes": self._limits.memory_bytes,
        }


class Host:
    """The process that measures, kept from one task to the next: torch is imported once.

    Args:
        program: The module it runs; tests name another.
    """

    def __init__(self, program: str = "sparsec.tuning.worker") -> None:
        self.busy_with: WorkerMeasurer | None = None
        self._program = program
        self._child: _Child | None = None

    def child_for(self, measurer: WorkerMeasurer, limits: Limits) -> _Child:
        """The process, started where there is none; it is told of the measurer's task by its next request."""
        if self._child is None:
            self._child = _Child(self._program, limits)
        self.busy_with = measurer
        return self._child

    def close(self) -> None:
        """Ends the process."""
        self.busy_with = None
        if self._child is not None:
            self._child.end()
            self._child = None


class _Child:
    """The process, and the two pipes to it."""

    def __init__(self, program: str, limits: Limits) -> None:
        reading, writing = os.pipe()
        environment = data.child_environment({"OMP_NUM_THREADS": str(limits.threads)} if limits.threads else {})
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        self._process = subprocess.Popen(
            [sys.executable, "-m", program, str(writing), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            env=environment,
            pass_fds=(writing,),
            # A group of its own, so that a compiler it started ends with it, and an interrupt is for this process.
            start_new_session=True,
        )
        os.close(writing)
        self._answers = os.fdopen(reading, "rb", buffering=0)
        self._pending = b""

    def ask(self, request: Json, timeout_s: float, memory_bytes: int) -> Json | Measurement:
        assert self._process.stdin is not None
        # It may die before it reads; its end says why.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return Measurement(failure="timeout", reason=f"no answer within {timeout_s:.0f} s")
            if not select.select([self._answers], [], [], min(left_s, _WATCH_S))[0]:
                resident = self._resident_bytes()
                if resident > memory_bytes:
                    allowed_gib = memory_bytes / 2**30
                    text = f"took {resident / 2**30:.1f} GiB of memory where {allowed_gib:.1f} are allowed"
                    return Measurement(failure="launch", reason=text)
                continue
            piece = os.read(self._answers.fileno(), 1 << 16)
            if not piece:
                return Measurement(failure="launch", reason=self._end_reason())
            self._pending += piece
        line, self._pending = self._pending.split(b"\n", 1)
        answer: Json = json.loads(line)
        return answer

    def end(self) -> None:
        """Ends the process and all it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.wait()
        self._answers.close()
        self._errors.close()

    def _resident_bytes(self) -> int:
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def _end_reason(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        cause = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return f"the process {cause}" + (f": {said[-1][:200]}" if said else "")


def _finite(row: Json) -> Json:
    """Without what has no JSON number."""
    return {name: value for name, value in row.items() if value != float("inf")}


def _measurement(row: Json) -> Measurement:
    return Measurement(**{**row, "timings_us": tuple(row["timings_us"])})


# The child.


def main() -> None:
    """Answers requests from stdin until it closes."""
    _die_with(int(sys.argv[2]))
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        measurer: LocalMeasurer | None = None
        for line in sys.stdin:
            request = json.loads(line)
            if "task" in request:
                if measurer is not None:
                    measurer.close()
                measurer = _started(request["task"])
            assert measurer is not None, "the first request tells the task"
            reply = _answer(measurer, request)
            answers.write(json.dumps(reply) + "\n")
            answers.flush()
            if reply["is_leaving"]:
                return


def _started(told: Json) -> LocalMeasurer:
    import torch

    from sparsec.request import torch_device
    from sparsec.saving import load

    if told["threads"]:
        torch.set_num_threads(told["threads"])
    where = told["device"]
    if where == "cpu":
        _limit_memory(told["memory_bytes"])
    heads, batch = tuple(told["heads"]), tuple(told["batch"])
    bound = load(told["mask"]).bound
    task = Task(bound, Problem(**told["problem"]), torch_device(where), told["direction"], heads, batch)
    return LocalMeasurer(Space(task, tuple(Arm(**arm) for arm in told["arms"])), where)


def _answer(measurer: LocalMeasurer, request: Json) -> Json:
    if "measure" in request:
        found = measurer.measure(Choice.from_text(request["measure"]), Look(**request["look"]))
        # A GPU that faulted serves this process no more.
        is_leaving = found.failure == "launch"
        return {"measurement": asdict(found), "is_leaving": is_leaving}
    choices = [Choice.from_text(text) for text in request["compare"]]
    several = measurer.compare(choices, request["rounds"], request["seconds"])
    is_leaving = any(each.failure == "launch" for each in several)
    return {"measurements": [asdict(each) for each in several], "is_leaving": is_leaving}


def _limit_memory(memory_bytes: int) -> None:
    """Lets allocations beyond the limit fail here, before the machine runs out.

    What a GPU's runtime maps is not memory, so that a GPU's processes are only watched.
    """
    import resource

    # Threads' stacks and arenas are counted, though hardly touched.
    with suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes + (2 << 30), most))


def _die_with(parent: int) -> None:
    """Ends this process when its parent ends, however that happens."""
    with suppress(OSError, AttributeError):
        # PR_SET_PDEATHSIG. Source: prctl(2).
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    main()
