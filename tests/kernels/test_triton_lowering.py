"""Every Triton kernel compiled for devices that are not here: no spills, matrix instructions, 64-bit addresses."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from functools import cache
from importlib import metadata

import numpy as np
import pytest

pytest.importorskip("triton")

import running
import torch
from cases import Case, by_degree, case, scattered
from test_triton_numerics import split

from sparsec import masks as m
from sparsec.backends import triton as triton_backend
from sparsec.backends.base import DTYPES, Problem
from sparsec.backends.table_gradients import sum_types
from sparsec.backends.triton import LoweredSource
from sparsec.device import device
from sparsec.layout import EdgeOrder
from sparsec.planner import plan
from sparsec.score import alibi, as_score_mod, chain, edge_bias, relative_bias, soft_cap
from sparsec.template import Config, template

# sm_80, sm_90, sm_100, gfx90a, gfx942.
DEVICES = ("nvidia-a100", "nvidia-h100", "nvidia-b200", "amd-mi250x", "amd-mi300x")
TEMPLATES = ("block_sparse", "row_traversal", "hybrid")
TILED = ("block_sparse", "hybrid")

# Older assemblers need some registers more; the kernels are shaped for the newest. Bytes; 3.6 was tried.
SPILLED_BY_OLDER = 32 if tuple(int(part) for part in metadata.version("triton").split(".")[:2]) < (3, 9) else 0

MATRIX_INSTRUCTION = {
    ("nvidia-a100", "bf16"): "HMMA",
    ("nvidia-h100", "bf16"): "HGMMA",
    ("nvidia-b200", "bf16"): "UTCHMMA",
    ("nvidia-b200", "fp16"): "UTCHMMA",
    ("nvidia-h100", "fp16"): "HGMMA",
    ("amd-mi250x", "bf16"): "v_mfma_f32",
    ("amd-mi300x", "bf16"): "v_mfma_f32",
    ("amd-mi300x", "fp16"): "v_mfma_f32",
    ("amd-mi300x", "fp32"): "v_mfma_f32",
}


@cache
def _lowered(
    name: str, gpu: str, dtype: str, tried: Case, values: tuple = (), direction: str = "forward"
) -> tuple[LoweredSource, ...]:
    chosen = template(name)
    config = Config.of(**{**chosen.default("triton").to_dict(), **dict(values)})
    assert chosen.violation("triton", config) is None
    made = running.launch(chosen, "triton", tried.with_dtype(dtype), config=config, device=device(gpu))
    lowered = triton_backend.lower_source(made, direction)
    assert all(each.shared_bytes <= device(gpu).shared_bytes_per_block for each in lowered)
    shape = triton_backend.shape_of(made)
    if direction == "forward" and shape.shared_bytes:
        assert lowered[0].shared_bytes <= shape.shared_bytes, "the shared-memory model is an upper bound"
    return lowered


@cache
def tried_at(head_dim: int) -> Case:
    return case("lowered", scattered(150, 300, 0.05), 150, 300, head_dim, heads=(4, 2))


# Each template, direction, dtype and architecture at least once, in seconds; the others are the spread.
QUICK = {
    ("block_sparse", "nvidia-h100", "bf16", "forward"),
    ("block_sparse", "nvidia-h100", "bf16", "backward"),
    ("block_sparse", "nvidia-b200", "fp16", "forward"),
    ("block_sparse", "nvidia-a100", "fp32", "forward"),
    ("block_sparse", "amd-mi300x", "fp16", "forward"),
    ("hybrid", "nvidia-h100", "bf16", "forward"),
    ("hybrid", "nvidia-h100", "bf16", "backward"),
    ("row_traversal", "nvidia-h100", "bf16", "forward"),
    ("row_traversal", "nvidia-h100", "bf16", "backward"),
    ("row_traversal", "amd-mi250x", "fp16", "forward"),
    ("row_traversal", "nvidia-a100", "fp32", "backward"),
}


def _spread():
    """Every template with every architecture, dtype and direction: what GPU.md lists as lowered."""
    for name, gpu, dtype, direction in itertools.product(TEMPLATES, DEVICES, DTYPES, ("forward", "backward")):
        head_dim = 128 if dtype == "bf16" else 64
        label = f"{name}-{gpu}-{dtype}-{direction}-d{head_dim}"
        marks = () if (name, gpu, dtype, direction) in QUICK else (pytest.mark.spread,)
        yield pytest.param(name, gpu, dtype, direction, head_dim, id=label, marks=marks)


@pytest.mark.parametrize(("name", "gpu", "dtype", "direction", "head_dim"), [*_spread()])
def test_the_default_does_not_spill(name, gpu, dtype, direction, head_dim):
    lowered = _lowered(name, gpu, dtype, tried_at(head_dim), direction=direction)
    walking = [each for each in lowered if each.name in ("forward", "backward")]
    assert len(walking) == (1 if direction == "forward" else 2)
    wanted = MATRIX_INSTRUCTION.get((gpu, dtype))
    # Known: three kinds of lists and fp32 operands held by threads are a few registers too many.
    is_known = (name, direction, dtype) == ("hybrid", "backward", "fp32") and gpu.startswith("nvidia")
    allowed = 32 if is_known else SPILLED_BY_OLDER
    for each in walking:
        assert each.spilled_bytes <= allowed, each
        if wanted and name == "block_sparse":
            assert each.instructions.get(wanted, 0) > 0, each
        if dtype == "fp32" and gpu.startswith("nvidia"):
            assert not {"HMMA", "HGMMA", "UTCHMMA"} & each.instructions.keys(), "fp32 is IEEE, never TF32"


@pytest.mark.spread
@pytest.mark.parametrize(
    ("name", "gpu", "values"),
    [
        ("block_sparse", "nvidia-h100", (("block_q", 128), ("block_kv", 128))),
        ("block_sparse", "nvidia-h100", (("block_q", 16), ("pack_gqa", 2), ("num_stages", 4))),
        ("block_sparse", "nvidia-h100", (("block_q", 8), ("pack_gqa", 8))),
        ("block_sparse", "amd-mi300x", (("block_q", 8), ("pack_gqa", 2))),
        ("block_sparse", "nvidia-rtx4090", (("block_q", 128), ("block_kv", 64))),
        ("hybrid", "nvidia-rtx4090", (("block_q", 64), ("num_warps", 8))),
        ("row_traversal", "nvidia-h100", (("block_q", 1), ("num_warps", 1))),
        ("row_traversal", "nvidia-a100", (("block_q", 32), ("fetch", 128))),
        ("block_sparse", "amd-mi250x", (("block_q", 32), ("block_kv", 16), ("num_warps", 2))),
        ("hybrid", "nvidia-b200", (("block_q", 32), ("block_kv", 64), ("num_stages", 3))),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{key}{number}" for key, number in value),
)
def test_other_configurations_compile_and_fit(name, gpu, values):
    _lowered(name, gpu, "bf16", tried_at(64), values)


# One query beside 128 heads: what is planned for key lists of each query's own.
ONE_QUERY = {
    "hybrid": (("block_q", 1), ("pack_gqa", 128), ("column_queries", 1), ("block_kv", 64)),
    "block_sparse": (("block_q", 1), ("pack_gqa", 128)),
}
# Heads packed beside more queries, with single edges too.
PACKED = (("block_q", 16), ("pack_gqa", 2))
LOW = (("block_q", 2), ("pack_gqa", 8), ("column_queries", 1))


def _packed():
    everywhere = [(name, values, gpu) for name, values in ONE_QUERY.items() for gpu in DEVICES]
    one_of_each = [("hybrid", values, gpu) for values in (PACKED, LOW) for gpu in ("nvidia-h100", "amd-mi300x")]
    for name, values, gpu in everywhere + one_of_each:
        is_quick = (name, gpu, values) == ("hybrid", "nvidia-h100", ONE_QUERY["hybrid"])
        label = f"{name}-{gpu}-{dict(values)['block_q']}x{dict(values)['pack_gqa']}"
        yield pytest.param(name, gpu, values, id=label, marks=() if is_quick else pytest.mark.spread)


@cache
def many_heads() -> Case:
    return case("many-heads", scattered(40, 600, 0.3), 40, 600, 128, heads=(128, 1))


@pytest.mark.parametrize(("name", "gpu", "values"), [*_packed()])
def test_packed_heads_fill_the_matrix_units(name, gpu, values):
    (lowered, *_) = _lowered(name, gpu, "bf16", many_heads(), values)
    # Known: 128 rows on eight warps are two registers too many on sm_80.
    known = 16 if gpu == "nvidia-a100" else 0
    assert lowered.spilled_bytes <= max(known, SPILLED_BY_OLDER), lowered
    is_group = dict(values)["block_q"] * dict(values)["pack_gqa"] >= 64
    wanted = MATRIX_INSTRUCTION[gpu, "bf16"] if is_group or gpu.startswith("amd") else "HMMA"
    assert lowered.instructions.get(wanted, 0) > 0, lowered
    if gpu.startswith("nvidia"):
        assert lowered.instructions.get("LDGSTS", 0) > 0, "rows are copied beside the arithmetic"


@pytest.mark.parametrize(("name", "values"), [("block_sparse", ()), ("hybrid", ONE_QUERY["hybrid"])], ids=TILED)
def test_rows_are_under_way_for_two_steps(name, values):
    """Three stages are three: none is spent on looking up where to fetch from."""
    tried = many_heads() if values else tried_at(128)
    text = _lowered(name, "nvidia-h100", "bf16", tried, values)[0].texts["ttgir"]
    # Copies of K and V each that may still be under way when a step begins; after a loop, all must have come.
    within = [int(number) for number in re.findall(r"ttg\.async_wait %.*\{num = (\d+)", text)]
    assert len(within) == (3 if name == "hybrid" else 2)
    assert min(within) >= 2


def _persistent():
    for name, gpu, direction in itertools.product(TILED, DEVICES, ("forward", "backward")):
        is_quick = (name, gpu) == ("block_sparse", "nvidia-h100") and direction == "forward"
        yield pytest.param(name, gpu, direction, marks=() if is_quick else pytest.mark.spread)


@pytest.mark.parametrize(("name", "gpu", "direction"), [*_persistent()])
def test_programs_that_stay_hold_nothing_over(name, gpu, direction):
    """The loop over items hoists nothing into registers that there are not."""
    for each in _lowered(name, gpu, "bf16", tried_at(128), (("persistent", 2),), direction):
        if each.name in ("forward", "backward"):
            assert each.spilled_bytes <= SPILLED_BY_OLDER, each
            assert each.shared_bytes * 2 <= device(gpu).shared_bytes_per_block


@cache
def grouped_at(head_dim: int) -> Case:
    return case("lowered", scattered(150, 300, 0.05), 150, 300, head_dim, heads=(64, 1))


def _packed_gradients():
    hybrids = tuple({"block_q": 64 // n, "pack_gqa": n, "column_queries": 1} for n in (64, 4))
    tiles = {"block_q": 8, "pack_gqa": 8}, {"block_q": 16, "pack_gqa": 4}
    for gpu, (name, configs) in itertools.product(DEVICES, (("block_sparse", tiles), ("hybrid", hybrids))):
        for values in configs:
            is_quick = (name, gpu, values["pack_gqa"]) in (
                ("block_sparse", "nvidia-h100", 4),
                ("hybrid", "nvidia-h100", 64),
            )
            label = f"{name}-{gpu}-{values['block_q']}x{values['pack_gqa']}"
            marks = () if is_quick else (pytest.mark.spread,)
            yield pytest.param(name, gpu, tuple(values.items()), id=label, marks=marks)


@pytest.mark.parametrize(("name", "gpu", "values"), [*_packed_gradients()])
def test_gradients_of_packed_heads_do_not_spill(name, gpu, values):
    """Sixty-four rows of a few queries each use the same matrix instructions as those of one head."""
    lowered = _lowered(name, gpu, "bf16", grouped_at(128), values, "backward")
    by_queries, by_keys = (each for each in lowered if each.name == "backward")
    assert max(by_queries.spilled_bytes, by_keys.spilled_bytes) <= SPILLED_BY_OLDER, (by_queries, by_keys)
    assert by_queries.instructions.get(MATRIX_INSTRUCTION[gpu, "bf16"], 0) > 0, by_queries


@pytest.mark.parametrize("gpu", ["nvidia-rtx4090", pytest.param("amd-mi300x", marks=pytest.mark.spread)])
def test_the_widest_heads_fit_the_smallest_devices(gpu):
    for dtype in ("fp32", "bf16"):
        assert _lowered("block_sparse", gpu, dtype, tried_at(256))[0].spilled_bytes <= SPILLED_BY_OLDER


@pytest.mark.parametrize("gpu", ["nvidia-rtx4090", pytest.param("amd-mi250x", marks=pytest.mark.spread)])
def test_what_is_planned_at_the_limit_compiles(gpu):
    """The widest heads with gradients: the planner steps off the default, to what fits shared memory and registers."""
    problem = Problem(150, 150, 2, 2, 256, 256, "bf16", needs_grad=True)
    launch = plan(m.window(40, 0), problem, gpu, template="block_sparse", backend="triton").steps[0].launch
    assert launch.config != launch.template.default("triton")
    # Known: on AMD the widest dK and dV leave a few registers too few.
    known = 32 if gpu.startswith("amd") else 0
    for direction in ("forward", "backward"):
        for each in triton_backend.lower_source(launch, direction):
            assert each.shared_bytes <= device(gpu).shared_bytes_per_block
            assert each.spilled_bytes <= max(known, SPILLED_BY_OLDER), each


def _described():
    for name, gpu, direction in itertools.product(TILED, ("nvidia-h100", "nvidia-b200"), ("forward", "backward")):
        is_quick = (name, gpu, direction) == ("block_sparse", "nvidia-h100", "forward")
        yield pytest.param(name, gpu, direction, marks=() if is_quick else pytest.mark.spread)


@pytest.mark.parametrize(("name", "gpu", "direction"), [*_described()])
def test_the_copy_engine_fetches_what_is_described(name, gpu, direction):
    lowered = _lowered(name, gpu, "bf16", tried_at(128), (("descriptors", 1), ("num_stages", 2)), direction)
    # Known: with both accumulators or both score tiles beside a barrier's addresses, a few registers too few.
    allowed = max(SPILLED_BY_OLDER, 16 if direction == "backward" else 0)
    for each in lowered:
        if each.name in ("forward", "backward"):
            assert each.instructions.get("UTMALDG", 0) > 0, each
            assert "cp.async.bulk.tensor" in each.texts["ptx"]
            assert each.spilled_bytes <= allowed, each


@pytest.mark.parametrize("form", ["offsets", "ranges", "edges"])
def test_forms_of_rows(form):
    mask = {"offsets": m.window(9, 0), "ranges": m.longformer(40, 2), "edges": by_degree([5] * 90, 90)}[form]
    tried = case(form, mask, 90, 90, 64)
    made = running.launch(template("row_traversal"), "triton", tried, device=device("nvidia-h100"))
    assert made.work.rows.form == form
    assert _lowered("row_traversal", "nvidia-h100", "bf16", tried)[0].spilled_bytes == 0


def _addressing():
    for name, direction in itertools.product(TEMPLATES, ("forward", "backward")):
        is_quick = (name, direction) in (("block_sparse", "backward"), ("row_traversal", "forward"))
        yield pytest.param(name, direction, marks=() if is_quick else pytest.mark.spread)


# The only 32-bit numbers that are multiplied: positions of a sequence, which are below 2³¹ like its length; places in
# tables, which are 64-bit where 32 would not do (`test_expr.py`); and numbers of programs, which a grid bounds.
_TIMES_A_CONSTANT = {"position", "first", "row", "scores", "weights"}
_TIMES_ANOTHER = {"copy"}


@pytest.mark.parametrize(("name", "direction"), [*_addressing()])
def test_offsets_are_64_bit(name, direction):
    """Of every kernel of a split launch with live tables: no stride, and no number of a copy, slot, tile or edge, is
    multiplied in 32 bits."""
    tried = tried_at(32).with_dtype("bf16")
    tables = (torch.zeros(shape, requires_grad=True) for shape in ((4, 65), (4, tried.bound.nnz), (4,)))
    score = chain(*(made(table) for made, table in zip((relative_bias, edge_bias, alibi), tables, strict=True)))
    values = {"row_traversal": {}}.get(name, {"block_q": 16, "block_kv": 16})
    config = Config.of(**{**template(name).default("triton").to_dict(), **values})
    gpu, edges = device("nvidia-h100"), EdgeOrder(tried.bound)
    made = running.launch(template(name), "triton", tried, config=config, device=gpu, edges=edges)
    lowered = triton_backend.lower_source(replace(made, work=split(made.work), score=score), direction)
    wanted = ["forward", "merge"] if direction == "forward" else ["prepare", "backward", "add_up", "backward"]
    assert [each.name for each in lowered][: len(wanted)] == wanted
    for each in lowered:
        text = each.texts["ttgir"]
        strides = [name for name in re.findall(r"%(\w+_(?:batch|head|row)): i32", text) if f"%{name} " in text]
        assert strides
        for stride in strides:
            assert re.search(rf"arith\.extsi %{stride} : i32 to i64", text), f"{stride} is not widened"
            assert not re.search(rf"splat [^:]*%{stride}\b[^:]*: [^:]*i32", text), f"{stride} in 32 bits"
        constants = {*re.findall(r"(%[\w$#-]+) = arith\.constant", text)}
        products = re.findall(r"%(\S+) = arith\.(?:muli|shli) (%[\w$#-]+), (%[\w$#-]+)[^:]*: \S*i32", text)
        for product, *factors in products:
            known = _TIMES_A_CONSTANT if constants & {*factors} else _TIMES_ANOTHER
            assert re.sub(r"_\d+$", "", product) in known, f"{each.name}: {product} = {factors}"


def test_a_split_unit_has_its_merge_kernel():
    tried = tried_at(64)
    made = running.launch(template("block_sparse"), "triton", tried, device=device("nvidia-h100"))
    names = [each.name for each in triton_backend.lower_source(replace(made, work=split(made.work)))]
    assert names == ["forward", "merge"]


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("block_sparse", "forward"),
        *(pytest.param(name, "backward", marks=pytest.mark.spread) for name in TEMPLATES),
        *(pytest.param(name, "forward", marks=pytest.mark.spread) for name in ("row_traversal", "hybrid")),
    ],
)
def test_modifiers_and_predicates_compile(name, direction):
    """A modifier with tables of every type, and partial tiles by predicate."""
    chosen = template(name)
    by_predicate = {} if name == "row_traversal" else {"by_predicate": 1}
    config = Config.of(**{**chosen.default("triton").to_dict(), **by_predicate})
    tried = case("lowered", m.documents([70, 80]), 150, 150, 64, heads=(4, 2)).with_dtype("bf16")
    made = running.launch(chosen, "triton", tried, config=config, device=device("nvidia-h100"))
    bias, allowed, shift = np.ones((4, 150), np.float32), np.ones(150, bool), np.arange(150)
    score = as_score_mod(
        lambda score, b, h, q, kv: (score + bias[h, q - kv] * (shift[q] + b)).where(allowed[kv], float("-inf"))
    )
    lowered = triton_backend.lower_source(replace(made, score=score), direction)
    for each in lowered:
        if each.name in ("forward", "backward"):
            # Known: beside a tile of 64 × 64 scores on four warps, three look-ups for each are too many registers.
            known = (160 if SPILLED_BY_OLDER else 64) if name == "block_sparse" else 0
            assert each.spilled_bytes <= max(known, SPILLED_BY_OLDER), each
            assert "score_tables" in each.texts["ttgir"]
            assert ("mask_tables" in each.texts["ttgir"]) == bool(by_predicate)


# Each captures a tensor that receives a gradient, but for the soft cap.
VARIANTS = {
    "soft-cap": lambda nnz: soft_cap(30.0),
    "alibi": lambda nnz: alibi(torch.zeros(4, requires_grad=True)),
    "relative-bias": lambda nnz: relative_bias(torch.zeros(4, 65, requires_grad=True)),
    "edge-bias": lambda nnz: edge_bias(torch.zeros(4, nnz, requires_grad=True)),
}


def _variants():
    """Every template, direction and kind of modifier, each on one architecture of those of matrix units."""
    gpus = itertools.cycle(DEVICES)
    for (variant, name, direction), gpu in zip(
        itertools.product(VARIANTS, TEMPLATES, ("forward", "backward")), gpus, strict=False
    ):
        is_quick = (variant, name, direction) == ("relative-bias", "block_sparse", "backward")
        marks = () if is_quick else (pytest.mark.spread,)
        yield pytest.param(variant, name, direction, "nvidia-h100" if is_quick else gpu, marks=marks)


@pytest.mark.parametrize(("variant", "name", "direction", "gpu"), [*_variants()])
def test_common_modifiers_do_not_spill(variant, name, direction, gpu):
    tried = tried_at(128).with_dtype("bf16")
    score = VARIANTS[variant](tried.bound.nnz)
    edges = EdgeOrder(tried.bound) if score.needs_edges else None
    made = running.launch(template(name), "triton", tried, device=device(gpu), edges=edges)
    lowered = triton_backend.lower_source(replace(made, score=score), direction)
    for each in lowered:
        if each.name in ("forward", "backward"):
            assert each.spilled_bytes <= SPILLED_BY_OLDER, each
    if direction == "backward" and score.live_tables:
        by_queries, by_keys = (each for each in lowered if each.name == "backward")
        is_by_edge = sum_types(score) == ("float32",)
        assert ("tt.atomic_rmw" in by_queries.texts["ttgir"]) == (not is_by_edge), "an edge has one writer"
        assert "tt.atomic_rmw" not in by_keys.texts["ttgir"]
        assert "fadd" not in re.findall(r"tt.atomic_rmw (\w+)", by_queries.texts["ttgir"]), "sums of integers alone"
