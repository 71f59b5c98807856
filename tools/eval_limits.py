"""How far the model of shared memory and registers is off: configurations drawn from a template's space, compiled.

    python tools/eval_limits.py --configs 8 --json FILE
    python tools/eval_limits.py --device nvidia-rtx4090 --template hybrid --backend triton

For each device, template, back end, direction and head_dim, configurations are drawn at random from all legal ones, and
what the model lets through is compiled for that device, which need not be here. Nothing it lets through may fail to
compile or ask for more shared memory than a block can have; how much less the kernel asks for than the model says, and
what it spills, is told. What the model refuses is compiled too where the compiler takes it: some of it would fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import click
import numpy as np
from bench.script import Aim, budget_option, finish, in_time, json_option

from sparsec import masks as m
from sparsec.backends import cuda, cuda_compile
from sparsec.backends import triton as triton_backend
from sparsec.backends.base import Launch, Problem, backend
from sparsec.backends.cuda_tiles import tile_shape
from sparsec.cli.console import out, show
from sparsec.device import Device
from sparsec.device import device as named_device
from sparsec.errors import CompileError
from sparsec.planner.works import build_work
from sparsec.report import Column, table
from sparsec.template import Config, Template, template

DEVICES = ("nvidia-a100", "nvidia-rtx4090", "nvidia-h200", "nvidia-b200", "amd-mi250x", "amd-mi300x")
TEMPLATES = ("block_sparse", "hybrid", "row_traversal")
SERVERS = ("triton", "cuda")
DIRECTIONS = ("forward", "backward")
HEAD_DIMS = (64, 128, 256)
# Bytes a thread keeps in local memory beyond which a configuration is slow, not only a little less fast.
MANY_SPILLED = 256


@dataclass(frozen=True)
class Space:
    """What configurations are drawn from."""

    device: str
    template: str
    backend: str
    direction: str
    head_dim: int


@dataclass(frozen=True)
class Lowered:
    """One configuration and its kernels.

    Attributes:
        space: Where it was drawn.
        config: The configuration.
        is_let_through: Whether the model has it fit.
        modelled_bytes: Of shared memory, by the model; None where it states no figure.
        shared_bytes: What the kernels ask for at most.
        limit_bytes: What a block can have.
        spilled_bytes: Of a thread, at most.
        error: Why it does not compile; "" where it does.
    """

    space: Space
    config: str
    is_let_through: bool
    modelled_bytes: int | None
    shared_bytes: int
    limit_bytes: int
    spilled_bytes: int
    error: str

    @property
    def fits(self) -> bool:
        return not self.error and self.shared_bytes <= self.limit_bytes


def spaces(devices: tuple[str, ...], names: tuple[str, ...], servers: tuple[str, ...]) -> Iterator[Space]:
    every = itertools.product(devices, names, servers, DIRECTIONS, HEAD_DIMS)
    for device, name, server, direction, head_dim in every:
        at, each = named_device(device), template(name)
        is_served = backend(server).serves(at) and backend(server).refusal(each, _problem(head_dim), at) is None
        if is_served and (direction == "forward" or each.has_backward(server)):
            yield Space(device, name, server, direction, head_dim)


def drawn(space: Space, count: int, seed: int = 0) -> list[Config]:
    """So many legal configurations, at random."""
    each, rng = template(space.template), np.random.default_rng(seed)
    found: dict[Config, None] = {}
    for _ in range(100 * count):
        values = {t.name: int(rng.choice(t.values)) for t in each.tunables_of(space.backend)}
        config = each.config_of(space.backend, values)
        if config is not None:
            found[config] = None
        if len(found) == count:
            break
    return [*found]


def _problem(head_dim: int, *, needs_grad: bool = False) -> Problem:
    return Problem(150, 300, 16, 2, head_dim, head_dim, "bf16", needs_grad=needs_grad)


def lowered(space: Space, config: Config) -> Lowered:
    at, each = named_device(space.device), template(space.template)
    problem = _problem(space.head_dim, needs_grad=space.direction == "backward")
    refused = backend(space.backend).config_refusal(each, config, problem, at)
    made = _launch(each, space.backend, config, problem, at)
    modelled: int | None = None
    shared = spilled = 0
    error = ""
    try:
        if space.backend == "triton":
            if space.direction == "forward":
                modelled = triton_backend.shape_of(made).shared_bytes or None
            kernels = triton_backend.lower_source(made, "backward" if space.direction == "backward" else "forward")
            shared = max(each.shared_bytes for each in kernels)
            spilled = max(each.spilled_bytes for each in kernels)
        else:
            given = tile_shape(made).shared_bytes if each.layout != "rows" else 0
            modelled = given or None
            for program, _ in cuda.programs_of(made, "backward" if space.direction == "backward" else "forward"):
                for kernel in cuda_compile.lowered(program).kernels.values():
                    shared = max(shared, kernel.shared_bytes + (given if kernel.name == "forward" else 0))
                    spilled = max(spilled, kernel.spilled_bytes)
    except (CompileError, AssertionError) as failure:
        error = (str(failure).splitlines() or [type(failure).__name__])[0][:200]
    limit = at.shared_bytes_per_block
    return Lowered(space, str(config), refused is None, modelled, shared, limit, spilled, error)


def _launch(each: Template, server: str, config: Config, problem: Problem, at: Device) -> Launch:
    dense = np.random.default_rng(3).random((problem.q_len, problem.kv_len)) < 0.05
    bound = m.from_dense(dense).bind()
    plain = replace(problem, needs_grad=False)
    work = build_work(each, config, bound, plain, at, heads=problem.q_heads)
    heads = tuple(range(problem.q_heads))
    return Launch(each, server, config, plain, at, work, heads, (0,), problem.head_dim**-0.5)


@click.command(help=__doc__)
@click.option("--device", "devices", multiple=True, type=click.Choice(DEVICES), default=DEVICES, help="Only this one.")
@click.option("--template", "names", multiple=True, type=click.Choice(TEMPLATES), default=TEMPLATES, help="Likewise.")
@click.option("--backend", "servers", multiple=True, type=click.Choice(SERVERS), default=SERVERS, help="Likewise.")
@click.option("--configs", default=4, show_default=True, help="Drawn from each space.")
@budget_option
@json_option
def main(
    devices: tuple[str, ...],
    names: tuple[str, ...],
    servers: tuple[str, ...],
    configs: int,
    budget: float,
    path: Path | None,
) -> None:
    left_out: list[tuple[Space, Config]] = []
    every = [
        (space, config)
        for number, space in enumerate(spaces(devices, names, servers))
        for config in drawn(space, configs, number)
    ]
    # In turns, so that what is left out for want of time is of no one space.
    order = np.random.default_rng(0).permutation(len(every))
    found = [lowered(*each) for each in in_time([every[index] for index in order], budget, left_out)]
    show(out(), _told(found), "")
    for each in found:
        if each.is_let_through and not each.fits:
            click.echo(f"let through, and does not fit: {each}")
    through = [each for each in found if each.is_let_through]
    wrong = sum(not each.fits for each in through)
    aims = [Aim("let through by the model, and failing", float(wrong), at_most=0.0, form="{:.0f}")]
    results = {"lowered": [asdict(each) for each in found], "left_out": len(left_out)}
    finish(aims, results, path)


def _told(found: list[Lowered]) -> object:
    groups: dict[tuple[str, str, str], list[Lowered]] = {}
    for each in found:
        groups.setdefault((each.space.template, each.space.backend, each.space.direction), []).append(each)
    titles = ("let through", "fail", "asked / modelled", "spill much", "refused", "would fit")
    columns = [Column("kernel"), *(Column(title, "right") for title in titles)]
    rows = []
    for key, mine in sorted(groups.items()):
        through = [each for each in mine if each.is_let_through]
        refused = [each for each in mine if not each.is_let_through]
        shares = [each.shared_bytes / each.modelled_bytes for each in through if each.modelled_bytes and each.fits]
        spread = f"{median(shares):.2f} ({min(shares):.2f}–{max(shares):.2f})" if shares else "–"
        much = sum(each.spilled_bytes > MANY_SPILLED for each in through)
        fitting = sum(each.fits and each.spilled_bytes <= MANY_SPILLED for each in refused)
        counts = (len(through), sum(not each.fits for each in through), spread, much, len(refused), fitting)
        rows.append((" ".join(key), *map(str, counts)))
    return table(columns, rows, out())


if __name__ == "__main__":
    main()
