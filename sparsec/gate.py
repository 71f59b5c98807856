"""The verification gate: a kernel serves users only after it passed a hard case here, with this toolchain.

This file decides what the hard cases are and how a pass is remembered: per template with its sources, back end with its
toolchain, dtype, direction and device. A failure is never remembered as a pass, and never served. It must not know how
kernels are chosen.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

from sparsec import data
from sparsec.backends import reference
from sparsec.backends.base import Dtype, Launch, Problem, backend
from sparsec.backends.reference import ReferenceKernel
from sparsec.device import Device
from sparsec.errors import CompileError, SparsecError
from sparsec.layout import EdgeOrder
from sparsec.masks import causal, from_dense
from sparsec.masks.mask import Mask
from sparsec.planner.works import build_work
from sparsec.score import ScoreMod
from sparsec.template import Template

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Direction = Literal["forward", "backward"]

# Lengths that divide nothing, grouped heads, a head_dim that fills no vector, and v of another dimension.
_CASE: Final = Problem(q_len=83, kv_len=151, q_heads=4, kv_heads=2, head_dim=40, v_dim=24, batch=2)
_passed: set[str] = set()


def ensure(
    template: Template,
    backend_name: str,
    dtype: Dtype,
    device: Device,
    direction: Direction = "forward",
    score: ScoreMod | None = None,
) -> None:
    """Returns when the kernel has passed its check here, now or earlier.

    Raises:
        CompileError: It does not compile, or its results are wrong.
    """
    if backend_name == "reference" or (backend_name == "torch" and device.kind == "cpu"):
        return
    key = _key(template, backend_name, dtype, direction, device, score)
    if key in _passed or _is_remembered(key):
        _passed.add(key)
        return
    error = check(template, backend_name, dtype, device, direction, score)
    if error is not None:
        raise CompileError(
            f"{template.name} on {backend_name} ({dtype}) gave wrong results on {device.name} and is not used: "
            f"{error}; the toolchain is {backend(backend_name).toolchain()}",
            template.kernel_path(backend_name),
        )
    _passed.add(key)
    _remember(key, template, backend_name, dtype, device, direction)


def is_passed(
    template: Template, backend_name: str, dtype: Dtype, device: Device, direction: Direction = "forward"
) -> bool:
    """Whether a kernel has passed its check here, with the sources and the toolchain of today."""
    key = _key(template, backend_name, dtype, direction, device, None)
    return key in _passed or _is_remembered(key)


def check(
    template: Template,
    backend_name: str,
    dtype: Dtype,
    device: Device,
    direction: Direction = "forward",
    score: ScoreMod | None = None,
) -> str | None:
    """What is wrong with a kernel's results on the hard case, in one sentence, or None."""
    import torch

    mask, problem = _case_of(template)
    problem = replace(problem, dtype=dtype)
    bound = mask.bind(problem.q_len, problem.kv_len)
    config = template.default(backend_name)
    heads, batch = tuple(range(problem.q_heads)), tuple(range(problem.batch))
    edges = EdgeOrder(bound) if score is not None and score.needs_edges else None
    work = build_work(template, config, bound, problem, device, heads=problem.q_heads, edges=edges)
    launch = Launch(
        template, backend_name, config, problem, device, work, heads, batch, problem.head_dim**-0.5, score=score
    )
    # Torch calls every GPU "cuda", AMD's too.
    where = "cpu" if device.kind == "cpu" else "cuda"
    q, k, v = (tensor.to(where) for tensor in _inputs(problem))
    tables = [tensor.to(where) for tensor in _tables(score)]
    out = q.new_full((problem.batch, problem.q_heads, problem.q_len, problem.v_dim), float("nan"))
    lse = torch.full(out.shape[:3], float("nan"), device=where)
    given = Given(q, k, v, tables)
    also = [tables] if tables else []
    if direction == "forward":
        backend(backend_name).lower(launch)(q, k, v, out, lse, *also)
        return forward_error(launch, given, out, lse)
    # The backward pass is given exact results of the forward pass, so that its own errors are seen.
    ReferenceKernel(launch)(q, k, v, out, lse, tables)
    generator = torch.Generator().manual_seed(13)
    above = (torch.randn(out.shape, generator=generator).to(out), torch.randn(lse.shape, generator=generator).to(lse))
    dk, dv = (torch.zeros_like(like, dtype=torch.float32) for like in (k, v))
    sums = Sums(torch.full_like(q, float("nan")), dk, dv, [torch.zeros_like(table) for table in tables])
    kernel = backend(backend_name).lower_backward(launch)
    kernel(q, k, v, out, lse, *above, sums.dq, dk, dv, *also, *([sums.d_tables] if tables else []))
    return gradient_error(launch, given, above, sums)


