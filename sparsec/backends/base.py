"""What a back end is: `Problem`, `Work`, `Launch`, `Kernel` and the `Backend` protocol.

This file decides what passes between the planner, which fills in `Work`, and the back ends, which run it. It must not
know any back end, nor how work is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

from sparsec.device import Device
from sparsec.layout import BlockTiles, EdgeNumbers, GatheredTiles, Ordering, RowLists, Schedule
from sparsec.layout.hybrid import HybridItems
from sparsec.masks.mask import BoundMask
from sparsec.score import ScoreMod
from sparsec.template import Config, Template

if TYPE_CHECKING:
    import torch

Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES: tuple[Dtype, ...] = ("fp32", "fp16", "bf16")
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
MAX_HEAD_DIM = 256
# Query heads that one thread of the CPU's row kernel runs side by side at most (rows.hpp).
MAX_HEADS_SHARING = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """The shape of one attention call; never its tensors.

    Attributes:
        q_len: Queries.
        kv_len: Keys.
        q_heads: Query heads; a multiple of `kv_heads`.
        kv_heads: Key and value heads.
        head_dim: Of q and k, 1 to 256.
        v_dim: Of v and the output, 1 to 256.
        dtype: Of q, k, v and the output; accumulation is fp32.
        batch: Batch elements.
        needs_grad: Whether a backward pass will follow.
        has_score_mod: Whether scores are modified before softmax.
    """

    q_len: int
    kv_len: int
    q_heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    v_dim: int = 64
    dtype: Dtype = "fp32"
    batch: int = 1
    needs_grad: bool = False
    has_score_mod: bool = False

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.q_heads // self.kv_heads

    @property
    def tensor_bytes(self) -> int:
        """Bytes of q, k, v and out together."""
        q_side = self.q_heads * self.q_len * (self.head_dim + self.v_dim)
        kv_side = self.kv_heads * self.kv_len * (self.head_dim + self.v_dim)
        return self.batch * (q_side + kv_side) * self.itemsize

    def flops(self, nnz: int) -> int:
        """Useful floating-point operations of a forward pass: 2·nnz·(head_dim + v_dim) a head."""
        return 2 * nnz * (self.head_dim + self.v_dim) * self.q_heads * self.batch


@dataclass(frozen=True, slots=True)
class Work:
    """The index arrays one launch walks. Units of the schedule are blocks of `block_q` positions.

    Attributes:
        bound: The mask, in position space, restricted to this launch's edges.
        ordering: Which token stands at each position.
        block_q: Queries a unit.
        schedule: Work items over the units.
        items: What each item covers of a hybrid's three lists; None for the other layouts.
        tiles: Contiguous tiles, or None.
        gathered: Gathered columns, or None.
        rows: Rows (or, beside tiles, leftover edges), or None.
        numbers: Of the edges in the mask's own order, where the score modifier asks for them.
    """

    bound: BoundMask
    ordering: Ordering
    block_q: int
    schedule: Schedule
    items: HybridItems | None = None
    tiles: BlockTiles | None = None
    gathered: GatheredTiles | None = None
    rows: RowLists | None = None
    numbers: EdgeNumbers | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all index arrays."""
        parts = (self.ordering, self.schedule, self.items, self.tiles, self.gathered, self.rows, self.numbers)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything a back end needs to make one kernel.

    Attributes:
        template: Whose kernel.
        backend: Who runs it.
        config: Its launch parameters.
        problem: The shape.
        device: What it is lowered for.
        work: What it walks.
        heads: The query heads it serves.
        batch: The batch elements it serves.
        scale: Of the scores.
        is_partial: Whether its result is joined with others': the output is then fp32.
        score: What happens to scores before softmax, or None.
        first_query: What query 0 is called there: the tensors may hold a run of a longer sequence's queries. Forward
            passes only.
    """

    template: Template
    backend: str
    config: Config
    problem: Problem
    device: Device
    work: Work
    heads: tuple[int, ...]
    batch: tuple[int, ...]
    scale: float
    is_partial: bool = False
    score: ScoreMod | None = None
    first_query: int = 0

    def elements(self, batch: int) -> tuple[int, ...]:
        """The batch elements it serves of tensors that have so many: one plan for all serves any number."""
        is_for_all = self.batch == tuple(range(self.problem.batch))
        return tuple(range(batch)) if is_for_all else self.batch


class Kernel(Protocol):
    """A launch, ready to run."""

    @property
    def nbytes(self) -> int:
        """Bytes it holds on the device: index arrays and workspace."""
        ...

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        tables: Sequence[torch.Tensor] = (),
    ) -> None:
        """Writes `out` and, where given, `lse` for the rows, heads and batch elements of its launch.

        Args:
            q: `[batch, q_heads, q_len, head_dim]`, last dimension contiguous.
            k: `[batch, kv_heads, kv_len, head_dim]`, likewise.
            v: `[batch, kv_heads, kv_len, v_dim]`, likewise.
            out: `[batch, q_heads, q_len, v_dim]`, likewise; fp32 where the launch is partial.
            lse: fp32 `[batch, q_heads, q_len]`, contiguous, or None.
            tables: The live tables of the score modifier: fp32, contiguous.
        """
        ...

    def source(self) -> dict[str, str]:
        """Source text by file name: the kernel, what it includes, and what was generated for it."""
        ...


@runtime_checkable
class Rebindable(Protocol):
    """A kernel, or gradient kernel, that can be had for another launch in microseconds."""

    def rebound(self, launch: Launch) -> Self:
        """The kernel of a launch that differs in its work, heads, batch elements and in what query 0 is called."""
        ...


@runtime_checkable
class Replayable(Protocol):
    """A kernel, or gradient kernel, that a captured graph may run again and again from the same device buffers."""

    def take_over(self, old: Self) -> None:
        """Puts its index arrays where the kernel it replaces has them, if a graph was captured with that one."""
        ...


class GradientKernel(Protocol):
    """The backward pass of a launch, ready to run."""

    @property
    def nbytes(self) -> int:
        """Bytes of its index arrays."""
        ...

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        d_out: torch.Tensor,
        d_lse: torch.Tensor | None,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        tables: Sequence[torch.Tensor] = (),
        d_tables: Sequence[torch.Tensor | None] = (),
    ) -> None:
        """Writes `dq` for its rows, heads and batch elements, and adds to `dk`, `dv` and `d_tables`.

        Args:
            q: As in the forward pass, like k, v, and its results out and lse.
            k: Keys.
            v: Values.
            out: The output; of all launches, where several were joined.
            lse: The log-sum-exp; likewise.
            d_out: Gradient of the output, like `out`.
            d_lse: Gradient of the log-sum-exp, like `lse`, or None.
            dq: Like q; fp32 where the launch is partial.
            dk: fp32 `[batch, kv_heads, kv_len, head_dim]`.
            dv: fp32 `[batch, kv_heads, kv_len, v_dim]`.
            tables: As in the forward pass.
            d_tables: Like `tables`; None where no gradient is wanted.
        """
        ...

    def source(self) -> dict[str, str]:
        """Source text by file name."""
        ...


class Backend(Protocol):
    """One file of `backends/`, found by name."""

    name: str

    def serves(self, device: Device) -> bool:
        """Whether this kind of device is its business at all."""
        ...

    def refusal(self, template: Template, problem: Problem, device: Device) -> str | None:
        """Why it cannot serve this template and problem on such a device anywhere, in one sentence, or None."""
        ...

    def config_refusal(self, template: Template, config: Config, problem: Problem, device: Device) -> str | None:
        """Why such a device cannot run this configuration of a template it serves, in one sentence, or None."""
        ...

    def missing(self, device: Device) -> str | None:
        """What this machine lacks to run on `device` now, in one sentence, or None."""
        ...

    def toolchain(self) -> str:
        """What compiles its kernels, with versions: part of every cache key and record."""
        ...

    def lower(self, launch: Launch) -> Kernel:
        """A kernel for the launch.

        Raises:
            CompileError: It does not compile, load or pass its check.
            BackendMissingError: What it needs is not here.
        """
        ...

    def lower_backward(self, launch: Launch) -> GradientKernel:
        """The backward pass of a launch.

        Raises:
            UnsupportedError: This back end has none for the template.
            CompileError: As in `lower`.
            BackendMissingError: As in `lower`.
        """
        ...


def backend(name: str) -> Backend:
    """The back end of that name.

    Raises:
        SparsecError: There is none.
    """
    import importlib

    from sparsec.errors import SparsecError

    if name not in BACKENDS:
        raise SparsecError(f"there is no back end {name!r}; the back ends are {', '.join(BACKENDS)}")
    module: Any = importlib.import_module(f"sparsec.backends.{name}")  # found by name, so a module object it is
    made: Backend = module.backend()
    return made


# Back ends by preference where estimates tie.
BACKENDS = ("cpu", "triton", "cuda", "torch", "reference")
