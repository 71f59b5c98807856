"""Masks as a user of FlexAttention writes them: predicates on index tensors.

This file decides the predicate for each mask a grid may name. It shares nothing with how sparsec reads masks, apart
from the tables of random blocks, which nobody could guess; every predicate is checked against the mask on sampled rows.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.grid import MaskSource
from bench.workload import document_lengths

if TYPE_CHECKING:
    import torch

    from sparsec.masks import BoundMask

MaskMod = Callable[..., Any]  # of four index tensors, to a bool tensor

# A dense look-up of every pair takes a byte a pair.
_MAX_LOOKUP_BYTES = 2**30


class NoPredicateError(ValueError):
    """A mask for which a user of FlexAttention has no way."""


def mask_mod(source: MaskSource, bound: BoundMask, device: torch.device | str = "cpu") -> MaskMod | None:
    """The predicate of a mask, with its tables on a device; None where every pair attends.

    Raises:
        NoPredicateError: The mask is irregular, and too large for a look-up.
    """
    if source.kind == "documents":
        return _documents(document_lengths(source), device)
    if source.kind == "packed":
        return _blocks(bound, int(source.options["block"]), device)
    if source.kind != "text":
        return _lookup(bound, device)
    expression = ast.parse(source.text.strip(), mode="eval").body
    if isinstance(expression, ast.Call) and _name(expression) == "full":
        return None
    try:
        return _written(expression, bound, device)
    except _NotWrittenError:
        return _lookup(bound, device)


class _NotWrittenError(Exception):
    """No natural predicate is known for a constructor with these arguments."""


def _written(node: ast.expr, bound: BoundMask, device: torch.device | str) -> MaskMod:
    match node:
        case ast.BinOp(op=op, left=left, right=right):
            return _combined(type(op), _written(left, bound, device), _written(right, bound, device))
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            inner = _written(operand, bound, device)
            return lambda b, h, q, kv: ~inner(b, h, q, kv)
        case ast.Call():
            arguments = [ast.literal_eval(each) for each in node.args]
            options = {each.arg: ast.literal_eval(each.value) for each in node.keywords if each.arg}
            name = _name(node)
            # Where these stand alone, their blocks are all there is to know.
            if name in ("bigbird", "random_blocks") and isinstance(arguments[-1], int):
                return _blocks(bound, arguments[0 if name == "bigbird" else 1], device)
            if name == "documents":
                return _documents(*arguments, device)
            writer = _WRITERS.get(name)
            if writer is None:
                raise _NotWrittenError
            try:
                return writer(*arguments, **options)
            except TypeError:
                raise _NotWrittenError from None
    raise _NotWrittenError


def _name(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _combined(op: type[ast.operator], left: MaskMod, right: MaskMod) -> MaskMod:
    if op is ast.BitAnd:
        return lambda b, h, q, kv: left(b, h, q, kv) & right(b, h, q, kv)
    if op is ast.BitOr:
        return lambda b, h, q, kv: left(b, h, q, kv) | right(b, h, q, kv)
    return lambda b, h, q, kv: left(b, h, q, kv) & ~right(b, h, q, kv)


def _full() -> MaskMod:
    return lambda b, h, q, kv: q >= 0


def _causal() -> MaskMod:
    return lambda b, h, q, kv: q >= kv


def _window(left: int, right: int) -> MaskMod:
    if right == 0:
        return lambda b, h, q, kv: (q >= kv) & (q - kv <= left)
    return lambda b, h, q, kv: (q - kv <= left) & (kv - q <= right)


def _dilated(reach: int, dilation: int) -> MaskMod:
    return lambda b, h, q, kv: ((q - kv).abs() <= reach) & ((q - kv) % dilation == 0)


def _dilated_2d(block: int, dilation: int) -> MaskMod:
    return lambda b, h, q, kv: (q // block == kv // block) & (q % block % dilation == 0) & (kv % block % dilation == 0)


def _strided(stride: int) -> MaskMod:
    return lambda b, h, q, kv: (q - kv) % stride == 0


def _prefix(n: int) -> MaskMod:
    return lambda b, h, q, kv: kv < n


def _global_tokens(n: int) -> MaskMod:
    if not isinstance(n, int):
        raise _NotWrittenError
    return lambda b, h, q, kv: (q < n) | (kv < n)


def _longformer(window: int, global_tokens: int) -> MaskMod:
    side = window // 2
    return _combined(ast.BitOr, _window(side, side), _global_tokens(global_tokens))


def _documents(lengths: list[int], device: torch.device | str) -> MaskMod:
    import torch

    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    return lambda b, h, q, kv: document[q] == document[kv]


def _neighborhood(shape: int | tuple[int, ...], kernel: int | tuple[int, ...]) -> MaskMod:
    grid = (shape,) if isinstance(shape, int) else tuple(shape)
    kernels = (kernel,) * len(grid) if isinstance(kernel, int) else tuple(kernel)

    def attends(b: Any, h: Any, q: torch.Tensor, kv: torch.Tensor) -> Any:
        result: Any = None
        inner = 1
        for size, width in zip(reversed(grid), reversed(kernels), strict=True):
            first = (q // inner % size - width // 2).clamp(0, size - width)
            offset = kv // inner % size - first
            near = (offset >= 0) & (offset < width)
            result = near if result is None else result & near
            inner *= size
        return result

    return attends


def _blocks(bound: BoundMask, block: int, device: torch.device | str) -> MaskMod:
    import torch

    tiles = bound.tiles(block, block)
    n_rows, n_columns = -(-bound.q_len // block), -(-bound.kv_len // block)
    table = torch.zeros(n_rows, n_columns, dtype=torch.bool)
    indptr = torch.from_numpy(tiles.indptr.astype("int64"))
    rows = torch.repeat_interleave(torch.arange(n_rows), indptr.diff())
    table[rows, torch.from_numpy(tiles.indices.astype("int64"))] = True
    table = table.to(device)
    return lambda b, h, q, kv: table[q // block, kv // block]


def _lookup(bound: BoundMask, device: torch.device | str) -> MaskMod:
    import torch

    n_bytes = bound.q_len * bound.kv_len
    if bound.varies_by_head or bound.varies_by_batch:
        raise NoPredicateError("no predicate is written for a mask that differs between heads or batch elements")
    if n_bytes > _MAX_LOOKUP_BYTES:
        raise NoPredicateError(
            f"as a look-up, an irregular mask of {bound.q_len:,} × {bound.kv_len:,} tokens "
            f"takes {n_bytes / 2**30:.1f} GiB"
        )
    table = torch.from_numpy(bound.to_csr().toarray()).to(device)
    return lambda b, h, q, kv: table[q, kv]


_WRITERS: dict[str, Callable[..., MaskMod]] = {
    "full": _full,
    "causal": _causal,
    "window": _window,
    "dilated": _dilated,
    "dilated_2d": _dilated_2d,
    "strided": _strided,
    "prefix": _prefix,
    "global_tokens": _global_tokens,
    "longformer": _longformer,
    "neighborhood": _neighborhood,
}
