"""sparsec under torch's own machinery: autograd, torch.compile, checkpointing, autocast, and packed tensors."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import sparsec
from sparsec import masks as m
from sparsec import score
from sparsec.backends import reference
from sparsec.errors import MaskError, SparsecError, UnsupportedError

pytestmark = pytest.mark.usefixtures("two_threads")

# An empty row and column, a full row, single edges.
_DENSE = np.random.default_rng(0).random((9, 11)) < 0.4
_DENSE[2] = False
_DENSE[5] = True
_DENSE[:, 7] = False
SMALL = m.from_dense(_DENSE)

MASKS = [
    m.window(40, 10),
    m.causal(),
    m.random_edges(5, 0),
    m.dilated(64, 4) | m.window(5, 5),
    m.window(5, 5) | m.global_tokens([7, 100, 200]),
    m.per_head([m.window(3, 3), m.causal(), ~m.full(), m.random_edges(3, 1)]),
]


class _Reference(torch.autograd.Function):
    """The oracle's output, log-sum-exp and gradients, for torch to difference numerically."""

    @staticmethod
    def forward(ctx, q, k, v, bound, scale):
        ctx.save_for_backward(q, k, v)
        ctx.bound, ctx.scale = bound, scale
        out, lse = reference.attention(*(t.detach().numpy() for t in (q, k, v)), bound, scale)
        return torch.from_numpy(out), torch.from_numpy(lse)

    @staticmethod
    def backward(ctx, d_out, d_lse):
        arrays = (t.detach().numpy() for t in ctx.saved_tensors)
        above = d_out.numpy(), d_lse.numpy()
        return (*map(torch.from_numpy, reference.gradients(*arrays, ctx.bound, ctx.scale, *above)), None, None)


def _dense_attention(q, k, v, bound):
    """torch's own, in fp64, differentiable; an empty row gives 0."""
    heads = q.shape[1]
    allowed = np.stack([(bound.select(0, h) if bound.varies_by_head else bound).to_dense() for h in range(heads)])
    allowed = torch.from_numpy(allowed)
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~allowed, -torch.inf)
    is_empty = ~allowed.any(-1)
    weights = torch.softmax(scores.masked_fill(is_empty[..., None], 0.0), -1).masked_fill(~allowed, 0.0)
    return weights @ v, torch.logsumexp(scores.masked_fill(is_empty[..., None], 0.0), -1).masked_fill(is_empty, 0.0)


def _inputs(*, length=300, batch=2, heads=(4, 2), dims=(32, 48), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]))
    made = (torch.randn(batch, h, length, d, generator=generator) for h, d in shapes)
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def test_the_reference_differentiates_itself():
    generator = torch.Generator().manual_seed(0)
    bound = SMALL.bind(9, 11)
    shapes = ((9, 4), (11, 4), (11, 3))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)
    attends = torch.from_numpy(bound.degrees("q") > 0)

    def function(q, k, v):
        out, lse = _Reference.apply(q, k, v, bound, 0.7)
        return out, lse[attends]

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_gradients_equal_those_of_dense_attention(mask, layout):
    made = sparsec.compile(mask, 300, layout=layout)
    leaves = _inputs()
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    out, lse = _dense_attention(*doubles, made._bound)
    d_out, d_lse = torch.randn(out.shape), torch.randn(lse.shape)
    d_lse[lse == 0] = 0.0
    wanted = torch.autograd.grad((out, lse), doubles, (d_out.double(), d_lse.double()))
    turned = [t if layout == "bhsd" else t.transpose(1, 2) for t in leaves]
    got, got_lse = made(*turned, return_lse=True)
    found = torch.autograd.grad((got, got_lse), leaves, (d_out if layout == "bhsd" else d_out.transpose(1, 2), d_lse))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["out", "lse"])
def test_one_result_alone(which):
    made = sparsec.compile(m.window(40, 10), 300)
    leaves = _inputs()
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    index = ("out", "lse").index(which)
    above = torch.randn(_dense_attention(*doubles, made._bound)[index].shape)
    wanted = torch.autograd.grad(_dense_attention(*doubles, made._bound)[index], doubles[: 3 - index], above.double())
    found = torch.autograd.grad(made(*leaves, return_lse=True)[index], leaves[: 3 - index], above)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_only_some_inputs_require_gradients():
    made = sparsec.compile(m.window(40, 10), 300)
    q, k, v = _inputs()
    whole = torch.autograd.grad(made(q, k, v).sum(), (q, k, v))
    (alone,) = torch.autograd.grad(made(q.detach(), k.detach(), v).sum(), v)
    assert torch.equal(alone, whole[2])


