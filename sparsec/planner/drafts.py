"""Candidates while the search weighs them: `Arm`, a kernel and an order of tokens; `Draft`, launches with index arrays.

This file decides what such a candidate is known by, how simple it is, and what it should take where some of its
launches were measured and others estimated. It must not know which candidates there are, nor which wins.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.analysis import MaskProfile
from sparsec.backends.base import Work
from sparsec.cost import Estimate
from sparsec.layout import Ordering
from sparsec.masks.mask import BoundMask
from sparsec.planner.plans import COST_MODEL, Candidate
from sparsec.records import Served
from sparsec.template import Config, Template

# Where two candidates cannot be told apart, the one that comes first is taken.
SIMPLEST = ("block_sparse", "row_traversal", "hybrid", "dense")


@dataclass(frozen=True, slots=True)
class Arm:
    """A kernel that can serve the mask, and the order of tokens it walks."""

    template: Template
    backend: str
    ordering: Ordering
    bound: BoundMask
    profile: MaskProfile

    @property
    def kernel(self) -> tuple[str, str, str]:
        return self.template.name, self.backend, self.ordering.name


@dataclass(frozen=True, slots=True)
class Part:
    """One launch of a draft."""

    template: Template
    backend: str
    config: Config
    profile: MaskProfile
    work: Work
    edges: str
    estimate: Estimate
    served: Served | None = None
    measured_us: float | None = None

    @property
    def kernel(self) -> tuple[str, str, str]:
        """Template, back end and order of tokens."""
        return self.template.name, self.backend, self.work.ordering.name

    @property
    def config_source(self) -> str:
        return COST_MODEL if self.served is None else str(self.served)


@dataclass(frozen=True, slots=True)
class Draft:
    """A candidate with its index arrays: one or more launches."""

    parts: tuple[Part, ...]
    is_joined: bool
    estimate: Estimate

    @property
    def rank(self) -> tuple[int, int, int]:
        """Simplest first."""
        first = self.parts[0]
        return len(self.parts), int(first.work.ordering.q_order is not None), SIMPLEST.index(first.template.name)

    @property
    def is_reordered(self) -> bool:
        return any(part.work.ordering.q_order is not None for part in self.parts)

    @property
    def is_measured(self) -> bool:
        return any(part.measured_us is not None for part in self.parts)

    @property
    def config_source(self) -> str:
        """Of each launch, once."""
        return "; ".join(dict.fromkeys(part.config_source for part in self.parts))

    def us(self, scale: float) -> float:
        """What it should take: measured where records say, estimated times `scale` elsewhere."""
        measured = [part for part in self.parts if part.measured_us is not None]
        rest = self.estimate.us - sum(part.estimate.us for part in measured)
        return sum(part.measured_us or 0.0 for part in measured) + scale * rest

    def candidate(self, scale: float) -> Candidate:
        first = self.parts[0]
        names = " + ".join(dict.fromkeys(part.template.name for part in self.parts))
        orders = " + ".join(dict.fromkeys(part.work.ordering.name for part in self.parts))
        layout_bytes = sum(part.work.nbytes for part in self.parts)
        return Candidate(
            names,
            first.backend,
            first.config,
            orders,
            self.estimate,
            self.us(scale),
            layout_bytes,
            self.config_source,
        )
