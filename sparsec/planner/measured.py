"""What the records say of a candidate, and how measured and estimated times are compared.

This file decides which candidates take their configuration and their time from records. Where a few candidates were
measured and others were not, the others' estimates are scaled by what the measured ones took over their own estimates.
It must not know how candidates are made, nor how records are kept.
"""

from __future__ import annotations

from functools import cache
from statistics import median

from sparsec.analysis import MaskProfile
from sparsec.backends.base import Problem, backend
from sparsec.device import Device
from sparsec.errors import BackendMissingError
from sparsec.layout import Ordering
from sparsec.planner.shortlist import shortlist
from sparsec.records import Direction, RecordBase, RecordKey, Served, Workload
from sparsec.template import Config, Template


class Measured:
    """The records, as far as they speak of one mask and problem on one device.

    Args:
        problem: The shape.
        device: What is planned for.
        n_heads: Query heads that share the mask.
        n_batch: Batch elements that share it.
        base: The records; None to go by the cost model alone.
    """

    def __init__(self, problem: Problem, device: Device, n_heads: int, n_batch: int, base: RecordBase | None) -> None:
        self._problem, self._device, self._n_heads, self._n_batch = problem, device, n_heads, n_batch
        # A user without records pays for one look at a directory.
        self._base = base if base is not None and base.knows(device.key) else None
        self._ratios: list[float] = []

    def served(
        self,
        each: Template,
        backend_name: str,
        profile: MaskProfile,
        ordering: Ordering,
        direction: Direction = "forward",
    ) -> Served | None:
        """What the records would have run, or None."""
        if self._base is None:
            return None

        server = backend(backend_name)

        def is_allowed(config: Config) -> bool:
            return server.config_refusal(each, config, self._problem, self._device) is None

        return self._base.lookup(
            RecordKey.of(each, backend_name, self._problem, self._device, direction),
            self._workload(profile, ordering),
            toolchain=_toolchain(backend_name),
            default=next(iter(shortlist(each, backend_name, self._problem, self._device)[0]), None),
            is_allowed=is_allowed,
        )

    def us(self, served: Served | None, profile: MaskProfile, ordering: Ordering) -> float | None:
        """What it should take by the records; None where they are not near enough to say."""
        return None if served is None else served.us_on(self._workload(profile, ordering))

    def note(self, measured_us: float, estimated_us: float) -> None:
        """Learns from a candidate that has both."""
        self._ratios.append(measured_us / estimated_us)

    @property
    def scale(self) -> float:
        """What an estimate is to be multiplied by, to be compared with measurements; 1 where there are none."""
        return median(self._ratios) if self._ratios else 1.0

    def _workload(self, profile: MaskProfile, ordering: Ordering) -> Workload:
        return Workload.of(
            profile,
            heads=self._n_heads,
            batch=self._n_batch,
            ordering=ordering.name if ordering.nbytes else "",
            has_score_mod=self._problem.has_score_mod,
        )


@cache
def _toolchain(backend_name: str) -> str | None:
    """The toolchain at hand; None where there is none, or where asking would load torch."""
    if backend_name == "torch":
        return None
    try:
        return backend(backend_name).toolchain()
    except BackendMissingError:
        return None
