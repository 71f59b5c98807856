"""Plans whose forward pass is CUDA's and whose gradients are another back end's or template's, from end to end.

CUDA kernels run in their emulation and Triton's in its interpreter, which has to be chosen before Triton is imported:
so both run in a process of their own. What joins the steps is what users run.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import running
import test_backward
from cases import Case, case, scattered
from cuda_emulation import Emulation

import sparsec
from sparsec import gate
from sparsec import masks as m
from sparsec.analysis import analyse
from sparsec.backends import cuda, reference
from sparsec.backends import triton as triton_backend
from sparsec.device import device
from sparsec.planner import Plan, search
from sparsec.records import RecordBase, RecordKey, TuningRecord, Workload
from sparsec.specialisation import Specialisation
from sparsec.template import template

# Not `importorskip`: the interpreter's process imports this file, and must not import Triton before it chose.
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

GPU = device("nvidia-h100")
MIXED = m.dilated(90, 8) | m.random_edges(2, 0)


@pytest.fixture(scope="module")
def interpreter():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), running.start_interpreter) as executor:
        yield lambda job, *arguments: executor.submit(job, *arguments).result()


@contextmanager
def _served(wanted=lambda draft: True):
    """CUDA's kernels come first where costs tie; of all plans those that are wanted, for masks that have one."""
    every = search._Search._drafts

    def drafts(self, servers):
        found = list(every(self, servers))
        yield from [draft for draft in found if wanted(draft)] or found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "BACKENDS", ("cuda", "triton"))
        patch.setattr(search._Search, "_drafts", drafts)
        machine = Emulation()
        patch.setattr(cuda, "machine", lambda: machine)
        for kind in (cuda.CudaBackend, triton_backend.TritonBackend):
            patch.setattr(kind, "missing", lambda self, device: None)
        patch.setattr(gate, "ensure", lambda *given: None)
        yield


def _planned(tried: Case, name: str | None = None) -> Plan:
    problem = replace(tried.problem, needs_grad=True)
    return sparsec.plan(tried.bound, problem, GPU, template=name)


def _check(tried: Case, made: Plan) -> None:
    """Forward and backward of a whole plan, its gradients by what its own forward pass gave."""
    given = test_backward.given(tried)
    inputs, (d_out, d_lse) = given.inputs, given.above
    runs = Specialisation(made)
    out, lse = runs.forward(*inputs, with_lse=True)
    for b, h in np.ndindex(lse.shape[:2]):
        bound = test_backward._member(tried, b, h)
        heads = test_backward._head(inputs, b, h, tried.problem)
        allowed = reference.tolerances(*heads, bound, running.scale_of(tried), tried.problem.dtype)
        wanted = reference.attention(*heads, bound, running.scale_of(tried))
        for got, right, most in zip((out[b, h], lse[b, h]), wanted, allowed, strict=True):
            running.check_close(got, right, most, f"head {h}, batch element {b}")
    test_backward.check(given, *runs.backward(*inputs, out, lse, d_out, d_lse))


def _passes(made: Plan) -> list[tuple[list[str], list[str]]]:
    """Of each group the back ends and templates of its steps, and of their gradients."""
    named = lambda launch: f"{launch.template.name} on {launch.backend}"  # noqa: E731
    return [
        ([named(step.launch) for step in group.steps], [named(launch) for launch in group.backward_launches])
        for group in made.groups
    ]


def _run_alone(name: str, tried: Case) -> None:
    with _served(_is_of_cuda):
        made = _planned(tried, name)
        assert _passes(made) == [([f"{name} on cuda"], [f"{name} on triton"])]
        _check(tried, made)


@pytest.mark.parametrize("dtype", ["fp16"])
@pytest.mark.parametrize("name", ["block_sparse", "hybrid"])
def test_a_tiled_forward_pass_and_triton_s_gradients(interpreter, name, dtype):
    tried = case("scattered", scattered(65, 90, 0.2), 65, 90, 16, heads=(4, 2), batch=2)
    interpreter(_run_alone, name, tried.with_dtype(dtype))


def _is_of_cuda(draft: search.Draft) -> bool:
    return any(part.backend == "cuda" for part in draft.parts)


def _gradients_of(forward: list[str]) -> list[str]:
    """Each step's own template; rows by CUDA itself, tiles by Triton."""
    return [each if "row_" in each else each.replace("cuda", "triton") for each in forward]


def _run_apart(tried: Case) -> None:
    with _served(lambda draft: len(draft.parts) == 2 and not draft.is_joined and _is_of_cuda(draft)):
        made = _planned(tried)
        ((forward, backward),) = _passes(made)
        assert len(forward) == 2, str(made)
        assert any(each.endswith("on cuda") for each in forward), forward
        assert backward == _gradients_of(forward)
        _check(tried, made)


def test_heavy_rows_apart(interpreter):
    interpreter(
        _run_apart, case("heavy", m.window(4, 4) | m.global_tokens([3, 77, 150, 222]), 600, 600, 16).with_dtype("fp16")
    )


def _run_joined(tried: Case) -> None:
    with _served(lambda draft: draft.is_joined and _is_of_cuda(draft)):
        made = _planned(tried)
        assert any(group.is_joined for group in made.groups), str(made)
        passes = _passes(made)
        assert any(each.endswith("on cuda") for forward, _ in passes for each in forward), passes
        assert all(backward == _gradients_of(forward) for forward, backward in passes), passes
        _check(tried, made)


@pytest.mark.parametrize(
    "tried",
    [
        case("joined", MIXED, 200, 200, 16, heads=(2, 1)),
        case("joined-heads", m.per_head([MIXED, m.window(9, 3)]), 200, 200, 16, heads=(2, 2)),
    ],
    ids=lambda tried: tried.id,
)
def test_joined_steps(interpreter, tried):
    interpreter(_run_joined, tried.with_dtype("fp16"))


def _run_by_records(tried: Case, folder: Path) -> None:
    """Tiles forward on CUDA, and backward the rows of CUDA, as records say."""
    from sparsec.records import base

    own = RecordBase([], folder)
    problem = replace(tried.problem, needs_grad=True)
    workload = Workload.of(analyse(tried.bound), heads=tried.problem.q_heads, batch=1)
    for name, server, direction, us in (
        ("block_sparse", "cuda", "forward", 1.0),
        ("block_sparse", "triton", "forward", 9.0),
        ("block_sparse", "triton", "backward", 9.0),
        ("row_traversal", "cuda", "forward", 9.0),
        ("row_traversal", "cuda", "backward", 1.0),
        ("row_traversal", "triton", "forward", 9.0),
        ("hybrid", "cuda", "forward", 9.0),
        ("hybrid", "triton", "forward", 9.0),
    ):
        key = RecordKey.of(template(name), server, problem, GPU, direction)
        own.append(TuningRecord(key, workload, template(name).default(server), (us,)))
    with _served(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_database", lambda shipped, own_folder: own)
        made = _planned(tried)
        assert _passes(made) == [(["block_sparse on cuda"], ["row_traversal on cuda"])], str(made)
        _check(tried, made)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_gradients_of_another_template_by_records(interpreter, tmp_path, dtype):
    tried = case("window", m.window(20, 5), 90, 90, 16, heads=(4, 2)).with_dtype(dtype)
    interpreter(_run_by_records, tried, tmp_path)
