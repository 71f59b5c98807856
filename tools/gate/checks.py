"""Exactness on a GPU: every kernel on hard cases, beyond 2³¹ elements, with score modifiers, under graph capture.

This file decides what is hard. It must not know what is recorded of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

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

TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DIRECTIONS = ("forward", "backward")


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
    grouped = Problem(211, 307, 8, 2, 40, 24, batch=2)
    return [
        Case("everything", everything, grouped),
        Case("everything-d128", everything, replace(grouped, head_dim=128, v_dim=128)),
        Case("everything-d256", everything, Problem(211, 307, 2, 1, 256, 256)),
        Case("long-rows", long_rows, Problem(len(degrees), 1000, 2, 2, 64, 64)),
        Case("window", m.window(100, 3), Problem(777, 777, 4, 1, 64, 64)),
        Case("dilated", m.dilated(200, 7), Problem(500, 600, 1, 1, 80, 80)),
        Case("full-ragged", m.full(), Problem(130, 331, 1, 1, 64, 1)),
        Case("empty", ~m.full(), Problem(65, 70, 1, 1, 16, 16)),
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
        if name in KERNEL_FILES and name in each.backends() and backend(name).missing(device) is None
    ]


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


def verifications(device: Device) -> Iterator[tuple[str, Callable[[], None]]]:
    """`(key, check)`; a check raises where something is wrong."""
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


def verify(launch: Launch, direction: str, placed: Callable[[Any, int], Any] | None = None) -> None:
    """Holds one launch to the fp64 reference, with outputs full of NaN before.

    Args:
        launch: Of all heads and batch elements.
        direction: Forward or backward.
        placed: Where the device has the n-th tensor of the launch's dtype; contiguous by default.
    """
    import torch

    p = launch.problem
    dtype = getattr(torch, TORCH_NAMES[p.dtype])
    generator = torch.Generator().manual_seed(11)

    def random(heads: int, length: int, dim: int) -> Any:  # a tensor
        # Coarse values: products and their sums are exact in fp32, so that errors are the kernel's own.
        drawn = torch.randn(p.batch, heads, length, dim, generator=generator)
        return drawn.mul(8).round().div(8).to(dtype)

    q, k, v = (
        random(p.q_heads, p.q_len, p.head_dim),
        random(p.kv_heads, p.kv_len, p.head_dim),
        random(p.kv_heads, p.kv_len, p.v_dim),
    )
    out = torch.full((p.batch, p.q_heads, p.q_len, p.v_dim), float("nan"), dtype=dtype)
    lse = torch.full(out.shape[:3], float("nan"))
    d_out = random(p.q_heads, p.q_len, p.v_dim)
    d_lse = torch.randn(lse.shape, generator=generator)
    group, bound, scale = p.q_heads // p.kv_heads, launch.work.bound, launch.scale
    place = placed or (lambda tensor, number: tensor.cuda())
    on = [place(tensor, number) for number, tensor in enumerate((q, k, v))]
    if direction == "forward":
        device_out, device_lse = place(out, 3), lse.cuda()
        backend(launch.backend).lower(launch)(*on, device_out, device_lse)
        out, lse = device_out.cpu(), device_lse.cpu()
    else:
        reference.ReferenceKernel(launch)(q, k, v, out, lse)
        dq = place(torch.full_like(q, float("nan")), 5)
        dk, dv = torch.zeros(k.shape).cuda(), torch.zeros(v.shape).cuda()
        kernel = backend(launch.backend).lower_backward(launch)
        kernel(*on, place(out, 3), lse.cuda(), place(d_out, 4), d_lse.cuda(), dq, dk, dv)
        dq, dk, dv = dq.cpu(), dk.cpu(), dv.cpu()
    for b, kv_head in np.ndindex(p.batch, p.kv_heads):
        sums, limits = [0.0, 0.0], [1e-6, 1e-6]
        for h in range(kv_head * group, (kv_head + 1) * group):
            heads = tuple(t.double().numpy() for t in (q[b, h], k[b, kv_head], v[b, kv_head]))
            where = f"head {h} of batch element {b}"
            if direction == "forward":
                wanted = reference.attention(*heads, bound, scale)
                allowed = reference.tolerances(*heads, bound, scale, p.dtype)
                hold(f"out of {where}", out[b, h], wanted[0], allowed[0])
                hold(f"lse of {where}", lse[b, h], wanted[1], allowed[1])
                continue
            above = d_out[b, h].double().numpy(), d_lse[b, h].double().numpy()
            wanted = reference.gradients(*heads, bound, scale, *above)
            allowed = reference.gradient_tolerances(*heads, bound, scale, *above, p.dtype)
            hold(f"dq of {where}", dq[b, h], wanted[0], allowed[0])
            sums = [total + more for total, more in zip(sums, wanted[1:], strict=True)]
            limits = [total + more for total, more in zip(limits, allowed[1:], strict=True)]
        if direction == "backward":
            hold(f"dk of key head {kv_head}", dk[b, kv_head], sums[0], limits[0])
            hold(f"dv of key head {kv_head}", dv[b, kv_head], sums[1], limits[1])


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
    storage = torch.empty(20 * apart, dtype=getattr(torch, TORCH_NAMES[dtype]), device="cuda")

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
    q, k, v = (torch.randn(1, 1, length, dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    out = torch.full_like(q, float("nan"))
    lse = torch.full((1, 1, length), float("nan"), device="cuda")
    backend(launch.backend).lower(launch)(q, k, v, out, lse)
    assert not torch.isnan(lse).any()
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
    """What the default leaves off: partial tiles by predicate, programs that stay, the copy engine, other shapes."""
    masks = {"window": m.window(100, 3), "documents": m.documents([300, 77, 400]), "dilated": m.dilated(200, 7)}
    for each, name in own_kernels(device):
        known = {tunable.name for tunable in each.tunables_of(name)}
        # Blocks of 16 queries: more items than programs that stay.
        tried = [("by_predicate", title, {"by_predicate": 1}) for title in masks]
        tried += [
            ("persistent", "dilated", {"persistent": 1, "block_q": 16}),
            ("descriptors", "window", {"descriptors": 1}),
            ("warp_rows", "window", {"warp_rows": 32}),
            ("step_kv", "documents", {"step_kv": 16, "num_stages": 4, "pack_gqa": 2}),
        ]
        for (tunable, title, values), direction in itertools.product(tried, DIRECTIONS):
            if tunable not in known or not computes(each, name, "bf16", direction, device):
                continue

            def check(
                e: Template = each,
                n: str = name,
                a: Mask = masks[title],
                d: str = direction,
                v: dict[str, int] = values,
            ) -> None:
                case = Case("other", a, Problem(777, 777, 4, 1, 64, 64))
                config = Config.of(**{**e.default(n).to_dict(), **v})
                reason = backend(n).config_refusal(e, config, case.problem, device)
                if reason is not None:
                    raise AssertionError(reason)
                verify(launch_of(e, n, case, "bf16", device, config), d)

            yield f"tunables/{each.name}/{name}/bf16/{direction}/{tunable}-{title}", check


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
        return [torch.randn(p.batch, *shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]

    held = random()
    out = torch.full((p.batch, p.q_heads, p.q_len, p.v_dim), float("nan"), dtype=torch.bfloat16, device="cuda")
    lse = torch.full(out.shape[:3], float("nan"), device="cuda")
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
