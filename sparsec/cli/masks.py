"""`sparsec masks`: every mask constructor with a small picture, or one mask in full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from sparsec.cli.arguments import read_mask, seq_length
from sparsec.cli.console import out, show, waiting, write
from sparsec.cli.names import nearest

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sparsec.masks import BoundMask, Constructor, Mask

_SMALL_TOKENS: Final = 16
_LARGE_DOTS: Final = 64
_CELL_WIDTH: Final = 38


@click.command(short_help="The masks there are, each with a picture.")
@click.argument("mask", metavar="[NAME or MASK]", required=False)
@click.option("--seq-len", callback=seq_length, metavar="N", help="Queries, and keys, to draw it for.")
def masks(mask: str | None, seq_len: int | None) -> None:
    """Shows the masks there are, each with a picture; or one of them, larger.

    Queries run from top to bottom and keys from left to right; a dot is a pair that attends.
    """
    if mask is None:
        if seq_len is not None:
            raise click.UsageError("--seq-len goes with a mask: sparsec masks 'window(3, 1)' --seq-len 256")
        _show_all()
        return
    from sparsec.masks import CONSTRUCTORS

    constructor = CONSTRUCTORS.get(mask)
    if constructor is not None:
        _show_constructor(mask, constructor, seq_len)
    elif mask.isidentifier():
        raise click.UsageError(f"there is no mask {mask!r}; {nearest(mask, CONSTRUCTORS)}")
    else:
        _show_mask(read_mask(mask), seq_len)


def _show_all() -> None:
    from rich.table import Table

    from sparsec.masks import CONSTRUCTORS

    console = out()
    cells = [_cell(name, constructor) for name, constructor in CONSTRUCTORS.items()]
    abreast = max(1, console.width // _CELL_WIDTH)
    grid = Table.grid(padding=(0, 2, 1, 0))
    for _ in range(abreast):
        grid.add_column(width=min(_CELL_WIDTH, console.width) - 2)
    for first in range(0, len(cells), abreast):
        grid.add_row(*cells[first : first + abreast])
    show(console, grid)
    show(console, "Join them with & | ~ and -, turn them with .T, cut them with [q0:q1, k0:k1].")
    show(console, "`sparsec masks NAME` shows one larger, `sparsec masks MASK --seq-len N` any other.")


def _cell(name: str, constructor: Constructor) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    from sparsec.report import picture

    lines = [""] * 4
    if constructor.example:
        bound = _first_member(_small(_parsed(constructor.example), _SMALL_TOKENS))
        lines = list(picture(bound, _SMALL_TOKENS).lines)
    words = Text(name, "bold")
    if constructor.example and constructor.example != f"{name}()":
        words.append(constructor.example.removeprefix(name) if constructor.example.startswith(name) else "")
    words.append(f"\n{constructor.summary}", "not bold")
    cell = Table.grid(padding=(0, 2, 0, 0))
    cell.add_column(width=_SMALL_TOKENS // 2)
    cell.add_column()
    cell.add_row(Text("\n".join(lines)), words)
    return cell


def _show_constructor(name: str, constructor: Constructor, seq_len: int | None) -> None:
    import inspect

    from rich.text import Text

    console = out()
    show(console, Text.assemble((name, "bold"), f": {constructor.summary}"))
    signature = inspect.signature(constructor.function)
    plain = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    write(f"{name}{signature.replace(parameters=plain, return_annotation=signature.empty)}\n")
    details = inspect.getdoc(constructor.function)
    if details:
        write(f"{details}\n")
    if constructor.example:
        _show_mask(_parsed(constructor.example), seq_len)
    else:
        show(console, "It takes a Python object, so it cannot be written on the command line.")


def _show_mask(mask: Mask, seq_len: int | None) -> None:

    with waiting("drawing"):
        bound = mask.bind(seq_len) if seq_len is not None else _small(mask, _LARGE_DOTS)
        members = _members(bound)
    console = out()
    show(console, repr(mask))
    for title, member in members:
        if title:
            show(console, f"\n{title}: {member.mask!r}")
        _draw(member)


def _draw(bound: BoundMask) -> None:
    from sparsec.report import picture

    console = out()
    with waiting("drawing"):
        drawn = picture(bound, min(_LARGE_DOTS, 2 * console.width))
        q_degrees, kv_degrees = bound.degrees("q"), bound.degrees("kv")
    show(console, "")
    show(console, str(drawn))
    show(console, "")
    q_len, kv_len = bound.shape
    if drawn.tokens > 1:
        show(console, f"a dot is {drawn.tokens:,} × {drawn.tokens:,} pairs, at least one of which attends")
    density = bound.nnz / max(q_len * kv_len, 1)
    show(console, f"shape    {q_len:,} queries × {kv_len:,} keys")
    show(console, f"nnz      {bound.nnz:,} edges, density {density:.3%}")
    for title, degrees, what in (("degrees", q_degrees, "keys a query"), ("", kv_degrees, "queries a key")):
        if len(degrees):
            spread = f"{degrees.min():,} to {degrees.max():,}, mean {degrees.mean():,.1f}"
            show(console, f"{title:8} {spread} {what}")


def _parsed(example: str) -> Mask:
    from sparsec.masks import parse

    return parse(example)


def _small(mask: Mask, tokens: int) -> BoundMask:
    """The mask at its own lengths where it knows them, else at `tokens`, or as few as it wants."""
    from sparsec.errors import MaskError

    for length in (None, tokens):
        try:
            return mask.bind(length)
        except MaskError:
            continue
    return mask.bind(_SMALL_TOKENS)


def _members(bound: BoundMask) -> list[tuple[str, BoundMask]]:
    """A mask, or each member of one that varies by head or batch element, with a title."""
    if not bound.varies_by_head and not bound.varies_by_batch:
        return [("", bound)]
    heads = range(bound.n_heads or 2) if bound.varies_by_head else range(1)
    batch = range(bound.n_batch or 2) if bound.varies_by_batch else range(1)
    members = []
    for b in batch:
        for h in heads:
            where = [f"head {h}"] * bound.varies_by_head + [f"batch element {b}"] * bound.varies_by_batch
            members.append((" of ".join(where), bound.select(b, h)))
    return members


def _first_member(bound: BoundMask) -> BoundMask:
    return _members(bound)[0][1]
