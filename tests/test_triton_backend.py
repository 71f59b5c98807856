"""The Triton back end without a GPU and mostly without Triton: refusals, shapes of kernels, arrays, plans."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import sparsec
from sparsec import masks as m
from sparsec.backends import triton
from sparsec.backends.base import DTYPES, Launch, Problem
from sparsec.device import device
from sparsec.layout import Ordering
from sparsec.planner.shortlist import shortlist
from sparsec.planner.works import build_work
from sparsec.score import as_score_mod
from sparsec.template import Config, template, templates

GPUS = (
    "nvidia-a100",
    "nvidia-h100",
    "nvidia-h100-pcie",
    "nvidia-h200",
    "nvidia-b200",
    "nvidia-l40s",
    "nvidia-rtx4090",
    "amd-mi250x",
    "amd-mi300x",
)
TEMPLATES = tuple(name for name, made in templates().items() if "triton" in made.backends())


def launch(name: str, gpu: str, problem: Problem, mask=None, heads=None, **values: int) -> Launch:
    chosen = template(name)
    config = Config.of(**{**chosen.default("triton").to_dict(), **values})
    bound = (m.window(40, 3) | m.global_tokens(2) if mask is None else mask).bind(problem.q_len, problem.kv_len)
    heads = tuple(range(problem.q_heads)) if heads is None else heads
    work = build_work(chosen, config, bound, problem, device(gpu), heads=len(heads))
    return Launch(chosen, "triton", config, problem, device(gpu), work, heads, (0,), problem.head_dim**-0.5)


def test_three_templates():
    assert TEMPLATES == ("block_sparse", "hybrid", "row_traversal")


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_default_fits_every_device(name, gpu, head_dim, dtype):
    problem = Problem(200, 200, 2, 2, head_dim, head_dim, dtype)
    made = launch(name, gpu, problem)
    back = triton.backend()
    assert back.refusal(made.template, problem, made.device) is None
    assert back.config_refusal(made.template, made.config, problem, made.device) is None
    shape = triton.shape_of(made)
    assert shape.shared_bytes <= made.device.shared_bytes_per_block
    assert shape.num_warps <= 8
    assert shape.num_stages >= 1


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_device_has_a_configuration_for_the_widest_heads(name, gpu):
    """In every dtype, with gradients: by the model of shared memory and registers."""
    for dtype in DTYPES:
        problem = Problem(200, 200, 8, 1, 256, 256, dtype, needs_grad=True)
        kept, _ = shortlist(template(name), "triton", problem, device(gpu))
        made = launch(name, gpu, problem, **kept[0].to_dict())
        assert triton.shape_of(made).shared_bytes <= made.device.shared_bytes_per_block


@pytest.mark.parametrize("name", TEMPLATES)
def test_shapes_hold_no_elements_of_tuples(name):
    """Triton 3.6 does not compile `tl.zeros([BLOCK, DIMS[1]])`; later ones do."""
    n_shapes = 0
    for path in triton.source_files(template(name)):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("zeros", "full")
            ):
                n_shapes += 1
                elements = [each.value for each in node.args[0].elts if isinstance(each, ast.Subscript)]
                assert not any(isinstance(each, ast.Name) for each in elements), f"{path.name}:{node.lineno}"
    assert n_shapes > 4


def test_refusals():
    back, problem = triton.backend(), Problem(64, 64)
    assert not back.serves(device("cpu"))
    assert all(back.serves(device(gpu)) for gpu in GPUS)
    assert back.refusal(template("hybrid"), replace(problem, has_score_mod=True), device("nvidia-h100")) is None
    old = replace(device("nvidia-a100"), arch="sm_75")
    assert "sm_80" in back.refusal(template("hybrid"), problem, old)
    tall = Config.of(**{**template("block_sparse").default("triton").to_dict(), "block_q": 128})
    wide = Problem(64, 64, head_dim=256, v_dim=256)
    assert "KiB" in back.config_refusal(template("block_sparse"), tall, wide, device("amd-mi300x"))
    assert back.config_refusal(template("block_sparse"), tall, problem, device("nvidia-rtx4090")) is None


def test_programs_stay_where_as_many_fit():
    """What one program could have is shared by those that stay on a multiprocessor."""
    back, h100 = triton.backend(), device("nvidia-h100")
    problem = Problem(4000, 4000, 8, 8, 128, 128, "bf16")
    for name in ("block_sparse", "hybrid"):
        alone, pair = (launch(name, "nvidia-h100", problem, persistent=k) for k in (1, 2))
        assert triton.shape_of(alone).shared_bytes <= h100.shared_bytes_per_block
        assert triton.shape_of(pair).shared_bytes * 2 <= h100.shared_bytes_per_block
        (call, *_), (plain, *_) = triton.calls_of(pair), triton.calls_of(launch(name, "nvidia-h100", problem))
        assert call.grid(1) == 2 * h100.units < plain.grid(1)
        assert plain.grid(3) == 3 * plain.grid(1)
        few = triton.calls_of(launch(name, "nvidia-h100", replace(problem, q_heads=1, kv_heads=1), persistent=4))[0]
        assert few.grid(1) == few.programs < 4 * h100.units

    def refused(gpu: str, wide: int, **values: int) -> str | None:
        config = Config.of(**{**template("block_sparse").default("triton").to_dict(), **values})
        return back.config_refusal(
            template("block_sparse"), config, Problem(64, 64, 1, 1, wide, wide, "bf16"), device(gpu)
        )

    assert "where 4 share a multiprocessor" in refused("nvidia-rtx4090", 128, persistent=4)
    assert refused("nvidia-rtx4090", 128, persistent=1) is None
    assert "4 programs hold" in refused("nvidia-h100", 256, persistent=4, block_q=64)


@pytest.mark.parametrize("name", ["block_sparse", "hybrid"])
def test_descriptors_are_refused_where_no_copy_engine_takes_them(name):
    config = Config.of(**{**template(name).default("triton").to_dict(), "descriptors": 1})
    problem = Problem(200, 200, 2, 2, 64, 64, "bf16")

    def reason(gpu: str, **changes) -> str | None:
        return triton.backend().config_refusal(template(name), config, replace(problem, **changes), device(gpu))

    for gpu in GPUS:
        assert ("copy engine" in (reason(gpu) or "")) == (device(gpu).arch not in ("sm_90", "sm_100"))
    assert "fp32" in reason("nvidia-h100", dtype="fp32")
    assert "rows of 20 dimensions" in reason("nvidia-h100", v_dim=20)
    made = launch(name, "nvidia-h100", problem, descriptors=1)
    assert triton.calls_of(made)[0].constants["DESCRIBED"]
    order = np.arange(200, dtype=np.int32)[::-1].copy()
    turned = replace(made, work=replace(made.work, ordering=Ordering("turned", order, order)))
    assert not triton.calls_of(turned)[0].constants["DESCRIBED"], "rows in another order are no tiles"
    assert [call.constants.get("DESCRIBED") for call in triton.gradient_calls_of(turned)] == [None, False, False]


def test_packed_heads_are_counted():
    config = Config.of(**{**template("block_sparse").default("triton").to_dict(), "block_q": 16, "pack_gqa": 8})
    wide = Problem(64, 64, 8, 1, head_dim=256, v_dim=256)
    refusal = triton.backend().config_refusal
    assert "KiB" in refusal(template("block_sparse"), config, wide, device("amd-mi300x"))
    assert refusal(template("block_sparse"), config, replace(wide, kv_heads=8), device("amd-mi300x")) is None


def test_a_configuration_that_does_not_fit_is_not_lowered():
    made = launch("block_sparse", "amd-mi300x", Problem(200, 200, head_dim=256, v_dim=256), block_q=128)
    with pytest.raises(sparsec.errors.CompileError, match="KiB of shared memory"):
        triton.backend().lower(made)


def test_packed_heads():
    grouped = Problem(100, 100, 8, 2)

    def packed(heads: tuple[int, ...], pack: int) -> int:
        return triton.shape_of(
            launch("block_sparse", "nvidia-h100", grouped, None, heads, block_q=16, pack_gqa=pack)
        ).pack

    assert packed(tuple(range(8)), 1) == 1
    assert packed(tuple(range(8)), 4) == 4
    assert packed(tuple(range(8)), 8) == 4  # a group has four heads
    assert packed((0, 1, 6, 7), 4) == 2
    assert packed((1, 2), 2) == 1  # heads of one group, but not a run the kernel can name by its first
    assert packed((0, 2), 2) == 1


def test_a_decoding_step_packs_the_heads_of_a_group_and_splits_the_keys():
    """One query of 64 heads over 8: tiles of 2 × 8 rows, and enough pieces of the keys for all multiprocessors."""
    gpu, problem = device("nvidia-h200"), Problem(1, 131_072, 64, 8, 128, 128, "bf16")
    made = sparsec.plan(m.full(), problem, gpu, template="block_sparse", backend="triton").steps[0].launch
    assert (made.config["block_q"], made.config["pack_gqa"]) == (2, 8)
    assert triton.shape_of(made).pack == 8
    forward, merge = triton.calls_of(made)
    assert (forward.name, merge.name) == ("forward", "merge")
    assert gpu.units <= forward.grid(1) <= 8 * gpu.units
    alone = sparsec.plan(m.full(), replace(problem, kv_heads=64), gpu, template="block_sparse", backend="triton")
    assert alone.steps[0].launch.config["pack_gqa"] == 1
    several = sparsec.plan(m.full(), replace(problem, q_len=4000), gpu, template="block_sparse", backend="triton")
    assert several.steps[0].launch.config["pack_gqa"] == 1


def test_low_tiles_are_filled_by_packed_heads():
    config = Config.of(**{**template("block_sparse").default("triton").to_dict(), "block_q": 8, "pack_gqa": 8})
    problem, h100 = Problem(64, 64, 8, 1), device("nvidia-h100")
    refusal = triton.backend().config_refusal
    for needs_grad in (False, True):
        assert refusal(template("block_sparse"), config, replace(problem, needs_grad=needs_grad), h100) is None
    assert "16 rows" in template("block_sparse").violation("triton", Config.of(**{**config.to_dict(), "pack_gqa": 1}))


def test_packed_heads_are_rows_of_dq_and_columns_of_dkv():
    """Keys and values are fetched once for a pack, and the grid over queries is as many times smaller."""
    problem = Problem(100, 130, 8, 2, dtype="bf16", needs_grad=True)
    made = launch("block_sparse", "nvidia-h100", problem, block_q=16, block_kv=32, pack_gqa=4, descriptors=1)
    by_queries, by_keys = (call for call in triton.gradient_calls_of(made) if call.name == "backward")
    assert by_queries.arrays["heads"].tolist() == [0, 4]
    assert by_queries.arrays["stream_heads"].tolist() == [0, 1]
    assert by_queries.grid(1) == made.work.schedule.n_items * 2
    assert by_keys.arrays["heads"].tolist() == [0, 1]
    assert by_keys.arrays["stream_heads"].tolist() == [0, 4]
    assert (by_queries.constants["BLOCK"], by_queries.constants["STREAM"], by_queries.constants["PACK"]) == (16, 32, 4)
    assert (by_keys.constants["BLOCK"], by_keys.constants["STREAM"], by_keys.constants["PACK"]) == (32, 16, 4)
    # The copy engine takes no rows of several heads as one tile.
    assert (by_queries.constants["DESCRIBED"], by_keys.constants["DESCRIBED"]) == (True, False)
    apart = replace(made, heads=(1, 2))
    assert [call.constants["PACK"] for call in triton.gradient_calls_of(apart) if call.name == "backward"] == [1, 1]


def test_more_programs_than_32_bits_count_are_refused():
    made = launch("block_sparse", "nvidia-h100", Problem(100, 130, 8, 2), block_q=16, persistent=1)
    for call in triton.calls_of(made):
        per_element = call.programs * len(call.arrays["heads"])
        assert call.grid(2**31 // per_element - 1) <= 2 * device("nvidia-h100").units
        with pytest.raises(sparsec.errors.UnsupportedError, match=r"a grid counts to 2,147,483,647"):
            call.grid(2**31 // per_element + 1)


def test_heads_that_share_keys_walk_side_by_side_where_they_are_not_packed():
    problem = Problem(100, 130, 8, 2, dtype="bf16", needs_grad=True)
    for pack, abreast in ((1, 4), (2, 2), (4, 1)):
        calls = triton.gradient_calls_of(launch("block_sparse", "nvidia-h100", problem, block_q=16, pack_gqa=pack))
        assert [call.numbers["abreast"] for call in calls if call.name == "backward"] == [abreast, 1]


def top_k(length: int, keys: int) -> m.Mask:
    """Each query's own keys, a random set."""
    chosen = np.argsort(np.random.default_rng(0).random((length, length)), axis=1)[:, :keys]
    return m.from_csr(np.arange(length + 1) * keys, np.sort(chosen, axis=1).reshape(-1), length)


