"""Runs one kernel on one case and holds its results to the fp64 reference: what every kernel test is made of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cases import Case

from sparsec.backends import reference
from sparsec.backends.base import BACKENDS, Launch, backend
from sparsec.device import Device, detect_cpu, detect_gpu
from sparsec.device import device as named_device
from sparsec.layout import EdgeOrder, Ordering
from sparsec.masks import BoundMask
from sparsec.planner.works import IDENTITY, build_work
from sparsec.template import Config, Template, templates

if TYPE_CHECKING:
    import torch

GPU_BACKENDS = ("triton", "cuda")


def kernels() -> Iterator[tuple[Template, str]]:
    """Every template on every back end that has a kernel for it."""
    for template in templates().values():
        for name in template.backends():
            if name in BACKENDS:
                yield template, name


def marks(backend_name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu] if backend_name in GPU_BACKENDS else []


def device_of(backend_name: str) -> Device:
    return detect_gpu() if backend_name in GPU_BACKENDS else detect_cpu()


def serves(template: Template, backend_name: str, case: Case) -> bool:
    """Whether a template computes this at all: a dense one only what is full or causal, some back ends no fp32."""
    if (
        backend_name == "cuda"
        and backend("cuda").refusal(template, case.problem, named_device("nvidia-h100")) is not None
    ):
        return False
    if template.layout != "none":
        return True
    p, bound = case.problem, case.bound
    is_causal = p.q_len == p.kv_len and bound.nnz == p.q_len * (p.q_len + 1) // 2 and case.name == "causal"
    is_dense = bound.nnz == p.q_len * p.kv_len or is_causal
    return is_dense and p.head_dim == p.v_dim


@cache
def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k, v of the case's dtype; q is as large as the case says."""
    import torch

    p = case.problem
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[p.dtype]
    generator = torch.Generator().manual_seed(p.q_len * 7919 + p.kv_len * 31 + p.head_dim)
    shapes = (
        (p.batch, p.q_heads, p.q_len, p.head_dim),
        (p.batch, p.kv_heads, p.kv_len, p.head_dim),
        (p.batch, p.kv_heads, p.kv_len, p.v_dim),
    )
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    q = q * case.magnitude
    if case.shift:
        # The first dimension adds the same product, a power of two times another, to every score.
        k[..., 0] = 128.0
        q[..., 0] = 2.0 ** round(np.log2(abs(case.shift) / 128.0 / scale_of(case))) * np.sign(case.shift)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def scale_of(case: Case) -> float:
    return case.problem.head_dim**-0.5 if case.scale is None else case.scale


def launch(
    template: Template,
    backend_name: str,
    case: Case,
    *,
    config: Config | None = None,
    device: Device | None = None,
    ordering: Ordering = IDENTITY,
    bound: BoundMask | None = None,
    is_partial: bool = False,
    edges: EdgeOrder | None = None,
) -> Launch:
    """A launch of the whole case; `bound` is the mask in position space where it is not the case's."""
    p = case.problem
    device = device or device_of(backend_name)
    config = config or template.default(backend_name)
    work = build_work(template, config, bound or case.bound, p, device, heads=p.q_heads, ordering=ordering, edges=edges)
    heads, batch = tuple(range(p.q_heads)), tuple(range(p.batch))
    return Launch(template, backend_name, config, p, device, work, heads, batch, scale_of(case), is_partial)


def poisoned(case: Case, *, is_partial: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp full of NaN, so that what a kernel does not write is found."""
    import torch

    p = case.problem
    dtype = torch.float32 if is_partial else inputs(case)[0].dtype
    out = torch.full((p.batch, p.q_heads, p.q_len, p.v_dim), float("nan"), dtype=dtype)
    return out, torch.full(out.shape[:3], float("nan"))


def run(made: Launch, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel of a launch writes into poisoned buffers."""
    out, lse = poisoned(case, is_partial=made.is_partial)
    device = "cuda" if made.backend in GPU_BACKENDS else "cpu"
    q, k, v, out, lse = (tensor.to(device) for tensor in (*inputs(case), out, lse))
    backend(made.backend).lower(made)(q, k, v, out, lse)
    return out.cpu(), lse.cpu()


@cache
def expected_of(case: Case, b: int, h: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    p = case.problem
    q, k, v = inputs(case)
    kv = h // (p.q_heads // p.kv_heads)
    arrays = tuple(t.double().numpy() for t in (q[b, h], k[b, kv], v[b, kv]))
    bound = case.bound
    bound = bound.select(b, h) if bound.varies_by_head or bound.varies_by_batch else bound
    out, lse = reference.attention(*arrays, bound, scale_of(case))
    return out, lse, *reference.tolerances(*arrays, bound, scale_of(case), p.dtype)


def check(case: Case, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
    """Raises where a result is further from the reference than a correct kernel's may be."""
    for b in range(case.problem.batch):
        for h in range(case.problem.q_heads):
            expected, expected_lse, allowed, allowed_lse = expected_of(case, b, h)
            check_close(out[b, h], expected, allowed, f"output of head {h}, batch element {b}")
            if lse is not None:
                check_close(lse[b, h], expected_lse, allowed_lse, f"log-sum-exp of head {h}, batch element {b}")


def start_interpreter() -> None:
    """Of a process that runs kernels in Triton's interpreter: memory that nobody has written is full of NaN there."""
    import torch

    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def check_close(got: torch.Tensor, expected: np.ndarray, allowed: float, what: str) -> None:
    values = got.double().numpy()
    assert values.shape == expected.shape, f"{what} has shape {values.shape}, not {expected.shape}"
    is_same = values == expected  # equal infinities
    error = np.where(is_same, 0.0, np.abs(values - np.where(is_same, 0.0, expected)))
    assert not np.isnan(error).any(), f"{what}: {np.isnan(error).sum()} entries are not numbers or the wrong infinity"
    worst = float(error.max(initial=0.0))
    where = np.unravel_index(int(error.argmax()), error.shape) if error.size else ()
    assert worst <= allowed, f"{what} is off by {worst:.3g} at {where}, and {allowed:.3g} is allowed"
