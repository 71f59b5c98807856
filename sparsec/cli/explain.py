"""`sparsec explain`: what would run for a mask, on which device, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from sparsec.cli.arguments import DTYPES, known_backend, known_device, known_template, read_mask
from sparsec.cli.console import waiting, write

if TYPE_CHECKING:
    from sparsec.backends.base import Launch, Problem
    from sparsec.device import Device
    from sparsec.errors import UnsupportedError
    from sparsec.masks import BoundMask
    from sparsec.planner import Plan
    from sparsec.planner.search import Reorder

_Command = TypeVar("_Command", bound=Callable[..., Any])  # Any: a command as click takes it


@dataclass(frozen=True, slots=True)
class _Request:
    """The command's options, as they were given."""

    seq_len: int | None
    kv_len: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    v_dim: int | None
    dtype: str
    batch: int | None
    device: Device
    template: str | None
    backend: str | None
    reorder: Reorder
    needs_grad: bool
    is_json: bool
    has_source: bool


_HEAD_DIM: Final = 64
_EXAMPLES: Final = """\b
Examples:
  sparsec explain 'window(255, 0) | global_tokens(16)' --seq-len 65536
  sparsec explain graph.npz --heads 8 --dtype bf16
  sparsec explain 'causal()' --seq-len 8192 --device nvidia-h100 --json
"""


def _count(name: str, text: str, most: int | None = None) -> Callable[[_Command], _Command]:
    """An option that takes a positive number."""
    return click.option(name, type=click.IntRange(1, most), metavar="N", help=text)


@click.command(short_help="What would run for a mask, and why.", epilog=_EXAMPLES)
@click.argument("mask")
@_count("--seq-len", "Queries; may be left out where the mask knows its lengths.")
@_count("--kv-len", "Keys, where they are not as many.")
@_count("--heads", "Query heads; as many as the mask has, or 1, by default.")
@_count("--kv-heads", "Key and value heads; as many by default.")
@_count("--head-dim", "Of q and k, up to 256; 64 by default.", 256)
@_count("--v-dim", "Of v; as that of q and k by default.", 256)
@_count("--batch", "Batch elements; as many as the mask has, or 1, by default.")
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="Of q, k, v and out.")
@click.option(
    "--device",
    default="cpu",
    callback=known_device,
    metavar="NAME",
    help="One of `sparsec devices`; this machine by default.",
)
@click.option("--template", callback=known_template, metavar="NAME", help="Consider only this template.")
@click.option("--backend", callback=known_backend, metavar="NAME", help="Consider only this back end.")
@click.option(
    "--reorder",
    type=click.Choice(["auto", "off", "force"]),
    default="auto",
    show_default=True,
    help="Whether other orders of tokens compete, or must win.",
)
@click.option("--needs-grad", is_flag=True, help="For a forward pass that a backward pass will follow.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
@click.option("--source", "has_source", is_flag=True, help="Also print each launch's source and how it is compiled.")
def explain(mask: str, **options: Any) -> None:  # Any: click's options
    """Says what would run for MASK, what else was weighed, and what could not run and why.

    Neither a GPU nor torch is needed, whatever the device.
    """
    from sparsec.errors import UnsupportedError
    from sparsec.planner import plan
    from sparsec.planner.text import plan_text

    request = _Request(**options)
    with waiting("planning"):
        bound = _bound(mask, request)
        try:
            made = plan(
                bound,
                _problem(bound, request),
                request.device,
                template=request.template,
                backend=request.backend,
                reorder=request.reorder,
            )
        except UnsupportedError as error:
            if request.is_json:
                click.echo(_refused_json(bound, request, error))
            raise
    sources = _sources(made) if request.has_source else None
    if request.is_json:
        from sparsec.report import json_text

        document = made.to_dict()
        click.echo(json_text(document if sources is None else document | {"source": sources}))
        return
    write(plan_text(made, request.reorder))
    for launch, files in (sources or {}).items():
        for name, text in files.items():
            click.echo(f"\n{launch}: {name}\n\n{text.rstrip()}")


def _bound(text: str, request: _Request) -> BoundMask:
    from sparsec.errors import MaskError

    mask = read_mask(text)
    if request.seq_len is None:
        if request.kv_len is not None:
            raise click.UsageError("--kv-len goes with --seq-len")
        try:
            return mask.bind(None)
        except MaskError as error:
            raise click.UsageError(f"give the number of queries with --seq-len ({error})") from error
    return mask.bind(request.seq_len, request.kv_len)


def _problem(bound: BoundMask, request: _Request) -> Problem:
    from sparsec.backends.base import Problem

    heads, head_dim = request.heads or bound.n_heads or 1, request.head_dim or _HEAD_DIM
    if heads % (request.kv_heads or heads):
        raise click.BadParameter(
            f"{heads} query heads over {request.kv_heads} key heads: the first must be a multiple of the second",
            param_hint="'--kv-heads'",
        )
    return Problem(
        q_len=bound.q_len,
        kv_len=bound.kv_len,
        q_heads=heads,
        kv_heads=request.kv_heads or heads,
        head_dim=head_dim,
        v_dim=request.v_dim or head_dim,
        dtype=request.dtype,  # type: ignore[arg-type]  # a choice of the option
        batch=request.batch or bound.n_batch or 1,
        needs_grad=request.needs_grad,
    )


def _refused_json(bound: BoundMask, request: _Request, error: UnsupportedError) -> str:
    from dataclasses import asdict

    from sparsec.report import json_text

    return json_text(
        {
            "mask": str(bound.mask),
            "problem": asdict(_problem(bound, request)),
            "device": {"name": request.device.name, "key": request.device.key, "label": request.device.label},
            "error": str(error).splitlines()[0],
            "refusals": [{"what": str(getattr(each, "what", "")), "reason": each.reason} for each in error.refusals],
        }
    )


def _sources(made: Plan) -> dict[str, dict[str, str]]:
    """Source texts by launch and file; a file that an earlier launch has shown is only named."""
    shown: dict[str, str] = {}
    found: dict[str, dict[str, str]] = {}
    for number, step in enumerate(made.steps, 1):
        launch = step.launch
        title = f"{number}. {launch.template.name} on {launch.backend}"
        found[title] = {}
        for name, text in _launch_sources(launch).items():
            is_shown = shown.get(name) == text
            found[title][name] = "(as above)" if is_shown else text
            shown[name] = text
    return found


def _launch_sources(launch: Launch) -> dict[str, str]:
    # Lowering would compile, or want the device; sources and command are known without.
    if launch.backend == "cpu":
        from sparsec.backends import cpu

        sources = cpu.source_files(launch.template)
        command = " ".join(cpu.compile_command(launch.template, launch.problem.dtype, launch.device))
        return {"compiled by": command} | {path.name: path.read_text() for path in sources}
    if launch.backend == "triton":
        from sparsec.backends import triton

        return {
            str(path.relative_to(launch.template.folder.parent)): path.read_text()
            for path in triton.source_files(launch.template)
        }
    from sparsec.backends.base import backend

    return backend(launch.backend).lower(launch).source()
