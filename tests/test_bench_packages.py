"""What GPU packages are asked for, by stand-ins that do in fp64 what each package documents; and times of a device.

No package has to be installed and no GPU has to be there: the stand-ins take the arguments by the packages' own names.
"""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import bench_suite  # noqa: E402
from bench import measure, names, peers, protocol, results, shapes, tables  # noqa: E402
from bench.grid import Case, Effort, MaskSource, find_grid, load_grid  # noqa: E402
from bench.peers import Prepared, RefusedError, peer  # noqa: E402
from bench.protocol import WARM, DeviceClock, interleaved, timed_ns  # noqa: E402
from bench.workload import make_workload  # noqa: E402
from gate import timing  # noqa: E402

from sparsec.device import devices  # noqa: E402
from sparsec.errors import BackendMissingError  # noqa: E402

QUICK = Effort(seconds=0.001, min_repeats=2, max_repeats=2)
PACKAGES = ("flash_attn", "flash_attn:3", "flashinfer", "flashinfer:blocks", "natten", "xformers", "magi")


def _silent(*_):
    pass


def _work(mask, *, length=64, dtype="bf16", heads=4, kv_heads=2, **options):
    source = mask if isinstance(mask, MaskSource) else MaskSource("text", mask)
    own = None if mask.startswith(("neighborhood", "documents(")) else length
    case = Case("tiny", "attention", source, own, heads, kv_heads, 16, dtype=dtype, **options)
    return replace(make_workload(case), device="cuda")


def _verdict(name, work):
    ready = measure._Ready(peer(name).prepare(work), work)
    return measure._Checked(work).verdict(ready, ready())


# Stand-ins: tensors are `[batch, tokens, heads, head_dim]`.


