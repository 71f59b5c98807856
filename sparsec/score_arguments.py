"""The tensors of a score modifier at a call: those it captured, or those given instead, and what sinks do.

This file decides how `score_args` names the tensors it replaces, what is refused before a kernel reads them, and how
sinks enter a result. It imports torch only when tensors are at hand. It must not know plans or kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsec.errors import SparsecError
from sparsec.score import ScoreMod

if TYPE_CHECKING:
    import torch

ScoreArgs = Sequence["torch.Tensor"] | Mapping[str, "torch.Tensor"]


class ScoreArguments:
    """What a modifier is called with.

    Attributes:
        tensors: Those it captured, in the order of `ScoreMod.arguments`.
        has_sinks: Whether the modifier has sinks.
    """

    def __init__(self, score: ScoreMod | None) -> None:
        self._score = score
        arguments = () if score is None else score.arguments
        self._names = tuple(argument.name for argument in arguments)
        self._n_tables = 0 if score is None else len(score.live_tables)
        self.tensors: tuple[Any, ...] = tuple(argument.original for argument in arguments)  # torch tensors
        self.has_sinks = score is not None and score.sinks is not None
        self._batch_limit = None if score is None else score.batch_limit

    def of_call(self, given: ScoreArgs | None) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """The live tables and the sinks of a call.

        Args:
            given: Tensors in place of the captured ones: all of them in order, or some by name.

        Raises:
            SparsecError: There are no such arguments.
        """
        tensors = self.tensors if given is None else self._replaced(given)
        tables = tensors[: self._n_tables]
        if not self.has_sinks:
            return tables, None
        return tables, tensors[self._n_tables] if len(tensors) > self._n_tables else self._frozen_sinks()

    def ready(self, tables: Sequence[torch.Tensor], q: torch.Tensor) -> list[torch.Tensor]:
        """Live tables as kernels read them: fp32, contiguous.

        Raises:
            SparsecError: One is of another shape or kind than what was captured, or on another device than q.
        """
        import torch

        if self._batch_limit is not None and q.shape[0] > self._batch_limit:
            raise SparsecError(
                f"score_mod: an array indexed by the batch element has {self._batch_limit} entries, and the tensors "
                f"have batch {q.shape[0]}: give it one entry each"
            )
        if not tables and not self._n_tables:
            return []
        assert self._score is not None, "tables without a score modifier"
        made = []
        for captured, table in zip(self._score.live_tables, tables, strict=True):
            shape = tuple(table.shape) or (1,)
            if shape != captured.shape or not table.is_floating_point() or table.device != q.device:
                raise SparsecError(
                    f"score_args: {captured.name!r} was captured with shape {captured.shape}; this is a {table.dtype} "
                    f"tensor of shape {shape} on {table.device}, and q is on {q.device}: give one of floats, of that "
                    "shape and device, or compile again"
                )
            made.append(table.detach().to(torch.float32).reshape(captured.shape).contiguous())
        return made

    def _replaced(self, given: ScoreArgs) -> tuple[torch.Tensor, ...]:
        if isinstance(given, Mapping):
            for name in given:
                if self._names.count(name) != 1:
                    raise SparsecError(
                        f"score_args names {name!r}; the score modifier's tensors are {list(self._names)}: name one "
                        "that is there once, or give all in that order"
                    )
            return tuple(given.get(name, own) for name, own in zip(self._names, self.tensors, strict=True))
        if len(given) != len(self.tensors):
            raise SparsecError(
                f"score_args has {len(given)} tensors; the score modifier captured {len(self.tensors)}: "
                f"{list(self._names)} (tensors of floats alone can be replaced)"
            )
        return tuple(given)

    def _frozen_sinks(self) -> torch.Tensor:
        import torch

        assert self._score is not None, "sinks without a score modifier"
        assert self._score.sinks is not None, "sinks that are not there"
        return torch.from_numpy(self._score.sinks.array.astype("float32"))


def with_sinks(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, *, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp once a logit for each head has entered the denominator; differentiable.

    Args:
        out: `[batch, q_heads, q_len, v_dim]`.
        lse: fp32 `[batch, q_heads, q_len]`.
        sinks: `[q_heads]`.
        in_place: Whether `out` may be overwritten.
    """
    import torch

    logits = sinks.to(device=lse.device, dtype=torch.float32)[:, None]
    is_empty = torch.isneginf(lse)
    # Of an empty row nothing may become inf - inf: its output is 0 whatever it is multiplied by.
    base = torch.where(is_empty, torch.zeros_like(lse), lse)
    share = torch.sigmoid(base - logits).unsqueeze(-1)
    joined = torch.where(is_empty, logits.expand_as(lse), base + torch.nn.functional.softplus(logits - base))
    return (out.mul_(share) if in_place else (out * share).to(out.dtype)), joined
