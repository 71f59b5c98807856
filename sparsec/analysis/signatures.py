"""The few coarse numbers by which tuning records know a mask.

This file decides how a profile is bucketed and how far apart two masks are; it must not know what a record holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsec.analysis.profile import MaskProfile

# How much a bucket of each field says about which launch parameters win: row length and tile fill decide between tile
# sizes and templates, the longest row only how work is balanced, the bandwidth only what a cache can hold.
_WEIGHTS = {"degree_mean": 1.0, "degree_max": 0.5, "degree_cv": 0.5, "bandwidth": 0.25, "tile_fill": 1.0}

# Fills are told apart down to 2**-12: below that tiles are out of the question anyway.
_LEAST_FILL = 2.0**-12


@dataclass(frozen=True, slots=True)
class MaskSignature:
    """Buckets of a mask's profile; equal for masks that want the same kernel.

    Attributes:
        degree_mean: `round(log2(1 + mean keys of a query))`.
        degree_max: `round(log2(1 + most keys of a query))`.
        degree_cv: `round(2 * log2(1 + cv))`, 0 for rows of equal length.
        bandwidth: `round(log2(1 + mean distance of an edge from the diagonal))`.
        tile_fill: `round(log2(fill of 64 × 64 tiles))`, 0 for full tiles, negative otherwise.
    """

    degree_mean: int
    degree_max: int
    degree_cv: int
    bandwidth: int
    tile_fill: int

    @property
    def coordinates(self) -> tuple[float, ...]:
        """A point whose differences from another, summed, are their distance."""
        return tuple(weight * getattr(self, name) for name, weight in _WEIGHTS.items())

    def distance(self, other: MaskSignature) -> float:
        """How unlike two masks are: 0 when equal, about 1 for each octave of row length or fill."""
        return sum(abs(mine - theirs) for mine, theirs in zip(self.coordinates, other.coordinates, strict=True))


def signature(profile: MaskProfile) -> MaskSignature:
    """The signature of a profile."""
    return MaskSignature(
        degree_mean=round(math.log2(1.0 + profile.q.mean)),
        degree_max=round(math.log2(1.0 + profile.q.max)),
        degree_cv=round(2.0 * math.log2(1.0 + profile.q.cv)),
        bandwidth=round(math.log2(1.0 + profile.bandwidth_mean)),
        tile_fill=round(math.log2(max(profile.fill(64).fill, _LEAST_FILL))),
    )
