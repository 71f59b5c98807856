"""The peers: ours and what torch offers, one small class each; `packages` has those that must be installed.

This file decides how each peer is best asked for the same work: compiled, in the layout it likes, with whatever it can
prepare made beforehand. It must not know how calls are timed or checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import packages
from bench.names import family
from bench.prepared import Peer, Prepared, RefusedError, check_memory, dense_mask, plain
from sparsec import masks
from sparsec.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from bench.results import PlanFacts
    from bench.workload import Workload
    from sparsec.masks import BoundMask

__all__ = ["Peer", "Prepared", "RefusedError", "peer"]


@dataclass(frozen=True, slots=True)
class Ours:
    """`sparsec.compile`: as planned, or with a template forced, or a template on one back end."""

    name: str = "ours"
    template: str | None = None
    backend: str | None = None

    def prepare(self, work: Workload) -> Prepared:
        import sparsec

        try:
            attention = sparsec.compile(work.bound, template=self.template, backend=self.backend)
        except UnsupportedError as error:
            raise RefusedError(str(error)) from error

        def call() -> Any:
            try:
                return attention(work.q, work.k, work.v)
            except UnsupportedError as error:
                raise RefusedError(str(error)) from error

        return Prepared(call, work.bound, plan=lambda: plan_facts(attention.plan))


def plan_facts(plan: Any) -> PlanFacts:
    from bench.results import PlanFacts

    runs = []
    for step in plan.steps:
        launch = step.launch
        order = launch.work.ordering.name if launch.work.ordering.q_order is not None else ""
        runs.append(" ".join(filter(None, [launch.template.name, "on", launch.backend, str(launch.config), order])))
    return PlanFacts(tuple(runs), plan.planning_us, plan.estimate.us, plan.layout_bytes)


@dataclass(frozen=True, slots=True)
class Sdpa:
    """torch's dense attention, for the masks it knows: full and causal; by one of its back ends, or as it chooses."""

    name: str = "sdpa"
    backend: str = ""

    def prepare(self, work: Workload) -> Prepared:
        is_causal = _same(work.bound, masks.causal())
        if not is_causal and not _same(work.bound, masks.full()):
            raise RefusedError("without a mask it computes full or causal attention, and this is neither")
        return _sdpa(work, self.backend, is_causal=is_causal)


@dataclass(frozen=True, slots=True)
class SdpaUnmasked:
    """torch's dense attention over every pair: another result, a yardstick for when sparsity pays."""

    name: str = "sdpa_unmasked"

    def prepare(self, work: Workload) -> Prepared:
        every = masks.full().bind(*work.bound.shape)
        return replace(_sdpa(work), computes=every, note="computes every pair, not this mask")


@dataclass(frozen=True, slots=True)
class SdpaMasked:
    """torch's dense attention with a boolean mask; by one of its back ends, or as it chooses."""

    name: str = "sdpa_masked"
    backend: str = ""

    def prepare(self, work: Workload) -> Prepared:
        bound = plain(work.bound)
        # torch turns the boolean mask into an additive one of the tensors' dtype.
        check_memory(bound.q_len * bound.kv_len * (1 + work.problem.itemsize), "its mask", work)
        return _sdpa(work, self.backend, attn_mask=dense_mask(bound, work))


_SDPA_BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}


# As torch says it of a GPU, and of a CPU.
_NO_KERNEL = ("No available kernel", "No viable backend")


def _sdpa(work: Workload, backend: str = "", **options: Any) -> Prepared:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, _SDPA_BACKENDS[backend]) if backend else None
    # This back end knows no groups.
    is_expanded = work.is_grouped and backend == "efficient"
    q, k, v = inputs = (work.q, *(work.expanded if is_expanded else (work.k, work.v)))

    def call() -> torch.Tensor:
        with nullcontext() if chosen is None else sdpa_kernel(chosen):
            try:
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, scale=work.scale, enable_gqa=work.is_grouped and not is_expanded, **options
                )
            except RuntimeError as error:
                if chosen is not None and any(words in str(error) for words in _NO_KERNEL):
                    raise RefusedError(f"torch has no kernel of its {backend} back end for this") from error
                raise

    return Prepared(call, work.bound, inputs=inputs)


@dataclass(frozen=True, slots=True)
class Flex:
    """FlexAttention: compiled, with a block mask made from a user's predicate."""

    name: str = "flex"
    block: int = 128
    is_max_autotune: bool = False

    def prepare(self, work: Workload) -> Prepared:
        import torch
        from torch.nn.attention import flex_attention as flex

        from bench.flex import NoPredicateError, mask_mod

        if work.needs_grad and work.device == "cpu":
            raise RefusedError("FlexAttention has no backward pass on a CPU")
        bound = plain(work.bound)
        try:
            predicate = mask_mod(work.case.mask, bound, work.q.device)
        except NoPredicateError as error:
            raise RefusedError(str(error)) from error
        # `create_block_mask` evaluates the predicate on all pairs, in 64-bit integers.
        check_memory(bound.q_len * bound.kv_len * 10, "making its block mask", work)
        block_mask = None
        if predicate is not None:
            _check_predicate(predicate, bound, work.q.device)
            block_mask = flex.create_block_mask(
                predicate, None, None, bound.q_len, bound.kv_len, device=work.q.device, BLOCK_SIZE=self.block
            )
        mode = "max-autotune-no-cudagraphs" if self.is_max_autotune else None
        compiled = torch.compile(flex.flex_attention, dynamic=False, mode=mode)
        return Prepared(
            lambda: compiled(
                work.q, work.k, work.v, block_mask=block_mask, scale=work.scale, enable_gqa=work.is_grouped
            ),
            work.bound,
        )


