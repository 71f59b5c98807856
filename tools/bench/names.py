"""The names of the peers, for grids, tables and plots; who they are is decided in `peers`."""

from __future__ import annotations

from typing import Final

TEMPLATES: Final = ("row_traversal", "block_sparse", "hybrid", "dense")

# Family -> what tables call it.
FAMILIES: Final = {
    "ours": "sparsec",
    "flex": "FlexAttention",
    "sdpa": "SDPA",
    "sdpa_masked": "SDPA, boolean mask",
    "sdpa_unmasked": "SDPA, every edge",
    "torch_sparse": "torch.sparse",
    "gather_scatter": "gather/scatter",
    "flash_attn": "FlashAttention",
    "flashinfer": "FlashInfer",
    "natten": "NATTEN",
    "xformers": "xFormers",
    "magi": "MagiAttention",
    "spfa_csr": "Longer Attention Span, CSR",
    "cold": "empty cache",
    "warm": "warm cache",
}
# Variants of a peer, written `family:variant`.
VARIANTS: Final = {
    # By a template alone, or on one of its back ends for GPUs.
    "ours": (*TEMPLATES, *(f"{name}@{server}" for name in TEMPLATES[:3] for server in ("triton", "cuda"))),
    "flex": ("64", "max-autotune"),
    "sdpa": ("flash", "efficient", "cudnn", "math"),
    # Its flash kernels take no mask.
    "sdpa_masked": ("efficient", "cudnn", "math"),
    "flash_attn": ("3",),
    "flashinfer": ("blocks",),
}


def family(peer: str) -> str:
    return peer.partition(":")[0]


def is_peer(name: object) -> bool:
    if not isinstance(name, str):
        return False
    head, colon, variant = name.partition(":")
    return head in FAMILIES and (not colon or variant in VARIANTS.get(head, ()))


def title(peer: str) -> str:
    head, colon, variant = peer.partition(":")
    return FAMILIES.get(head, head) + (f" {variant}" if colon else "")
