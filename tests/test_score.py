"""Score modifiers on the CPU: every template and dtype, values and gradients, against the fp64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparsec
from sparsec import gate, masks, score
from sparsec.device import detect_cpu
from sparsec.errors import MaskError, UnsupportedError
from sparsec.template import template

_RNG = np.random.default_rng(3)
_BIAS = _RNG.standard_normal((4, 63)).astype(np.float32)
_TABLE = torch.from_numpy(_RNG.standard_normal(8).astype(np.float32))


def _every_operation(value, b, h, q_idx, kv_idx):
    near = torch.where((q_idx - kv_idx) % 3 == 0, value * 2, value - 1.5 + _TABLE[(q_idx // 7) % 8])
    return torch.sigmoid(near) * 3 + torch.abs(near) * 0.25 + torch.maximum(near, value) * 0.5 + b * 0.125 - h


MODIFIERS = {
    "alibi": score.alibi([0.5, 0.25, 0.125, 0.0625]),
    "soft_cap": score.soft_cap(3.0),
    "relative_bias": score.relative_bias(_BIAS),
    "temperature": score.temperature([1.0, 2.0, 0.5, -1.0]),
    "everything": score.as_score_mod(_every_operation),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["row_traversal", "block_sparse", "hybrid"])
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_kernels_agree_with_the_reference(modifier, name, dtype):
    for direction in ("forward", "backward"):
        error = gate.check(template(name), "cpu", dtype, detect_cpu(), direction, MODIFIERS[modifier])
        assert error is None, f"{direction}: {error}"


def _dense(q, k, v, attended, value_of):
    scaled = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    heads = torch.arange(q.shape[1])[:, None, None]
    rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    scores = value_of(scaled, heads, rows, columns).masked_fill(~attended, -torch.inf)
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


@pytest.mark.parametrize(
    "mask",
    [
        masks.window(20, 5),
        masks.dilated(40, 4),
        masks.random_edges(6, 0),
        masks.per_head([masks.causal(), masks.window(3, 3), masks.causal(), masks.full()]),
    ],
    ids=str,
)
def test_a_compiled_attention_agrees_with_dense_autograd(mask):
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    attention = sparsec.compile(mask, 70, score_mod=lambda s, b, h, q, k: 5 * torch.tanh(s / 5) + slopes[h] * (k - q))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 70, 16, generator=generator).requires_grad_() for _ in range(3))
    out, lse = attention(q, k, v, return_lse=True)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    bound = attention.bound
    dense = np.stack([(bound.select(0, h) if bound.varies_by_head else bound).to_dense() for h in range(4)])
    wanted, wanted_lse = _dense(
        *exact,
        torch.from_numpy(dense),
        lambda s, h, q, k: 5 * torch.tanh(s / 5) + slopes.double()[h] * (k - q),
    )
    torch.testing.assert_close(out.double(), wanted, atol=3e-6, rtol=0)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=3e-6, rtol=2e-7)
    weight = torch.randn(out.shape, generator=generator)
    ((out * weight).sum() + lse.sum()).backward()
    ((wanted * weight).sum() + wanted_lse.sum()).backward()
    for got, reference in zip((q, k, v), exact, strict=True):
        torch.testing.assert_close(got.grad.double(), reference.grad, atol=2e-5, rtol=0)


def test_what_cannot_be_a_modifier_is_refused():
    with pytest.raises(MaskError, match=r"test_score\.py"):
        sparsec.compile(masks.full(), 8, score_mod=lambda s, b, h, q, k: s if q > 3 else -s)
    with pytest.raises(MaskError, match="int"):
        sparsec.compile(masks.full(), 8, score_mod=3)
    with pytest.raises(MaskError, match="positive"):
        score.soft_cap(0.0)
    with pytest.raises(MaskError, match="reach"):
        score.relative_bias(np.zeros((2, 4)))
    trainable = torch.ones(4, requires_grad=True)
    with pytest.raises(UnsupportedError, match="detach"):
        sparsec.compile(masks.full(), 8, score_mod=lambda s, b, h, q, k: s * trainable[h])


def test_the_plan_refuses_who_applies_none():
    attention = sparsec.compile(
        masks.causal(), 64, score_mod=score.soft_cap(10.0), q_heads=1, head_dim=16, dtype="fp32"
    )
    assert any("no score modifier" in refusal.reason for refusal in attention.plan.refusals)
    assert "tanh" in "".join(text for files in attention.source().values() for text in files.values())
