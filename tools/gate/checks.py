"""Exactness on a GPU: every kernel on hard cases, beyond 2³¹ elements, with score modifiers, under graph capture.

This file decides what is hard, and which configurations of a template's space are tried. It must not know what is
recorded of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsec import gate
from sparsec import masks as m
from sparsec.backends import reference
from sparsec.backends.base import BACKENDS, DTYPES, Dtype, Launch, Problem, backend
from sparsec.device import Device
from sparsec.masks.mask import Mask
from sparsec.planner.works import build_work
from sparsec.score import ScoreMod, as_score_mod, chain, edge_bias
from sparsec.template import KERNEL_FILES, Config, Template, templates

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DIRECTIONS = ("forward", "backward")
# Configurations drawn from the whole of a template's space, beside those that differ from the default in one place.
DRAWN = 12
# What torch calls the device; where a GPU is only pretended, it is the CPU.
_where = "cuda"
_is_pretended = False


def pretend(where: str = "cpu") -> None:
    """From here on, every kernel counts as one that runs here: to list tasks, or to go through them without a GPU."""
    global _where, _is_pretended
    _where, _is_pretended = where, True


@dataclass(frozen=True)
class Case:
    """One hard case: a mask and a problem small enough for the fp64 reference."""

    name: str
    mask: Mask
    problem: Problem
    scale: float | None = None


def hard_cases() -> list[Case]:
    """Most telling first: everything at once, then what each thing breaks on."""
    rng = np.random.default_rng(7)
    dense = rng.random((211, 307)) < 0.08
    dense[3:170, 10:200] = True
    dense[5] = dense[64] = False
    dense[17] = dense[166] = True
    dense[:, 100] = False
    everything = m.from_dense(dense)
    degrees = [3, 900, 0, 1, 7, 2, 899, 64, 5, 0, 31]
    rows = [np.sort(rng.choice(1000, n, replace=False)) for n in degrees]
    long_rows = m.from_csr(np.cumsum([0, *degrees]), np.concatenate(rows), 1000)
    grouped = Problem(211, 307, 4, 2, 40, 24, batch=2)
    return [
        Case("everything", everything, grouped),
        Case("everything-d128", everything, replace(grouped, head_dim=128, v_dim=128)),
        Case("everything-d256", everything, Problem(211, 307, 2, 1, 256, 256)),
        Case("long-rows", long_rows, Problem(len(degrees), 1000, 2, 2, 64, 64)),
        Case("window", m.window(100, 3), Problem(333, 333, 4, 1, 64, 64)),
        Case("dilated", m.dilated(200, 7), Problem(500, 600, 1, 1, 80, 80)),
        Case("full-ragged", m.full(), Problem(130, 331, 1, 1, 64, 1)),
        Case("empty", ~m.full(), Problem(65, 70, 1, 1, 16, 16)),
        Case("one-key-head", m.from_dense(dense[3:8]), Problem(5, 307, 128, 1, 64, 64)),
        Case("one-dim", m.random_edges(9, 1), Problem(200, 300, 1, 1, 1, 256)),
        Case("negative-scale", everything, grouped, scale=-0.3),
    ]


def own_kernels(device: Device) -> list[tuple[Template, str]]:
    """Every template with every GPU back end that has kernels for it and runs here."""
    return [
        (each, name)
        for name in BACKENDS
        if device.kind != "cpu" and backend(name).serves(device)
        for each in templates().values()
        if name in KERNEL_FILES and name in each.backends() and (_is_pretended or backend(name).missing(device) is None)
    ]


def absent_kernels(device: Device) -> dict[str, str]:
    """The back ends for such a device that cannot run here, and why."""
    names = [name for name in KERNEL_FILES if name != "cpu" and backend(name).serves(device)]
    found = {name: backend(name).missing(device) for name in names}
    return {name: reason for name, reason in found.items() if reason is not None}


def computes(each: Template, name: str, dtype: Dtype, direction: str, device: Device, **asked: Any) -> bool:
    """Whether a back end computes this at all: some have no fp32, or no backward pass."""
    if direction == "backward" and not each.has_backward(name):
        return False
    return backend(name).refusal(each, Problem(64, 64, dtype=dtype, **asked), device) is None


def launch_of(
    each: Template, name: str, case: Case, dtype: str, device: Device, config: Config | None = None
) -> Launch:
    problem = replace(case.problem, dtype=dtype)
    bound = case.mask.bind(problem.q_len, problem.kv_len)
    config = config or each.default(name)
    work = build_work(each, config, bound, problem, device, heads=problem.q_heads)
    heads, batch = tuple(range(problem.q_heads)), tuple(range(problem.batch))
    scale = problem.head_dim**-0.5 if case.scale is None else case.scale
    return Launch(each, name, config, problem, device, work, heads, batch, scale)


def dense_cases() -> list[Case]:
    """What torch's own attention is handed."""
    problem = Problem(333, 333, 4, 2, 64, 64, batch=2)
    return [
        Case("causal", m.causal(), problem),
        Case("full-odd", m.full(), replace(problem, kv_len=457, head_dim=75, v_dim=75)),
        Case("full-d256", m.full(), replace(problem, head_dim=256, v_dim=256)),
    ]