def test_same_output_with_and_without_gradients():
    made = sparsec.compile(m.window(40, 10), 300)
    leaves = _inputs()
    out = made(*leaves)
    assert out.requires_grad
    with torch.no_grad():
        plain = made(*leaves)
    assert not plain.requires_grad
    assert torch.equal(out, plain)


def test_needs_grad_false_refuses():
    made = sparsec.compile(m.window(40, 10), 300, needs_grad=False)
    leaves = _inputs()
    with pytest.raises(UnsupportedError, match=r"needs_grad=False.*torch\.no_grad"):
        made(*leaves)
    with torch.no_grad():
        assert not made(*leaves).requires_grad
    out = torch.compile(made, fullgraph=True, backend="aot_eager")(*leaves)
    with pytest.raises(UnsupportedError, match=r"needs_grad=False.*torch\.no_grad"):
        out.sum().backward()


def test_integer_inputs_are_refused():
    made = sparsec.compile(m.window(40, 10), 300)
    with pytest.raises(UnsupportedError, match=r"torch\.int64"):
        made(*(torch.zeros(1, 1, 300, 16, dtype=torch.int64) for _ in range(3)))


def test_a_graph_keeps_its_attention():
    leaves = _inputs()
    kept = sparsec.compile(m.window(40, 10), 300)
    wanted = torch.autograd.grad(kept(*leaves).sum(), leaves)
    out = sparsec.compile(m.window(40, 10), 300)(*leaves)
    gc.collect()
    found = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_an_attention_that_is_gone_is_named():
    made = sparsec.compile(m.window(40, 10), 300)
    handle = made._handle
    del made
    gc.collect()
    with pytest.raises(SparsecError, match="no longer exists: keep the object"):
        torch.ops.sparsec.forward(*_inputs(), [], handle)


def test_second_gradients_are_refused():
    made = sparsec.compile(m.window(40, 10), 300)
    leaves = _inputs()
    first = torch.autograd.grad(made(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(UnsupportedError, match="a gradient of a gradient"):
        first[0].sum().backward()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_is_made_again(copied):
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    made = sparsec.compile(m.window(40, 10) | m.random_edges(3, 0), 300, score_mod=score.alibi(slopes))
    q, k, v = (t.detach() for t in _inputs())
    wanted = made(q, k, v)
    twin = copied(made)
    assert twin._handle != made._handle
    made.update(m.window(3, 3) | m.random_edges(3, 0))
    assert torch.equal(twin(q, k, v), wanted)
    assert not torch.equal(made(q, k, v), wanted)


# Operators.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    made = sparsec.compile(m.window(9, 3), 60)
    for tensors in (_inputs(length=60, dims=(16, 24), dtype=dtype), [t.detach() for t in _inputs(length=60)]):
        torch.library.opcheck(torch.ops.sparsec.forward.default, (*tensors, [], made._handle))
    q, k, v = (t.detach() for t in _inputs(length=60, dims=(16, 24), dtype=dtype))
    out, lse = made(q, k, v, return_lse=True)
    above = torch.randn_like(out), torch.randn_like(lse)
    torch.library.opcheck(torch.ops.sparsec.backward.default, (q, k, v, out, lse, *above, [], [], made._handle))


def test_opcheck_of_turned_tensors():
    made = sparsec.compile(m.window(9, 3), 60)
    q, k, v = (t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in _inputs(length=60))
    torch.library.opcheck(torch.ops.sparsec.forward.default, (q, k, v, [], made._handle))


# Forward mode.


def _tangents_dropped_by():
    def dual(f, x):
        with forward_ad.dual_level():
            return f(forward_ad.make_dual(x, torch.ones_like(x)))

    return {
        "dual": dual,
        "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
        "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
        "compiled": lambda f, x: dual(torch.compile(f, backend="aot_eager"), x),
    }


@pytest.mark.parametrize("way", [*_tangents_dropped_by()])
@pytest.mark.parametrize("of", ["q", "v", "table", "sinks", "step"])
def test_forward_mode_is_refused(way, of):
    """Kernels see values alone: a derivative that comes along with them would be lost without a word."""
    if way == "compiled" and of not in ("q", "table"):
        pytest.skip("one operator takes all of them")
    torch._dynamo.reset()
    q, k, v = (t.detach() for t in _inputs(length=60))
    slopes, sinks = torch.rand(4), torch.rand(4)
    made = sparsec.compile(m.window(9, 3), 60, score_mod=score.chain(score.alibi(slopes), score.sinks(sinks)))
    call = {
        "q": (lambda x: made(x, k, v), q),
        "v": (lambda x: made(q, k, x), v),
        "table": (lambda x: made(q, k, v, score_args=[x, sinks]), slopes),
        "sinks": (lambda x: made(q, k, v, score_args=[slopes, x]), sinks),
        "step": (lambda x: made.step(x[:, :, -1:], k, v), q),
    }[of]
    call[0](call[1])
    with pytest.raises(UnsupportedError, match="only reverse mode"):
        _tangents_dropped_by()[way](*call)
    # An open level changes nothing for tensors without derivatives.
    with forward_ad.dual_level():
        call[0](call[1])


# torch.compile.


class _Block(torch.nn.Module):
    def __init__(self, attention, layout):
        super().__init__()
        self.attention, self.layout = attention, layout
        self.projection = torch.nn.Linear(32, 3 * 32)

    def forward(self, x):
        q, k, v = self.projection(x).view(*x.shape[:2], 3, 4, 8).unbind(2)
        if self.layout == "bhsd":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out, lse = self.attention(q, k, v, return_lse=True)
        out = out.transpose(1, 2) if self.layout == "bhsd" else out
        return out.flatten(2), lse


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_compiled_in_one_graph_for_any_batch(layout):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    block = _Block(sparsec.compile(m.window(40, 10), 100, layout=layout), layout)
    compiled = torch.compile(block, fullgraph=True, backend=aot_autograd(fw_compiler=count))
    for batch in (1, 2, 3, 5, 4):
        x = torch.randn(batch, 100, 32, requires_grad=True)
        wanted, found = block(x), compiled(x)
        above = tuple(torch.randn_like(t) for t in wanted)
        inputs = [x, *block.parameters()]
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(
            torch.autograd.grad(found, inputs, above), torch.autograd.grad(wanted, inputs, above), strict=True
        ):
            torch.testing.assert_close(a, b)
        # Forward and backward: once for batch 1, and once for all others.
        assert len(graphs) == (2 if batch == 1 else 4)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 2, 20, 8), (1, 2, 20, 8), (2, 2, 20, 8)], "q has batch 2 and k has 1"),
        ([(2, 2, 20, 8), (2, 2, 20, 8), (2, 2, 9, 8)], r"k has shape .* and v \(2, 2, 9, 8\)"),
        ([(2, 2, 20, 8), (2, 2, 20, 4), (2, 2, 20, 8)], "q has head_dim 8 and k has 4"),
    ],
)
def test_a_compiled_function_refuses_tensors_that_do_not_fit(shapes, message):
    # A kernel that took them would read beyond the smaller one.
    torch._dynamo.reset()
    attn = sparsec.compile(m.window(3, 3), 20)
    compiled = torch.compile(attn, backend="eager")
    with pytest.raises(sparsec.errors.SparsecError, match=message):
        compiled(*(torch.randn(shape) for shape in shapes))
    torch._dynamo.reset()


