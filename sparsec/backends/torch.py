"""The torch back end: torch's own dense attention, for masks that are full or causal.

This file decides how a dense launch is handed over, on CPUs and GPUs, and how its log-sum-exp is had where the public
function does not return it. It has no kernels of its own.
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
                with_sums = _with_log_sums_on_cpu if qs.device.type == "cpu" else _with_log_sums_on_gpu
                values, lse[batch, heads] = with_sums(qs, ks, vs, is_causal, launch.scale)
            out[batch, heads] = values.to(out.dtype)

    def source(self) -> dict[str, str]:
        return {"torch.py": Path(__file__).read_text()}


def _with_log_sums_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp."""
    import torch

    # In half precision torch's exponentials are good for the output, and not for an fp32 log-sum-exp.
    values, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.float(), k.float(), v.float(), 0.0, is_causal, scale=scale
    )
    return values, log_sums


def _with_log_sums_on_gpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp."""
    import torch

    length, dim = q.shape[2:]
    # Both kernels take whole vectors of 8; dimensions of zeros change no score, and their values are left out again.
    q, k, v = (torch.nn.functional.pad(each, (0, -dim % 8)) for each in (q, k, v))
    if q.dtype == torch.float32:
        values, log_sums = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, is_causal, scale=scale
        )[:2]
    else:
        values, log_sums = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, is_causal, False, scale=scale
        )[:2]
    # Log-sum-exps may come with some beyond the last query.
    return values[..., :dim], log_sums[..., :length]


class TorchBackend:
    """Hands dense launches to torch."""

    name = "torch"

    def serves(self, device: Device) -> bool:
        return True

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
        import torch

        if device.kind == "cpu" or torch.cuda.is_available():
            return None
        return f"torch {torch.__version__} sees no GPU; check the driver, or install a torch built for it"

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
