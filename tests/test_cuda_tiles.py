"""What a launch of tiles asks of the CUDA kernels: geometry against brute force, limits, the plans that pair passes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparsec
from sparsec import masks as m
from sparsec.backends import cuda
from sparsec.backends.base import Launch, Problem
from sparsec.backends.cuda_tiles import staged_row_bytes, tile_scale, tile_shape, tile_walk
from sparsec.device import device, devices
from sparsec.errors import UnsupportedError
from sparsec.planner.works import build_work
from sparsec.template import Config, template, templates

GPU = device("nvidia-h100")
TEMPLATES = [name for name, made in templates().items() if "cuda" in made.backends() and made.layout != "rows"]
PROBLEM = Problem(300, 500, 8, 2, 64, 64, dtype="bf16")
WINDOW = m.window(90, 3)


def launch(name: str, problem: Problem, mask, gpu=GPU, **values: int) -> Launch:
    chosen = template(name)
    wanted = {**chosen.default("cuda").to_dict(), **values}
    if name == "hybrid":
        wanted["block_q"] = min(wanted["block_q"], 64 // wanted["pack_gqa"])
    config = Config.of(**wanted)
    assert chosen.violation("cuda", config) is None
    heads = tuple(range(problem.q_heads))
    work = build_work(chosen, config, mask.bind(problem.q_len, problem.kv_len), problem, gpu, heads=len(heads))
    return Launch(
        chosen, "cuda", config, problem, gpu, work, heads, tuple(range(problem.batch)), problem.head_dim**-0.5
    )


@pytest.mark.parametrize("gpu", [each for each in devices() if each.kind == "nvidia"], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_configuration_fits_every_device(name, gpu):
    chosen = template(name)
    for config in chosen.configs("cuda"):
        for head_dim, is_partial in itertools.product((1, 64, 128, 256), (False, True)):
            problem = replace(PROBLEM, head_dim=head_dim, v_dim=head_dim)
            heads = tuple(range(problem.q_heads))
            # The shape needs no index arrays.
            made = Launch(chosen, "cuda", config, problem, gpu, None, heads, (0,), 1.0, is_partial)
            shape = tile_shape(made)
            assert shape.shared_bytes <= gpu.shared_bytes_per_block
            assert 1 <= shape.warps <= 8
            assert shape.rows % (16 * shape.warps) == 0
            assert shape.stages >= 2
            assert config["block_kv"] % shape.step_kv == 0
            assert shape.step_kv % 16 == 0


@given(st.integers(1, 256))
def test_no_two_of_eight_rows_share_a_bank(dim):
    row_bytes = staged_row_bytes(dim)
    chunks = -(-dim // 16) * 2
    assert row_bytes >= chunks * 16
    for chunk in range(chunks):
        if chunks % 8 == 0:
            banks = {(row * row_bytes // 16 + (chunk ^ row)) % 8 for row in range(8)}
        else:
            banks = {(row * row_bytes // 16 + chunk) % 8 for row in range(8)}
        assert len(banks) == 8


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("mask", [WINDOW, m.full(), m.random_edges(30, 1), m.longformer(20, [0, 37])], ids=str)
def test_the_items_cover_every_edge_once(name, mask):
    made = launch(name, PROBLEM, mask, block_q=32)
    walk, work = tile_walk(made), made.work
    arrays = walk.arrays
    block_q, block_kv = work.block_q, work.tiles.tile_map.block_kv
    met = np.zeros((PROBLEM.q_len + block_q, PROBLEM.kv_len + block_kv), int)
    for item in range(walk.numbers["n_items"]):
        row = arrays["item_unit"][item] * block_q
        first, n_full = arrays["item_tile"][item], arrays["item_full"][item]
        for tile in range(first, first + n_full + arrays["item_partial"][item]):
            column = arrays["tile_column"][tile] * block_kv
            block = met[row : row + block_q, column : column + block_kv]
            if tile < first + n_full:
                assert column + block_kv <= PROBLEM.kv_len, "a full tile needs no bound"
                block += 1
            else:
                words = np.ascontiguousarray(arrays["patterns"][arrays["tile_pattern"][tile]])
                block += np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :block_kv]
        if work.gathered is not None:
            for place in range(arrays["item_column"][item], arrays["item_column_stop"][item]):
                lanes = int(arrays["gathered_lanes"][place]) & (2**64 - 1)
                met[row : row + block_q, arrays["gathered_columns"][place]] += [lanes >> i & 1 for i in range(block_q)]
            indptr = arrays["row_indptr"]
            for query in range(row, min(row + block_q, PROBLEM.q_len)):
                start = max(indptr[query], arrays["item_edge"][item])
                for edge in range(start, min(indptr[query + 1], arrays["item_edge_stop"][item])):
                    met[query, arrays["row_first"][edge]] += 1
    assert (met[: PROBLEM.q_len, : PROBLEM.kv_len] == mask.bind(300, 500).to_dense()).all()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("group", "heads", "wanted"),
    [(8, range(8), 4), (2, range(4), 2), (6, range(12), 2), (4, (1, 2), 1), (1, range(4), 1)],
)
def test_heads_of_a_group_go_together(name, group, heads, wanted):
    heads = tuple(heads)
    q_heads = group * (max(heads) // group + 1)
    problem = replace(PROBLEM, q_heads=q_heads, kv_heads=q_heads // group)
    made = replace(launch(name, problem, WINDOW, block_q=32, pack_gqa=4), heads=heads)
    walk = tile_walk(made)
    assert walk.shape.pack == wanted
    assert walk.shape.rows == made.work.block_q * wanted
    assert walk.arrays["heads"].tolist() == list(heads[::wanted])
    assert walk.numbers["abreast"] == max(1, np.gcd(len(heads) // wanted, group // wanted))


def test_a_scale_turns_the_queries_round_and_is_never_0():
    made = launch("block_sparse", PROBLEM, WINDOW)
    assert tile_scale(replace(made, scale=-0.5)) == (0.5 * 1.4426950408889634, 0x80008000)
    assert tile_scale(replace(made, scale=0.5))[1] == 0
    assert tile_scale(replace(made, scale=0.0))[0] > 0


# Plans.


def weighed(plan: sparsec.Plan) -> set[tuple[str, str]]:
    found = {(each.template, each.backend) for group in plan.groups for each in group.alternatives}
    return found | {(step.launch.template.name, step.launch.backend) for step in plan.steps}


@pytest.mark.parametrize("gpu", ["nvidia-a100", "nvidia-rtx4090", "nvidia-h200", "nvidia-b200"])
def test_both_gpu_back_ends_are_candidates(gpu):
    for name, mask in (("block_sparse", WINDOW), ("hybrid", m.random_edges(9, 2))):
        if name in TEMPLATES:
            plan = sparsec.plan(mask, PROBLEM, gpu, template=name)
            assert {(name, "triton"), (name, "cuda")} <= weighed(plan)
            assert f"{name} on cuda" in str(plan)


def test_fp32_is_refused():
    problem = replace(PROBLEM, dtype="fp32")
    plan = sparsec.plan(WINDOW, problem, GPU)
    assert ("block_sparse", "cuda") not in weighed(plan)
    assert any("ten bits" in refusal.reason for group in plan.groups for refusal in group.refusals)


@pytest.mark.parametrize("name", TEMPLATES)
def test_gradients_are_another_back_end_s(name, monkeypatch):
    mask = WINDOW if name == "block_sparse" else m.random_edges(9, 2)
    # Heads of their own: what packs heads costs other than what does not.
    training = replace(PROBLEM, needs_grad=True, kv_heads=PROBLEM.q_heads)
    with pytest.raises(UnsupportedError, match="leave the back end open"):
        sparsec.plan(mask, training, GPU, template=name, backend="cuda")
    # As if records named the CUDA kernel: it comes first where costs tie.
    monkeypatch.setattr("sparsec.planner.search.BACKENDS", ("cuda", "triton"))
    plan = sparsec.plan(mask, training, GPU, template=name, reorder="off")
    (group,) = plan.groups
    assert [step.launch.backend for step in group.steps] == ["cuda"]
    assert [launch.backend for launch in group.backward_launches] == ["triton"]
    (backward,) = group.backward_launches
    assert backward.template.name == name
    assert backward.template.violation("triton", backward.config) is None
    assert (backward.heads, backward.batch, backward.scale) == (plan.steps[0].launch.heads, (0,), 64**-0.5)
    assert "backward" in str(plan)
    # Without another that can, the forward pass is refused too.
    monkeypatch.setattr("sparsec.planner.search.BACKENDS", ("cuda",))
    with pytest.raises(UnsupportedError, match="no other back end"):
        sparsec.plan(mask, training, GPU, template=name)


def test_what_is_shown_of_a_kernel():
    told = cuda.described(launch("block_sparse", PROBLEM, WINDOW))
    assert "shared/tiles.cuh" in told
    assert "block_sparse/kernel_cuda.cu" in told
    assert "SX_STEP=64" in told["compiled by"]
