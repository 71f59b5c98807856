"""What `sparsec demo` runs: published masks of text models, a real graph, and the other ways to compute the same.

This file decides the masks, the shapes and how each peer computes its answer. It must not know how they are timed or
checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from sparsec.backends.base import DTYPE_BYTES, Dtype
from sparsec.masks import Mask, bigbird, full, load, longformer

if TYPE_CHECKING:
    import torch

    from sparsec.masks import BoundMask

GRAPH: Final = Path(__file__).parent.parent / "demo_data" / "debian_depends.npz"
HEAD_DIM: Final = 64
_MODEL_HEADS: Final = 12
_GRAPH_HEADS: Final = 8


class Case(NamedTuple):
    """A mask at a length.

    Attributes:
        title: For a person.
        about: Where the mask comes from.
        mask: Which query attends which key.
        seq_len: Queries and keys.
        heads: Of queries, keys and values; their dimension is `HEAD_DIM`.
        dtypes: In which it is run.
        is_graph: Whether peers walk its edges.
    """

    title: str
    about: str
    mask: Mask
    seq_len: int
    heads: int
    dtypes: tuple[Dtype, ...]
    is_graph: bool = False


def cases(lengths: tuple[int, ...]) -> list[Case]:
    """The text models at each length, then the graph."""
    models = [
        (
            "BigBird-base",
            "3 window, 2 global and 3 random blocks of 64 (Zaheer et al. 2020); one draw for all heads",
            bigbird(64, 3, 2, 3, seed=0),
        ),
        ("Longformer-base", "a window of 512 and one global token (Beltagy et al. 2020)", longformer(512, 1)),
    ]
    text = [
        Case(title, about, mask, length, _MODEL_HEADS, ("fp32", "bf16"))
        for length in lengths
        for title, about, mask in models
    ]
    graph = load(GRAPH)
    about = "the Depends relation of Debian packages; a package attends what it depends on, and itself"
    return [
        *text,
        Case("debian_depends", about, graph, graph.bind(None).q_len, _GRAPH_HEADS, ("fp32",), is_graph=True),
    ]


class Tensors(NamedTuple):
    """`[1, heads, seq_len, HEAD_DIM]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def tensors(case: Case, dtype: Dtype) -> Tensors:
    """Normal random numbers, the same at every run."""
    import torch

    generator = torch.Generator().manual_seed(0)
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    shape = (1, case.heads, case.seq_len, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).to(kind) for _ in range(3))
    return Tensors(q, k, v)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another way to compute attention.

    Attributes:
        name: For a person.
        short_name: The same in two words.
        prepare: Everything it may do once for a mask; returns what is timed.
        bound: The mask that its answer means: a dense kernel's is another.
    """

    name: str
    short_name: str
    prepare: Callable[[], Callable[[], torch.Tensor]]
    bound: BoundMask


class Absent(NamedTuple):
    """A peer that was not run, and why."""

    name: str
    short_name: str
    reason: str


def peers(case: Case, bound: BoundMask, dtype: Dtype, given: Tensors, memory_bytes: int) -> Iterator[Peer | Absent]:
    """The other ways to compute a case, as far as they need at most `memory_bytes`."""
    from sparsec.planner.words import size

    pairs = bound.q_len * bound.kv_len
    # A boolean mask, and the additive one of the tensors' dtype that torch makes of it.
    masked_bytes = pairs * (1 + DTYPE_BYTES[dtype])
    masked = ("torch SDPA, boolean mask", "masked SDPA")
    if masked_bytes <= memory_bytes:
        yield Peer(*masked, lambda: _masked_sdpa(bound, given), bound)
    else:
        yield Absent(*masked, f"would need {size(masked_bytes)} for the mask alone")
    if case.is_graph:
        yield Peer("gather/scatter, as PyG does", "gather/scatter", lambda: _gather_scatter(bound, given), bound)
        yield Peer("torch.sparse (SDDMM, SpMM)", "torch.sparse", lambda: _torch_sparse(bound, given), bound)
    else:
        yield Peer(
            "torch SDPA, no mask: all pairs", "dense SDPA", lambda: _dense_sdpa(given), full().bind(*bound.shape)
        )


def _masked_sdpa(bound: BoundMask, given: Tensors) -> Callable[[], torch.Tensor]:
    import torch

    mask = torch.from_numpy(bound.to_dense())
    return lambda: torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=mask)


def _dense_sdpa(given: Tensors) -> Callable[[], torch.Tensor]:
    import torch

    return lambda: torch.nn.functional.scaled_dot_product_attention(*given)


def _edges(bound: BoundMask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(indptr, query, key)` of every edge, int64."""
    import torch

    csr = bound.to_csr()
    indptr, key = (torch.from_numpy(array).long() for array in (csr.indptr, csr.indices))
    query = torch.repeat_interleave(torch.arange(bound.q_len), indptr.diff())
    return indptr, query, key


def _gather_scatter(bound: BoundMask, given: Tensors) -> Callable[[], torch.Tensor]:
    import torch

    _, query, key = _edges(bound)
    # A graph library keeps nodes first.
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in given)
    n, heads, dim = q.shape
    by_query = query.unsqueeze(1).expand(-1, heads)

    def run() -> torch.Tensor:
        scores = (q.index_select(0, query) * k.index_select(0, key)).sum(-1) * dim**-0.5
        peak = torch.full((n, heads), -torch.inf).scatter_reduce_(0, by_query, scores, "amax")
        weights = torch.exp(scores - peak.index_select(0, query))
        total = torch.zeros(n, heads).index_add_(0, query, weights)
        messages = weights.unsqueeze(-1) * v.index_select(0, key)
        out = torch.zeros(n, heads, dim).index_add_(0, query, messages) / total.clamp_min(1e-30).unsqueeze(-1)
        return out.transpose(0, 1).unsqueeze(0)

    return run


def _torch_sparse(bound: BoundMask, given: Tensors) -> Callable[[], torch.Tensor]:
    import warnings

    import torch

    indptr, query, key = _edges(bound)
    degrees = indptr.diff()
    q, k, v = (tensor[0] for tensor in given)

    def sparse(values: torch.Tensor) -> torch.Tensor:
        return torch.sparse_csr_tensor(indptr, key, values, size=bound.shape)

    with warnings.catch_warnings():
        # torch calls its CSR tensors a beta.
        warnings.simplefilter("ignore", UserWarning)
        pattern = sparse(torch.zeros(len(key)))

    def run() -> torch.Tensor:
        out = torch.empty_like(q)
        for head in range(len(q)):
            scaled = torch.sparse.sampled_addmm(pattern, q[head], k[head].T, beta=0.0, alpha=q.shape[-1] ** -0.5)
            scores = scaled.values()
            peak = torch.segment_reduce(scores, "max", lengths=degrees, unsafe=True)
            weights = torch.exp(scores - peak[query])
            total = torch.segment_reduce(weights, "sum", lengths=degrees, unsafe=True)
            out[head] = sparse(weights / total[query]) @ v[head]
        return out.unsqueeze(0)

    return run
