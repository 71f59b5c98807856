"""The CPU back end: instruction sets, the compiler, the cache of binaries, and sizes beyond 2³¹."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
import running
import torch
from cases import HARD, Case, by_degree, case, scattered

import sparsec
from sparsec import masks as m
from sparsec.backends import cpu, cpu_kernels, reference
from sparsec.backends.base import DTYPES, backend
from sparsec.device import _ISA_LEVELS, Device, detect_cpu
from sparsec.errors import BackendMissingError, CompileError, SparsecError
from sparsec.template import Config, template

pytestmark = pytest.mark.usefixtures("two_threads")


# Instruction sets.

TILES, ROWS = "hybrid", "row_traversal"  # between them every line of the shared headers


def _lower_levels() -> list[str]:
    """The instruction sets below the one this machine has."""
    levels = list(_ISA_LEVELS[detect_cpu().arch])
    return levels[: levels.index(detect_cpu().isa)]


def _with_isa(name: str) -> Device:
    here = detect_cpu()
    return replace(here, features=_ISA_LEVELS[here.arch][name])


def _is_tried(level: str, dtype: str) -> bool:
    # AVX-512 with and without bf16 dot products differ in bf16 alone.
    return level != "avx512" or dtype == "bf16"


@pytest.fixture(scope="module")
def lower_kernels():
    """All kernels of the lower instruction sets, compiled two at a time."""
    wanted = [
        (cpu.source_files(template(name)), dtype, _with_isa(level))
        for level in _lower_levels()
        for name in (TILES, ROWS)
        for dtype in DTYPES
        if _is_tried(level, dtype)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda arguments: cpu.compiled(*arguments), wanted))


_SQUARE = scattered(65, 67, 0.3)
ISA_CASES = [
    HARD,
    case("full", m.full(), 63, 130),
    case("window", m.window(20, 5), 63, 130, heads=(4, 2), batch=2),
    *(case("short-rows", by_degree([i % 10 for i in range(41)], 40), 41, 40, d) for d in (8, 16, 32, 64, 128)),
    *(case("scattered", _SQUARE, 65, 67, d, v_dim=v) for d, v in ((1, 1), (7, 9), (17, 3), (48, 80), (256, 255))),
    case("scattered", _SQUARE, 65, 67, scale=-0.125),
    case("scattered", _SQUARE, 65, 67, scale=0.0),
    case("scattered", _SQUARE, 65, 67, magnitude=1e4),
    case("short-rows", by_degree([i % 10 for i in range(41)], 40), 41, 40, shift=1e4),
]


@pytest.mark.usefixtures("lower_kernels")
@pytest.mark.parametrize("tried", ISA_CASES, ids=lambda tried: tried.id)
@pytest.mark.parametrize("name", [TILES, ROWS])
@pytest.mark.parametrize(
    ("level", "dtype"), [(level, dtype) for level in _lower_levels() for dtype in DTYPES if _is_tried(level, dtype)]
)
def test_lower_instruction_sets(level, dtype, name, tried: Case):
    tried = tried.with_dtype(dtype)
    configs = [None]
    if name == TILES:
        configs.append(Config.of(block_q=64, block_kv=32, tile_percent=12, column_queries=2))
    for config in configs:
        made = running.launch(template(name), "cpu", tried, device=_with_isa(level), config=config)
        running.check(tried, *running.run(made, tried))


@pytest.mark.usefixtures("lower_kernels")
@pytest.mark.parametrize("level", _lower_levels()[:-1] or _lower_levels())
def test_lower_instruction_sets_keep_a_nan_to_its_rows(level):
    tried = case("nan", scattered(90, 100, 0.1), 90, 100)
    q, k, v = (tensor.clone() for tensor in running.inputs(tried))
    k[:, :, 60] = float("nan")
    attends = torch.from_numpy(tried.bound.to_dense()[:, 60])
    for name in (TILES, ROWS):
        out, lse = running.poisoned(tried)
        backend("cpu").lower(running.launch(template(name), "cpu", tried, device=_with_isa(level)))(q, k, v, out, lse)
        assert torch.equal(torch.isnan(out[0, 0]).all(1), attends)
        assert torch.equal(torch.isnan(out[0, 0]).any(1), attends)
        assert torch.equal(torch.isnan(lse[0, 0]), attends)


def test_an_instruction_set_that_is_not_there_in_full_is_not_used():
    here = detect_cpu()
    if here.arch != "x86-64":
        pytest.skip("about x86-64")
    # The first processors with AVX-512 lacked its byte, word and short-vector forms, which the kernels use.
    knights_landing = replace(here, features=_ISA_LEVELS["x86-64"]["avx2"] | {"avx512f"})
    assert cpu.isa_flags(knights_landing) == cpu.isa_flags(_with_isa("avx2"))
    without_fma = replace(here, features=frozenset({"sse2", "avx2"}))
    assert cpu.isa_flags(without_fma) == cpu.isa_flags(_with_isa("sse2"))


def test_isa_variable_reaches_the_compiler(kernel_cache):
    level = "sse2" if detect_cpu().arch == "x86-64" else "neon"
    program = """
        import torch, sparsec
        from sparsec import masks as m
        from sparsec.backends import cpu
        from sparsec.device import detect_cpu
        q = torch.randn(1, 1, 50, 16)
        attn = sparsec.compile(m.window(5, 5), 50, template="row_traversal")
        out = attn(q, q, q)
        scores = (q @ q.mT / 4).masked_fill(~torch.from_numpy(m.window(5, 5).bind(50).to_dense()), -torch.inf)
        assert torch.allclose(out, torch.softmax(scores, -1) @ q, atol=1e-5)
        print(cpu.isa_flags(detect_cpu()), attn.plan.device.key)
    """
    done = _in_process(program, SPARSEC_ISA=level)
    assert done.returncode == 0, done.stderr
    assert str(cpu.isa_flags(_with_isa(level))) in done.stdout
    assert level in done.stdout


def _in_process(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


# The cache of binaries. A small source stands for a kernel: what is cached does not matter.

KERNEL = 'extern "C" long sx_abi() { return %d; }\nextern "C" void forward(const void*) {}\n'


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def small(tmp_path) -> tuple[Path, ...]:
    source = tmp_path / "small" / "kernel_cpu.cpp"
    source.parent.mkdir()
    source.write_text(KERNEL % 1)
    return (source,)


@pytest.fixture
def logging_compiler(tmp_path, monkeypatch):
    """`$CXX` as a script that notes every compilation; gives how often it compiled."""
    script, log = tmp_path / "noting-cxx", tmp_path / "compilations"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo x >> "{log}";; esac\nexec {_found()} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    cpu.compiler.cache_clear()
    yield lambda: len(log.read_text().split()) if log.exists() else 0
    cpu.compiler.cache_clear()


def _found() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or ""


def test_a_kernel_is_compiled_once(own_cache, small, logging_compiler):
    first = cpu.compiled(small, "fp32", detect_cpu())
    assert cpu.compiled(small, "fp32", detect_cpu()) == first
    assert logging_compiler() == 1
    assert cpu.compiled(small, "bf16", detect_cpu()) != first
    small[0].write_text(KERNEL % 2)
    assert cpu.compiled(small, "fp32", detect_cpu()) != first
    assert cpu.compiled(small, "fp32", detect_cpu(), defines=("-DX",)) != first
    assert logging_compiler() == 4


def test_a_changed_header_compiles_again(own_cache, small, tmp_path):
    header = tmp_path / "small" / "a.hpp"
    header.write_text("")
    first = cpu.compiled((*small, header), "fp32", detect_cpu())
    header.write_text("// changed\n")
    assert cpu.compiled((*small, header), "fp32", detect_cpu()) != first


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x7fELF" + os.urandom(5000)),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff"),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".sha256").unlink(),
        lambda path: path.with_suffix(".sha256").write_text("0" * 64),
        lambda path: path.with_suffix(".sha256").write_bytes(b"\xff\xfe"),
    ],
    ids=["half", "empty", "noise", "one-byte", "gone", "no-digest", "wrong-digest", "digest-of-noise"],
)
def test_a_damaged_binary_is_compiled_again(damage, own_cache, small, logging_compiler, caplog):
    path = cpu.compiled(small, "fp32", detect_cpu())
    whole = path.read_bytes()
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert cpu.compiled(small, "fp32", detect_cpu()) == path
    assert logging_compiler() == 2
    assert path.read_bytes() == whole
    assert cpu.compiled(small, "fp32", detect_cpu()) == path
    assert logging_compiler() == 2


def test_concurrent_processes_compile_a_kernel_once(own_cache, small, logging_compiler):
    program = f"""
        from pathlib import Path
        from sparsec.backends import cpu
        from sparsec.device import detect_cpu
        print(cpu.compiled((Path({str(small[0])!r}),), "fp32", detect_cpu()))
    """
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: _in_process(program), range(4)))
    assert [each.stderr for each in done] == [""] * 4
    assert len({each.stdout for each in done}) == 1
    assert logging_compiler() == 1
    leftovers = [path.name for path in (own_cache / "cpu").iterdir() if path.suffix not in (".so", ".sha256", ".lock")]
    assert leftovers == []


def test_the_cache_is_the_users_alone(own_cache, small):
    path = cpu.compiled(small, "fp32", detect_cpu())
    for made in (own_cache, own_cache / "cpu"):
        assert made.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0


def test_a_cache_that_others_can_write_to_is_refused(own_cache):
    own_cache.mkdir()
    own_cache.chmod(0o777)
    attn = sparsec.compile(m.window(3, 3), 20, template="row_traversal")
    with pytest.raises(SparsecError, match=r"cache directory .* mode 0777.*chmod 700"):
        attn(*(torch.randn(1, 1, 20, 8) for _ in range(3)))
    assert list(own_cache.iterdir()) == []


def test_a_foreign_cache_is_refused(own_cache, monkeypatch):
    own_cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: own_cache.stat().st_uid + 1)
    attn = sparsec.compile(m.window(3, 3), 20, template="row_traversal")
    with pytest.raises(SparsecError, match=r"belongs to user \d+.*set SPARSEC_CACHE_DIR"):
        attn(*(torch.randn(1, 1, 20, 8) for _ in range(3)))


def test_a_cache_that_is_a_file_is_refused(own_cache):
    own_cache.write_text("")
    with pytest.raises(SparsecError, match="SPARSEC_CACHE_DIR"):
        sparsec.compile(m.window(3, 3), 20, q_heads=1, head_dim=8, dtype="fp32", template="row_traversal")


def test_a_file_where_a_folder_of_the_cache_belongs_is_told(own_cache, small):
    own_cache.mkdir(mode=0o700)
    (own_cache / "cpu").write_text("")
    with pytest.raises(SparsecError, match="cpu"):
        cpu.compiled(small, "fp32", detect_cpu())


# The compiler.


@pytest.fixture
def compiler_of(monkeypatch):
    def set_compiler(command: str) -> None:
        monkeypatch.setenv("CXX", command)
        cpu.compiler.cache_clear()

    yield set_compiler
    cpu.compiler.cache_clear()


def test_no_compiler(compiler_of):
    compiler_of("/nonexistent/c++")
    with pytest.raises(BackendMissingError, match=r"CXX is '/nonexistent/c\+\+'.*install a C\+\+17 compiler"):
        cpu.compiler()
    attn = sparsec.compile(m.window(3, 3), 20)
    with pytest.raises(BackendMissingError, match=r"cpu back end.*install a C\+\+17 compiler.*set CXX"):
        attn(*(torch.randn(1, 1, 20, 8) for _ in range(3)))


def test_no_compiler_on_the_path(compiler_of, monkeypatch, tmp_path):
    compiler_of("")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendMissingError, match=r"neither g\+\+ nor clang\+\+ is on the PATH"):
        cpu.compiler()


def test_a_compiler_that_fails_to_run(compiler_of, tmp_path):
    broken = tmp_path / "broken-cxx"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    compiler_of(str(broken))
    with pytest.raises(BackendMissingError, match="does not run"):
        cpu.compiler()


def test_the_compiler_of_the_environment_is_used(own_cache, small, logging_compiler):
    assert cpu.compiler().command[0].endswith("noting-cxx")
    assert cpu.backend().toolchain() == cpu.compiler().version
    cpu.compiled(small, "fp32", detect_cpu())
    assert logging_compiler() == 1


def test_a_compiler_with_arguments(own_cache, small, compiler_of):
    compiler_of(f"{_found()} -DEXTRA")
    small[0].write_text(KERNEL % 1 + "#ifndef EXTRA\n#error no extra\n#endif\n")
    assert cpu.compiled(small, "fp32", detect_cpu()).is_file()


def test_an_error_of_the_compiler_is_told_with_path_and_log(own_cache, small):
    small[0].write_text("this is no C++;\n")
    with pytest.raises(CompileError, match=r"could not compile kernel_cpu\.cpp") as caught:
        cpu.compiled(small, "fp32", detect_cpu())
    assert caught.value.source == small[0]
    assert "error" in caught.value.log
    assert str(small[0]) in str(caught.value)
    assert "compiler log" in str(caught.value)
    assert not list((own_cache / "cpu").glob("*.so"))


def test_a_kernel_of_another_interface_is_refused(own_cache, small):
    path = cpu.compiled(small, "fp32", detect_cpu())
    with pytest.raises(CompileError, match="takes 1 bytes of arguments"):
        cpu._load(path, small[0])


def test_clang(own_cache, compiler_of):
    if shutil.which("clang++") is None:
        pytest.skip("no clang++ here")
    compiler_of("clang++")
    for name, dtype in ((ROWS, "fp32"), (TILES, "bf16")):
        tried = HARD.with_dtype(dtype)
        running.check(tried, *running.run(running.launch(template(name), "cpu", tried), tried))


# Threads.


def test_kernels_use_the_threads_of_torch():
    assert cpu_kernels.openmp_parallel() is not None


@pytest.mark.parametrize("name", [TILES, ROWS])
def test_one_thread_where_torch_brings_no_openmp(name, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "openmp_parallel", lambda: None)
    running.check(HARD, *running.run(running.launch(template(name), "cpu", HARD), HARD))


def test_what_a_kernel_holds():
    rows = backend("cpu").lower(running.launch(template(ROWS), "cpu", HARD))
    assert rows.launch.work.rows.nbytes <= rows.nbytes
    long = case("one-row", m.full(), 1, 200_000, 8)
    split = backend("cpu").lower(running.launch(template(ROWS), "cpu", long))
    assert split.nbytes > split.launch.work.schedule.n_slots * (long.problem.v_dim + 2) * 4 > 0


# More than 2³¹ edges.


def test_more_than_two_to_the_31_edges():
    q_len, reach = 300_000, 8000
    bound = m.window(reach, 0).bind(q_len)
    assert bound.nnz > 2**31
    q, k, v = (torch.randn(1, 1, q_len, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    attn = sparsec.compile(bound)
    out, lse = attn(q, k, v, return_lse=True)
    _check_sampled(bound, q, k, v, out, lse, np.array([0, 1, 8000, 8001, 150_000, 268_500, q_len - 1]))
    assert attn.plan.layout_bytes < 2**26


def test_rows_after_two_to_the_31_edges():
    # Only the last work items of a row kernel: the edges before them are counted, and cost nothing.
    q_len, reach = 300_000, 8000
    tried = case("long", m.window(reach, 0), q_len, q_len, 4)
    made = running.launch(template(ROWS), "cpu", tried)
    schedule, block_q = made.work.schedule, made.work.block_q
    last = np.flatnonzero(schedule.unit >= (q_len - 1000) // block_q)
    kept = replace(
        schedule, **{name: getattr(schedule, name)[last] for name in ("unit", "start", "stop", "slot", "cost")}
    )
    out, lse = running.run(replace(made, work=replace(made.work, schedule=kept)), tried)
    rows = np.arange(q_len - 900, q_len, 101)
    _check_sampled(tried.bound, *running.inputs(tried), out, lse, rows)
    assert torch.isnan(out[0, 0, : q_len - 2000]).all()


def _check_sampled(bound, q, k, v, out, lse, rows) -> None:
    arrays = (tensor[0, 0].double().numpy() for tensor in (q, k, v))
    expected, expected_lse = reference.attention(*arrays, bound, q.shape[3] ** -0.5, rows)
    assert np.abs(out[0, 0, rows].double().numpy() - expected).max() < 2e-6
    assert np.abs(lse[0, 0, rows].double().numpy() - expected_lse).max() < 5e-6


@pytest.mark.parametrize(
    ("heads", "group", "sharing"),
    [
        ((0, 1, 2, 3), 4, 4),
        ((0, 2, 4, 6), 4, 2),
        ((0, 1, 4), 4, 1),
        (tuple(range(12)), 12, 6),
        (tuple(range(32)), 32, 8),
        ((3,), 1, 1),
    ],
)
def test_heads_that_share_keys_go_side_by_side(heads, group, sharing):
    assert cpu_kernels.heads_sharing(heads, group) == sharing
