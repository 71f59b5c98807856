"""CUDA C++ compiled by NVRTC for a device that need not be here, the cache of binaries, and what they tell.

This file decides the compiler's options and how its log and a disassembly are read. It must not know what the kernels
compute, nor how they are launched. cuda-python is imported only to compile.

A binary is keyed by its sources, options, architecture and compiler, and checked against its own digest when read.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

from sparsec import data
from sparsec.backends.cuda_calls import Program
from sparsec.device import Device
from sparsec.errors import BackendMissingError, CompileError, SparsecError

logger = logging.getLogger(__name__)

_INSTALL: Final = "pip install 'sparsec[gpu]'"
# ptxas states registers and spills in the log.
_OPTIONS: Final = ("--std=c++17", "--ptxas-options=-v")
# Warps and blocks of a multiprocessor, where they are not 64 and 32.
_MOST_RESIDENT: Final = {"sm_86": (48, 16), "sm_89": (48, 24)}
_KEPT_BYTES: Final = 1024
_SASS_KINDS: Final = (
    r"\b(LDG\.E\.128|LDG\.E\.64|LDG\.E\.U16|LDG\.E|STG\.E\.128|LDGSTS\.E\.\w+\.128|LDSM\.16\.\w+\.4|HMMA|MUFU\.EX2|"
    r"SHFL|LDL|STL)\b"
)


@dataclass(frozen=True, slots=True)
class LoweredKernel:
    """One kernel of a compiled program.

    Attributes:
        name: The kernel's name.
        arch: `sm_90`.
        registers: 32-bit registers a thread.
        spilled_bytes: Of registers that did not fit, stored and loaded a thread.
        shared_bytes: Static shared memory of a block.
    """

    name: str
    arch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int

    def warps_per_unit(self, warps_per_block: int, device: Device, shared_bytes: int) -> int:
        """Warps that fit a multiprocessor; `shared_bytes` is what a block has with what it is launched with.

        Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
        """
        # Registers come in units of 256 a warp, which each of four partitions hands out by itself.
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = device.registers_per_unit // 4 // per_warp * 4
        most_warps, most_blocks = _MOST_RESIDENT.get(device.arch, (64, 32))
        blocks = min(most_warps, by_registers) // warps_per_block
        if shared_bytes:
            # A block may have all of a multiprocessor's but the 1 KiB that the system keeps of each block.
            blocks = min(blocks, (device.shared_bytes_per_block + _KEPT_BYTES) // (shared_bytes + _KEPT_BYTES))
        return min(most_blocks, blocks) * warps_per_block


@dataclass(frozen=True)
class Lowered:
    """A program compiled for an architecture.

    Attributes:
        cubin: The binary.
        resident: Blocks that a multiprocessor is to hold of its first kernel, where the program says so.
        kernels: What is in it.
    """

    cubin: bytes = field(repr=False)
    resident: int | None
    kernels: Mapping[str, LoweredKernel]

    @cached_property
    def sass(self) -> str:
        """Its disassembly; "" where no nvdisasm is here."""
        return _disassembled(self.cubin)

    @cached_property
    def instructions(self) -> Mapping[str, Mapping[str, int]]:
        """Telling instructions of each kernel by kind, and how many there are."""
        return {name: _instructions(self.sass, name) for name in self.kernels}


def missing() -> str | None:
    """What this machine lacks to compile, in one sentence, or None."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return f"cuda-python is not installed; install it with `{_INSTALL}`"
    try:
        _version()
    except BackendMissingError as error:
        return str(error)
    return None


def toolchain() -> str:
    """The compiler and its version."""
    try:
        return "nvrtc {}.{}".format(*_version())
    except BackendMissingError:
        return "nvrtc (not installed)"


def source_files(template: str) -> tuple[Path, ...]:
    """The kernels of a template and what they include, the kernels first."""
    root = data.templates_dir()
    own = [root / template / "kernel_cuda.cu", *sorted((root / template).glob("*.cuh"))]
    return (*own, *sorted((root / "shared").glob("*.cuh")))


def options(program: Program, resident: int | None = None) -> tuple[str, ...]:
    """What the compiler is told, but for where the headers lie; of a program that was cut down to `resident` blocks."""
    defines = dict(program.defines)
    if program.resident is not None:
        defines["SX_RESIDENT"] = str(program.resident if resident is None else resident)
    return (f"--gpu-architecture={program.arch}", *_OPTIONS, *(f"-D{name}={value}" for name, value in defines.items()))


def cubin(program: Program) -> bytes:
    """The binary of a program, from the cache or the compiler.

    Raises:
        BackendMissingError: cuda-python or NVRTC is not here.
        CompileError: The compiler refused; carries the source's path and the log.
    """
    return _compiled(program)[0]


def lowered(program: Program) -> Lowered:
    """A program compiled, with what the compiler says of it, and the disassembler where it is asked.

    Raises:
        BackendMissingError: As in `cubin`.
        CompileError: As in `cubin`.
    """
    content, log = _compiled(program)
    resident = None if program.resident is None else int(log.partition("\n")[0])
    return Lowered(content, resident, _kernels(log, program.arch))


