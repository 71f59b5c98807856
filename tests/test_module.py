"""`SparseAttention`: its mathematics, its state, its copies, and torch.compile."""

from __future__ import annotations

import copy
import gc
import io

import numpy as np
import pytest
import torch

import sparsec
from sparsec import masks as m
from sparsec.errors import MaskError, SparsecError

pytestmark = pytest.mark.usefixtures("two_threads")


WINDOW = m.window(20, 0)


def _layer(mask=WINDOW, **options) -> sparsec.SparseAttention:
    torch.manual_seed(0)
    return sparsec.SparseAttention(mask, 48, 6, **options)


def _dense(layer, x):
    """The same layer with torch's attention under a boolean mask."""
    b, n, _ = x.shape
    q, k, v = (p(x).view(b, n, -1, layer.head_dim).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    allowed = torch.from_numpy(layer.mask.bind(n).to_dense())
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    return layer.out_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2}, {"kv_heads": 1, "head_dim": 20}, {"bias": False}], ids=str)
def test_equals_dense_attention(options):
    layer = _layer(**options)
    for length in (100, 37):
        x = torch.randn(2, length, 48, requires_grad=True)
        found, wanted = layer(x), _dense(layer, x)
        torch.testing.assert_close(found, wanted)
        inputs = [x, *layer.parameters()]
        above = torch.randn_like(found)
        for a, b in zip(
            torch.autograd.grad(found, inputs, above), torch.autograd.grad(wanted, inputs, above), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_repr_names_mask_and_heads():
    text = repr(_layer(kv_heads=2))
    assert "window(20, 0), embed_dim=48, q_heads=6, kv_heads=2, head_dim=8" in text
    assert "q_proj" in text


def test_state_is_the_projections():
    layer = _layer()
    assert sorted(layer.state_dict()) == [
        f"{name}_proj.{part}" for name in ("k", "out", "q", "v") for part in ("bias", "weight")
    ]
    other = sparsec.SparseAttention(m.window(20, 0), 48, 6)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(1, 50, 48)
    assert torch.equal(layer(x), other(x))


def test_each_length_is_compiled_once_and_few_are_kept():
    layer = _layer()
    first = layer.attention(50)
    assert layer.attention(50) is first
    for length in range(51, 58):
        layer.attention(length)
    assert layer.attention(50) is first
    for length in range(58, 66):
        layer.attention(length)
    assert layer.attention(50) is not first


def test_a_copy_outlives_the_original():
    layer = _layer()
    x = torch.randn(1, 50, 48)
    wanted = layer(x)
    twin = copy.deepcopy(layer)
    assert twin._handle == twin._by_length.handle != layer._handle
    del layer
    gc.collect()
    assert torch.equal(twin(x), wanted)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(twin, fullgraph=True, backend="aot_eager")(x), wanted)


def test_a_saved_module_comes_back():
    layer = _layer()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.randn(1, 50, 48)
    assert torch.equal(again(x), layer(x))


def test_compiled_in_one_graph():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    layer = _layer(kv_heads=2)
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for batch, length in ((2, 100), (3, 100), (5, 100), (4, 64), (2, 30)):
        x = torch.randn(batch, length, 48, requires_grad=True)
        found, wanted = compiled(x), layer(x)
        torch.testing.assert_close(found, wanted)
        above = torch.randn_like(found)
        for a, b in zip(
            torch.autograd.grad(found, [x, *layer.parameters()], above),
            torch.autograd.grad(wanted, [x, *layer.parameters()], above),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    # Any batch, then any batch and length.
    assert len(graphs) <= 3


def test_autocast():
    layer = _layer()
    x = torch.randn(2, 50, 48)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, again = layer(x), compiled(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, again)
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)


def test_half_precision_parameters():
    layer = _layer(dtype=torch.bfloat16)
    assert layer(torch.randn(1, 50, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_mask_of_one_length():
    layer = _layer(m.from_dense(np.tri(40) > 0))
    assert layer(torch.randn(1, 40, 48)).shape == (1, 40, 48)
    with pytest.raises(MaskError, match="40"):
        layer(torch.randn(1, 41, 48))


@pytest.mark.parametrize(
    ("arguments", "message"), [((48, 5), "no multiple of q_heads=5"), ((48, 6, 4), "multiple of the key heads")]
)
def test_heads_that_do_not_fit(arguments, message):
    with pytest.raises(SparsecError, match=message):
        sparsec.SparseAttention(m.causal(), *arguments)


def test_it_learns():
    torch.manual_seed(0)
    layer = _layer()
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(4, 60, 48)
    wanted = torch.roll(x, 3, 1)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = (layer(x) - wanted)[:, 3:].square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
