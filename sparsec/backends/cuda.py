"""The CUDA back end: the templates' CUDA C++ kernels, compiled by NVRTC on NVIDIA GPUs.

This file decides how a launch's kernels are bound to tensors and started on torch's current stream. What they are given
is in `cuda_calls.py`, how they are compiled in `cuda_compile.py`. It must not know how work is chosen. cuda-python and
torch are imported only to run.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, Self

import numpy as np

from sparsec.backends import cuda_compile
from sparsec.backends.base import Launch, Problem
from sparsec.backends.cuda_calls import (
    JOIN_THREADS,
    LOG2_E,
    MAX_BLOCKS,
    WARP,
    Array,
    ForwardArguments,
    ListsArgument,
    Placed,
    Program,
    TensorArgument,
    Walk,
    fetch_bytes,
    forward_program,
    forward_walk,
)
from sparsec.backends.cuda_gradients import GradientArguments, Side, gradient_program, prepared_blocks, sides
from sparsec.backends.cuda_printed import (
    MASK_HEADER,
    SCORE_HEADER,
    Extents,
    PrintedPredicate,
    score_header,
    score_tables,
)
from sparsec.backends.cuda_tiles import (
    TileArguments,
    TileListsArgument,
    TileWalk,
    TileWidths,
    tile_program,
    tile_scale,
    tile_walk,
)
from sparsec.backends.table_gradients import add_sums, zero_sums
from sparsec.device import Device
from sparsec.errors import CompileError, UnsupportedError
from sparsec.template import Config, Template

if TYPE_CHECKING:
    import torch

__all__ = ["CudaBackend", "CudaGradient", "CudaKernel", "backend", "described", "programs_of"]

logger = logging.getLogger(__name__)

Direction = Literal["forward", "backward"]
# What a kernel may have of shared memory without asking for it.
_SHARED_UNASKED: Final = 48 << 10


class Machine(Protocol):
    """What runs kernels: a GPU's driver; in the tests, an emulation of it."""

    def run(
        self,
        program: Program,
        name: str,
        blocks: int,
        threads: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
        device: torch.device,
    ) -> None:
        """Starts a kernel of a program."""
        ...


class Driver:
    """The CUDA driver, through cuda-python."""

    def __init__(self) -> None:
        self._driver: Any = importlib.import_module("cuda.bindings.driver")  # has no types
        self._kernels: dict[tuple[Program, str], Any] = {}
        # A kernel is one for all devices, but each is told what a block may have of shared memory.
        self._told: set[tuple[Program, str, torch.device]] = set()

    def run(
        self,
        program: Program,
        name: str,
        blocks: int,
        threads: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
        device: torch.device,
    ) -> None:
        import torch

        # torch has made the device's primary context, and this makes it the current one.
        with torch.cuda.device(device):
            function = self._kernel(program, name, shared_bytes, device)
            stream = torch.cuda.current_stream(device).cuda_stream
            # The driver copies the arguments before it returns.
            pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
            self._checked(
                self._driver.cuLaunchKernel(
                    function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, ctypes.addressof(pointers), 0
                ),
                f"{program.template} ({name}) could not be started with {blocks} blocks of {threads} threads",
                program,
            )

    def _kernel(self, program: Program, name: str, shared_bytes: int, device: torch.device) -> Any:
        driver = self._driver
        if (program, name) not in self._kernels:
            (library,) = self._checked(
                driver.cuLibraryLoadData(cuda_compile.cubin(program), [], [], 0, [], [], 0),
                f"the kernels of {program.template} for {program.arch} do not load",
                program,
            )
            # A library is loaded into every context that uses it.
            (kernel,) = self._checked(driver.cuLibraryGetKernel(library, name.encode()), f"no kernel {name}", program)
            self._kernels[program, name] = kernel
        kernel = self._kernels[program, name]
        if shared_bytes > _SHARED_UNASKED and (program, name, device) not in self._told:
            asked = f"{name} needs {shared_bytes:,} bytes of shared memory a block"
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (current,) = self._checked(driver.cuCtxGetDevice(), asked, program)
            self._checked(driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, current), asked, program)
            self._told.add((program, name, device))
        # What starts functions starts kernels too.
        return driver.CUfunction(int(kernel))

    def _checked(self, answer: tuple[Any, ...], what: str, program: Program) -> tuple[Any, ...]:
        status, *values = answer
        if status != self._driver.CUresult.CUDA_SUCCESS:
            _, text = self._driver.cuGetErrorString(status)
            path = cuda_compile.source_files(program.template)[0]
            raise CompileError(f"{what}: {text.decode() if text else status} ({status.name})", path)
        return tuple(values)


