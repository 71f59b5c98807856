"""The command line, `sparsec`: one file a command."""

from sparsec.cli.entry import main, sparsec

__all__ = ["main", "sparsec"]
