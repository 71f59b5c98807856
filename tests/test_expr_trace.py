"""Tracing of FlexAttention's functions: against torch itself, and what a refusal says."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, create_mask, noop_mask, or_masks

from sparsec.errors import MaskError
from sparsec.expr import Table, Var, torch_function, trace_mask_mod, trace_score_mod

N = 37
DOCUMENT_ID = torch.arange(N) // 10
GLOBAL_WINDOW = 5
TENSOR_WINDOW = torch.tensor(7)
NUMPY_SLOPES = np.array([0.5, 0.25, 0.125], np.float32)
HALF_BIAS = torch.linspace(-1, 1, 3 * 64, dtype=torch.bfloat16).reshape(3, 64)
BLOCK_TABLE = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def document(b, h, q_idx, kv_idx):
    return DOCUMENT_ID[q_idx] == DOCUMENT_ID[kv_idx]


def sliding(b, h, q_idx, kv_idx):
    return is_near(q_idx, kv_idx) & (q_idx >= kv_idx)


def is_near(q_idx, kv_idx, *, reach=TENSOR_WINDOW):
    return (q_idx - kv_idx).abs() <= reach


def windowed(window, b, h, q_idx, kv_idx):
    return q_idx - kv_idx < window


def make_prefix(lengths: dict[str, Any]):
    def prefix(b, h, q_idx, kv_idx):
        return (kv_idx < lengths["prefix"][b]) | causal(b, h, q_idx, kv_idx)

    return prefix


@dataclass
class DocumentMask:
    document_id: torch.Tensor
    is_causal: bool = True

    def __call__(self, b, h, q_idx, kv_idx):
        same = self.document_id[q_idx] == self.document_id[kv_idx]
        return same & (q_idx >= kv_idx) if self.is_causal else same

    def method(self, b, h, q_idx, kv_idx):
        return torch.logical_and(self(b, h, q_idx, kv_idx), q_idx != kv_idx)


def recursive(b, h, q_idx, kv_idx, depth=2):
    return q_idx >= kv_idx if depth == 0 else recursive(b, h, q_idx - 1, kv_idx, depth - 1)


MASK_MODS: dict[str, Callable[..., Any]] = {
    "causal": causal,
    "document": document,
    "helper-with-keyword-default": sliding,
    "noop": noop_mask,
    "and_masks": and_masks(causal, document),
    "or_masks": or_masks(document, lambda b, h, q, k: k < 3),
    "nested": and_masks(or_masks(causal, document), noop_mask),
    "partial": functools.partial(windowed, GLOBAL_WINDOW),
    "partial-tensor": functools.partial(windowed, torch.tensor(4)),
    "closure-dict": make_prefix({"prefix": torch.tensor([3, 9])}),
    "instance": DocumentMask(DOCUMENT_ID),
    "method": DocumentMask(DOCUMENT_ID, is_causal=False).method,
    "recursive": recursive,
    "table-2d": lambda b, h, q, k: BLOCK_TABLE[q // 13, k // 13],
    "table-row": lambda b, h, q, k: BLOCK_TABLE[h][k % 3],
    "table-negative": lambda b, h, q, k: DOCUMENT_ID[q - k] > 1,
    "table-derived": lambda b, h, q, k: (DOCUMENT_ID * 2 + 1)[q] > k,
    "table-attributes": lambda b, h, q, k: q < len(DOCUMENT_ID) - DOCUMENT_ID.shape[0] // 2,
    "local-tensor": lambda b, h, q, k: torch.tensor([1, 0, 1], dtype=torch.bool)[q % 3],
    "where": lambda b, h, q, k: torch.where(q > k, q % 3 == 0, k % 2 == 0),
    "logical": lambda b, h, q, k: torch.logical_not(torch.logical_or(q < 3, torch.logical_and(k > 2, q > k))),
    "reflected": lambda b, h, q, k: (5 - q) < (40 // (k + 1)),
    "reflected-tensor": lambda b, h, q, k: torch.tensor(30) - q > k,
    "floor": lambda b, h, q, k: torch.floor_divide(q - k, 4) == torch.remainder(k - q, 3) - 2,
    "rounding-mode": lambda b, h, q, k: torch.div(q - k, 4, rounding_mode="trunc") == 0,
    "minimum": lambda b, h, q, k: torch.minimum(q, k) + torch.maximum(k, q) < torch.clamp(q, min=20, max=30),
    "bits": lambda b, h, q, k: ((q ^ k) & 6 | (q >> 2)) << 1 < 16,
    "xor": lambda b, h, q, k: (q < 9) ^ (k < 9),
    "casts": lambda b, h, q, k: (q / 3).to(torch.int32) > k.float().sqrt().long(),
    "bool-cast": lambda b, h, q, k: (q % 4).bool() & (k % 3).to(torch.bool),
    "head": lambda b, h, q, k: q - k < (1 << (h + 1)),
    "constants": lambda b, h, q, k: q.new_ones((), dtype=torch.bool) & ~k.new_zeros((), dtype=torch.bool),
    "math": lambda b, h, q, k: torch.exp(-q / 9.0) > torch.sigmoid(k * -0.25),
    "chain": lambda b, h, q, k: functools.reduce(lambda x, i: x | (q - k == i * i), range(6), q == k),
}


@pytest.mark.parametrize("name", MASK_MODS)
def test_traced_mask_is_the_mask(name: str):
    mask_mod = MASK_MODS[name]

    def plain(b, h, q, k):
        # create_mask miscounts the arguments of a bound method.
        return mask_mod(b, h, q, k)

    want = create_mask(plain, 2, 3, N, N, device="cpu").numpy()
    expr = trace_mask_mod(mask_mod)
    b, h, q, k = np.ogrid[:2, :3, :N, :N]
    got = np.broadcast_to(expr.evaluate(b=b, h=h, q_idx=q, kv_idx=k), want.shape)
    np.testing.assert_array_equal(got, want)
    assert expr == trace_mask_mod(mask_mod)


def test_trace_with_numpy_functions():
    def mask_mod(b, h, q, k):
        return np.where(np.greater(q, k), np.abs(q - k) < np.minimum(q, 9), np.logical_not(np.equal(k % 2, 0)))

    q, k = np.ogrid[:N, :N]
    np.testing.assert_array_equal(trace_mask_mod(mask_mod).evaluate(q_idx=q, kv_idx=k), mask_mod(0, 0, q, k))


SCORE_MODS: dict[str, Callable[..., Any]] = {
    "alibi": lambda score, b, h, q, k: score + NUMPY_SLOPES[h] * (k - q),
    "bias": lambda score, b, h, q, k: score + HALF_BIAS[h, q - k + 10],
    "soft-cap": lambda score, b, h, q, k: 20 * torch.tanh(score / 20),
    "masked": lambda score, b, h, q, k: torch.where(q >= k, score, -float("inf")),
    "power": lambda score, b, h, q, k: score**3 - score.pow(2) + (score.abs() + 1) ** -0.5,
    "relu": lambda score, b, h, q, k: torch.relu(score) * torch.rsqrt(1.0 + q) + torch.sign(score) + torch.ceil(score),
    "pass": lambda score, b, h, q, k: score,
    "masked-fill": lambda score, b, h, q, k: score.masked_fill(q < k, -1e4),
}


@pytest.mark.parametrize("name", SCORE_MODS)
def test_traced_score_is_the_score(name: str):
    score_mod, expr = SCORE_MODS[name], trace_score_mod(SCORE_MODS[name])
    score = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(0))
    h, q, k = torch.meshgrid(torch.arange(3), torch.arange(20), torch.arange(20), indexing="ij")
    # A numpy array cannot be indexed and multiplied by torch tensors.
    alibi = score + torch.from_numpy(NUMPY_SLOPES)[h] * (k - q)
    want = alibi if name == "alibi" else score_mod(score, torch.tensor(0), h, q, k)
    got = expr.evaluate(score=score.numpy(), h=h.numpy(), q_idx=q.numpy(), kv_idx=k.numpy())
    np.testing.assert_allclose(got, want.float().numpy(), rtol=1e-5, atol=1e-5)
    as_torch = torch_function(expr)(score=score, h=h, q_idx=q, kv_idx=k)
    torch.testing.assert_close(torch.broadcast_to(as_torch, want.shape), want.float(), rtol=1e-5, atol=1e-5)


def test_trained_tables_are_recognised_and_get_gradients():
    bias = torch.nn.Parameter(torch.zeros(3, 8))
    other = torch.nn.Parameter(torch.zeros(3, 8))
    scale = torch.nn.Parameter(torch.tensor(2.0))
    expr = trace_score_mod(lambda s, b, h, q, k: s * scale + bias[h, q - k + 4] * s + other[h, k])
    tables = expr.tables()
    assert len(tables) == 3
    assert {id(table.original) for table in tables} == {id(bias), id(other), id(scale)}
    assert all(table.is_trainable for table in tables)
    lookup = next(node for node in expr.walk() if isinstance(node, Table) and node.captured.original is bias)
    assert expr.derivative(lookup) == Var("score")
    score = torch.full((4,), 3.0)
    torch_function(expr)(score=score, h=1, q_idx=torch.arange(4), kv_idx=1).sum().backward()
    assert bias.grad is not None
    assert bias.grad[1, 3:7].tolist() == [3.0] * 4
    assert scale.grad is not None
    assert scale.grad.item() == 12.0


def test_a_captured_array_is_a_copy():
    table = torch.arange(4)
    expr = trace_mask_mod(lambda b, h, q, k: table[q] > k)
    table.zero_()
    assert expr.evaluate(q_idx=3, kv_idx=2)
    assert "table[q_idx]" in str(expr)


def branch(b, h, q_idx, kv_idx):
    if q_idx > 5:
        return q_idx > kv_idx
    return q_idx == kv_idx


def boolean_words(b, h, q_idx, kv_idx):
    return q_idx > kv_idx and kv_idx > 2


def chained(b, h, q_idx, kv_idx):
    return 0 <= q_idx - kv_idx < 4


def as_int(b, h, q_idx, kv_idx):
    return int(q_idx) > kv_idx


def loop(b, h, q_idx, kv_idx):
    return sum(kv_idx == i for i in range(q_idx))


def unsupported(b, h, q_idx, kv_idx):
    return torch.cumsum(q_idx, 0) > kv_idx


def no_method(b, h, q_idx, kv_idx):
    return q_idx.argmax() > kv_idx


def whole_table(b, h, q_idx, kv_idx):
    return q_idx == DOCUMENT_ID


def too_many_indices(b, h, q_idx, kv_idx):
    return DOCUMENT_ID[q_idx, kv_idx] == 0


def float_index(b, h, q_idx, kv_idx):
    return DOCUMENT_ID[q_idx / 2] == 0


def by_zero(b, h, q_idx, kv_idx):
    return q_idx % 0 == kv_idx


@pytest.mark.parametrize(
    ("mask_mod", "line", "says"),
    [
        (branch, "if q_idx > 5", "torch.where"),
        (boolean_words, "and kv_idx", "write & | ~"),
        (chained, "0 <= q_idx", "chained"),
        (as_int, "int(q_idx)", "integer value"),
        (loop, "range(q_idx)", "loop over numbers"),
        (unsupported, "cumsum", "cumsum"),
        (no_method, "argmax", "argmax"),
        (whole_table, "q_idx == DOCUMENT_ID", "index it by positions"),
        (too_many_indices, "DOCUMENT_ID[q_idx, kv_idx]", "2 indices"),
        (float_index, "DOCUMENT_ID[q_idx / 2]", "must be int"),
        (by_zero, "q_idx % 0", "zero"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refusals_name_the_line_and_the_way_out(mask_mod: Callable[..., Any], line: str, says: str):
    lines, first = inspect.getsourcelines(mask_mod)
    number = first + next(i for i, text in enumerate(lines) if line in text)
    with pytest.raises(MaskError) as caught:
        trace_mask_mod(mask_mod)
    assert f"{__file__}:{number}: " in str(caught.value)
    assert says in str(caught.value)


def test_refusals_of_the_result_and_the_signature():
    with pytest.raises(MaskError, match=r"returned q_idx - kv_idx, which is int.*compare it"):
        trace_mask_mod(lambda b, h, q, k: q - k)
    with pytest.raises(MaskError, match="returned nothing"):
        trace_mask_mod(lambda b, h, q, k: None)
    with pytest.raises(MaskError, match="positional arguments"):
        trace_mask_mod(lambda q, k: q > k)
    with pytest.raises(MaskError, match="expected a function"):
        trace_mask_mod(3)  # type: ignore[arg-type]
    with pytest.raises(MaskError, match="list"):
        trace_mask_mod(lambda b, h, q, k: [q > k])


def test_a_mistake_in_the_users_code_surfaces():
    with pytest.raises(ZeroDivisionError):
        trace_mask_mod(lambda b, h, q, k: q > 1 // 0)
    with pytest.raises(NameError):
        trace_mask_mod(lambda b, h, q, k: q > undefined)  # noqa: F821


def test_expressions_do_not_import_torch():
    program = (
        "import sys; from sparsec.expr import trace_mask_mod; import numpy as np; t = np.arange(9);"
        "trace_mask_mod(lambda b, h, q, k: (t[q] == t[k]) & (q >= k)).evaluate(q_idx=1, kv_idx=2);"
        "assert not {'torch', 'triton', 'cuda', 'optuna'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
