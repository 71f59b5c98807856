"""The Triton back end: the templates' Triton kernels, on NVIDIA and AMD GPUs.

This file decides how a launch becomes calls of Triton kernels: the arrays they walk, the constants they are specialised
on, and how many warps, stages and keys a step fit the device. Kernels run on the current stream, through Triton's
interpreter where `TRITON_INTERPRET=1`, or are only compiled for a device that is not here (`lower_source`). It must not
know how work is chosen. Triton and torch are imported only to lower.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from sparsec.backends.base import Launch, Problem
from sparsec.device import Device
from sparsec.errors import BackendMissingError, CompileError
from sparsec.layout import BlockTiles
from sparsec.template import Config, Template

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

_LOG2_E: Final = 1.4426950408889634
_POINTER_TYPES: Final = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16", "int32": "*i32", "int64": "*i64"}
# Rows a merge program joins: few, so that 256 columns of fp32 stay in registers.
_MERGE_ROWS: Final = 16
# Of the accumulator, so many fp32 a thread at most: the scores, weights and addresses need most of 255 registers.
_ACCUMULATOR_PER_THREAD: Final = 64
# The row kernel: without a limit, the assembler spills a few registers to reach the next occupancy.
_ROW_REGISTERS: Final = 168
# Scores a thread holds at most, likewise.
_SCORES_PER_THREAD: Final = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """What a launch's kernel is specialised on beyond its problem; follows from launch and device alone.

    Attributes:
        dims: `(head_dim, head_width, v_dim, v_width)`; a width is a power of two, at least 16, that holds a dimension.
        pack: Query heads packed into the query tile.
        step_kv: Keys that go to the matrix units at a time.
        chunk: Dimensions of q and k that go at a time; head_width on matrix units.
        keys: Keys a row that go to the vector units at a time.
        num_warps: At least what the configuration says; more where the accumulator would not fit the registers.
        num_stages: At most what the configuration says; fewer where the stages would not fit the shared memory.
        shared_bytes: What the kernel should ask for, at most.
    """

    dims: tuple[int, int, int, int]
    pack: int
    step_kv: int
    chunk: int
    keys: int
    num_warps: int
    num_stages: int
    shared_bytes: int


def shape_of(launch: Launch) -> Shape:
    """The shape of a launch's kernel."""
    config, problem = launch.config, launch.problem
    pack = _packed_heads(launch)
    dims = (problem.head_dim, _width(problem.head_dim), problem.v_dim, _width(problem.v_dim))
    rows = config["block_q"] * pack
    warp = 64 if launch.device.kind == "amd" else 32
    warps = config["num_warps"]
    if launch.template.layout != "rows":
        while rows * dims[3] > _ACCUMULATOR_PER_THREAD * warp * warps and warps < 8:
            warps *= 2
    threads = warp * warps
    row_bytes = max(dims[1], dims[3]) * problem.itemsize
    keys = max(1, config.get("fetch", 64) * threads // (rows * row_bytes))
    if launch.template.layout == "rows":
        return Shape(dims, pack, 0, dims[1], keys, warps, 1, 0)
    step = min(config["block_kv"], max(16, _SCORES_PER_THREAD * threads // rows))
    stages, chunk = config["num_stages"], dims[1]
    if launch.device.kind == "nvidia" and problem.dtype == "fp32":
        # No matrix units: operands are held by threads, so they are cut small, and nothing is staged.
        step, stages, chunk = 16, 1, 16
    device, itemsize = launch.device, problem.itemsize

    def needed() -> int:
        return shared_bytes(device, rows, step, dims, stages, itemsize)

    while needed() > device.shared_bytes_per_block and (step > 16 or stages > 1):
        # Two tiles in flight hide most of what can be hidden; smaller steps than that cost less.
        if stages > 2 or step == 16:
            stages -= 1
        else:
            step //= 2
    return Shape(dims, pack, step, chunk, keys, warps, stages, needed())


def shared_bytes(
    device: Device, rows: int, step_kv: int, dims: tuple[int, int, int, int], stages: int, itemsize: int
) -> int:
    """Shared memory of a tile kernel, at most.

    NVIDIA: the queries stay there, K and V have a buffer for every stage but one, and weights pass through; in fp32, V
    and chunks of the others pass through. AMD: the queries pass through before the first tile. The tests hold this
    against what Triton allocates.
    """
    queries = rows * dims[1] * itemsize
    tiles = max(stages - 1, 1) * step_kv * (dims[1] + dims[3]) * itemsize
    passing = rows * (step_kv + 8) * 4 + 2048
    if device.kind == "amd":
        return max(queries, tiles + passing)
    if itemsize == 4:
        return step_kv * dims[3] * itemsize + passing + 16384
    return queries + tiles + passing


def _width(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _packed_heads(launch: Launch) -> int:
    """Heads that go together: at most what the configuration says, and whole runs of heads of one group."""
    group = launch.problem.q_heads // launch.problem.kv_heads
    pack = launch.config.get("pack_gqa", 1)
    while pack > 1:
        first = launch.heads[::pack]
        runs = tuple(head + i for head in first for i in range(pack))
        if group % pack == 0 and runs == launch.heads and all(head % pack == 0 for head in first):
            return pack
        pack //= 2
    return 1


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel of a launch: its arguments but for tensors and strides.

    Attributes:
        name: The kernel's name in the template's file.
        programs: Its grid for one copy (a batch element and a pack of heads).
        arrays: Index arrays by parameter.
        numbers: Integers and floats by parameter.
        constants: `tl.constexpr` parameters.
        num_warps: Warps a program.
        num_stages: Depth of software pipelining.
        max_registers: 32-bit registers a thread may have; None lets the compiler choose.
    """

    name: str
    programs: int
    arrays: Mapping[str, Array | None]
    numbers: Mapping[str, int | float]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def calls_of(launch: Launch) -> tuple[Call, ...]:
    """The kernels of a launch, in the order they run."""
    shape, work, problem = shape_of(launch), launch.work, launch.problem
    schedule, ordering = work.schedule, work.ordering
    group = problem.q_heads // problem.kv_heads
    heads = np.array(launch.heads[:: shape.pack], np.int32)
    # Heads of one group share their keys: they walk an item side by side.
    abreast = max(1, math.gcd(len(heads), group // shape.pack))
    common_arrays = {"heads": heads, "q_order": ordering.q_order}
    common_numbers = {"n_slots": schedule.n_slots, "n_heads": len(heads), "q_len": work.bound.q_len}
    arrays, constants = _LISTS[launch.template.layout](launch, shape)
    numbers: dict[str, int | float] = {
        "n_items": schedule.n_items,
        "abreast": abreast,
        "kv_len": work.bound.kv_len,
        # A scale of 0 must not turn -inf into a NaN.
        "scale": max(abs(launch.scale), 1e-30) * _LOG2_E,
    }
    if launch.template.layout == "rows":
        numbers["n_offsets"] = len(work.rows.start) if work.rows is not None and work.rows.form == "offsets" else 0
    forward = Call(
        name="forward",
        programs=schedule.n_items,
        arrays={
            **common_arrays,
            "kv_order": ordering.kv_order,
            "item_unit": schedule.unit,
            "item_slot": schedule.slot,
            **arrays,
        },
        numbers={**common_numbers, **numbers},
        constants={
            "GROUP": group,
            "NEGATE": launch.scale < 0,
            "BLOCK_Q": work.block_q,
            "DIMS": shape.dims,
            **constants,
        },
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        max_registers=_ROW_REGISTERS if launch.template.layout == "rows" and launch.device.kind == "nvidia" else None,
    )
    if not len(schedule.merge_unit):
        return (forward,)
    rows = min(_MERGE_ROWS, work.block_q * shape.pack)
    merge = Call(
        name="merge",
        programs=len(schedule.merge_unit) * (work.block_q * shape.pack // rows),
        arrays={**common_arrays, "merge_unit": schedule.merge_unit, "merge_indptr": schedule.merge_indptr},
        numbers={**common_numbers, "n_merges": len(schedule.merge_unit)},
        constants={
            "BLOCK_Q": work.block_q,
            "PACK": shape.pack,
            "ROWS": rows,
            "V_DIM": shape.dims[2],
            "V_WIDTH": shape.dims[3],
        },
        num_warps=4,
        num_stages=1,
    )
    return forward, merge


Lists = tuple[dict[str, Array | None], dict[str, object]]


def _row_lists(launch: Launch, shape: Shape) -> Lists:
    rows, schedule = launch.work.rows, launch.work.schedule
    assert rows is not None, "row_traversal walks rows"
    is_edges = rows.form == "edges"
    arrays: dict[str, Array | None] = {
        "item_start": schedule.start,
        "item_stop": schedule.stop,
        "row_indptr": None if rows.form == "offsets" else rows.indptr,
        "row_first": rows.columns if is_edges else rows.start,
        "row_last": None if is_edges else rows.stop,
        "row_step": None if is_edges else rows.step,
    }
    return arrays, {"KEYS": shape.keys, "FORM": rows.form}


def _tile_lists(launch: Launch, shape: Shape) -> Lists:
    tiles, schedule = launch.work.tiles, launch.work.schedule
    assert tiles is not None, "block_sparse walks tiles"
    arrays = _tile_arrays(tiles, schedule.start, schedule.stop)
    return arrays, {"PACK": shape.pack, "BLOCK_KV": tiles.tile_map.block_kv, **_steps(shape)}


def _hybrid_lists(launch: Launch, shape: Shape) -> Lists:
    work = launch.work
    tiles, gathered, rows, items = work.tiles, work.gathered, work.rows, work.items
    assert tiles is not None, "hybrid walks tiles"
    assert gathered is not None, "hybrid walks gathered columns"
    assert rows is not None, "hybrid walks single edges"
    assert items is not None, "a hybrid's items name stretches of three lists"
    arrays: dict[str, Array | None] = {
        **_tile_arrays(tiles, items.tile_start, items.tile_stop),
        "item_column": items.column_start,
        "item_column_stop": items.column_stop,
        "item_edge": items.edge_start,
        "item_edge_stop": items.edge_stop,
        "gathered_columns": gathered.columns,
        "gathered_lanes": gathered.lanes.view(np.int64),
        "row_indptr": rows.indptr,
        "row_first": rows.columns,
    }
    return arrays, {"BLOCK_KV": tiles.tile_map.block_kv, **_steps(shape), "KEYS": shape.keys}


def _steps(shape: Shape) -> dict[str, object]:
    return {"STEP_KV": shape.step_kv, "CHUNK": shape.chunk}


_LISTS: Final = {"rows": _row_lists, "tiles": _tile_lists, "hybrid": _hybrid_lists}


def _tile_arrays(tiles: BlockTiles, start: Array, stop: Array) -> dict[str, Array | None]:
    """Tiles in the order the kernels walk them: of each item the full ones, then the partial ones.

    A full tile that the end of the key sequence cuts off becomes a partial one, so that no full tile needs a bound.
    """
    tile_map = tiles.tile_map
    pattern = tiles.patterns.index.copy()
    masks = tiles.row_masks().view(np.int64)
    ragged = tile_map.shape[1] % tile_map.block_kv
    if ragged:
        is_cut = tile_map.is_full & (tile_map.indices == tile_map.shape[1] // tile_map.block_kv)
        pattern[is_cut] = len(masks)
        keys = np.arange(masks.shape[2] * 64) < ragged
        words = np.packbits(keys, bitorder="little").view("<i8")
        masks = np.concatenate([masks, np.broadcast_to(words, (1, *masks.shape[1:]))])
    is_partial = pattern >= 0
    # Items are disjoint stretches that cover all tiles: sorting by (first tile of the item, partial) stays inside them.
    first = np.sort(start[start < stop])
    item = np.searchsorted(first, np.arange(tile_map.n_tiles), side="right")
    order = np.lexsort((is_partial, item))
    before = np.concatenate(([0], np.cumsum(is_partial)))
    n_partial = before[stop] - before[start]
    return {
        "item_tile": start,
        "item_full": (stop - start - n_partial).astype(np.int32),
        "item_partial": n_partial.astype(np.int32),
        "tile_column": tile_map.indices[order],
        "tile_pattern": pattern[order],
        "patterns": masks,
    }


class TritonKernel:
    """The kernels of one launch bound to its index arrays, which are uploaded once a device."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._calls = calls_of(launch)
        self._module = kernel_module(launch.template)
        self._pack = shape_of(launch).pack
        self._uploaded: dict[torch.device, list[dict[str, torch.Tensor | None]]] = {}
        self._batches: dict[tuple[torch.device, int], torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        index = sum(array.nbytes for call in self._calls for array in call.arrays.values() if array is not None)
        return index + self._partial_words(len(self.launch.batch)) * 4

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        import torch

        batches = self._batch_elements(q)
        copies = len(batches) * len(self.launch.heads) // self._pack
        partial = torch.empty(self._partial_words(len(batches)), dtype=torch.float32, device=q.device)
        tensors: dict[str, Any] = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "partial": partial}
        tensors |= {"batches": batches, **_strides(q, k, v, out, lse)}
        with _on(q.device):
            for call, arrays in zip(self._calls, self._arrays_on(q.device), strict=True):
                kernel = getattr(self._module, call.name)
                given = {name: tensors[name] for name in kernel.arg_names if name in tensors}
                kernel[(call.programs * copies,)](
                    **given,
                    **arrays,
                    **call.numbers,
                    **call.constants,
                    **_options(call),
                )

    def source(self) -> dict[str, str]:
        return {f"{path.parent.name}/{path.name}": path.read_text() for path in source_files(self.launch.template)}

    def _partial_words(self, batch: int) -> int:
        launch = self.launch
        rows = launch.work.schedule.n_slots * batch * len(launch.heads) * launch.work.block_q
        return rows * (launch.problem.v_dim + 2)

    def _batch_elements(self, q: torch.Tensor) -> torch.Tensor:
        import torch

        key = (q.device, q.shape[0])
        if key not in self._batches:
            elements = self.launch.elements(q.shape[0])
            self._batches[key] = torch.tensor(elements, dtype=torch.int32, device=q.device)
        return self._batches[key]

    def _arrays_on(self, device: torch.device) -> list[dict[str, torch.Tensor | None]]:
        import torch

        def upload(array: Array | None) -> torch.Tensor | None:
            if array is None:
                return None
            # A pointer must point somewhere, even where nothing is read.
            kept = np.ascontiguousarray(array) if array.size else np.zeros(1, array.dtype)
            return torch.from_numpy(kept).to(device)

        if device not in self._uploaded:
            self._uploaded[device] = [
                {name: upload(array) for name, array in call.arrays.items()} for call in self._calls
            ]
        return self._uploaded[device]


def _options(call: Call) -> dict[str, Any]:  # what Triton's compiler takes
    # Fused multiply-adds are stated: Triton's default for them is about to change.
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages, "enable_fp_fusion": True}
    return options if call.max_registers is None else options | {"maxnreg": call.max_registers}


def _strides(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
) -> dict[str, int]:
    strides = {}
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        for axis, stride in zip(("batch", "head", "row"), tensor.stride(), strict=False):
            strides[f"{name}_{axis}"] = stride
    strides["lse_batch"], strides["lse_head"] = (0, 0) if lse is None else lse.stride()[:2]
    return strides


def _on(device: torch.device) -> Any:  # a context manager of torch's or contextlib's
    import contextlib

    import torch

    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class TritonBackend:
    """Triton kernels for NVIDIA and AMD GPUs."""

    name = "triton"

    def refusal(self, template: Template, problem: Problem, device: Device) -> str | None:
        if device.kind == "cpu":
            return "it serves GPUs, and the device is a processor"
        if device.kind == "nvidia" and int(device.arch.removeprefix("sm_")) < 80:
            return f"its kernels need sm_80 or newer, and {device.name} is {device.arch}"
        return None

    def config_refusal(self, template: Template, config: Config, problem: Problem, device: Device) -> str | None:
        """Why no kernel of this configuration fits the device's shared memory, in one sentence, or None."""
        if template.layout == "rows":
            return None
        dims = (problem.head_dim, _width(problem.head_dim), problem.v_dim, _width(problem.v_dim))
        least = shared_bytes(device, config["block_q"], 16, dims, 1, problem.itemsize)
        if least > device.shared_bytes_per_block:
            return (
                f"{config} needs at least {least / 1024:.0f} KiB of shared memory, "
                f"and {device.name} has {device.shared_bytes_per_block / 1024:.0f} KiB a block"
            )
        return None

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
        reason = self.config_refusal(launch.template, launch.config, launch.problem, launch.device)
        if reason is not None:
            raise CompileError(reason, launch.template.kernel_path("triton"))
        return TritonKernel(launch)


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
    return template.kernel_path("triton"), template.folder.parent / "shared" / "kernel_triton.py"


@dataclass(frozen=True, slots=True)
class LoweredSource:
    """One kernel compiled for a device that need not be here.

    Attributes:
        name: The kernel's name.
        target: `sm_90`, `gfx942`.
        texts: By stage: `ttgir`, then `ptx` and (where Triton ships a disassembler) `sass`, or `amdgcn`.
        registers: 32-bit registers a thread.
        spilled_bytes: Of local memory a thread: registers that did not fit.
        shared_bytes: Shared memory (LDS) a block asks for.
        instructions: The matrix instructions of the binary by kind, and how many there are.
    """

    name: str
    target: str
    texts: Mapping[str, str] = field(repr=False)
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: Mapping[str, int]


def lower_source(launch: Launch) -> tuple[LoweredSource, ...]:
    """Each kernel of a launch, compiled for its device without that device, for contiguous tensors.

    Raises:
        BackendMissingError: Triton is not here.
        CompileError: It does not compile.
    """
    module = kernel_module(launch.template)
    from triton import knobs

    if knobs.runtime.interpret:
        raise BackendMissingError("TRITON_INTERPRET is set, which replaces the compiler; unset it to lower")
    return tuple(_lower_call(launch, call, getattr(module, call.name)) for call in calls_of(launch))


def _lower_call(launch: Launch, call: Call, kernel: Any) -> LoweredSource:  # a triton.JITFunction
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    device = launch.device
    is_nvidia = device.kind == "nvidia"
    target = GPUTarget("cuda", int(device.arch[3:]), 32) if is_nvidia else GPUTarget("hip", device.arch, 64)
    signature, constants, attributes = _signature(launch, call, kernel)
    try:
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=target, options=_options(call))
    except Exception as error:  # Triton raises its own errors, MLIR's RuntimeError and ptxas failures alike
        raise CompileError(
            f"{launch.template.name} ({call.name}, {launch.config}) does not compile for {device.name}: {error}",
            launch.template.kernel_path("triton"),
        ) from error
    shared = int(compiled.metadata.shared)
    texts = {stage: str(compiled.asm[stage]) for stage in ("ttgir", "ptx", "amdgcn") if stage in compiled.asm}
    if not is_nvidia:
        registers, spilled = _amd_usage(texts["amdgcn"])
        counted = _count(r"\b(v_mfma_\w+?)_\d+x\d+x\d+", texts["amdgcn"])
        return LoweredSource(call.name, device.arch, texts, registers, spilled, shared, counted)
    usage, sass = _nvidia_tool("cuobjdump", "-res-usage", compiled.asm["cubin"]), ""
    sass = _nvidia_tool("nvdisasm", "-c", compiled.asm["cubin"])
    texts["sass"] = sass
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    registers, spilled = (int(found[1]), int(found[2])) if found else (-1, -1)
    counted = _count(r"\b(HGMMA|HMMA|UTC\w*MMA|LDGSTS|UTMALDG|FFMA)\b", sass)
    return LoweredSource(call.name, device.arch, texts, registers, spilled, shared, counted)


def _signature(
    launch: Launch, call: Call, kernel: Any
) -> tuple[dict[str, str], dict[str, object], dict[tuple[int, ...], list[list[object]]]]:
    """Types, constants and divisibility of a kernel's parameters, as the JIT would find them on a call."""
    problem = launch.problem
    tensor_type = _POINTER_TYPES[problem.dtype]
    pointers = {"q": tensor_type, "k": tensor_type, "v": tensor_type, "lse": "*fp32", "partial": "*fp32"}
    pointers |= {"out": "*fp32" if launch.is_partial else tensor_type, "batches": "*i32"}
    strides = {"lse_head": problem.q_len, "lse_batch": problem.q_len * problem.q_heads}
    for name, heads, length, dim in (
        ("q", problem.q_heads, problem.q_len, problem.head_dim),
        ("k", problem.kv_heads, problem.kv_len, problem.head_dim),
        ("v", problem.kv_heads, problem.kv_len, problem.v_dim),
        ("out", problem.q_heads, problem.q_len, problem.v_dim),
    ):
        strides |= {f"{name}_row": dim, f"{name}_head": dim * length, f"{name}_batch": dim * length * heads}
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        array = call.arrays.get(name)
        value = call.numbers.get(name, strides.get(name))
        if name in call.constants or (name in call.arrays and array is None):
            signature[name] = "constexpr"
            constants[name] = call.constants.get(name)
        elif name in pointers or array is not None:
            signature[name] = pointers[name] if array is None else _POINTER_TYPES[str(array.dtype)]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            assert value is not None, f"{call.name} has a parameter {name} that nothing fills"
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _nvidia_tool(tool: str, option: str, cubin: bytes) -> str:
    """What a disassembler of Triton's wheel says of a binary; "" where the wheel has none."""
    from triton import knobs

    command = getattr(knobs.nvidia, tool, None)
    if command is None:
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([command.path, option, file.name], capture_output=True, text=True, check=False)
    return done.stdout


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers a thread and its bytes of scratch memory, from the metadata at the end of the assembly."""

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    return value("vgpr_count"), value("private_segment_fixed_size")


def _count(pattern: str, text: str) -> dict[str, int]:
    counted: dict[str, int] = {}
    for kind in re.findall(pattern, text):
        counted[kind] = counted.get(kind, 0) + 1
    return counted
