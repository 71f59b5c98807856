"""What `compile` was told, checked: a mistake is met at once and by its name, not at the first call.

This file decides which values each argument may have. It must not know what is done with them.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NoReturn, get_args

from sparsec.backends.base import BACKENDS, DTYPES, Dtype
from sparsec.device import Device, detect_cpu, detect_gpu
from sparsec.device import device as named_device
from sparsec.errors import MaskError, SparsecError, UnsupportedError
from sparsec.masks.arguments import is_int
from sparsec.masks.mask import BoundMask, Mask
from sparsec.planner.plans import Reorder
from sparsec.score import ScoreMod
from sparsec.template import template
from sparsec.tensors import Layout

if TYPE_CHECKING:
    import torch

Tune = Literal["off", "cached", "auto", "quick", "full"]

# What others call the dtypes.
_OTHER_NAMES = {
    "fp32": ("float32", "float", "f32"),
    "fp16": ("float16", "half", "f16"),
    "bf16": ("bfloat16",),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller of `compile` fixed; None is taken from the first tensors."""

    q_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    v_dim: int | None
    dtype: Dtype | None
    device: str | None
    backend: str | None
    template: str | None
    needs_grad: bool | None
    scale: float | None
    score: ScoreMod | None
    layout: Layout
    tune: Tune
    reorder: Reorder

    def check(self, bound: BoundMask) -> None:
        """Raises where an argument cannot be, or not for this mask.

        Raises:
            MaskError: The mask has members for another number of heads.
            UnsupportedError: More or fewer than sparsec serves.
            BackendMissingError: A GPU was named, and there is none.
            SparsecError: No such name, or a value of the wrong kind.
        """
        check_choice("layout", self.layout, get_args(Layout))
        check_choice("tune", self.tune, get_args(Tune))
        check_choice("reorder", self.reorder, get_args(Reorder))
        check_choice("needs_grad", self.needs_grad, (None, True, False))
        if self.q_heads is not None and self.kv_heads is not None and self.q_heads % self.kv_heads:
            raise UnsupportedError(
                f"q_heads={self.q_heads} and kv_heads={self.kv_heads}: the number of query heads must be a multiple of "
                "that of the key heads"
            )
        if None not in (bound.n_heads, self.q_heads) and bound.n_heads != self.q_heads:
            raise MaskError(f"the mask has one member for each of {bound.n_heads} heads, and q_heads={self.q_heads}")
        if self.template is not None:
            template(self.template)
        if self.backend is not None and self.backend not in BACKENDS:
            raise SparsecError(f"there is no back end {self.backend!r}; the back ends are {', '.join(BACKENDS)}")
        if self.device is not None:
            torch_device(self.device)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise SparsecError(f"{name}={value!r} is none of {', '.join(map(repr, choices))}")


def check_mask(mask: object) -> None:
    """Raises where this is no mask, with what makes one of it."""
    if isinstance(mask, (Mask, BoundMask)):
        return
    if isinstance(mask, str):
        hint = f"masks.parse({mask!r}) reads an expression"
    elif getattr(mask, "__module__", "").startswith("sparsec.masks"):
        hint = f"call it: masks.{getattr(mask, '__name__', '')}(…)"
    elif callable(mask):
        hint = "masks.from_mask_mod(fn) takes fn(b, h, q_idx, kv_idx)"
    elif type(mask).__name__ == "BlockMask":
        hint = "masks.from_block_mask(mask) takes it"
    else:
        hint = "masks.from_dense takes an array of bool, from_csr and from_sparse take edges, from_graph a graph"
    raise MaskError(f"sparsec takes a mask of sparsec.masks; got {type(mask).__name__}: {hint}")


def bound_mask(mask: Mask | BoundMask, seq_len: int | tuple[int, int] | None, kv_len: int | None) -> BoundMask:
    """The mask with the lengths that `compile` was given.

    Raises:
        MaskError: No mask; no length where it knows none; or others than it knows.
    """
    check_mask(mask)
    if isinstance(seq_len, tuple):
        if len(seq_len) != 2:
            raise MaskError(f"seq_len={seq_len}: give one length, or (q_len, kv_len)")
        q_len: int | None = seq_len[0]
        if kv_len not in (None, seq_len[1]):
            raise MaskError(f"seq_len={seq_len} and kv_len={kv_len} disagree: give the number of keys once")
        kv_len = seq_len[1]
    else:
        q_len = seq_len
    for name, length in (("seq_len", q_len), ("kv_len", kv_len)):
        if length is not None and not is_int(length):
            raise MaskError(f"{name}={length!r}: a length is an int, or seq_len a tuple (q_len, kv_len)")
    if isinstance(mask, Mask):
        return mask.bind(q_len, kv_len)
    # A bound mask knows its lengths; those given must agree, and a single length stands for the queries.
    if q_len not in (None, mask.q_len) or kv_len not in (None, mask.kv_len):
        raise MaskError(f"the mask is bound to {mask.shape}, and compile was asked for {(q_len, kv_len)}")
    return mask


def dtype_name(dtype: torch.dtype | str) -> Dtype:
    """`fp32`, `fp16` or `bf16`.

    Raises:
        UnsupportedError: Another.
    """
    for name in DTYPES:
        if dtype == name or str(dtype) == f"torch.{_OTHER_NAMES[name][0]}":
            return name
    meant = next((name for name, others in _OTHER_NAMES.items() if str(dtype) in others), None)
    hint = f"; did you mean {meant!r}?" if meant else ""
    raise UnsupportedError(f"dtype {dtype}: sparsec takes {', '.join(DTYPES)}{hint}")


def device_name(device: torch.device | str | None) -> str | None:
    """The name of a torch device or of one of `devices.yaml`.

    Raises:
        SparsecError: It is neither.
    """
    if device is None or isinstance(device, str):
        return device
    if type(device).__name__ != "device":
        raise SparsecError(f"device={device!r}: give a name such as 'cpu' or 'cuda:0', or a torch.device")
    return str(device)


def torch_device(name: str) -> Device:
    """The device a torch device string or a name of `devices.yaml` stands for.

    Raises:
        BackendMissingError: There is no GPU.
        SparsecError: No device has that name.
    """
    family, _, index = name.partition(":")
    if family == "cpu":
        return detect_cpu()
    if family != "cuda":
        return named_device(name)
    if index and not index.isdigit():
        raise SparsecError(f"device={name!r}: what follows 'cuda:' is a number")
    return detect_gpu(int(index) if index else None)


def finite_scale(scale: object) -> float | None:
    """The scale as a Python float, whatever kind of number it is.

    Raises:
        SparsecError: It is no finite number.
    """
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        _refuse_scale(scale, "give a number" + (": scale.item()" if hasattr(scale, "item") else ""))
    if not math.isfinite(scale):
        _refuse_scale(scale, "the scale of the scores must be a finite number")
    return float(scale)


def _refuse_scale(scale: object, what: str) -> NoReturn:
    raise SparsecError(f"scale={scale!r}: {what}")


def count(name: str, value: object, most: int | None = None) -> int | None:
    """A number of heads or dimensions as a Python int.

    Raises:
        SparsecError: It is no int.
        UnsupportedError: Less than 1, or more than sparsec serves.
    """
    if value is None:
        return None
    if not is_int(value):
        raise SparsecError(f"{name}={value!r} must be an int")
    if value < 1 or (most is not None and value > most):
        raise UnsupportedError(f"{name}={value}: sparsec takes {'1 or more' if most is None else f'1 to {most}'}")
    return int(value)
