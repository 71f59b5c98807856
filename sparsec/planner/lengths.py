"""The same mask at other lengths: what it would cost, and from which length on it beats dense attention.

This file decides which lengths are tried. It must not decide how a plan is made: each is an ordinary plan.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

from sparsec.cost import dense_estimate
from sparsec.errors import MaskError, UnsupportedError
from sparsec.planner.plans import Plan
from sparsec.planner.search import again
from sparsec.planner.words import duration
from sparsec.planner.works import IDENTITY

# Lengths between which the crossover is looked for: below, nothing takes long; above, planning would.
SHORTEST, _LONGEST = 64, 16_384


def dense_us(made: Plan) -> float:
    """What torch's own attention over all pairs should take on the same problem, microseconds."""
    return dense_estimate(made.problem, made.device, 1.0).us


def at_length(made: Plan, seq_len: int) -> Plan:
    """The plan of the same mask, shape and device for so many queries and keys, asked for as the first one was.

    Raises:
        MaskError: The mask knows its length, and it is another.
        UnsupportedError: Nothing can serve it.
    """
    problem = replace(made.problem, q_len=seq_len, kv_len=seq_len)
    return again(made, made.mask.mask, problem)


def dense_crossover(made: Plan) -> float | None:
    """The length, in tokens, below which dense attention over all pairs should be faster.

    Of lengths that are doubled from `SHORTEST` on, one is found at which the plan wins and at half of which it loses;
    between the two, both times are taken to be powers of the length.

    Returns:
        Tokens; `SHORTEST` where the plan wins even there; None where the mask has one length only, or dense attention
        wins at every length tried.
    """
    longest = min(_LONGEST, made.problem.q_len)
    if made.problem.q_len != made.problem.kv_len or longest < SHORTEST or not _is_open(made):
        return None
    if all(step.launch.work.ordering is IDENTITY for step in made.steps):
        # Where no other order of tokens pays, none is looked for at other lengths: a graph's takes long to find.
        made = replace(made, asked=replace(made.asked, reorder="off"))

    @cache
    def ratio(length: int) -> float | None:
        """Our time over that of dense attention; None where nothing serves that length, or the mask wants another."""
        try:
            other = at_length(made, length)
        except (MaskError, UnsupportedError):
            return None
        return other.estimate.us / dense_us(other)

    def is_won(length: int) -> bool:
        found = ratio(length)
        return found is not None and found <= 1.0

    # Were our time as the length and that of dense attention as its square, it would be here: most masks are so.
    likely = made.problem.q_len * made.estimate.us / dense_us(made)
    length = SHORTEST
    while length < likely and 2 * length <= longest:
        length *= 2
    if is_won(length):
        while length > SHORTEST and is_won(length // 2):
            length //= 2
    else:
        while not is_won(length):
            length *= 2
            if length > longest:
                return None
    if length == SHORTEST:
        return float(SHORTEST)
    lost, won = ratio(length // 2), ratio(length)
    # Where shorter ones cannot be had, nothing is known of them.
    if lost is None or won is None:
        return None
    return float(length / 2 * 2.0 ** (math.log(lost) / (math.log(lost) - math.log(won))))


def crossover_words(made: Plan, crossover: float | None) -> str:
    """The dense alternative to a plan in a sentence, with the length below which it is faster."""
    ratio = dense_us(made) / made.estimate.us
    times = f"{ratio:,.0f}×" if ratio >= 100.0 else f"{ratio:.1f}×"
    text = f"Dense attention over all pairs would take {duration(dense_us(made))}, {times} as long"
    if crossover is None:
        return f"{text}."
    if crossover <= SHORTEST:
        return f"{text}, and is slower from {SHORTEST} tokens on."
    return f"{text}; it is the faster one below about {rounded_tokens(crossover)} tokens."


def rounded_tokens(length: float) -> str:
    """A length to two digits: a crossover is no more exact than the two estimates it comes from."""
    digits = max(len(str(int(length))) - 2, 0)
    return f"{round(length / 10**digits) * 10**digits:,}"


def _is_open(made: Plan) -> bool:
    """Whether the mask can be had at another length."""
    try:
        made.mask.mask.bind(2 * made.problem.q_len)
    except MaskError:
        return False
    return True
