"""Who takes part in `sparsec bench`: the plan, its rivals, and torch's ways to compute the same.

This file decides how each contestant is asked, and why one cannot take part. It must not know how they are timed or
checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from sparsec.backends.base import DTYPE_BYTES, Dtype, Problem
from sparsec.cli.demo_cases import Absent, Case, Tensors, peers
from sparsec.masks import BoundMask, full
from sparsec.planner.works import IDENTITY

if TYPE_CHECKING:
    import torch

    from sparsec.cli.planning import Asked
    from sparsec.planner import Plan

Run = Callable[[], "torch.Tensor"]

# The plan's rivals, at most.
_RIVALS: Final = 4
# FlexAttention evaluates its predicate on all pairs, in 64-bit integers.
_FLEX_BYTES_A_PAIR: Final = 10


class RefusedError(Exception):
    """Why a contestant does not take part, in one sentence."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to compute attention.

    Attributes:
        name: For a person.
        is_ours: Whether sparsec runs it.
        bound: The mask that its answer means: a dense kernel's is another.
        asked_digest: Of the mask that was asked for.
        dtype: Of its inputs.
        estimate_us: What it should take, where there is an estimate.
        prepare: Everything it does once; returns what is timed. Raises `RefusedError`.
    """

    name: str
    is_ours: bool
    bound: BoundMask
    asked_digest: str
    dtype: Dtype
    estimate_us: float | None
    prepare: Callable[[], Run]


def tensors(problem: Problem) -> Tensors:
    """Normal random numbers, the same at every run: `[batch, heads, length, dim]`."""
    import torch

    generator = torch.Generator().manual_seed(0)
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[problem.dtype]
    shapes = (
        (problem.batch, problem.q_heads, problem.q_len, problem.head_dim),
        (problem.batch, problem.kv_heads, problem.kv_len, problem.head_dim),
        (problem.batch, problem.kv_heads, problem.kv_len, problem.v_dim),
    )
    q, k, v = (torch.randn(shape, generator=generator).to(kind) for shape in shapes)
    return Tensors(q, k, v)


def contestants(made: Plan, asked: Asked, given: Tensors, memory_bytes: int, *, with_peers: bool) -> list[Contestant]:
    """The plan first, then its rivals, then the peers."""
    found = list(_ours(made, asked, given))
    return [*found, *_peers(made, given, memory_bytes)] if with_peers else found


def _ours(made: Plan, asked: Asked, given: Tensors) -> Iterator[Contestant]:
    digest, dtype = made.mask.digest, made.problem.dtype
    yield Contestant(f"sparsec: {_words(made)}", True, made.mask, digest, dtype, made.us, _compiled(made, asked, given))
    shown = {_words(made)}
    for group in made.groups[:1]:
        for each in group.alternatives:
            if " + " in each.template or len(shown) > _RIVALS:
                continue
            wanted = replace(asked, template=each.template, backend=each.backend, reorder="force")
            if each.ordering == IDENTITY.name:
                wanted = replace(wanted, reorder="off")
            rival = _planned(wanted, made.mask)
            if rival is None or _words(rival) in shown:
                continue
            shown.add(_words(rival))
            prepare = _compiled(rival, wanted, given)
            yield Contestant(f"sparsec: {_words(rival)}", True, made.mask, digest, dtype, rival.us, prepare)


def _planned(asked: Asked, bound: BoundMask) -> Plan | None:
    from sparsec.errors import SparsecError

    try:
        return asked.plan(bound)
    except SparsecError:
        return None


def _words(made: Plan) -> str:
    from sparsec.report import launches

    return launches(made)


def _compiled(made: Plan, asked: Asked, given: Tensors) -> Callable[[], Run]:
    def prepare() -> Run:
        import torch

        import sparsec

        problem = made.problem
        attention = sparsec.compile(
            made.mask,
            q_heads=problem.q_heads,
            kv_heads=problem.kv_heads,
            head_dim=problem.head_dim,
            v_dim=problem.v_dim,
            dtype=problem.dtype,
            device="cpu",
            template=asked.template,
            backend=asked.backend,
            reorder=asked.reorder,
            tune=asked.tune,
        )

        def run() -> torch.Tensor:
            answer = attention(*given)
            assert isinstance(answer, torch.Tensor), "a log-sum-exp was not asked for"
            return answer

        return run

    return prepare


def _peers(made: Plan, given: Tensors, memory_bytes: int) -> Iterator[Contestant]:
    bound, problem = made.mask, made.problem
    digest, dtype = bound.digest, problem.dtype

    def absent(name: str, reason: str) -> Contestant:
        def refuse() -> Run:
            raise RefusedError(reason)

        return Contestant(name, False, bound, digest, dtype, None, refuse)

    alike = Tensors(*(each.repeat_interleave(problem.q_heads // each.shape[1], 1) for each in given))
    yield Contestant(
        "torch SDPA, all pairs", False, full().bind(*bound.shape), digest, dtype, _dense_us(made), lambda: _sdpa(alike)
    )
    if bound.varies_by_head or bound.varies_by_batch:
        yield absent("other peers", "they take one mask for all heads and batch elements")
        return
    case = Case("", "", bound.mask, problem.q_len, problem.q_heads, (dtype,), is_graph=True)
    simple = problem.batch == 1 and problem.v_dim == problem.head_dim
    for peer in peers(case, bound, dtype, alike, memory_bytes):
        if isinstance(peer, Absent):
            yield absent(peer.name, peer.reason)
        elif peer.name.startswith(("gather", "torch.sparse")) and not (simple and dtype == "fp32"):
            yield absent(peer.name, "it takes fp32, one batch element, and v of the dimension of k")
        elif peer.name.startswith(("gather", "torch.sparse")) and _edge_bytes(made) > memory_bytes:
            yield absent(peer.name, f"{bound.nnz:,} edges would not fit beside the tensors")
        else:
            yield Contestant(peer.name, False, bound, digest, dtype, None, peer.prepare)
    yield _flex(made, alike, memory_bytes, absent)


def _edge_bytes(made: Plan) -> int:
    """Of gathered keys and values, and their products, for every edge."""
    return made.mask.nnz * made.problem.q_heads * made.problem.head_dim * DTYPE_BYTES[made.problem.dtype] * 3


def _dense_us(made: Plan) -> float:
    from sparsec.planner.lengths import dense_us

    return dense_us(made)


def _sdpa(given: Tensors) -> Run:
    import torch

    return lambda: torch.nn.functional.scaled_dot_product_attention(*given)


def _flex(made: Plan, given: Tensors, memory_bytes: int, absent: Callable[[str, str], Contestant]) -> Contestant:
    from sparsec.planner.words import size

    bound = made.mask
    name, needed = "FlexAttention, compiled", bound.q_len * bound.kv_len * _FLEX_BYTES_A_PAIR
    if needed > memory_bytes:
        return absent(name, f"making its block mask would need {size(needed)}")
    return Contestant(name, False, bound, bound.digest, made.problem.dtype, None, lambda: _flex_run(bound, given))


def _flex_run(bound: BoundMask, given: Tensors) -> Run:
    import torch
    from torch.nn.attention import flex_attention as flex

    from sparsec.expr.printers import torch_function

    if bound.predicate is not None:
        function = torch_function(bound.predicate)

        def attends(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # tensors
            return function(q_idx=q_idx, kv_idx=kv_idx)
    else:
        pairs = torch.from_numpy(bound.to_csr().toarray())

        def attends(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # tensors
            return pairs[q_idx, kv_idx]

    try:
        block_mask = flex.create_block_mask(attends, None, None, *bound.shape, device="cpu")
        compiled = torch.compile(flex.flex_attention, dynamic=False)
        compiled(*given, block_mask=block_mask)
    # Whatever torch's compiler raises: it is a peer that cannot take part.
    except Exception as error:
        raise RefusedError(f"torch cannot compile it: {type(error).__name__}") from error

    def run() -> torch.Tensor:
        answer: torch.Tensor = compiled(*given, block_mask=block_mask)
        return answer

    return run
