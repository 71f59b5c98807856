"""How time and memory are measured.

This file decides warm-up, interleaving, repeats and statistics. It must not know what is called.
"""

from __future__ import annotations

import ctypes
import gc
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from bench.grid import Effort
from bench.results import Timing

_WARM_UPS = 2

Announce = Callable[[str, str], None]


def interleaved(calls: Mapping[str, Callable[[], object]], effort: Effort, announce: Announce) -> dict[str, Timing]:
    """Every round calls each once, in a shuffled order of its own: what is called before leaves its data in the caches.

    Args:
        calls: What to time, by name.
        effort: How long.
        announce: Told the name and `"call"` before each call, so that a hang has a name.
    """
    for name, call in calls.items():
        announce(name, "call")
        for _ in range(_WARM_UPS):
            call()
    samples: dict[str, list[int]] = {name: [] for name in calls}
    budget_ns = effort.seconds * len(calls) * 1e9
    spent_ns = 0
    for round_number in range(effort.max_repeats):
        if round_number >= effort.min_repeats and spent_ns >= budget_ns:
            break
        for name in random.Random(round_number).sample(list(calls), len(calls)):
            announce(name, "call")
            took = timed_ns(calls[name])
            samples[name].append(took)
            spent_ns += took
    return {name: timing([ns / 1e3 for ns in taken]) for name, taken in samples.items()}


def timed_ns(call: Callable[[], object]) -> int:
    """Nanoseconds of one call; what it returns is freed outside the time."""
    started = time.perf_counter_ns()
    result = call()
    took = time.perf_counter_ns() - started
    del result
    return took


def timing(samples_us: list[float]) -> Timing:
    """Median, quartiles (of the samples themselves, none invented outside them) and the least."""
    q25, median, q75 = (
        statistics.quantiles(samples_us, n=4, method="inclusive") if len(samples_us) > 1 else samples_us * 3
    )
    return Timing(round(median, 3), round(q25, 3), round(q75, 3), round(min(samples_us), 3), len(samples_us))


class PeakMemory:
    """Bytes this process grew by, at the highest, since this was made; None where the system cannot tell."""

    def __init__(self) -> None:
        self._before: int | None = None
        _give_back()
        try:
            # Sets the mark of the highest resident size back to the present one. Source: proc_pid_clear_refs(5).
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status_bytes("VmRSS")
        except OSError:
            return

    def bytes(self) -> int | None:
        highest = _status_bytes("VmHWM")
        return None if self._before is None or highest is None else max(0, highest - self._before)


def _give_back() -> None:
    """Returns freed memory to the system: what is taken from the allocator's stock would not be seen."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes() -> int:
    """What this process may still allocate: free memory, or less where it was limited."""
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    used = _status_bytes("VmData")
    return free if limit == resource.RLIM_INFINITY or used is None else min(free, max(0, limit - used))


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
