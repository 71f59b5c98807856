"""Two result files compared, peer by peer, with the noise of both in mind.

This file decides when a difference counts: the quartile ranges must not overlap, and the medians must differ by more
than a share that a shared machine moves by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bench.results import CaseRow, PeerRow, Run, Timing
from bench.sheet import Figure, Sheet

Judgement = Literal["faster", "slower", "same", "no longer exact", "exact again", "lost", "gained"]

# Medians that differ less are the same even where the quartiles of few repeats happen not to overlap.
_MARGIN = 0.03


# Instructions differ only where code or compiler does; the least loop count that depends on an address is below this.
_COUNT_MARGIN = 0.001


@dataclass(frozen=True, slots=True)
class FigureChange:
    """One figure of a sheet, before and after."""

    what: str
    shape: str
    judgement: Judgement
    before: Figure
    after: Figure


def compare_sheets(old: Sheet, new: Sheet) -> list[FigureChange]:
    """What changed in the figures that both sheets have."""
    before = {(figure.what, figure.said): figure for figure in old.figures}
    changes = []
    for figure in new.figures:
        earlier = before.get((figure.what, figure.said))
        if earlier is not None and earlier.unit == figure.unit:
            changes.append(FigureChange(figure.what, figure.said, _figure_judged(earlier, figure), earlier, figure))
    return changes


def _figure_judged(old: Figure, new: Figure) -> Judgement:
    if old.is_exact and new.is_exact is False:
        return "no longer exact"
    if old.is_exact is False and new.is_exact:
        return "exact again"
    if old.timing is not None and new.timing is not None:
        return faster_or_slower(old.timing, new.timing)
    if abs(new.value - old.value) <= (_COUNT_MARGIN if new.unit == "instructions" else _MARGIN) * old.value:
        return "same"
    # More is better of lengths and rates alone.
    is_more_better = new.unit in ("tokens", "bytes/s")
    return "faster" if (new.value > old.value) == is_more_better else "slower"


@dataclass(frozen=True, slots=True)
class Change:
    """One peer on one case, before and after.

    Attributes:
        case_id: Which case.
        peer: Which peer.
        judgement: What became of it.
        before_us: Median before, where there was a time.
        after_us: Median after, likewise.
        peak_drift: Of the machine's own peak, after over before; None where it was not measured.
    """

    case_id: str
    peer: str
    judgement: Judgement
    before_us: float | None
    after_us: float | None
    peak_drift: float | None

    @property
    def speedup(self) -> float | None:
        return self.before_us / self.after_us if self.before_us and self.after_us else None


def compare(old: Run, new: Run) -> list[Change]:
    """What changed in the cases that both runs have."""
    before = {row.case.id: row for row in old.cases}
    return [change for row in new.cases if row.case.id in before for change in _changes(before[row.case.id], row)]


def _changes(old: CaseRow, new: CaseRow) -> Iterator[Change]:
    drift = new.peak_flops / old.peak_flops if new.peak_flops and old.peak_flops else None
    for row in new.peers:
        earlier = old.row(row.peer)
        if earlier is not None and (earlier.us is not None or row.us is not None):
            yield Change(new.case.id, row.peer, judged(earlier, row), earlier.us, row.us, drift)


def judged(old: PeerRow, new: PeerRow) -> Judgement:
    if old.status == "ok" and new.status == "wrong":
        return "no longer exact"
    if old.status == "wrong" and new.status == "ok":
        return "exact again"
    if new.us is None or new.timing is None:
        return "lost"
    if old.us is None or old.timing is None:
        return "gained"
    return faster_or_slower(old.timing, new.timing)


def faster_or_slower(old: Timing, new: Timing) -> Judgement:
    is_near = abs(math.log(new.median_us / old.median_us)) < math.log1p(_MARGIN)
    if is_near or (old.q25_us <= new.q75_us and new.q25_us <= old.q75_us):
        return "same"
    return "faster" if new.median_us < old.median_us else "slower"


def differences(old: Run, new: Run) -> list[str]:
    """What makes the two runs hard to compare, for a person."""
    pairs = (
        ("device", old.provenance.device, new.provenance.device),
        ("processor", old.provenance.processor, new.provenance.processor),
        ("threads", old.threads, new.threads),
        *(
            (name, old.provenance.versions.get(name), new.provenance.versions.get(name))
            for name in sorted({*old.provenance.versions, *new.provenance.versions})
        ),
    )
    return [f"{name}: {before} before, {after} now" for name, before, after in pairs if before != after]
