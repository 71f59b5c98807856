"""Which configuration the measurements of one workload speak for.

This file decides what a contest between configurations is and who wins it. In a user's words:

- A configuration wins only over the default (what would run without records): where that was not measured beside it,
  nothing wins.
- Measurements made interleaved (one contest) are compared with the default of their own contest, so that a machine that
  was busy on one day does not decide; where there are none, medians of medians are.
- What is nearer than noise goes to the default; the further a workload is, the larger a lead must be to carry over.
- A configuration that failed is out; one that only ran out of time, and at another time did not, is in.
- A configuration the template does not allow today, or that was ever found to compute wrong results, is out.

It must not know where records are kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from sparsec.records.record import Failure, RecordKey, Settings, TuningRecord, Workload, settings_of
from sparsec.template import Config

# Two configurations nearer than this are equal. Source: flashinfer#3920, where winners by less flipped between runs.
NEAR_TIE: Final = 1.02
# A small lead on one mask is none on another: for each unit of distance it must be so much larger.
TIE_BY_DISTANCE: Final = 0.02


@dataclass(frozen=True, slots=True)
class Case:
    """All measurements of one workload under one key.

    Attributes:
        key: What was measured.
        workload: On what.
        records: In the order they were read.
    """

    key: RecordKey
    workload: Workload
    records: tuple[TuningRecord, ...]


@dataclass(frozen=True, slots=True)
class Winner:
    """The configuration a case speaks for.

    Attributes:
        config: It.
        us: Its median of medians.
        default_us: The default's, or None where the default failed.
        records: Its measurements.
    """

    config: Config
    us: float
    default_us: float | None
    records: tuple[TuningRecord, ...]


@dataclass(frozen=True, slots=True)
class Standings:
    """How the configurations of a case did; `winner` says which is served.

    Attributes:
        default: The template's default, as it stood in the case.
        scores: Of each configuration that can run: microseconds, or the ratio to the default.
        records: The measurements behind each score.
    """

    default: Settings
    scores: Mapping[Settings, float]
    records: Mapping[Settings, tuple[TuningRecord, ...]]

    def winner(self, is_allowed: Callable[[Settings], bool], distance: float = 0.0) -> Winner | None:
        """What is served among what is allowed today, or None; to a workload so far away."""
        scores = {settings: score for settings, score in self.scores.items() if is_allowed(settings)}
        if not scores:
            return None
        best = min(scores, key=lambda settings: (scores[settings], sorted(settings)))
        if self.default in scores and scores[self.default] <= scores[best] * (NEAR_TIE + TIE_BY_DISTANCE * distance):
            best = self.default
        mine = self.records[best]
        default_us = _median_us(self.records[self.default]) if self.default in self.records else None
        return Winner(mine[0].config, _median_us(mine), default_us, mine)


def standings(case: Case, default: Config, toolchain: str | None = None) -> Standings | None:
    """How the configurations of a case did; None where the default was not among them.

    Args:
        case: The measurements.
        default: The template's default of today.
        toolchain: Measurements with it count alone where they include the default.
    """
    records = _with_toolchain(case.records, default, toolchain)
    timed, failed = _by_settings(records)
    default_settings = settings_of(default)
    if default_settings not in timed and default_settings not in failed:
        return None
    able = {settings: tuple(mine) for settings, mine in timed.items() if failed.get(settings, set()) <= {"timeout"}}
    scores = _interleaved_scores(able, default_settings) or {
        settings: _median_us(mine) for settings, mine in able.items()
    }
    return Standings(default_settings, scores, able)


def _median_us(records: Sequence[TuningRecord]) -> float:
    """The median of the records' medians."""
    return median(record.median_us for record in records)


def _with_toolchain(records: Sequence[TuningRecord], default: Config, toolchain: str | None) -> Sequence[TuningRecord]:
    mine = [record for record in records if record.toolchain == toolchain]
    has_default = any(settings_of(record.config) == settings_of(default) for record in mine)
    return mine if has_default else records


def _by_settings(
    records: Sequence[TuningRecord],
) -> tuple[dict[Settings, list[TuningRecord]], dict[Settings, set[Failure]]]:
    """The measurements, and the kinds of failure, of each configuration."""
    timed: dict[Settings, list[TuningRecord]] = defaultdict(list)
    failed: dict[Settings, set[Failure]] = defaultdict(set)
    for record in records:
        if record.failure is None:
            timed[settings_of(record.config)].append(record)
        else:
            failed[settings_of(record.config)].add(record.failure)
    return timed, failed


def _interleaved_scores(able: Mapping[Settings, tuple[TuningRecord, ...]], default: Settings) -> dict[Settings, float]:
    """Of each configuration in a contest with the default: the median of its ratios to it."""
    beside: dict[str, list[float]] = defaultdict(list)
    for record in able.get(default, ()):
        if record.contest:
            beside[record.contest].append(record.median_us)
    ratios: dict[Settings, list[float]] = defaultdict(list)
    for settings, mine in able.items():
        for record in mine:
            if record.contest in beside:
                ratios[settings].append(record.median_us / median(beside[record.contest]))
    return {settings: median(each) for settings, each in ratios.items()}
