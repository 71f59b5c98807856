"""The CUDA back end without a GPU and without a compiler: bins of rows, geometry, widths, refusals, plans."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparsec
from sparsec import masks as m
from sparsec import score
from sparsec.backends import cuda, cuda_calls
from sparsec.backends.base import Launch, Problem
from sparsec.backends.cuda_calls import Placed, Program, TeamShape, bin_rows, fetch_bytes, forward_walk
from sparsec.device import device
from sparsec.errors import UnsupportedError
from sparsec.planner.works import build_work
from sparsec.template import Config, template

GPU = device("nvidia-h100")
SHAPE = TeamShape(lanes=8, keys=4, pack=1, warps=4, rows_per_warp=2)


def launch(problem: Problem, mask, heads=None, **values: int) -> Launch:
    chosen = template("row_traversal")
    config = Config.of(**{**chosen.default("cuda").to_dict(), **values})
    assert chosen.violation("cuda", config) is None
    heads = tuple(range(problem.q_heads)) if heads is None else heads
    bound = mask.bind(problem.q_len, problem.kv_len)
    work = build_work(chosen, config, bound, problem, GPU, heads=len(heads))
    return Launch(chosen, "cuda", config, problem, GPU, work, heads, (0,), problem.head_dim**-0.5)


@given(
    st.lists(st.integers(0, 40) | st.integers(0, 9000), max_size=300),
    st.sampled_from([0, 8, 16]),
    st.sampled_from([256, 1024]),
    st.integers(1, 500),
)
def test_every_row_is_in_one_bin_and_every_key_in_one_piece(degrees, short, long, workers):
    degrees = np.array(degrees, np.int64)
    bins = bin_rows(degrees, short=short, long=long, shape=SHAPE, workers=workers, copies=3)
    teams, warps, pieces = bins.teams.to_array(), bins.warps.to_array(), bins.piece_row
    assert sorted([*teams, *warps, *set(pieces.tolist())]) == list(range(len(degrees)))
    assert (degrees[teams] <= short).all()
    assert ((degrees[warps] > short) & (degrees[warps] <= long)).all()
    for row in set(pieces.tolist()):
        mine = np.flatnonzero(pieces == row)
        mine = mine[np.argsort(bins.piece_start[mine])]
        starts, stops, slots = bins.piece_start[mine], bins.piece_stop[mine], bins.piece_slot[mine]
        assert degrees[row] > long
        assert starts[0] == 0
        assert stops[-1] == degrees[row]
        assert (starts[1:] == stops[:-1]).all()
        if len(mine) == 1:
            assert slots.tolist() == [-1]
        else:
            merged = bins.merge_row.tolist().index(row)
            # A merge joins its slots in the order of the keys.
            assert slots.tolist() == list(range(bins.merge_indptr[merged], bins.merge_indptr[merged + 1]))
    assert bins.n_slots == (bins.piece_slot >= 0).sum()


def test_bins_that_are_runs_store_nothing():
    bins = bin_rows(np.full(100_000, 11), short=16, long=1024, shape=SHAPE, workers=500, copies=1)
    assert bins.teams.rows is None
    assert (bins.teams.first, bins.teams.count, bins.warps.count, len(bins.piece_row)) == (0, 100_000, 0, 0)


def test_short_rows_of_a_warp_are_about_as_long():
    degrees = np.tile([1, 16], 4096)
    bins = bin_rows(degrees, short=16, long=1024, shape=SHAPE, workers=500, copies=1)
    by_warp = degrees[bins.teams.to_array()].reshape(-1, SHAPE.teams)
    assert (by_warp.max(axis=1) == by_warp.min(axis=1)).all()


def test_one_heavy_row_is_shared_by_the_whole_device():
    degrees = np.array([1_000_000, *[5] * 100])
    bins = bin_rows(degrees, short=16, long=1024, shape=SHAPE, workers=GPU.units * 4, copies=1)
    pieces = bins.piece_stop - bins.piece_start
    assert len(pieces) == 64
    assert pieces.max() < 1.1 * pieces.mean()


def test_blocks_cover_the_bins():
    degrees = np.repeat([3, 100, 5000], [1001, 77, 3])
    bins = bin_rows(degrees, short=16, long=1024, shape=SHAPE, workers=1, copies=1)
    # 2 rounds of 4 teams a warp, 2 rows a warp, 4 warps a block.
    assert SHAPE.blocks(bins) == len(bins.piece_row) + -(-77 // 8) + -(-1001 // 32)


@pytest.mark.parametrize(
    ("group", "heads", "wanted"),
    [(8, range(8), 4), (2, range(4), 2), (6, range(12), 2), (4, (0, 1), 2), (4, (1, 2), 1), (1, range(4), 1)],
)
def test_heads_of_a_group_go_together(group, heads, wanted):
    heads = tuple(heads)
    q_heads = group * (max(heads) // group + 1)
    made = launch(Problem(50, 50, q_heads, q_heads // group), m.window(3, 3), heads)
    walk = forward_walk(made)
    assert walk.shape.pack == wanted
    assert walk.arrays["heads"].tolist() == list(heads[::wanted])


def test_few_rows_are_spread_over_warps():
    few = forward_walk(launch(Problem(500, 500), m.window(3, 3)))
    many = forward_walk(launch(Problem(200_000, 200_000), m.window(3, 3)))
    assert (few.shape.rows_per_warp, many.shape.rows_per_warp) == (1, 2)


@pytest.mark.parametrize(
    ("dim", "itemsize", "address", "row", "wanted"),
    [
        (64, 2, 0, 64, 16),
        (64, 2, 8, 64, 8),
        (64, 2, 2, 64, 2),
        (64, 2, 0, 65, 2),
        (64, 2, 0, 66, 4),
        (17, 2, 0, 17, 2),
        (36, 2, 0, 36, 8),
        (64, 4, 0, 64, 16),
        (3, 4, 0, 3, 4),
        (1, 2, 0, 1, 2),
    ],
)
def test_rows_are_fetched_as_wide_as_they_lie(dim, itemsize, address, row, wanted):
    assert fetch_bytes(dim, itemsize, (Placed(address, (64 * row, 8 * row, row), itemsize),)) == wanted


def test_a_partial_output_is_written_at_most_sixteen_bytes_at_a_time():
    fp32_out = Placed(0, (0, 0, 64), 4)
    assert fetch_bytes(64, 2, (Placed(0, (0, 0, 64), 2), fp32_out)) == 16
    assert fetch_bytes(64, 2, (Placed(0, (0, 0, 64), 2), replace(fp32_out, address=8))) == 4


def test_refusals():
    back, problem = cuda.backend(), Problem(64, 64)
    row = template("row_traversal")
    assert not back.serves(device("cpu"))
    assert not back.serves(device("amd-mi300x"))
    assert back.refusal(row, problem, GPU) is None
    assert "sm_80" in back.refusal(row, problem, replace(GPU, arch="sm_75"))


class StandIn:
    """What of cuda-python's driver starts a kernel, for two devices; writes down what it is asked."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="dynamic shared memory")

    def __init__(self) -> None:
        self.current, self.loaded, self.told, self.started = 0, 0, [], []

    def cuLibraryLoadData(self, content, *nothing):
        self.loaded += 1
        return 0, "library"

    def cuLibraryGetKernel(self, library, name):
        return 0, 1234

    def cuCtxGetDevice(self):
        return 0, self.current

    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        self.told.append((attribute, value, kernel, device))
        return (0,)

    def CUfunction(self, kernel):
        return kernel

    def cuLaunchKernel(self, function, *geometry):
        self.started.append((self.current, function, geometry[0], geometry[3], geometry[6]))
        return (0,)


