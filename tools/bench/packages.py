"""Attention packages for GPUs, where they are installed: one small class each.

This file decides how each package is asked for a mask: which function, which layout, what its arguments mean. All want
tokens before heads. None of them has to be there, and what a package cannot compute is refused with a reason; what it
computes is held to the reference like everything else, so that a misunderstood argument shows as a wrong result.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench import shapes
from bench.prepared import Prepared, RefusedError, check_memory, dense_mask, plain
from bench.workload import mask_of
from sparsec.masks.neighborhood import Neighborhood

if TYPE_CHECKING:
    import torch

    from bench.shapes import Band
    from bench.workload import Workload

# The block that a mask is cut into where it does not consist of blocks.
_BLOCK: Final = 64
# What FlashInfer's documentation recommends.
_WORKSPACE_BYTES: Final = 128 * 2**20
_BEYOND: Final = "it computes full and causal attention and windows{}, and this mask is none of them"

Tensors = tuple[Any, Any, Any]  # of torch


@dataclass(frozen=True, slots=True)
class FlashAttention:
    """flash-attn: dense, causal and window attention, and documents as sequences of different lengths.

    Source: the docstrings of `flash_attn_func` and `flash_attn_varlen_func`; a window includes both of its ends.
    """

    name: str = "flash_attn"
    module: str = "flash_attn"

    def prepare(self, work: Workload) -> Prepared:
        _check_half(work)
        package = _package(self.module, work)
        q, k, v = inputs = _tokens_first(work)
        found = shapes.band(work.bound)
        if found is not None:
            options = {"softmax_scale": work.scale, **_flash_window(found)}
            return _prepared(lambda: _first(package.flash_attn_func(q, k, v, **options)), work, inputs)
        packed = shapes.documents(work.bound)
        if packed is None:
            raise RefusedError(_BEYOND.format(", within documents too"))
        ends = _ends(packed.lengths * work.problem.batch, q)
        longest = max(packed.lengths)

        def call() -> torch.Tensor:
            flat = (tensor.flatten(0, 1) for tensor in (q, k, v))
            out = package.flash_attn_varlen_func(
                *flat,
                cu_seqlens_q=ends,
                cu_seqlens_k=ends,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
                softmax_scale=work.scale,
                causal=packed.is_causal,
            )
            result: torch.Tensor = _first(out).unflatten(0, q.shape[:2])
            return result

        return _prepared(call, work, inputs)


def _flash_window(found: Band) -> dict[str, Any]:
    """-1 stands for no end; causal is a window's right end, and has kernels of its own."""
    left, right = (-1 if end is None else end for end in (found.left, found.right))
    if right == 0:
        return {"causal": True, "window_size": (left, -1 if left < 0 else 0)}
    return {"causal": False, "window_size": (left, right)}


@dataclass(frozen=True, slots=True)
class FlashInfer:
    """FlashInfer's attention of one sequence: causal, windows to the left, and any mask as a matrix of bits.

    Source: the docstring of `single_prefill_with_kv_cache`; `window_left` is the number of keys before the query's own.
    """

    name: str = "flashinfer"

    def prepare(self, work: Workload) -> Prepared:
        _check_single(work)
        package = _package("flashinfer", work)
        q, k, v = inputs = _tokens_first(work)
        options: dict[str, Any] = {"kv_layout": "NHD", "sm_scale": work.scale}
        found = shapes.band(work.bound)
        if found is not None and found.right in (None, 0):
            options |= {"causal": found.right == 0, "window_left": -1 if found.left is None else found.left}
        else:
            bound = plain(work.bound)
            check_memory(2 * bound.q_len * bound.kv_len, "its mask", work)
            options["custom_mask"] = dense_mask(bound, work)
        return _prepared(lambda: package.single_prefill_with_kv_cache(q[0], k[0], v[0], **options)[None], work, inputs)


@dataclass(frozen=True, slots=True)
class FlashInferBlocks:
    """FlashInfer's block-sparse attention: whole blocks, or blocks with a bit for each pair.

    Source: the docstring of `BlockSparseAttentionWrapper`; blocks are those of SciPy's BSR matrices.
    """

    name: str = "flashinfer:blocks"

    def prepare(self, work: Workload) -> Prepared:
        _check_single(work)
        package = _package("flashinfer", work)
        import torch

        bound, problem = plain(work.bound), work.problem
        tiles = shapes.whole_blocks(bound)
        mask = None
        if tiles is None:
            if bound.q_len % _BLOCK or bound.kv_len % _BLOCK:
                raise RefusedError(f"it wants lengths of whole blocks, and these are no multiples of {_BLOCK}")
            tiles = bound.tiles(_BLOCK, _BLOCK)
            check_memory(2 * tiles.n_tiles * _BLOCK**2, "its blocks' masks", work)
            mask = torch.from_numpy(_block_masks(bound, tiles)).to(work.q.device)
        q, k, v = inputs = _tokens_first(work)
        indptr, indices = (
            torch.from_numpy(each.astype(np.int32)).to(work.q.device) for each in (tiles.indptr, tiles.indices)
        )
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=work.q.device)
        wrapper = package.BlockSparseAttentionWrapper(workspace)
        wrapper.plan(
            indptr,
            indices,
            bound.q_len,
            bound.kv_len,
            tiles.block_q,
            tiles.block_kv,
            problem.q_heads,
            problem.kv_heads,
            problem.head_dim,
            mask=mask,
            sm_scale=work.scale,
            q_data_type=q.dtype,
            kv_data_type=q.dtype,
            o_data_type=q.dtype,
        )
        note = "" if mask is None else f"its blocks of {_BLOCK} have a mask each"
        return _prepared(lambda: wrapper.run(q[0], k[0], v[0])[None], work, inputs, note)


