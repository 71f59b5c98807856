"""A result file of a program that is no grid: single figures, each with its shape, its spread and its check.

This file decides what such a figure carries, and how figures become a table and are compared. It must not know what
they are of.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from bench.provenance import provenance
from bench.results import SCHEMA, Provenance, Timing, read, write
from sparsec import data
from sparsec.planner.words import duration, size

Unit = Literal["us", "bytes", "bytes/s", "tokens", "instructions", "ratio"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was measured.

    Attributes:
        what: In words; tells figures of a sheet apart together with `shape`.
        value: In `unit`; the median where it was timed.
        unit: Of the value.
        shape: Of the work: mask, tokens, heads and what else matters.
        timing: Repeated calls, where it was timed.
        base: `what` of the figure of the same sheet and shape that it is compared with; "" for none.
        error: The largest error on what was checked of the result.
        allowed: The largest that is allowed there.
        note: What a reader must know.
    """

    what: str
    value: float
    unit: Unit
    shape: dict[str, int | float | str] = field(default_factory=dict)
    timing: Timing | None = None
    base: str = ""
    error: float | None = None
    allowed: float | None = None
    note: str = ""

    @property
    def is_exact(self) -> bool | None:
        """None where nothing was there to check; what is no number is wrong."""
        if self.allowed is None:
            return None
        return self.error is not None and self.error <= self.allowed

    @property
    def said(self) -> str:
        """The shape in words."""
        return ", ".join(
            f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in self.shape.items()
        )


@dataclass(frozen=True, slots=True)
class Sheet:
    """One result file.

    Attributes:
        schema: Of this file.
        sheet: The program's name.
        about: What it measures, in a sentence.
        protocol: How.
        provenance: Where and with what.
        threads: Of the CPU.
        figures: What was found.
    """

    schema: int
    sheet: str
    about: str
    protocol: str
    provenance: Provenance
    threads: int
    figures: tuple[Figure, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def made(sheet: str, about: str, protocol: str, threads: int, figures: list[Figure]) -> Sheet:
    return Sheet(SCHEMA, sheet, about, protocol, provenance(), threads, tuple(figures))


def timed(what: str, timing: Timing, shape: dict[str, int | float | str], base: str = "", note: str = "") -> Figure:
    return Figure(what, timing.median_us, "us", shape, timing, base, note=note)


def is_sheet(path: Path) -> bool:
    content = data.read_json(path)
    return isinstance(content, dict) and "sheet" in content


def read_sheet(path: Path) -> Sheet:
    """The figures in a file.

    Raises:
        ResultError: It is another schema, or damaged; names file and key.
    """
    return read(path, Sheet)


def write_sheet(path: Path, sheet: Sheet) -> None:
    """Puts the figures at `path`, whole or not at all."""
    write(path, sheet.to_json())


def measured(figure: Figure) -> str:
    """The value as a person reads it, with its spread where there is one."""
    match figure.unit:
        case "us":
            spread = f" ± {figure.timing.spread / 2:.0%}" if figure.timing is not None else ""
            return duration(figure.value) + spread
        case "bytes":
            return size(int(figure.value))
        case "bytes/s":
            return f"{figure.value / 1e9:.3g} GB/s"
        case "instructions":
            return f"{figure.value / 1e6:,.1f} M instructions"
        case "ratio":
            return f"{figure.value:.3g}"
        case _:
            return f"{figure.value:,.0f} tokens"


def compared(figure: Figure, sheet: Sheet) -> str:
    """How a figure stands to the one it is compared with."""
    base = next((each for each in sheet.figures if each.what == figure.base and each.shape == figure.shape), None)
    if base is None or not figure.value:
        return ""
    if figure.unit == "us":
        return f"{base.value / figure.value:.2f}× as fast as {base.what}"
    return f"{figure.value / base.value:.2f}× {base.what}"


def checked(figure: Figure) -> str:
    if figure.is_exact is None or figure.error is None:
        return "" if figure.is_exact is None else "wrong"
    said = f"off by {figure.error:.2g}, allowed {figure.allowed:.2g}"
    return said if figure.is_exact else f"wrong: {said}"