def test_every_device_is_told_what_shared_memory_a_block_may_have(monkeypatch):
    torch = pytest.importorskip("torch")
    driver = StandIn()

    @contextlib.contextmanager
    def on(device):
        driver.current = device.index
        yield

    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda.cuda_compile, "cubin", lambda program: b"")
    made, arguments = Program("block_sparse", "sm_90", ()), ctypes.c_int(0)
    machine = cuda.Driver()
    for index, shared_bytes in ((0, 100_000), (0, 100_000), (1, 100_000), (1, 0)):
        machine.run(made, "forward", 7, 128, shared_bytes, arguments, torch.device("cuda", index))
    machine.run(made, "merge", 3, 128, 4096, arguments, torch.device("cuda", 1))
    assert driver.told == [("dynamic shared memory", 100_000, 1234, index) for index in (0, 1)]
    assert [started[0] for started in driver.started] == [0, 0, 1, 1, 1]
    assert driver.started[0][1:] == (1234, 7, 128, 100_000)
    assert driver.loaded == 2, "a kernel is one for all devices"


def test_more_blocks_than_a_grid_has_are_refused():
    kernel = cuda.backend().lower(launch(Problem(50, 50), m.window(3, 3)))
    with pytest.raises(UnsupportedError, match="2,147,483,648 blocks, and a grid has at most 2,147,483,647"):
        kernel.run(Program("row_traversal", "sm_90", ()), "forward", 2**31, 128, ctypes.c_int(0), "cpu")


