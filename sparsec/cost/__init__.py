"""What a launch should take: a cost for every tile, gathered column, edge and unit of work, on any device.

This package decides the formulas and their coefficients: `cpu` and `gpu` those of a worker, this file how the costs of
workers become the time of a launch. The same costs order a schedule, choose among candidates and are told by `explain`.
It must not know how candidates are made, nor any record: a measurement, where there is one, wins over everything here.

Costs are nanoseconds on one worker (a core, a streaming multiprocessor); an `Estimate` divides them among workers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sparsec.analysis import MaskProfile
from sparsec.backends.base import Problem, Work
from sparsec.cost import cpu, gpu
from sparsec.device import Device
from sparsec.layout import BlockTiles, GatheredTiles

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one launch, or a whole plan, should take.

    Attributes:
        us: Wall time, microseconds.
        compute_us: Arithmetic and fetching of keys, spread evenly over the workers.
        idle_us: What uneven items add to that.
        memory_us: The least time in which q, k, v, out and the index arrays can be moved; `us` is never below it.
        launch_us: Starting the work.
        flops: Useful floating-point operations (4·nnz·head_dim a head where v_dim = head_dim).
    """

    us: float
    compute_us: float
    idle_us: float
    memory_us: float
    launch_us: float
    flops: float

    @property
    def limiter(self) -> str:
        """What most of the time goes to, for a person."""
        parts = {
            "moving q, k, v and out": self.memory_us if self.memory_us >= self.compute_us + self.idle_us else 0.0,
            "uneven work": self.idle_us,
            "starting the kernel": self.launch_us,
            "arithmetic and fetching keys": self.compute_us,
        }
        return max(parts, key=lambda name: parts[name])

    def __add__(self, other: Estimate) -> Estimate:
        """Two launches, one after the other."""
        return Estimate(
            self.us + other.us,
            self.compute_us + other.compute_us,
            self.idle_us + other.idle_us,
            self.memory_us + other.memory_us,
            self.launch_us + other.launch_us,
            self.flops + other.flops,
        )


class CostModel(Protocol):
    """Nanoseconds on one worker, for one head of one batch element."""

    workers: int

    def tiles(self, tiles: BlockTiles, heads: int = 1) -> FloatArray:
        """Of each tile, for so many heads that are packed into it."""
        ...

    def rough_tiles(self, profile: MaskProfile) -> float:
        """Of all tiles together, from the profile alone."""
        ...

    def columns(self, gathered: GatheredTiles, heads: int = 1) -> float:
        """Of a gathered column, on average, likewise."""
        ...

    def edge(self, span_keys: float, heads_sharing: int = 1) -> float:
        """Of a single edge whose keys are picked from among about so many, and fetched once for so many heads."""
        ...

    def unit(self, block_q: int, *, is_rows: bool, is_scattered: bool = False) -> float:
        """Of taking up and writing out a block of queries, which may be scattered over the sequence."""
        ...


@cache
def model_digest(key: str) -> str:
    """Of the model of the devices with this key: factors that were measured of another are not comparable."""
    path = Path(__file__).with_name("cpu.py" if key.startswith("cpu-") else "gpu.py")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def cost_model(problem: Problem, device: Device) -> CostModel:
    """The costs of a problem on a device, by its own calibration where it has one."""
    model: CostModel = cpu.CpuModel(problem, device) if device.kind == "cpu" else gpu.GpuModel(problem, device)
    if not device.factors:
        return model
    return _Calibrated(model, device.factor(f"tiles_{problem.dtype}"), device.factor(f"rows_{problem.dtype}"))


class _Calibrated:
    """A model times what was measured over what it estimated: for tiles and for single edges."""

    def __init__(self, model: CostModel, tiles: float, rows: float) -> None:
        self.workers = model.workers
        self._model, self._tiles, self._rows = model, tiles, rows

    def tiles(self, tiles: BlockTiles, heads: int = 1) -> FloatArray:
        costs: FloatArray = self._model.tiles(tiles, heads) * np.float32(self._tiles)
        return costs

    def rough_tiles(self, profile: MaskProfile) -> float:
        return self._model.rough_tiles(profile) * self._tiles

    def columns(self, gathered: GatheredTiles, heads: int = 1) -> float:
        return self._model.columns(gathered, heads) * self._tiles

    def edge(self, span_keys: float, heads_sharing: int = 1) -> float:
        return self._model.edge(span_keys, heads_sharing) * self._rows

    def unit(self, block_q: int, *, is_rows: bool, is_scattered: bool = False) -> float:
        factor = self._rows if is_rows else self._tiles
        return self._model.unit(block_q, is_rows=is_rows, is_scattered=is_scattered) * factor


def estimate(work: Work, problem: Problem, device: Device, heads: int) -> Estimate:
    """What a launch over `work` should take, for so many heads of every batch element."""
    busy_us = float(work.schedule.cost.sum(dtype=np.float64)) * work.schedule.copies * 1e-3
    workers = cost_model(problem, device).workers
    compute_us = busy_us / workers
    idle_us = compute_us * (work.schedule.balance(workers) - 1.0)
    memory_us = (problem.tensor_bytes * heads / problem.q_heads + work.nbytes) / device.memory_bandwidth * 1e6
    us = max(compute_us + idle_us, memory_us) + device.launch_us
    flops = problem.flops(work.bound.nnz) * heads / problem.q_heads
    return Estimate(us, compute_us, idle_us, memory_us, device.launch_us, flops)


def dense_estimate(problem: Problem, device: Device, share: float) -> Estimate:
    """What torch's own attention should take on a `share` of all pairs (1 full, ½ causal).

    Source: on 2 cores of a Zen 4 processor torch 2.13's SDPA reaches 68 % of the fp32 and 34 % of the bf16 peak, and
    takes up every key of every query head in about 1.4 cycles a dimension besides, which one query bears alone; on an
    H200 its best back end reaches about two thirds of the matrix peak.
    """
    matrix = device.matrix_flops.get(problem.dtype, device.vector_flops)
    if device.kind == "cpu":
        rate = 0.68 * device.vector_flops if problem.dtype == "fp32" else 0.34 * matrix
    else:
        rate = 0.66 * matrix
    flops = problem.flops(problem.q_len * problem.kv_len) * share
    compute_us = flops / rate * 1e6
    if device.kind == "cpu":
        dims = problem.batch * problem.q_heads * problem.kv_len * (problem.head_dim + problem.v_dim)
        compute_us += dims * _DENSE_KEY_CYCLES / (device.clock_hz * device.units) * 1e6
    memory_us = problem.tensor_bytes / device.memory_bandwidth * 1e6
    launch_us = device.launch_us
    return Estimate(max(compute_us, memory_us) + launch_us, compute_us, 0.0, memory_us, launch_us, flops)


# What torch's own attention takes on a CPU to take up a key, per dimension.
_DENSE_KEY_CYCLES = 1.4