def _check_predicate(predicate: Callable[..., Any], bound: BoundMask, device: torch.device) -> None:
    """Raises unless the predicate is the mask, on sampled rows."""
    import torch

    from bench.exactness import dense_rows, sampled_rows

    rows = sampled_rows(bound)
    attended, keys = dense_rows(bound, rows)
    expected = np.zeros((len(rows), bound.kv_len), bool)
    expected[:, keys] = attended
    zero, every = torch.tensor(0, device=device), torch.arange(bound.kv_len, device=device)
    found = predicate(zero, zero, torch.from_numpy(rows).to(device)[:, None], every[None])
    differ = np.flatnonzero((found.expand(expected.shape).cpu().numpy() != expected).any(1))
    if len(differ):
        raise AssertionError(f"the predicate given to FlexAttention is another mask in row {rows[differ[0]]}")


@dataclass(frozen=True, slots=True)
class TorchSparse:
    """torch.sparse: sampled dense-dense product, softmax over the rows' values, sparse-dense product."""

    name: str = "torch_sparse"

    def prepare(self, work: Workload) -> Prepared:
        if work.problem.dtype != "fp32":
            raise RefusedError("torch's sparse products take fp32")
        from bench.sparse import Pattern, SparseAttention

        bound = plain(work.bound)
        copies = work.problem.q_heads * work.problem.batch
        # Row, column, zero and weight of each edge; for gradients, it by key too, and the gradients of its weight.
        check_memory(bound.nnz * copies * (28 if not work.needs_grad else 64), "its edges", work)
        # torch warns once that CSR is in beta.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        pattern = Pattern.of(bound.to_csr(), copies, work.needs_grad, work.q.device)
        inputs = (work.q, *work.expanded)
        note = "the backward pass is written out in the same products, as torch's own gradients of them are dense"
        return Prepared(
            lambda: SparseAttention.apply(*inputs, pattern, work.scale),
            work.bound,
            note=note if work.needs_grad else "",
            inputs=inputs,
        )


@dataclass(frozen=True, slots=True)
class GatherScatter:
    """Message passing as graph libraries do it: gather keys and values per edge, softmax by target, scatter."""

    name: str = "gather_scatter"

    def prepare(self, work: Workload) -> Prepared:
        import torch

        bound = plain(work.bound)
        heads, dim = work.problem.q_heads, work.problem.head_dim
        # The backward pass keeps the first three and makes their gradients.
        n_copies = 7 if work.needs_grad else 3
        n_bytes = n_copies * bound.nnz * heads * dim * work.problem.itemsize
        check_memory(n_bytes, "a key, a query and a value for each edge", work)
        indptr, columns = (tensor.to(work.q.device) for tensor in _csr(bound.to_csr()))
        target = torch.repeat_interleave(torch.arange(bound.q_len, device=work.q.device), indptr.diff())
        # Features of a node lie together, as in `[nodes, heads, channels]`.
        features = [tensor.detach().transpose(1, 2).contiguous() for tensor in (work.q, *work.expanded)]
        for tensor in features:
            tensor.requires_grad_(work.needs_grad)
        index = target[:, None].expand(-1, heads)

        def call() -> torch.Tensor:
            elements = zip(*(tensor.unbind() for tensor in features), strict=True)
            return torch.stack([attend(*each) for each in elements])

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            scores = ((q[target] * k[columns]).sum(-1) * work.scale).float()
            empty = scores.new_zeros(bound.q_len, heads)
            # It cancels, so that nothing need be differentiated through it.
            peak = empty.scatter_reduce(0, index, scores.detach(), "amax", include_self=False)
            weights = (scores - peak[target]).exp()
            total = empty.scatter_add(0, index, weights)
            messages = v[columns] * (weights / total[target]).to(v.dtype).unsqueeze(-1)
            return v.new_zeros(bound.q_len, heads, dim).index_add_(0, target, messages)

        return Prepared(call, work.bound, lambda out: out.transpose(1, 2), inputs=tuple(features))


# Any: SciPy carries no types.
def _csr(array: Any) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    return torch.from_numpy(array.indptr.astype(np.int64)), torch.from_numpy(array.indices.astype(np.int64))


def _same(bound: BoundMask, mask: masks.Mask) -> bool:
    """Whether a mask is another at these lengths: no edge more, no edge less."""
    if bound.varies_by_head or bound.varies_by_batch:
        return False
    return bound == mask.bind(*bound.shape)


def peer(name: str) -> Peer:
    """The peer of a name that a grid may say."""
    variant = name.partition(":")[2]
    match family(name):
        case "ours":
            template, _, server = variant.partition("@")
            return Ours(name, template or None, server or None)
        case "flex":
            return Flex(name, int(variant) if variant.isdigit() else 128, variant == "max-autotune")
        case "sdpa":
            return Sdpa(name, variant)
        case "sdpa_masked":
            return SdpaMasked(name, variant)
        case "flash_attn":
            return packages.FlashAttention(name, "flash_attn_interface" if variant == "3" else "flash_attn")
        case "flashinfer":
            return packages.FlashInferBlocks() if variant else packages.FlashInfer()
        case head:
            others: tuple[Peer, ...] = (SdpaUnmasked(), TorchSparse(), GatherScatter())
            others += (packages.Natten(), packages.Xformers(), packages.Magi(), packages.SpanCsr())
            return next(each for each in others if each.name == head)
