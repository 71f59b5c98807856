"""Arrays a user's function closes over: document ids, slopes, bias tables.

This file decides when two captured arrays are the same and which of them are read anew each time they are used, and
answers "the least and largest entry of this box of the array" in constant time and memory proportional to the array. It
must not know of expressions, and it reads torch tensors without importing torch.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsec.errors import MaskError
from sparsec.expr.ops import Array, Kind

_MAX_DIMS = 3


def is_torch_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_numpy(value: Any) -> Array:  # a torch tensor, numpy array or nested list
    """The content of an array or tensor, on the host; half precisions become float32."""
    if is_torch_tensor(value):
        value = value.detach().cpu()
        if value.is_floating_point() and value.element_size() < 4:
            value = value.float()
        return np.asarray(value.numpy())
    return np.asarray(value)


class Captured:
    """An array indexed by an expression.

    A frozen one is a copy, equal to another by content. A live one is a torch tensor of floats as it is whenever it is
    read: equal to another only where both are the same tensor, for equal values need not stay so.

    Attributes:
        original: What the user captured; a live tensor can be recognised by it.
        name: What the user's code calls it; not part of the identity.
        is_live: Whether it is read anew each time.
        shape: 1 to 3 dimensions; a single number has one.
        dtype: bool, int32, int64, float32 or float64; float32 where it is live, whatever the tensor's.
        digest: Hexadecimal digest of kind and shape, and of the content where it is frozen; stable across processes.
    """

    __slots__ = ("_frozen", "_ripmap", "digest", "dtype", "is_live", "name", "original", "shape")

    def __init__(self, value: object, name: str = "table", is_live: bool | None = None) -> None:
        """Captures `value`: live where it is a tensor of floats and `is_live`, or by default requires a gradient."""
        self.original = value
        self.name = name
        self.is_live = is_torch_tensor(value) and _is_live(value, is_live)
        self.shape: tuple[int, ...] = tuple(getattr(value, "shape", ())) or np.shape(to_numpy(value)) or (1,)
        if len(self.shape) > _MAX_DIMS:
            raise MaskError(
                f"captured array {name!r} has {len(self.shape)} dimensions; an expression can index 1 to {_MAX_DIMS}. "
                "Reshape it before capturing it."
            )
        if 0 in self.shape:
            raise MaskError(f"captured array {name!r} of shape {self.shape} is empty; capture at least one entry.")
        self._frozen = None if self.is_live else _frozen(value, name)
        self.dtype = np.dtype(np.float32) if self._frozen is None else self._frozen.dtype
        content = b"live" if self._frozen is None else self._frozen.tobytes()
        header = f"{self.kind}{self.shape}{self.dtype.str}".encode()
        self.digest = hashlib.blake2b(header + content, digest_size=16).hexdigest()
        self._ripmap: dict[tuple[int, ...], tuple[Array, Array]] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return Captured, (self.original if self.is_live else self.array, self.name, self.is_live)

    @property
    def array(self) -> Array:
        """The content, C-contiguous and not to be written to; of a live one as it is now."""
        return to_numpy(self.original).reshape(self.shape) if self._frozen is None else self._frozen

    @property
    def kind(self) -> Kind:
        return {"b": "bool", "i": "int", "f": "float"}[self.dtype.kind]  # type: ignore[return-value]

    @property
    def is_trainable(self) -> bool:
        """Whether the user captured a torch tensor that requires a gradient."""
        return is_torch_tensor(self.original) and bool(getattr(self.original, "requires_grad", False))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Captured):
            return NotImplemented
        if self is other:
            return True
        if self.is_live or other.is_live:
            return self.is_live and other.is_live and self.original is other.original
        return self.digest == other.digest

    def __hash__(self) -> int:
        return hash(id(self.original) if self.is_live else self.digest)

    def __repr__(self) -> str:
        return f"{self.name}[{'×'.join(map(str, self.shape))}]"

    def gather(self, indices: Sequence[Array]) -> Array:
        """The entries at `indices`: negative ones count from the end, and one outside reads the nearest entry."""
        return np.asarray(self.array[self.wrapped(indices)])

    def wrapped(self, indices: Sequence[Array]) -> tuple[Array, ...]:
        """`indices` with negative ones counted from the end and the rest clamped into the array."""
        return tuple(
            np.clip(np.where(index < 0, index + size, index), 0, size - 1)
            for index, size in zip(indices, self.shape, strict=True)
        )

    def extremes(
        self, lower: Sequence[npt.NDArray[np.int64]], upper: Sequence[npt.NDArray[np.int64]]
    ) -> tuple[Array, Array]:
        """Lower and upper bounds of the entries in boxes of indices.

        Args:
            lower: For each dimension, the least index of each box: int64 `[n]`.
            upper: For each dimension, the largest index of each box: int64 `[n]`.

        Returns:
            Two arrays `[n]`: exact for single entries and for boxes aligned to powers of two, otherwise conservative
            (the box is covered by at most two aligned cells in each dimension). A live array may hold anything.
        """
        if self.is_live:
            boxes = np.broadcast_shapes(*(np.shape(low) for low in lower))
            return np.full(boxes, -np.inf, np.float32), np.full(boxes, np.inf, np.float32)
        first, last, levels = [], [], []
        for low, high, size in zip(lower, upper, self.shape, strict=True):
            # An index that may wrap around can be anywhere, unless all of the interval wraps.
            wraps, all_wrap = low < 0, high < 0
            low = np.where(all_wrap, low + size, np.where(wraps, 0, low))
            high = np.where(all_wrap, high + size, np.where(wraps, size - 1, high))
            low, high = np.clip(low, 0, size - 1), np.clip(high, 0, size - 1)
            first.append(low)
            last.append(high)
            levels.append(np.frexp((high - low).astype(np.float64))[1])
        level = np.stack(np.broadcast_arrays(*levels), axis=-1)
        n = len(level)
        least, most = np.empty(n, self.dtype), np.empty(n, self.dtype)
        keys, group = np.unique(level, axis=0, return_inverse=True)
        for index, key in enumerate(keys):
            chosen = slice(None) if len(keys) == 1 else np.flatnonzero(group.reshape(-1) == index)
            cells = [
                (np.broadcast_to(low, n)[chosen] >> int(k), np.broadcast_to(high, n)[chosen] >> int(k))
                for low, high, k in zip(first, last, key, strict=True)
            ]
            low_map, high_map = self._cells(tuple(int(k) for k in key))
            corners = list(itertools.product(*((pair if k else pair[:1]) for pair, k in zip(cells, key, strict=True))))
            low_value, high_value = low_map[corners[0]], high_map[corners[0]]
            for corner in corners[1:]:
                low_value = np.minimum(low_value, low_map[corner])
                high_value = np.maximum(high_value, high_map[corner])
            least[chosen], most[chosen] = low_value, high_value
        return least, most

    def _cells(self, levels: tuple[int, ...]) -> tuple[Array, Array]:
        """Least and largest entry of every cell of `2 ** levels[d]` indices in dimension d; built once."""
        if levels not in self._ripmap:
            axis = next((d for d, level in enumerate(levels) if level), None)
            if axis is None:
                self._ripmap[levels] = (self.array, self.array)
            else:
                finer = self._cells(tuple(level - (d == axis) for d, level in enumerate(levels)))
                starts = np.arange(0, finer[0].shape[axis], 2)
                self._ripmap[levels] = (
                    np.minimum.reduceat(finer[0], starts, axis=axis),
                    np.maximum.reduceat(finer[1], starts, axis=axis),
                )
        return self._ripmap[levels]


def _is_live(tensor: Any, is_live: bool | None) -> bool:  # a torch tensor
    wanted = tensor.requires_grad if is_live is None else is_live
    return bool(wanted and tensor.is_floating_point())


def _frozen(value: object, name: str) -> Array:
    """A read-only copy in the dtype it is kept in."""
    array = to_numpy(value)
    if array.ndim == 0:
        array = array.reshape(1)
    if array.dtype.kind in "iu":
        fits = np.iinfo(np.int32).min <= int(array.min()) and int(array.max()) <= np.iinfo(np.int32).max
        if not fits and array.dtype == np.uint64 and int(array.max()) > np.iinfo(np.int64).max:
            raise MaskError(f"captured array {name!r} holds {int(array.max())}, which does not fit int64.")
        dtype = np.dtype(np.int32 if fits else np.int64)
    elif array.dtype.kind == "f":
        dtype = np.dtype(np.float32 if array.dtype.itemsize <= 4 else np.float64)
    elif array.dtype.kind == "b":
        dtype = np.dtype(np.bool_)
    else:
        raise MaskError(f"captured array {name!r} has dtype {array.dtype}; use bool, an integer or a float type.")
    # A copy: the user may write to theirs after this.
    frozen = np.array(array, dtype=dtype, order="C", copy=True)
    frozen.setflags(write=False)
    return frozen
