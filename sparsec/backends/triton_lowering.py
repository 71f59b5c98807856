"""Triton kernels compiled for a device that need not be here, and what the binaries say of themselves.

This file decides how types, constants and alignment are stated without tensors, and which tools read the result. It
must not know what the kernels compute.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sparsec.backends.base import Launch
from sparsec.backends.triton_calls import Call, options_of
from sparsec.errors import CompileError

_TYPES: Final = {
    "fp32": "*fp32",
    "fp16": "*fp16",
    "bf16": "*bf16",
    "float32": "*fp32",
    "int32": "*i32",
    "int64": "*i64",
    "uint8": "*u8",
}
# fp32 whatever the dtype of the launch.
_ALWAYS_FP32: Final = frozenset({"lse", "d_lse", "delta", "partial", "dk", "dv"})


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


def lower_call(launch: Launch, call: Call, kernel: Any) -> LoweredSource:  # a triton.JITFunction
    """One kernel of a launch, compiled for its device, for contiguous tensors.

    Raises:
        CompileError: It does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    device = launch.device
    is_nvidia = device.kind == "nvidia"
    target = GPUTarget("cuda", int(device.arch[3:]), 32) if is_nvidia else GPUTarget("hip", device.arch, 64)
    signature, constants, attributes = _signature(launch, call, kernel)
    try:
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=target, options=options_of(call))
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
) -> tuple[dict[str, str | tuple[str, ...]], dict[str, object], dict[tuple[int, ...], list[list[object]]]]:
    """Types, constants and divisibility of a kernel's parameters, as the JIT would find them on a call."""
    strides = _strides(launch, call)
    signature: dict[str, str | tuple[str, ...]] = {}
    constants: dict[str, object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        given = (call.tensors, call.arrays, call.functions, call.tables)
        is_absent = any(each.get(name, "") is None for each in given)
        array, value = call.arrays.get(name), call.numbers.get(name, strides.get(name))
        printed, tables = call.functions.get(name), call.tables.get(name)
        if name in call.constants or is_absent:
            signature[name] = "constexpr"
            constants[name] = call.constants.get(name)
        elif printed is not None:
            signature[name] = "constexpr"
            constants[name] = printed[0].function(printed[1])
        elif name == "score_sums":
            signature[name] = tuple(_TYPES[each] for each in call.sum_types) or "constexpr"
            if call.sum_types:
                attributes.update({(index, number): [["tt.divisibility", 16]] for number in range(len(call.sum_types))})
            else:
                constants[name] = None
        elif tables is not None:
            signature[name] = tuple(_TYPES[str(table.dtype)] for table in tables)
            for number in range(len(tables)):
                attributes[(index, number)] = [["tt.divisibility", 16]]
        elif name == "batches" or name in call.tensors or array is not None:
            signature[name] = _pointer_type(launch, call.tensors.get(name), array)
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            assert value is not None, f"{call.name} has a parameter {name} that nothing fills"
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _pointer_type(launch: Launch, tensor: str | None, array: Any) -> str:  # a numpy array or None
    if array is not None:
        return _TYPES[str(array.dtype)]
    if tensor is None:
        return "*i32"
    is_fp32 = tensor in _ALWAYS_FP32 or (launch.is_partial and tensor in ("out", "dq"))
    return _TYPES["fp32" if is_fp32 else launch.problem.dtype]


def _strides(launch: Launch, call: Call) -> dict[str, int]:
    problem = launch.problem
    q_side, kv_side = (problem.q_heads, problem.q_len), (problem.kv_heads, problem.kv_len)
    shapes = {
        **dict.fromkeys(("q", "dq"), (*q_side, problem.head_dim)),
        **dict.fromkeys(("out", "d_out"), (*q_side, problem.v_dim)),
        **dict.fromkeys(("k", "dk"), (*kv_side, problem.head_dim)),
        **dict.fromkeys(("v", "dv"), (*kv_side, problem.v_dim)),
        **dict.fromkeys(("lse", "d_lse", "delta"), (*q_side, 1)),
    }
    strides = {}
    for parameter, tensor in call.tensors.items():
        heads, length, dim = shapes.get(tensor or "", (0, 0, 0))
        strides[f"{parameter}_row"] = dim
        strides[f"{parameter}_head"] = dim * length
        strides[f"{parameter}_batch"] = dim * length * heads
    return strides


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