def test_many_heads_over_one_take_a_query_at_a_time():
    """Top-k token by token at 128:1: each key list is one query's, and fills the matrix units with its heads."""
    problem = Problem(600, 600, 128, 1, 128, 128, "bf16")
    made = sparsec.plan(top_k(600, 75), problem, "nvidia-h200")
    step = made.steps[0]
    assert (step.launch.template.name, step.launch.backend) == ("hybrid", "triton")
    config = step.launch.config
    assert (config["block_q"], config["pack_gqa"], config["column_queries"]) == (1, 128, 1)
    assert step.config_source == "cost model"
    assert "1 query × 128 heads are 128 rows" in " ".join(str(made).split())
    assert triton.shape_of(step.launch).pack == 128
    (call,) = triton.calls_of(step.launch)
    assert call.arrays["gathered_lanes"] is None, "one query's columns are its keys"
    assert call.arrays["row_first"] is None, "and none of them is single"
    assert len(call.arrays["gathered_columns"]) == 600 * 75
    assert call.grid(1) == 600
    # Every key is fetched for all heads at once, and taken by all of them.
    wide = Problem(600, 600, 128, 128, 128, 128, "bf16")
    alone = sparsec.plan(top_k(600, 75), wide, "nvidia-h200")
    assert alone.steps[0].launch.config.get("pack_gqa", 1) == 1
    assert alone.estimate.us > 2 * made.estimate.us
    trained = sparsec.plan(top_k(600, 75), replace(problem, needs_grad=True), "nvidia-h200")
    config = trained.steps[0].launch.config
    assert (config["block_q"], config["pack_gqa"]) == (1, 64), "a backward pass has room for half as many rows"


