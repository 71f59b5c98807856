"""CUDA kernels run by an emulation on this processor, through the back end's own launches, against the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import running
import test_backward
import torch
from cases import HARD, Case, by_degree, case, scattered
from cuda_emulation import Emulation

from sparsec import gate, score
from sparsec import masks as m
from sparsec.backends import cuda, reference
from sparsec.device import device
from sparsec.errors import UnsupportedError
from sparsec.layout import Ordering, reordered
from sparsec.template import Config, template

GPU = device("nvidia-h100")
ROWS = template("row_traversal")

# Lengths for every bin: empty, short, middling, long, and one that is split.
_DEGREES = [3, 300, 0, 1, 7, 2, 64, 0, 31, 900]
EVERY_BIN = case("every-bin", by_degree(_DEGREES, 1000), len(_DEGREES), 1000, 64, heads=(4, 2))


@pytest.fixture
def emulation(monkeypatch) -> Emulation:
    made = Emulation()
    monkeypatch.setattr(cuda, "machine", lambda: made)
    return made


def launched(tried: Case, *, values=(), **given):
    config = Config.of(**{**ROWS.default("cuda").to_dict(), **dict(values)})
    return running.launch(ROWS, "cuda", tried, config=config, device=GPU, **given)


def forward(tried: Case, *, values=(), **given) -> tuple[torch.Tensor, torch.Tensor]:
    made = launched(tried, values=values, **given)
    out, lse = running.poisoned(tried, is_partial=made.is_partial)
    cuda.backend().lower(made)(*running.inputs(tried), out, lse)
    return out, lse


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_hard_case(emulation, dtype):
    tried = HARD.with_dtype(dtype)
    running.check(tried, *forward(tried))


@pytest.mark.parametrize(
    ("tried", "dtype", "values"),
    [
        (EVERY_BIN, "bf16", {"long_keys": 256}),
        (EVERY_BIN, "fp32", {"long_keys": 256, "short_keys": 0, "num_warps": 8, "pack_gqa": 1}),
        (case("offsets", m.dilated(60, 7) | m.window(9, 20), 70, 80, 64, heads=(4, 1), batch=2), "bf16", {}),
        (case("ranges", m.longformer(20, [0, 37]), 70, 70, 64), "fp16", {"rows_per_warp": 4, "lane_bytes": 32}),
        (case("odd", scattered(65, 67, 0.3), 65, 67, 31, v_dim=255), "bf16", {}),
        (case("wide", scattered(65, 67, 0.3), 65, 67, 256, scale=-0.125), "fp32", {}),
        (case("large-scores", by_degree([i % 10 for i in range(41)], 40), 41, 40, 64, shift=1e4), "fp32", {}),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else None,
)
def test_bins_forms_and_dimensions(emulation, tried, dtype, values):
    tried = tried.with_dtype(dtype)
    running.check(tried, *forward(tried, values=values.items()))
    if tried.name == "every-bin":
        assert [name for name, *_ in emulation.started] == ["forward", "merge"]


def test_the_same_inputs_give_the_same_bits(emulation):
    tried = EVERY_BIN.with_dtype("bf16")
    first, again = (forward(tried, values=[("long_keys", 256)]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_captured_graph_goes_on_with_an_updated_mask(emulation, monkeypatch, caplog):
    monkeypatch.setattr(cuda, "_is_capturing", lambda device: True)
    tried, other = (
        case("random", m.random_edges(9, seed), 50, 80, 16, heads=(4, 2)).with_dtype("fp32") for seed in (1, 2)
    )
    old = cuda.backend().lower(launched(tried))
    out, lse = running.poisoned(tried)
    old(*running.inputs(tried), out, lse)
    running.check(tried, out, lse)
    new = cuda.backend().lower(launched(other))
    new.take_over(old)
    out.fill_(float("nan"))
    emulation.replay()
    running.check(other, out, lse)
    # Rows of other lengths are binned otherwise, which the graph has fixed: it keeps what it reads, and we are told.
    longer = cuda.backend().lower(launched(case("longer", m.random_edges(20, 1), 50, 80, 16, heads=(4, 2))))
    longer.take_over(new)
    assert "capture it again" in caplog.text
    del old, new
    out.fill_(float("nan"))
    emulation.replay()
    running.check(other, out, lse)


def test_another_order_of_tokens(emulation):
    tried = HARD.with_dtype("bf16")
    p, rng = tried.problem, np.random.default_rng(5)
    orders = (rng.permutation(n).astype(np.int32) for n in (p.q_len, p.kv_len))
    ordering = Ordering("shuffled", *orders)
    running.check(tried, *forward(tried, ordering=ordering, bound=reordered(tried.bound, ordering)))


def test_a_partial_result_is_fp32(emulation):
    tried = HARD.with_dtype("bf16")
    out, lse = forward(tried, is_partial=True)
    assert out.dtype == torch.float32
    running.check(tried, out, lse)


def test_some_heads_of_some_batch_elements(emulation):
    tried = case("some", m.window(9, 9), 60, 60, 64, heads=(8, 2), batch=3)
    made = replace(launched(tried), heads=(1, 2, 3, 6), batch=(2,))
    out, lse = running.poisoned(tried)
    cuda.backend().lower(made)(*running.inputs(tried), out, lse)
    served = torch.zeros(3, 8, dtype=torch.bool)
    served[2, [1, 2, 3, 6]] = True
    assert torch.isnan(lse[~served]).all()
    for b, h in (~served).nonzero().tolist():
        out[b, h], lse[b, h] = map(torch.from_numpy, running.expected_of(tried, b, h)[:2])
    running.check(tried, out, lse)


def test_inputs_in_any_layout(emulation):
    """Rows that lie apart, heads inside tokens, and addresses that no wide load may use."""
    tried = HARD.with_dtype("bf16")
    made = launched(tried)
    spread = []
    for tensor in running.inputs(tried):
        wider = torch.full((*tensor.shape[:2], tensor.shape[2], tensor.shape[3] + 3), float("nan"), dtype=tensor.dtype)
        wider[..., 1:-2] = tensor
        spread.append(wider[..., 1:-2])
    out, lse = running.poisoned(tried)
    cuda.backend().lower(made)(*spread, out, lse)
    running.check(tried, out, lse)
    inside = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in running.inputs(tried)]
    out, _ = running.poisoned(tried)
    cuda.backend().lower(made)(*inside, out, None)
    running.check(tried, out)


def test_offsets_are_64_bit(emulation):
    tried = case("far", m.full(), 3, 3, 8).with_dtype("fp16")
    apart = 2**30 + 8
    far = torch.empty(2 * apart + 8, dtype=torch.float16).as_strided((1, 1, 3, 8), (0, 0, apart, 1))
    q, k, v = running.inputs(tried)
    far.copy_(k)
    out, lse = running.poisoned(tried)
    cuda.backend().lower(launched(tried))(q, far, v, out, lse)
    running.check(tried, out, lse)


def test_a_nan_stays_with_the_rows_that_attend_it(emulation):
    tried = HARD
    q, k, v = (tensor.clone() for tensor in running.inputs(tried))
    k[0, 0, 60] = float("nan")
    out, _ = running.poisoned(tried)
    cuda.backend().lower(launched(tried))(q, k, v, out, None)
    attends = torch.from_numpy(tried.bound.to_dense()[:, 60])
    assert torch.isnan(out[0, :, attends]).all()
    assert not torch.isnan(out[0, :, ~attends]).any()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_of_the_hard_case(emulation, dtype):
    given = test_backward.given(HARD.with_dtype(dtype))
    test_backward.check(given, *test_backward.run(launched(given.case), given))


@pytest.mark.parametrize(
    ("tried", "dtype", "values"),
    [
        (EVERY_BIN, "bf16", {"long_keys": 256}),
        # Keys that many queries attend.
        (
            replace(
                EVERY_BIN, mask=EVERY_BIN.mask.T, problem=replace(EVERY_BIN.problem, q_len=1000, kv_len=len(_DEGREES))
            ),
            "fp32",
            {},
        ),
        (case("offsets", m.dilated(60, 7) | m.window(9, 20), 70, 80, 64, heads=(4, 1), batch=2), "bf16", {}),
        (case("ranges", m.longformer(20, [0, 37]), 70, 70, 31, v_dim=255, scale=-0.2), "fp16", {}),
        (case("large-scores", by_degree([i % 10 for i in range(41)], 40), 41, 40, 64, shift=1e4), "fp32", {}),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else None,
)
def test_gradients_of_bins_and_forms(emulation, tried, dtype, values):
    given = test_backward.given(tried.with_dtype(dtype))
    made = launched(given.case, values=values.items())
    gradients = test_backward.run(made, given)
    test_backward.check(given, *gradients)
    if tried is EVERY_BIN:
        again = test_backward.run(made, given)
        assert all(torch.equal(one, other) for one, other in zip(gradients, again, strict=True))


def test_gradients_are_added_and_need_none_of_the_log_sum_exp(emulation):
    given = test_backward.given(case("added", m.window(9, 9), 60, 60, 64, heads=(4, 2)).with_dtype("bf16"))
    kernel = cuda.backend().lower_backward(launched(given.case))
    results = []
    for d_lse in (None, torch.zeros_like(given.above[1])):
        dq, dk, dv = test_backward.buffers(given)
        dk += 1
        kernel(*given.inputs, *given.results, given.above[0], d_lse, dq, dk, dv)
        results.append((dq, dk, dv))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    _, dk, _ = test_backward.buffers(given)
    kernel(*given.inputs, *given.results, given.above[0], None, dq, dk, dv)
    # A sum is made up, and then added: rounded once.
    assert torch.equal(results[0][1], dk + 1)


def test_gradients_of_split_rows_are_added_once(emulation):
    """Keys that many queries attend: several blocks have a part of each, and what they amount to is added once."""
    problem = replace(EVERY_BIN.problem, q_len=1000, kv_len=len(_DEGREES))
    given = test_backward.given(replace(EVERY_BIN, mask=EVERY_BIN.mask.T, problem=problem))
    made = launched(given.case, values=[("long_keys", 256)])
    kernel = cuda.backend().lower_backward(made)
    once, again = test_backward.buffers(given), test_backward.buffers(given)
    tensors = (*given.inputs, *given.results, *given.above)
    kernel(*tensors, *once)
    assert "add_up" in {name for name, *_ in emulation.started}
    kernel(*tensors, *again)
    kernel(*tensors, *again)
    assert torch.equal(again[0], once[0])
    for twice, single in zip(again[1:], once[1:], strict=True):
        assert torch.equal(twice, 2 * single)


def test_gradients_in_another_order_of_tokens(emulation):
    given = test_backward.given(HARD.with_dtype("bf16"))
    p, rng = HARD.problem, np.random.default_rng(5)
    ordering = Ordering("shuffled", *(rng.permutation(n).astype(np.int32) for n in (p.q_len, p.kv_len)))
    made = launched(given.case, ordering=ordering, bound=reordered(given.case.bound, ordering), is_partial=True)
    dq, dk, dv = test_backward.buffers(given)
    dq = dq.float()
    cuda.backend().lower_backward(made)(*given.inputs, *given.results, *given.above, dq, dk, dv)
    test_backward.check(given, dq, dk, dv)


def _every_operation(value, b, h, q_idx, kv_idx):
    near = torch.where((q_idx - kv_idx) % 3 == 0, value * 2, value - 1.5 + _TABLE[(q_idx // 7) % 8])
    return torch.sigmoid(near) * 3 + torch.abs(near) * 0.25 + torch.maximum(near, value) * 0.5 + b * 0.125 - h


_TABLE = np.random.default_rng(3).standard_normal(8).astype(np.float32)


def _modifiers() -> dict[str, score.ScoreMod]:
    """The last two capture tensors, by places of every kind and by edges; an infinite slope forbids every fifth key."""
    gain, bias, shift, edges, own_edges = (
        torch.zeros(*shape, requires_grad=True) for shape in ((4,), (4, 65), (2, 151), (700,), (2, 4, 3000))
    )

    def by_places(value, b, h, q_idx, kv_idx):
        nothing = torch.clamp(value, max=9e9) - value
        forbidden = torch.log(torch.where(kv_idx % 5 == 4, nothing, nothing + 1.0)) * gain[h] * gain[h]
        return (value * (1.5 + gain[h]) + bias[h, kv_idx - q_idx + 32] + shift[b, kv_idx]) * (
            1.0 + 0.25 * shift[0, q_idx]
        ) + forbidden

    return {
        "every-operation": score.as_score_mod(_every_operation),
        "by-places": score.as_score_mod(by_places),
        "by-edges": score.chain(
            score.edge_bias(edges), lambda s, b, h, q, kv: s * 0.5 + torch.sigmoid(s), score.edge_bias(own_edges)
        ),
    }


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", [*_modifiers()])
def test_score_modifiers(emulation, name, direction):
    # The gate's own hard case, with its tensors where the emulation can read them.
    here = replace(GPU, kind="cpu")
    assert gate.check(ROWS, "cuda", "fp32", here, direction, _modifiers()[name]) is None


def test_modifiers_are_told_queries_of_a_longer_sequence(emulation):
    tried = case("step", m.window(9, 9), 5, 60, 16, heads=(4, 2)).with_dtype("fp32")
    made = replace(launched(tried), score=score.alibi([0.5, 0.25, 0.125, 0.0625]), first_query=23)
    results = [running.poisoned(tried) for _ in range(2)]
    cuda.backend().lower(made)(*running.inputs(tried), *results[0])
    reference.ReferenceKernel(made)(*running.inputs(tried), *results[1])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_what_a_modifier_asks_beyond_the_kernels_is_refused():
    wide = score.as_score_mod(lambda value, b, h, q_idx, kv_idx: value + q_idx * 1_000_000_000 // (kv_idx + 1))
    made = replace(launched(HARD), score=wide)
    with pytest.raises(UnsupportedError, match="32 bits"):
        cuda.programs_of(made)
