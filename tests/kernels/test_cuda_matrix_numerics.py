"""The CUDA kernels of tiles run by an emulation of matrix units and asynchronous copies, against the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import running
import torch
from cases import HARD, Case, by_degree, case, scattered
from cuda_emulation import Emulation

from sparsec import gate, score
from sparsec import masks as m
from sparsec.backends import cuda, reference
from sparsec.backends.base import Launch
from sparsec.backends.cuda_tiles import tile_walk
from sparsec.device import device
from sparsec.errors import UnsupportedError
from sparsec.layout import Ordering, reordered, schedule
from sparsec.layout.hybrid import HybridLayout
from sparsec.template import Config, template, templates

GPU, SMALL_GPU = device("nvidia-h100"), device("nvidia-l40s")
TEMPLATES = [name for name, made in templates().items() if "cuda" in made.backends() and made.layout != "rows"]
EVERY = pytest.mark.parametrize("name", TEMPLATES)


@pytest.fixture
def emulation(monkeypatch) -> Emulation:
    made = Emulation()
    monkeypatch.setattr(cuda, "machine", lambda: made)
    return made


def launched(name: str, tried: Case, values=(), on=GPU, **given) -> Launch:
    chosen = template(name)
    largest = {tunable.name: max(tunable.values) for tunable in chosen.tunables_of("cuda")}
    wanted = chosen.default("cuda").to_dict() | {key: min(value, largest[key]) for key, value in dict(values).items()}
    if name == "hybrid":
        wanted["block_q"] = min(wanted["block_q"], 64 // wanted["pack_gqa"])
    config = Config.of(**wanted)
    assert chosen.violation("cuda", config) is None
    return running.launch(chosen, "cuda", tried, config=config, device=on, **given)


def split(made: Launch) -> Launch:
    """The same launch, its blocks of queries cut into pieces of an entry or two."""
    work = made.work
    if work.items is None:
        planned = schedule(work.tiles.tile_map.indptr, 1.0, workers=16, copies=1)
        return replace(made, work=replace(work, schedule=planned))
    layout = HybridLayout(work.tiles, work.gathered, work.rows)
    planned = schedule(layout.entry_indptr(), 1.0, workers=16, copies=1)
    return replace(made, work=replace(work, schedule=planned, items=layout.items(planned)))


def run(made: Launch, tried: Case) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = running.poisoned(tried, is_partial=made.is_partial)
    cuda.backend().lower(made)(*running.inputs(tried), out, lse)
    return out, lse


@EVERY
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_hard_case(emulation, name, dtype):
    tried = HARD.with_dtype(dtype)
    running.check(tried, *run(launched(name, tried), tried))


@EVERY
@pytest.mark.parametrize(
    ("tried", "dtype", "values"),
    [
        # Heads of a group in one query tile, two parts a warp, tiles of more keys than a step.
        (
            case("packed", scattered(70, 150, 0.1), 70, 150, 64, heads=(4, 1), batch=2),
            "bf16",
            {"block_q": 32, "pack_gqa": 4, "warp_rows": 32, "block_kv": 128, "step_kv": 32, "num_stages": 4},
        ),
        # Dimensions that fill no matrix and no copy, one warp, the smallest tiles.
        (case("odd", scattered(65, 67, 0.3), 65, 67, 31, v_dim=255), "bf16", {"block_q": 16, "block_kv": 16}),
        (case("one-dim", scattered(65, 67, 0.3), 65, 67, 1, v_dim=6), "fp16", {"block_q": 128, "block_kv": 32}),
        # No room for the queries in registers.
        (case("wide", scattered(65, 67, 0.3), 65, 67, 256, scale=-0.125), "bf16", {}),
        (case("no-scale", scattered(65, 67, 0.3), 65, 67, 80, scale=0.0), "fp16", {}),
        # Full tiles that the end of the keys cuts off, empty blocks, tiles beyond the last key.
        (case("full", m.full(), 67, 200, shift=1e4), "bf16", {}),
        (case("window", m.window(90, 3), 200, 200, 64, heads=(3, 3)), "bf16", {"num_stages": 3}),
        (case("empty", ~m.full(), 65, 70, 16), "fp16", {}),
        (
            case("short-rows", by_degree([i % 10 for i in range(41)], 40), 41, 40, heads=(6, 2)),
            "fp16",
            {"block_q": 16, "pack_gqa": 4},
        ),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else None,
)
def test_shapes_and_configurations(emulation, name, tried, dtype, values):
    tried = tried.with_dtype(dtype)
    running.check(tried, *run(launched(name, tried, values), tried))


# Of numbers alone, of a table that the mask captured, and of integers beyond 32 bits.
_LABELS = np.repeat(np.arange(9), 25)
PREDICATES = {
    "window": m.window(37, 5),
    "documents": m.documents([60, 1, 90, 48]),
    "table": m.from_mask_mod(lambda b, h, q_idx, kv_idx: _LABELS[q_idx] == _LABELS[kv_idx]),
    "wide": m.from_mask_mod(lambda b, h, q_idx, kv_idx: q_idx * 1_000_003 * (kv_idx + 7) // 1_000_000 % 3 == 0),
}


@EVERY
@pytest.mark.parametrize("title", PREDICATES)
def test_partial_tiles_by_predicate(emulation, name, title):
    is_cut = title in ("window", "wide")
    values = {"block_kv": 128, "step_kv": 32, "pack_gqa": 2, "block_q": 32, "warp_rows": 32} if is_cut else {}
    tried = case(title, PREDICATES[title], 199, 199, 32, heads=(4, 2)).with_dtype("fp16")
    made = launched(
        name,
        tried,
        {**values, "by_predicate": 1, "tile_percent": 12} if name == "hybrid" else {**values, "by_predicate": 1},
    )
    walk = tile_walk(made)
    assert walk.arrays["patterns"] is None
    assert walk.arrays["item_partial"].sum() > 0
    assert ("long long" in walk.predicate.header.partition("struct Predicate")[2]) == (title == "wide")
    results = run(made, tried)
    running.check(tried, *results)
    # The same pairs, so the same bits as by pattern.
    by_pattern = replace(made, config=Config.of(**{**made.config.to_dict(), "by_predicate": 0}))
    assert all(torch.equal(one, other) for one, other in zip(results, run(by_pattern, tried), strict=True))


@EVERY
def test_predicates_follow_the_order_of_tokens_and_the_tables_of_a_modifier(emulation, name):
    tried = case("documents", PREDICATES["documents"], 199, 199, 32, heads=(4, 2)).with_dtype("fp16")
    rng = np.random.default_rng(5)
    ordering = Ordering("shuffled", *(rng.permutation(199).astype(np.int32) for _ in range(2)))
    bias, live = rng.standard_normal(4).astype(np.float32), torch.zeros(4)
    modifier = score.as_score_mod(lambda value, b, h, q, kv: value * 0.5 + bias[h] + live[h])
    made = launched(name, tried, {"by_predicate": 1}, ordering=ordering, bound=reordered(tried.bound, ordering))
    for launch in (made, replace(launched(name, tried, {"by_predicate": 1}), score=modifier.in_kernel)):
        by_pattern = replace(launch, config=Config.of(**{**launch.config.to_dict(), "by_predicate": 0}))
        given = () if launch.score is None else (torch.tensor([1.0, -2.0, 0.5, 3.0]),)
        found = []
        for each in (launch, by_pattern):
            out, lse = running.poisoned(tried)
            cuda.backend().lower(each)(*running.inputs(tried), out, lse, given)
            found.append((out, lse))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        assert not torch.isnan(found[0][0]).any()


def test_a_captured_graph_goes_on_with_an_updated_mask(emulation, monkeypatch):
    monkeypatch.setattr(cuda, "_is_capturing", lambda device: True)
    tried, other = (
        case("documents", m.documents(lengths), 199, 199, 16).with_dtype("fp16")
        for lengths in ([60, 80, 59], [70, 80, 49])
    )
    # The predicate's table of documents is another mask's too.
    old, new = (cuda.backend().lower(launched("block_sparse", each, {"by_predicate": 1})) for each in (tried, other))
    out, lse = running.poisoned(tried)
    old(*running.inputs(tried), out, lse)
    running.check(tried, out, lse)
    new.take_over(old)
    out.fill_(float("nan"))
    emulation.replay()
    running.check(other, out, lse)


@EVERY
def test_a_mask_of_edges_alone_keeps_its_patterns(name):
    made = launched(name, HARD.with_dtype("bf16"), {"by_predicate": 1})
    assert tile_walk(made).predicate is None
    assert "SX_PREDICATE" not in dict(cuda.programs_of(made)[0][0].defines)


@EVERY
def test_a_device_with_little_shared_memory(emulation, name):
    tried = case("wide", scattered(65, 67, 0.3), 65, 67, 256).with_dtype("bf16")
    made = launched(name, tried, {"num_stages": 4, "block_q": 64}, SMALL_GPU)
    shape = tile_walk(made).shape
    assert shape.stages == 2
    assert shape.shared_bytes <= SMALL_GPU.shared_bytes_per_block
    running.check(tried, *run(made, tried))


@EVERY
@pytest.mark.parametrize("values", [{}, {"pack_gqa": 2, "block_q": 32}], ids=["plain", "packed"])
def test_split_blocks_are_joined(emulation, name, values):
    tried = replace(HARD, problem=replace(HARD.problem, kv_len=500), mask=scattered(150, 500, 0.1)).with_dtype("bf16")
    made = split(launched(name, tried, {**values, "block_kv": 32}))
    assert len(made.work.schedule.merge_unit)
    results = run(made, tried)
    running.check(tried, *results)
    assert [started for started, *_ in emulation.started] == ["forward", "merge"]
    assert all(torch.equal(one, other) for one, other in zip(results, run(made, tried), strict=True))


@EVERY
def test_another_order_of_tokens(emulation, name):
    tried = HARD.with_dtype("bf16")
    p, rng = tried.problem, np.random.default_rng(5)
    ordering = Ordering("shuffled", *(rng.permutation(n).astype(np.int32) for n in (p.q_len, p.kv_len)))
    made = launched(name, tried, ordering=ordering, bound=reordered(tried.bound, ordering))
    running.check(tried, *run(made, tried))


@EVERY
def test_a_partial_result_is_fp32(emulation, name):
    tried = HARD.with_dtype("bf16")
    out, lse = run(launched(name, tried, is_partial=True), tried)
    assert out.dtype == torch.float32
    running.check(tried, out, lse)


@EVERY
def test_some_heads_of_some_batch_elements(emulation, name):
    tried = case("some", m.window(9, 9), 60, 60, 64, heads=(8, 2), batch=3).with_dtype("fp16")
    made = replace(launched(name, tried, {"pack_gqa": 2}), heads=(1, 2, 3, 6), batch=(2,))
    out, lse = run(made, tried)
    served = torch.zeros(3, 8, dtype=torch.bool)
    served[2, [1, 2, 3, 6]] = True
    assert torch.isnan(lse[~served]).all()
    assert torch.isnan(out[~served]).all()
    for b, h in (~served).nonzero().tolist():
        out[b, h], lse[b, h] = (torch.from_numpy(each) for each in running.expected_of(tried, b, h)[:2])
    running.check(tried, out, lse)


@EVERY
@pytest.mark.parametrize("apart", [3, 2, 4], ids=["by-2-bytes", "by-4-bytes", "by-8-bytes"])
def test_inputs_in_any_layout(emulation, name, apart):
    """Rows that lie apart, at addresses that no wide copy may use."""
    tried = HARD.with_dtype("bf16")
    spread = []
    for tensor in running.inputs(tried):
        wider = torch.full((*tensor.shape[:2], tensor.shape[2], tensor.shape[3] + apart), float("nan")).to(tensor.dtype)
        wider[..., : tensor.shape[3]] = tensor
        spread.append(wider[..., : tensor.shape[3]])
    out, _ = running.poisoned(tried)
    cuda.backend().lower(launched(name, tried))(*spread, out, None)
    running.check(tried, out)


@EVERY
def test_offsets_are_64_bit(emulation, name):
    tried = case("far", m.full(), 3, 3, 8).with_dtype("fp16")
    apart = 2**30 + 8
    far = torch.empty(2 * apart + 8, dtype=torch.float16).as_strided((1, 1, 3, 8), (0, 0, apart, 1))
    q, k, v = running.inputs(tried)
    far.copy_(k)
    out, lse = running.poisoned(tried)
    cuda.backend().lower(launched(name, tried))(q, far, v, out, lse)
    running.check(tried, out, lse)


@EVERY
def test_a_nan_in_a_key_stays_with_the_rows_that_attend_it(emulation, name):
    tried = HARD.with_dtype("bf16")
    q, k, v = (tensor.clone() for tensor in running.inputs(tried))
    k[0, 0, 60] = float("nan")
    out, _ = running.poisoned(tried)
    cuda.backend().lower(launched(name, tried))(q, k, v, out, None)
    attends = torch.from_numpy(tried.bound.to_dense()[:, 60])
    assert torch.isnan(out[0, :, attends]).all()
    assert not torch.isnan(out[0, :, ~attends]).any()


def _bent(value, b, h, q_idx, kv_idx):
    near = torch.where((q_idx - kv_idx) % 3 == 0, value * 2, value - 1.5 + _TABLE[(q_idx // 7) % 8])
    return torch.tanh(near) * 3 + b * 0.125 - h


_TABLE = np.random.default_rng(3).standard_normal(8).astype(np.float32)
_SHIFTS = torch.zeros(2, 65)


def _forbidding(value, b, h, q_idx, kv_idx):
    """All keys of every seventh query, and some of the others'."""
    return torch.where((q_idx % 7 == 5) | ((q_idx + kv_idx) % 4 == 0), -float("inf"), value * 8 + 500.0)


