"""The Triton back end: the templates' Triton kernels, on NVIDIA and AMD GPUs.

This file decides how the calls of a launch (`triton_calls.py`, `triton_gradients.py`) are run: on the current stream,
through Triton's interpreter where `TRITON_INTERPRET=1`, or only compiled, for a device that is not here
(`triton_lowering.py`). It must not know how work is chosen. Triton and torch are imported only to lower.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeAlias

import numpy as np

from sparsec.backends.base import Launch, Problem
from sparsec.backends.table_gradients import add_sums, zero_sums
from sparsec.backends.triton_calls import (
    ALIGNMENT_BYTES,
    Array,
    Call,
    calls_of,
    options_of,
    shape_of,
    too_large,
)
from sparsec.backends.triton_gradients import gradient_calls_of
from sparsec.backends.triton_lowering import LoweredSource, lower_call
from sparsec.device import Device
from sparsec.errors import BackendMissingError, CompileError
from sparsec.template import Config, Template

if TYPE_CHECKING:
    import torch

__all__ = [
    "LoweredSource",
    "TritonBackend",
    "TritonGradient",
    "TritonKernel",
    "backend",
    "calls_of",
    "gradient_calls_of",
    "lower_source",
    "shape_of",
]

logger = logging.getLogger(__name__)

Direction = Literal["forward", "backward"]
# What stands behind a pointer, or behind a tuple of them.
Uploaded: TypeAlias = "torch.Tensor | tuple[torch.Tensor | None, ...] | None"


class _Calls:
    """Kernels of a launch bound to their index arrays, which are uploaded once a device."""

    def __init__(self, launch: Launch, calls: tuple[Call, ...]) -> None:
        self.launch = launch
        self._calls = calls
        self._module = kernel_module(launch.template)
        score_tables = () if launch.score is None else launch.score.tables
        self._live_places = [place for place, table in enumerate(score_tables) if table.is_live]
        self._functions = [
            {name: None if given is None else given[0].function(given[1]) for name, given in call.functions.items()}
            for call in calls
        ]
        self._uploaded: dict[torch.device, list[dict[str, Uploaded]]] = {}
        self._batches: dict[tuple[torch.device, int], torch.Tensor] = {}
        # Whether a graph reads what is uploaded; and what one still reads of kernels that this one has replaced.
        self._is_captured = False
        self._held: tuple[object, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(call.nbytes for call in self._calls)

    def source(self) -> dict[str, str]:
        printed = [made[0] for call in self._calls for made in call.functions.values() if made is not None]
        written = {f"{path.parent.name}/{path.name}": path.read_text() for path in source_files(self.launch.template)}
        return written | {f"{made.name}.py": made.source for made in printed}

    def run(
        self,
        tensors: dict[str, torch.Tensor | None],
        device: torch.device,
        batch: int,
        tables: Sequence[torch.Tensor] = (),
        sums: Sequence[torch.Tensor | None] = (),
    ) -> None:
        """Runs the kernels in their order, on the current stream of a device.

        Args:
            tensors: By the name that calls have for them.
            device: Where they are.
            batch: Batch elements of the tensors.
            tables: The modifier's live tables.
            sums: What is added to for their gradients; empty where none is wanted.
        """
        batches = self._batch_elements(device, batch)
        self._is_captured = self._is_captured or _is_capturing(device)
        if any(call.constants.get("DESCRIBED") for call in self._calls):
            # The kernels keep their descriptors in memory that Triton asks for; the caller's own answer stays.
            context = contextvars.copy_context()
            context.run(_provide_scratch, device)
            context.run(self._launch_all, tensors, device, batches, tables, sums)
        else:
            self._launch_all(tensors, device, batches, tables, sums)

    def _launch_all(
        self,
        tensors: dict[str, torch.Tensor | None],
        device: torch.device,
        batches: torch.Tensor,
        tables: Sequence[torch.Tensor],
        sums: Sequence[torch.Tensor | None],
    ) -> None:
        live = dict(zip(self._live_places, tables, strict=True))
        with _on(device):
            for call, functions, arrays in zip(self._calls, self._functions, self._arrays_on(device), strict=True):
                kernel = getattr(self._module, call.name)
                given = {name: None if key is None else tensors[key] for name, key in call.tensors.items()}
                numbers = {**call.numbers, "n_batches": len(batches)} if "n_batches" in call.numbers else call.numbers
                kernel[(call.grid(len(batches)),)](
                    batches=batches,
                    **given,
                    **_strides(given, kernel.arg_names),
                    **(_with_live(arrays, live) if live else arrays),
                    **numbers,
                    **{**call.constants, **_undescribed(call, given)},
                    **{**functions, **_summed(call, kernel, sums)},
                    **options_of(call),
                )

    def take_over(self, old: Self) -> None:
        """Moves its index arrays into the buffers of a kernel that a graph was captured with; the graph then runs this.

        Where they differ in what the graph has fixed (grids, lengths of lists, functions) or are larger, they get
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
            self._held = (*old._held, old._uploaded, old._batches)
            return
        arrays = [array for call in self._calls for array in _all_arrays(call)]
        for kept in old._uploaded.values():
            for buffer, array in zip(_all_buffers(self._calls, kept), arrays, strict=True):
                values = torch.from_numpy(np.ascontiguousarray(array).reshape(-1))
                buffer.view(-1)[: len(values)].copy_(values)
        self._uploaded, self._batches, self._held = old._uploaded, old._batches, old._held
        self._is_captured = True

    def _fits(self, old: Self) -> bool:
        """Whether kernels that were launched for another mask do this one's work once their arrays are refilled."""
        if old.launch.batch != self.launch.batch or len(old._calls) != len(self._calls):
            return False
        pairs = [*zip(self._calls, old._calls, strict=True)]
        if any(_fixed_by_capture(mine) != _fixed_by_capture(other) for mine, other in pairs):
            return False
        # As many as there are: which arrays are None is fixed too.
        sizes = [array.size for call in self._calls for array in _all_arrays(call)]
        return all(
            size <= buffer.numel()
            for kept in old._uploaded.values()
            for size, buffer in zip(sizes, _all_buffers(old._calls, kept), strict=True)
        )

    def _batch_elements(self, device: torch.device, batch: int) -> torch.Tensor:
        import torch

        if (device, batch) not in self._batches:
            elements = self.launch.elements(batch)
            self._batches[device, batch] = torch.tensor(elements, dtype=torch.int32, device=device)
        return self._batches[device, batch]

    def _arrays_on(self, device: torch.device) -> list[dict[str, Uploaded]]:
        import torch

        def upload(array: Array | None) -> torch.Tensor | None:
            if array is None:
                return None
            # A pointer must point somewhere, even where nothing is read.
            kept = np.ascontiguousarray(array) if array.size else np.zeros(1, array.dtype)
            return torch.from_numpy(kept).to(device)

        if device not in self._uploaded:
            self._uploaded[device] = [
                {
                    **{name: upload(array) for name, array in call.arrays.items()},
                    **{
                        name: None if tables is None else tuple(upload(table) for table in tables)
                        for name, tables in call.tables.items()
                    },
                }
                for call in self._calls
            ]
        return self._uploaded[device]


