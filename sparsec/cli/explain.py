"""`sparsec explain`: what would run for a mask, on which device, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sparsec.cli.arguments import lengths, read_mask
from sparsec.cli.console import columns, out, show, waiting, write
from sparsec.cli.planning import Asked, planning_options

if TYPE_CHECKING:
    from sparsec.errors import UnsupportedError
    from sparsec.masks import BoundMask, Mask
    from sparsec.planner import Plan

_EXAMPLES: Final = """\b
Examples:
  sparsec explain 'window(255, 0) | global_tokens(16)' --seq-len 65536
  sparsec explain graph.npz --heads 8 --dtype bf16 --html page.html
  sparsec explain 'causal()' --seq-len 8192 --device nvidia-h100 --json
  sparsec explain 'window(1023, 0)' --at 4k,16k,64k,1m --device nvidia-h100
  sparsec explain 'dilated(512, 8)' --seq-len 16384 --compare 'window(64, 64)'
"""


@click.command(short_help="What would run for a mask, and why.", epilog=_EXAMPLES)
@click.argument("mask")
@planning_options
@click.option("--compare", metavar="MASK2", help="Set another mask beside it.")
@click.option("--at", callback=lengths, metavar="N,N,…", help="Compare lengths, such as 4k,16k,1m (k is 1,024).")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
@click.option("--source", "has_source", is_flag=True, help="Also print each launch's source and how it is compiled.")
@click.option("--png", type=click.Path(dir_okay=False), metavar="FILE", help="Draw mask, degrees and ceilings.")
@click.option("--html", type=click.Path(dir_okay=False), metavar="FILE", help="Write a page to explore the plan with.")
def explain(mask: str, **options: Any) -> None:  # Any: click's options
    """Says what would run for MASK, what else was weighed, and what could not run and why.

    Neither a GPU nor torch is needed, whatever the device.
    """
    asked = Asked(**{field.name: options[field.name] for field in fields(Asked)})
    _check_options(asked, options)
    is_json = options["is_json"]
    if len(asked.devices) > 1:
        _on_devices(read_mask(mask), asked, is_json=is_json)
    elif options["compare"] is not None:
        _beside(read_mask(mask), read_mask(options["compare"]), asked, is_json=is_json)
    elif options["at"]:
        _at_lengths(read_mask(mask), asked, options["at"], is_json=is_json)
    else:
        _one(mask, asked, options)


def _check_options(asked: Asked, options: dict[str, Any]) -> None:  # Any: click's options
    several = {
        "--device all": len(asked.devices) > 1,
        "--compare": options["compare"] is not None,
        "--at": bool(options["at"]),
    }
    named = [name for name, is_given in several.items() if is_given]
    single = [f"--{name}" for name in ("source", "png", "html") if options.get(name) or options.get(f"has_{name}")]
    if len(named) > 1 or (named and single):
        raise click.UsageError(f"{' and '.join([*named, *single][:2])} do not go together: ask for one at a time")
    if options["at"] and (asked.seq_len or asked.kv_len):
        raise click.UsageError("--at names the lengths; leave out --seq-len and --kv-len")
    for name in ("png", "html"):
        if options[name] is not None:
            _check_writable(Path(options[name]))


def _check_writable(path: Path) -> None:
    """Before anything is planned."""
    import os

    folder = path.parent
    if not folder.is_dir():
        raise click.ClickException(f"cannot write {path}: there is no directory {folder}; make it, or name another")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise click.ClickException(f"cannot write {path}: permission denied; name a file that you may write")


@contextmanager
def _writing(path: str) -> Iterator[None]:
    """What could not be known beforehand, such as a full disk, is told as well."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror or error}") from error


# One plan.


def _one(text: str, asked: Asked, options: dict[str, Any]) -> None:  # Any: click's options
    from sparsec.errors import UnsupportedError
    from sparsec.planner.text import plan_text
    from sparsec.report import json_text, plan_sources

    with waiting("planning"):
        bound = asked.bound(read_mask(text))
        try:
            made = asked.plan(bound)
        except UnsupportedError as error:
            if options["is_json"]:
                click.echo(json_text(_refused(bound, asked, error)))
            raise
    sources = plan_sources(made) if options["has_source"] or options["html"] else {}
    with waiting("drawing"):
        _draw(made, sources, options)
    if options["is_json"]:
        document = made.to_dict()
        click.echo(json_text(document | {"source": sources} if options["has_source"] else document))
        return
    with waiting("looking for advice"):
        words = plan_text(made, columns())
    write(words)
    for launch, files in sources.items() if options["has_source"] else ():
        for name, source in files.items():
            click.echo(f"\n{launch}: {name}\n\n{source.rstrip()}")


