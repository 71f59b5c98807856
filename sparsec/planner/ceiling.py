"""How near a plan comes to what its device could do at best.

This file decides what the best is: all useful arithmetic at the device's matrix rate, or q, k, v and out moved once at
its memory bandwidth, whichever takes longer. It must not know how an estimate is made.

Source: S. Williams, A. Waterman and D. Patterson, "Roofline: an insightful visual performance model for multicore
architectures", Commun. ACM 52 (2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparsec.backends.base import Problem
from sparsec.device import Device
from sparsec.planner.plans import Group, Plan, Step
from sparsec.planner.words import duration, rate


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The least time that a device's ceilings allow.

    Attributes:
        us: That time, microseconds.
        bound: Which ceiling it is.
        flops_per_s: The device's matrix rate in the problem's dtype.
        bytes_per_s: Its memory bandwidth.
        intensity: Useful operations for each byte of q, k, v and out.
        share: `us` over what the plan should take, by records where they say, 0 … 1.
    """

    us: float
    bound: Literal["arithmetic", "memory"]
    flops_per_s: float
    bytes_per_s: float
    intensity: float
    share: float


def ceiling(plan: Plan) -> Ceiling:
    """The ceiling of a plan, and how near its estimate comes."""
    flops = sum(plan.problem.flops(group.profile.nnz) * _copies_share(group, plan.problem) for group in plan.groups)
    n_bytes = plan.problem.tensor_bytes
    rate = matrix_rate(plan.problem, plan.device)
    arithmetic_us = flops / rate * 1e6
    memory_us = n_bytes / plan.device.memory_bandwidth * 1e6
    least_us = max(arithmetic_us, memory_us)
    return Ceiling(
        us=least_us,
        bound="arithmetic" if arithmetic_us >= memory_us else "memory",
        flops_per_s=rate,
        bytes_per_s=plan.device.memory_bandwidth,
        intensity=flops / n_bytes,
        share=min(1.0, least_us / plan.us),
    )


def matrix_rate(problem: Problem, device: Device) -> float:
    """Operations a second of the device's matrix units in the problem's dtype."""
    return device.matrix_flops.get(problem.dtype, device.vector_flops)


def tile_fill(steps: Sequence[Step]) -> float | None:
    """The share of useful pairs in the contiguous tiles of some steps, 0 … 1; None where they have none."""
    edges = pairs = 0
    for step in steps:
        tiles = step.launch.work.tiles
        if tiles is not None:
            copies, tile_map = len(step.launch.heads) * len(step.launch.batch), tiles.tile_map
            edges += copies * tile_map.nnz
            pairs += copies * tile_map.n_tiles * tile_map.block_q * tile_map.block_kv
    return edges / pairs if pairs else None


def _copies_share(group: Group, problem: Problem) -> float:
    return len(group.heads) * len(group.batch) / (problem.q_heads * problem.batch)


def ceiling_words(plan: Plan) -> str:
    """The least time that the device allows, and how near the plan comes."""
    roof = ceiling(plan)
    what = (
        f"all useful arithmetic at {rate(roof.flops_per_s * 1e-9)}"
        if roof.bound == "arithmetic"
        else f"q, k, v and out moved once at {roof.bytes_per_s / 1e9:,.0f} GB/s"
    )
    return f"{duration(roof.us)}, {what}; the plan reaches {roof.share:.0%} of that"
