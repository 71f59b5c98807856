"""What a device can hold: a configuration of every template that fits it, and a model that lets nothing else through.

Compiled for devices that are not here: each kind of `devices.yaml` that differs in architecture, shared memory or
registers, forward and backward, by both back ends for GPUs.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from cases import scattered

from sparsec.backends import cuda, cuda_compile
from sparsec.backends import triton as triton_backend
from sparsec.backends.base import Launch, Problem
from sparsec.backends.cuda_tiles import tile_shape
from sparsec.device import Device, devices
from sparsec.planner import plan
from sparsec.template import template

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import eval_limits

TEMPLATES = ("block_sparse", "hybrid", "row_traversal")
# The smallest devices and the widest heads, in seconds; the others are the spread.
QUICK = {
    ("nvidia-l40s", "block_sparse", "triton", "backward", 256),
    ("nvidia-l40s", "hybrid", "triton", "forward", 256),
    ("nvidia-l40s", "row_traversal", "cuda", "backward", 256),
    ("nvidia-l40s", "block_sparse", "cuda", "forward", 256),
    ("amd-mi250x", "block_sparse", "triton", "forward", 256),
}


def _kinds() -> list[Device]:
    """One device of each architecture, shared memory and registers."""
    found: dict[tuple[object, ...], Device] = {}
    for each in devices():
        if each.kind != "cpu":
            found.setdefault((each.arch, each.shared_bytes_per_block, each.registers_per_unit), each)
    return [*found.values()]


# Of each maker the one with the least shared memory, and the least registers: what fits there at 64 and 128 dimensions
# fits elsewhere, and the widest heads are tried on every kind.
SMALLEST = ("nvidia-l40s", "amd-mi250x")


def _every():
    servers = ("triton", "cuda")
    for at, name, server, direction, head_dim in itertools.product(
        _kinds(), TEMPLATES, servers, ("forward", "backward"), (64, 128, 256)
    ):
        if head_dim < 256 and at.name not in SMALLEST:
            continue
        is_served = server == "triton" or at.kind == "nvidia"
        if is_served and (direction == "forward" or template(name).has_backward(server)):
            is_quick = (at.name, name, server, direction, head_dim) in QUICK
            yield pytest.param(
                at,
                name,
                server,
                direction,
                head_dim,
                id=f"{name}-{server}-{direction}-{at.name}-d{head_dim}",
                marks=() if is_quick else pytest.mark.spread,
            )


def _planned(at: Device, name: str, server: str, direction: str, head_dim: int) -> Launch:
    problem = Problem(150, 300, 4, 2, head_dim, head_dim, "bf16", needs_grad=direction == "backward")
    made = plan(scattered(150, 300, 0.05), problem, at, template=name, backend=server, tune="off", reorder="off")
    launch = made.steps[0].launch
    assert (launch.template.name, launch.backend) == (name, server)
    return launch


@pytest.mark.parametrize(("at", "name", "server", "direction", "head_dim"), [*_every()])
def test_every_device_has_a_configuration_that_compiles_and_fits(at, name, server, direction, head_dim):
    """What the planner takes without records: the default, or the nearest to it that the device can hold."""
    if server == "cuda" and cuda_compile.missing() is not None:
        pytest.skip(str(cuda_compile.missing()))
    launch = _planned(at, name, server, direction, head_dim)
    if server == "triton":
        for kernel in triton_backend.lower_source(launch, direction):
            assert kernel.shared_bytes <= at.shared_bytes_per_block, kernel
        return
    asked = 0 if launch.template.layout == "rows" else tile_shape(launch).shared_bytes
    for program, walk in cuda.programs_of(launch, direction):
        assert program.arch == at.arch
        for kernel in cuda_compile.lowered(program).kernels.values():
            assert kernel.shared_bytes + asked <= at.shared_bytes_per_block, kernel
            # What a block's threads hold together is in one multiprocessor.
            assert kernel.registers * walk.shape.warps * 32 <= at.registers_per_unit, kernel


def test_every_device_is_of_a_kind_that_is_tried():
    kinds = {(each.arch, each.shared_bytes_per_block, each.registers_per_unit) for each in _kinds()}
    gpus = [each for each in devices() if each.kind != "cpu"]
    assert {(each.arch, each.shared_bytes_per_block, each.registers_per_unit) for each in gpus} == kinds
    smallest = min(each.shared_bytes_per_block for each in gpus if each.kind == "nvidia")
    assert smallest == 99 * 1024


def _sampled():
    """One configuration of each space of 128 dimensions, drawn at random: the others are for `tools/eval_limits.py`."""
    quick = {
        ("nvidia-rtx4090", "block_sparse", "triton", "forward", 128),
        ("nvidia-h200", "hybrid", "cuda", "forward", 64),
    }
    for number, space in enumerate(eval_limits.spaces(eval_limits.DEVICES, TEMPLATES, eval_limits.SERVERS)):
        key = (space.device, space.template, space.backend, space.direction, space.head_dim)
        if space.head_dim != 128 and key not in quick:
            continue
        marks = () if key in quick else pytest.mark.spread
        yield pytest.param(space, number, id="-".join(map(str, key)), marks=marks)


@pytest.mark.parametrize(("space", "number"), [*_sampled()])
def test_what_the_model_lets_through_compiles_and_fits(space, number):
    if space.backend == "cuda" and cuda_compile.missing() is not None:
        pytest.skip(str(cuda_compile.missing()))
    (config,) = eval_limits.drawn(space, 1, 100 + number)
    found = eval_limits.lowered(space, config)
    if found.is_let_through:
        assert found.fits, found
        if found.modelled_bytes is not None:
            assert found.shared_bytes <= found.modelled_bytes, found


def test_a_configuration_that_does_not_fit_is_told():
    """The judge itself: with a smaller device, what was let through fails."""
    (space,) = [
        each
        for each in eval_limits.spaces(("nvidia-rtx4090",), ("block_sparse",), ("triton",))
        if each.direction == "forward" and each.head_dim == 128
    ]
    found = eval_limits.lowered(space, template("block_sparse").default("triton"))
    assert found.is_let_through
    assert found.fits
    assert not eval_limits.replace(found, limit_bytes=found.shared_bytes - 1).fits
    assert not eval_limits.replace(found, error="it does not compile").fits
