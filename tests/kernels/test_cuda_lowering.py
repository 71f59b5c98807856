"""Every CUDA kernel compiled by NVRTC for devices that are not here: registers, spills, 16-byte loads."""

from __future__ import annotations

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

import running
from cases import by_degree, case, scattered

from sparsec import masks as m
from sparsec.backends import cuda, cuda_compile
from sparsec.backends.cuda_calls import Program, forward_walk
from sparsec.device import device
from sparsec.errors import CompileError
from sparsec.template import Config, template

if cuda_compile.missing() is not None:
    pytest.skip(cuda_compile.missing(), allow_module_level=True)

# sm_80, sm_86, sm_89, sm_90, sm_100.
GPUS = {
    "sm_80": "nvidia-a100",
    "sm_86": "nvidia-l40s",
    "sm_89": "nvidia-l40s",
    "sm_90": "nvidia-h100",
    "sm_100": "nvidia-b200",
}
# What GPU.md lists as lowered: every dtype and architecture, not all with all.
SPREAD = (
    *(("forward", arch, "bf16", 64, (4, 4)) for arch in GPUS),
    ("forward", "sm_90", "fp16", 128, (8, 2)),
    ("forward", "sm_80", "fp32", 256, (4, 1)),
    ("forward", "sm_90", "fp32", 64, (4, 4)),
)


def lowered(arch: str, dtype: str, tried, values=()) -> cuda_compile.Lowered:
    chosen = template("row_traversal")
    config = Config.of(**{**chosen.default("cuda").to_dict(), **dict(values)})
    assert chosen.violation("cuda", config) is None
    made = running.launch(chosen, "cuda", tried.with_dtype(dtype), config=config, device=device(GPUS[arch]))
    program = cuda.forward_program(made, forward_walk(made))
    return cuda_compile.lowered(Program(program.template, arch, program.defines))


@pytest.mark.parametrize(("direction", "arch", "dtype", "head_dim", "heads"), SPREAD)
def test_the_default_does_not_spill_and_loads_sixteen_bytes(direction, arch, dtype, head_dim, heads):
    tried = case("lowered", scattered(150, 300, 0.05), 150, 300, head_dim, heads=heads)
    made = lowered(arch, dtype, tried)
    for kernel in made.kernels.values():
        assert kernel.spilled_bytes == 0, kernel
    if not made.sass:
        pytest.skip("no nvdisasm is here to read the loads")
    counted = made.instructions[direction]
    # A lane fetches its part of q once a packed head, and of four rows of K and of V.
    parts = max(1, head_dim * {"fp32": 4}.get(dtype, 2) // 512)
    pack = min(4, heads[0] // heads[1])
    assert counted["LDG.E.128"] == parts * (pack + 2 * 4)
    assert not counted.get("LDL"), "no array lives in local memory"
    assert counted.get("HMMA", 0) == 0


@pytest.mark.parametrize("form", ["offsets", "ranges", "edges"])
def test_forms_of_rows(form):
    mask = {"offsets": m.window(9, 0), "ranges": m.longformer(40, 2), "edges": by_degree([5] * 90, 90)}[form]
    made = lowered("sm_90", "bf16", case(form, mask, 90, 90, 64), {"keys": 2, "lane_bytes": 32}.items())
    assert all(kernel.spilled_bytes == 0 for kernel in made.kernels.values())
    # Four blocks of four warps at least.
    assert made.kernels["forward"].registers <= 128


def test_what_does_not_compile_says_why():
    broken = Program("row_traversal", "sm_90", (("SX_T", "sx::nothing"),))
    with pytest.raises(CompileError, match=r"could not compile kernel_cuda\.cu for sm_90") as caught:
        cuda_compile.cubin(broken)
    assert "error" in caught.value.log


def test_a_damaged_binary_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(tmp_path))
    tried = case("lowered", m.window(3, 3), 20, 20, 8)
    made = lowered("sm_80", "fp16", tried, [("keys", 1)])
    (path,) = (tmp_path / "cuda").glob("*.cubin")
    path.write_bytes(b"nothing")
    assert lowered("sm_80", "fp16", tried, [("keys", 1)]).cubin == made.cubin
