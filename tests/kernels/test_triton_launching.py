"""Triton kernels launched as on a GPU, but for the last step: the driver is pretended, and nothing is run.

The interpreter takes any arguments, and lowering states their types itself. Only a launch shows that Triton binds what
the back end hands over: every parameter filled, nothing unknown, absent arrays and generated functions as they are.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import running
import torch
from cases import case, scattered
from test_triton_numerics import split

from sparsec import masks as m
from sparsec.backends import triton as triton_backend
from sparsec.backends.base import Launch
from sparsec.device import device
from sparsec.layout import EdgeOrder
from sparsec.score import alibi, as_score_mod, chain, edge_bias, relative_bias
from sparsec.template import Config, template

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

H100 = device("nvidia-h100")
# Small tiles compile in a second.
SMALL = {
    "block_sparse": {"block_q": 16, "block_kv": 16},
    "row_traversal": {"block_q": 4},
    "hybrid": {"block_kv": 16},
}
# All that changes which arguments there are.
OTHERS = {
    "block_sparse": {"persistent": 1, "by_predicate": 1, "descriptors": 1},
    "row_traversal": {},
    "hybrid": {"persistent": 1, "by_predicate": 1, "descriptors": 1},
}
# Name, grid and (where they were compiled) shared memory of the kernels that were launched.
Launched = list[tuple[str, int, int | None]]

_launched: Launched = []
_compile = None


@pytest.fixture(scope="module")
def pretended_gpu():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _pretend) as executor:
        yield lambda job, *arguments: executor.submit(job, *arguments).result()


class _Driver:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):  # a GPUTarget
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _pretend() -> None:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    global _compile
    driver.set_active(_Driver())
    run, _compile = JITFunction.run, JITFunction._do_compile

    def only_compiled(kernel, *arguments, grid, warmup, **named):
        made = run(kernel, *arguments, grid=grid, warmup=True, **named)
        _launched.append((kernel.fn.__name__, grid[0], made and made.metadata.shared))
        return made

    JITFunction.run = only_compiled


def _launch(name: str, with_others: bool) -> Launch:
    values = {**SMALL[name], **(OTHERS[name] if with_others else {})}
    config = Config.of(**{**template(name).default("triton").to_dict(), **values})
    assert template(name).violation("triton", config) is None
    mask = m.documents([50, 63]) if with_others else scattered(113, 113, 0.05)
    tried = case("launched", mask, 113, 113, 16, heads=(4, 2), batch=2).with_dtype("bf16")
    made = running.launch(template(name), "triton", tried, config=config, device=H100)
    if not with_others:
        return replace(made, work=split(made.work))
    bias = np.ones((4, 225), np.float32)
    return replace(made, score=as_score_mod(lambda score, b, h, q, kv: score + bias[h, q - kv + 112]))


def _launched_by(name: str, with_others: bool, direction: str, is_compiled: bool) -> Launched:
    from triton.runtime.jit import JITFunction

    JITFunction._do_compile = _compile if is_compiled else lambda kernel, *bound: None
    made = _launch(name, with_others)
    q, k, v = (torch.randn(2, heads, 113, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
    out, lse = torch.empty_like(q), torch.zeros(2, 4, 113)
    _launched.clear()
    if direction == "forward":
        triton_backend.backend().lower(made)(q, k, v, out, lse)
    else:
        into = torch.empty_like(q), torch.zeros(k.shape), torch.zeros(v.shape)
        triton_backend.backend().lower_backward(made)(q, k, v, out, lse, torch.ones_like(out), None, *into)
    return list(_launched)


@pytest.mark.parametrize("with_others", [False, True], ids=["plain", "others"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", [*SMALL])
def test_every_argument_of_a_call_is_bound(pretended_gpu, name, direction, with_others):
    launched = pretended_gpu(_launched_by, name, with_others, direction, False)
    made = _launch(name, with_others)
    calls = triton_backend.calls_of(made) if direction == "forward" else triton_backend.gradient_calls_of(made)
    assert [each[:2] for each in launched] == [(call.name, call.grid(2)) for call in calls]
    assert ("merge" in {each[0] for each in launched}) == (direction == "forward" and not with_others)


def _launched_with_tables(name: str) -> Launched:
    from triton.runtime.jit import JITFunction

    JITFunction._do_compile = _compile
    tried = case("launched", scattered(50, 50, 0.05), 50, 50, 16, heads=(4, 2), batch=2).with_dtype("bf16")
    shapes = (4, 99), (4, tried.bound.nnz), (4,)
    bias, edges, slopes = (torch.zeros(*shape, requires_grad=True) for shape in shapes)
    score = chain(relative_bias(bias), edge_bias(edges), alibi(slopes))
    config = Config.of(**{**template(name).default("triton").to_dict(), **SMALL[name]})
    order = EdgeOrder(tried.bound)
    made = running.launch(template(name), "triton", tried, config=config, device=H100, edges=order)
    made = replace(made, score=score)
    q, k, v = running.inputs(tried)
    out, lse = torch.empty_like(q), torch.zeros(q.shape[:3])
    tables = [torch.zeros(shape) for shape in shapes]
    _launched.clear()
    triton_backend.backend().lower(made)(q, k, v, out, lse, tables)
    into = torch.empty_like(q), torch.zeros(k.shape), torch.zeros(v.shape)
    # Of one table no gradient is wanted.
    wanted = [torch.zeros(shape) if shape != shapes[0] else None for shape in shapes]
    gradient = triton_backend.backend().lower_backward(made)
    gradient(q, k, v, out, lse, torch.ones_like(out), None, *into, tables, wanted)
    return list(_launched)


@pytest.mark.parametrize(
    "name", ["block_sparse", *(pytest.param(n, marks=pytest.mark.spread) for n in ("row_traversal", "hybrid"))]
)
def test_tables_and_their_sums_are_bound(pretended_gpu, name):
    launched = [kernel for kernel, *_ in pretended_gpu(_launched_with_tables, name)]
    assert [kernel for kernel in launched if kernel in ("forward", "backward")] == ["forward", "backward", "backward"]


@pytest.mark.spread
@pytest.mark.parametrize("with_others", [False, True], ids=["plain", "others"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", [*SMALL])
def test_what_is_lowered_is_what_is_launched(pretended_gpu, name, direction, with_others):
    launched = pretended_gpu(_launched_by, name, with_others, direction, True)
    lowered = triton_backend.lower_source(_launch(name, with_others), direction)
    assert [(each[0], each[2]) for each in launched] == [(each.name, each.shared_bytes) for each in lowered]
