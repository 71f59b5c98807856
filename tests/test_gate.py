"""The verification gate: a pass is remembered, a wrong kernel is never served."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import sparsec
from sparsec import data, gate, score
from sparsec import masks as m
from sparsec.backends import cpu
from sparsec.backends import torch as torch_backend
from sparsec.backends.base import DTYPES
from sparsec.device import detect_cpu, device
from sparsec.errors import CompileError
from sparsec.template import template, templates

pytestmark = pytest.mark.usefixtures("two_threads")

CPU_TEMPLATES = [name for name, made in templates().items() if "cpu" in made.backends()]


@pytest.fixture
def forgetful(monkeypatch):
    """A process that has seen no kernel pass."""
    monkeypatch.setattr(gate, "_passed", set())


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPARSEC_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def own_templates(tmp_path, monkeypatch):
    """A copy of the templates that a test may spoil."""
    folder = tmp_path / "templates"
    shutil.copytree(data.templates_dir(), folder)
    monkeypatch.setattr(data, "templates_dir", lambda: folder)
    templates.cache_clear()
    yield folder
    monkeypatch.undo()
    templates.cache_clear()


@pytest.fixture
def checks(monkeypatch):
    """The checks that ran, without running them."""
    ran: list[tuple[str, str, str]] = []

    def check(each, backend_name, dtype, *_):
        ran.append((each.name, backend_name, dtype))

    monkeypatch.setattr(gate, "check", check)
    return ran


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CPU_TEMPLATES)
def test_every_kernel_passes(name, dtype):
    assert gate.check(template(name), "cpu", dtype, detect_cpu()) is None


@pytest.mark.usefixtures("own_cache", "forgetful")
def test_a_pass_is_remembered_in_the_process_and_beyond(checks, monkeypatch):
    rows = template("row_traversal")
    for _ in range(3):
        gate.ensure(rows, "cpu", "fp32", detect_cpu())
    assert checks == [("row_traversal", "cpu", "fp32")]
    monkeypatch.setattr(gate, "_passed", set())
    gate.ensure(rows, "cpu", "fp32", detect_cpu())
    assert len(checks) == 1


@pytest.mark.usefixtures("own_cache", "forgetful")
def test_a_pass_is_for_one_template_dtype_and_device(checks):
    here = detect_cpu()
    gate.ensure(template("row_traversal"), "cpu", "fp32", here)
    gate.ensure(template("row_traversal"), "cpu", "bf16", here)
    gate.ensure(template("block_sparse"), "cpu", "fp32", here)
    gate.ensure(template("row_traversal"), "cpu", "fp32", replace(here, features=frozenset({"sse2"})))
    assert len(checks) == 4


@pytest.mark.usefixtures("own_cache", "forgetful")
def test_a_pass_is_for_one_toolchain(checks, monkeypatch):
    gate.ensure(template("row_traversal"), "cpu", "fp32", detect_cpu())
    monkeypatch.setattr(cpu.CpuBackend, "toolchain", lambda self: "another compiler 1.0")
    gate.ensure(template("row_traversal"), "cpu", "fp32", detect_cpu())
    assert len(checks) == 2


@pytest.mark.usefixtures("own_cache", "forgetful")
def test_a_pass_is_for_one_score_modifier(checks):
    for modifier in (None, score.soft_cap(3.0), score.soft_cap(4.0), None, score.soft_cap(3.0)):
        gate.ensure(template("row_traversal"), "cpu", "fp32", detect_cpu(), "forward", modifier)
    assert len(checks) == 3


@pytest.mark.parametrize(
    ("got", "is_refused"), [(1.0, False), (1.1, False), (1.2, True), (math.nan, True), (math.inf, True)]
)
def test_what_is_no_number_is_wrong(got, is_refused):
    wanted = np.array([1.0, -math.inf])
    told = gate._worst(("the output",), (np.array([got, -math.inf]),), (wanted,), (0.15,))
    assert (told is not None) is is_refused
    assert gate._worst(("the output",), (np.array([1.0, 5.0]),), (wanted,), (0.15,)) is not None


@pytest.mark.usefixtures("own_cache", "forgetful")
def test_the_reference_needs_no_check_and_torch_one_on_gpus(checks):
    for name in ("reference", "torch"):
        gate.ensure(template("dense"), name, "fp32", detect_cpu())
    assert checks == []
    gate.ensure(template("dense"), "torch", "fp32", device("nvidia-h100"))
    assert checks == [("dense", "torch", "fp32")]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_attention_of_torch_passes(dtype):
    assert gate.check(template("dense"), "torch", dtype, detect_cpu()) is None


@pytest.mark.usefixtures("own_cache", "forgetful")
def test_dense_attention_of_torch_that_is_wrong_is_refused(monkeypatch):
    right = torch_backend._with_log_sums_on_cpu
    monkeypatch.setattr(torch_backend, "_with_log_sums_on_cpu", lambda q, k, v, _, scale: right(q, k, v, False, scale))
    error = gate.check(template("dense"), "torch", "fp32", detect_cpu())
    assert error is not None
    monkeypatch.setattr(gate, "check", lambda *_: error)
    with pytest.raises(CompileError, match="dense on torch"):
        gate.ensure(template("dense"), "torch", "fp32", device("nvidia-h100"))


@pytest.mark.parametrize(("dtype", "dim", "length"), [("float32", 40, 83), ("float16", 75, 457), ("bfloat16", 256, 33)])
def test_torch_has_what_gpus_are_asked_for(dtype, dim, length):
    """Names and arguments of torch's operators, and the shapes they answer with."""
    q = torch.empty(2, 4, length, dim, dtype=getattr(torch, dtype), device="meta")
    k = torch.empty(2, 4, length + 3, dim, dtype=q.dtype, device="meta")
    values, log_sums = torch_backend._with_log_sums_on_gpu(q, k, k, False, 0.3)
    assert (values.shape, values.dtype) == (q.shape, q.dtype)
    assert (log_sums.shape, log_sums.dtype) == (q.shape[:3], torch.float32)


