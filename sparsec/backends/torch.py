"""The torch back end: torch's own dense attention, for masks that are full or causal.

This file decides how a dense launch is handed over, and how its log-sum-exp is had where the public function does not
return it. It has no kernels of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sparsec.backends.base import GradientKernel, Launch, Problem
from sparsec.device import Device
from sparsec.errors import UnsupportedError
from sparsec.template import Config, Template

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TorchKernel:
    """A dense launch run by torch."""

    launch: Launch

    @property
    def nbytes(self) -> int:
        return 0

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        import torch

        launch = self.launch
        problem = launch.problem
        is_causal = problem.q_len > 1 and launch.work.bound.nnz < problem.q_len * problem.kv_len
        group = problem.q_heads // problem.kv_heads
        heads = list(launch.heads)
        elements = launch.elements(q.shape[0])
        is_all = heads == list(range(problem.q_heads)) and len(elements) == q.shape[0]
        kv_heads = [h // group for h in heads]
        for batch in [slice(None)] if is_all else [slice(b, b + 1) for b in elements]:
            qs = q if is_all else q[batch, heads]
            ks, vs = (t if is_all and group == 1 else t[batch, kv_heads] for t in (k, v))
            if lse is None:
                values = torch.nn.functional.scaled_dot_product_attention(
                    qs, ks, vs, is_causal=is_causal, scale=launch.scale
                )
            else:
                # In half precision torch's exponentials are good for the output, and not for an fp32 log-sum-exp.
                values, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    qs.float(), ks.float(), vs.float(), 0.0, is_causal, scale=launch.scale
                )
                lse[batch, heads] = log_sums
            out[batch, heads] = values.to(out.dtype)

    def source(self) -> dict[str, str]:
        return {"torch.py": Path(__file__).read_text()}


class TorchBackend:
    """Hands dense launches to torch."""

    name = "torch"

    def serves(self, device: Device) -> bool:
        return device.kind == "cpu"  # handing over work on GPUs is not built yet

    def refusal(self, template: Template, problem: Problem, device: Device) -> str | None:
        if problem.has_score_mod:
            return "it applies no score modifier"
        if problem.needs_grad:
            return "its backward pass would not know the gradient of the log-sum-exp"
        if problem.head_dim != problem.v_dim:
            return f"torch's kernel wants one head_dim for k and v; here they are {problem.head_dim}, {problem.v_dim}"
        return None

    def config_refusal(self, template: Template, config: Config, problem: Problem, device: Device) -> str | None:
        return None

    def missing(self, device: Device) -> str | None:
        return None

    def toolchain(self) -> str:
        import torch

        return f"torch {torch.__version__}"

    def lower(self, launch: Launch) -> TorchKernel:
        return TorchKernel(launch)

    def lower_backward(self, launch: Launch) -> GradientKernel:
        raise UnsupportedError("the torch back end is not planned where gradients are needed")


@cache
def backend() -> TorchBackend:
    return TorchBackend()
