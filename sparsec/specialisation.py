"""A plan with its kernels: what runs for one signature of shapes, heads and dtype.

This file decides how a plan's launches become kernels, how tensors are handed to them, and how the partial results of
several are joined. It must not know how a plan is chosen or when one is made, nor any kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from sparsec import buffers, gate
from sparsec.backends.base import GradientKernel, Kernel, Launch, Rebindable, Replayable, backend
from sparsec.errors import BackendMissingError
from sparsec.planner import Group, Plan

if TYPE_CHECKING:
    import torch


class Specialisation:
    """A plan with its kernels; those of the backward pass are made when first needed."""

    def __init__(self, made: Plan) -> None:
        self.plan = made
        self._kernels = [[_lowered(step.launch) for step in group.steps] for group in made.groups]
        self._gradients: list[list[GradientKernel]] | None = None
        if made.problem.needs_grad:
            self._gradients = self._lowered_gradients()

    def renewed(self, made: Plan) -> Specialisation:
        """The same with a plan that differs in index arrays, heads and batch elements alone: nothing is compiled."""
        again = copy.copy(self)
        again.plan = made
        rebind = {
            (launch.template.name, launch.backend): rebinding(launch, kernel) for launch, kernel in self.kernels()
        }
        again._kernels = [
            [rebind[step.launch.template.name, step.launch.backend](step.launch) for step in group.steps]
            for group in made.groups
        ]
        if self._gradients is not None:
            again._gradients = again._lowered_gradients()
        return again

    def take_over(self, old: Specialisation) -> None:
        """Lets graphs that were captured with the specialisation before go on with this one's mask."""
        for mine, before in ((self._kernels, old._kernels), (self._gradients or [], old._gradients or [])):
            for kernel, replaced in zip(chain(*mine), chain(*before), strict=False):
                if isinstance(kernel, Replayable) and type(kernel) is type(replaced):
                    kernel.take_over(replaced)

    def kernels(self) -> list[tuple[Launch, Kernel]]:
        return [
            (step.launch, kernel)
            for group, kernels in zip(self.plan.groups, self._kernels, strict=True)
            for step, kernel in zip(group.steps, kernels, strict=True)
        ]

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tables: Sequence[torch.Tensor] = (),
        *,
        with_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        import torch

        from sparsec import torch_ops

        out = torch_ops.new_output(q, v.shape[3], partial(buffers.empty, dtype=q.dtype, device=q.device))
        q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if with_lse else None
        also = (tables,) if tables else ()
        for group, kernels in zip(self.plan.groups, self._kernels, strict=True):
            if group.is_joined:
                _run_joined(group, kernels, q, k, v, out, lse, also)
            else:
                for kernel in kernels:
                    kernel(q, k, v, out, lse, *also)
        return out, lse

    def backward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        d_out: torch.Tensor,
        d_lse: torch.Tensor,
        tables: Sequence[torch.Tensor] = (),
        d_tables: Sequence[torch.Tensor | None] = (),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        assert self._gradients is not None, "planned without gradients"
        q, k, v, out, d_out, lse, d_lse = (rows_contiguous(t) for t in (q, k, v, out, d_out, lse, d_lse))
        dk = buffers.zeros(k.shape, torch.float32, k.device)
        dv = buffers.zeros(v.shape, torch.float32, v.device)
        dq = buffers.empty(q.shape, q.dtype, q.device)
        also = (tables, d_tables) if tables else ()
        for group, kernels in zip(self.plan.groups, self._gradients, strict=True):
            if not group.is_joined:
                for kernel in kernels:
                    kernel(q, k, v, out, lse, d_out, d_lse, dq, dk, dv, *also)
                continue
            # Each launch gives what its own edges contribute to dQ.
            total = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
            part = torch.zeros_like(total)
            for kernel in kernels:
                kernel(q, k, v, out, lse, d_out, d_lse, part, dk, dv, *also)
                total += part
            _copy_heads(group, dq, total)
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _lowered_gradients(self) -> list[list[GradientKernel]]:
        return [[_lowered_backward(each) for each in group.backward_launches] for group in self.plan.groups]


def _run_joined(
    group: Group,
    kernels: list[Kernel],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    also: tuple[Sequence[torch.Tensor], ...],
) -> None:
    """Partial results in fp32, weighed by their log-sum-exp: exact up to fp32 rounding."""
    import torch

    parts, log_sums = [], []
    for kernel in kernels:
        part = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        log_sum = torch.zeros(out.shape[:3], dtype=torch.float32, device=out.device)
        kernel(q, k, v, part, log_sum, *also)
        parts.append(part)
        log_sums.append(log_sum)
    total = torch.logsumexp(torch.stack(log_sums), dim=0)
    # An empty row has -inf in every part, and no weight.
    base = torch.where(torch.isneginf(total), torch.zeros_like(total), total)
    joined = torch.zeros_like(parts[0])
    for part, log_sum in zip(parts, log_sums, strict=True):
        joined.addcmul_(part, (log_sum - base).exp_().unsqueeze(-1))
    _copy_heads(group, out, joined)
    if lse is not None:
        _copy_heads(group, lse, total)


def _copy_heads(group: Group, into: torch.Tensor, source: torch.Tensor) -> None:
    """Copies the heads and batch elements of a group."""
    is_all_heads, is_all_batch = len(group.heads) == into.shape[1], group.is_whole_batch
    if is_all_heads and is_all_batch:
        into.copy_(source)
        return
    heads = list(group.heads)
    for b in range(into.shape[0]) if is_all_batch else group.batch:
        into[b, heads] = source[b, heads].to(into.dtype)


def rebinding(launch: Launch, kernel: Kernel) -> Callable[[Launch], Kernel]:
    """What makes the kernel of another launch that differs from this one in its work alone; it needs no check."""
    return kernel.rebound if isinstance(kernel, Rebindable) else backend(launch.backend).lower


def _lowered(launch: Launch) -> Kernel:
    server = backend(launch.backend)
    missing = server.missing(launch.device)
    if missing is not None:
        raise BackendMissingError(
            f"{launch.template.name} was planned for the {launch.backend} back end, but {missing}"
        )
    gate.ensure(launch.template, launch.backend, launch.problem.dtype, launch.device, "forward", launch.score)
    return server.lower(launch)


def _lowered_backward(launch: Launch) -> GradientKernel:
    gate.ensure(launch.template, launch.backend, launch.problem.dtype, launch.device, "backward", launch.score)
    return backend(launch.backend).lower_backward(launch)


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy."""
    tensor = tensor.resolve_neg()  # a sign that is only a flag would be lost
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