@pytest.mark.usefixtures("forgetful")
def test_what_is_remembered_says_what_passed(own_cache, checks):
    gate.ensure(template("row_traversal"), "cpu", "fp32", detect_cpu())
    (path,) = (own_cache / "gate").glob("*.json")
    passed = json.loads(path.read_text())
    assert passed["template"] == "row_traversal"
    assert passed["device"] == detect_cpu().key
    assert passed["toolchain"] == cpu.compiler().version
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("own_cache", "forgetful")
@pytest.mark.parametrize("file", ["row_traversal/kernel_cpu.cpp", "shared/simd.hpp"])
def test_a_changed_source_is_checked_again(file, own_templates, checks):
    gate.ensure(template("row_traversal"), "cpu", "fp32", detect_cpu())
    with (own_templates / file).open("a") as source:
        source.write("// changed\n")
    templates.cache_clear()
    gate.ensure(template("row_traversal"), "cpu", "fp32", detect_cpu())
    assert len(checks) == 2


@pytest.mark.usefixtures("forgetful")
def test_a_pass_that_cannot_be_remembered_is_a_pass(own_cache, checks, caplog):
    own_cache.mkdir(mode=0o700)
    (own_cache / "gate").write_text("")
    gate.ensure(template("row_traversal"), "cpu", "fp32", detect_cpu())
    gate.ensure(template("row_traversal"), "cpu", "fp32", detect_cpu())
    assert len(checks) == 1
    assert "not remembered" in caplog.text


@pytest.mark.usefixtures("own_cache", "forgetful")
def test_a_wrong_kernel_is_refused_every_time(own_templates, own_cache):
    path = own_templates / "shared" / "simd.hpp"
    source = path.read_text()
    right, wrong = "constexpr float LOG2_E = 1.4426950408889634f", "constexpr float LOG2_E = 1.4427f"
    assert right in source
    path.write_text(source.replace(right, wrong))
    templates.cache_clear()
    attn = sparsec.compile(m.window(3, 3), 20, template="row_traversal")
    for _ in range(2):
        with pytest.raises(
            CompileError, match=r"row_traversal on cpu \(fp32\) gave wrong results.*is not used"
        ) as caught:
            attn(*(torch.randn(1, 1, 20, 8) for _ in range(3)))
        assert caught.value.source == own_templates / "row_traversal" / "kernel_cpu.cpp"
        assert "is allowed" in str(caught.value)
    assert not list(own_cache.glob("gate/*"))


@pytest.mark.usefixtures("own_cache", "forgetful")
def test_a_kernel_that_does_not_compile_is_told(own_templates):
    with (own_templates / "row_traversal" / "kernel_cpu.cpp").open("a") as source:
        source.write("an error\n")
    templates.cache_clear()
    with pytest.raises(CompileError, match="could not compile") as caught:
        sparsec.compile(m.window(3, 3), 20, q_heads=1, head_dim=8, dtype="fp32", template="row_traversal")
    assert caught.value.log


def test_the_hard_mask_is_hard():
    dense = gate.hard_mask().bind(83, 151).to_dense()
    degrees = dense.sum(1)
    assert (degrees == 0).any()
    assert (degrees == 150).any()  # one column is empty
    assert (dense.sum(0) == 0).any()
    tiles = gate.hard_mask().bind(83, 151).tiles(16, 16)
    assert 0 < tiles.is_full.sum() < tiles.n_tiles
