"""`compile` and `Attention`: exact on every mask by whatever is chosen, and clear about what they cannot take."""

from __future__ import annotations

import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
import numpy as np
import running
import torch
from cases import Case, case, cases, every_constructor, scattered

import sparsec
from sparsec import masks as m
from sparsec.backends import cpu
from sparsec.backends.base import DTYPES
from sparsec.errors import MaskError, SparsecError, UnsupportedError

pytestmark = pytest.mark.usefixtures("two_threads")

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[2])).to(dtype)


def _qkv(q_len: int = 20, kv_len: int | None = None, heads: int = 1, head_dim: int = 8, batch: int = 1):
    kv_len = q_len if kv_len is None else kv_len
    return _random(batch, heads, q_len, head_dim), *(_random(batch, heads, kv_len, head_dim) for _ in range(2))


# Exact on every mask.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tried", cases(), ids=lambda tried: tried.id)
def test_what_is_chosen_is_exact(tried: Case, dtype):
    tried = tried.with_dtype(dtype)
    p = tried.problem
    attn = sparsec.compile(tried.mask, (p.q_len, p.kv_len), scale=tried.scale)
    out, lse = attn(*running.inputs(tried), return_lse=True)
    running.check(tried, out, lse)
    only_out = attn(*running.inputs(tried))
    assert only_out.dtype == TORCH[dtype]
    assert only_out.is_contiguous()
    assert lse.dtype == torch.float32
    running.check(tried, only_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tried", every_constructor()[::4], ids=lambda tried: tried.id)
def test_the_reference_by_name(tried: Case, dtype):
    tried = tried.with_dtype(dtype)
    attn = sparsec.compile(tried.mask, (tried.problem.q_len, tried.problem.kv_len), backend="reference")
    out, lse = attn(*running.inputs(tried), return_lse=True)
    running.check(tried, out, lse)


def test_the_reference_in_another_order():
    tried = case("dilated", m.dilated(120, 8) | m.random_edges(2, 0), 400, 400, 8)
    attn = sparsec.compile(tried.mask, 400, backend="reference", reorder="force")
    running.check(tried, *attn(*running.inputs(tried), return_lse=True))
    assert any(step.launch.work.ordering.q_order is not None for step in attn.plan.steps)


def test_masks_by_head_and_by_batch_element():
    heads = [m.window(3, 3), m.causal(), m.full(), ~m.full()]
    tried = case("by-head", m.per_head(heads), 60, 60, heads=(4, 2), batch=2)
    running.check(tried, *sparsec.compile(tried.mask, 60)(*running.inputs(tried), return_lse=True))
    tried = case("by-batch", m.per_batch([m.window(3, 3), m.documents([20, 40])]), 60, 60, heads=(4, 2), batch=2)
    running.check(tried, *sparsec.compile(tried.mask, 60)(*running.inputs(tried), return_lse=True))
    predicate = m.from_mask_mod(lambda b, h, q, kv: (q - kv).abs() <= 3 * h + 5 * b)
    tried = case("by-both", predicate, 60, 60, heads=(4, 2), batch=3)
    running.check(tried, *sparsec.compile(tried.mask, 60)(*running.inputs(tried), return_lse=True))


def test_one_attention_for_many_signatures():
    attn = sparsec.compile(m.window(9, 4), 50)
    for dtype in DTYPES:
        for head_dim, heads, batch in ((8, (1, 1), 1), (40, (4, 2), 3), (64, (2, 2), 2)):
            tried = case("window", m.window(9, 4), 50, 50, head_dim, heads=heads, batch=batch).with_dtype(dtype)
            out, lse = attn(*running.inputs(tried), return_lse=True)
            running.check(tried, out, lse)
            assert attn.plan.problem.head_dim == head_dim


def test_no_batch_elements():
    out, lse = sparsec.compile(m.window(3, 3), 20)(*_qkv(batch=0), return_lse=True)
    assert out.shape == (0, 1, 20, 8)
    assert lse.shape == (0, 1, 20)


@pytest.mark.parametrize("salt", range(6))
@pytest.mark.parametrize(
    "mask",
    [
        m.dilated(120, 8) | m.random_edges(2, 0),
        m.window(9, 4) & ~m.strided(5) | m.global_tokens([7, 90, 251]),
        m.per_head([m.longformer(16, 2), m.bigbird(16, 3, 1, 1, 0), m.longformer(16, 2), m.causal()]),
    ],
    ids=["dilated-and-scattered", "window-and-tokens", "by-head"],
)
def test_whichever_candidate_wins_the_result_is_the_same(mask, salt, monkeypatch):
    from sparsec.planner.drafts import Draft

    def us(draft, scale):
        parts = [(p.template.name, str(p.config), p.work.ordering.name, p.edges) for p in draft.parts]
        return 1.0 + zlib.crc32(repr((salt, parts)).encode())

    monkeypatch.setattr(Draft, "us", us)
    tried = case("any", mask, 257, 257, 40, v_dim=24, heads=(4, 2), batch=2)
    attn = sparsec.compile(tried.mask, 257, backend="cpu")
    running.check(tried, *attn(*running.inputs(tried), return_lse=True))


# When a plan is made.


def test_a_plan_is_made_when_the_signature_is_known():
    attn = sparsec.compile(m.window(3, 3), 20)
    with pytest.raises(SparsecError, match=r"no plan yet.*give compile q_heads, head_dim and dtype"):
        attn.plan  # noqa: B018
    attn(*_qkv())
    assert attn.plan.problem.q_heads == 1
    known = sparsec.compile(m.window(3, 3), 20, q_heads=4, kv_heads=2, head_dim=8, v_dim=16, dtype="bf16")
    assert known.plan.problem == replace(known.plan.problem, q_heads=4, kv_heads=2, head_dim=8, v_dim=16, dtype="bf16")


def test_a_signature_is_planned_once(monkeypatch):
    from sparsec import runtime

    calls = []
    plan = runtime.plan
    monkeypatch.setattr(runtime, "plan", lambda *args, **kwargs: calls.append(1) or plan(*args, **kwargs))
    attn = sparsec.compile(m.window(3, 3), 20)
    for batch in (1, 2, 5, 1):
        attn(*_qkv(batch=batch))
    assert len(calls) == 1


def test_what_can_be_read():
    attn = sparsec.compile(m.window(3, 3), 20, template="row_traversal")
    attn(*_qkv())
    assert attn.explain() == str(attn.plan)
    assert repr(attn) == "sparsec.compile(window(3, 3), (20, 20))"
    (sources,) = attn.source().values()
    assert "kernel_cpu.cpp" in sources
    assert "simd.hpp" in sources
    assert list(attn.source()) == ["1. row_traversal on cpu"]


# Another mask.


def test_update_takes_another_mask_and_compiles_nothing(monkeypatch):
    tried = case("before", scattered(60, 60, 0.1, seed=1), 60, 60, heads=(2, 1))
    after = case("after", scattered(60, 60, 0.1, seed=2), 60, 60, heads=(2, 1))
    attn = sparsec.compile(tried.mask, 60)
    running.check(tried, *attn(*running.inputs(tried), return_lse=True))
    monkeypatch.setattr(cpu, "_compile", lambda *_: pytest.fail("compiled again"))
    attn.update(after.mask)
    running.check(after, *attn(*running.inputs(after), return_lse=True))
    assert attn.plan.mask.mask == after.mask


def test_update_wants_the_same_lengths():
    attn = sparsec.compile(m.window(3, 3), 20)
    before = attn(*_qkv())
    for other in (m.window(3, 3).bind(21), m.from_dense(np.ones((20, 21), bool)), m.documents([10, 11])):
        with pytest.raises(MaskError):
            attn.update(other)
    assert torch.equal(attn(*_qkv()), before)


# The functional form.


def test_the_functional_form():
    tried = case("functional", m.longformer(8, 2), 60, 60, heads=(4, 2), batch=2)
    out, lse = sparsec.attention(*running.inputs(tried), m.longformer(8, 2), return_lse=True)
    running.check(tried, out, lse)
    shifted = (tensor.transpose(1, 2) for tensor in running.inputs(tried))
    running.check(tried, sparsec.attention(*shifted, m.longformer(8, 2), layout="bshd").transpose(1, 2))
    scaled = replace(tried, scale=-0.5)
    running.check(scaled, sparsec.attention(*running.inputs(scaled), m.longformer(8, 2), scale=-0.5))


def test_the_functional_form_keeps_what_it_compiled(monkeypatch):
    from sparsec import runtime

    sparsec.attention(*_qkv(31), m.window(3, 2))
    monkeypatch.setattr(runtime, "plan", lambda *_, **__: pytest.fail("planned again"))
    sparsec.attention(*_qkv(31), m.window(3, 2))


# What compile is told, and what it finds.


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"q_heads": 2}, "q_heads=2, and the tensors have 1"),
        ({"kv_heads": 4}, "kv_heads=4, and the tensors have 1"),
        ({"head_dim": 16}, "head_dim=16, and the tensors have 8"),
        ({"v_dim": 4}, "v_dim=4, and the tensors have 8"),
        ({"dtype": "bf16"}, "dtype=bf16, and the tensors have fp32"),
        ({"dtype": torch.float16}, "dtype=fp16, and the tensors have fp32"),
        ({"device": "nvidia-h100"}, "device.*nvidia-h100.*cpu"),
    ],
    ids=str,
)
def test_tensors_that_are_not_as_told(told, found):
    with pytest.raises(SparsecError, match=found):
        sparsec.compile(m.window(3, 3), 20, **told)(*_qkv())


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), torch.device("cpu", 0)], ids=str)
def test_the_device_told(device):
    assert sparsec.compile(m.window(3, 3), 20, device=device)(*_qkv()).shape == (1, 1, 20, 8)
    made = sparsec.compile(m.window(3, 3), 20, device=device, q_heads=1, head_dim=8, dtype="fp32")
    assert made.plan.device.name == "cpu"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": "sbhd"}, SparsecError, "layout='sbhd' is none of 'bhsd', 'bshd'"),
        ({"tune": "fast"}, SparsecError, "tune='fast' is none of"),
        ({"reorder": "yes"}, SparsecError, "reorder='yes' is none of 'auto', 'off', 'force'"),
        ({"dtype": torch.float64}, UnsupportedError, "float64.*fp32, fp16, bf16"),
        ({"dtype": "fp8"}, UnsupportedError, "fp8.*fp32, fp16, bf16"),
        ({"dtype": torch.int32}, UnsupportedError, "int32"),
        ({"template": "flash"}, SparsecError, "no template 'flash'; the templates are"),
        ({"backend": "metal"}, SparsecError, "no back end 'metal'; the back ends are"),
        ({"template": "dense"}, UnsupportedError, "neither full nor causal"),
        ({"backend": "torch"}, UnsupportedError, "neither full nor causal"),
        ({"device": "nvidia-h10"}, SparsecError, "did you mean nvidia-h100"),
        ({"q_heads": 3, "kv_heads": 2}, UnsupportedError, "q_heads=3 and kv_heads=2"),
        ({"kv_heads": 0}, UnsupportedError, "kv_heads=0"),
        ({"q_heads": 0}, UnsupportedError, "q_heads=0"),
        ({"head_dim": 0}, UnsupportedError, "head_dim=0.*1 to 256"),
        ({"head_dim": 257}, UnsupportedError, "head_dim=257.*1 to 256"),
        ({"v_dim": 0}, UnsupportedError, "v_dim=0.*1 to 256"),
        ({"v_dim": 257}, UnsupportedError, "v_dim=257.*1 to 256"),
        ({"scale": float("nan")}, SparsecError, "scale"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options, error, message):
    signature = {"q_heads": 4, "head_dim": 8, "dtype": "fp32"}
    with pytest.raises(error, match=message):
        sparsec.compile(m.window(3, 3), 20, **(signature | options))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"seq_len": -3}, "-3"),
        ({"seq_len": 2.5}, "2.5"),
        ({"seq_len": "20"}, "20"),
        ({"seq_len": (20,)}, r"\(20,\)"),
        ({"seq_len": (20, 30, 40)}, r"\(20, 30, 40\)"),
        ({"seq_len": (20, 30), "kv_len": 40}, "disagree"),
        ({"seq_len": None}, "length"),
        ({"seq_len": 20, "kv_len": -1}, "-1"),
    ],
    ids=str,
)
def test_lengths_that_cannot_be(lengths, message):
    with pytest.raises(MaskError, match=message):
        sparsec.compile(m.window(3, 3), **lengths)


