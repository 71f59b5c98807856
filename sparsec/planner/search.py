"""Chooses: every (template, back end, order of tokens, configuration) is a candidate with an estimate, or a refusal.

This file decides what is considered and what wins. The decision, in a user's words:

- Heads and batch elements with equal masks are planned together, and run in one launch where they are all heads of some
  batch elements, or the same heads of several; in any case they share index arrays.
- A back end that cannot serve a template, a dimension or a device refuses it, in one sentence.
- Every remaining template gets a rough estimate from the mask's profile. One that is far behind the best is passed over
  without building its index arrays, but listed.
- A template takes the configuration that records of this or the nearest mask name; without such records, the shortlist
  is costed. Measured times and estimates are made comparable by the ratio of those that have both.
- Where index arrays would be large, those of a sample of the rows are costed first. Of one kernel in one order of
  tokens only the configuration that is best by that sample goes on. What is behind the best by more than a sample errs
  is passed over as well. Both are listed with the sample's figure.
- The others' index arrays are built and costed exactly. The cheapest, by record where there is one and else by cost,
  wins; where two are nearer than the cost model can tell apart, the simpler one does.
- An order of tokens (residue classes, clusters) competes like any other candidate, its index arrays' cost included.
- A few rows that attend nearly everything may get a launch of their own, packed together; a dilated part of a union may
  get one in residue order, joined with the rest by log-sum-exp.

Naming a template or a back end only filters this list. This file must not know any kernel, nor the tensors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from sparsec.analysis import MaskProfile, analyse, candidate_orderings, residue_ordering
from sparsec.backends.base import BACKENDS, DTYPES, MAX_HEAD_DIM, Launch, Problem, Work, backend
from sparsec.cost import CostModel, Estimate, cost_model, dense_estimate, estimate, model_digest
from sparsec.device import Device, calibrated
from sparsec.device import device as named_device
from sparsec.errors import MaskError, SparsecError, UnsupportedError
from sparsec.layout import EdgeOrder, Ordering, RowLists, reordered
from sparsec.masks.mask import BoundMask, Mask
from sparsec.planner.drafts import Arm, Draft, Part
from sparsec.planner.measured import Measured
from sparsec.planner.parts import distinct_masks, heavy_rows_apart, residue_part
from sparsec.planner.plans import COST_MODEL, Asked, Candidate, Group, Plan, PlanTune, Refusal, Reorder, Step
from sparsec.planner.renewal import shared_group
from sparsec.planner.sampling import Sample, is_long_to_build
from sparsec.planner.shortlist import shortlist
from sparsec.planner.works import IDENTITY, LAYOUT_TUNABLES, build_work, heads_sharing, span_of
from sparsec.records import NEAR_TIE, Direction, RecordBase, Served, database
from sparsec.score import ScoreMod
from sparsec.template import Config, Template, template, templates

# A template is passed over on its rough estimate when that is so many times the best.
_FAR_BEHIND = 2.5
# One with more than a few index arrays is passed over when it is so many times the best by a sample of its rows.
_SAMPLED_BEHIND = 1.1
# Configurations of one kernel in one order, by one sample: what is nearer than this is told apart by tiles to store.
_SAMPLED_NEAR = 1.01
# With so many items a worker, uneven ones leave none idle for long.
_MANY_ITEMS = 32
# One whose measured time is so many times the best measured one is passed over as well.
_MEASURED_FAR_BEHIND = 1.5
# The cost model cannot tell apart what is nearer than this; the earlier of `drafts.SIMPLEST` wins.
_NEAR = 1.03
# Index arrays may take this share of the device's memory.
_LAYOUT_SHARE = 0.25
# An irregular order must save on so many keys a query what it costs on the query itself.
_MIN_ORDER_DEGREE = 16.0
# Gathered tiles can gain only where tiles leave this much empty.
_HYBRID_FILL = 0.6
_OWN_ORDER = "the tokens' own order, and reorder='force' asks for another"
# Entries of a score modifier's array, and edges it can count: kernels index them with int32.
_MAX_NUMBERED = 1 << 31


def plan(
    mask: Mask | BoundMask,
    problem: Problem,
    device: Device | str = "cpu",
    *,
    template: str | None = None,
    backend: str | None = None,
    reorder: Reorder = "auto",
    scale: float | None = None,
    score: ScoreMod | None = None,
    tune: PlanTune = "cached",
    records: RecordBase | None = None,
) -> Plan:
    """What should run for a mask and a problem on a device; needs neither torch nor the device.

    Args:
        mask: Which query attends which key.
        problem: Lengths, heads, dimensions and dtype.
        device: A device, or its name: `cpu` (this machine) or one of `devices.yaml`.
        template: Only this template.
        backend: Only this back end.
        reorder: `"auto"` lets orders of tokens compete, `"off"` keeps the tokens' own, `"force"` takes the best other.
        scale: Of the scores; `1/√head_dim` by default.
        score: What happens to scores before softmax.
        tune: `"cached"` goes by records where there are any, else by the cost model; `"off"` by the cost model alone.
        records: Which records; the shipped ones and the user's own by default.

    Raises:
        MaskError: The mask does not fit the lengths or heads.
        UnsupportedError: Nothing can serve the request; carries every refusal.
    """
    started = time.perf_counter()
    asked = Asked(template, backend, reorder, scale, score, tune, records)
    if not isinstance(mask, (Mask, BoundMask)):
        raise MaskError(f"plan takes a mask of sparsec.masks; got {type(mask).__name__}")
    if not isinstance(problem, Problem):
        raise SparsecError(f"plan takes a sparsec.Problem; got {type(problem).__name__}")
    if reorder not in get_args(Reorder):
        raise SparsecError(f"reorder={reorder!r} is none of {', '.join(map(repr, get_args(Reorder)))}")
    if scale is not None and not math.isfinite(scale):
        raise SparsecError(f"scale={scale}: the scale of the scores must be a finite number")
    bound = mask if isinstance(mask, BoundMask) else mask.bind(problem.q_len, problem.kv_len)
    _check(bound, problem)
    if score is not None:
        _check_score(score, bound, problem)
        score = score.in_kernel
    problem = replace(problem, has_score_mod=score is not None)
    target = _calibrated(named_device(device) if isinstance(device, str) else device, records)
    wanted = _Wanted(template, backend, reorder, problem.head_dim**-0.5 if scale is None else scale, score)
    base = None if tune == "off" else database() if records is None else records
    groups: list[Group] = []
    for each, heads, batch in distinct_masks(bound, problem):
        twin = next((group for group in groups if group.bound is each), None)
        if twin is None:
            groups.append(_Search(each, problem, target, heads, batch, wanted, base).group())
        else:
            groups.append(shared_group(twin, heads, batch, problem, target))
    return Plan(bound, problem, target, tuple(groups), (time.perf_counter() - started) * 1e6, asked)


def again(made: Plan, mask: Mask | BoundMask, problem: Problem) -> Plan:
    """The plan of another mask or problem, asked for as `made` was."""
    asked = made.asked
    return plan(
        mask,
        problem,
        made.device,
        template=asked.template,
        backend=asked.backend,
        reorder=asked.reorder,
        scale=asked.scale,
        score=asked.score,
        tune=asked.tune,
        records=asked.records,
    )


def _calibrated(found: Device, records: RecordBase | None) -> Device:
    """With its own rates and factors, where they were measured of this cost model; the latest count.

    Those of another processor that has the same key are not its own.
    """
    base = database() if records is None else records
    known = [
        each
        for each in base.calibrations(found.key)
        if each.source == model_digest(found.key) and each.model in ("", found.model)
    ]
    return calibrated(found, dict(known[-1].values)) if known and not found.factors else found


def _check(bound: BoundMask, problem: Problem) -> None:
    if bound.shape != (problem.q_len, problem.kv_len):
        raise MaskError(
            f"the mask is bound to {bound.q_len} queries and {bound.kv_len} keys, "
            f"and the problem has {problem.q_len} and {problem.kv_len}"
        )
    if problem.dtype not in DTYPES:
        raise UnsupportedError(f"dtype {problem.dtype!r}: sparsec takes {', '.join(DTYPES)}")
    if problem.batch < 1:
        raise UnsupportedError(f"batch={problem.batch}: a plan is for at least one batch element")
    if problem.q_heads < 1 or problem.kv_heads < 1 or problem.q_heads % problem.kv_heads:
        raise UnsupportedError(
            f"{problem.q_heads} query heads over {problem.kv_heads} key heads: "
            "the number of query heads must be a multiple of that of the key heads"
        )
    for name, dim in (("head_dim", problem.head_dim), ("v_dim", problem.v_dim)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise UnsupportedError(f"{name}={dim}: sparsec's kernels take 1 to {MAX_HEAD_DIM}")
    for name, members, wanted in (
        ("heads", bound.n_heads, problem.q_heads),
        ("batch elements", bound.n_batch, problem.batch),
    ):
        if members is not None and members != wanted:
            raise MaskError(f"the mask has one member for each of {members} {name}, and the problem has {wanted}")


def _check_score(score: ScoreMod, bound: BoundMask, problem: Problem) -> None:
    extents = {"h": problem.q_heads, "q_idx": problem.q_len, "kv_idx": problem.kv_len}
    if bound.varies_by_batch:
        extents["b"] = problem.batch
    if score.needs_edges:
        if bound.varies_by_head or bound.varies_by_batch:
            raise UnsupportedError(
                "the score modifier counts the edges of the mask, and this mask has other edges for other heads or "
                "batch elements: compile one attention for each, or look the bias up by query and key"
            )
        if bound.nnz >= _MAX_NUMBERED:
            raise UnsupportedError(
                f"the score modifier counts the edges of the mask, and {bound.nnz:,} are more than sparsec can number "
                f"({_MAX_NUMBERED - 1:,}): compute the bias from positions"
            )
        extents["edge"] = bound.nnz
    score.check(extents)
    for table in score.tables:
        if math.prod(table.shape) >= _MAX_NUMBERED:
            raise UnsupportedError(
                f"score_mod: {table.name!r} of shape {table.shape} has more than {_MAX_NUMBERED - 1:,} entries: "
                "split it by heads"
            )


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the caller fixed."""

    template: str | None
    backend: str | None
    reorder: Reorder
    scale: float
    score: ScoreMod | None