def test_headers_are_printed_once_a_kernel_and_not_once_a_call(monkeypatch):
    torch = pytest.importorskip("torch")
    printed, started = [], []
    print_header = cuda_calls.score_header
    monkeypatch.setattr(
        cuda_calls, "score_header", lambda *given, **named: printed.append(1) or print_header(*given, **named)
    )
    machine = SimpleNamespace(run=lambda program, *given: started.append(program))
    monkeypatch.setattr(cuda, "machine", lambda: machine)
    made = replace(launch(Problem(50, 50), m.window(3, 3)), score=score.soft_cap(5.0))
    kernel, (q, k, v, out) = cuda.backend().lower(made), torch.randn(4, 1, 1, 50, 64)
    for _ in range(3):
        kernel(q, k, v, out, None)
    odd = torch.randn(1, 1, 50, 65)[..., 1:]
    kernel(odd, k, v, out, None)
    assert len(printed) == 2, "one for each width of the rows"
    assert len(started) == 4
    assert [dict(program.defines)["SX_K_BYTES"] for program in started] == ["16", "16", "16", "4"]


def test_both_gpu_back_ends_are_weighed():
    plan = sparsec.plan(m.random_edges(16, 0), Problem(4096, 4096, 8, 8), "nvidia-h200")
    weighed = {(each.template, each.backend) for group in plan.groups for each in group.alternatives}
    weighed |= {(step.launch.template.name, step.launch.backend) for step in plan.steps}
    assert {("row_traversal", "triton"), ("row_traversal", "cuda")} <= weighed


def test_a_back_end_can_be_asked_for():
    plan = sparsec.plan(m.random_edges(16, 0), Problem(4096, 4096), "nvidia-h200", backend="cuda")
    assert [step.launch.backend for step in plan.steps] == ["cuda"]


def test_the_source_has_the_modifier_and_the_planner_takes_every_one():
    torch = pytest.importorskip("torch")
    bound = m.window(9, 0).bind(100)
    problem = Problem(100, 100, 2, 2, dtype="bf16", needs_grad=True)
    modifier = score.chain(score.soft_cap(5.0), score.edge_bias(torch.zeros(bound.nnz, requires_grad=True)))
    made = sparsec.plan(bound, problem, "nvidia-h100", backend="cuda", score=modifier)
    source = cuda.backend().lower(made.steps[0].launch).source()
    assert "tanh" in source["score_generated.cuh"]
