"""Every CUDA kernel compiled by NVRTC for devices that are not here: registers, spills, 16-byte loads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import running
import torch
from cases import case, scattered

from sparsec import masks as m
from sparsec import score
from sparsec.backends import cuda, cuda_compile
from sparsec.backends.cuda_calls import Program
from sparsec.device import device
from sparsec.errors import CompileError
from sparsec.layout import EdgeOrder
from sparsec.template import Config, template

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


def lowered(arch: str, dtype: str, tried, values=(), direction="forward") -> list[cuda_compile.Lowered]:
    config = Config.of(**{**ROWS.default("cuda").to_dict(), **dict(values)})
    assert ROWS.violation("cuda", config) is None
    made = running.launch(ROWS, "cuda", tried.with_dtype(dtype), config=config, device=device(GPUS[arch]))
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