def verifications(device: Device) -> Iterator[tuple[str, Callable[[], None]]]:
    """`(key, check)`; a check raises where something is wrong."""
    dense = templates()["dense"]
    if _is_pretended or backend("torch").missing(device) is None:
        for case, dtype in itertools.product(dense_cases(), reversed(DTYPES)):
            key = f"verify/dense/torch/{dtype}/forward/{case.name}"
            yield key, lambda c=case, t=dtype: verify(launch_of(dense, "torch", c, t, device), "forward")
    for case in hard_cases():
        for direction in DIRECTIONS:
            for each, name in own_kernels(device):
                for dtype in reversed(DTYPES):
                    if not computes(each, name, dtype, direction, device):
                        continue
                    key = f"verify/{each.name}/{name}/{dtype}/{direction}/{case.name}"
                    yield (
                        key,
                        lambda e=each, n=name, c=case, t=dtype, d=direction: verify(launch_of(e, n, c, t, device), d),
                    )


@dataclass(frozen=True)
class _Made:
    """Inputs, and what the reference says of them: it takes longer than any kernel, and is the same for all of them.

    Attributes:
        given: q, k and v.
        above: The gradients of the output and of the log-sum-exp.
        exact: The output and the log-sum-exp, once they were worked out.
        results: Of the forward pass, by head.
        gradients: Of the backward pass, by head.
    """

    given: gate.Given
    above: tuple[torch.Tensor, torch.Tensor]
    exact: list[torch.Tensor] = field(default_factory=list)
    results: gate.Known = field(default_factory=dict)
    gradients: gate.Known = field(default_factory=dict)


@lru_cache(maxsize=12)
def _inputs(mask: str, p: Problem, scale: float) -> _Made:
    """Of a mask by its digest, a problem and a scale."""
    import torch

    dtype = getattr(torch, TORCH_NAMES[p.dtype])
    generator = torch.Generator().manual_seed(11)

    def random(heads: int, length: int, dim: int) -> torch.Tensor:
        # Coarse values: products and their sums are exact in fp32, so that errors are the kernel's own.
        drawn = torch.randn(p.batch, heads, length, dim, generator=generator)
        return drawn.mul(8).round().div(8).to(dtype)

    q = random(p.q_heads, p.q_len, p.head_dim)
    k, v = random(p.kv_heads, p.kv_len, p.head_dim), random(p.kv_heads, p.kv_len, p.v_dim)
    d_out = random(p.q_heads, p.q_len, p.v_dim)
    return _Made(gate.Given(q, k, v), (d_out, torch.randn(d_out.shape[:3], generator=generator)))