def test_lengths_that_can():
    for made in (
        sparsec.compile(m.window(3, 3), (20, 30)),
        sparsec.compile(m.window(3, 3), 20, kv_len=30),
        sparsec.compile(m.window(3, 3).bind(20, 30)),
        sparsec.compile(m.window(3, 3).bind(20, 30), 20),
        sparsec.compile(m.window(3, 3).bind(20, 30), (20, 30)),
        sparsec.compile(m.window(3, 3), np.int64(20), kv_len=np.int64(30)),
        sparsec.compile(m.from_dense(np.ones((20, 30), bool))),
    ):
        assert made(*_qkv(20, 30)).shape == (1, 1, 20, 8)
    with pytest.raises(MaskError, match=r"bound to \(20, 30\).*\(20, 40\)"):
        sparsec.compile(m.window(3, 3).bind(20, 30), (20, 40))
    with pytest.raises(MaskError, match="20"):
        sparsec.compile(m.documents([10, 11]), 20)


@pytest.mark.parametrize(
    "mask",
    [None, "causal()", np.ones((20, 20), bool), lambda b, h, q, kv: q >= kv],
    ids=["none", "text", "array", "function"],
)
def test_what_is_no_mask(mask):
    with pytest.raises(MaskError, match=r"takes a mask of sparsec\.masks; got .*(from_|parse)"):
        sparsec.compile(mask, 20)
    with pytest.raises(MaskError, match=r"takes a mask of sparsec\.masks; got .*(from_|parse)"):
        sparsec.attention(*_qkv(), mask)


