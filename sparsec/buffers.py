"""Large results in memory that is mapped already.

The system hands out a large block page by page, each with a fault and a zeroing, and takes it back as soon as it is
freed: writing a result of 130 MB for the first time costs more than computing one of few edges. This file decides which
blocks are kept for the next result of the same size, as torch keeps them on a GPU. It must not know what is stored.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

# Smaller blocks come from the C library's heap, which keeps them itself (glibc's M_MMAP_THRESHOLD grows to 32 MiB).
_MIN_BYTES: Final = 4 << 20
# Free blocks are kept up to so many bytes in all.
_KEPT_BYTES: Final = 512 << 20


class _FreeBlocks:
    """Blocks whose tensors are gone, the latest last."""

    def __init__(self) -> None:
        self._blocks: dict[int, torch.Tensor] = {}
        # A block may come back, and push others out, in the middle of `take`: when the garbage collector frees a tensor
        # there. So nothing is taken by its place.
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> torch.Tensor | None:
        with self._lock:
            for block in reversed(list(self._blocks.values())):
                if block.numel() == nbytes and self._blocks.pop(id(block), None) is not None:
                    return block
        return None

    def give(self, block: torch.Tensor) -> None:
        with self._lock:
            self._blocks[id(block)] = block
            while self.nbytes > _KEPT_BYTES:
                del self._blocks[next(iter(self._blocks))]

    @property
    def nbytes(self) -> int:
        return sum(block.numel() for block in list(self._blocks.values()))

    def clear(self) -> None:
        with self._lock:
            self._blocks.clear()


_free = _FreeBlocks()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised contiguous tensor; a large one on the CPU may lie where an earlier one did.

    The block goes back when the last tensor that shares its memory is gone, views and those saved for a backward pass
    included.
    """
    import torch

    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _MIN_BYTES:
        return torch.empty(*shape, dtype=dtype, device=device)
    block = _free.take(nbytes)
    if block is None:
        block = torch.empty(nbytes, dtype=torch.uint8, device=device)
    # torch's storage keeps this array alive, and nothing else does: it dies with the last tensor.
    array = block.numpy()
    weakref.finalize(array, _free.give, block).atexit = False
    return torch.from_numpy(array).view(dtype).view(*shape)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The same, filled with zeros."""
    return empty(shape, dtype, device).zero_()


def free_bytes() -> int:
    """Of the blocks that wait for another result."""
    return _free.nbytes


def release() -> None:
    """Gives the free blocks back to the system."""
    _free.clear()
