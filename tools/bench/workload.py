"""A case becomes work: a bound mask and tensors.

This file decides what the data files, generated graphs and packed sequences of a grid mean. It must not know who is
measured on them.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.grid import Case, GridError, MaskSource, data_file
from sparsec import Problem, masks
from sparsec.masks import Mask

if TYPE_CHECKING:
    import networkx
    import torch

    from sparsec.masks import BoundMask
    from sparsec.score import ScoreMod

SEED = 0
_PIECE_ROWS = 1 << 20


@dataclass(frozen=True)
class Workload:
    """What every peer of a case is given.

    Attributes:
        case: What was declared.
        bound: The mask, bound to its lengths.
        problem: The shape.
        q: `[batch, heads, q_len, head_dim]`, of the case's dtype, on the device, standard normal.
        k: `[batch, kv_heads, kv_len, head_dim]`, likewise.
        v: Likewise.
        d_out: The gradient of the result, like q; None where only the forward pass is measured.
        score: What happens to scores before softmax, without sinks.
        device: `cpu`, or `cuda` as torch calls any GPU.
    """

    case: Case
    bound: BoundMask
    problem: Problem
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor | None = None
    score: ScoreMod | None = None
    device: str = "cpu"

    @property
    def needs_grad(self) -> bool:
        return self.d_out is not None

    @property
    def scale(self) -> float:
        return float(self.problem.head_dim**-0.5)

    @property
    def is_grouped(self) -> bool:
        return self.problem.kv_heads != self.problem.q_heads

    @cached_property
    def expanded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values once for each query head, for peers that know no groups."""
        group = self.problem.q_heads // self.problem.kv_heads
        if group == 1:
            return self.k, self.v
        k, v = (tensor.detach().repeat_interleave(group, 1) for tensor in (self.k, self.v))
        return k.requires_grad_(self.needs_grad), v.requires_grad_(self.needs_grad)


def make_workload(case: Case, device: str = "cpu") -> Workload:
    """The same numbers on every device."""
    import torch

    bound = bound_mask(case)
    shape = problem(case, bound)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[case.dtype]
    generator = torch.Generator().manual_seed(SEED)

    def random(heads: int, length: int) -> torch.Tensor:
        made = torch.empty(case.batch, heads, length, case.head_dim, dtype=dtype)
        # In pieces, so that half-precision tensors of millions of tokens do not pass through a whole one in fp32.
        flat = made.flatten(0, 2)
        for start in range(0, len(flat), _PIECE_ROWS):
            piece = flat[start : start + _PIECE_ROWS]
            piece.copy_(torch.randn(piece.shape, generator=generator))
        return made.to(device)

    q = random(shape.q_heads, shape.q_len)
    k, v = (random(shape.kv_heads, shape.kv_len) for _ in range(2))
    if case.direction == "forward":
        return Workload(case, bound, shape, q, k, v, device=device)
    d_out = random(shape.q_heads, shape.q_len)
    return Workload(case, bound, shape, *(tensor.requires_grad_() for tensor in (q, k, v)), d_out, device=device)


def problem(case: Case, bound: BoundMask) -> Problem:
    kv_heads = case.kv_heads or case.heads
    return Problem(
        bound.q_len, bound.kv_len, case.heads, kv_heads, case.head_dim, case.head_dim, case.dtype, case.batch
    )


def bound_mask(case: Case) -> BoundMask:
    """The mask of a case, built anew on each call."""
    if case.mask.kind == "queries_of":
        return mask_of(case.mask).bind(int(case.mask.options["queries"]), int(case.mask.options["keys"]))
    return mask_of(case.mask).bind(length_of(case))


def length_of(case: Case) -> int | None:
    """What a mask is bound to; None where it knows its lengths."""
    return sum(packed_lengths(case.mask)) if case.mask.kind == "packed" else case.length


def mask_of(source: MaskSource) -> Mask:
    """The mask a source stands for, built anew on each call.

    Raises:
        GridError: Its options do not fit its data.
    """
    match source.kind:
        case "text" | "queries_of" | "turns":
            return masks.parse(source.text)
        case "file":
            return masks.load(data_file(source.text))
        case "documents":
            return masks.documents(document_lengths(source))
        case "graph":
            return graph_mask(source)
        case _:
            return packed_mask(source)


def document_lengths(source: MaskSource) -> list[int]:
    """Lengths from a column of a CSV file, in the file's order, until they sum to `total`; the last is cut."""
    total, column = int(source.options["total"]), str(source.options.get("column", "tokens"))
    lengths: list[int] = []
    with data_file(source.text).open(newline="") as file:
        for row in csv.DictReader(file):
            if column not in row:
                raise GridError(f"{source.text} has no column {column!r}; it has {', '.join(row)}")
            lengths.append(min(int(row[column]), total - sum(lengths)))
            if sum(lengths) == total:
                return lengths
    raise GridError(f"{source.text} holds {sum(lengths):,} tokens in all, and {total:,} were asked for")


def graph_mask(source: MaskSource) -> Mask:
    """A generated graph, every edge in both directions, nodes in the order they were generated."""
    import networkx
    import scipy.sparse

    graph = _generated(source, networkx)
    pairs = np.array(list(graph.edges()), np.int64).reshape(-1, 2)
    n = graph.number_of_nodes()
    both = np.concatenate([pairs, pairs[:, ::-1]])
    array = scipy.sparse.csr_array((np.ones(len(both), bool), (both[:, 0], both[:, 1])), shape=(n, n))
    array.sum_duplicates()
    array.sort_indices()
    return masks.from_sparse(array)


# Any: networkx carries no types.
def _generated(source: MaskSource, networkx: Any) -> networkx.Graph:
    """About `nodes · degree` attended pairs."""
    nodes, degree = int(source.options["nodes"]), int(source.options.get("degree", 10))
    seed = int(source.options.get("seed", SEED))
    match source.text:
        case "power_law":
            return networkx.barabasi_albert_graph(nodes, degree // 2, seed=seed)
        case "small_world":
            rewired = float(source.options.get("rewired", 0.1))
            return networkx.watts_strogatz_graph(nodes, degree, rewired, seed=seed)
        case "mesh":
            side = round(nodes**0.5)
            return networkx.convert_node_labels_to_integers(networkx.triangular_lattice_graph(side, 2 * side))
        case _:
            half = nodes // 2
            return networkx.bipartite.gnmk_random_graph(half, nodes - half, nodes * degree // 2, seed=seed)


def packed_lengths(source: MaskSource) -> list[int]:
    """Normally distributed around `mean` with a quarter of it as deviation, whole blocks, from one of them to `max`."""
    block, count, mean, longest, seed = (
        int(source.options[name]) for name in ("block", "count", "mean", "max", "seed")
    )
    drawn = np.random.default_rng(seed).normal(mean, mean / 4, count)
    return [int(n) * block for n in np.clip(np.round(drawn / block), 1, longest // block)]


def packed_mask(source: MaskSource) -> Mask:
    """Sequences of different lengths one after the other, each with its own copy of a mask of whole blocks."""
    import scipy.sparse

    block, mask = int(source.options["block"]), masks.parse(source.text)
    parts = []
    for length in packed_lengths(source):
        tiles = mask.bind(length).tiles(block, block)
        if not tiles.is_full.all():
            raise GridError(f"{source.text} does not consist of whole blocks of {block} tokens")
        n = length // block
        parts.append(scipy.sparse.csr_array((np.ones(len(tiles.indices), bool), tiles.indices, tiles.indptr), (n, n)))
    return masks.blocks(scipy.sparse.block_diag(parts, format="csr"), block)
