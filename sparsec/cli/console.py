"""Where the command line writes: the result to stdout, everything else to stderr.

This file decides how text, tables and progress reach the two streams, and that a stream which is no terminal gets plain
text. It must not know what is written.
"""

from __future__ import annotations

import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

# Work that takes longer than this shows a bar.
_PATIENCE_S: Final = 1.0
_NARROWEST: Final = 20
_WIDEST: Final = 80


def out() -> Console:
    """A console on stdout."""
    return _console(is_error=False)


def err() -> Console:
    """A console on stderr."""
    return _console(is_error=True)


def _console(*, is_error: bool) -> Console:
    from rich.console import Console

    class PassingConsole(Console):
        def on_broken_pipe(self) -> None:
            # rich would end the program here, with an exit code of its own.
            raise  # noqa: PLE0704  # called while the BrokenPipeError is handled

    return PassingConsole(file=sys.stderr if is_error else sys.stdout, highlight=False, soft_wrap=False)


def columns() -> int:
    """How wide prose is set: 80 columns, and less on a terminal that has less."""
    return max(_NARROWEST, min(_WIDEST, out().width)) if sys.stdout.isatty() else _WIDEST


def write(text: str) -> None:
    """Writes text to stdout, its lines folded with their indentation where the terminal is narrower than they are."""
    width = out().width
    if sys.stdout.isatty() and any(len(line) > width for line in text.splitlines()):
        text = "\n".join(_folded(line, width) for line in text.splitlines())
    click.echo(text)


def show(console: Console, *renderables: RenderableType) -> None:
    """Writes what rich renders, without the blanks that fill its last column; text is taken as it is."""
    from rich.text import Text

    plain = [Text(each) if isinstance(each, str) else each for each in renderables]
    with console.capture() as captured:
        console.print(*plain, sep="\n")
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()), file=console.file)


def _folded(line: str, width: int) -> str:
    indent = " " * min(len(line) - len(line.lstrip()) + 2, width // 2)
    return textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False) if line else line


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows a moving bar on stderr, after a moment and only on a terminal, until the block ends."""
    progress = bar()
    if progress.disable:
        yield
        return
    progress.add_task(what, total=None)
    timer = threading.Timer(_PATIENCE_S, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


def bar() -> Progress:
    """A progress bar on stderr that leaves nothing behind; it does nothing where stderr is no terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = err()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        # The result goes to stdout past rich, which would take it to stderr.
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    )
