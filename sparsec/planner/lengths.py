"""The same mask at other lengths: what it would cost, and from which length on it beats dense attention.

This file decides which lengths are tried. It must not decide how a plan is made: each is an ordinary plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from sparsec.cost import dense_estimate
from sparsec.errors import MaskError, UnsupportedError
from sparsec.planner.plans import Plan
from sparsec.planner.search import Reorder, plan
from sparsec.planner.words import duration

# Lengths between which the crossover is looked for: below, nothing takes long; above, planning would.
SHORTEST, _LONGEST = 64, 16_384


def dense_us(made: Plan) -> float:
    """What torch's own attention over all pairs should take on the same problem, microseconds."""
    return dense_estimate(made.problem, made.device, 1.0).us


def at_length(made: Plan, seq_len: int, reorder: Reorder = "auto") -> Plan:
    """The plan of the same mask, shape and device for so many queries and keys.

    Raises:
        MaskError: The mask knows its length, and it is another.
        UnsupportedError: Nothing can serve it.
    """
    problem = replace(made.problem, q_len=seq_len, kv_len=seq_len)
    return plan(made.mask.mask, problem, made.device, reorder=reorder)


def dense_crossover(made: Plan, reorder: Reorder = "auto") -> float | None:
    """The length, in tokens, below which dense attention over all pairs should be faster.

    Lengths are doubled until the plan wins; between the last two, both times are taken to be powers of the length.

    Returns:
        Tokens; `SHORTEST` where the plan wins even there; None where the mask has one length only, or dense attention
        wins at every length tried.
    """
    if made.problem.q_len != made.problem.kv_len or not _is_open(made):
        return None
    before: tuple[int, float] | None = None
    for length, ratio in _ratios(made, reorder):
        if ratio <= 1.0:
            if before is None:
                # Where shorter ones cannot be had, nothing is known of them.
                return float(length) if length == SHORTEST else None
            share = math.log(before[1]) / (math.log(before[1]) - math.log(ratio))
            return float(before[0] * (length / before[0]) ** share)
        before = length, ratio
    return None


def crossover_words(made: Plan, crossover: float | None) -> str:
    """The dense alternative to a plan in a sentence, with the length below which it is faster."""
    ratio = dense_us(made) / made.estimate.us
    times = f"{ratio:,.0f}×" if ratio >= 100.0 else f"{ratio:.1f}×"
    text = f"Dense attention over all pairs would take {duration(dense_us(made))}, {times} as long"
    if crossover is None:
        return f"{text}."
    if crossover <= SHORTEST:
        return f"{text}, and is slower from {SHORTEST} tokens on."
    digits = max(len(str(int(crossover))) - 2, 0)
    rounded = round(crossover / 10**digits) * 10**digits
    return f"{text}; it is the faster one below about {rounded:,} tokens."


def _is_open(made: Plan) -> bool:
    """Whether the mask can be had at another length."""
    try:
        made.mask.mask.bind(2 * made.problem.q_len)
    except MaskError:
        return False
    return True


def _ratios(made: Plan, reorder: Reorder) -> Iterator[tuple[int, float]]:
    """`(length, our time over that of dense attention)`, from short to long."""
    length = SHORTEST
    while length <= min(_LONGEST, made.problem.q_len):
        try:
            shorter = at_length(made, length, reorder)
            yield length, shorter.estimate.us / dense_us(shorter)
        except (MaskError, UnsupportedError):
            # Some masks want a least length, others one alone.
            pass
        length *= 2
