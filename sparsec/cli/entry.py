"""The `sparsec` program: its commands, its exit codes, and what becomes of errors.

This file decides how an error ends the program: 0 done, 1 failed, 2 bad usage, 130 interrupted, 141 when the reader of
a pipe has gone (128 and the signal's number, as a shell reports it). It must not know what a command does; commands
import what they need when they run, so that `--help` is quick.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from sparsec import __version__
from sparsec.cli.bench import bench
from sparsec.cli.db import db
from sparsec.cli.demo import demo
from sparsec.cli.devices import devices
from sparsec.cli.doctor import doctor
from sparsec.cli.explain import explain
from sparsec.cli.masks import masks
from sparsec.cli.names import nearest
from sparsec.cli.tune import tune

INTERRUPTED: Final = 130
CLOSED_PIPE: Final = 141


class _Failed(click.ClickException):
    """The request is fine, and could not be served."""

    exit_code = 1


class _Misused(click.ClickException):
    """The request means nothing."""

    exit_code = 2


class _Commands(click.Group):
    """Turns errors that a user can cause into a message and an exit code; others are faults, with their traceback."""

    # Any: whatever the command returns, as click has it.
    def invoke(self, ctx: click.Context) -> Any:
        from sparsec.errors import MaskError, SparsecError

        try:
            return super().invoke(ctx)
        except MaskError as error:
            raise _Misused(str(error)) from error
        except SparsecError as error:
            raise _Failed(str(error)) from error
        except MemoryError as error:
            raise _Failed(f"out of memory: {str(error) or 'ask for shorter lengths'}") from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"there is no command {args[0]!r}; {nearest(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        # In the order a reader wants them.
        return list(self.commands)


@click.group(
    cls=_Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="sparsec %(version)s")
def sparsec() -> None:
    """Compiles attention masks to the fastest exact attention kernels, and says why it chose them.

    MASK is an expression, such as 'window(255, 0) | global_tokens(16)', or a file: .yaml with an expression, .npz
    (SciPy sparse), .mtx (Matrix Market) or .npy (bool).
    """


for _command in (demo, explain, bench, tune, masks, devices, db, doctor):
    sparsec.add_command(_command)


def main() -> None:
    """Runs the program and exits."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs the program; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character of a picture must not end the program.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = _run(list(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _discard_output()
        return CLOSED_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        click.echo(f"Error: {error}", err=True)
        _discard_output()
        return 1


def _run(arguments: list[str]) -> int:
    try:
        with sparsec.make_context("sparsec", arguments) as context:
            sparsec.invoke(context)
        return 0
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        sys.stdout.flush()
        error.show()
        return error.exit_code


def _discard_output() -> None:
    """Python flushes stdout once more as it ends; that goes nowhere, quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
