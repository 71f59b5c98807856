"""Plans: what was chosen for a mask on a device, what else was considered, and why each refusal.

This file decides what a plan says, as text and as a dictionary. It must not know how the choice is made.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Final, Literal

from sparsec.analysis import MaskProfile, analyse
from sparsec.backends.base import Launch, Problem
from sparsec.cost import Estimate
from sparsec.device import Device
from sparsec.masks.mask import BoundMask
from sparsec.planner.works import IDENTITY
from sparsec.records import RecordBase
from sparsec.score import ScoreMod
from sparsec.template import Config

PLAN_SCHEMA = 1

Reorder = Literal["auto", "off", "force"]
# What a plan goes by; it never measures.
PlanTune = Literal["off", "cached"]

# Where a configuration comes from that no record speaks for.
COST_MODEL: Final = "cost model"


@dataclass(frozen=True, slots=True)
class Asked:
    """What `plan` was told besides mask, problem and device; as there."""

    template: str | None = None
    backend: str | None = None
    reorder: Reorder = "auto"
    scale: float | None = None
    score: ScoreMod | None = None
    tune: PlanTune = "cached"
    records: RecordBase | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that was not considered further, and why."""

    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that could run, with what it should take.

    Attributes:
        template: Its name, or several joined by `+` for a mixed plan.
        backend: Whose kernel.
        config: Launch parameters of its first launch.
        ordering: The order of tokens.
        estimate: From the cost model; None where a rough figure was enough to pass over it.
        us: What it was compared by: measured where records say, else estimated.
        layout_bytes: Of its index arrays; 0 where they were not built.
        config_source: Where the configuration came from.
    """

    template: str
    backend: str
    config: Config
    ordering: str
    estimate: Estimate | None
    us: float
    layout_bytes: int
    config_source: str = COST_MODEL

    def __str__(self) -> str:
        order = "" if self.ordering == IDENTITY.name else f", {self.ordering}"
        settings = f"{self.config}{order}" if self.config.items else order.removeprefix(", ")
        return f"{self.template} on {self.backend}" + (f" ({settings})" if settings else "")


@dataclass(frozen=True, slots=True)
class Step:
    """One launch of a plan.

    Attributes:
        launch: What a back end is given.
        edges: Which edges it does, for a person.
        estimate: What it should take.
        config_source: Where the configuration came from.
    """

    launch: Launch
    edges: str
    estimate: Estimate
    config_source: str = COST_MODEL


@dataclass(frozen=True, slots=True)
class Group:
    """The steps of heads and batch elements that share one mask.

    Attributes:
        bound: Their mask, in the tokens' own order.
        heads: Which query heads.
        batch: Which batch elements.
        is_whole_batch: Whether every batch element is in it, however many there will be.
        known_profile: What their mask looks like, where planning found out.
        steps: Run one after the other. More than one is either joined by log-sum-exp (all partial), or each writes rows
            of its own and later ones overwrite earlier ones.
        estimate: Of all steps.
        config_source: Where the configurations of the steps came from.
        alternatives: Other candidates, cheapest first.
        refusals: What could not run, and why.
        expected_us: What records say it takes, in part or in full; None where the estimate is all there is.
        backward: The launches of the backward pass where records name better ones than the steps' own.
        backward_source: Where those came from; "" where there are none.
    """

    bound: BoundMask
    heads: tuple[int, ...]
    batch: tuple[int, ...]
    is_whole_batch: bool
    known_profile: MaskProfile | None
    steps: tuple[Step, ...]
    estimate: Estimate
    config_source: str
    alternatives: tuple[Candidate, ...]
    refusals: tuple[Refusal, ...]
    expected_us: float | None = None
    backward: tuple[Launch, ...] | None = None
    backward_source: str = ""

    @property
    def backward_launches(self) -> tuple[Launch, ...]:
        """The launches of the backward pass: joined where the forward ones are."""
        return self.backward or tuple(step.launch for step in self.steps)

    @property
    def us(self) -> float:
        """What it should take: by records where they say, else by the cost model."""
        return self.estimate.us if self.expected_us is None else self.expected_us

    @property
    def profile(self) -> MaskProfile:
        """What their mask looks like."""
        return _profile(self.bound) if self.known_profile is None else self.known_profile

    @property
    def is_joined(self) -> bool:
        """Whether the steps' results are joined by log-sum-exp."""
        return any(step.launch.is_partial for step in self.steps)

    @property
    def layout_bytes(self) -> int:
        return sum(step.launch.work.nbytes for step in self.steps)