@cache
def machine() -> Machine:
    """What runs kernels in this process."""
    return Driver()


class _Bound:
    """A launch's walks with their index arrays, which are uploaded once a device."""

    def __init__(self, launch: Launch, walks: Sequence[Walk | TileWalk]) -> None:
        self.launch = launch
        self._walks = tuple(walks)
        self._uploaded: dict[torch.device, list[dict[str, torch.Tensor | None]]] = {}
        self._batches: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._lists: dict[tuple[int, torch.device, int], ListsArgument | TileListsArgument] = {}
        self._tables: dict[torch.device, list[torch.Tensor | None]] = {}
        self._programs: dict[Hashable, Program] = {}
        # Whether a graph reads what is uploaded; and what one still reads of kernels that this one has replaced.
        self._is_captured = False
        self._held: tuple[object, ...] = ()

    def source(self) -> dict[str, str]:
        generated = {}
        if self.launch.score is not None:
            generated[SCORE_HEADER] = score_header(self.launch.score, Extents.of(self.launch))
        for predicate in _predicates(self._walks):
            generated[MASK_HEADER] = predicate.header
        return _sources(self.launch.template) | generated

    def program(self, key: Hashable, made: Callable[[], Program]) -> Program:
        """The program for tensors that are told apart by `key`; its header is printed once."""
        if key not in self._programs:
            self._programs[key] = made()
        return self._programs[key]

    def lists(self, place: int, device: torch.device, batch: int) -> ListsArgument | TileListsArgument:
        """Where the arrays of a walk, the batch elements and the tables are on a device; for the caller to copy."""
        import torch

        if (place, device, batch) not in self._lists:
            if device not in self._uploaded:
                self._uploaded[device] = [
                    {name: _upload(array, device) for name, array in walk.arrays.items()} for walk in self._walks
                ]
            if (device, batch) not in self._batches:
                elements = self.launch.elements(batch)
                self._batches[device, batch] = torch.tensor(elements, dtype=torch.int32, device=device)
            arrays = self._uploaded[device][place].items()
            found = {name: None if array is None else array.data_ptr() for name, array in arrays}
            made = self._walks[place].arguments({**found, "batches": self._batches[device, batch].data_ptr()})
            for number, table in enumerate(self._tables_on(device)):
                made.tables[number] = None if table is None else table.data_ptr()
            self._lists[place, device, batch] = made
        return self._lists[place, device, batch]

    def fill_live_tables(self, lists: ListsArgument | TileListsArgument, live: Sequence[torch.Tensor]) -> None:
        """Where the tables of this call are."""
        if self.launch.score is not None and live:
            places = (place for place, table in enumerate(self.launch.score.tables) if table.is_live)
            for place, table in zip(places, live, strict=True):
                lists.tables[place] = table.data_ptr()

    def _tables_on(self, device: torch.device) -> list[torch.Tensor | None]:
        """The score modifier's arrays, then the predicate's; None for those that are given at each call."""
        if device not in self._tables:
            arrays = [] if self.launch.score is None else [*score_tables(self.launch.score)]
            for predicate in _predicates(self._walks):
                arrays += predicate.tables
            self._tables[device] = [_upload(array, device) for array in arrays]
        return self._tables[device]

    def take_over(self, old: Self) -> None:
        """Moves its index arrays into the buffers of a kernel that a graph was captured with; the graph then runs this.

        Where they differ in what the graph has fixed (grids, lengths of lists, programs) or are larger, they get
        buffers of their own, and the graph goes on as it was.
        """
        import torch

        if not old._is_captured:
            return
        if not self._fits(old):
            logger.warning(
                "a CUDA graph was captured with %s, and the index arrays of the new mask do not fit its buffers: "
                "capture it again, or it goes on with the mask before",
                old.launch.template.name,
            )
            self._held = (*old._held, old._uploaded, old._batches, old._tables)
            return
        for device, kept in old._uploaded.items():
            fresh = [walk.arrays for walk in self._walks]
            for buffers, arrays in zip(kept, fresh, strict=True):
                for name, array in arrays.items():
                    buffer = buffers[name]
                    if array is not None and buffer is not None:
                        values = torch.from_numpy(np.ascontiguousarray(array).reshape(-1))
                        buffer.view(-1)[: len(values)].copy_(values)
            for table, content in zip(old._tables_on(device), self._tables_on(torch.device("cpu")), strict=True):
                if table is not None and content is not None:
                    table.copy_(content)
        self._uploaded, self._batches, self._tables = old._uploaded, old._batches, old._tables
        self._held, self._is_captured = old._held, True

    def _fits(self, old: Self) -> bool:
        """Whether kernels that were launched for another mask do this one's work once their arrays are refilled."""
        if old.launch.batch != self.launch.batch or len(old._walks) != len(self._walks):
            return False
        if self.launch.score is not None and Extents.of(self.launch) != Extents.of(old.launch):
            return False
        if any(
            _fixed_by_capture(mine) != _fixed_by_capture(other)
            for mine, other in zip(self._walks, old._walks, strict=True)
        ):
            return False
        return all(
            array is None or (buffer := buffers[name]) is None or array.size <= buffer.numel()
            for kept in old._uploaded.values()
            for walk, buffers in zip(self._walks, kept, strict=True)
            for name, array in walk.arrays.items()
        )

    def run(
        self,
        made: Program,
        name: str,
        blocks: int,
        threads: int,
        arguments: ctypes.Structure,
        device: torch.device,
        shared_bytes: int = 0,
    ) -> None:
        if blocks > MAX_BLOCKS:
            raise UnsupportedError(
                f"{self.launch.template.name} on cuda would take {blocks:,} blocks, and a grid has at most "
                f"{MAX_BLOCKS:,}; split the batch, or use another back end"
            )
        self._is_captured = self._is_captured or _is_capturing(device)
        if blocks:
            machine().run(made, name, blocks, threads, shared_bytes, arguments, device)