# Any: a bound mask and its tiles.
def _block_masks(bound: Any, tiles: Any) -> Any:
    """Which pairs of each tile are edges: bool `[tiles, block_q, block_kv]`."""
    array = bound.to_csr()
    q = np.repeat(np.arange(bound.q_len), np.diff(array.indptr))
    kv = array.indices.astype(np.int64)
    n_columns = bound.kv_len // tiles.block_kv
    tile_rows = np.repeat(np.arange(len(tiles.indptr) - 1), np.diff(tiles.indptr))
    # Ascending, as rows of tiles are and columns within them.
    places = tile_rows * n_columns + tiles.indices
    tile = np.searchsorted(places, q // tiles.block_q * n_columns + kv // tiles.block_kv)
    found = np.zeros((tiles.n_tiles, tiles.block_q, tiles.block_kv), bool)
    found[tile, q % tiles.block_q, kv % tiles.block_kv] = True
    return found


@dataclass(frozen=True, slots=True)
class Natten:
    """NATTEN: neighbourhoods on grids of one, two and three dimensions.

    Source: the docstrings of `natten.na1d`, `na2d` and `na3d`; tensors are `[batch, *grid, heads, head_dim]`.
    """

    name: str = "natten"

    def prepare(self, work: Workload) -> Prepared:
        mask = mask_of(work.case.mask)
        if not isinstance(mask, Neighborhood) or mask.is_transposed:
            raise RefusedError("it computes neighbourhoods on grids, and this mask is none")
        package = _package("natten", work)
        function = getattr(package, f"na{len(mask.grid)}d")
        q, k, v = inputs = _tokens_first(work, is_expanded=True)

        def call() -> torch.Tensor:
            on_grid = (tensor.unflatten(1, mask.grid) for tensor in (q, k, v))
            out: torch.Tensor = function(
                *on_grid,
                kernel_size=mask.kernel,
                stride=mask.stride,
                dilation=mask.dilation,
                is_causal=mask.causal,
                scale=work.scale,
            )
            return out.flatten(1, len(mask.grid))

        return _prepared(call, work, inputs)


@dataclass(frozen=True, slots=True)
class Xformers:
    """xFormers: `memory_efficient_attention` with the biases that stand for causal masks, windows and documents.

    Source: the docstrings of `memory_efficient_attention` (grouped heads are a dimension of their own) and of
    `LocalAttentionFromBottomRightMask`; a window includes both of its ends.
    """

    name: str = "xformers"

    def prepare(self, work: Workload) -> Prepared:
        package = _package("xformers.ops", work)
        biases = _package("xformers.ops.fmha.attn_bias", work)
        q, k, v = inputs = _tokens_first(work)
        group = work.problem.q_heads // work.problem.kv_heads
        found, packed = shapes.band(work.bound), shapes.documents(work.bound)
        if found is not None:
            bias, is_flat = _xformers_bias(biases, found, work.bound.q_len), False
        elif packed is not None:
            whole = biases.BlockDiagonalMask.from_seqlens(list(packed.lengths * work.problem.batch))
            bias, is_flat = whole.make_causal() if packed.is_causal else whole, True
        else:
            raise RefusedError(_BEYOND.format(", and documents"))

        def given(tensor: torch.Tensor, heads_of_group: int) -> torch.Tensor:
            """As it takes them: sequences of a block-diagonal bias one after the other in one batch element."""
            if group > 1:
                tensor = tensor.unflatten(2, (-1, heads_of_group)).expand(-1, -1, -1, group, -1)
            return tensor.flatten(0, 1)[None] if is_flat else tensor

        def call() -> torch.Tensor:
            out = package.memory_efficient_attention(
                given(q, group), given(k, 1), given(v, 1), attn_bias=bias, scale=work.scale
            )
            result: torch.Tensor = out.reshape(q.shape)
            return result

        return _prepared(call, work, inputs)


# Any: a module, and what its classes make.
def _xformers_bias(biases: Any, found: Band, length: int) -> Any:
    if found.is_full:
        return None
    if found.left is None and found.right == 0:
        return biases.LowerTriangularMask()
    left, right = (length if end is None else end for end in (found.left, found.right))
    return biases.LocalAttentionFromBottomRightMask(window_left=left, window_right=right)


@dataclass(frozen=True, slots=True)
class Magi:
    """MagiAttention: slices of queries and keys, each full, causal, its inverse, or what both have in common.

    Source: the docstring of `flex_flash_attn_func`, whose note draws the four kinds.
    """

    name: str = "magi"

    def prepare(self, work: Workload) -> Prepared:
        _check_half(work)
        found = shapes.slices(plain(work.bound))
        if found is None:
            raise RefusedError("it computes few slices of queries and keys, and this mask is no union of such")
        package = _package("magi_attention.api", work)
        import torch

        batches = range(work.problem.batch)
        (q_len, kv_len), device = work.bound.shape, work.q.device
        every = [(each, b * q_len, b * kv_len) for b in batches for each in found]
        ranges = [[[s.q_start + at, s.q_stop + at] for s, at, _ in every]]
        ranges += [[[s.kv_start + at, s.kv_stop + at] for s, _, at in every]]
        q_ranges, k_ranges = (torch.tensor(each, dtype=torch.int32, device=device) for each in ranges)
        kinds = torch.tensor([_MAGI_KINDS[s.kind] for s, _, _ in every], dtype=torch.int32, device=device)
        starts = [s.q_start for s in found]
        q, k, v = inputs = _tokens_first(work)

        def call() -> torch.Tensor:
            flat = (tensor.flatten(0, 1) for tensor in (q, k, v))
            out = package.flex_flash_attn_func(
                *flat,
                q_ranges,
                k_ranges,
                attn_type_map=kinds,
                softmax_scale=work.scale,
                # As its documentation recommends where no query lies in two slices.
                disable_fwd_atomic_reduction=len(set(starts)) == len(starts),
            )
            result: torch.Tensor = _first(out).unflatten(0, q.shape[:2])
            return result

        return _prepared(call, work, inputs)


_MAGI_KINDS: Final = {"full": 0, "causal": 1, "inverse": 2, "both": 3}


@dataclass(frozen=True, slots=True)
class SpanCsr:
    """The CSR kernel that its authors published with "Longer Attention Span", built from their sources as `spfa_csr`.

    Source: https://github.com/KLab-AI3/Graph-Processing-Attention-IPDPS-2025, Sparse_FlashAttention_CSR/README.md.
    """

    name: str = "spfa_csr"

    def prepare(self, work: Workload) -> Prepared:
        problem = work.problem
        if problem.q_heads > 1 or problem.batch > 1 or problem.dtype == "bf16" or work.needs_grad:
            raise RefusedError("it computes the forward pass of one head in fp32 or fp16")
        package = _package("spfa_csr", work)
        import torch

        array = plain(work.bound).to_csr()
        row_off = torch.from_numpy(array.indptr.astype(np.uint64)).to(work.q.device)
        columns = torch.from_numpy(array.indices.astype(np.uint32)).to(work.q.device)
        q, k, v = (tensor[0, 0].contiguous() for tensor in (work.q, work.k, work.v))
        values = torch.ones(array.nnz, dtype=q.dtype, device=q.device)
        peak, total = (torch.empty(len(q), dtype=q.dtype, device=q.device) for _ in range(2))
        out = torch.empty_like(q)

        def call() -> torch.Tensor:
            # It goes on from what it finds there.
            peak.fill_(-float("inf"))
            total.zero_()
            out.zero_()
            result: torch.Tensor = package.forward(q, k, v, row_off, columns, values, peak, total, out, False)
            return result

        note = "three fills of its buffers, which it asks for, are in the time"
        return Prepared(call, work.bound, lambda made: made[None, None], note=note)


# What they have in common.


def _package(name: str, work: Workload) -> Any:
    """A package's module.

    Raises:
        RefusedError: The work is not on a GPU, or the package is not installed.
    """
    if work.device == "cpu":
        raise RefusedError("it has kernels for GPUs only")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name.partition(".")[0]:
            raise RefusedError(f"{error.name} is not installed") from error
        raise RefusedError(f"{name} cannot be imported: {error}") from error


def _check_half(work: Workload) -> None:
    if work.problem.dtype == "fp32":
        raise RefusedError("it takes fp16 and bf16")


def _check_single(work: Workload) -> None:
    _check_half(work)
    if work.needs_grad:
        raise RefusedError("it has no backward pass")
    if work.problem.batch > 1:
        raise RefusedError("it takes one sequence at a time, and this is a batch")


def _tokens_first(work: Workload, is_expanded: bool = False) -> Tensors:
    """q, k and v as `[batch, tokens, heads, head_dim]`, contiguous; expanded, each head has its own keys and values."""
    k, v = work.expanded if is_expanded else (work.k, work.v)
    q, k, v = (tensor.detach().transpose(1, 2).contiguous() for tensor in (work.q, k, v))
    return q.requires_grad_(work.needs_grad), k.requires_grad_(work.needs_grad), v.requires_grad_(work.needs_grad)


def _prepared(call: Callable[[], Any], work: Workload, inputs: Tensors, note: str = "") -> Prepared:
    return Prepared(call, work.bound, lambda out: out.transpose(1, 2), note=note, inputs=inputs)


# Any: a tensor, or a tuple that begins with one: releases differ.
def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _ends(lengths: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Where sequences begin and end: int32 `[sequences + 1]`."""
    import torch

    return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=like.device)
