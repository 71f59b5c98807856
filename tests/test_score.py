"""Score modifiers on the CPU: every template, values and gradients, against the fp64 reference and dense autograd."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import sparsec
from sparsec import gate, masks, score
from sparsec.device import detect_cpu
from sparsec.errors import MaskError, RecordError, SparsecError, UnsupportedError
from sparsec.template import template

pytestmark = pytest.mark.usefixtures("two_threads")

_RNG = np.random.default_rng(3)
_BIAS = _RNG.standard_normal((4, 63)).astype(np.float32)
_TABLE = torch.from_numpy(_RNG.standard_normal(8).astype(np.float32))
_GAIN = torch.ones(4, requires_grad=True)
TEMPLATES = ["row_traversal", "block_sparse", "hybrid"]


def _every_operation(value, b, h, q_idx, kv_idx):
    near = torch.where((q_idx - kv_idx) % 3 == 0, value * 2, value - 1.5 + _TABLE[(q_idx // 7) % 8])
    return torch.sigmoid(near) * 3 + torch.abs(near) * 0.25 + torch.maximum(near, value) * 0.5 + b * 0.125 - h


def _steep(value, b, h, q_idx, kv_idx):
    """Forbids every fifth key by the logarithm of 0, whose slope is no number."""
    nothing = torch.clamp(value, max=9e9) - value
    return value + _GAIN[h] * _GAIN[h] * torch.log(torch.where(kv_idx % 5 == 4, nothing, nothing + 1.0))


MODIFIERS = {
    "steep": score.as_score_mod(_steep),
    "alibi": score.alibi([0.5, 0.25, 0.125, 0.0625]),
    "soft_cap": score.soft_cap(3.0),
    "relative_bias": score.relative_bias(_BIAS),
    "temperature": score.temperature([1.0, 2.0, 0.5, -1.0]),
    "everything": score.as_score_mod(_every_operation),
}


@pytest.mark.parametrize(
    ("modifier", "name", "dtype"),
    [
        *(("everything", name, dtype) for name in TEMPLATES for dtype in ("fp32", "bf16")),
        *(("steep", name, "fp32") for name in TEMPLATES),
        ("alibi", "row_traversal", "fp32"),
        ("soft_cap", "block_sparse", "fp32"),
        ("soft_cap", "row_traversal", "bf16"),
        ("relative_bias", "hybrid", "fp32"),
        ("temperature", "block_sparse", "bf16"),
    ],
)
def test_kernels_agree_with_the_reference(modifier, name, dtype):
    for direction in ("forward", "backward"):
        error = gate.check(template(name), "cpu", dtype, detect_cpu(), direction, MODIFIERS[modifier])
        assert error is None, f"{direction}: {error}"


def _dense(q, k, v, attended, value_of, sinks=None):
    """torch's own, in the dtype of q; `value_of` takes scaled scores, heads, queries and keys."""
    scaled = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    heads = torch.arange(q.shape[1])[:, None, None]
    rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    scores = value_of(scaled, heads, rows, columns).masked_fill(~attended, -torch.inf)
    if sinks is None:
        return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)
    scores = torch.cat((scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    return torch.softmax(scores, -1)[..., :-1] @ v, torch.logsumexp(scores, -1)


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
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], requires_grad=True)
    attention = sparsec.compile(mask, 70, score_mod=lambda s, b, h, q, k: 5 * torch.tanh(s / 5) + slopes[h] * (k - q))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 70, 16, generator=generator).requires_grad_() for _ in range(3))
    out, lse = attention(q, k, v, return_lse=True)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v, slopes)]
    bound = attention.bound
    dense = np.stack([(bound.select(0, h) if bound.varies_by_head else bound).to_dense() for h in range(4)])
    wanted, wanted_lse = _dense(
        *exact[:3],
        torch.from_numpy(dense),
        lambda s, h, q, k: 5 * torch.tanh(s / 5) + exact[3][h] * (k - q),
    )
    torch.testing.assert_close(out.double(), wanted, atol=3e-6, rtol=0)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=3e-6, rtol=2e-7)
    weight = torch.randn(out.shape, generator=generator)
    ((out * weight).sum() + lse.sum()).backward()
    ((wanted * weight).sum() + wanted_lse.sum()).backward()
    for got, reference in zip((q, k, v, slopes), exact, strict=True):
        torch.testing.assert_close(got.grad.double(), reference.grad, atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("name", TEMPLATES)
def test_batch_elements_with_masks_of_their_own_have_biases_of_their_own(name):
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(3, 2, 40, 16, generator=generator).requires_grad_() for _ in range(3))
    bias = torch.randn(3, 2, 40, generator=generator).requires_grad_()
    mask = masks.per_batch([masks.window(9, 3), masks.strided(3), masks.window(9, 3)])
    made = sparsec.compile(mask, 40, score_mod=score.column_bias(bias), template=name)
    weight = torch.randn(3, 2, 40, 16, generator=generator)
    (made(q, k, v) * weight).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (q, k, v, bias)]
    dense = torch.stack([torch.from_numpy(made.bound.select(b, 0).to_dense()) for b in range(3)])[:, None]
    scores = (exact[0] @ exact[1].mT / 4 + exact[3][:, :, None]).masked_fill(~dense, -torch.inf)
    wanted = scores.softmax(-1) @ exact[2]
    (wanted * weight).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(made(q, k, v).double(), wanted, atol=3e-6, rtol=0)
    for got, reference in zip((q, k, v, bias), exact, strict=True):
        torch.testing.assert_close(got.grad.double(), reference.grad, atol=2e-5, rtol=1e-6)


