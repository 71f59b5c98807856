"""Attention of torch.sparse's products, with a backward pass of the same products.

All heads and batch elements are one block-diagonal pattern: a product of each kind a pass, with no copies between them,
was the fastest of the ways tried. The product with dense rows is the one with a named reduction, torch's own kernel,
which is faster here than the one of MKL behind `torch.mm`. torch's own gradients of these products are dense, one
matrix of every query and key for each head; a user who trains with them writes what follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Pattern:
    """A mask's edges, once for each head, as one block-diagonal CSR matrix.

    Attributes:
        zeros: The matrix, of zeros: where products are sampled.
        rows: The query of each edge.
        transposed: `indptr` and columns by key, and which edge each is; None where no gradients are wanted.
    """

    zeros: torch.Tensor
    rows: torch.Tensor
    transposed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None

    @classmethod
    def of(cls, array: Any, heads: int, needs_grad: bool, device: torch.device | str = "cpu") -> Pattern:
        """From a SciPy CSR array."""
        indptr, columns = _repeated(array.indptr, array.indices, array.shape[1], heads)
        shape = (heads * array.shape[0], heads * array.shape[1])
        zeros = torch.sparse_csr_tensor(indptr, columns, torch.zeros(len(columns)), shape).to(device)
        rows = torch.repeat_interleave(torch.arange(shape[0]), indptr.diff()).to(device)
        if not needs_grad:
            return cls(zeros, rows, None)
        by_indptr, by_columns, edges = (tensor.to(device) for tensor in _by_key(array, heads))
        return cls(zeros, rows, (by_indptr, by_columns, edges))

    @property
    def indptr(self) -> torch.Tensor:
        return self.zeros.crow_indices()

    def sampled(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """`a · bᵀ · scale` at every edge."""
        return torch.sparse.sampled_addmm(self.zeros, a, b.mT, beta=0.0, alpha=scale).values()

    def softmax_(self, scores: torch.Tensor) -> torch.Tensor:
        """Over the edges of each query, in place."""
        scores -= self.by_edge(torch.segment_reduce(scores, "max", offsets=self.indptr, unsafe=True))
        total = torch.segment_reduce(scores.exp_(), "sum", offsets=self.indptr, unsafe=True)
        scores /= self.by_edge(total)
        return scores

    def by_edge(self, values: torch.Tensor) -> torch.Tensor:
        return values.index_select(0, self.rows)

    def product(self, weights: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        matrix = torch.sparse_csr_tensor(self.indptr, self.zeros.col_indices(), weights, self.zeros.shape)
        return _product(matrix, dense)

    def transposed_product(self, weights: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        assert self.transposed is not None
        indptr, columns, edges = self.transposed
        matrix = torch.sparse_csr_tensor(indptr, columns, weights.index_select(0, edges), self.zeros.shape[::-1])
        return _product(matrix, dense)


def _product(matrix: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    # The one with a named reduction is for CPUs only.
    return torch.sparse.mm(matrix, dense, "sum") if dense.device.type == "cpu" else matrix @ dense


# Any: index arrays of NumPy.
def _repeated(indptr: Any, columns: Any, width: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """CSR arrays of a block-diagonal matrix of the same block again and again."""
    n_edges = len(columns)
    head = torch.arange(heads)[:, None]
    starts = torch.from_numpy(indptr[:-1].astype(np.int64)) + n_edges * head
    repeated = torch.from_numpy(columns.astype(np.int64)) + width * head
    return torch.cat([starts.flatten(), torch.tensor([heads * n_edges])]), repeated.flatten()


def _by_key(array: Any, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import scipy.sparse

    n_edges = len(array.indices)
    numbered = scipy.sparse.csr_array((np.arange(n_edges), array.indices, array.indptr), shape=array.shape).tocsc()
    indptr, columns = _repeated(numbered.indptr, numbered.indices, array.shape[0], heads)
    edges = torch.from_numpy(numbered.data.astype(np.int64)) + n_edges * torch.arange(heads)[:, None]
    return indptr, columns, edges.flatten()


class SparseAttention(torch.autograd.Function):
    """Softmax attention over the edges of a pattern; q, k and v have as many heads as it, batch elements included."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float
    ) -> torch.Tensor:
        ctx.pattern, ctx.scale = pattern, scale
        weights = pattern.softmax_(pattern.sampled(q.flatten(0, 2), k.flatten(0, 2), scale))
        out = pattern.product(weights, v.flatten(0, 2)).view(*q.shape[:3], v.shape[3])
        ctx.save_for_backward(q, k, v, out, weights)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, weights = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        rows = d_out.flatten(0, 2)
        d_scores = pattern.sampled(rows, v.flatten(0, 2), 1.0)
        d_scores -= pattern.by_edge((d_out * out).sum(-1).flatten())
        d_scores.mul_(weights).mul_(ctx.scale)
        dq = pattern.product(d_scores, k.flatten(0, 2)).view_as(q)
        dk = pattern.transposed_product(d_scores, q.flatten(0, 2)).view_as(k)
        dv = pattern.transposed_product(weights, rows).view_as(v)
        return dq, dk, dv, None, None
