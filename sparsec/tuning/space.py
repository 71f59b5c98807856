"""What a search may choose from: `Task`, the `Choice`s that could run it, and where a search begins.

This file decides the conditional space (template × back end × order of tokens, and below each the template's own
tunables) and which choices are legal. It reads what the planner weighed and must not know how anything is measured, nor
how a search proceeds. It imports neither torch nor optuna.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Final, Literal

from sparsec.analysis import MaskProfile, analyse, candidate_orderings
from sparsec.backends.base import Launch, Problem
from sparsec.cost import estimate
from sparsec.device import Device
from sparsec.layout import Ordering, reordered
from sparsec.masks.mask import BoundMask
from sparsec.planner import Group, Plan, Step, plan
from sparsec.planner.plans import Reorder
from sparsec.planner.works import IDENTITY, build_work, span_of
from sparsec.template import Config, Tunable, template

Direction = Literal["forward", "backward"]

# An arm is left out of the space when the cost model puts its best at so many times the cheapest: the model is not that
# wrong (tools/eval_cost.py says how wrong it is).
_FAR_BEHIND: Final = 4.0
# What the planner calls a plan of several launches.
_MIXTURE: Final = " + "


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to tune: a mask, for one direction of one problem on one device.

    Attributes:
        bound: The mask, with its lengths; the same for all its heads and batch elements.
        problem: The shape.
        device: What it is tuned for.
        direction: Which pass; they are tuned apart.
        heads: The query heads that share the mask; all by default.
        batch: The batch elements that do; all by default.
        template: Only this template.
        backend: Only this back end.
        reorder: As in `plan`.
    """

    bound: BoundMask
    problem: Problem
    device: Device
    direction: Direction = "forward"
    heads: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    template: str | None = None
    backend: str | None = None
    reorder: Reorder = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", self.heads or tuple(range(self.problem.q_heads)))
        object.__setattr__(self, "batch", self.batch or tuple(range(self.problem.batch)))
        if self.direction == "backward":
            object.__setattr__(self, "problem", replace(self.problem, needs_grad=True))

    @property
    def scale(self) -> float:
        return float(self.problem.head_dim**-0.5)

    @property
    def digest(self) -> str:
        """Names the task: equal in every process and on every machine with such a device."""
        told: list[object] = [
            self.bound.digest,
            asdict(self.problem),
            self.device.key,
            self.direction,
            self.heads,
            self.batch,
        ]
        told += [self.template, self.backend, self.reorder]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]

    def __str__(self) -> str:
        p = self.problem
        heads = f"{p.q_heads}" if p.q_heads == p.kv_heads else f"{p.q_heads}:{p.kv_heads}"
        dims = f"d{p.head_dim}" if p.head_dim == p.v_dim else f"d{p.head_dim} v{p.v_dim}"
        return f"{self.bound.mask}, {p.q_len} × {p.kv_len}, {heads} heads, {dims}, {p.dtype}, {self.direction}"


@dataclass(frozen=True, slots=True)
class Arm:
    """A kernel and an order of tokens: what the tunables hang on."""

    template: str
    backend: str
    order: str = IDENTITY.name

    def __str__(self) -> str:
        return f"{self.template} on {self.backend}" + ("" if self.order == IDENTITY.name else f", {self.order}")

    @property
    def is_mixture(self) -> bool:
        """Whether it stands for a plan of several launches, taken as the planner made it."""
        return _MIXTURE in self.template


@dataclass(frozen=True, slots=True)
class Choice:
    """One point of the space."""

    arm: Arm
    config: Config

    def __str__(self) -> str:
        return f"{self.arm} ({self.config})" if self.config.items else str(self.arm)

    def to_text(self) -> str:
        """One line of JSON that `from_text` reads."""
        return json.dumps([self.arm.template, self.arm.backend, self.arm.order, self.config.to_dict()])

    @classmethod
    def from_text(cls, text: str) -> Choice:
        template_name, backend, order, config = json.loads(text)
        return cls(Arm(template_name, backend, order), Config(tuple(config.items())))