def verify(launch: Launch, direction: str, placed: Callable[[Any, int], Any] | None = None) -> None:
    """Holds one launch to the fp64 reference, with outputs full of NaN before.

    Args:
        launch: Of all heads and batch elements.
        direction: Forward or backward.
        placed: Where the device has the n-th tensor of the launch's dtype; contiguous by default.

    Raises:
        AssertionError: A result is further off than a correct one may be.
    """
    import torch

    p = launch.problem
    made = _inputs(launch.work.bound.digest, p, launch.scale)
    q, k, v = made.given.q, made.given.k, made.given.v
    dtype = q.dtype
    out = torch.full((p.batch, p.q_heads, p.q_len, p.v_dim), float("nan"), dtype=dtype)
    lse = torch.full(out.shape[:3], float("nan"))
    place = placed or (lambda tensor, number: tensor.to(_where))
    on = [place(tensor, number) for number, tensor in enumerate((q, k, v))]
    if direction == "forward":
        device_out, device_lse = place(out, 3), lse.to(_where)
        backend(launch.backend).lower(launch)(*on, device_out, device_lse)
        error = gate.forward_error(launch, made.given, device_out.cpu(), device_lse.cpu(), made.results)
    else:
        if not made.exact:
            reference.ReferenceKernel(launch)(q, k, v, out, lse)
            made.exact.extend((out, lse))
        d_out, d_lse = made.above
        dq = place(torch.full_like(q, float("nan")), 5)
        dk, dv = torch.zeros(k.shape, device=_where), torch.zeros(v.shape, device=_where)
        kernel = backend(launch.backend).lower_backward(launch)
        exact_out, exact_lse = place(made.exact[0], 3), made.exact[1].to(_where)
        kernel(*on, exact_out, exact_lse, place(d_out, 4), d_lse.to(_where), dq, dk, dv)
        sums = gate.Sums(dq.cpu(), dk.cpu(), dv.cpu())
        error = gate.gradient_error(launch, made.given, made.above, sums, made.gradients)
    if error is not None:
        raise AssertionError(error)


def hold(what: str, tensor: Any, expected: Any, allowed: float) -> None:
    """Raises where a tensor is further off than allowed, or not a number."""
    got = tensor.double().numpy()
    same = got == expected
    error = float(np.where(same, 0.0, np.abs(got - np.where(same, 0.0, expected))).max(initial=0.0))
    if not error <= allowed:
        raise AssertionError(f"{what} is off by {error:.3g}, and {allowed:.3g} is allowed")


def far_offsets(device: Device) -> Iterator[tuple[str, Callable[[], None]]]:
    kernels = own_kernels(device)
    for each, name in kernels:
        for direction in DIRECTIONS:
            if not computes(each, name, "bf16", direction, device):
                continue
            key = f"offsets/{each.name}/{name}/bf16/{direction}/far-rows"
            yield key, lambda e=each, n=name, d=direction: far_rows(e, n, "bf16", device, d)
    for each, name in kernels:
        if each.layout != "hybrid":
            key = f"offsets/{each.name}/{name}/bf16/forward/17-million-tokens"
            yield key, lambda e=each, n=name: many_tokens(e, n, device)


def far_rows(each: Template, name: str, dtype: str, device: Device, direction: str) -> None:
    """A few rows, heads and batch elements that lie 2^28 elements apart and more."""
    import torch

    apart = 2**28
    case = Case("far-rows", m.from_dense(np.tri(5, 5, dtype=bool)), Problem(5, 5, 2, 2, 8, 8, batch=2))
    launch = launch_of(each, name, case, dtype, device)
    storage = torch.empty(20 * apart, dtype=getattr(torch, TORCH_NAMES[dtype]), device=_where)

    def far(tensor: Any, number: int) -> Any:
        view = storage.as_strided(tensor.shape, (10 * apart, 5 * apart, apart, 1), 64 * number)
        view.copy_(tensor)
        return view

    verify(launch, direction, far)