def _dense(q, k, v, allowed, scale):
    k, v = (tensor.repeat_interleave(q.shape[2] // tensor.shape[2], 2) for tensor in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double()).to(q.dtype)


def _places(n_q, n_kv):
    return torch.arange(n_q)[:, None], torch.arange(n_kv)[None]


def _bottom_right(n_q, n_kv, left, right):
    """A negative end is no end."""
    q, kv = _places(n_q, n_kv)
    at = q + n_kv - n_q
    return ((kv >= at - left) | (left < 0)) & ((kv <= at + right) | (right < 0))


def _flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    left, right = window_size
    return _dense(q, k, v, _bottom_right(q.shape[1], k.shape[1], left, 0 if causal else right), softmax_scale)


def _flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    parts = [
        _flash_attn_func(q[None, a:b], k[None, a:b], v[None, a:b], 0.0, softmax_scale, causal)[0]
        for a, b in zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist()[1:], strict=False)
    ]
    return torch.cat(parts)


def _with_lse(function):
    return lambda *arguments, **options: (function(*arguments, **options), None)


def _single_prefill(q, k, v, custom_mask=None, causal=False, kv_layout="NHD", sm_scale=None, window_left=-1):
    assert kv_layout == "NHD"
    allowed = _bottom_right(len(q), len(k), window_left, 0 if causal else -1) if custom_mask is None else custom_mask
    return _dense(q[None], k[None], v[None], allowed, sm_scale)[0]


class _BlockSparse:
    def __init__(self, float_workspace_buffer, backend="auto"):
        assert float_workspace_buffer.dtype == torch.uint8

    def plan(
        self,
        indptr,
        indices,
        M,
        N,
        R,
        C,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        mask=None,
        sm_scale=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type="float16",
    ):
        assert M % R == 0
        assert N % C == 0
        assert q_data_type == kv_data_type == o_data_type == torch.bfloat16
        self.scale, self.allowed = sm_scale, torch.zeros(M, N, dtype=torch.bool)
        self.shapes = [(M, num_qo_heads, head_dim), (N, num_kv_heads, head_dim)]
        for row in range(M // R):
            for at in range(int(indptr[row]), int(indptr[row + 1])):
                first = int(indices[at]) * C
                block = True if mask is None else mask[at]
                self.allowed[row * R : (row + 1) * R, first : first + C] = block

    def run(self, q, k, v):
        assert [tuple(q.shape), tuple(k.shape)] == self.shapes
        return _dense(q[None], k[None], v[None], self.allowed, self.scale)[0]


def _window_of(size, kernel, dilation, causal):
    """Who attends whom along one dimension: windows of a residue class shift at its ends, unless they are causal."""
    allowed = torch.zeros(size, size, dtype=torch.bool)
    for residue in range(dilation):
        own = list(range(residue, size, dilation))
        for at, query in enumerate(own):
            first = max(0, at - kernel + 1) if causal else min(max(at - kernel // 2, 0), len(own) - kernel)
            for key in own[first : at + 1 if causal else first + kernel]:
                allowed[query, key] = True
    return allowed


def _natten(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None):
    grid = query.shape[1:-2]
    assert set(stride) == {1}
    assert query.shape == key.shape
    allowed = torch.ones(1, 1, dtype=torch.bool)
    for axis in zip(grid, kernel_size, dilation, is_causal, strict=True):
        allowed = torch.kron(allowed.int(), _window_of(*axis).int()).bool()
    flat = (tensor.flatten(1, len(grid)) for tensor in (query, key, value))
    return _dense(*flat, allowed, scale).unflatten(1, grid)


class _LowerTriangularMask:
    def allowed(self, n_q, n_kv):
        q, kv = _places(n_q, n_kv)
        return kv <= q


class _LocalAttentionFromBottomRightMask:
    def __init__(self, window_left, window_right):
        self.ends = (window_left, window_right)

    def allowed(self, n_q, n_kv):
        return _bottom_right(n_q, n_kv, *self.ends)


class _BlockDiagonalMask:
    def __init__(self, lengths, is_causal=False):
        self.lengths, self.is_causal = lengths, is_causal

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None):
        return cls(q_seqlen)

    def make_causal(self):
        return _BlockDiagonalMask(self.lengths, True)

    def allowed(self, n_q, n_kv):
        blocks = [torch.ones(n, n, dtype=torch.bool) for n in self.lengths]
        return torch.block_diag(*(block.tril() if self.is_causal else block for block in blocks)).bool()


def _memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    if query.ndim == 5:
        assert query.shape == key.shape
        query, key, value = (tensor.flatten(2, 3) for tensor in (query, key, value))
        return _memory_efficient_attention(query, key, value, attn_bias, p, scale)
    assert query.shape[2] == key.shape[2]
    assert not isinstance(attn_bias, _BlockDiagonalMask) or len(query) == 1
    shape = (query.shape[1], key.shape[1])
    allowed = torch.ones(shape, dtype=torch.bool) if attn_bias is None else attn_bias.allowed(*shape)
    return _dense(query, key, value, allowed, scale)


def _flex_flash_attn_func(
    q, k, v, q_ranges, k_ranges, attn_type_map=None, *, softmax_scale=None, disable_fwd_atomic_reduction=False
):
    allowed = torch.zeros(len(q), len(k), dtype=torch.bool)
    for (a, b), (c, d), kind in zip(q_ranges.tolist(), k_ranges.tolist(), attn_type_map.tolist(), strict=True):
        i, j = _places(b - a, d - c)
        causal, inverse = j <= i + (d - c) - (b - a), j >= i
        part = [torch.ones(b - a, d - c, dtype=torch.bool), causal, inverse, causal & inverse][kind]
        assert not (allowed[a:b, c:d] & part).any(), "a pair lies in two slices"
        allowed[a:b, c:d] |= part
    if disable_fwd_atomic_reduction:
        starts = sorted(q_ranges.tolist())
        assert all(before[1] <= after[0] for before, after in pairwise(starts))
    return _dense(q[None], k[None], v[None], allowed, softmax_scale)[0], SimpleNamespace(lse=None)


STAND_INS = {
    "flash_attn": {"flash_attn_func": _flash_attn_func, "flash_attn_varlen_func": _flash_attn_varlen_func},
    "flash_attn_interface": {
        "flash_attn_func": _with_lse(_flash_attn_func),
        "flash_attn_varlen_func": _with_lse(_flash_attn_varlen_func),
    },
    "flashinfer": {"single_prefill_with_kv_cache": _single_prefill, "BlockSparseAttentionWrapper": _BlockSparse},
    "natten": {"na1d": _natten, "na2d": _natten, "na3d": _natten},
    "xformers.ops": {"memory_efficient_attention": _memory_efficient_attention},
    "xformers.ops.fmha.attn_bias": {
        "LowerTriangularMask": _LowerTriangularMask,
        "LocalAttentionFromBottomRightMask": _LocalAttentionFromBottomRightMask,
        "BlockDiagonalMask": _BlockDiagonalMask,
    },
    "magi_attention.api": {"flex_flash_attn_func": _flex_flash_attn_func},
}


@pytest.fixture
def installed(monkeypatch):
    for name, content in STAND_INS.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


DOCUMENTS = "documents([20, 5, 39])"
BANDS = ("full()", "causal()", "window(7, 0)", "window(7, 3)", "window(0, 9)", "window(63, 2)", "window(4, 63)")
COMPUTED = [
    *((name, mask) for name in ("flash_attn", "flash_attn:3", "flashinfer", "xformers") for mask in BANDS),
    *(("magi", mask) for mask in (*BANDS, "bigbird(16, 3, 1, 1, 0)", "random_blocks(2, 16, 3)")),
    *(
        (n, m)
        for n in ("flash_attn", "flash_attn:3", "xformers", "magi")
        for m in (DOCUMENTS, f"{DOCUMENTS} & causal()")
    ),
    *(("flashinfer", mask) for mask in ("random_edges(5, 0)", "dilated(20, 4)")),
    *(("flashinfer:blocks", mask) for mask in ("bigbird(16, 3, 1, 1, 0)", "random_edges(5, 0)", "window(7, 3)")),
    ("natten", "neighborhood(30, 5)"),
    ("natten", "neighborhood(30, 4, dilation=3)"),
    ("natten", "neighborhood((6, 9), (3, 4), causal=(True, False))"),
    ("natten", "neighborhood((3, 4, 5), (2, 3, 5))"),
]


@pytest.mark.parametrize(("name", "mask"), COMPUTED)
def test_each_package_is_asked_for_the_mask(installed, name, mask):
    batch = 1 if name.startswith("flashinfer") else 2
    verdict = _verdict(name, _work(mask, batch=batch))
    assert verdict.is_exact, verdict


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("flash_attn", "window(7, 3)"),
        ("flash_attn:3", DOCUMENTS),
        ("xformers", "causal()"),
        ("xformers", DOCUMENTS),
        ("natten", "neighborhood((6, 9), (3, 4))"),
        ("magi", "window(7, 3)"),
    ],
)
def test_gradients_come_back_in_each_packages_layout(installed, name, mask):
    verdict = _verdict(name, _work(mask, batch=2, direction="forward_backward"))
    assert verdict.is_exact, verdict


def test_a_misunderstood_argument_shows_as_a_wrong_result(installed, monkeypatch):
    def exclusive(*tensors, window_size, **options):
        return _flash_attn_func(*tensors, window_size=(window_size[0] - 1, window_size[1]), **options)

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", exclusive)
    assert not _verdict("flash_attn", _work("window(7, 3)")).is_exact


@pytest.mark.parametrize(
    ("name", "mask", "options", "reason"),
    [
        ("flash_attn", "causal()", {"dtype": "fp32"}, "fp16 and bf16"),
        ("flash_attn", "dilated(20, 4)", {}, "this mask is none of them"),
        ("flashinfer", "causal()", {"batch": 2}, "one sequence at a time"),
        ("flashinfer:blocks", "causal()", {"direction": "forward_backward"}, "no backward pass"),
        ("flashinfer:blocks", "causal()", {"length": 65}, "whole blocks"),
        ("natten", "window(7, 7)", {}, "neighbourhoods on grids"),
        ("xformers", "random_edges(5, 0)", {}, "this mask is none of them"),
        ("magi", "random_edges(5, 0)", {}, "no union of such"),
        ("magi", "window(40, 40)", {}, "no union of such"),
        ("magi", "per_head([causal(), full(), causal(), full()])", {}, "this one varies"),
        ("sdpa:math", "window(7, 0)", {}, "full or causal"),
    ],
)
def test_what_a_package_does_not_compute_is_refused(installed, name, mask, options, reason):
    with pytest.raises(RefusedError, match=reason):
        peer(name).prepare(_work(mask, **options))


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_there_says_so(monkeypatch, name):
    mask = "neighborhood(30, 5)" if name == "natten" else "causal()"
    roots = {module.partition(".")[0] for module in STAND_INS}

    def find_spec(module, path=None, target=None):
        if module.partition(".")[0] in roots:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    for module in [module for module in sys.modules if module.partition(".")[0] in roots]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=find_spec), *sys.meta_path])
    work = _work(mask)
    with pytest.raises(RefusedError, match="is not installed"):
        peer(name).prepare(work)
    with pytest.raises(RefusedError, match="GPUs only"):
        peer(name).prepare(replace(work, device="cpu"))


