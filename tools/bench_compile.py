"""How long NVRTC takes for each kernel file of ours in its default configuration, and how long the cache takes.

    python tools/bench_compile.py --json FILE

Needs cuda-python and NVRTC, and no GPU: kernels are compiled for the named devices into an empty cache, one process,
one program after the other. A file holds two or three kernels. From the cache they are read once more.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click
from bench.script import Aim, finish, json_option

from sparsec import data
from sparsec import masks as m
from sparsec.backends import cuda, cuda_compile
from sparsec.backends.base import Launch, Problem
from sparsec.backends.cuda_calls import Program
from sparsec.device import device as named_device
from sparsec.planner.works import build_work
from sparsec.template import templates

_DEVICES = ("nvidia-a100", "nvidia-l40s", "nvidia-h200", "nvidia-b200")


@click.command(help=__doc__)
@click.option("--device", "devices", multiple=True, default=_DEVICES, show_default=True, help="For which devices.")
@json_option
def bench(devices: tuple[str, ...], path: Path | None) -> None:
    reason = cuda_compile.missing()
    if reason is not None:
        raise click.ClickException(reason)
    found = []
    with TemporaryDirectory() as folder:
        for name, (title, program) in itertools.product(devices, [*_programs(devices[0])]):
            told = _timed(name, title, program, Path(folder))
            click.echo(
                f"{told['device']:14} {told['kernels']:44} {told['cold_s']:6.2f} s, cached {told['warm_s']:.4f} s"
            )
            found.append(told)
    slowest, cached = (max(each[key] for each in found) for key in ("cold_s", "warm_s"))
    aims = [
        Aim("the slowest kernel file:", slowest, at_most=2.0, form="{:.2f} s"),
        Aim("the slowest one from the cache:", cached, at_most=0.05, form="{:.4f} s"),
    ]
    middle = median(each["cold_s"] for each in found)
    finish(aims, {"compiler": cuda_compile.toolchain(), "median_s": middle, "kernels": found}, path)


def _programs(device: str) -> Iterator[tuple[str, Program]]:
    """Every template and direction in the default configuration, for a group of four heads of 128 dimensions."""
    bound = m.longformer(64, 4).bind(512)
    for each in templates().values():
        for direction in ("forward", "backward"):
            if "cuda" not in each.backends() or (direction == "backward" and not each.has_backward("cuda")):
                continue
            problem, at = Problem(512, 512, 4, 1, 128, 128, "bf16"), named_device(device)
            config = each.default("cuda")
            work = build_work(each, config, bound, problem, at, heads=4)
            launch = Launch(each, "cuda", config, problem, at, work, (0, 1, 2, 3), (0,), 128**-0.5)
            for number, (program, _) in enumerate(cuda.programs_of(launch, direction), 1):
                yield f"{each.name} {direction} {number}", program


def _timed(device: str, title: str, program: Program, folder: Path) -> dict[str, str | float]:
    program = replace(program, arch=named_device(device).arch)
    os.environ[data.CACHE_DIR_VARIABLE] = str(folder)
    cold, warm = _seconds(program), min(_seconds(program) for _ in range(3))
    return {"device": device, "kernels": title, "cold_s": round(cold, 3), "warm_s": round(warm, 5)}


def _seconds(program: Program) -> float:
    started = time.perf_counter()
    cuda_compile.cubin(program)
    return time.perf_counter() - started


if __name__ == "__main__":
    bench()