class TritonKernel(_Calls):
    """The forward pass of one launch."""

    def __init__(self, launch: Launch) -> None:
        super().__init__(launch, calls_of(launch))

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._partial_words(len(self.launch.batch)) * 4

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        tables: Sequence[torch.Tensor] = (),
    ) -> None:
        import torch

        words = self._partial_words(len(self.launch.elements(q.shape[0])))
        partial = torch.empty(words, dtype=torch.float32, device=q.device)
        tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "partial": partial}
        self.run(tensors, q.device, q.shape[0], tables)

    def _partial_words(self, batch: int) -> int:
        launch = self.launch
        rows = launch.work.schedule.n_slots * batch * len(launch.heads) * launch.work.block_q
        return rows * (launch.problem.v_dim + 2)


class TritonGradient(_Calls):
    """The backward pass of one launch; deterministic, like the forward pass."""

    def __init__(self, launch: Launch) -> None:
        super().__init__(launch, gradient_calls_of(launch))

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

        words = self._partial_words(len(self.launch.elements(q.shape[0])))
        tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "d_out": d_out, "dq": dq, "dk": dk, "dv": dv}
        # Without gradients of the log-sum-exp, zeros stand for them: one kernel serves both.
        tensors["d_lse"] = torch.zeros_like(lse) if d_lse is None else d_lse
        tensors["delta"] = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
        tensors["partial"] = torch.empty(words, dtype=torch.float32, device=q.device)
        score, numbers = self.launch.score, self.launch.work.numbers
        if score is None or all(wanted is None for wanted in d_tables):
            self.run(dict(tensors), q.device, q.shape[0], tables)
            return
        places = (q.shape[0], q.shape[1], 0 if numbers is None else numbers.mask.nnz)
        sums = zero_sums(score, d_tables, places, q.device)
        self.run(dict(tensors), q.device, q.shape[0], tables, sums)
        add_sums(score, sums, d_tables)

    def _partial_words(self, batch: int) -> int:
        problem = self.launch.problem
        words = 0
        for call in self._calls:
            if call.name == "backward":
                block, pack, is_dq = (call.constants[name] for name in ("BLOCK", "PACK", "IS_DQ"))
                assert isinstance(block, int), "a block is a number of rows"
                assert isinstance(pack, int), "a pack is a number of heads"
                rows, dims = (block * pack, problem.head_dim) if is_dq else (block, problem.head_dim + problem.v_dim)
                words = max(words, int(call.numbers["n_slots"]) * int(call.numbers["n_heads"]) * rows * dims)
        return words * batch