def _draw(made: Plan, sources: dict[str, dict[str, str]], options: dict[str, Any]) -> None:  # Any: click's options
    if options["png"] is not None:
        from sparsec.report.figure import write_png

        with _writing(options["png"]):
            write_png(made, Path(options["png"]))
        click.echo(f"drawn: {options['png']}", err=True)
    if options["html"] is not None:
        from sparsec.report.page import write_page

        with _writing(options["html"]):
            write_page(made, sources, Path(options["html"]))
        click.echo(f"written: {options['html']}", err=True)


def _refused(bound: BoundMask, asked: Asked, error: UnsupportedError) -> dict[str, Any]:  # Any: JSON values
    from dataclasses import asdict

    from sparsec.planner.plans import PLAN_SCHEMA
    from sparsec.report import refused

    return {
        "schema": PLAN_SCHEMA,
        "mask": str(bound.mask),
        "problem": asdict(asked.problem(bound)),
        "device": {"name": asked.device.name, "key": asked.device.key, "label": asked.device.label},
        "error": str(error).splitlines()[0],
        "refusals": refused(error),
    }


# Several plans.


def _on_devices(mask: Mask, asked: Asked, *, is_json: bool) -> None:
    from sparsec.errors import UnsupportedError
    from sparsec.report import devices_reasons, devices_table, json_text, side_by_side

    plans: list[tuple[str, Plan | UnsupportedError]] = []
    bound = asked.bound(mask)
    with waiting("planning for every device"):
        for device in asked.devices:
            try:
                plans.append((device.name, asked.plan(bound, device)))
            except UnsupportedError as error:
                plans.append((device.name, error))
    if all(isinstance(each, UnsupportedError) for _, each in plans):
        raise plans[0][1]  # type: ignore[misc]  # an error, as all of them are
    if is_json:
        documents = [
            {"device": {"name": name}, **_error_document(each)}
            if isinstance(each, UnsupportedError)
            else each.to_dict()
            for name, each in plans
        ]
        click.echo(json_text(side_by_side("devices", documents)))
        return
    write(_wrapped(_title(bound, asked)))
    show(out(), devices_table(plans, out()))
    for sentence in devices_reasons(plans):
        write(_wrapped(sentence))
    for name, each in plans:
        if isinstance(each, UnsupportedError):
            click.echo(f"{name}: {each}")


def _beside(mask: Mask, other: Mask, asked: Asked, *, is_json: bool) -> None:
    from sparsec.report import json_text, masks_table, masks_verdict, side_by_side

    with waiting("planning both"):
        plans = asked.plan(asked.bound(mask)), asked.plan(asked.bound(other))
    if is_json:
        click.echo(json_text(side_by_side("masks", [each.to_dict() for each in plans])))
        return
    for letter, made in zip("AB", plans, strict=True):
        write(_wrapped(f"{letter}  {_title(made.mask, asked)}"))
    show(out(), masks_table(plans, out()))
    write(_wrapped(masks_verdict(*plans)))


def _at_lengths(mask: Mask, asked: Asked, chosen: tuple[int, ...], *, is_json: bool) -> None:
    from sparsec.planner.lengths import crossover_words, dense_crossover
    from sparsec.report import json_text, lengths_table, side_by_side

    with waiting("planning at every length"):
        plans = [asked.at(length).plan(asked.at(length).bound(mask)) for length in chosen]
        crossover = dense_crossover(plans[-1])
    if is_json:
        documents = [made.to_dict() for made in plans]
        click.echo(json_text(side_by_side("lengths", documents, crossover_tokens=crossover)))
        return
    write(_wrapped(f"{mask} on {asked.device.name}, {plans[0].problem.dtype}"))
    show(out(), lengths_table(plans, out()))
    write(_wrapped(crossover_words(plans[-1], crossover)))


def _error_document(error: UnsupportedError) -> dict[str, Any]:  # Any: JSON values
    from sparsec.report import refused

    return {"error": str(error).splitlines()[0], "refusals": refused(error)}


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, columns(), break_on_hyphens=False)


def _title(bound: BoundMask, asked: Asked) -> str:
    problem = asked.problem(bound)
    heads = "1 head" if problem.q_heads == 1 else f"{problem.q_heads} heads"
    return f"{bound.mask}, {bound.q_len:,} × {bound.kv_len:,} tokens, {heads}, {problem.dtype}"