# Captured tensors.

LENGTH = 70
# Token 3 attends nobody and is attended by nobody.
MASK = masks.window(20, 5) - masks.global_tokens([3])
DENSE = torch.from_numpy(MASK.bind(LENGTH).to_dense())
NNZ = int(DENSE.sum())


class Trained:
    """Every kind of captured tensor, all in one modifier, so that few kernels are compiled; in fp64 for the oracle."""

    def __init__(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(5)
        shapes = ((4,), (4, 31), (LENGTH,), (2, 4, LENGTH), (4, NNZ), (1,), (4,))
        made = [torch.randn(shape, generator=generator) for shape in shapes]
        self.tensors = [t.to(dtype).requires_grad_() for t in made]
        self.slopes, self.table, self.columns, self.rows, self.edges, self.gain, self.sinks = self.tensors

    def mod(self):
        slopes, gain = self.slopes, self.gain

        def biased(s, b, h, q, k):
            return 4 * torch.tanh(s * gain / 4) + slopes[h] * (k - q) * 0.125

        return score.chain(
            biased,
            score.relative_bias(self.table),
            score.column_bias(self.columns),
            score.row_bias(self.rows),
            score.edge_bias(self.edges),
            score.sinks(self.sinks),
        )

    def value(self, s, h, q, k):
        near = (k - q + 15).clamp(0, 30)
        edges = torch.zeros(4, LENGTH, LENGTH, dtype=s.dtype).masked_scatter(DENSE.expand(4, -1, -1), self.edges)
        s = 4 * torch.tanh(s * self.gain / 4) + self.slopes[h] * (k - q) * 0.125
        return s + self.table[h, near] + self.columns[k] + self.rows[:, h, q] + edges


def _leaves(dtype=torch.float32, heads=(4, 2), batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(batch, h, LENGTH, 16, generator=generator) for h in (heads[0], heads[1], heads[1]))
    return [t.to(dtype).requires_grad_() for t in made]


def _gradients(attention, leaves, trained, above):
    out, lse = attention(*leaves, return_lse=True)
    return out, lse, torch.autograd.grad((out, lse), (*leaves, *trained.tensors), above)


def _exact(leaves, trained, above):
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact = Trained(torch.float64)
    for own, other in zip(exact.tensors, trained.tensors, strict=True):
        own.data.copy_(other.detach())
    q, k, v = doubles
    out, lse = _dense(q, *(t.repeat_interleave(2, 1) for t in (k, v)), DENSE, exact.value, exact.sinks)
    return out, lse, torch.autograd.grad((out, lse), (*doubles, *exact.tensors), [t.double() for t in above])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TEMPLATES)