@pytest.mark.parametrize("name", ["sdpa", "sdpa:flash", "sdpa:math", "sdpa_masked", "sdpa_masked:math"])
def test_torchs_back_ends_are_asked_for_one_by_one(name):
    assert _verdict(name, _work("causal()", batch=2)).is_exact


def test_a_back_end_of_torch_without_a_kernel_is_skipped():
    # Its tensors lie on the CPU, which this back end does not serve.
    prepared = peer("sdpa:cudnn").prepare(_work("causal()"))
    with pytest.raises(RefusedError, match="no kernel of its cudnn back end"):
        prepared.call()


def test_every_variant_has_a_peer_of_its_name():
    for name in [*names.FAMILIES, *(f"{head}:{each}" for head, kinds in names.VARIANTS.items() for each in kinds)]:
        if name not in ("cold", "warm"):
            assert peer(name).name == name


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        ("full()", shapes.Band(None, None)),
        ("causal()", shapes.Band(None, 0)),
        ("window(7, 3)", shapes.Band(7, 3)),
        ("~causal()", None),
        ("window(7, 3) - window(1, 1)", None),
        ("dilated(20, 4)", None),
        ("global_tokens(3)", None),
    ],
)
def test_bands(mask, found):
    assert shapes.band(_work(mask).bound) == found