def _fixed_by_capture(call: Call) -> tuple[object, ...]:
    """What a captured launch keeps whatever its buffers hold."""
    functions = {name: None if given is None else (given[0].source, given[1]) for name, given in call.functions.items()}
    types = [array.dtype for array in _all_arrays(call)]
    present = [name for name, given in [*call.arrays.items(), *call.tables.items()] if given is not None]
    numbers = (call.programs, call.most_programs, dict(call.numbers), dict(call.constants), options_of(call))
    return call.name, numbers, functions, present, types


def _all_arrays(call: Call) -> list[Array]:
    """Its index arrays, then its tables."""
    tables = [table for given in call.tables.values() for table in given or ()]
    return [*(array for array in call.arrays.values() if array is not None), *tables]


def _all_buffers(calls: Sequence[Call], kept: list[dict[str, Uploaded]]) -> list[torch.Tensor]:
    """What was uploaded of the arrays of some calls, in the order of `_all_arrays`."""
    found: list[torch.Tensor] = []
    for call, buffers in zip(calls, kept, strict=True):
        for name in [*call.arrays, *call.tables]:
            given = buffers[name]
            found += [each for each in (given if isinstance(given, tuple) else (given,)) if each is not None]
    return found


def _is_capturing(device: torch.device) -> bool:
    import torch

    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _strides(given: dict[str, torch.Tensor | None], parameters: list[str]) -> dict[str, int]:
    """Batch, head and row strides of the tensors, as far as the kernel takes them; 0 for those that are not there."""
    strides = {}
    for name, tensor in given.items():
        sizes = (0, 0, 0) if tensor is None else tensor.stride()[:3]
        for axis, size in zip(("batch", "head", "row"), sizes, strict=False):
            if f"{name}_{axis}" in parameters:
                strides[f"{name}_{axis}"] = size
    return strides


def _with_live(arrays: dict[str, Uploaded], live: Mapping[int, torch.Tensor]) -> dict[str, Uploaded]:
    """The arrays of a kernel with this call's tables in the places of those that are read anew."""
    kept = arrays.get("score_tables")
    if not isinstance(kept, tuple):
        return arrays
    return arrays | {"score_tables": tuple(live.get(place, table) for place, table in enumerate(kept))}


def _summed(call: Call, kernel: Any, sums: Sequence[torch.Tensor | None]) -> dict[str, object]:
    """Where gradients of tables are added up, for a kernel that takes that; it is another where none is wanted."""
    if "score_sums" not in kernel.arg_names:
        return {}
    return {"score_sums": tuple(sums)} if sums and call.sum_types else {"score_sums": None, "SCATTER": None}