@EVERY
def test_a_score_modifier(emulation, name):
    # The gate's own hard case, with its tensors where the emulation can read them.
    here = replace(GPU, kind="cpu")
    assert gate.check(template(name), "cuda", "bf16", here, "forward", score.as_score_mod(_bent)) is None


@EVERY
@pytest.mark.parametrize(
    ("modifier", "dtype", "values", "mask"),
    [
        # Heads of a pack differ in what they add; more keys a tile than a step.
        (
            score.alibi([0.5, 0.25, 0.125, 0.0625]),
            "bf16",
            {"pack_gqa": 2, "block_q": 32, "block_kv": 128, "step_kv": 32, "num_stages": 4},
            scattered(70, 90, 0.2),
        ),
        # Rows of which all keys are forbidden; of the others, scores are large.
        (score.as_score_mod(_forbidding), "fp16", {"block_q": 16, "by_predicate": 1}, m.window(37, 5)),
        # A captured tensor, by head and distance, clamped at both ends; queries of a longer sequence.
        (
            score.as_score_mod(lambda value, b, h, q, kv: torch.tanh(value) + _SHIFTS[h // 2, kv - q + 32]).in_kernel,
            "fp16",
            {"pack_gqa": 2, "block_q": 16},
            scattered(70, 90, 0.1),
        ),
    ],
    ids=["alibi", "forbidding", "captured"],
)
def test_score_modifiers_in_other_shapes(emulation, name, modifier, dtype, values, mask):
    tried = case("modified", mask, 70, 90, 24, v_dim=40, heads=(4, 2), batch=2).with_dtype(dtype)
    made = replace(split(launched(name, tried, values)), score=modifier, first_query=11)
    generator = torch.Generator().manual_seed(3)
    tables = [torch.randn(table.shape, generator=generator) for table in modifier.live_tables]
    out, lse = running.poisoned(tried)
    q, k, v = running.inputs(tried)
    cuda.backend().lower(made)(q, k, v, out, lse, tables)
    for b, h in np.ndindex(lse.shape[:2]):
        heads = tuple(t.double().numpy() for t in (q[b, h], k[b, h // 2], v[b, h // 2]))
        bent = reference.modifier_of(made, b, h, tables)
        wanted = reference.attention(*heads, tried.bound, made.scale, modifier=bent)
        allowed = reference.tolerances(*heads, tried.bound, made.scale, dtype, bent)
        for got, right, most in zip((out[b, h], lse[b, h]), wanted, allowed, strict=True):
            running.check_close(got, right, most, f"head {h}, batch element {b}")


@EVERY
def test_a_score_modifier_in_another_order_of_tokens(emulation, name):
    tried = HARD.with_dtype("fp16")
    p, rng = tried.problem, np.random.default_rng(5)
    ordering = Ordering("shuffled", *(rng.permutation(n).astype(np.int32) for n in (p.q_len, p.kv_len)))
    distant = score.as_score_mod(lambda value, b, h, q_idx, kv_idx: value - 0.01 * (q_idx - kv_idx) * (h + 1))
    plain = replace(launched(name, tried), score=distant)
    moved = launched(name, tried, ordering=ordering, bound=reordered(tried.bound, ordering))
    for one, other in zip(run(plain, tried), run(replace(moved, score=distant), tried), strict=True):
        torch.testing.assert_close(one, other, rtol=4e-3, atol=4e-3)


@EVERY
def test_a_captured_tensor_is_read_anew(emulation, name):
    tried = HARD.with_dtype("bf16")
    bias = torch.zeros(tried.problem.q_heads)
    made = replace(
        launched(name, tried), score=score.as_score_mod(lambda value, b, h, q, kv: value + bias[h]).in_kernel
    )
    kernel, shifts = cuda.backend().lower(made), (torch.tensor([0.5, -1.0]), torch.tensor([3.0, 0.0]))
    for shift in shifts:
        out, lse = running.poisoned(tried)
        kernel(*running.inputs(tried), out, lse, [shift])
        # What is added to every score of a head changes nothing but the log-sum-exp.
        running.check(tried, out, lse - shift[None, :, None])


@EVERY
def test_what_it_does_not_compute_is_refused(name):
    made = launched(name, HARD.with_dtype("fp32"))
    with pytest.raises(UnsupportedError, match="ten bits"):
        cuda.backend().lower(made)
    bias = torch.zeros(1, HARD.problem.q_heads, HARD.bound.nnz)
    numbered = replace(launched(name, HARD.with_dtype("bf16")), score=score.edge_bias(bias))
    with pytest.raises(UnsupportedError, match="numbers of edges"):
        cuda.backend().lower(numbered)
    with pytest.raises(UnsupportedError, match="forward pass only"):
        cuda.backend().lower_backward(launched(name, HARD.with_dtype("bf16")))
