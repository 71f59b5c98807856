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
from sparsec.backends.cuda_calls import Program
from sparsec.backends.cuda_tiles import tile_walk
from sparsec.device import device
from sparsec.errors import CompileError
from sparsec.layout import EdgeOrder
from sparsec.template import Config, template, templates

pytestmark = pytest.mark.skipif(cuda_compile.missing() is not None, reason=str(cuda_compile.missing()))

# sm_80, sm_86, sm_89, sm_90, sm_100.
GPUS = {
    "sm_80": "nvidia-a100",
    "sm_86": "nvidia-l40s",
    "sm_89": "nvidia-l40s",
    "sm_90": "nvidia-h100",
    "sm_100": "nvidia-b200",
}
ROWS = template("row_traversal")
# What GPU.md lists as lowered: every dtype and architecture, not all with all.
SPREAD = (
    *(("forward", arch, "bf16", 64, (4, 4)) for arch in GPUS),
    ("forward", "sm_90", "fp16", 128, (8, 2)),
    ("forward", "sm_80", "fp32", 256, (4, 1)),
    ("backward", "sm_80", "fp32", 256, (4, 1)),
    ("backward", "sm_90", "bf16", 64, (8, 2)),
    ("backward", "sm_100", "fp16", 128, (4, 4)),
)


TILED = [name for name, made in templates().items() if "cuda" in made.backends() and made.layout != "rows"]


def lowered(arch, dtype, tried, values=(), direction="forward", chosen=ROWS) -> list[cuda_compile.Lowered]:
    config = Config.of(**{**chosen.default("cuda").to_dict(), **dict(values)})
    assert chosen.violation("cuda", config) is None
    made = running.launch(chosen, "cuda", tried.with_dtype(dtype), config=config, device=device(GPUS[arch]))
    programs = cuda.programs_of(made, direction)
    return [cuda_compile.lowered(replace(program, arch=arch)) for program, _ in programs]


