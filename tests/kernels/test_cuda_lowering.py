"""Every CUDA kernel compiled by NVRTC for devices that are not here: registers, spills, 16-byte loads."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import running
import torch
from cases import case, scattered

from sparsec import masks as m
from sparsec import score
from sparsec.backends import cuda, cuda_compile
from sparsec.backends.base import DTYPES
from sparsec.backends.cuda_calls import Program
from sparsec.backends.cuda_tiles import tile_walk
from sparsec.device import device
from sparsec.errors import CompileError
from sparsec.layout import EdgeOrder
from sparsec.template import Config, template, templates

pytestmark = pytest.mark.skipif(cuda_compile.missing() is not None, reason=str(cuda_compile.missing()))

# A device of each architecture; what sm_86 has is what sm_89 has.
GPUS = {
    "sm_80": "nvidia-a100",
    "sm_86": "nvidia-l40s",
    "sm_89": "nvidia-l40s",
    "sm_90": "nvidia-h100",
    "sm_100": "nvidia-b200",
}
DIMS = (64, 128, 256)
ROWS = template("row_traversal")
TILED = [name for name, made in templates().items() if "cuda" in made.backends() and made.layout != "rows"]
# What `make test` compiles; `make spread` compiles the rest.
QUICK_ROWS = {
    *(("forward", arch, "bf16") for arch in GPUS),
    ("forward", "sm_90", "fp16"),
    ("forward", "sm_80", "fp32"),
    ("backward", "sm_80", "fp32"),
    ("backward", "sm_90", "bf16"),
    ("backward", "sm_100", "fp16"),
}
QUICK_TILES = {("sm_80", "bf16", 64), ("sm_90", "fp16", 128)}


def lowered(arch, dtype, tried, values=(), direction="forward", chosen=ROWS) -> list[cuda_compile.Lowered]:
    config = Config.of(**{**chosen.default("cuda").to_dict(), **dict(values)})
    assert chosen.violation("cuda", config) is None
    gpu = replace(device(GPUS[arch]), arch=arch)
    made = running.launch(chosen, "cuda", tried.with_dtype(dtype), config=config, device=gpu)
    return [cuda_compile.lowered(program) for program, _ in cuda.programs_of(made, direction)]


def hold(made: cuda_compile.Lowered) -> None:
    for kernel in made.kernels.values():
        assert kernel.spilled_bytes == 0, kernel


def _turned(place: int, of: tuple, *steps: int):
    """One of several things, another for each architecture, dtype, ...: over all of them every pair comes up."""
    return of[(place + sum(steps)) % len(of)]


def _rows():
    every = itertools.product(("forward", "backward"), enumerate(GPUS), enumerate(DTYPES))
    for direction, (i, arch), (j, dtype) in every:
        head_dim, heads = _turned(i, DIMS, j), _turned(i, ((4, 4), (8, 2), (4, 1)), j, direction == "backward")
        marks = () if (direction, arch, dtype) in QUICK_ROWS else (pytest.mark.spread,)
        name = f"row_traversal-{arch}-{dtype}-{direction}-d{head_dim}"
        yield pytest.param(direction, arch, dtype, head_dim, heads, id=name, marks=marks)


@pytest.mark.parametrize(("direction", "arch", "dtype", "head_dim", "heads"), [*_rows()])
def test_the_default_does_not_spill_and_loads_sixteen_bytes(direction, arch, dtype, head_dim, heads):
    tried = case("lowered", scattered(150, 300, 0.05), 150, 300, head_dim, heads=heads)
    # A lane fetches its part of its own rows once a packed head, and of four rows of K and of V; dK and dV are of one.
    # The forward pass has those of K and V twice: where all four are there, and where some are not.
    parts = max(1, head_dim * {"fp32": 4}.get(dtype, 2) // 512)
    pack = min(4, heads[0] // heads[1])
    own = [pack] if direction == "forward" else [2 * pack, 2]
    for made, own_rows in zip(lowered(arch, dtype, tried, direction=direction), own, strict=True):
        hold(made)
        if made.sass:
            counted = made.instructions[direction]
            assert counted["LDG.E.128"] == parts * (own_rows + 2 * 4 * (2 if direction == "forward" else 1))
            assert not counted.get("LDL"), "no array lives in local memory"


# The bytes that must be under way to a multiprocessor of an H200 at any time: 4.8 TB/s for 800 ns, over 132 of them.
NEEDED_BYTES = 29_000


@pytest.mark.parametrize(("direction", "heads"), [("forward", (4, 4)), ("forward", (4, 1)), ("backward", (4, 4))])
def test_enough_warps_are_resident_to_keep_the_memory_busy(direction, heads):
    tried = case("lowered", scattered(150, 300, 0.05), 150, 300, 64, heads=heads)
    gpu = replace(device("nvidia-h200"), arch="sm_90")
    made = running.launch(ROWS, "cuda", tried.with_dtype("bf16"), device=gpu)
    for program, walk in cuda.programs_of(made, direction):
        compiled, shape = cuda_compile.lowered(program), walk.shape
        hold(compiled)
        kernel = compiled.kernels[direction]
        assert compiled.resident * shape.warps <= kernel.warps_per_unit(shape.warps, gpu, kernel.shared_bytes)
        # Of each key a team has in flight, a row of each of two tensors; half the time a warp does something else.
        fetched = shape.keys * shape.teams * 2 * tried.problem.head_dim * 2
        assert compiled.resident * shape.warps * fetched / 2 >= 0.8 * NEEDED_BYTES


def test_what_would_spill_is_compiled_for_fewer_resident_blocks():
    tried = case("lowered", scattered(150, 300, 0.05), 150, 300, 64).with_dtype("bf16")
    ((program, _),) = cuda.programs_of(running.launch(ROWS, "cuda", tried, device=device("nvidia-h100")))
    wishful = replace(program, resident=program.resident + 2)
    made = cuda_compile.lowered(wishful)
    hold(made)
    assert made.resident < wishful.resident
    assert f"-DSX_RESIDENT={made.resident}" in cuda_compile.options(wishful, made.resident)


ROW_CONFIGS = (
    {"lane_bytes": 32},
    {"lane_bytes": 64, "keys": 2},
    {"keys": 8, "pack_gqa": 1},
    {"keys": 1, "pack_gqa": 8, "num_warps": 1},
    {"num_warps": 8, "pack_gqa": 2},
    {"rows_per_warp": 8, "keys": 2},
)
ROW_CASES = (
    case("offsets", m.window(9, 0), 90, 90, 64, heads=(4, 2)),
    case("ranges", m.longformer(40, 2), 90, 90, 128, heads=(8, 1)),
    case("odd", scattered(90, 90, 0.05), 90, 90, 31, v_dim=255, heads=(2, 2)),
)


def _row_configurations():
    places = itertools.product(("forward", "backward"), enumerate(GPUS), enumerate(DTYPES), range(2))
    for direction, (i, arch), (j, dtype), k in places:
        values, tried = _turned(i, ROW_CONFIGS, 2 * j, k), _turned(i, ROW_CASES, j, k)
        text = "-".join(f"{name}{value}" for name, value in values.items())
        marks = () if (direction, arch, k) == ("forward", "sm_90", 0) else (pytest.mark.spread,)
        name = f"{arch}-{dtype}-{direction}-{tried.name}-{text}"
        yield pytest.param(direction, arch, dtype, tried, values, id=name, marks=marks)


@pytest.mark.parametrize(("direction", "arch", "dtype", "tried", "values"), [*_row_configurations()])
def test_configurations_of_rows_do_not_spill(direction, arch, dtype, tried, values):
    for made in lowered(arch, dtype, tried, values.items(), direction):
        hold(made)


def _tiles():
    for name, (i, arch), (j, dtype) in itertools.product(TILED, enumerate(GPUS), enumerate(("bf16", "fp16"))):
        for head_dim in DIMS if j == 0 else {_turned(i, DIMS): None, 128: None}:
            marks = () if (arch, dtype, head_dim) in QUICK_TILES else (pytest.mark.spread,)
            yield pytest.param(
                name, arch, dtype, head_dim, id=f"{name}-{arch}-{dtype}-forward-d{head_dim}", marks=marks
            )


@pytest.mark.parametrize(("name", "arch", "dtype", "head_dim"), [*_tiles()])
def test_the_default_does_not_spill_on_matrix_units(name, arch, dtype, head_dim):
    tried = case("lowered", scattered(150, 300, 0.05), 150, 300, head_dim, heads=(4, 2))
    (made,) = lowered(arch, dtype, tried, chosen=template(name))
    hold(made)
    if not made.sass:
        return
    launch = running.launch(template(name), "cuda", tried.with_dtype(dtype), device=device(GPUS[arch]))
    shape = tile_walk(launch).shape
    step, parts = shape.step_kv, shape.rows // shape.warps // 16
    counted = made.instructions["forward"]
    # Of 16 rows and a step's keys, each product takes one instruction for 8 columns and 16 of what is summed over.
    assert counted["HMMA"] == parts * 2 * (step // 8) * (head_dim // 16)
    # Keys and values are read once for all rows of a warp.
    assert counted["LDSM.16.M88.4"] >= step // 16 * head_dim // 16
    assert counted["LDSM.16.MT88.4"] == step // 16 * head_dim // 16
    # Rows of Q, K and V come 16 bytes at a time, beside the registers; those of the output leave so.
    assert counted["LDGSTS.E.BYPASS.128"] > 0
    assert not {kind for kind in counted if kind.startswith("LDGSTS")} - {"LDGSTS.E.BYPASS.128"}
    assert counted["STG.E.128"] > 0
    assert not counted.get("LDL"), "no array lives in local memory"


TILE_CONFIGS = (
    {"warp_rows": 16},
    {"warp_rows": 32, "step_kv": 32},
    {"block_q": 16, "block_kv": 32, "num_stages": 4},
    {"step_kv": 16, "num_stages": 3},
    {"pack_gqa": 2},
    {"by_predicate": 1},
)


def _tile_configurations():
    places = itertools.product(TILED, enumerate(GPUS), enumerate(("bf16", "fp16")), range(3))
    for name, (i, arch), (j, dtype), k in places:
        values, head_dim = _turned(i, TILE_CONFIGS, 3 * j, k), _turned(i, (64, 128, 192, 80), j, k)
        text = "-".join(f"{tunable}{value}" for tunable, value in values.items())
        marks = () if (arch, dtype, k) == ("sm_89", "bf16", 0) else (pytest.mark.spread,)
        id_ = f"{name}-{arch}-{dtype}-d{head_dim}-{text}"
        yield pytest.param(name, arch, dtype, head_dim, values, id=id_, marks=marks)


@pytest.mark.parametrize(("name", "arch", "dtype", "head_dim", "values"), [*_tile_configurations()])
def test_configurations_on_matrix_units_do_not_spill(name, arch, dtype, head_dim, values):
    mask = m.window(37, 5) if "by_predicate" in values else scattered(150, 300, 0.05)
    tried = case("lowered", mask, 150, 300, head_dim, heads=(4, 2))
    (made,) = lowered(arch, dtype, tried, values.items(), chosen=template(name))
    hold(made)


@pytest.mark.parametrize(
    ("listed", "configs"), [(_row_configurations, ROW_CONFIGS), (_tile_configurations, TILE_CONFIGS)]
)
def test_every_configuration_is_compiled_for_every_architecture_and_dtype(listed, configs):
    tried = [each.values for each in listed()]
    for which in (1, 2):
        of = {values[which] for values in tried}
        met = {(values[which], str(values[4])) for values in tried}
        assert met == {*itertools.product(of, map(str, configs))}


def test_machine_code_is_read():
    assert cuda_compile.disassembler() is not None, "the extra `lowering` has one"


MODIFIED = case("lowered", scattered(90, 90, 0.05), 90, 90, 64, heads=(4, 2))
MODIFIERS = {
    "soft-cap": score.soft_cap(30.0),
    "relative-bias": score.relative_bias(torch.zeros(4, 65, requires_grad=True)),
    "row-and-edge": score.chain(
        score.row_bias(torch.zeros(4, 90, requires_grad=True)),
        score.edge_bias(torch.zeros(4, MODIFIED.bound.nnz, requires_grad=True)),
    ),
}


def _modified():
    for (i, name), arch, direction in itertools.product(enumerate(MODIFIERS), GPUS, ("forward", "backward")):
        marks = () if (name, arch) == ("relative-bias", "sm_90") else (pytest.mark.spread,)
        dtype = _turned(i, DTYPES, [*GPUS].index(arch))
        yield pytest.param(name, arch, dtype, direction, id=f"{name}-{arch}-{dtype}-{direction}", marks=marks)


@pytest.mark.parametrize(("name", "arch", "dtype", "direction"), [*_modified()])
def test_score_modifiers_do_not_spill(name, arch, dtype, direction):
    edges = EdgeOrder(MODIFIED.bound) if MODIFIERS[name].needs_edges else None
    gpu = replace(device(GPUS[arch]), arch=arch)
    made = running.launch(ROWS, "cuda", MODIFIED.with_dtype(dtype), device=gpu, edges=edges)
    for program, _ in cuda.programs_of(replace(made, score=MODIFIERS[name]), direction):
        hold(cuda_compile.lowered(program))
        if "SX_SCATTER" in dict(program.defines):
            assert "scatter_kept" in dict(program.headers)["score_generated.cuh"]


def _modified_tiles():
    named = [name for name, modifier in MODIFIERS.items() if not modifier.needs_edges]
    for name, modifier, (i, arch) in itertools.product(TILED, named, enumerate(GPUS)):
        marks = () if arch == "sm_90" and modifier == "soft-cap" else (pytest.mark.spread,)
        dtype = _turned(i, ("bf16", "fp16"), named.index(modifier))
        yield pytest.param(name, arch, dtype, modifier, id=f"{name}-{arch}-{dtype}-{modifier}", marks=marks)


@pytest.mark.parametrize(("name", "arch", "dtype", "modifier"), [*_modified_tiles()])
def test_score_modifiers_do_not_spill_on_matrix_units(name, arch, dtype, modifier):
    gpu = replace(device(GPUS[arch]), arch=arch)
    made = running.launch(template(name), "cuda", MODIFIED.with_dtype(dtype), device=gpu)
    ((program, _),) = cuda.programs_of(replace(made, score=MODIFIERS[modifier]))
    hold(cuda_compile.lowered(program))


def test_what_does_not_compile_says_why():
    broken = Program("row_traversal", "sm_90", (("SX_T", "sx::nothing"),))
    with pytest.raises(CompileError, match=r"could not compile kernel_cuda\.cu for sm_90") as caught:
        cuda_compile.cubin(broken)
    assert "error" in caught.value.log


def test_a_damaged_binary_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path))
    tried = case("lowered", m.window(3, 3), 20, 20, 8)
    (made,) = lowered("sm_80", "fp16", tried, [("keys", 1)])
    (path,) = (tmp_path / "cuda").glob("*.cubin")
    path.write_bytes(b"nothing")
    assert lowered("sm_80", "fp16", tried, [("keys", 1)])[0].cubin == made.cubin


def test_what_is_cached_is_not_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path))
    tried = case("lowered", m.window(3, 3), 20, 20, 8)
    (made,) = lowered("sm_80", "fp16", tried, [("keys", 2)])

    def refuse(*given):
        raise AssertionError("what the cache has is compiled again")

    monkeypatch.setattr(cuda_compile, "_compile", refuse)
    (again,) = lowered("sm_80", "fp16", tried, [("keys", 2)])
    assert (again.cubin, again.resident, again.kernels) == (made.cubin, made.resident, made.kernels)
