"""The reference back end: dense masked attention in NumPy and fp64, the oracle of every check.

This file decides what is correct. It shares no code with the templates, knows nothing of layouts, and is slow on
purpose: it walks the rows of a mask and computes each by the textbook.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sparsec.backends.base import Launch, Problem
from sparsec.device import Device
from sparsec.masks.mask import BoundMask
from sparsec.template import Template

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float64]

# Queries whose dense rows are held at a time.
_ROWS = 256


def attention(
    q: npt.NDArray[np.floating],
    k: npt.NDArray[np.floating],
    v: npt.NDArray[np.floating],
    bound: BoundMask,
    scale: float,
    rows: npt.NDArray[np.integer] | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Output and log-sum-exp of one head, in fp64.

    Args:
        q: `[q_len, head_dim]`.
        k: `[kv_len, head_dim]`.
        v: `[kv_len, v_dim]`.
        bound: The mask.
        scale: Of the scores.
        rows: The queries to compute; all by default.

    Returns:
        `out [rows, v_dim]` and `lse [rows]`; an empty row gives 0 and -inf.
    """
    rows = np.arange(bound.q_len) if rows is None else rows
    out = np.zeros((len(rows), v.shape[1]))
    lse = np.full(len(rows), -np.inf)
    k, v = k.astype(np.float64), v.astype(np.float64)
    for first in range(0, len(rows), _ROWS):
        chosen = rows[first : first + _ROWS]
        attended = _dense_rows(bound, chosen)
        scores = np.where(attended, q[chosen].astype(np.float64) @ k.T * scale, -np.inf)
        peak = scores.max(axis=1, initial=-np.inf)
        finite_peak = np.where(np.isneginf(peak), 0.0, peak)
        weights = np.exp(scores - finite_peak[:, None])
        total = weights.sum(axis=1)
        attends = attended.any(axis=1)
        # A key nobody attends must not spoil a row even if it is not a number: 0 · NaN is taken as 0.
        live = attended.any(axis=0)
        out[first : first + _ROWS][attends] = (weights[attends][:, live] @ v[live]) / total[attends, None]
        with np.errstate(divide="ignore"):
            lse[first : first + _ROWS] = np.where(attends, np.log(total) + finite_peak, -np.inf)
    return out, lse


def _dense_rows(bound: BoundMask, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    dense = np.zeros((len(rows), bound.kv_len), bool)
    for i, row in enumerate(rows.tolist()):
        ranges = bound.rows(row, row + 1)
        for start, stop, step in zip(ranges.start, ranges.stop, ranges.step, strict=True):
            dense[i, start:stop:step] = True
    return dense


@dataclass(frozen=True, slots=True)
class ReferenceKernel:
    """A launch computed by `attention`, head by head."""

    launch: Launch

    @property
    def nbytes(self) -> int:
        return 0

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        import torch

        launch = self.launch
        group = launch.problem.q_heads // launch.problem.kv_heads
        for b in launch.batch:
            for h in launch.heads:
                arrays = (t.detach().double().cpu().numpy() for t in (q[b, h], k[b, h // group], v[b, h // group]))
                values, log_sums = attention(*arrays, launch.work.bound, launch.scale)
                out[b, h] = torch.from_numpy(values).to(out)
                if lse is not None:
                    lse[b, h] = torch.from_numpy(log_sums).to(lse)

    def source(self) -> dict[str, str]:
        from pathlib import Path

        return {"reference.py": Path(__file__).read_text()}


class ReferenceBackend:
    """Serves every problem on every device, slowly."""

    name = "reference"

    def missing(self, device: Device) -> str | None:
        return None

    def refusal(self, template: Template, problem: Problem, device: Device) -> str | None:
        return None

    def toolchain(self) -> str:
        return f"numpy {np.__version__}"

    def lower(self, launch: Launch) -> ReferenceKernel:
        return ReferenceKernel(launch)


@cache
def backend() -> ReferenceBackend:
    return ReferenceBackend()