@pytest.mark.parametrize(
    ("direction", "arch", "dtype", "head_dim", "heads"),
    [pytest.param(*each, id="row_traversal-{1}-{2}-{0}-d{3}".format(*each)) for each in SPREAD],
)
def test_the_default_does_not_spill_and_loads_sixteen_bytes(direction, arch, dtype, head_dim, heads):
    tried = case("lowered", scattered(150, 300, 0.05), 150, 300, head_dim, heads=heads)
    # A lane fetches its part of its own rows once a packed head, and of four rows of K and of V; dK and dV are of one.
    parts = max(1, head_dim * {"fp32": 4}.get(dtype, 2) // 512)
    pack = min(4, heads[0] // heads[1])
    own = [pack] if direction == "forward" else [2 * pack, 2]
    for made, own_rows in zip(lowered(arch, dtype, tried, direction=direction), own, strict=True):
        for kernel in made.kernels.values():
            assert kernel.spilled_bytes == 0, kernel
        if made.sass:
            counted = made.instructions[direction]
            assert counted["LDG.E.128"] == parts * (own_rows + 2 * 4)
            assert not counted.get("LDL"), "no array lives in local memory"


def _on_matrix_units():
    quick = {("sm_80", "bf16", 64), ("sm_90", "fp16", 128)}
    for name, arch, dtype, head_dim in itertools.product(TILED, GPUS, ("bf16", "fp16"), (64, 128, 256)):
        marks = () if (arch, dtype, head_dim) in quick else (pytest.mark.spread,)
        yield pytest.param(name, arch, dtype, head_dim, id=f"{name}-{arch}-{dtype}-forward-d{head_dim}", marks=marks)


@pytest.mark.parametrize(("name", "arch", "dtype", "head_dim"), [*_on_matrix_units()])
def test_the_default_does_not_spill_on_matrix_units(name, arch, dtype, head_dim):
    tried = case("lowered", scattered(150, 300, 0.05), 150, 300, head_dim, heads=(4, 2))
    (made,) = lowered(arch, dtype, tried, chosen=template(name))
    for kernel in made.kernels.values():
        assert kernel.spilled_bytes == 0, kernel
    if not made.sass:
        return
    launch = running.launch(template(name), "cuda", tried.with_dtype(dtype), device=device(GPUS[arch]))
    step = tile_walk(launch).shape.step_kv
    counted = made.instructions["forward"]
    # Of 16 rows and a step's keys, each product takes one instruction for 8 columns and 16 of what is summed over.
    assert counted["HMMA"] == 2 * (step // 8) * (head_dim // 16)
    assert counted["LDSM.16.M88.4"] >= step // 16 * head_dim // 16
    assert counted["LDSM.16.MT88.4"] == step // 16 * head_dim // 16
    # Rows of Q, K and V come 16 bytes at a time, beside the registers; those of the output leave so.
    assert counted["LDGSTS.E.BYPASS.128"] > 0
    assert not {kind for kind in counted if kind.startswith("LDGSTS")} - {"LDGSTS.E.BYPASS.128"}
    assert counted["STG.E.128"] > 0
    assert not counted.get("LDL"), "no array lives in local memory"


def _tuned():
    for name, head_dim in itertools.product(TILED, (64, 128, 192)):
        for values in ({"warp_rows": 32}, {"num_stages": 4}, {"block_q": 16}, {"step_kv": 16}, {"pack_gqa": 2}):
            marks = () if (head_dim, *values) == (128, "warp_rows") else (pytest.mark.spread,)
            yield pytest.param(name, head_dim, values, marks=marks)


@pytest.mark.parametrize(("name", "head_dim", "values"), [*_tuned()])
def test_configurations_on_matrix_units_do_not_spill(name, head_dim, values):
    tried = case("lowered", scattered(150, 300, 0.05), 150, 300, head_dim, heads=(4, 2))
    (made,) = lowered("sm_89", "bf16", tried, values.items(), chosen=template(name))
    assert all(kernel.spilled_bytes == 0 for kernel in made.kernels.values())


@pytest.mark.parametrize("name", TILED)
def test_a_score_modifier_is_compiled_in_on_matrix_units(name):
    tried = case("lowered", scattered(90, 90, 0.05), 90, 90, 64, heads=(4, 2)).with_dtype("bf16")
    made = replace(
        running.launch(template(name), "cuda", tried, device=device("nvidia-h100")), score=score.soft_cap(30.0)
    )
    ((program, _),) = cuda.programs_of(made)
    assert all(kernel.spilled_bytes == 0 for kernel in cuda_compile.lowered(program).kernels.values())


def test_machine_code_is_read():
    assert cuda_compile.disassembler() is not None, "the extra `lowering` has one"


@pytest.mark.parametrize("form", ["offsets", "ranges"])
def test_forms_of_rows(form):
    mask = {"offsets": m.window(9, 0), "ranges": m.longformer(40, 2)}[form]
    (made,) = lowered("sm_90", "bf16", case(form, mask, 90, 90, 64), {"keys": 2, "lane_bytes": 32}.items())
    assert all(kernel.spilled_bytes == 0 for kernel in made.kernels.values())
    # Four blocks of four warps at least.
    assert made.kernels["forward"].registers <= 128


MODIFIED = case("lowered", scattered(90, 90, 0.05), 90, 90, 64, heads=(4, 2)).with_dtype("bf16")
MODIFIERS = {
    "soft-cap": score.soft_cap(30.0),
    "relative-bias": score.relative_bias(torch.zeros(4, 65, requires_grad=True)),
    "row-and-edge": score.chain(
        score.row_bias(torch.zeros(4, 90, requires_grad=True)),
        score.edge_bias(torch.zeros(4, MODIFIED.bound.nnz, requires_grad=True)),
    ),
}


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=pytest.mark.spread)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "name", ["relative-bias", *(pytest.param(n, marks=pytest.mark.spread) for n in ("soft-cap", "row-and-edge"))]
)
def test_score_modifiers_do_not_spill(name, direction, arch):
    edges = EdgeOrder(MODIFIED.bound) if MODIFIERS[name].needs_edges else None
    made = running.launch(ROWS, "cuda", MODIFIED, device=device(GPUS[arch]), edges=edges)
    for program, _ in cuda.programs_of(replace(made, score=MODIFIERS[name]), direction):
        assert all(kernel.spilled_bytes == 0 for kernel in cuda_compile.lowered(program).kernels.values())
        if "SX_SCATTER" in dict(program.defines):
            assert "scatter_kept" in program.score


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