# A GPU, pretended: tensors stay where they are.


@pytest.fixture
def pretended_gpu(monkeypatch, installed):
    def no_peak(*_):
        raise BackendMissingError("there is no device")

    clocks = SimpleNamespace(clocks={"": timed_ns, WARM: timed_ns})
    monkeypatch.setattr(measure, "make_workload", lambda case, device: replace(make_workload(case), device=device))
    monkeypatch.setattr(measure, "peak_memory", lambda device: protocol.PeakMemory())
    monkeypatch.setattr(measure, "detect_gpu", lambda: None)
    monkeypatch.setattr(measure, "DeviceClock", lambda device: clocks)
    monkeypatch.setattr(measure, "device_peak_call", no_peak)
    monkeypatch.setattr(measure, "gather_call", lambda work: lambda: None)
    monkeypatch.setattr(measure, "device_answers", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def _measure(*peers, make_peer=peer):
    case = Case("tiny", "attention", MaskSource("text", "causal()"), 64, 2, head_dim=16, dtype="bf16", peers=peers)
    return measure.measure_case(case, QUICK, torch.get_num_threads(), _silent, make_peer=make_peer, device="cuda")


def test_on_a_gpu_each_peer_has_times_with_a_cold_and_a_warm_cache(pretended_gpu):
    row = _measure("ours", "flash_attn", "magi", "natten", "sdpa_masked")
    status = dict.fromkeys(("ours", "flash_attn", "magi", "sdpa_masked"), "ok") | {"natten": "skipped"}
    assert {each.peer: each.status for each in row.peers} == status
    assert all(each.warm.repeats == 2 for each in row.peers if each.status == "ok")
    assert row.gather_bytes_per_s > 0
    assert results.decode(results.CaseRow, row.to_dict(), "") == row
    assert "warm L2" in tables.attention_table([row])
    on_cpu = replace(row, peers=tuple(replace(each, warm=None) for each in row.peers))
    assert not any("warm" in each for each in on_cpu.to_dict()["peers"])
    assert "warm L2" not in tables.attention_table([on_cpu])


def _raising(error, calls=0):
    """The stand-in of flash-attn, which raises after so many calls."""

    class Failing:
        def prepare(self, work):
            prepared = peer("flash_attn").prepare(work)
            made = []

            def call():
                made.append(1)
                if len(made) > calls:
                    raise error
                return prepared.call()

            return Prepared(call, work.bound, prepared.to_out, inputs=prepared.inputs)

    return lambda name: Failing() if name == "flash_attn" else peer(name)


@pytest.mark.parametrize("calls", [0, 3])
def test_a_device_out_of_memory_costs_one_row(pretended_gpu, calls):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB.")
    row = _measure("flash_attn", "magi", make_peer=_raising(error, calls))
    assert row.row("flash_attn").status == "failed"
    assert row.row("flash_attn").reason.startswith("out of memory")
    assert row.row("magi").us is not None


@pytest.mark.parametrize("calls", [0, 3])
def test_a_ruined_device_ends_the_process_so_that_the_others_get_another(pretended_gpu, monkeypatch, calls):
    monkeypatch.setattr(measure, "device_answers", lambda: False)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(measure.DeviceLostError, match="illegal memory access"):
        _measure("flash_attn", "magi", make_peer=_raising(error, calls))


class _Events:
    """A device's events, and a buffer to flush with: what happened, in order; each call takes 2.5 ms."""

    def __init__(self, monkeypatch):
        log = self.log = []
        self.bytes = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("record")

            def synchronize(self):
                log.append("wait")

            def elapsed_time(self, other):
                return 2.5

        def empty(n_bytes, dtype, device):
            assert (dtype, device) == (torch.uint8, "cuda")
            self.bytes.append(n_bytes)
            return SimpleNamespace(zero_=lambda: log.append("flush"))

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
        monkeypatch.setattr(torch, "empty", empty)


def test_a_cold_call_follows_a_flush_and_a_warm_one_the_same_call(monkeypatch):
    events = _Events(monkeypatch)
    clocks = DeviceClock(devices()[1]).clocks
    for ending, before in (("", "flush"), (WARM, "call")):
        events.log.clear()
        assert clocks[ending](lambda: events.log.append("call")) == 2_500_000
        assert events.log == [before, "sleep", "record", "call", "record", "wait"]


def test_the_flush_is_larger_than_the_last_cache_of_any_device(monkeypatch):
    events = _Events(monkeypatch)
    for device in devices()[1:]:
        DeviceClock(device)
        assert events.bytes[-1] >= max(2**28, 2 * device.l2_bytes, 2 * device.l3_bytes)


def test_both_clocks_time_every_call_in_turn():
    order = []
    clocks = {"": lambda call: call() or 1000, WARM: lambda call: call() or 500}
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleaved(calls, Effort(seconds=1e-9, min_repeats=2, max_repeats=2), _silent, clocks)
    told = "".join(order)
    assert told[:8] == "aaaabbbb"
    assert {told[8:12], told[12:]} <= {"aabb", "bbaa"}
    assert {name: each.median_us for name, each in times.items()} == {"a": 1.0, "a warm": 0.5, "b": 1.0, "b warm": 0.5}


def _gate_case(*peers):
    grid = load_grid(find_grid("gpu_figures"))
    case = Case("tiny", "attention", MaskSource("text", "causal()"), 64, 2, head_dim=16, dtype="bf16", peers=peers)
    return replace(grid, effort=QUICK), case


def test_the_gate_times_by_the_suite_and_fails_where_ours_does(pretended_gpu, monkeypatch):
    found = timing.measured(*_gate_case("ours", "flash_attn", "natten"))
    assert "status" not in found
    row = results.decode(results.CaseRow, found["row"], "")
    assert [each.status for each in row.peers] == ["ok", "ok", "skipped"]
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", lambda q, *_, **__: q)
    found = timing.measured(*_gate_case("ours", "flash_attn"))
    assert "status" not in found
    assert found["row"]["peers"][1]["status"] == "wrong"
    monkeypatch.setattr(peers.Ours, "prepare", lambda self, work: Prepared(lambda: work.q, work.bound))
    found = timing.measured(*_gate_case("ours"))
    assert found["status"] == "failed"
    assert "ours wrong: off by" in found["error"]


def test_the_gate_leaves_out_whom_it_has_lost_and_tells_whom_it_is_busy_with(pretended_gpu):
    told = []
    lost = {"flash_attn": "its process was lost"}
    found = timing.measured(*_gate_case("ours", "flash_attn"), lambda who, stage: told.append((who, stage)), lost)
    assert found["row"]["peers"][1]["reason"] == "its process was lost"
    assert {who for who, _ in told} == {"", "ours", measure.GATHER}
    assert ("ours", "call") in told


def test_a_grid_for_a_gpu_says_that_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out.json"
    done = CliRunner().invoke(bench_suite.main, ["run", "--grid", "gpu_forward", "--device", "gpu", "--out", str(out)])
    assert done.exit_code == 1
    assert "sees none" in done.output
    assert not out.exists()