def test_captured_tensors_are_read_anew_and_get_gradients(name, dtype):
    trained = Trained()
    attention = sparsec.compile(MASK, LENGTH, score_mod=trained.mod(), template=name)
    leaves = _leaves(dtype)
    generator = torch.Generator().manual_seed(9)
    above = (
        torch.randn(2, 4, LENGTH, 16, generator=generator).to(dtype),
        torch.randn(2, 4, LENGTH, generator=generator),
    )
    for step in range(2):
        found, exact = _gradients(attention, leaves, trained, above), _exact(leaves, trained, above)
        for got, wanted in zip((*found[:2], *found[2]), (*exact[:2], *exact[2]), strict=True):
            # A sum of n rounded terms errs by √n: of the edges, an entry of a small table sums thousands.
            summed = max(1.0, NNZ * 8 / wanted.numel() / 1000) ** 0.5
            limit = {torch.float32: 4e-6, torch.bfloat16: 0.02}[dtype] * max(1.0, float(wanted.detach().abs().max()))
            limit *= summed
            torch.testing.assert_close(got.double(), wanted, atol=limit, rtol=0)
        assert torch.equal(found[0][:, :, 3], torch.zeros(2, 4, 16, dtype=dtype)), "an empty row"
        assert torch.equal(found[1][:, :, 3], trained.sinks.detach().expand(2, 4)), "an empty row"
        if step == 0:
            with torch.no_grad():
                # As without gradients; then a step of an optimiser.
                assert torch.equal(attention(*leaves), found[0])
                for tensor in trained.tensors:
                    tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.5)
    # With gradients and without.
    assert len(attention.plans()) == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_tables_are_the_same_bits_each_time(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    trained, leaves = Trained(), _leaves()
    attention = sparsec.compile(MASK, LENGTH, score_mod=trained.mod(), template="block_sparse")
    above = torch.randn(2, 4, LENGTH, 16), torch.randn(2, 4, LENGTH)
    first, second = (_gradients(attention, leaves, trained, above)[2] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.set_num_threads(before)


def test_score_args_replace_what_was_captured():
    slopes, bias = torch.zeros(4, requires_grad=True), torch.zeros(4, 2, LENGTH)[:, 0]
    attention = sparsec.compile(
        MASK, LENGTH, score_mod=lambda s, b, h, q, k: s + slopes[h] * (k - q) + bias[h, k], template="row_traversal"
    )
    leaves = [t.detach() for t in _leaves()]
    other, columns = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.randn(4, LENGTH)
    got = attention(*leaves, score_args={"slopes": other})
    (found,) = torch.autograd.grad(got.sum(), other)
    assert found.dtype == torch.float64
    assert not torch.equal(got, attention(*leaves))
    both = attention(*leaves, score_args=(other, columns))
    with torch.no_grad():
        slopes.copy_(other)
        bias.copy_(columns)
    assert torch.equal(attention(*leaves), both)
    with torch.no_grad():
        slopes.zero_()
        bias.zero_()
    assert torch.equal(attention(*leaves, score_args={"slopes": other}), got)
    for wrong in (
        {"slope": other},
        (other,),
        {"slopes": torch.zeros(3)},
        {"slopes": torch.zeros(4, dtype=torch.int64)},
    ):
        with pytest.raises(SparsecError, match="score_args"):
            attention(*leaves, score_args=wrong)


def test_edges_are_counted_in_the_masks_order_whatever_the_order_of_tokens():
    # Two interleaved communities: clusters pay, and rows are then walked in another order.
    rng = np.random.default_rng(0)
    member = rng.permutation(400) % 2
    dense = (rng.random((400, 400)) < 0.2) & (member[:, None] == member)
    bias = torch.randn(int(dense.sum()), requires_grad=True)
    q, k, v = (torch.randn(1, 2, 400, 8, requires_grad=True) for _ in range(3))
    grown = torch.zeros(400, 400).masked_scatter(torch.from_numpy(dense), bias)
    wanted = _dense(q, k, v, torch.from_numpy(dense), lambda s, *_: s + grown)[0]
    above = torch.randn(wanted.shape)
    expected = torch.autograd.grad(wanted, (q, bias), above)
    for options in ({"reorder": "force", "template": "row_traversal"}, {"template": "row_traversal"}):
        attention = sparsec.compile(masks.from_dense(dense), 400, score_mod=score.edge_bias(bias), **options)
        out = attention(q, k, v)
        assert (attention.plan.groups[0].steps[0].launch.work.ordering.q_order is not None) == ("reorder" in options)
        torch.testing.assert_close(out, wanted, atol=3e-6, rtol=0)
        torch.testing.assert_close(torch.autograd.grad(out, (q, bias), above), expected, atol=1e-5, rtol=0)
    options = {"q_heads": 2, "head_dim": 8, "dtype": "fp32", "reorder": "force", "template": "block_sparse"}
    with pytest.raises(UnsupportedError) as refused:
        sparsec.compile(masks.from_dense(dense), 400, score_mod=score.edge_bias(bias), **options)
    assert any("counts edges" in refusal.reason for refusal in refused.value.refusals)


def test_another_mask_renumbers_its_edges():
    rng = np.random.default_rng(1)
    first, second = (np.isin(np.arange(900), rng.permutation(900)[:200]).reshape(30, 30) for _ in range(2))
    bias = torch.randn(200)
    attention = sparsec.compile(masks.from_dense(first), 30, score_mod=score.edge_bias(bias), template="row_traversal")
    q, k, v = torch.randn(3, 1, 1, 30, 8)
    attention(q, k, v)
    attention.update(masks.from_dense(second))
    grown = torch.zeros(30, 30).masked_scatter(torch.from_numpy(second), bias)
    attends = torch.from_numpy(second.any(1))
    wanted = _dense(q, k, v, torch.from_numpy(second), lambda s, *_: s + grown)[0]
    torch.testing.assert_close(attention(q, k, v)[:, :, attends], wanted[:, :, attends], atol=3e-6, rtol=0)
    second[0] = True
    with pytest.raises(SparsecError, match="the edge of the mask"):
        attention.update(masks.from_dense(second))


# torch's machinery.


def test_compiled_in_one_graph_with_live_tensors():
    torch._dynamo.reset()
    trained, leaves = Trained(), _leaves()
    attention = sparsec.compile(MASK, LENGTH, score_mod=trained.mod(), template="row_traversal")
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    above = torch.randn(2, 4, LENGTH, 16), torch.randn(2, 4, LENGTH)
    for _ in range(2):
        found = _gradients(compiled, leaves, trained, above)
        wanted = _gradients(attention, leaves, trained, above)
        torch.testing.assert_close((*found[:2], *found[2]), (*wanted[:2], *wanted[2]))
        with torch.no_grad():
            trained.slopes.mul_(2)
    torch._dynamo.reset()


def test_opcheck_with_tables():
    trained, leaves = Trained(), _leaves()
    attention = sparsec.compile(MASK, LENGTH, score_mod=trained.mod(), template="row_traversal")
    tables = [t.original for t in attention.request.score.live_tables]
    torch.library.opcheck(torch.ops.sparsec.forward.default, (*leaves, tables, attention._handle))
    q, k, v = (t.detach() for t in leaves)
    plain = [t.detach() for t in tables]
    out, lse = attention.forward(q, k, v, plain)
    above = torch.randn_like(out), torch.randn_like(lse)
    wanted = [number % 2 == 0 for number in range(len(plain))]
    torch.library.opcheck(
        torch.ops.sparsec.backward.default, (q, k, v, out, lse, *above, plain, wanted, attention._handle)
    )


def test_a_layer_owns_the_parameters_its_modifier_captured():
    slopes, logits = (torch.nn.Parameter(torch.rand(4)) for _ in range(2))
    layer = sparsec.SparseAttention(MASK, 32, 4, score_mod=score.chain(score.alibi(slopes), score.sinks(logits)))
    assert {id(slopes), id(logits)} <= {id(p) for p in layer.parameters()}
    x = torch.randn(2, LENGTH, 32)
    twin = copy.deepcopy(layer)
    layer(x).sum().backward()
    assert slopes.grad.abs().sum() > 0
    assert logits.grad.abs().sum() > 0
    with torch.no_grad():
        for parameter in twin.score_parameters:
            parameter.zero_()
    assert slopes.abs().sum() > 0
    assert not torch.equal(twin(x), layer(x))
    with torch.no_grad():
        slopes.zero_()
        logits.zero_()
    torch.testing.assert_close(twin(x), layer(x))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_layer_goes_by_the_parameters_that_come_in_the_place_of_its_own(is_compiled):
    bias, logits = (torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 9), (4,)))
    layer = sparsec.SparseAttention(MASK, 32, 4, score_mod=score.chain(score.relative_bias(bias), score.sinks(logits)))
    x = torch.randn(2, LENGTH, 32)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.score_parameters:
            parameter.normal_()
    expected = other(x)
    run = torch.compile(layer, backend="eager") if is_compiled else layer
    assert not torch.allclose(run(x), expected)
    if not is_compiled:
        given = {name: parameter.detach().clone() for name, parameter in other.named_parameters()}
        torch.testing.assert_close(torch.func.functional_call(layer, given, (x,)), expected)
    layer.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(run(x), expected)
    run(x).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.score_parameters)