@dataclass(frozen=True)
class Given:
    """What a launch computes from: as a kernel takes them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tables: Sequence[torch.Tensor] = ()

    def heads(self, b: int, h: int) -> tuple[reference.FloatArray, reference.FloatArray, reference.FloatArray]:
        """Of one query head, in fp64."""
        kv_head = h // (self.q.shape[1] // self.k.shape[1])
        return _array(self.q[b, h]), _array(self.k[b, kv_head]), _array(self.v[b, kv_head])


@dataclass(frozen=True)
class Sums:
    """What a backward pass has written, or added to zeros."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    d_tables: Sequence[torch.Tensor] = ()


# By batch element and head: what is expected, and what is allowed.
Known: TypeAlias = dict[tuple[int, int], tuple[tuple[reference.FloatArray, ...], tuple[float, ...]]]


def forward_error(
    launch: Launch, given: Given, out: torch.Tensor, lse: torch.Tensor, known: Known | None = None
) -> str | None:
    """What is wrong with the results of a launch over all heads, in one sentence, or None.

    Args:
        launch: Which launch.
        given: The inputs.
        out: What was written.
        lse: Likewise.
        known: Of the same mask, inputs and scale, and of no score modifier: filled in, and used where it is filled.
    """
    bound, scale, dtype = launch.work.bound, launch.scale, launch.problem.dtype
    known = {} if known is None else known
    for b, h in np.ndindex(out.shape[:2]):
        if (b, h) not in known:
            heads, modifier = given.heads(b, h), reference.modifier_of(launch, b, h, given.tables)
            results = reference.attention(*heads, bound, scale, modifier=modifier)
            known[b, h] = results, reference.tolerances(*heads, bound, scale, dtype, modifier)
        expected, allowed = known[b, h]
        error = _worst(("the output", "the log-sum-exp"), (_array(out[b, h]), _array(lse[b, h])), expected, allowed)
        if error is not None:
            return f"head {h} of batch element {b}: {error}"
    return None


def gradient_error(
    launch: Launch,
    given: Given,
    above: tuple[torch.Tensor, torch.Tensor],
    sums: Sums,
    known: Known | None = None,
) -> str | None:
    """What is wrong with the gradients of a launch over all heads, in one sentence, or None.

    Args:
        launch: Which launch.
        given: The inputs.
        above: The gradients of the output and of the log-sum-exp.
        sums: What was written.
        known: As in `forward_error`, and of the same gradients above.
    """
    known = {} if known is None else known
    bound, scale, dtype = launch.work.bound, launch.scale, launch.problem.dtype
    group = launch.problem.group
    expected_tables = [np.zeros(tuple(table.shape)) for table in given.tables]
    allowed_tables = [0.0] * len(expected_tables)
    for b, kv_head in np.ndindex(given.k.shape[:2]):
        expected_k, expected_v = (np.zeros(tuple(each.shape[2:])) for each in (given.k, given.v))
        allowed_k = allowed_v = 0.0
        for h in range(kv_head * group, (kv_head + 1) * group):
            if (b, h) not in known:
                heads, modifier = given.heads(b, h), reference.modifier_of(launch, b, h, given.tables)
                own = (_array(above[0][b, h]), _array(above[1][b, h]))
                gradients = reference.gradients(*heads, bound, scale, *own, modifier, expected_tables)
                known[b, h] = gradients, reference.gradient_tolerances(*heads, bound, scale, *own, dtype, modifier)
            expected, allowed = known[b, h]
            error = _worst(("dq",), (_array(sums.dq[b, h]),), expected[:1], allowed[:1])
            if error is not None:
                return f"head {h} of batch element {b}: {error}"
            expected_k, expected_v = expected_k + expected[1], expected_v + expected[2]
            allowed_k, allowed_v = allowed_k + allowed[1], allowed_v + allowed[2]
            allowed_tables = [total + more for total, more in zip(allowed_tables, allowed[3:], strict=True)]
        found = (_array(sums.dk[b, kv_head]), _array(sums.dv[b, kv_head]))
        error = _worst(("dk", "dv"), found, (expected_k, expected_v), (allowed_k, allowed_v))
        if error is not None:
            return f"key head {kv_head} of batch element {b}: {error}"
    names = () if launch.score is None else tuple(f"the gradient of {t.name!r}" for t in launch.score.live_tables)
    return _worst(names, tuple(map(_array, sums.d_tables)), tuple(expected_tables), tuple(allowed_tables))