def _compiled(program: Program) -> tuple[bytes, str]:
    sources = source_files(program.template)
    generated = [part for header in program.headers for part in header]
    key = hashlib.sha256("\0".join([toolchain(), *options(program), *generated]).encode())
    for path in sources:
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = data.cache_dir() / "cuda"
    path = folder / f"{program.template}-{program.arch}-{key.hexdigest()[:24]}.cubin"
    kept = _read(path)
    if kept is not None:
        return kept
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SparsecError(
            f"compiled kernels are kept in {folder}, which cannot be made ({error.strerror}); "
            "remove what is in its place, or set SPARSEC_CACHE_DIR to another directory"
        ) from None
    with data.entry_lock(path):
        kept = _read(path)
        if kept is not None:
            return kept
        content, log = _unspilled(program, sources[0])
        data.publish(path.with_suffix(".log"), f"{hashlib.sha256(content).hexdigest()}\n{log}".encode())
        data.publish(path, content)
        return content, log


def _read(path: Path) -> tuple[bytes, str] | None:
    """A cached binary and its log; one that is not all there is compiled again, never loaded."""
    try:
        content = path.read_bytes()
        digest, _, log = path.with_suffix(".log").read_text().partition("\n")
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest() == digest:
        return content, log
    logger.warning("the cached kernel %s is damaged; it is compiled again", path)
    return None


def _unspilled(program: Program, source: Path) -> tuple[bytes, str]:
    """A program compiled for as many resident blocks as it asks for, or for as many fewer as spill no register.

    The first line of the log says how many they are.
    """
    if program.resident is None:
        return _compile(program, source, None)
    for resident in range(program.resident, 0, -1):
        content, log = _compile(program, source, resident)
        if resident == 1 or not any(kernel.spilled_bytes for kernel in _kernels(log, program.arch).values()):
            break
    return content, f"{resident}\n{log}"


def _compile(program: Program, source: Path, resident: int | None) -> tuple[bytes, str]:
    nvrtc = _nvrtc()
    told = [option.encode() for option in (*options(program, resident), f"-I{data.templates_dir()}")]
    logger.debug("compiling %s: %s", source, b" ".join(told).decode())
    names, texts = ([each[part].encode() for each in program.headers] for part in (0, 1))
    _, made = nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), len(names), texts, names)
    try:
        (status,) = nvrtc.nvrtcCompileProgram(made, len(told), told)
        log = _text(made, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{toolchain()} could not compile {source.name} for {program.arch}", source, log)
        return _text(made, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log.replace("\0", "")
    finally:
        nvrtc.nvrtcDestroyProgram(made)


def _text(made: Any, size: Any, read: Any) -> bytes:  # functions of cuda.bindings, which has no types
    _, n = size(made)
    # The bindings write into a bytes object of the right length; Python shares those of one byte.
    content = bytes(max(n, 2))
    read(made, content)
    return content


def _nvrtc() -> Any:  # a module of cuda.bindings, which has no types
    if importlib.util.find_spec("cuda") is None:
        raise BackendMissingError(f"the cuda back end was asked for, and cuda-python is not installed; {_INSTALL}")
    return importlib.import_module("cuda.bindings.nvrtc")


@cache
def _version() -> tuple[int, int]:
    nvrtc = _nvrtc()
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        # The bindings look for the library when it is first called.
        raise BackendMissingError(
            f"the cuda back end compiles with NVRTC, and its library is not found ({error}); "
            "pip install nvidia-cuda-nvrtc"
        ) from error
    return int(major), int(minor)


def _kernels(log: str, arch: str) -> dict[str, LoweredKernel]:
    found = {}
    for block in log.split("Compiling entry function '")[1:]:
        name = block.partition("'")[0]
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", block))
        registers = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        assert registers is not None, f"the compiler's log states no registers of {name}"
        found[name] = LoweredKernel(name, arch, int(registers[1]), spilled, int(shared[1]) if shared else 0)
    return found


@cache
def disassembler() -> str | None:
    """An `nvdisasm`: of its own wheel, of Triton's, or on the PATH."""
    for package, inside in (("nvidia", "cu13/bin/nvdisasm"), ("triton", "backends/nvidia/bin/nvdisasm")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(folder) / inside).is_file():
                return str(Path(folder) / inside)
    return shutil.which("nvdisasm")


def _disassembled(content: bytes) -> str:
    tool = disassembler()
    if tool is None:
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=False)
    return done.stdout


def _instructions(sass: str, kernel: str) -> dict[str, int]:
    counted: dict[str, int] = {}
    _, _, after = sass.partition(f"//--------------------- .text.{kernel} ")
    for kind in re.findall(_SASS_KINDS, after.partition("//---------------------")[0]):
        counted[kind] = counted.get(kind, 0) + 1
    return counted