@lru_cache(maxsize=16)
def _profile(bound: BoundMask) -> MaskProfile:
    return analyse(bound)


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs for a mask and a problem on a device. `str()` is what `sparsec explain` prints.

    Attributes:
        mask: The mask, bound to its lengths.
        problem: The shape.
        device: What it is planned for.
        groups: One for each distinct mask among heads and batch elements.
        planning_us: How long planning took.
        asked: What else `plan` was told.
    """

    mask: BoundMask
    problem: Problem
    device: Device
    groups: tuple[Group, ...]
    planning_us: float = field(compare=False)
    asked: Asked = field(default=Asked(), compare=False, repr=False)

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for group in self.groups for step in group.steps)

    @property
    def estimate(self) -> Estimate:
        total = self.groups[0].estimate
        for group in self.groups[1:]:
            total = total + group.estimate
        return total

    @property
    def us(self) -> float:
        """What it should take: by records where they say, else by the cost model."""
        return sum(group.us for group in self.groups)

    @property
    def config_source(self) -> str:
        """Where the configurations came from: records, and how near, or the cost model."""
        return "; ".join(dict.fromkeys(group.config_source for group in self.groups))

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        return tuple(refusal for group in self.groups for refusal in group.refusals)

    @property
    def layout_bytes(self) -> int:
        """Bytes of all index arrays."""
        return sum(group.layout_bytes for group in self.groups)

    def __str__(self) -> str:
        from sparsec.planner.text import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        from sparsec.planner.notebook import plan_html

        return plan_html(self)

    def to_dict(self) -> dict[str, Any]:  # JSON values
        """What `str()` says, for programs; `sparsec/report/SCHEMA.md` says what each key means."""
        from sparsec.planner.advice import advice
        from sparsec.planner.ceiling import ceiling
        from sparsec.planner.lengths import dense_us
        from sparsec.planner.spending import spending

        return {
            "schema": PLAN_SCHEMA,
            "mask": str(self.mask.mask),
            "digest": self.mask.digest,
            "problem": asdict(self.problem),
            "device": {"name": self.device.name, "key": self.device.key, "label": self.device.label},
            "planning_us": round(self.planning_us, 1),
            "layout_bytes": self.layout_bytes,
            "estimate": _estimate_dict(self.estimate),
            "ceiling": asdict(ceiling(self)),
            "spending": [{"name": part.name, "words": part.words, "us": round(part.us, 3)} for part in spending(self)],
            "dense_us": round(dense_us(self), 3),
            "advice": list(advice(self)),
            "groups": [_group_dict(group) for group in self.groups],
        }


def _estimate_dict(estimate: Estimate) -> dict[str, Any]:
    return {**{name: round(value, 3) for name, value in asdict(estimate).items()}, "limiter": estimate.limiter}


def _group_dict(group: Group) -> dict[str, Any]:
    from sparsec.planner.graphs import graph_of

    graph = graph_of(group)
    return {
        "heads": list(group.heads),
        "batch": list(group.batch),
        "profile": asdict(group.profile),
        "graph": None if graph is None else asdict(graph),
        "config_source": group.config_source,
        "expected_us": None if group.expected_us is None else round(group.expected_us, 3),
        "is_joined": group.is_joined,
        "estimate": _estimate_dict(group.estimate),
        "steps": [_step_dict(step) for step in group.steps],
        "alternatives": [
            {
                "template": candidate.template,
                "backend": candidate.backend,
                "config": candidate.config.to_dict(),
                "ordering": candidate.ordering,
                "us": round(candidate.us, 3),
                "is_rough": candidate.estimate is None,
                "config_source": candidate.config_source,
                "layout_bytes": candidate.layout_bytes,
            }
            for candidate in group.alternatives
        ],
        "refusals": [asdict(refusal) for refusal in group.refusals],
        "backward": _backward_dict(group) if group.steps[0].launch.problem.needs_grad else None,
    }


def _backward_dict(group: Group) -> dict[str, Any]:
    launches = group.backward_launches
    return {
        "config_source": group.backward_source or "as the forward pass",
        "steps": [
            {"template": each.template.name, "backend": each.backend, "config": each.config.to_dict()}
            for each in launches
        ],
    }


def _step_dict(step: Step) -> dict[str, Any]:
    launch, work = step.launch, step.launch.work
    return {
        "template": launch.template.name,
        "backend": launch.backend,
        "config": launch.config.to_dict(),
        "config_source": step.config_source,
        "edges": step.edges,
        "nnz": work.bound.nnz,
        "ordering": work.ordering.name,
        "is_partial": launch.is_partial,
        "layout_bytes": work.nbytes,
        "items": work.schedule.n_items,
        "slots": work.schedule.n_slots,
        "balance": round(work.schedule.balance(launch.device.units), 4),
        "estimate": _estimate_dict(step.estimate),
    }