def _case_of(template: Template) -> tuple[Mask, Problem]:
    """The hard case; of a template that is for dense masks alone, the harder of those it takes."""
    if template.layout != "none":
        return hard_mask(), _CASE
    return causal(), replace(_CASE, kv_len=_CASE.q_len, v_dim=_CASE.head_dim)


def hard_mask() -> Mask:
    """Empty and full rows and columns, full and partial tiles, single edges."""
    rng = np.random.default_rng(7)
    mask = rng.random((_CASE.q_len, _CASE.kv_len)) < 0.15
    mask[3:70, 10:90] = True
    mask[5] = mask[64] = False
    mask[17] = mask[66] = True
    mask[:, 100] = False
    mask[:, 101] = True
    mask[:, 101] &= np.arange(_CASE.q_len) != 5
    return from_dense(mask)


def _inputs(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(11)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[problem.dtype]

    def random(heads: int, length: int, dim: int) -> torch.Tensor:
        return torch.randn(problem.batch, heads, length, dim, generator=generator).to(dtype)

    return (
        random(problem.q_heads, problem.q_len, problem.head_dim) * 2,
        random(problem.kv_heads, problem.kv_len, problem.head_dim),
        random(problem.kv_heads, problem.kv_len, problem.v_dim),
    )


def _tables(score: ScoreMod | None) -> list[torch.Tensor]:
    """Random content for the live tables: what they hold now may be nothing but zeros."""
    import torch

    generator = torch.Generator().manual_seed(17)
    return [torch.randn(table.shape, generator=generator) for table in (() if score is None else score.live_tables)]


def _array(tensor: torch.Tensor) -> reference.FloatArray:
    array: reference.FloatArray = tensor.double().cpu().numpy()
    return array


def _worst(
    names: tuple[str, ...],
    found: tuple[reference.FloatArray, ...],
    expected: tuple[reference.FloatArray, ...],
    allowed: tuple[float, ...],
) -> str | None:
    """The first result that is further off than allowed, in one sentence; infinities must be equal."""
    for name, got, wanted, limit in zip(names, found, expected, allowed, strict=True):
        same = got == wanted
        error = float(np.where(same, 0.0, np.abs(got - np.where(same, 0.0, wanted))).max(initial=0.0))
        if not error <= limit:
            return f"{name} is off by {error:.3g} where {limit:.3g} is allowed"
    return None


def _key(
    template: Template, backend_name: str, dtype: str, direction: Direction, device: Device, score: ScoreMod | None
) -> str:
    parts: tuple[str, ...] = (
        template.source_digest,
        backend_name,
        backend(backend_name).toolchain(),
        dtype,
        direction,
        device.key,
    )
    parts += () if score is None else (score.digest,)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _is_remembered(key: str) -> bool:
    return (data.cache_dir() / "gate" / f"{key}.json").is_file()


def _remember(
    key: str, template: Template, backend_name: str, dtype: str, device: Device, direction: Direction
) -> None:
    passed = {
        "template": template.name,
        "backend": backend_name,
        "dtype": dtype,
        "direction": direction,
        "device": device.key,
        "toolchain": backend(backend_name).toolchain(),
    }
    try:
        folder = data.cache_dir() / "gate"
        folder.mkdir(mode=0o700, exist_ok=True)
        data.publish(folder / f"{key}.json", json.dumps(passed, indent=1).encode())
    except (SparsecError, OSError) as error:
        logger.warning("the check of %s is not remembered: %s", template.name, error)
