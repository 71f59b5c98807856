"""Masks that differ by query head or by batch element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsec.errors import MaskError
from sparsec.masks.mask import Key, Mask, Not, Shape, Transpose, common


@dataclass(frozen=True, eq=False, repr=False)
class _Members(Mask):
    members: tuple[Mask, ...]

    def _operands(self) -> tuple[Mask, ...]:
        return self.members

    def _with_operands(self, operands: tuple[Mask, ...]) -> Mask:
        return type(self)(operands)

    @property
    def _depends_on_lengths(self) -> bool:  # type: ignore[override]
        return any(m._depends_on_lengths for m in self.members)

    def _fixed_lengths(self) -> tuple[int | None, int | None]:
        pairs = [m._fixed_lengths() for m in self.members]
        q_len, kv_len = (common(what, (pair[i] for pair in pairs), self) for i, what in enumerate(("queries", "keys")))
        return q_len, kv_len

    def _check(self, shape: Shape) -> None:
        for member in self.members:
            member._check(shape)

    def _normal(self, shape: Shape | None, negated: bool, transposed: bool) -> Mask:
        # Only where heads cannot be told apart one by one (a predicate beside them reads h): the members, as they are.
        leaf: Mask = Transpose(self) if transposed else self
        return Not(leaf) if negated else leaf

    def _key(self) -> Key:
        return (type(self).__name__, *(member._canonical for member in self.members))


@dataclass(frozen=True, eq=False, repr=False)
class PerHead(_Members):
    """One mask a query head."""

    varies_by_head = True

    def _text(self, show: Callable[[object], str]) -> str:
        return f"per_head([{', '.join(show(m) for m in self.members)}])"

    @property
    def n_heads(self) -> int | None:  # type: ignore[override]
        return len(self.members)

    @property
    def n_batch(self) -> int | None:  # type: ignore[override]
        return common("batch elements", (m.n_batch for m in self.members), self)

    @property
    def varies_by_batch(self) -> bool:  # type: ignore[override]
        return any(m.varies_by_batch for m in self.members)

    def _select(self, batch: int, head: int) -> Mask:
        return self.members[head]._select(batch, head)


@dataclass(frozen=True, eq=False, repr=False)
class PerBatch(_Members):
    """One mask a batch element."""

    varies_by_batch = True

    def _text(self, show: Callable[[object], str]) -> str:
        return f"per_batch([{', '.join(show(m) for m in self.members)}])"

    @property
    def n_batch(self) -> int | None:  # type: ignore[override]
        return len(self.members)

    @property
    def n_heads(self) -> int | None:  # type: ignore[override]
        return common("heads", (m.n_heads for m in self.members), self)

    @property
    def varies_by_head(self) -> bool:  # type: ignore[override]
        return any(m.varies_by_head for m in self.members)

    def _select(self, batch: int, head: int) -> Mask:
        return self.members[batch]._select(batch, head)


def per_head(masks: Sequence[Mask]) -> Mask:
    """One mask for each query head, in order; their lengths must agree.

    Raises:
        MaskError: No masks, something that is no mask, or one that differs by head itself.
    """
    members = _checked(masks, "per_head")
    if any(m.varies_by_head for m in members):
        raise MaskError("per_head: a member differs by head itself; give one plain mask a head")
    if any(m.varies_by_batch for m in members):
        raise MaskError(
            "per_head: a member differs by batch element; nest the other way: per_batch([per_head([...]), ...])"
        )
    return PerHead(members)


def per_batch(masks: Sequence[Mask]) -> Mask:
    """One mask for each batch element, in order; they may differ by head in turn.

    Raises:
        MaskError: No masks, something that is no mask, or one that differs by batch element itself.
    """
    members = _checked(masks, "per_batch")
    if any(m.varies_by_batch for m in members):
        raise MaskError("per_batch: a member differs by batch element itself; give one mask a batch element")
    result = PerBatch(members)
    # Asked here so that a disagreement is met where it is made.
    _ = result.n_heads
    return result


def _checked(masks: Sequence[Mask], name: str) -> tuple[Mask, ...]:
    members = tuple(masks)
    if not members:
        raise MaskError(f"{name}: the list is empty; give at least one mask")
    for i, member in enumerate(members):
        if not isinstance(member, Mask):
            raise MaskError(f"{name}: entry {i} is a {type(member).__name__}; every entry must be a mask")
    return members
