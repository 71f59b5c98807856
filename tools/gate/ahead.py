"""Kernels of tasks compiled ahead on the other cores; the process that checks and times finds them in the caches.

This file decides how many processes compile, and that they launch nothing. What goes wrong in them is left to the task
itself to find out. Without a GPU, tasks can be rehearsed for one by name: the same calls, which only compile.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any

from sparsec.device import Device, detect_gpu

# The longest that a task waits for its kernels; then it compiles them itself.
LIMIT_S = 90.0
# Each process takes up torch and the device for itself, about half a GiB of its memory.
MOST_PROCESSES = 12


class Ahead:
    """The compiling of some tasks, in their order; `with` ends it."""

    def __init__(self, attempt: Callable[[str], None], keys: Iterable[str], processes: int | None = None) -> None:
        # One core is for the process that waits, one for what it waits for.
        n = min(MOST_PROCESSES, len(os.sched_getaffinity(0)) - 2) if processes is None else processes
        keys = list(keys)
        self._futures: dict[str, Future[None]] = {}
        self._executor = None
        if n > 0 and keys:
            self._executor = ProcessPoolExecutor(min(n, len(keys)), multiprocessing.get_context("spawn"))
            self._futures = {key: self._executor.submit(attempt, key) for key in keys}

    def wait(self, key: str) -> None:
        """Returns when the kernels of a task are compiled, or will not be."""
        if key in self._futures:
            wait([self._futures[key]], LIMIT_S)

    def wait_for_all(self) -> None:
        """Returns when the cores are free, so that nothing disturbs what is timed."""
        wait(self._futures.values(), LIMIT_S)
        self.end()

    def end(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


Tasks = Callable[[Device], Iterator[tuple[str, Callable[[], Any]]]]
_tasks: dict[str, dict[str, Callable[[], Any]]] = {}


def compile_for(tasks: Tasks, key: str) -> None:
    """Goes through a task with launches that only compile."""
    if not _tasks:
        only_compile()
    name = f"{tasks.__module__}.{tasks.__qualname__}"
    if name not in _tasks:
        _tasks[name] = dict(tasks(detect_gpu()))
    # A check of what no kernel has written fails.
    with contextlib.suppress(Exception):
        _tasks[name][key]()


class _CompilingMachine:
    """Stands where the CUDA driver stands, and compiles what it is to start."""

    def run(self, program: Any, *_: object) -> None:
        from sparsec.backends import cuda_compile

        cuda_compile.cubin(program)


def only_compile() -> None:
    """From here on, this process launches no kernel of ours: where it would, it compiles it."""
    from sparsec import gate
    from sparsec.backends import cuda

    gate.ensure = lambda *_: None
    cuda.machine = _CompilingMachine
    with contextlib.suppress(ImportError):
        from triton.runtime.jit import JITFunction

        run = JITFunction.run

        def compiled(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
            return run(kernel, *arguments, grid=grid, warmup=True, **named)

        JITFunction.run = compiled


class _NamedDriver:
    """Stands where Triton asks its driver what is here: a device by name, of which only the compiler hears."""

    def __init__(self, device: Device) -> None:
        from triton.backends.compiler import GPUTarget

        is_nvidia = device.kind == "nvidia"
        self._target = GPUTarget("cuda", int(device.arch[3:]), 32) if is_nvidia else GPUTarget("hip", device.arch, 64)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object) -> int:
        return 0


def rehearsed(task: Callable[[], Any]) -> str | None:
    """What goes wrong with a task whose launches only compile, or None.

    That nothing was written is what its check must find: buffers are full of NaN.
    """
    try:
        task()
    except AssertionError as error:
        return None if "is off by nan" in str(error) else str(error)
    except Exception as error:  # whatever would stop it on the device too
        return f"{type(error).__name__}: {error}"
    return "nothing was launched, and its check found nothing wrong"


def pretend_device(device: Device) -> None:
    """From here on, Triton compiles for a device that is not here."""
    from triton.runtime import driver

    driver.set_active(_NamedDriver(device))