def test_masks_of_other_heads_or_batch_elements():
    attn = sparsec.compile(m.per_head([m.causal(), m.full()]), 20)
    with pytest.raises(MaskError, match="each of 2 heads, and the problem has 3"):
        attn(*_qkv(heads=3))
    attn = sparsec.compile(m.per_batch([m.causal(), m.full()]), 20)
    with pytest.raises(MaskError, match="each of 2 batch elements, and the problem has 3"):
        attn(*_qkv(batch=3))
    assert attn(*_qkv(batch=2)).shape == (2, 1, 20, 8)


def _nested(tensor: torch.Tensor, layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([tensor[0], tensor[0, :, :9]], layout=layout)


def _replaced(position: int, change):
    tensors = list(_qkv(heads=2, batch=2))
    tensors[position] = change(tensors[position])
    return tensors


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (lambda: _qkv(21), MaskError, "20 queries and 20 keys.*21 and 21"),
        (lambda: _qkv(20, 19), MaskError, "20 queries and 20 keys.*20 and 19"),
        (lambda: _replaced(0, lambda t: t[0]), SparsecError, r"q has shape \(2, 20, 8\).*four dimensions"),
        (lambda: _replaced(1, lambda t: t[None]), SparsecError, r"k has shape \(1, 2, 2, 20, 8\).*four dimensions"),
        (lambda: _replaced(1, lambda t: t[:1]), SparsecError, "q has batch 2 and k has 1"),
        (lambda: _replaced(2, lambda t: t[:1]), SparsecError, "q has batch 2 and v has 1"),
        (lambda: _replaced(2, lambda t: t[:, :1]), SparsecError, r"k has shape \(2, 2, 20, 8\) and v \(2, 1, 20, 8\)"),
        (lambda: _replaced(2, lambda t: t[:, :, :9]), SparsecError, r"k has shape .* and v \(2, 2, 9, 8\)"),
        (lambda: _replaced(0, lambda t: t[..., :7]), SparsecError, "q has head_dim 7 and k has 8"),
        (
            lambda: _replaced(0, lambda t: t.repeat(1, 2, 1, 1)[:, :3]),
            UnsupportedError,
            "3 query heads over 2 key heads",
        ),
        (lambda: _replaced(0, lambda t: t[:, :0]), UnsupportedError, "0 query heads over 2"),
        (lambda: _replaced(1, lambda t: t.half()), SparsecError, "q is torch.float32 and k is torch.float16"),
        (lambda: [t.double() for t in _qkv()], UnsupportedError, "float64.*fp32, fp16, bf16"),
        (lambda: [t.int() for t in _qkv()], UnsupportedError, "int32.*fp32, fp16, bf16"),
        (lambda: [t.to(torch.complex64) for t in _qkv()], UnsupportedError, "complex64"),
        (lambda: _replaced(2, lambda t: t.to("meta")), SparsecError, "q is on cpu and v on meta"),
        (lambda: [t.to("meta") for t in _qkv()], SparsecError, "meta"),
        (lambda: _replaced(0, lambda t: t.numpy()), SparsecError, "q is a ndarray"),
        (lambda: _replaced(1, lambda t: None), SparsecError, "k is a NoneType"),
        (lambda: _replaced(1, lambda t: t.to_sparse()), SparsecError, "k is a torch.sparse_coo tensor"),
        (
            lambda: [_nested(t, torch.strided) for t in _qkv()],
            UnsupportedError,
            "NestedTensor.*documents",
        ),
        (
            lambda: [_nested(t, torch.jagged) for t in _qkv()],
            UnsupportedError,
            "NestedTensor.*documents",
        ),
        (lambda: [t[..., :0] for t in _qkv()], UnsupportedError, "head_dim=0"),
        (lambda: [t.repeat(1, 1, 1, 40) for t in _qkv()], UnsupportedError, "head_dim=320.*1 to 256"),
    ],
)
def test_tensors_that_cannot_be(tensors, error, message):
    attn = sparsec.compile(m.window(3, 3), 20)
    with pytest.raises(error, match=message):
        attn(*tensors())
    # Nothing is spoilt by the refusal.
    assert attn(*_qkv()).shape == (1, 1, 20, 8)


