"""What a mask looks like: its profile, its block graph, its signature, and the orders of tokens worth trying.

This package measures masks; it must not know templates, devices or costs.
"""

from sparsec.analysis.fill import FILL_BLOCKS, TileFill
from sparsec.analysis.graph import BlockGraphProfile, block_graph
from sparsec.analysis.orderings import (
    candidate_orderings,
    cluster_ordering,
    popularity_ordering,
    rcm_ordering,
    residue_ordering,
)
from sparsec.analysis.profile import DegreeStats, MaskProfile, analyse
from sparsec.analysis.sampling import UNIT, Run, n_units, sample_runs, units_of
from sparsec.analysis.signatures import MaskSignature, signature

__all__ = [
    "FILL_BLOCKS",
    "UNIT",
    "BlockGraphProfile",
    "DegreeStats",
    "MaskProfile",
    "MaskSignature",
    "Run",
    "TileFill",
    "analyse",
    "block_graph",
    "candidate_orderings",
    "cluster_ordering",
    "n_units",
    "popularity_ordering",
    "rcm_ordering",
    "residue_ordering",
    "sample_runs",
    "signature",
    "units_of",
]
