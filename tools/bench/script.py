"""What a single script found, held against its aims: told to a person, and written for a program.

This file decides how a verdict reads and what surrounds results in a file: machine, versions, commit, aims. It must not
know what was measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from bench.provenance import provenance
from sparsec.report import json_text

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Aim:
    """A figure and how large it should be.

    Attributes:
        what: In words.
        value: As measured; None where nothing could be said.
        at_least: The least that is aimed at, or None.
        at_most: The most, or None.
        form: How the figures are written.
    """

    what: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None
    form: str = "{:.1%}"

    @property
    def is_met(self) -> bool:
        if self.value is None:
            return False
        return not (self.at_least is not None and self.value < self.at_least) and not (
            self.at_most is not None and self.value > self.at_most
        )

    def __str__(self) -> str:
        limit = self.at_least if self.at_least is not None else self.at_most
        assert limit is not None, "an aim has a limit"
        wanted = f"at {'least' if self.at_least is not None else 'most'} {self.form.format(limit)} is aimed at"
        if self.value is None:
            return f"not known: {self.what}; {wanted}"
        return f"{'met' if self.is_met else 'MISSED'}: {self.what} {self.form.format(self.value)}; {wanted}"


def in_time(cases: Iterable[C], budget_s: float, left_out: list[C]) -> Iterator[C]:
    """The cases that are begun within so many seconds; the others are added to `left_out`."""
    started = time.monotonic()
    for case in cases:
        if time.monotonic() - started < budget_s:
            yield case
        else:
            left_out.append(case)


def finish(aims: Sequence[Aim], results: dict[str, Any], path: Path | None) -> None:  # Any: JSON values
    """Says how the aims were met, and writes everything to a file where one was named."""
    for aim in aims:
        click.echo(str(aim))
    if path is not None:
        told = [{**asdict(aim), "is_met": aim.is_met} for aim in aims]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json_text({"provenance": asdict(provenance()), "aims": told, **results}) + "\n")


budget_option = click.option(
    "--budget", default=math.inf, metavar="SECONDS", help="Begins no other case after so many seconds."
)
json_option = click.option(
    "--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Also writes the results here."
)