def _is_capturing(device: torch.device) -> bool:
    import torch

    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _predicates(walks: Sequence[Walk | TileWalk]) -> list[PrintedPredicate]:
    return [walk.predicate for walk in walks if isinstance(walk, TileWalk) and walk.predicate is not None]


def _fixed_by_capture(walk: Walk | TileWalk) -> tuple[object, ...]:
    """What a captured launch keeps whatever its buffers hold."""
    present = {name: array.dtype for name, array in walk.arrays.items() if array is not None}
    printed = [(made.header, [table.shape for table in made.tables]) for made in _predicates((walk,))]
    form = walk.form if isinstance(walk, Walk) else None
    return form, walk.shape, dict(walk.numbers), walk.n_copies, present, printed


def _upload(array: Array | None, device: torch.device) -> torch.Tensor | None:
    import torch

    if array is None:
        return None
    # A pointer must point somewhere, even where nothing is read.
    kept = np.ascontiguousarray(array) if array.size else np.zeros(1, array.dtype)
    return torch.from_numpy(kept).to(device)


def _argument(tensor: torch.Tensor) -> TensorArgument:
    return TensorArgument(tensor.data_ptr(), *tensor.stride()[:3])


def _forward_tensors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    partial: torch.Tensor,
) -> dict[str, object]:
    """What every forward pass is told of its tensors: `FORWARD_FIELDS`, but for the scale."""
    return {
        "q": _argument(q),
        "k": _argument(k),
        "v": _argument(v),
        "out": _argument(out),
        "lse": None if lse is None else lse.data_ptr(),
        "lse_batch": 0 if lse is None else lse.stride(0),
        "lse_head": 0 if lse is None else lse.stride(1),
        "partial": partial.data_ptr(),
    }


def _placed(tensor: torch.Tensor) -> Placed:
    batch, head, row = tensor.stride()[:3]
    return Placed(tensor.data_ptr(), (batch, head, row), tensor.element_size())


