"""How time and memory are measured, on a CPU and on a GPU.

This file decides warm-up, interleaving, repeats and statistics, and what a cold and a warm cache are on a GPU. It must
not know what is called.
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
from typing import Protocol

from bench.grid import Effort
from bench.results import Timing
from sparsec.device import Device

_WARM_UPS = 2
# What the name of times with a warm cache ends with.
WARM = " warm"

Announce = Callable[[str, str], None]
Call = Callable[[], object]
Clock = Callable[[Call], int]  # calls, and returns nanoseconds


def timed_ns(call: Call) -> int:
    """Nanoseconds of one call; what it returns is freed outside the time."""
    started = time.perf_counter_ns()
    result = call()
    took = time.perf_counter_ns() - started
    del result
    return took


# On a CPU, each call finds the caches as the one before has left them.
CPU_CLOCKS: Mapping[str, Clock] = {"": timed_ns}


class DeviceClock:
    """Times on a GPU, by events of the device; when a time is returned, all work is done."""

    def __init__(self, device: Device) -> None:
        import torch

        # Larger than the last cache by far: nothing of what was there is left.
        n_bytes = max(2**28, 4 * max(device.l2_bytes, device.l3_bytes))
        self._flush = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")

    @property
    def clocks(self) -> Mapping[str, Clock]:
        return {"": self.cold_ns, WARM: self.warm_ns}

    def cold_ns(self, call: Call) -> int:
        """Nanoseconds of one call that finds nothing of its own in the L2."""
        self._flush.zero_()
        return between_events_ns(call)

    def warm_ns(self, call: Call) -> int:
        """Nanoseconds of one call that follows the same call."""
        call()
        return between_events_ns(call)


# About a millisecond: longer than Python takes to launch anything that is measured here.
_BUSY_CYCLES = 2_000_000


def between_events_ns(call: Call) -> int:
    """Nanoseconds on the device, which is kept busy while Python launches the call."""
    import torch

    torch.cuda._sleep(_BUSY_CYCLES)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call()
    stop.record()
    stop.synchronize()
    del result
    return round(start.elapsed_time(stop) * 1e6)


def interleaved(
    calls: Mapping[str, Call], effort: Effort, announce: Announce, clocks: Mapping[str, Clock] = CPU_CLOCKS
) -> dict[str, Timing]:
    """Every round calls each once, in a shuffled order of its own: what is called before leaves its data in the caches.

    Args:
        calls: What to time, by name.
        effort: How long.
        announce: Told the name and `"call"` before each call, so that a hang has a name.
        clocks: How each is timed, by what the name of the result ends with.
    """
    for name, call in calls.items():
        announce(name, "call")
        for clock in clocks.values():
            for _ in range(_WARM_UPS):
                clock(call)
    samples: dict[str, list[int]] = {name + ending: [] for name in calls for ending in clocks}
    budget_ns = effort.seconds * len(calls) * 1e9
    spent_ns = 0
    for round_number in range(effort.max_repeats):
        if round_number >= effort.min_repeats and spent_ns >= budget_ns:
            break
        for name in random.Random(round_number).sample(list(calls), len(calls)):
            announce(name, "call")
            for ending, clock in clocks.items():
                took = clock(calls[name])
                samples[name + ending].append(took)
                spent_ns += took
    return {name: timing([ns / 1e3 for ns in taken]) for name, taken in samples.items()}


def timing(samples_us: list[float]) -> Timing:
    """Median, quartiles (of the samples themselves, none invented outside them) and the least."""
    q25, median, q75 = (
        statistics.quantiles(samples_us, n=4, method="inclusive") if len(samples_us) > 1 else samples_us * 3
    )
    return Timing(round(median, 3), round(q25, 3), round(q75, 3), round(min(samples_us), 3), len(samples_us))


class Peak(Protocol):
    """The highest use of memory since this was made."""

    def bytes(self) -> int | None: ...


def peak_memory(device: str) -> Peak:
    """Of this process on a CPU, of the device's memory on a GPU."""
    return PeakMemory() if device == "cpu" else DevicePeakMemory()


class DevicePeakMemory:
    """Bytes that torch gave out on the GPU beyond those before, at the highest, since this was made."""

    def __init__(self) -> None:
        import torch

        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def bytes(self) -> int:
        import torch

        return max(0, torch.cuda.max_memory_allocated() - self._before)


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


def available_bytes(device: str = "cpu") -> int:
    """What this process may still allocate: free memory, or less where it was limited; for a GPU, in both memories."""
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()
        on_device: int = torch.cuda.mem_get_info()[0]
        return min(on_device, available_bytes())
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    used = _status_bytes("VmData")
    return free if limit == resource.RLIM_INFINITY or used is None else min(free, max(0, limit - used))


def device_answers() -> bool:
    """Whether the GPU still does what it is told: after a bad access this process can use it no more."""
    import torch

    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1.0)
    except RuntimeError:
        return False


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
