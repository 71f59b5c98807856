"""The errors a user of sparsec can meet.

This file decides their names and what each one carries. It knows nothing of masks, plans or kernels. A message says
what was asked, what was found (the actual values), and what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class SparsecError(Exception):
    """Base of every error raised on purpose by sparsec."""


class MaskError(SparsecError, ValueError):
    """A mask, a predicate or a mask file that cannot mean what it says."""


class Reason(Protocol):
    """What `UnsupportedError` carries: anything that states a reason in one sentence."""

    @property
    def reason(self) -> str: ...


class UnsupportedError(SparsecError, NotImplementedError):
    """A valid request that no template and back end can serve here.

    Attributes:
        refusals: Every candidate that was refused, each with its `reason`.
    """

    def __init__(self, message: str, refusals: Sequence[Reason] = ()) -> None:
        self.refusals = tuple(refusals)
        if self.refusals:
            message = "\n".join([message, *(f"  - {refusal}" for refusal in self.refusals)])
        super().__init__(message)


class BackendMissingError(SparsecError, ImportError):
    """A back end was named, and the package, compiler or device it needs is not here."""


class CompileError(SparsecError, RuntimeError):
    """A kernel did not compile, did not load, or failed its check against the reference.

    Attributes:
        source: The source file that was compiled.
        log: What the compiler printed.
    """

    def __init__(self, message: str, source: Path | None = None, log: str = "") -> None:
        self.source, self.log = source, log
        parts = [message]
        if source is not None:
            parts.append(f"  source: {source}")
        if log:
            parts.append("  compiler log:\n" + "\n".join(f"    {line}" for line in log.splitlines()[:40]))
        super().__init__("\n".join(parts))


class RecordError(SparsecError, ValueError):
    """A tuning record or a record file that cannot be used."""