class _Forward(_Bound):
    """The forward pass of one launch."""

    def __init__(self, launch: Launch, walk: Walk | TileWalk) -> None:
        super().__init__(launch, (walk,))
        self._words = walk.n_states * (launch.problem.v_dim + 2)

    @property
    def nbytes(self) -> int:
        return self._walks[0].nbytes + len(self.launch.batch) * self._words * 4

    def partial(self, batch: int, device: torch.device) -> torch.Tensor:
        """Room for the states of pieces, for so many batch elements."""
        import torch

        return torch.empty(batch * self._words, dtype=torch.float32, device=device)


class CudaKernel(_Forward):
    """The forward pass of one launch of rows."""

    def __init__(self, launch: Launch) -> None:
        self._walk = forward_walk(launch)
        super().__init__(launch, self._walk)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        tables: Sequence[torch.Tensor] = (),
    ) -> None:
        launch, walk, problem = self.launch, self._walk, self.launch.problem
        n_batch = len(launch.elements(q.shape[0]))
        widths = (
            fetch_bytes(problem.head_dim, problem.itemsize, (_placed(q), _placed(k))),
            fetch_bytes(problem.v_dim, problem.itemsize, (_placed(v), _placed(out))),
        )
        partial = self.partial(n_batch, q.device)
        arguments = ForwardArguments(
            lists=self.lists(0, q.device, q.shape[0]),
            **_forward_tensors(q, k, v, out, lse, partial),
            scale=launch.scale * (LOG2_E if launch.score is None else 1.0),
        )
        self.fill_live_tables(arguments.lists, tables)
        made = self.program(widths, lambda: forward_program(launch, walk, widths))
        copies = n_batch * walk.n_copies
        blocks, shape = walk.shape.blocks(walk.bins), walk.shape
        self.run(made, "forward", blocks * copies, shape.warps * WARP, arguments, q.device)
        joined = len(walk.bins.merge_row) * shape.pack * copies
        self.run(made, "merge", joined, JOIN_THREADS, arguments, q.device)


class CudaTileKernel(_Forward):
    """The forward pass of one launch of tiles, on matrix units."""

    def __init__(self, launch: Launch) -> None:
        self._walk = tile_walk(launch)
        super().__init__(launch, self._walk)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        tables: Sequence[torch.Tensor] = (),
    ) -> None:
        launch, walk = self.launch, self._walk
        n_batch = len(launch.elements(q.shape[0]))
        partial = self.partial(n_batch, q.device)
        scale, flip = tile_scale(launch)
        arguments = TileArguments(
            lists=self.lists(0, q.device, q.shape[0]),
            **_forward_tensors(q, k, v, out, lse, partial),
            scale=scale,
            flip=flip,
        )
        self.fill_live_tables(arguments.lists, tables)
        widths = _tile_widths(launch, *map(_placed, (q, k, v, out)))
        made = self.program(widths, lambda: tile_program(launch, walk, widths))
        copies, shape = n_batch * walk.n_copies, walk.shape
        items = walk.numbers["n_items"] * copies
        self.run(made, "forward", items, shape.warps * WARP, arguments, q.device, shape.shared_bytes)
        self.run(made, "merge", walk.merged_blocks * copies, JOIN_THREADS, arguments, q.device)