def test_gradients_that_were_told_not_to_come():
    attn = sparsec.compile(m.window(3, 3), 20, needs_grad=False)
    q, k, v = _qkv()
    for tensor in (q, k, v):
        tensor.requires_grad_()
        with pytest.raises(UnsupportedError, match=r"require gradients.*no_grad"):
            attn(q, k, v)
        with torch.no_grad():
            assert not attn(q, k, v).requires_grad
        tensor.requires_grad_(False)


def test_the_tuning_mode_of_the_environment(monkeypatch):
    monkeypatch.setenv("SPARSEC_TUNE", "never")
    with pytest.raises(SparsecError, match="SPARSEC_TUNE='never' is no tuning mode"):
        sparsec.compile(m.window(3, 3), 20)
    monkeypatch.setenv("SPARSEC_TUNE", "off")
    sparsec.compile(m.window(3, 3), 20)(*_qkv())


def test_a_lazily_negated_tensor():
    # The imaginary part of a conjugate is a view whose sign is a flag.
    complex_q = torch.view_as_complex(torch.randn(1, 1, 20, 1, 2))
    q = complex_q.conj().imag
    assert q.is_neg()
    _, k, v = _qkv(head_dim=1)
    attn = sparsec.compile(m.window(3, 3), 20)
    assert torch.equal(attn(q, k, v), attn(q.resolve_neg().contiguous(), k, v))


def test_inputs_are_left_as_they_are():
    q, k, v = _qkv(60, heads=2, head_dim=40)
    before = [tensor.clone() for tensor in (q, k, v)]
    for name in ("row_traversal", "block_sparse", "hybrid"):
        sparsec.compile(scattered(60, 60, 0.1), 60, template=name)(q, k, v)
    assert all(torch.equal(tensor, old) for tensor, old in zip((q, k, v), before, strict=True))
