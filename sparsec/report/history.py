"""What has been measured of a mask on a device, in the order it was.

This file decides which records belong to a plan: those of the same device, dtype and dimensions whose launch walked as
many edges between as many tokens. It must not know how they are drawn.
"""

from __future__ import annotations

from typing import Any

from sparsec.planner import Plan
from sparsec.records import database

# The latest measurements that are shown.
_MOST = 600


def history(made: Plan) -> list[dict[str, Any]]:  # Any: JSON values
    """`what`, `us` (None where it failed), `failure`, `date` and `isBest` of each measurement."""
    problem = made.problem
    edges = {step.launch.work.bound.nnz for step in made.steps} | {group.bound.nnz for group in made.groups}
    wanted = (problem.dtype, problem.head_dim, problem.v_dim, problem.group, "forward")
    found = [
        record
        for record in database().records(made.device.key)
        if (record.key.dtype, record.key.head_dim, record.key.v_dim, record.key.group, record.key.direction) == wanted
        and (record.workload.q_len, record.workload.kv_len) == (problem.q_len, problem.kv_len)
        and record.workload.nnz in edges
    ]
    found = sorted(found, key=lambda record: record.date)[-_MOST:]
    best = min((record.median_us for record in found), default=0.0)
    return [
        {
            "what": f"{record.key.template} on {record.key.backend} ({record.config})",
            "us": record.median_us if record.timings_us else None,
            "failure": record.failure,
            "date": record.date,
            "isBest": record.median_us == best,
        }
        for record in found
    ]