def test_a_saved_attention_takes_its_tensors_again(tmp_path):
    trained, leaves = Trained(), _leaves()
    attention = sparsec.compile(MASK, LENGTH, score_mod=trained.mod(), template="row_traversal")
    with torch.no_grad():
        wanted = attention(*leaves)
        attention.save(tmp_path / "saved")
        assert torch.equal(sparsec.load(tmp_path / "saved", score_mod=trained.mod())(*leaves), wanted)
        # What they hold is not part of the file; their shapes are.
        sparsec.load(tmp_path / "saved", score_mod=Trained().mod())
    with pytest.raises(RecordError, match="same score_mod"):
        sparsec.load(tmp_path / "saved", score_mod=score.alibi(trained.slopes))
    with pytest.raises(RecordError, match="same score_mod"):
        sparsec.load(tmp_path / "saved", score_mod=trained.mod().in_kernel)  # without its sinks


# Sinks and columns by themselves.


def test_sinks_alone_change_no_kernel():
    logits = torch.tensor([0.5, -torch.inf, 3.0, -2.0])
    plain, sunk = sparsec.compile(MASK, LENGTH), sparsec.compile(MASK, LENGTH, score_mod=score.sinks(logits))
    leaves = _leaves()
    out, lse = sunk(*leaves, return_lse=True)
    assert sunk.plan.groups[0].steps[0].launch.score is None
    q, k, v = (t.detach().double() for t in leaves)
    exact = _dense(q, *(t.repeat_interleave(2, 1) for t in (k, v)), DENSE, lambda s, *_: s, logits.double())
    attends = DENSE.any(1)
    torch.testing.assert_close(out[:, :, attends].double(), exact[0][:, :, attends], atol=2e-6, rtol=0)
    torch.testing.assert_close(lse.double(), exact[1], atol=2e-6, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(sunk(*leaves), out)
        torch.testing.assert_close(out[:, 1], plain(*leaves)[:, 1])
    gradients = torch.autograd.grad(out.sum() + lse[:, :, attends].sum(), leaves)
    assert all(g.isfinite().all() for g in gradients)


# Refusals.


def test_what_cannot_be_a_modifier_is_refused():
    with pytest.raises(MaskError, match=r"test_score\.py"):
        sparsec.compile(masks.full(), 8, score_mod=lambda s, b, h, q, k: s if q > 3 else -s)
    with pytest.raises(MaskError, match=r"test_score\.py:\d+: .*cumsum"):
        sparsec.compile(masks.full(), 8, score_mod=lambda s, b, h, q, k: torch.cumsum(s, 0))
    with pytest.raises(MaskError, match="int"):
        sparsec.compile(masks.full(), 8, score_mod=3)
    with pytest.raises(MaskError, match="positive"):
        score.soft_cap(0.0)
    with pytest.raises(MaskError, match="reach"):
        score.relative_bias(np.zeros((2, 4)))
    with pytest.raises(MaskError, match="floats"):
        score.alibi(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(MaskError, match="two of its modifiers have sinks"):
        score.chain(score.sinks([1.0]), score.sinks([1.0]))


def test_a_modifier_with_a_side_effect_is_named_with_its_line():
    seen, calls, buffer, log_slopes = [], 0, torch.zeros(4), torch.zeros(4, requires_grad=True)

    def appends(s, b, h, q, k):
        seen.append(s)
        return s

    def counts(s, b, h, q, k):
        nonlocal calls
        calls += 1
        return s

    def writes(s, b, h, q, k):
        buffer[0] = 1.0
        return s

    def adds(s, b, h, q, k):
        return s + buffer.add_(1.0)[h]

    def draws(s, b, h, q, k):
        return s + torch.rand(()).item()

    def derives(s, b, h, q, k):
        return s + torch.exp(log_slopes)[h]

    for function, what in (
        (appends, "seen, by append"),
        (counts, "calls of an enclosing function"),
        (writes, "an item of an object"),
        (adds, "changes the captured array 'buffer'"),
        (draws, "and then"),
        (derives, "'log_slopes', which requires a gradient"),
    ):
        with pytest.raises(MaskError, match=rf"test_score\.py:\d+: .*{what}"):
            sparsec.compile(masks.full(), 8, score_mod=function)
    assert not seen
    assert calls == 0
    assert not buffer.any()


def test_arrays_of_the_wrong_length_are_refused():
    options = {"q_heads": 4, "head_dim": 16, "dtype": "fp32"}
    for wrong, what in (
        (score.alibi(torch.zeros(3)), r"'slopes' of shape \(3,\).*the query head \(h\).*4"),
        (score.column_bias(torch.zeros(4, LENGTH - 1)), rf"the key \(kv_idx\).*{LENGTH}"),
        (score.edge_bias(torch.zeros(NNZ + 1)), f"the edge of the mask.*{NNZ:,}"),
        (score.sinks(torch.zeros(2)), "one logit a query head"),
    ):
        with pytest.raises(SparsecError, match=what):
            sparsec.compile(MASK, LENGTH, score_mod=wrong, **options)
    varied = masks.per_head([masks.causal(), masks.full(), masks.full(), masks.full()])
    with pytest.raises(UnsupportedError, match="counts the edges"):
        sparsec.compile(varied, LENGTH, score_mod=score.edge_bias(torch.zeros(5)), **options)
    narrow = sparsec.compile(
        MASK, LENGTH, score_mod=score.row_bias(torch.zeros(1, 4, LENGTH)), template="row_traversal"
    )
    with pytest.raises(SparsecError, match=r"batch element has 1 entries.*batch 2"):
        narrow(*_leaves())
    frozen = sparsec.compile(MASK, LENGTH, score_mod=score.alibi(torch.zeros(4, requires_grad=True)), needs_grad=False)
    with pytest.raises(UnsupportedError, match="needs_grad=False"):
        frozen(*(t.detach() for t in _leaves()))


def test_the_plan_refuses_who_applies_none():
    attention = sparsec.compile(
        masks.causal(), 64, score_mod=score.soft_cap(10.0), q_heads=1, head_dim=16, dtype="fp32"
    )
    assert any("no score modifier" in refusal.reason for refusal in attention.plan.refusals)
    assert "tanh" in "".join(text for files in attention.source().values() for text in files.values())
