"""Attention of torch.sparse's products, with a backward pass of the same products.

torch's own gradients of these products are dense, one matrix of every query and key for each head; a user who trains
with them writes what follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Pattern:
    """A mask's edges in both orders.

    Attributes:
        zeros: Batched CSR, `[heads, q_len, kv_len]`: where products are sampled.
        indptr: Of the queries, int64.
        degrees: Edges of each query.
        csr: `indptr` and columns, int32.
        transposed: Likewise by key.
        edges: Which edge each of the transposed is.
    """

    zeros: torch.Tensor
    indptr: torch.Tensor
    degrees: torch.Tensor
    csr: tuple[torch.Tensor, torch.Tensor]
    transposed: tuple[torch.Tensor, torch.Tensor]
    edges: torch.Tensor

    @classmethod
    def of(cls, array: Any, heads: int) -> Pattern:
        """From a SciPy CSR array."""
        import scipy.sparse

        n_edges = len(array.indices)
        indptr, columns = (torch.from_numpy(each.astype(np.int64)) for each in (array.indptr, array.indices))
        zeros = torch.sparse_csr_tensor(
            indptr.expand(heads, -1).contiguous(),
            columns.expand(heads, -1).contiguous(),
            torch.zeros(heads, n_edges),
            (heads, *array.shape),
        )
        numbered = scipy.sparse.csr_array((np.arange(n_edges), array.indices, array.indptr), shape=array.shape).tocsc()
        transposed = tuple(torch.from_numpy(each.astype(np.int32)) for each in (numbered.indptr, numbered.indices))
        edges = torch.from_numpy(numbered.data.astype(np.int64))
        return cls(zeros, indptr, indptr.diff(), (indptr.int(), columns.int()), transposed, edges)

    @property
    def shape(self) -> tuple[int, int]:
        _, q_len, kv_len = self.zeros.shape
        return q_len, kv_len

    def sampled(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """`a · bᵀ · scale` at every edge, `[heads, edges]`."""
        return torch.sparse.sampled_addmm(self.zeros, a, b.mT, beta=0.0, alpha=scale).values()

    def softmax_(self, scores: torch.Tensor) -> torch.Tensor:
        """Over the edges of each query, in place."""
        scores -= self.by_edge(torch.segment_reduce(scores, "max", offsets=self.indptr, unsafe=True))
        total = torch.segment_reduce(scores.exp_(), "sum", offsets=self.indptr, unsafe=True)
        scores /= self.by_edge(total)
        return scores

    def by_edge(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.repeat_interleave(rows, self.degrees)

    def product(self, weights: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        return torch.mm(torch.sparse_csr_tensor(*self.csr, weights, self.shape), dense)

    def transposed_product(self, weights: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        return torch.mm(torch.sparse_csr_tensor(*self.transposed, weights[self.edges], self.shape[::-1]), dense)


class SparseAttention(torch.autograd.Function):
    """Softmax attention over the edges of a pattern; q, k and v have as many heads as it."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float
    ) -> torch.Tensor:
        ctx.pattern, ctx.scale = pattern, scale
        out = torch.empty(*q.shape[:3], v.shape[3])
        weights = []
        for b in range(len(q)):
            scores = pattern.sampled(q[b], k[b], scale)
            weights.append(scores)
            for h, row in enumerate(scores):
                out[b, h] = pattern.product(pattern.softmax_(row), v[b, h])
        ctx.save_for_backward(q, k, v, out, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *weights = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        dq, dk, dv = (torch.empty_like(each) for each in (q, k, v))
        delta = (d_out * out).sum(-1)
        for b in range(len(q)):
            d_weights = pattern.sampled(d_out[b], v[b], 1.0)
            for h in range(q.shape[1]):
                d_scores = (d_weights[h] - pattern.by_edge(delta[b, h])).mul_(weights[b][h]).mul_(ctx.scale)
                dq[b, h] = pattern.product(d_scores, k[b, h])
                dk[b, h] = pattern.transposed_product(d_scores, q[b, h])
                dv[b, h] = pattern.transposed_product(weights[b][h], d_out[b, h])
        return dq, dk, dv, None, None
