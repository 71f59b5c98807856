"""sparsec compiles attention masks to the fastest exact attention for the machine at hand.

    attn = sparsec.compile(masks.window(255, 0) | masks.global_tokens(16), seq_len=65_536)
    out = attn(q, k, v)

Layers, from the top; imports go down only:

    cli  integrations  report
    tuning
    runtime                      compile, Attention
    gate                         no kernel serves before it passed
    planner                      which template takes which edges, and why
    cost  records  backends/*    what it should take; what it took; who runs it
    analysis  template           what a mask looks like; the ways to compute
    layout                       index arrays
    masks  expr  device
    data  errors

Importing this package, and planning, load none of torch, triton, cuda and optuna.
"""

from sparsec import masks
from sparsec.analysis import MaskProfile, analyse
from sparsec.backends.base import Problem
from sparsec.device import Device, device
from sparsec.errors import (
    BackendMissingError,
    CompileError,
    MaskError,
    RecordError,
    SparsecError,
    UnsupportedError,
)
from sparsec.planner import Plan, plan
from sparsec.runtime import Attention, attention, compile

__version__ = "0.1.0"

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
    "SparsecError",
    "UnsupportedError",
    "analyse",
    "attention",
    "compile",
    "device",
    "masks",
    "plan",
]