def many_tokens(each: Template, name: str, device: Device) -> None:
    """One head of 17 million tokens of 128 dimensions: 2.2 · 10^9 elements a tensor. Rows at both ends are checked."""
    import torch

    length, dim, reach = 17_000_000, 128, 40
    case = Case("many", m.window(reach, reach), Problem(length, length, 1, 1, dim, dim))
    launch = launch_of(each, name, case, "bf16", device)
    q, k, v = (torch.randn(1, 1, length, dim, dtype=torch.bfloat16, device=_where) for _ in range(3))
    out = torch.full_like(q, float("nan"))
    lse = torch.full((1, 1, length), float("nan"), device=_where)
    backend(launch.backend).lower(launch)(q, k, v, out, lse)
    assert not torch.isnan(lse).any()
    assert not torch.isnan(out).any()
    for first in (0, 2**31 // dim - 100, length - 200):
        piece = slice(first, first + 200)
        heads = tuple(t[0, 0, piece].double().cpu().numpy() for t in (q, k, v))
        bound = m.window(reach, reach).bind(200)
        wanted = reference.attention(*heads, bound, launch.scale)
        allowed = reference.tolerances(*heads, bound, launch.scale, "bf16")
        # Rows whose keys all lie in the piece.
        inner = slice(0 if first == 0 else reach, 200 if first + 200 == length else 200 - reach)
        hold(f"out from row {first} on", out[0, 0, piece][inner].cpu(), wanted[0][inner], allowed[0])
        hold(f"lse from row {first} on", lse[0, 0, piece][inner].cpu(), wanted[1][inner], allowed[1])


# Score modifiers, partial tiles by predicate, graph capture.


def modifiers() -> dict[str, ScoreMod]:
    """One that looks up by head and distance and bends what it finds; two of captured tensors with gradients."""
    import torch

    frozen = np.random.default_rng(4).normal(size=(4, 65)).astype(np.float32)
    # By the head, the query, the key and both; by the edge, shared by all heads and not.
    gain, rows, columns, bias, edges, own_edges = (
        torch.zeros(*shape, requires_grad=True) for shape in ((4,), (4, 83), (2, 151), (4, 65), (3000,), (2, 4, 3000))
    )
    return {
        "bent": as_score_mod(
            lambda score, b, h, q, kv: (score + frozen[h, (q - kv) % 65] * (b + 1)) * 0.5 + score.tanh()
        ),
        "captured": as_score_mod(
            lambda score, b, h, q, kv: (
                (score * (1.5 + gain[h]) + bias[h, kv - q + 32] + columns[b, kv]) * (1.0 + 0.25 * rows[h, q])
            )
        ),
        "edges": chain(edge_bias(edges), lambda s, b, h, q, kv: s * 0.5 + torch.sigmoid(s), edge_bias(own_edges)),
    }


def modified(device: Device) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every kernel with score modifiers, and the gradients of the tensors that those capture."""
    every = (
        (*tried, kernel)
        for tried in itertools.product(modifiers().items(), DIRECTIONS)
        for kernel in own_kernels(device)
    )
    for (title, score), direction, (each, name) in every:
        for dtype in reversed(DTYPES):

            def check(
                e: Template = each,
                n: str = name,
                t: Dtype = dtype,
                d: gate.Direction = direction,
                s: ScoreMod = score,
            ) -> None:
                error = gate.check(e, n, t, device, d, s)
                if error is not None:
                    raise AssertionError(error)

            is_told = each.counts_edges(name) or not score.needs_edges
            if is_told and computes(each, name, dtype, direction, device, has_score_mod=True):
                yield f"modified/{each.name}/{name}/{dtype}/{direction}/{title}", check


def other_configurations(device: Device) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every value of every tunable, and some of the configurations that differ from the default in many places."""
    for each, name in own_kernels(device):
        for config, direction in itertools.product(tried_configs(each, name), DIRECTIONS):
            for title, case in tunable_cases(config):
                problem = replace(case.problem, dtype="bf16", needs_grad=direction == "backward")
                if not computes(each, name, "bf16", direction, device):
                    continue
                if backend(name).config_refusal(each, config, problem, device) is not None:
                    continue
                values = "-".join(f"{key}{value}" for key, value in _changes(each, name, config)) or "default"
                # Partial tiles by predicate need a mask that has one; everything else is harder on single edges.
                if (title == "expression") != (config.get("by_predicate", 0) == 1):
                    continue

                def check(
                    e: Template = each, n: str = name, c: Case = case, d: str = direction, at: Config = config
                ) -> None:
                    # Programs that stay are to take several items each, however many could run at once.
                    known = replace(device, units=2) if at.get("persistent", 0) else device
                    verify(launch_of(e, n, c, "bf16", known, at), d)

                yield f"tunables/{each.name}/{name}/bf16/{direction}/{values}", check


def _changes(each: Template, name: str, config: Config) -> list[tuple[str, int]]:
    """Where a configuration differs from the default."""
    default = each.default(name)
    return [(key, value) for key, value in config.items if default[key] != value]


def tried_configs(each: Template, name: str) -> list[Config]:
    """Legal configurations: one for each value of each tunable, as near to the default as there is, and drawn ones."""
    default = each.default(name).to_dict()
    tunables = each.tunables_of(name)
    found: dict[Config, None] = {}
    for tunable in tunables:
        for value in tunable.values:
            if value != tunable.default:
                found[_nearest(each, name, {**default, tunable.name: value}, tunable.name)] = None
    rng = np.random.default_rng(3)
    drawn = 0
    while drawn < DRAWN and tunables:
        values = {each.name: int(rng.choice(each.values)) for each in tunables}
        config = each.config_of(name, values)
        if config is not None:
            drawn += 1
            found[config] = None
    return [*found]


def _nearest(each: Template, name: str, values: dict[str, int], kept: str) -> Config:
    """The legal configuration with these values, or with as few of the others changed as it takes."""
    tunables = [tunable for tunable in each.tunables_of(name) if tunable.name != kept]
    for n_changed in range(len(tunables) + 1):
        for chosen in itertools.combinations(tunables, n_changed):
            for other in itertools.product(*(tunable.values for tunable in chosen)):
                changed = {tunable.name: value for tunable, value in zip(chosen, other, strict=True)}
                config = each.config_of(name, {**values, **changed})
                if config is not None:
                    return config
    raise AssertionError(f"no legal configuration of {each.name} on {name} has {kept}={values[kept]}")


# Queries of a check, times heads: each head is held to the reference by itself.
_CHECKED_ROWS = 211 * 16


def tunable_cases(config: Config) -> list[tuple[str, Case]]:
    """Masks that a configuration is tried on, with as many heads a group as it packs."""
    heads = max(8, config.get("pack_gqa", 1))
    dense = hard_cases()[0].mask
    q_len, kv_len = dense.bind().shape
    taken = min(q_len, _CHECKED_ROWS // heads)
    problem = Problem(taken, kv_len, heads, 1, 64, 64, batch=2 if heads == 8 else 1)
    edges = m.from_dense(dense.bind().to_dense()[:taken])
    attended = (m.window(60, 3) | m.dilated(200, 7)) & ~m.prefix(5)
    return [("edges", Case("edges", edges, problem)), ("expression", Case("expression", attended, problem))]


def captured(device: Device) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every kernel captured in a graph and replayed on other inputs in the same buffers."""
    for each, name in own_kernels(device):
        yield f"graph/{each.name}/{name}/bf16/forward", lambda e=each, n=name: capture(launch_of_all(e, n, device))


def launch_of_all(each: Template, name: str, device: Device) -> Launch:
    return launch_of(each, name, hard_cases()[0], "bf16", device)


def capture(launch: Launch) -> None:
    import torch

    p, kernel = launch.problem, backend(launch.backend).lower(launch)
    shapes = ((p.q_heads, p.q_len, p.head_dim), (p.kv_heads, p.kv_len, p.head_dim), (p.kv_heads, p.kv_len, p.v_dim))

    def random() -> list[Any]:  # tensors
        return [torch.randn(p.batch, *shape, dtype=torch.bfloat16, device=_where) for shape in shapes]

    held = random()
    out = torch.full((p.batch, p.q_heads, p.q_len, p.v_dim), float("nan"), dtype=torch.bfloat16, device=_where)
    lse = torch.full(out.shape[:3], float("nan"), device=_where)
    kernel(*held, out, lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(*held, out, lse)
    for _ in range(2):
        fresh = random()
        for tensor, values in zip(held, fresh, strict=True):
            tensor.copy_(values)
        out.fill_(float("nan"))
        graph.replay()
        wanted_out, wanted_lse = torch.empty_like(out), torch.empty_like(lse)
        kernel(*fresh, wanted_out, wanted_lse)
        if not (torch.equal(out, wanted_out) and torch.equal(lse, wanted_lse)):
            raise AssertionError("a replayed graph gives other results than the kernel called on the same values")
