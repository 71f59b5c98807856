"""sparsec compiles attention masks to the fastest exact attention for the machine at hand.

    attn = sparsec.compile(masks.window(255, 0) | masks.global_tokens(16), seq_len=65_536)
    out = attn(q, k, v)

Layers, from the top; imports go down only:

    cli  integrations  report
    tuning
    functional  module  saving   a function of tensors; a layer of a model; attentions as files
    runtime                      compile, Attention
    stepping  request            steps of generation, over a cache that grows; what compile was told, checked
    specialisation               a plan with its kernels
    gate  torch_ops              no kernel serves before it passed; operators in torch's registry
    planner                      which template takes which edges, and why
    cost  records  backends/*    what it should take; what it took; who runs it
    analysis  template           what a mask looks like; the ways to compute
    layout                       index arrays
    score_arguments  packing     the tensors of a score modifier at a call; masks of packed sequences
    score                        what happens to scores before softmax
    masks  expr  device
    data  errors  buffers  handles  tensors

Importing this package, and planning, load none of torch, triton, cuda and optuna.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsec import masks, score
    from sparsec.analysis import MaskProfile, analyse
    from sparsec.backends.base import Problem
    from sparsec.device import Device
    from sparsec.errors import (
        BackendMissingError,
        CompileError,
        MaskError,
        RecordError,
        SparsecError,
        UnsupportedError,
    )
    from sparsec.functional import attention
    from sparsec.module import SparseAttention
    from sparsec.planner import Plan, plan
    from sparsec.runtime import Attention, compile
    from sparsec.saving import load

__version__ = "0.1.0"

# Where each public name lives. Names are loaded when first used, so that importing the package costs next to nothing.
_HOMES = {
    "Attention": "sparsec.runtime",
    "BackendMissingError": "sparsec.errors",
    "CompileError": "sparsec.errors",
    "Device": "sparsec.device",
    "MaskError": "sparsec.errors",
    "MaskProfile": "sparsec.analysis",
    "Plan": "sparsec.planner",
    "Problem": "sparsec.backends.base",
    "RecordError": "sparsec.errors",
    "SparseAttention": "sparsec.module",
    "SparsecError": "sparsec.errors",
    "UnsupportedError": "sparsec.errors",
    "analyse": "sparsec.analysis",
    "attention": "sparsec.functional",
    "compile": "sparsec.runtime",
    "load": "sparsec.saving",
    "plan": "sparsec.planner",
}
_SUBMODULES = ("masks", "score")

__all__ = [
    "Attention",
    "BackendMissingError",
    "CompileError",
    "Device",
    "MaskError",
    "MaskProfile",
    "Plan",
    "Problem",
    "RecordError",
    "SparseAttention",
    "SparsecError",
    "UnsupportedError",
    "analyse",
    "attention",
    "compile",
    "load",
    "masks",
    "plan",
    "score",
]


def __getattr__(name: str) -> Any:  # any public object
    if name in _SUBMODULES:
        return importlib.import_module(f"sparsec.{name}")
    if name in _HOMES:
        found = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'sparsec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
