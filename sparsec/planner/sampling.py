"""What a candidate should take, from a sample of the rows: index arrays of millions of tiles are not built in vain.

This file decides for which candidates a sample comes first, how large it is, and how its cost is scaled up. The cost is
that of the same index arrays, built of the sampled rows alone. It must not know which candidate wins.
"""

from __future__ import annotations

import numpy as np

from sparsec.analysis import UNIT, MaskProfile, n_units, sample_runs, units_of
from sparsec.backends.base import Problem
from sparsec.cost import cost_model
from sparsec.device import Device
from sparsec.layout import Ordering
from sparsec.masks.mask import BoundMask
from sparsec.planner.works import build_work, span_of
from sparsec.template import Config, Template

# Index arrays of fewer tiles, edges to sort, or ranges of keys are built at once: in some 50 ms on one core.
_MANY_TILES, _MANY_EDGES, _MANY_RANGES = 1 << 16, 1 << 19, 1 << 21
# Edges of a sample, about; and the units of rows it has at least.
_SAMPLE_EDGES, _LEAST_UNITS = 1 << 18, 12


def is_long_to_build(each: Template, profile: MaskProfile) -> bool:
    """Whether a template's index arrays take long enough for a sample to pay."""
    if each.layout == "hybrid":
        return profile.nnz >= _MANY_EDGES
    if each.layout == "rows":
        return not profile.is_toeplitz and profile.nnz >= _MANY_RANGES * profile.keys_per_range
    return each.layout == "tiles" and profile.fill(64).n_tiles >= _MANY_TILES


class Sample:
    """Evenly spread rows of a mask in some order of tokens, and its heavy rows besides."""

    def __init__(self, bound: BoundMask, profile: MaskProfile, ordering: Ordering) -> None:
        self._ordering, self._span = ordering, span_of(profile)
        wanted = max(_LEAST_UNITS, int(_SAMPLE_EDGES / (UNIT * max(profile.q.mean, 1.0))))
        runs = sample_runs(n_units(bound), wanted, units_of(profile.q.heavy))
        self._parts = [
            (bound[slice(*run.rows(bound)), 0 : bound.kv_len], run.weight * run.length * UNIT) for run in runs
        ]

    def us(self, each: Template, config: Config, problem: Problem, device: Device, heads: int) -> float:
        """Microseconds for so many heads of every batch element, idle workers and index arrays left out."""
        if each.layout == "rows" and config.get("block_q", 0) > UNIT:
            # A sampled run would be a short block, at the cost of a whole one.
            config = Config.of(**{**config.to_dict(), "block_q": UNIT})
        ns = 0.0
        for part, stands_for in self._parts:
            work = build_work(
                each,
                config,
                part,
                problem,
                device,
                heads=heads,
                ordering=self._ordering,
                span_keys=self._span,
                is_sample=True,
            )
            ns += float(work.schedule.cost.sum(dtype=np.float64)) * work.schedule.copies * stands_for / part.q_len
        compute_us = ns / cost_model(problem, device).workers * 1e-3
        memory_us = problem.tensor_bytes * heads / problem.q_heads / device.memory_bandwidth * 1e6
        return max(compute_us, memory_us) + device.launch_us
