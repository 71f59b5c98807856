"""Gradients of live tables on a GPU: where its kernels add them up, and what the sums amount to.

Any number of programs add to one entry of a table, in whatever order they run. So that the result is the same each
time, an entry's sum is kept exactly, in integers, which may be added in any order: an fp32 number is 24 bits at one of
254 places, and it is added to the two digits of `DIGIT_BITS` bits that it falls into. What a table has for each edge is
written once for each head and batch element instead, and added up here.

This file decides the form of the sums. It must not know the kernels, nor any back end. torch is imported only to run.

Source: Kulisch, "Computer Arithmetic and Validity" (2008), chapter 8: sums of floating-point numbers in fixed point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sparsec.expr import Var
from sparsec.score import ScoreMod

if TYPE_CHECKING:
    import torch

# As in templates/shared/gradient_triton.py and templates/row_traversal/tables.cuh. A digit of 28 bits in a word of 64
# holds the sum of 2^35 terms at least.
DIGIT_BITS: Final = 28
DIGITS: Final = 10
# One more word counts what is not finite: in its lower half infinities, in its upper half those below 0; NaN is both.
WORDS: Final = DIGITS + 1
# The value of the lowest bit of the lowest digit.
_LOWEST: Final = 2.0**-149

_PLACES: tuple[str, ...] = ("b", "h", "edge")


def is_by_edge(score: ScoreMod, number: int) -> bool:
    """Whether a live table has its own entry for each edge: one look-up, by the edge and at most head and batch."""
    indices = [look_up.args for at, look_up, _ in score.look_ups if at == number]
    names = [arg.name if isinstance(arg, Var) else "" for args in indices for arg in args]
    return len(indices) == 1 and "edge" in names and len(set(names)) == len(names) and set(names) <= set(_PLACES)


def sum_types(score: ScoreMod) -> tuple[str, ...]:
    """The element type of each live table's sums."""
    return tuple("float32" if is_by_edge(score, n) else "int64" for n in range(len(score.live_tables)))


def zero_sums(
    score: ScoreMod, wanted: Sequence[torch.Tensor | None], places: tuple[int, int, int], device: torch.device
) -> tuple[torch.Tensor | None, ...]:
    """What kernels add to, for each live table whose gradient is wanted.

    Args:
        score: The modifier.
        wanted: The gradients, of the shapes of the tables; None where none is wanted.
        places: How many batch elements, query heads and edges there are.
        device: Where.

    Returns:
        fp32 `[batch, q_heads, edges]` of a table by edges, else int64 `[entries, WORDS]`.
    """
    import torch

    return tuple(
        None
        if gradient is None
        else torch.zeros(places, dtype=torch.float32, device=device)
        if is_by_edge(score, number)
        else torch.zeros((gradient.numel(), WORDS), dtype=torch.int64, device=device)
        for number, gradient in enumerate(wanted)
    )


def add_sums(score: ScoreMod, sums: Sequence[torch.Tensor | None], wanted: Sequence[torch.Tensor | None]) -> None:
    """Adds to each gradient what its sums amount to, rounded once."""
    for number, (total, gradient) in enumerate(zip(sums, wanted, strict=True)):
        if total is not None and gradient is not None:
            by_edge = is_by_edge(score, number)
            gradient += _of_edges(score, number, total) if by_edge else exact_totals(total).reshape(gradient.shape)


def exact_totals(sums: torch.Tensor) -> torch.Tensor:
    """fp32 `[entries]` of int64 `[entries, WORDS]`."""
    import torch

    digits, special = sums[:, :DIGITS].double(), sums[:, DIGITS]
    powers = [_LOWEST * 2.0 ** (DIGIT_BITS * place) for place in range(DIGITS)]
    totals = (digits * torch.tensor(powers, dtype=torch.float64, device=sums.device)).sum(1)
    is_above, is_below = (special & 0xFFFFFFFF) > 0, (special >> 32) > 0
    totals[is_above] = torch.inf
    totals[is_below] = -torch.inf
    totals[is_above & is_below] = torch.nan
    return totals.float()


def _of_edges(score: ScoreMod, number: int, sums: torch.Tensor) -> torch.Tensor:
    """The gradient of a table by edges from `[batch, q_heads, edges]`."""
    ((look_up, shape),) = ((node, node.captured.shape) for at, node, _ in score.look_ups if at == number)
    names = [arg.name for arg in look_up.args if isinstance(arg, Var)]
    present = [name for name in _PLACES if name in names]
    shared = [axis for axis, name in enumerate(_PLACES) if name not in names]
    kept = sums.sum(shared) if shared else sums
    for axis, name in enumerate(present):
        kept = _folded(kept, axis, shape[names.index(name)])
    return kept.permute([present.index(name) for name in names])


def _folded(sums: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """With `size` entries along an axis: the last has all from there on, as the nearest entry of a look-up beyond."""
    import torch

    extent = sums.shape[axis]
    if extent < size:
        missing = list(sums.shape)
        missing[axis] = size - extent
        return torch.cat((sums, sums.new_zeros(missing)), axis)
    if extent == size:
        return sums
    inside, last = sums.narrow(axis, 0, size - 1), sums.narrow(axis, size - 1, extent - size + 1)
    return torch.cat((inside, last.sum(axis, keepdim=True)), axis)
