"""`tune="auto"`: what a first call measures by itself, so that nobody has to ask for it.

A user who calls a compiled attention for the first time wants the answer now, and the next thousand answers a little
sooner. So this measures only what cannot be felt:

- only where no record is near: once per machine and kind of mask, and then it is remembered;
- only configurations of the kernel that was chosen, whose parameters the compiled binary takes at run time. On a GPU
  each configuration is a compilation of seconds, which belongs in `sparsec tune`;
- only for calls long enough to matter, and short enough that some tens of them take about a second;
- only with the scale that records speak of, and without a score modifier: results are checked against plain attention;
- never in a distributed job, where ranks must not differ; nor while a graph is captured or a call is traced.

This file decides that. Results are checked as in every search, and near-ties go to the default.
"""

from __future__ import annotations

import logging
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Final

from sparsec import data
from sparsec.planner import Plan
from sparsec.planner.plans import COST_MODEL
from sparsec.records import NEAR_TIE, RecordBase
from sparsec.template import template

if TYPE_CHECKING:
    from types import ModuleType

    from sparsec.tuning.measure import Measurer
    from sparsec.tuning.space import Choice, Space

logger = logging.getLogger(__name__)

# Calls that take less are left alone, and so are those of which a contest would take seconds; of the rest so many are
# spent, up to a second.
_LEAST_US: Final = 2_000.0
_MOST_US: Final = 40_000.0
_CALLS: Final = 15
_MOST_S: Final = 1.0


def is_welcome(made: Plan) -> bool:
    """Whether a first call of this plan may measure."""
    if made.device.kind != "cpu" or any(group.config_source != COST_MODEL for group in made.groups):
        return False
    if len(made.groups) != 1 or len(made.steps) != 1:
        return False
    launch = made.steps[0].launch
    if launch.score is not None or launch.scale != made.problem.head_dim**-0.5:
        return False
    if not _LEAST_US <= made.estimate.us <= _MOST_US:
        return False
    return not (data.is_distributed_job() or _is_distributed(sys.modules.get("torch")) or _is_traced())


def measure(made: Plan, where: str, base: RecordBase) -> bool:
    """Measures a short list in this process, and remembers it; whether something was better than the plan."""
    from sparsec.tuning.measure import LocalMeasurer
    from sparsec.tuning.space import Space, Task

    deadline = time.monotonic() + min(_MOST_S, _CALLS * made.estimate.us * 1e-6)
    group = made.groups[0]
    space = Space(Task(group.bound, made.problem, made.device, heads=group.heads, batch=group.batch), group=group)
    choices = short_list(space)
    if len(choices) < 2:
        return False
    with closing(LocalMeasurer(space, where, n_rows=8)) as measurer:
        return _contest(space, choices, measurer, deadline, base)


def short_list(space: Space) -> list[Choice]:
    """The default, its template's, and what is one step away from either."""
    from sparsec.tuning.space import Choice

    default = space.default
    if default.arm.is_mixture or not space.tunables(default.arm):
        return [default]
    own = Choice(default.arm, template(default.arm.template).default(default.arm.backend))
    return list(dict.fromkeys([default, own, *space.neighbours(default), *space.neighbours(own)]))


def _contest(space: Space, choices: Sequence[Choice], measurer: Measurer, deadline: float, base: RecordBase) -> bool:
    """Those there is time for, in turns; whether the default lost."""
    from sparsec.tuning.measure import Look, Measurement
    from sparsec.tuning.recording import Recorder

    recorder = Recorder(space, base)
    took: dict[Choice, Measurement] = {}
    for choice in choices:
        # The default and its template's own are what records compare with.
        if len(took) >= 2 and time.monotonic() > deadline:
            break
        took[choice] = measurer.measure(choice, Look(runs=2, seconds=0.0))
        if took[choice].failure is not None:
            recorder.tried(choice, took[choice])
    able = sorted((choice for choice in took if took[choice].timings_us), key=lambda choice: took[choice].us)
    finalists = list(dict.fromkeys([*(choice for choice in choices[:2] if choice in able), *able[:2]]))
    if len(finalists) < 2 or finalists[0] != space.default:
        return False
    found = measurer.compare(finalists, 7, max(deadline - time.monotonic(), 0.05))
    finals = dict(zip(finalists, found, strict=True))
    recorder.contested(uuid.uuid4().hex[:12], finals)
    best = min(finals, key=lambda choice: finals[choice].us)
    logger.debug("the first call measured %d configurations of %s; best: %s", len(took), space.default.arm, best)
    return finals[best].us * NEAR_TIE < finals[space.default].us


# Of a torch that is loaded: none is imported for this.
def _is_distributed(torch: ModuleType | None) -> bool:
    distributed = getattr(torch, "distributed", None)
    return bool(distributed is not None and distributed.is_available() and distributed.is_initialized())


def _is_traced() -> bool:
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    is_captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return bool(torch.compiler.is_compiling() or is_captured)