@dataclass(frozen=True, slots=True)
class _Contender:
    """A kernel with its configuration: with its index arrays, or with what a sample of the rows makes it take."""

    arm: Arm
    config: Config
    served: Served | None
    draft: Draft | None
    sampled_us: float

    @property
    def us(self) -> float:
        """By the cost model."""
        return self.sampled_us if self.draft is None else self.draft.estimate.us

    @property
    def passed_over(self) -> Candidate:
        arm = self.arm
        return Candidate(arm.template.name, arm.backend, self.config, arm.ordering.name, None, self.us, 0)


class _Search:
    """One distinct mask."""

    def __init__(
        self,
        bound: BoundMask,
        problem: Problem,
        device: Device,
        heads: tuple[int, ...],
        batch: tuple[int, ...],
        wanted: _Wanted,
        base: RecordBase | None,
    ) -> None:
        self._bound, self._problem, self._device = bound, problem, device
        self._heads, self._batch, self._wanted = heads, batch, wanted
        self._model: CostModel = cost_model(problem, device)
        self._profile = analyse(bound)
        self._measured = Measured(problem, device, len(heads), len(batch), base)
        self._edges = EdgeOrder(bound) if wanted.score is not None and wanted.score.needs_edges else None
        self._refusals: list[Refusal] = []
        self._passed_over: list[Candidate] = []
        self._arms: list[Arm] = []
        self._rows: tuple[BoundMask, RowLists] | None = None
        self._works: dict[tuple[object, ...], tuple[BoundMask, Work]] = {}

    def group(self) -> Group:
        servers = list(self._servers())
        drafts = list(self._drafts(servers))
        if self._wanted.reorder == "force":
            kept = [draft for draft in drafts if draft.is_reordered]
            self._refusals += [Refusal(str(draft.candidate(1.0)), _OWN_ORDER) for draft in drafts if draft not in kept]
            drafts = kept
        if not drafts:
            asked = [name for name in (self._wanted.template, self._wanted.backend) if name is not None]
            raise UnsupportedError(
                f"nothing can run {self._bound.mask} on {self._device.name}"
                + (f" with {' and '.join(asked)}" if asked else ""),
                tuple(self._refusals),
            )
        scale = self._measured.scale
        fastest = min(draft.us(scale) for draft in drafts)
        winner = min(
            (draft for draft in drafts if draft.us(scale) <= fastest * _NEAR),
            key=lambda draft: (draft.rank, draft.us(scale)),
        )
        others = [draft.candidate(scale) for draft in drafts if draft is not winner]
        # What was passed over by the cost model is told in the same currency.
        others += [
            each if each.config_source != COST_MODEL else replace(each, us=each.us * scale)
            for each in self._passed_over
        ]
        backward = self._backward(winner) if self._problem.needs_grad else None
        return Group(
            bound=self._bound,
            heads=self._heads,
            batch=self._batch,
            is_whole_batch=self._batch == tuple(range(self._problem.batch)),
            known_profile=self._profile,
            steps=tuple(self._steps(winner)),
            estimate=winner.estimate,
            config_source=winner.config_source,
            alternatives=tuple(sorted(others, key=lambda candidate: candidate.us)),
            refusals=tuple(self._refusals),
            expected_us=winner.us(scale) if winner.is_measured else None,
            backward=None
            if backward is None
            else tuple(self._launch(part, is_partial=winner.is_joined) for part in backward),
            backward_source="" if backward is None else "; ".join(dict.fromkeys(p.config_source for p in backward)),
        )

    def _backward(self, winner: Draft) -> tuple[Part, ...] | None:
        """What runs the backward pass, or None: it then runs as the forward pass does."""
        by_records = self._recorded_backward(winner.parts[0]) if len(winner.parts) == 1 else None
        if by_records is not None:
            return (by_records,)
        parts = tuple(map(self._with_backward, winner.parts))
        return None if all(part is own for part, own in zip(parts, winner.parts, strict=True)) else parts

    def _recorded_backward(self, own: Part) -> Part | None:
        """What records would run the backward pass with.

        Another kernel than the forward pass's is taken only where both were measured.
        """
        told = {
            arm.kernel: (arm, *self._served(arm.template, arm.backend, arm.profile, arm.ordering, "backward"))
            for arm in self._arms
            if arm.template.has_backward(arm.backend) and self._layout_refusal(arm.template, arm.profile) is None
        }
        name, ordering = self._backward_server(own.template, own.backend), own.work.ordering.name
        arm, served, us = told[own.template.name, name or own.backend, ordering]
        for other, other_served, other_us in told.values():
            if us is not None and other_us is not None and other_us * NEAR_TIE < us:
                arm, served, us = other, other_served, other_us
        if served is None:
            return None
        if arm.kernel == own.kernel and served.config == own.config:
            return replace(own, served=served)
        work = self._work(arm.template, served.config, arm.bound, arm.profile, arm.ordering)
        cost = self._estimate(arm.template, work)
        return Part(arm.template, arm.backend, served.config, arm.profile, work, "all", cost, served)

    def _with_backward(self, part: Part) -> Part:
        """The launch itself, or where its back end has a forward pass only, one of another back end."""
        each, name = part.template, self._backward_server(part.template, part.backend)
        assert name is not None, "a forward pass without a backward pass is refused"
        if name == part.backend:
            return part
        config = shortlist(each, name, self._problem, self._device)[0][0]
        work = self._work(each, config, part.work.bound, part.profile, part.work.ordering)
        return Part(each, name, config, part.profile, work, part.edges, self._estimate(each, work))

    def _backward_server(self, each: Template, name: str) -> str | None:
        """The back end that runs the backward pass where `name` runs a template's forward pass; None: there is none."""
        if each.has_backward(name):
            return name
        if self._wanted.backend is not None:
            return None
        for other in BACKENDS:
            is_fit = other in each.backends() and each.has_backward(other) and backend(other).serves(self._device)
            if is_fit and self._refusal(each, other) is None and shortlist(each, other, self._problem, self._device)[0]:
                return other
        return None

    def _refusal(self, each: Template, name: str) -> str | None:
        if self._edges is not None and not each.counts_edges(name):
            return "score_mod asks for the numbers of edges, which it does not count"
        return backend(name).refusal(each, self._problem, self._device)

    def _backward_refusal(self, each: Template, name: str) -> str | None:
        if not self._problem.needs_grad or self._backward_server(each, name) is not None:
            return None
        if self._wanted.backend is not None:
            return "it has a forward pass only: leave the back end open, and another runs the backward pass"
        return "it has a forward pass only, and no other back end runs its backward pass"

    def _servers(self) -> Iterator[tuple[Template, str]]:
        """Templates and back ends that can serve the problem; the others become refusals."""
        if self._wanted.template is not None:
            template(self._wanted.template)  # an unknown name is an error, not an empty list
        for each in templates().values():
            if self._wanted.template not in (None, each.name):
                continue
            names = [self._wanted.backend] if self._wanted.backend is not None else list(BACKENDS)
            for name in names:
                server = backend(name)
                if name != "reference" and name not in each.backends():
                    if name == self._wanted.backend:
                        self._refusals.append(Refusal(f"{each.name} on {name}", "the template has no such kernel"))
                    continue
                if name == "reference" and self._wanted.backend != name:
                    continue
                if not server.serves(self._device):
                    if name == self._wanted.backend:
                        wrong_kind = f"it does not serve {self._device.kind} devices such as {self._device.name}"
                        self._refusals.append(Refusal(f"{each.name} on {name}", wrong_kind))
                    continue
                reason = self._refusal(each, name) or self._backward_refusal(each, name)
                if each.layout == "none":
                    reason = reason or self._dense_refusal()
                if reason is not None:
                    self._refusals.append(Refusal(f"{each.name} on {name}", reason))
                else:
                    yield each, name

    def _dense_refusal(self) -> str | None:
        if self._dense_share() is None:
            return f"the mask is neither full nor causal (density {self._profile.density:.2%})"
        return None

    def _dense_share(self) -> float | None:
        """The share of all pairs that torch's attention would compute: all, or those of a causal square; else None."""
        q_len, kv_len = self._bound.shape
        if self._profile.nnz == q_len * kv_len:
            return 1.0
        offsets = self._bound.offsets
        is_causal = (
            q_len == kv_len
            and offsets is not None
            and offsets.start.tolist() == [1 - q_len]
            and offsets.stop.tolist() == [1]
            and offsets.step.tolist() == [1]
        )
        return self._profile.nnz / (q_len * kv_len) if is_causal else None

    def _drafts(self, servers: list[tuple[Template, str]]) -> Iterator[Draft]:
        contenders = self._contenders_in(self._bound, self._profile, IDENTITY, servers, float("inf"))
        best = min((each.us for each in contenders), default=float("inf"))
        is_reordered = self._wanted.reorder != "off" and self._may_reorder()
        for ordering in candidate_orderings(self._bound, self._profile) if is_reordered else ():
            moved = reordered(self._bound, ordering)
            contenders += self._contenders_in(moved, analyse(moved), ordering, servers, best)
        yield from self._built(contenders)
        if is_reordered and self._wanted.template is None and self._edges is None:
            yield from self._mixed(servers)

    def _may_reorder(self) -> bool:
        """Whether another order of tokens can pay."""
        profile = self._profile
        is_regular = profile.period > 1 or profile.common_step > 1
        if is_regular or profile.q.mean >= _MIN_ORDER_DEGREE or self._wanted.reorder != "auto":
            return True
        if not profile.is_toeplitz:
            reason = f"with {profile.q.mean:.1f} keys a query, fetching q and out in it costs more than it saves"
            self._refusals.append(Refusal("another order of tokens", reason))
        return False

    def _contenders_in(
        self,
        bound: BoundMask,
        profile: MaskProfile,
        ordering: Ordering,
        servers: list[tuple[Template, str]],
        best_us: float,
    ) -> list[_Contender]:
        rough = {each.name: self._rough_us(each, profile) for each, _ in servers}
        limit = min([best_us, *rough.values()], default=0.0) * _FAR_BEHIND
        told = {(each.name, name): self._served(each, name, profile, ordering) for each, name in servers}
        measured_limit = min((us for _, us in told.values() if us is not None), default=0.0) * _MEASURED_FAR_BEHIND
        contenders: list[_Contender] = []
        sample: Sample | None = None
        for each, name in servers:
            if each.layout == "none" and ordering is not IDENTITY:
                continue
            if self._edges is not None and each.layout != "rows" and ordering is not IDENTITY:
                counting = "the score modifier counts edges, and tiles count them in the tokens' own order only"
                self._refusals.append(Refusal(f"{each.name} on {name}, {ordering.name}", counting))
                continue
            title = f"{each.name} on {name}" + ("" if ordering is IDENTITY else f", {ordering.name}")
            arm = Arm(each, name, ordering, bound, profile)
            self._arms.append(arm)
            served, measured_us = told[each.name, name]
            is_behind = rough[each.name] > limit if measured_us is None else measured_us > measured_limit
            if is_behind and self._wanted.template is None:
                self._passed_over.append(self._unbuilt(each, name, ordering, rough[each.name], served, measured_us))
                continue
            reason = self._layout_refusal(each, profile)
            if reason is not None:
                self._refusals.append(Refusal(title, reason))
                continue
            worth_costing, unfit = shortlist(each, name, self._problem, self._device)
            for refusal in unfit:
                self._refuse(refusal)
            is_sampled = measured_us is None and is_long_to_build(each, profile)
            for config in worth_costing if served is None else [served.config]:
                if is_sampled:
                    sample = sample or Sample(bound, profile, ordering)
                    sampled_us = sample.us(each, config, self._problem, self._device, len(self._heads))
                    contenders.append(_Contender(arm, config, served, None, sampled_us))
                else:
                    draft = self._draft(arm, config, served, measured_us)
                    contenders.append(_Contender(arm, config, served, draft, 0.0))
        return contenders

    def _built(self, contenders: list[_Contender]) -> list[Draft]:
        """Those with their index arrays that are not far behind the best by a sample of their rows."""
        is_forced = self._wanted.reorder == "force"
        drafts = {index: each.draft for index, each in enumerate(contenders) if each.draft is not None}
        best = min(
            (draft.estimate.us for draft in drafts.values() if draft.is_reordered or not is_forced),
            default=float("inf"),
        )
        sampled = {index: each for index, each in enumerate(contenders) if each.draft is None}
        if is_forced:
            own_order = [index for index, each in sampled.items() if each.arm.ordering is IDENTITY]
            self._refusals += [Refusal(str(sampled.pop(index).passed_over), _OWN_ORDER) for index in own_order]
        chosen = self._best_sampled(sampled)
        of_sample: dict[tuple[str, str, str], float] = {}
        for index in sorted(chosen, key=lambda index: sampled[index].us):
            each = sampled[index]
            if each.us > best * _SAMPLED_BEHIND:
                self._passed_over.append(each.passed_over)
                continue
            drafts[index] = self._draft(each.arm, each.config, each.served, None)
            best = min(best, drafts[index].estimate.us)
            of_sample[each.arm.kernel] = drafts[index].estimate.us / each.us
        for index, each in sampled.items():
            if index not in chosen:
                # To the one that was built they are as their figures of the same rows are.
                told = each.passed_over
                self._passed_over.append(replace(told, us=told.us * of_sample.get(each.arm.kernel, 1.0)))
        return [drafts[index] for index in sorted(drafts)]

    def _best_sampled(self, sampled: dict[int, _Contender]) -> list[int]:
        """Of each kernel in each order, the configuration that is best by the sample; the largest tiles of near ones.

        Those whose items are so few that some workers could idle, which no sample tells, stay as well.
        """
        copies = len(self._heads) * self._problem.batch
        chosen = []
        for kernel in dict.fromkeys(each.arm.kernel for each in sampled.values()):
            own = {index: each for index, each in sampled.items() if each.arm.kernel == kernel}
            limit = min(each.us for each in own.values()) * _SAMPLED_NEAR
            near = [index for index, each in own.items() if each.us <= limit]
            best = max(near, key=lambda index: (_tile_area(own[index].config), -own[index].us))
            for index, each in own.items():
                items = self._problem.q_len / each.config.get("block_q", 1) * copies
                if index == best or items < _MANY_ITEMS * self._model.workers:
                    chosen.append(index)
        return chosen

    def _draft(self, arm: Arm, config: Config, served: Served | None, measured_us: float | None) -> Draft:
        work = self._work(arm.template, config, arm.bound, arm.profile, arm.ordering)
        cost = self._estimate(arm.template, work)
        if measured_us is not None:
            self._measured.note(measured_us, cost.us)
        part = Part(arm.template, arm.backend, config, arm.profile, work, "all", cost, served, measured_us)
        return Draft((part,), False, cost)

    def _work(self, each: Template, config: Config, bound: BoundMask, profile: MaskProfile, ordering: Ordering) -> Work:
        # Two back ends with the same tiles walk the same arrays, and rows are the same whatever the configuration.
        key = (each.name, id(bound), ordering.name, *(config.get(name, 0) for name in LAYOUT_TUNABLES))
        if key not in self._works:
            known = (
                self._rows[1] if each.layout == "rows" and self._rows is not None and self._rows[0] is bound else None
            )
            work = build_work(
                each,
                config,
                bound,
                self._problem,
                self._device,
                heads=len(self._heads),
                ordering=ordering,
                span_keys=span_of(profile),
                rows=known,
                edges=self._edges,
            )
            if each.layout == "rows" and work.rows is not None:
                self._rows = bound, work.rows
            # With the mask, so that its id stays its own.
            self._works[key] = bound, work
        return self._works[key][1]

    def _served(
        self,
        each: Template,
        name: str,
        profile: MaskProfile,
        ordering: Ordering,
        direction: Direction = "forward",
    ) -> tuple[Served | None, float | None]:
        """What the records would have run, and what it should take where they say."""
        served = self._measured.served(each, name, profile, ordering, direction)
        return served, self._measured.us(served, profile, ordering)

    def _unbuilt(
        self,
        each: Template,
        name: str,
        ordering: Ordering,
        rough_us: float,
        served: Served | None,
        measured_us: float | None,
    ) -> Candidate:
        """A candidate that is passed over without its index arrays."""
        if served is None or measured_us is None:
            return Candidate(each.name, name, each.default(name), ordering.name, None, rough_us, 0)
        return Candidate(each.name, name, served.config, ordering.name, None, measured_us, 0, str(served))

    def _refuse(self, refusal: Refusal) -> None:
        """Notes a refusal once, however many orders of tokens meet it."""
        if refusal not in self._refusals:
            self._refusals.append(refusal)

    def _estimate(self, each: Template, work: Work) -> Estimate:
        if each.layout == "none":
            share = self._dense_share()
            assert share is not None, "a dense launch of a mask that is not dense"
            return dense_estimate(self._problem, self._device, share)
        return estimate(work, self._problem, self._device, len(self._heads))

    def _rough_us(self, each: Template, profile: MaskProfile) -> float:
        """From the profile alone, microseconds."""
        copies = len(self._heads) * self._problem.batch
        per_worker = copies / self._model.workers * 1e-3
        q_len = profile.shape[0]
        if each.layout == "none":
            return dense_estimate(self._problem, self._device, profile.density).us
        shared = heads_sharing(self._problem, self._device, len(self._heads))
        by_rows = profile.nnz * self._model.edge(span_of(profile), shared) + self._model.unit(q_len, is_rows=True)
        by_tiles = self._model.rough_tiles(profile) + self._model.unit(q_len, is_rows=False)
        ns = {"rows": by_rows, "tiles": by_tiles}.get(each.layout, 0.8 * min(by_rows, by_tiles))
        return ns * per_worker + self._device.launch_us

    def _layout_refusal(self, each: Template, profile: MaskProfile) -> str | None:
        limit = _LAYOUT_SHARE * self._device.memory_bytes
        if each.layout == "hybrid" and profile.fill(16).fill >= _HYBRID_FILL:
            return f"tiles of 16 are {profile.fill(16).fill:.0%} full: nothing is left to gather"
        if each.layout == "hybrid" and profile.nnz * 16 > limit:
            return f"{profile.nnz:,} edges are too many to sort into tiles, columns and single edges"
        if each.layout == "tiles" and not profile.is_toeplitz:
            partial = profile.fill(64).n_tiles - profile.fill(64).n_full
            bytes_at_most = partial * 2 * 64 * 64 // 8
            if bytes_at_most > limit and partial * 64 > profile.nnz:
                return f"{partial:,} partial tiles could need {bytes_at_most / 2**30:.1f} GiB of patterns"
        return None

    def _mixed(self, servers: list[tuple[Template, str]]) -> Iterator[Draft]:
        """Plans of two launches."""
        apart = heavy_rows_apart(self._bound, self._profile)
        if apart is not None:
            rest, heavy, order = apart
            drafts = self._best_of(rest, IDENTITY, servers), self._best_of(heavy, order, servers)
            yield from self._together(drafts, ("all but the heavy rows", "heavy rows"), is_joined=False)
        parts = residue_part(self._bound)
        if parts is not None and self._bound.q_len == self._bound.kv_len:
            progressing, rest, period = parts
            ordering = residue_ordering(progressing, period)
            drafts = (
                self._best_of(reordered(progressing, ordering), ordering, servers),
                self._best_of(rest, IDENTITY, servers),
            )
            yield from self._together(drafts, (f"offsets that are multiples of {period}", "the rest"), is_joined=True)

    def _best_of(self, bound: BoundMask, ordering: Ordering, servers: list[tuple[Template, str]]) -> Draft | None:
        own = [pair for pair in servers if pair[0].layout != "none"]
        refusals, passed_over, arms = list(self._refusals), list(self._passed_over), list(self._arms)
        drafts = self._built(self._contenders_in(bound, analyse(bound), ordering, own, float("inf")))
        # A part's are not the mask's.
        self._refusals, self._passed_over, self._arms = refusals, passed_over, arms
        scale = self._measured.scale
        return min(drafts, key=lambda draft: draft.us(scale), default=None)

    def _together(
        self, drafts: tuple[Draft | None, Draft | None], edges: tuple[str, str], *, is_joined: bool
    ) -> Iterator[Draft]:
        first, second = drafts
        if first is None or second is None:
            return
        parts = tuple(replace(draft.parts[0], edges=text) for draft, text in zip((first, second), edges, strict=True))
        total = first.estimate + second.estimate
        if is_joined:
            # Two fp32 results are written, read again and joined.
            moved = 5 * 4 * self._problem.q_heads * self._problem.q_len * self._problem.v_dim * self._problem.batch
            total = total + _moving(moved / self._device.memory_bandwidth * 1e6)
        yield Draft(parts, is_joined, total)

    def _steps(self, draft: Draft) -> Iterator[Step]:
        for part in draft.parts:
            launch = self._launch(part, is_partial=draft.is_joined)
            yield Step(launch, part.edges, part.estimate, part.config_source)

    def _launch(self, part: Part, *, is_partial: bool) -> Launch:
        return Launch(
            template=part.template,
            backend=part.backend,
            config=part.config,
            problem=self._problem,
            device=self._device,
            work=part.work,
            heads=self._heads,
            batch=self._batch,
            scale=self._wanted.scale,
            is_partial=is_partial,
            score=self._wanted.score,
        )


def _tile_area(config: Config) -> int:
    return config.get("block_q", 1) * config.get("block_kv", 1)


def _moving(us: float) -> Estimate:
    return Estimate(us, 0.0, 0.0, us, 0.0, 0.0)