def test_compiled_by_aot_eager_without_gradients():
    torch._dynamo.reset()
    made = sparsec.compile(m.window(40, 10), 100)
    compiled = torch.compile(lambda *t: made(*t) * 2, fullgraph=True, backend="aot_eager")
    q, k, v = (t.detach() for t in _inputs(length=100))
    torch.testing.assert_close(compiled(q, k, v), made(q, k, v) * 2)


# Checkpointing.


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    block = _Block(sparsec.compile(m.window(40, 10), 100), "bhsd")
    x = torch.randn(2, 100, 32, requires_grad=True)
    wanted = torch.autograd.grad(block(x)[0].sum(), x)
    x2 = x.detach().requires_grad_()
    checkpoint(lambda x: block(x)[0], x2, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x2.grad, wanted[0])


# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_torch_does(dtype):
    made = sparsec.compile(m.window(40, 10), 300)
    leaves = _inputs(heads=(4, 4), dims=(32, 32))
    with torch.autocast("cpu", dtype=dtype):
        out, lse = made(*leaves, return_lse=True)
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(*leaves).dtype == dtype
    assert lse.dtype == torch.float32
    halves = [t.detach().to(dtype).requires_grad_() for t in leaves]
    wanted = made(*halves)
    assert torch.equal(out, wanted)
    above = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, above)
    for a, b in zip(found, torch.autograd.grad(wanted, halves, above), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_autocast_of_inputs_of_two_dtypes():
    made = sparsec.compile(m.window(40, 10), 300)
    q, k, v = (t.detach() for t in _inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = made(q, k.bfloat16(), v)
    assert torch.equal(mixed, made(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    with pytest.raises(SparsecError, match="one dtype"):
        made(q, k.bfloat16(), v)


def test_autocast_within_torch_compile():
    torch._dynamo.reset()
    block = _Block(sparsec.compile(m.window(40, 10), 100), "bhsd")
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 100, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = compiled(x)[0], block(x)[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted)
    a, b = (torch.autograd.grad(out.float().sum(), x)[0] for out in (found, wanted))
    torch.testing.assert_close(a, b)


def test_autocast_inside_a_compiled_function():
    torch._dynamo.reset()
    made = sparsec.compile(m.window(40, 10), 100)

    def function(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return made(q, k, v)

    q, k, v = (t.detach() for t in _inputs(length=100))
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(found, function(q, k, v))


# Packed sequences.

BOUNDS = [0, 40, 40, 141, 142, 300]


def _packed(seed=0):
    q, k, v = _inputs(batch=1, seed=seed)
    return [t.detach()[0].transpose(0, 1).contiguous().requires_grad_() for t in (q, k, v)]


def test_layout_thd_equals_each_document_alone():
    q, k, v = _packed()
    made = sparsec.compile(m.documents(cu_seqlens=BOUNDS) & m.window(20, 5), 300, layout="thd")
    out, lse = made(q, k, v, return_lse=True)
    assert out.shape == (300, 4, 48)
    assert lse.shape == (4, 300)
    assert out.is_contiguous()
    above = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out, lse), (q, k, v), above)
    for first, last in itertools.pairwise(BOUNDS):
        if first == last:
            continue
        leaves = [t[first:last].detach().transpose(0, 1).unsqueeze(0).requires_grad_() for t in (q, k, v)]
        alone, alone_lse = sparsec.attention(*leaves, m.window(20, 5), return_lse=True)
        torch.testing.assert_close(out[first:last], alone[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, first:last], alone_lse[0])
        given = above[0][first:last].transpose(0, 1).unsqueeze(0), above[1][:, first:last].unsqueeze(0)
        wanted = torch.autograd.grad((alone, alone_lse), leaves, given)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a[first:last], b[0].transpose(0, 1))


@pytest.mark.parametrize("kind", [list, np.array, lambda b: torch.tensor(b, dtype=torch.int32)])
def test_cu_seqlens_at_the_call(kind):
    q, k, v = (t.detach() for t in _packed())
    made = sparsec.compile(m.documents(cu_seqlens=BOUNDS) & m.causal(), 300, layout="thd")
    for mask in (m.causal(), m.causal("bottom_right")):
        found = sparsec.attention(q, k, v, mask, layout="thd", cu_seqlens=kind(BOUNDS))
        assert torch.equal(found, made(q, k, v))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 50, 40, 300], "decreases from 50 to 40"),
        ([0, 50, 299], "ends at 299, and the tensors have 300"),
        ([0, 50, 301], "ends at 301, and the tensors have 300"),
        ([1, 300], "must begin at 0"),
        ([], "must begin at 0"),
        ([0.0, 300.0], "flat sequence of ints"),
        ([[0, 300]], "flat sequence of ints"),
    ],
)
def test_wrong_cu_seqlens(bounds, message):
    with pytest.raises(MaskError, match=message):
        sparsec.attention(*_packed(), m.causal(), layout="thd", cu_seqlens=bounds)