def test_low_tiles_need_heads_that_fill_them():
    refusal, h100 = triton.backend().config_refusal, device("nvidia-h100")
    for name in ("block_sparse", "hybrid"):
        chosen = template(name)
        queries = {"column_queries": 1} if name == "hybrid" else {}
        values = {**chosen.default("triton").to_dict(), **queries, "block_q": 1}
        config = Config.of(**{**values, "pack_gqa": 128})
        assert chosen.violation("triton", config) is None
        assert refusal(chosen, config, Problem(64, 64, 32, 2), h100) is None
        assert "8 of the 16 rows" in refusal(chosen, config, Problem(64, 64, 16, 2), h100)
        assert "16 rows" in chosen.violation("triton", Config.of(**{**values, "pack_gqa": 8}))
    singles = Config.of(**{**values, "block_q": 32, "pack_gqa": 4, "column_queries": 2})
    assert "single edges" in chosen.violation("triton", singles)


def test_tiles_are_walked_full_ones_first_and_ragged_ones_by_pattern():
    problem = Problem(100, 150)
    made = launch("block_sparse", "nvidia-h100", problem, m.full() & ~m.window(-60, 70), block_q=16, block_kv=16)
    call = triton.calls_of(made)[0]
    tiles = made.work.tiles
    tile, full, partial = (call.arrays[name] for name in ("item_tile", "item_full", "item_partial"))
    pattern, column = call.arrays["tile_pattern"], call.arrays["tile_column"]
    seen = np.zeros(tiles.tile_map.n_tiles, int)
    for first, n_full, n_partial in zip(tile, full, partial, strict=True):
        middle, last = first + n_full, first + n_full + n_partial
        assert (pattern[first:middle] < 0).all()
        assert (column[first:middle] < 150 // 16).all(), "a full tile needs no bound"
        assert (pattern[middle:last] >= 0).all()
        seen[first:last] += 1
    assert (seen == 1).all()
    for start, stop in zip(tiles.tile_map.indptr[:-1], tiles.tile_map.indptr[1:], strict=True):
        assert sorted(column[start:stop]) == sorted(tiles.tile_map.indices[start:stop])
    cut = call.arrays["patterns"][pattern[column == 150 // 16]]
    assert len(cut)
    assert (cut.view(np.uint64) < 1 << (150 % 16)).all(), "keys beyond the sequence are attended by nobody"


def test_modifiers_are_told_queries_in_one_width_by_keys_too():
    """Of a million times a query of thousands, 32 bits hold nothing; that its keys are few makes no difference."""
    made = launch("row_traversal", "nvidia-h100", Problem(5000, 10), m.full())
    score = as_score_mod(lambda score, b, h, q_idx, kv_idx: score + q_idx * 1_000_000 // (kv_idx + 1))
    forward, *backward = (
        call.functions["MODIFY"][0].source
        for call in (
            *triton.calls_of(replace(made, score=score)),
            *triton.gradient_calls_of(replace(made, score=score)),
        )
        if call.functions.get("MODIFY")
    )
    assert "q_idx = q_idx.to(tl.int64)" in forward
    assert [source == forward for source in backward] == [True, True]


@pytest.mark.parametrize("gpu", GPUS)
def test_every_plan_fits_its_device(gpu):
    """What is planned for a device fits it, at every head_dim, with gradients too; what does not is a refusal."""
    for head_dim in (64, 256):
        for name in TEMPLATES:
            problem = Problem(700, 700, 2, 2, head_dim, head_dim, "bf16", needs_grad=True)
            made = sparsec.plan(m.window(100, 0) | m.random_edges(3, 1), problem, gpu, template=name, backend="triton")
            for step in made.steps:
                launch = step.launch
                assert launch.backend == "triton"
                assert triton.backend().config_refusal(launch.template, launch.config, problem, launch.device) is None
                assert triton.shape_of(launch).shared_bytes <= launch.device.shared_bytes_per_block


def test_the_planner_lists_what_does_not_fit():
    wide = Problem(700, 700, 2, 2, 256, 256, "bf16", needs_grad=True)
    made = sparsec.plan(m.window(100, 0), wide, "nvidia-rtx4090", template="block_sparse", backend="triton")
    assert made.steps[0].launch.config["block_kv"] == 32, "the nearest to the default that fits"
    refused = {refusal.what: refusal.reason for refusal in made.refusals}
    assert any("block_kv=64" in what and "values of gradients" in reason for what, reason in refused.items())
    single = replace(wide, needs_grad=False, dtype="fp32")
    forward = sparsec.plan(m.window(100, 0), single, "amd-mi300x", template="block_sparse")
    refused = {refusal.what: refusal.reason for refusal in forward.refusals}
    assert any("block_q=128" in what and "KiB of shared memory" in reason for what, reason in refused.items())


def test_no_device_is_too_small_for_an_answer():
    """Where nothing fits, the planner says which limit stands in the way instead of planning what cannot compile."""
    tiny = replace(device("nvidia-rtx4090"), shared_bytes_per_block=8 << 10)
    with pytest.raises(sparsec.errors.UnsupportedError, match="KiB of shared memory"):
        sparsec.plan(m.window(9, 0), Problem(200, 200, head_dim=256, v_dim=256), tiny, template="block_sparse")


def test_planning_for_a_gpu_imports_neither_torch_nor_triton():
    code = (
        "import sys, sparsec\n"
        "from sparsec import masks as m\n"
        "sparsec.plan(m.window(64, 0), sparsec.backends.base.Problem(512, 512, dtype='bf16'), 'nvidia-h100')\n"
        "assert not {'torch', 'triton'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_captured_tensors_and_numbered_edges_are_served():
    import torch

    bound = (m.window(40, 0) | m.random_edges(3, 1)).bind(700)
    problem = Problem(700, 700, 2, 2, dtype="bf16", needs_grad=True)
    for score in (
        sparsec.score.relative_bias(torch.zeros(2, 33, requires_grad=True)),
        sparsec.score.edge_bias(torch.zeros(2, bound.nnz, requires_grad=True)),
    ):
        for name in TEMPLATES:
            made = sparsec.plan(bound, problem, "nvidia-h100", template=name, backend="triton", score=score)
            backward = [call for call in triton.gradient_calls_of(made.steps[0].launch) if call.name == "backward"]
            assert [call.functions["SCATTER"] is not None for call in backward] == [True, False]
