"""What a peer hands over: itself ready to be called, or why it takes no part.

This file decides what is refused for every peer alike. It must not know any peer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from bench.results import PlanFacts
    from bench.workload import Workload
    from sparsec.masks import BoundMask

Call = Callable[[], Any]  # whatever the peer returns


class RefusedError(Exception):
    """Why a peer does not take part in a case, in one sentence."""


@dataclass(frozen=True)
class Prepared:
    """A peer, ready to be called.

    Attributes:
        call: The forward pass.
        to_out: From what `call` returns to `[batch, heads, q_len, head_dim]`, and back; not timed.
        computes: The mask whose attention it computes.
        plan: After the first call, what ours says of itself.
        note: What a reader of the time must know.
        inputs: What gradients are taken of, in the layout of `call`; the work's q, k and v by default.
    """

    call: Call
    computes: BoundMask
    to_out: Callable[[Any], torch.Tensor] = lambda out: out
    plan: Callable[[], PlanFacts] | None = None
    note: str = ""
    inputs: tuple[torch.Tensor, ...] | None = None


class Peer(Protocol):
    """One way to compute attention."""

    @property
    def name(self) -> str: ...

    def prepare(self, work: Workload) -> Prepared:
        """The peer made ready for the work, everything done that is done once.

        Where the work needs gradients, what the call returns can be differentiated.

        Raises:
            RefusedError: It cannot do this work.
        """
        ...


def plain(bound: BoundMask) -> BoundMask:
    """The mask, where one serves all heads and batch elements."""
    if bound.varies_by_head or bound.varies_by_batch:
        raise RefusedError("it is given one mask for all heads and batch elements, and this one varies")
    return bound


def check_memory(n_bytes: int, what: str, work: Workload) -> None:
    """Raises where a peer would not fit into what is left of this process's memory, and of the device's."""
    from bench.protocol import available_bytes

    room = available_bytes(work.q.device.type)
    if n_bytes > room:
        raise RefusedError(f"{what} would take {n_bytes / 2**30:.1f} GiB, and {room / 2**30:.1f} GiB are free")


def dense_mask(bound: BoundMask, work: Workload) -> torch.Tensor:
    """The mask as a bool tensor `[q_len, kv_len]` beside the work's tensors."""
    import torch

    return torch.from_numpy(bound.to_csr().toarray()).to(work.q.device)