@pytest.mark.parametrize(
    "mask",
    [
        m.global_tokens(2),
        m.prefix(3) | m.causal(),
        m.bigbird(16, 3, 1, 2, 0),
        m.documents([100, 200]),
        m.per_head([m.causal()] * 4),
        m.from_dense(np.tri(300) > 0),
    ],
    ids=str,
)
def test_masks_that_count_positions_are_refused_with_cu_seqlens(mask):
    with pytest.raises(MaskError, match="kv - q alone"):
        sparsec.attention(*_packed(), mask, layout="thd", cu_seqlens=BOUNDS)


def test_cu_seqlens_is_for_packed_tensors():
    with pytest.raises(MaskError, match="cu_seqlens is for packed tensors"):
        sparsec.attention(*_inputs(), m.causal(), cu_seqlens=BOUNDS)
    q, k, v = _packed()
    with pytest.raises(MaskError, match="300 queries and 299 keys"):
        sparsec.attention(q, k[:299], v[:299], m.causal(), layout="thd", cu_seqlens=BOUNDS)
    with pytest.raises(SparsecError, match="three dimensions"):
        sparsec.attention(*_inputs(), m.causal(), layout="thd")


def test_layout_thd_under_torch_compile():
    torch._dynamo.reset()
    made = sparsec.compile(m.documents(cu_seqlens=BOUNDS) & m.causal(), 300, layout="thd")
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    leaves = _packed()
    found, wanted = compiled(*leaves), made(*leaves)
    assert torch.equal(found, wanted)
    for a, b in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True):
        assert torch.equal(a, b)
