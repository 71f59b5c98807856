"""What `compile` knows of tuning: `sparsec.runtime.Tuner`.

This file decides which way a mode of `compile` takes. It loads little: most calls find that nothing is to be measured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sparsec.records import database
from sparsec.tuning import first_call

if TYPE_CHECKING:
    from sparsec.planner import Plan
    from sparsec.request import Request


class Tuner:
    """Measures as `compile` was told."""

    def improve(self, made: Plan, request: Request, where: str) -> bool:
        """Measures for a plan as `request.tune` says; whether the records may say better afterwards.

        A score modifier is left out of what is measured: it costs every configuration the same.
        """
        if request.tune == "auto":
            return first_call.is_welcome(made) and first_call.measure(made, where, database())
        from sparsec.tuning.tuner import Job, tune

        problem = replace(made.problem, has_score_mod=False)
        # A name of devices.yaml stands for the GPU that is here.
        here = where if where.partition(":")[0] in ("cpu", "cuda") else "cuda"
        job = Job(made.mask, problem, made.device, here, request.template, request.backend, request.reorder)
        tune(job, "quick" if request.tune == "quick" else "full")
        return True


def tuner() -> Tuner:
    return Tuner()
