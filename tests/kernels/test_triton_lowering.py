"""Every Triton kernel compiled for devices that are not here: no spills, matrix instructions, 64-bit addresses."""

from __future__ import annotations

import re
from functools import cache

import pytest

pytest.importorskip("triton")

import running
from cases import Case, by_degree, case, scattered

from sparsec import masks as m
from sparsec.backends import triton as triton_backend
from sparsec.backends.triton import LoweredSource
from sparsec.device import device
from sparsec.template import Config, template

# sm_80, sm_90, sm_100, gfx90a, gfx942.
DEVICES = ("nvidia-a100", "nvidia-h100", "nvidia-b200", "amd-mi250x", "amd-mi300x")
TEMPLATES = ("block_sparse", "row_traversal", "hybrid")

MATRIX_INSTRUCTION = {
    ("nvidia-a100", "bf16"): "HMMA",
    ("nvidia-h100", "bf16"): "HGMMA",
    ("nvidia-b200", "bf16"): "UTCHMMA",
    ("nvidia-h100", "fp16"): "HGMMA",
    ("amd-mi250x", "bf16"): "v_mfma_f32",
    ("amd-mi300x", "bf16"): "v_mfma_f32",
    ("amd-mi300x", "fp32"): "v_mfma_f32",
}


@cache
def _lowered(name: str, gpu: str, dtype: str, head_dim: int, tried: Case, values: tuple = ()) -> LoweredSource:
    chosen = template(name)
    config = Config.of(**{**chosen.default("triton").to_dict(), **dict(values)})
    assert chosen.violation("triton", config) is None
    problem = tried.with_dtype(dtype)
    made = running.launch(chosen, "triton", problem, config=config, device=device(gpu))
    forward = triton_backend.lower_source(made)[0]
    assert forward.name == "forward"
    shape = triton_backend.shape_of(made)
    if shape.shared_bytes:
        assert forward.shared_bytes <= shape.shared_bytes, "the shared-memory model is an upper bound"
    assert forward.shared_bytes <= device(gpu).shared_bytes_per_block
    return forward


@cache
def tried_at(head_dim: int) -> Case:
    return case("lowered", scattered(150, 300, 0.05), 150, 300, head_dim, heads=(4, 2))


def _spread():
    """Every template, dtype and device; head dimensions change along the way."""
    for name in TEMPLATES:
        for gpu in DEVICES:
            for dtype, head_dim in (("bf16", 128), ("fp32", 64), ("fp16", 64)):
                # fp16 and bf16 differ in one instruction: one device and the newest of the other maker stand for all.
                if dtype != "fp16" or gpu in ("nvidia-h100", "amd-mi300x"):
                    yield pytest.param(name, gpu, dtype, head_dim, id=f"{name}-{gpu}-{dtype}-d{head_dim}")


@pytest.mark.parametrize(("name", "gpu", "dtype", "head_dim"), [*_spread()])
def test_the_default_does_not_spill(name, gpu, dtype, head_dim):
    forward = _lowered(name, gpu, dtype, head_dim, tried_at(head_dim))
    assert forward.spilled_bytes == 0, forward
    wanted = MATRIX_INSTRUCTION.get((gpu, dtype))
    if wanted and name == "block_sparse":
        assert forward.instructions.get(wanted, 0) > 0, forward
    if dtype == "fp32" and gpu.startswith("nvidia"):
        assert not {"HMMA", "HGMMA", "UTCHMMA"} & forward.instructions.keys(), "fp32 is IEEE, never TF32"


@pytest.mark.parametrize(
    ("name", "gpu", "values"),
    [
        ("block_sparse", "nvidia-h100", (("block_q", 128), ("block_kv", 128))),
        ("block_sparse", "nvidia-h100", (("block_q", 16), ("pack_gqa", 2), ("num_stages", 4))),
        ("block_sparse", "nvidia-rtx4090", (("block_q", 128), ("block_kv", 64))),
        ("hybrid", "nvidia-rtx4090", (("block_q", 64), ("num_warps", 8))),
        ("row_traversal", "nvidia-h100", (("block_q", 1), ("num_warps", 1))),
        ("row_traversal", "nvidia-a100", (("block_q", 32), ("fetch", 128))),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{key}{number}" for key, number in value),
)
def test_other_configurations_compile_and_fit(name, gpu, values):
    _lowered(name, gpu, "bf16", 64, tried_at(64), values)


@pytest.mark.parametrize("gpu", ["nvidia-rtx4090", "amd-mi300x"])
def test_the_widest_heads_fit_the_smallest_devices(gpu):
    for dtype in ("fp32", "bf16"):
        assert _lowered("block_sparse", gpu, dtype, 256, tried_at(256)).spilled_bytes == 0


@pytest.mark.parametrize("form", ["offsets", "ranges", "edges"])
def test_forms_of_rows(form):
    mask = {"offsets": m.window(9, 0), "ranges": m.longformer(40, 2), "edges": by_degree([5] * 90, 90)}[form]
    tried = case(form, mask, 90, 90, 64)
    made = running.launch(template("row_traversal"), "triton", tried, device=device("nvidia-h100"))
    assert made.work.rows.form == form
    assert _lowered("row_traversal", "nvidia-h100", "bf16", 64, tried).spilled_bytes == 0


@pytest.mark.parametrize("name", TEMPLATES)
def test_offsets_are_64_bit(name):
    """No stride, token or slot is ever multiplied in 32 bits."""
    text = _lowered(name, "nvidia-h100", "bf16", 128, tried_at(128)).texts["ttgir"]
    for tensor in ("q", "k", "v", "out"):
        for axis in ("batch", "head", "row"):
            stride = rf"%{tensor}_{axis}\b"
            assert re.search(rf"arith\.extsi {stride} : i32 to i64", text), (
                f"{tensor}_{axis} is widened before it is used"
            )
            assert not re.search(rf"(muli|splat) [^:]*{stride}[^:]*: [^:]*i32", text), f"{tensor}_{axis} in 32 bits"


def test_a_split_unit_has_its_merge_kernel():
    from test_triton_numerics import split

    tried = tried_at(64)
    made = running.launch(template("block_sparse"), "triton", tried, device=device("nvidia-h100"))
    from dataclasses import replace

    names = [each.name for each in triton_backend.lower_source(replace(made, work=split(made.work)))]
    assert names == ["forward", "merge"]
