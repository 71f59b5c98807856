"""Arrays a user's function closes over: document ids, slopes, bias tables.

This file decides when two captured arrays are the same, and answers "the least and largest entry of this box of the
array" in constant time and memory proportional to the array. It must not know of expressions, and it reads torch
tensors without importing torch.
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
    """An array indexed by an expression; immutable, equal by content.

    Two tensors that require a gradient are equal only when they are the same object: equal values need not stay so.

    Attributes:
        array: bool, int32, int64, float32 or float64 numpy array of 1 to 3 dimensions, C-contiguous and read-only.
        original: What the user captured; a torch tensor that requires a gradient can be recognised by it.
        name: What the user's code calls it; not part of the identity.
        digest: Hexadecimal digest of kind, shape and content, stable across processes.
    """

    __slots__ = ("_ripmap", "array", "digest", "name", "original")

    def __init__(self, value: object, name: str = "table") -> None:
        array = to_numpy(value)
        if array.ndim == 0:
            array = array.reshape(1)
        if not 1 <= array.ndim <= _MAX_DIMS:
            raise MaskError(
                f"captured array {name!r} has {array.ndim} dimensions; an expression can index 1 to {_MAX_DIMS}. "
                "Reshape it before capturing it."
            )
        if array.size == 0:
            raise MaskError(f"captured array {name!r} of shape {array.shape} is empty; capture at least one entry.")
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
        self.array: Array = frozen
        self.original = value
        self.name = name
        header = f"{self.kind}{frozen.shape}{frozen.dtype.str}".encode()
        self.digest = hashlib.blake2b(header + frozen.tobytes(), digest_size=16).hexdigest()
        self._ripmap: dict[tuple[int, ...], tuple[Array, Array]] = {}

    @property
    def kind(self) -> Kind:
        return {"b": "bool", "i": "int", "f": "float"}[self.array.dtype.kind]  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def is_trainable(self) -> bool:
        """Whether the user captured a torch tensor that requires a gradient."""
        return is_torch_tensor(self.original) and bool(getattr(self.original, "requires_grad", False))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Captured):
            return NotImplemented
        if self is other:
            return True
        same_object = self.original is other.original
        return self.digest == other.digest and (same_object or not (self.is_trainable or other.is_trainable))

    def __hash__(self) -> int:
        return hash(self.digest)

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
            (the box is covered by at most two aligned cells in each dimension).
        """
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
        least, most = np.empty(n, self.array.dtype), np.empty(n, self.array.dtype)
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