class CudaGradient(_Bound):
    """The backward pass of one launch; deterministic, like the forward pass."""

    def __init__(self, launch: Launch) -> None:
        self._sides = sides(launch)
        super().__init__(launch, [side.walk for side in self._sides])
        self._heads: dict[tuple[torch.device, bool], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        return sum(side.walk.nbytes for side in self._sides)

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
        import torch

        score, numbers = self.launch.score, self.launch.work.numbers
        sums: Sequence[torch.Tensor | None] = ()
        if score is not None and any(wanted is not None for wanted in d_tables):
            places = (q.shape[0], q.shape[1], 0 if numbers is None else numbers.mask.nnz)
            sums = zero_sums(score, d_tables, places, q.device)
        problem, n_batch = self.launch.problem, len(self.launch.elements(q.shape[0]))
        delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
        for place, side in enumerate(self._sides):
            walk, copies = side.walk, n_batch * side.walk.n_copies
            own, stream, into = ((q, d_out), (k, v), (dq, dq)) if side.is_dq else ((k, v), (q, d_out), (dk, dv))
            widths = (
                fetch_bytes(problem.head_dim, problem.itemsize, _all_placed(q, k, *((dq,) if side.is_dq else ()))),
                fetch_bytes(problem.v_dim, problem.itemsize, _all_placed(v, d_out, *((out,) if side.is_dq else ()))),
            )
            words = sum(n * dim for n, dim in zip(side.state_words, (problem.head_dim, problem.v_dim), strict=True))
            partial = torch.empty(n_batch * walk.n_states * words, dtype=torch.float32, device=q.device)
            arguments = GradientArguments(
                lists=self.lists(place, q.device, q.shape[0]),
                own_1=_argument(own[0]),
                own_2=_argument(own[1]),
                stream_1=_argument(stream[0]),
                stream_2=_argument(stream[1]),
                into_1=_argument(into[0]),
                into_2=_argument(into[1]),
                out=_argument(out),
                lse=lse.data_ptr(),
                lse_batch=lse.stride(0),
                lse_head=lse.stride(1),
                d_lse=None if d_lse is None else d_lse.data_ptr(),
                d_lse_batch=0 if d_lse is None else d_lse.stride(0),
                d_lse_head=0 if d_lse is None else d_lse.stride(1),
                delta=delta.data_ptr(),
                delta_batch=delta.stride(0),
                delta_head=delta.stride(1),
                partial=partial.data_ptr(),
                scale=self.launch.scale,
            )
            self.fill_live_tables(arguments.lists, tables)
            for number, total in enumerate(sums):
                arguments.sums[number] = None if total is None else total.data_ptr()
            head_indptr, stream_heads = self._heads_on(side, q.device)
            arguments.head_indptr, arguments.stream_heads = head_indptr.data_ptr(), stream_heads.data_ptr()
            made = self._program(place, widths, with_sums=bool(sums))
            threads = walk.shape.warps * WARP
            if side.is_dq:
                self.run(made, "prepare", prepared_blocks(walk) * copies, threads, arguments, q.device)
            self.run(made, "backward", walk.shape.blocks(walk.bins) * copies, threads, arguments, q.device)
            joined = len(walk.bins.merge_row) * walk.shape.pack * copies
            self.run(made, "add_up", joined, JOIN_THREADS, arguments, q.device)
        if score is not None and sums:
            add_sums(score, sums, d_tables)

    def _program(self, place: int, widths: tuple[int, int], *, with_sums: bool) -> Program:
        side = self._sides[place]
        key = (place, widths, with_sums)
        return self.program(key, lambda: gradient_program(self.launch, side, widths, with_sums=with_sums))

    def _heads_on(self, side: Side, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if (device, side.is_dq) not in self._heads:
            arrays = (side.head_indptr, side.stream_heads)
            first, second = (torch.from_numpy(array).to(device) for array in arrays)
            self._heads[device, side.is_dq] = first, second
        return self._heads[device, side.is_dq]


def _all_placed(*tensors: torch.Tensor) -> tuple[Placed, ...]:
    return tuple(_placed(tensor) for tensor in tensors)


def _tile_widths(launch: Launch, q: Placed, k: Placed, v: Placed, out: Placed) -> TileWidths:
    head_dim, v_dim = launch.problem.head_dim, launch.problem.v_dim
    return TileWidths(
        q=fetch_bytes(head_dim, q.itemsize, (q,)),
        k=fetch_bytes(head_dim, k.itemsize, (k,)),
        v=fetch_bytes(v_dim, v.itemsize, (v,)),
        out=fetch_bytes(v_dim, out.itemsize, (out,)),
    )


def programs_of(launch: Launch, direction: Direction = "forward") -> tuple[tuple[Program, Walk | TileWalk], ...]:
    """The programs of a launch with their walks, for contiguous tensors."""
    problem, size = launch.problem, launch.problem.itemsize
    own_size = 4 if launch.is_partial else size
    if launch.template.layout != "rows":
        k, v, out = (
            _contiguous(*each) for each in ((problem.head_dim, size), (problem.v_dim, size), (problem.v_dim, own_size))
        )
        tiles = tile_walk(launch)
        return ((tile_program(launch, tiles, _tile_widths(launch, k, k, v, out)), tiles),)
    widths = (
        fetch_bytes(problem.head_dim, size, (_contiguous(problem.head_dim, own_size),)),
        fetch_bytes(problem.v_dim, size, (_contiguous(problem.v_dim, own_size),)),
    )
    if direction == "forward":
        walk = forward_walk(launch)
        return ((forward_program(launch, walk, widths), walk),)
    with_sums = launch.score is not None and bool(launch.score.live_tables)
    return tuple((gradient_program(launch, side, widths, with_sums=with_sums), side.walk) for side in sides(launch))


def _contiguous(dim: int, itemsize: int) -> Placed:
    return Placed(0, (dim, dim, dim), itemsize)


def described(launch: Launch) -> dict[str, str]:
    """Texts for a person, by name: what the compiler says of the kernels, their sources, and their machine code.

    Needs no GPU; where the compiler is not here either, it says so and shows the sources.
    """
    ((made, walk),) = programs_of(launch)
    sources = _sources(launch.template)
    reason = cuda_compile.missing()
    if reason is not None:
        return {"compiled by": f"{_told(made)}\n(not compiled here: {reason})", **sources}
    lowered, device = cuda_compile.lowered(made), launch.device
    lines = [_told(made, lowered.resident)]
    for kernel in lowered.kernels.values():
        is_join = kernel.name == "merge"
        warps = JOIN_THREADS // WARP if is_join else walk.shape.warps
        shared = kernel.shared_bytes + (0 if is_join or isinstance(walk, Walk) else walk.shape.shared_bytes)
        resident = kernel.warps_per_unit(warps, device, shared)
        lines.append(
            f"{kernel.name} on {kernel.arch}: {kernel.registers} registers a thread, {kernel.spilled_bytes} bytes "
            f"spilled, {shared} bytes of shared memory a block, {resident} warps a multiprocessor"
        )
    machine_code = {"machine code": lowered.sass} if lowered.sass else {}
    return {"compiled by": "\n".join(lines), **sources, **machine_code}


def _told(made: Program, resident: int | None = None) -> str:
    return " ".join(("nvrtc", *cuda_compile.options(made, resident), "-I templates", "kernel_cuda.cu"))


def _sources(template: Template) -> dict[str, str]:
    return {f"{path.parent.name}/{path.name}": path.read_text() for path in cuda_compile.source_files(template.name)}


_OLDEST: Final = 80


class CudaBackend:
    """CUDA C++ kernels for NVIDIA GPUs."""

    name = "cuda"

    def serves(self, device: Device) -> bool:
        return device.kind == "nvidia"

    def refusal(self, template: Template, problem: Problem, device: Device) -> str | None:
        if device.kind == "nvidia" and int(device.arch.removeprefix("sm_")) < _OLDEST:
            return f"its kernels need sm_{_OLDEST} or newer, and {device.name} is {device.arch}"
        if template.layout != "rows" and problem.dtype == "fp32":
            return "its tiles go to matrix units, which round fp32 to ten bits: that would not be exact"
        return None

    def config_refusal(self, template: Template, config: Config, problem: Problem, device: Device) -> str | None:
        return None

    def missing(self, device: Device) -> str | None:
        reason = cuda_compile.missing()
        if reason is not None:
            return reason
        import torch

        if torch.cuda.is_available():
            return None
        return f"torch {torch.__version__} sees no GPU; check the driver, or install a torch built for it"

    def toolchain(self) -> str:
        return cuda_compile.toolchain()

    def lower(self, launch: Launch) -> CudaKernel | CudaTileKernel:
        reason = self.refusal(launch.template, launch.problem, launch.device)
        if launch.score is not None and launch.score.needs_edges and not launch.template.counts_edges(self.name):
            reason = "score_mod asks for the numbers of edges, which its kernels do not count"
        if reason is not None:
            raise UnsupportedError(f"{launch.template.name} on cuda: {reason}")
        return CudaKernel(launch) if launch.template.layout == "rows" else CudaTileKernel(launch)

    def lower_backward(self, launch: Launch) -> CudaGradient:
        if not launch.template.has_backward(self.name):
            raise UnsupportedError(
                f"{launch.template.name} on cuda has a forward pass only; ask another back end for its gradients"
            )
        return CudaGradient(launch)


@cache
def backend() -> CudaBackend:
    return CudaBackend()