def _undescribed(call: Call, given: dict[str, torch.Tensor | None]) -> dict[str, bool]:
    """What switches descriptors off where the tensors at hand are not aligned for them."""
    if not call.constants.get("DESCRIBED"):
        return {}
    names = ("k", "v", "stream_1", "stream_2")
    streamed = [tensor for name in names if (tensor := given.get(name)) is not None]
    strides = [stride * each.itemsize for each in streamed for stride in each.stride()[:3]]
    places = [*strides, *(each.data_ptr() for each in streamed)]
    return {} if all(place % ALIGNMENT_BYTES == 0 for place in places) else {"DESCRIBED": False}


def _provide_scratch(device: torch.device) -> None:
    """Lets kernels have scratch memory of torch's, in the context this is called in."""
    import torch
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class TritonBackend:
    """Triton kernels for NVIDIA and AMD GPUs."""

    name = "triton"

    def serves(self, device: Device) -> bool:
        return device.kind in ("nvidia", "amd")

    def refusal(self, template: Template, problem: Problem, device: Device) -> str | None:
        if device.kind == "nvidia" and int(device.arch.removeprefix("sm_")) < 80:
            return f"its kernels need sm_80 or newer, and {device.name} is {device.arch}"
        return None

    def config_refusal(self, template: Template, config: Config, problem: Problem, device: Device) -> str | None:
        return too_large(template, config, problem, device)

    def missing(self, device: Device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; install it with `pip install triton`"
        import torch
        from triton import knobs

        if knobs.runtime.interpret or torch.cuda.is_available():
            return None
        return f"torch {torch.__version__} sees no GPU; check the driver, or install a torch built for it"

    def toolchain(self) -> str:
        try:
            return f"triton {metadata.version('triton')}"
        except metadata.PackageNotFoundError:
            return "triton (not installed)"

    def lower(self, launch: Launch) -> TritonKernel:
        self._check(launch)
        return TritonKernel(launch)

    def lower_backward(self, launch: Launch) -> TritonGradient:
        self._check(launch)
        return TritonGradient(launch)

    def _check(self, launch: Launch) -> None:
        reason = self.config_refusal(launch.template, launch.config, launch.problem, launch.device)
        if reason is not None:
            raise CompileError(reason, launch.template.kernel_path("triton"))


@cache
def backend() -> TritonBackend:
    return TritonBackend()


_PACKAGE: Final = "sparsec_templates"


def kernel_module(template: Template) -> types.ModuleType:
    """The template's kernels, imported by their path as part of a package of all templates.

    Raises:
        BackendMissingError: Triton is not here.
    """
    if importlib.util.find_spec("triton") is None:
        raise BackendMissingError("the triton back end was asked for, and triton is not installed; pip install triton")
    root = str(template.folder.parent)
    package = sys.modules.get(_PACKAGE)
    if package is None or list(package.__path__) != [root]:
        package = types.ModuleType(_PACKAGE, "The kernels of `templates/`.")
        package.__path__ = [root]
        sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.{template.name}.kernel_triton")


def source_files(template: Template) -> tuple[Path, ...]:
    """The kernels of a template and what they import, the template's own first."""
    shared = template.folder.parent / "shared"
    return template.kernel_path("triton"), shared / "kernel_triton.py", shared / "gradient_triton.py"


def lower_source(launch: Launch, direction: Direction = "forward") -> tuple[LoweredSource, ...]:
    """Each kernel of a launch, compiled for its device without that device, for contiguous tensors.

    Raises:
        BackendMissingError: Triton is not here, or its interpreter stands in for its compiler.
        CompileError: It does not compile.
    """
    module = kernel_module(launch.template)
    from triton import knobs

    if knobs.runtime.interpret:
        raise BackendMissingError("TRITON_INTERPRET is set, which replaces the compiler; unset it to lower")
    calls = calls_of(launch) if direction == "forward" else gradient_calls_of(launch)
    return tuple(lower_call(launch, call, getattr(module, call.name)) for call in calls)