class Space:
    """What could run a task, by what the planner weighed for it.

    Args:
        task: What is tuned.
        arms: Only these; all that the planner found eligible by default.
        group: What the planner makes of the task by the cost model, where that is known.
    """

    def __init__(self, task: Task, arms: tuple[Arm, ...] | None = None, group: Group | None = None) -> None:
        made = planned_group(task) if group is None else group
        self._group = replace(made, heads=task.heads, batch=task.batch)
        # The planner's device, by whose calibration its estimates are: others are compared with them.
        self.task = replace(task, device=made.steps[0].launch.device)
        self.arms = self._eligible() if arms is None else arms
        self._orders: dict[str, tuple[BoundMask, Ordering, MaskProfile]] = {}

    def only(self, arms: tuple[Arm, ...]) -> Space:
        """The same task with fewer kernels."""
        return Space(self.task, arms, self._group)

    @cached_property
    def default(self) -> Choice:
        """What runs where nothing was ever measured: the cost model's choice."""
        steps = self._group.steps
        names = _MIXTURE.join(dict.fromkeys(step.launch.template.name for step in steps))
        orders = _MIXTURE.join(dict.fromkeys(step.launch.work.ordering.name for step in steps))
        first = steps[0].launch
        if len(steps) == 1:
            return Choice(Arm(first.template.name, first.backend, orders), first.config)
        # The planner's own mixture of one template with itself would read like a single launch.
        return Choice(Arm(names if _MIXTURE in names else f"{names}{_MIXTURE}{names}", first.backend, orders), Config())

    def seeds(self) -> list[Choice]:
        """Where a search begins: the default, then each arm's cheapest by the cost model and its template's default."""
        found = [self.default]
        for arm in self.arms:
            if arm.is_mixture:
                continue
            weighed = [
                Choice(arm, each.config)
                for each in self._group.alternatives
                if (each.template, each.backend, each.ordering) == (arm.template, arm.backend, arm.order)
                and each.estimate is not None
            ]
            found += weighed[:1]
            found.append(Choice(arm, template(arm.template).default(arm.backend)))
        return [choice for choice in dict.fromkeys(found) if self.refusal(choice) is None]

    def tunables(self, arm: Arm) -> tuple[Tunable, ...]:
        return () if arm.is_mixture else template(arm.template).tunables_of(arm.backend)

    def refusal(self, choice: Choice) -> str | None:
        """Why a choice is not in the space, in one sentence, or None."""
        if choice.arm not in self.arms:
            return f"{choice.arm} cannot run {self.task.bound.mask} here, or is far behind"
        if choice.arm.is_mixture:
            return None if choice == self.default else f"{choice} is not what the planner mixes"
        return template(choice.arm.template).violation(choice.arm.backend, choice.config)

    def choices(self) -> Iterator[Choice]:
        """Every legal choice, the default first."""
        yield self.default
        for arm in self.arms:
            if not arm.is_mixture:
                for config in template(arm.template).configs(arm.backend):
                    if Choice(arm, config) != self.default:
                        yield Choice(arm, config)

    @property
    def size(self) -> int:
        """Points of the space, illegal ones among them."""
        return sum(math.prod(len(t.values) for t in self.tunables(arm)) for arm in self.arms)

    @property
    def digest(self) -> str:
        """Changes with anything that makes earlier results of a search meaningless."""
        parts = [self.task.digest, *(self._arm_identity(arm) for arm in self.arms)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

    def source_digest(self, arm: Arm) -> str:
        """Of everything the kernels of an arm are compiled from."""
        names = dict.fromkeys(arm.template.split(_MIXTURE))
        return "+".join(template(name).digest_of(arm.backend) for name in names)

    def neighbours(self, choice: Choice) -> Iterator[Choice]:
        """The legal choices one step of one tunable away, of the same arm."""
        for tunable in self.tunables(choice.arm):
            at = tunable.values.index(choice.config[tunable.name])
            for near in (at - 1, at + 1):
                if 0 <= near < len(tunable.values):
                    items = choice.config.to_dict() | {tunable.name: tunable.values[near]}
                    moved = Choice(choice.arm, Config(tuple(items.items())))
                    if self.refusal(moved) is None:
                        yield moved

    def steps(self, choice: Choice) -> tuple[Step, ...]:
        """The launches of a choice, their index arrays built.

        Raises:
            SparsecError: The order is none that the mask has.
        """
        if choice == self.default:
            return self._group.steps
        task = self.task
        each = template(choice.arm.template)
        if each.layout == "none":
            return self._dense_steps(choice)
        bound, ordering, profile = self._ordered(choice.arm.order)
        work = build_work(
            each,
            choice.config,
            bound,
            task.problem,
            task.device,
            heads=len(task.heads),
            ordering=ordering,
            span_keys=span_of(profile),
        )
        launch = Launch(
            template=each,
            backend=choice.arm.backend,
            config=choice.config,
            problem=task.problem,
            device=task.device,
            work=work,
            heads=task.heads,
            batch=task.batch,
            scale=task.scale,
        )
        return (Step(launch, "all", estimate(work, task.problem, task.device, len(task.heads))),)

    def _dense_steps(self, choice: Choice) -> tuple[Step, ...]:
        """torch's own attention, which walks no index arrays."""
        task = self.task
        alone = replace(task, template=choice.arm.template, backend=choice.arm.backend, reorder="off")
        steps = planned_group(alone).steps
        return tuple(replace(step, launch=replace(step.launch, heads=task.heads, batch=task.batch)) for step in steps)

    def group(self, choice: Choice) -> Group:
        """The planner's group with a choice in place of its own."""
        steps = self.steps(choice)
        total = steps[0].estimate
        for step in steps[1:]:
            total = total + step.estimate
        return replace(self._group, steps=steps, estimate=total)

    def profile_of(self, arm: Arm) -> MaskProfile:
        """The mask's profile as the kernel of an arm walks it: in its order of tokens."""
        return self._ordered(arm.order)[2]

    def _ordered(self, name: str) -> tuple[BoundMask, Ordering, MaskProfile]:
        if name not in self._orders:
            self._orders[name] = self._found_order(name)
        return self._orders[name]

    def _found_order(self, name: str) -> tuple[BoundMask, Ordering, MaskProfile]:
        bound, profile = self.task.bound, self._group.profile
        if name == IDENTITY.name:
            return bound, IDENTITY, profile
        for step in self._group.steps:
            if step.launch.work.ordering.name == name and len(self._group.steps) == 1:
                return step.launch.work.bound, step.launch.work.ordering, analyse(step.launch.work.bound)
        ordering = next(each for each in candidate_orderings(bound, profile) if each.name == name)
        moved = reordered(bound, ordering)
        return moved, ordering, analyse(moved)

    def _eligible(self) -> tuple[Arm, ...]:
        group = self._group
        best: dict[Arm, float] = {self.default.arm: group.estimate.us}
        for each in group.alternatives:
            if _MIXTURE not in each.template and _MIXTURE not in each.ordering:
                arm = Arm(each.template, each.backend, each.ordering)
                best[arm] = min(each.us, best.get(arm, math.inf))
        limit = _FAR_BEHIND * min(best.values())
        near = [arm for arm, us in best.items() if us <= limit or arm == self.default.arm]
        if self.task.direction == "backward":
            near = [arm for arm in near if arm.is_mixture or template(arm.template).has_backward(arm.backend)]
        return tuple(near)

    def _arm_identity(self, arm: Arm) -> str:
        values = [(t.name, t.values) for t in self.tunables(arm)]
        return f"{arm} {self.source_digest(arm)} {values}"


def planned(task: Task) -> Plan:
    """What the planner makes of a task by the cost model alone.

    Raises:
        MaskError: The mask does not fit the problem.
        UnsupportedError: Nothing can run it.
    """
    return plan(
        task.bound,
        task.problem,
        task.device,
        tune="off",
        template=task.template,
        backend=task.backend,
        reorder=task.reorder,
    )


def planned_group(task: Task) -> Group:
    """The same of a task whose mask is one for all heads and batch elements."""
    (group,) = planned(task).groups
    return group
