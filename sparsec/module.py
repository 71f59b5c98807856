"""`SparseAttention`: self-attention under a mask as a layer of a model.

This file decides how the layer projects its input, which parameters it has, and how many lengths it keeps compiled. It
imports torch, and is imported when `sparsec.SparseAttention` is first asked for. It must not know plans or kernels.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import sparsec.torch_ops  # noqa: F401  # its operators must be in torch's registry
from sparsec.errors import SparsecError
from sparsec.expr import Expr
from sparsec.handles import register
from sparsec.masks.mask import Mask
from sparsec.runtime import Attention, compile
from sparsec.score import ScoreFunction, ScoreMod, as_score_mod
from sparsec.score_arguments import ScoreArguments, with_sinks

# Lengths kept compiled at a time; the one that was used longest ago goes first.
_MAX_LENGTHS = 8


class SparseAttention(nn.Module):
    """Multi-head self-attention under a mask, with projections of its own.

    The mask's lengths may stay open: each length that is met is compiled once, and the last few are kept. Parameters
    are the projections, and those that a score modifier captured; neither the mask nor anything compiled is part of the
    state dict.

    Args:
        mask: Which token attends which (True means attend).
        embed_dim: Of input and output.
        q_heads: Query heads; a multiple of `kv_heads`.
        kv_heads: Key and value heads (grouped or multi-query attention); `q_heads` by default.
        head_dim: Of each head; `embed_dim / q_heads` by default.
        bias: Whether the projections add a bias.
        scale: Of the scores; `1/√head_dim` by default.
        score_mod: As in `sparsec.compile`. Parameters that it captures become the layer's own.
        backend: As in `sparsec.compile`.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        SparsecError: Heads and dimensions that do not go together.
    """

    def __init__(
        self,
        mask: Mask,
        embed_dim: int,
        q_heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = True,
        scale: float | None = None,
        score_mod: ScoreMod | Expr | ScoreFunction | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = q_heads if kv_heads is None else kv_heads
        if min(embed_dim, q_heads, kv_heads) < 1 or q_heads % kv_heads:
            raise SparsecError(
                f"SparseAttention: embed_dim={embed_dim}, q_heads={q_heads}, kv_heads={kv_heads}: all must be at least "
                "1, and the query heads a multiple of the key heads"
            )
        if head_dim is None and embed_dim % q_heads:
            raise SparsecError(
                f"SparseAttention: embed_dim={embed_dim} is no multiple of q_heads={q_heads}; give head_dim"
            )
        self.embed_dim, self.q_heads, self.kv_heads = embed_dim, q_heads, kv_heads
        self.head_dim = embed_dim // q_heads if head_dim is None else head_dim
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}  # as nn.Linear takes them
        self.q_proj = nn.Linear(embed_dim, q_heads * self.head_dim, **options)
        self.k_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, **options)
        self.v_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, **options)
        self.out_proj = nn.Linear(q_heads * self.head_dim, embed_dim, **options)
        score = None if score_mod is None else as_score_mod(score_mod)
        self._score_arguments = ScoreArguments(score)
        captured = self._score_arguments.tensors
        self._trained = [place for place, tensor in enumerate(captured) if isinstance(tensor, nn.Parameter)]
        if self._trained:
            self.score_parameters = nn.ParameterList(captured[place] for place in self._trained)
        self._by_length = _ByLength(mask, scale, score, backend)
        self._handle = self._by_length.handle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output.

        Args:
            x: `[batch, length, embed_dim]`.

        Returns:
            `[batch, length, embed_dim]`. A token that attends none gets the output projection's bias.

        Raises:
            MaskError: The mask cannot have this length.
        """
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.q_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        score_args = self._score_args()
        if torch.compiler.is_compiling():
            tables, sinks = self._score_arguments.of_call(score_args)
            out, lse = torch.ops.sparsec.forward(q, k, v, list(tables), self._handle)
            if sinks is not None:
                out, _ = with_sinks(out, lse, sinks)
        else:
            out = self.attention(length)(q, k, v, score_args=score_args)
        # Heads lie within the rows of the output as within those of q, so that this is a view.
        mixed: torch.Tensor = self.out_proj(out.transpose(1, 2).reshape(batch, length, self.q_heads * self.head_dim))
        return mixed

    def _score_args(self) -> list[torch.Tensor] | None:
        """What the score modifier captured, with the layer's parameters as they are now: others may have come in."""
        if not self._trained:
            return None
        found = list(self._score_arguments.tensors)
        for place, parameter in zip(self._trained, self.score_parameters, strict=True):
            found[place] = parameter
        return found

    def attention(self, length: int) -> Attention:
        """What computes a length; `.plan` says how, once it was called."""
        return self._by_length.of(length)

    @property
    def mask(self) -> Mask:
        return self._by_length.mask

    def extra_repr(self) -> str:
        return (
            f"{self.mask}, embed_dim={self.embed_dim}, q_heads={self.q_heads}, kv_heads={self.kv_heads}, "
            f"head_dim={self.head_dim}"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:  # as nn.Module has it
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        # A copy has an attention of its own, under a number of its own.
        self._handle = self._by_length.handle


class _ByLength:
    """Compiled attentions by length; as an executor it serves whatever length the tensors have."""

    def __init__(self, mask: Mask, scale: float | None, score: ScoreMod | None, backend: str | None) -> None:
        self.mask = mask
        self._scale, self._score, self._backend = scale, score, backend
        self._begin()

    def _begin(self) -> None:
        self._made: OrderedDict[int, Attention] = OrderedDict()
        self._lock = threading.Lock()
        self.handle = register(self)

    def of(self, length: int) -> Attention:
        with self._lock:
            found = self._made.pop(length, None)
            if found is None:
                found = compile(self.mask, length, scale=self._scale, score_mod=self._score, backend=self._backend)
            self._made[length] = found
            while len(self._made) > _MAX_LENGTHS:
                self._made.popitem(last=False)
            return found

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.of(q.shape[2]).forward(q, k, v, tables)

    def backward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        d_out: torch.Tensor,
        d_lse: torch.Tensor,
        tables: Sequence[torch.Tensor] = (),
        is_wanted: Sequence[bool] = (),
    ) -> tuple[torch.Tensor, ...]:
        return self.of(q.shape[2]).backward(q, k, v, out, lse, d_out, d_lse, tables, is_wanted)

    def held(self) -> _ByLength:
        return self

    @property
    def was_updated(self) -> bool:
        return False

    def __getstate__(self) -> dict[str, Any]:
        # Nothing compiled is copied: it is made again when it is needed.
        return {"mask": self.mask, "_scale": self._scale, "_score": self._score, "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()
