"""The kernels for Arm, compiled as on an Arm machine and run in an emulator, against dense attention in fp64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import emulated
import pytest
import running
from cases import HARD, Case, by_degree, case, scattered
from test_backward import ISA_CASES, buffers, check, given

from sparsec import masks as m
from sparsec.backends import cpu
from sparsec.backends.base import DTYPES
from sparsec.device import _ISA_LEVELS, Device, detect_cpu
from sparsec.template import template

pytestmark = pytest.mark.skipif(bool(emulated.missing()), reason=emulated.missing())

# block_sparse instantiates what hybrid does: one dtype of it shows that its own source compiles and runs.
KERNELS = [(name, dtype) for name in ("row_traversal", "hybrid") for dtype in DTYPES] + [("block_sparse", "fp32")]
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
SQUARE = scattered(65, 67, 0.3)
FORWARD = [
    HARD,
    case("window", m.window(20, 5), 63, 130, heads=(4, 2), batch=2),
    case("short-rows", by_degree([i % 10 for i in range(41)], 40), 41, 40, 32),
    *(case("scattered", SQUARE, 65, 67, d, v_dim=v) for d, v in ((1, 1), (17, 3), (256, 255))),
    case("scattered", SQUARE, 65, 67, magnitude=1e4),
]


@pytest.fixture(scope="module")
def binaries():
    """The shared libraries of all kernels by template, dtype and direction, compiled two at a time."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("CXX", emulated.COMPILER)
        cpu.compiler.cache_clear()
        wanted = [(name, dtype, defines) for name, dtype in KERNELS for defines in ((), ("-DSX_BACKWARD",))]
        paths = pool.map(
            lambda each: cpu.compiled(cpu.source_files(template(each[0])), each[1], arm(), each[2]), wanted
        )
        found = dict(zip(wanted, paths, strict=True))
    cpu.compiler.cache_clear()
    return found


def arm() -> Device:
    return replace(detect_cpu(), arch="aarch64", features=_ISA_LEVELS["aarch64"]["neon"])


@pytest.mark.parametrize(("name", "dtype"), KERNELS)
def test_forward(name, dtype, binaries: dict[tuple[str, str, tuple[str, ...]], Path]):
    for tried in FORWARD:
        check_forward(tried.with_dtype(dtype), name, binaries[name, dtype, ()])


def check_forward(tried: Case, name: str, binary: Path) -> None:
    made = running.launch(template(name), "cpu", tried, device=arm())
    out, lse = running.poisoned(tried)
    emulated.forward(made, binary, SIZES[tried.problem.dtype])(*running.inputs(tried), out, lse)
    running.check(tried, out, lse)


@pytest.mark.parametrize(("name", "dtype"), KERNELS)
def test_backward(name, dtype, binaries):
    for tried in ISA_CASES:
        made_of = given(tried.with_dtype(dtype))
        made = running.launch(template(name), "cpu", made_of.case, device=arm())
        gradients = buffers(made_of)
        kernel = emulated.backward(made, binaries[name, dtype, ("-DSX_BACKWARD",)], SIZES[dtype])
        kernel(*made_of.inputs, *made_of.results, *made_of.above, *gradients)
        check(made_of, *gradients)
